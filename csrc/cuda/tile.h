// How a launch cuts its work: pure functions of sizes and of the device. Every candidate that fits is priced in estimated
// cycles per frame. The price only ranks: 24 bytes per cycle from L2 to an SM, the cycles of a step (ops.h), 1500 for a
// staging and the wait after it.
#pragma once
#include "gather.h"

namespace sparse_stgcn::cuda {

// What a warp holds in registers: `pixels` on the matrix unit's M side x `rows` target channels; `step` gathered rows at a
// time on its K side. `piece`: elements in 16 bytes.
struct Unit { int element, piece, step, pixels, rows; };
constexpr Unit unit(Arithmetic a) {
    return a == Arithmetic::float32 ? Unit{4, 4, 4, 64, 32}
         : a == Arithmetic::tf32 ? Unit{4, 4, 8, 32, 64} : Unit{2, 8, 16, 64, 32};
}

// Channels of a target group. A group reads the union of what its blocks read: the more blocks, the more of it is dead for one
// of them, but the fewer times a row is loaded. Blocks of 16 and 32 channels are groups by themselves, at least.
inline int choose_rows(const Gather& g, const Step& step, int most = 32) {
    int best = g.tb % 32 == 0 ? 32 : g.tb % 16 == 0 ? 16 : 8;
    double least = HUGE_VAL;
    for (int rows = best; rows <= most; rows *= 2) {
        const double steps = g.union_of(rows) / step.slots + 0.5;
        const double cost = (g.targets + rows - 1) / rows * steps * step.cycles(rows);
        if (cost < least) best = rows, least = cost;
    }
    return best;
}

inline Gather in_groups(Gather g) {
    g.rows = choose_rows(g, gather_step(g.arithmetic));
    return g;
}

// The epilogue's buffer: each warp turns 8 target channels at a time from its registers' order into memory's.
__host__ __device__ constexpr int buffer_pitch(int pixels) { return pixels + 4; }
__host__ __device__ constexpr int buffer_bytes(int pixels) { return WARPS * 8 * buffer_pitch(pixels) * 4; }

// The adjacency in shared memory: K x joints() rows of adjacency_pitch() elements, padded with zeros; the pitch gives the
// lanes of a fragment 32 different banks.
__host__ __device__ constexpr int joints(int V) { return (V + 15) / 16 * 16; }

inline Tile choose_tile(const Gather& g, const Device& device) {
    const Unit u = unit(g.arithmetic);
    const bool graph = g.rule == Rule::adjacency;
    const Reach far = reach(g);
    const int group_rows = u.rows / g.rows, groups = g.groups(), adjacency_pitch = joints(g.V) + (u.element == 2 ? 8 : 4);
    const int64_t samples = g.N > 0 ? g.N : 1;
    Tile best{};
    best.reason = plan_limits(g) ? plan_limits(g) : "a tile of one frame does not fit into shared memory";
    if (g.V > WARPS * u.pixels) best.reason = "a frame has more vertices than a block has pixels";
    if (plan_limits(g)) return best;
    double least = 0;
    const double steps = g.groups_per_phase() * g.union_of(g.rows) / u.step + groups;
    const Step step = gather_step(g.arithmetic);
    const double price = step.cycles(g.rows) * u.step / step.slots;
    for (int frames = 1; frames <= g.frames && frames * g.V <= WARPS * u.pixels; ++frames) {
        const int64_t staged = (int64_t(frames - 1) * g.stride + far.last - far.first + 1) * g.V;
        if (staged * u.element > device.shared_per_block) break;
        const int row_pitch = rounded(int(staged) + u.piece - 1, u.piece);
        // rows made by the adjacency product start a word later each, so that neighbours are in other banks
        const int pitch = graph ? rounded(frames * g.V, u.piece) + 4 / u.element : row_pitch;
        int pixel_warps = 1;
        while (pixel_warps * u.pixels < frames * g.V) pixel_warps *= 2;
        const int per_slice = group_rows * (WARPS / pixel_warps), slices = (groups + per_slice - 1) / per_slice;
        for (int chunks = 1, before = 0; chunks <= MAX_CHUNKS; ++chunks) {
            const int rows = g.source_rows(), chunk = (rows + chunks - 1) / chunks;
            if (chunk == before || (rows + chunk - 1) / chunk != chunks) continue;
            before = chunk;
            const int zero_row = graph ? chunk * g.K : chunk;
            // past the row of zeros: pixels that are computed and dropped read a little further
            int64_t bytes = rounded((zero_row + 1) * pitch + 16, u.piece) * int64_t(u.element) + buffer_bytes(u.pixels);
            if (graph) bytes += (int64_t(chunk) * row_pitch + int64_t(g.K) * joints(g.V) * adjacency_pitch) * u.element;
            if (bytes > device.shared_per_block) continue;
            const int stagings = chunks > 1 ? chunks * slices : 1;
            const bool pair = 2 * (bytes + 1024) <= device.shared_per_multiprocessor;
            double copy = double(rows) * row_pitch * u.element * (chunks > 1 ? slices : 1) / 24;
            if (graph) copy *= 3;
            const double cost = (copy + steps * pixel_warps * price + stagings * 1500.) * (pair ? 1 : 1.5) / frames;
            if (best.frames && cost >= least) continue;
            least = cost;
            const int tiles = (g.frames + frames - 1) / frames;
            int split = 1;                                       // too few blocks for the machine: share out the slices
            while (split < slices && samples * tiles * split < device.multiprocessors) ++split;
            best = Tile{nullptr, frames, tiles, chunk, chunks, pitch, zero_row, pixel_warps, slices, split, 0, 0,
                        row_pitch, adjacency_pitch, g.rows, bytes};
        }
    }
    return best;
}

}  // namespace sparse_stgcn::cuda
