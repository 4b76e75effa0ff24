// Frames times graphs, inside a fused network: y[t, :] = epilogue(sum over k, v of x_k[t, v] G_k[v, :]), frames of V joints one
// after the other. Maps have rows of `joint_ld` floats, whatever the width of a vector.
//
// 25 joints fill two vectors of 16 to 78 %. Five frames are 5 x 16 + 45 columns: eight vectors hold 125 of 128 lanes. The three
// tail vectors multiply a register put together from the broadcasts of two or three frames. That is why the lanes past the
// last joint repeat columns 16 and on: the second vector of a row serves the tail of one frame and most of another's.

// The geometry of a map with rows of ld floats: a multiple of every vector width.
INLINE Joints<float> joints_with(int64_t V, int64_t ld) {
  Joints<float> j(V);
  j.ld = ld, j.vectors = ld / lanes<float>, j.map = V * ld;
  return j;
}

struct Frame25Recipe { const float *a, *d0, *d1; float k, w0, w1; };  // G = a + k + w0 d0 + w1 d1, d1 may be null

// With RELU, y = relu(sum + bias + residual); the residual may be y itself.
struct GraphProduct {
  const float* x;
  int64_t subset, K;  // floats between x_k and x_{k+1}, number of subsets
  float* graph;       // K maps
  const float* residual;
  float bias;
  float* y;
  int64_t T;
};

constexpr int64_t make_frames = 15;  // the fewest frames of a product that makes its graphs
constexpr int64_t max_recipes = 8;   // and its most subsets

#if VECTOR_BYTES == 64
// Where an operation on 512 bits is two on 256 (Zen 4), 25 joints are one and a half of them: 24 columns without a lane lost.
INLINE bool half_width() {
#if defined(__x86_64__)
  static const bool value = (__builtin_cpu_init(), __builtin_cpu_is("amdfam19h"));
  return value;
#else
  return false;
#endif
}

typedef int Lanes __attribute__((vector_size(64)));
constexpr int split_rows = 14;  // 28 sums, two of G, a broadcast

// The sums of 8 vectors as the lanes of one.
INLINE __m256 sums_of(const __m256* v) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}

// Row v of a graph from its recipe.
INLINE void make_row(const Frame25Recipe& h, int64_t at, __m512& g0, __m512& g1) {
  const __m512 constant = _mm512_set1_ps(h.k), w = _mm512_set1_ps(h.w0);
  g0 = _mm512_fmadd_ps(w, _mm512_loadu_ps(h.d0 + at), _mm512_add_ps(constant, _mm512_loadu_ps(h.a + at)));
  g1 = _mm512_fmadd_ps(w, _mm512_loadu_ps(h.d0 + at + 16), _mm512_add_ps(constant, _mm512_loadu_ps(h.a + at + 16)));
  if (h.d1) {
    const __m512 w1 = _mm512_set1_ps(h.w1);
    g0 = _mm512_fmadd_ps(w1, _mm512_loadu_ps(h.d1 + at), g0);
    g1 = _mm512_fmadd_ps(w1, _mm512_loadu_ps(h.d1 + at + 16), g1);
  }
}

