// The register tiles of paired.inl: those of tile.inl with vdpbf16ps, which adds two products of bfloat16 numbers to every float. Lane l
// of an accumulator gets a[2l] b[2l] + a[2l+1] b[2l+1], each product exact, each addition rounded as a fused multiply-add would.

INLINE __m512bh half_lanes(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE __m512bh half_splat(uint32_t pair) {
  __m512i v = _mm512_set1_epi32((int)pair);
  KEEP(v);
  return (__m512bh)v;
}
INLINE uint32_t upper_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits >> 16;
}
INLINE uint32_t pair_of(float low, float high) { return upper_half(low) | upper_half(high) << 16; }

// 32 sums in the order of the two interleaved halves -> 32 pixels in their own order, of which `valid` are stored.
INLINE void store_rounded(Bfloat16* y, __m512 low, __m512 high, int64_t valid) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i v = _mm512_permutexvar_epi64(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  if (valid >= 32) _mm512_storeu_si512(y, v);
  else _mm512_mask_storeu_epi16(y, (__mmask32)((1ull << valid) - 1), v);
}

// R outputs x N times 32 pixels.
template <int R, int N>
INLINE void gather_pairs(const Bfloat16* x, const int32_t* offset, const uint32_t* weight, int64_t pairs, int64_t bo, const float* bias,
                         Bfloat16* y, int64_t ldy, int64_t valid) {
  __m512 acc[R][2 * N];
  UNROLL for (int o = 0; o < R; o++)
    UNROLL for (int i = 0; i < 2 * N; i++) acc[o][i] = _mm512_set1_ps(bias ? bias[o] : 0);
  for (int64_t j = 0; j < pairs; j++, weight += bo, offset += 2) {
    __m512bh in[2 * N];
    UNROLL for (int i = 0; i < N; i++) {
      const __m512i a = _mm512_loadu_si512(x + offset[0] + 32 * i), b = _mm512_loadu_si512(x + offset[1] + 32 * i);
      in[2 * i] = (__m512bh)_mm512_unpacklo_epi16(a, b), in[2 * i + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
    UNROLL for (int o = 0; o < R; o++) {
      const __m512bh w = half_splat(weight[o]);
      UNROLL for (int i = 0; i < 2 * N; i++) acc[o][i] = _mm512_dpbf16_ps(acc[o][i], w, in[i]);
    }
  }
  UNROLL for (int o = 0; o < R; o++)
    UNROLL for (int i = 0; i < N; i++)
      if (valid > 32 * i) store_rounded(y + o * ldy + 32 * i, acc[o][2 * i], acc[o][2 * i + 1], valid - 32 * i);
}

// P pairs of outputs x N vectors of 16 pixels.
template <int P, int N>
INLINE void scatter_pairs(float* x, const int32_t* offset, const uint32_t* weight, int64_t n, int64_t stride, const uint32_t* dy,
                          int64_t ldy) {
  __m512bh held[P][N];
  UNROLL for (int o = 0; o < P; o++)
    UNROLL for (int i = 0; i < N; i++) held[o][i] = half_lanes(dy + o * ldy + 16 * i);
  for (int64_t j = 0; j < n; j++, weight += stride) {
    float* row = x + offset[j];
    __m512 acc[N];
    UNROLL for (int i = 0; i < N; i++) acc[i] = _mm512_loadu_ps(row + 16 * i);
    UNROLL for (int o = 0; o < P; o++) {
      const __m512bh w = half_splat(weight[o]);
      UNROLL for (int i = 0; i < N; i++) acc[i] = _mm512_dpbf16_ps(acc[i], w, held[o][i]);
    }
    UNROLL for (int i = 0; i < N; i++) _mm512_storeu_ps(row + 16 * i, acc[i]);
  }
}

// dW: the loops of dot_row on rows of bfloat16.
template <int R, int E>
INLINE void dot_pairs(const Bfloat16* x, const int32_t* offset, const Bfloat16* dy, int64_t ldy, int64_t vectors, float* dw, int64_t bo) {
  Vec<float> acc[E][R] = {};
  for (int64_t i = 0; i < vectors * 32; i += 32) {
    __m512bh in[E];
    UNROLL for (int e = 0; e < E; e++) in[e] = half_lanes(x + offset[e] + i);
    UNROLL for (int o = 0; o < R; o++) {
      __m512bh d = half_lanes(dy + o * ldy + i);
      KEEP(d);
      UNROLL for (int e = 0; e < E; e++) acc[e][o] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[e][o], d, in[e]);
    }
  }
  UNROLL for (int e = 0; e < E; e++) add_sums<float, R>(dw + e * bo, acc[e]);
}

INLINE void dot_row(const Bfloat16* panel, const int32_t* offset, int64_t entries, int64_t bo, int64_t rows, const Bfloat16* dy,
                    int64_t ldy, int64_t pixels, float* dw) {
  const int64_t vectors = ceil_div(pixels, 32);
  for (int64_t v = 0; v < vectors; v += dot_piece) {
    const int64_t count = min64(dot_piece, vectors - v), p = v * 32;
    row_pieces(rows, [&](auto r, int64_t o) __attribute__((always_inline)) {
      constexpr int R = decltype(r)::value, E = tile_vectors<R>;
      int64_t e = 0;
      for (; entries - e >= E; e += E) dot_pairs<R, E>(panel + p, offset + e, dy + o * ldy + p, ldy, count, dw + e * bo + o, bo);
      for (; e < entries; e++) dot_pairs<R, 1>(panel + p, offset + e, dy + o * ldy + p, ldy, count, dw + e * bo + o, bo);
    });
  }
}
INLINE float sum_row(const Bfloat16* row, int64_t pixels) {  // padded with zeros to whole vectors
  __m512 acc = {};
  const __m512bh ones = half_splat(pair_of(1, 1));
  for (int64_t i = 0; i < pixels; i += 32) acc = _mm512_dpbf16_ps(acc, ones, half_lanes(row + i));
  return sum_lanes<float>((Vec<float>)acc);
}
