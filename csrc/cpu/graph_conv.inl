// graph_conv: Y[n,o,t,w] = B[o,w] + sum over live (o,i,k) of W[o,i,k] Z_k[n,i,t,w],
// Z_k[n,i,t,w] = sum over entries (k,v,w) of A_k[v,w] X[n,i,t,v]; B[o,w] = sum over k, v of A_k[v,w] b_k[o] comes ready.
//
// The adjacency goes first: sum_k (W_k X) A_k = sum_k W_k (X A_k). Only rows (i, k) that a live block reads are made, the
// sum over k stays in registers, and neither W_k X nor Z ever exists as a whole tensor. G is where the graph of sample n
// comes from: one AdjacencyTable that all samples share, or SampleGraphs.
// Backward: dZ = W^T dY by scatter into the same panel, or by gather where blocks have few outputs, dX_i = sum_k dZ_k,i A_k^T, dA_k[v,w] = sum X[v] dZ_k[w].

struct GraphPlan {
  int64_t frames, tiles, ld, zrows;
  int32_t* row;  // (I, K) -> row of the panel, or -1

  template <class S>
  static GraphPlan make(int64_t N, int64_t T, int64_t V, const Pattern& p, int64_t threads, int64_t tasks, int32_t* row,
                        int64_t panels = 1) {
    GraphPlan r;
    r.row = row;
    for (int64_t j = 0; j < p.I * p.K; j++) row[j] = -1;
    for (int64_t b = 0; b < p.blocks; b++)
      for (int64_t i = p.input[b] * p.bi; i < min64(p.I, (p.input[b] + 1) * p.bi); i++) row[i * p.K + p.tap[b]] = 0;
    r.zrows = 0;
    for (int64_t j = 0; j < p.I * p.K; j++)
      if (row[j] == 0) row[j] = (int32_t)r.zrows++;
    r.frames = tile_frames(T, max64(panels * r.zrows, 1), V, sizeof(S), N, threads, tasks);
    r.tiles = ceil_div(T, r.frames);
    r.ld = row_length<S>(r.frames * V);
    return r;
  }
  void offsets(const Pattern& p, int32_t* offset) const {  // the ragged edge reads row zrows, which is all zeros
    for (int64_t b = 0; b < p.blocks; b++)
      for (int64_t j = 0; j < p.bi; j++) {
        const int64_t i = p.input[b] * p.bi + j;
        *offset++ = (int32_t)((i < p.I ? row[i * p.K + p.tap[b]] : zrows) * ld);
      }
  }
  int64_t panel_size() const { return (zrows + 1) * ld; }
};

template <class S, class A, class G>
void pack_graph_panel(const GraphPlan& plan, int64_t T, int64_t V, const Pattern& p, const G& graph, const View<const A>& x,
                      int64_t n, int64_t t0, int64_t frames, S* input, S* panel) {
  for (int64_t i = 0; i < p.I; i++) {
    bool packed = false;
    for (int64_t k = 0; k < p.K; k++) {
      const int32_t r = plan.row[i * p.K + k];
      if (r < 0) continue;
      if (!packed) pack_rows(x, n, i, 1, T, V, t0, frames, input, plan.ld), packed = true;
      S* z = panel + r * plan.ld;
      graph.apply(k, input, frames, z);
      std::memset(z + frames * V, 0, (plan.ld - frames * V) * sizeof(S));
    }
  }
  std::memset(panel + plan.zrows * plan.ld, 0, plan.ld * sizeof(S));
}

// Of the tables of a pattern; the caller's graphs come from the same scratch.
INLINE size_t graph_room(const Pattern& p) {
  return Scratch::room<int32_t>(p.I * p.K) + Scratch::room<int32_t>(p.blocks * p.bi);
}

// A is what x, y and their gradients are stored as; T are frames.
template <class S, class A, class G>
void graph_forward_with(int64_t N, int64_t T, int64_t V, const Pattern& p, const G& graphs, View<const A> x, const S* values,
                        const S* bias_map, A* y, int threads) {
  int32_t* row = call_scratch.take<int32_t>(p.I * p.K);
  int32_t* offset = call_scratch.take<int32_t>(p.blocks * p.bi);
  const auto plan = GraphPlan::make<S>(N, T, V, p, threads, threads, row);
  plan.offsets(p, offset);
  const bool streams = is_streamed<S>(N * p.O * T * V);
  parallel(N * plan.tiles, threads, [&](int64_t task) {
    const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames, frames = min64(plan.frames, T - t0);
    task_scratch.reserve(Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(plan.ld) + Scratch::room<S>(p.bo * plan.ld));
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* input = task_scratch.take<S>(plan.ld);
    S* room = task_scratch.take<S>(p.bo * plan.ld);
    pack_graph_panel(plan, T, V, p, graphs.at(n), x, n, t0, frames, input, panel);
    for (int64_t g = 0; g < p.rows; g++) {
      const int64_t live = live_rows(p, g);
      A* out = y + ((n * p.O + g * p.bo) * T + t0) * V;
      const OutputRows<S, A> sums(room, plan.ld, out, T * V, streams);
      gather_row(panel, block_row(p, g, offset, values), live, (const S*)nullptr, sums.rows, sums.ld, sums.pixels(frames * V));
      for (int64_t o = 0; bias_map && o < live; o++)
        for (int64_t t = 0; t < frames; t++)
          for (int64_t v = 0; v < V; v++) sums.rows[o * sums.ld + t * V + v] += bias_map[(g * p.bo + o) * V + v];
      sums.finish(live, frames * V, out, T * V);
    }
    end_stream();
  });
}

