// Branches of a temporal unit in training mode: y = f_b(relu(norm(z_b))) one below the other, each f_b a convolution over frames or
// max-pooling over 3 of them, or y = z_b. relu(norm(z)) is made as rows are packed, in both passes, so that forward only reads z
// and writes y. Backward is two sweeps: dz' = the gradient of norm(z) where its ReLU is open, with the sums that the norm's
// gradient needs (normed_backward.inl), then dz from it in its place.
// With a joint mean (DG-STGCN) every frame of z gets its mean as one more joint as it is read, and y_v += coef_v y_V as y leaves;
// neither side exists in memory with that joint.
// A task is a branch of a sample: its channels with their frames stay in L2. Reference: the ops one by one, in kernels/branches.py.

template <class S>
BlockNorm<S> norm_from(const BlockNorm<S>& norm, int64_t c) {
  return {norm.gamma + c, norm.beta + c, norm.mean + c, norm.rstd + c, norm.variance ? norm.variance + c : nullptr, norm.eps};
}

// The shape that a branch sees, and its channels: what passes has the frames of y already.
template <class S>
TemporalShape shape_of(TemporalShape s, const Branch<S>& branch, const JointMean<S>& joint) {
  s.dilation = branch.dilation;
  if (joint.coef) s.V++;
  return s;
}
template <class S>
Channels<S> channels_of(const TemporalShape& s, const Branch<S>& branch, const BranchGradient<S>& gradient, const JointMean<S>& joint) {
  return {branch.z, branch.z_stride, gradient.dz, gradient.dz_stride, branch.kind == PASSES ? s.T_out : s.T, s.V, joint.coef != nullptr};
}

// Rows of y, channel by channel from the branch's first on, in pieces of whole frames where there is a joint mean.
template <class S>
struct BranchOutput {
  const JointMean<S>& joint;
  S* y;
  int64_t channel, T, V;  // of n and the branch's first; frames and joints of y
  bool streams;

  // Frames [t, t + frames) of channel o; room for V numbers a frame where there is a joint mean.
  INLINE void leave(int64_t o, int64_t t, int64_t frames, const S* row, S* room) const {
    const int64_t at = (channel + o) * T + t;
    if (joint.coef) spread_frames(row, joint.coef, frames, V, room, joint.means + at);
    leave_row(y + at * V, joint.coef ? room : row, frames * V, streams);
  }
};

template <class S>
void branches_forward(const TemporalShape& shape, int64_t count, const Branch<S>* branches, const BlockNorm<S>& norm,
                      const JointMean<S>& joint, int64_t channels, S* y, int threads) {
  for (int64_t b = 0; b < count; b++)
    if (branches[b].kind != PASSES)
      take_moments(shape.N, branches[b].conv.I, channels_of(shape, branches[b], {}, joint), norm_from(norm, branches[b].first), threads);
  const int64_t V = shape.V + (joint.coef != nullptr);
  const bool streams = is_streamed<S>(shape.N * channels * shape.T_out * shape.V);
  struct Way {
    TemporalPlan plan;
    int32_t* offset;
    int64_t tiles, sweep;
  };
  size_t room = 0;
  for (int64_t b = 0; b < count; b++) room += Scratch::room<int32_t>(branches[b].conv.blocks * branches[b].conv.bi);
  call_scratch.reserve(room);
  std::vector<Way> ways(count);
  int64_t tiles = 0;
  for (int64_t b = 0; b < count; b++) {
    const Pattern& p = branches[b].conv;
    ways[b].offset = call_scratch.take<int32_t>(p.blocks * p.bi);
    ways[b].tiles = 1;
    if (branches[b].kind == CONVOLVES) {
      const TemporalShape s = shape_of(shape, branches[b], joint);
      ways[b].plan = TemporalPlan::make<S>(s, p, threads, threads);
      ways[b].plan.offsets(s, p, ways[b].offset);
      ways[b].tiles = ways[b].plan.tiles;
      ways[b].sweep = panel_sweep<S>(p, streams);
    }
    tiles += ways[b].tiles;
  }
  parallel(shape.N * tiles, threads, [&](int64_t task) {  // samples first: threads take the same mixture of branches
    const int64_t n = task / tiles;
    int64_t b = 0, tile = task % tiles;
    for (; tile >= ways[b].tiles; b++) tile -= ways[b].tiles;
    const Branch<S>& branch = branches[b];
    const Way& way = ways[b];
    const Pattern& p = branch.conv;
    const Channels<S> z = channels_of(shape, branch, {}, joint);
    const BranchOutput<S> out{joint, y, n * channels + branch.target, shape.T_out, shape.V, streams};
    const size_t spread = joint.coef ? Scratch::room<S>(shape.T_out * shape.V) : 0;
    if (branch.kind != CONVOLVES) {
      const int64_t in = z.T * V;
      task_scratch.reserve(z.room() + Scratch::room<S>(in + lanes<S>) + Scratch::room<S>(shape.T_out * V) + spread);
      S* own = z.take_room(task_scratch);
      S* row = task_scratch.take<S>(in + lanes<S>);
      S* pooled = task_scratch.take<S>(shape.T_out * V);
      S* last = task_scratch.take<S>(spread / sizeof(S));
      for (int64_t i = 0; i < p.I; i++) {
        const S* given = z.row(n, i, 0, z.T, own);
        if (branch.kind == POOLS) {
          make_normed(given, affine_of(norm, branch.first + i), in, row);
          pool_channel<S>({shape.N, p.I, shape.T, V, shape.stride}, row, pooled);
        }
        out.leave(i, 0, shape.T_out, branch.kind == POOLS ? pooled : given, last);
      }
      return end_stream();
    }
    const int64_t t0 = tile * way.plan.frames, frames = min64(way.plan.frames, shape.T_out - t0), ldo = row_length<S>(frames * V);
    task_scratch.reserve(Scratch::room<S>(way.plan.panel_size()) + Scratch::room<S>(p.bo * way.sweep) + z.room() + spread +
                         (joint.coef ? Scratch::room<S>(p.O * ldo) : 0));
    S* panel = task_scratch.take<S>(way.plan.panel_size());
    S* rows = task_scratch.take<S>(p.bo * way.sweep);
    S* own = z.take_room(task_scratch);
    S* last = task_scratch.take<S>(spread / sizeof(S));
    pack_normed(way.plan, shape_of(shape, branch, joint), z, norm_from(norm, branch.first), n, t0, 0, own, panel);
    if (!joint.coef) {
      sweep_panel(p, way.offset, branch.values, branch.bias, panel, frames * V, way.sweep, streams, rows,
                  y + (out.channel * shape.T_out + t0) * V, shape.T_out * V);
      return end_stream();
    }
    S* made = task_scratch.take<S>(p.O * ldo);
    sweep_panel(p, way.offset, branch.values, branch.bias, panel, frames * V, way.sweep, false, rows, made, ldo);
    for (int64_t o = 0; o < p.O; o++) out.leave(o, t0, frames, made + o * ldo, last);
    end_stream();
  });
}

