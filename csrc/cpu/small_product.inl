// Products with graphs: dense matrices V x V, V a few dozen joints. A graph is kept as a *map*: V rows of whole vectors,
// `ld` elements each, so that a row is 1 to 3 registers and every load of it is aligned.
//
//   out[r][:] (+)= sum over j of a[r * row + j * term] * b[j * ldb + :]
//
// One side, a, is read one number at a time and may have any strides; the other, b, is read by vectors. That one form gives
// all three products of an aggregation y = x G over the frames t:
//
//   y[t, :]  = sum over v of x[t, v] G[v, :]       dx[t, :] = sum over w of dy[t, w] G'[w, :]
//   dG'[w, :] = sum over t of dy[t, w] x[t, :]     so that backward needs the transposed map G' only
//
// R rows x N vectors accumulate in registers; each sum runs over j in order, whatever the tile.

// The geometry of a map.
template <class S>
struct Joints {
  int64_t V, vectors, ld, map, last;  // last: lanes of the last vector of a row that hold joints
  explicit Joints(int64_t joints) : V(joints), vectors(ceil_div(V, lanes<S>)), ld(vectors * lanes<S>), map(V * ld),
                                    last(V - (vectors - 1) * lanes<S>) {}
};

// The first n lanes from p, zeros in the others; nothing is read beyond p[n - 1]. 0 < n <= lanes.
template <class S>
INLINE Vec<S> load_first(const S* p, int64_t n) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 4) return (Vec<S>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else return (Vec<S>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif VECTOR_BYTES == 32
  if constexpr (sizeof(S) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (Vec<S>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane));
  } else {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return (Vec<S>)_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
  }
#else
  S lane[lanes<S>] = {};
  for (int64_t i = 0; i < n; i++) lane[i] = p[i];
  return load(lane);
#endif
}

// Writes the first n lanes and nothing else.
template <class S>
INLINE void store_first(S* p, Vec<S> v, int64_t n) {
  if (n == lanes<S>) return store(p, v);
#if VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  else _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#else  // halves of known size: a masked store of AVX2 takes microcode on some processors
  S lane[lanes<S>];
  store(lane, v);
  const S* from = lane;
  UNROLL for (int half = lanes<S> / 2; half > 0; half /= 2)
    if (n & half) std::memcpy(p, from, half * sizeof(S)), p += half, from += half;
#endif
}

// Row of V numbers at any stride to a padded row; the lanes beyond repeat `padding`.
template <class S>
INLINE void pack_joints(const S* from, int64_t stride, const Joints<S>& j, S padding, S* to) {
  for (int64_t v = 0; v < j.V; v++) to[v] = from[v * stride];
  for (int64_t v = j.V; v < j.ld; v++) to[v] = padding;
}
template <class S>
INLINE void unpack_joints(const S* from, const Joints<S>& j, S* to) {
  for (int64_t i = 0; i < j.vectors; i++)
    store_first(to + i * lanes<S>, load(from + i * lanes<S>), i + 1 < j.vectors ? lanes<S> : j.last);
}

// One channel of a sample, (T, V), in the caller's strides.
template <class S>
struct Frames {
  const S* data;
  int64_t frame, joint;
};
template <class S>
INLINE Frames<S> frames_of(const View<const S>& x, int64_t n, int64_t c) {
  return {x.data + n * x.stride[0] + c * x.stride[1], x.stride[2], x.stride[3]};
}
template <class S>
INLINE Frames<S> frames_of(const GroupView<const S>& x, int64_t n, int64_t k, int64_t c) {
  return {x.data + n * x.stride[0] + k * x.stride[1] + c * x.stride[2], x.stride[3], x.stride[4]};
}

// To padded rows with zeros behind: the vector side of a product.
template <class S>
INLINE void pack_frames(const Frames<S>& x, int64_t T, const Joints<S>& j, S* to) {
  const S* from = x.data;
  for (int64_t t = 0; t < T; t++, from += x.frame, to += j.ld) {
    if (x.joint != 1) { pack_joints(from, x.joint, j, S(0), to); continue; }
    const int64_t end = (j.vectors - 1) * lanes<S>;
    for (int64_t v = 0; v < end; v += lanes<S>) store(to + v, load(from + v));
    store(to + end, load_first(from + end, j.last));
  }
}
// A (V, V) to a map, or its transpose.
template <class S>
INLINE void pack_map(const S* A, bool transposed, const Joints<S>& j, S* to) {
  pack_frames<S>({A, transposed ? 1 : j.V, transposed ? j.V : 1}, j.V, j, to);
}
// The transpose of a map back to (V, V).
template <class S>
INLINE void unpack_transposed_map(const S* from, const Joints<S>& j, S* A) {
  for (int64_t v = 0; v < j.V; v++)
    for (int64_t w = 0; w < j.V; w++) A[v * j.V + w] = from[w * j.ld + v];
}

