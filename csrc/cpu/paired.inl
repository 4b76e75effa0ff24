// The temporal convolution by vdpbf16ps (paired_tile.inl). What is added up in pairs, and so must lie side by side in 32 bits, differs
// by product:
//
//   forward  two entries of a block row: their 32 pixels are interleaved when they are loaded, weights once a call
//   dX       two outputs of a block: rows of dy are interleaved when they are packed; the sums are scattered in float32
//   dW       two pixels: the rows as they are
//
// Panels of forward and dW are bfloat16: half the bytes. Numbers below 2^-126 count as 0 here, which is what the instruction does.
// Weights must be bfloat16 numbers; others, and forward and dX of blocks of fewer than four outputs, take the loops in float32.

inline bool are_bfloat16(const float* values, int64_t count) {
  uint32_t lost = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    lost |= bits & 0xffff;
  }
  return !lost;
}

// The entries of all block rows, two and two; one without a partner gets the row of zeros and the weight 0.
struct Pairs {
  int32_t *ptr, *offset;  // ptr: rows + 1, in pairs; offset: two a pair
  uint32_t* weight;       // bo a pair

  static int64_t most(const Pattern& p) { return (p.blocks * p.bi + p.rows + 1) / 2; }
  static size_t room(const Pattern& p) {
    return Scratch::room<int32_t>(p.rows + 1) + Scratch::room<int32_t>(2 * most(p)) + Scratch::room<uint32_t>(most(p) * p.bo);
  }
  Pairs(const Pattern& p, const int32_t* offsets, const float* values, int32_t zeros, Scratch& scratch)
      : ptr(scratch.take<int32_t>(p.rows + 1)), offset(scratch.take<int32_t>(2 * most(p))),
        weight(scratch.take<uint32_t>(most(p) * p.bo)) {
    int32_t pair = 0;
    for (int64_t g = 0; g < p.rows; g++) {
      ptr[g] = pair;
      for (int64_t e = p.row_ptr[g] * p.bi, end = p.row_ptr[g + 1] * p.bi; e < end; e += 2, pair++) {
        offset[2 * pair] = offsets[e], offset[2 * pair + 1] = e + 1 < end ? offsets[e + 1] : zeros;
        for (int64_t o = 0; o < p.bo; o++)
          weight[pair * p.bo + o] = pair_of(values[e * p.bo + o], e + 1 < end ? values[(e + 1) * p.bo + o] : 0);
      }
    }
    ptr[p.rows] = pair;
  }
};

void paired_forward(const TemporalShape& s, const Pattern& p, View<const Bfloat16> x, const float* values, const float* bias,
                    Bfloat16* y, int threads) {
  if (p.bo < 4 || !are_bfloat16(values, p.blocks * p.bi * p.bo))
    return avx512_table().bf16.temporal_forward(s, p, x, values, bias, y, threads);
  const auto plan = TemporalPlan::make<Bfloat16>(s, p, threads, threads);
  call_scratch.reserve(Scratch::room<int32_t>(p.blocks * p.bi) + Pairs::room(p));
  int32_t* offset = call_scratch.take<int32_t>(p.blocks * p.bi);
  plan.offsets(s, p, offset);
  const Pairs pairs(p, offset, values, (int32_t)plan.zeros(), call_scratch);
  const int64_t sweep = 256;  // pixels that all block rows sweep before the next ones
  parallel(s.N * plan.tiles, threads, [&](int64_t task) {
    const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames;
    const int64_t pixels = min64(plan.frames, s.T_out - t0) * s.V, ldy = s.T_out * s.V;
    task_scratch.reserve(Scratch::room<Bfloat16>(plan.panel_size()));
    Bfloat16* panel = task_scratch.take<Bfloat16>(plan.panel_size());
    pack_panel(plan, s, x, n, t0, panel);
    for (int64_t at = 0; at < pixels; at += sweep)
      for (int64_t g = 0; g < p.rows; g++)
        row_pieces(live_rows(p, g), [&](auto r, int64_t o) __attribute__((always_inline)) {
          constexpr int R = decltype(r)::value, N = R == 8 ? 1 : R == 4 ? 2 : 3;
          const int64_t first = pairs.ptr[g], c = g * p.bo + o, count = min64(sweep, pixels - at);
          vector_pieces<N>(ceil_div(count, 32), [&](auto v, int64_t i) __attribute__((always_inline)) {
            gather_pairs<R, decltype(v)::value>(panel + at + 32 * i, pairs.offset + 2 * first, pairs.weight + first * p.bo + o,
                                                pairs.ptr[g + 1] - first, p.bo, bias ? bias + c : nullptr,
                                                y + (n * p.O + c) * ldy + t0 * s.V + at + 32 * i, ldy, count - 32 * i);
          });
        });
  });
}

