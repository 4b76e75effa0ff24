// dg_aggregate: y[n,k,c,t,w] = sum over v of x[n,k,c,t,v] G[n,k,c,v,w],
// G[n,k,c] = A[k] + alpha tanh(x1[n,k,c,v] - x2[n,k,c,w]) + beta P[n,k], P[n,k,v,w] = softmax over v of
// (sum over c of x1[n,k,c,v] x2[n,k,c,w]). Reference: kernels/reference_dynamic.py.
//
// One graph exists at a time. Backward keeps the maps transposed (rows w, lanes v), but for P, whose softmax over v runs
// over rows.
//
// With a norm (its gamma is not nullptr) x is the norm's input, and relu(norm(x)) is multiplied: made for a channel of a sample at a
// time, in both passes. Backward leaves dx' = the gradient of norm(x) where its ReLU is open, then dx from it in its place. The
// pixels of a channel of x then lie in one run, and its channels side by side.
// Channels of y that nobody reads are not multiplied (`read`, see table.h).

template <class S>
struct GroupRows {  // x1 and x2 of one (n, k): (C, ld) each, padded rows that repeat their first number
  S *x1, *x2;
  static size_t room(const DynamicShape& s, const Joints<S>& j) { return 2 * Scratch::room<S>(s.C * j.ld); }
  GroupRows(const DynamicShape& s, const Joints<S>& j, Scratch& scratch)
      : x1(scratch.take<S>(s.C * j.ld)), x2(scratch.take<S>(s.C * j.ld)) {}
  void pack(const DynamicShape& s, const Joints<S>& j, const View<const S>& a, const View<const S>& b, int64_t n, int64_t k) {
    for (int64_t c = 0; c < s.C; c++) {
      const S* from = a.data + n * a.stride[0] + k * a.stride[1] + c * a.stride[2];
      pack_joints(from, a.stride[3], j, from[0], x1 + c * j.ld);
      from = b.data + n * b.stride[0] + k * b.stride[1] + c * b.stride[2];
      pack_joints(from, b.stride[3], j, from[0], x2 + c * j.ld);
    }
  }
};

// P (rows v, lanes w); the lanes past the last joint hold finite numbers.
template <class S>
INLINE void dg_attention(int64_t C, const Joints<S>& j, const S* x1, const S* x2, S* P) {
  product<S>({x1, 1, j.ld, x2, j.ld, C, P, j.ld, false}, j.V, j, lanes<S>);
  for (int64_t i = 0; i < j.ld; i += lanes<S>) {
    Vec<S> top = load(P + i), sum = {};
    for (int64_t v = 1; v < j.V; v++) {
      const Vec<S> score = load(P + v * j.ld + i);
      top = score > top ? score : top;
    }
    for (int64_t v = 0; v < j.V; v++) {
      const Vec<S> below = load(P + v * j.ld + i) - top, floor = splat<S>(Float<S>::lowest);
      const Vec<S> e = exp_of<S>(below < floor ? floor : below);
      sum += e;
      store(P + v * j.ld + i, e);
    }
    const Vec<S> scale = splat<S>(S(1)) / sum;
    for (int64_t v = 0; v < j.V; v++) store(P + v * j.ld + i, load(P + v * j.ld + i) * scale);
  }
}

// The frames that a graph multiplies; with a norm they are made in `room`.
template <class S>
INLINE Frames<S> dg_input(const DynamicShape& s, const GroupView<const S>& x, const BlockNorm<S>& norm, int64_t n, int64_t k, int64_t c,
                          S* room) {
  const Frames<S> given = frames_of(x, n, k, c);
  if (!norm.gamma) return given;
  make_normed(given.data, affine_of(norm, k * s.C + c), s.T * s.V, room);
  return {room, s.V, 1};
}

