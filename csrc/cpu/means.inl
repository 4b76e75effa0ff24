// Means over frames and over joints, and sums of gradients, each in one sweep: a tensor that several layers read gets its
// gradients as one sum, with that of its mean added where the sum is written. A task is a channel of a sample, but for the
// gradient of spread_mean's coefficients, which is summed over samples in order. Reference: kernels/reference_units.py.

// mean[n,c,v] = sum over t of x[n,c,t,v] / T; mean (N, C, V) contiguous.
template <class S>
void frame_mean(const MeanShape& s, View<const S> x, S* mean, int threads) {
  const Vec<S> scale = splat((S)(1 / (double)s.T));
  parallel(s.N * s.C, threads, [&](int64_t task) {
    const S* from = x.data + task / s.C * x.stride[0] + task % s.C * x.stride[1];
    over_joints<S>(s.V, [&](auto count, const auto& j) __attribute__((always_inline)) {
      constexpr int m = decltype(count)::value;
      Vec<S> sum[m] = {};
      for (int64_t t = 0; t < s.T; t++)
        UNROLL for (int i = 0; i < m; i++) sum[i] += j.read(from + t * s.V, i);
      UNROLL for (int i = 0; i < m; i++) j.write(mean + task * s.V, i, sum[i] * scale);
    });
  });
}

// y = sum over k of x_k + mean / T, T and V those of x; mean (N, C, V) or nullptr. y contiguous. The gradients of layers that read
// one tensor and of its mean over frames are added like this.
template <class S>
void total_of(const MeanShape& s, int64_t count, const View<const S>* x, const S* mean, S* y, int threads) {
  // Without a mean the pixels of a channel are one long frame.
  const int64_t P = s.T * s.V, frames = mean ? s.T : 1, joints = mean ? s.V : P;
  const Vec<S> scale = splat((S)(1 / (double)s.T));
  const bool streams = is_streamed<S>(s.N * s.C * P);
  parallel(s.N * s.C, threads, [&](int64_t task) {
    const S* from[max_parts];
    task_scratch.reserve(Scratch::room<S>(P));
    S* to = task_scratch.take<S>(P);
    for (int64_t k = 0; k < count; k++) from[k] = x[k].data + task / s.C * x[k].stride[0] + task % s.C * x[k].stride[1];
    over_joints<S>(joints, [&](auto vectors, const auto& j) __attribute__((always_inline)) {
      constexpr int m = decltype(vectors)::value;
      Vec<S> of_mean[m] = {};
      if (mean) UNROLL for (int i = 0; i < m; i++) of_mean[i] = j.read(mean + task * s.V, i) * scale;
      for (int64_t t = 0; t < frames; t++) {
        Vec<S> sum[m];
        UNROLL for (int i = 0; i < m; i++) sum[i] = of_mean[i];
        for (int64_t k = 0; k < count; k++)
          UNROLL for (int i = 0; i < m; i++) sum[i] += j.read(from[k] + t * joints, i);
        UNROLL for (int i = 0; i < m; i++) j.write(to + t * joints, i, sum[i]);
      }
    });
    leave_row(y + task * P, to, P, streams);
    end_stream();
  });
}

// T frames of V joints, and behind each of them what `last` makes of the sum over joints of part_v x_v; without `part` of x_v.
template <class S, class F>
INLINE void append_sum(const S* from, const S* part, int64_t T, int64_t V, S* to, F last) {
  for (int64_t t = 0; t < T; t++) to[t * (V + 1) + V] = 0;
  over_joints<S>(V, [&](auto count, const auto& j) __attribute__((always_inline)) {
    constexpr int m = decltype(count)::value;
    Vec<S> of[m];
    UNROLL for (int i = 0; i < m; i++) of[i] = part ? j.read(part, i) : splat<S>(S(1));
    for (int64_t t = 0; t < T; t++) {
      S* row = to + t * (V + 1);
      Vec<S> v[m], scaled[m];
      UNROLL for (int i = 0; i < m; i++) v[i] = j.read(from + t * V, i), scaled[i] = v[i] * of[i];
      UNROLL for (int i = 0; i < m; i++) j.write(row, i, v[i]);
      row[V] += j.sum(scaled);
    }
  });
  for (int64_t t = 0; t < T; t++) to[t * (V + 1) + V] = last(to[t * (V + 1) + V]);
}
// y_v = x_v, and behind them their mean.
template <class S>
INLINE void append_mean_frames(const S* from, int64_t T, int64_t V, S* to) {
  append_sum(from, (const S*)nullptr, T, V, to, [scale = (S)(1 / (double)V)](S sum) { return sum * scale; });
}

// Its adjoint: y_v = x_v + x_V / V.
template <class S>
INLINE void fold_mean_frames(const S* from, int64_t T, int64_t V, S* to) {
  const S scale = (S)(1 / (double)V);
  over_joints<S>(V, [&](auto count, const auto& j) __attribute__((always_inline)) {
    constexpr int m = decltype(count)::value;
    for (int64_t t = 0; t < T; t++) {
      const S* row = from + t * (V + 1);
      const Vec<S> share = splat(row[V] * scale);
      Vec<S> v[m];
      UNROLL for (int i = 0; i < m; i++) v[i] = j.read(row, i) + share;
      UNROLL for (int i = 0; i < m; i++) j.write(to + t * V, i, v[i]);
    }
  });
}

