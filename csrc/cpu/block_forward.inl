// The forward pass of an ST-GCN block in training mode, in three passes over the batch:
//
//   z = graph_conv(x)                  reads x, writes z         the sums of bn1 are taken before z leaves
//   y = temporal_conv(relu(bn1(z)))    reads z, writes y         bn1 and ReLU while the panel is packed; sums of bn2
//   out = relu(bn2(y) + residual)      reads y and the residual, writes out
//
// Seven moves of a tensor, where norms and convolutions one by one make nine and read four of the tensors they write.
// Reference: the layers of backbones/stgcn.py.

// A row buffer's channels go to `to` (channels `ld` apart), with their sums.
template <class S>
INLINE void leave(const S* rows, int64_t ld_rows, int64_t live, int64_t pixels, S* to, int64_t ld, Moments<S>* moments) {
  for (int64_t o = 0; o < live; o++) {
    moments[o].add(rows + o * ld_rows, pixels);
    stream_row(to + o * ld, rows + o * ld_rows, pixels);
  }
}

template <class S>
void block_graph_forward(const TemporalShape& s, const Pattern& p, const Adjacency& a, const BlockTensors<S>& b, int threads) {
  const int64_t V = s.V, T = s.T;
  call_scratch.reserve(Scratch::room<int32_t>(p.I * p.K) + Scratch::room<int32_t>(p.blocks * p.bi) +
                       AdjacencyTable<S>::room(a) + ChannelSums<Moments<S>>::room(p.O));
  int32_t* row = call_scratch.take<int32_t>(p.I * p.K);
  int32_t* offset = call_scratch.take<int32_t>(p.blocks * p.bi);
  const AdjacencyTable<S> adjacency(a, b.coef, false, call_scratch);
  const auto plan = GraphPlan::make<S>(s.N, T, V, p, fixed_threads, fixed_tasks, row);
  plan.offsets(p, offset);
  const int64_t tasks = s.N * plan.tiles, chunks = min64(block_chunks, max64(tasks, 1));
  const ChannelSums<Moments<S>> moments(p.O, chunks, call_scratch);
  const GraphInput<S> x{b.x, s.N * p.I * T * V, p.I, T, V};
  in_chunks(tasks, chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    task_scratch.reserve(Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(plan.ld) + Scratch::room<S>(p.bo * plan.ld));
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* input = task_scratch.take<S>(plan.ld);
    S* rows = task_scratch.take<S>(p.bo * plan.ld);
    for (int64_t task = begin; task < end; task++) {
      const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames, frames = min64(plan.frames, T - t0);
      pack_block_graph(plan, p, adjacency, x, n, t0, frames, input, panel);
      for (int64_t g = 0; g < p.rows; g++) {
        const int64_t live = live_rows(p, g), c = g * p.bo;
        gather_row(panel, block_row(p, g, offset, b.graph_values), live, (const S*)nullptr, rows, plan.ld,
                   ceil_div(frames * V, lanes<S>) * lanes<S>);
        if (b.bias_map)
          for (int64_t o = 0; o < live; o++)
            for (int64_t t = 0; t < frames; t++)
              for (int64_t v = 0; v < V; v++) rows[o * plan.ld + t * V + v] += b.bias_map[(c + o) * V + v];
        leave(rows, plan.ld, live, frames * V, b.z + ((n * p.O + c) * T + t0) * V, T * V, moments.of(chunk) + c);
      }
    }
    end_stream();
  });
  finish_moments(moments, b.first);
}

template <class S>
void block_temporal_forward(const TemporalShape& s, const Pattern& p, const BlockTensors<S>& b, int threads) {
  const auto plan = TemporalPlan::make<S>(s, p, fixed_threads, 1);
  const int64_t tasks = s.N * plan.tiles, chunks = min64(block_chunks, max64(tasks, 1)), ldy = s.T_out * s.V;
  call_scratch.reserve(Scratch::room<int32_t>(p.blocks * p.bi) + ChannelSums<Moments<S>>::room(p.O));
  int32_t* offset = call_scratch.take<int32_t>(p.blocks * p.bi);
  plan.offsets(s, p, offset);
  const ChannelSums<Moments<S>> moments(p.O, chunks, call_scratch);
  const Channels<S> z{b.z, p.I * s.T * s.V, nullptr, 0, s.T, s.V, false};
  const int64_t sweep = streamed_sweep<S>;  // pixels of all block rows before the next ones
  in_chunks(tasks, chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    task_scratch.reserve(Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(p.bo * sweep));
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* rows = task_scratch.take<S>(p.bo * sweep);
    for (int64_t task = begin; task < end; task++) {
      const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames;
      const int64_t pixels = min64(plan.frames, s.T_out - t0) * s.V;
      pack_normed(plan, s, z, b.first, n, t0, 0, (S*)nullptr, panel);
      for (int64_t at = 0; at < pixels; at += sweep)
        for (int64_t g = 0; g < p.rows; g++) {
          const int64_t live = live_rows(p, g), c = g * p.bo, count = min64(sweep, pixels - at);
          gather_row(panel + at, block_row(p, g, offset, b.temporal_values), live, b.temporal_bias ? b.temporal_bias + c : nullptr,
                     rows, sweep, ceil_div(count, lanes<S>) * lanes<S>);
          leave(rows, sweep, live, count, b.y + (n * p.O + c) * ldy + t0 * s.V + at, ldy, moments.of(chunk) + c);
        }
    }
    end_stream();
  });
  finish_moments(moments, b.second);
}

template <class S>
void block_output(const TemporalShape& s, int64_t channels, const BlockTensors<S>& b, int threads) {
  const int64_t pixels = s.T_out * s.V, pieces = 8;
  parallel(s.N * pieces, threads, [&](int64_t task) {
    const int64_t n = task / pieces, part = task % pieces;
    for (int64_t c = part * channels / pieces; c < (part + 1) * channels / pieces; c++) {
      const Affine<S> affine = affine_of(b.second, c);
      const int64_t at = (n * channels + c) * pixels;
      const S* y = b.y + at;
      if (b.residual)
        stream_pixels(b.out + at, pixels, [&](auto read) __attribute__((always_inline)) {
          return rectify<S>(affine(read(y)) + read(b.residual + at));
        });
      else
        stream_pixels(b.out + at, pixels, [&](auto read) __attribute__((always_inline)) { return rectify<S>(affine(read(y))); });
    }
    end_stream();
  });
}

template <class S>
void block_forward(const TemporalShape& s, const Pattern& graph, const Adjacency& a, const Pattern& temporal,
                   const BlockTensors<S>& b, int threads) {
  block_graph_forward(s, graph, a, b, threads);
  block_temporal_forward(s, temporal, b, threads);
  block_output(s, temporal.O, b, threads);
}
