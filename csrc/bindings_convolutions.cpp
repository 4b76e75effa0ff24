// The convolutions, products with graphs, and the group lasso.
#include "bindings.h"

namespace sparse_stgcn::bindings {

void bind_convolutions(py::module_& m) {
  m.def("temporal_forward", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index, Address x,
                               const Sizes& x_stride, Address values, Address bias, Address y, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      ops.temporal_forward(temporal_shape(shape), pattern(size, index), view<A>(x, x_stride), (const S*)values, (const S*)bias,
                           (A*)y, threads);
    });
  });
  m.def("temporal_dx", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index, Address dy,
                          const Sizes& dy_stride, Address values, Address dx, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      ops.temporal_dx(temporal_shape(shape), pattern(size, index), view<A>(dy, dy_stride), (const S*)values, (A*)dx, threads);
    });
  });
  m.def("temporal_dw", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index, Address x,
                          const Sizes& x_stride, Address dy, const Sizes& dy_stride, Address masked, Address values, double scale,
                          Address dw, Address dbias, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      ops.temporal_dw(temporal_shape(shape), pattern(size, index), view<A>(x, x_stride), view<A>(dy, dy_stride),
                      lasso<S>(masked, values, scale), (S*)dw, (S*)dbias, threads);
    });
  });

  m.def("pointwise_backward", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                                 Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride, Address masked,
                                 Address values, double scale, Address dx, Address dw, Address dbias, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      ops.pointwise_backward(temporal_shape(shape), pattern(size, index), view<A>(x, x_stride), view<A>(dy, dy_stride),
                             lasso<S>(masked, values, scale), (A*)dx, (S*)dw, (S*)dbias, threads);
    });
  });

  // Graph convolution: shape = (N, T, V, K, entries); adjacency = addresses of ptr, src.
  m.def("graph_forward", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                            const std::array<Address, 2>& adjacency, Address x, const Sizes& x_stride, Address values, Address coef,
                            Address bias_map, Address y, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      const Adjacency graph{shape[3], shape[2], shape[4], (const int32_t*)adjacency[0], (const int32_t*)adjacency[1]};
      ops.graph_forward(shape[0], shape[1], pattern(size, index), graph, view<A>(x, x_stride), (const S*)values, (const S*)coef,
                        (const S*)bias_map, (A*)y, threads);
    });
  });
  m.def("graph_dx", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                       const std::array<Address, 2>& adjacency, Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride,
                       Address values, Address coef, Address dx, Address dcoef, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      const Adjacency graph{shape[3], shape[2], shape[4], (const int32_t*)adjacency[0], (const int32_t*)adjacency[1]};
      ops.graph_dx(shape[0], shape[1], pattern(size, index), graph, view<A>(x, x_stride), view<A>(dy, dy_stride), (const S*)values,
                   (const S*)coef, (A*)dx, (S*)dcoef, threads);
    });
  });
  m.def("graph_dw", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                       const std::array<Address, 2>& adjacency, Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride,
                       Address coef, Address masked, Address values, double scale, Address dw, Address dbias_map, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      const Adjacency graph{shape[3], shape[2], shape[4], (const int32_t*)adjacency[0], (const int32_t*)adjacency[1]};
      ops.graph_dw(shape[0], shape[1], pattern(size, index), graph, view<A>(x, x_stride), view<A>(dy, dy_stride), (const S*)coef,
                   lasso<S>(masked, values, scale), (S*)dw, (S*)dbias_map, threads);
    });
  });

  // The same with graphs of the samples: shape = (N, K, C, R, T, V), of which C and R are not read.
  m.def("sample_graph_forward", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                                   Address x, const Sizes& x_stride, Address values, Address graphs, Address bias_map, Address y,
                                   int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      ops.sample_graph_forward(dynamic_shape(shape), pattern(size, index), view<A>(x, x_stride), (const S*)values,
                               (const S*)graphs, (const S*)bias_map, (A*)y, threads);
    });
  });
  m.def("sample_graph_dx", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                              Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride, Address values, Address graphs,
                              Address dx, Address dgraphs, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      ops.sample_graph_dx(dynamic_shape(shape), pattern(size, index), view<A>(x, x_stride), view<A>(dy, dy_stride),
                          (const S*)values, (const S*)graphs, (A*)dx, (S*)dgraphs, threads);
    });
  });
  m.def("sample_graph_dw", [](int dtype, const Sizes& shape, const Sizes& size, const std::array<Address, 3>& index,
                              Address x, const Sizes& x_stride, Address dy, const Sizes& dy_stride, Address graphs, Address masked,
                              Address values, double scale, Address dw, Address dbias_map, int threads) {
    stored(dtype, [&](auto& ops, auto s, auto a) {
      using S = decltype(s);
      using A = decltype(a);
      ops.sample_graph_dw(dynamic_shape(shape), pattern(size, index), view<A>(x, x_stride), view<A>(dy, dy_stride),
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

}  // namespace sparse_stgcn::bindings
