// AVX2 with FMA: 16 registers of 32 bytes.
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

#pragma GCC target("avx2,fma,bmi2")
#define VECTOR_BYTES 32
#define MAX_ROWS 4

namespace sparse_stgcn {
namespace {
#include "isa.inl"
}  // namespace

const Table& avx2_table() {
  static const Table table{"avx2", ops<float>(), ops<double>(), convolutions<float, Bfloat16>(),
                           fused_tables_room, fused_make_tables, fused_run, fma_burst};
  return table;
}
}  // namespace sparse_stgcn
#endif
