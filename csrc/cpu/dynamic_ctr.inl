// ctr_aggregate: y[n,c,t,w] = sum over k, v of x3[n,k,c,t,v] G[n,k,c,v,w]; of subset k, D[r,v,w] = tanh(x1[n,r,v] - x2[n,r,w])
// and G[n,c] = A + alpha (b4[c] + sum over live (c,r) of W4[c,r] D[r]). Reference: kernels/reference_dynamic.py.
//
// Rank, not channels: D exists for one sample, and only for those r that a live block reads. G is mixed for 8 channels at a
// time by the register tiles of the convolutions (tile.inl), a map being a row of V * ld pixels: gather makes G, dot makes
// dW4[c,r] = alpha <dG[c], D[r]>, scatter makes dD[r] += alpha W4[c,r] dG[c]. Backward keeps all maps transposed.

constexpr int64_t mix_rows = 8;

// W4 (dense (C, R), or its live blocks) as entries of the tiles, scaled by alpha. Every block row begins with one more entry
// of weight 1 that reads map 0, which is A. Maps 1 to `live` are D, the last one is zeros for inputs past the ragged edge.
template <class S>
struct Mix {
  const DynamicShape& s;
  const Pattern& p;
  const Joints<S> j;
  int64_t live = 0;
  int32_t *slot, *first, *offset;  // slot: the map of r, 0 if no block reads it
  S *weight, *bias;

  static bool dense(const Pattern& p) { return !p.row_ptr; }
  static int64_t entries(const DynamicShape& s, const Pattern& p) {
    return p.rows + (dense(p) ? p.rows * s.R : p.blocks * p.bi);
  }
  static int64_t weights(const DynamicShape& s, const Pattern& p) { return dense(p) ? s.C * s.R : p.blocks * p.bi * p.bo; }
  static size_t room(const DynamicShape& s, const Pattern& p) {
    return Scratch::room<int32_t>(s.R) + Scratch::room<int32_t>(p.rows + 1) + Scratch::room<int32_t>(entries(s, p)) +
           Scratch::room<S>(entries(s, p) * p.bo) + Scratch::room<S>(s.C);
  }

  Mix(const DynamicShape& shape, const Pattern& pattern, const S* w, const S* b, S alpha, Scratch& scratch)
      : s(shape), p(pattern), j(shape.V) {
    slot = scratch.take<int32_t>(s.R);
    first = scratch.take<int32_t>(p.rows + 1);
    offset = scratch.take<int32_t>(entries(s, p));
    weight = scratch.take<S>(entries(s, p) * p.bo);
    bias = scratch.take<S>(s.C);
    first[0] = 0;
    for (int64_t g = 0; g < p.rows; g++)
      first[g + 1] = first[g] + 1 + (int32_t)(dense(p) ? s.R : (p.row_ptr[g + 1] - p.row_ptr[g]) * p.bi);
    std::memset(slot, 0, s.R * sizeof(int32_t));
    each([&](int64_t, int64_t, int64_t r, int64_t, int64_t) { if (r < s.R) slot[r] = 1; });
    for (int64_t r = 0; r < s.R; r++)
      if (slot[r]) slot[r] = (int32_t)++live;
    for (int64_t g = 0; g < p.rows; g++) {
      offset[first[g]] = 0;
      for (int64_t o = 0; o < p.bo; o++) weight[first[g] * p.bo + o] = 1;
    }
    each([&](int64_t g, int64_t e, int64_t r, int64_t at, int64_t step) {
      offset[e] = (int32_t)((r < s.R ? slot[r] : live + 1) * j.map);
      for (int64_t o = 0; o < p.bo; o++) weight[e * p.bo + o] = o < live_rows(p, g) ? alpha * w[at + o * step] : 0;
    });
    for (int64_t c = 0; c < s.C; c++) bias[c] = alpha * b[c];
  }

  // body(block row, entry, r, at, step): output o of the entry is element at + o * step of the caller's weight.
  template <class F>
  void each(F body) const {
    for (int64_t g = 0; g < p.rows; g++)
      for (int64_t e = first[g] + 1; e < first[g + 1]; e++) {
        const int64_t k = e - first[g] - 1;
        if (dense(p)) { body(g, e, k, g * p.bo * s.R + k, s.R); continue; }
        const int64_t entry = p.row_ptr[g] * p.bi + k;
        body(g, e, p.input[entry / p.bi] * p.bi + entry % p.bi, entry * p.bo, 1);
      }
  }

