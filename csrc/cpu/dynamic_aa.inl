// aa_aggregate: y[n,c,t,w] = sum over v of x[n,c,t,v] G[n,v,w], G[n] = A + alpha tanh(S[n] / (R T)),
// S[n,v,w] = sum over r, t of a[n,r,t,v] b[n,r,t,w]. Reference: kernels/reference_dynamic.py.
//
// Backward works on transposed maps: G' for dx, dG' = sum over c, t of dy x, dS' = alpha dG' (1 - tanh^2) / (R T), then
// da = b dS' and db = a dS.

// Every sum over r or c is split in this many parts, so that one sample serves several threads; the parts are then added
// in order, whatever the threads.
constexpr int64_t aa_parts = 4;

// Parts of S, (N, aa_parts, map): rows from `rows` (one number at a time), lanes from `lanes_of` (packed frame by frame).
template <class S>
void aa_similarity(const DynamicShape& s, const Joints<S>& j, View<const S> rows, View<const S> lanes_of, S* parts,
                   int threads) {
  parallel(s.N * aa_parts, threads, [&](int64_t task) {
    const int64_t n = task / aa_parts, part = task % aa_parts;
    task_scratch.reserve(Scratch::room<S>(s.T * j.ld));
    S* packed = task_scratch.take<S>(s.T * j.ld);
    S* sum = parts + task * j.map;
    std::memset(sum, 0, j.map * sizeof(S));
    for (int64_t r = part * s.R / aa_parts; r < (part + 1) * s.R / aa_parts; r++) {
      pack_frames(frames_of(lanes_of, n, r), s.T, j, packed);
      correlate(frames_of(rows, n, r), packed, s.T, j, sum, true);
    }
  });
}

// Vector i of the sum of all parts.
template <class S>
INLINE Vec<S> add_parts(const S* parts, const Joints<S>& j, int64_t i) {
  Vec<S> sum = load(parts + i);
  for (int64_t part = 1; part < aa_parts; part++) sum += load(parts + part * j.map + i);
  return sum;
}

// T = tanh(S / (R T)) and, if wanted, G = A + alpha T.
template <class S>
INLINE void aa_graph(const DynamicShape& s, const Joints<S>& j, const S* parts, const S* A, S alpha, S* tanh_map, S* graph) {
  const Vec<S> scale = splat<S>(S(1) / S(s.R * s.T)), a = splat<S>(alpha);
  for (int64_t i = 0; i < j.map; i += lanes<S>) {
    const Vec<S> t = tanh_of<S>(add_parts(parts, j, i) * scale);
    if (tanh_map) store(tanh_map + i, t);
    if (graph) store(graph + i, load(A + i) + a * t);
  }
}

template <class S>
void aa_forward(const DynamicShape& s, View<const S> x, View<const S> a, View<const S> b, const S* alpha, const S* A, S* y,
                int threads) {
  const Joints<S> j(s.V);
  call_scratch.reserve(Scratch::room<S>(j.map) + Scratch::room<S>(s.N * aa_parts * j.map));
  S* shared = call_scratch.take<S>(j.map);
  S* parts = call_scratch.take<S>(s.N * aa_parts * j.map);
  pack_map(A, false, j, shared);
  aa_similarity(s, j, a, b, parts, threads);
  parallel(s.N * aa_parts, threads, [&](int64_t task) {
    const int64_t n = task / aa_parts, part = task % aa_parts;
    task_scratch.reserve(Scratch::room<S>(j.map));
    S* graph = task_scratch.take<S>(j.map);
    aa_graph<S>(s, j, parts + n * aa_parts * j.map, shared, *alpha, nullptr, graph);
    for (int64_t c = part * s.C / aa_parts; c < (part + 1) * s.C / aa_parts; c++)
      multiply(frames_of(x, n, c), graph, s.T, j, y + (n * s.C + c) * s.T * s.V);
  });
}

