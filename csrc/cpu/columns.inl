// Columns: the layout of the temporal convolution, which never mixes joints. A strip is a run of frames of one sample; lane
// q of all lanes is joint q % V of strip q / V, and a column is one vector of lanes over all frames of a strip:
//
//   row of a panel:  | frame 0: 16 lanes | frame 1: 16 lanes | ...     a tap is a shift by whole vectors
//
// so that every load is one cache line whatever V is (rows of V = 25 split a line at every access), a tile of consecutive
// frames reuses its lines for all taps, and few lanes are idle: 16 samples of 25 joints fill 25 columns exactly.
// A column is a task of its own. It has a halo of frames on both sides, zeros where the clip ends.

// Some consecutive lanes of a vector, which lie side by side in memory. p is the address of the first of them.
template <class S>
struct Part {
  int32_t first, length;
#if VECTOR_BYTES == 64
  uint32_t bits() const { return ((1u << length) - 1) << first; }
#endif
};
#if VECTOR_BYTES == 64
INLINE __m512 load_part_native(const float* p, Part<float> m) { return _mm512_maskz_loadu_ps((__mmask16)m.bits(), p - m.first); }
INLINE __m512d load_part_native(const double* p, Part<double> m) { return _mm512_maskz_loadu_pd((__mmask8)m.bits(), p - m.first); }
INLINE void store_part_native(float* p, __m512 v, Part<float> m) { _mm512_mask_storeu_ps(p - m.first, (__mmask16)m.bits(), v); }
INLINE void store_part_native(double* p, __m512d v, Part<double> m) { _mm512_mask_storeu_pd(p - m.first, (__mmask8)m.bits(), v); }
#endif
INLINE Vec<float> load_wide(const Bfloat16* p) {
#if VECTOR_BYTES == 64
  return (Vec<float>)widened_vector(_mm256_loadu_si256((const __m256i*)p));
#else
  float lane[lanes<float>];
  convert(p, lanes<float>, lane);
  return load(lane);
#endif
}
template <class S>
INLINE Vec<S> load_wide(const S* p) { return load(p); }
INLINE Vec<float> load_part(const Bfloat16* p, Part<float> m) {
#if VECTOR_BYTES == 64
  return (Vec<float>)widened_vector(_mm256_maskz_loadu_epi16((__mmask16)m.bits(), p - m.first));
#else
  float lane[lanes<float>] = {};
  convert(p, m.length, lane + m.first);
  return load(lane);
#endif
}
INLINE void store_part(Bfloat16* p, Vec<float> v, Part<float> m) {
#if VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(p - m.first, (__mmask16)m.bits(), rounded_vector((__m512)v));
#else
  float lane[lanes<float>];
  store(lane, v);
  convert(lane + m.first, m.length, p);
#endif
}
template <class S>
INLINE Vec<S> load_part(const S* p, Part<S> m) {
#if VECTOR_BYTES == 64
  return (Vec<S>)load_part_native(p, m);
#else
  S lane[lanes<S>] = {};
  for (int32_t l = 0; l < m.length; l++) lane[m.first + l] = p[l];
  return load(lane);
#endif
}
template <class S>
INLINE void store_part(S* p, Vec<S> v, Part<S> m) {
  if (m.length == lanes<S>) return store(p, v);
#if VECTOR_BYTES == 64
  typedef decltype(load_part_native((const S*)nullptr, m)) Native;
  store_part_native(p, (Native)v, m);
#else
  S lane[lanes<S>];
  store(lane, v);
  for (int32_t l = 0; l < m.length; l++) p[l] = lane[m.first + l];
#endif
}

// How the strips of all samples are cut into columns. `frames` a strip, `strips` a sample.
struct Strips {
  int64_t samples, strips, frames, V, lanes, columns;

  // The cut with the least work: a column costs `work` for every frame, and its halo of `halo` frames `halo_work`. Results do
  // not depend on it.
  static Strips make(int64_t samples, int64_t T, int64_t V, int64_t lanes, int64_t most_frames, int64_t multiple, int64_t halo,
                     double work, double halo_work, int64_t workers) {
    Strips best{samples, 1, T, V, lanes, 0};
    const int64_t least = max64(1, ceil_div(T, max64(multiple, most_frames / multiple * multiple)));
    double least_cost = 0;
    for (int64_t h = least; h < least + 8; h++) {
      const int64_t frames = h == 1 ? T : ceil_div(ceil_div(T, h), multiple) * multiple, strips = max64(1, ceil_div(T, frames));
      const int64_t columns = ceil_div(samples * strips * V, lanes);
      const double cost = (double)ceil_div(columns, workers) * ((double)frames * work + (double)(h == 1 ? 0 : halo) * halo_work);
      if (h == least || cost < 0.97 * least_cost) best = {samples, strips, frames, V, lanes, columns}, least_cost = cost;
    }
    return best;
  }
};

// One column: its lanes as runs of joints of one strip each, in order.
template <class S>
struct Column {
  struct Run {
    int64_t sample, frame, joint;  // of its first lane; frame: the first of its strip
    Part<S> part;
  } run[lanes<S>];
  int runs = 0;

