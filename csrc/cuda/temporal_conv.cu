// Block-sparse temporal convolution, forward.
//
//   y[n,o,t,v] = act( scale[o] * sum over live (o,i,k) of w[o,i,k] x[n,i, t*stride + (k-(K-1)/2)*dilation, v]
//                     + shift[o] + residual[n,o,t,v] )          x (N,I,T,V), y (N,O,To,V), w in blocks (bo, bi)
//
//            gathered (channel, tap) slots = K                A block of 8 warps takes one sample and a tile of frames.
//           +----------------------------+                    It stages the input panel (a chunk of channels, the
//   pixels  | rows of the panel in       |   x  slots         frames and their halo) in shared memory by 16-byte
//     = M   | shared memory, shifted by  |      x bo = N      copies, then each warp gathers, for its pixels and its
//           | the tap, read in place     |                    groups of bo output channels, the live rows from it.
//           +----------------------------+                    Sums stay in registers for the whole reduction.
//
// A block of (bo, bi) is bi slots: vector blocks and square blocks are one kernel. Dead blocks are never read; padding
// slots point at a row of zeros, so that 0 * NaN never enters. Fused at the store: scale, shift, residual, ReLU.
// Contract: sums in float32, in an order that depends on the pattern and the shapes alone; tf32 and 16-bit factors are
// rounded once; the result is rounded once. Reference: sparse_stgcn/kernels/reference.py.
#include "device.h"
#include "ops.h"
#include "plan.h"

namespace sparse_stgcn::cuda {
namespace {

struct ConvArgs {
    const void *x, *values, *residual;      // x is rounded down to a multiple of 16 bytes, x_offset elements before its first
    const float *scale, *shift;
    void* y;
    const int2* slots;
    const int* starts;
    int64_t x_offset, x_batch, x_channel, residual_batch, residual_channel;
    int I, O, T, To, V, stride, groups, first_frame, relu;
    Tile tile;
};

// The staged channels. A channel's row begins at an address that is a multiple of 16 bytes in global memory, so its
// first frame stands at (lead + channel * stride) mod PIECE; a slot carries that product mod 8 in its three low bits.
template <class T> struct Panel {
    static constexpr int PIECE = 16 / sizeof(T);
    const T* data;
    int lead;
    __device__ __forceinline__ int row(int slot) const { return (slot >> 3) + ((slot + lead) & (PIECE - 1)); }
};

// One K step of each arithmetic for one group of BO channels. `at`: offsets of this lane's pixels in a row of the panel.
// On the matrix unit a lane owns RUN pixels side by side (rows of M are ours to name) and channels 2 quad + {0, 1}.
template <class E, int BO> struct Half {
    using T = E;
    static constexpr int MT = 4, GROUPS = 32 / BO, STEP = 16, RUN = 2 * MT;
    using Sums = float[GROUPS * BO / 8][MT][4];
    static __device__ __forceinline__ int pixel(int lane, int j) { return (lane >> 2) * RUN + j; }

    template <bool UNIT>
    static __device__ __forceinline__ void step(Sums& sums, int group, const Panel<T>& p, const int2* slots,
                                                const T* values, const int (&at)[RUN], int lane) {
        const int4* mine = reinterpret_cast<const int4*>(slots + 4 * (lane & 3));   // the order along K is ours, too
        const int4 s01 = __ldg(mine), s23 = __ldg(mine + 1);
        const int weight[4] = {s01.y, s01.w, s23.y, s23.w};
        const int row[4] = {p.row(s01.x), p.row(s01.z), p.row(s23.x), p.row(s23.z)};
        uint32_t b[BO / 8][2], a[MT][4];
#pragma unroll
        for (int n = 0; n < BO / 8; ++n) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) w[i] = weight[i] < 0 ? 0 : values[weight[i] + n * 8 + (lane >> 2)].bits;
            b[n][0] = w[0] | w[1] << 16, b[n][1] = w[2] | w[3] << 16;
        }
        if constexpr (UNIT) {                       // pixels lie side by side: read words; an odd row straddles them
            uint32_t pair[4][MT];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t* word = reinterpret_cast<const uint32_t*>(p.data + at[0]) + (unsigned(row[i]) >> 1);
                const uint32_t select = 0x3210 + (row[i] & 1) * 0x2222;                   // at[0] is even
                uint32_t w[MT + 1];
#pragma unroll
                for (int m = 0; m <= MT; ++m) w[m] = word[m];
#pragma unroll
                for (int m = 0; m < MT; ++m) pair[i][m] = __byte_perm(w[m], w[m + 1], select);
            }
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    a[m][i] = __byte_perm(pair[i / 2 * 2][m], pair[i / 2 * 2 + 1][m], i % 2 ? 0x7632 : 0x5410);
        } else {
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int k = i / 2 * 2, px = at[2 * m + i % 2];
                    a[m][i] = p.data[row[k] + px].bits | uint32_t(p.data[row[k + 1] + px].bits) << 16;
                }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < BO / 8; ++n) mma(E{}, sums[group * (BO / 8) + n][m], a[m], b[n]);
    }
};

