// Vectors of one instruction set. Included by <isa>.cpp inside an anonymous namespace, after `#pragma GCC target`, with
// VECTOR_BYTES (64, 32 or 16) and MAX_ROWS (rows of a register tile: 8 with 32 registers, 4 with 16) defined.
//
// Nothing here may have external linkage: a function compiled for AVX-512 and merged by the linker into the baseline
// path would crash an older processor.

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define NO_UNROLL _Pragma("GCC unroll 1")

template <class S>
struct Simd;
#define DEFINE_SIMD(S, BYTES_OF_S)                                                                    \
  template <>                                                                                         \
  struct Simd<S> {                                                                                    \
    typedef S Vec __attribute__((vector_size(VECTOR_BYTES)));                                         \
    typedef S Loose __attribute__((vector_size(VECTOR_BYTES), aligned(BYTES_OF_S), may_alias));       \
    static constexpr int lanes = VECTOR_BYTES / BYTES_OF_S;                                           \
  };
DEFINE_SIMD(float, 4)
DEFINE_SIMD(double, 8)
#undef DEFINE_SIMD

template <class S>
using Vec = typename Simd<S>::Vec;
template <class S>
constexpr int lanes = Simd<S>::lanes;

template <class S>
INLINE Vec<S> load(const S* p) { return *(const typename Simd<S>::Loose*)p; }
template <class S>
INLINE void store(S* p, Vec<S> v) { *(typename Simd<S>::Loose*)p = v; }
template <class S>
INLINE Vec<S> splat(S s) { return s - Vec<S>{}; }  // exact, also for -0, and GCC makes it one broadcast

// Streaming: a tensor past this many bytes is written around the caches. A line that is only written would be read first, and
// what is written is evicted before anyone reads it. After the last `stream` of a task: `end_stream`.
template <class S>
INLINE bool is_streamed(int64_t elements) { return elements * (int64_t)sizeof(S) >= 4 << 20; }
template <class S>
INLINE void stream(S* p, Vec<S> v) {  // p aligned to a vector
#if VECTOR_BYTES == 64
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif VECTOR_BYTES == 32
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}
INLINE void end_stream() {
#if VECTOR_BYTES > 16
  _mm_sfence();
#endif
}
// Elements from p up to the first vector that is aligned.
template <class S>
INLINE int64_t until_aligned(const S* p) {
  return (int64_t)((VECTOR_BYTES - (uintptr_t)p % VECTOR_BYTES) % VECTOR_BYTES / sizeof(S));
}

// Keeps a loaded vector in a register: GCC otherwise folds the load into each of its uses, 24 loads instead of 3.
#if defined(__x86_64__)
#define KEEP(v) asm("" : "+v"(v))
#else
#define KEEP(v) asm("" : "+w"(v))
#endif

// The sum of all lanes in a fixed tree.
template <class S>
INLINE S sum_lanes(Vec<S> v) {
  S lane[lanes<S>];
  store(lane, v);
  UNROLL for (int half = lanes<S> / 2; half > 0; half /= 2)
    UNROLL for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}
#if VECTOR_BYTES == 64
INLINE float sum_lanes_f32(__m512 v) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
template <>
INLINE float sum_lanes<float>(Vec<float> v) { return sum_lanes_f32((__m512)v); }
// Lane r is the sum of v[r]: eight sums in 24 operations.
INLINE __m256 sum_eight(const Vec<float>* v) {
  auto pair = [&](int i) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]), _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]));
  };
  auto four = [&](int i) __attribute__((always_inline)) {
    const __m512d a = _mm512_castps_pd(pair(i)), b = _mm512_castps_pd(pair(i + 2));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  const __m512 a = four(0), b = four(4);
  const __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  return _mm512_castps512_ps256(_mm512_add_ps(_mm512_shuffle_f32x4(s, s, 0x88), _mm512_shuffle_f32x4(s, s, 0xdd)));
}
#endif

// to[r] += the sum of v[r].
template <class S, int R>
INLINE void add_sums(S* to, const Vec<S>* v) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 4 && R == 8) return _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum_eight(v)));
#endif
  UNROLL for (int r = 0; r < R; r++) to[r] += sum_lanes<S>(v[r]);
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory of one thread, 64-byte aligned, kept between calls; `take` hands out zeroed or raw pieces in order.
struct Scratch {
  char* base = nullptr;
  size_t size = 0, used = 0;
  ~Scratch() { std::free(base); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    std::free(base);
    size = (bytes + 4095) / 4096 * 4096;
    base = (char*)std::aligned_alloc(4096, size);
    if (!base) { size = 0; throw std::bad_alloc(); }
  }
  template <class T>
  T* take(int64_t n) {
    T* p = (T*)(base + used);
    used += room<T>(n);
    return p;
  }
  template <class T>
  static size_t room(int64_t n) { return ((size_t)n * sizeof(T) + 63) / 64 * 64; }
};
// One for the calling thread's shared tables, one for the work inside a task: a task may run on the calling thread.
inline thread_local Scratch call_scratch, task_scratch;

// Numbers below the smallest normal one (1.2e-38 in float32) count as 0 while this lives. The graphs that learn from the sample
// are products of scales that begin at 0 and of gradients behind norms that begin at 1e-6, so that they meet such numbers, and
// there an Intel processor takes 150 cycles for a multiply-add: a quarter of CTR-GCN's training step.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : kept(__builtin_ia32_stmxcsr()) { set(kept | 0x8040); }
  ~FlushDenormals() { set(kept); }

 private:
  unsigned kept;
  static INLINE void set(unsigned to) {
    asm volatile("" ::: "memory");
    __builtin_ia32_ldmxcsr(to);
    asm volatile("" ::: "memory");
  }
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

// body(i) for every task, on up to `threads` threads. An exception of a task is thrown again here, once all tasks have ended.
template <class F>
void parallel(int64_t tasks, int threads, F body) {
  if (!torch_parallel_for || threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; i++) body(i);
    return;
  }
  struct Work {
    F& body;
    TaskErrors errors;
  } work{body, {}};
  const auto run = [](int64_t begin, int64_t end, void* context) {
    Work& work = *(Work*)context;
    try {
      for (int64_t i = begin; i < end; i++) work.body(i);
    } catch (...) {
      work.errors.keep();
    }
  };
  work.errors.raise(torch_parallel_for(0, tasks, 1, run, &work));
}
