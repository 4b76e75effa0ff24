// graph_conv with a graph of its own for every sample, dense (N, K, V, V): the same loops as with a shared one, see graph_conv.inl.
// A graph is a map (small_product.inl), packed once a call; frames of a panel lie V apart and are read beyond their joints
// by whole vectors: those lanes only reach lanes of a result that nobody keeps.

template <class S>
struct SampleGraph {
  const Joints<S>& j;
  const S* maps;  // (K, map)

  void apply(int64_t k, const S* x, int64_t frames, S* z) const { run(k, x, frames, z, false); }
  void add(int64_t k, const S* x, int64_t frames, S* z) const { run(k, x, frames, z, true); }
  void run(int64_t k, const S* x, int64_t frames, S* z, bool add) const {
    product<S>({x, j.V, 1, maps + k * j.map, j.ld, j.V, z, j.V, add}, frames, j, j.last);
  }
  // sums[k, v, :] += sum over t of x[t, v] dz[t, :].
  void correlate(int64_t k, const S* x, const S* dz, int64_t frames, S* sums) const {
    product<S>({x, 1, j.V, dz, j.V, frames, sums + k * j.map, j.ld, true}, j.V, j, lanes<S>);
  }
};

template <class S>
struct SampleGraphs {
  static constexpr bool of_samples = true;
  const Joints<S>& j;
  int64_t K;
  S* maps;  // (N, K, map)

  static size_t room(const Joints<S>& j, int64_t N, int64_t K) { return Scratch::room<S>(N * K * j.map); }
  SampleGraphs(const Joints<S>& joints, int64_t N, int64_t subsets, const S* graphs, bool transposed, Scratch& scratch)
      : j(joints), K(subsets), maps(scratch.take<S>(N * subsets * joints.map)) {
    for (int64_t i = 0; i < N * K; i++) pack_map(graphs + i * j.V * j.V, transposed, j, maps + i * j.map);
  }
  SampleGraph<S> at(int64_t n) const { return {j, maps + n * K * j.map}; }
};

template <class S, class A>
void sample_graph_forward(const DynamicShape& s, const Pattern& p, View<const A> x, const S* values, const S* graphs,
                          const S* bias_map, A* y, int threads) {
  const Joints<S> j(s.V);
  call_scratch.reserve(graph_room(p) + SampleGraphs<S>::room(j, s.N, p.K));
  const SampleGraphs<S> forward(j, s.N, p.K, graphs, false, call_scratch);
  graph_forward_with(s.N, s.T, s.V, p, forward, x, values, bias_map, y, threads);
}

// dgraphs (N, K, V, V) may be nullptr.
template <class S, class A>
void sample_graph_dx(const DynamicShape& s, const Pattern& p, View<const A> x, View<const A> dy, const S* values,
                     const S* graphs, A* dx, S* dgraphs, int threads) {
  const Joints<S> j(s.V);
  const int64_t sums = p.K * j.map;
  const auto make_plan = [&] { return GraphPlan::make<S>(s.N, s.T, s.V, p, fixed_threads, fixed_tasks, call_scratch.take<int32_t>(p.I * p.K)); };
  call_scratch.reserve(graph_room(p));
  const int64_t tiles = make_plan().tiles;  // how much room the partial sums take
  call_scratch.reserve(graph_room(p) + 2 * SampleGraphs<S>::room(j, s.N, p.K) + TransposedEntries<S>::room(p, p.K) +
                       Scratch::room<S>(s.N * tiles * sums));
  const GraphPlan plan = make_plan();
  const SampleGraphs<S> forward(j, s.N, p.K, graphs, false, call_scratch), transposed(j, s.N, p.K, graphs, true, call_scratch);
  S* partial = dgraphs ? call_scratch.take<S>(s.N * tiles * sums) : nullptr;
  graph_dx_with(s.N, s.T, s.V, p, plan, forward, transposed, x, dy, values, dx, partial, sums, threads);
  if (!dgraphs) return;
  for (int64_t n = 0; n < s.N; n++) {
    S* sum = partial + n * tiles * sums;
    add_parts(sum, tiles, sums);
    for (int64_t r = 0; r < p.K * s.V; r++) unpack_joints(sum + r * j.ld, j, dgraphs + (n * p.K * s.V + r) * s.V);
  }
}

template <class S, class A>
void sample_graph_dw(const DynamicShape& s, const Pattern& p, View<const A> x, View<const A> dy, const S* graphs,
                     const Lasso<S>& lasso, S* dw, S* dbias_map, int threads) {
  const Joints<S> j(s.V);
  call_scratch.reserve(graph_dw_room<S>(p, s.V) + SampleGraphs<S>::room(j, s.N, p.K));
  const SampleGraphs<S> forward(j, s.N, p.K, graphs, false, call_scratch);
  graph_dw_with(s.N, s.T, s.V, p, forward, x, dy, lasso, dw, dbias_map, threads);
}
