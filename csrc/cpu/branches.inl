// Branches of a temporal unit in training mode: y = f_b(relu(norm(z_b))) one below the other, each f_b a convolution over frames or
// max-pooling over 3 of them. relu(norm(z)) is made as rows are packed, in both passes, so that forward only reads z and writes y.
// Backward is two sweeps: dz' = the gradient of norm(z) where its ReLU is open, with the sums that the norm's gradient needs
// (normed_backward.inl), then dz from it in its place.
// A task is a branch of a sample: its channels with their frames stay in L2. Reference: kernels/reference_units.py.

template <class S>
BlockNorm<S> norm_from(const BlockNorm<S>& norm, int64_t c) {
  return {norm.gamma + c, norm.beta + c, norm.mean + c, norm.rstd + c, nullptr, norm.eps};
}
inline TemporalShape dilated(TemporalShape s, int64_t dilation) {
  s.dilation = dilation;
  return s;
}

template <class S>
void branches_forward(const TemporalShape& shape, int64_t count, const Branch<S>* branches, const BlockNorm<S>& norm,
                      int64_t channels, S* y, int threads) {
  const int64_t V = shape.V, in = shape.T * V, ldy = shape.T_out * V;
  const bool streams = is_streamed<S>(shape.N * channels * ldy);
  struct Way {
    TemporalPlan plan;
    int32_t* offset;
    int64_t tiles, sweep;
  };
  size_t room = Scratch::room<Way>(count);
  for (int64_t b = 0; b < count; b++) room += Scratch::room<int32_t>(branches[b].conv.blocks * branches[b].conv.bi);
  call_scratch.reserve(room);
  Way* ways = call_scratch.take<Way>(count);
  int64_t tiles = 0;
  for (int64_t b = 0; b < count; b++) {
    const Branch<S>& branch = branches[b];
    const Pattern& p = branch.conv;
    ways[b].offset = call_scratch.take<int32_t>(p.blocks * p.bi);
    ways[b].tiles = 1;
    if (!branch.pools) {
      const TemporalShape s = dilated(shape, branch.dilation);
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
    const Pattern& p = branch.conv;
    const S* z = branch.z + n * branch.z_stride;
    S* out = y + (n * channels + branch.target) * ldy;
    const BlockNorm<S> own = norm_from(norm, branch.first);
    if (branch.pools) {
      task_scratch.reserve(Scratch::room<S>(in + lanes<S>) + Scratch::room<S>(ldy));
      S* row = task_scratch.take<S>(in + lanes<S>);
      S* pooled = task_scratch.take<S>(ldy);
      for (int64_t i = 0; i < p.I; i++) {
        make_normed(z + i * in, affine_of(own, i), in, row);
        pool_channel<S>({shape.N, p.I, shape.T, V, shape.stride}, row, pooled);
        leave_row(out + i * ldy, pooled, ldy, streams);
      }
      return end_stream();
    }
    const Way& way = ways[b];
    const int64_t t0 = tile * way.plan.frames;
    task_scratch.reserve(Scratch::room<S>(way.plan.panel_size(p)) + Scratch::room<S>(p.bo * way.sweep));
    S* panel = task_scratch.take<S>(way.plan.panel_size(p));
    S* rows = task_scratch.take<S>(p.bo * way.sweep);
    pack_normed(way.plan, dilated(shape, branch.dilation), p, z, own, t0, 0, panel);
    sweep_panel(p, way.offset, branch.values, branch.bias, panel, min64(way.plan.frames, shape.T_out - t0) * V, way.sweep, streams,
                rows, out + t0 * V, ldy);
    end_stream();
  });
}

// Rows of dy as they are.
template <class S>
struct GivenRows {
  const S* dy;  // of the branch's first channel
  int64_t stride, ld;
  INLINE void pack(int64_t n, int64_t c, int64_t live, int64_t first, int64_t pixels, S* rows, int64_t ld_rows) const {
    for (int64_t o = 0; o < live; o++) {
      std::memset(rows + o * ld_rows + pixels / lanes<S> * lanes<S>, 0, VECTOR_BYTES);
      std::memcpy(rows + o * ld_rows, dy + n * stride + (c + o) * ld + first, pixels * sizeof(S));
    }
  }
  INLINE void ahead(Ahead<S>& next, int64_t n, int64_t c, int64_t live, int64_t first, int64_t pixels) const {
    next.add(dy + n * stride + c * ld + first, live, ld, pixels);
  }
};

// dz' of one sample's pooled channels.
template <class S>
void pooled_backward(const TemporalShape& s, const Branch<S>& branch, const BlockNorm<S>& norm, const GivenRows<S>& dy, int64_t n,
                     const BranchGradient<S>& gradient, SlopeSums* sums) {
  const int64_t C = branch.conv.I, in = s.T * s.V;
  task_scratch.reserve(2 * Scratch::room<S>(in + lanes<S>));
  S* h = task_scratch.take<S>(in + lanes<S>);
  S* dh = task_scratch.take<S>(in + lanes<S>);
  for (int64_t i = 0; i < C; i++) {
    const S* z = branch.z + n * branch.z_stride + i * in;
    make_normed(z, affine_of(norm, i), in, h);
    pool_channel_backward<S>({s.N, C, s.T, s.V, s.stride}, h, dy.dy + n * dy.stride + i * dy.ld, dh);
    leave_slope(h, dh, z, norm.mean[i], in, dh, sums[i], gradient.dz + n * gradient.dz_stride + i * in);
  }
}