// R frames. column: column 24 of every graph, 32 floats each.
template <int R, bool RELU, bool MAKE>
__attribute__((noinline)) void split_frames(const GraphProduct& p, int64_t t, float* column, const Frame25Recipe* how) {
  constexpr int64_t V = 25, ld = 32;
  __m512 low[R];
  __m256 high[R];
  UNROLL for (int r = 0; r < R; r++) low[r] = _mm512_set1_ps(RELU ? p.bias : 0.f), high[r] = _mm256_set1_ps(RELU ? p.bias : 0.f);
  float* g = p.graph;
  for (int64_t k = 0; k < p.K; k++) {
    const float* x = p.x + k * p.subset + t * V;
    for (int64_t v = 0; v < V; v++, g += ld, x++) {
      __m512 g0;
      __m256 g1;
      if constexpr (MAKE) {
        __m512 made;
        make_row(how[k], v * ld, g0, made);
        g1 = _mm512_castps512_ps256(made);
        _mm512_storeu_ps(g, g0), _mm512_storeu_ps(g + 16, made);
        column[k * ld + v] = g[24];
      } else {
        g0 = _mm512_loadu_ps(g), g1 = _mm256_loadu_ps(g + 16);
      }
      asm("" : "+v"(g0), "+v"(g1));
      UNROLL for (int r = 0; r < R; r++) {
        __m512 b = _mm512_set1_ps(x[r * V]);
        asm("" : "+v"(b));  // one broadcast for both
        low[r] = _mm512_fmadd_ps(b, g0, low[r]), high[r] = _mm256_fmadd_ps(_mm512_castps512_ps256(b), g1, high[r]);
      }
    }
  }
  float* y = p.y + t * V;
  const float* residual = RELU ? p.residual + t * V : nullptr;
  UNROLL for (int r = 0; r < R; r++) {
    if constexpr (RELU) {
      low[r] = _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), low[r] + _mm512_loadu_ps(residual + r * V));
      high[r] = _mm256_max_ps(_mm256_setzero_ps(), high[r] + _mm256_loadu_ps(residual + r * V + 16));
    }
    _mm512_storeu_ps(y + r * V, low[r]), _mm256_storeu_ps(y + r * V + 16, high[r]);
  }
  __m256 dot[16] = {};
  float last[16] = {}, sums[16];
  for (int64_t k = 0; k < p.K; k++) {
    const float *x = p.x + k * p.subset + t * V, *c = column + k * ld;
    const __m256 c0 = _mm256_loadu_ps(c), c1 = _mm256_loadu_ps(c + 8), c2 = _mm256_loadu_ps(c + 16);
    UNROLL for (int r = 0; r < R; r++) {
      const float* row = x + r * V;
      dot[r] = _mm256_fmadd_ps(_mm256_loadu_ps(row), c0, dot[r]);
      dot[r] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 8), c1, dot[r]);
      dot[r] = _mm256_fmadd_ps(_mm256_loadu_ps(row + 16), c2, dot[r]);
      last[r] += row[24] * c[24];
    }
  }
  _mm256_storeu_ps(sums, sums_of(dot));
  if constexpr (R > 8) _mm256_storeu_ps(sums + 8, sums_of(dot + 8));
  UNROLL for (int r = 0; r < R; r++) {
    last[r] += sums[r];
    if constexpr (RELU) {
      const float sum = last[r] + p.bias + residual[r * V + 24];
      y[r * V + 24] = sum < 0 ? 0 : sum;
    } else {
      y[r * V + 24] = last[r];
    }
  }
}

template <bool RELU, bool MAKE, int R = split_rows>
INLINE void split_frames_of(int64_t rows, const GraphProduct& p, int64_t t, float* column, const Frame25Recipe* how) {
  if constexpr (R > 0) {
    if (rows == R) split_frames<R, RELU, MAKE>(p, t, column, how);
    else split_frames_of<RELU, MAKE, R - 1>(rows, p, t, column, how);
  }
}

template <bool RELU>
INLINE void split_product(const GraphProduct& p, const Frame25Recipe* how) {
  constexpr int64_t ld = 32, V = 25;
  float column[max_recipes * ld];
  if (!how)
    for (int64_t k = 0; k < p.K; k++)
      for (int64_t v = 0; v < V; v++) column[k * ld + v] = p.graph[(k * V + v) * ld + 24];
  int64_t t = 0;
  for (int64_t tiles = ceil_div(p.T, split_rows); tiles > 0; tiles--) {
    const int64_t count = ceil_div(p.T - t, tiles);
    if (how && t == 0) split_frames_of<RELU, true>(count, p, t, column, how);
    else split_frames_of<RELU, false>(count, p, t, column, nullptr);
    t += count;
  }
}

