// The backward pass of an ST-GCN block in training mode, in three passes over the batch:
//
//   g = dout where out > 0             reads dout, out, y; writes g          the two sums of bn2's gradient
//   dz' = d/d bn1(z), where it is > 0  reads g, y, z, writes dz'             dy = bn2's gradient and relu(bn1(z)) are made as
//                                                                           rows are packed; dW, dX; the two sums of bn1's
//   dx                                 reads dz', z, x, g, writes dx         dz = bn1's gradient as rows are packed; dW, dX, dA
//
// Neither relu(bn1(z)) nor dy nor dz exists as a whole tensor, and each is made once for dX and dW.

template <class S>
void block_output_backward(const TemporalShape& s, int64_t channels, const BlockTensors<S>& b, const BlockGradients<S>& d,
                           NormSlope<S>* slope, int threads) {
  const int64_t pixels = s.T_out * s.V, chunks = min64(block_chunks, max64(s.N, 1));
  call_scratch.reserve(ChannelSums<SlopeSums>::room(channels));
  const ChannelSums<SlopeSums> sums(channels, chunks, call_scratch);
  in_chunks(s.N, chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    constexpr int64_t piece = norm_vectors * lanes<S>;
    alignas(64) S row[piece];
    for (int64_t n = begin; n < end; n++)
      for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < pixels; p += piece) {
          const int64_t count = min64(piece, pixels - p), at = (n * channels + c) * pixels + p;
          const S *out = b.out + at, *dout = d.dout + at;
          make_row(row, count, [&](auto read) __attribute__((always_inline)) { return positive<S>(read(out), read(dout)); });
          sums.of(chunk)[c].add(row, b.y + at, count, b.second.mean[c]);
          stream_row(d.g + at, row, count);
        }
    end_stream();
  });
  finish_slopes(sums, b.second, (double)s.N * (double)pixels, slope, d.dgamma2, d.dbeta2);
}

// The rows of g (gradient of a norm's output) and x (its input), channels [c, c + live), as rows of the norm's gradient.
template <class S>
INLINE void pack_slope(const NormSlope<S>* slope, const S* g, const S* x, int64_t channel, int64_t live, int64_t pixels, S* rows,
                       int64_t ld) {
  for (int64_t o = 0; o < live; o++, g += channel, x += channel, rows += ld) {
    const auto gradient = slope[o].gradient();
    std::memset(rows + pixels / lanes<S> * lanes<S>, 0, VECTOR_BYTES);
    make_row(rows, pixels, [&](auto read) __attribute__((always_inline)) { return gradient(read(g), read(x)); });
  }
}

// Rows of dy = the gradient of bn2's input, made of g and y as they are packed.
template <class S>
struct SlopedRows {
  const NormSlope<S>* slope;
  const S *g, *y;
  int64_t channels, ld;  // of y
  INLINE int64_t at(int64_t n, int64_t c, int64_t first) const { return (n * channels + c) * ld + first; }
  INLINE void pack(int64_t n, int64_t c, int64_t live, int64_t first, int64_t pixels, S* rows, int64_t ld_rows) const {
    pack_slope(slope + c, g + at(n, c, first), y + at(n, c, first), ld, live, pixels, rows, ld_rows);
  }
  INLINE void ahead(Ahead<S>& next, int64_t n, int64_t c, int64_t live, int64_t first, int64_t pixels) const {
    next.add(g + at(n, c, first), live, ld, pixels);
    next.add(y + at(n, c, first), live, ld, pixels);
  }
};