// Rows of dy of a branch as f's gradient takes them: with a joint mean dy_V = sum over v of dy_v coef_v.
template <class S>
struct BranchRows {
  JointMean<S> joint;
  const S* dy;  // of the branch's first channel
  int64_t stride, T, V;

  INLINE const S* at(int64_t n, int64_t c, int64_t t) const { return dy + n * stride + (c * T + t) * V; }
  INLINE int64_t joints() const { return V + (joint.coef != nullptr); }
  INLINE void pack(int64_t n, int64_t c, int64_t live, int64_t first, int64_t pixels, S* rows, int64_t ld) const {
    const int64_t t = first / joints(), frames = pixels / joints();
    for (int64_t o = 0; o < live; o++, rows += ld) {
      std::memset(rows + pixels / lanes<S> * lanes<S>, 0, VECTOR_BYTES);
      if (joint.coef) append_sum(at(n, c + o, t), joint.coef, frames, V, rows, [](S sum) { return sum; });
      else std::memcpy(rows, at(n, c + o, t), pixels * sizeof(S));
    }
  }
  INLINE void ahead(Ahead<S>& next, int64_t n, int64_t c, int64_t live, int64_t first, int64_t pixels) const {
    next.add(at(n, c, first / joints()), live, T * V, pixels / joints() * V);
  }
};

// dz' of a sample's channels that are pooled, and dz of those that pass.
template <class S>
void unconvolved_backward(const TemporalShape& s, const Branch<S>& branch, const Channels<S>& z, const BlockNorm<S>& norm,
                          const BranchRows<S>& dy, int64_t n, SlopeSums* sums) {
  const int64_t C = branch.conv.I, in = z.T * z.joints(), out = s.T_out * z.joints();
  task_scratch.reserve(z.room() + 2 * Scratch::room<S>(in + lanes<S>) + Scratch::room<S>(out + lanes<S>));
  S* room = z.take_room(task_scratch);
  S* h = task_scratch.take<S>(in + lanes<S>);
  S* dh = task_scratch.take<S>(in + lanes<S>);
  S* row = task_scratch.take<S>(out + lanes<S>);
  for (int64_t i = 0; i < C; i++) {
    dy.pack(n, i, 1, 0, out, row, 0);
    if (branch.kind == PASSES) {
      z.leave(n, i, 0, z.T, row, room);
      continue;
    }
    make_normed(z.row(n, i, 0, z.T, room), affine_of(norm, branch.first + i), in, h);
    pool_channel_backward<S>({s.N, C, s.T, z.joints(), s.stride}, h, row, dh);
    leave_slope(z, n, i, 0, z.T, h, dh, norm.mean[branch.first + i], dh, room, sums[i]);
  }
}

