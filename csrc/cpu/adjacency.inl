// A sparse adjacency applied to one row of frames: z[t,w] = sum over entries (v,w) of A[v,w] x[t,v].
//
// A column with d entries takes d slots: slot s holds, for every target w, one source joint and its coefficient. With
// V <= 32 in float32 and AVX-512 a frame is two registers and a slot is a permutation of them and a multiply-add; a
// column that has fewer entries than slots holds coefficient 0 there. Elsewhere the entries are walked one by one.

template <class S>
struct AdjacencyTable {
  static constexpr bool of_samples = false;
  int64_t K, V, stride;         // stride: lanes of one slot
  const int32_t *ptr, *src;     // entries by (k, w), or by (k, v) if transposed
  const S* coef;
  int32_t *slots, *index, *entry;  // slots: per k; index, entry (-1: none): (K, V, stride)
  S* weight;                       // (K, V, stride)

  static int64_t lanes_of(const Adjacency& a) { return ceil_div(a.V, 32) * 32; }
  static size_t room(const Adjacency& a) {
    const int64_t table = a.K * a.V * lanes_of(a);
    return Scratch::room<int32_t>(a.K) + 2 * Scratch::room<int32_t>(table) + Scratch::room<S>(table) +
           Scratch::room<int32_t>(a.K * a.V + 1) + Scratch::room<int32_t>(a.entries) + Scratch::room<S>(a.entries);
  }
  static int64_t sums(const Adjacency& a) { return a.K * a.V * lanes_of(a); }

  AdjacencyTable(const Adjacency& a, const S* values, bool transposed, Scratch& scratch) : K(a.K), V(a.V), stride(lanes_of(a)) {
    slots = scratch.take<int32_t>(K);
    index = scratch.take<int32_t>(K * V * stride);
    entry = scratch.take<int32_t>(K * V * stride);
    weight = scratch.take<S>(K * V * stride);
    int32_t* sorted_ptr = scratch.take<int32_t>(K * V + 1);
    int32_t* sorted_src = scratch.take<int32_t>(a.entries);
    S* sorted_coef = scratch.take<S>(a.entries);
    std::memset(slots, 0, K * sizeof(int32_t));
    std::memset(weight, 0, K * V * stride * sizeof(S));
    for (int64_t j = 0; j < K * V * stride; j++) index[j] = 0, entry[j] = -1;
    ptr = a.ptr, src = a.src, coef = values;
    if (transposed) {  // a counting sort by (k, v): stable, so the order of every sum is fixed
      std::memset(sorted_ptr, 0, (K * V + 1) * sizeof(int32_t));
      for (int64_t k = 0; k < K; k++)
        for (int32_t e = a.ptr[k * V]; e < a.ptr[(k + 1) * V]; e++) sorted_ptr[k * V + a.src[e] + 1]++;
      for (int64_t j = 0; j < K * V; j++) sorted_ptr[j + 1] += sorted_ptr[j];
      for (int64_t k = 0; k < K; k++)
        for (int64_t w = 0; w < V; w++)
          for (int32_t e = a.ptr[k * V + w]; e < a.ptr[k * V + w + 1]; e++) {
            const int32_t at = sorted_ptr[k * V + a.src[e]]++;
            sorted_src[at] = (int32_t)w, sorted_coef[at] = values[e];
          }
      for (int64_t j = K * V; j > 0; j--) sorted_ptr[j] = sorted_ptr[j - 1];
      sorted_ptr[0] = 0;
      ptr = sorted_ptr, src = sorted_src, coef = sorted_coef;
    }
    for (int64_t k = 0; k < K; k++)
      for (int64_t w = 0; w < V; w++)
        for (int32_t e = ptr[k * V + w]; e < ptr[k * V + w + 1]; e++) {
          const int64_t s = e - ptr[k * V + w], at = (k * V + s) * stride + w;
          if (s + 1 > slots[k]) slots[k] = (int32_t)s + 1;
          index[at] = src[e], weight[at] = coef[e], entry[at] = e;
        }
  }

  const AdjacencyTable& at(int64_t) const { return *this; }
  void apply(int64_t k, const S* x, int64_t frames, S* z) const { apply_runs(k, x, frames, z, 1, 0); }
  // Several runs of frames, `apart` elements from one another.
  void apply_runs(int64_t k, const S* x, int64_t frames, S* z, int64_t runs, int64_t apart) const {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(S) == 4)
      if (V >= 16 && V <= 32 && slots[k] >= 1 && slots[k] <= 4)
        return of_size<4>(slots[k], 0, [&](auto n, int64_t) __attribute__((always_inline)) {
          permute_held<decltype(n)::value>(k, x, frames, z, runs, apart);
        });
#endif
    for (int64_t r = 0; r < runs; r++) run<false>(k, x + r * apart, frames, z + r * apart);
  }
  void add(int64_t k, const S* x, int64_t frames, S* z) const { run<true>(k, x, frames, z); }

  template <bool ADD>
  void run(int64_t k, const S* x, int64_t frames, S* z) const {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(S) == 4)
      if (V <= 32) return permute<ADD>(k, x, frames, z);
#endif
    for (int64_t t = 0; t < frames; t++, x += V, z += V)
      for (int64_t w = 0; w < V; w++) {
        S acc = ADD ? z[w] : 0;
        for (int32_t e = ptr[k * V + w]; e < ptr[k * V + w + 1]; e++) acc += coef[e] * x[src[e]];
        z[w] = acc;
      }
  }

  // sum[s][w] += sum over t of x[t, index[s][w]] * dz[t, w]: the gradient of every coefficient, slot by slot.
  void correlate(int64_t k, const S* x, const S* dz, int64_t frames, S* sums) const {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(S) == 4)
      if (V <= 32) return permute_correlate(k, x, dz, frames, sums);