template <class S, class A>
void graph_forward(int64_t N, int64_t T, const Pattern& p, const Adjacency& a, View<const A> x, const S* values,
                   const S* coef, const S* bias_map, A* y, int threads) {
  call_scratch.reserve(graph_room(p) + AdjacencyTable<S>::room(a));
  const AdjacencyTable<S> adjacency(a, coef, false, call_scratch);
  graph_forward_with(N, T, a.V, p, adjacency, x, values, bias_map, y, threads);
}

// dZ row by row, for blocks of few outputs: a row is gathered over all of dY, sent back through the adjacency and forgotten.
template <class S>
struct GatheredDz {
  const TransposedEntries<S>& entries;
  const S* dy;  // (O, ld)

  void make(int64_t row, int64_t pixels, S* dz) const {
    const int32_t first = entries.ptr[row];
    gather_row(dy, {entries.offset + first, entries.weight + first, entries.ptr[row + 1] - first, 1}, 1, (const S*)nullptr, dz, 0,
               ceil_div(pixels, lanes<S>) * lanes<S>);
  }
};

// Tiles of samples, always the same ones: dA is a sum over them. Returns how many partial sums of it there are.
template <class S, class A, class G>
int64_t graph_dx_with(int64_t N, int64_t T, int64_t V, const Pattern& p, const GraphPlan& plan, const G& forward,
                      const G& transposed, View<const A> x, View<const A> dy, const S* values, A* dx, S* partial,
                      int64_t sums, int threads) {
  int32_t* offset = call_scratch.take<int32_t>(p.blocks * p.bi);
  plan.offsets(p, offset);
  const bool gathers = p.bo < 4;
  const TransposedEntries<S> entries(p, gathers ? p.K : 0, values, plan.ld, [](int64_t k, int64_t q) { return k == q ? 0 : -1; },
                                     call_scratch);
  const int64_t tasks = N * plan.tiles, chunks = min64(max_chunks, max64(tasks, 1));
  const bool streams = is_streamed<S>(N * p.I * T * V);
  const int64_t panel_rows = gathers ? 1 : plan.zrows + 1, packed_rows = gathers ? p.O : p.bo;
  parallel(chunks, threads, [&](int64_t chunk) {
    task_scratch.reserve(Scratch::room<S>(panel_rows * plan.ld) + Scratch::room<S>(packed_rows * plan.ld) +
                         2 * Scratch::room<S>(plan.ld));
    S* panel = task_scratch.take<S>(panel_rows * plan.ld);
    S* rows = task_scratch.take<S>(packed_rows * plan.ld);
    const GatheredDz<S> gathered{entries, rows};
    S* input = task_scratch.take<S>(plan.ld);
    S* output = task_scratch.take<S>(plan.ld);
    if (partial && !G::of_samples) std::memset(partial + chunk * sums, 0, sums * sizeof(S));
    for (int64_t task = chunk * tasks / chunks; task < (chunk + 1) * tasks / chunks; task++) {
      const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames, frames = min64(plan.frames, T - t0);
      const auto& graph = forward.at(n);
      const auto& back = transposed.at(n);
      S* sum = partial ? partial + (G::of_samples ? task : chunk) * sums : nullptr;
      if (partial && G::of_samples) std::memset(sum, 0, sums * sizeof(S));
      if (gathers) pack_rows(dy, n, 0, p.O, T, V, t0, frames, rows, plan.ld);
      else std::memset(panel, 0, panel_rows * plan.ld * sizeof(S));
      for (int64_t g = 0; !gathers && g < p.rows; g++) {
        pack_rows(dy, n, g * p.bo, live_rows(p, g), T, V, t0, frames, rows, plan.ld);
        scatter_row(panel, block_row(p, g, offset, values), live_rows(p, g), rows, plan.ld, frames * V);
      }
      for (int64_t i = 0; i < p.I; i++) {
        std::memset(output, 0, frames * V * sizeof(S));
        if (partial) pack_rows(x, n, i, 1, T, V, t0, frames, input, plan.ld);
        for (int64_t k = 0; k < p.K; k++) {
          const int32_t r = plan.row[i * p.K + k];
          if (r < 0) continue;
          S* dz = gathers ? panel : panel + r * plan.ld;
          if (gathers) gathered.make(i * p.K + k, frames * V, dz);
          back.add(k, dz, frames, output);
          if (partial) graph.correlate(k, input, dz, frames, sum);
        }
        leave_row(dx + ((n * p.I + i) * T + t0) * V, output, frames * V, streams);
      }
    }
    end_stream();
  });
  return G::of_samples ? tasks : chunks;
}

