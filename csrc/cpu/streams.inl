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
template <class S, class A>
INLINE void leave_row(A* to, const S* row, int64_t pixels, bool) { convert(row, pixels, to); }

// The same for a row of zeros.
template <class A>
INLINE void leave_zeros(A* to, int64_t pixels, bool streams) {
  if constexpr (std::is_same_v<A, float> || std::is_same_v<A, double>)
    if (streams) return stream_pixels(to, pixels, [](auto) __attribute__((always_inline)) { return Vec<A>{}; });
  std::memset((void*)to, 0, pixels * sizeof(A));
}

// Whether a row holds nothing but 0, of one sign. The gradient of channels that no live block reads does: what would follow from
// it need not be computed.
template <class S>
INLINE bool all_zeros(const S* row, int64_t pixels) {
  return pixels == 0 || (row[0] == 0 && !std::memcmp(row, row + 1, (pixels - 1) * sizeof(S)));
}

// Where sums of rows go that a tensor of A takes: to `room`, until `finish`, or, if the tensor stores S and is not streamed,
// to the tensor itself.
template <class S, class A>
struct OutputRows {
  S* rows;
  int64_t ld;
  bool held, streams;
  OutputRows(S* room, int64_t room_ld, A* y, int64_t ldy, bool past) : rows(room), ld(room_ld), held(true), streams(past) {
    if constexpr (std::is_same_v<S, A>)
      if (!past) rows = y, ld = ldy, held = false;
  }
  int64_t pixels(int64_t count) const { return held ? ceil_div(count, lanes<S>) * lanes<S> : count; }  // whole vectors in the room
  void finish(int64_t count, int64_t valid, A* y, int64_t ldy) const {
    for (int64_t o = 0; held && o < count; o++) leave_row(y + o * ldy, rows + o * ld, valid, streams);
  }
};

// The same for one row of S.
template <class S>
struct OneRow {
  S *row, *to;
  OneRow(S* room, S* y, bool streams) : row(streams ? room : y), to(y) {}
  void finish(int64_t pixels) const {
    if (row != to) stream_row(to, row, pixels);
  }
};

// Pixels of a row that all block rows make before the next ones, where they leave past the caches: 2.6 kB and more.
template <class S>
constexpr int64_t streamed_sweep = 14 * 3 * lanes<S>;
