// The three register tiles that all ops share. A panel is a workspace of rows of pixels; an entry is one live column of
// a block: `bo` outputs x one input row, at a fixed offset into the panel. The same offset serves all three products:
//
//   gather  (forward)  y[o][p]      += w[e][o] * x[off_e + p]      accumulators in registers, stored once
//   scatter (dX)       dx[off_e + p] += w[e][o] * dy[o][p]          dY in registers: the exact adjoint of gather
//   dot     (dW)       dw[e][o]     += sum_p dy[o][p] * x[off_e + p]
//
// One x vector loaded once serves R outputs. R rows x N vectors accumulate: 8 x 3 fills 32 registers, 4 x 3 fills 16.
// R = 1 has no reuse and is bound by its loads: 1 x 12 only hides the latency of the multiply-add.

template <int R>
constexpr int tile_vectors = MAX_ROWS == 8 ? (R == 8 ? 3 : R == 4 ? 5 : R == 2 ? 8 : 12) : (R == 4 ? 3 : R == 2 ? 5 : 8);

template <class S>
struct Entries {  // of one block row: n entries, `bo` weights each
  const int32_t* offset;
  const S* weight;
  int64_t n, bo;
};

// start(o, i) is the first value of an accumulator; finish(o, i, sum) takes the sum of vector i of output o.
template <class S, int R, int N, class Start, class Finish>
INLINE void gather_tile(const S* x, const Entries<S>& e, Start start, Finish finish) {
  Vec<S> acc[R][N];
  UNROLL for (int o = 0; o < R; o++)
    UNROLL for (int i = 0; i < N; i++) acc[o][i] = start(o, i);
  const S* w = e.weight;
  for (int64_t j = 0; j < e.n; j++, w += e.bo) {
    const S* row = x + e.offset[j];
    if constexpr (R == 1) {
      Vec<S> weight = splat<S>(w[0]);
      UNROLL for (int i = 0; i < N; i++) acc[0][i] += weight * load(row + i * lanes<S>);
    } else {
      Vec<S> in[N];
      UNROLL for (int i = 0; i < N; i++) in[i] = load(row + i * lanes<S>);
      UNROLL for (int o = 0; o < R; o++) {
        Vec<S> weight = splat<S>(w[o]);
        KEEP(weight);
        UNROLL for (int i = 0; i < N; i++) acc[o][i] += weight * in[i];
      }
    }
  }
  // Unrolled: a run-time index into acc would move it from registers to memory.
  UNROLL for (int o = 0; o < R; o++)
    UNROLL for (int i = 0; i < N; i++) finish(o, i, acc[o][i]);
}

// Stores `valid` pixels of R rows: whole vectors, or what is left of the last tile.
template <class S, int R, int N>
INLINE void gather(const S* x, const Entries<S>& e, const S* bias, S* y, int64_t ldy, int64_t valid) {
  auto start = [&](int o, int) __attribute__((always_inline)) { return bias ? splat<S>(bias[o]) : Vec<S>{}; };
  if (valid >= N * lanes<S>) {
    gather_tile<S, R, N>(x, e, start, [&](int o, int i, Vec<S> sum) __attribute__((always_inline)) {
      store(y + o * ldy + i * lanes<S>, sum);
    });
    return;
  }
  S tail[R][N * lanes<S>];
  gather_tile<S, R, N>(x, e, start, [&](int o, int i, Vec<S> sum) __attribute__((always_inline)) {
    store(tail[o] + i * lanes<S>, sum);
  });
  for (int o = 0; o < R; o++) std::memcpy(y + o * ldy, tail[o], valid * sizeof(S));
}

// dy holds whole vectors: its rows are padded with zeros, so that what lies beyond the last pixel adds nothing.
template <class S, int R, int N>
INLINE void scatter(S* x, const Entries<S>& e, const S* dy, int64_t ldy) {
  Vec<S> held[R][N];
  UNROLL for (int o = 0; o < R; o++)
    UNROLL for (int i = 0; i < N; i++) held[o][i] = load(dy + o * ldy + i * lanes<S>);
  const S* w = e.weight;
  for (int64_t j = 0; j < e.n; j++, w += e.bo) {
    S* row = x + e.offset[j];
    Vec<S> acc[N];
    UNROLL for (int i = 0; i < N; i++) acc[i] = load(row + i * lanes<S>);
    UNROLL for (int o = 0; o < R; o++) {
      Vec<S> weight = splat<S>(w[o]);
      KEEP(weight);
      UNROLL for (int i = 0; i < N; i++) acc[i] += weight * held[o][i];
    }
    UNROLL for (int i = 0; i < N; i++) store(row + i * lanes<S>, acc[i]);
  }
}

// E entries x R outputs over `vectors` vectors of pixels.
template <class S, int R, int E>
INLINE void dot(const S* x, const int32_t* offset, const S* dy, int64_t ldy, int64_t vectors, S* dw, int64_t bo) {
  Vec<S> acc[E][R] = {};
  const S* row[E];
  UNROLL for (int e = 0; e < E; e++) row[e] = x + offset[e];
  for (int64_t p = 0; p < vectors * lanes<S>; p += lanes<S>) {
    Vec<S> in[E];
    UNROLL for (int e = 0; e < E; e++) { in[e] = load(row[e] + p); KEEP(in[e]); }
    UNROLL for (int o = 0; o < R; o++) {
      Vec<S> d = load(dy + o * ldy + p);
      KEEP(d);
      UNROLL for (int e = 0; e < E; e++) acc[e][o] += d * in[e];
    }
  }
  UNROLL for (int e = 0; e < E; e++) add_sums<S, R>(dw + e * bo, acc[e]);
}