template <class S, class A>
void graph_dx(int64_t N, int64_t T, const Pattern& p, const Adjacency& a, View<const A> x, View<const A> dy,
              const S* values, const S* coef, A* dx, S* dcoef, int threads) {
  const int64_t sums = AdjacencyTable<S>::sums(a);
  call_scratch.reserve(graph_room(p) + 2 * AdjacencyTable<S>::room(a) + Scratch::room<S>(max_chunks * sums) +
                       TransposedEntries<S>::room(p, p.K));
  int32_t* row = call_scratch.take<int32_t>(p.I * p.K);
  const AdjacencyTable<S> forward(a, coef, false, call_scratch), transposed(a, coef, true, call_scratch);
  S* partial = call_scratch.take<S>(max_chunks * sums);
  const auto plan = GraphPlan::make<S>(N, T, a.V, p, fixed_threads, fixed_tasks, row);
  const int64_t count = graph_dx_with(N, T, a.V, p, plan, forward, transposed, x, dy, values, dx, dcoef ? partial : nullptr,
                                      sums, threads);
  if (!dcoef) return;
  add_parts(partial, count, sums);
  forward.collect(a, partial, dcoef);
}

template <class S>
size_t graph_dw_room(const Pattern& p, int64_t V) {
  return graph_room(p) + Scratch::room<S>(max_chunks * p.blocks * p.bi * p.bo) + Scratch::room<S>(max_chunks * p.O * V);
}

template <class S, class A, class G>
void graph_dw_with(int64_t N, int64_t T, int64_t V, const Pattern& p, const G& graphs, View<const A> x, View<const A> dy,
                   const Lasso<S>& lasso, S* dw, S* dbias_map, int threads) {
  const int64_t entries = p.blocks * p.bi, size = entries * p.bo;
  int32_t* row = call_scratch.take<int32_t>(p.I * p.K);
  int32_t* offset = call_scratch.take<int32_t>(entries);
  S* partial = call_scratch.take<S>(max_chunks * size);
  S* partial_bias = call_scratch.take<S>(max_chunks * p.O * V);
  const auto plan = GraphPlan::make<S>(N, T, V, p, fixed_threads, fixed_tasks, row);
  plan.offsets(p, offset);
  const int64_t tasks = N * plan.tiles, chunks = min64(max_chunks, max64(tasks, 1));
  parallel(chunks, threads, [&](int64_t chunk) {
    S* sum = partial + chunk * size;
    S* bias = partial_bias + chunk * p.O * V;
    std::memset(sum, 0, size * sizeof(S));
    std::memset(bias, 0, p.O * V * sizeof(S));
    task_scratch.reserve(Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(p.bo * plan.ld) + Scratch::room<S>(plan.ld));
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* rows = task_scratch.take<S>(p.bo * plan.ld);
    S* input = task_scratch.take<S>(plan.ld);
    for (int64_t task = chunk * tasks / chunks; task < (chunk + 1) * tasks / chunks; task++) {
      const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames, frames = min64(plan.frames, T - t0);
      pack_graph_panel(plan, T, V, p, graphs.at(n), x, n, t0, frames, input, panel);
      for (int64_t g = 0; g < p.rows; g++) {
        const int64_t live = live_rows(p, g), e = p.row_ptr[g] * p.bi;
        pack_rows(dy, n, g * p.bo, live, T, V, t0, frames, rows, plan.ld);
        dot_row(panel, offset + e, (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi, p.bo, live, rows, plan.ld, frames * V,
                sum + e * p.bo);
        if (dbias_map)
          for (int64_t o = 0; o < live; o++)
            for (int64_t t = 0; t < frames; t++)
              for (int64_t v = 0; v < V; v++) bias[(g * p.bo + o) * V + v] += rows[o * plan.ld + t * V + v];
      }
    }
    clear_ragged(p, sum);
  });
  add_chunks(partial, chunks, p.blocks, p.bi * p.bo, lasso, dw, threads);
  if (dbias_map) add_chunks(partial_bias, chunks, p.O, V, Lasso<S>{}, dbias_map, 1);
}

template <class S, class A>
void graph_dw(int64_t N, int64_t T, const Pattern& p, const Adjacency& a, View<const A> x, View<const A> dy, const S* coef,
              const Lasso<S>& lasso, S* dw, S* dbias_map, int threads) {
  call_scratch.reserve(graph_dw_room<S>(p, a.V) + AdjacencyTable<S>::room(a));
  const AdjacencyTable<S> adjacency(a, coef, false, call_scratch);
  graph_dw_with(N, T, a.V, p, adjacency, x, dy, lasso, dw, dbias_map, threads);
}
