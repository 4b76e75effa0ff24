// aa_graph: G[n,k] = A_k + alpha tanh(S[n,k] / (R T)), S[n,k,v,w] = sum over r, t of a[n,k,r,t,v] b[n,k,r,t,w].
// Reference: kernels/reference_dynamic.py. Backward: dS = alpha dG (1 - tanh^2) / (R T), then da = b dS' and db = a dS.

// Every sum over r is split in this many parts, so that one sample serves several threads; the parts are then added in
// order, whatever the threads.
constexpr int64_t aa_parts = 4;

// Parts of S, (N, K, aa_parts, map).
template <class S>
void aa_similarity(const DynamicShape& s, const Joints<S>& j, GroupView<const S> a, GroupView<const S> b, S* parts, int threads) {
  parallel(s.N * s.K * aa_parts, threads, [&](int64_t task) {
    const int64_t n = task / aa_parts / s.K, k = task / aa_parts % s.K, part = task % aa_parts;
    task_scratch.reserve(Scratch::room<S>(s.T * j.ld));
    S* packed = task_scratch.take<S>(s.T * j.ld);
    S* sum = parts + task * j.map;
    std::memset(sum, 0, j.map * sizeof(S));
    for (int64_t r = part * s.R / aa_parts; r < (part + 1) * s.R / aa_parts; r++) {
      pack_frames(frames_of(b, n, k, r), s.T, j, packed);
      correlate(frames_of(a, n, k, r), packed, s.T, j, sum, true);
    }
  });
}

// Vector i of tanh(S / (R T)), S the sum of all parts.
template <class S>
INLINE Vec<S> aa_tanh(const S* parts, const Joints<S>& j, Vec<S> scale, int64_t i) {
  Vec<S> sum = load(parts + i);
  for (int64_t part = 1; part < aa_parts; part++) sum += load(parts + part * j.map + i);
  return tanh_of<S>(sum * scale);
}
template <class S>
INLINE Vec<S> aa_scale(const DynamicShape& s) { return splat<S>(S(1) / S(s.R * s.T)); }

template <class S>
void aa_graphs(const DynamicShape& s, GroupView<const S> a, GroupView<const S> b, const S* alpha, const S* A, S* graphs,
               int threads) {
  const Joints<S> j(s.V);
  call_scratch.reserve(Scratch::room<S>(s.K * j.map) + Scratch::room<S>(s.N * s.K * aa_parts * j.map));
  S* shared = call_scratch.take<S>(s.K * j.map);
  S* parts = call_scratch.take<S>(s.N * s.K * aa_parts * j.map);
  for (int64_t k = 0; k < s.K; k++) pack_map(A + k * s.V * s.V, false, j, shared + k * j.map);
  aa_similarity(s, j, a, b, parts, threads);
  parallel(s.N * s.K, threads, [&](int64_t task) {
    task_scratch.reserve(Scratch::room<S>(j.map));
    S* graph = task_scratch.take<S>(j.map);
    for (int64_t i = 0; i < j.map; i += lanes<S>)
      store(graph + i, load(shared + task % s.K * j.map + i) +
                           splat<S>(*alpha) * aa_tanh(parts + task * aa_parts * j.map, j, aa_scale<S>(s), i));
    for (int64_t v = 0; v < s.V; v++) unpack_joints(graph + v * j.ld, j, graphs + (task * s.V + v) * s.V);
  });
}

// dalpha and dA of dgraphs (N, K, V, V), where `along` is <dG, tanh> of every sample and subset.
template <class S>
void aa_scales(const DynamicShape& s, const S* dgraphs, const double* along, S* dalpha, S* dA) {
  const int64_t size = s.V * s.V;
  double sum = 0;
  for (int64_t graph = 0; graph < s.N * s.K; graph++) sum += along[graph];
  *dalpha = (S)sum;
  for (int64_t i = 0; i < s.K * size; i++) {
    S total = 0;
    for (int64_t n = 0; n < s.N; n++) total += dgraphs[n * s.K * size + i];
    dA[i] = total;
  }
}

