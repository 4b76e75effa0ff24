// Runs CUDA kernels on the CPU: one block at a time, every thread a fiber, so that barriers, shuffles, asynchronous
// copies and matrix instructions keep their meaning. Made to find mistakes: shared memory starts as NaN, asynchronous
// copies land as late as the standard allows (at the wait), threads run in a chosen order, and a thread that leaves
// while others wait, or threads that wait at different barriers, stop the launch with a message.
//
// What it does not show: bank conflicts, coalescing, races between blocks (they run one after another), and the
// matrix unit's own order and rounding of sums (here float32, in order).
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

namespace emu {

enum class Order { forward, reversed, shuffled };
enum class State { running, at_warp, at_block, done };
struct Copy { void* to; const void* from; int bytes; };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake = nullptr;                                       // AddressSanitizer's own stack of this fiber
    State state;
    unsigned rank, turn;
    dim3 thread;
    int line;                                                   // of the barrier it waits at
    std::vector<Copy> copies;
};
struct Shown { uint32_t a[4], b[2]; uint64_t word; };           // what one lane shows to its warp

constexpr size_t stack_bytes = 64 << 10;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline void* scheduler_fake;
inline const void* scheduler_stack;
inline size_t scheduler_size;
inline Fiber* self;
inline dim3 block, block_dim, grid_dim;
inline std::function<void()> body;
inline std::string error;
inline std::vector<Shown> board[2];
inline std::vector<uint32_t> shared;
inline Order order = Order::forward;
inline unsigned seed = 0;
inline std::vector<const void*> streams;                        // of the launches so far

inline void enter() {                                           // first words of a fiber, and after every switch
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake, &scheduler_stack, &scheduler_size);
#endif
}
inline void leave(State state) {
    Fiber* me = self;
    me->state = state;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(state == State::done ? nullptr : &me->fake, scheduler_stack, scheduler_size);
#endif
    swapcontext(&me->context, &scheduler);
    enter();
}
inline void resume(Fiber& f) {
    self = &f;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake, f.stack.get(), stack_bytes);
#endif
    swapcontext(&scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}
inline void main_of_fiber() {
    enter();
    body();
    leave(State::done);
}
inline void fail(const std::string& text) {
    if (error.empty()) error = text + " (block " + std::to_string(block.x) + "," + std::to_string(block.y) + ")";
}
inline void wait_block(int line) {
    self->line = line;
    leave(State::at_block);
}
inline void wait_warp() { leave(State::at_warp); }

