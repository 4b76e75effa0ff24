// AVX-512: 32 registers of 64 bytes.
#if defined(__x86_64__)
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

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")
#define VECTOR_BYTES 64
#define MAX_ROWS 8

namespace sparse_stgcn {
namespace {
#include "isa.inl"
}  // namespace

const Table& avx512_table() {
  // double is the type of references, and these functions a third of what this file would take to compile: those of AVX2 serve.
  static const Table table{"avx512", ops<float>(), avx2_table().f64, convolutions<float, Bfloat16>(),
                           fused_tables_room, fused_make_tables, fused_run, fma_burst};
  return table;
}
}  // namespace sparse_stgcn
#endif
