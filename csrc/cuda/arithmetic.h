// One step of a warp on the matrix unit (or, in IEEE float32, beside it), for each arithmetic: gathered rows of a panel times
// the weights that they meet. Pixels are the unit's M side.
#pragma once
#include "gather.h"

namespace sparse_stgcn::cuda {

// The staged channels. A channel's row begins at an address that is a multiple of 16 bytes in global memory, so its
// first frame stands at (lead + channel * stride) mod PIECE; a slot carries that product mod 8 in its three low bits.
template <class T> struct Panel {
    static constexpr int PIECE = 16 / sizeof(T);
    const T* data;
    int lead;
    __device__ __forceinline__ int row(int slot) const { return (slot >> 3) + ((slot + lead) & (PIECE - 1)); }
};

// One K step of each arithmetic for one group of BO channels. `at`: offsets of this lane's pixels in a row of the panel.
// On the matrix unit a lane owns RUN pixels side by side (rows of M are ours to name) and channels 2 quad + {0, 1}.
template <class E, int BO> struct Half {
    using T = E;
    static constexpr bool MATRIX = true;
    static constexpr int MT = 4, GROUPS = 32 / BO, STEP = 16, RUN = 2 * MT;
    using Sums = float[GROUPS * BO / 8][MT][4];
    static __device__ __forceinline__ int pixel(int lane, int j) { return (lane >> 2) * RUN + j; }

    template <bool UNIT>
    static __device__ __forceinline__ void step(Sums& sums, int group, const Panel<T>& p, const int2* slots,
                                                const T* values, const int (&at)[RUN], int lane) {
        const int4* mine = reinterpret_cast<const int4*>(slots + 4 * (lane & 3));   // the order along K is ours, too
        const int4 s01 = __ldg(mine), s23 = __ldg(mine + 1);
        const int weight[4] = {s01.y, s01.w, s23.y, s23.w};
        const int row[4] = {p.row(s01.x), p.row(s01.z), p.row(s23.x), p.row(s23.z)};
        uint32_t b[BO / 8][2], a[MT][4];
#pragma unroll
        for (int n = 0; n < BO / 8; ++n) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) w[i] = weight[i] < 0 ? 0 : values[weight[i] + n * 8 + (lane >> 2)].bits;
            b[n][0] = w[0] | w[1] << 16, b[n][1] = w[2] | w[3] << 16;
        }
        if constexpr (UNIT) {                       // pixels lie side by side: read words; an odd row straddles them
            uint32_t pair[4][MT];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t* word = reinterpret_cast<const uint32_t*>(p.data + at[0]) + (unsigned(row[i]) >> 1);
                const uint32_t select = 0x3210 + (row[i] & 1) * 0x2222;                   // at[0] is even
                uint32_t w[MT + 1];
#pragma unroll
                for (int m = 0; m <= MT; ++m) w[m] = word[m];
#pragma unroll
                for (int m = 0; m < MT; ++m) pair[i][m] = __byte_perm(w[m], w[m + 1], select);
            }
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    a[m][i] = __byte_perm(pair[i / 2 * 2][m], pair[i / 2 * 2 + 1][m], i % 2 ? 0x7632 : 0x5410);
        } else {
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int k = i / 2 * 2, px = at[2 * m + i % 2];
                    a[m][i] = p.data[row[k] + px].bits | uint32_t(p.data[row[k + 1] + px].bits) << 16;
                }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < BO / 8; ++n) mma(E{}, sums[group * (BO / 8) + n][m], a[m], b[n]);
    }
};

template <int BO> struct Tf32 {
    using T = float;
    static constexpr bool MATRIX = true;
    static constexpr int MT = 2, GROUPS = 64 / BO, STEP = 8, RUN = 2 * MT;
    using Sums = float[GROUPS * BO / 8][MT][4];
    static __device__ __forceinline__ int pixel(int lane, int j) { return (lane >> 2) * RUN + j; }

    template <bool UNIT>
    static __device__ __forceinline__ void step(Sums& sums, int group, const Panel<T>& p, const int2* slots,
                                                const T* values, const int (&at)[RUN], int lane) {
        const int4 s = __ldg(reinterpret_cast<const int4*>(slots + 2 * (lane & 3)));
        const T *even = p.data + p.row(s.x), *odd = p.data + p.row(s.z);
        uint32_t b[BO / 8][2];
#pragma unroll
        for (int n = 0; n < BO / 8; ++n) {
            b[n][0] = s.y < 0 ? 0 : to_tf32(values[s.y + n * 8 + (lane >> 2)]);
            b[n][1] = s.w < 0 ? 0 : to_tf32(values[s.w + n * 8 + (lane >> 2)]);
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const uint32_t a[4] = {to_tf32(even[at[2 * m]]), to_tf32(even[at[2 * m + 1]]),
                                   to_tf32(odd[at[2 * m]]), to_tf32(odd[at[2 * m + 1]])};
#pragma unroll
            for (int n = 0; n < BO / 8; ++n) mma(0.f, sums[group * (BO / 8) + n][m], a, b[n]);
        }
    }
};

// IEEE float32: a lane owns RUN pixels, 32 apart, and all BO channels of the group. Every lane reads the same slots.
template <int BO> struct Exact {
    using T = float;
    static constexpr bool MATRIX = false;
    static constexpr int MT = 4, GROUPS = 32 / BO, STEP = 4, RUN = 2;
    using Sums = float[GROUPS * BO / 8][MT][4];     // [eight channels][8 channels x RUN pixels]
    static __device__ __forceinline__ int pixel(int lane, int j) { return lane + 32 * j; }

    template <bool UNIT>
    static __device__ __forceinline__ void step(Sums& sums, int group, const Panel<T>& p, const int2* slots,
                                                const T* values, const int (&at)[RUN], int) {
#pragma unroll (BO == 32 ? 1 : STEP)                                     // more would spill
        for (int k = 0; k < STEP; ++k) {
            const int2 s = __ldg(slots + k);
            if (s.y < 0) break;
            const T* row = p.data + p.row(s.x);
            const float x[RUN] = {row[at[0]], row[at[1]]};
#pragma unroll
            for (int q = 0; q < BO / 4; ++q) {
                float* sum = &sums[group * (BO / 8) + q / 2][q % 2 * 2][0];
                const float4 w = __ldg(reinterpret_cast<const float4*>(values + s.y) + q);
#pragma unroll
                for (int j = 0; j < RUN; ++j) {
                    sum[0 * RUN + j] += w.x * x[j];
                    sum[1 * RUN + j] += w.y * x[j];
                    sum[2 * RUN + j] += w.z * x[j];
                    sum[3 * RUN + j] += w.w * x[j];
                }
            }
        }
    }
};

// Put eight channels of a lane's sums where they belong in the warp's buffer (8 x LD).
template <int LD, class Math>
__device__ __forceinline__ void spread(Math, float* buffer, const float (&sums)[Math::MT][4], int lane) {
#pragma unroll
    for (int m = 0; m < Math::MT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            buffer[(2 * (lane & 3) + i % 2) * LD + Math::pixel(lane, 2 * m + i / 2)] = sums[m][i];
}
template <int LD, int BO>
__device__ __forceinline__ void spread(Exact<BO>, float* buffer, const float (&sums)[4][4], int lane) {
#pragma unroll
    for (int i = 0; i < 16; ++i) buffer[i / 2 * LD + lane + i % 2 * 32] = sums[i / 4][i % 4];
}

}  // namespace sparse_stgcn::cuda
