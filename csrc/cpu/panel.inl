// Panels: where strides, halos and padding end. Every op packs its operands into rows of contiguous pixels, so that the
// register tiles see one layout whatever the caller's strides are, and frames outside of the tensor are plain zeros.
//
// A row of a temporal panel holds `phases` planes: plane q has the padded input frames q, q + stride, q + 2 stride, ...
// Tap k of output frame t reads padded frame t * stride + k * dilation, i.e. plane (k * dilation) % stride, shifted by
// (k * dilation) / stride frames: for any stride and dilation a tap is one fixed offset.

// The input channels that a live block reads are the rows of a panel; the others are neither packed nor sent anything: at 0.95 two
// of three inputs of a 1 x 1 convolution of 64 outputs in blocks (8, 1).
struct LiveInputs {
  std::vector<int32_t> channel;  // of every row
  std::vector<int32_t> row;      // of every channel; -1: it has none

  LiveInputs() = default;
  explicit LiveInputs(const Pattern& p) : row(p.I, -1) {
    for (int64_t b = 0; b < p.blocks; b++)
      for (int64_t i = p.input[b] * p.bi, end = min64(i + p.bi, p.I); i < end; i++) row[i] = 0;
    for (int64_t i = 0; i < p.I; i++)
      if (row[i] == 0) row[i] = (int32_t)channel.size(), channel.push_back((int32_t)i);
  }
  int64_t count() const { return (int64_t)channel.size(); }
};

// Frames [first, first + count) of channel c of sample n, in steps of `step`, to `to` as rows of V; outside: zeros.
template <class S, class A>
INLINE void copy_frames(const View<const A>& x, int64_t n, int64_t c, int64_t T, int64_t V, int64_t first, int64_t step,
                        int64_t count, S* to) {
  const A* from = x.data + n * x.stride[0] + c * x.stride[1];
  const int64_t st = x.stride[2], sv = x.stride[3];
  if (step == 1 && sv == 1 && st == V) {  // one run
    const int64_t begin = min64(max64(-first, 0), count), end = max64(min64(T - first, count), begin);
    std::memset(to, 0, begin * V * sizeof(S));
    if (end > begin) convert(from + (first + begin) * V, (end - begin) * V, to + begin * V);
    std::memset(to + end * V, 0, (count - end) * V * sizeof(S));
    return;
  }
  for (int64_t j = 0; j < count; j++, to += V) {
    const int64_t t = first + j * step;
    if (t < 0 || t >= T) std::memset(to, 0, V * sizeof(S));
    else if (sv == 1) convert(from + t * st, V, to);
    else for (int64_t v = 0; v < V; v++) convert(from + t * st + v * sv, 1, to + v);
  }
}

// Rows [first_row, first_row + rows) of frames [t0, t0 + frames), each padded with zeros to ld elements.
template <class S, class A>
INLINE void pack_rows(const View<const A>& x, int64_t n, int64_t first_row, int64_t rows, int64_t T, int64_t V, int64_t t0,
                      int64_t frames, S* to, int64_t ld) {
  for (int64_t r = 0; r < rows; r++, to += ld) {
    copy_frames(x, n, first_row + r, T, V, t0, 1, frames, to);
    std::memset(to + frames * V, 0, (ld - frames * V) * sizeof(S));
  }
}

// How far a tile may read or write past the pixels of a row: the widest register tile.
template <class S>
constexpr int64_t slack = 12 * lanes<S>;

// An odd number of cache lines: rows a power of two apart would share the sets of the cache.
template <class S>
INLINE int64_t row_length(int64_t pixels) { return (ceil_div((pixels + slack<S>) * (int64_t)sizeof(S), 64) | 1) * 64 / sizeof(S); }

