// Block-sparse spatial graph convolution: forward, and the gradients of its input, its adjacency and its weights.
//
//   y[n,o,t,w] = act( scale[o] * ( sum over live (o,i,k), v of w[o,i,k] x[n,i,t,v] A_k[v,w] + map[o,w] )
//                     + shift[o] + residual[n,o,t,w] )        x (N,I,T,V), y (N,O,T,V), A (K,V,V), also per n and o
//
// With an adjacency that all channels share, y, dx and dw are one pass each: z_k = x A_k, or dh_k = dy A_k' for dx, is made in
// shared memory, and the weights gather from it (gather_kernel.h, adjacency_panel.h), or it meets dy there
// (weight_gradient.cu). The others are two passes with one tensor between them, K times as many channels as x or y, stored as
// the input is:
//
//   dA                     dz_k = W_k' dy          then dA_k = sum of x' dz_k
//   per channel, y, dA     h_k = W_k x             then y = sum over k of h_k A_k, dA_k = sum of h_k' dy
//   per channel, dx, dw    dh_k = dy A_k'          then dx = sum over k of W_k' dh_k, dw_k = dh_k x'
// Reference: sparse_stgcn/kernels/reference.py and its autograd.
#include "adjacency.h"
#include "gather_kernel.h"
#include "weight_gradient.h"
#include "weight_tile.h"