// y[n,c,t,:V] = x[n,c,t,:], y[n,c,t,V] = its mean. y (N, C, T, V + 1) contiguous.
template <class S>
void append_mean(const MeanShape& s, View<const S> x, S* y, int threads) {
  parallel(s.N * s.C, threads, [&](int64_t task) {
    append_mean_frames(x.data + task / s.C * x.stride[0] + task % s.C * x.stride[1], s.T, s.V, y + task * s.T * (s.V + 1));
  });
}

// The adjoint of append_mean for the sum of `count` gradients g_i (N, C, T, V + 1); dx (N, C, T, V) contiguous.
template <class S>
void append_mean_backward(const MeanShape& s, int64_t count, const View<const S>* g, S* dx, int threads) {
  const S scale = (S)(1 / (double)s.V);
  parallel(s.N * s.C, threads, [&](int64_t task) {
    const S* from[max_parts];
    for (int64_t k = 0; k < count; k++) from[k] = g[k].data + task / s.C * g[k].stride[0] + task % s.C * g[k].stride[1];
    S* to = dx + task * s.T * s.V;
    over_joints<S>(s.V, [&](auto vectors, const auto& j) __attribute__((always_inline)) {
      constexpr int m = decltype(vectors)::value;
      for (int64_t t = 0; t < s.T; t++) {
        const int64_t at = t * (s.V + 1);
        S mean = 0;
        for (int64_t k = 0; k < count; k++) mean += from[k][at + s.V];
        Vec<S> sum[m];
        UNROLL for (int i = 0; i < m; i++) sum[i] = splat(mean * scale);
        for (int64_t k = 0; k < count; k++)
          UNROLL for (int i = 0; i < m; i++) sum[i] += j.read(from[k] + at, i);
        UNROLL for (int i = 0; i < m; i++) j.write(to + t * s.V, i, sum[i]);
      }
    });
  });
}

// y_v = x_v + x_V coef_v of T frames, x_V = means[t]: behind the V joints of a frame of x where `means` is to be written.
template <class S>
INLINE void spread_frames(const S* from, const S* coef, int64_t T, int64_t V, S* to, S* means) {
  over_joints<S>(V, [&](auto count, const auto& j) __attribute__((always_inline)) {
    constexpr int m = decltype(count)::value;
    Vec<S> part[m];
    UNROLL for (int i = 0; i < m; i++) part[i] = j.read(coef, i);
    for (int64_t t = 0; t < T; t++) {
      const S* row = from + t * (V + 1);
      const Vec<S> mean = splat(row[V]);
      means[t] = row[V];
      Vec<S> v[m];
      UNROLL for (int i = 0; i < m; i++) v[i] = j.read(row, i) + mean * part[i];
      UNROLL for (int i = 0; i < m; i++) j.write(to + t * V, i, v[i]);
    }
  });
}

// y[n,c,t,v] = x[n,c,t,v] + x[n,c,t,V] coef[v], v < V; x has V + 1 joints.
template <class S>
void spread_mean(const MeanShape& s, View<const S> x, const S* coef, View<S> y, View<S> mean, int threads) {
  parallel(s.N * s.C, threads, [&](int64_t task) {
    spread_frames(x.data + task / s.C * x.stride[0] + task % s.C * x.stride[1], coef, s.T, s.V,
                  y.data + task / s.C * y.stride[0] + task % s.C * y.stride[1],
                  mean.data + task / s.C * mean.stride[0] + task % s.C * mean.stride[1]);
  });
}

// sums_v += sum over t of g_v mean_t.
template <class S>
INLINE void spread_sums(const S* g, const S* means, int64_t T, int64_t V, double* sums) {
  over_joints<S>(V, [&](auto count, const auto& j) __attribute__((always_inline)) {
    constexpr int m = decltype(count)::value;
    Vec<S> sum[m] = {};
    for (int64_t t = 0; t < T; t++) {
      const Vec<S> mean = splat(means[t]);
      UNROLL for (int i = 0; i < m; i++) sum[i] += j.read(g + t * V, i) * mean;
    }
    j.add(sums, sum);
  });
}

// dx[..., :V] = dy, dx[..., V] = sum over v of dy coef[v]; dcoef[v] += sum over n, c, t of dy[n,c,t,v] mean[n,c,t].
template <class S>
void spread_mean_backward(const MeanShape& s, View<const S> dy, View<const S> mean, const S* coef, View<S> dx, double* dcoef,
                          int threads) {
  call_scratch.reserve(Scratch::room<double>(s.C * s.V));
  double* partial = call_scratch.take<double>(s.C * s.V);
  parallel(s.C, threads, [&](int64_t c) {
    double* total = partial + c * s.V;
    for (int64_t v = 0; v < s.V; v++) total[v] = 0;
    for (int64_t n = 0; n < s.N; n++) {
      const S* d = dy.data + n * dy.stride[0] + c * dy.stride[1];
      append_sum(d, coef, s.T, s.V, dx.data + n * dx.stride[0] + c * dx.stride[1], [](S sum) { return sum; });
      spread_sums(d, mean.data + n * mean.stride[0] + c * mean.stride[1], s.T, s.V, total);
    }
  });
  for (int64_t c = 0; c < s.C; c++)
    for (int64_t v = 0; v < s.V; v++) dcoef[v] += partial[c * s.V + v];
}
