// norm: y = relu(relu'(gamma (x - mean) / sqrt(var + eps) + beta) + residual) with the statistics of the batch, and its
// backward. Each of the two ReLUs is optional: `open` is that before the residual, `relu` that at the end.
//
// A task is a few channels side by side: their pixels of all samples (160 kB a channel for 16 persons of 100 frames and 25
// joints) are read from memory once, in runs long enough to be prefetched, and stay in L2 for the second sweep, which
// normalises or makes dx. Sums run over blocks in a fixed order whatever the
// number of threads: 4 vectors within a block, float64 between blocks. The squares are taken about a pivot, the mean of the
// block before, so that a mean far from zero costs no digits. Reference: kernels/reference.py.

constexpr int64_t norm_vectors = 64;  // of a block: 4 kB, every lane adds 16 numbers

// Of one channel: gamma / sqrt(var + eps), beta, mean.
template <class S>
struct Affine {
  Vec<S> scale, shift, mean;
  Affine(S a, S b, S m) : scale(splat(a)), shift(splat(b)), mean(splat(m)) {}
  INLINE Vec<S> operator()(Vec<S> x) const { return (x - mean) * scale + shift; }
};

template <class S>
INLINE Vec<S> rectify(Vec<S> v) { return v < Vec<S>{} ? Vec<S>{} : v; }  // NaN stays NaN
template <class S>
INLINE Vec<S> positive(Vec<S> keep, Vec<S> v) { return keep > Vec<S>{} ? v : Vec<S>{}; }
template <class S>
INLINE Vec<S> load_some(const S* p, int64_t count) {
  Vec<S> v = {};
  std::memcpy(&v, p, count * sizeof(S));
  return v;
}
template <class S>
INLINE void store_some(S* p, Vec<S> v, int64_t count) { std::memcpy(p, &v, count * sizeof(S)); }

// Calls body(p, read, write) for every vector of a row of `pixels`; read(row) and write(row, v) end at the last pixel.
template <class S, class F>
INLINE void sweep_row(int64_t pixels, F body, const S* aligned = nullptr) {
  constexpr int64_t L = lanes<S>;
  int64_t p = 0;
  if (aligned) {
    const int64_t head = min64(pixels, until_aligned(aligned));
    if (head)
      body([&](const S* row) __attribute__((always_inline)) { return load_some(row, head); },
           [&](S* row, Vec<S> v) __attribute__((always_inline)) { store_some(row, v, head); });
    for (p = head; p + L <= pixels; p += L)
      body([&](const S* row) __attribute__((always_inline)) { return load(row + p); },
           [&](S* row, Vec<S> v) __attribute__((always_inline)) { stream(row + p, v); });
  }
  for (; p + L <= pixels; p += L)
    body([&](const S* row) __attribute__((always_inline)) { return load(row + p); },
         [&](S* row, Vec<S> v) __attribute__((always_inline)) { store(row + p, v); });
  if (const int64_t rest = pixels - p)
    body([&](const S* row) __attribute__((always_inline)) { return load_some(row + p, rest); },
         [&](S* row, Vec<S> v) __attribute__((always_inline)) { store_some(row + p, v, rest); });
}

// Two sums over one block of up to norm_vectors whole vectors, then over the `rest` pixels behind them: term(p, count) gives
// the two addends of the vector at pixel p, of which `count` lanes are valid and the others are 0.
template <class S, class F>
INLINE void block_sums(int64_t vectors, int64_t rest, double& first, double& second, F term) {
  constexpr int64_t L = lanes<S>;
  Vec<S> a[4] = {}, b[4] = {}, u, v;
  int64_t i = 0;
  for (; i + 4 <= vectors; i += 4)
    UNROLL for (int j = 0; j < 4; j++) {
      term((i + j) * L, L, u, v);
      a[j] += u, b[j] += v;
    }
  for (; i < vectors; i++) {
    term(i * L, L, u, v);
    a[0] += u, b[0] += v;
  }
  if (rest) {
    term(i * L, rest, u, v);
    a[1] += u, b[1] += v;
  }
  first = sum_lanes<S>((a[0] + a[1]) + (a[2] + a[3]));
  second = sum_lanes<S>((b[0] + b[1]) + (b[2] + b[3]));
}

