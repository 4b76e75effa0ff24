// The Python module `sparse_stgcn._native`: addresses, sizes and strides in, nothing of torch. The only file that knows
// pybind11. Callers (kernels/*.py) have checked shapes and types; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/table.h"
#include "measure.h"

namespace py = pybind11;
using namespace sparse_stgcn;

namespace {

using Address = uintptr_t;
using Sizes = std::vector<int64_t>;

// (O, I, K, bo, bi, blocks) and the addresses of row_ptr, input, tap.
Pattern pattern(const Sizes& size, const std::array<Address, 3>& index) {
  return {size[0], size[1], size[2], size[3], size[4], (size[0] + size[3] - 1) / size[3], size[5],
          (const int32_t*)index[0], (const int32_t*)index[1], (const int32_t*)index[2]};
}

// Of subsets with `blocks` live blocks each, their indices one after the other; index[0] == 0: dense weights.
std::vector<Pattern> patterns(const Sizes& size, const Sizes& blocks, const std::array<Address, 2>& index) {
  std::vector<Pattern> list;
  const auto *row_ptr = (const int32_t*)index[0], *input = (const int32_t*)index[1];
  for (const int64_t count : blocks) {
    Pattern p = pattern(size, {(Address)row_ptr, (Address)input, 0});
    p.blocks = count;
    list.push_back(p);
    if (row_ptr) row_ptr += p.rows + 1, input += count;
  }
  return list;
}

template <class S>
View<const S> view(Address data, const Sizes& stride) {
  return {(const S*)data, {stride[0], stride[1], stride[2], stride[3]}};
}

using Addresses = std::vector<Address>;
using Strides = std::vector<Sizes>;

DynamicShape dynamic_shape(const Sizes& size) { return {size[0], size[1], size[2], size[3], size[4], size[5]}; }

template <class S>
GroupView<S> group_view(Address data, const Sizes& stride) {
  return {(S*)data, {stride[0], stride[1], stride[2], stride[3], stride[4]}};
}

// A block's tensors in the order of kernels/stgcn_block.py; those behind them are the gradients.
template <class S>
BlockTensors<S> block_tensors(const Addresses& t, const std::array<double, 2>& eps) {
  const auto in = [&](int i) { return (const S*)t[i]; };
  const auto norm = [&](int i, double e) { return BlockNorm<S>{in(i), in(i + 1), (S*)t[i + 2], (S*)t[i + 3], (S*)t[i + 4], e}; };
  return {in(0), in(1), in(2), in(3), in(4), in(5), in(6), norm(7, eps[0]), norm(12, eps[1]), (S*)t[17], (S*)t[18], (S*)t[19]};
}
template <class S>
BlockGradients<S> block_gradients(const Addresses& t, bool identity) {
  const auto out = [&](int i) { return (S*)t[i]; };
  return {(const S*)t[0], out(1), out(2),  out(3),  out(4),  out(5), out(6),
          out(7),         out(8), out(9), out(10), out(11), out(12), identity};
}

// A View of which only the strides of sample and channel are used.
template <class S>
View<S> plane(Address data, const Sizes& stride) {
  return {(S*)data, {stride[0], stride[1], 0, 0}};
}

using MeanSizes = std::array<int64_t, 4>;
MeanShape mean_shape(const MeanSizes& size) { return {size[0], size[1], size[2], size[3]}; }

// What is added up, at most max_parts of them.
template <class S>
std::vector<View<const S>> planes(const Addresses& data, const Strides& stride) {
  if (data.size() > (size_t)max_parts)
    throw std::invalid_argument("Expected at most " + std::to_string(max_parts) + " tensors. Got " + std::to_string(data.size()) + ".");
  std::vector<View<const S>> views;
  for (size_t i = 0; i < data.size(); i++) views.push_back(plane<const S>(data[i], stride[i]));
  return views;
}

AttendShape attend_shape(const std::array<int64_t, 7>& size) {
  return {size[0], size[1], size[2], size[3], size[4], size[5], size[6]};
}

// Eight addresses in a row.
template <class P>
AttendParameters<P> attend_parameters(const Address* t) {
  return {(P)t[0], (P)t[1], (P)t[2], (P)t[3], (P)t[4], (P)t[5], (P)t[6], (P)t[7]};
}

TemporalShape temporal_shape(const Sizes& size) { return {size[0], size[1], size[2], size[3], size[4], size[5]}; }

template <class S>
Lasso<S> lasso(Address masked, Address values, double scale) {
  return {(const uint8_t*)masked, (const S*)values, (S)scale};
}

// Calls body with the table of float or double.
template <class F>
void typed(bool is_double, F body) {
  py::gil_scoped_release release;
  if (is_double) body(table().f64, double{});
  else body(table().f32, float{});
}

// Owns what a FusedNetwork points to. Built by runtime/ from plain dicts: sizes by name, arrays as buffers.
class Fused {
 public:
  Fused(const py::dict& sizes, const py::buffer& scale, const py::buffer& shift, const py::list& steps) {
    net_.joints = size(sizes, "joints"), net_.channels = size(sizes, "channels"), net_.frames = size(sizes, "frames");
    net_.input = size(sizes, "input"), net_.input_ld = size(sizes, "input_ld"), net_.features = size(sizes, "features");
    net_.arena = size(sizes, "arena"), net_.persons = size(sizes, "persons");
    net_.columns = size(sizes, "columns"), net_.column = size(sizes, "column"), net_.strips = size(sizes, "strips");
    net_.strip_frames = size(sizes, "strip_frames");
    net_.scale = keep<float>(scale), net_.shift = keep<float>(shift);
    for (const auto& item : steps) {
      const auto d = item.cast<py::dict>();
      FusedStep s;
      s.kind = size(d, "kind"), s.src = size(d, "src"), s.src_ld = size(d, "src_ld"), s.src_frames = size(d, "src_frames");
      s.dst = size(d, "dst"), s.dst_ld = size(d, "dst_ld"), s.frames = size(d, "frames"), s.lead = size(d, "lead");
      s.trail = size(d, "trail"), s.rows = size(d, "rows"), s.bo = size(d, "bo"), s.relu = size(d, "relu");
      s.residual = d.contains("residual") ? size(d, "residual") : -1, s.residual_ld = size(d, "residual_ld");
      s.subsets = size(d, "subsets"), s.scratch = size(d, "scratch"), s.scratch_ld = size(d, "scratch_ld");
      s.tile = size(d, "tile"), s.planes = size(d, "planes"), s.plane_ld = size(d, "plane_ld"), s.bias_ld = size(d, "bias_ld");
      s.row_ptr = array<int32_t>(d, "row_ptr"), s.offset = array<int32_t>(d, "offset"), s.weight = array<float>(d, "weight");
      s.bias = array<float>(d, "bias"), s.made_subset = array<int32_t>(d, "made_subset", &s.made);
      s.made_input = array<int32_t>(d, "made_input"), s.ptr = array<int32_t>(d, "ptr");
      s.source = array<int32_t>(d, "source", &s.entries), s.coef = array<float>(d, "coef");
      s.diagonal = array<int32_t>(d, "diagonal"), s.lane_coef = array<float>(d, "lane_coef");
      s.joints = size(d, "joints"), s.graphs = graphs(d);
      s.maps = size(d, "maps"), s.hidden = size(d, "hidden");
      s.groups = s.bo > 0 ? (s.rows + s.bo - 1) / s.bo : 0;
      steps_.push_back(s);
    }
    net_.steps = steps_.data(), net_.num_steps = (int64_t)steps_.size();
    char* tables = room(table().fused_tables_room(net_));
    table().fused_make_tables(net_, tables);
    net_.tables = tables;
    auto* absent = (float*)room(net_.persons * net_.features * sizeof(float));
    const float zero = 0;
    const int64_t stride[5] = {};
    const FusedNetwork* self = &net_;
    table().fused_run(&self, 1, 1, net_.persons, &zero, stride, &absent, 1);
    net_.absent = absent;
  }
  const FusedNetwork& network() const { return net_; }

