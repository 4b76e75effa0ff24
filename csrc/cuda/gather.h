// What the products share: a sum over live blocks in which every target channel gathers rows of a source, and how it is
// planned. One description serves forward passes and input gradients; the weight gradient uses the forward's plan.
#pragma once
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
    const int32_t *ptr, *perm, *source, *tap;           // blocks ptr[q]..ptr[q+1]-1 of target block q; perm null: as stored
    Planes x;
    const void* values;
    Epilogue epilogue;
    void* y;

    // Channels of a target group: vector and odd blocks run on groups of 8 that cover them.
    int rows() const { return tb % 32 == 0 ? 32 : tb % 16 == 0 ? 16 : 8; }
    int groups_per_phase() const { return (targets + rows() - 1) / rows(); }
    int groups() const { return phases * groups_per_phase(); }
    int source_rows() const { return rule == Rule::stack ? sources * K : sources; }
    int groups_per_block() const { return tb % rows() == 0 ? tb / rows() : (tb + rows() - 2) / rows() + 1; }
    int64_t live_slots() const { return int64_t(blocks) * sb * groups_per_block(); }    // at most, in one phase
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
