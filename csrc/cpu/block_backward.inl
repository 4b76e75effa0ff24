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

// A sample at a time, tile by tile of output frames. The panels of relu(bn1(z)) and of its gradient hold the frames that the
// tile reaches; those that the next tile reaches too are carried over, so that no frame is computed twice.
// Blocks of few outputs (`gathers`) take a panel of dy with a halo instead, and make each row of the gradient at once from it.
template <class S>
struct TemporalBackward {
  const TemporalShape& s;
  const Pattern& p;
  const BlockTensors<S>& b;
  const BlockGradients<S>& d;
  const NormSlope<S>* slope;
  const bool gathers;
  TemporalPlan plan;
  int64_t carried, ldy, lead, held;  // lead: frames of dy before the tile, held: with those behind it

  TemporalBackward(const TemporalShape& s_, const Pattern& p_, const BlockTensors<S>& b_, const BlockGradients<S>& d_,
                   const NormSlope<S>* slope_)
      : s(s_), p(p_), b(b_), d(d_), slope(slope_), gathers(p_.bo < 4) {
    plan.phases = s.stride;
    plan.padding = (p.K - 1) / 2 * s.dilation;
    carried = (p.K - 1) * s.dilation / s.stride;
    const int64_t budget = 1000 * 1024, frame = 2 * max64(p.I, p.O) * plan.phases * s.V * (int64_t)sizeof(S);
    const int64_t most = max64(budget / frame - carried, 6);
    plan.tiles = ceil_div(s.T_out, most);
    plan.set_frames<S>(ceil_div(s.T_out, plan.tiles), s, p);
    ldy = row_length<S>(plan.frames * s.V);
    lead = plan.padding / s.stride;
    held = plan.frames + 2 * lead + 1;
  }
  int64_t dy_ld() const { return row_length<S>(held * s.V); }
  int64_t dpanel_size() const { return gathers ? p.O * dy_ld() : plan.panel_size(p); }
  size_t room() const {
    return Scratch::room<S>(plan.panel_size(p)) + Scratch::room<S>(dpanel_size()) + Scratch::room<S>(p.bo * ldy) +
           2 * Scratch::room<S>(row_size()) + Scratch::room<S>(ldy);
  }
  // Where tap k of input frame q of a tile is found in a row of dy, or -1.
  auto shift() const {
    return [this](int64_t k, int64_t q) {
      const int64_t at = q + plan.padding - k * s.dilation;
      return at % s.stride ? int64_t(-1) : (at / s.stride + lead) * s.V;
    };
  }
  int64_t row_size() const { return (plan.plane_frames + 1) * plan.phases * s.V + lanes<S>; }

