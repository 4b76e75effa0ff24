// The gradient of live weights: a sum over all pixels, split over blocks of threads and added up in a fixed order.
//
//   dw[o,i,k] = sum over n,t,v of dy[n,o,t,v] x[n,i, t*stride + (k-halo)*dilation, v]   (+ scale * w of masked blocks)
//
//              pixels = K                  A block of 8 warps takes a share of the tiles (sample, frames) and a slice of the
//           +-------------------+          groups of output channels. It stages x and dy of a tile; a warp then takes 16 slots
//   slots   | rows of x, shifted|  x  dy   (input channel, tap) of a group at a time and adds the tile's pixels to their sums,
//     = M   | by the tap        |   = N    which stay in the share's own partial result. The second pass adds the shares up,
//           +-------------------+          in an order that is fixed, and the group lasso's gradient once.
// Of graph_conv, rows x_c A_k that any block reads are made in shared memory first, and take the place of those of x. The
// sum of dy, which the bias's gradient needs, is added up from the staged rows on the way, and by the second pass.
//
// Contract: float32 sums, in an order that depends on shapes, pattern and number of multiprocessors alone; no atomics;
// pixels past the tile are cleared in registers on both sides, so that nothing strange is multiplied.
#include "weight_gradient.h"

#include "adjacency_panel.h"
#include "weight_tile.h"

