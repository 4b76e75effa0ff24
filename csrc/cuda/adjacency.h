// Products with the adjacency that stand alone, for its gradient and for an adjacency per channel.
#pragma once
#include "gather.h"

namespace sparse_stgcn::cuda {

// expand: y[n, k*C + c, t, :] = x[n, c, t, :] A_k. Otherwise the sum y[n, c, t, :] = sum over k of x[n, k*C + c, t, :] A_k,
// with the epilogue. A_k[from][to] may be per sample and per channel c; y is contiguous.
struct Mix {
    Arithmetic arithmetic;
    bool expand;
    int N, C, K, T, V;
    Planes x;
    Adjacency adjacency;
    Epilogue epilogue;
    void* y;
};
int64_t mix_shared(int K, int V);                       // bytes of shared memory
const char* mix_joints(const Mix& m, void* stream);

// dA_k[v][w] = sum over frames, and over what the adjacency does not depend on, of x[n, c, t, v] d[n, c, t, w], where the
// channel is k*C + c in the tensor that is split by subsets. `splits`: shares of the sum.
struct Outer {
    Arithmetic arithmetic;
    bool per_sample, per_channel, split_x;              // else d is split
    int N, C, K, T, V, splits;
    Planes x, d;
    void* da;                                           // contiguous in the shape of the adjacency
    void* scratch;
};
int outer_splits(const Outer& o, const Device& device);
int64_t outer_bytes(const Outer& o);
const char* outer_joints(const Outer& o, void* stream);
constexpr int MAX_JOINTS = 64;                          // of outer_joints

}  // namespace sparse_stgcn::cuda
