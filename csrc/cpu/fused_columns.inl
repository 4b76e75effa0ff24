// A FusedNetwork in columns, for blocks of few outputs, where one load serves one multiply-add: a clip is cut into strips of
// frames, lane q of all lanes is joint q % V of strip q / V, and 16 lanes over all frames of a strip are a column with an arena of
// its own. Inside a column a frame is one cache line, so that every tap is an aligned load and a column's rows are short:
//
//   arena:  | column 0: rows of X, rows of H, ... | column 1: the same | ... | Z, in frames of all lanes |
//
// Convolutions run column by column as if it were a person of 16 joints. Only the graph steps, which mix joints, and the borders
// of H, which are frames of another strip, look at more than one. Frames past the clip are zeros in H and garbage elsewhere.

#if VECTOR_BYTES == 64
// Lanes of a column whose strip has frame j (of a strip, any integer) inside of a clip of T frames; strips of F frames.
INLINE __mmask16 live_lanes(const FusedNetwork& net, int64_t column, int64_t j, int64_t F, int64_t T) {
  uint32_t mask = 0;
  for (int64_t l = 0; l < 16; l++) {
    const int64_t q = column * 16 + l, t = q / net.joints * F + j;
    if (q < net.strips * net.joints && t >= 0 && t < T) mask |= 1u << l;
  }
  return (__mmask16)mask;
}

// gather_tile over N vectors of each of P columns, `apart` floats from one another: vector i is vector i % N of column i / N.
template <int R, int N, int P, class Start, class Finish>
INLINE void columns_tile(const float* x, int64_t apart, const Entries<float>& e, Start start, Finish finish) {
  Vec<float> acc[R][N * P];
  UNROLL for (int o = 0; o < R; o++)
    UNROLL for (int i = 0; i < N * P; i++) acc[o][i] = start(o, i);
  const float* w = e.weight;
  for (int64_t j = 0; j < e.n; j++, w += e.bo) {
    const float* row = x + e.offset[j];
    if constexpr (R == 1) {
      const Vec<float> weight = splat<float>(w[0]);
      UNROLL for (int i = 0; i < N * P; i++) acc[0][i] += weight * load(row + i / N * apart + i % N * 16);
    } else {
      Vec<float> in[N * P];
      UNROLL for (int i = 0; i < N * P; i++) in[i] = load(row + i / N * apart + i % N * 16);
      UNROLL for (int o = 0; o < R; o++) {
        Vec<float> weight = splat<float>(w[o]);
        KEEP(weight);
        UNROLL for (int i = 0; i < N * P; i++) acc[o][i] += weight * in[i];
      }
    }
  }
  UNROLL for (int o = 0; o < R; o++)
    UNROLL for (int i = 0; i < N * P; i++) finish(o, i, acc[o][i]);
}

// All block rows of a share over the F frames of P neighbouring columns, the first of which is at `column`.
template <int P>
STEP void convolve_columns(const FusedNetwork& net, const FusedStep& s, float* column, Share share) {
  const int64_t ldy = s.dst_ld, ldr = s.residual_ld, apart = net.column;
  for (int64_t g = share.begin(s.groups), last = share.end(s.groups); g < last; g++) {
    const Entries<float> e = fused_entries(s, g);
    row_pieces(min64(s.bo, s.rows - g * s.bo), [&](auto r, int64_t o) __attribute__((always_inline)) {
      constexpr int R = decltype(r)::value;
      const Entries<float> piece{e.offset, e.weight + o, e.n, e.bo};
      const int64_t row = g * s.bo + o;
      even_pieces<frame_tile<R> / P>(s.frames, [&](auto n, int64_t at) __attribute__((always_inline)) {
        constexpr int N = decltype(n)::value;
        const float* residual = s.residual >= 0 ? column + s.residual + row * ldr + at * 16 : nullptr;
        float* y = column + s.dst + row * ldy + at * 16;
        const float* bias = s.bias + row;
        columns_tile<R, N, P>(
            column + at * 16, apart, piece,
            [=](int k, int) __attribute__((always_inline)) { return splat<float>(bias[k]); },
            [=](int k, int i, Vec<float> sum) __attribute__((always_inline)) {
              const int64_t p = i / N * apart + i % N * 16;
              if (residual) sum += load(residual + k * ldr + p);
              store(y + k * ldy + p, relu(sum));
            });
      });
    });
  }
}

