// temporal_conv over columns (columns.inl), for blocks of few outputs (bo < 4) and kernels with taps: there an x vector serves one
// multiply-add or two, and a load that splits a cache line costs as much as both. Wider blocks amortise it and do better on
// plain pixels (temporal_conv.inl), whose packing is a mere copy.
//
// A task is one column: pack its input with the halo, then let every block row sweep it. A row of a panel holds `phases` planes,
// as in temporal_conv.inl: for any stride and dilation a tap is one fixed offset.

constexpr int64_t panel_budget = 640 * 1024;  // of a column: it stays in L2, with room for what streams past it

// The columns of a forward pass or of a dW.
struct ColumnPlan {
  Strips strips;
  int64_t phases, padding, plane_frames, plane, ld;  // plane, ld: elements

  template <class S>
  static ColumnPlan make(const TemporalShape& s, const Pattern& p, int64_t workers) {
    ColumnPlan r;
    const int64_t reach = (p.K - 1) * s.dilation, halo = reach / s.stride;
    r.phases = s.stride;
    r.padding = reach / 2;
    const int64_t most = panel_budget / (max64(p.I, 1) * r.phases * VECTOR_BYTES) - halo;
    r.strips = Strips::make(s.N, s.T_out, s.V, lanes<S>, max64(most, 8), 1, halo, work_of(p) + packing * (double)p.I, packing * (double)p.I,
                            workers);
    r.set_frames<S>(r.strips.frames + halo);
    return r;
  }
  template <class S>
  void set_frames(int64_t count) {
    plane_frames = count;
    plane = count * lanes<S>;
    ld = (phases * count | 1) * lanes<S>;  // odd: rows a power of two apart would share the sets of the cache
  }
  static constexpr double packing = 4;  // cycles to pack a vector, in multiply-adds
  static double work_of(const Pattern& p) { return (double)(p.blocks * p.bi * p.bo) + packing * (double)p.O; }

  // Offset of every entry; the ragged edge's entries, whose weights are 0, read row I, which is all zeros.
  void offsets(const TemporalShape& s, const Pattern& p, int64_t lanes, int32_t* offset) const {
    for (int64_t b = 0; b < p.blocks; b++) {
      const int64_t shift = p.tap[b] * s.dilation, at = shift % s.stride * plane + shift / s.stride * lanes;
      for (int64_t j = 0; j < p.bi; j++) *offset++ = (int32_t)(min64(p.input[b] * p.bi + j, p.I) * ld + at);
    }
  }
  int64_t panel_size(const Pattern& p) const { return (p.I + 1) * ld; }
};

template <class S, class A>
void pack_column_panel(const ColumnPlan& plan, const TemporalShape& s, const Pattern& p, const View<const A>& x,
                const Column<S>& column, S* panel) {
  for (int64_t i = 0; i < p.I; i++)
    for (int64_t q = 0; q < plan.phases; q++)
      pack_column(x, column, i, s.T, s.stride, q - plan.padding, s.stride, plan.plane_frames, panel + i * plan.ld + q * plan.plane);
  std::memset(panel + p.I * plan.ld, 0, plan.ld * sizeof(S));
}

// Frames that all rows sweep before the next ones: one register tile, so that rows find lines of the panel in L1.
INLINE int64_t column_sweep(int64_t frames) { return max64(1, ceil_div(frames, max64(1, ceil_div(frames, frame_tile<1>)))); }

// One block row over frames [at, at + frames) of a column; its first output is channel c.
template <class S, class A>
INLINE void gather_column(const S* panel, Entries<S> e, int64_t rows, const S* bias, const ColumnOutput<S, A>& out, int64_t c, int64_t at,
                          int64_t frames) {
  row_pieces(rows, [&](auto r, int64_t o) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value;
    const Entries<S> piece{e.offset, e.weight + o, e.n, e.bo};
    even_pieces<frame_tile<R>>(frames, [&](auto n, int64_t j) __attribute__((always_inline)) {
      gather_tile<S, R, decltype(n)::value>(
          panel + (at + j) * lanes<S>, piece,
          [&](int k, int) __attribute__((always_inline)) { return bias ? splat<S>(bias[o + k]) : Vec<S>{}; },
          [&](int k, int i, Vec<S> sum) __attribute__((always_inline)) { out.put(c + o + k, at + j + i, sum); });
    });
  });
}