// Calls body(std::integral_constant<R>, first row) for pieces of MAX_ROWS, 4, 2, 1 rows.
template <int V>
struct Int { static constexpr int value = V; };
template <class F>
INLINE void row_pieces(int64_t rows, F body) {
  int64_t o = 0;
  if constexpr (MAX_ROWS == 8)
    for (; rows - o >= 8; o += 8) body(Int<8>{}, o);
  for (; rows - o >= 4; o += 4) body(Int<4>{}, o);
  if (rows - o >= 2) body(Int<2>{}, o), o += 2;
  if (rows - o >= 1) body(Int<1>{}, o);
}

// Calls body(Int<N>, first vector): full tiles of N vectors, then half a tile, then single ones.
template <int N, class F>
INLINE void vector_pieces(int64_t vectors, F body) {
  int64_t i = 0;
  for (; vectors - i >= N; i += N) body(Int<N>{}, i);
  if constexpr (N >= 3) {
    constexpr int H = N == 3 ? 2 : N / 2;
    for (; vectors - i >= H; i += H) body(Int<H>{}, i);
  }
  for (; i < vectors; i++) body(Int<1>{}, i);
}

// Frames of a column (columns.inl) in one register tile, and their cut into tiles that differ by one frame at most: body(Int<n>, first).
template <int R>
constexpr int frame_tile = MAX_ROWS == 8 ? (R == 8 ? 3 : R == 4 ? 5 : R == 2 ? 8 : 13) : (R == 4 ? 3 : R == 2 ? 5 : 9);

template <int N, class F>
INLINE void of_size(int64_t size, int64_t first, F body) {
  if constexpr (N == 1) body(Int<1>{}, first);
  else if (size == N) body(Int<N>{}, first);
  else of_size<N - 1>(size, first, body);
}
template <int N, class F>
INLINE void even_pieces(int64_t count, F body) {
  int64_t first = 0;
  for (int64_t pieces = ceil_div(count, N); pieces > 0; pieces--) {
    const int64_t size = ceil_div(count - first, pieces);
    of_size<N>(size, first, body);
    first += size;
  }
}

// One block row over `pixels` pixels of a panel, forward.
template <class S>
INLINE void gather_row(const S* panel, Entries<S> e, int64_t rows, const S* bias, S* y, int64_t ldy, int64_t pixels) {
  row_pieces(rows, [&](auto r, int64_t o) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value;
    Entries<S> piece{e.offset, e.weight + o, e.n, e.bo};
    vector_pieces<tile_vectors<R>>(ceil_div(pixels, lanes<S>), [&](auto n, int64_t i) __attribute__((always_inline)) {
      const int64_t p = i * lanes<S>;
      gather<S, R, decltype(n)::value>(panel + p, piece, bias ? bias + o : nullptr, y + o * ldy + p, ldy, pixels - p);
    });
  });
}

template <class S>
INLINE void scatter_row(S* panel, Entries<S> e, int64_t rows, const S* dy, int64_t ldy, int64_t pixels) {
  row_pieces(rows, [&](auto r, int64_t o) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value;
    Entries<S> piece{e.offset, e.weight + o, e.n, e.bo};
    vector_pieces<tile_vectors<R>>(ceil_div(pixels, lanes<S>), [&](auto n, int64_t i) __attribute__((always_inline)) {
      scatter<S, R, decltype(n)::value>(panel + i * lanes<S>, piece, dy + o * ldy + i * lanes<S>, ldy);
    });
  });
}

// dY in pieces of 40 vectors: 8 rows of them stay in L1 for all entries of the block row. `between` is called after every tile.
constexpr int64_t dot_piece = 40;

struct Nothing {
  INLINE void operator()() const {}
};
template <class S, class Between = Nothing>
INLINE void dot_row(const S* panel, const int32_t* offset, int64_t entries, int64_t bo, int64_t rows, const S* dy,
                    int64_t ldy, int64_t pixels, S* dw, Between&& between = {}) {
  const int64_t vectors = ceil_div(pixels, lanes<S>);
  for (int64_t v = 0; v < vectors; v += dot_piece) {
    const int64_t count = min64(dot_piece, vectors - v), p = v * lanes<S>;
    row_pieces(rows, [&](auto r, int64_t o) __attribute__((always_inline)) {
      constexpr int R = decltype(r)::value, E = tile_vectors<R>;
      int64_t e = 0;
      for (; entries - e >= E; e += E) {
        dot<S, R, E>(panel + p, offset + e, dy + o * ldy + p, ldy, count, dw + e * bo + o, bo);
        between();
      }
      for (; e < entries; e++) {
        dot<S, R, 1>(panel + p, offset + e, dy + o * ldy + p, ldy, count, dw + e * bo + o, bo);
        between();
      }
    });
  }
}
