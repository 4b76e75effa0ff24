// What the CUDA kernels offer to the host: pointers, sizes and strides; no CUDA type, so that any compiler can call them.
// Nothing here allocates, waits or reads device memory: a call is a few launches on the stream that it is given, so that
// it can be captured in a graph. It takes a workspace, `scratch`, of as many bytes as its *_scratch function says.
#pragma once
#include <cstdint>

namespace sparse_stgcn::cuda {

// How products and sums are made. The sums are float32 throughout.
enum class Arithmetic { float32, tf32, bfloat16, float16 };   // tf32 reads float32 and rounds both factors to 10 bits

struct Device {
    int index;                                      // ordinal, for the guard around a launch
    int shared_per_block, shared_per_multiprocessor;   // bytes of shared memory: what one block may ask for; what there is
    int multiprocessors;
};

// The live blocks of a weight (O,I,K); see BlockPattern. The gradient of the input needs the transposed index.
struct Pattern {
    int O, I, K, bo, bi, blocks;
    const int32_t *row_ptr, *input, *tap;
    const int32_t *t_ptr, *t_perm, *t_row;
};

// A tensor (N,C,T,V) whose planes (T,V) are contiguous; strides in elements.
struct Planes {
    const void* data;
    int64_t batch, channel;
};

// y = act(scale * sum + shift + residual), each part but the sum optional.
struct Epilogue {
    const float *scale, *shift;                     // (O)
    const float* map;                               // (O,V), added to the sum: the bias of a graph convolution
    int64_t map_batch;                              // from one sample's map to the next; 0: one map
    Planes residual;
    bool relu;
};

// masked (blocks) flags: the gradient of those blocks gets scale * values more. Null: none.
struct Lasso {
    const uint8_t* masked;
    const float* scale;
};

// How a launch cuts its work: see tile.h. `reason` says why there is no such launch.
struct Tile {
    const char* reason;
    int frames, tiles;                              // frames of one block, blocks per sample
    int chunk_channels, chunks;                     // source channels staged at a time
    int pitch, zero_row;                            // elements from one row of the panel to the next; index of the row of zeros
    int pixel_warps, slices, split;                 // warps of a block over pixels; passes over the groups; grid.y
    int groups_per_slice, splits;                   // weight gradient: groups of one block; shares of the pixels
    int row_pitch, adjacency_pitch;                 // graph_conv: of the staged input; of the adjacency
    int rows;                                       // target channels of a group
    int64_t bytes;                                  // shared memory of one block
};

// What a step of a warp costs a multiprocessor, counted from the loops: accesses of 128 bytes to shared memory and L1, one a
// cycle, and instructions, four a cycle, for 8 target channels and for each 8 more. A step is so many gathered slots.
struct Step {
    int slots, wavefronts, issue, more_wavefronts, more_issue;
    double cycles(int rows) const {
        const double more = rows / 8 - 1, issued = (issue + more * more_issue) / 4, moved = wavefronts + more * more_wavefronts;
        return issued > moved ? issued : moved;
    }
};
constexpr Step gather_step(Arithmetic a) {              // arithmetic.h; float32: of one slot of four
    return a == Arithmetic::float32 ? Step{1, 5, 24, 2, 17}
         : a == Arithmetic::tf32 ? Step{8, 11, 44, 2, 10} : Step{16, 32, 90, 4, 16};
}
// One run of pixels of a task of weight_gradient.cu: 64 of 16 bits, 32 of 32. float32 takes 8 slots x 8 rows at a time.
constexpr Step weight_step(Arithmetic a) {
    return a == Arithmetic::float32 ? Step{8, 16, 96, 16, 96}
         : a == Arithmetic::tf32 ? Step{16, 24, 76, 8, 28} : Step{16, 27, 76, 9, 28};
}

struct TemporalConv {
    Arithmetic arithmetic;
    int N, T, V, stride, dilation;
    Pattern pattern;
    int out_frames() const { return (T - 1) / stride + 1; }
};
// forward: x (N,I,T,V) -> y (N,O,To,V); input_gradient: dy (N,O,To,V) -> dx (N,I,T,V); values (blocks,bi,bo).
Tile temporal_conv_tile(const TemporalConv& op, const Device& device);
int64_t temporal_conv_scratch(const TemporalConv& op, const Tile& tile);
const char* temporal_conv_forward(const TemporalConv& op, const Tile& tile, const Device& device, Planes x, const void* values,
                                  const Epilogue& epilogue, void* y, void* scratch, void* stream);
Tile temporal_conv_input_gradient_tile(const TemporalConv& op, const Device& device);
int64_t temporal_conv_input_gradient_scratch(const TemporalConv& op, const Tile& tile);
const char* temporal_conv_input_gradient(const TemporalConv& op, const Tile& tile, const Device& device, Planes dy,
                                         const void* values, void* dx, void* scratch, void* stream);
Tile temporal_conv_weight_gradient_tile(const TemporalConv& op, const Device& device);
int64_t temporal_conv_weight_gradient_scratch(const TemporalConv& op, const Tile& tile);
const char* temporal_conv_weight_gradient(const TemporalConv& op, const Tile& tile, const Device& device, Planes x, Planes dy,
                                          const void* values, Lasso lasso, void* dw, float* dy_sums, void* scratch,
                                          void* stream);

// A_k[v][w] of the adjacency, of the arithmetic's storage type, any strides; `batch` 0: one for all samples, `channel` 0: one
// for all channels.
struct Adjacency {
    const void* data;
    int64_t batch, subset, channel, from, to;
};
struct GraphConv {
    Arithmetic arithmetic;
    int N, T, V;
    bool per_sample, per_channel;                   // adjacency (K,V,V), (N,K,V,V) or (N,K,O,V,V)
    Pattern pattern;                                // its taps are the subsets of the graph
};
Tile graph_conv_tile(const GraphConv& op, const Device& device);
int64_t graph_conv_scratch(const GraphConv& op, const Tile& tile);
const char* graph_conv_forward(const GraphConv& op, const Tile& tile, const Device& device, Planes x, const void* values,
                               Adjacency adjacency, const Epilogue& epilogue, void* y, void* scratch, void* stream);
Tile graph_conv_input_gradient_tile(const GraphConv& op, const Device& device);
int64_t graph_conv_input_gradient_scratch(const GraphConv& op, const Tile& tile);
// dx (N,I,T,V) and dadjacency, contiguous in the shape of the adjacency; either may be null.
const char* graph_conv_input_gradient(const GraphConv& op, const Tile& tile, const Device& device, Planes x, Planes dy,
                                      const void* values, Adjacency adjacency, void* dx, void* dadjacency, void* scratch,
                                      void* stream);
Tile graph_conv_weight_gradient_tile(const GraphConv& op, const Device& device);
int64_t graph_conv_weight_gradient_scratch(const GraphConv& op, const Tile& tile);
const char* graph_conv_weight_gradient(const GraphConv& op, const Tile& tile, const Device& device, Planes x, Planes dy,
                                       const void* values, Adjacency adjacency, Lasso lasso, void* dw, float* dy_sums,
                                       void* scratch, void* stream);

const char* read_device(int index, Device* device); // the error's text, if there is no such device or no driver for it

}  // namespace sparse_stgcn::cuda
