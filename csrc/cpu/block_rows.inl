// What the passes of an ST-GCN block share (block_forward.inl, block_backward.inl): a row of pixels of one channel is made in a
// buffer that stays in L1, its sums are taken there, and it leaves for memory past the caches: a store into a line that is in
// no cache would first read it. Sums over the batch are partial sums over fixed ranges of tiles, joined in order.

// to[p] = value(read) for every pixel p, `to` in a buffer with room for a whole last vector.
template <class S, class F>
INLINE void make_row(S* to, int64_t pixels, F value) {
  constexpr int64_t L = lanes<S>;
  int64_t p = 0;
  for (; p + L <= pixels; p += L)
    store(to + p, value([&](const S* row) __attribute__((always_inline)) { return load(row + p); }));
  if (p < pixels) {
    const Part<S> some = first_lanes<S>(pixels - p);
    store_part(to + p, value([&](const S* row) __attribute__((always_inline)) { return load_part(row + p, some); }), some);
  }
}

// The backward pass of a norm: dx = scale ((g - of_sum) - (x - mean) of_x).
template <class S>
struct NormSlope {
  S scale, mean, of_sum, of_x;
  INLINE auto gradient() const {
    return [s = splat(scale), m = splat(mean), u = splat(of_sum), v = splat(of_x)](Vec<S> g, Vec<S> x)
               __attribute__((always_inline)) { return s * ((g - u) - (x - m) * v); };
  }
};

// Sum of g and of g (x - mean), of one channel.
struct SlopeSums {
  double g = 0, gx = 0;
  template <class S>
  INLINE void add(const S* g_row, const S* x_row, int64_t pixels, S mean) {
    row_blocks<S>(pixels, [&](int64_t p, int64_t vectors, int64_t rest) __attribute__((always_inline)) {
      double a, b;
      block_sums<S>(vectors, rest, a, b, [&](int64_t at, int64_t valid, Vec<S>& u, Vec<S>& v) __attribute__((always_inline)) {
        const Part<S> some = first_lanes<S>(valid);
        u = load_part(g_row + p + at, some);
        v = u * (load_part(x_row + p + at, some) - splat(mean));
      });
      g += a, gx += b;
    });
  }
};

// Rows that are read next, brought nearer while the multiply-adds of the rows at hand run: a few lines at every call.
template <class S>
class Ahead {
 public:
  // Rows ld apart, of which `channel` names some.
  INLINE void add(const S* row, int64_t rows, int64_t ld, int64_t pixels, const int32_t* channel = nullptr) {
    if (rows > 0 && pixels > 0) source[sources++] = {row, rows, ld, pixels, channel}, lines += rows * lines_of(pixels);
  }
  INLINE void spread(int64_t calls) { share = ceil_div(lines, max64(calls, 1)); }
  INLINE void operator()() {
    for (int64_t left = share; left > 0 && at < sources;) {
      Source& s = source[at];
      const int64_t count = min64(left, lines_of(s.pixels) - line);
      const char* p = (const char*)(s.row + (s.channel ? *s.channel : 0) * s.ld) + line * 64;
      for (int64_t i = 0; i < count; i++) __builtin_prefetch(p + i * 64, 0, 2);
      left -= count, line += count;
      if (line < lines_of(s.pixels)) continue;
      line = 0;
      if (s.channel) s.channel++;
      else s.row += s.ld;
      if (--s.rows == 0) at++;
    }
  }

 private:
  struct Source {
    const S* row;
    int64_t rows, ld, pixels;
    const int32_t* channel;
  } source[4];
  int64_t sources = 0, lines = 0, share = 0, at = 0, line = 0;
  static INLINE int64_t lines_of(int64_t pixels) { return ceil_div(pixels * (int64_t)sizeof(S), 64) + 1; }
};
// Calls of `ahead` in dot_row over `entries` entries and `pixels` pixels.
template <class S>
INLINE int64_t dot_calls(int64_t entries, int64_t pixels) {
  constexpr int64_t E = tile_vectors<MAX_ROWS>;
  return ceil_div(ceil_div(pixels, lanes<S>), dot_piece) * (entries / E + entries % E);
}

constexpr int64_t block_chunks = 32;  // of sums over the batch that are a few numbers a channel