template <class S, class A>
void column_forward(const TemporalShape& s, const Pattern& p, View<const A> x, const S* values, const S* bias, A* y,
                    int threads) {
  const auto plan = ColumnPlan::make<S>(s, p, threads);
  call_scratch.reserve(Scratch::room<int32_t>(p.blocks * p.bi));
  int32_t* offset = call_scratch.take<int32_t>(p.blocks * p.bi);
  plan.offsets(s, p, lanes<S>, offset);
  const int64_t sweep = column_sweep(plan.strips.frames);
  parallel(plan.strips.columns, threads, [&](int64_t c) {
    task_scratch.reserve(Scratch::room<S>(plan.panel_size(p)));
    S* panel = task_scratch.take<S>(plan.panel_size(p));
    const Column<S> column(plan.strips, c);
    pack_column_panel(plan, s, p, x, column, panel);
    const ColumnOutput<S, A> out(column, y, p.O, s.T_out, s.V, plan.strips.frames);
    for (int64_t at = 0; at < plan.strips.frames; at += sweep)
      for (int64_t g = 0; g < p.rows; g++)
        gather_column(panel, block_row(p, g, offset, values), live_rows(p, g), bias ? bias + g * p.bo : nullptr, out, g * p.bo, at,
                      min64(sweep, plan.strips.frames - at));
  });
}

// Strips of input frames; output frame (a strip's first input frame) / stride is their first output frame.
template <class S, class A>
void column_dx(const TemporalShape& s, const Pattern& p, View<const A> dy, const S* values, A* dx, int threads) {
  // Row frame j of phase q is input frame u = j * stride + q of a strip; tap k reads output frame (u + padding - k * dilation) / stride.
  const int64_t padding = (p.K - 1) / 2 * s.dilation, lead = padding / s.stride;
  const int64_t most = (panel_budget / (p.O * VECTOR_BYTES) - 2 * lead - 1) * s.stride;
  const auto strips = Strips::make(s.N, s.T, s.V, lanes<S>, max64(most, 8), s.stride, 2 * padding,
                                   ColumnPlan::work_of(p) / (double)s.stride, ColumnPlan::packing * (double)p.O, threads);
  const int64_t frames = ceil_div(strips.frames, s.stride);
  const int64_t held = frames + 2 * lead + 1, ld = (held | 1) * lanes<S>;
  auto shift = [&](int64_t k, int64_t q) {
    const int64_t at = q + padding - k * s.dilation;
    return at % s.stride ? int64_t(-1) : (at / s.stride + lead) * lanes<S>;
  };
  call_scratch.reserve(TransposedEntries<S>::room(p, s.stride));
  const TransposedEntries<S> entries(p, s.stride, values, ld, shift, call_scratch);
  parallel(strips.columns, threads, [&](int64_t c) {
    task_scratch.reserve(Scratch::room<S>(p.O * ld));
    S* panel = task_scratch.take<S>(p.O * ld);
    const Column<S> column(strips, c);
    Strips out_strips = strips;
    out_strips.frames = strips.frames / s.stride;
    const Column<S> source(out_strips, c);  // the same lanes, in output frames
    for (int64_t o = 0; o < p.O; o++) pack_column(dy, source, o, s.T_out, 1, -lead, 1, held, panel + o * ld);
    ColumnOutput<S, A> out(column, dx, p.I, s.T, s.V, strips.frames);
    const int64_t sweep = column_sweep(frames);
    for (int64_t begin = 0; begin < frames; begin += sweep)
      for (int64_t r = 0; r < p.I * s.stride; r++) {
        const int32_t* at = entries.ptr + r;
        const Entries<S> e{entries.offset + at[0], entries.weight + at[0], at[1] - at[0], 1};
        even_pieces<frame_tile<1>>(min64(sweep, frames - begin), [&](auto n, int64_t piece) __attribute__((always_inline)) {
          const int64_t j = begin + piece;
          gather_tile<S, 1, decltype(n)::value>(
              panel + j * lanes<S>, e, [&](int, int) __attribute__((always_inline)) { return Vec<S>{}; },
              [&](int, int f, Vec<S> sum) __attribute__((always_inline)) { out.put(r / s.stride, (j + f) * s.stride + r % s.stride, sum); });
        });
      }
  });
}
