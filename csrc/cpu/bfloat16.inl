// bfloat16 is the upper half of a float: widened it is exact, and a sum is rounded once, to nearest, ties to even.

template <>
struct Simd<Bfloat16> {
  static constexpr int lanes = VECTOR_BYTES / 2;
};

INLINE float widened(Bfloat16 b) {
  const uint32_t bits = (uint32_t)b.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
INLINE Bfloat16 rounded(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t nan = bits >> 16 | 0x40, nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // a NaN must not round to infinity
  return {(uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : nearest)};
}

// to[i] = from[i], for i below n.
template <class S>
INLINE void convert(const S* from, int64_t n, S* to) { std::memcpy(to, from, n * sizeof(S)); }
#if VECTOR_BYTES == 64
INLINE __m512 widened_vector(__m256i half) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); }
INLINE __m256i rounded_vector(__m512 v) {
  const __m512i bits = (__m512i)v, upper = _mm512_srli_epi32(bits, 16), odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(nearest, nan, upper, _mm512_set1_epi32(0x40)));
}
INLINE void convert(const Bfloat16* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(to + i, widened_vector(_mm256_loadu_si256((const __m256i*)(from + i))));
  for (; i < n; i++) to[i] = widened(from[i]);
}
INLINE void convert(const float* from, int64_t n, Bfloat16* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(to + i), rounded_vector(_mm512_loadu_ps(from + i)));
  for (; i < n; i++) to[i] = rounded(from[i]);
}
#else
INLINE void convert(const Bfloat16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = widened(from[i]);
}
INLINE void convert(const float* from, int64_t n, Bfloat16* to) {
  for (int64_t i = 0; i < n; i++) to[i] = rounded(from[i]);
}
#endif