  int64_t panel_size() const { return (live + 2) * j.map; }
  Entries<S> row(int64_t g, int64_t o) const {
    return {offset + first[g], weight + first[g] * p.bo + o, first[g + 1] - first[g], p.bo};
  }

  // D of sample n; transposed: the rows are the joints w that receive. work: four padded rows.
  void maps(View<const S> x1, View<const S> x2, int64_t n, bool transposed, S* panel, S* work) const {
    View<const S> &rows = transposed ? x2 : x1, &columns = transposed ? x1 : x2;
    for (int64_t r = 0; r < s.R; r++) {
      if (!slot[r]) continue;
      const S* a = rows.data + n * rows.stride[0] + r * rows.stride[1];
      const S* b = columns.data + n * columns.stride[0] + r * columns.stride[1];
      pack_joints(a, rows.stride[3], j, a[0], work);
      pack_joints(b, columns.stride[3], j, b[0], work + j.ld);
      S* to = panel + slot[r] * j.map;
      const int64_t ld = j.ld;
      tanh_map<S>(work, work + ld, j, transposed ? -1 : 1, work + 2 * ld,
                  [=](int64_t v, int64_t i, Vec<S> t) __attribute__((always_inline)) { store(to + v * ld + i * lanes<S>, t); });
    }
  }
};

// x1 (which = 0) or x2 (1) of subset k, (N, R, 1, V) of embedded (N, K, 2, R, V).
template <class S>
INLINE View<const S> embedding(const GroupView<const S>& x, int64_t k, int64_t which) {
  return {x.data + k * x.stride[1] + which * x.stride[2], {x.stride[0], x.stride[3], 0, x.stride[4]}};
}
template <class S>
void ctr_forward(const DynamicShape& s, const Pattern* p, GroupView<const S> x12, const Wide<S>& x3, const S* weight,
                 const S* bias, const S* alpha, const S* A, S* y, int threads) {
  size_t room = 0;
  for (int64_t k = 0; k < s.K; k++) room += Mix<S>::room(s, p[k]);
  call_scratch.reserve(room);
  std::vector<Mix<S>> mixes;
  mixes.reserve(s.K);
  int64_t largest = 0;
  for (int64_t k = 0; k < s.K; weight += Mix<S>::weights(s, p[k]), k++) {
    mixes.emplace_back(s, p[k], weight, bias + k * s.C, *alpha, call_scratch);
    largest = max64(largest, mixes[k].panel_size());
  }
  const Joints<S> j(s.V);
  static_assert(mix_rows <= WideRows<S>::group);
  const typename WideRows<S>::Tables tables(s, x3);
  // Threads without a sample of their own take block rows of one, and make the maps once more.
  const int64_t rows = p[0].rows, bo = p[0].bo, parts = s.N ? max64(1, min64(rows, ceil_div(threads, s.N))) : 1;
  parallel(s.N * parts, threads, [&](int64_t task) {
    const FlushDenormals flush;
    const int64_t n = task / parts, part = task % parts;
    task_scratch.reserve(Scratch::room<S>(largest) + Scratch::room<S>(mix_rows * j.map) + Scratch::room<S>(4 * j.ld) +
                         tables.room(false));
    S* panel = task_scratch.take<S>(largest);
    S* graph = task_scratch.take<S>(mix_rows * j.map);
    S* work = task_scratch.take<S>(4 * j.ld);
    WideRows<S> wide(tables, task_scratch);
    wide.enter(n);
    for (int64_t k = 0; k < s.K; k++) {  // y of a sample stays in L2
      const Mix<S>& mix = mixes[k];
      pack_map(A + k * s.V * s.V, false, j, panel);
      std::memset(panel + (mix.live + 1) * j.map, 0, j.map * sizeof(S));
      mix.maps(embedding(x12, k, 0), embedding(x12, k, 1), n, false, panel, work);
      for (int64_t g = part * rows / parts; g < (part + 1) * rows / parts; g++)
        for (int64_t o = 0; o < live_rows(p[k], g); o += mix_rows) {
          const int64_t count = min64(mix_rows, live_rows(p[k], g) - o), c = g * bo + o;
          gather_row(panel, mix.row(g, o), count, mix.bias + c, graph, j.map, j.map);
          wide.open(k, c, count);
          for (int64_t i = 0; i < count; i++)
            multiply(wide.row(i), graph + i * j.map, s.T, j, y + (n * s.C + c + i) * s.T * s.V, k > 0);
        }
    }
  });
}

