// How a launch cuts its work (a pure function of sizes and of the device), and in which order a block reads its weights
// (a small kernel, so that nothing about a pattern has to pass through the host).
#pragma once
#include "device.h"
#include "ops.h"

namespace sparse_stgcn::cuda {

constexpr int WARPS = 8, THREADS = 32 * WARPS, MAX_CHUNKS = 16;

// What a warp holds in registers: `pixels` on the matrix unit's M side x `rows` output channels; `step` gathered rows at
// a time on its K side. `piece`: elements in 16 bytes.
struct Unit { int element, piece, step, pixels, rows; };
constexpr Unit unit(Arithmetic a) {
    return a == Arithmetic::float32 ? Unit{4, 4, 4, 64, 32}
         : a == Arithmetic::tf32 ? Unit{4, 4, 8, 32, 64} : Unit{2, 8, 16, 64, 32};
}
constexpr int rounded(int n, int to) { return (n + to - 1) / to * to; }

// The epilogue's buffer: each warp turns 8 output channels at a time from its registers' order into memory's.
__host__ __device__ constexpr int buffer_pitch(int pixels) { return pixels + 4; }
__host__ __device__ constexpr int buffer_bytes(int pixels) { return WARPS * 8 * buffer_pitch(pixels) * 4; }

// Try every number of frames and of chunks that fits, and take the one with the fewest estimated cycles per frame.
// The estimate only ranks: 24 bytes per cycle from L2 to an SM, 35 cycles for a step of a warp, 1500 for a staging.
inline Tile choose_tile(const TemporalConv& op, const Device& device) {
    const Unit u = unit(op.arithmetic);
    const int group_rows = u.rows / op.bo, out_frames = op.out_frames(), groups = op.groups();
    const int64_t samples = op.N > 0 ? op.N : 1;
    Tile best{"a tile of one frame does not fit into shared memory", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    double least = 0;
    if (op.V > WARPS * u.pixels) best.reason = "a frame has more vertices than a block has pixels";
    for (int frames = 1; frames <= out_frames && frames * op.V <= WARPS * u.pixels; ++frames) {
        int64_t staged = (int64_t(frames - 1) * op.stride + int64_t(op.K - 1) * op.dilation + 1) * op.V;
        if (staged * u.element > device.shared_per_block) break;
        const int pitch = rounded(int(staged) + u.piece - 1, u.piece);
        int pixel_warps = 1;
        while (pixel_warps * u.pixels < frames * op.V) pixel_warps *= 2;
        const int per_slice = group_rows * (WARPS / pixel_warps), slices = (groups + per_slice - 1) / per_slice;
        const double steps = double(op.blocks) * op.bi / u.step + groups;
        for (int chunks = 1, before = 0; chunks <= MAX_CHUNKS; ++chunks) {
            const int chunk_channels = (op.I + chunks - 1) / chunks;
            if (chunk_channels == before || (op.I + chunk_channels - 1) / chunk_channels != chunks) continue;
            before = chunk_channels;
            // past the row of zeros: pixels that are computed and dropped read a little further
            const int64_t bytes = int64_t(chunk_channels + 1) * pitch * u.element + 16 * u.element + buffer_bytes(u.pixels);
            if (bytes > device.shared_per_block) continue;
            const int stagings = chunks > 1 ? chunks * slices : 1;
            const bool pair = 2 * (bytes + 1024) <= device.shared_per_multiprocessor;
            const double copy = double(op.I) * pitch * u.element * (chunks > 1 ? slices : 1) / 24;
            const double cost = (copy + steps * pixel_warps * 35 + stagings * 1500.) * (pair ? 1 : 1.5) / frames;
            if (best.frames && cost >= least) continue;
            least = cost;
            const int tiles = (out_frames + frames - 1) / frames;
            int split = 1;                                       // too few blocks for the machine: share out the slices
            while (split < slices && samples * tiles * split < device.multiprocessors) ++split;
            best = Tile{nullptr, frames, tiles, chunk_channels, chunks, pitch, chunk_channels, pixel_warps, slices, split, bytes};
        }
    }
    return best;
}

// The slots of output group g: (place in the panel << 3 | class, first weight), bi of them for each block, bin by bin
// of chunks, each bin filled to whole steps with slots that point at the row of zeros.
struct PlanArgs {
    const int32_t *row_ptr, *input, *tap;
    int2* slots;
    int* starts;                                                 // (groups, chunks + 1)
    int64_t channel_stride;
    int bo, bi, I, chunk_channels, chunks, pitch, tap_step, step, piece, deal;
};
inline int64_t slot_count(int64_t slots, int groups, int chunks, int step) {
    return (slots + step - 1) / step * step + int64_t(groups) * (chunks + 1) * step;
}
__device__ __forceinline__ int first_slot(int slots_before, int group, int chunks, int step) {
    return (slots_before + step - 1) / step * step + group * (chunks + 1) * step;
}

// The lanes of a matrix unit read four slots at once. Where a slot starts modulo 16 bytes decides its banks in shared
// memory, and the order of the slots of a bin is free: sort by that class, stably, and deal like cards, so that four
// slots read together are a quarter of the classes apart. One block per group; ranks by counting, hence no order of
// threads matters.
__global__ void __launch_bounds__(128) plan_slots(PlanArgs a) {
    SHARED_MEMORY(memory);
    int* count = reinterpret_cast<int*>(memory);                 // MAX_CHUNKS counts, MAX_CHUNKS + 1 starts, then keys
    int* start = count + MAX_CHUNKS;
    uint8_t* key = memory + (2 * MAX_CHUNKS + 4) * sizeof(int);
    const int g = blockIdx.x, first = a.row_ptr[g], n = (a.row_ptr[g + 1] - first) * a.bi;
    if (threadIdx.x < MAX_CHUNKS) count[threadIdx.x] = 0;
    __syncthreads();
    for (int e = threadIdx.x; e < n; e += blockDim.x) {
        const int block = first + e / a.bi, channel = a.input[block] * a.bi + e % a.bi, chunk = channel / a.chunk_channels;
        const int64_t place = channel * a.channel_stride + int64_t(a.tap[block]) * a.tap_step;
        key[e] = channel < a.I ? uint8_t(chunk * 8 + int(place % a.piece)) : 255;
        if (channel < a.I) atomicAdd(count + chunk, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        start[0] = first_slot(first * a.bi, g, a.chunks, a.step);
        for (int c = 0; c < a.chunks; ++c) start[c + 1] = start[c] + (count[c] + a.step - 1) / a.step * a.step;
    }
    __syncthreads();
    for (int c = threadIdx.x; c <= a.chunks; c += blockDim.x) a.starts[g * (a.chunks + 1) + c] = start[c];
    for (int s = start[0] + threadIdx.x; s < start[a.chunks]; s += blockDim.x)
        a.slots[s] = int2{a.chunk_channels * a.pitch << 3, -1};
    __syncthreads();
    for (int e = threadIdx.x; e < n; e += blockDim.x) {
        if (key[e] == 255) continue;
        const int block = first + e / a.bi, channel = a.input[block] * a.bi + e % a.bi, chunk = key[e] >> 3;
        int rank = 0;
        for (int j = 0; j < n; ++j) rank += key[j] >> 3 == chunk && (key[j] < key[e] || (key[j] == key[e] && j < e));
        int at = rank;
        if (a.deal) {
            const int quads = (start[chunk + 1] - start[chunk]) / 4, each = a.step / 4, quad = rank % quads;
            at = quad / each * a.step + rank / quads * each + quad % each;
        }
        const int local = channel - chunk * a.chunk_channels, place = local * a.pitch + a.tap[block] * a.tap_step;
        a.slots[start[chunk] + at] = int2{place << 3 | int(local * a.channel_stride & 7), ((block * a.bi) + e % a.bi) * a.bo};
    }
}

}  // namespace sparse_stgcn::cuda
