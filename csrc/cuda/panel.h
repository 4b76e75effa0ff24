// Between global memory and a block of threads: rows of pixels in by asynchronous copies of 16 bytes, and out by 16 bytes.
#pragma once
#include "arithmetic.h"
#include "tile.h"

namespace sparse_stgcn::cuda {

// Rows of a tensor (N,C,T,V), seen from a multiple of 16 bytes: row c of the panel is elements start + c * channel ...
struct Rows {
    const void* data;
    int64_t offset, batch, channel;
    int plane;                                          // T * V: what lies outside of a row's plane reads as zero
};
inline Rows rows_of(const Planes& x, int element, int frames, int V) {
    const Aligned at = aligned(x.data, element);
    return {at.data, at.offset, x.batch, x.channel, frames * V};
}

// Start copying `count` rows into the panel, a warp to a row. Element `origin` of the tensor is the first wanted of row 0,
// whose plane begins at `start`.
template <class T>
__device__ __forceinline__ void stage(T* panel, int pitch, const Rows& x, int64_t start, int64_t origin, int count) {
    constexpr int PIECE = Panel<T>::PIECE;
    const T* data = static_cast<const T*>(x.data);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int c = warp; c < count; c += WARPS) {
        const int64_t begin = start + c * x.channel, end = begin + x.plane;
        const int64_t base = (origin + c * x.channel) & -PIECE;
        for (int i = lane * PIECE; i < pitch; i += 32 * PIECE) {
            const int64_t from = base + i, left = end - from;
            const bool inside = from + PIECE > begin && left > 0;
            const int valid = inside ? int(left < PIECE ? left : PIECE) * int(sizeof(T)) : 0;
            cp_async_16(panel + c * pitch + i, data + (inside ? from : 0), valid);
        }
    }
    cp_async_commit();
}
// After the wait for the copies: the piece that straddles a plane's start; the lane that copied it clears what is not ours.
template <class T>
__device__ __forceinline__ void clear_before(T* panel, int pitch, const Rows& x, int64_t start, int64_t origin, int count) {
    constexpr int PIECE = Panel<T>::PIECE;
    if (origin >= start) return;
    for (int c = threadIdx.x / 32; c < count; c += WARPS) {
        const int before = int(start + c * x.channel - ((origin + c * x.channel) & -PIECE));
        int i = before & -PIECE;
        if (before < pitch && int(threadIdx.x % 32) == i / PIECE % 32)
            for (; i < before; ++i) panel[c * pitch + i] = T{};
    }
}

struct Output {
    void* y;
    Epilogue epilogue;
    int V, rows, channels, frames, interleave, split;   // rows of a phase; of y: channels, frames; 1 or the phases' frames apart
};

// Write eight rows of the warp's pixels, first .. first + left - 1 of the tile, from its buffer: 16 aligned bytes at once,
// the ragged ends one by one. Interleaved frames are written one by one throughout.
template <class T, int PIXELS>
__device__ __forceinline__ void store(const float* buffer, const Output& out, int n, int phase, int t0, int first, int left,
                                      int o0) {
    constexpr int PIECE = Panel<T>::PIECE, PIECES = PIXELS / PIECE + 1, LD = buffer_pitch(PIXELS);
    const Epilogue& e = out.epilogue;
    const int V = out.V;
    for (int job = threadIdx.x % 32; job < 8 * PIECES; job += 32) {
        const int r = job / PIECES, o = o0 + r;
        if (o >= out.rows) continue;
        const int64_t channel = int64_t(n) * out.channels + (out.split ? phase * out.rows : 0) + o;
        T* y = static_cast<T*>(out.y) + (channel * out.frames + t0 * out.interleave) * V + first;
        const int past = int(reinterpret_cast<uintptr_t>(y) / sizeof(T)) & (PIECE - 1);   // elements past an aligned address
        const int p = job % PIECES * PIECE - past, lo = p < 0 ? 0 : p, hi = p + PIECE < left ? p + PIECE : left;
        const T* residual = static_cast<const T*>(e.residual.data);
        if (residual) residual += n * e.residual.batch + o * e.residual.channel + int64_t(t0) * V + first;
        const float scale = e.scale ? __ldg(e.scale + o) : 1.f, shift = e.shift ? __ldg(e.shift + o) : 0.f;
        const float* map = e.map ? e.map + n * e.map_batch + int64_t(o) * V : nullptr;
        const float* sum = buffer + r * LD;
        auto act = [&](int i, float add) {
            const float s = (map ? sum[i] + __ldg(map + (first + i) % V) : sum[i]) * scale + shift + add;
            return e.relu && s < 0.f ? 0.f : s;
        };
        if (out.interleave > 1) {
            for (int i = lo; i < hi; ++i) {
                const int t = (first + i) / V, frame = (t0 + t) * out.interleave + phase;
                if (frame < out.frames) to_storage(y + i + (t * (out.interleave - 1) + phase) * V, act(i, 0.f));
            }
        } else if (hi - lo == PIECE && (reinterpret_cast<uintptr_t>(residual + (residual ? p : 0)) & 15) == 0) {
            const int4 more = residual ? load_16(residual + p) : int4{0, 0, 0, 0};
            auto word = [&](int i, int add) {                           // 4 bytes: one float or two of 16 bits
                if constexpr (sizeof(T) == 4) return int(as_bits(act(p + i, as_float(uint32_t(add)))));
                else return int(pack(T{}, act(p + 2 * i, to_float(T{uint16_t(add)})),
                                     act(p + 2 * i + 1, to_float(T{uint16_t(uint32_t(add) >> 16)}))));
            };
            store_16(y + p, int4{word(0, more.x), word(1, more.y), word(2, more.z), word(3, more.w)});
        } else
            for (int i = lo; i < hi; ++i) to_storage(y + i, act(i, residual ? to_float(residual[i]) : 0.f));
    }
}

}  // namespace sparse_stgcn::cuda
