// The steps of AA-GCN in a FusedNetwork: a graph per person from its embeddings, its product with the rows that live blocks
// read, and the attention over joints, frames and channels. Formulas: backbones/aagcn.py; maps and products: small_product.inl.

// Rows of embeddings of one convolution, whole blocks of them.
INLINE int64_t embedded_rows(const FusedStep& s) { return ceil_div(s.hidden, s.bo) * s.bo; }

// map[v, :] (+)= sum over r < rows and t of a[r, t, v] b[r, t, :]. A row of full tiles follows the last one without a gap, so
// all of them are one sum; the rows of another tile are added one by one.
INLINE void similarity(const float* a, const float* b, int64_t rows, int64_t ld, int64_t frames, const Joints<float>& j,
                       float* map) {
  const bool joined = ld == frames * j.V;
  for (int64_t r = 0; r < (joined ? 1 : rows); r++)
    product<float>({a + r * ld, 1, j.V, b + r * ld, j.V, joined ? rows * frames : frames, map, j.ld, true}, j.V, j, lanes<float>);
}

// coef: A (K, V, V), then alpha. Entries: of every subset the rows of conv_a, then of conv_b, offsets from the arena.
// Threads share the subsets.
STEP void aa_graphs(const FusedStep& s, int64_t V, float* arena, Share share) {
  const Joints<float> j(V);
  const int64_t part = embedded_rows(s), groups = part / s.bo, first = share.begin(s.subsets), last = share.end(s.subsets);
  float *maps = arena + s.maps, *e = arena + s.scratch;
  if (share.parts > 1) {
    task_scratch.reserve(Scratch::room<float>((2 * part + 1) * s.scratch_ld));
    e = task_scratch.take<float>((2 * part + 1) * s.scratch_ld);
  }
  std::memset(maps + first * j.map, 0, (last - first) * j.map * sizeof(float));
  for (int64_t q = 0; q < s.planes; q++) {
    const int64_t count = ceil_div(s.src_frames - q, s.planes);
    for (int64_t t0 = 0; t0 < count; t0 += s.tile) {
      const int64_t frames = min64(s.tile, count - t0), pixels = frames * V;
      const int64_t ld = pixels % lanes<float> ? s.scratch_ld : pixels;
      const float* x = arena + q * s.plane_ld + t0 * V;
      for (int64_t k = first; k < last; k++) {
        for (int64_t g = 2 * k * groups; g < 2 * (k + 1) * groups; g++) {
          const float* bias = s.bias + g * s.bo;
          fused_row(x, fused_entries(s, g), s.bo, pixels, e + (g - 2 * k * groups) * s.bo * ld, ld,
                    [&](int64_t o, int64_t, int) __attribute__((always_inline)) { return splat<float>(bias[o]); },
                    [&](int64_t, int64_t, Vec<float> sum) __attribute__((always_inline)) { return sum; });
        }
        similarity(e, e + part * ld, s.hidden, ld, frames, j, maps + k * j.map);
      }
    }
  }
  const Vec<float> scale = splat<float>(1 / (float)(s.hidden * s.src_frames)), alpha = splat<float>(s.coef[s.subsets * V * V]);
  for (int64_t r = first * V; r < last * V; r++)
    for (int64_t i = 0; i < j.vectors; i++) {
      const int64_t valid = i + 1 < j.vectors ? lanes<float> : j.last;
      float* at = maps + r * j.ld + i * lanes<float>;
      const Vec<float> t = tanh_of<float>(load(at) * scale);
      store(at, load_first(s.coef + r * V + i * lanes<float>, valid) + alpha * t);
      for (int64_t l = valid; l < lanes<float>; l++) at[l] = 0;
    }
}

// made_subset = subsets: the row of X itself, which a convolution beside the graphs reads.
STEP void aa_apply(const FusedStep& s, int64_t V, float* arena, Share share) {
  const MadeRows made(s, arena, share);
  const Joints<float> j(V);
  // Whole vectors may be written where the next frame comes later: rows of up to 3 vectors are made in one go.
  const int64_t last = j.vectors <= 3 ? lanes<float> : j.last, ldr = s.residual_ld;
  const int64_t tile = even_tile(s);
  for (int64_t t0 = 0; t0 < s.frames; t0 += tile) {
    const int64_t frames = min64(tile, s.frames - t0);
    float* z = made.z;
    for (int64_t m = 0; m < s.made; m++, z += s.scratch_ld) {
      if (!made.has(m)) continue;
      const float* x = arena + s.src + s.made_input[m] * s.src_ld + t0 * V;
      if (s.made_subset[m] == s.subsets) std::memcpy(z, x, frames * V * sizeof(float));
      else product<float>({x, V, 1, arena + s.maps + s.made_subset[m] * j.map, j.ld, V, z, V, false}, frames, j, last);
    }
    for (int64_t g = share.begin(s.groups); g < share.end(s.groups); g++) {
      const int64_t first = g * s.bo, rows = min64(s.bo, s.rows - first);
      const float* bias = s.bias + first;
      const float* res = arena + s.residual + first * ldr + t0 * V;
      float* y = arena + s.dst + first * s.dst_ld + t0 * V;
      auto start = [=](int64_t o, int64_t, int) __attribute__((always_inline)) { return splat<float>(bias[o]); };
      if (s.residual >= 0)
        fused_row(made.z, fused_entries(s, g), rows, frames * V, y, s.dst_ld, start,
                  [=](int64_t o, int64_t p, Vec<float> sum) __attribute__((always_inline)) {
                    return relu(sum + load(res + o * ldr + p));
                  });
      else
        fused_row(made.z, fused_entries(s, g), rows, frames * V, y, s.dst_ld, start,
                  [](int64_t, int64_t, Vec<float> sum) __attribute__((always_inline)) { return relu(sum); });
    }
  }
  clear_halo(s, V, arena, share);
}