 private:
  FusedGraphs graphs(const py::dict& d) {
    FusedGraphs g;
    g.x1 = size(d, "x1"), g.x2 = size(d, "x2"), g.joint_ld = size(d, "joint_ld"), g.maps = size(d, "maps");
    g.graph = size(d, "graph"), g.work = size(d, "work"), g.mix_bo = size(d, "mix_bo");
    g.adjacency = array<float>(d, "adjacency"), g.scale = array<float>(d, "scale");
    g.live_row = array<int32_t>(d, "live_row", &g.live), g.mix_ptr = array<int32_t>(d, "mix_ptr");
    g.mix_offset = array<int32_t>(d, "mix_offset"), g.mix_weight = array<float>(d, "mix_weight");
    g.mix_bias = array<float>(d, "mix_bias");
    return g;
  }
  static int64_t size(const py::dict& d, const char* name) { return d.contains(name) ? d[name].cast<int64_t>() : 0; }
  template <class T>
  const T* keep(const py::buffer& buffer, int64_t* count = nullptr) {
    const py::buffer_info info = buffer.request();
    if (info.itemsize != (py::ssize_t)sizeof(T)) throw std::invalid_argument("Expected 4-byte elements in an array of a fused step.");
    const size_t bytes = (size_t)info.size * sizeof(T);
    char* block = room(bytes + 64);
    if (bytes) std::memcpy(block, info.ptr, bytes);
    if (count) *count = info.size;
    return (const T*)block;
  }
  char* room(size_t bytes) {
    kept_.emplace_back(new char[bytes + 64]);
    return (char*)(((uintptr_t)kept_.back().get() + 63) / 64 * 64);
  }
  template <class T>
  const T* array(const py::dict& d, const char* name, int64_t* count = nullptr) {
    return d.contains(name) ? keep<T>(d[name].cast<py::buffer>(), count) : nullptr;
  }
  std::vector<std::unique_ptr<char[]>> kept_;
  std::vector<FusedStep> steps_;
  FusedNetwork net_;
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of sparse_stgcn";
  m.def("isa", [] { return table().name; });
  m.def("set_parallel_for", [](Address f) { torch_parallel_for = (ParallelFor)f; });

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

