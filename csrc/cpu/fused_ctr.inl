// The spatial unit of CTR-GCN on one person: dst = relu(sum over k of x3_k G_k + bias + residual), x3_k = conv3_k(src),
// G_k[c] = A_k + alpha (b4_k[c] + sum over live r of W4_k[c, r] tanh(x1_k[r, v] - x2_k[r, w])), a graph for every channel.
// x1 and x2 come from the means over frames, which steps before have made. Batch norm is folded into conv3 and the bias.
//
// Rank, not channels: tanh maps exist only for the (k, r) that a block of conv4 reads. x3 exists for 8 channels at a time. A
// graph that takes at most two maps of each subset is made inside the product that uses it (fused_product.inl).

constexpr int64_t ctr_channels = 8;  // channels whose x3 exist at a time

// body(block row, first row inside it, rows, channel): the pieces of block rows of bo channels that cover `count` channels.
template <class F>
INLINE void block_pieces(int64_t first, int64_t count, int64_t bo, F body) {
  for (int64_t c = first; c < first + count;) {
    const int64_t g = c / bo, o = c % bo, n = min64(bo - o, first + count - c);
    body(g, o, n, c);
    c += n;
  }
}

// Rows [first, first + count) of a convolution whose entries start at block row `group`, without an epilogue.
INLINE void fused_rows(const FusedStep& s, int64_t group, const float* bias, int64_t first, int64_t count, int64_t at,
                       int64_t pixels, const float* arena, float* y, int64_t ldy, bool positive) {
  block_pieces(first, count, s.bo, [&](int64_t g, int64_t o, int64_t n, int64_t c) __attribute__((always_inline)) {
    Entries<float> e = fused_entries(s, group + g);
    e.weight += o;
    auto start = [&](int64_t i, int64_t, int) __attribute__((always_inline)) { return splat<float>(bias[c + i]); };
    const Vec<float> floor = positive ? Vec<float>{} : splat<float>(-__builtin_inff());
    fused_row(arena + at, e, n, pixels, y + (c - first) * ldy, ldy, start,
              [&](int64_t, int64_t, Vec<float> sum) __attribute__((always_inline)) { return sum < floor ? floor : sum; });  // a NaN stays one
  });
}

// The tanh maps of all live (k, r).
INLINE void tanh_maps(const FusedGraphs& d, const Joints<float>& j, float* arena) {
  for (int64_t m = 0; m < d.live; m++) {
    float* to = arena + d.maps + m * j.map;
    const int64_t ld = j.ld;
    tanh_map<float>(arena + d.x1 + d.live_row[m] * ld, arena + d.x2 + d.live_row[m] * ld, j, 1, arena + d.work,
                    [=](int64_t v, int64_t i, Vec<float> t) __attribute__((always_inline)) { store(to + v * ld + i * lanes<float>, t); });
  }
}

struct CtrMaker {
  const FusedStep& s;
  const FusedGraphs& d;
  const Joints<float> j;
  float* arena;
  int64_t groups;  // block rows of conv4

  // Recipes of one channel's graphs; false if one of them takes more than two maps.
  INLINE bool recipes(int64_t c, Frame25Recipe* how) const {
    const int64_t g = c / d.mix_bo, o = c % d.mix_bo;
    for (int64_t k = 0; k < s.subsets; k++) {
      const int64_t e = d.mix_ptr[k * groups + g], n = d.mix_ptr[k * groups + g + 1] - e;
      if (n > 2) return false;
      const float *a = d.adjacency + k * j.map, *maps = arena + d.maps;
      how[k] = {a, n > 0 ? maps + d.mix_offset[e] : a, n > 1 ? maps + d.mix_offset[e + 1] : nullptr, d.mix_bias[k * s.rows + c],
                n > 0 ? d.mix_weight[e * d.mix_bo + o] : 0, n > 1 ? d.mix_weight[(e + 1) * d.mix_bo + o] : 0};
    }
    return true;
  }

  // Graphs of `count` channels: channel by channel, the subsets of one behind each other.
  INLINE void graphs(int64_t first, int64_t count) const {
    for (int64_t k = 0; k < s.subsets; k++) {
      const float *a = d.adjacency + k * j.map, *bias = d.mix_bias + k * s.rows;
      block_pieces(first, count, d.mix_bo, [&](int64_t g, int64_t o, int64_t n, int64_t c) __attribute__((always_inline)) {
        const int64_t e = d.mix_ptr[k * groups + g];
        const Entries<float> entries{d.mix_offset + e, d.mix_weight + e * d.mix_bo + o, d.mix_ptr[k * groups + g + 1] - e, d.mix_bo};
        fused_row(arena + d.maps, entries, n, j.map, arena + d.graph + ((c - first) * s.subsets + k) * j.map, s.subsets * j.map,
                  [&](int64_t i, int64_t p, int v) __attribute__((always_inline)) { return load(a + p + v * lanes<float>) + splat<float>(bias[c + i]); },
                  [&](int64_t, int64_t, Vec<float> sum) __attribute__((always_inline)) { return sum; });
      });
    }
  }
};

__attribute__((noinline)) void fused_ctr(const FusedStep& s, int64_t V, float* arena) {
  const FusedGraphs& d = s.graphs;
  const int64_t ld = d.joint_ld, pixels = s.frames * V, K = s.subsets;
  const CtrMaker maker{s, d, joints_with(V, ld), arena, ceil_div(s.rows, d.mix_bo)};
  const Joints<float>& j = maker.j;
  tanh_maps(d, j, arena);
  const bool late = VECTOR_BYTES == 64 && V == 25 && s.frames >= make_frames && K <= max_recipes;
  const int64_t ldx = s.scratch_ld;
  for (int64_t c0 = 0; c0 < s.rows; c0 += ctr_channels) {
    const int64_t count = min64(ctr_channels, s.rows - c0);
    for (int64_t k = 0; k < K; k++)
      fused_rows(s, k * s.groups, s.bias + k * s.rows, c0, count, 0, pixels, arena, arena + s.scratch + k * ldx, K * ldx, false);
    Frame25Recipe how[ctr_channels][max_recipes];
    bool all_late = late;
    for (int64_t o = 0; o < count && all_late; o++) all_late = maker.recipes(c0 + o, how[o]);
    if (!all_late) maker.graphs(c0, count);
    for (int64_t o = 0; o < count; o++) {
      const int64_t c = c0 + o;
      graph_product<true>({arena + s.scratch + o * K * ldx, ldx, K, arena + d.graph + (all_late ? 0 : o * K * j.map),
                           arena + s.residual + c * s.residual_ld, s.coef[c], arena + s.dst + c * s.dst_ld, s.frames},
                          V, ld, all_late ? how[o] : nullptr);
    }
  }
}
