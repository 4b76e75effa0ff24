// Runs a FusedNetwork. One person is one task: its activations stay in the L2 of one core from the first block to the last.
// Rows end in slack, so a tile may write whole vectors past the last pixel; what lands in the zero frames of a row is cleared.

// One block row over [0, pixels). start(row, first pixel of the tile, vector) is the first value of an accumulator,
// finish(row, pixel, sum) what is stored.
template <class Start, class Finish>
INLINE void fused_row(const float* x, Entries<float> e, int64_t rows, int64_t pixels, float* y, int64_t ldy, Start start,
                      Finish finish) {
  row_pieces(rows, [&](auto r, int64_t o) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value;
    const Entries<float> piece{e.offset, e.weight + o, e.n, e.bo};
    vector_pieces<tile_vectors<R>>(ceil_div(pixels, lanes<float>), [&](auto n, int64_t v) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      const int64_t p = v * lanes<float>;
      gather_tile<float, R, N>(
          x + p, piece, [&](int j, int i) __attribute__((always_inline)) { return start(o + j, p, i); },
          [&](int j, int i, Vec<float> sum) __attribute__((always_inline)) {
            const int64_t at = p + i * lanes<float>;
            store(y + (o + j) * ldy + at, finish(o + j, at, sum));
          });
    });
  });
}

// max(0, v): one instruction with the bits of v < 0 ? 0 : v, for NaN and -0 too. A NaN stays one: it must not become an answer.
INLINE Vec<float> relu(Vec<float> v) {
#if VECTOR_BYTES == 64
  return (Vec<float>)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v);
#elif VECTOR_BYTES == 32
  return (Vec<float>)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v);
#else
  return v < Vec<float>{} ? Vec<float>{} : v;
#endif
}

INLINE Entries<float> fused_entries(const FusedStep& s, int64_t g) {
  const int64_t first = s.row_ptr[g];
  return {s.offset + first, s.weight + first * s.bo, s.row_ptr[g + 1] - first, s.bo};
}

// What one of `parts` threads does of a step: a range of its block rows. Every output is the same sum whoever makes it.
struct Share {
  int64_t part = 0, parts = 1;
  int64_t begin(int64_t n) const { return part * n / parts; }
  int64_t end(int64_t n) const { return (part + 1) * n / parts; }
};

// Frames of a step's tiles, at most s.tile and as even as they can be: a small last one would leave vectors idle.
INLINE int64_t even_tile(const FusedStep& s) { return ceil_div(s.frames, max64(1, ceil_div(s.frames, s.tile))); }

INLINE void clear_halo(const FusedStep& s, int64_t V, float* arena, Share share) {
  if (!s.lead && !s.trail) return;
  const int64_t last = min64(share.end(s.groups) * s.bo, s.rows);
  for (int64_t o = share.begin(s.groups) * s.bo; o < last; o++) {
    float* row = arena + s.dst + o * s.dst_ld;
    std::memset(row - s.lead * V, 0, s.lead * V * sizeof(float));
    std::memset(row + s.frames * V, 0, s.trail * V * sizeof(float));
  }
}

// Pixels that all block rows sweep before the next ones: what they read of the arena stays near.
constexpr int64_t fused_sweep = 6 * tile_vectors<MAX_ROWS> * lanes<float>;

// A function for every kind of step and of epilogue: in one function with all of them the compiler spills what stays in registers here.
#define STEP __attribute__((noinline))

enum Epilogue { kPlain, kRelu, kAdded, kReluAdded };

template <Epilogue E>
STEP void fused_conv_rows(const FusedStep& s, int64_t pixels, float* arena, Share share) {
  const int64_t ldy = s.dst_ld, ldr = s.residual_ld;  // copies: a store through a float* may change what lies in memory
  for (int64_t at = 0; at < pixels; at += fused_sweep)
    for (int64_t g = share.begin(s.groups), last = share.end(s.groups); g < last; g++) {
      const int64_t first = g * s.bo, rows = min64(s.bo, s.rows - first);
      const float* bias = s.bias + first;
      const float* residual = arena + s.residual + first * ldr + at;
      fused_row(arena + at, fused_entries(s, g), rows, min64(fused_sweep, pixels - at), arena + s.dst + first * ldy + at, ldy,
                [=](int64_t o, int64_t, int) __attribute__((always_inline)) { return splat<float>(bias[o]); },
                [=](int64_t o, int64_t p, Vec<float> sum) __attribute__((always_inline)) {
                  if constexpr (E == kReluAdded) sum = relu(sum);
                  if constexpr (E >= kAdded) sum += load(residual + o * ldr + p);
                  if constexpr (E != kPlain) sum = relu(sum);
                  return sum;
                });
    }
}

