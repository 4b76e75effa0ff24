// What one thread of this machine can do at most, measured: the denominators of the benchmark.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "cpu/table.h"

namespace sparse_stgcn {

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best rate of `work()`, which returns how much it did, over bursts that fill `seconds`.
template <class F>
double best_rate(double seconds, F work) {
  double best = 0;
  for (double start = seconds_now(), begin = start; begin - start < seconds;) {
    const double done = work(), end = seconds_now();
    best = std::max(best, done / (end - begin));
    begin = end;
  }
  return best;
}

// GFLOP/s of the chosen instruction set in float32.
inline double fma_peak(double seconds) {
  return best_rate(seconds, [] { return (double)table().fma_burst(100000) * 1e-9; });
}

// GB/s of a copy of `bytes`: bytes read plus bytes written.
inline double copy_bandwidth(size_t bytes, double seconds) {
  std::vector<char> from(bytes, 1), to(bytes, 2);
  return best_rate(seconds, [&] {
    const size_t times = std::max<size_t>(1, (size_t(4) << 20) / bytes);  // a burst of at least 4 MB: the clock is not exact
    for (size_t i = 0; i < times; i++) {
      std::memcpy(to.data(), from.data(), bytes);
      asm volatile("" : : "r"(to.data()) : "memory");  // every copy is made
    }
    return 2e-9 * (double)(bytes * times);
  });
}

}  // namespace sparse_stgcn
