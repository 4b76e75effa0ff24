// The backward pass of y = temporal_conv(relu(norm(z))) down to dz' = the gradient of norm(z) where its ReLU is open: relu(norm(z))
// is made again as its rows are packed, and no gradient of it exists as a whole tensor. For a block of ST-GCN (block_backward.inl)
// and for the branches of a temporal unit (branches.inl).

// What is convolved; V of the shape counts the joints that the norm sees.
template <class S>
struct NormedConv {
  TemporalShape s;
  Pattern p;
  const S* values;
  BlockNorm<S> norm;  // of its first channel
  Channels<S> z;
};

// Frames [begin, end) of the gradient dh of h = relu(norm(z)) of a channel leave through the ReLU, with their sums. row: room for
// them, may be dh; room: as Channels asks for it.
template <class S>
INLINE void leave_slope(const Channels<S>& z, int64_t n, int64_t i, int64_t begin, int64_t end, const S* h, const S* dh, S mean, S* row,
                        S* room, SlopeSums& sums) {
  const int64_t pixels = (end - begin) * z.joints();
  make_row(row, pixels, [&](auto read) __attribute__((always_inline)) { return positive<S>(read(h), read(dh)); });
  sums.add(row, z.row(n, i, begin, end, room) + begin * z.joints(), pixels, mean);
  z.leave(n, i, begin, end, row, room);
}

// dz of C channels of N samples from dz' in its place. Where means are folded, dz_v + dz_V / V is the same formula for z_v + z_V / V, of which
// mean and of_sum count 1 + 1 / V times. Channels without a row (see LiveInputs; live[c] < 0, null where all have one) have a gradient of zeros
// already.
template <class S>
void apply_slopes(int64_t N, int64_t C, const NormSlope<S>* slope, const Channels<S>& z, const int32_t* live, int threads) {
  const int64_t pixels = z.T * z.V, pieces = 4;  // of a sample, so that one sample is work for several threads
  parallel(N * pieces, threads, [&](int64_t task) {
    const int64_t n = task / pieces, piece = task % pieces;
    task_scratch.reserve(z.room() + Scratch::room<S>(z.mean ? pixels : 0));
    S* room = z.take_room(task_scratch);
    S* folded = task_scratch.take<S>(z.mean ? pixels : 0);
    for (int64_t c = piece * C / pieces; c < (piece + 1) * C / pieces; c++) {
      if (live && live[c] < 0) continue;
      NormSlope<S> own = slope[c];
      const S* row = z.row(n, c, 0, z.T, room);
      if (z.mean) {
        const S often = (S)(1 + 1 / (double)z.V);
        own.mean *= often, own.of_sum *= often;
        fold_mean_frames(row, z.T, z.V, folded);
        row = folded;
      }
      S* dz = z.dz + n * z.dz_stride + c * pixels;
      const auto gradient = own.gradient();
      stream_pixels(dz, pixels, [&](auto read) __attribute__((always_inline)) { return gradient(read(dz), read(row)); });
    }
    end_stream();
  });
}

// A sample at a time, tile by tile of output frames. The panels of relu(bn1(z)) and of its gradient hold the frames that the
// tile reaches; those that the next tile reaches too are carried over, so that no frame is computed twice.
// Blocks of few outputs (`gathers`) take a panel of dy with a halo instead, and make each row of the gradient at once from it.
// Upper gives rows of dy: pack(n, first channel, channels, first pixel, pixels, rows, ld), each followed by a vector of zeros, and
// ahead(Ahead, n, first channel, channels, first pixel, pixels), which names what pack will read.
template <class S, class Upper>
struct NormedBackward {
  NormedConv<S> conv;
  Upper upper;
  TemporalShape s;
  Pattern p;
  bool gathers;
  TemporalPlan plan;
  int64_t carried, ldy, lead, held;  // lead: frames of dy before the tile, held: with those behind it