// Output frames of one tile: the panel of a tile (`rows` rows) stays within a share of L2, there are at least `tasks` tiles where T
// allows, and the last round of tiles leaves few threads idle. Forward results do not depend on it; dX, dW and dA,
// whose sums are ordered by tiles, pass constants (fixed_threads, fixed_tasks).
INLINE int64_t tile_frames(int64_t T, int64_t rows, int64_t V, int64_t size, int64_t samples, int64_t threads, int64_t tasks) {
  const int64_t budget = 768 * 1024, most = max64(1, T / 8), n = max64(samples, 1);
  const int64_t least = min64(most, max64(ceil_div(T * rows * V * size, budget), ceil_div(tasks, n)));
  int64_t tiles = least;
  double best = 0;
  for (int64_t t = least; t <= min64(most, least + 3); t++) {  // every cut repeats a halo
    const double cost = (double)ceil_div(n * t, max64(threads, 1)) / (double)t * (1 + 0.05 * (double)(t - least));
    if (t == least || cost < best) tiles = t, best = cost;
  }
  return max64(ceil_div(T, max64(tiles, 1)), 1);
}

// How sums over tiles are cut, whatever the number of threads: at least `tasks` pieces, which balance over `threads`.
constexpr int64_t fixed_threads = 2, fixed_tasks = 2;

// A weight gradient is summed in at most this many partial sums over fixed ranges of (sample, tile), which are then
// added in order: bit-equal between runs and numbers of threads.
constexpr int64_t max_chunks = 16;

// dW = the partial sums of all chunks, in order, plus the group lasso's gradient on masked blocks while the sum is at
// hand: no second sweep over the weights. `block` weights a block.
template <class S>
INLINE void add_chunks(const S* partial, int64_t chunks, int64_t blocks, int64_t block, const Lasso<S>& lasso, S* out,
                       int threads) {
  const int64_t piece = max64(1, 4096 / block), size = blocks * block;
  parallel(ceil_div(blocks, piece), threads, [&](int64_t p) {
    const int64_t first = p * piece, last = min64(blocks, first + piece), begin = first * block, end = last * block;
    for (int64_t i = begin; i < end; i++) out[i] = partial[i];
    for (int64_t c = 1; c < chunks; c++)
      for (int64_t i = begin; i < end; i++) out[i] += partial[c * size + i];
    if (!lasso.masked) return;
    for (int64_t b = first; b < last; b++)
      if (lasso.masked[b])
        for (int64_t i = b * block; i < (b + 1) * block; i++) out[i] += lasso.scale * lasso.values[i];
  });
}

// part[0] = the sum of `count` parts, in order.
template <class S>
INLINE void add_parts(S* part, int64_t count, int64_t size) {
  for (int64_t c = 1; c < count; c++)
    for (int64_t i = 0; i < size; i++) part[i] += part[c * size + i];
}

template <class S>
Entries<S> block_row(const Pattern& p, int64_t g, const int32_t* offset, const S* values) {
  const int64_t first = p.row_ptr[g] * p.bi;
  return {offset + first, values + first * p.bo, (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi, p.bo};
}
INLINE int64_t live_rows(const Pattern& p, int64_t g) { return min64(p.bo, p.O - g * p.bo); }

// The sum of a row of pixels, padded with zeros to whole vectors.
template <class S>
INLINE S sum_row(const S* row, int64_t pixels) {
  Vec<S> acc = {};
  for (int64_t p = 0; p < pixels; p += lanes<S>) acc += load(row + p);
  return sum_lanes<S>(acc);
}

// Stored entries beyond the ragged edge get gradient exactly 0: they were summed against a row of zeros for missing
// inputs, and rows of outputs that do not exist were never touched, so only rounding-free zeros may remain.
template <class S>
INLINE void clear_ragged(const Pattern& p, S* dw) {
  const int64_t rows = p.O - (p.rows - 1) * p.bo;
  for (int64_t b = p.row_ptr[p.rows - 1]; rows < p.bo && b < p.blocks; b++)
    for (int64_t j = 0; j < p.bi; j++)
      for (int64_t o = rows; o < p.bo; o++) dw[(b * p.bi + j) * p.bo + o] = 0;
}
