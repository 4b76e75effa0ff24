// temporal_conv: Y[n,o,t,v] = b[o] + sum over live (o,i,k) of W[o,i,k] X[n, i, t*stride + (k - (K-1)/2)*dilation, v].
//
// x (N, I, T, V) any strides, y (N, O, T_out, V) contiguous, values (blocks, bi, bo). Reference: kernels/reference.py.
// A task is one tile of output frames of one sample: pack the tile's input with its halo, then let every block row
// sweep it. x, dy, y, dx are stored as A, a panel as P: S, or what paired.inl multiplies. dX scatters with the same offsets;
// frames in the halo are computed twice, so that tiles share nothing.
// Blocks of few outputs take the columns of temporal_columns.inl instead.

// dX gathers over columns everywhere; the forward gains only where a column is packed with masked loads; dW does not gain.
INLINE bool by_columns(const Pattern& p) { return p.bo < 4 && p.K > 1; }

struct TemporalPlan {
  int64_t phases, frames, plane_frames, tiles, plane, ld, padding;
  LiveInputs inputs;

  template <class S>
  static TemporalPlan make(const TemporalShape& s, const Pattern& p, int64_t threads, int64_t tasks) {
    TemporalPlan r;
    r.inputs = LiveInputs(p);
    r.phases = p.K == 1 ? 1 : s.stride;
    r.padding = (p.K - 1) / 2 * s.dilation;
    r.frames = tile_frames(s.T_out, max64(r.inputs.count(), p.O) * r.phases, s.V, sizeof(S), s.N, threads, tasks);
    r.tiles = ceil_div(s.T_out, r.frames);
    r.set_frames<S>(r.frames, s, p);
    return r;
  }
  template <class S>
  void set_frames(int64_t count, const TemporalShape& s, const Pattern& p) {
    frames = count;
    plane_frames = count + (p.K - 1) * s.dilation / s.stride;
    plane = row_length<S>(plane_frames * s.V);
    ld = phases * plane;
  }
  // Offset of every entry; the ragged edge's entries, whose weights are 0, read the last row, which is all zeros.
  void offsets(const TemporalShape& s, const Pattern& p, int32_t* offset) const {
    for (int64_t b = 0; b < p.blocks; b++) {
      const int64_t shift = p.tap[b] * s.dilation, at = shift % s.stride * plane + shift / s.stride * s.V;
      for (int64_t i = p.input[b] * p.bi, end = i + p.bi; i < end; i++)
        *offset++ = (int32_t)((i < p.I ? inputs.row[i] * ld : zeros()) + at);
    }
  }
  int64_t zeros() const { return inputs.count() * ld; }
  int64_t panel_size() const { return zeros() + ld; }
};

template <class S, class A>
void pack_panel(const TemporalPlan& plan, const TemporalShape& s, const View<const A>& x, int64_t n, int64_t t0, S* panel) {
  for (int64_t r = 0; r < plan.inputs.count(); r++)
    for (int64_t q = 0; q < plan.phases; q++) {
      S* row = panel + r * plan.ld + q * plan.plane;
      copy_frames(x, n, plan.inputs.channel[r], s.T, s.V, t0 * s.stride + q - plan.padding, s.stride, plan.plane_frames, row);
      std::memset(row + plan.plane_frames * s.V, 0, (plan.plane - plan.plane_frames * s.V) * sizeof(S));
    }
  std::memset(panel + plan.zeros(), 0, plan.ld * sizeof(S));
}

// Pixels that all block rows sweep before the next ones: the columns of the panel that they touch stay in L1 and L2.
template <class S>
INLINE int64_t panel_sweep(const Pattern& p, bool streams) {
  if (p.bo < MAX_ROWS) return 2 * tile_vectors<1> * lanes<S>;
  return streams ? streamed_sweep<S> : 3 * tile_vectors<MAX_ROWS> * lanes<S>;
}