INLINE void fused_conv(const FusedStep& s, int64_t V, float* arena, Share share) {
  const int64_t pixels = s.frames * V;
  if (s.residual >= 0 && s.relu == 2) fused_conv_rows<kReluAdded>(s, pixels, arena, share);
  else if (s.residual >= 0) fused_conv_rows<kAdded>(s, pixels, arena, share);
  else if (s.relu) fused_conv_rows<kRelu>(s, pixels, arena, share);
  else fused_conv_rows<kPlain>(s, pixels, arena, share);
  clear_halo(s, V, arena, share);
}

// Z of a step: one for the person, or, where threads share the step, one for each with the rows that its block rows read.
struct MadeRows {
  float* z;
  const uint8_t* wanted = nullptr;
  MadeRows(const FusedStep& s, float* arena, Share share) : z(arena + s.scratch) {
    if (share.parts == 1) return;
    task_scratch.reserve(Scratch::room<uint8_t>(s.made) + Scratch::room<float>((s.made + 1) * s.scratch_ld));
    uint8_t* flags = task_scratch.take<uint8_t>(s.made);
    z = task_scratch.take<float>((s.made + 1) * s.scratch_ld);
    std::memset(flags, 0, s.made);
    const int64_t last = s.row_ptr[share.end(s.groups)];
    for (int64_t e = s.row_ptr[share.begin(s.groups)]; e < last; e++) flags[s.offset[e] / s.scratch_ld] = 1;
    wanted = flags;
  }
  bool has(int64_t row) const { return !wanted || wanted[row]; }
};

STEP void fused_graph(const FusedStep& s, int64_t V, const AdjacencyTable<float>& adjacency, float* arena, Share share) {
  const MadeRows made(s, arena, share);
  const int64_t ldy = s.dst_ld, ldb = s.bias_ld;
  const int64_t tile = even_tile(s);
  for (int64_t t0 = 0; t0 < s.frames; t0 += tile) {
    const int64_t frames = min64(tile, s.frames - t0);
    for (int64_t z = 0; z < s.made; z++)
      if (made.has(z))
        adjacency.apply(s.made_subset[z], arena + s.src + s.made_input[z] * s.src_ld + t0 * V, frames, made.z + z * s.scratch_ld);
    for (int64_t g = share.begin(s.groups), last = share.end(s.groups); g < last; g++) {
      const int64_t first = g * s.bo, rows = min64(s.bo, s.rows - first);
      const float* bias = s.bias + first * ldb;
      fused_row(made.z, fused_entries(s, g), rows, frames * V, arena + s.dst + first * ldy + t0 * V, ldy,
                [=](int64_t o, int64_t p, int i) __attribute__((always_inline)) { return load(bias + o * ldb + p % V + i * lanes<float>); },
                [](int64_t, int64_t, Vec<float> sum) __attribute__((always_inline)) { return relu(sum); });
    }
  }
  clear_halo(s, V, arena, share);
}

STEP void fused_split(const FusedStep& s, int64_t V, float* arena, Share share) {
  for (int64_t r = share.begin(s.rows); r < share.end(s.rows); r++)
    for (int64_t q = 0; q < s.planes; q++) {
      float* to = arena + s.dst + r * s.dst_ld + q * s.plane_ld;
      int64_t t = q;
      for (; t < s.src_frames; t += s.planes, to += V)
        std::memcpy(to, arena + s.src + r * s.src_ld + t * V, V * sizeof(float));
      std::memset(to, 0, (arena + s.dst + r * s.dst_ld + q * s.plane_ld + s.frames * V - to) * sizeof(float));
    }
}

