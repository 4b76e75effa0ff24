// max_pool: y[t] = max of x[t s - 1], x[t s], x[t s + 1] over the frames that exist, and its backward. Which frame won is not
// stored but found again from x. As in torch, the first of equals wins, and a NaN replaces whatever came before it.
// A task is a channel of a sample, which stays in L1; frames that are neighbours in all three rows are one run of pixels.
// Reference: kernels/reference_units.py.

// The later of two candidates wins where it is greater, or a NaN.
template <class S>
INLINE bool overtakes(S later, S best) { return later > best || later != later; }

// Calls body(Int<before>, Int<after>, first pixel of x's middle row, first pixel of y, pixels) for runs of windows that have
// the same of the frames before and after.
template <class F>
INLINE void over_windows(const PoolShape& s, F body) {
  const int64_t T_out = ceil_div(s.T, s.stride);
  for (int64_t t = 0, count; t < T_out; t += count) {
    const bool before = t * s.stride > 0, after = t * s.stride + 1 < s.T;
    count = s.stride == 1 && before && after ? T_out - 1 - t : 1;
    const int64_t x = t * s.stride * s.V, y = t * s.V, pixels = count * s.V;
    if (before && after) body(Int<1>{}, Int<1>{}, x, y, pixels);
    else if (before) body(Int<1>{}, Int<0>{}, x, y, pixels);
    else if (after) body(Int<0>{}, Int<1>{}, x, y, pixels);
    else body(Int<0>{}, Int<0>{}, x, y, pixels);
  }
}

// One channel of a sample.
template <class S>
INLINE void pool_channel(const PoolShape& s, const S* from, S* to) {
  over_windows(s, [&](auto before, auto after, int64_t at, int64_t out, int64_t pixels) {
    const S *__restrict row = from + at;
    S* __restrict result = to + out;
    for (int64_t p = 0; p < pixels; p++) {
      S best = row[p];
      if constexpr (decltype(before)::value) best = overtakes(best, row[p - s.V]) ? best : row[p - s.V];
      if constexpr (decltype(after)::value) best = overtakes(row[p + s.V], best) ? row[p + s.V] : best;
      result[p] = best;
    }
  });
}

template <class S>
void pool_forward(const PoolShape& s, View<const S> x, View<S> y, int threads) {
  parallel(s.N * s.C, threads, [&](int64_t task) {
    const int64_t n = task / s.C, c = task % s.C;
    pool_channel(s, x.data + n * x.stride[0] + c * x.stride[1], y.data + n * y.stride[0] + c * y.stride[1]);
  });
}

// What the frames of a window (a, b, c) get of its gradient g; those that do not exist (BEFORE, AFTER) are not read.
template <class S, bool BEFORE, bool AFTER>
INLINE void pool_shares(Vec<S> a, Vec<S> b, Vec<S> c, Vec<S> g, Vec<S>* share) {
  const Vec<S> none = {};
  Vec<S> best = b, first = none, second = g;
  if constexpr (BEFORE) {
    const auto overtaken = (b > a) | (b != b);
    best = overtaken ? b : a, first = overtaken ? none : g, second = overtaken ? g : none;
  }
  if constexpr (AFTER) {
    const auto third = (c > best) | (c != c);
    share[2] += third ? g : none;
    first = third ? none : first, second = third ? none : second;
  }
  share[0] += first, share[1] += second;
}

template <class S>
INLINE void pool_channel_backward(const PoolShape& s, const S* from, const S* d, S* to) {
  const int64_t T_out = ceil_div(s.T, s.stride);
  over_joints<S>(s.V, [&](auto count, const auto& j) __attribute__((always_inline)) {
    constexpr int m = decltype(count)::value;
    Vec<S> share[m][3] = {};  // the sums of frames `at`, at + 1 and at + 2
    int64_t at = -1;
    auto write_until = [&](int64_t end) __attribute__((always_inline)) {
      for (; at < end; at++)
        UNROLL for (int i = 0; i < m; i++) {
          if (at >= 0) j.write(to + at * s.V, i, share[i][0]);
          share[i][0] = share[i][1], share[i][1] = share[i][2], share[i][2] = Vec<S>{};
        }
    };
    auto window = [&](int64_t t, auto before, auto after) __attribute__((always_inline)) {
      constexpr bool BEFORE = decltype(before)::value, AFTER = decltype(after)::value;
      write_until(t * s.stride - 1);
      const S* row = from + t * s.stride * s.V;
      UNROLL for (int i = 0; i < m; i++) {
        const Vec<S> a = BEFORE ? j.read(row - s.V, i) : Vec<S>{}, b = j.read(row, i);
        const Vec<S> c = AFTER ? j.read(row + s.V, i) : Vec<S>{}, g = j.read(d + t * s.V, i);
        pool_shares<S, BEFORE, AFTER>(a, b, c, g, share[i]);
      }
    };
    const int64_t whole = (s.T - 2) / s.stride + 1;  // windows before this one have a frame after
    s.T > 1 ? window(0, Int<0>{}, Int<1>{}) : window(0, Int<0>{}, Int<0>{});
    for (int64_t t = 1; t < whole; t++) window(t, Int<1>{}, Int<1>{});
    for (int64_t t = max64(whole, 1); t < T_out; t++) window(t, Int<1>{}, Int<0>{});
    write_until(s.T);
  });
}

template <class S>
void pool_backward(const PoolShape& s, View<const S> x, View<const S> dy, View<S> dx, int threads) {
  parallel(s.N * s.C, threads, [&](int64_t task) {
    const int64_t n = task / s.C, c = task % s.C;
    pool_channel_backward(s, x.data + n * x.stride[0] + c * x.stride[1], dy.data + n * dy.stride[0] + c * dy.stride[1],
                          dx.data + n * dx.stride[0] + c * dx.stride[1]);
  });
}