// Calls body(first pixel, vectors, rest) for the blocks of a row.
template <class S, class F>
INLINE void row_blocks(int64_t pixels, F body) {
  constexpr int64_t L = lanes<S>;
  for (int64_t p = 0; p < pixels; p += norm_vectors * L) {
    const int64_t count = min64(norm_vectors * L, pixels - p);
    body(p, count / L, count % L);
  }
}

// The lanes of v that hold pixels; the others 0.
template <class S>
INLINE Vec<S> valid_lanes(Vec<S> v, int64_t count) {
  if (count < lanes<S>) {
    Vec<S> kept = {};
    std::memcpy(&kept, &v, count * sizeof(S));
    return kept;
  }
  return v;
}

template <class S>
INLINE Vec<S> load_valid(const S* p, int64_t count) { return count < lanes<S> ? load_some(p, count) : load(p); }

// The numbers of one channel: how many, and their sum and sum of squares about `origin`, the first of them.
template <class S>
struct Moments {
  double count = 0, origin = 0, sum = 0, about = 0;
  S pivot = 0;  // the mean of the last block

  INLINE void add(const S* row, int64_t pixels) {
    row_blocks<S>(pixels, [&](int64_t p, int64_t vectors, int64_t rest) __attribute__((always_inline)) {
      const double numbers = (double)(vectors * lanes<S> + rest);
      const bool first_block = count == 0;
      if (first_block) pivot = row[p], origin = (double)pivot;
      double d = 0, q = 0;
      for (int turn = first_block ? 0 : 1; turn < 2; turn++) {
        const Vec<S> about_pivot = splat(pivot);
        block_sums<S>(vectors, rest, d, q, [&](int64_t at, int64_t valid, Vec<S>& u, Vec<S>& v) __attribute__((always_inline)) {
          u = valid_lanes<S>(load_valid(row + p + at, valid) - about_pivot, valid);
          v = u * u;
        });
        if (turn == 0) pivot = (S)(pivot + d / numbers);
      }
      const double off = (double)pivot - origin;
      count += numbers;
      sum += d + numbers * off;
      about += q + 2 * off * d + numbers * off * off;
      pivot = (S)(pivot + d / numbers);
    });
  }
  void merge(const Moments& m) {
    if (count == 0) return void(*this = m);
    const double off = m.origin - origin;
    sum += m.sum + m.count * off;
    about += m.about + 2 * off * m.sum + m.count * off * off;
    count += m.count;
  }
  double mean() const { return origin + sum / count; }
  double square() const {  // the sum of squares about the mean
    const double s = about - sum * sum / count;
    return s < 0 ? 0 : s;
  }
  void finish(double eps, S& mean_, S& rstd, S& variance) const {
    mean_ = (S)mean(), rstd = (S)(1 / std::sqrt(square() / count + eps)), variance = (S)(square() / (count - 1));
  }
};

// Channels of a task: runs of 16 kB in every sample where that leaves `tensors` of them within 1 MB, and work for all threads.
template <class S>
INLINE int64_t norm_group(const NormShape& s, int64_t tensors, int threads) {
  const int64_t run = max64(1, s.P * (int64_t)sizeof(S)), all = max64(1, s.N) * run * tensors;
  return max64(1, min64(min64(ceil_div(16 << 10, run), (1 << 20) / all), s.C / (4 * max64(threads, 1))));
}

// mean, rstd and variance of channels [begin, end), of whose rows row(n, c) gives each; moments: room for end - begin.
template <class S, class F>
INLINE void batch_moments(const NormShape& s, int64_t begin, int64_t end, double eps, S* mean, S* rstd, S* variance, Moments<S>* moments,
                          F row) {
  for (int64_t c = begin; c < end; c++) moments[c - begin] = Moments<S>();
  for (int64_t n = 0; n < s.N; n++)
    for (int64_t c = begin; c < end; c++) moments[c - begin].add(row(n, c), s.P);
  for (int64_t c = begin; c < end; c++) moments[c - begin].finish(eps, mean[c], rstd[c], variance[c]);
}