template <class S>
void block_temporal_backward(const TemporalShape& s, const Pattern& p, const BlockTensors<S>& b, const BlockGradients<S>& d,
                             const NormSlope<S>* slope, NormSlope<S>* first_slope, int threads) {
  const int64_t sample = p.I * s.T * s.V;
  const NormedConv<S> conv{s, p, b.temporal_values, b.first, {b.z, sample, d.dz, sample, s.T, s.V, false}};
  const SlopedRows<S> dy{slope, d.g, b.y, p.O, s.T_out * s.V};
  const NormedBackward<S, SlopedRows<S>> pass(conv, dy);
  const int64_t entries = p.blocks * p.bi, size = entries * p.bo, chunks = min64(max_chunks, max64(s.N, 1));
  call_scratch.reserve(Scratch::room<int32_t>(entries) + Scratch::room<S>(chunks * size) + Scratch::room<S>(chunks * p.O) +
                       ChannelSums<SlopeSums>::room(p.I) + TransposedEntries<S>::room(p, s.stride));
  int32_t* offset = call_scratch.take<int32_t>(entries);
  pass.plan.offsets(s, p, offset);
  const TransposedEntries<S> transposed(p, pass.gathers ? s.stride : 0, b.temporal_values, pass.dy_ld(), pass.shift(), call_scratch);
  S* partial = call_scratch.take<S>(chunks * size);
  S* partial_bias = call_scratch.take<S>(chunks * p.O);
  const ChannelSums<SlopeSums> sums(p.I, chunks, call_scratch);
  in_chunks(s.N, chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    S *dw = partial + chunk * size, *dbias = partial_bias + chunk * p.O;
    std::memset(dw, 0, size * sizeof(S));
    std::memset(dbias, 0, p.O * sizeof(S));
    for (int64_t n = begin; n < end; n++) {
      task_scratch.reserve(pass.room());
      pass.run(n, offset, transposed, dw, dbias, sums.of(chunk));
    }
    clear_ragged(p, dw);
    end_stream();
  });
  add_chunks(partial, chunks, p.blocks, p.bi * p.bo, Lasso<S>{}, d.dtemporal, threads);
  if (d.dbias) add_chunks(partial_bias, chunks, p.O, 1, Lasso<S>{}, d.dbias, 1);
  finish_slopes(sums, b.first, (double)s.N * (double)(s.T * s.V), first_slope, d.dgamma1, d.dbeta1);
}

