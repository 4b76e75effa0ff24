// Which instruction set: chosen once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "table.h"

namespace sparse_stgcn {

ParallelFor torch_parallel_for = nullptr;

void TaskErrors::keep() {
  if (!__atomic_exchange_n(&failed, true, __ATOMIC_RELAXED)) first = std::current_exception();
}

void TaskErrors::raise(int32_t code) {
  if (first) std::rethrow_exception(first);
  if (code) throw std::runtime_error("Expected torch_parallel_for to return 0. Got " + std::to_string(code) + ".");
}

namespace {
const Table& choose() {
  const char* wanted = std::getenv("SPARSE_STGCN_ISA");
  const std::string name = wanted ? wanted : "";
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16 && (name.empty() || name == "avx512_bf16")) return avx512_bf16_table(!name.empty());
  if (avx512 && (name.empty() || name == "avx512")) return avx512_table();
  if (avx2 && (name.empty() || name == "avx2")) return avx2_table();
#endif
  if (name.empty() || name == "baseline") return baseline_table();
  throw std::invalid_argument("Expected SPARSE_STGCN_ISA to be avx512_bf16, avx512, avx2 or baseline, and one that this processor has. Got " +
                              name + "; unset it to let the best one be chosen.");
}
}  // namespace

const Table& table() {
  static const Table& chosen = choose();
  return chosen;
}

}  // namespace sparse_stgcn
