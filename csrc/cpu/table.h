// What every instruction set offers: one table of functions over raw pointers. No torch, no pybind11.
//
// Sizes and strides are in elements. S is float or double; a function of the table works on the S it is listed under.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>

#include "fused.h"

namespace sparse_stgcn {

// The upper half of a float: activations may be stored in it, nothing is summed in it.
struct Bfloat16 {
  uint16_t bits;
};

// The live blocks of a weight (O, I, K): see kernels/pattern.py.
struct Pattern {
  int64_t O, I, K, bo, bi, rows, blocks;
  const int32_t *row_ptr, *input, *tap;
};

// A tensor (N, C, T, V) with any strides.
template <class S>
struct View {
  S* data;
  int64_t stride[4];
};

struct TemporalShape {
  int64_t N, T, T_out, V, stride, dilation;
};

// The entries of a sparse adjacency, sorted by subset k, then target w: entry e adds coef[e] * x[src[e]].
struct Adjacency {
  int64_t K, V, entries;
  const int32_t *ptr, *src;  // ptr: (K * V + 1)
};

// lambda * W* / norm on masked blocks, added to dW in the pass that makes it: dW[b] += scale * values[b] where masked[b].
template <class S>
struct Lasso {
  const uint8_t* masked;  // one flag a block; nullptr: no term
  const S* values;
  S scale;
};

// Of the aggregations with graphs from the sample: x (N, K, C, T, V) with embeddings of R rows; K is 1 but for dg_aggregate.
struct DynamicShape {
  int64_t N, K, C, R, T, V;
};

// A tensor (N, K, C, T, V) with any strides.
template <class S>
struct GroupView {
  S* data;
  int64_t stride[5];
};

// What graphs multiply or are made of, (N, K, C, T, V): given, or made from x (N, I, T, V) by a 1 x 1 convolution of live blocks whose
// outputs are the channels of one subset after the other. bias may be nullptr.
template <class S>
struct Wide {
  bool made;
  GroupView<const S> given;
  Pattern conv;
  View<const S> x;
  const S *values, *bias;
};
// Its gradient: `wide`, or those of x, of the values and of the bias.
template <class S>
struct WideGradient {
  S *wide, *x, *values, *bias;
};

// Batch norm over samples and pixels: P = T * V pixels lie in one run. Of a View of it only stride[0], stride[1] are read.
struct NormShape {
  int64_t N, C, P;
};

// Max-pooling over 3 frames of (N, C, T, V), and means of it; the pixels of a channel lie in one run. Views: stride[0], [1] only.
struct PoolShape {
  int64_t N, C, T, V, stride;
};
struct MeanShape {
  int64_t N, C, T, V;
};
constexpr int64_t max_parts = 8;  // that are added in one sweep

// AA-GCN's attention of y (N, C, T, V), contiguous: taps of the convolutions along joints and frames, H hidden units.
struct AttendShape {
  int64_t N, C, T, V, joint_taps, frame_taps, H;
  int64_t state() const { return C * (V + T + 2) + H + V + T; }  // numbers a sample that the backward pass needs
};

// joint (C, joint_taps), frame (C, frame_taps), fc1 (H, C), fc2 (C, H) with a bias each, all contiguous.
template <class P>
struct AttendParameters {
  P joint, joint_bias, frame, frame_bias, fc1, fc1_bias, fc2, fc2_bias;
};
template <class S>
using AttendWeights = AttendParameters<const S*>;
template <class S>
using AttendGradients = AttendParameters<S*>;
// A block of ST-GCN in training mode: z = graph_conv(x), y = temporal_conv(relu(bn1(z))), out = relu(bn2(y) + residual).
// Tensors are contiguous. `residual` is nullptr where there is none, and `bias_map`, `temporal_bias` and dcoef too.
template <class S>
struct BlockNorm {
  const S *gamma, *beta;
  S *mean, *rstd, *variance;  // of the batch; variance: unbiased
  double eps;
};
template <class S>
struct BlockTensors {
  const S *x, *residual, *graph_values, *coef, *bias_map, *temporal_values, *temporal_bias;
  BlockNorm<S> first, second;
  S *z, *y, *out;
};
template <class S>
struct BlockGradients {
  const S* dout;
  S *g, *dz;                         // dout where the last ReLU is open (the gradient of the residual), and a workspace like z
  S *dx, *dgraph, *dcoef, *dbias_map, *dtemporal, *dbias, *dgamma1, *dbeta1, *dgamma2, *dbeta2;
  bool identity;                     // the residual is x: dx includes its gradient
};

// A map of the channels of z (N, C, T, V) that are its own: y = f(relu(norm(z))), f a convolution or max-pooling over 3 frames; or
// y = z, which then has y's frames. Channels of z are T V numbers apart, strides are between samples.
enum BranchKind : int64_t { CONVOLVES, POOLS, PASSES };
template <class S>
struct Branch {
  int64_t kind;
  Pattern conv;  // only I = O counts where it does not convolve
  int64_t dilation;
  const S *values, *bias;
  int64_t first, target;  // its first channel in the norm, unless it passes, and in y
  const S* z;
  int64_t z_stride;
};
template <class S>
struct BranchGradient {
  S* dz;
  int64_t dz_stride;
  S *values, *bias;  // bias may be nullptr
};
// The mean over joints goes through all branches as one more joint, and then y_v += coef_v y_V; coef == nullptr: there is none.
// means (N, channels of y, T_out): y_V, written forward. dcoef (V): backward.
template <class S>
struct JointMean {
  const S* coef;
  S *means, *dcoef;
};

// The convolutions: A is what activations and their gradients are stored in; weights, their gradients and all sums are S.
template <class S, class A>
struct Convolutions {
  void (*temporal_forward)(const TemporalShape&, const Pattern&, View<const A> x, const S* values, const S* bias, A* y,
                           int threads);
  void (*temporal_dx)(const TemporalShape&, const Pattern&, View<const A> dy, const S* values, A* dx, int threads);
  void (*temporal_dw)(const TemporalShape&, const Pattern&, View<const A> x, View<const A> dy, const Lasso<S>&, S* dw,
                      S* dbias, int threads);
  // 1 x 1, stride 1: both gradients; the weights are those of the lasso, whose term is optional.
  void (*pointwise_backward)(const TemporalShape&, const Pattern&, View<const A> x, View<const A> dy, const Lasso<S>&, A* dx,
                             S* dw, S* dbias, int threads);
  void (*graph_forward)(int64_t N, int64_t T, const Pattern&, const Adjacency&, View<const A> x, const S* values,
                        const S* coef, const S* bias_map, A* y, int threads);
  void (*graph_dx)(int64_t N, int64_t T, const Pattern&, const Adjacency&, View<const A> x, View<const A> dy,
                   const S* values, const S* coef, A* dx, S* dcoef, int threads);
  void (*graph_dw)(int64_t N, int64_t T, const Pattern&, const Adjacency&, View<const A> x, View<const A> dy,
                   const S* coef, const Lasso<S>&, S* dw, S* dbias_map, int threads);
  // The same with graphs (N, K, V, V), one of its own for every sample. dgraphs may be nullptr.
  void (*sample_graph_forward)(const DynamicShape&, const Pattern&, View<const A> x, const S* values, const S* graphs,
                               const S* bias_map, A* y, int threads);
  void (*sample_graph_dx)(const DynamicShape&, const Pattern&, View<const A> x, View<const A> dy, const S* values,
                          const S* graphs, A* dx, S* dgraphs, int threads);
  void (*sample_graph_dw)(const DynamicShape&, const Pattern&, View<const A> x, View<const A> dy, const S* graphs,
                          const Lasso<S>&, S* dw, S* dbias_map, int threads);
};

template <class S>
struct Ops : Convolutions<S, S> {
  // z (N, K C, T, V) = x (N, C, T, V) times a shared adjacency, or times graphs (N, K, V, V). dcoef, dgraphs may be nullptr.
  void (*graph_product)(const DynamicShape&, const Adjacency&, View<const S> x, const S* coef, S* z, int threads);
  void (*graph_product_backward)(const DynamicShape&, const Adjacency&, View<const S> x, View<const S> dz, const S* coef, S* dx,
                                 S* dcoef, int threads);
  void (*sample_product)(const DynamicShape&, View<const S> x, const S* graphs, S* z, int threads);
  void (*sample_product_backward)(const DynamicShape&, View<const S> x, View<const S> dz, const S* graphs, S* dx, S* dgraphs,
                                  int threads);
  double (*lasso_square)(int64_t O, int64_t I, int64_t K, const S* w, const int64_t stride[3], const uint8_t* kept);
  void (*lasso_gradient)(int64_t O, int64_t I, int64_t K, const S* w, const int64_t stride[3], const uint8_t* kept,
                         S scale, S* gradient);