INLINE void column_conv(const FusedNetwork& net, const FusedStep& s, float* arena, Share share) {
  int64_t c = 0;
  if (s.frames <= 6)  // too few sums to hide the latency of a multiply-add and the price of an entry
    for (; c + 1 < net.columns; c += 2) convolve_columns<2>(net, s, arena + c * net.column, share);
  for (; c < net.columns; c++) convolve_columns<1>(net, s, arena + c * net.column, share);
}

// Z_k = X A_k in frames of all lanes, `tile` of them at a time; H = relu(W Z + bias map). A row of X is first copied to the row past Z.
STEP void column_graph(const FusedNetwork& net, const FusedStep& s, const AdjacencyTable<float>& adjacency, float* arena, Share share) {
  const MadeRows made(s, arena, share);
  const int64_t C = net.columns, width = C * 16, V = net.joints;
  float* x = made.z + s.made * s.scratch_ld;
  for (int64_t t0 = 0; t0 < s.frames; t0 += s.tile) {
    const int64_t frames = min64(s.tile, s.frames - t0);
    int64_t held = -1;
    for (int64_t r = 0; r < s.made; r++) {
      if (!made.has(r)) continue;
      const int64_t k = s.made_subset[r];
      const float* from = arena + s.src + s.made_input[r] * s.src_ld + t0 * 16;
      float* z = made.z + r * s.scratch_ld;
      if (s.diagonal[k]) {  // joints stay where they are
        for (int64_t c = 0; c < C; c++) {
          const Vec<float> a = load(s.lane_coef + k * width + c * 16);
          for (int64_t j = 0; j < frames; j++) store(z + j * width + c * 16, a * load(from + c * net.column + j * 16));
        }
        continue;
      }
      if (held != s.made_input[r])
        for (int64_t c = 0; c < C; c++)
          for (int64_t j = 0; j < frames; j++) store(x + j * width + c * 16, load(from + c * net.column + j * 16));
      held = s.made_input[r];
      for (int64_t j = 0; j < frames; j++)
        for (int64_t q = net.strips * V / 16 * 16; q < width; q += 16) store(z + j * width + q, Vec<float>{});
      adjacency.apply_runs(k, x, net.strips, z, frames, width);
    }
    for (int64_t g = share.begin(s.groups), last = share.end(s.groups); g < last; g++) {
      const Entries<float> e = fused_entries(s, g);
      row_pieces(min64(s.bo, s.rows - g * s.bo), [&](auto r, int64_t o) __attribute__((always_inline)) {
        constexpr int R = decltype(r)::value;
        const Entries<float> piece{e.offset, e.weight + o, e.n, e.bo};
        const int64_t row = g * s.bo + o;
        const float* bias = s.bias + row * s.bias_ld;
        const int64_t ldb = s.bias_ld, ldy = s.dst_ld, apart = net.column;
        float* y = arena + s.dst + row * ldy + t0 * 16;
        even_pieces<frame_tile<R>>(frames * C, [&](auto n, int64_t p) __attribute__((always_inline)) {
          const int64_t first = p % C;
          int64_t c = 0, to = 0;  // column and place of the vector at hand: start and finish are called in the order of vectors
          gather_tile<float, R, decltype(n)::value>(
              made.z + p * 16, piece,
              [&](int k, int i) __attribute__((always_inline)) {
                c = i == 0 || c + 1 == C ? (i == 0 ? first : 0) : c + 1;
                return load(bias + k * ldb + c * 16);
              },
              [&](int k, int i, Vec<float> sum) __attribute__((always_inline)) {
                if (i == 0) c = first, to = first * apart + p / C * 16;
                store(y + k * ldy + to, relu(sum));
                if (++c == C) c = 0, to += 16 - (C - 1) * apart;
                else to += apart;
              });
        });
      });
    }
  }
}

