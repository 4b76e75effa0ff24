// What the files of the Python module `sparse_stgcn._native` share: addresses, sizes and strides as they come from Python, and as
// the kernels take them. Callers (kernels/*.py) have checked shapes and types; the GIL is released while a kernel runs.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "cpu/table.h"

namespace sparse_stgcn::bindings {

namespace py = pybind11;

void bind_convolutions(py::module_& m);  // temporal and graph convolutions, products with graphs, group lasso
void bind_aggregations(py::module_& m);  // with graphs of the sample
void bind_units(py::module_& m);         // norm, attention, pooling, means, the block of ST-GCN
void bind_fused(py::module_& m);         // networks of runtime/

using Address = uintptr_t;
using Sizes = std::vector<int64_t>;

// (O, I, K, bo, bi, blocks) and the addresses of row_ptr, input, tap.
inline Pattern pattern(const Sizes& size, const std::array<Address, 3>& index) {
  return {size[0], size[1], size[2], size[3], size[4], (size[0] + size[3] - 1) / size[3], size[5],
          (const int32_t*)index[0], (const int32_t*)index[1], (const int32_t*)index[2]};
}

// Of subsets with `blocks` live blocks each, their indices one after the other; index[0] == 0: dense weights.
inline std::vector<Pattern> patterns(const Sizes& size, const Sizes& blocks, const std::array<Address, 2>& index) {
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

inline DynamicShape dynamic_shape(const Sizes& size) { return {size[0], size[1], size[2], size[3], size[4], size[5]}; }

template <class S>
GroupView<S> group_view(Address data, const Sizes& stride) {
  return {(S*)data, {stride[0], stride[1], stride[2], stride[3], stride[4]}};
}

// What graphs multiply or are made of: `given`, or, where there is a pattern, made from made[0] with weights made[1] and bias made[2].
template <class S>
Wide<S> wide(Address given, const Sizes& stride, const Sizes& conv, const std::array<Address, 3>& index, const Addresses& made) {
  if (conv.empty()) return {false, group_view<const S>(given, stride), {}, {}, nullptr, nullptr};
  return {true, {}, pattern(conv, index), view<S>(made[0], stride), (const S*)made[1], (const S*)made[2]};
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

// Weight, bias, mean, rstd and variance of a norm, the last one 0 in a backward pass. Empty: no norm.
template <class S>
BlockNorm<S> norm_of(const Addresses& t, double eps = 0) {
  if (t.empty()) return {nullptr, nullptr, nullptr, nullptr, nullptr, 0};
  return {(const S*)t[0], (const S*)t[1], (S*)t[2], (S*)t[3], (S*)t[4], eps};
}

// Branches: (kind, O, I, K, bo, bi, blocks, dilation, first channel in the norm and in y, strides of z and dz) each, and the addresses
// of row_ptr, input, tap, values, bias, z, and of the gradients of z, values and bias.
template <class S>
std::vector<Branch<S>> branches(const Strides& size, const std::vector<Addresses>& t) {
  std::vector<Branch<S>> list;
  for (size_t b = 0; b < size.size(); b++) {
    const Sizes& i = size[b];
    const auto at = [&](int j) { return (const S*)t[b][j]; };
    const Sizes of_pattern(i.begin() + 1, i.begin() + 7);
    list.push_back({i[0], pattern(of_pattern, {t[b][0], t[b][1], t[b][2]}), i[7], at(3), at(4), i[8],
                    i[9], at(5), i[10]});
  }
  return list;
}
template <class S>
std::vector<BranchGradient<S>> branch_gradients(const Strides& size, const std::vector<Addresses>& t) {
  std::vector<BranchGradient<S>> list;
  for (size_t b = 0; b < size.size(); b++) list.push_back({(S*)t[b][6], size[b][11], (S*)t[b][7], (S*)t[b][8]});
  return list;
}

// A View of which only the strides of sample and channel are used.
template <class S>
View<S> plane(Address data, const Sizes& stride) {
  return {(S*)data, {stride[0], stride[1], 0, 0}};
}

using MeanSizes = std::array<int64_t, 4>;
inline MeanShape mean_shape(const MeanSizes& size) { return {size[0], size[1], size[2], size[3]}; }

// What is added up, at most max_parts of them.
template <class S>
std::vector<View<const S>> planes(const Addresses& data, const Strides& stride) {
  if (data.size() > (size_t)max_parts)
    throw std::invalid_argument("Expected at most " + std::to_string(max_parts) + " tensors. Got " + std::to_string(data.size()) + ".");
  std::vector<View<const S>> views;
  for (size_t i = 0; i < data.size(); i++) views.push_back(plane<const S>(data[i], stride[i]));
  return views;
}

inline AttendShape attend_shape(const std::array<int64_t, 7>& size) {
  return {size[0], size[1], size[2], size[3], size[4], size[5], size[6]};
}

// Eight addresses in a row.
template <class P>
AttendParameters<P> attend_parameters(const Address* t) {
  return {(P)t[0], (P)t[1], (P)t[2], (P)t[3], (P)t[4], (P)t[5], (P)t[6], (P)t[7]};
}

inline TemporalShape temporal_shape(const Sizes& size) { return {size[0], size[1], size[2], size[3], size[4], size[5]}; }

template <class S>
Lasso<S> lasso(Address masked, Address values, double scale) {
  return {(const uint8_t*)masked, (const S*)values, (S)scale};
}

// The same for the convolutions, which also take activations in bfloat16: dtype is 0, 1 (double) or 2 (bfloat16). body gets the
// table, a number of the type that is summed in and one of the type that activations are stored in.
template <class F>
void stored(int dtype, F body) {
  py::gil_scoped_release release;
  if (dtype == 1) body(table().f64, double{}, double{});
  else if (dtype == 2) body(table().bf16, float{}, Bfloat16{});
  else body(table().f32, float{}, float{});
}

// Calls body with the table of float or double.
template <class F>
void typed(bool is_double, F body) {
  py::gil_scoped_release release;
  if (is_double) body(table().f64, double{});
  else body(table().f32, float{});
}

}  // namespace sparse_stgcn::bindings
