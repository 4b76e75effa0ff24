// The adjacency product of graph_conv's forward pass: rows z(c,k) = x_c A_k of a tile's frames, made in shared memory from
// the staged input, for the gather to read. Rows that no block reads are not made. In 16 bits, z is rounded to them once.
//
//   x, rows (c, frame) of V values  @  A_k (V x V, padded with zeros to a multiple of 16)  ->  z, rows (c, frame)
#pragma once
#include "panel.h"

namespace sparse_stgcn::cuda {

enum class Kind { unit, strided, graph };                               // stride 1, any stride, adjacency product first

struct AdjacencyPanel {
    Adjacency from;
    const int *live, *live_starts;
    int K, V;
};

// A_k transposed for the matrix unit, whose lanes read neighbouring v of one w; as it is for IEEE float32.
template <class Math, class T>
__device__ __forceinline__ void load_adjacency(T* graph, const AdjacencyPanel& a, int pitch, int n) {
    const int J = joints(a.V);
    const T* data = static_cast<const T*>(a.from.data) + n * a.from.batch;
    for (int i = threadIdx.x; i < a.K * J * J; i += THREADS) {
        const int k = i / (J * J), row = i / J % J, column = i % J;
        const int v = Math::MATRIX ? column : row, w = Math::MATRIX ? row : column;
        const bool inside = v < a.V && w < a.V;
        T value{};
        if (inside) value = data[k * a.from.subset + v * a.from.from + w * a.from.to];
        graph[(k * J + row) * pitch + column] = value;
    }
}

template <class T> __device__ __forceinline__ uint32_t word_of(const T* p, bool live, bool next) {  // 2 of 16 bits, or a float
    if constexpr (sizeof(T) == 4) return live ? to_tf32(*p) : 0;
    else return (live ? p[0].bits : 0) | (next ? uint32_t(p[1].bits) : 0) << 16;
}

// z rows of one chunk: `frames` of every live row. x: the staged input of pitch `row_pitch`.
template <class Math, class T>
__device__ __forceinline__ void multiply(T* z, const T* x, const T* graph, const AdjacencyPanel& a, const Tile& tile, int chunk,
                                         int frames, int lead, int64_t channel_stride) {
    constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;                        // values of one register of a fragment
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, V = a.V, J = joints(V), pitch = tile.adjacency_pitch;
    int job = warp;                                                     // over the subsets, so that warps share all of them
    for (int k = 0; k < a.K; ++k) {
        const int* starts = a.live_starts + chunk * a.K + k;
        const int first = __ldg(starts), rows = (__ldg(starts + 1) - first) * frames;
        const T* A = graph + k * J * pitch;
        auto from = [&](int m) {                                        // row (c, frame) of x
            const int c = __ldg(a.live + first + m / frames);
            return x + c * tile.row_pitch + (int(c * channel_stride + lead) & (Panel<T>::PIECE - 1)) + m % frames * V;
        };
        auto to = [&](int m) { return z + (__ldg(a.live + first + m / frames) * a.K + k) * tile.pitch + m % frames * V; };
        constexpr int TILE = Math::MATRIX ? 16 : 4;
        const int tiles = (rows + TILE - 1) / TILE;
        for (; job < tiles; job += WARPS) {
            if constexpr (Math::MATRIX) {
                const int quad = lane & 3, m[2] = {job * 16 + (lane >> 2), job * 16 + (lane >> 2) + 8};
                const T* row[2] = {from(m[0] < rows ? m[0] : 0), from(m[1] < rows ? m[1] : 0)};
#pragma unroll 1
                for (int w0 = 0; w0 < J; w0 += 32) {
                    float sums[4][4] = {};
#pragma unroll 1
                    for (int v0 = 0; v0 < J; v0 += 8 * PAIR) {
                        uint32_t f[4];
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int v = v0 + PAIR * quad + i / 2 * 4 * PAIR;
                            f[i] = word_of(row[i % 2] + v, v < V, v + 1 < V);
                        }
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const int w = w0 + 8 * j;
                            if (w >= J) break;
                            const T* at = A + (w + (lane >> 2)) * pitch + v0 + PAIR * quad;
                            const uint32_t b[2] = {word_of(at, true, true), word_of(at + 4 * PAIR, true, true)};
                            mma(T{}, sums[j], f, b);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < 4; ++j)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int w = w0 + 8 * j + 2 * quad + i % 2;
                            if (m[i / 2] < rows && w < V) to_storage(to(m[i / 2]) + w, sums[j][i]);
                        }
                }
            } else {
                for (int w = lane; w < J; w += 32) {                    // a lane owns a joint, and reads four rows by broadcast
                    float sums[4] = {};
                    const T* row[4];
#pragma unroll
                    for (int r = 0; r < 4; ++r) row[r] = from(job * 4 + r < rows ? job * 4 + r : 0);
                    for (int v = 0; v < V; ++v) {
                        const float weight = A[v * pitch + w];
#pragma unroll
                        for (int r = 0; r < 4; ++r) sums[r] += row[r][v] * weight;
                    }
#pragma unroll
                    for (int r = 0; r < 4; ++r)
                        if (job * 4 + r < rows && w < V) to(job * 4 + r)[w] = sums[r];
                }
            }
        }
        job -= tiles;
    }
}

}  // namespace sparse_stgcn::cuda