template <class S>
void dg_forward(const DynamicShape& s, GroupView<const S> x, const BlockNorm<S>& norm, const int32_t* read, View<const S> x1,
                View<const S> x2, const S* alpha, const S* beta, const S* A, S* y, int threads) {
  const Joints<S> j(s.V);
  const bool streams = is_streamed<S>(s.N * s.K * s.C * s.T * s.V);
  if (norm.gamma) take_moments<S>(s.N, s.K * s.C, {x.data, x.stride[0], nullptr, 0, s.T, s.V, false}, norm, threads);
  parallel(s.N * s.K, threads, [&](int64_t task) {
    const FlushDenormals flush;
    const int64_t n = task / s.K, k = task % s.K;
    task_scratch.reserve(GroupRows<S>::room(s, j) + 2 * Scratch::room<S>(j.map) + Scratch::room<S>(2 * j.ld) +
                         Scratch::room<S>(s.T * s.V) + Scratch::room<S>(s.T * s.V + lanes<S>));
    GroupRows<S> rows(s, j, task_scratch);
    S* shared = task_scratch.take<S>(j.map);  // A + beta P
    S* graph = task_scratch.take<S>(j.map);
    S* work = task_scratch.take<S>(2 * j.ld);
    S* output = task_scratch.take<S>(s.T * s.V);
    S* normed = task_scratch.take<S>(s.T * s.V + lanes<S>);
    rows.pack(s, j, x1, x2, n, k);
    dg_attention(s.C, j, rows.x1, rows.x2, graph);
    pack_map(A + k * j.V * j.V, false, j, shared);
    const Vec<S> a = splat<S>(*alpha), b = splat<S>(*beta);
    for (int64_t i = 0; i < j.map; i += lanes<S>) store(shared + i, load(shared + i) + b * load(graph + i));
    for (int64_t c = 0; c < s.C; c++) {
      S* to = y + (task * s.C + c) * s.T * s.V;
      if (read && read[k * s.C + c] < 0) {
        leave_zeros(to, s.T * s.V, streams);
        continue;
      }
      tanh_map<S>(rows.x1 + c * j.ld, rows.x2 + c * j.ld, j, 1, work,
                  [=](int64_t v, int64_t i, Vec<S> t) __attribute__((always_inline)) {
                    const int64_t at = v * j.ld + i * lanes<S>;
                    store(graph + at, load(shared + at) + a * t);
                  });
      const OneRow<S> product(output, to, streams);
      multiply(dg_input(s, x, norm, n, k, c, normed), graph, s.T, j, product.row);
      product.finish(s.T * s.V);
    }
    end_stream();
  });
}

// dP of one (n, k) to the scores: dscore'[w, v] = beta P'[w, v] (dP'[w, v] - sum over v of dP' P'), in place. Returns <dP, P>.
template <class S>
INLINE double dg_softmax_backward(const Joints<S>& j, const S* P, S beta, S* dP) {
  double along = 0;
  for (int64_t w = 0; w < j.V; w++) {
    Vec<S> dot = {};
    for (int64_t i = w * j.ld; i < (w + 1) * j.ld; i += lanes<S>) dot += load(P + i) * load(dP + i);
    const S mean = sum_lanes<S>(dot);
    along += mean;
    for (int64_t i = w * j.ld; i < (w + 1) * j.ld; i += lanes<S>)
      store(dP + i, splat<S>(beta) * load(P + i) * (load(dP + i) - splat<S>(mean)));
  }
  return along;
}