template <class S>
void branches_backward(const TemporalShape& shape, int64_t count, const Branch<S>* branches, const BlockNorm<S>& norm,
                       const JointMean<S>& joint, int64_t channels, const S* dy, const BranchGradient<S>* gradients, S* dgamma,
                       S* dbeta, int threads) {
  const int64_t V = shape.V, ldy = shape.T_out * V, chunks = min64(max_chunks, max64(shape.N, 1));
  struct Way {  // a branch's tables and partial sums
    std::optional<NormedBackward<S, BranchRows<S>>> pass;
    std::optional<TransposedEntries<S>> transposed;
    BranchRows<S> rows;
    Channels<S> z;
    int32_t* offset;
    S *partial, *partial_bias;
    int64_t size;
  };
  std::vector<Way> ways(count);
  int64_t normed = 0;
  for (int64_t b = 0; b < count; b++)
    if (branches[b].kind != PASSES) normed = max64(normed, branches[b].first + branches[b].conv.I);
  size_t room = ChannelSums<SlopeSums>::room(normed) + Scratch::room<NormSlope<S>>(normed) + Scratch::room<double>(chunks * count * V);
  for (int64_t b = 0; b < count; b++) {
    const Pattern& p = branches[b].conv;
    ways[b].size = p.blocks * p.bi * p.bo;
    room += Scratch::room<int32_t>(p.blocks * p.bi) + TransposedEntries<S>::room(p, shape.stride) +
            Scratch::room<S>(chunks * ways[b].size) + Scratch::room<S>(chunks * p.O);
  }
  call_scratch.reserve(room);
  const ChannelSums<SlopeSums> sums(normed, chunks, call_scratch);
  auto* slope = call_scratch.take<NormSlope<S>>(normed);
  double* dcoef = call_scratch.take<double>(chunks * count * V);
  std::memset(dcoef, 0, chunks * count * V * sizeof(double));
  for (int64_t b = 0; b < count; b++) {
    const Branch<S>& branch = branches[b];
    const Pattern& p = branch.conv;
    Way& way = ways[b];
    way.z = channels_of(shape, branch, gradients[b], joint);
    way.rows = {joint, dy + branch.target * ldy, channels * ldy, shape.T_out, V};
    if (branch.kind != CONVOLVES) continue;
    const TemporalShape s = shape_of(shape, branch, joint);
    way.pass.emplace(NormedConv<S>{s, p, branch.values, norm_from(norm, branch.first), way.z}, way.rows);
    way.offset = call_scratch.take<int32_t>(p.blocks * p.bi);
    way.pass->plan.offsets(s, p, way.offset);
    way.transposed.emplace(p, way.pass->gathers ? s.stride : 0, branch.values, way.pass->dy_ld(), way.pass->shift(), call_scratch);
    way.partial = call_scratch.take<S>(chunks * way.size);
    way.partial_bias = call_scratch.take<S>(chunks * p.O);
  }
  parallel(chunks * count, threads, [&](int64_t task) {
    const int64_t chunk = task / count, b = task % count, begin = chunk * shape.N / chunks, end = (chunk + 1) * shape.N / chunks;
    const Branch<S>& branch = branches[b];
    const Pattern& p = branch.conv;
    const Way& way = ways[b];
    SlopeSums* own = branch.kind == PASSES ? nullptr : sums.of(chunk) + branch.first;
    S *dw = nullptr, *dbias = nullptr;
    if (branch.kind == CONVOLVES) {
      dw = way.partial + chunk * way.size, dbias = way.partial_bias + chunk * p.O;
      std::memset(dw, 0, way.size * sizeof(S));
      std::memset(dbias, 0, p.O * sizeof(S));
    }
    for (int64_t n = begin; n < end; n++) {
      for (int64_t o = 0; joint.coef && o < p.O; o++)
        spread_sums(way.rows.at(n, o, 0), joint.means + (n * channels + branch.target + o) * shape.T_out, shape.T_out, V, dcoef + task * V);
      if (branch.kind != CONVOLVES) {
        unconvolved_backward(shape, branch, way.z, norm, way.rows, n, own);
        continue;
      }
      task_scratch.reserve(way.pass->room());
      way.pass->run(n, way.offset, *way.transposed, dw, dbias, own);
    }
    if (branch.kind == CONVOLVES) clear_ragged(p, dw);
    end_stream();
  });
  finish_slopes(sums, norm, (double)shape.N * (double)(shape.T * (V + (joint.coef != nullptr))), slope, dgamma, dbeta);
  for (int64_t b = 0; b < count; b++) {
    const Pattern& p = branches[b].conv;
    if (branches[b].kind != CONVOLVES) continue;
    add_chunks(ways[b].partial, chunks, p.blocks, p.bi * p.bo, Lasso<S>{}, gradients[b].values, threads);
    if (gradients[b].bias) add_chunks(ways[b].partial_bias, chunks, p.O, 1, Lasso<S>{}, gradients[b].bias, 1);
  }
  for (int64_t v = 0; joint.coef && v < V; v++) {
    double sum = 0;
    for (int64_t part = 0; part < chunks * count; part++) sum += dcoef[part * V + v];
    joint.dcoef[v] = (S)sum;
  }
  for (int64_t b = 0; b < count; b++)
    if (branches[b].kind != PASSES)
      apply_slopes(shape.N, branches[b].conv.I, slope + branches[b].first, ways[b].z,
                   branches[b].kind == CONVOLVES ? ways[b].pass->plan.inputs.row.data() : nullptr, threads);
}
