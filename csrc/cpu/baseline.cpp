// What every x86-64 (SSE2) and aarch64 (NEON) processor has: 16-byte vectors.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "table.h"

#define VECTOR_BYTES 16
#define MAX_ROWS 4

namespace sparse_stgcn {
namespace {
#include "isa.inl"
}  // namespace

const Table& baseline_table() {
  static const Table table{"baseline", ops<float>(), ops<double>(), convolutions<float, Bfloat16>(),
                           fused_tables_room, fused_make_tables, fused_run, fma_burst};
  return table;
}
}  // namespace sparse_stgcn
