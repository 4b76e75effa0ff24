// Rows that leave for memory. A row of pixels is made in a buffer that stays in the caches and then written past them, as long
// as possible at once: a store into a line that is in no cache first reads it, and short pieces of many rows, one after the
// other, defeat the prefetching of those reads (pieces of 576 bytes: 3.6 GB/s, whole rows 10, whole rows past the caches 19,
// one core of a Xeon of the fourth or fifth generation).

template <class S>
INLINE Part<S> first_lanes(int64_t count) { return {0, (int32_t)count}; }

// to[p] = value(read) for every pixel p, where read(row) loads the pixels of `row` at hand: whole vectors of `to` are streamed.
template <class S, class F>
INLINE void stream_pixels(S* to, int64_t pixels, F value) {
  constexpr int64_t L = lanes<S>;
  auto part = [&](int64_t p, int64_t count) __attribute__((always_inline)) {
    const Part<S> some = first_lanes<S>(count);
    store_part(to + p, value([&](const S* row) __attribute__((always_inline)) { return load_part(row + p, some); }), some);
  };
  int64_t p = min64(pixels, until_aligned(to));
  if (p) part(0, p);
  for (; p + L <= pixels; p += L)
    stream(to + p, value([&](const S* row) __attribute__((always_inline)) { return load(row + p); }));
  if (p < pixels) part(p, pixels - p);
}
template <class S>
INLINE void stream_row(S* to, const S* row, int64_t pixels) {
  stream_pixels(to, pixels, [&](auto read) __attribute__((always_inline)) { return read(row); });
}

// Copies a finished row to a tensor; `streams` as is_streamed says of the whole tensor. After the last one: end_stream.
template <class S>
INLINE void leave_row(S* to, const S* row, int64_t pixels, bool streams) {
  if (streams) stream_row(to, row, pixels);
  else std::memcpy(to, row, pixels * sizeof(S));
}

// Pixels of a row that all block rows make before the next ones, where they leave past the caches: 2.6 kB and more.
template <class S>
constexpr int64_t streamed_sweep = 14 * 3 * lanes<S>;
