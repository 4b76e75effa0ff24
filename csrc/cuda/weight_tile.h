// How the gradient of the weights is cut: as tile.h does it for a gather, and priced in the same cycles.
#pragma once
#include "tile.h"

namespace sparse_stgcn::cuda {

constexpr int SLACK = 32;                                               // elements that may be read, not used, past a panel
constexpr int64_t PARTIAL_BYTES = 64 << 20;                             // of all shares together, unless one is larger

// Rows that one task takes: on the matrix unit as many as registers hold, 32 of tf32 would spill.
inline int task_rows(Arithmetic a, int rows) {
    const int most = a == Arithmetic::float32 ? 8 : a == Arithmetic::tf32 ? 16 : 32;
    return rows < most ? rows : most;
}
inline Gather in_weight_groups(Gather g) {
    const int most = task_rows(g.arithmetic, 32);
    g.rows = choose_rows(g, weight_step(g.arithmetic), most);
    return g;
}

inline int64_t floats_of_dy(const Gather& g) { return int64_t(g.phases) * g.targets * g.V; }
inline int64_t floats_of_share(const Gather& g, int chunks) {           // of weights, without the sum of dy
    return slot_count(g, chunks, weight_step(g.arithmetic).slots) * g.rows;
}

inline Tile choose_weight_tile(const Gather& g, const Device& device) {
    const Unit u = unit(g.arithmetic);
    const Step step = weight_step(g.arithmetic);
    const Reach far = reach(g);
    const bool graph = g.rule == Rule::adjacency, exact = g.arithmetic == Arithmetic::float32;
    const int groups = g.groups(), rows = g.source_rows(), run = u.element == 2 ? 64 : 32;
    const int adjacency_pitch = joints(g.V) + (u.element == 2 ? 8 : 4), height = task_rows(g.arithmetic, g.rows);
    Tile best{};
    best.reason = plan_limits(g) ? plan_limits(g) : "a tile of one frame does not fit into shared memory";
    if (plan_limits(g)) return best;
    const double tasks = (g.groups_per_phase() * g.union_of(g.rows) / step.slots + 0.5 * groups) * g.rows / height;
    const double finish = exact ? 70 : height;                          // to read a task's sums and to write them
    double least = 0;
    for (int frames = 1; frames <= g.frames && frames * g.V <= 1024 + g.V; ++frames) {
        const int64_t staged = (int64_t(frames - 1) * g.stride + far.last - far.first + 1) * g.V;
        if (staged * u.element > device.shared_per_block) break;
        const int x_pitch = rounded(int(staged) + u.piece - 1, u.piece);
        const int dy_pitch = rounded(frames * g.V + u.piece - 1, u.piece);
        const int pitch = graph ? rounded(frames * g.V, u.piece) + 4 / u.element : x_pitch;
        const int tiles = (g.frames + frames - 1) / frames;
        const int64_t all = int64_t(g.N > 0 ? g.N : 1) * tiles;
        const double runs = (frames * g.V + run - 1) / run, work = tasks * (runs * step.cycles(height) + 3 * finish);
        for (int slices = 1; slices <= groups; slices *= 2)
            for (int chunks = 1, before = 0; chunks <= MAX_CHUNKS; ++chunks) {
                const int chunk = (rows + chunks - 1) / chunks, per_slice = (groups + slices - 1) / slices;
                if (chunk == before || (rows + chunk - 1) / chunk != chunks) continue;
                before = chunk;
                const int zero_row = graph ? chunk * g.K : chunk;
                int64_t elements = rounded((zero_row + 1) * pitch + SLACK, u.piece);
                if (graph) elements += int64_t(chunk) * x_pitch + int64_t(g.K) * joints(g.V) * adjacency_pitch;
                const int64_t bytes = (elements + int64_t(per_slice) * g.rows * dy_pitch + SLACK) * u.element;
                if (bytes > device.shared_per_block) continue;
                const int used = (groups + per_slice - 1) / per_slice;
                const int64_t share = floats_of_share(g, chunks) * 4;
                int64_t splits = (2 * device.multiprocessors + used - 1) / used;
                if (splits * share > PARTIAL_BYTES) splits = PARTIAL_BYTES / share ? PARTIAL_BYTES / share : 1;
                if (splits > all) splits = all;
                const bool pair = !exact && 2 * (bytes + 1024) <= device.shared_per_multiprocessor;
                const double idle = double(device.multiprocessors) / double(splits * used);     // too few blocks of threads
                const double x = double(rows) * x_pitch * used * (graph ? 3 : 1);
                const double copy = (x + double(groups) * g.rows * dy_pitch) * u.element / 24;
                const double each = (copy + work + double(used) * chunks * 1500) * (pair ? 1 : 1.5) * (idle > 1 ? idle : 1);
                const double cost = double(all) * each + 2. * double(splits * share) / 14;      // 14 bytes of memory per cycle
                if (best.frames && cost >= least) continue;
                least = cost;
                best = Tile{nullptr, frames, tiles, chunk, chunks, pitch, zero_row, 0, used, 0, per_slice, int(splits),
                            dy_pitch, adjacency_pitch, g.rows, bytes};
            }
    }
    return best;
}

inline int64_t weight_gradient_bytes(const Gather& g, const Tile& tile) {
    const int64_t share = floats_of_share(g, tile.chunks) + floats_of_dy(g);
    return plan_bytes(g, tile.chunks, weight_step(g.arithmetic).slots, true) + tile.splits * share * 4;
}

}  // namespace sparse_stgcn::cuda