  // Small arguments (alpha, beta, A, weights) are contiguous, those of ctr's subsets one after the other. x12 is (N, K, 2, R, V);
  // a pattern without row_ptr is a dense weight (C, R).
  void (*aa_graphs)(const DynamicShape&, GroupView<const S> a, GroupView<const S> b, const S* alpha, const S* A, S* graphs,
                    int threads);
  void (*aa_graphs_backward)(const DynamicShape&, GroupView<const S> a, GroupView<const S> b, const S* alpha,
                             const S* dgraphs, GroupView<S> da, GroupView<S> db, S* dalpha, S* dA, int threads);
  // ab.conv makes all a_k, then all b_k; similar (N, K, V, V): what alpha is multiplied with, for the backward pass.
  void (*aa_unit_graphs)(const DynamicShape&, const Wide<S>& ab, const S* alpha, const S* A, S* graphs, S* similar, int threads);
  void (*aa_unit_graphs_backward)(const DynamicShape&, const Wide<S>& ab, const S* alpha, const S* similar, const S* dgraphs,
                                  const WideGradient<S>& dab, S* dalpha, S* dA, int threads);
  void (*ctr_forward)(const DynamicShape&, const Pattern* of_subsets, GroupView<const S> x12, const Wide<S>& x3,
                      const S* weight, const S* bias, const S* alpha, const S* A, S* y, int threads);
  void (*ctr_backward)(const DynamicShape&, const Pattern* of_subsets, GroupView<const S> x12, const Wide<S>& x3,
                       const S* weight, const S* bias, const S* alpha, const S* A, View<const S> dy, S* dx12,
                       const WideGradient<S>& dx3, S* dweight, S* dbias, S* dalpha, S* dA, int threads);
  // With a norm relu(norm(x)) takes the place of x, and mean, rstd and variance are written forward; gamma == nullptr: there is none.
  // Nobody reads channels of y whose `read` is below 0: y, their dy and what follows from it are zeros; nullptr: all are read.
  void (*dg_forward)(const DynamicShape&, GroupView<const S> x, const BlockNorm<S>&, const int32_t* read, View<const S> x1,
                     View<const S> x2, const S* alpha, const S* beta, const S* A, S* y, int threads);
  void (*dg_backward)(const DynamicShape&, GroupView<const S> x, const BlockNorm<S>&, const int32_t* read, View<const S> x1,
                      View<const S> x2, const S* alpha, const S* beta, const S* A, GroupView<const S> dy, S* dx, S* dx1, S* dx2,
                      S* dalpha, S* dbeta, S* dA, S* dgamma, S* dshift, int threads);