// Two rows of dy as one: lane l of it has pixel l of both. ldy counts lanes; rows that do not exist are zeros.
INLINE void interleave(const Bfloat16* a, const Bfloat16* b, int64_t pixels, uint32_t* to) {
  for (int64_t i = 0; i < pixels; i++) to[i] = (uint32_t)a[i].bits | (uint32_t)b[i].bits << 16;
}

void paired_dx(const TemporalShape& s, const Pattern& p, View<const Bfloat16> dy, const float* values, Bfloat16* dx, int threads) {
  const int64_t entries = p.blocks * p.bi, couples = ceil_div(p.bo, 2);
  if (p.bo < 4 || !are_bfloat16(values, entries * p.bo)) return avx512_table().bf16.temporal_dx(s, p, dy, values, dx, threads);
  std::vector<uint32_t> weight(entries * couples);  // the scratch of the call belongs to scatter_tiles
  for (int64_t g = 0; g < p.rows; g++)
    for (int64_t e = p.row_ptr[g] * p.bi; e < p.row_ptr[g + 1] * p.bi; e++)
      for (int64_t c = 0; c < couples; c++) {
        const auto of = [&](int64_t o) { return o < live_rows(p, g) ? values[e * p.bo + o] : 0; };
        weight[e * couples + c] = pair_of(of(2 * c), of(2 * c + 1));
      }
  scatter_tiles<float>(s, p, dx, threads, [&](int64_t n, int64_t g, int64_t first, int64_t frames, const int32_t* offset, float* panel,
                                              float* rows, int64_t ldy) {
    // Of the room for bo rows of floats, couples rows of pairs, and the two rows of dy behind them where bo allows.
    const int64_t live = live_rows(p, g), pairs = ceil_div(live, 2), pixels = frames * s.V, e = p.row_ptr[g] * p.bi;
    uint32_t* packed = (uint32_t*)rows;
    Bfloat16* two = (Bfloat16*)(rows + couples * ldy);  // bo >= 4: couples < bo
    for (int64_t c = 0; c < pairs; c++) {
      for (int64_t o = 0; o < 2; o++)
        if (2 * c + o < live) copy_frames(dy, n, g * p.bo + 2 * c + o, s.T_out, s.V, first, 1, frames, two + o * ldy);
        else std::memset(two + o * ldy, 0, pixels * sizeof(Bfloat16));
      interleave(two, two + ldy, pixels, packed + c * ldy);
      std::memset(packed + c * ldy + pixels, 0, (ldy - pixels) * sizeof(uint32_t));
    }
    row_pieces(pairs, [&](auto r, int64_t c) __attribute__((always_inline)) {
      constexpr int P = decltype(r)::value, N = P == 8 ? 2 : P == 4 ? 4 : 6;
      vector_pieces<N>(ceil_div(pixels, 16), [&](auto v, int64_t i) __attribute__((always_inline)) {
        scatter_pairs<P, decltype(v)::value>(panel + 16 * i, offset + e, weight.data() + e * couples + c,
                                             (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi, couples, packed + c * ldy + 16 * i, ldy);
      });
    });
  });
}

void paired_dw(const TemporalShape& s, const Pattern& p, View<const Bfloat16> x, View<const Bfloat16> dy, const Lasso<float>& lasso,
               float* dw, float* dbias, int threads) {
  temporal_dw<float, Bfloat16, Bfloat16>(s, p, x, dy, lasso, dw, dbias, threads);
}

// Where vdpbf16ps is slow, only dW of few outputs a block gains: it is bound by its loads, of which there are half as many.
void narrow_dw(const TemporalShape& s, const Pattern& p, View<const Bfloat16> x, View<const Bfloat16> dy, const Lasso<float>& lasso,
               float* dw, float* dbias, int threads) {
  (p.bo < 4 ? paired_dw : avx512_table().bf16.temporal_dw)(s, p, x, dy, lasso, dw, dbias, threads);
}