#endif
    for (int64_t w = 0; w < V; w++)
      for (int32_t e = ptr[k * V + w]; e < ptr[k * V + w + 1]; e++) {
        S acc = 0;
        for (int64_t t = 0; t < frames; t++) acc += x[t * V + src[e]] * dz[t * V + w];
        sums[(k * V + e - ptr[k * V + w]) * stride + w] += acc;
      }
  }
  void collect(const Adjacency& a, const S* sums, S* dcoef) const {
    for (int64_t j = 0; j < a.K * V * stride; j++)
      if (entry[j] >= 0) dcoef[entry[j]] = sums[j];
  }

#if VECTOR_BYTES == 64
  // Reads and writes whole registers: up to 32 elements from the start of the last frame, within the row's slack. Lanes
  // past V are overwritten by the next frame when the row is written anew, and masked off when it is added to.
  template <bool ADD>
  void permute(int64_t k, const float* x, int64_t frames, float* z) const {
    const __mmask16 low = V >= 16 ? 0xffff : (1u << V) - 1, high = V > 16 ? (__mmask16)((1u << (V - 16)) - 1) : 0;
    for (int64_t t = 0; t < frames; t++, x += V, z += V) {
      const __m512 lo = _mm512_loadu_ps(x), hi = _mm512_loadu_ps(x + 16);
      __m512 a = ADD ? _mm512_maskz_loadu_ps(low, z) : _mm512_setzero_ps();
      __m512 b = ADD ? _mm512_maskz_loadu_ps(high, z + 16) : _mm512_setzero_ps();
      for (int64_t s = k * V; s < k * V + slots[k]; s++) {
        const int32_t* id = index + s * stride;
        a = _mm512_fmadd_ps(_mm512_loadu_ps(weight + s * stride), _mm512_permutex2var_ps(lo, _mm512_loadu_si512(id), hi), a);
        b = _mm512_fmadd_ps(_mm512_loadu_ps(weight + s * stride + 16),
                            _mm512_permutex2var_ps(lo, _mm512_loadu_si512(id + 16), hi), b);
      }
      _mm512_mask_storeu_ps(z, low, a);
      _mm512_mask_storeu_ps(z + 16, high, b);
    }
  }
  // The same for N slots, V >= 16, with the table in registers. All frames but the last of a run are stored whole: what lies past V
  // is overwritten by the next one. A masked store costs twice as much.
  template <int N>
  void permute_held(int64_t k, const float* x, int64_t frames, float* z, int64_t runs, int64_t apart) const {
    const __mmask16 high = (__mmask16)((1u << (V - 16)) - 1);
    __m512i il[N], ih[N];
    __m512 wl[N], wh[N];
    UNROLL for (int s = 0; s < N; s++) {
      const int64_t at = (k * V + s) * stride;
      il[s] = _mm512_loadu_si512(index + at), ih[s] = _mm512_loadu_si512(index + at + 16);
      wl[s] = _mm512_loadu_ps(weight + at), wh[s] = _mm512_loadu_ps(weight + at + 16);
    }
    for (int64_t r = 0; r < runs; r++)
      for (int64_t t = 0; t < frames; t++) {
        const float* from = x + r * apart + t * V;
        float* to = z + r * apart + t * V;
        const __m512 lo = _mm512_loadu_ps(from), hi = _mm512_loadu_ps(from + 16);
        __m512 a = _mm512_mul_ps(wl[0], _mm512_permutex2var_ps(lo, il[0], hi));
        __m512 b = _mm512_mul_ps(wh[0], _mm512_permutex2var_ps(lo, ih[0], hi));
        UNROLL for (int s = 1; s < N; s++) {
          a = _mm512_fmadd_ps(wl[s], _mm512_permutex2var_ps(lo, il[s], hi), a);
          b = _mm512_fmadd_ps(wh[s], _mm512_permutex2var_ps(lo, ih[s], hi), b);
        }
        _mm512_storeu_ps(to, a);
        if (t + 1 < frames) _mm512_storeu_ps(to + 16, b);
        else _mm512_mask_storeu_ps(to + 16, high, b);
      }
  }
  void permute_correlate(int64_t k, const float* x, const float* dz, int64_t frames, float* sums) const {
    const __mmask16 low = V >= 16 ? 0xffff : (1u << V) - 1, high = V > 16 ? (__mmask16)((1u << (V - 16)) - 1) : 0;
    for (int64_t s = k * V; s < k * V + slots[k]; s++) {
      const __m512i il = _mm512_loadu_si512(index + s * stride), ih = _mm512_loadu_si512(index + s * stride + 16);
      __m512 a = _mm512_setzero_ps(), b = a;
      for (int64_t t = 0; t < frames; t++) {
        const __m512 lo = _mm512_loadu_ps(x + t * V), hi = _mm512_loadu_ps(x + t * V + 16);
        a = _mm512_fmadd_ps(_mm512_permutex2var_ps(lo, il, hi), _mm512_maskz_loadu_ps(low, dz + t * V), a);
        b = _mm512_fmadd_ps(_mm512_permutex2var_ps(lo, ih, hi), _mm512_maskz_loadu_ps(high, dz + t * V + 16), b);
      }
      float* to = sums + s * stride;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), a));
      _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), b));
    }
  }
#endif
};
