// The gradient of an adjacency: sums of outer products of frames, without atomics.
//
//   dA[v][w] = sum over frames r of x[r][v] d[r][w]
//
//   IEEE float32, or more than 32 vertices      a thread owns 4 x 4 entries of dA, and some of the rows
//   else, on the matrix unit: r is its K side   a warp owns all of dA, 32 x 32, and every eighth 8 rows
//
// On the matrix unit the factors are rounded to TF32, which is exact for values that were stored in 16 bits.
#include "adjacency.h"

#include "tile.h"

namespace sparse_stgcn::cuda {
namespace {

struct OuterArgs {
    Outer op;
    float* partial;
    int matrices, planes;
};

// Rows of a plane, each `pitch` floats with zeros past V, and rows of zeros past the last: a warp to a row.
template <class T, class Convert>
__device__ __forceinline__ void stage_rows(float* to, int pitch, const T* from, int rows, int padded, int V, Convert convert) {
    for (int r = threadIdx.x / 32; r < padded; r += WARPS)
        for (int v = threadIdx.x % 32; v < pitch; v += 32)
            to[r * pitch + v] = r < rows && v < V ? convert(from[int64_t(r) * V + v]) : 0.f;
}

struct OuterOnFma {
    static constexpr int ROWS = 32;                                     // frames staged at a time
    static __host__ __device__ int pitch(int V) { return rounded(V, 4); }
    static __host__ __device__ int subsets(int V) { return THREADS / (pitch(V) / 4 * (pitch(V) / 4)); }
    float sums[4][4] = {};
    int subset, v0, w0;

    __device__ explicit OuterOnFma(int V) {
        const int side = pitch(V) / 4, tile = threadIdx.x % (side * side);
        subset = threadIdx.x / (side * side), v0 = tile / side * 4, w0 = tile % side * 4;
    }
    template <class T> static __device__ float factor(T x) { return to_float(x); }
    __device__ __forceinline__ void add(const float* xs, const float* ds, int rows, int V) {
        const int J = pitch(V);
        for (int r = subset; r < rows && subset < subsets(V); r += subsets(V)) {
            const float4 p = *reinterpret_cast<const float4*>(xs + r * J + v0);
            const float4 q = *reinterpret_cast<const float4*>(ds + r * J + w0);
            const float from[4] = {p.x, p.y, p.z, p.w}, to[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] += from[i] * to[j];
        }
    }
    __device__ __forceinline__ void leave(float* all, int V) const {    // (subsets, V, V)
        if (subset >= subsets(V)) return;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (v0 + i < V && w0 + j < V) all[(subset * V + v0 + i) * V + w0 + j] = sums[i][j];
    }
};

struct OuterOnMatrixUnit {
    static constexpr int ROWS = 64;
    static __host__ __device__ int pitch(int) { return 40; }            // 8 mod 32: lanes of a fragment in 32 banks
    static __host__ __device__ int subsets(int) { return WARPS; }
    float sums[2][4][4] = {};

    __device__ explicit OuterOnMatrixUnit(int) {}
    template <class T> static __device__ float factor(T x) { return as_float(to_tf32(to_float(x))); }
    __device__ __forceinline__ void add(const float* xs, const float* ds, int rows, int) {
        const int lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
        for (int r = threadIdx.x / 32 * 8; r < rows; r += WARPS * 8) {
            const float *x = xs + (r + q) * pitch(0) + g, *d = ds + (r + q) * pitch(0) + g;
            uint32_t a[2][4], b[4][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) a[m][i] = as_bits(x[i / 2 * 4 * pitch(0) + m * 16 + i % 2 * 8]);
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) b[n][i] = as_bits(d[i * 4 * pitch(0) + n * 8]);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) mma(0.f, sums[m][n], a[m], b[n]);
        }
    }
    __device__ __forceinline__ void leave(float* all, int V) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int v = m * 16 + i / 2 * 8 + (lane >> 2), w = n * 8 + 2 * (lane & 3) + i % 2;
                    if (v < V && w < V) all[(warp * V + v) * V + w] = sums[m][n][i];
                }
    }
};