INLINE void fused_pool(const FusedStep& s, int64_t V, const float* arena, float* features) {
  const int64_t pixels = s.src_frames * V, whole = pixels / lanes<float> * lanes<float>;
  for (int64_t r = 0; r < s.rows; r++) {
    const float* row = arena + s.src + r * s.src_ld;
    Vec<float> sum[4] = {};
    int64_t p = 0;
    for (; p + 4 * lanes<float> <= whole; p += 4 * lanes<float>)
      UNROLL for (int i = 0; i < 4; i++) sum[i] += load(row + p + i * lanes<float>);
    for (; p < whole; p += lanes<float>) sum[0] += load(row + p);
    float total = sum_lanes<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; p < pixels; p++) total += row[p];
    features[r] = total / (float)pixels;
  }
}

void fused_branch_step(const FusedStep& s, int64_t V, float* arena);  // fused_branches.inl
void fused_ctr(const FusedStep& s, int64_t V, float* arena);          // fused_ctr.inl
void fused_dg(const FusedStep& s, int64_t V, float* arena);           // fused_dg.inl
void fused_ctr_inputs(const FusedStep& s, int64_t V, float* arena);   // fused_inputs.inl
inline void fused_aa(const FusedStep& s, int64_t V, float* arena, Share share);  // fused_aa.inl

#if VECTOR_BYTES == 64
inline void column_step(const FusedNetwork& net, const FusedStep& s, float* arena, float* features, Share share);  // fused_columns.inl
#endif

// The normalised input of a person. False if it holds a NaN or an infinity, of which the network makes NaN.
INLINE bool fused_input(const FusedNetwork& net, const float* x, const int64_t stride[3], int64_t person, float* arena) {
  const int64_t T = net.frames, V = net.joints, C = net.channels;
  const float* scale = net.scale + person % net.persons * V * C;
  const float* shift = net.shift + person % net.persons * V * C;
  bool number = true;
  for (int64_t c = 0; c < C; c++) {
    float* to = arena + net.input + c * net.input_ld;
    for (int64_t k = 0; k < net.columns; k++) std::memset(to + k * net.column, 0, net.strip_frames * 16 * sizeof(float));
    for (int64_t t = 0; t < T; t++)
      for (int64_t v = 0; v < V; v++) {
        const float value = x[t * stride[0] + v * stride[1] + c * stride[2]];
        const int64_t q = net.columns ? t / net.strip_frames * V + v : 0;
        number &= value - value == 0;
        to[net.columns ? q / 16 * net.column + t % net.strip_frames * 16 + q % 16 : t * V + v] = value * scale[v * C + c] + shift[v * C + c];
      }
  }
  return number;
}

// Whether threads can share a step.
INLINE bool shareable(const FusedStep& s) { return s.kind != FusedStep::kPool && s.kind < FusedStep::kAttend; }

inline void fused_step(const FusedNetwork& net, const FusedStep& s, float* arena, float* features, Share share) {
  const int64_t V = net.joints;
#if VECTOR_BYTES == 64
  if (net.columns) return column_step(net, s, arena, features, share);
#endif
  if (s.kind == FusedStep::kGraph) fused_graph(s, V, ((const AdjacencyTable<float>*)net.tables)[&s - net.steps], arena, share);
  else if (s.kind == FusedStep::kConv) fused_conv(s, s.joints ? s.joints : V, arena, share);
  else if (s.kind == FusedStep::kSplit) fused_split(s, V, arena, share);
  else if (s.kind >= FusedStep::kAaGraph && s.kind <= FusedStep::kAttend) fused_aa(s, V, arena, share);
  else if (s.kind == FusedStep::kPool) fused_pool(s, V, arena, features);
  else if (s.kind == FusedStep::kCtr) fused_ctr(s, V, arena);
  else if (s.kind == FusedStep::kCtrInputs) fused_ctr_inputs(s, V, arena);
  else if (s.kind == FusedStep::kDg) fused_dg(s, V, arena);
  else fused_branch_step(s, V, arena);
}

// One person, its steps shared by `threads` threads. A person with a number that is not finite has no features but NaN.
inline void fused_person(const FusedNetwork& net, const float* x, const int64_t stride[3], int64_t person, float* arena,
                         float* features, int threads) {
  if (!fused_input(net, x, stride, person, arena)) {
    for (int64_t i = 0; i < net.features; i++) features[i] = __builtin_nanf("");
    return;
  }
  for (int64_t j = 0; j < net.num_steps; j++) {
    const FusedStep& s = net.steps[j];
    const int64_t parts = shareable(s) ? threads : 1;
    parallel(parts, threads, [&](int64_t part) { fused_step(net, s, arena, features, {part, parts}); });
  }
}

