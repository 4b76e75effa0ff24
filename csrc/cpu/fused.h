// A network compiled for inference: a list of steps over one person's arena of float32 rows. Built once by runtime/
// (batch norm folded into the live weights, offsets resolved), run per person on any thread without allocation.
#pragma once
#include <cstdint>

namespace sparse_stgcn {

struct FusedStep {
  enum Kind : int64_t {
    kGraph,  // Z_k = X A_k for the rows that live blocks read, one tile of frames at a time; dst = relu(W Z + bias map)
    kConv,   // dst = relu(W (rows of the arena) + bias + residual): any tap, stride and strided residual is an offset
    kSplit,  // frames of src sorted into `planes` planes: what a strided convolution reads
    kPool,   // mean over all pixels of a row -> features
    kAaGraph = 8,  // AA-GCN: embeddings of a person, G_k = A_k + alpha tanh(a_k' b_k / (R T)) -> maps
    kAaApply,      // Z_k = X G_k for the rows that live blocks read; dst = relu(W Z + bias + residual)
    kAttend,       // dst scaled by 1 + sigmoid for joints, then frames, then channels
  };
  int64_t kind = kConv;
  int64_t src = 0, src_ld = 0, src_frames = 0;  // offsets into the arena and row lengths, in floats; frames of V pixels
  int64_t dst = 0, dst_ld = 0, frames = 0;      // dst: first pixel of row 0
  int64_t lead = 0, trail = 0;                  // zero frames kept before and after the frames of every dst row
  int64_t rows = 0, bo = 1;                     // output rows (channels), rows of a block
  int64_t residual = -1, residual_ld = 0;       // added before the ReLU; -1: none
  int64_t relu = 0;
  int64_t subsets = 0, scratch = 0, scratch_ld = 0, tile = 0;  // kGraph: Z and its tile of frames
  int64_t planes = 1, plane_ld = 0;                            // kSplit: distance of planes in dst
  int64_t groups = 0, made = 0, entries = 0, bias_ld = 0;
  const int32_t *row_ptr = nullptr, *offset = nullptr;  // entries of each block row; offsets from the arena, or from Z
  const float *weight = nullptr, *bias = nullptr;       // bo weights an entry; bias: (rows), or (rows, bias_ld) with period V
  const int32_t *made_subset = nullptr, *made_input = nullptr;  // kGraph: which (k, i) each of the `made` rows of Z is
  const int32_t *ptr = nullptr, *source = nullptr;              // kGraph: sparse adjacency by (k, w), `entries` long
  const float* coef = nullptr;
  int64_t maps = 0, hidden = 0;  // AA-GCN: offset of the graphs; kAaGraph: R, kAttend: width between the two linear layers
};

struct FusedNetwork {
  int64_t joints = 0, channels = 0, frames = 0;  // of the input (T, V, C) of a person
  int64_t input = 0, input_ld = 0;               // where its C rows go
  int64_t features = 0, arena = 0;               // outputs a person, floats of an arena
  const float *scale = nullptr, *shift = nullptr;  // folded input norm, (persons, V, C)
  int64_t persons = 1;                             // 1: the same norm for every person
  int64_t num_steps = 0;
  const FusedStep* steps = nullptr;
  const float* absent = nullptr;  // features of a person that is nothing but zeros, (persons, features)
  const char* tables = nullptr;   // of the instruction set: fused_make_tables
};

}  // namespace sparse_stgcn
