// dX, dW and the bias's gradient of a 1 x 1 convolution of stride 1 in one pass: every tile packs dy once for scatter and dot.
// Tiles and their sums are the same ones whatever the number of threads.
template <class S, class A>
void pointwise_backward(const TemporalShape& s, const Pattern& p, View<const A> x, View<const A> dy, const Lasso<S>& lasso,
                        A* dx, S* dw, S* dbias, int threads) {
  TemporalPlan plan = TemporalPlan::make<S>(s, p, fixed_threads, fixed_tasks);
  plan.frames = tile_frames(s.T, 2 * plan.inputs.count() + p.bo, s.V, sizeof(S), s.N, fixed_threads, fixed_tasks);
  plan.tiles = ceil_div(s.T, plan.frames);
  plan.set_frames<S>(plan.frames, s, p);
  const int64_t entries = p.blocks * p.bi, size = entries * p.bo, tasks = s.N * plan.tiles;
  const int64_t chunks = min64(max_chunks, max64(tasks, 1)), ldy = row_length<S>(plan.frames * s.V);
  call_scratch.reserve(Scratch::room<int32_t>(entries) + Scratch::room<S>(chunks * size) + Scratch::room<S>(chunks * p.O));
  int32_t* offset = call_scratch.take<int32_t>(entries);
  S* partial = call_scratch.take<S>(chunks * size);
  S* partial_bias = call_scratch.take<S>(chunks * p.O);
  plan.offsets(s, p, offset);
  const bool streams = is_streamed<S>(s.N * p.I * s.T * s.V);
  parallel(chunks, threads, [&](int64_t chunk) {
    S* sum = partial + chunk * size;
    S* bias = partial_bias + chunk * p.O;
    std::memset(sum, 0, size * sizeof(S));
    std::memset(bias, 0, p.O * sizeof(S));
    task_scratch.reserve(2 * Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(p.bo * ldy));
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* gradient = task_scratch.take<S>(plan.panel_size());
    S* rows = task_scratch.take<S>(p.bo * ldy);
    for (int64_t task = chunk * tasks / chunks; task < (chunk + 1) * tasks / chunks; task++) {
      const int64_t n = task / plan.tiles, t0 = task % plan.tiles * plan.frames, frames = min64(plan.frames, s.T - t0);
      pack_panel(plan, s, x, n, t0, panel);
      std::memset(gradient, 0, plan.panel_size() * sizeof(S));
      for (int64_t g = 0; g < p.rows; g++) {
        const int64_t live = live_rows(p, g), e = p.row_ptr[g] * p.bi, count = (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi;
        if (!count && !dbias) continue;
        pack_rows(dy, n, g * p.bo, live, s.T, s.V, t0, frames, rows, ldy);
        scatter_row(gradient, {offset + e, lasso.values + e * p.bo, count, p.bo}, live, rows, ldy, frames * s.V);
        dot_row(panel, offset + e, count, p.bo, live, rows, ldy, frames * s.V, sum + e * p.bo);
        for (int64_t o = 0; o < live; o++) bias[g * p.bo + o] += sum_row(rows + o * ldy, frames * s.V);
      }
      for (int64_t i = 0; i < p.I; i++) {
        A* to = dx + ((n * p.I + i) * s.T + t0) * s.V;
        if (const int64_t r = plan.inputs.row[i]; r < 0) leave_zeros(to, frames * s.V, streams);
        else leave_row(to, gradient + r * plan.ld, frames * s.V, streams);
      }
    }
    end_stream();
    clear_ragged(p, sum);
  });
  add_chunks(partial, chunks, p.blocks, p.bi * p.bo, lasso, dw, threads);
  if (dbias) add_chunks(partial_bias, chunks, p.O, 1, Lasso<S>{}, dbias, 1);
}