// Run the lanes of one warp as far as they get without the rest of the block: warps drift apart as far as they may.
inline void run_warp(size_t begin, const std::vector<unsigned>& sequence) {
    size_t end = std::min(fibers.size(), begin + 32);
    for (bool again = true; again && error.empty();) {
        size_t waiting = 0, gone = 0;
        for (size_t i = begin; i < end; ++i)
            if (Fiber& f = *fibers[sequence[i]]; f.state == State::running) resume(f);
        for (size_t i = begin; i < end; ++i) {
            waiting += fibers[sequence[i]]->state == State::at_warp;
            gone += fibers[sequence[i]]->state == State::done;
        }
        if (waiting && gone) fail("a lane left while its warp waits");
        if ((again = waiting == end - begin))
            for (size_t i = begin; i < end; ++i) fibers[sequence[i]]->state = State::running;
        if (order == Order::shuffled) break;                    // let another warp go on; this one has its next turn
    }
}
// Release the block's barrier when it is complete; false when the block is over.
inline bool release() {
    size_t running = 0, at_block = 0, done = 0;
    for (auto& f : fibers) {
        running += f->state == State::running;
        at_block += f->state == State::at_block;
        done += f->state == State::done;
    }
    if (at_block && done) fail("a thread left while others wait at __syncthreads");
    if (at_block == fibers.size())
        for (auto& f : fibers) {
            if (f->line != fibers[0]->line)
                fail("threads wait at different barriers, lines " + std::to_string(f->line) + " and " +
                     std::to_string(fibers[0]->line));
            f->state = State::running, running = 1;
        }
    if (!running && done != fibers.size()) fail("deadlock: lanes of one warp wait at different kinds of barrier");
    return running && error.empty();
}
inline void prepare(Fiber& f, unsigned rank, dim3 threads) {
    if (!f.stack) f.stack = std::make_unique<char[]>(stack_bytes);
    f.state = State::running, f.rank = rank, f.turn = 0, f.line = 0, f.fake = nullptr, f.copies.clear();
    f.thread = dim3(rank % threads.x, rank / threads.x % threads.y, rank / (threads.x * threads.y));
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = stack_bytes, f.context.uc_link = nullptr;
    makecontext(&f.context, main_of_fiber, 0);
}
inline void run_block(std::vector<unsigned>& sequence, std::vector<unsigned>& warps, std::mt19937& random) {
    unsigned n = unsigned(fibers.size());
    do {
        if (order != Order::shuffled) {
            for (unsigned w : warps) run_warp(w, sequence);
            continue;
        }
        for (unsigned w = 0; w < n; w += 32)
            std::shuffle(sequence.begin() + w, sequence.begin() + std::min(n, w + 32), random);
        std::shuffle(warps.begin(), warps.end(), random);
        for (size_t i = 0; i < warps.size(); ++i)               // some of the warps, at least one
            if (random() & 1 || !i) run_warp(warps[i], sequence);
    } while (release());
}
// Null, or what went wrong.
inline const char* launch(dim3 grid, dim3 threads, size_t bytes, std::function<void()> kernel) {
    unsigned n = threads.x * threads.y * threads.z;
    grid_dim = grid, block_dim = threads, body = std::move(kernel), error.clear();
    fibers.resize(n), board[0].assign(n, {}), board[1].assign(n, {});
    std::vector<unsigned> sequence(n), warps;
    for (unsigned w = 0; w < n; w += 32) warps.push_back(w);
    if (order == Order::reversed) std::reverse(warps.begin(), warps.end());
    std::mt19937 random(seed);
    for (block.z = 0; block.z < grid.z; ++block.z)
        for (block.y = 0; block.y < grid.y; ++block.y)
            for (block.x = 0; block.x < grid.x; ++block.x) {
                std::vector<uint32_t>((bytes + 3) / 4, 0xffffffffu).swap(shared);   // fresh, so that ASan sees its ends
                for (unsigned i = 0; i < n; ++i) {
                    if (!fibers[i]) fibers[i] = std::make_unique<Fiber>();
                    prepare(*fibers[i], i, threads);
                    unsigned first = i / 32 * 32;
                    sequence[i] = order == Order::reversed ? first + std::min(n, first + 32) - 1 - i : i;
                }
                run_block(sequence, warps, random);
                for (auto& f : fibers)
                    if (!f->copies.empty()) fail("a thread left with an asynchronous copy not waited for");
                if (!error.empty()) return error.c_str();
            }
    return nullptr;
}
inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(shared.data()); }

// Show a record to the warp, wait for the warp, look at its lanes' records. Two boards in turn: one barrier is enough.
template <class Put> const Shown* exchange(Put put) {
    auto& now = board[self->turn++ & 1];
    put(now[self->rank]);
    wait_warp();
    return &now[self->rank & ~31u];
}
template <class T> T shuffle(T value, unsigned source) {
    const Shown* lanes = exchange([&](Shown& f) { std::memcpy(&f.word, &value, sizeof(T)); });
    T result;
    std::memcpy(&result, &lanes[source & 31].word, sizeof(T));
    return result;
}
inline unsigned lane() { return self->rank & 31; }

}  // namespace emu

#define threadIdx (emu::self->thread)
#define blockIdx emu::block
#define blockDim emu::block_dim
#define gridDim emu::grid_dim
#define __syncthreads() emu::wait_block(__LINE__)
#define __syncwarp(...) emu::wait_warp()
#define __shfl_xor_sync(mask, v, bits) emu::shuffle((v), emu::lane() ^ (bits))
#define __shfl_down_sync(mask, v, by) emu::shuffle((v), emu::lane() + (by) > 31 ? emu::lane() : emu::lane() + (by))
#define SHARED_MEMORY(name) unsigned char* name = emu::shared_memory()
#define LAUNCH(kernel, grid, threads, bytes, stream, ...) \
    (emu::streams.push_back(stream), emu::launch(grid, threads, bytes, [&] { kernel(__VA_ARGS__); }))