// The frames of H before and after those of a strip: those of its neighbours in time, zeros outside of the clip. A frame j outside
// of [0, F) is frame j mod F of the lanes floor(j / F) strips further on.
STEP void column_borders(const FusedNetwork& net, const FusedStep& s, float* arena, Share share) {
  const int64_t F = s.frames, T = s.src_frames, first = share.begin(s.rows), last = share.end(s.rows);
  auto at = [&](int64_t frame) { return frame % s.planes * s.plane_ld + frame / s.planes * 16; };  // of a padded frame
  float* h = arena + s.dst;
  for (int64_t j = -s.lead; j < F + s.trail; j++) {
    if (j >= 0 && j < F && (net.strips - 1) * F + j < T) continue;
    const int64_t strips = (j + s.lead * F) / F - s.lead, to = at(j + s.lead), from = at(j - strips * F + s.lead);
    for (int64_t c = 0; c < net.columns; c++) {
      const __mmask16 live = live_lanes(net, c, j, F, T);
      const int64_t lane = c * 16 + strips * net.joints, source = max64(0, min64(lane < 0 ? (lane - 15) / 16 : lane / 16, net.columns - 1));
      const float* low = h + source * net.column + from;
      const float* high = h + min64(source + 1, net.columns - 1) * net.column + from;
      const __m512i index = _mm512_add_epi32(_mm512_set1_epi32((int)(lane - source * 16)),
                                             _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      float* y = h + c * net.column + to;
      for (int64_t r = first; r < last; r++) {
        const __m512 a = (__m512)load(low + r * s.dst_ld), b = (__m512)load(high + r * s.dst_ld);
        store(y + r * s.dst_ld, (Vec<float>)_mm512_maskz_permutex2var_ps(live, a, index, b));
      }
    }
  }
}

INLINE void column_split(const FusedNetwork& net, const FusedStep& s, float* arena, Share share) {
  for (int64_t c = 0; c < net.columns; c++) fused_split(s, 16, arena + c * net.column, share);
}

// Means over the joints and frames of the clip. `scratch`: one vector a row.
INLINE void column_pool(const FusedNetwork& net, const FusedStep& s, float* arena, float* features) {
  float* sums = arena + s.scratch;
  std::memset(sums, 0, s.rows * 16 * sizeof(float));
  for (int64_t c = 0; c < net.columns; c++)
    for (int64_t j = 0; j < s.src_frames; j++) {
      const __mmask16 live = live_lanes(net, c, j, s.src_frames, s.frames);
      const float* x = arena + c * net.column + s.src + j * 16;
      for (int64_t r = 0; r < s.rows; r++)
        store(sums + r * 16, (Vec<float>)_mm512_mask_add_ps((__m512)load(sums + r * 16), live, (__m512)load(sums + r * 16),
                                                           (__m512)load(x + r * s.src_ld)));
    }
  for (int64_t r = 0; r < s.rows; r++) features[r] = sum_lanes<float>(load(sums + r * 16)) / (float)(s.frames * net.joints);
}

inline void column_step(const FusedNetwork& net, const FusedStep& s, float* arena, float* features, Share share) {
  if (s.kind == FusedStep::kGraph) column_graph(net, s, ((const AdjacencyTable<float>*)net.tables)[&s - net.steps], arena, share);
  else if (s.kind == FusedStep::kConv) column_conv(net, s, arena, share);
  else if (s.kind == FusedStep::kBorders) column_borders(net, s, arena, share);
  else if (s.kind == FusedStep::kSplit) column_split(net, s, arena, share);
  else column_pool(net, s, arena, features);
}
#endif