  Column(const Strips& s, int64_t column) {
    const int64_t begin = column * lanes<S>, end = min64(begin + lanes<S>, s.samples * s.strips * s.V);
    for (int64_t q = begin; q < end; runs++) {
      const int64_t strip = q / s.V, v = q % s.V, length = min64(s.V - v, end - q);
      run[runs] = {strip / s.strips, strip % s.strips * s.frames, v, {(int32_t)(q - begin), (int32_t)length}};
      q += length;
    }
  }
  bool whole() const { return runs == 1 && run[0].part.length == lanes<S>; }
};

// The frames j of [0, count) for which 0 <= t + j * step < T.
INLINE void frames_inside(int64_t t, int64_t step, int64_t T, int64_t count, int64_t* begin, int64_t* end) {
  *begin = min64(count, t >= 0 ? 0 : ceil_div(-t, step));
  *end = max64(*begin, t >= T ? 0 : min64(count, (T - 1 - t) / step + 1));
}

// Row `to` of a column: `count` frames of channel c. Frame j of a run is frame (its strip's frame) * scale + first + j * step of
// its sample, zeros outside of [0, T) and in lanes that do not exist.
template <class S, class A>
INLINE void pack_column(const View<const A>& x, const Column<S>& column, int64_t c, int64_t T, int64_t scale, int64_t first,
                        int64_t step, int64_t count, S* to) {
  const int64_t move = step * x.stride[2], sv = x.stride[3];
  const A* from[2] = {};
  int64_t begin[2] = {0, 0}, end[2] = {count, count};
  if (column.runs > 2 || sv != 1) {
    std::memset(to, 0, count * lanes<S> * sizeof(S));
    for (int r = 0; r < column.runs; r++) {
      const auto& run = column.run[r];
      const int64_t t = run.frame * scale + first;
      frames_inside(t, step, T, count, begin, end);
      const A* p = x.data + run.sample * x.stride[0] + c * x.stride[1] + t * x.stride[2] + run.joint * sv;
      for (int64_t j = begin[0]; j < end[0]; j++)
        for (int32_t l = 0; l < run.part.length; l++) convert(p + j * move + l * sv, 1, to + j * lanes<S> + run.part.first + l);
    }
    return;
  }
  for (int r = 0; r < column.runs; r++) {
    const auto& run = column.run[r];
    const int64_t t = run.frame * scale + first;
    frames_inside(t, step, T, count, begin + r, end + r);
    from[r] = x.data + run.sample * x.stride[0] + c * x.stride[1] + t * x.stride[2] + run.joint;
  }
  const Part<S> a = column.run[0].part;
  if (column.runs == 1) {
    for (int64_t j = 0; j < begin[0]; j++) store(to + j * lanes<S>, Vec<S>{});
    if (a.length == lanes<S>)
      for (int64_t j = begin[0]; j < end[0]; j++) store(to + j * lanes<S>, load_wide(from[0] + j * move));
    else
      for (int64_t j = begin[0]; j < end[0]; j++) store(to + j * lanes<S>, load_part(from[0] + j * move, a));
    for (int64_t j = end[0]; j < count; j++) store(to + j * lanes<S>, Vec<S>{});
    return;
  }
  const Part<S> b = column.run[1].part;
  const int64_t both_begin = max64(begin[0], begin[1]), both_end = max64(both_begin, min64(end[0], end[1]));
  auto either = [&](int64_t j) __attribute__((always_inline)) {  // one of the runs may be outside of its clip
    Vec<S> v = {};
    if (j >= begin[0] && j < end[0]) v = load_part(from[0] + j * move, a);
    if (j >= begin[1] && j < end[1]) v += load_part(from[1] + j * move, b);
    store(to + j * lanes<S>, v);
  };
  for (int64_t j = 0; j < min64(both_begin, count); j++) either(j);
  for (int64_t j = both_begin; j < both_end; j++)
    store(to + j * lanes<S>, load_part(from[0] + j * move, a) + load_part(from[1] + j * move, b));
  for (int64_t j = both_end; j < count; j++) either(j);
}

// Where a column's rows go in a contiguous tensor (N, C, T, V): address and number of existing frames of every run.
template <class S, class A>
struct ColumnOutput {
  const Column<S>& column;
  A* to[lanes<S>];  // of channel 0
  int64_t frames[lanes<S>], channel, V;

  ColumnOutput(const Column<S>& c, A* y, int64_t channels, int64_t T, int64_t V, int64_t strip_frames)
      : column(c), channel(T * V), V(V) {
    for (int r = 0; r < c.runs; r++) {
      const auto& run = c.run[r];
      to[r] = y + (run.sample * channels * T + run.frame) * V + run.joint;
      frames[r] = min64(strip_frames, T - run.frame);
    }
  }
  INLINE void put(int64_t c, int64_t frame, Vec<S> v) const {
    const int64_t at = c * channel + frame * V;
    NO_UNROLL for (int r = 0; r < column.runs; r++)  // of one run mostly; unrolled, it is half of the module in float64
      if (frame < frames[r]) store_part(to[r] + at, v, column.run[r].part);
  }
};