  void run(int64_t n, const int32_t* offset, const TransposedEntries<S>& entries, S* dw, S* dbias, SlopeSums* sums) const {
    S* panel = task_scratch.take<S>(plan.panel_size(p));
    S* dpanel = task_scratch.take<S>(dpanel_size());
    S* rows = task_scratch.take<S>(p.bo * ldy);
    S* first_row = task_scratch.take<S>(row_size());
    S* second_row = task_scratch.take<S>(row_size());
    S* phase_row = task_scratch.take<S>(ldy);
    if (gathers) return run_gathers(n, offset, entries, panel, dpanel, rows, first_row, second_row, phase_row, dw, dbias, sums);
    std::memset(dpanel, 0, plan.panel_size(p) * sizeof(S));
    for (int64_t t0 = 0; t0 < s.T_out; t0 += plan.frames) {
      const int64_t frames = min64(plan.frames, s.T_out - t0);
      if (t0) carry(panel), carry(dpanel);
      pack_normed(plan, s, p, b.z + n * p.I * s.T * s.V, b.first, t0, t0 ? carried : 0, panel);
      for (int64_t g = 0; g < p.rows; g++) {
        const int64_t live = live_rows(p, g), c = g * p.bo, at = ((n * p.O + c) * s.T_out + t0) * s.V, e = p.row_ptr[g] * p.bi;
        pack_slope(slope + c, d.g + at, b.y + at, s.T_out * s.V, live, frames * s.V, rows, ldy);
        scatter_row(dpanel, block_row(p, g, offset, b.temporal_values), live, rows, ldy, frames * s.V);
        Ahead<S> ahead;
        if (g + 1 < p.rows) {
          const int64_t next = at + p.bo * s.T_out * s.V, count = live_rows(p, g + 1);
          ahead.add(d.g + next, count, s.T_out * s.V, frames * s.V);
          ahead.add(b.y + next, count, s.T_out * s.V, frames * s.V);
        }
        const int64_t i = g * p.I / p.rows, z_frame = (t0 + plan.frames + carried) * s.stride - plan.padding;  // first of the next tile
        ahead.add(b.z + ((n * p.I + i) * s.T + z_frame) * s.V, (g + 1) * p.I / p.rows - i, s.T * s.V,
                  (min64(s.T, z_frame + plan.frames * s.stride) - z_frame) * s.V);
        const int64_t count = (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi;
        ahead.spread(dot_calls<S>(count, frames * s.V));
        dot_row(panel, offset + e, count, p.bo, live, rows, ldy, frames * s.V, dw + e * p.bo, ahead);
        for (int64_t o = 0; o < live; o++) dbias[c + o] += sum_row(rows + o * ldy, frames * s.V);
      }
      const bool last = t0 + frames == s.T_out;
      const int64_t begin = max64(0, t0 * s.stride - plan.padding);
      const int64_t finish = last ? s.T : min64(s.T, (t0 + frames) * s.stride - plan.padding);
      for (int64_t i = 0; i < p.I && begin < finish; i++)
        leave(n, i, begin, finish, frames_of(panel + i * plan.ld, t0, begin, finish, first_row),
              frames_of(dpanel + i * plan.ld, t0, begin, finish, second_row), second_row, sums);
    }
  }

  void run_gathers(int64_t n, const int32_t* offset, const TransposedEntries<S>& entries, S* panel, S* dpanel, S* rows, S* first_row,
                   S* second_row, S* phase_row, S* dw, S* dbias, SlopeSums* sums) const {
    for (int64_t t0 = 0; t0 < s.T_out; t0 += plan.frames) {
      const int64_t frames = min64(plan.frames, s.T_out - t0), pixels = frames * s.V, whole = ceil_div(pixels, lanes<S>) * lanes<S>;
      if (t0) carry(panel);
      pack_normed(plan, s, p, b.z + n * p.I * s.T * s.V, b.first, t0, t0 ? carried : 0, panel);
      pack_dy(n, t0, dpanel);
      for (int64_t g = 0; g < p.rows; g++) {
        const int64_t live = live_rows(p, g), c = g * p.bo, e = p.row_ptr[g] * p.bi;
        for (int64_t o = 0; o < live; o++) {
          std::memcpy(rows + o * ldy, dpanel + (c + o) * dy_ld() + lead * s.V, pixels * sizeof(S));
          std::memset(rows + o * ldy + pixels, 0, (whole - pixels) * sizeof(S));
          dbias[c + o] += sum_row(rows + o * ldy, pixels);
        }
        dot_row(panel, offset + e, (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi, p.bo, live, rows, ldy, pixels, dw + e * p.bo);
      }
      const int64_t begin = t0 * s.stride, end = min64(s.T, (t0 + frames) * s.stride);
      for (int64_t i = 0; i < p.I; i++) {
        for (int64_t q = 0; q < s.stride; q++) {
          const int32_t* at = entries.ptr + i * s.stride + q;
          S* made = s.stride == 1 ? second_row : phase_row;
          gather_row(dpanel, {entries.offset + at[0], entries.weight + at[0], at[1] - at[0], 1}, 1, (const S*)nullptr, made, 0, whole);
          for (int64_t j = 0; s.stride > 1 && begin + j * s.stride + q < end; j++)
            std::memcpy(second_row + (j * s.stride + q) * s.V, phase_row + j * s.V, s.V * sizeof(S));
        }
        leave(n, i, begin, end, frames_of(panel + i * plan.ld, t0, begin, end, first_row), second_row, second_row, sums);
      }
    }
  }

  // Output frames [t0 - lead, t0 - lead + held) of all channels of dy; outside of the clip zeros.
  void pack_dy(int64_t n, int64_t t0, S* dpanel) const {
    const int64_t first = t0 - lead, begin = max64(first, 0), end = min64(s.T_out, first + held);
    for (int64_t o = 0; o < p.O; o++) {
      S* row = dpanel + o * dy_ld();
      const int64_t at = ((n * p.O + o) * s.T_out + begin) * s.V;
      std::memset(row, 0, (begin - first) * s.V * sizeof(S));
      pack_slope(slope + o, d.g + at, b.y + at, 0, 1, (end - begin) * s.V, row + (begin - first) * s.V, 0);
      std::memset(row + (end - first) * s.V, 0, (first + held - end) * s.V * sizeof(S));
    }
  }

  void carry(S* panel) const {
    for (int64_t i = 0; i < p.I; i++)
      for (int64_t q = 0; q < plan.phases; q++) {
        S* row = panel + i * plan.ld + q * plan.plane;
        std::memmove(row, row + plan.frames * s.V, carried * s.V * sizeof(S));
        std::memset(row + carried * s.V, 0, (plan.plane - carried * s.V) * sizeof(S));
      }
  }

  // Input frames [begin, end) of channel i are complete: through the ReLU, and out.
  void leave(int64_t n, int64_t i, int64_t begin, int64_t end, const S* h, const S* dh, S* row, SlopeSums* sums) const {
    const int64_t pixels = (end - begin) * s.V, at = ((n * p.I + i) * s.T + begin) * s.V;
    make_row(row, pixels, [&](auto read) __attribute__((always_inline)) { return positive<S>(read(h), read(dh)); });
    sums[i].add(row, b.z + at, pixels, b.first.mean[i]);
    stream_row(d.dz + at, row, pixels);
  }
  // Input frames [begin, end) of a panel's row in order, in `to` where they do not lie side by side.
  const S* frames_of(const S* row, int64_t t0, int64_t begin, int64_t end, S* to) const {
    const int64_t first = begin + plan.padding - t0 * s.stride;  // padded frames from the panel's first on
    if (s.stride == 1) return row + first * s.V;
    for (int64_t j = 0; j < end - begin; j++) {
      const int64_t q = (first + j) % s.stride, at = (first + j) / s.stride;
      if (at < plan.plane_frames) std::memcpy(to + j * s.V, row + q * plan.plane + at * s.V, s.V * sizeof(S));
      else std::memset(to + j * s.V, 0, s.V * sizeof(S));
    }
    return to;
  }
};

template <class S>
void block_temporal_backward(const TemporalShape& s, const Pattern& p, const BlockTensors<S>& b, const BlockGradients<S>& d,
                             const NormSlope<S>* slope, NormSlope<S>* first_slope, int threads) {
  const TemporalBackward<S> pass(s, p, b, d, slope);
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