template <class S>
void dg_backward(const DynamicShape& s, GroupView<const S> x, const BlockNorm<S>& norm, const int32_t* read, View<const S> x1,
                 View<const S> x2, const S* alpha, const S* beta, const S* A, GroupView<const S> dy, S* dx, S* dx1, S* dx2, S* dalpha,
                 S* dbeta, S* dA, S* dgamma, S* dshift, int threads) {
  // Sums over samples: in at most max_chunks ranges, then range by range.
  const int64_t chunks = min64(max_chunks, max64(s.N, 1));
  const Joints<S> j(s.V);
  const int64_t channels = s.K * s.C, pixels = s.T * s.V;
  call_scratch.reserve(Scratch::room<S>(s.K * chunks * j.map) + Scratch::room<double>(2 * s.K * chunks) +
                       ChannelSums<SlopeSums>::room(channels) + Scratch::room<NormSlope<S>>(channels));
  S* dshared = call_scratch.take<S>(s.K * chunks * j.map);  // dA' of every range
  const bool streams = is_streamed<S>(s.N * s.K * s.C * s.T * s.V);
  double* dscale = call_scratch.take<double>(2 * s.K * chunks);
  const ChannelSums<SlopeSums> sums(channels, chunks, call_scratch);
  auto* slope = call_scratch.take<NormSlope<S>>(channels);
  const Channels<S> z{x.data, x.stride[0], dx, channels * pixels, s.T, s.V, false};
  parallel(s.K * chunks, threads, [&](int64_t task) {
    const FlushDenormals flush;
    const int64_t k = task / chunks, chunk = task % chunks;
    task_scratch.reserve(2 * GroupRows<S>::room(s, j) + 6 * Scratch::room<S>(j.map) + Scratch::room<S>(s.T * j.ld) +
                         Scratch::room<S>(2 * j.ld) + Scratch::room<S>(pixels) + 2 * Scratch::room<S>(pixels + lanes<S>));
    GroupRows<S> rows(s, j, task_scratch), drows(s, j, task_scratch);
    S* shared = task_scratch.take<S>(j.map);  // (A + beta P)'
    S* P = task_scratch.take<S>(j.map);       // P'
    S* dP = task_scratch.take<S>(j.map);      // the sum of dG' over channels
    S* graph = task_scratch.take<S>(j.map);
    S* tanhs = task_scratch.take<S>(j.map);
    S* dgraph = task_scratch.take<S>(j.map);
    S* packed = task_scratch.take<S>(s.T * j.ld);
    S* work = task_scratch.take<S>(2 * j.ld);
    S* output = task_scratch.take<S>(pixels + lanes<S>);
    S* normed = task_scratch.take<S>(pixels + lanes<S>);
    const Vec<S> a = splat<S>(*alpha), b = splat<S>(*beta), one = splat<S>(S(1));
    S* dsum = dshared + task * j.map;
    std::memset(dsum, 0, j.map * sizeof(S));
    double along_alpha = 0, along_beta = 0;
    for (int64_t n = chunk * s.N / chunks; n < (chunk + 1) * s.N / chunks; n++) {
      rows.pack(s, j, x1, x2, n, k);
      dg_attention(s.C, j, rows.x1, rows.x2, graph);
      transpose_map(graph, j, P);
      pack_map(A + k * j.V * j.V, true, j, shared);
      for (int64_t i = 0; i < j.map; i += lanes<S>) store(shared + i, load(shared + i) + b * load(P + i));
      std::memset(dP, 0, j.map * sizeof(S));
      for (int64_t c = 0; c < s.C; c++) {
        S* to = dx + ((n * s.K + k) * s.C + c) * pixels;
        S *d1 = drows.x1 + c * j.ld, *d2 = drows.x2 + c * j.ld;
        if (read && read[k * s.C + c] < 0) {
          leave_zeros(to, pixels, streams || norm.gamma);
          std::memset(d1, 0, j.ld * sizeof(S));
          std::memset(d2, 0, j.ld * sizeof(S));
          continue;
        }
        tanh_map<S>(rows.x2 + c * j.ld, rows.x1 + c * j.ld, j, -1, work,
                    [=](int64_t w, int64_t i, Vec<S> t) __attribute__((always_inline)) {
                      const int64_t at = w * j.ld + i * lanes<S>;
                      store(tanhs + at, t);
                      store(graph + at, load(shared + at) + a * t);
                    });
        const OneRow<S> gradient(output, to, streams || norm.gamma);
        multiply(frames_of(dy, n, k, c), graph, s.T, j, gradient.row);
        const Frames<S> input = dg_input(s, x, norm, n, k, c, normed);
        const int64_t i = k * s.C + c;
        if (norm.gamma) leave_slope(z, n, i, 0, s.T, normed, output, norm.mean[i], output, (S*)nullptr, sums.of(chunk)[i]);
        else gradient.finish(pixels);
        pack_frames(input, s.T, j, packed);
        correlate(frames_of(dy, n, k, c), packed, s.T, j, dgraph, false);
        std::memset(d1, 0, j.ld * sizeof(S));
        Vec<S> along = {};
        for (int64_t w = 0; w < j.V; w++) {
          Vec<S> row = {};
          for (int64_t i = 0; i < j.ld; i += lanes<S>) {
            const int64_t at = w * j.ld + i;
            const Vec<S> t = load(tanhs + at), d = load(dgraph + at), slope = a * d * (one - t * t);
            along += d * t;
            row += slope;
            store(d1 + i, load(d1 + i) + slope);
            store(dP + at, load(dP + at) + d);
          }
          d2[w] = -sum_lanes<S>(row);
        }
        for (int64_t w = j.V; w < j.ld; w++) d2[w] = 0;
        along_alpha += sum_lanes<S>(along);
      }
      for (int64_t i = 0; i < j.map; i += lanes<S>) store(dsum + i, load(dsum + i) + load(dP + i));
      along_beta += dg_softmax_backward(j, P, *beta, dP);
      transpose_map(dP, j, graph);
      product<S>({rows.x2, j.ld, 1, dP, j.ld, s.V, drows.x1, j.ld, true}, s.C, j, lanes<S>);
      product<S>({rows.x1, j.ld, 1, graph, j.ld, s.V, drows.x2, j.ld, true}, s.C, j, lanes<S>);
      for (int64_t c = 0; c < s.C; c++) {
        const int64_t at = ((n * s.K + k) * s.C + c) * s.V;
        unpack_joints(drows.x1 + c * j.ld, j, dx1 + at);
        unpack_joints(drows.x2 + c * j.ld, j, dx2 + at);
      }
    }
    end_stream();
    dscale[2 * task] = along_alpha, dscale[2 * task + 1] = along_beta;
  });

  double sum_alpha = 0, sum_beta = 0;
  for (int64_t task = 0; task < s.K * chunks; task++) sum_alpha += dscale[2 * task], sum_beta += dscale[2 * task + 1];
  *dalpha = (S)sum_alpha, *dbeta = (S)sum_beta;
  for (int64_t k = 0; k < s.K; k++) {
    S* sum = dshared + k * chunks * j.map;
    for (int64_t chunk = 1; chunk < chunks; chunk++)
      for (int64_t i = 0; i < j.map; i++) sum[i] += sum[chunk * j.map + i];
    unpack_transposed_map(sum, j, dA + k * j.V * j.V);
  }
  if (!norm.gamma) return;
  finish_slopes(sums, norm, (double)s.N * (double)pixels, slope, dgamma, dshift);
  apply_slopes(s.N, channels, slope, z, read, threads);
}