namespace sparse_stgcn::cuda {
namespace {

struct WeightArgs {
    Rows x, dy;
    const int2* slots;
    const int* starts;
    float *partial, *dy_sums;                                           // of every share; dy_sums may be null
    int64_t share, dy_share, tiles;                                     // floats of one share; tiles in all
    AdjacencyPanel graph;
    int sources, frames, V, stride, groups, groups_per_phase, targets, rows, first_frame;
    Tile tile;
};

// A run of pixels side by side for one lane: 8 registers of two 16-bit values or one float; those past `valid` are zero.
template <class T, bool UNIT>
__device__ __forceinline__ void load_run(uint32_t (&w)[8], const T* panel, int row, int p, int pixels, int V, int stride) {
    constexpr int PER = sizeof(T) == 2 ? 2 : 1, RUN = 8 * PER;
    const int valid = pixels - p;
    if constexpr (UNIT && PER == 2) {
        const int start = valid > 0 ? row + p : row;                    // p is even
        const uint32_t* word = reinterpret_cast<const uint32_t*>(panel) + (unsigned(start) >> 1);
        const uint32_t select = 0x3210 + (start & 1) * 0x2222;
        uint32_t all[9];
#pragma unroll
        for (int i = 0; i < 9; ++i) all[i] = word[i];
#pragma unroll
        for (int i = 0; i < 8; ++i) w[i] = __byte_perm(all[i], all[i + 1], select);
        if (valid < RUN)
#pragma unroll
            for (int i = 0; i < 8; ++i) w[i] = 2 * i >= valid ? 0 : 2 * i + 1 == valid ? w[i] & 0xffff : w[i];
    } else {
        int v = UNIT ? 0 : p % V, at = UNIT ? p : p + p / V * V * (stride - 1);
        auto next = [&] {                                               // the element of this pixel, and on to the next
            const int here = at;
            at += !UNIT && ++v == V ? (v = 0, 1 + V * (stride - 1)) : 1;
            return row + here;
        };
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if constexpr (PER == 2) {
                const int first = next(), second = next();
                w[i] = (2 * i < valid ? panel[first].bits : 0) | (2 * i + 1 < valid ? uint32_t(panel[second].bits) : 0) << 16;
            } else {
                const int here = next();
                w[i] = i < valid ? to_tf32(panel[here]) : 0;
            }
    }
}

template <class E> struct OnMatrixUnit {                     // tf32, bfloat16, float16: 16 slots x EIGHTS * 8 rows
    using T = E;
    static constexpr bool MATRIX = true;
    static constexpr int STEP = weight_step(Arithmetic::tf32).slots, BLOCKS = 2;

    template <int EIGHTS, bool UNIT, class Row>
    static __device__ __forceinline__ void task(float* sums, bool first, const Panel<T>& x, const int2* slots, const T* dy,
                                                Row row, int pixels, const WeightArgs& a) {
        constexpr int RUN = sizeof(T) == 2 ? 16 : 8;
        const int lane = threadIdx.x % 32, quad = lane & 3;
        const int slot[2] = {x.row(slots[lane >> 2].x), x.row(slots[(lane >> 2) + 8].x)};
        float sum[EIGHTS][4];
        auto at = [&](int e, int i) { return sums + ((lane >> 2) + i * 8) * a.rows + e * 8 + 2 * quad; };
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[e][i] = first ? 0.f : at(e, i / 2)[i % 2];
        int from[EIGHTS];
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e) from[e] = row(e * 8 + (lane >> 2));
#pragma unroll 1
        for (int p = quad * RUN; p - quad * RUN < pixels; p += 4 * RUN) {
            uint32_t f[2][8];
            load_run<T, UNIT>(f[0], x.data, slot[0], p, pixels, a.V, a.stride);
            load_run<T, UNIT>(f[1], x.data, slot[1], p, pixels, a.V, a.stride);
#pragma unroll
            for (int e = 0; e < EIGHTS; ++e) {
                uint32_t g[8];
                load_run<T, true>(g, dy, from[e], p, pixels, a.V, 1);
#pragma unroll
                for (int j = 0; j < 4; ++j) {                           // the order of pixels along K is ours
                    const uint32_t m[4] = {f[0][2 * j], f[1][2 * j], f[0][2 * j + 1], f[1][2 * j + 1]};
                    const uint32_t b[2] = {g[2 * j], g[2 * j + 1]};
                    mma(T{}, sum[e], m, b);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
            for (int i = 0; i < 4; ++i) at(e, i / 2)[i % 2] = sum[e][i];
    }
};

// Add up 2 * HALF sums over the lanes: in every round a lane keeps one half of them and gives the other away, so that lane i
// ends with sums 2 i and 2 i + 1.
template <int HALF> __device__ __forceinline__ void over_lanes(float (&sum)[64], int lane) {
    const bool upper = lane & HALF / 2;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float given = __shfl_xor_sync(~0u, upper ? sum[i] : sum[i + HALF], HALF / 2);
        sum[i] = (upper ? sum[i + HALF] : sum[i]) + given;
    }
    if constexpr (HALF > 2) over_lanes<HALF / 2>(sum, lane);
}

struct InFloat32 {                                                      // IEEE: a lane owns pixels, 8 slots x 8 rows at a time
    using T = float;
    static constexpr bool MATRIX = false;
    static constexpr int STEP = weight_step(Arithmetic::float32).slots;
    static constexpr int BLOCKS = 1;                                    // 64 sums a lane, and what they need: no room for two

    template <int EIGHTS, bool UNIT, class Row>
    static __device__ __forceinline__ void task(float* sums, bool first, const Panel<T>& x, const int2* slots, const T* dy,
                                                Row row, int pixels, const WeightArgs& a) {
        const int lane = threadIdx.x % 32;
        float sum[64] = {};
        int slot[8], from[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) slot[i] = x.row(__ldg(&slots[i].x)), from[i] = row(i);
#pragma unroll 1
        for (int p = lane; p < pixels; p += 32) {
            const int at = UNIT ? p : p + p / a.V * a.V * (a.stride - 1);
            float g[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) g[i] = dy[from[i] + p];
#pragma unroll
            for (int s = 0; s < 8; ++s) {
                const float value = x.data[slot[s] + at];
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[s * 8 + i] += value * g[i];
            }
        }
        over_lanes<32>(sum, lane);
        float* to = sums + lane / 4 * a.rows + lane % 4 * 2;            // sums 2 * lane and 2 * lane + 1 of slot, row
        to[0] = first ? sum[0] : to[0] + sum[0], to[1] = first ? sum[1] : to[1] + sum[1];
    }
};

// sums[c][v] of the staged rows c over their frames, added to what the thread's earlier tiles left there.
template <class T, class Row>
__device__ __forceinline__ void add_rows(float* sums, bool first, const T* dy, Row row, int rows, int frames, int V) {
    for (int c = threadIdx.x / 32; c < rows; c += WARPS)
        for (int v = threadIdx.x % 32; v < V; v += 32) {
            float sum[4] = {};                                          // four short sums lose less than a long one
            const T* of_joint = dy + row(c) + v;
            int f = 0;
            for (; f + 4 <= frames; f += 4)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] += to_float(of_joint[(f + i) * V]);
            for (; f < frames; ++f) sum[0] += to_float(of_joint[f * V]);
            const float all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            sums[c * V + v] = first ? all : sums[c * V + v] + all;
        }
}

template <class Math, int EIGHTS, Kind KIND>
__global__ void __launch_bounds__(THREADS, Math::BLOCKS) weight_gradient_kernel(WeightArgs a) {
    using T = typename Math::T;
    constexpr bool UNIT = KIND != Kind::strided, GRAPH = KIND == Kind::graph;
    SHARED_MEMORY(memory);
    const int warp = threadIdx.x / 32, pitch = a.tile.pitch, dy_pitch = a.tile.row_pitch;
    const int x_pitch = GRAPH ? a.tile.row_pitch : pitch;
    T* panel = reinterpret_cast<T*>(memory);
    T* staged = GRAPH ? panel + rounded((a.tile.zero_row + 1) * pitch + SLACK, Panel<T>::PIECE) : panel;
    T* graph = staged + a.tile.chunk_channels * x_pitch;
    T* panel_dy = GRAPH ? graph + a.graph.K * joints(a.V) * a.tile.adjacency_pitch
                        : panel + (a.tile.zero_row + 1) * pitch + SLACK;
    const int group0 = blockIdx.y * a.tile.groups_per_slice;
    const int group_end = group0 + a.tile.groups_per_slice < a.groups ? group0 + a.tile.groups_per_slice : a.groups;
    auto first_row = [&](int group) { return group / a.groups_per_phase * a.targets + group % a.groups_per_phase * a.rows; };
    const int row0 = first_row(group0), row_last = first_row(group_end - 1);
    const int in_phase = a.targets - (group_end - 1) % a.groups_per_phase * a.rows;
    const int rows = row_last - row0 + (in_phase < a.rows ? in_phase : a.rows);
    float* partial = a.partial + blockIdx.x * a.share;
    const int64_t tile0 = blockIdx.x * a.tiles / gridDim.x, tile_end = (blockIdx.x + 1) * a.tiles / gridDim.x;
    for (int64_t tile = tile0; tile < tile_end; ++tile) {
        const int n = int(tile / a.tile.tiles), t0 = int(tile % a.tile.tiles) * a.tile.frames;
        const int frames = t0 + a.tile.frames < a.frames ? a.tile.frames : a.frames - t0, pixels = frames * a.V;
        const int64_t start_dy = a.dy.offset + n * a.dy.batch + row0 * a.dy.channel, origin_dy = start_dy + int64_t(t0) * a.V;
        auto row_at = [&](int c) { return c * dy_pitch + int((origin_dy + c * a.dy.channel) & (Panel<T>::PIECE - 1)); };
        for (int chunk = 0; chunk < a.tile.chunks; ++chunk) {
            const int c0 = chunk * a.tile.chunk_channels;
            const int channels = c0 + a.tile.chunk_channels < a.sources ? a.tile.chunk_channels : a.sources - c0;
            const int64_t start = a.x.offset + n * a.x.batch + c0 * a.x.channel;
            const int64_t origin = start + int64_t(t0 * a.stride + a.first_frame) * a.V;
            const int lead = int(origin & (Panel<T>::PIECE - 1));
            __syncthreads();
            if (GRAPH && chunk == 0 && (tile == tile0 || (a.graph.from.batch && tile % a.tile.tiles == 0)))
                load_adjacency<Math>(graph, a.graph, a.tile.adjacency_pitch, n);
            stage(staged, x_pitch, a.x, start, origin, channels);
            if (chunk == 0) stage(panel_dy, dy_pitch, a.dy, start_dy, origin_dy, rows);
            for (int i = threadIdx.x; i < pitch; i += THREADS) panel[a.tile.zero_row * pitch + i] = T{};
            cp_async_wait_all();
            clear_before(staged, x_pitch, a.x, start, origin, channels);
            __syncthreads();
            if (GRAPH) {
                multiply<Math>(panel, staged, graph, a.graph, a.tile, chunk, frames, lead, a.x.channel);
                __syncthreads();
            }
            if (a.dy_sums && chunk == 0)
                add_rows(a.dy_sums + blockIdx.x * a.dy_share + row0 * a.V, tile == tile0, panel_dy, row_at, rows, frames, a.V);
            const Panel<T> x = {panel, GRAPH ? 0 : lead};
            int turn = 0;                                               // the next task; tasks are dealt to the warps
            for (int group = group0; group < group_end; ++group) {
                const int* starts = a.starts + group * (a.tile.chunks + 1) + chunk;
                const int begin = __ldg(starts), parts = a.rows / (8 * EIGHTS);
                const int tasks = (__ldg(starts + 1) - begin) / Math::STEP * parts;
                for (int job = (warp - turn) & (WARPS - 1); job < tasks; job += WARPS) {
                    const int o = job % parts * 8 * EIGHTS, s = begin + job / parts * Math::STEP;
                    auto row = [&](int r) {                             // past the last: its twin, whose sums nobody reads
                        const int wanted = first_row(group) - row0 + o + r;
                        return row_at(wanted < rows ? wanted : rows - 1);
                    };
                    Math::template task<EIGHTS, UNIT>(partial + int64_t(s) * a.rows + o, tile == tile0, x, a.slots + s,
                                                      panel_dy, row, pixels, a);
                }
                turn += tasks;
            }
        }
    }
}

struct SumArgs {
    const float *partial, *partial_of_dy;
    float* dy_sums;
    const int* where;
    const void* values;
    const uint8_t* masked;
    const float* scale;
    void* dw;
    int64_t share, count, dy_share;
    int shares, block_size;
};
// The second pass: of 32 weights, or sums of dy, each warp adds every eighth share, and the first adds those sums up in order
// and the lasso's gradient.
template <class T> __global__ void __launch_bounds__(THREADS) sum_shares(SumArgs a) {
    SHARED_MEMORY(memory);
    float* sums = reinterpret_cast<float*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t i = int64_t(blockIdx.x) * 32 + lane, of_dy = i - a.count;
    const bool weight = of_dy < 0;
    const float* from = weight ? a.partial : a.partial_of_dy;
    const int64_t step = weight ? a.share : a.dy_share, at = weight ? a.where[i] : of_dy < a.dy_share ? of_dy : -1;
    float sum = 0.f;
    if (at >= 0)                                                        // else past a ragged edge: stored, and always zero
        for (int s = warp; s < a.shares; s += WARPS) sum += from[s * step + at];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp || of_dy >= a.dy_share) return;
    for (int w = 1; w < WARPS; ++w) sum += sums[w * 32 + lane];
    if (!weight) {
        a.dy_sums[of_dy] = sum;
        return;
    }
    if (a.masked && a.masked[i / a.block_size]) sum += *a.scale * to_float(static_cast<const T*>(a.values)[i]);
    to_storage(static_cast<T*>(a.dw) + i, sum);
}

template <class Math, int EIGHTS> const char* launch(const WeightArgs& a, dim3 grid, void* stream) {
    const Kind kind = a.graph.live ? Kind::graph : a.stride == 1 ? Kind::unit : Kind::strided;
    if (kind == Kind::graph)
        return LAUNCH((weight_gradient_kernel<Math, EIGHTS, Kind::graph>), grid, THREADS, a.tile.bytes, stream, a);
    return kind == Kind::unit
               ? LAUNCH((weight_gradient_kernel<Math, EIGHTS, Kind::unit>), grid, THREADS, a.tile.bytes, stream, a)
               : LAUNCH((weight_gradient_kernel<Math, EIGHTS, Kind::strided>), grid, THREADS, a.tile.bytes, stream, a);
}
template <class Math> const char* launch(const WeightArgs& a, dim3 grid, void* stream) {
    if constexpr (sizeof(typename Math::T) == 4)
        return a.rows > 8 ? launch<Math, 2>(a, grid, stream) : launch<Math, 1>(a, grid, stream);
    else
        return a.rows == 32 ? launch<Math, 4>(a, grid, stream)
             : a.rows == 16 ? launch<Math, 2>(a, grid, stream) : launch<Math, 1>(a, grid, stream);
}

}  // namespace