template <class S>
void branches_backward(const TemporalShape& shape, int64_t count, const Branch<S>* branches, const BlockNorm<S>& norm,
                       int64_t channels, const S* dy, const BranchGradient<S>* gradients, S* dgamma, S* dbeta, int threads) {
  const int64_t V = shape.V, in = shape.T * V, ldy = shape.T_out * V, chunks = min64(max_chunks, max64(shape.N, 1));
  using Pass = NormedBackward<S, GivenRows<S>>;
  // Each branch's tables and partial sums. NormedBackward holds references: its two arguments have to stay where they are.
  struct Way {
    NormedConv<S> conv;
    GivenRows<S> rows;
    std::unique_ptr<Pass> pass;
    std::unique_ptr<TransposedEntries<S>> transposed;
    int32_t* offset;
    S *partial, *partial_bias;
    int64_t size;
  };
  std::vector<Way> ways(count);
  int64_t all = 0;
  for (int64_t b = 0; b < count; b++) all = max64(all, branches[b].first + branches[b].conv.I);
  size_t room = ChannelSums<SlopeSums>::room(all) + Scratch::room<NormSlope<S>>(all);
  for (int64_t b = 0; b < count; b++) {
    const Pattern& p = branches[b].conv;
    ways[b].size = p.blocks * p.bi * p.bo;
    room += Scratch::room<int32_t>(p.blocks * p.bi) + TransposedEntries<S>::room(p, shape.stride) +
            Scratch::room<S>(chunks * ways[b].size) + Scratch::room<S>(chunks * p.O);
  }
  call_scratch.reserve(room);
  const ChannelSums<SlopeSums> sums(all, chunks, call_scratch);
  auto* slope = call_scratch.take<NormSlope<S>>(all);
  for (int64_t b = 0; b < count; b++) {
    const Branch<S>& branch = branches[b];
    const Pattern& p = branch.conv;
    Way& way = ways[b];
    way.rows = {dy + branch.target * ldy, channels * ldy, ldy};
    if (branch.pools) continue;
    way.conv = {dilated(shape, branch.dilation), p, branch.values, norm_from(norm, branch.first), branch.z, branch.z_stride,
                gradients[b].dz, gradients[b].dz_stride};
    way.pass = std::make_unique<Pass>(way.conv, way.rows);
    way.offset = call_scratch.take<int32_t>(p.blocks * p.bi);
    way.pass->plan.offsets(way.conv.s, p, way.offset);
    way.transposed = std::make_unique<TransposedEntries<S>>(p, way.pass->gathers ? shape.stride : 0, branch.values, way.pass->dy_ld(),
                                                            way.pass->shift(), call_scratch);
    way.partial = call_scratch.take<S>(chunks * way.size);
    way.partial_bias = call_scratch.take<S>(chunks * p.O);
  }
  parallel(chunks * count, threads, [&](int64_t task) {
    const int64_t chunk = task / count, b = task % count, begin = chunk * shape.N / chunks, end = (chunk + 1) * shape.N / chunks;
    const Branch<S>& branch = branches[b];
    const Way& way = ways[b];
    SlopeSums* own = sums.of(chunk) + branch.first;
    if (branch.pools) {
      for (int64_t n = begin; n < end; n++)
        pooled_backward(shape, branch, norm_from(norm, branch.first), way.rows, n, gradients[b], own);
      return end_stream();
    }
    S *dw = way.partial + chunk * way.size, *dbias = way.partial_bias + chunk * branch.conv.O;
    std::memset(dw, 0, way.size * sizeof(S));
    std::memset(dbias, 0, branch.conv.O * sizeof(S));
    for (int64_t n = begin; n < end; n++) {
      task_scratch.reserve(way.pass->room());
      way.pass->run(n, way.offset, *way.transposed, dw, dbias, own);
    }
    clear_ragged(branch.conv, dw);
    end_stream();
  });
  finish_slopes(sums, norm, (double)shape.N * (double)in, slope, dgamma, dbeta);
  for (int64_t b = 0; b < count; b++) {
    const Pattern& p = branches[b].conv;
    if (branches[b].pools) continue;
    add_chunks(ways[b].partial, chunks, p.blocks, p.bi * p.bo, Lasso<S>{}, gradients[b].values, threads);
    if (gradients[b].bias) add_chunks(ways[b].partial_bias, chunks, p.O, 1, Lasso<S>{}, gradients[b].bias, 1);
  }
  parallel(shape.N * count, threads, [&](int64_t task) {
    const int64_t n = task / count, b = task % count;
    const Branch<S>& branch = branches[b];
    apply_slopes(slope + branch.first, branch.conv.I, branch.z + n * branch.z_stride, in, gradients[b].dz + n * gradients[b].dz_stride);
  });
}
