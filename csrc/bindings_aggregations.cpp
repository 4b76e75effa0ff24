// The aggregations of AA-GCN, CTR-GCN and DG-STGCN.
#include "bindings.h"

namespace sparse_stgcn::bindings {

void bind_aggregations(py::module_& m) {
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
  // t = x, values, bias, alpha, A, graphs, similar; in the backward pass x, values, bias, alpha, similar, dgraphs, and the
  // gradients of x, values, bias, alpha, A.
  m.def("aa_unit_graphs", [](bool is_double, const Sizes& shape, const Addresses& t, const Sizes& stride, const Sizes& conv,
                             const std::array<Address, 3>& index, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.aa_unit_graphs(dynamic_shape(shape), wide<S>(0, stride, conv, index, t), (const S*)t[3], (const S*)t[4], (S*)t[5],
                         (S*)t[6], threads);
    });
  });
  m.def("aa_unit_graphs_backward", [](bool is_double, const Sizes& shape, const Addresses& t, const Sizes& stride,
                                      const Sizes& conv, const std::array<Address, 3>& index, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.aa_unit_graphs_backward(dynamic_shape(shape), wide<S>(0, stride, conv, index, t), (const S*)t[3], (const S*)t[4],
                                  (const S*)t[5], {nullptr, (S*)t[6], (S*)t[7], (S*)t[8]}, (S*)t[9], (S*)t[10], threads);
    });
  });
  // x3 is t[1] with stride[1]; or, where conv is not empty, made from x: conv = sizes of its pattern, conv_index = addresses of its
  // indices, made = addresses of x, values, bias, and of their gradients in the backward pass; stride[1] is then that of x.
  m.def("ctr_forward", [](bool is_double, const Sizes& shape, const Sizes& size, const Sizes& blocks,
                          const std::array<Address, 2>& index, const Addresses& t, const Strides& stride, const Sizes& conv,
                          const std::array<Address, 3>& conv_index, const Addresses& made, int threads) {
    const auto of_subsets = patterns(size, blocks, index);
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.ctr_forward(dynamic_shape(shape), of_subsets.data(), group_view<const S>(t[0], stride[0]),
                      wide<S>(t[1], stride[1], conv, conv_index, made), (const S*)t[2], (const S*)t[3], (const S*)t[4],
                      (const S*)t[5], (S*)t[6], threads);
    });
  });
  m.def("ctr_backward", [](bool is_double, const Sizes& shape, const Sizes& size, const Sizes& blocks,
                           const std::array<Address, 2>& index, const Addresses& t, const Strides& stride, const Sizes& conv,
                           const std::array<Address, 3>& conv_index, const Addresses& made, int threads) {
    const auto of_subsets = patterns(size, blocks, index);
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      const WideGradient<S> into = conv.empty() ? WideGradient<S>{(S*)t[8], nullptr, nullptr, nullptr}
                                                : WideGradient<S>{nullptr, (S*)made[3], (S*)made[4], (S*)made[5]};
      ops.ctr_backward(dynamic_shape(shape), of_subsets.data(), group_view<const S>(t[0], stride[0]),
                       wide<S>(t[1], stride[1], conv, conv_index, made), (const S*)t[2], (const S*)t[3], (const S*)t[4],
                       (const S*)t[5], view<S>(t[6], stride[2]), (S*)t[7], into, (S*)t[9], (S*)t[10], (S*)t[11], (S*)t[12],
                       threads);
    });
  });
  m.def("dg_forward", [](bool is_double, const Sizes& shape, const Addresses& t, const Strides& stride, const Addresses& norm,
                         Address read, double eps, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.dg_forward(dynamic_shape(shape), group_view<const S>(t[0], stride[0]), norm_of<S>(norm, eps), (const int32_t*)read,
                     view<S>(t[1], stride[1]), view<S>(t[2], stride[2]), (const S*)t[3], (const S*)t[4], (const S*)t[5], (S*)t[6],
                     threads);
    });
  });
  m.def("dg_backward", [](bool is_double, const Sizes& shape, const Addresses& t, const Strides& stride, const Addresses& norm,
                          Address read, int threads) {
    typed(is_double, [&](auto& ops, auto s) {
      using S = decltype(s);
      ops.dg_backward(dynamic_shape(shape), group_view<const S>(t[0], stride[0]), norm_of<S>(norm), (const int32_t*)read,
                      view<S>(t[1], stride[1]), view<S>(t[2], stride[2]), (const S*)t[3], (const S*)t[4], (const S*)t[5],
                      group_view<const S>(t[6], stride[3]), (S*)t[7], (S*)t[8], (S*)t[9], (S*)t[10], (S*)t[11], (S*)t[12],
                      norm.empty() ? nullptr : (S*)norm[5], norm.empty() ? nullptr : (S*)norm[6], threads);
    });
  });
}

}  // namespace sparse_stgcn::bindings
