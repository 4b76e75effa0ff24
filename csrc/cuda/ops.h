// What the CUDA kernels offer to the host: pointers, sizes and strides; no CUDA type, so that any compiler can call them.
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

struct TemporalConv {
    Arithmetic arithmetic;
    int N, I, T, V, O, K, bo, bi, blocks, stride, dilation;
    const void* x;                                  // (N,I,T,V), a plane (T,V) contiguous
    int64_t x_batch, x_channel;                     // strides in elements
    const void* values;                             // (blocks,bi,bo), aligned to 16 bytes
    const int32_t *row_ptr, *input, *tap;           // the pattern: (ceil(O/bo) + 1), (blocks), (blocks)
    const float *scale, *shift;                     // (O) or null: y = scale * sum + shift
    const void* residual;                           // (N,O,To,V) or null, a plane contiguous
    int64_t residual_batch, residual_channel;
    void* y;                                        // (N,O,To,V) contiguous, aligned to its element
    int32_t* scratch;                               // temporal_conv_scratch() integers, aligned to 16 bytes
    bool relu;

    int out_frames() const { return (T - 1) / stride + 1; }
    int groups() const { return (O + bo - 1) / bo; }
};

// How a launch cuts its work: see choose_tile in plan.h. `reason` says why there is no such launch.
struct Tile {
    const char* reason;
    int frames, tiles;                              // frames of one block, blocks per sample
    int chunk_channels, chunks;                     // input channels staged at a time
    int pitch, zero_row;                            // elements from one staged channel to the next; index of the row of zeros
    int pixel_warps, slices, split;                 // warps of a block over pixels; passes over the groups; grid.y
    int64_t bytes;                                  // shared memory of one block
};

Tile temporal_conv_tile(const TemporalConv& op, const Device& device);
int64_t temporal_conv_scratch(const TemporalConv& op, const Tile& tile);
const char* temporal_conv_forward(const TemporalConv& op, const Tile& tile, const Device& device, void* stream);

bool read_device(int index, Device* device);        // false where there is no such device or no driver

}  // namespace sparse_stgcn::cuda
