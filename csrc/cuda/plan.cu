// In which order a block reads its weights, worked out on the device, so that nothing about a pattern has to pass through
// the host. A group of target channels gathers the union of what its channels' blocks read: for blocks as high as the
// group that is a list of blocks, for lower ones, and for vectors seen from their single side, it is their cover.
//
// The lanes of a matrix unit read four slots at once. Where a slot starts modulo 16 bytes decides its banks in shared
// memory, and the order of the slots of a group is free: they are sorted by that class, stably, and dealt like cards, so
// that four slots read together are a quarter of the classes apart. Every order here is counted, hence no order of threads
// matters. One block of threads per group; its threads share out the keys (chunk, class) and the slots.
#include "gather.h"

namespace sparse_stgcn::cuda {
namespace {

constexpr int KEYS = MAX_CHUNKS * 8;

struct PlanArgs {
    const int32_t *ptr, *perm, *source, *tap;
    const void* values;
    Plan plan;
    Rule rule;
    int64_t channel_stride, most_slots;
    int tb, sb, targets, sources, K, V, rows, phases, groups_per_phase, dilation, first_frame;
    int chunk, chunks, pitch, zero_row, step, piece, element, deal;
};

// Frames from a target's to those that block b reads, counted from the first that is staged; -1 where it reads none.
__device__ __forceinline__ int shift_of(const PlanArgs& a, int phase, int tap) {
    const int at = (tap - (a.K - 1) / 2) * a.dilation;
    if (a.rule == Rule::shift) return at - a.first_frame;
    if (a.rule == Rule::phase) return (phase - at) % a.phases ? -1 : (phase - at) / a.phases - a.first_frame;
    return a.rule == Rule::split && tap != phase ? -1 : 0;
}
// Row of the source, before chunks, and the chunk it belongs to.
struct Row { int chunk, local; };
__device__ __forceinline__ Row row_of(const PlanArgs& a, int channel, int tap) {
    if (a.rule == Rule::adjacency) return {channel / a.chunk, channel % a.chunk * a.K + tap};
    const int row = a.rule == Rule::stack ? tap * a.sources + channel : channel;
    return {row / a.chunk, row % a.chunk};
}

__global__ void __launch_bounds__(KEYS) plan_slots(PlanArgs a) {
    SHARED_MEMORY(memory);
    const int source_blocks = (a.sources + a.sb - 1) / a.sb, units = source_blocks * a.K, words = (units + 31) / 32;
    int* before = reinterpret_cast<int*>(memory);                    // slots of the groups before this one
    int *bits = before + 4, *rank = bits + words, *count = rank + words + 1, *from = count + KEYS, *start = from + KEYS;
    uint16_t* list = reinterpret_cast<uint16_t*>(start + MAX_CHUNKS + 1);  // live (source block, tap), in their order
    uint16_t* at = list + units;                                     // of every live slot: its place in the group's order
    uint8_t* key = reinterpret_cast<uint8_t*>(at + units * a.sb);
    const int id = blockIdx.x, phase = id / a.groups_per_phase, group = id % a.groups_per_phase, thread = threadIdx.x;
    const int last_block = (a.targets - 1) / a.tb;
    auto first = [&](int g) { return a.ptr[g * a.rows / a.tb]; };
    auto end = [&](int g) {
        const int q = ((g + 1) * a.rows - 1) / a.tb;
        return a.ptr[(q < last_block ? q : last_block) + 1];
    };
    for (int i = thread; i < words + 4; i += KEYS) before[i] = 0;
    __syncthreads();
    for (int g = thread; g < group; g += KEYS) {
        const int blocks = end(g) - first(g);
        atomicAdd(before, (blocks < units ? blocks : units) * a.sb);
    }
    for (int j = first(group) + thread; j < end(group); j += KEYS) {
        const int tap = a.tap[a.perm ? a.perm[j] : j], unit = a.source[j] * a.K + tap;
        if (shift_of(a, phase, tap) >= 0) atomicOr(bits + unit / 32, int(1u << unit % 32));
    }
    __syncthreads();
    if (thread == 0) {
        rank[0] = 0;
        for (int w = 0; w < words; ++w) rank[w + 1] = rank[w] + __popc(bits[w]);
    }
    __syncthreads();
    auto place_of = [&](int u) { return rank[u / 32] + __popc(bits[u / 32] & ((1u << u % 32) - 1)); };
    for (int u = thread; u < units; u += KEYS)
        if (uint32_t(bits[u / 32]) >> u % 32 & 1) list[place_of(u)] = uint16_t(u);
    __syncthreads();
    const int n = rank[words] * a.sb;
    auto channel_of = [&](int e) { return list[e / a.sb] / a.K * a.sb + e % a.sb; };
    for (int e = thread; e < n; e += KEYS) {
        const int channel = channel_of(e), tap = list[e / a.sb] % a.K;
        const Row row = row_of(a, channel, tap);
        const int64_t in_memory = (int64_t(row.chunk) * a.chunk + row.local) * a.channel_stride;
        const int64_t shift = int64_t(shift_of(a, phase, tap)) * a.V;
        const int64_t place = (a.rule == Rule::adjacency ? row.local * a.pitch : in_memory) + shift;
        key[e] = channel < a.sources ? uint8_t(row.chunk * 8 + int(place % a.piece)) : 255;
    }
    __syncthreads();
    const int keys = a.chunks * 8, parts = KEYS / keys;              // a thread counts one key in one part of the slots
    const int my_key = thread < keys * parts ? thread % keys : -1, part = thread / keys;
    const int part_begin = int(int64_t(n) * part / parts), part_end = my_key < 0 ? 0 : int(int64_t(n) * (part + 1) / parts);
    int mine = 0;
    for (int e = part_begin; e < part_end; ++e) mine += key[e] == my_key;
    count[thread] = mine;
    __syncthreads();
    if (thread == 0) {
        const int64_t slots = phase * a.most_slots + *before;
        start[0] = int((slots + a.step - 1) / a.step * a.step) + id * (a.chunks + 1) * a.step;
        for (int c = 0; c < a.chunks; ++c) {
            int total = 0;
            for (int i = c * 8; i < c * 8 + 8; ++i)
                for (int p = 0; p < parts; ++p) from[p * keys + i] = total, total += count[p * keys + i];
            start[c + 1] = start[c] + (total + a.step - 1) / a.step * a.step;
        }
    }
    __syncthreads();
    int next = my_key < 0 ? 0 : from[thread];
    for (int e = part_begin; e < part_end; ++e)
        if (key[e] == my_key) {
            const int chunk = my_key / 8, quads = (start[chunk + 1] - start[chunk]) / 4, each = a.step / 4, quad = next % quads;
            const int dealt = quad / each * a.step + next / quads * each + quad % each;
            at[e] = uint16_t(start[chunk] - start[0] + (a.deal ? dealt : next));
            ++next;
        }
    int* starts = a.plan.starts + id * (a.chunks + 1);
    for (int c = thread; c <= a.chunks; c += KEYS) starts[c] = start[c];
    uint16_t* packed16 = static_cast<uint16_t*>(a.plan.packed);
    uint32_t* packed32 = static_cast<uint32_t*>(a.plan.packed);
    for (int s = start[0] + thread; s < start[a.chunks]; s += KEYS) a.plan.slots[s] = int2{a.zero_row * a.pitch << 3, -1};
    for (int i = start[0] * a.rows + thread; a.plan.packed && i < start[a.chunks] * a.rows; i += KEYS)
        if (a.element == 2) packed16[i] = 0;
        else packed32[i] = 0;
    __syncthreads();
    for (int e = thread; e < n; e += KEYS) {
        if (key[e] == 255) continue;
        const int channel = channel_of(e), tap = list[e / a.sb] % a.K, s = start[0] + at[e];
        const Row row = row_of(a, channel, tap);
        const int class_ = a.rule == Rule::adjacency ? 0 : int(row.local * a.channel_stride & 7);
        a.plan.slots[s] = int2{(row.local * a.pitch + shift_of(a, phase, tap) * a.V) << 3 | class_, s * a.rows};
    }
    const int size = a.tb * a.sb, f = first(group), blocks = end(group) - f;
    for (int i = thread; i < blocks * size; i += KEYS) {
        const int j = f + i / size, block = a.perm ? a.perm[j] : j, tap = a.tap[block], unit = a.source[j] * a.K + tap;
        const int s = i % size / a.tb, t = i % a.tb;                // source and target channel within the block
        int q = group * a.rows / a.tb;                              // target block: the group touches few
        while (j >= a.ptr[q + 1]) ++q;
        const int column = q * a.tb + t - group * a.rows, target = q * a.tb + t;
        if (shift_of(a, phase, tap) < 0 || column < 0 || column >= a.rows) continue;
        const int value = a.perm ? block * size + t * a.sb + s : block * size + s * a.tb + t;
        const bool inside = target < a.targets && a.source[j] * a.sb + s < a.sources;
        const int e = place_of(unit) * a.sb + s;
        const int position = inside ? (start[0] + at[e]) * a.rows + column : -1;
        if (a.plan.where) a.plan.where[value] = position;
        else if (inside && a.element == 2) packed16[position] = static_cast<const uint16_t*>(a.values)[value];
        else if (inside) packed32[position] = static_cast<const uint32_t*>(a.values)[value];
    }
}

// Rule::adjacency: which rows (channel, subset) any block reads; the others are never made. One block of threads.
__global__ void __launch_bounds__(THREADS) plan_live_rows(PlanArgs a, int blocks) {
    SHARED_MEMORY(memory);
    const int bits_of_all = a.chunks * a.K * a.chunk, words = (bits_of_all + 31) / 32;
    int *bits = reinterpret_cast<int*>(memory), *rank = bits + words;
    for (int w = threadIdx.x; w < words; w += THREADS) bits[w] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < blocks * a.sb; i += THREADS) {
        const int j = i / a.sb, tap = a.tap[a.perm ? a.perm[j] : j], channel = a.source[j] * a.sb + i % a.sb;
        const int bit = (channel / a.chunk * a.K + tap) * a.chunk + channel % a.chunk;
        if (channel < a.sources) atomicOr(bits + bit / 32, int(1u << bit % 32));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        rank[0] = 0;
        for (int w = 0; w < words; ++w) rank[w + 1] = rank[w] + __popc(bits[w]);
    }
    __syncthreads();
    auto place = [&](int bit) { return rank[bit / 32] + (bit % 32 ? __popc(bits[bit / 32] & ((1u << bit % 32) - 1)) : 0); };
    for (int i = threadIdx.x; i <= a.chunks * a.K; i += THREADS) a.plan.live_starts[i] = place(i * a.chunk);
    for (int i = threadIdx.x; i < bits_of_all; i += THREADS)
        if (uint32_t(bits[i / 32]) >> i % 32 & 1) a.plan.live[place(i)] = i % a.chunk;
}

int64_t aligned_16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

int64_t slot_count(const Gather& g, int chunks, int step) {
    return (g.phases * g.most_slots() + step - 1) / step * step + int64_t(g.groups()) * (chunks + 1) * step;
}

const char* plan_limits(const Gather& g) {
    if (int64_t(g.source_rows()) * g.K > MAX_ROWS || int64_t(rounded(g.sources, g.sb)) * g.K > MAX_ROWS)
        return "a group reads more than 16384 rows";
    const int64_t slots = g.phases * g.most_slots() + int64_t(g.groups()) * (MAX_CHUNKS + 1) * 16;
    if (slots * g.rows > INT32_MAX) return "more than 2^31 stored weights";
    return nullptr;
}

int64_t plan_bytes(const Gather& g, int chunks, int step, bool where) {
    const int64_t slots = slot_count(g, chunks, step), element = g.arithmetic >= Arithmetic::bfloat16 ? 2 : 4;
    int64_t bytes = aligned_16(slots * 8) + aligned_16(int64_t(g.groups()) * (chunks + 1) * 4);
    bytes += where ? aligned_16(int64_t(g.blocks) * g.sb * g.tb * 4) : aligned_16(slots * g.rows * element);
    if (g.rule == Rule::adjacency) bytes += aligned_16(int64_t(chunks * g.K + 1) * 4) + int64_t(g.sources) * g.K * 4;
    return aligned_16(bytes);
}

Plan place_plan(const Gather& g, int chunks, int step, bool where, void* scratch) {
    const int64_t slots = slot_count(g, chunks, step), element = g.arithmetic >= Arithmetic::bfloat16 ? 2 : 4;
    char* p = static_cast<char*>(scratch);
    auto take = [&](int64_t bytes) {
        void* here = p;
        p += aligned_16(bytes);
        return here;
    };
    Plan plan{};
    plan.slots = static_cast<int2*>(take(slots * 8));
    plan.starts = static_cast<int*>(take(int64_t(g.groups()) * (chunks + 1) * 4));
    if (where) plan.where = static_cast<int*>(take(int64_t(g.blocks) * g.sb * g.tb * 4));
    else plan.packed = take(slots * g.rows * element);
    if (g.rule == Rule::adjacency) {
        plan.live_starts = static_cast<int*>(take(int64_t(chunks * g.K + 1) * 4));
        plan.live = static_cast<int*>(take(int64_t(g.sources) * g.K * 4));
    }
    return plan;
}

const char* make_plan(const Gather& g, const Tile& tile, int step, const Plan& plan, void* stream) {
    const bool half = g.arithmetic >= Arithmetic::bfloat16;
    const PlanArgs a{g.ptr, g.perm, g.source, g.tap, g.values, plan, g.rule, g.x.channel, g.most_slots(), g.tb, g.sb,
                     g.targets, g.sources, g.K, g.V, g.rows, g.phases, g.groups_per_phase(), g.dilation, reach(g).first,
                     tile.chunk_channels, tile.chunks, tile.pitch, tile.zero_row, step, half ? 8 : 4, half ? 2 : 4,
                     g.arithmetic != Arithmetic::float32};
    const int64_t units = g.units(), words = (units + 31) / 32;
    const int64_t bytes = (4 + 2 * words + 1 + 2 * KEYS + MAX_CHUNKS + 1) * 4 + units * 2 + units * g.sb * 3;
    if (const char* error = LAUNCH(plan_slots, dim3(unsigned(g.groups())), KEYS, bytes, stream, a)) return error;
    if (g.rule != Rule::adjacency) return nullptr;
    const int64_t bits = (int64_t(tile.chunks) * tile.chunk_channels * g.K + 31) / 32;
    return LAUNCH(plan_live_rows, dim3(1), THREADS, (2 * bits + 1) * 4, stream, a, g.blocks);
}

}  // namespace sparse_stgcn::cuda
