// What graphs of the sample are made of or multiply, (N, K, C, T, V): a tensor, or rows of a 1 x 1 convolution W x + b that are
// made, eight at a time, from one sample's x while it is in L2, and whose gradients go back into that of x and into dW at once.
// Then no tensor with K times C channels is written, read again, or kept for the backward pass.

template <class S>
class WideRows {
 public:
  // What all tasks share: the convolution's offsets.
  struct Tables {
    const DynamicShape& s;
    const Wide<S>& wide;
    TemporalShape shape;
    TemporalPlan plan{};
    std::vector<int32_t> offset;
    int64_t slots;  // groups of rows that are open at a time
    Tables(const DynamicShape& sizes, const Wide<S>& source, int64_t open_groups = 1)
        : s(sizes), wide(source), shape{sizes.N, sizes.T, sizes.T, sizes.V, 1, 1}, slots(open_groups) {
      if (!made()) return;
      plan.inputs = LiveInputs(wide.conv);
      plan.phases = 1, plan.padding = 0;
      plan.template set_frames<S>(s.T, shape, wide.conv);
      offset.resize(wide.conv.blocks * wide.conv.bi);
      plan.offsets(shape, wide.conv, offset.data());
    }
    bool made() const { return wide.made; }
    int64_t entries() const { return wide.conv.blocks * wide.conv.bi; }
    int64_t sums() const { return made() ? entries() * wide.conv.bo + wide.conv.O : 0; }  // of dW, then of db
    size_t room(bool backward) const {
      if (!made()) return backward ? Scratch::room<S>(s.T * s.V) : 0;
      return (backward ? 2 : 1) * (Scratch::room<S>(plan.panel_size()) + Scratch::room<S>(slots * group * plan.ld));
    }
  };
  static constexpr int64_t group = 8;  // rows at a time

  WideRows(const Tables& tables, Scratch& scratch, const WideGradient<S>* into = nullptr)
      : t(tables), s(tables.s), to(into),
        streams(into && is_streamed<S>(s.N * (t.made() ? t.wide.conv.I : s.K * s.C) * s.T * s.V)) {
    if (!t.made()) { rows = to ? scratch.take<S>(s.T * s.V) : nullptr; return; }
    panel = scratch.take<S>(t.plan.panel_size());
    rows = scratch.take<S>(t.slots * group * t.plan.ld);
    if (!to) return;
    dpanel = scratch.take<S>(t.plan.panel_size());
    drows = scratch.take<S>(t.slots * group * t.plan.ld);
    std::memset(drows, 0, t.slots * group * t.plan.ld * sizeof(S));  // behind the pixels it stays so
  }

  void enter(int64_t sample) {
    n = sample;
    if (!t.made()) return;
    pack_panel(t.plan, t.shape, t.wide.x, n, 0, panel);
    if (to) std::memset(dpanel, 0, t.plan.panel_size() * sizeof(S));
  }

  // Channels [c, c + count) of subset k of the sample: row(i, slot) is channel c + i, until the slot is opened again.
  void open(int64_t k, int64_t c, int64_t count, int64_t slot = 0) {
    subset[slot] = k, first[slot] = c;
    if (!t.made()) return;
    const int64_t pixels = ceil_div(s.T * s.V, lanes<S>) * lanes<S>;
    each(count, slot, [&](int64_t r, int64_t at, int64_t piece, const Entries<S>& e) {
      S* made = rows + (slot * group + r) * t.plan.ld;
      gather_row(panel, e, piece, t.wide.bias ? t.wide.bias + at : nullptr, made, t.plan.ld, pixels);
    });
  }
  Frames<S> row(int64_t i, int64_t slot = 0) const {
    if (t.made()) return {rows + (slot * group + i) * t.plan.ld, s.V, 1};
    return frames_of(t.wide.given, n, subset[slot], first[slot] + i);
  }

  // Where the gradient of row(i, slot) is to be written, and what follows when it is, then when all of a slot are.
  S* gradient(int64_t i, int64_t slot = 0) const {
    return t.made() ? drows + (slot * group + i) * t.plan.ld : streams ? rows : place(i);
  }
  void finish(int64_t i) const {
    if (!t.made() && streams) stream_row(place(i), rows, s.T * s.V);
  }
  void send(int64_t count, S* sums, int64_t slot = 0) const {
    if (!t.made()) return;
    const Pattern& p = t.wide.conv;
    const int64_t ld = t.plan.ld, pixels = s.T * s.V;
    each(count, slot, [&](int64_t r, int64_t at, int64_t piece, const Entries<S>& e) {
      const int64_t o = at % p.bo;
      const S* d = drows + (slot * group + r) * ld;
      scatter_row(dpanel, e, piece, d, ld, pixels);
      dot_row(panel, e.offset, e.n, p.bo, piece, d, ld, pixels, sums + (e.offset - t.offset.data()) * p.bo + o);
      for (int64_t i = 0; i < piece; i++) sums[t.entries() * p.bo + at + i] += sum_row(d + i * ld, pixels);
    });
  }
  void leave() const {
    for (int64_t i = 0; t.made() && i < t.wide.conv.I; i++) {
      S* dx = to->x + (n * t.wide.conv.I + i) * s.T * s.V;
      if (const int64_t r = t.plan.inputs.row[i]; r < 0) leave_zeros(dx, s.T * s.V, streams);
      else leave_row(dx, dpanel + r * t.plan.ld, s.T * s.V, streams);
    }
  }

  // The gradients of values and bias from the sums of `chunks` ranges of samples.
  static void finish(const Tables& tables, S* partial, int64_t chunks, const WideGradient<S>& into) {
    if (!tables.made()) return;
    add_parts(partial, chunks, tables.sums());
    const int64_t weights = tables.entries() * tables.wide.conv.bo;
    if (weights) clear_ragged(tables.wide.conv, partial);
    std::memcpy(into.values, partial, weights * sizeof(S));
    if (into.bias) std::memcpy(into.bias, partial + weights, tables.wide.conv.O * sizeof(S));
  }

 private:
  // body(r, output, rows, entries) for the pieces of block rows that rows [r, r + rows) of the `count` of a slot lie in.
  template <class F>
  void each(int64_t count, int64_t slot, F body) const {
    const Pattern& p = t.wide.conv;
    for (int64_t r = 0; r < count;) {
      const int64_t at = subset[slot] * s.C + first[slot] + r, g = at / p.bo, o = at % p.bo, piece = min64(p.bo - o, count - r);
      Entries<S> e = block_row(p, g, t.offset.data(), t.wide.values);
      e.weight += o;
      body(r, at, piece, e);
      r += piece;
    }
  }
  S* place(int64_t i) const { return to->wide + ((n * s.K + subset[0]) * s.C + first[0] + i) * s.T * s.V; }

  const Tables& t;
  const DynamicShape& s;
  const WideGradient<S>* to;
  S *panel = nullptr, *rows = nullptr, *dpanel = nullptr, *drows = nullptr;
  bool streams;
  int64_t n = 0, subset[2] = {}, first[2] = {};
};