const char* weight_gradient(const Gather& g, const Adjacency& adjacency, const Tile& tile, Planes dy, Lasso lasso, void* dw,
                            float* dy_sums, void* scratch, void* stream) {
    const int step = weight_step(g.arithmetic).slots, element = unit(g.arithmetic).element;
    if (tile.reason) return tile.reason;
    if (reinterpret_cast<uintptr_t>(scratch) % 16) return "the scratch must be aligned to 16 bytes";
    const int64_t count = int64_t(g.blocks) * g.sb * g.tb;
    if (count == 0) return nullptr;
    const Plan plan = place_plan(g, tile.chunks, step, true, scratch);
    if (const char* error = make_plan(g, tile, step, plan, stream)) return error;
    float* partial = reinterpret_cast<float*>(static_cast<char*>(scratch) + plan_bytes(g, tile.chunks, step, true));
    const Rows x = rows_of(g.x, element, g.source_frames, g.V), rows_dy = rows_of(dy, element, g.frames, g.V);
    const int64_t share = floats_of_share(g, tile.chunks);
    float* partial_of_dy = dy_sums ? partial + tile.splits * share : nullptr;
    const int64_t tiles = int64_t(g.N) * tile.tiles;
    const WeightArgs a{x, rows_dy, plan.slots, plan.starts, partial, partial_of_dy, share, floats_of_dy(g), tiles,
                       {adjacency, plan.live, plan.live_starts, g.K, g.V}, g.source_rows(), g.frames, g.V, g.stride,
                       g.groups(), g.groups_per_phase(), g.targets, g.rows, reach(g).first, tile};
    const dim3 grid(unsigned(tile.splits), unsigned(tile.slices));
    const char* error = nullptr;
    if (a.tiles && g.V) switch (g.arithmetic) {
        case Arithmetic::float32: error = launch<InFloat32, 1>(a, grid, stream); break;
        case Arithmetic::tf32: error = launch<OnMatrixUnit<float>>(a, grid, stream); break;
        case Arithmetic::bfloat16: error = launch<OnMatrixUnit<bf16>>(a, grid, stream); break;
        case Arithmetic::float16: error = launch<OnMatrixUnit<f16>>(a, grid, stream); break;
    }
    if (error) return error;
    const SumArgs s{partial, partial_of_dy, dy_sums, plan.where, g.values, lasso.masked, lasso.scale, dw, a.share, count,
                    dy_sums ? floats_of_dy(g) : 0, a.tiles && g.V ? tile.splits : 0, g.sb * g.tb};
    const dim3 blocks(unsigned((count + s.dy_share + 31) / 32));
    const int64_t bytes = THREADS * sizeof(float);
    if (element == 4) return LAUNCH((sum_shares<float>), blocks, THREADS, bytes, stream, s);
    return g.arithmetic == Arithmetic::bfloat16 ? LAUNCH((sum_shares<bf16>), blocks, THREADS, bytes, stream, s)
                                                : LAUNCH((sum_shares<f16>), blocks, THREADS, bytes, stream, s);
}

Tile temporal_conv_weight_gradient_tile(const TemporalConv& op, const Device& device) {
    return choose_weight_tile(in_weight_groups(forward_of(op)), device);
}
int64_t temporal_conv_weight_gradient_scratch(const TemporalConv& op, const Tile& tile) {
    return weight_gradient_bytes(in_weight_groups(forward_of(op)), tile);
}
const char* temporal_conv_weight_gradient(const TemporalConv& op, const Tile& tile, const Device& device, Planes x, Planes dy,
                                          const void* values, Lasso lasso, void* dw, float* dy_sums, void* scratch,
                                          void* stream) {
    if (const char* error = use_device(device.index)) return error;
    Gather g = in_weight_groups(forward_of(op));
    g.x = x, g.values = values;
    return weight_gradient(g, {}, tile, dy, lasso, dw, dy_sums, scratch, stream);
}

}  // namespace sparse_stgcn::cuda
