// Products with the adjacency that stand alone. Both are bound by memory, and multiply and add in float32 whatever the
// storage: V is small and odd, so that a lane owns a joint (mix) or 4 x 4 entries of dA (outer), without atomics.
#include "adjacency.h"

#include "tile.h"

namespace sparse_stgcn::cuda {
namespace {

constexpr int FRAMES = 4;                                               // of a warp at a time: one read of A serves them all

struct MixArgs {
    Mix op;
    int blocks_per_sample, channels_per_block;
};

template <class T> __global__ void __launch_bounds__(THREADS) mix_kernel(MixArgs a) {
    SHARED_MEMORY(memory);
    const Mix& m = a.op;
    const int V = m.V, K = m.K, pitch = rounded(V, 32), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* graph = reinterpret_cast<float*>(memory);                    // (K, V, pitch)
    float* rows = graph + K * V * pitch + warp * FRAMES * V;
    const int n = blockIdx.x / a.blocks_per_sample, c0 = blockIdx.x % a.blocks_per_sample * a.channels_per_block;
    const int channels = c0 + a.channels_per_block < m.C ? a.channels_per_block : m.C - c0;
    const T* A = static_cast<const T*>(m.adjacency.data) + n * m.adjacency.batch + c0 * m.adjacency.channel;
    for (int i = threadIdx.x; i < K * V * pitch; i += THREADS) {
        const int w = i % pitch, v = i / pitch % V, k = i / pitch / V;
        graph[i] = w < V ? to_float(A[k * m.adjacency.subset + v * m.adjacency.from + w * m.adjacency.to]) : 0.f;
    }
    __syncthreads();
    const Epilogue& e = m.epilogue;
    const int quads = (m.T + FRAMES - 1) / FRAMES, out_channels = m.expand ? K * m.C : m.C;
    for (int job = warp; job < channels * quads; job += WARPS) {
        const int c = c0 + job / quads, t = job % quads * FRAMES, frames = m.T - t < FRAMES ? m.T - t : FRAMES;
        for (int w = lane; w < pitch; w += 32) {
            float sums[FRAMES] = {};
            for (int k = 0; k < K; ++k) {
                if (!m.expand || (k == 0 && w == lane)) {
                    const T* x = static_cast<const T*>(m.x.data) + n * m.x.batch + (m.expand ? c : k * m.C + c) * m.x.channel + int64_t(t) * V;
                    __syncwarp();
                    for (int i = lane; i < FRAMES * V; i += 32) rows[i] = i < frames * V ? to_float(x[i]) : 0.f;
                    __syncwarp();
                }
                for (int v = 0; v < V; ++v) {
                    const float weight = graph[(k * V + v) * pitch + w];
#pragma unroll
                    for (int f = 0; f < FRAMES; ++f) sums[f] += rows[f * V + v] * weight;
                }
                if (m.expand || k == K - 1)
#pragma unroll
                    for (int f = 0; f < FRAMES; ++f) {
                        if (w < V && f < frames) {
                            float s = sums[f];
                            if (e.map) s += e.map[n * e.map_batch + int64_t(c) * V + w];
                            if (e.scale) s *= e.scale[c];
                            if (e.shift) s += e.shift[c];
                            if (const T* r = static_cast<const T*>(e.residual.data))
                                s += to_float(r[n * e.residual.batch + c * e.residual.channel + int64_t(t + f) * V + w]);
                            const int64_t channel = int64_t(n) * out_channels + (m.expand ? k * m.C + c : c);
                            to_storage(static_cast<T*>(m.y) + (channel * m.T + t + f) * V + w, e.relu && s < 0.f ? 0.f : s);
                        }
                        sums[f] = 0.f;
                    }
            }
        }
    }
}

constexpr int ROWS = 32;                                                // frames staged at a time

struct OuterArgs {
    Outer op;
    float* partial;
    int matrices, planes;
};

template <class T> __global__ void __launch_bounds__(THREADS) outer_kernel(OuterArgs a) {
    SHARED_MEMORY(memory);
    const Outer& o = a.op;
    const int V = o.V, J = rounded(V, 4), side = J / 4, tiles = side * side, subsets = THREADS / tiles;
    float* xs = reinterpret_cast<float*>(memory);                       // (ROWS, J), twice; then the subsets' sums (J, J)
    float* ds = xs + ROWS * J;
    const int matrix = blockIdx.x, c_of = o.per_channel ? matrix % o.C : 0, k = (o.per_channel ? matrix / o.C : matrix) % o.K;
    const int n_of = matrix / (o.per_channel ? o.C : 1) / o.K;
    const int tile = threadIdx.x % tiles, subset = threadIdx.x / tiles, v0 = tile / side * 4, w0 = tile % side * 4;
    float sums[4][4] = {};
    const int first = int(int64_t(blockIdx.y) * a.planes / o.splits), last = int(int64_t(blockIdx.y + 1) * a.planes / o.splits);
    for (int plane = first; plane < last; ++plane) {
        const int n = o.per_sample ? n_of : plane / o.C, c = o.per_channel ? c_of : plane % o.C;
        const T* x = static_cast<const T*>(o.x.data) + n * o.x.batch + ((o.split_x ? k * o.C : 0) + c) * o.x.channel;
        const T* d = static_cast<const T*>(o.d.data) + n * o.d.batch + ((o.split_x ? 0 : k * o.C) + c) * o.d.channel;
        for (int t = 0; t < o.T; t += ROWS) {
            const int rows = o.T - t < ROWS ? o.T - t : ROWS;
            __syncthreads();
            for (int i = threadIdx.x; i < rows * J; i += THREADS) {
                const int r = i / J, v = i % J;
                xs[i] = v < V ? to_float(x[int64_t(t + r) * V + v]) : 0.f;
                ds[i] = v < V ? to_float(d[int64_t(t + r) * V + v]) : 0.f;
            }
            __syncthreads();
            for (int r = subset; r < rows && subset < subsets; r += subsets) {
                const float4 p = *reinterpret_cast<const float4*>(xs + r * J + v0), q = *reinterpret_cast<const float4*>(ds + r * J + w0);
                const float from[4] = {p.x, p.y, p.z, p.w}, to[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[i][j] += from[i] * to[j];
            }
        }
    }
    __syncthreads();
    if (subset < subsets)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) xs[(subset * J + v0 + i) * J + w0 + j] = sums[i][j];
    __syncthreads();
    float* partial = a.partial + (int64_t(blockIdx.y) * a.matrices + matrix) * V * V;
    for (int i = threadIdx.x; i < V * V; i += THREADS) {
        float sum = 0.f;
        for (int s = 0; s < subsets; ++s) sum += xs[(s * J + i / V) * J + i % V];
        partial[i] = sum;
    }
}

template <class T> __global__ void __launch_bounds__(THREADS) sum_splits(const float* partial, int splits, int64_t count, T* to) {
    const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    float sum = 0.f;
    for (int s = 0; s < splits; ++s) sum += partial[s * count + i];
    to_storage(to + i, sum);
}

template <class T> const char* launch_mix(const MixArgs& a, dim3 grid, int64_t bytes, void* stream) {
    return LAUNCH((mix_kernel<T>), grid, THREADS, bytes, stream, a);
}
template <class T> const char* launch_outer(const OuterArgs& a, dim3 grid, int64_t bytes, int64_t count, void* stream) {
    if (const char* error = LAUNCH((outer_kernel<T>), grid, THREADS, bytes, stream, a)) return error;
    const dim3 blocks(unsigned((count + THREADS - 1) / THREADS));
    return LAUNCH((sum_splits<T>), blocks, THREADS, 0, stream, a.partial, a.op.splits, count, static_cast<T*>(a.op.da));
}

int64_t matrices(const Outer& o) { return int64_t(o.per_sample ? o.N : 1) * o.K * (o.per_channel ? o.C : 1); }
int64_t planes(const Outer& o) { return int64_t(o.per_sample ? 1 : o.N) * (o.per_channel ? 1 : o.C); }

}  // namespace

const char* mix_joints(const Mix& m, void* stream) {
    const int per_block = m.adjacency.channel ? 1 : 16;
    const MixArgs a{m, (m.C + per_block - 1) / per_block, per_block};
    const int64_t bytes = (int64_t(m.K) * m.V * rounded(m.V, 32) + WARPS * FRAMES * m.V) * 4, blocks = int64_t(m.N) * a.blocks_per_sample;
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "more than 2^31 blocks";
    const dim3 grid{unsigned(blocks)};
    return m.arithmetic == Arithmetic::bfloat16  ? launch_mix<bf16>(a, grid, bytes, stream)
           : m.arithmetic == Arithmetic::float16 ? launch_mix<f16>(a, grid, bytes, stream)
                                                 : launch_mix<float>(a, grid, bytes, stream);
}

int outer_splits(const Outer& o, const Device& device) {
    const int64_t wanted = (2 * device.multiprocessors + matrices(o) - 1) / (matrices(o) ? matrices(o) : 1);
    const int64_t splits = wanted < planes(o) ? wanted : planes(o);
    return splits > 1 ? int(splits) : 1;
}
int64_t outer_bytes(const Outer& o) { return o.splits * matrices(o) * o.V * o.V * 4; }

const char* outer_joints(const Outer& o, void* stream) {
    const int64_t count = matrices(o) * o.V * o.V;
    const int J = rounded(o.V, 4), tiles = J / 4 * (J / 4), subsets = THREADS / tiles;
    const int64_t floats = 2 * ROWS * J > subsets * J * J ? 2 * ROWS * J : subsets * J * J;
    if (count == 0) return nullptr;
    if (matrices(o) > INT32_MAX) return "more than 2^31 adjacencies";
    const OuterArgs a{o, static_cast<float*>(o.scratch), int(matrices(o)), int(planes(o))};
    const dim3 grid(unsigned(matrices(o)), unsigned(o.splits));
    return o.arithmetic == Arithmetic::bfloat16  ? launch_outer<bf16>(a, grid, floats * 4, count, stream)
           : o.arithmetic == Arithmetic::float16 ? launch_outer<f16>(a, grid, floats * 4, count, stream)
                                                 : launch_outer<float>(a, grid, floats * 4, count, stream);
}

}  // namespace sparse_stgcn::cuda
