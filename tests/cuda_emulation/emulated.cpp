// The CUDA module with every kernel executed on the CPU by csrc/cuda/emulate.h.
#include "cuda/plan.cu"
#include "cuda/temporal_conv.cu"
#include "cuda/weight_gradient.cu"
#include "cuda/adjacency.cu"
#include "cuda/outer.cu"
#include "cuda/graph_conv.cu"
#include "cuda/bindings.cpp"

// The order of threads for the launches to come: 0 forward, 1 reversed, 2 shuffled.
extern "C" __attribute__((visibility("default"))) void emulate_order(int order, unsigned seed) {
    emu::order = emu::Order(order), emu::seed = seed;
}

// How many of the launches since the last call were given another stream than this; -1 if there was no launch.
extern "C" __attribute__((visibility("default"))) int emulate_strays(const void* stream) {
    const size_t all = emu::streams.size(), there = size_t(std::count(emu::streams.begin(), emu::streams.end(), stream));
    emu::streams.clear();
    return all ? int(all - there) : -1;
}