inline const char* use_device(int) { return nullptr; }

template <class T> inline T atomicAdd(T* p, T v) { T old = *p; *p += v; return old; }
inline int atomicOr(int* p, int v) { int old = *p; *p |= v; return old; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T> inline T __ldg(const T* p) { return *p; }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t select) {
    uint64_t both = uint64_t(high) << 32 | low;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) r |= uint32_t(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
    return r;
}

inline void cp_async_16(void* to, const void* from, int valid) {
    if ((uintptr_t(to) | uintptr_t(from)) & 15) return emu::fail("cp_async_16: address not a multiple of 16");
    if (valid < 0 || valid > 16) return emu::fail("cp_async_16: valid outside 0..16");
    std::memset(to, 0xff, 16);
    emu::self->copies.push_back({to, from, valid});
}
inline void cp_async_commit() {}
inline void cp_async_wait_all() {
    for (auto& c : emu::self->copies) std::memset(c.to, 0, 16), std::memcpy(c.to, c.from, size_t(c.bytes));
    emu::self->copies.clear();
}
inline int4 load_16(const void* from) {
    if (uintptr_t(from) & 15) return emu::fail("load_16: address not a multiple of 16"), int4{};
    int4 v;
    std::memcpy(&v, from, 16);
    return v;
}
inline void store_16(void* to, int4 v) {
    if (uintptr_t(to) & 15) return emu::fail("store_16: address not a multiple of 16");
    std::memcpy(to, &v, 16);
}

inline float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t as_bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline uint32_t to_tf32(float x) {                              // to nearest, ties away from zero, 10 bits of mantissa
    uint32_t u = as_bits(x);
    return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
    if (exponent == 0) return as_float(sign) + (sign ? -1.f : 1.f) * std::ldexp(float(mantissa), -24);
    return as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}
inline uint32_t round_to(bf16, float x) {
    uint32_t u = as_bits(x);
    return x != x ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
inline uint32_t round_to(f16, float x) {
    uint32_t sign = as_bits(x) >> 16 & 0x8000;
    float size = std::fabs(x);
    if (x != x) return 0x7fffu;
    if (size >= 65520.f) return sign | 0x7c00u;
    if (size < std::ldexp(1.f, -14)) return sign | uint32_t(std::nearbyint(size * std::ldexp(1.f, 24)));
    uint32_t u = as_bits(size);
    return sign | (((u + 0xfffu + (u >> 13 & 1)) >> 13) - (112u << 10));
}
template <class E> inline uint32_t pack(E e, float lo, float hi) { return round_to(e, lo) | round_to(e, hi) << 16; }

// Fragments as in the PTX manual, lane = 4 * row + quad. C and D: rows row, row + 8; columns 2 quad, 2 quad + 1.
template <class Product>
inline void mma_twin(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Product product) {
    const emu::Shown* lanes = emu::exchange([&](emu::Shown& f) { std::memcpy(f.a, a, 16), std::memcpy(f.b, b, 8); });
    unsigned row = emu::lane() >> 2, quad = emu::lane() & 3;
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned q = 0; q < 4; ++q)
            for (unsigned half = 0; half < 2; ++half)           // a[0], a[1]: rows r and r + 8, first half of k
                d[i] += product(lanes[4 * row + q].a[2 * half + i / 2], lanes[4 * (2 * quad + i % 2) + q].b[half]);
}
inline void mma(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_twin(d, a, b, [](uint32_t x, uint32_t y) { return as_float(x & 0xffffe000u) * as_float(y & 0xffffe000u); });
}
template <class E> inline void mma(E, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    auto low = [](uint32_t x) { return to_float(E{uint16_t(x)}); };
    auto high = [](uint32_t x) { return to_float(E{uint16_t(x >> 16)}); };
    mma_twin(d, a, b, [&](uint32_t x, uint32_t y) { return low(x) * low(y) + high(x) * high(y); });
}