INLINE Vec<float> one_plus_sigmoid(Vec<float> x) {
  const Vec<float> end = splat<float>(-Float<float>::lowest), one = splat<float>(1);
  x = x > end ? end : x;
  x = x < -end ? -end : x;
  return one + reciprocal<float>(one + exp_of<float>(-x));
}

// out[i] = 1 + sigmoid(bias + sum over c and k of weight[c, k] x[c, i + k - (taps - 1) / 2]), i < n. x: rows of `ld` with zeros
// for at least half the taps before row 0 and behind every row. n is rounded up to whole vectors.
INLINE void gate_along(const float* x, int64_t ld, int64_t rows, const float* weight, int64_t taps, float bias, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += lanes<float>) {
    Vec<float> sum[4] = {splat<float>(bias)};
    for (int64_t c = 0; c < rows; c++) {
      const float *from = x + c * ld + i - (taps - 1) / 2, *w = weight + c * taps;
      int64_t k = 0;
      for (; k + 4 <= taps; k += 4)
        UNROLL for (int u = 0; u < 4; u++) sum[u] += splat<float>(w[k + u]) * load(from + k + u);
      for (; k < taps; k++) sum[0] += splat<float>(w[k]) * load(from + k);
    }
    store(out + i, one_plus_sigmoid((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

// out[o] = bias[o] + sum over i of weight[i, o] x[i], o < n rounded up to whole vectors: weight rows are padded to `ld`.
INLINE void linear(const float* x, int64_t inputs, const float* weight, int64_t ld, const float* bias, float* out) {
  for (int64_t o = 0; o < ld; o += lanes<float>) {
    Vec<float> sum[4] = {load(bias + o)};
    int64_t i = 0;
    for (; i + 4 <= inputs; i += 4)
      UNROLL for (int u = 0; u < 4; u++) sum[u] += splat<float>(x[i + u]) * load(weight + (i + u) * ld + o);
    for (; i < inputs; i++) sum[0] += splat<float>(x[i]) * load(weight + i * ld + o);
    store(out + o, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

#if VECTOR_BYTES == 64
// (a0 + a1, a2 + a3, b0 + b1, b2 + b3) of the quarters of a and b.
INLINE __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
#endif

// The sums of the lanes of 16 vectors, in a fixed tree; sums[t] of vector t.
INLINE void sum_frames(const Vec<float>* v, float* sums) {
#if VECTOR_BYTES == 64
  __m512 pair[8], four[4];
  UNROLL for (int i = 0; i < 8; i++) {
    const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  _mm512_storeu_ps(sums, add_quarters(add_quarters(four[0], four[1]), add_quarters(four[2], four[3])));
#else
  for (int t = 0; t < 16; t++) sums[t] = sum_lanes<float>(v[t]);
#endif
}

// The gates multiply, so dst is read twice and written once: the mean over frames gives the joints' gate f, the mean of y f
// over joints the frames' gate g, and the mean of that times g the channels' gate.
//
// Row o of dst has frame t at plane (t + lead) % planes, place (t + lead) / planes. weight: joints (O, subsets taps), frames
// (O, tile taps), linear 1 transposed (O, hidden), linear 2 transposed (hidden, O), rows of both padded to 16; bias in that order.
// Scratch: O rows of means with half the taps of zeros before and behind, then four vectors, each scratch_ld
// floats; then a row of pixels in planes.
inline void attend(const FusedStep& s, int64_t V, float* arena) {
  const Joints<float> j(V);
  const int64_t O = s.rows, T = s.frames, ld = s.scratch_ld, wide = ceil_div(O, 16) * 16, narrow = ceil_div(s.hidden, 16) * 16;
  const int64_t front = ceil_div(max64(V, s.tile), 32) * 16, planes = min64(s.planes, T);
  const float *sa = s.weight, *ta = sa + O * s.subsets, *fc1 = ta + O * s.tile, *fc2 = fc1 + O * narrow;
  float *means = arena + s.scratch + front, *joints = arena + s.scratch + O * ld;
  float *gates = joints + ld, *squeezed = gates + ld, *hidden = squeezed + ld;
  // Frames q, q + planes, ... of row o lie one after the other from here.
  auto plane = [&](int64_t o, int64_t q) __attribute__((always_inline)) {
    return arena + s.dst + o * s.dst_ld + (q + s.lead) % s.planes * s.plane_ld + (q + s.lead) / s.planes * V;
  };
  std::memset(arena + s.scratch, 0, O * ld * sizeof(float));
  for (int64_t o = 0; o < O; o++)
    for (int64_t i = 0; i < j.vectors; i++) {
      Vec<float> sum[4] = {};
      for (int64_t q = 0; q < planes; q++) {
        const float* y = plane(o, q) + i * lanes<float>;
        int64_t n = ceil_div(T - q, s.planes);
        for (; n >= 4; n -= 4, y += 4 * V)
          UNROLL for (int u = 0; u < 4; u++) sum[u] += load(y + u * V);
        for (; n > 0; n--, y += V) sum[0] += load(y);
      }
      const Vec<float> mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * splat<float>(1 / (float)T);
      store_first(means + o * ld + i * lanes<float>, mean, i + 1 < j.vectors ? lanes<float> : j.last);
    }
  gate_along(means, ld, O, sa, s.subsets, s.bias[0], V, joints);
  for (int64_t v = V; v < j.ld; v++) joints[v] = 0;

  // means[o, t]: of y f over joints. What lies behind the last joint may be anything, so it is left out and not times 0.
  std::memset(arena + s.scratch, 0, O * ld * sizeof(float));
  const int64_t end = (j.vectors - 1) * lanes<float>;
  const float share = 1 / (float)V;
  for (int64_t o = 0; o < O; o++)
    for (int64_t q = 0; q < planes; q++) {
      const float* y = plane(o, q);
      float* to = means + o * ld + q;
      for (int64_t n = ceil_div(T - q, s.planes); n > 0; n -= 16) {
        const int64_t count = min64(n, 16);
        Vec<float> part[16] = {};
        float sums[16];
        for (int64_t t = 0; t < count; t++, y += V) {
          part[t] = load_first(y + end, j.last) * load(joints + end);
          for (int64_t i = 0; i < end; i += lanes<float>) part[t] += load(y + i) * load(joints + i);
        }
        sum_frames(part, sums);
        for (int64_t t = 0; t < count; t++, to += s.planes) *to = sums[t] * share;
      }
    }
  gate_along(means, ld, O, ta, s.tile, s.bias[1], T, gates);
  for (int64_t t = T; t < ceil_div(T, 16) * 16; t++) gates[t] = 0;

  for (int64_t o = 0; o < O; o++) {
    Vec<float> sum = {};
    for (int64_t t = 0; t < T; t += lanes<float>) sum += load(means + o * ld + t) * load(gates + t);
    squeezed[o] = sum_lanes<float>(sum) / (float)T;
  }
  linear(squeezed, O, fc1, narrow, s.bias + 2, hidden);
  for (int64_t i = 0; i < s.hidden; i++) hidden[i] = hidden[i] < 0 ? 0 : hidden[i];  // a NaN stays one
  linear(hidden, s.hidden, fc2, wide, s.bias + 2 + narrow, squeezed);
  for (int64_t o = 0; o < wide; o += lanes<float>) store(squeezed + o, one_plus_sigmoid(load(squeezed + o)));

  // f g as a row of pixels, plane by plane, with zeros behind: whole vectors then pass over all joints and frames.
  float* both = hidden + ld;
  const int64_t both_ld = ceil_div(ceil_div(T, s.planes) * V, 16) * 16;
  for (int64_t q = 0; q < planes; q++) {
    float* to = both + q * both_ld;
    for (int64_t t = q; t < T; t += s.planes, to += V)
      for (int64_t v = 0; v < V; v++) to[v] = joints[v] * gates[t];
    for (; to < both + (q + 1) * both_ld; to++) *to = 0;
  }
  for (int64_t o = 0; o < O; o++)
    for (int64_t q = 0; q < planes; q++) {
      float *y = plane(o, q), *factor = both + q * both_ld;
      const Vec<float> gate = splat<float>(squeezed[o]);
      const int64_t pixels = ceil_div(T - q, s.planes) * V;
      for (int64_t p = 0; p < pixels; p += lanes<float>) store(y + p, load(y + p) * (load(factor + p) * gate));
    }
}

inline void fused_aa(const FusedStep& s, int64_t V, float* arena, Share share) {
  if (s.kind == FusedStep::kAaGraph) aa_graphs(s, V, arena, share);
  else if (s.kind == FusedStep::kAaApply) aa_apply(s, V, arena, share);
  else attend(s, V, arena);
}
