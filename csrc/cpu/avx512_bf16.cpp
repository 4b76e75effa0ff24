// AVX-512 with AVX512-BF16: the temporal convolution of bfloat16; everything else is the table of avx512.cpp.
#if defined(__x86_64__)
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include <immintrin.h>

#include "table.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi2")
#define VECTOR_BYTES 64
#define MAX_ROWS 8

namespace sparse_stgcn {
namespace {
#include "simd.inl"
#include "bfloat16.inl"
#include "tile.inl"
#include "panel.inl"
#include "paired_tile.inl"
#include "columns.inl"
#include "streams.inl"
#include "transposed.inl"
#include "temporal_columns.inl"
#include "temporal_conv.inl"
#include "paired.inl"

// Multiply-adds of vdpbf16ps over those of a fused multiply-add, in the same time: the best of 32 bursts of a microsecond each. An
// instruction does twice as many; Sapphire Rapids issues a quarter as many of them: 0.5.
double advantage() {
  const auto burst = [](auto pairs) {
    __m512 acc[20], one = _mm512_set1_ps(1);
    KEEP(one);
    UNROLL for (int i = 0; i < 20; i++) acc[i] = _mm512_setzero_ps();
    const auto begin = std::chrono::steady_clock::now();
    for (int round = 0; round < 100; round++)
      UNROLL for (int i = 0; i < 20; i++) {
        if constexpr (decltype(pairs)::value) acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)one, (__m512bh)one);
        else acc[i] = _mm512_fmadd_ps(one, one, acc[i]);
        KEEP(acc[i]);
      }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  double fma = 1, pairs = 1;
  for (int i = 0; i < 32; i++) fma = std::fmin(fma, burst(Int<0>{})), pairs = std::fmin(pairs, burst(Int<1>{}));
  return 2 * fma / pairs;
}

Table table_of(bool all) {
  Table t = avx512_table();
  t.name = "avx512_bf16";
  t.bf16.temporal_dw = all ? paired_dw : narrow_dw;
  if (all) t.bf16.temporal_forward = paired_forward, t.bf16.temporal_dx = paired_dx;
  return t;
}
}  // namespace

const Table& avx512_bf16_table(bool by_name) {
  // Between 1 and 2: a processor either issues vdpbf16ps as often as a fused multiply-add or at most half as often, so that no
  // burst disturbed by a neighbour should tip the choice. Only 0.5 has been measured.
  static const Table table = table_of(by_name || advantage() > 1.4);
  return table;
}
}  // namespace sparse_stgcn
#endif
