// What lies between the convolutions of a training step, and a block of ST-GCN.
#include "bindings.h"

namespace sparse_stgcn::bindings {

void bind_units(py::module_& m) {
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

  // Branches of a temporal unit: shape as in temporal_conv; norm: see norm_of, backward with the gradients of weight and bias
  // behind; joint = coefficients, means, and backward the gradient of the former, all 0 without a joint mean.
  m.def("branches_forward", [](bool is_double, const Sizes& shape, const Strides& sizes, const std::vector<Addresses>& addresses,
                               const Addresses& norm, double eps, const std::array<Address, 3>& joint, int64_t channels, Address y,
                               int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const auto list = branches<S>(sizes, addresses);
      ops.branches_forward(temporal_shape(shape), (int64_t)list.size(), list.data(), norm_of<S>(norm, eps),
                           {(const S*)joint[0], (S*)joint[1], nullptr}, channels, (S*)y, threads);
    });
  });
  m.def("branches_backward", [](bool is_double, const Sizes& shape, const Strides& sizes, const std::vector<Addresses>& addresses,
                                const Addresses& norm, const std::array<Address, 3>& joint, int64_t channels, Address dy,
                                int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const auto list = branches<S>(sizes, addresses);
      ops.branches_backward(temporal_shape(shape), (int64_t)list.size(), list.data(), norm_of<S>(norm),
                            {(const S*)joint[0], (S*)joint[1], (S*)joint[2]}, channels, (const S*)dy,
                            branch_gradients<S>(sizes, addresses).data(), (S*)norm[5], (S*)norm[6], threads);
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
      ops.spread_mean(mean_shape(size), plane<const S>(t[0], stride[0]), (const S*)t[1], plane<S>(t[2], stride[1]),
                      plane<S>(t[3], stride[2]), threads);
    });
  });
  m.def("spread_mean_backward", [](bool is_double, const MeanSizes& size, const Addresses& t, const Strides& stride, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.spread_mean_backward(mean_shape(size), plane<const S>(t[0], stride[0]), plane<const S>(t[1], stride[1]), (const S*)t[2],
                               plane<S>(t[3], stride[2]), (double*)t[4], threads);
    });
  });
}

}  // namespace sparse_stgcn::bindings