  NormedBackward(const NormedConv<S>& conv_, const Upper& upper_)
      : conv(conv_), upper(upper_), s(conv_.s), p(conv_.p), gathers(conv_.p.bo < 4) {
    plan.inputs = LiveInputs(p);
    plan.phases = s.stride;
    plan.padding = (p.K - 1) / 2 * s.dilation;
    carried = (p.K - 1) * s.dilation / s.stride;
    const int64_t budget = 1000 * 1024, frame = 2 * max64(plan.inputs.count(), p.O) * plan.phases * s.V * (int64_t)sizeof(S);
    const int64_t most = max64(budget / frame - carried, 6);
    plan.tiles = ceil_div(s.T_out, most);
    plan.set_frames<S>(ceil_div(s.T_out, plan.tiles), s, p);
    ldy = row_length<S>(plan.frames * s.V);
    lead = plan.padding / s.stride;
    held = plan.frames + 2 * lead + 1;
  }
  int64_t dy_ld() const { return row_length<S>(held * s.V); }
  int64_t dpanel_size() const { return gathers ? p.O * dy_ld() : plan.panel_size(); }
  size_t room() const {
    return Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(dpanel_size()) + Scratch::room<S>(p.bo * ldy) +
           2 * Scratch::room<S>(row_size()) + Scratch::room<S>(ldy) + conv.z.room();
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
    S* panel = task_scratch.take<S>(plan.panel_size());
    S* dpanel = task_scratch.take<S>(dpanel_size());
    S* rows = task_scratch.take<S>(p.bo * ldy);
    S* first_row = task_scratch.take<S>(row_size());
    S* second_row = task_scratch.take<S>(row_size());
    S* phase_row = task_scratch.take<S>(ldy);
    S* room = conv.z.take_room(task_scratch);
    if (gathers) return run_gathers(n, offset, entries, panel, dpanel, rows, first_row, second_row, phase_row, room, dw, dbias, sums);
    std::memset(dpanel, 0, plan.panel_size() * sizeof(S));
    for (int64_t t0 = 0; t0 < s.T_out; t0 += plan.frames) {
      const int64_t frames = min64(plan.frames, s.T_out - t0);
      if (t0) carry(panel), carry(dpanel);
      pack_normed(plan, s, conv.z, conv.norm, n, t0, t0 ? carried : 0, room, panel);
      for (int64_t g = 0; g < p.rows; g++) {
        const int64_t live = live_rows(p, g), c = g * p.bo, e = p.row_ptr[g] * p.bi;
        upper.pack(n, c, live, t0 * s.V, frames * s.V, rows, ldy);
        scatter_row(dpanel, block_row(p, g, offset, conv.values), live, rows, ldy, frames * s.V);
        Ahead<S> ahead;
        if (g + 1 < p.rows) upper.ahead(ahead, n, c + p.bo, live_rows(p, g + 1), t0 * s.V, frames * s.V);
        const int64_t z_frame = (t0 + plan.frames + carried) * s.stride - plan.padding;  // first of the next tile
        const int64_t r = g * plan.inputs.count() / p.rows, share = (g + 1) * plan.inputs.count() / p.rows - r;
        ahead.add(conv.z.at(n, 0, z_frame), share, s.T * conv.z.V,
                  (min64(s.T, z_frame + plan.frames * s.stride) - z_frame) * conv.z.V, plan.inputs.channel.data() + r);
        const int64_t count = (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi;
        ahead.spread(dot_calls<S>(count, frames * s.V));
        dot_row(panel, offset + e, count, p.bo, live, rows, ldy, frames * s.V, dw + e * p.bo, ahead);
        for (int64_t o = 0; o < live; o++) dbias[c + o] += sum_row(rows + o * ldy, frames * s.V);
      }
      const bool last = t0 + frames == s.T_out;
      const int64_t begin = max64(0, t0 * s.stride - plan.padding);
      const int64_t finish = last ? s.T : min64(s.T, (t0 + frames) * s.stride - plan.padding);
      for (int64_t i = 0; i < p.I && begin < finish; i++) {
        const int64_t r = plan.inputs.row[i];
        if (r < 0) conv.z.leave_zeros_of(n, i, begin, finish);
        else leave(n, i, begin, finish, frames_of(panel + r * plan.ld, t0, begin, finish, first_row),
                   frames_of(dpanel + r * plan.ld, t0, begin, finish, second_row), second_row, room, sums);
      }
    }
  }

  void run_gathers(int64_t n, const int32_t* offset, const TransposedEntries<S>& entries, S* panel, S* dpanel, S* rows, S* first_row,
                   S* second_row, S* phase_row, S* room, S* dw, S* dbias, SlopeSums* sums) const {
    for (int64_t t0 = 0; t0 < s.T_out; t0 += plan.frames) {
      const int64_t frames = min64(plan.frames, s.T_out - t0), pixels = frames * s.V, whole = ceil_div(pixels, lanes<S>) * lanes<S>;
      if (t0) carry(panel);
      pack_normed(plan, s, conv.z, conv.norm, n, t0, t0 ? carried : 0, room, panel);
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
        const int64_t r = plan.inputs.row[i];
        if (r < 0) {
          conv.z.leave_zeros_of(n, i, begin, end);
          continue;
        }
        for (int64_t q = 0; q < s.stride; q++) {
          const int32_t* at = entries.ptr + i * s.stride + q;
          S* made = s.stride == 1 ? second_row : phase_row;
          gather_row(dpanel, {entries.offset + at[0], entries.weight + at[0], at[1] - at[0], 1}, 1, (const S*)nullptr, made, 0, whole);
          for (int64_t j = 0; s.stride > 1 && begin + j * s.stride + q < end; j++)
            std::memcpy(second_row + (j * s.stride + q) * s.V, phase_row + j * s.V, s.V * sizeof(S));
        }
        leave(n, i, begin, end, frames_of(panel + r * plan.ld, t0, begin, end, first_row), second_row, second_row, room, sums);
      }
    }
  }

  // Output frames [t0 - lead, t0 - lead + held) of all channels of dy; outside of the clip zeros.
  void pack_dy(int64_t n, int64_t t0, S* dpanel) const {
    const int64_t first = t0 - lead, begin = max64(first, 0), end = min64(s.T_out, first + held);
    for (int64_t o = 0; o < p.O; o++) {
      S* row = dpanel + o * dy_ld();
      std::memset(row, 0, (begin - first) * s.V * sizeof(S));
      upper.pack(n, o, 1, begin * s.V, (end - begin) * s.V, row + (begin - first) * s.V, 0);
      std::memset(row + (end - first) * s.V, 0, (first + held - end) * s.V * sizeof(S));
    }
  }

  void carry(S* panel) const {
    for (int64_t i = 0; i < plan.inputs.count(); i++)
      for (int64_t q = 0; q < plan.phases; q++) {
        S* row = panel + i * plan.ld + q * plan.plane;
        std::memmove(row, row + plan.frames * s.V, carried * s.V * sizeof(S));
        std::memset(row + carried * s.V, 0, (plan.plane - carried * s.V) * sizeof(S));
      }
  }

  // Input frames [begin, end) of channel i are complete: through the ReLU, and out.
  void leave(int64_t n, int64_t i, int64_t begin, int64_t end, const S* h, const S* dh, S* row, S* room, SlopeSums* sums) const {
    leave_slope(conv.z, n, i, begin, end, h, dh, conv.norm.mean[i], row, room, sums[i]);
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
