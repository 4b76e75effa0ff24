// The kernel of every gather.
//
//            gathered (row, tap) slots = K                    A block of 8 warps takes one sample and a tile of frames.
//           +----------------------------+                    It stages the source's panel (a chunk of rows, the
//   pixels  | rows of the panel in       |   x  slots         frames and their halo) in shared memory by 16-byte
//     = M   | shared memory, shifted by  |      x rows        copies, then each warp gathers, for its pixels and its
//           | the tap, read in place     |        = N         groups of target channels, the live rows from it.
//           +----------------------------+                    Sums stay in registers for the whole reduction.
//
// For graph_conv the panel that is gathered from is made of the staged one first (adjacency_panel.h). Dead blocks are never
// read; padding slots point at a row of zeros, so that 0 * NaN never enters. Fused at the store: the epilogue.
// Contract: sums in float32, in an order that depends on the pattern and the shapes alone; tf32 and 16-bit factors are
// rounded once; the result is rounded once.
#pragma once
#include "adjacency_panel.h"

namespace sparse_stgcn::cuda {

struct GatherArgs {
    Rows x;
    const void* values;
    const int2* slots;
    const int* starts;
    Output out;
    AdjacencyPanel graph;
    int sources, frames, V, stride, groups, groups_per_phase, first_frame;
    Tile tile;
};

template <class Math, Kind KIND>
__global__ void __launch_bounds__(THREADS, 2) gather_kernel(GatherArgs a) {
    using T = typename Math::T;
    constexpr bool UNIT = KIND != Kind::strided, GRAPH = KIND == Kind::graph;
    constexpr int PIXELS = 16 * Math::MT, EIGHTS = sizeof(typename Math::Sums) / sizeof(float[Math::MT][4]);
    constexpr int LD = buffer_pitch(PIXELS), BO = EIGHTS * 8 / Math::GROUPS;
    SHARED_MEMORY(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* buffer = reinterpret_cast<float*>(memory) + warp * 8 * LD;
    T* panel = reinterpret_cast<T*>(memory + buffer_bytes(PIXELS));
    T* staged = GRAPH ? panel + rounded((a.tile.zero_row + 1) * a.tile.pitch + 16, Panel<T>::PIECE) : panel;
    T* graph = staged + a.tile.chunk_channels * a.tile.row_pitch;
    const T* values = static_cast<const T*>(a.values);
    const int n = int(blockIdx.x / a.tile.tiles);
    const int t0 = int(blockIdx.x % a.tile.tiles) * a.tile.frames;
    const int frames = t0 + a.tile.frames < a.frames ? a.tile.frames : a.frames - t0, pixels = frames * a.V;
    const int mine = warp % a.tile.pixel_warps * PIXELS, group_warps = WARPS / a.tile.pixel_warps;

    int at[Math::RUN];                                                  // pixels past the tile are computed and dropped
#pragma unroll
    for (int j = 0; j < Math::RUN; ++j) {
        const int p = mine + Math::pixel(lane, j);
        at[j] = p < pixels ? (UNIT ? p : p + p / a.V * a.V * (a.stride - 1)) : 0;
        if (UNIT && j && Math::pixel(0, 1) == 1) at[j] = at[0] + j;
    }
    if (GRAPH) load_adjacency<Math>(graph, a.graph, a.tile.adjacency_pitch, n);
    for (int slice = blockIdx.y; slice < a.tile.slices; slice += gridDim.y) {
        const int group0 = (slice * group_warps + warp / a.tile.pixel_warps) * Math::GROUPS;
        typename Math::Sums sums = {};
        for (int chunk = 0; chunk < a.tile.chunks; ++chunk) {
            const int c0 = chunk * a.tile.chunk_channels;
            const int channels = c0 + a.tile.chunk_channels < a.sources ? a.tile.chunk_channels : a.sources - c0;
            const int64_t start = a.x.offset + n * a.x.batch + c0 * a.x.channel;
            const int64_t origin = start + int64_t(t0 * a.stride + a.first_frame) * a.V;
            const int lead = int(origin & (Panel<T>::PIECE - 1));
            if (a.tile.chunks > 1 || slice == int(blockIdx.y)) {        // one chunk: staged once for all slices
                __syncthreads();
                stage(staged, a.tile.row_pitch, a.x, start, origin, channels);
                for (int i = threadIdx.x; i < a.tile.pitch; i += THREADS) panel[a.tile.zero_row * a.tile.pitch + i] = T{};
                cp_async_wait_all();
                clear_before(staged, a.tile.row_pitch, a.x, start, origin, channels);
                __syncthreads();
                if (GRAPH) {
                    multiply<Math>(panel, staged, graph, a.graph, a.tile, chunk, frames, lead, a.x.channel);
                    __syncthreads();
                }
            }
            const Panel<T> p = {panel, GRAPH ? 0 : lead};
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
            if (const int group = group0 + e * 8 / BO; group < a.groups) {
                const int phase = a.out.split || a.out.interleave > 1 ? group / a.groups_per_phase : 0;
                const int row = (group - phase * a.groups_per_phase) * BO + e * 8 % BO;
                store<T, PIXELS>(buffer, a.out, n, phase, t0, mine, left, row);
            }
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

template <class Math, bool GRAPH> const char* launch_gather(const GatherArgs& a, dim3 grid, void* stream) {
    if constexpr (GRAPH) return LAUNCH((gather_kernel<Math, Kind::graph>), grid, THREADS, a.tile.bytes, stream, a);
    else if (a.stride == 1) return LAUNCH((gather_kernel<Math, Kind::unit>), grid, THREADS, a.tile.bytes, stream, a);
    else return LAUNCH((gather_kernel<Math, Kind::strided>), grid, THREADS, a.tile.bytes, stream, a);
}
template <int BO, bool GRAPH> const char* launch_gather(Arithmetic arithmetic, const GatherArgs& a, dim3 grid, void* stream) {
    switch (arithmetic) {
        case Arithmetic::float32: return launch_gather<Exact<BO>, GRAPH>(a, grid, stream);
        case Arithmetic::tf32: return launch_gather<Tf32<BO>, GRAPH>(a, grid, stream);
        case Arithmetic::bfloat16: return launch_gather<Half<bf16, BO>, GRAPH>(a, grid, stream);
        case Arithmetic::float16: return launch_gather<Half<f16, BO>, GRAPH>(a, grid, stream);
    }
    return "unknown arithmetic";
}

// The plan, and the gather itself.
template <bool GRAPH> const char* run_gather(const Gather& g, const Adjacency& adjacency, const Tile& tile, void* scratch,
                                             void* stream) {
    const Unit u = unit(g.arithmetic);
    const int64_t blocks = int64_t(g.N) * tile.tiles;
    if (tile.reason) return tile.reason;
    if (blocks == 0 || g.targets == 0 || g.V == 0) return nullptr;
    if (blocks > INT32_MAX) return "more than 2^31 tiles";
    if (reinterpret_cast<uintptr_t>(scratch) % 16) return "the scratch must be aligned to 16 bytes";
    const Plan plan = place_plan(g, tile.chunks, u.step, false, scratch);
    if (const char* error = make_plan(g, tile, u.step, plan, stream)) return error;
    const GatherArgs a{rows_of(g.x, u.element, g.source_frames, g.V), plan.packed, plan.slots, plan.starts,
                       {g.y, g.epilogue, g.V, g.targets, g.out_channels, g.out_frames, g.rule == Rule::phase ? g.phases : 1,
                        g.rule == Rule::split},
                       {adjacency, plan.live, plan.live_starts, g.K, g.V},
                       g.source_rows(), g.frames, g.V, g.stride, g.groups(), g.groups_per_phase(), reach(g).first, tile};
    const dim3 grid(unsigned(blocks), unsigned(tile.split));
    return g.rows == 8 ? launch_gather<8, GRAPH>(g.arithmetic, a, grid, stream)
         : g.rows == 16 ? launch_gather<16, GRAPH>(g.arithmetic, a, grid, stream)
                          : launch_gather<32, GRAPH>(g.arithmetic, a, grid, stream);
}
const char* gather(const Gather& g, const Tile& tile, void* scratch, void* stream);     // without an adjacency

}  // namespace sparse_stgcn::cuda