// Without `variance`, mean and rstd are given.
template <class S>
void norm_forward(const NormShape& s, View<const S> x, View<const S> residual, const S* gamma, const S* beta, double eps,
                  bool open, bool relu, View<S> y, S* mean, S* rstd, S* variance, int threads) {
  const bool streams = is_streamed<S>(s.N * s.C * s.P);
  const int64_t group = norm_group<S>(s, 1, threads);
  parallel(ceil_div(s.C, group), threads, [&](int64_t task) {
    const int64_t begin = task * group, end = min64(s.C, begin + group);
    if (variance) {
      task_scratch.reserve(Scratch::room<Moments<S>>(group));
      batch_moments(s, begin, end, eps, mean, rstd, variance, task_scratch.take<Moments<S>>(group),
                    [&](int64_t n, int64_t c) { return x.data + n * x.stride[0] + c * x.stride[1]; });
    }
    auto normalise = [&](int64_t n, int64_t c) __attribute__((always_inline)) {
      const Affine<S> affine(gamma[c] * rstd[c], beta[c], mean[c]);
      const S* from = x.data + n * x.stride[0] + c * x.stride[1];
      const S* add = residual.data + n * residual.stride[0] + c * residual.stride[1];
      S* to = y.data + n * y.stride[0] + c * y.stride[1];
      auto sweep = [&](auto with_open, auto with_residual, auto with_relu) __attribute__((always_inline)) {
        sweep_row<S>(s.P, [&](auto read, auto write) __attribute__((always_inline)) {
          Vec<S> v = affine(read(from));
          if constexpr (decltype(with_open)::value) v = rectify<S>(v);
          if constexpr (decltype(with_residual)::value) v += read(add);
          if constexpr (decltype(with_relu)::value) v = rectify<S>(v);
          write(to, v);
        }, streams ? to : nullptr);
      };
      if (!residual.data) open || relu ? sweep(Int<1>{}, Int<0>{}, Int<0>{}) : sweep(Int<0>{}, Int<0>{}, Int<0>{});
      else if (open) relu ? sweep(Int<1>{}, Int<1>{}, Int<1>{}) : sweep(Int<1>{}, Int<1>{}, Int<0>{});
      else relu ? sweep(Int<0>{}, Int<1>{}, Int<1>{}) : sweep(Int<0>{}, Int<1>{}, Int<0>{});
    };
    for (int64_t n = 0; n < s.N; n++)
      for (int64_t c = begin; c < end; c++) normalise(n, c);
    end_stream();
  });
}