template <int BO> struct Tf32 {
    using T = float;
    static constexpr int MT = 2, GROUPS = 64 / BO, STEP = 8, RUN = 2 * MT;
    using Sums = float[GROUPS * BO / 8][MT][4];
    static __device__ __forceinline__ int pixel(int lane, int j) { return (lane >> 2) * RUN + j; }

    template <bool UNIT>
    static __device__ __forceinline__ void step(Sums& sums, int group, const Panel<T>& p, const int2* slots,
                                                const T* values, const int (&at)[RUN], int lane) {
        const int4 s = __ldg(reinterpret_cast<const int4*>(slots + 2 * (lane & 3)));
        const T *even = p.data + p.row(s.x), *odd = p.data + p.row(s.z);
        uint32_t b[BO / 8][2];
#pragma unroll
        for (int n = 0; n < BO / 8; ++n) {
            b[n][0] = s.y < 0 ? 0 : to_tf32(values[s.y + n * 8 + (lane >> 2)]);
            b[n][1] = s.w < 0 ? 0 : to_tf32(values[s.w + n * 8 + (lane >> 2)]);
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const uint32_t a[4] = {to_tf32(even[at[2 * m]]), to_tf32(even[at[2 * m + 1]]),
                                   to_tf32(odd[at[2 * m]]), to_tf32(odd[at[2 * m + 1]])};
#pragma unroll
            for (int n = 0; n < BO / 8; ++n) mma(0.f, sums[group * (BO / 8) + n][m], a, b[n]);
        }
    }
};

// IEEE float32: a lane owns RUN pixels, 32 apart, and all BO channels of the group. Every lane reads the same slots.
template <int BO> struct Exact {
    using T = float;
    static constexpr int MT = 4, GROUPS = 32 / BO, STEP = 4, RUN = 2;
    using Sums = float[GROUPS * BO / 8][MT][4];     // [eight channels][8 channels x RUN pixels]
    static __device__ __forceinline__ int pixel(int lane, int j) { return lane + 32 * j; }

    template <bool UNIT>
    static __device__ __forceinline__ void step(Sums& sums, int group, const Panel<T>& p, const int2* slots,
                                                const T* values, const int (&at)[RUN], int) {
#pragma unroll (BO == 32 ? 1 : STEP)                                     // more would spill
        for (int k = 0; k < STEP; ++k) {
            const int2 s = __ldg(slots + k);
            if (s.y < 0) break;
            const T* row = p.data + p.row(s.x);
            const float x[RUN] = {row[at[0]], row[at[1]]};
#pragma unroll
            for (int q = 0; q < BO / 4; ++q) {
                float* sum = &sums[group * (BO / 8) + q / 2][q % 2 * 2][0];
                const float4 w = __ldg(reinterpret_cast<const float4*>(values + s.y) + q);
#pragma unroll
                for (int j = 0; j < RUN; ++j) {
                    sum[0 * RUN + j] += w.x * x[j];
                    sum[1 * RUN + j] += w.y * x[j];
                    sum[2 * RUN + j] += w.z * x[j];
                    sum[3 * RUN + j] += w.w * x[j];
                }
            }
        }
    }
};

