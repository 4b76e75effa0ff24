// The graphs of DG-STGCN on one person: dst[k, c] = relu(pre[k, c](src)) G[k, c] with
// G[k, c] = A_k + alpha tanh(x1[k, c, v] - x2[k, c, w]) + beta softmax over v (sum over c of x1[k, c, v] x2[k, c, w]).
// x1 and x2 come from the means over frames. One graph exists at a time, and 8 channels of pre(src). Channels that nothing reads
// are not made: at 0.95 in blocks (8, 1) two of three of the first blocks.

constexpr int64_t dg_channels = 8;

__attribute__((noinline)) void fused_dg(const FusedStep& s, int64_t V, float* arena) {
  const FusedGraphs& d = s.graphs;
  const int64_t ld = d.joint_ld, pixels = s.frames * V, ldx = s.scratch_ld, inner = s.rows / s.subsets;
  const Joints<float> j = joints_with(V, ld);
  float *graph = arena + d.graph, *shared = arena + d.maps;  // shared: A + beta softmax, of one subset
  const Vec<float> alpha = splat<float>(d.scale[0]), beta = splat<float>(d.scale[1]);
  auto is_read = [&](int64_t first, int64_t count) {
    for (int64_t c = first; c < first + count; c++)
      if (d.read[c] >= 0) return true;
    return false;
  };
  for (int64_t c0 = 0; c0 < s.rows; c0 += dg_channels) {
    const int64_t count = min64(dg_channels, s.rows - c0);
    if (is_read(c0, count)) fused_rows(s, 0, s.bias, c0, count, 0, pixels, arena, arena + s.scratch, ldx, true);
    for (int64_t o = 0; o < count; o++) {
      const int64_t c = c0 + o;
      const float *x1 = arena + d.x1 + c * ld, *x2 = arena + d.x2 + c * ld;
      if (c % inner == 0 && is_read(c, inner)) {
        dg_attention<float>(inner, j, x1, x2, graph);
        const float* a = d.adjacency + c / inner * j.map;
        for (int64_t i = 0; i < j.map; i += lanes<float>) store(shared + i, load(a + i) + beta * load(graph + i));
      }
      if (d.read[c] < 0) continue;
      tanh_map<float>(x1, x2, j, 1, arena + d.work, [=](int64_t v, int64_t i, Vec<float> t) __attribute__((always_inline)) {
        const int64_t at = v * ld + i * lanes<float>;
        store(graph + at, load(shared + at) + alpha * t);
      });
      graph_product<false>({arena + s.scratch + o * ldx, 0, 1, graph, nullptr, 0, arena + s.dst + c * s.dst_ld, s.frames}, V, ld);
    }
  }
}