template <class S>
void block_graph_backward(const TemporalShape& s, const Pattern& p, const Adjacency& a, const BlockTensors<S>& b,
                          const BlockGradients<S>& d, const NormSlope<S>* slope, int threads) {
  const int64_t T = s.T, V = s.V, entries = p.blocks * p.bi, size = entries * p.bo, sums = AdjacencyTable<S>::sums(a);
  call_scratch.reserve(Scratch::room<int32_t>(p.I * p.K) + Scratch::room<int32_t>(entries) + 2 * AdjacencyTable<S>::room(a) +
                       Scratch::room<S>(max_chunks * sums) + Scratch::room<S>(max_chunks * size) +
                       Scratch::room<S>(max_chunks * p.O * V) + TransposedEntries<S>::room(p, p.K));
  int32_t* row = call_scratch.take<int32_t>(p.I * p.K);
  int32_t* offset = call_scratch.take<int32_t>(entries);
  const AdjacencyTable<S> forward(a, b.coef, false, call_scratch), transposed(a, b.coef, true, call_scratch);
  S* partial = call_scratch.take<S>(max_chunks * size);
  S* partial_bias = call_scratch.take<S>(max_chunks * p.O * V);
  S* partial_coef = call_scratch.take<S>(max_chunks * sums);
  const bool gathers = p.bo < 4;
  const auto plan = GraphPlan::make<S>(s.N, T, V, p, fixed_threads, fixed_tasks, row, gathers ? 1 : 2);
  plan.offsets(p, offset);
  const TransposedEntries<S> by_input(p, gathers ? p.K : 0, b.graph_values, plan.ld, [](int64_t k, int64_t q) { return k == q ? 0 : -1; },
                                      call_scratch);
  const int64_t tasks = s.N * plan.tiles, chunks = min64(max_chunks, max64(tasks, 1));
  const GraphInput<S> x{b.x, s.N * p.I * T * V, p.I, T, V};
  in_chunks(tasks, chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    S *dw = partial + chunk * size, *bias = partial_bias + chunk * p.O * V, *coef = partial_coef + chunk * sums;
    std::memset(dw, 0, size * sizeof(S));
    std::memset(bias, 0, p.O * V * sizeof(S));
    std::memset(coef, 0, sums * sizeof(S));
    // By gathers: a row of dZ for each subset, and all rows of dz; otherwise all rows of dZ, and dz of one block row.
    const int64_t dpanel_size = gathers ? p.K * plan.ld : plan.panel_size(), rows_size = (gathers ? p.O : p.bo) * plan.ld;
    task_scratch.reserve(Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(dpanel_size) + Scratch::room<S>(rows_size) +
                         2 * Scratch::room<S>(plan.ld) + Scratch::room<const S*>(p.K));
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* dpanel = task_scratch.take<S>(dpanel_size);
    S* all_rows = task_scratch.take<S>(rows_size);
    S* copy = task_scratch.take<S>(plan.ld);
    S* output = task_scratch.take<S>(plan.ld);
    const S** subset = task_scratch.take<const S*>(p.K);
    for (int64_t task = begin; task < end; task++) {
      const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames, frames = min64(plan.frames, T - t0), pixels = frames * V;
      pack_block_graph(plan, p, forward, x, n, t0, frames, copy, panel);
      for (int64_t r = 0; !gathers && r <= plan.zrows; r++) std::memset(dpanel + r * plan.ld, 0, (pixels + lanes<S>) * sizeof(S));
      for (int64_t g = 0; g < p.rows; g++) {
        const int64_t live = live_rows(p, g), c = g * p.bo, at = ((n * p.O + c) * T + t0) * V, e = p.row_ptr[g] * p.bi;
        S* rows = gathers ? all_rows + c * plan.ld : all_rows;
        pack_slope(slope + c, d.dz + at, b.z + at, T * V, live, pixels, rows, plan.ld);
        if (!gathers) scatter_row(dpanel, block_row(p, g, offset, b.graph_values), live, rows, plan.ld, pixels);
        Ahead<S> ahead;
        if (g + 1 < p.rows) {
          ahead.add(d.dz + at + p.bo * T * V, live_rows(p, g + 1), T * V, pixels);
          ahead.add(b.z + at + p.bo * T * V, live_rows(p, g + 1), T * V, pixels);
        }
        const int64_t i = g * p.I / p.rows, share = (g + 1) * p.I / p.rows - i;
        if (t0 + frames < T) ahead.add(b.x + ((n * p.I + i) * T + t0 + frames) * V, share, T * V, min64(plan.frames, T - t0 - frames) * V);
        else if (task + 1 < end) ahead.add(b.x + ((n + 1) * p.I + i) * T * V, share, T * V, plan.frames * V);
        if (d.identity) ahead.add(d.g + ((n * p.I + i) * T + t0) * V, share, T * V, pixels);
        const int64_t count = (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi;
        ahead.spread(dot_calls<S>(count, pixels));
        dot_row(panel, offset + e, count, p.bo, live, rows, plan.ld, pixels, dw + e * p.bo, ahead);
        if (d.dbias_map)
          for (int64_t o = 0; o < live; o++)
            for (int64_t t = 0; t < frames; t++)
              for (int64_t v = 0; v < V; v++) bias[(c + o) * V + v] += rows[o * plan.ld + t * V + v];
      }
      for (int64_t i = 0; i < p.I; i++) {
        const int64_t at = ((n * p.I + i) * T + t0) * V;
        for (int64_t k = 0; k < p.K; k++) {
          const int32_t r = plan.row[i * p.K + k];
          subset[k] = r < 0 ? nullptr : dpanel + (gathers ? k : r) * plan.ld;
          if (gathers && r >= 0) GatheredDz<S>{by_input, all_rows}.make(i * p.K + k, pixels, dpanel + k * plan.ld);
        }
        transposed.join(subset, d.identity ? d.g + at : nullptr, frames, output);
        if (d.dcoef) {
          const S* input = x.row(n, i, t0, frames, copy);
          for (int64_t k = 0; k < p.K; k++)
            if (subset[k]) forward.correlate(k, input, subset[k], frames, coef);
        }
        stream_row(d.dx + at, output, pixels);
      }
    }
    clear_ragged(p, dw);
    end_stream();
  });
  add_chunks(partial, chunks, p.blocks, p.bi * p.bo, Lasso<S>{}, d.dgraph, threads);
  if (d.dbias_map) add_chunks(partial_bias, chunks, p.O, V, Lasso<S>{}, d.dbias_map, 1);
  if (!d.dcoef) return;
  add_parts(partial_coef, chunks, sums);
  forward.collect(a, partial_coef, d.dcoef);
}

inline thread_local Scratch block_scratch;  // what the three passes share; each has call_scratch for itself

template <class S>
void block_backward(const TemporalShape& s, const Pattern& graph, const Adjacency& a, const Pattern& temporal,
                    const BlockTensors<S>& b, const BlockGradients<S>& d, int threads) {
  block_scratch.reserve(Scratch::room<NormSlope<S>>(temporal.I) + Scratch::room<NormSlope<S>>(temporal.O));
  auto* first = block_scratch.take<NormSlope<S>>(temporal.I);
  auto* second = block_scratch.take<NormSlope<S>>(temporal.O);
  block_output_backward(s, temporal.O, b, d, second, threads);
  block_temporal_backward(s, temporal, b, d, second, first, threads);
  block_graph_backward(s, graph, a, b, d, first, threads);
}