// All outputs of `pixels` pixels of a packed panel to y, whose channels are ldy apart; room: for bo rows of `sweep`.
template <class S, class A>
INLINE void sweep_panel(const Pattern& p, const int32_t* offset, const S* values, const S* bias, const S* panel, int64_t pixels,
                        int64_t sweep, bool streams, S* room, A* y, int64_t ldy) {
  for (int64_t at = 0; at < pixels; at += sweep)
    for (int64_t g = 0; g < p.rows; g++) {
      A* out = y + g * p.bo * ldy + at;
      const int64_t count = min64(sweep, pixels - at);
      const OutputRows<S, A> sums(room, sweep, out, ldy, streams);
      gather_row(panel + at, block_row(p, g, offset, values), live_rows(p, g), bias ? bias + g * p.bo : nullptr, sums.rows, sums.ld,
                 sums.pixels(count));
      sums.finish(live_rows(p, g), count, out, ldy);
    }
}

template <class S, class A>
void temporal_forward(const TemporalShape& s, const Pattern& p, View<const A> x, const S* values, const S* bias, A* y,
                      int threads) {
  if (VECTOR_BYTES == 64 && by_columns(p)) return column_forward(s, p, x, values, bias, y, threads);
  const auto plan = TemporalPlan::make<S>(s, p, threads, threads);
  call_scratch.reserve(Scratch::room<int32_t>(p.blocks * p.bi));
  int32_t* offset = call_scratch.take<int32_t>(p.blocks * p.bi);
  plan.offsets(s, p, offset);
  const bool streams = std::is_same_v<S, A> && is_streamed<S>(s.N * p.O * s.T_out * s.V);
  const int64_t sweep = panel_sweep<S>(p, streams);
  parallel(s.N * plan.tiles, threads, [&](int64_t task) {
    const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames, ldy = s.T_out * s.V;
    task_scratch.reserve(Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(p.bo * sweep));
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* room = task_scratch.take<S>(p.bo * sweep);
    pack_panel(plan, s, x, n, t0, panel);
    sweep_panel(p, offset, values, bias, panel, min64(plan.frames, s.T_out - t0) * s.V, sweep, streams, room,
                y + n * p.O * ldy + t0 * s.V, ldy);
    end_stream();
  });
}

// scatter(n, g, first, frames, offset, panel, rows, ldy) adds what block row g sends back from output frames [first, first + frames)
// to the panel; rows: room for as many rows of dy, `ldy` apart.
template <class S, class A, class Scatter>
void scatter_tiles(const TemporalShape& s, const Pattern& p, A* dx, int threads, Scatter scatter) {
  // Tiles of input frames, always the same ones: the order in which a scatter adds to a frame depends on where the tiles begin.
  // Tile [a, b) is reached by output frames [first, last); its panel starts at output `first`.
  TemporalPlan plan = TemporalPlan::make<S>(s, p, fixed_threads, fixed_tasks);
  const int64_t reach = (p.K - 1) * s.dilation, tile = ceil_div(s.T, plan.tiles);
  plan.tiles = ceil_div(s.T, tile);
  plan.set_frames<S>((tile + reach) / s.stride + 2, s, p);
  call_scratch.reserve(Scratch::room<int32_t>(p.blocks * p.bi));
  int32_t* offset = call_scratch.take<int32_t>(p.blocks * p.bi);
  plan.offsets(s, p, offset);
  const int64_t ldy = row_length<S>(plan.frames * s.V);
  const bool streams = std::is_same_v<S, A> && is_streamed<S>(s.N * p.I * s.T * s.V);
  parallel(s.N * plan.tiles, threads, [&](int64_t task) {
    const int64_t n = task / plan.tiles, a = task % plan.tiles * tile, b = min64(s.T, a + tile);
    const int64_t first = max64(0, ceil_div(a + plan.padding - reach, s.stride));
    const int64_t last = min64(s.T_out, (b - 1 + plan.padding) / s.stride + 1), frames = max64(0, last - first);
    task_scratch.reserve(Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(p.bo * ldy));
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* rows = task_scratch.take<S>(p.bo * ldy);
    std::memset(panel, 0, plan.panel_size() * sizeof(S));
    for (int64_t g = 0; g < p.rows && frames; g++) scatter(n, g, first, frames, offset, panel, rows, ldy);
    if (s.stride == 1 && a + plan.padding >= first && b + plan.padding - first <= plan.plane_frames) {  // one run
      for (int64_t i = 0; i < p.I; i++) {
        A* to = dx + ((n * p.I + i) * s.T + a) * s.V;
        if (const int64_t r = plan.inputs.row[i]; r < 0) leave_zeros(to, (b - a) * s.V, streams);
        else leave_row(to, panel + r * plan.ld + (a + plan.padding - first) * s.V, (b - a) * s.V, streams);
      }
      return end_stream();
    }
    for (int64_t i = 0; i < p.I; i++)
      for (int64_t t = a, r = plan.inputs.row[i]; t < b; t++) {
        const int64_t padded = t + plan.padding - first * s.stride, q = padded % s.stride, at = padded / s.stride;
        A* to = dx + ((n * p.I + i) * s.T + t) * s.V;
        if (r < 0 || padded < 0 || q >= plan.phases || at >= plan.plane_frames) std::memset(to, 0, s.V * sizeof(A));
        else convert(panel + r * plan.ld + q * plan.plane + at * s.V, s.V, to);
      }
  });
}

