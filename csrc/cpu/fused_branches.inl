// Steps of the multi-branch temporal units that are no convolutions, and the means over frames that graphs are made from.

// dst rows of joints: what lies past the last joint repeats the joints of the last 16 lanes (see FusedGraphs).
INLINE void fused_means(const FusedStep& s, int64_t V, float* arena) {
  const int64_t ld = s.dst_ld;
  const Vec<float> scale = splat<float>(1.f / (float)s.src_frames);
  for (int64_t r = 0; r < s.rows; r++) {
    const float* from = arena + s.src + r * s.src_ld;
    float* to = arena + s.dst + r * ld;
    for (int64_t v = 0; v < V; v += lanes<float>) {
      Vec<float> sum[4] = {};
      const float* x = from + v;
      int64_t t = 0;
      for (; t + 4 <= s.src_frames; t += 4)
        UNROLL for (int i = 0; i < 4; i++) sum[i] += load(x + (t + i) * V);
      for (; t < s.src_frames; t++) sum[0] += load(x + t * V);
      store(to + v, ((sum[0] + sum[1]) + (sum[2] + sum[3])) * scale);
    }
    const int64_t base = (V - 1) / 16 * 16;
    for (int64_t v = V; v < ld; v++) to[v] = to[base + (v - base) % (V - base)];
  }
}

INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return (a > b) | (a != a) ? a : b; }  // NaN, if one is

// relu as in kConv; scale in coef, shift in bias, both per row.
INLINE void fused_max(const FusedStep& s, int64_t V, float* arena) {
  const int64_t pixels = s.frames * V;
  const Vec<float> zero = {}, lowest = splat<float>(-__builtin_inff()), first = s.relu == 2 ? zero : lowest, last = s.relu ? zero : lowest;
  for (int64_t r = 0; r < s.rows; r++) {
    const float *x = arena + r * s.src_ld, *res = s.residual < 0 ? nullptr : arena + s.residual + r * s.residual_ld;
    float* y = arena + s.dst + r * s.dst_ld;
    const Vec<float> scale = splat<float>(s.coef[r]), shift = splat<float>(s.bias[r]);
    for (int64_t p = 0; p < pixels; p += lanes<float>) {
      const Vec<float> a = load(x + s.offset[0] + p), b = load(x + s.offset[1] + p), c = load(x + s.offset[2] + p);
      Vec<float> top = larger(larger(a, b), c) * scale + shift;
      top = top < first ? first : top;  // a NaN stays one
      if (res) top += load(res + p);
      store(y + p, top < last ? last : top);
    }
  }
}

INLINE void fused_joint_mean(const FusedStep& s, int64_t V, float* arena) {
  const int64_t whole = V / lanes<float> * lanes<float>, left = V - whole;
  const float scale = 1.f / (float)V;
  for (int64_t r = 0; r < s.rows; r++) {
    const float* x = arena + s.src + r * s.src_ld;
    float* y = arena + s.dst + r * s.dst_ld;
    for (int64_t t = 0; t < s.src_frames; t++, x += V, y += V + 1) {
      Vec<float> sum = {};
      for (int64_t v = 0; v < whole; v += lanes<float>) {
        const Vec<float> in = load(x + v);
        store(y + v, in);
        sum += in;
      }
      if (left) {
        const Vec<float> in = load_first(x + whole, left);
        store(y + whole, in);  // beyond the frame: its mean and the next frame, both still to come
        sum += in;
      }
      y[V] = sum_lanes<float>(sum) * scale;
    }
  }
}

// coef: (V) and whole vectors of slack behind it.
INLINE void fused_joint_add(const FusedStep& s, int64_t V, float* arena) {
  for (int64_t r = 0; r < s.rows; r++) {
    const float* x = arena + s.src + r * s.src_ld;
    float* y = arena + s.dst + r * s.dst_ld;
    const Vec<float> bias = splat<float>(s.bias[r]);
    for (int64_t t = 0; t < s.frames; t++, x += V + 1, y += V) {
      const Vec<float> mean = splat<float>(x[V]);
      for (int64_t v = 0; v < V; v += lanes<float>) store(y + v, relu(load(x + v) + bias + mean * load(s.coef + v)));
    }
  }
}

__attribute__((noinline)) void fused_branch_step(const FusedStep& s, int64_t V, float* arena) {
  if (s.kind == FusedStep::kMeans) fused_means(s, V, arena);
  else if (s.kind == FusedStep::kMax) fused_max(s, s.joints ? s.joints : V, arena);
  else if (s.kind == FusedStep::kJointMean) fused_joint_mean(s, V, arena);
  else fused_joint_add(s, V, arena);
}
