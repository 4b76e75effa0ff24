// A network compiled for inference: a list of steps over one person's arena of float32 rows. Built once by runtime/
// (batch norm folded into the live weights, offsets resolved), run per person on any thread without allocation.
#pragma once
#include <cstdint>

namespace sparse_stgcn {

// kCtr, kDg: graphs made from the person. Rows of joints are joint_ld floats, a map is V such rows; lanes past the last joint
// repeat the joints of the row's last vector.
struct FusedGraphs {
  int64_t x1 = 0, x2 = 0, joint_ld = 0;  // embeddings, offsets of their first row
  int64_t maps = 0, graph = 0, work = 0;  // room for the tanh maps, for graphs, for two rows
  const float* adjacency = nullptr;       // (K, V, joint_ld)
  const float* scale = nullptr;           // kDg: alpha, beta
  const int32_t* read = nullptr;          // kDg: of every channel, below 0 where nothing reads it
  int64_t live = 0;                       // kCtr: tanh maps that a block of conv4 reads
  const int32_t* live_row = nullptr;      // their rows of x1 and x2
  int64_t mix_bo = 1;                     // kCtr: alpha * conv4 by (subset, block row); offsets from `maps`; bias (K, rows)
  const int32_t *mix_ptr = nullptr, *mix_offset = nullptr;
  const float *mix_weight = nullptr, *mix_bias = nullptr;
};

struct FusedStep {
  enum Kind : int64_t {
    kGraph,  // Z_k = X A_k for the rows that live blocks read, one tile of frames at a time; dst = relu(W Z + bias map)
    kConv,   // dst = relu(W (rows of the arena) + bias + residual): any tap, stride and strided residual is an offset
    kSplit,  // frames of src sorted into `planes` planes: what a strided convolution reads
    kPool,   // mean over all pixels of a row -> features; in columns of `frames` frames of the clip
    kBorders,  // in columns: the `lead` and `trail` frames around those of a strip of dst, from its neighbours; src_frames: the clip's
    kAaGraph = 8,  // AA-GCN: embeddings of a person, G_k = A_k + alpha tanh(a_k' b_k / (R T)) -> maps
    kAaApply,      // Z_k = X G_k for the rows that live blocks read; dst = relu(W Z + bias + residual)
    kAttend,       // dst scaled by 1 + sigmoid for joints, then frames, then channels
    kMeans = 16,  // mean over frames of every row of src -> rows of joints
    kCtr,         // tanh maps; for every channel graphs from them, dst = relu(sum over subsets of x3_k G_k + bias + residual)
    kDg,          // dst = relu(pre(src)) G, a graph for every channel
    kMax,         // dst = maximum over three frames, scaled, shifted
    kJointMean,   // frames of V joints -> frames of V + 1, the last one is the mean
    kCtrInputs = 22,  // kCtr by way of products of src with single maps: dst = relu(W (those products) + bias + residual)
    kJointAdd = 21,   // frames of V + 1 joints -> V: relu(x[v] + coef[v] x[V] + bias)
  };
  int64_t kind = kConv;
  int64_t src = 0, src_ld = 0, src_frames = 0;  // offsets into the arena and row lengths, in floats; frames of V pixels
  int64_t dst = 0, dst_ld = 0, frames = 0;      // dst: first pixel of row 0
  int64_t lead = 0, trail = 0;                  // zero frames kept before and after the frames of every dst row
  int64_t rows = 0, bo = 1;                     // output rows (channels), rows of a block
  int64_t residual = -1, residual_ld = 0;       // added before the ReLU; -1: none
  int64_t relu = 0;                             // 2: one ReLU before the residual is added, another one behind
  int64_t joints = 0;                           // pixels of a frame; 0: V
  int64_t subsets = 0, scratch = 0, scratch_ld = 0, tile = 0;  // kGraph: Z and its tile of frames
  int64_t planes = 1, plane_ld = 0;                            // kSplit: distance of planes in dst
  int64_t groups = 0, made = 0, entries = 0, bias_ld = 0;
  const int32_t *row_ptr = nullptr, *offset = nullptr;  // entries of each block row; offsets from the arena, or from Z
  const float *weight = nullptr, *bias = nullptr;       // bo weights an entry; bias: (rows), or (rows, bias_ld) with period V
  const int32_t *made_subset = nullptr, *made_input = nullptr;  // kGraph: which (k, i) each of the `made` rows of Z is
  const int32_t *ptr = nullptr, *source = nullptr;              // kGraph: sparse adjacency by (k, w), `entries` long
  const float* coef = nullptr;
  const int32_t* diagonal = nullptr;   // kGraph in columns: whether A_k is nothing but a diagonal, and it for all lanes
  const float* lane_coef = nullptr;
  FusedGraphs graphs;
  int64_t maps = 0, hidden = 0;  // AA-GCN: offset of the graphs; kAaGraph: R, kAttend: width between the two linear layers
};

struct FusedNetwork {
  int64_t joints = 0, channels = 0, frames = 0;  // of the input (T, V, C) of a person
  int64_t input = 0, input_ld = 0;               // where its C rows go
  int64_t features = 0, arena = 0;               // outputs a person, floats of an arena
  const float *scale = nullptr, *shift = nullptr;  // folded input norm, (persons, V, C)
  int64_t persons = 1;                             // 1: the same norm for every person
  // 0: rows of pixels. Otherwise the arena holds `columns` arenas of `column` floats, offsets of steps (all but scratch) are into
  // each of them, and a clip is cut into `strips` strips (fused_columns.inl).
  int64_t columns = 0, column = 0, strips = 0, strip_frames = 0;
  int64_t num_steps = 0;
  const FusedStep* steps = nullptr;
  const float* absent = nullptr;  // features of a person that is nothing but zeros, (persons, features)
  const char* tables = nullptr;   // of the instruction set: fused_make_tables
};

}  // namespace sparse_stgcn