template <int LANES>
INLINE __m512 join(__m512 a, __m512 b) {  // lanes below LANES of a, the rest of b; asm: gcc would load b once more, and loads are scarce
  __m512 m;
  asm("vblendmps %2, %1, %0 %{%3%}" : "=v"(m) : "v"(a), "v"(b), "Yk"((__mmask16)(0xffff << LANES)));
  return m;
}

// 5 * P frames. MAKE: G does not exist yet; it is made row by row, where loads and multiply-adds have room, and left for the
// next tiles. A function of its own: inlined, gcc runs out of registers.
template <int P, bool RELU, bool MAKE>
__attribute__((noinline)) void five_frames(const GraphProduct& p, int64_t t, const Frame25Recipe* how) {
  constexpr int64_t V = 25, ld = 32;
  __m512 acc[P][8];
  const Lanes rest = {7, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 0, 0, 0};
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int n = 0; n < 8; n++) acc[i][n] = _mm512_set1_ps(RELU ? p.bias : 0.f);
  float* g = p.graph;
  for (int64_t k = 0; k < p.K; k++) {
    const float* x = p.x + k * p.subset + t * V;
    for (int64_t v = 0; v < V; v++, g += ld, x++) {
      __m512 g0, ga;
      if constexpr (MAKE) {
        make_row(how[k], v * ld, g0, ga);
        _mm512_storeu_ps(g, g0), _mm512_storeu_ps(g + 16, ga);
      } else {
        g0 = _mm512_loadu_ps(g), ga = _mm512_loadu_ps(g + 16);
      }
      __m512 gb = __builtin_shuffle(ga, rest);  // columns 23 24, 16..24, 23 24
      asm("" : "+v"(g0), "+v"(ga), "+v"(gb));       // else gcc reloads them for every five frames
      UNROLL for (int i = 0; i < P; i++) {
        const float* r = x + 5 * i * V;  // in this order four temporaries are enough: 24 sums + 3 of G + 1 + 4 = 32 registers
        __m512 b0 = _mm512_set1_ps(r[0]), b1 = _mm512_set1_ps(r[V]);
        acc[i][0] = _mm512_fmadd_ps(b0, g0, acc[i][0]), acc[i][1] = _mm512_fmadd_ps(b1, g0, acc[i][1]);
        b0 = join<9>(b0, b1), acc[i][5] = _mm512_fmadd_ps(b0, ga, acc[i][5]);
        __m512 b2 = _mm512_set1_ps(r[2 * V]);
        acc[i][2] = _mm512_fmadd_ps(b2, g0, acc[i][2]), b1 = join<2>(b1, b2);
        __m512 b3 = _mm512_set1_ps(r[3 * V]);
        acc[i][3] = _mm512_fmadd_ps(b3, g0, acc[i][3]), b1 = join<11>(b1, b3), acc[i][6] = _mm512_fmadd_ps(b1, gb, acc[i][6]);
        __m512 b4 = _mm512_set1_ps(r[4 * V]);
        acc[i][4] = _mm512_fmadd_ps(b4, g0, acc[i][4]), b4 = join<9>(b4, b3), acc[i][7] = _mm512_fmadd_ps(b4, ga, acc[i][7]);
      }
    }
  }
  UNROLL for (int i = 0; i < P; i++) {
    float* y = p.y + (t + 5 * i) * V;
    const float* residual = RELU ? p.residual + (t + 5 * i) * V : nullptr;
    auto put = [&](__m512 sum, int64_t at, __mmask16 lanes_kept) __attribute__((always_inline)) {
      if constexpr (RELU)
        sum = _mm512_maskz_max_ps(lanes_kept, _mm512_setzero_ps(), _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes_kept, residual + at)));
      _mm512_mask_storeu_ps(y + at, lanes_kept, sum);
    };
    UNROLL for (int n = 0; n < 5; n++) put(acc[i][n], n * V, 0xffff);
    put(acc[i][5], 16, 0x1ff), put(acc[i][5], V + 7, 0xfe00);
    put(acc[i][6], V + 23, 0x3), put(acc[i][6], 2 * V + 14, 0x7fc), put(acc[i][6], 3 * V + 12, 0x1800);
    put(acc[i][7], 4 * V + 16, 0x1ff), put(acc[i][7], 3 * V + 7, 0xfe00);
  }
}