// The partial sums of C channels in `chunks` ranges, and body(channel, sum) over their joins in order.
template <class Sum>
struct ChannelSums {
  Sum* all;
  int64_t C, chunks;
  static size_t room(int64_t C) { return Scratch::room<Sum>(block_chunks * C); }
  ChannelSums(int64_t C_, int64_t chunks_, Scratch& scratch) : all(scratch.take<Sum>(block_chunks * C_)), C(C_), chunks(chunks_) {
    for (int64_t i = 0; i < chunks * C; i++) all[i] = Sum();
  }
  Sum* of(int64_t chunk) const { return all + chunk * C; }
  template <class Merge, class F>
  void join(Merge merge, F body) const {
    for (int64_t c = 0; c < C; c++) {
      Sum sum = all[c];
      for (int64_t j = 1; j < chunks; j++) merge(sum, all[j * C + c]);
      body(c, sum);
    }
  }
};

template <class S>
void finish_moments(const ChannelSums<Moments<S>>& sums, const BlockNorm<S>& norm) {
  sums.join([](Moments<S>& a, const Moments<S>& b) { a.merge(b); },
            [&](int64_t c, const Moments<S>& m) { m.finish(norm.eps, norm.mean[c], norm.rstd[c], norm.variance[c]); });
}
template <class S>
void finish_slopes(const ChannelSums<SlopeSums>& sums, const BlockNorm<S>& norm, double total, NormSlope<S>* slope, S* dgamma,
                   S* dbeta) {
  sums.join([](SlopeSums& a, const SlopeSums& b) { a.g += b.g, a.gx += b.gx; },
            [&](int64_t c, const SlopeSums& s) {
              const double rstd = (double)norm.rstd[c];
              dbeta[c] = (S)s.g, dgamma[c] = (S)(s.gx * rstd);
              slope[c] = {norm.gamma[c] * norm.rstd[c], norm.mean[c], (S)(s.g / total), (S)(s.gx / total * rstd * rstd)};
            });
}

template <class S>
INLINE Affine<S> affine_of(const BlockNorm<S>& norm, int64_t c) {
  return Affine<S>(norm.gamma[c] * norm.rstd[c], norm.beta[c], norm.mean[c]);
}

// Calls body(chunk, first task, last task) for ranges of tasks.
template <class F>
void in_chunks(int64_t tasks, int64_t chunks, int threads, F body) {
  parallel(chunks, threads, [&](int64_t c) { body(c, c * tasks / chunks, (c + 1) * tasks / chunks); });
}

// row = relu(norm(z)) of pixels of one channel.
template <class S>
INLINE void make_normed(const S* z, const Affine<S>& affine, int64_t pixels, S* row) {
  make_row(row, pixels, [&](auto read) __attribute__((always_inline)) { return rectify<S>(affine(read(z))); });
}

// Channels of z (N, C, T, V), the input of a norm, and where their gradients go. Channels of a sample are T V numbers apart. With
// `mean` the norm sees the mean of each frame as joint V: rows are then made with it, and folded as they leave.
template <class S>
struct Channels {
  const S* z;
  int64_t z_stride;
  S* dz;
  int64_t dz_stride, T, V;
  bool mean;

  int64_t joints() const { return V + mean; }
  int64_t row_size() const { return T * joints() + lanes<S>; }
  size_t room() const { return mean ? Scratch::room<S>(row_size()) : 0; }  // of a row with means
  S* take_room(Scratch& scratch) const { return mean ? scratch.take<S>(row_size()) : nullptr; }

  INLINE const S* at(int64_t n, int64_t i, int64_t t) const { return z + n * z_stride + (i * T + t) * V; }
  // Where frame 0 of a channel lies, of which frames [begin, end) may be read.
  INLINE const S* row(int64_t n, int64_t i, int64_t begin, int64_t end, S* room) const {
    if (!mean) return at(n, i, 0);
    append_mean_frames(at(n, i, begin), end - begin, V, room + begin * joints());
    return room;
  }
  // Frames [begin, end) of the gradient of a channel leave; with means they are folded in `room`, which may not be `g`.
  INLINE void leave(int64_t n, int64_t i, int64_t begin, int64_t end, const S* g, S* room) const {
    if (mean) fold_mean_frames(g, end - begin, V, room);
    stream_row(dz + n * dz_stride + (i * T + begin) * V, mean ? room : g, (end - begin) * V);
  }
  INLINE void leave_zeros_of(int64_t n, int64_t i, int64_t begin, int64_t end) const {
    leave_zeros(dz + n * dz_stride + (i * T + begin) * V, (end - begin) * V, true);
  }
};