  // residual may have data == nullptr, and y and dresidual of the backward pass both; variance: unbiased, or
  // nullptr: mean and rstd are given.
  void (*norm_forward)(const NormShape&, View<const S> x, View<const S> residual, const S* gamma, const S* beta, double eps,
                       bool open, bool relu, View<S> y, S* mean, S* rstd, S* variance, int threads);
  void (*norm_backward)(const NormShape&, View<const S> dy, View<const S> x, View<const S> y, const S* gamma, const S* beta,
                        const S* mean, const S* rstd, bool open, View<S> dx, View<S> dresidual, S* dgamma, S* dbeta,
                        int threads);

  void (*attend_forward)(const AttendShape&, const S* y, const AttendWeights<S>&, S* out, S* state, int threads);
  void (*attend_backward)(const AttendShape&, const S* y, const S* dout, const AttendWeights<S>&, const S* state, S* dy,
                          const AttendGradients<S>&, int threads);
  void (*pool_forward)(const PoolShape&, View<const S> x, View<S> y, int threads);
  void (*pool_backward)(const PoolShape&, View<const S> x, View<const S> dy, View<S> dx, int threads);

  // V counts the joints without the mean. Results are contiguous unless they are a View; dcoef is added to.
  void (*frame_mean)(const MeanShape&, View<const S> x, S* mean, int threads);
  // y = sum of x + mean / T
  void (*total_of)(const MeanShape&, int64_t count, const View<const S>* x, const S* mean, S* y, int threads);
  void (*append_mean)(const MeanShape&, View<const S> x, S* y, int threads);
  void (*append_mean_backward)(const MeanShape&, int64_t count, const View<const S>* g, S* dx, int threads);
  void (*spread_mean)(const MeanShape&, View<const S> x, const S* coef, View<S> y, View<S> mean, int threads);
  void (*spread_mean_backward)(const MeanShape&, View<const S> dy, View<const S> mean, const S* coef, View<S> dx, double* dcoef,
                               int threads);