// R frames of 25 joints, each in two vectors: what five frames at a time leave over.
template <int R, bool RELU>
__attribute__((noinline)) void single_frames(const GraphProduct& p, int64_t t) {
  constexpr int64_t V = 25, ld = 32;
  __m512 acc[R][2];
  UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_set1_ps(RELU ? p.bias : 0.f);
  const float* g = p.graph;
  for (int64_t k = 0; k < p.K; k++) {
    const float* x = p.x + k * p.subset + t * V;
    for (int64_t v = 0; v < V; v++, g += ld, x++) {
      const __m512 g0 = _mm512_loadu_ps(g), g1 = _mm512_loadu_ps(g + 16);
      UNROLL for (int r = 0; r < R; r++) {
        const __m512 b = _mm512_set1_ps(x[r * V]);
        acc[r][0] = _mm512_fmadd_ps(b, g0, acc[r][0]), acc[r][1] = _mm512_fmadd_ps(b, g1, acc[r][1]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < 2; n++) {
      const __mmask16 kept = n ? 0x1ff : 0xffff;
      const int64_t at = (t + r) * V + 16 * n;
      __m512 sum = acc[r][n];
      if constexpr (RELU)
        sum = _mm512_maskz_max_ps(kept, _mm512_setzero_ps(), _mm512_add_ps(sum, _mm512_maskz_loadu_ps(kept, p.residual + at)));
      _mm512_mask_storeu_ps(p.y + at, kept, sum);
    }
}
#endif


// how: the graphs' recipes, if they do not exist yet; then V is 25 and T at least make_frames.
template <bool RELU>
INLINE void graph_product(const GraphProduct& p, int64_t V, int64_t ld, const Frame25Recipe* how = nullptr) {
#if VECTOR_BYTES == 64
  if (V == 25 && half_width() && p.K <= max_recipes) return split_product<RELU>(p, how);
  if (V == 25) {
    int64_t t = 0;
    if (how) five_frames<3, RELU, true>(p, 0, how), t = make_frames;
    for (int64_t fives = (p.T - t) / 5; fives > 0;) {
      const int64_t count = fives == 4 ? 2 : min64(fives, 3);
      if (count == 3) five_frames<3, RELU, false>(p, t, nullptr);
      else if (count == 2) five_frames<2, RELU, false>(p, t, nullptr);
      else five_frames<1, RELU, false>(p, t, nullptr);
      fives -= count, t += 5 * count;
    }
    const int64_t left = p.T - t;
    if (left == 4) single_frames<4, RELU>(p, t);
    else if (left == 3) single_frames<3, RELU>(p, t);
    else if (left == 2) single_frames<2, RELU>(p, t);
    else if (left == 1) single_frames<1, RELU>(p, t);
    return;
  }
#endif
  (void)how;
  const Joints<float> j(V);
  const int64_t pixels = p.T * V;
  if (RELU && p.residual != p.y) std::memcpy(p.y, p.residual, pixels * sizeof(float));
  for (int64_t k = 0; k < p.K; k++)
    product<float>({p.x + k * p.subset, V, 1, p.graph + k * V * ld, ld, V, p.y, V, RELU || k > 0}, p.T, j, j.last);
  if constexpr (RELU)
    for (int64_t i = 0; i < pixels; i++) {
      const float sum = p.y[i] + p.bias;
      p.y[i] = sum < 0 ? 0 : sum;
    }
}
