// The few words in which a kernel speaks to the machine. Under nvcc they are PTX; for any other compiler emulate.h holds
// their twins, so that the same source runs on a CPU.
#pragma once
#include <cstdint>

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

#if !defined(__CUDACC__)
#include "emulate.h"
#else
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
// The error's text, or null.
#define LAUNCH(kernel, grid, threads, bytes, stream, ...)                                                     \
    (allow_all_shared(kernel),                                                                                \
     kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__),                        \
     error_text(cudaGetLastError()))
inline const char* error_text(cudaError_t e) { return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

// Lets a kernel take as much shared memory as a block may have on the current device. The limit is the kernel's and not the
// launch's, and cheap to set again: were it the bytes of a launch, another thread could lower it before that launch.
template <class Kernel> void allow_all_shared(Kernel* kernel) {
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Makes a device current for this thread; the error's text, or null. torch and this module have each their own runtime, so
// nothing is taken for granted. The caller, who asks within torch.cuda.device, goes back to the device before: this runtime
// takes device 0 for that until it is told, and going back to it would create a context where nobody else has one.
inline const char* use_device(int index) {
    const char* error = error_text(cudaSetDevice(index));
    cudaGetLastError();                                                 // a launch reports what went wrong in it alone
    return error;
}

// Copy `valid` bytes (0..16) from global to shared memory and fill the rest of the 16 with zeros, without waiting.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(valid) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 16 bytes at once from and to global memory, written out because the compiler may split a plain int4 access in four.
__device__ __forceinline__ int4 load_16(const void* from) {
    int4 r;
    asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(from) : "memory");
    return r;
}
__device__ __forceinline__ void store_16(void* to, int4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t to_tf32(float x) { uint32_t r; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x)); return r; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits)); return r; }

// Two values rounded to nearest even and packed, the first in the low half.
__device__ __forceinline__ uint32_t pack(bf16, float lo, float hi) {
    uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r;
}
__device__ __forceinline__ uint32_t pack(f16, float lo, float hi) {
    uint32_t r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r;
}

// d += a b on the matrix unit: 16 pixels x 8 channels, 8 (tf32) or 16 gathered rows.
#define MMA(shape)                                                                                             \
    asm("mma.sync.aligned." shape " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ __forceinline__ void mma(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
__device__ __forceinline__ void mma(bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
__device__ __forceinline__ void mma(f16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
#undef MMA
#endif

// The value rounded to T.
__device__ __forceinline__ void to_storage(float* to, float x) { *to = x; }
template <class T> __device__ __forceinline__ void to_storage(T* to, float x) { to->bits = uint16_t(pack(T{}, x, 0.f)); }