// mean, rstd and variance of C channels of N samples, a few side by side as norm_group says.
template <class S>
void take_moments(int64_t N, int64_t C, const Channels<S>& z, const BlockNorm<S>& norm, int threads) {
  const NormShape s{N, C, z.T * z.joints()};
  const int64_t group = norm_group<S>(s, 1, threads);
  parallel(ceil_div(C, group), threads, [&](int64_t task) {
    task_scratch.reserve(Scratch::room<Moments<S>>(group) + z.room());
    Moments<S>* moments = task_scratch.take<Moments<S>>(group);
    S* room = z.take_room(task_scratch);
    batch_moments(s, task * group, min64(C, (task + 1) * group), norm.eps, norm.mean, norm.rstd, norm.variance, moments,
                  [&](int64_t n, int64_t c) { return z.row(n, c, 0, z.T, room); });
  });
}

// A temporal panel whose rows go through relu(bn(z)) as they are packed, for output frames [t0, t0 + count) of sample n: frames
// [from, plane_frames) of every plane. room: see Channels.
template <class S>
void pack_normed(const TemporalPlan& plan, const TemporalShape& s, const Channels<S>& z, const BlockNorm<S>& norm, int64_t n, int64_t t0,
                 int64_t from, S* room, S* panel) {
  const int64_t first = t0 * s.stride - plan.padding;
  const int64_t least = max64(0, first + from * s.stride), most = max64(least, min64(s.T, first + plan.plane_frames * s.stride));
  for (int64_t r = 0; r < plan.inputs.count(); r++) {
    const int64_t i = plan.inputs.channel[r];
    const Affine<S> affine = affine_of(norm, i);
    const S* channel = z.row(n, i, least, most, room);
    for (int64_t q = 0; q < plan.phases; q++) {
      S* row = panel + r * plan.ld + q * plan.plane;
      const int64_t t = t0 * s.stride + q - plan.padding;  // input frame of panel frame 0
      int64_t begin, end;
      frames_inside(t, s.stride, s.T, plan.plane_frames, &begin, &end);
      begin = max64(begin, from), end = max64(end, begin);
      std::memset(row + from * s.V, 0, (begin - from) * s.V * sizeof(S));
      if (s.stride == 1) make_normed(channel + (t + begin) * s.V, affine, (end - begin) * s.V, row + begin * s.V);
      else
        for (int64_t j = begin; j < end; j++) make_normed(channel + (t + j * s.stride) * s.V, affine, s.V, row + j * s.V);
      std::memset(row + end * s.V, 0, (plan.plane - end * s.V) * sizeof(S));
    }
  }
  std::memset(panel + plan.zeros(), 0, plan.ld * sizeof(S));
}

// x (N, I, T, V) for an adjacency, which reads whole registers: in place, or in `copy` where they would pass the end of the tensor.
template <class S>
struct GraphInput {
  const S* x;
  int64_t size, channels, T, V;

  INLINE const S* row(int64_t n, int64_t i, int64_t t0, int64_t frames, S* copy) const {
    const int64_t at = ((n * channels + i) * T + t0) * V, pixels = frames * V;
    if (at + pixels + 2 * lanes<S> <= size) return x + at;
    std::memcpy(copy, x + at, pixels * sizeof(S));
    return copy;
  }
};

// As pack_graph_panel. Tiles read whole vectors, no further.
template <class S>
void pack_block_graph(const GraphPlan& plan, const Pattern& p, const AdjacencyTable<S>& adjacency, const GraphInput<S>& x, int64_t n,
                      int64_t t0, int64_t frames, S* copy, S* panel) {
  const int64_t pixels = frames * x.V;
  for (int64_t i = 0; i < p.I; i++) {
    const S* input = x.row(n, i, t0, frames, copy);
    for (int64_t k = 0; k < p.K; k++) {
      const int32_t r = plan.row[i * p.K + k];
      if (r < 0) continue;
      adjacency.apply(k, input, frames, panel + r * plan.ld);
      std::memset(panel + r * plan.ld + pixels, 0, VECTOR_BYTES);
    }
  }
  std::memset(panel + plan.zrows * plan.ld, 0, (pixels + lanes<S>) * sizeof(S));
}