  m.def("temporal_forward", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index, Address x,
                               const Sizes& x_stride, Address values, Address bias, Address y, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.temporal_forward(temporal_shape(shape), pattern(size, index), view<S>(x, x_stride), (const S*)values, (const S*)bias,
                           (S*)y, threads);
    });
  });
  m.def("temporal_dx", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index, Address dy,
                          const Sizes& dy_stride, Address values, Address dx, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.temporal_dx(temporal_shape(shape), pattern(size, index), view<S>(dy, dy_stride), (const S*)values, (S*)dx, threads);
    });
  });
  m.def("temporal_dw", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index, Address x,
                          const Sizes& x_stride, Address dy, const Sizes& dy_stride, Address masked, Address values, double scale,
                          Address dw, Address dbias, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.temporal_dw(temporal_shape(shape), pattern(size, index), view<S>(x, x_stride), view<S>(dy, dy_stride),
                      lasso<S>(masked, values, scale), (S*)dw, (S*)dbias, threads);
    });
  });

  m.def("pointwise_backward", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                                 Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride, Address masked,
                                 Address values, double scale, Address dx, Address dw, Address dbias, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.pointwise_backward(temporal_shape(shape), pattern(size, index), view<S>(x, x_stride), view<S>(dy, dy_stride),
                             lasso<S>(masked, values, scale), (S*)dx, (S*)dw, (S*)dbias, threads);
    });
  });

  // Graph convolution: shape = (N, T, V, K, entries); adjacency = addresses of ptr, src.
  m.def("graph_forward", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                            const std::array<Address, 2>& adjacency, Address x, const Sizes& x_stride, Address values, Address coef,
                            Address bias_map, Address y, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const Adjacency a{shape[3], shape[2], shape[4], (const int32_t*)adjacency[0], (const int32_t*)adjacency[1]};
      ops.graph_forward(shape[0], shape[1], pattern(size, index), a, view<S>(x, x_stride), (const S*)values, (const S*)coef,
                        (const S*)bias_map, (S*)y, threads);
    });
  });
  m.def("graph_dx", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                       const std::array<Address, 2>& adjacency, Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride,
                       Address values, Address coef, Address dx, Address dcoef, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const Adjacency a{shape[3], shape[2], shape[4], (const int32_t*)adjacency[0], (const int32_t*)adjacency[1]};
      ops.graph_dx(shape[0], shape[1], pattern(size, index), a, view<S>(x, x_stride), view<S>(dy, dy_stride), (const S*)values,
                   (const S*)coef, (S*)dx, (S*)dcoef, threads);
    });
  });
  m.def("graph_dw", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                       const std::array<Address, 2>& adjacency, Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride,
                       Address coef, Address masked, Address values, double scale, Address dw, Address dbias_map, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const Adjacency a{shape[3], shape[2], shape[4], (const int32_t*)adjacency[0], (const int32_t*)adjacency[1]};
      ops.graph_dw(shape[0], shape[1], pattern(size, index), a, view<S>(x, x_stride), view<S>(dy, dy_stride), (const S*)coef,
                   lasso<S>(masked, values, scale), (S*)dw, (S*)dbias_map, threads);
    });
  });

  // The same with graphs of the samples: shape = (N, K, C, R, T, V), of which C and R are not read.
  m.def("sample_graph_forward", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                                   Address x, const Sizes& x_stride, Address values, Address graphs, Address bias_map, Address y,
                                   int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.sample_graph_forward(dynamic_shape(shape), pattern(size, index), view<S>(x, x_stride), (const S*)values,
                               (const S*)graphs, (const S*)bias_map, (S*)y, threads);
    });
  });
  m.def("sample_graph_dx", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                              Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride, Address values, Address graphs,
                              Address dx, Address dgraphs, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.sample_graph_dx(dynamic_shape(shape), pattern(size, index), view<S>(x, x_stride), view<S>(dy, dy_stride),
                          (const S*)values, (const S*)graphs, (S*)dx, (S*)dgraphs, threads);
    });
  });
  m.def("sample_graph_dw", [](bool is_double, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                              Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride, Address graphs, Address masked,
                              Address values, double scale, Address dw, Address dbias_map, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.sample_graph_dw(dynamic_shape(shape), pattern(size, index), view<S>(x, x_stride), view<S>(dy, dy_stride),
                          (const S*)graphs, lasso<S>(masked, values, scale), (S*)dw, (S*)dbias_map, threads);
    });
  });

  // shape = (N, K, C, R, T, V), R is not read; adjacency = (entries, addresses of ptr, src), or (0, graphs, 0) of the samples.
  m.def("graph_product", [](bool is_double, const Sizes& shape, const Addresses& adjacency, Address x, const Sizes& x_stride,
                            Address coef, Address z, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const DynamicShape d = dynamic_shape(shape);
      if (!adjacency[2]) return ops.sample_product(d, view<S>(x, x_stride), (const S*)adjacency[1], (S*)z, threads);
      const Adjacency a{d.K, d.V, (int64_t)adjacency[0], (const int32_t*)adjacency[1], (const int32_t*)adjacency[2]};
      ops.graph_product(d, a, view<S>(x, x_stride), (const S*)coef, (S*)z, threads);
    });
  });
  m.def("graph_product_backward", [](bool is_double, const Sizes& shape, const Addresses& adjacency, Address x,
                                     const Sizes& x_stride, Address dz, const Sizes& dz_stride, Address coef, Address dx,
                                     Address dgraphs, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const DynamicShape d = dynamic_shape(shape);
      if (!adjacency[2])
        return ops.sample_product_backward(d, view<S>(x, x_stride), view<S>(dz, dz_stride), (const S*)adjacency[1], (S*)dx,
                                           (S*)dgraphs, threads);
      const Adjacency a{d.K, d.V, (int64_t)adjacency[0], (const int32_t*)adjacency[1], (const int32_t*)adjacency[2]};
      ops.graph_product_backward(d, a, view<S>(x, x_stride), view<S>(dz, dz_stride), (const S*)coef, (S*)dx, (S*)dgraphs, threads);
    });
  });

  py::class_<Fused>(m, "Fused")
      .def(py::init<const py::dict&, const py::buffer&, const py::buffer&, const py::list&>());

  // One batch through several networks of the same input: a list of Fused and the addresses of their features.
  m.def("fused_run", [](const std::vector<const Fused*>& networks, int64_t batch, int64_t persons, Address x,
                        const std::array<int64_t, 5>& stride, const Addresses& features, int threads) {
    py::gil_scoped_release release;
    std::vector<const FusedNetwork*> nets;
    for (const Fused* network : networks) nets.push_back(&network->network());
    table().fused_run(nets.data(), (int64_t)nets.size(), batch, persons, (const float*)x, stride.data(),
                      (float* const*)features.data(), threads);
  });

  // Dynamic aggregations: shape = (N, K, C, R, T, V). A list of addresses and a list of strides, in the order of the op.
  m.def("aa_graphs", [](bool is_double, const Sizes& shape, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.aa_graphs(dynamic_shape(shape), group_view<const S>(t[0], stride[0]), group_view<const S>(t[1], stride[1]),
                    (const S*)t[2], (const S*)t[3], (S*)t[4], threads);
    });
  });
  m.def("aa_graphs_backward", [](bool is_double, const Sizes& shape, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.aa_graphs_backward(dynamic_shape(shape), group_view<const S>(t[0], stride[0]), group_view<const S>(t[1], stride[1]),
                             (const S*)t[2], (const S*)t[3], group_view<S>(t[4], stride[2]), group_view<S>(t[5], stride[3]),
                             (S*)t[6], (S*)t[7], threads);
    });
  });
  m.def("ctr_forward", [](bool is_double, const Sizes& shape, const Sizes& size, const Sizes& blocks,
                          const std::array<Address, 2>& index, const Addresses& t, const Strides& stride, int threads) {
    const auto of_subsets = patterns(size, blocks, index);
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.ctr_forward(dynamic_shape(shape), of_subsets.data(), group_view<const S>(t[0], stride[0]),
                      group_view<const S>(t[1], stride[1]), (const S*)t[2], (const S*)t[3], (const S*)t[4], (const S*)t[5],
                      (S*)t[6], threads);
    });
  });
  m.def("ctr_backward", [](bool is_double, const Sizes& shape, const Sizes& size, const Sizes& blocks,
                           const std::array<Address, 2>& index, const Addresses& t, const Strides& stride, int threads) {
    const auto of_subsets = patterns(size, blocks, index);
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.ctr_backward(dynamic_shape(shape), of_subsets.data(), group_view<const S>(t[0], stride[0]),
                       group_view<const S>(t[1], stride[1]), (const S*)t[2], (const S*)t[3], (const S*)t[4], (const S*)t[5],
                       view<S>(t[6], stride[2]), (S*)t[7], (S*)t[8], (S*)t[9], (S*)t[10], (S*)t[11], (S*)t[12], threads);
    });
  });
  m.def("dg_forward", [](bool is_double, const Sizes& shape, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.dg_forward(dynamic_shape(shape), group_view<const S>(t[0], stride[0]), view<S>(t[1], stride[1]), view<S>(t[2], stride[2]),
                     (const S*)t[3], (const S*)t[4], (const S*)t[5], (S*)t[6], threads);
    });
  });
  m.def("dg_backward", [](bool is_double, const Sizes& shape, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.dg_backward(dynamic_shape(shape), group_view<const S>(t[0], stride[0]), view<S>(t[1], stride[1]), view<S>(t[2], stride[2]),
                      (const S*)t[3], (const S*)t[4], (const S*)t[5], group_view<const S>(t[6], stride[3]), (S*)t[7], (S*)t[8],
                      (S*)t[9], (S*)t[10], (S*)t[11], (S*)t[12], threads);
    });
  });

  // Batch norm: shape = (N, C, P); strides of (n, c) only; address 0: no such tensor.
  m.def("norm_forward", [](bool is_double, const std::array<int64_t, 3>& size, const Addresses& t, const Strides& stride, double eps,
                           bool open, bool relu, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.norm_forward({size[0], size[1], size[2]}, plane<const S>(t[0], stride[0]), plane<const S>(t[1], stride[1]),
                       (const S*)t[2], (const S*)t[3], eps, open, relu, plane<S>(t[4], stride[2]), (S*)t[5], (S*)t[6], (S*)t[7],
                       threads);
    });
  });
  m.def("norm_backward", [](bool is_double, const std::array<int64_t, 3>& size, const Addresses& t, const Strides& stride, bool open,
                            int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.norm_backward({size[0], size[1], size[2]}, plane<const S>(t[0], stride[0]), plane<const S>(t[1], stride[1]),
                        plane<const S>(t[2], stride[2]), (const S*)t[3], (const S*)t[4], (const S*)t[5], (const S*)t[6], open,
                        plane<S>(t[7], stride[3]), plane<S>(t[8], stride[4]), (S*)t[9], (S*)t[10], threads);
    });
  });

  // AA-GCN's attention: size = AttendShape in order; then y, the eight parameters in order, and the results.
  m.def("attend_forward", [](bool is_double, const std::array<int64_t, 7>& size, const Addresses& t, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.attend_forward(attend_shape(size), (const S*)t[0], attend_parameters<const S*>(&t[1]), (S*)t[9], (S*)t[10], threads);
    });
  });
  m.def("attend_backward", [](bool is_double, const std::array<int64_t, 7>& size, const Addresses& t, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.attend_backward(attend_shape(size), (const S*)t[0], (const S*)t[1], attend_parameters<const S*>(&t[2]), (const S*)t[10],
                          (S*)t[11], attend_parameters<S*>(&t[12]), threads);
    });
  });

  // A block of ST-GCN: shape as in temporal_conv, eps of both norms; graph = (K, V, entries).
  m.def("block_forward", [](bool is_double, const Sizes& shape, const Sizes& graph_size, const std::array<Address, 3>& graph_index,
                            const Sizes& graph, const std::array<Address, 2>& adjacency, const Sizes& temporal_size,
                            const std::array<Address, 3>& temporal_index, const std::array<double, 2>& eps, const Addresses& t,
                            int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const Adjacency a{graph[0], graph[1], graph[2], (const int32_t*)adjacency[0], (const int32_t*)adjacency[1]};
      ops.block_forward(temporal_shape(shape), pattern(graph_size, graph_index), a, pattern(temporal_size, temporal_index),
                        block_tensors<S>(t, eps), threads);
    });
  });
  m.def("block_backward", [](bool is_double, const Sizes& shape, const Sizes& graph_size, const std::array<Address, 3>& graph_index,
                             const Sizes& graph, const std::array<Address, 2>& adjacency, const Sizes& temporal_size,
                             const std::array<Address, 3>& temporal_index, const Addresses& t, const Addresses& gradients,
                             bool identity, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const Adjacency a{graph[0], graph[1], graph[2], (const int32_t*)adjacency[0], (const int32_t*)adjacency[1]};
      ops.block_backward(temporal_shape(shape), pattern(graph_size, graph_index), a, pattern(temporal_size, temporal_index),
                         block_tensors<S>(t, {}), block_gradients<S>(gradients, identity), threads);
    });
  });

  // Pooling over 3 frames: size = (N, C, T, V, stride); strides of (n, c) only. pool_forward: x, y; pool_backward: x, dy, dx.
  m.def("pool_forward", [](bool is_double, const std::array<int64_t, 5>& size, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.pool_forward({size[0], size[1], size[2], size[3], size[4]}, plane<const S>(t[0], stride[0]), plane<S>(t[1], stride[1]), threads);
    });
  });
  m.def("pool_backward", [](bool is_double, const std::array<int64_t, 5>& size, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.pool_backward({size[0], size[1], size[2], size[3], size[4]}, plane<const S>(t[0], stride[0]),
                        plane<const S>(t[1], stride[1]), plane<S>(t[2], stride[2]), threads);
    });
  });

  // Means and sums of gradients: size = (N, C, T, V), V without the mean; strides of (n, c) of the operands, results contiguous.
  m.def("frame_mean", [](bool is_double, const MeanSizes& size, Address x, const Sizes& stride, Address mean, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.frame_mean(mean_shape(size), plane<const S>(x, stride), (S*)mean, threads);
    });
  });
  m.def("total", [](bool is_double, const MeanSizes& size, const Addresses& x, const Strides& stride, Address mean, Address y,
                    int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const auto views = planes<S>(x, stride);
      ops.total_of(mean_shape(size), (int64_t)views.size(), views.data(), (const S*)mean, (S*)y, threads);
    });
  });
  m.def("append_mean", [](bool is_double, const MeanSizes& size, Address x, const Sizes& stride, Address y, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.append_mean(mean_shape(size), plane<const S>(x, stride), (S*)y, threads);
    });
  });
  m.def("append_mean_backward", [](bool is_double, const MeanSizes& size, const Addresses& g, const Strides& stride, Address dx,
                                   int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const auto views = planes<S>(g, stride);
      ops.append_mean_backward(mean_shape(size), (int64_t)views.size(), views.data(), (S*)dx, threads);
    });
  });
  m.def("spread_mean", [](bool is_double, const MeanSizes& size, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.spread_mean(mean_shape(size), plane<const S>(t[0], stride[0]), (const S*)t[1], plane<S>(t[2], stride[1]), threads);
    });
  });
  m.def("spread_mean_backward", [](bool is_double, const MeanSizes& size, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.spread_mean_backward(mean_shape(size), plane<const S>(t[0], stride[0]), plane<const S>(t[1], stride[1]), (const S*)t[2],
                               plane<S>(t[3], stride[2]), (double*)t[4], threads);
    });
  });

  m.def("lasso_square", [](bool is_double, const std::array<int64_t, 3>& size, Address w, const std::array<int64_t, 3>& stride,
                           Address kept) {
    double square = 0;
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      square = ops.lasso_square(size[0], size[1], size[2], (const S*)w, stride.data(), (const uint8_t*)kept);
    });
    return square;
  });
  m.def("lasso_gradient", [](bool is_double, const std::array<int64_t, 3>& size, Address w, const std::array<int64_t, 3>& stride,
                             Address kept, double scale, Address gradient) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.lasso_gradient(size[0], size[1], size[2], (const S*)w, stride.data(), (const uint8_t*)kept, (S)scale, (S*)gradient);
    });
  });
}