template <class Math, class T> __global__ void __launch_bounds__(THREADS, 2) outer_kernel(OuterArgs a) {
    SHARED_MEMORY(memory);
    const Outer& o = a.op;
    const int V = o.V, pitch = Math::pitch(V);
    float* xs = reinterpret_cast<float*>(memory);                       // (ROWS, pitch), twice; then the sums of all subsets
    float* ds = xs + Math::ROWS * pitch;
    const int matrix = blockIdx.x, c_of = o.per_channel ? matrix % o.C : 0, k = (o.per_channel ? matrix / o.C : matrix) % o.K;
    const int n_of = matrix / (o.per_channel ? o.C : 1) / o.K;
    Math math(V);
    const int first = int(int64_t(blockIdx.y) * a.planes / o.splits), last = int(int64_t(blockIdx.y + 1) * a.planes / o.splits);
    for (int plane = first; plane < last; ++plane) {
        const int n = o.per_sample ? n_of : plane / o.C, c = o.per_channel ? c_of : plane % o.C;
        const T* x = static_cast<const T*>(o.x.data) + n * o.x.batch + ((o.split_x ? k * o.C : 0) + c) * o.x.channel;
        const T* d = static_cast<const T*>(o.d.data) + n * o.d.batch + ((o.split_x ? 0 : k * o.C) + c) * o.d.channel;
        for (int t = 0; t < o.T; t += Math::ROWS) {
            const int rows = o.T - t < Math::ROWS ? o.T - t : Math::ROWS, padded = rounded(rows, 8);
            auto factor = [](T value) { return Math::factor(value); };
            __syncthreads();
            stage_rows(xs, pitch, x + int64_t(t) * V, rows, padded, V, factor);
            stage_rows(ds, pitch, d + int64_t(t) * V, rows, padded, V, factor);
            __syncthreads();
            math.add(xs, ds, rows, V);
        }
    }
    __syncthreads();
    math.leave(xs, V);
    __syncthreads();
    float* partial = a.partial + (int64_t(blockIdx.y) * a.matrices + matrix) * V * V;
    for (int i = threadIdx.x; i < V * V; i += THREADS) {
        float sum = 0.f;
        for (int s = 0; s < Math::subsets(V); ++s) sum += xs[s * V * V + i];
        partial[i] = sum;
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS) sum_splits(const float* partial, int splits, int64_t count, T* to) {
    const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    float sum = 0.f;
    for (int s = 0; s < splits; ++s) sum += partial[s * count + i];
    to_storage(to + i, sum);
}

int64_t matrices(const Outer& o) { return int64_t(o.per_sample ? o.N : 1) * o.K * (o.per_channel ? o.C : 1); }
int64_t planes(const Outer& o) { return int64_t(o.per_sample ? 1 : o.N) * (o.per_channel ? 1 : o.C); }
bool on_matrix_unit(const Outer& o) { return o.arithmetic != Arithmetic::float32 && o.V <= 32; }

template <class Math, class T> const char* launch_outer(const OuterArgs& a, dim3 grid, void* stream) {
    const int V = a.op.V;
    const int64_t staged = 2 * int64_t(Math::ROWS) * Math::pitch(V), summed = int64_t(Math::subsets(V)) * V * V;
    return LAUNCH((outer_kernel<Math, T>), grid, THREADS, (staged > summed ? staged : summed) * 4, stream, a);
}
template <class T> const char* launch_outer(const OuterArgs& a, dim3 grid, void* stream) {
    const int64_t count = matrices(a.op) * a.op.V * a.op.V;
    const char* error = on_matrix_unit(a.op) ? launch_outer<OuterOnMatrixUnit, T>(a, grid, stream)
                                             : launch_outer<OuterOnFma, T>(a, grid, stream);
    if (error) return error;
    const dim3 blocks(unsigned((count + THREADS - 1) / THREADS));
    return LAUNCH((sum_splits<T>), blocks, THREADS, 0, stream, a.partial, a.op.splits, count, static_cast<T*>(a.op.da));
}

}  // namespace

int outer_splits(const Outer& o, const Device& device) {
    const int64_t wanted = (2 * device.multiprocessors + matrices(o) - 1) / (matrices(o) ? matrices(o) : 1);
    const int64_t splits = wanted < planes(o) ? wanted : planes(o);
    return splits > 1 ? int(splits) : 1;
}
int64_t outer_bytes(const Outer& o) { return o.splits * matrices(o) * o.V * o.V * 4; }

const char* outer_joints(const Outer& o, void* stream) {
    if (matrices(o) * o.V == 0) return nullptr;
    if (matrices(o) > INT32_MAX) return "more than 2^31 adjacencies";
    const OuterArgs a{o, static_cast<float*>(o.scratch), int(matrices(o)), int(planes(o))};
    const dim3 grid(unsigned(matrices(o)), unsigned(o.splits));
    return o.arithmetic == Arithmetic::bfloat16  ? launch_outer<bf16>(a, grid, stream)
           : o.arithmetic == Arithmetic::float16 ? launch_outer<f16>(a, grid, stream)
                                                 : launch_outer<float>(a, grid, stream);
}

}  // namespace sparse_stgcn::cuda