// Whether a person is nothing but zeros.
INLINE bool absent(const float* x, const int64_t stride[3], int64_t T, int64_t V, int64_t C) {
  for (int64_t t = 0; t < T; t++)
    for (int64_t v = 0; v < V; v++)
      for (int64_t c = 0; c < C; c++)
        if (x[t * stride[0] + v * stride[1] + c * stride[2]] != 0) return false;
  return true;
}

// Tables of a network that are the same for all calls, made once: one for every step, filled for kGraph.
inline size_t fused_tables_room(const FusedNetwork& net) {
  size_t room = Scratch::room<AdjacencyTable<float>>(net.num_steps);
  for (int64_t j = 0; j < net.num_steps; j++)
    if (net.steps[j].kind == FusedStep::kGraph)
      room += AdjacencyTable<float>::room({net.steps[j].subsets, net.joints, net.steps[j].entries, nullptr, nullptr});
  return room;
}
inline void fused_make_tables(const FusedNetwork& net, char* memory) {
  Scratch scratch;
  scratch.base = memory, scratch.size = fused_tables_room(net);
  auto* tables = scratch.take<AdjacencyTable<float>>(net.num_steps);
  for (int64_t j = 0; j < net.num_steps; j++) {
    const FusedStep& s = net.steps[j];
    if (s.kind == FusedStep::kGraph)
      new (&tables[j]) AdjacencyTable<float>({s.subsets, net.joints, s.entries, s.ptr, s.source}, s.coef, false, scratch);
  }
  scratch.base = nullptr;  // the caller's
}

// A person whose steps are shared has one arena, of the thread that calls.
inline thread_local Scratch shared_arena;

// x (batch, persons, T, V, C) with strides, read by `count` networks; features[i] (batch * persons, nets[i]->features).
// The features of an absent person are a constant of the network: nets[i]->absent, where it is known, is copied. A task is one
// person in one network; with fewer persons than threads, they share the steps of a task.
inline void fused_run(const FusedNetwork* const* nets, int64_t count, int64_t batch, int64_t persons, const float* x,
                      const int64_t stride[5], float* const* features, int threads) {
  const int64_t total = batch * persons;
  call_scratch.reserve(Scratch::room<int64_t>(total));
  int64_t* todo = call_scratch.take<int64_t>(total);
  int64_t present = 0;
  bool known = true;
  for (int64_t n = 0; n < count; n++) known = known && nets[n]->absent;
  auto person = [&](int64_t i) { return x + i / persons * stride[0] + i % persons * stride[1]; };
  for (int64_t i = 0; i < total; i++) {
    if (known && absent(person(i), stride + 2, nets[0]->frames, nets[0]->joints, nets[0]->channels))
      for (int64_t n = 0; n < count; n++) {
        const int64_t width = nets[n]->features;
        std::memcpy(features[n] + i * width, nets[n]->absent + i % persons % nets[n]->persons * width, width * sizeof(float));
      }
    else todo[present++] = i;
  }
  auto run = [&](int64_t task, Scratch& scratch, int share) {
    const FusedNetwork& net = *nets[task % count];
    const int64_t i = todo[task / count];
    scratch.reserve(Scratch::room<float>(net.arena));
    fused_person(net, person(i), stride + 2, i % persons, scratch.take<float>(net.arena), features[task % count] + i * net.features, share);
  };
  const int64_t tasks = present * count;
  if (present < threads)
    for (int64_t task = 0; task < tasks; task++) run(task, shared_arena, threads);
  else  // tasks in the order of persons, so that every thread has as much of each network; its share network by network
    parallel(threads, threads, [&](int64_t part) {
      const int64_t begin = tasks * part / threads, end = tasks * (part + 1) / threads;
      for (int64_t n = 0; n < count; n++)
        for (int64_t task = begin + (n + count - begin % count) % count; task < end; task += count) run(task, task_scratch, 1);
    });
}