// g = dy where the ReLUs are open: that at the end by y > 0, if there is a y, that before the residual by computing it again
// from x. Without a residual the two are one, and no y is needed. dresidual, wherever y is: dy where y > 0.
// dx = gamma rstd (g - sum g / n - (x - mean) rstd^2 sum g (x - mean) / n). Of rows of dy that are 0 neither x nor y is read.
template <class S>
void norm_backward(const NormShape& s, View<const S> dy, View<const S> x, View<const S> y, const S* gamma, const S* beta,
                   const S* mean, const S* rstd, bool open, View<S> dx, View<S> dresidual, S* dgamma, S* dbeta, int threads) {
  const double total = (double)s.N * (double)s.P;
  const bool streams = is_streamed<S>(s.N * s.C * s.P);
  const int64_t group = norm_group<S>(s, 2, threads);
  auto run = [&](int64_t begin, int64_t end, auto with_open, auto with_y) __attribute__((always_inline)) {
    constexpr bool OPEN = decltype(with_open)::value, Y = decltype(with_y)::value;
    task_scratch.reserve(Scratch::room<double>(2 * group) + Scratch::room<char>(group));
    double *sums = task_scratch.take<double>(2 * group), *products = sums + group;
    char* silent = task_scratch.take<char>(group);  // channels whose dy is 0
    for (int64_t i = 0; i < 2 * group; i++) sums[i] = 0;
    std::memset(silent, 1, group);
    const auto affine_at = [&](int64_t c) __attribute__((always_inline)) { return Affine<S>(gamma[c] * rstd[c], beta[c], mean[c]); };
    const auto gate = [](const Affine<S>& affine, Vec<S> in, Vec<S> g) __attribute__((always_inline)) {
      if constexpr (OPEN) return positive<S>(affine(in), g);
      else return g;
    };
    auto add = [&](int64_t n, int64_t c) __attribute__((always_inline)) {
      const Affine<S> affine = affine_at(c);
      const S* from = x.data + n * x.stride[0] + c * x.stride[1];
      const S* d = dy.data + n * dy.stride[0] + c * dy.stride[1];
      const S* out = Y ? y.data + n * y.stride[0] + c * y.stride[1] : nullptr;
      S* g = Y ? dresidual.data + n * dresidual.stride[0] + c * dresidual.stride[1] : nullptr;
      if (all_zeros(d, s.P)) {
        if (Y) std::memset(g, 0, s.P * sizeof(S));
        return;
      }
      silent[c - begin] = 0;
      row_blocks<S>(s.P, [&](int64_t p, int64_t vectors, int64_t rest) __attribute__((always_inline)) {
        double a, b;
        block_sums<S>(vectors, rest, a, b, [&](int64_t at, int64_t valid, Vec<S>& u, Vec<S>& v) __attribute__((always_inline)) {
          const Vec<S> in = load_valid(from + p + at, valid);
          u = load_valid(d + p + at, valid);
          if constexpr (Y) {
            u = positive<S>(load_valid(out + p + at, valid), u);
            valid < lanes<S> ? store_some(g + p + at, u, valid) : store(g + p + at, u);
          }
          u = gate(affine, in, u);
          v = u * (in - affine.mean);
        });
        sums[c - begin] += a, products[c - begin] += b;
      });
    };
    for (int64_t n = 0; n < s.N; n++)
      for (int64_t c = begin; c < end; c++) add(n, c);
    const View<const S> source = Y ? View<const S>{dresidual.data, {dresidual.stride[0], dresidual.stride[1], 0, 0}} : dy;
    auto spread = [&](int64_t n, int64_t c) __attribute__((always_inline)) {
      const Affine<S> affine = affine_at(c);
      const double product = products[c - begin];
      const Vec<S> of_sum = splat((S)(sums[c - begin] / total)), of_x = splat((S)(product / total * (double)rstd[c] * (double)rstd[c]));
      const S* from = x.data + n * x.stride[0] + c * x.stride[1];
      const S* g = source.data + n * source.stride[0] + c * source.stride[1];
      S* to = dx.data + n * dx.stride[0] + c * dx.stride[1];
      if (silent[c - begin]) return leave_zeros(to, s.P, streams);
      sweep_row<S>(s.P, [&](auto read, auto write) __attribute__((always_inline)) {
        const Vec<S> in = read(from);
        write(to, affine.scale * ((gate(affine, in, read(g)) - of_sum) - (in - affine.mean) * of_x));
      }, streams ? to : nullptr);
    };
    for (int64_t n = 0; n < s.N; n++)
      for (int64_t c = begin; c < end; c++) spread(n, c);
    for (int64_t c = begin; c < end; c++)
      dbeta[c] = (S)sums[c - begin], dgamma[c] = (S)(products[c - begin] * (double)rstd[c]);
  };
  parallel(ceil_div(s.C, group), threads, [&](int64_t task) {
    const int64_t begin = task * group, end = min64(s.C, begin + group);
    if (y.data) open ? run(begin, end, Int<1>{}, Int<1>{}) : run(begin, end, Int<0>{}, Int<1>{});
    else open ? run(begin, end, Int<1>{}, Int<0>{}) : run(begin, end, Int<0>{}, Int<0>{});
    end_stream();
  });
}