namespace sparse_stgcn::cuda {
namespace {

Gather gather_of(const GraphConv& op, Rule rule, bool transposed) {
    const Pattern& p = op.pattern;
    Gather g{};
    g.arithmetic = op.arithmetic, g.rule = rule, g.N = op.N, g.V = op.V, g.K = p.K;
    g.sources = transposed ? p.O : p.I, g.targets = transposed ? p.I : p.O;
    g.sb = transposed ? p.bo : p.bi, g.tb = transposed ? p.bi : p.bo, g.blocks = p.blocks;
    g.source_frames = g.frames = g.out_frames = op.T, g.stride = g.dilation = 1;
    g.phases = rule == Rule::split ? p.K : 1, g.out_channels = g.phases * g.targets;
    g.ptr = transposed ? p.t_ptr : p.row_ptr, g.perm = transposed ? p.t_perm : nullptr;
    g.source = transposed ? p.t_row : p.input, g.tap = p.tap;
    return g;
}
Gather forward_of(const GraphConv& op) {
    return in_groups(gather_of(op, op.per_channel ? Rule::split : Rule::adjacency, false));
}
Gather input_gradient_of(const GraphConv& op) {
    return in_groups(gather_of(op, op.per_channel ? Rule::stack : Rule::adjacency, true));
}
Gather weight_gradient_of(const GraphConv& op) {
    return in_weight_groups(gather_of(op, op.per_channel ? Rule::split : Rule::adjacency, false));
}
Gather factor_of(const GraphConv& op) { return in_groups(gather_of(op, Rule::split, !op.per_channel)); }  // dz_k, h_k, for dA

int64_t plane_bytes(const GraphConv& op, int channels) {                // of a tensor between two passes
    return (int64_t(op.N) * op.pattern.K * channels * op.T * op.V * unit(op.arithmetic).element + 15) / 16 * 16;
}
Planes between(const GraphConv& op, const void* data, int channels) {
    const int64_t plane = int64_t(op.T) * op.V;
    return {data, op.pattern.K * channels * plane, plane};
}
int64_t bytes_of_plan(const Gather& g, int chunks) { return plan_bytes(g, chunks, unit(g.arithmetic).step, false); }

Adjacency transposed(Adjacency a) {
    const int64_t from = a.from;
    a.from = a.to, a.to = from;
    return a;
}
Mix mix_of(const GraphConv& op, bool expand, int channels, Planes x, const Adjacency& adjacency, void* y) {
    return {op.arithmetic, expand, op.N, channels, op.pattern.K, op.T, op.V, x, adjacency, {}, y};
}
Outer outer_of(const GraphConv& op) {
    Outer o{};
    o.arithmetic = op.arithmetic, o.per_sample = op.per_sample || op.per_channel, o.per_channel = o.split_x = op.per_channel;
    o.N = op.N, o.C = op.per_channel ? op.pattern.O : op.pattern.I, o.K = op.pattern.K, o.T = op.T, o.V = op.V;
    return o;
}
const char* too_wide(const GraphConv& op, const Device& device) {
    return mix_shared(op.pattern.K, op.V) > device.shared_per_block ? "the adjacency does not fit into shared memory" : nullptr;
}
bool empty(const GraphConv& op) { return op.N == 0 || op.T == 0; }
const char* misaligned(const void* scratch) {
    return reinterpret_cast<uintptr_t>(scratch) % 16 ? "the scratch must be aligned to 16 bytes" : nullptr;
}

}  // namespace

Tile graph_conv_tile(const GraphConv& op, const Device& device) {
    Tile tile = choose_tile(forward_of(op), device);
    if (op.per_channel && too_wide(op, device)) tile.reason = too_wide(op, device);
    return tile;
}

int64_t graph_conv_scratch(const GraphConv& op, const Tile& tile) {
    return bytes_of_plan(forward_of(op), tile.chunks) + (op.per_channel ? plane_bytes(op, op.pattern.O) : 0);
}

const char* graph_conv_forward(const GraphConv& op, const Tile& tile, const Device& device, Planes x, const void* values,
                               Adjacency adjacency, const Epilogue& epilogue, void* y, void* scratch, void* stream) {
    if (const char* error = use_device(device.index)) return error;
    Gather g = forward_of(op);
    g.x = x, g.values = values;
    if (!op.per_channel) {
        g.epilogue = epilogue, g.y = y;
        return run_gather<true>(g, adjacency, tile, scratch, stream);
    }
    g.y = static_cast<char*>(scratch) + bytes_of_plan(g, tile.chunks);
    if (const char* error = gather(g, tile, scratch, stream)) return error;
    Mix m = mix_of(op, false, op.pattern.O, between(op, g.y, op.pattern.O), adjacency, y);
    m.epilogue = epilogue;
    return empty(op) ? nullptr : mix_joints(m, stream);
}

Tile graph_conv_input_gradient_tile(const GraphConv& op, const Device& device) {
    Tile tile = choose_tile(input_gradient_of(op), device);
    if (op.V > MAX_JOINTS) tile.reason = "the gradient of the adjacency takes up to 64 vertices";
    if (!tile.reason) tile.reason = choose_tile(factor_of(op), device).reason;
    if (op.per_channel && too_wide(op, device)) tile.reason = too_wide(op, device);
    tile.splits = outer_splits(outer_of(op), device);
    return tile;
}

int64_t graph_conv_input_gradient_scratch(const GraphConv& op, const Tile& tile) {
    Outer o = outer_of(op);
    o.splits = tile.splits;
    const int planes = op.per_channel ? 2 : 1;                          // dh, and what dA is made of
    return bytes_of_plan(input_gradient_of(op), tile.chunks) + bytes_of_plan(factor_of(op), MAX_CHUNKS) +
           planes * plane_bytes(op, o.C) + outer_bytes(o);
}

const char* graph_conv_input_gradient(const GraphConv& op, const Tile& tile, const Device& device, Planes x, Planes dy,
                                      const void* values, Adjacency adjacency, void* dx, void* dadjacency, void* scratch,
                                      void* stream) {
    if (const char* error = use_device(device.index)) return error;
    if (tile.reason) return tile.reason;
    if (const char* error = misaligned(scratch)) return error;
    const Adjacency back = transposed(adjacency);
    char* p = static_cast<char*>(scratch);
    auto take = [&](int64_t bytes) {
        char* here = p;
        p += bytes;
        return here;
    };
    Gather g = input_gradient_of(op);
    g.x = dy, g.values = values, g.y = dx;
    void* plan = take(bytes_of_plan(g, tile.chunks));
    const char* error = nullptr;
    if (dx && op.per_channel) {
        void* dh = take(plane_bytes(op, op.pattern.O));
        if (!empty(op)) error = mix_joints(mix_of(op, true, op.pattern.O, dy, back, dh), stream);
        g.x = between(op, dh, op.pattern.O);
        if (!error) error = gather(g, tile, plan, stream);
    } else if (dx)
        error = run_gather<true>(g, back, tile, plan, stream);
    if (error || !dadjacency) return error;
    Outer o = outer_of(op);
    o.splits = tile.splits;
    Gather f = factor_of(op);
    const Tile cut = choose_tile(f, device);
    void* plan_of_factor = take(bytes_of_plan(f, MAX_CHUNKS));
    f.x = op.per_channel ? x : dy, f.values = values, f.y = take(plane_bytes(op, o.C));
    if ((error = gather(f, cut, plan_of_factor, stream))) return error;
    o.x = op.per_channel ? between(op, f.y, o.C) : x, o.d = op.per_channel ? dy : between(op, f.y, o.C);
    o.da = dadjacency, o.scratch = p;
    return outer_joints(o, stream);
}

Tile graph_conv_weight_gradient_tile(const GraphConv& op, const Device& device) {
    Tile tile = choose_weight_tile(weight_gradient_of(op), device);
    if (op.per_channel && too_wide(op, device)) tile.reason = too_wide(op, device);
    return tile;
}

int64_t graph_conv_weight_gradient_scratch(const GraphConv& op, const Tile& tile) {
    return weight_gradient_bytes(weight_gradient_of(op), tile) + (op.per_channel ? plane_bytes(op, op.pattern.O) : 0);
}

const char* graph_conv_weight_gradient(const GraphConv& op, const Tile& tile, const Device& device, Planes x, Planes dy,
                                       const void* values, Adjacency adjacency, Lasso lasso, void* dw, float* dy_sums,
                                       void* scratch, void* stream) {
    if (const char* error = use_device(device.index)) return error;
    if (tile.reason) return tile.reason;
    if (const char* error = misaligned(scratch)) return error;
    Gather g = weight_gradient_of(op);
    g.x = x, g.values = values;
    if (!op.per_channel) return weight_gradient(g, adjacency, tile, dy, lasso, dw, dy_sums, scratch, stream);
    const int channels = op.pattern.O;
    char* dh = static_cast<char*>(scratch);
    if (!empty(op) && op.pattern.blocks)
        if (const char* error = mix_joints(mix_of(op, true, channels, dy, transposed(adjacency), dh), stream)) return error;
    return weight_gradient(g, {}, tile, between(op, dh, channels), lasso, dw, nullptr, dh + plane_bytes(op, channels), stream);
}

}  // namespace sparse_stgcn::cuda