// The frames of da and db are contiguous (T, V).
template <class S>
void aa_graphs_backward(const DynamicShape& s, GroupView<const S> a, GroupView<const S> b, const S* alpha,
                        const S* dgraphs, GroupView<S> da, GroupView<S> db, S* dalpha, S* dA, int threads) {
  const Joints<S> j(s.V);
  const int64_t graphs = s.N * s.K, size = s.V * s.V;
  call_scratch.reserve(Scratch::room<S>(graphs * aa_parts * j.map) + Scratch::room<double>(graphs));
  S* parts = call_scratch.take<S>(graphs * aa_parts * j.map);
  double* dalphas = call_scratch.take<double>(graphs);
  aa_similarity(s, j, a, b, parts, threads);

  const bool streams = is_streamed<S>(s.N * s.K * s.R * s.T * s.V);
  parallel(graphs * aa_parts, threads, [&](int64_t task) {
    const int64_t graph = task / aa_parts, n = graph / s.K, k = graph % s.K, part = task % aa_parts;
    task_scratch.reserve(2 * Scratch::room<S>(j.map) + Scratch::room<S>(s.T * s.V));
    S* plain = task_scratch.take<S>(j.map);       // dG, then dS
    S* transposed = task_scratch.take<S>(j.map);  // dS'
    S* output = task_scratch.take<S>(s.T * s.V);
    pack_map(dgraphs + graph * size, false, j, plain);
    const Vec<S> scale = splat<S>(*alpha / S(s.R * s.T)), one = splat<S>(S(1));
    Vec<S> along = {};
    for (int64_t i = 0; i < j.map; i += lanes<S>) {
      const Vec<S> d = load(plain + i), t = aa_tanh(parts + graph * aa_parts * j.map, j, aa_scale<S>(s), i);
      along += d * t;
      store(plain + i, scale * d * (one - t * t));
    }
    if (part == 0) dalphas[graph] = sum_lanes<S>(along);
    transpose_map(plain, j, transposed);
    const auto row = [&](const GroupView<S>& to, int64_t r) { return to.data + n * to.stride[0] + k * to.stride[1] + r * to.stride[2]; };
    for (int64_t r = part * s.R / aa_parts; r < (part + 1) * s.R / aa_parts; r++) {
      const OneRow<S> to_a(output, row(da, r), streams), to_b(output, row(db, r), streams);
      multiply(frames_of(b, n, k, r), transposed, s.T, j, to_a.row);
      to_a.finish(s.T * s.V);
      multiply(frames_of(a, n, k, r), plain, s.T, j, to_b.row);
      to_b.finish(s.T * s.V);
    }
    end_stream();
  });

  aa_scales(s, dgraphs, dalphas, dalpha, dA);
}

// The same graphs of embeddings a and b that are rows of one convolution, all a_k, then all b_k, made while a sample's x is in L2.
// similar (N, K, V, V): tanh(S / (R T)), which the backward pass takes.
template <class S>
INLINE DynamicShape aa_pairs(const DynamicShape& s) { return {s.N, 2 * s.K, s.R, s.R, s.T, s.V}; }