template <class S>
void aa_backward(const DynamicShape& s, View<const S> x, View<const S> a, View<const S> b, const S* alpha, const S* A,
                 View<const S> dy, S* dx, S* da, S* db, S* dalpha, S* dA, int threads) {
  const Joints<S> j(s.V);
  const int64_t maps = s.N * aa_parts;
  call_scratch.reserve(2 * Scratch::room<S>(j.map) + 2 * Scratch::room<S>(maps * j.map) + Scratch::room<S>(s.N * j.map) +
                       Scratch::room<double>(s.N));
  S* shared = call_scratch.take<S>(j.map);  // A'
  S* total = call_scratch.take<S>(j.map);
  S* parts = call_scratch.take<S>(maps * j.map);
  S* dparts = call_scratch.take<S>(maps * j.map);
  S* dgraphs = call_scratch.take<S>(s.N * j.map);
  double* dalphas = call_scratch.take<double>(s.N);
  pack_map(A, true, j, shared);
  aa_similarity(s, j, b, a, parts, threads);

  parallel(maps, threads, [&](int64_t task) {
    const int64_t n = task / aa_parts, part = task % aa_parts;
    task_scratch.reserve(Scratch::room<S>(j.map) + Scratch::room<S>(s.T * j.ld));
    S* graph = task_scratch.take<S>(j.map);
    S* packed = task_scratch.take<S>(s.T * j.ld);
    S* sum = dparts + task * j.map;
    std::memset(sum, 0, j.map * sizeof(S));
    aa_graph<S>(s, j, parts + n * aa_parts * j.map, shared, *alpha, nullptr, graph);
    for (int64_t c = part * s.C / aa_parts; c < (part + 1) * s.C / aa_parts; c++) {
      multiply(frames_of(dy, n, c), graph, s.T, j, dx + (n * s.C + c) * s.T * s.V);
      pack_frames(frames_of(x, n, c), s.T, j, packed);
      correlate(frames_of(dy, n, c), packed, s.T, j, sum, true);
    }
  });

  parallel(maps, threads, [&](int64_t task) {
    const int64_t n = task / aa_parts, part = task % aa_parts;
    task_scratch.reserve(3 * Scratch::room<S>(j.map));
    S* tanh_map = task_scratch.take<S>(j.map);
    S* transposed = task_scratch.take<S>(j.map);  // dS'
    S* plain = task_scratch.take<S>(j.map);       // dS
    aa_graph<S>(s, j, parts + n * aa_parts * j.map, shared, *alpha, tanh_map, nullptr);
    const Vec<S> scale = splat<S>(*alpha / S(s.R * s.T)), one = splat<S>(S(1));
    Vec<S> along = {};
    for (int64_t i = 0; i < j.map; i += lanes<S>) {
      const Vec<S> d = add_parts(dparts + n * aa_parts * j.map, j, i), t = load(tanh_map + i);
      along += d * t;
      store(transposed + i, scale * d * (one - t * t));
      if (part == 0) store(dgraphs + n * j.map + i, d);
    }
    if (part == 0) dalphas[n] = sum_lanes<S>(along);
    transpose_map(transposed, j, plain);
    for (int64_t r = part * s.R / aa_parts; r < (part + 1) * s.R / aa_parts; r++) {
      const int64_t at = (n * s.R + r) * s.T * s.V;
      multiply(frames_of(b, n, r), transposed, s.T, j, da + at);
      multiply(frames_of(a, n, r), plain, s.T, j, db + at);
    }
  });

  double sum = 0;
  std::memset(total, 0, j.map * sizeof(S));
  for (int64_t n = 0; n < s.N; n++) {
    sum += dalphas[n];
    for (int64_t i = 0; i < j.map; i += lanes<S>) store(total + i, load(total + i) + load(dgraphs + n * j.map + i));
  }
  *dalpha = (S)sum;
  unpack_transposed_map(total, j, dA);
}
