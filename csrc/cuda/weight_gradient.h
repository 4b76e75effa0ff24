// The gradient of the weights: of temporal_conv and, with rows made by the adjacency, of graph_conv.
#pragma once
#include "gather.h"

namespace sparse_stgcn::cuda {

// g: the forward pass as a gather, of in_weight_groups(), g.x its source; dy (N, phases * targets, frames, V). adjacency: of
// Rule::adjacency. dy_sums: null, or (phases * targets, V) floats for the sum of dy over samples and frames; not where there is
// no block. Its tile and its scratch: weight_tile.h.
const char* weight_gradient(const Gather& g, const Adjacency& adjacency, const Tile& tile, Planes dy, Lasso lasso, void* dw,
                            float* dy_sums, void* scratch, void* stream);

}  // namespace sparse_stgcn::cuda