template <class S, class A>
void temporal_dx(const TemporalShape& s, const Pattern& p, View<const A> dy, const S* values, A* dx, int threads) {
  if (by_columns(p)) return column_dx(s, p, dy, values, dx, threads);
  scatter_tiles<S>(s, p, dx, threads, [&](int64_t n, int64_t g, int64_t first, int64_t frames, const int32_t* offset, S* panel,
                                          S* rows, int64_t ldy) {
    pack_rows(dy, n, g * p.bo, live_rows(p, g), s.T_out, s.V, first, frames, rows, ldy);
    scatter_row(panel, block_row(p, g, offset, values), live_rows(p, g), rows, ldy, frames * s.V);
  });
}

template <class S, class A, class P = S>
void temporal_dw(const TemporalShape& s, const Pattern& p, View<const A> x, View<const A> dy, const Lasso<S>& lasso, S* dw,
                 S* dbias, int threads) {
  const auto plan = TemporalPlan::make<P>(s, p, fixed_threads, fixed_tasks);
  const int64_t entries = p.blocks * p.bi, size = entries * p.bo, tasks = s.N * plan.tiles;
  const int64_t chunks = min64(max_chunks, max64(tasks, 1)), ldy = row_length<P>(plan.frames * s.V);
  call_scratch.reserve(Scratch::room<int32_t>(entries) + Scratch::room<S>(chunks * size) + Scratch::room<S>(chunks * p.O));
  int32_t* offset = call_scratch.take<int32_t>(entries);
  S* partial = call_scratch.take<S>(chunks * size);
  S* partial_bias = call_scratch.take<S>(chunks * p.O);
  plan.offsets(s, p, offset);
  parallel(chunks, threads, [&](int64_t chunk) {
    S* sum = partial + chunk * size;
    S* bias = partial_bias + chunk * p.O;
    std::memset(sum, 0, size * sizeof(S));
    std::memset(bias, 0, p.O * sizeof(S));
    task_scratch.reserve(Scratch::room<P>(plan.panel_size()) + Scratch::room<P>(p.bo * ldy));
    P* panel = task_scratch.take<P>(plan.panel_size());
    P* rows = task_scratch.take<P>(p.bo * ldy);
    for (int64_t task = chunk * tasks / chunks; task < (chunk + 1) * tasks / chunks; task++) {
      const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames, frames = min64(plan.frames, s.T_out - t0);
      pack_panel(plan, s, x, n, t0, panel);
      for (int64_t g = 0; g < p.rows; g++) {
        pack_rows(dy, n, g * p.bo, live_rows(p, g), s.T_out, s.V, t0, frames, rows, ldy);
        const int64_t e = p.row_ptr[g] * p.bi;
        dot_row(panel, offset + e, (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi, p.bo, live_rows(p, g), rows, ldy, frames * s.V,
                sum + e * p.bo);
        for (int64_t o = 0; o < live_rows(p, g); o++) bias[g * p.bo + o] += sum_row(rows + o * ldy, frames * s.V);
      }
    }
    clear_ragged(p, sum);
  });
  add_chunks(partial, chunks, p.blocks, p.bi * p.bo, lasso, dw, threads);
  if (dbias) add_chunks(partial_bias, chunks, p.O, 1, Lasso<S>{}, dbias, 1);
}