// to[w][v] = from[v][w], with zeros behind the last joint.
template <class S>
INLINE void transpose_map(const S* from, const Joints<S>& j, S* to) {
  for (int64_t w = 0; w < j.V; w++) pack_joints(from + w, j.ld, j, S(0), to + w * j.ld);
}

template <class S>
struct Product {
  const S* a;
  int64_t row, term;  // strides of a
  const S* b;
  int64_t ldb, terms;
  S* out;
  int64_t ldo;
  bool add;  // to what out holds
};

// 26, 24 or 12 sums; AVX2 and SSE2 have 16 registers for 12 of them.
template <int N>
constexpr int product_rows = MAX_ROWS == 8 ? (N == 3 ? 8 : N == 2 ? 13 : 16) : (N == 3 ? 4 : N == 2 ? 6 : 12);

// A function of its own for every size: inlined side by side, GCC runs out of registers.
template <class S, int R, int N>
__attribute__((noinline)) void product_tile(const Product<S>& p, int64_t last) {
  Vec<S> acc[R][N];
  if (p.add) {
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int i = 0; i < N; i++)
        acc[r][i] = i < N - 1 ? load(p.out + r * p.ldo + i * lanes<S>) : load_first(p.out + r * p.ldo + i * lanes<S>, last);
  } else {
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int i = 0; i < N; i++) acc[r][i] = Vec<S>{};
  }
  constexpr int Q = (R + 3) / 4;  // one pointer for four rows: the other three are reached by the address modes
  const S* a[Q];
  UNROLL for (int q = 0; q < Q; q++) a[q] = p.a + 4 * q * p.row;
  const S* b = p.b;
  const int64_t row = p.row, term = p.term, ldb = p.ldb;
  for (int64_t j = p.terms; j > 0; j--, b += ldb) {
    Vec<S> in[N];
    UNROLL for (int i = 0; i < N; i++) { in[i] = load(b + i * lanes<S>); KEEP(in[i]); }
    UNROLL for (int r = 0; r < R; r++) {
      Vec<S> factor = splat<S>(a[r / 4][(r % 4) * row]);
      KEEP(factor);
      UNROLL for (int i = 0; i < N; i++) acc[r][i] += factor * in[i];
    }
    UNROLL for (int q = 0; q < Q; q++) a[q] += term;
  }
  UNROLL for (int r = 0; r < R; r++) {
    S* to = p.out + r * p.ldo;
    UNROLL for (int i = 0; i < N - 1; i++) store(to + i * lanes<S>, acc[r][i]);
    store_first(to + (N - 1) * lanes<S>, acc[r][N - 1], last);
  }
}

template <class S, int N, int R = product_rows<N>>
INLINE void product_tile_of(int64_t rows, const Product<S>& p, int64_t last) {
  if constexpr (R > 0) {
    if (rows == R) product_tile<S, R, N>(p, last);
    else product_tile_of<S, N, R - 1>(rows, p, last);
  }
}

// All rows of N columns of vectors, in as few tiles as fit, of sizes that differ by one at most: a tile of one row would
// wait for its own sums.
template <class S, int N>
INLINE void product_columns(Product<S> p, int64_t rows, int64_t last) {
  for (int64_t tiles = ceil_div(rows, product_rows<N>); tiles > 0; tiles--) {
    const int64_t count = ceil_div(rows, tiles);
    product_tile_of<S, N>(count, p, last);
    rows -= count, p.a += count * p.row, p.out += count * p.ldo;
  }
}

// `rows` rows over all joints. The last vector of a row is written up to `last` lanes: j.last for the caller's tensors,
// lanes<S> for maps.
template <class S>
__attribute__((noinline)) void product(Product<S> p, int64_t rows, const Joints<S>& j, int64_t last) {
  for (int64_t left = j.vectors; left > 0;) {
    const int64_t count = left == 3 || left > 4 ? 3 : min64(left, 2), end = left == count ? last : lanes<S>;
    if (count == 3) product_columns<S, 3>(p, rows, end);
    else if (count == 2) product_columns<S, 2>(p, rows, end);
    else product_columns<S, 1>(p, rows, end);
    left -= count, p.b += count * lanes<S>, p.out += count * lanes<S>;
  }
}

// y[t, :] (+)= sum over v of x[t, v] G[v, :]; y (T, V) contiguous.
template <class S>
INLINE void multiply(const Frames<S>& x, const S* graph, int64_t T, const Joints<S>& j, S* y, bool add = false) {
  product<S>({x.data, x.frame, x.joint, graph, j.ld, j.V, y, j.V, add}, T, j, j.last);
}

// map[w, :] (+)= sum over t of x[t, w] packed[t, :].
template <class S>
INLINE void correlate(const Frames<S>& x, const S* packed, int64_t T, const Joints<S>& j, S* map, bool add) {
  product<S>({x.data, x.joint, x.frame, packed, j.ld, T, map, j.ld, add}, j.V, j, lanes<S>);
}
