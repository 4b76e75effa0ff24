// What the emulator promises: collectives, the fragment layout, and every mistake it is made to catch.
#include <cstdio>

#include "cuda/device.h"

static int failed = 0;
static void expect(bool ok, const char* what) {
    if (!ok) ++failed;
    std::printf("%s %s\n", ok ? "ok    " : "FAILED", what);
}
static bool complains(const char* error, const char* part) { return error && std::strstr(error, part); }

__global__ void sum_by_shuffle(const float* x, float* y) {
    float s = x[threadIdx.x], t = s;
    for (int k = 16; k; k >>= 1) s += __shfl_xor_sync(~0u, s, k);
    for (int k = 16; k; k >>= 1) {
        float other = __shfl_down_sync(~0u, t, k);
        if ((threadIdx.x & 31) + k < 32) t += other;
    }
    if (threadIdx.x % 32 == 0) atomicAdd(y, s), atomicAdd(y + 1, t);
}
__global__ void reverse(int* y, int barrier) {
    SHARED_MEMORY(memory);
    int* s = reinterpret_cast<int*>(memory);
    s[threadIdx.x] = int(threadIdx.x);
    if (barrier) __syncthreads();
    y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
__global__ void leaves_early() {
    if (threadIdx.x == 5) return;
    __syncthreads();
}
__global__ void lane_leaves() {
    if (threadIdx.x == 5) return;
    __syncwarp();
}
__global__ void two_barriers() {
    if (threadIdx.x < 32) __syncthreads();
    else
        __syncthreads();
}
__global__ void mixed() {
    if (threadIdx.x < 16) __syncwarp();
    else __syncthreads();
}
__global__ void poisoned(float* y) {
    SHARED_MEMORY(memory);
    y[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}
__global__ void copies(const float* x, float* y, int wait) {
    SHARED_MEMORY(memory);
    float* s = reinterpret_cast<float*>(memory);
    cp_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x, threadIdx.x == 1 ? 4 : 16);
    cp_async_commit();
    if (wait) cp_async_wait_all();
    for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = s[4 * threadIdx.x + i];
    cp_async_wait_all();
}
__global__ void never_waits(const float* x) {
    SHARED_MEMORY(memory);
    cp_async_16(memory, x, 16);
}
__global__ void misaligned(const float* x) {
    SHARED_MEMORY(memory);
    cp_async_16(memory, x + 1, 16);
    cp_async_wait_all();
}

// d = a b with a[i][k] and b[k][j] put where the PTX manual says, written out entry by entry.
template <class E> __global__ void product(const float* a, const float* b, float* d) {
    int lane = int(threadIdx.x), group = lane / 4, in = lane % 4;
    constexpr bool half = sizeof(E) == 2;
    uint32_t x[4], y[2];
    float s[4] = {};
    for (int i = 0; i < 4; ++i) {
        int row = group + (i % 2 ? 8 : 0);
        if constexpr (half) x[i] = pack(E{}, a[row * 16 + in * 2 + i / 2 * 8], a[row * 16 + in * 2 + 1 + i / 2 * 8]);
        else x[i] = to_tf32(a[row * 8 + in + i / 2 * 4]);
    }
    for (int i = 0; i < 2; ++i) {
        if constexpr (half) y[i] = pack(E{}, b[(in * 2 + 8 * i) * 8 + group], b[(in * 2 + 1 + 8 * i) * 8 + group]);
        else y[i] = to_tf32(b[(in + 4 * i) * 8 + group]);
    }
    mma(E{}, s, x, y);
    for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in * 2 + i % 2] = s[i];
}
template <class E> bool multiplies() {
    const int K = sizeof(E) == 2 ? 16 : 8;
    float a[256], b[128], d[128];
    for (int i = 0; i < 16 * K; ++i) a[i] = float((i * 7 + 3) % 11 - 5);
    for (int i = 0; i < 8 * K; ++i) b[i] = float((i * 5 + 1) % 13 - 6);
    if (LAUNCH(product<E>, 1, 32, 0, nullptr, a, b, d)) return false;
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            float s = 0;
            for (int k = 0; k < K; ++k) s += a[i * K + k] * b[k * 8 + j];
            if (s != d[i * 8 + j]) return false;
        }
    return true;
}
// Every 16-bit pattern is the rounding of its own value, and halfway points go to even.
template <class E> bool rounds(float one_ulp) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        float x = to_float(E{uint16_t(bits)});
        if (x == x && round_to(E{}, x) != bits) return false;
    }
    return round_to(E{}, 1 + one_ulp / 2) == round_to(E{}, 1.f) && round_to(E{}, 1 + 1.5f * one_ulp) == round_to(E{}, 1 + 2 * one_ulp);
}

int main() {
    for (int o = 0; o < 3; ++o) {
        emu::order = emu::Order(o);
        float x[64], y[2] = {};
        for (int i = 0; i < 64; ++i) x[i] = float(i);
        LAUNCH(sum_by_shuffle, 1, 64, 0, nullptr, x, y);
        expect(y[0] == 2016 && y[1] == 2016, "shuffles and atomics");
        int z[64];
        auto reversed = [&] {
            bool all = true;
            for (int i = 0; i < 64; ++i) all &= z[i] == 63 - i;
            return all;
        };
        LAUNCH(reverse, 1, 64, 256, nullptr, z, 1);
        expect(reversed(), "shared memory with its barrier");
        LAUNCH(reverse, 1, 64, 256, nullptr, z, 0);
        expect(!reversed(), "a missing barrier shows");
    }
    emu::order = emu::Order::forward;
    expect(complains(LAUNCH(leaves_early, 1, 64, 0, nullptr), "left while others wait"), "a thread that leaves early");
    expect(complains(LAUNCH(lane_leaves, 1, 64, 0, nullptr), "lane left"), "a lane that leaves its warp");
    expect(complains(LAUNCH(two_barriers, 1, 64, 0, nullptr), "different barriers"), "two barriers at once");
    expect(complains(LAUNCH(mixed, 1, 32, 0, nullptr), "deadlock"), "a warp at two kinds of barrier");
    float y[32];
    LAUNCH(poisoned, 1, 32, 128, nullptr, y);
    expect(y[0] != y[0] && y[31] != y[31], "shared memory starts as NaN");
    alignas(16) float from[32], to[32];
    for (int i = 0; i < 32; ++i) from[i] = float(i);
    LAUNCH(copies, 1, 8, 128, nullptr, from, to, 1);
    expect(to[4] == 4 && to[5] == 0 && to[7] == 0 && to[31] == 31, "short copies are filled with zeros");
    LAUNCH(copies, 1, 8, 128, nullptr, from, to, 0);
    expect(to[0] != to[0], "a copy read before the wait is NaN");
    expect(complains(LAUNCH(never_waits, 1, 1, 16, nullptr, from), "not waited"), "a copy nobody waits for");
    expect(complains(LAUNCH(misaligned, 1, 1, 16, nullptr, from), "multiple of 16"), "a misaligned copy");
    expect(multiplies<bf16>(), "m16n8k16 bf16");
    expect(multiplies<f16>(), "m16n8k16 f16");
    expect(multiplies<float>(), "m16n8k8 tf32");
    expect(rounds<bf16>(0x1p-7f), "bf16 to nearest even");
    expect(rounds<f16>(0x1p-10f), "f16 to nearest even");
    std::printf("%d failed\n", failed);
    return failed != 0;
}
