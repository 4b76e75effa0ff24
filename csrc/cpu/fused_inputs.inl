// The spatial unit of CTR-GCN where few products are left: dst = relu(sum over live (k, j) and r of weights times x_j G + residual).
// conv3 is linear, so x3_k G_k is a sum of products of inputs x_j with A_k, with a map of ones, and with the tanh maps: each is
// made once for all the channels that read it, for a tile of frames at a time, and a sparse convolution adds them up.
// Input -1 is a frame of ones, which carries the bias of conv3.

// Every frame: the sum of its joints, at every joint.
INLINE void spread_sums(const float* x, int64_t frames, int64_t V, float* y) {
  const int64_t end = (V - 1) / lanes<float> * lanes<float>;
  for (int64_t t = 0; t < frames; t++, x += V, y += V) {
    Vec<float> sum = load_first(x + end, V - end);
    for (int64_t v = 0; v < end; v += lanes<float>) sum += load(x + v);
    const Vec<float> all = splat<float>(sum_lanes<float>(sum));
    for (int64_t v = 0; v < V; v += lanes<float>) store(y + v, all);
  }
}

__attribute__((noinline)) void fused_ctr_inputs(const FusedStep& s, int64_t V, float* arena) {
  const FusedGraphs& d = s.graphs;
  const int64_t ld = d.joint_ld, K = s.subsets;
  const Joints<float> j = joints_with(V, ld);
  tanh_maps(d, j, arena);
  float* ones = arena + d.graph;
  for (int64_t v = 0; v < V; v++) ones[v] = 1;
  for (int64_t t0 = 0; t0 < s.frames; t0 += s.tile) {
    const int64_t frames = min64(s.tile, s.frames - t0);
    for (int64_t z = 0; z < s.made; z++) {
      const int64_t graph = s.made_subset[z], input = s.made_input[z];
      const float* x = input < 0 ? ones : arena + s.src + input * s.src_ld + t0 * V;
      float* y = arena + s.scratch + z * s.scratch_ld;
      if (graph == K) { spread_sums(x, frames, V, y); continue; }
      if (input < 0 && t0 > 0) continue;  // all frames of all tiles are the same
      // A product reads its map only; adjacency is not the arena's.
      float* map = graph < K ? const_cast<float*>(d.adjacency) + graph * j.map : arena + d.maps + (graph - K - 1) * j.map;
      graph_product<false>({x, 0, 1, map, nullptr, 0, y, input < 0 ? 1 : frames}, V, ld);
      if (input < 0)
        for (int64_t t = 1; t < s.tile; t++) std::memcpy(y + t * V, y, V * sizeof(float));
    }
    for (int64_t g = 0; g < s.groups; g++) {
      const int64_t first = g * s.bo, rows = min64(s.bo, s.rows - first), ldr = s.residual_ld;
      const float *bias = s.bias + first, *res = arena + s.residual + first * ldr + t0 * V;
      fused_row(arena + s.scratch, fused_entries(s, g), rows, frames * V, arena + s.dst + first * s.dst_ld + t0 * V, s.dst_ld,
                [=](int64_t o, int64_t, int) __attribute__((always_inline)) { return splat<float>(bias[o]); },
                [=](int64_t o, int64_t p, Vec<float> sum) __attribute__((always_inline)) {
                  return relu(sum + load(res + o * ldr + p));
                });
    }
  }
}
