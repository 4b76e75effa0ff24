// Block-sparse temporal convolution, forward and the gradient of its input; both are gathers.
//
//   y[n,o,t,v]  = act( scale[o] * sum over live (o,i,k) of w[o,i,k] x[n,i, t*stride + (k-halo)*dilation, v]
//                      + shift[o] + residual[n,o,t,v] )          x (N,I,T,V), y (N,O,To,V), halo = (K-1)/2
//   dx[n,i,u,v] = sum over live (o,i,k), t with t*stride + (k-halo)*dilation = u of w[o,i,k] dy[n,o,t,v]
//
// Frames u = phase, phase + stride, ... of dx meet the same taps, so that every phase is a convolution of stride 1 over dy.
// Reference: sparse_stgcn/kernels/reference.py and its autograd.
#include "gather_kernel.h"

namespace sparse_stgcn::cuda {

Gather forward_of(const TemporalConv& op) {
    const Pattern& p = op.pattern;
    Gather g{};
    g.arithmetic = op.arithmetic, g.rule = Rule::shift, g.N = op.N, g.V = op.V, g.K = p.K;
    g.sources = p.I, g.targets = p.O, g.sb = p.bi, g.tb = p.bo, g.blocks = p.blocks;
    g.source_frames = op.T, g.frames = g.out_frames = op.out_frames(), g.stride = op.stride, g.dilation = op.dilation;
    g.phases = 1, g.out_channels = p.O;
    g.ptr = p.row_ptr, g.source = p.input, g.tap = p.tap;
    return g;
}
static Gather output_of(const TemporalConv& op) { return in_groups(forward_of(op)); }

static Gather input_gradient_of(const TemporalConv& op) {
    const Pattern& p = op.pattern;
    Gather g{};
    g.arithmetic = op.arithmetic, g.rule = Rule::phase, g.N = op.N, g.V = op.V, g.K = p.K;
    g.sources = p.O, g.targets = p.I, g.sb = p.bo, g.tb = p.bi, g.blocks = p.blocks;
    g.source_frames = op.out_frames(), g.frames = (op.T - 1) / op.stride + 1, g.out_frames = op.T;
    g.stride = 1, g.dilation = op.dilation, g.phases = op.stride, g.out_channels = p.I;
    g.ptr = p.t_ptr, g.perm = p.t_perm, g.source = p.t_row, g.tap = p.tap;
    return in_groups(g);
}

Tile temporal_conv_tile(const TemporalConv& op, const Device& device) { return choose_tile(output_of(op), device); }
int64_t temporal_conv_scratch(const TemporalConv& op, const Tile& tile) {
    return plan_bytes(output_of(op), tile.chunks, unit(op.arithmetic).step, false);
}
const char* temporal_conv_forward(const TemporalConv& op, const Tile& tile, const Device& device, Planes x, const void* values,
                                  const Epilogue& epilogue, void* y, void* scratch, void* stream) {
    if (const char* error = use_device(device.index)) return error;
    Gather g = output_of(op);
    g.x = x, g.values = values, g.epilogue = epilogue, g.y = y;
    return gather(g, tile, scratch, stream);
}

Tile temporal_conv_input_gradient_tile(const TemporalConv& op, const Device& device) {
    return choose_tile(input_gradient_of(op), device);
}
int64_t temporal_conv_input_gradient_scratch(const TemporalConv& op, const Tile& tile) {
    return plan_bytes(input_gradient_of(op), tile.chunks, unit(op.arithmetic).step, false);
}
const char* temporal_conv_input_gradient(const TemporalConv& op, const Tile& tile, const Device& device, Planes dy,
                                         const void* values, void* dx, void* scratch, void* stream) {
    if (const char* error = use_device(device.index)) return error;
    Gather g = input_gradient_of(op);
    g.x = dy, g.values = values, g.y = dx;
    return gather(g, tile, scratch, stream);
}

const char* gather(const Gather& g, const Tile& tile, void* scratch, void* stream) {
    return run_gather<false>(g, Adjacency{}, tile, scratch, stream);
}

#if defined(__CUDACC__)
const char* read_device(int index, Device* device) {
    int block = 0, all = 0, count = 0;
    cudaError_t e = cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
    cudaGetLastError();                                                 // a launch reports what went wrong in it alone
    *device = Device{index, block, all, count};
    return error_text(e);
}
#else
const char* read_device(int index, Device* device) {                    // an H100's numbers
    *device = Device{index, 227 << 10, 228 << 10, 132};
    return nullptr;
}
#endif

}  // namespace sparse_stgcn::cuda