template <class S>
void aa_unit_graphs(const DynamicShape& s, const Wide<S>& ab, const S* alpha, const S* A, S* graphs, S* similar, int threads) {
  const Joints<S> j(s.V);
  const DynamicShape pairs = aa_pairs<S>(s);
  const typename WideRows<S>::Tables tables(pairs, ab, 2);
  // Threads without a sample of their own take subsets of one.
  const int64_t parts = s.N ? max64(1, min64(s.K, ceil_div(threads, s.N))) : 1;
  parallel(s.N * parts, threads, [&](int64_t task) {
    const int64_t n = task / parts, part = task % parts;
    task_scratch.reserve(Scratch::room<S>(s.T * j.ld) + 2 * Scratch::room<S>(j.map) + tables.room(false));
    S* packed = task_scratch.take<S>(s.T * j.ld);
    S* sum = task_scratch.take<S>(j.map);
    S* graph = task_scratch.take<S>(j.map);
    WideRows<S> rows(tables, task_scratch);
    rows.enter(n);
    for (int64_t k = part * s.K / parts; k < (part + 1) * s.K / parts; k++) {
      std::memset(sum, 0, j.map * sizeof(S));
      for (int64_t r = 0; r < s.R; r += rows.group) {
        const int64_t count = min64(rows.group, s.R - r);
        rows.open(k, r, count, 0);
        rows.open(s.K + k, r, count, 1);
        for (int64_t i = 0; i < count; i++) {
          pack_frames(rows.row(i, 1), s.T, j, packed);
          correlate(rows.row(i, 0), packed, s.T, j, sum, true);
        }
      }
      pack_map(A + k * s.V * s.V, false, j, graph);
      for (int64_t i = 0; i < j.map; i += lanes<S>) {
        const Vec<S> t = tanh_of<S>(load(sum + i) * aa_scale<S>(s));
        store(sum + i, t);
        store(graph + i, load(graph + i) + splat<S>(*alpha) * t);
      }
      for (int64_t v = 0; v < s.V; v++) {
        unpack_joints(graph + v * j.ld, j, graphs + ((n * s.K + k) * s.V + v) * s.V);
        unpack_joints(sum + v * j.ld, j, similar + ((n * s.K + k) * s.V + v) * s.V);
      }
    }
  });
}

template <class S>
void aa_unit_graphs_backward(const DynamicShape& s, const Wide<S>& ab, const S* alpha, const S* similar, const S* dgraphs,
                             const WideGradient<S>& dab, S* dalpha, S* dA, int threads) {
  const Joints<S> j(s.V);
  const DynamicShape pairs = aa_pairs<S>(s);
  const typename WideRows<S>::Tables tables(pairs, ab, 2);
  const int64_t chunks = min64(max_chunks, max64(s.N, 1)), size = s.V * s.V;
  call_scratch.reserve(Scratch::room<S>(chunks * tables.sums()) + Scratch::room<double>(s.N * s.K));
  S* partial = call_scratch.take<S>(chunks * tables.sums());
  double* alongs = call_scratch.take<double>(s.N * s.K);
  parallel(chunks, threads, [&](int64_t chunk) {
    task_scratch.reserve(3 * Scratch::room<S>(j.map) + tables.room(true));
    S* plain = task_scratch.take<S>(j.map);       // dG, then dS
    S* transposed = task_scratch.take<S>(j.map);  // dS'
    S* tanhs = task_scratch.take<S>(j.map);
    WideRows<S> rows(tables, task_scratch, &dab);
    S* sums = partial + chunk * tables.sums();
    std::memset(sums, 0, tables.sums() * sizeof(S));
    for (int64_t n = chunk * s.N / chunks; n < (chunk + 1) * s.N / chunks; n++) {
      rows.enter(n);
      for (int64_t k = 0; k < s.K; k++) {
        const int64_t graph = n * s.K + k;
        pack_map(dgraphs + graph * size, false, j, plain);
        pack_map(similar + graph * size, false, j, tanhs);
        const Vec<S> scale = splat<S>(*alpha / S(s.R * s.T)), one = splat<S>(S(1));
        Vec<S> along = {};
        for (int64_t i = 0; i < j.map; i += lanes<S>) {
          const Vec<S> d = load(plain + i), t = load(tanhs + i);
          along += d * t;
          store(plain + i, scale * d * (one - t * t));
        }
        alongs[graph] = sum_lanes<S>(along);
        transpose_map(plain, j, transposed);
        for (int64_t r = 0; r < s.R; r += rows.group) {
          const int64_t count = min64(rows.group, s.R - r);
          rows.open(k, r, count, 0);
          rows.open(s.K + k, r, count, 1);
          for (int64_t i = 0; i < count; i++) {
            multiply(rows.row(i, 1), transposed, s.T, j, rows.gradient(i, 0));
            multiply(rows.row(i, 0), plain, s.T, j, rows.gradient(i, 1));
          }
          rows.send(count, sums, 0);
          rows.send(count, sums, 1);
        }
      }
      rows.leave();
    }
    end_stream();
  });
  WideRows<S>::finish(tables, partial, chunks, dab);
  aa_scales(s, dgraphs, alongs, dalpha, dA);
}