// dx1[v] and dx2[w] of one map D' (rows w, lanes v) from dD': d tanh(x1[v] - x2[w]) = 1 - tanh^2.
template <class S>
INLINE void ctr_differences(const S* map, const S* dmap, const Joints<S>& j, S* dx1, S* dx2, S* work) {
  std::memset(work, 0, j.ld * sizeof(S));
  for (int64_t w = 0; w < j.V; w++) {
    Vec<S> row = {};
    for (int64_t i = 0; i < j.ld; i += lanes<S>) {
      const Vec<S> t = load(map + w * j.ld + i), d = load(dmap + w * j.ld + i) * (splat<S>(S(1)) - t * t);
      row += d;
      store(work + i, load(work + i) + d);
    }
    dx2[w] = -sum_lanes<S>(row);
  }
  unpack_joints(work, j, dx1);
}

// What a subset adds to the sums over samples: <dG, D> of every entry, the sums of dG, dA'.
template <class S>
INLINE int64_t ctr_sums(const DynamicShape& s, const Pattern& p) {
  return Mix<S>::entries(s, p) * p.bo + s.C + Joints<S>(s.V).map;
}

// One sample and subset. maps, dmaps: D' and dD' in the panel of `mix`, their map 0 being A' and dA'; dx12 (2, R, V).
template <class S>
struct CtrBackward {
  const DynamicShape& s;
  const Joints<S>& j;
  S *maps, *dmaps, *graph, *dgraph, *packed, *work;

  static size_t room(const DynamicShape& s, const Joints<S>& j, int64_t panel) {
    return 2 * Scratch::room<S>(panel) + 2 * Scratch::room<S>(mix_rows * j.map) + Scratch::room<S>(s.T * j.ld) +
           Scratch::room<S>(4 * j.ld);
  }
  CtrBackward(const DynamicShape& shape, const Joints<S>& joints, int64_t panel, Scratch& scratch)
      : s(shape), j(joints), maps(scratch.take<S>(panel)), dmaps(scratch.take<S>(panel)),
        graph(scratch.take<S>(mix_rows * joints.map)), dgraph(scratch.take<S>(mix_rows * joints.map)),
        packed(scratch.take<S>(shape.T * joints.ld)), work(scratch.take<S>(4 * joints.ld)) {}

  // along: this subset's sums over samples; wide_sums: those of the convolution that makes x3; silent: channels of dy that are 0.
  void run(const Mix<S>& mix, View<const S> x1, View<const S> x2, WideRows<S>& wide, View<const S> dy, const char* silent, int64_t n,
           int64_t k, const S* A, S* dx12, S* along, S* wide_sums) {
    const Pattern& p = mix.p;
    S *sums = along + Mix<S>::entries(s, p) * p.bo, *dA = sums + s.C;
    pack_map(A, true, j, maps);
    std::memset(maps + (mix.live + 1) * j.map, 0, j.map * sizeof(S));
    mix.maps(x1, x2, n, true, maps, work);
    std::memset(dmaps, 0, mix.panel_size() * sizeof(S));
    for (int64_t g = 0; g < p.rows; g++)
      for (int64_t o = 0; o < live_rows(p, g); o += mix_rows) {
        const int64_t count = min64(mix_rows, live_rows(p, g) - o), c = g * p.bo + o;
        const Entries<S> row = mix.row(g, o);
        gather_row(maps, row, count, mix.bias + c, graph, j.map, j.map);
        wide.open(k, c, count);
        for (int64_t i = 0; i < count; i++) {
          S* to = dgraph + i * j.map;
          if (silent[c + i]) {
            std::memset(wide.gradient(i), 0, s.T * s.V * sizeof(S));
            wide.finish(i);
            std::memset(to, 0, j.map * sizeof(S));
            continue;
          }
          multiply(frames_of(dy, n, c + i), graph + i * j.map, s.T, j, wide.gradient(i));
          wide.finish(i);
          pack_frames(wide.row(i), s.T, j, packed);
          correlate(frames_of(dy, n, c + i), packed, s.T, j, to, false);
          sums[c + i] += sum_row(to, j.map);
        }
        wide.send(count, wide_sums);
        dot_row(maps, row.offset + 1, row.n - 1, p.bo, count, dgraph, j.map, j.map, along + (mix.first[g] + 1) * p.bo + o);
        scatter_row(dmaps, row, count, dgraph, j.map, j.map);
      }
    for (int64_t i = 0; i < j.map; i++) dA[i] += dmaps[i];
    for (int64_t r = 0; r < s.R; r++) {
      S *d1 = dx12 + r * s.V, *d2 = dx12 + (s.R + r) * s.V;
      if (mix.slot[r]) ctr_differences(maps + mix.slot[r] * j.map, dmaps + mix.slot[r] * j.map, j, d1, d2, work);
      else std::memset(d1, 0, s.V * sizeof(S)), std::memset(d2, 0, s.V * sizeof(S));
    }
  }
};

