// graph_product: Z[n, k I + i, t, w] = sum over v of X[n,i,t,v] A_k[v,w], for a shared sparse adjacency or dense graphs of the
// samples (G as in graph_conv.inl). What a dense convolution over all subsets reads; backward dX_i = sum over k of dZ_k,i A_k',
// dA_k[v,w] = sum over i, t of X[v] dZ_k[w].

// The channels of a sample in this many parts: one sample serves several threads, and sums over parts are added in order.
constexpr int64_t product_parts = 4;

template <class S, class G>
void graph_product_with(const DynamicShape& s, const G& graphs, View<const S> x, S* z, int threads) {
  const int64_t ld = row_length<S>(s.T * s.V), pixels = s.T * s.V;
  parallel(s.N * product_parts, threads, [&](int64_t task) {
    const int64_t n = task / product_parts, part = task % product_parts;
    task_scratch.reserve(2 * Scratch::room<S>(ld));
    S* input = task_scratch.take<S>(ld);
    S* output = task_scratch.take<S>(ld);
    const auto& graph = graphs.at(n);
    for (int64_t i = part * s.C / product_parts; i < (part + 1) * s.C / product_parts; i++) {
      pack_rows(x, n, i, 1, s.T, s.V, 0, s.T, input, ld);
      for (int64_t k = 0; k < s.K; k++) {
        graph.apply(k, input, s.T, output);
        std::memcpy(z + ((n * s.K + k) * s.C + i) * pixels, output, pixels * sizeof(S));
      }
    }
  });
}

// partial: `sums` numbers for each of N * product_parts parts, or nullptr.
template <class S, class G>
void graph_product_backward_with(const DynamicShape& s, const G& graphs, const G& transposed, View<const S> x, View<const S> dz,
                                 S* dx, S* partial, int64_t sums, int threads) {
  const int64_t ld = row_length<S>(s.T * s.V), pixels = s.T * s.V;
  parallel(s.N * product_parts, threads, [&](int64_t task) {
    const int64_t n = task / product_parts, part = task % product_parts;
    task_scratch.reserve(3 * Scratch::room<S>(ld));
    S* input = task_scratch.take<S>(ld);
    S* gradient = task_scratch.take<S>(ld);
    S* output = task_scratch.take<S>(ld);
    const auto &graph = graphs.at(n), &back = transposed.at(n);
    S* sum = partial ? partial + task * sums : nullptr;
    if (sum) std::memset(sum, 0, sums * sizeof(S));
    for (int64_t i = part * s.C / product_parts; i < (part + 1) * s.C / product_parts; i++) {
      if (sum) pack_rows(x, n, i, 1, s.T, s.V, 0, s.T, input, ld);
      std::memset(output, 0, pixels * sizeof(S));
      for (int64_t k = 0; k < s.K; k++) {
        pack_rows(dz, n, k * s.C + i, 1, s.T, s.V, 0, s.T, gradient, ld);
        back.add(k, gradient, s.T, output);
        if (sum) graph.correlate(k, input, gradient, s.T, sum);
      }
      std::memcpy(dx + (n * s.C + i) * pixels, output, pixels * sizeof(S));
    }
  });
}

template <class S>
void graph_product(const DynamicShape& s, const Adjacency& a, View<const S> x, const S* coef, S* z, int threads) {
  call_scratch.reserve(AdjacencyTable<S>::room(a));
  graph_product_with(s, AdjacencyTable<S>(a, coef, false, call_scratch), x, z, threads);
}

// dcoef may be nullptr.
template <class S>
void graph_product_backward(const DynamicShape& s, const Adjacency& a, View<const S> x, View<const S> dz, const S* coef, S* dx,
                            S* dcoef, int threads) {
  const int64_t sums = AdjacencyTable<S>::sums(a), count = s.N * product_parts;
  call_scratch.reserve(2 * AdjacencyTable<S>::room(a) + Scratch::room<S>(max64(count, 1) * sums));
  const AdjacencyTable<S> forward(a, coef, false, call_scratch), transposed(a, coef, true, call_scratch);
  S* partial = dcoef ? call_scratch.take<S>(max64(count, 1) * sums) : nullptr;
  if (partial) std::memset(partial, 0, sums * sizeof(S));  // of no samples
  graph_product_backward_with(s, forward, transposed, x, dz, dx, partial, sums, threads);
  if (!dcoef) return;
  add_parts(partial, count, sums);
  forward.collect(a, partial, dcoef);
}

template <class S>
void sample_product(const DynamicShape& s, View<const S> x, const S* graphs, S* z, int threads) {
  const Joints<S> j(s.V);
  call_scratch.reserve(SampleGraphs<S>::room(j, s.N, s.K));
  graph_product_with(s, SampleGraphs<S>(j, s.N, s.K, graphs, false, call_scratch), x, z, threads);
}

// dgraphs may be nullptr.
template <class S>
void sample_product_backward(const DynamicShape& s, View<const S> x, View<const S> dz, const S* graphs, S* dx, S* dgraphs,
                             int threads) {
  const Joints<S> j(s.V);
  const int64_t sums = s.K * j.map;
  call_scratch.reserve(2 * SampleGraphs<S>::room(j, s.N, s.K) + Scratch::room<S>(s.N * product_parts * sums));
  const SampleGraphs<S> forward(j, s.N, s.K, graphs, false, call_scratch), transposed(j, s.N, s.K, graphs, true, call_scratch);
  S* partial = dgraphs ? call_scratch.take<S>(s.N * product_parts * sums) : nullptr;
  graph_product_backward_with(s, forward, transposed, x, dz, dx, partial, sums, threads);
  for (int64_t n = 0; dgraphs && n < s.N; n++) {
    S* sum = partial + n * product_parts * sums;
    add_parts(sum, product_parts, sums);
    for (int64_t r = 0; r < s.K * s.V; r++) unpack_joints(sum + r * j.ld, j, dgraphs + (n * s.K * s.V + r) * s.V);
  }
}