  void (*block_forward)(const TemporalShape&, const Pattern& graph, const Adjacency&, const Pattern& temporal,
                        const BlockTensors<S>&, int threads);
  void (*block_backward)(const TemporalShape&, const Pattern& graph, const Adjacency&, const Pattern& temporal,
                         const BlockTensors<S>&, const BlockGradients<S>&, int threads);

  // `channels` of y and dy, which are contiguous; dilation of the shape is not read. mean, rstd and variance of the norm are
  // written forward.
  void (*branches_forward)(const TemporalShape&, int64_t count, const Branch<S>*, const BlockNorm<S>&, const JointMean<S>&,
                           int64_t channels, S* y, int threads);
  void (*branches_backward)(const TemporalShape&, int64_t count, const Branch<S>*, const BlockNorm<S>&, const JointMean<S>&,
                            int64_t channels, const S* dy, const BranchGradient<S>*, S* dgamma, S* dbeta, int threads);
};

struct Table {
  const char* name;
  Ops<float> f32;
  Ops<double> f64;
  Convolutions<float, Bfloat16> bf16;
  size_t (*fused_tables_room)(const FusedNetwork&);
  void (*fused_make_tables)(const FusedNetwork&, char* memory);
  // x (batch, persons, T, V, C) with any strides -> for each of `count` networks features (batch * persons, its features).
  void (*fused_run)(const FusedNetwork* const* networks, int64_t count, int64_t batch, int64_t persons, const float* x,
                    const int64_t stride[5], float* const* features, int threads);
  int64_t (*fma_burst)(int64_t rounds);  // peak.inl
};

const Table& baseline_table();
#if defined(__x86_64__)
const Table& avx2_table();
const Table& avx512_table();
const Table& avx512_bf16_table(bool by_name);  // by name: every product that can uses vdpbf16ps
#endif

// Chosen once: the best set of this processor, or the one that SPARSE_STGCN_ISA names. Throws std::invalid_argument.
const Table& table();

// The address of torch's C symbol `torch_parallel_for`; without it everything runs on the calling thread.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);
extern ParallelFor torch_parallel_for;

// What tasks of a parallel loop threw. torch's symbol says only that one did, by its result, and not what.
class TaskErrors {
 public:
  void keep();               // in a handler, on any thread: the first exception is kept
  void raise(int32_t code);  // after the loop, with its result: throws what was kept, or says that the loop failed

 private:
  bool failed = false;
  std::exception_ptr first;
};

}  // namespace sparse_stgcn