template <class S>
void ctr_backward(const DynamicShape& s, const Pattern* p, GroupView<const S> x12, const Wide<S>& x3, const S* weight,
                  const S* bias, const S* alpha, const S* A, View<const S> dy, S* dx12, const WideGradient<S>& dx3, S* dweight,
                  S* dbias, S* dalpha, S* dA, int threads) {
  // Sums over samples: in at most max_chunks ranges, then range by range.
  const int64_t chunks = min64(max_chunks, max64(s.N, 1));
  const Joints<S> j(s.V);
  size_t room = 0;
  int64_t size = 0, largest = 0;
  for (int64_t k = 0; k < s.K; k++) room += Mix<S>::room(s, p[k]), size += ctr_sums<S>(s, p[k]);
  const typename WideRows<S>::Tables tables(s, x3);
  call_scratch.reserve(room + Scratch::room<S>(chunks * size) + Scratch::room<S>(chunks * tables.sums()));
  std::vector<Mix<S>> mixes;
  mixes.reserve(s.K);
  const S* of_subset = weight;
  for (int64_t k = 0; k < s.K; of_subset += Mix<S>::weights(s, p[k]), k++) {
    mixes.emplace_back(s, p[k], of_subset, bias + k * s.C, *alpha, call_scratch);
    largest = max64(largest, mixes[k].panel_size());
  }
  S* partial = call_scratch.take<S>(chunks * size);
  S* wide_partial = call_scratch.take<S>(chunks * tables.sums());
  parallel(chunks, threads, [&](int64_t chunk) {
    const FlushDenormals flush;
    task_scratch.reserve(CtrBackward<S>::room(s, j, largest) + tables.room(true) + Scratch::room<char>(s.C));
    CtrBackward<S> step(s, j, largest, task_scratch);
    char* silent = task_scratch.take<char>(s.C);
    WideRows<S> wide(tables, task_scratch, &dx3);
    S* wide_sums = wide_partial + chunk * tables.sums();
    std::memset(partial + chunk * size, 0, size * sizeof(S));
    std::memset(wide_sums, 0, tables.sums() * sizeof(S));
    for (int64_t n = chunk * s.N / chunks; n < (chunk + 1) * s.N / chunks; n++) {
      S* along = partial + chunk * size;
      wide.enter(n);
      for (int64_t c = 0; c < s.C; c++) {
        const Frames<S> d = frames_of(dy, n, c);
        silent[c] = d.frame == s.V && d.joint == 1 && all_zeros(d.data, s.T * s.V);
      }
      for (int64_t k = 0; k < s.K; along += ctr_sums<S>(s, p[k]), k++)  // dy of a sample stays in L2
        step.run(mixes[k], embedding(x12, k, 0), embedding(x12, k, 1), wide, dy, silent, n, k, A + k * s.V * s.V,
                 dx12 + (n * s.K + k) * 2 * s.R * s.V, along, wide_sums);
      wide.leave();
    }
    end_stream();
  });
  add_parts(partial, chunks, size);
  WideRows<S>::finish(tables, wide_partial, chunks, dx3);

  double dot = 0;  // dalpha = sum of dG (b4 + W4 D)
  for (int64_t k = 0; k < s.K; k++) {
    const S *sums = partial + Mix<S>::entries(s, p[k]) * p[k].bo, *dmap = sums + s.C;
    mixes[k].each([&](int64_t g, int64_t e, int64_t r, int64_t at, int64_t step) {
      for (int64_t o = 0; o < p[k].bo; o++) {
        const bool exists = o < live_rows(p[k], g);
        if (!exists && Mix<S>::dense(p[k])) continue;
        const S value = exists && r < s.R ? partial[e * p[k].bo + o] : 0;
        dweight[at + o * step] = *alpha * value;
        if (exists) dot += (double)weight[at + o * step] * value;
      }
    });
    for (int64_t c = 0; c < s.C; c++) {
      dbias[k * s.C + c] = *alpha * sums[c];
      dot += (double)bias[k * s.C + c] * sums[c];
    }
    unpack_transposed_map(dmap, j, dA + k * s.V * s.V);
    partial += ctr_sums<S>(s, p[k]), weight += Mix<S>::weights(s, p[k]), dweight += Mix<S>::weights(s, p[k]);
  }
  *dalpha = (S)dot;
}
