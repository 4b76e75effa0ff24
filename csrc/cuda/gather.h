// What the products share: a sum over live blocks in which every target channel gathers rows of a source, and how it is
// planned. One description serves forward passes and input gradients; the weight gradient uses the forward's plan.
#pragma once
#include <cmath>

#include "device.h"
#include "ops.h"

namespace sparse_stgcn::cuda {

constexpr int WARPS = 8, THREADS = 32 * WARPS, MAX_CHUNKS = 16, MAX_ROWS = 16384;

// Which row of the source a block's tap makes a target read.
enum class Rule {
    shift,      // the row of its channel, (tap - halo) * dilation frames later
    phase,      // targets are the frames phase, phase + stride, ...; of the taps, those that meet a frame of the source
    split,      // every tap has targets of its own: phase = tap
    stack,      // the source has rows for every tap: tap * sources + channel
    adjacency,  // the same, but as rows of a panel that is made of the source: channel * K + tap
};

struct Gather {
    Arithmetic arithmetic;
    Rule rule;
    int N, V, K, sources, targets, sb, tb, blocks;      // channels in all and of one block
    int source_frames, frames;                          // of the source; of the targets, of one phase
    int stride, dilation, phases;                       // stride: of the source's frames per target frame
    int out_channels, out_frames;                       // of y as it lies in memory
    int rows;                                           // channels of a target group: 8, 16 or 32
    const int32_t *ptr, *perm, *source, *tap;           // blocks ptr[q]..ptr[q+1]-1 of target block q; perm null: as stored
    Planes x;
    const void* values;
    Epilogue epilogue;
    void* y;

    int groups_per_phase() const { return (targets + rows - 1) / rows; }
    int groups() const { return phases * groups_per_phase(); }
    int source_rows() const { return rule == Rule::stack ? sources * K : sources; }
    int groups_per_block() const {                      // that one block is in, at most
        return tb % rows == 0 ? tb / rows : rows % tb == 0 ? 1 : (tb + rows - 2) / rows + 1;
    }
    int units() const { return (sources + sb - 1) / sb * K; }    // what a block's column may be: source block and tap
    int64_t most_slots() const {                        // of all groups of a phase
        const int64_t of_blocks = int64_t(blocks) * sb * groups_per_block();
        const int64_t of_groups = int64_t(groups_per_phase()) * units() * sb;
        return of_blocks < of_groups ? of_blocks : of_groups;
    }
    // Slots that a group of so many channels reads in a phase, where blocks lie at random: the union of its blocks' rows.
    double union_of(int channels) const {
        const int there = (targets + tb - 1) / tb, met = (channels + tb - 1) / tb;
        const double all = double(units()) * there, dead = all > 0 ? 1 - blocks / all : 1;
        return units() * sb * (1 - std::pow(dead > 0 ? dead : 0, met < there ? met : there));
    }
};

__host__ __device__ constexpr int rounded(int n, int to) { return (n + to - 1) / to * to; }

// Frames that taps reach before and after a target frame's own.
struct Reach { int first, last; };
inline Reach reach(const Gather& g) {
    const int halo = (g.K - 1) / 2;
    if (g.rule == Rule::shift) return {-halo * g.dilation, (g.K - 1 - halo) * g.dilation};
    if (g.rule != Rule::phase) return {0, 0};
    Reach r{0, 0};
    for (int phase = 0; phase < g.phases; ++phase)
        for (int k = 0; k < g.K; ++k) {
            const int at = phase - (k - halo) * g.dilation;
            if (at % g.phases) continue;
            r.first = at / g.phases < r.first ? at / g.phases : r.first;
            r.last = at / g.phases > r.last ? at / g.phases : r.last;
        }
    return r;
}

// Gather::x seen from an address that is a multiple of 16 bytes, `offset` elements before its first.
struct Aligned {
    const void* data;
    int64_t offset;
};
inline Aligned aligned(const void* data, int element) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    return {reinterpret_cast<const void*>(address & ~uintptr_t(15)), int64_t(address % 16 / element)};
}

// The plan of a gather, in its scratch: for target group g and chunk c of source rows the slots starts[g][c] ..
// starts[g][c+1]-1, each (place in the panel << 3 | class, position of its weights in `packed` or -1), with weights
// (slots, rows of a group). Groups are filled to whole steps with slots that point at the row of zeros.
struct Plan {
    int2* slots;
    int* starts;
    void* packed;                                       // null for the weight gradient, which has `where` instead: the
    int* where;                                         // position (slot, row of the group) of every value
    int *live, *live_starts;                            // Rule::adjacency: channels of chunk and subset that a block reads
};
int64_t slot_count(const Gather& g, int chunks, int step);
int64_t plan_bytes(const Gather& g, int chunks, int step, bool where);
Plan place_plan(const Gather& g, int chunks, int step, bool where, void* scratch);
const char* make_plan(const Gather& g, const Tile& tile, int step, const Plan& plan, void* stream);
const char* plan_limits(const Gather& g);
Gather forward_of(const TemporalConv& op);

}  // namespace sparse_stgcn::cuda
