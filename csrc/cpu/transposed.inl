// The transposed pattern, entry by entry: dX of blocks of few outputs (bo < 4) is a gather over rows of dY, because a scatter of
// one row is bound by its stores. Row (i, q) has the entries of input i that belong to phase q: a phase u % stride of the input
// frames u in temporal_conv, a subset in graph_conv.
template <class S>
struct TransposedEntries {
  int32_t *ptr, *offset;  // by (i, q)
  S* weight;
  static int64_t count(const Pattern& p) { return p.blocks * p.bi * p.bo; }
  static size_t room(const Pattern& p, int64_t phases) {
    return Scratch::room<int32_t>(p.I * phases + 2) + Scratch::room<int32_t>(count(p)) + Scratch::room<S>(count(p));
  }
  // shift(k, q): the offset of tap k in phase q within a row of dY, or -1 where it does not belong to it. ld: between rows of dY.
  template <class F>
  TransposedEntries(const Pattern& p, int64_t phases, const S* values, int64_t ld, F shift, Scratch& scratch) {
    ptr = scratch.take<int32_t>(p.I * phases + 2);
    offset = scratch.take<int32_t>(count(p));
    weight = scratch.take<S>(count(p));
    std::memset(ptr, 0, (p.I * phases + 2) * sizeof(int32_t));
    auto each = [&](auto body) __attribute__((always_inline)) {
      for (int64_t g = 0; g < p.rows; g++)
        for (int64_t b = p.row_ptr[g]; b < p.row_ptr[g + 1]; b++)
          for (int64_t j = 0; j < min64(p.bi, p.I - p.input[b] * p.bi); j++)
            for (int64_t q = 0; q < phases; q++) {
              const int64_t at = shift(p.tap[b], q);
              if (at < 0) continue;
              for (int64_t o = 0; o < min64(p.bo, p.O - g * p.bo); o++)
                body((p.input[b] * p.bi + j) * phases + q, (g * p.bo + o) * ld + at, values[(b * p.bi + j) * p.bo + o]);
            }
    };
    each([&](int64_t row, int64_t, S) { ptr[row + 2]++; });
    for (int64_t r = 0; r < p.I * phases; r++) ptr[r + 2] += ptr[r + 1];
    each([&](int64_t row, int64_t at, S w) {  // in the order of the blocks: the order of every sum is fixed
      const int32_t to = ptr[row + 1]++;
      offset[to] = (int32_t)at, weight[to] = w;
    });
  }
};
