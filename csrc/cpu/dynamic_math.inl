// exp and tanh of vectors, and the map tanh(a[r] - b[c]) of two rows of joints.
//
// Errors: exp 2 ulp; tanh and the map 3 eps absolute in float32 and float64 (what a graph needs: its entries are sums of
// tanh and of numbers of size 1). NaN stays NaN.

template <class S>
struct Float;
#define DEFINE_FLOAT(S, UINT, BITS, BIAS, MAGIC, HIGH, LOW, DEGREE, LOWEST)                         \
  template <>                                                                                       \
  struct Float<S> {                                                                                 \
    typedef UINT Bits __attribute__((vector_size(VECTOR_BYTES)));                                   \
    static constexpr int mantissa = BITS, degree = DEGREE;                                          \
    static constexpr UINT bias = BIAS;                                                              \
    static constexpr S magic = MAGIC, high = HIGH, low = LOW, lowest = LOWEST;                      \
  };
// magic: 1.5 * 2^mantissa, whose unit in the last place is 1. high + low = ln 2, and n * high is exact. degree: the first
// Taylor term left out is below a tenth of the unit roundoff for |f| <= ln(2) / 2. lowest: exp of it is still normal.
DEFINE_FLOAT(float, uint32_t, 23, 127, 12582912.f, 0.693359375f, -2.12194440e-4f, 7, -87.f)
DEFINE_FLOAT(double, uint64_t, 52, 1023, 6755399441055744., 6.93147180369123816490e-01, 1.90821492927058770002e-10, 13, -708.)
#undef DEFINE_FLOAT

constexpr double taylor[] = {1, 1, 1 / 2., 1 / 6., 1 / 24., 1 / 120., 1 / 720., 1 / 5040., 1 / 40320., 1 / 362880.,
                             1 / 3628800., 1 / 39916800., 1 / 479001600., 1 / 6227020800.};  // 1 / k!

// exp(x) = 2^n exp(f), for x between Float<S>::lowest and its negative.
template <class S>
INLINE Vec<S> exp_of(Vec<S> x) {
  using F = Float<S>;
  const Vec<S> shifted = x * splat<S>(S(1.4426950408889634)) + splat<S>(F::magic), n = shifted - splat<S>(F::magic);
  Vec<S> f = x - n * splat<S>(F::high);
  f = f - n * splat<S>(F::low);
  Vec<S> sum = splat<S>(S(taylor[F::degree]));
  UNROLL for (int k = F::degree - 1; k >= 0; k--) sum = sum * f + splat<S>(S(taylor[k]));
  const auto power = ((typename F::Bits)shifted << F::mantissa) + (F::bias << F::mantissa);  // the bits of 2^n
  return sum * (Vec<S>)power;
}

// 1 / d: in float32 an estimate and one step, where there is one; a division takes as long as ten multiply-adds.
template <class S>
INLINE Vec<S> reciprocal(Vec<S> d) {
  const Vec<S> one = splat<S>(S(1));
#if VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 4) {
    const Vec<S> r = (Vec<S>)_mm512_rcp14_ps((__m512)d);  // relative error e below 2^-14, and e^2 after the step
    return r + r * (one - d * r);
  }
#elif VECTOR_BYTES == 32
  if constexpr (sizeof(S) == 4) {
    const Vec<S> r = (Vec<S>)_mm256_rcp_ps((__m256)d), e = one - d * r;  // below 1.5 * 2^-12, and e^3
    return r + r * (e + e * e);
  }
#endif
  return one / d;
}

template <class S>
INLINE Vec<S> tanh_of(Vec<S> x) {
  const Vec<S> end = splat<S>(S(20));  // tanh is 1 in double from here on
  x = x > end ? end : x;
  x = x < -end ? -end : x;
  return splat<S>(S(1)) - splat<S>(S(2)) * reciprocal<S>(exp_of<S>(x + x) + splat<S>(S(1)));
}

// e^(2 (x - m)). What the subtraction rounds away goes back in as a factor: it would be an error of the result of up to
// 40 roundings of 1.
template <class S>
INLINE Vec<S> exp_twice(Vec<S> x, Vec<S> m) {
  const Vec<S> s = x - m, t = s - x, lost = (x - (s - t)) - (m + t), e = exp_of<S>(s + s);
  return e + e * (lost + lost);
}

// put(r, i, sign * tanh(a[r] - b[c])) for every joint r and vector i of joints c. a and b are padded rows that repeat
// their first number; work: two rows.
//
// One exp a joint, not one a pair: e^(2(a-b)) = e^(2(a-m)) e^(-2(b-m)), as long as all joints are within 20 of m, so that
// neither overflows.
template <class S, class F>
INLINE void tanh_map(const S* a, const S* b, const Joints<S>& j, S sign, S* work, F put) {
  const Vec<S> m = splat<S>(b[0]);
  Vec<S> far = {};
  auto reach = [&](const S* side) __attribute__((always_inline)) {
    const Vec<S> d = load(side) - m, size = d < Vec<S>{} ? -d : d;
    far = size > far ? size : far;
  };
  for (int64_t i = 0; i < j.ld; i += lanes<S>) reach(a + i), reach(b + i);
  S lane[lanes<S>], farthest = 0;
  store(lane, far);
  UNROLL for (int l = 0; l < lanes<S>; l++) farthest = lane[l] > farthest ? lane[l] : farthest;
  if (farthest < 20 && b[0] == b[0]) {  // a NaN at b[0] belongs to that joint alone
    const Vec<S> one = splat<S>(S(1)), plus = splat<S>(sign), twice = plus + plus;
    S *ea = work, *eb = work + j.ld;
    for (int64_t i = 0; i < j.ld; i += lanes<S>) {
      store(ea + i, exp_twice<S>(load(a + i), m));
      store(eb + i, exp_twice<S>(-load(b + i), -m));
    }
    for (int64_t r = 0; r < j.V; r++) {
      const Vec<S> e = splat<S>(ea[r]);
      for (int64_t i = 0; i < j.vectors; i++) put(r, i, plus - twice * reciprocal<S>(e * load(eb + i * lanes<S>) + one));
    }
  } else {
    for (int64_t r = 0; r < j.V; r++)
      for (int64_t i = 0; i < j.vectors; i++)
        put(r, i, splat<S>(sign) * tanh_of<S>(splat<S>(a[r]) - load(b + i * lanes<S>)));
  }
}