// Put eight channels of a lane's sums where they belong in the warp's buffer (8 x LD).
template <int LD, class Math>
__device__ __forceinline__ void spread(Math, float* buffer, const float (&sums)[Math::MT][4], int lane) {
#pragma unroll
    for (int m = 0; m < Math::MT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            buffer[(2 * (lane & 3) + i % 2) * LD + Math::pixel(lane, 2 * m + i / 2)] = sums[m][i];
}
template <int LD, int BO>
__device__ __forceinline__ void spread(Exact<BO>, float* buffer, const float (&sums)[4][4], int lane) {
#pragma unroll
    for (int i = 0; i < 16; ++i) buffer[i / 2 * LD + lane + i % 2 * 32] = sums[i / 4][i % 4];
}

// Copy one chunk of channels into the panel, 16 bytes at a time, a warp to a channel; frames outside 0..T-1 are zeros.
template <class T>
__device__ __forceinline__ void stage(T* panel, const ConvArgs& a, int64_t start, int64_t origin, int channels) {
    constexpr int PIECE = Panel<T>::PIECE;
    const T* x = static_cast<const T*>(a.x);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pitch = a.tile.pitch, plane = a.T * a.V;
    for (int c = warp; c < channels; c += WARPS) {
        const int64_t begin = start + c * a.x_channel, end = begin + plane;
        const int64_t base = (origin + c * a.x_channel) & -PIECE;
        for (int i = lane * PIECE; i < pitch; i += 32 * PIECE) {
            const int64_t from = base + i, left = end - from;
            const bool inside = from + PIECE > begin && left > 0;
            const int valid = inside ? int(left < PIECE ? left : PIECE) * int(sizeof(T)) : 0;
            cp_async_16(panel + c * pitch + i, x + (inside ? from : 0), valid);
        }
    }
    cp_async_commit();
    for (int i = threadIdx.x; i < pitch; i += THREADS) panel[a.tile.zero_row * pitch + i] = T{};
    cp_async_wait_all();
    if (origin >= start) return;
    for (int c = warp; c < channels; c += WARPS) {      // the piece that straddles a plane's start: its lane clears
        const int before = int(start + c * a.x_channel - ((origin + c * a.x_channel) & -PIECE));   // what is not ours
        int i = before & -PIECE;
        if (before < pitch && lane == i / PIECE % 32)
            for (; i < before; ++i) panel[c * pitch + i] = T{};
    }
}

// Write eight channels of the warp's pixels from its buffer: 16 aligned bytes at once, the ragged ends one by one.
template <class T, int PIXELS>
__device__ __forceinline__ void store(const float* buffer, const ConvArgs& a, int n, int t0, int first, int left, int o0) {
    constexpr int PIECE = Panel<T>::PIECE, PIECES = PIXELS / PIECE + 1, LD = buffer_pitch(PIXELS);
    for (int job = threadIdx.x % 32; job < 8 * PIECES; job += 32) {
        const int r = job / PIECES, o = o0 + r;
        if (o >= a.O) continue;
        T* y = static_cast<T*>(a.y) + ((int64_t(n) * a.O + o) * a.To + t0) * a.V + first;
        const int past = int(reinterpret_cast<uintptr_t>(y) / sizeof(T)) & (PIECE - 1);   // elements past an aligned address
        const int p = job % PIECES * PIECE - past, lo = p < 0 ? 0 : p, hi = p + PIECE < left ? p + PIECE : left;
        const T* residual = static_cast<const T*>(a.residual);
        if (residual) residual += n * a.residual_batch + o * a.residual_channel + int64_t(t0) * a.V + first;
        const float scale = a.scale ? __ldg(a.scale + o) : 1.f, shift = a.shift ? __ldg(a.shift + o) : 0.f;
        const float* sum = buffer + r * LD;
        auto act = [&](int i, float add) {
            const float s = sum[i] * scale + shift + add;
            return a.relu && s < 0.f ? 0.f : s;
        };
        if (hi - lo == PIECE && (reinterpret_cast<uintptr_t>(residual + (residual ? p : 0)) & 15) == 0) {
            const int4 more = residual ? load_16(residual + p) : int4{0, 0, 0, 0};
            auto word = [&](int i, int add) {                           // 4 bytes: one float or two of 16 bits
                if constexpr (sizeof(T) == 4) return int(as_bits(act(p + i, as_float(uint32_t(add)))));
                else return int(pack(T{}, act(p + 2 * i, to_float(T{uint16_t(add)})),
                                     act(p + 2 * i + 1, to_float(T{uint16_t(uint32_t(add) >> 16)}))));
            };
            store_16(y + p, int4{word(0, more.x), word(1, more.y), word(2, more.z), word(3, more.w)});
        } else
            for (int i = lo; i < hi; ++i) to_storage(y + i, act(i, residual ? to_float(residual[i]) : 0.f));
    }
}

template <class Math, bool UNIT>                                        // UNIT: stride 1
__global__ void __launch_bounds__(THREADS, 2) temporal_conv_kernel(ConvArgs a) {
    using T = typename Math::T;
    constexpr int PIXELS = 16 * Math::MT, EIGHTS = sizeof(typename Math::Sums) / sizeof(float[Math::MT][4]);
    constexpr int LD = buffer_pitch(PIXELS), BO = EIGHTS * 8 / Math::GROUPS;
    SHARED_MEMORY(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* buffer = reinterpret_cast<float*>(memory) + warp * 8 * LD;
    T* panel = reinterpret_cast<T*>(memory + buffer_bytes(PIXELS));
    const T* values = static_cast<const T*>(a.values);
    const int n = int(blockIdx.x / a.tile.tiles);
    const int t0 = int(blockIdx.x % a.tile.tiles) * a.tile.frames;
    const int pixels = (t0 + a.tile.frames < a.To ? a.tile.frames : a.To - t0) * a.V;
    const int mine = warp % a.tile.pixel_warps * PIXELS, group_warps = WARPS / a.tile.pixel_warps;

    int at[Math::RUN];                                                  // pixels past the tile are computed and dropped
#pragma unroll
    for (int j = 0; j < Math::RUN; ++j) {
        const int p = mine + Math::pixel(lane, j);
        at[j] = p < pixels ? (UNIT ? p : p + p / a.V * a.V * (a.stride - 1)) : 0;
        if (UNIT && j && Math::pixel(0, 1) == 1) at[j] = at[0] + j;
    }
    for (int slice = blockIdx.y; slice < a.tile.slices; slice += gridDim.y) {
        const int group0 = (slice * group_warps + warp / a.tile.pixel_warps) * Math::GROUPS;
        typename Math::Sums sums = {};
        for (int chunk = 0; chunk < a.tile.chunks; ++chunk) {
            const int c0 = chunk * a.tile.chunk_channels;
            const int channels = c0 + a.tile.chunk_channels < a.I ? a.tile.chunk_channels : a.I - c0;
            const int64_t start = a.x_offset + n * a.x_batch + c0 * a.x_channel;
            const int64_t origin = start + int64_t(t0 * a.stride + a.first_frame) * a.V;
            if (a.tile.chunks > 1 || slice == int(blockIdx.y)) {        // one chunk: staged once for all slices
                __syncthreads();
                stage(panel, a, start, origin, channels);
                __syncthreads();
            }
            const Panel<T> p = {panel, int(origin & (Panel<T>::PIECE - 1))};
#pragma unroll
            for (int g = 0; g < Math::GROUPS; ++g) {
                if (group0 + g >= a.groups || mine >= pixels) break;
                const int* starts = a.starts + (group0 + g) * (a.tile.chunks + 1) + chunk;
                for (int s = __ldg(starts), end = __ldg(starts + 1); s < end; s += Math::STEP)
                    Math::template step<UNIT>(sums, g, p, a.slots + s, values, at, lane);
            }
        }
        if (mine >= pixels) continue;
        const int left = pixels - mine < PIXELS ? pixels - mine : PIXELS;
#pragma unroll 1
        for (int e = 0; e < EIGHTS; ++e) {                              // a rolled loop keeps the code small: sums move up
            spread<LD>(Math{}, buffer, sums[0], lane);
            __syncwarp();
            if (group0 + e * 8 / BO < a.groups) store<T, PIXELS>(buffer, a, n, t0, mine, left, group0 * BO + e * 8);
            __syncwarp();
#pragma unroll
            for (int i = 1; i < EIGHTS; ++i)
#pragma unroll
                for (int m = 0; m < Math::MT; ++m)
#pragma unroll
                    for (int q = 0; q < 4; ++q) sums[i - 1][m][q] = sums[i][m][q];
        }
    }
}

template <class Math> const char* launch(const ConvArgs& a, int64_t blocks, void* stream) {
    const dim3 grid(unsigned(blocks), unsigned(a.tile.split));
    return a.stride == 1 ? LAUNCH((temporal_conv_kernel<Math, true>), grid, THREADS, a.tile.bytes, stream, a)
                         : LAUNCH((temporal_conv_kernel<Math, false>), grid, THREADS, a.tile.bytes, stream, a);
}
template <int BO> const char* launch(Arithmetic arithmetic, const ConvArgs& a, int64_t blocks, void* stream) {
    switch (arithmetic) {
        case Arithmetic::float32: return launch<Exact<BO>>(a, blocks, stream);
        case Arithmetic::tf32: return launch<Tf32<BO>>(a, blocks, stream);
        case Arithmetic::bfloat16: return launch<Half<bf16, BO>>(a, blocks, stream);
        case Arithmetic::float16: return launch<Half<f16, BO>>(a, blocks, stream);
    }
    return "unknown arithmetic";
}

}  // namespace

Tile temporal_conv_tile(const TemporalConv& op, const Device& device) {
    Tile none{};
    if (op.bo != 8 && op.bo != 16 && op.bo != 32) none.reason = "blocks have 8, 16 or 32 output channels";
    else if (int64_t(op.I) * op.K > 24576) none.reason = "a row of blocks has more than 24576 slots";
    else if (int64_t(op.blocks) * op.bi * op.bo > INT32_MAX) none.reason = "more than 2^31 stored weights";
    return none.reason ? none : choose_tile(op, device);
}

int64_t temporal_conv_scratch(const TemporalConv& op, const Tile& tile) {
    const int step = unit(op.arithmetic).step;
    return 2 * slot_count(int64_t(op.blocks) * op.bi, op.groups(), tile.chunks, step) + int64_t(op.groups()) * (tile.chunks + 1);
}

const char* temporal_conv_forward(const TemporalConv& op, const Tile& tile, const Device& device, void* stream) {
    const Unit u = unit(op.arithmetic);
    const int64_t blocks = int64_t(op.N) * tile.tiles;
    if (tile.reason) return tile.reason;
    if (blocks == 0 || op.O == 0 || op.V == 0) return nullptr;
    if (blocks > INT32_MAX) return "more than 2^31 tiles";
    if (uintptr_t(op.values) % 16 || uintptr_t(op.scratch) % 16) return "values and scratch must be aligned to 16 bytes";
    DeviceGuard guard(device.index);
    int2* slots = reinterpret_cast<int2*>(op.scratch);
    int* starts = op.scratch + 2 * slot_count(int64_t(op.blocks) * op.bi, op.groups(), tile.chunks, u.step);
    const PlanArgs plan{op.row_ptr, op.input, op.tap, slots, starts, op.x_channel, op.bo, op.bi, op.I,
                        tile.chunk_channels, tile.chunks, tile.pitch, op.dilation * op.V, u.step, u.piece,
                        op.arithmetic != Arithmetic::float32};
    const int64_t keys = (2 * MAX_CHUNKS + 4) * sizeof(int) + int64_t((op.I + op.bi - 1) / op.bi) * op.bi * op.K;
    if (const char* error = LAUNCH(plan_slots, dim3(unsigned(op.groups())), 128, keys, stream, plan)) return error;

    const uintptr_t address = reinterpret_cast<uintptr_t>(op.x);
    const ConvArgs a{reinterpret_cast<const void*>(address & ~uintptr_t(15)), op.values, op.residual, op.scale, op.shift,
                     op.y, slots, starts, int64_t(address % 16 / u.element), op.x_batch, op.x_channel,
                     op.residual_batch, op.residual_channel, op.I, op.O, op.T, op.out_frames(), op.V, op.stride,
                     op.groups(), -(op.K - 1) / 2 * op.dilation, op.relu, tile};
    return op.bo == 8 ? launch<8>(op.arithmetic, a, blocks, stream)
         : op.bo == 16 ? launch<16>(op.arithmetic, a, blocks, stream) : launch<32>(op.arithmetic, a, blocks, stream);
}

#if defined(__CUDACC__)
bool read_device(int index, Device* device) {
    int block = 0, all = 0, count = 0;
    bool ok = cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess &&
              cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index) == cudaSuccess &&
              cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index) == cudaSuccess;
    if (!ok) cudaGetLastError();
    *device = Device{index, block, all, count};
    return ok;
}
#else
bool read_device(int index, Device* device) {                           // an H100's numbers
    *device = Device{index, 227 << 10, 228 << 10, 132};
    return true;
}
#endif

}  // namespace sparse_stgcn::cuda
