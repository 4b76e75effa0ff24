// The Python module `sparse_stgcn._native`, nothing of torch. Only the files bindings*.cpp know pybind11.
#include "bindings.h"

#include <stdexcept>
#include <string>

#include "measure.h"

using namespace sparse_stgcn;
namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of sparse_stgcn";
  m.def("isa", [] { return table().name; });
  m.def("set_parallel_for", [](bindings::Address f) { torch_parallel_for = (ParallelFor)f; });

  // Of one thread: GFLOP/s in float32, and GB/s (read + written) of a copy of that many bytes. They take about `seconds`.
  m.def("fma_peak", [](double seconds) {
    if (!(seconds > 0)) throw std::invalid_argument("Expected seconds above 0. Got " + std::to_string(seconds) + ".");
    py::gil_scoped_release release;
    return fma_peak(seconds);
  });
  m.def("copy_bandwidth", [](int64_t bytes, double seconds) {
    if (bytes < 1) throw std::invalid_argument("Expected bytes of at least 1. Got " + std::to_string(bytes) + ".");
    if (!(seconds > 0)) throw std::invalid_argument("Expected seconds above 0. Got " + std::to_string(seconds) + ".");
    py::gil_scoped_release release;
    return copy_bandwidth((size_t)bytes, seconds);
  });

  bindings::bind_convolutions(m);
  bindings::bind_aggregations(m);
  bindings::bind_units(m);
  bindings::bind_fused(m);
}
