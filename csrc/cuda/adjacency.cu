// Products with an adjacency that stand alone: for one per channel. They are bound by memory, and multiply and add in float32
// whatever the storage: V is small and odd, so that a lane owns a joint.
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
                    const int64_t channel = m.expand ? c : k * m.C + c;
                    const T* x = static_cast<const T*>(m.x.data) + n * m.x.batch + channel * m.x.channel + int64_t(t) * V;
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

template <class T> const char* launch_mix(const MixArgs& a, dim3 grid, int64_t bytes, void* stream) {
    return LAUNCH((mix_kernel<T>), grid, THREADS, bytes, stream, a);
}

}  // namespace

int64_t mix_shared(int K, int V) { return (int64_t(K) * V * rounded(V, 32) + WARPS * FRAMES * V) * 4; }

const char* mix_joints(const Mix& m, void* stream) {
    const int per_block = m.adjacency.channel ? 1 : 16;
    const MixArgs a{m, (m.C + per_block - 1) / per_block, per_block};
    const int64_t bytes = mix_shared(m.K, m.V), blocks = int64_t(m.N) * a.blocks_per_sample;
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "more than 2^31 blocks";
    const dim3 grid{unsigned(blocks)};
    return m.arithmetic == Arithmetic::bfloat16  ? launch_mix<bf16>(a, grid, bytes, stream)
           : m.arithmetic == Arithmetic::float16 ? launch_mix<f16>(a, grid, bytes, stream)
                                                 : launch_mix<float>(a, grid, bytes, stream);
}

}  // namespace sparse_stgcn::cuda
