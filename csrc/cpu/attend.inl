// attend: AA-GCN's attention over joints, frames and channels, and its backward. The three gates multiply:
//   out[c,t,v] = y[c,t,v] a[v] b[t] g[c]
//   a = 1 + sigmoid(conv over v of m1), m1[c,v] = mean over t of y
//   b = 1 + sigmoid(conv over t of m2), m2[c,t] = mean over v of y a
//   g = 1 + sigmoid(fc2 relu(fc1 m3)),  m3[c]   = mean over t of m2 b
// so that y is read for m1, for m2 and for out, and the gated tensors between are never made. A task is a sample (640 kB for
// 64 channels of 100 frames and 25 joints): it comes from memory once and stays in L2 for the later sweeps.
//
// Backward, d = dL/dout: one sweep over y and d for the sums of d y that all gates need, one over y for what reaches a through
// m2, one over d that writes dy = a (d b g + dm2 / V) + dm1 / T. Gradients of the weights are summed over the samples in order.
// Reference: kernels/reference_units.py.

// The joints of a frame as up to `n` vectors. The last one ends at the last joint, and so may hold joints of the one before
// again; `fresh` marks the others. Frames shorter than a vector (SHORT) are read and written in part.
template <class S, int n, bool SHORT>
struct FrameVectors {
  int64_t first, last, V;
  Vec<S> fresh;
  FrameVectors(int64_t V, int64_t first, int64_t end) : first(first), last(SHORT ? 0 : end - lanes<S>), V(V), fresh{} {
    for (int64_t l = 0; l < lanes<S>; l++) fresh[l] = SHORT ? l < V : last + l >= first + (n - 1) * lanes<S>;
  }
  INLINE int64_t at(int i) const { return i + 1 < n ? first + i * lanes<S> : last; }
  INLINE Vec<S> read(const S* frame, int i) const {
    if constexpr (SHORT) return load_some(frame, V);
    else return load(frame + at(i));
  }
  INLINE void write(S* frame, int i, Vec<S> v) const {
    if constexpr (SHORT) store_some(frame, v, V);
    else store(frame + at(i), v);
  }
  // to[joint] += its lane of v, every joint once.
  INLINE void add(double* to, const Vec<S>* v) const {
    for (int i = 0; i < n; i++)
      for (int64_t l = 0; l < (SHORT ? V : lanes<S>); l++)
        if (i + 1 < n || fresh[l] > S(0)) to[at(i) + l] += (double)v[i][l];
  }
  // The sum of a frame's vectors, every joint once.
  INLINE S sum(const Vec<S>* v) const {
    Vec<S> total = fresh > Vec<S>{} ? v[n - 1] : Vec<S>{};
    UNROLL for (int i = 0; i + 1 < n; i++) total += v[i];
    return sum_lanes<S>(total);
  }
};

// Calls body(Int<n>, vectors) for the joints, four vectors at a time.
template <class S, class F>
INLINE void over_joints(int64_t V, F body) {
  constexpr int64_t L = lanes<S>;
  if (V < L) return body(Int<1>{}, FrameVectors<S, 1, true>(V, 0, V));
  for (int64_t first = 0; first < V; first += 4 * L) {
    const int64_t end = min64(V, first + 4 * L);
    switch (ceil_div(end - first, L)) {
      case 1: body(Int<1>{}, FrameVectors<S, 1, false>(V, first, end)); break;
      case 2: body(Int<2>{}, FrameVectors<S, 2, false>(V, first, end)); break;
      case 3: body(Int<3>{}, FrameVectors<S, 3, false>(V, first, end)); break;
      default: body(Int<4>{}, FrameVectors<S, 4, false>(V, first, end));
    }
  }
}

// What a sample keeps for the backward pass: the three means, the hidden units, and the sigmoids of the gates.
template <class S>
struct AttendState {
  S *joint_mean, *frame_mean, *mean, *hidden, *joint, *frame, *channel;
  AttendState(const AttendShape& s, S* state, int64_t n) {
    joint_mean = state + n * s.state();
    frame_mean = joint_mean + s.C * s.V;
    mean = frame_mean + s.C * s.T;
    hidden = mean + s.C;
    joint = hidden + s.H;
    frame = joint + s.V;
    channel = frame + s.T;
  }
};

template <class S>
INLINE int64_t padded(int64_t count) { return ceil_div(count, lanes<S>) * lanes<S>; }

template <class S>
INLINE S sigmoid_of(S x) { return (S)(1 / (1 + std::exp(-(double)x))); }

template <class S>
INLINE S dot(const S* a, const S* b, int64_t count) {
  Vec<S> sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * lanes<S> <= count; i += 2 * lanes<S>)
    UNROLL for (int u = 0; u < 2; u++) sum[u] += load(a + i + u * lanes<S>) * load(b + i + u * lanes<S>);
  S total = sum_lanes<S>(sum[0] + sum[1]);
  for (; i < count; i++) total += a[i] * b[i];
  return total;
}

// to[i] += w * from[i].
template <class S>
INLINE void add_scaled(S w, const S* from, S* to, int64_t count) {
  sweep_row<S>(count, [&](auto read, auto write) __attribute__((always_inline)) { write(to, read(to) + splat(w) * read(from)); });
}

// gate[l] = sigmoid(bias + sum over c, k of w[c,k] x[c, l + k - (taps-1)/2]), x (C, length) with zeros outside of it. `pad`: room
// for a row of x between the zeros, `sums` for one of whole vectors.
template <class S>
void gate_sigmoids(int64_t C, int64_t taps, int64_t length, const S* x, const S* w, S bias, S* pad, S* sums, S* gate) {
  const int64_t whole = padded<S>(length), lead = (taps - 1) / 2;
  std::memset(pad, 0, (whole + taps - 1) * sizeof(S));
  for (int64_t l = 0; l < whole; l++) sums[l] = bias;
  for (int64_t c = 0; c < C; c++) {
    std::memcpy(pad + lead, x + c * length, length * sizeof(S));
    for (int64_t l = 0; l < whole; l += lanes<S>) {
      Vec<S> sum = {};
      for (int64_t k = 0; k < taps; k++) sum += splat(w[c * taps + k]) * load(pad + l + k);
      store(sums + l, load(sums + l) + sum);
    }
  }
  for (int64_t l = 0; l < length; l++) gate[l] = sigmoid_of(sums[l]);
}

// The adjoint of that for one channel: to[l] = sum over k of w[k] d[l - k + (taps-1)/2]; pad: d between (taps-1)/2 zeros before
// it and as many, and a vector, behind it. Whole vectors are written.
template <class S>
INLINE void spread_taps(int64_t taps, int64_t length, const S* pad, const S* w, S* to) {
  for (int64_t l = 0; l < length; l += lanes<S>) {
    Vec<S> sum = {};
    for (int64_t k = 0; k < taps; k++) sum += splat(w[k]) * load(pad + l + taps - 1 - k);
    store(to + l, sum);
  }
}

template <class S>
void attend_forward(const AttendShape& s, const S* y, const AttendWeights<S>& w, S* out, S* state, int threads) {
  const int64_t P = s.T * s.V, most = max64(s.T, s.V), rows = padded<S>(most);
  const int64_t taps = max64(s.joint_taps, s.frame_taps);
  parallel(s.N, threads, [&](int64_t n) {
    task_scratch.reserve(Scratch::room<S>(rows + taps) + 4 * Scratch::room<S>(rows));
    S *pad = task_scratch.take<S>(rows + taps), *sums = task_scratch.take<S>(rows), *a = task_scratch.take<S>(rows),
      *b = task_scratch.take<S>(rows), *totals = task_scratch.take<S>(rows);
    const AttendState<S> keep(s, state, n);
    const S* from = y + n * s.C * P;
    S* to = out + n * s.C * P;
    over_joints<S>(s.V, [&](auto count, const auto& j) __attribute__((always_inline)) {
      constexpr int m = decltype(count)::value;
      const Vec<S> scale = splat((S)(1 / (double)s.T));
      for (int64_t c = 0; c < s.C; c++) {
        Vec<S> sum[m] = {};
        for (int64_t t = 0; t < s.T; t++)
          UNROLL for (int i = 0; i < m; i++) sum[i] += j.read(from + c * P + t * s.V, i);
        UNROLL for (int i = 0; i < m; i++) j.write(keep.joint_mean + c * s.V, i, sum[i] * scale);
      }
    });
    gate_sigmoids(s.C, s.joint_taps, s.V, keep.joint_mean, w.joint, *w.joint_bias, pad, sums, keep.joint);
    for (int64_t v = 0; v < s.V; v++) a[v] = 1 + keep.joint[v];

    std::memset(keep.frame_mean, 0, s.C * s.T * sizeof(S));
    over_joints<S>(s.V, [&](auto count, const auto& j) __attribute__((always_inline)) {
      constexpr int m = decltype(count)::value;
      Vec<S> gate[m];
      UNROLL for (int i = 0; i < m; i++) gate[i] = j.read(a, i);
      for (int64_t r = 0; r < s.C * s.T; r++) {
        Vec<S> v[m];
        UNROLL for (int i = 0; i < m; i++) v[i] = j.read(from + r * s.V, i) * gate[i];
        keep.frame_mean[r] += j.sum(v);
      }
    });
    const S per_joint = (S)(1 / (double)s.V);
    for (int64_t r = 0; r < s.C * s.T; r++) keep.frame_mean[r] *= per_joint;
    gate_sigmoids(s.C, s.frame_taps, s.T, keep.frame_mean, w.frame, *w.frame_bias, pad, sums, keep.frame);
    for (int64_t t = 0; t < s.T; t++) b[t] = 1 + keep.frame[t];

    for (int64_t c = 0; c < s.C; c++) keep.mean[c] = dot(keep.frame_mean + c * s.T, b, s.T) * (S)(1 / (double)s.T);
    for (int64_t h = 0; h < s.H; h++) {
      const S sum = w.fc1_bias[h] + dot(w.fc1 + h * s.C, keep.mean, s.C);
      keep.hidden[h] = sum < 0 ? 0 : sum;  // NaN stays NaN
    }
    for (int64_t c = 0; c < s.C; c++) keep.channel[c] = sigmoid_of(w.fc2_bias[c] + dot(w.fc2 + c * s.H, keep.hidden, s.H));

    for (int64_t c = 0; c < s.C; c++) {
      for (int64_t t = 0; t < s.T; t++) totals[t] = b[t] * (1 + keep.channel[c]);
      over_joints<S>(s.V, [&](auto count, const auto& j) __attribute__((always_inline)) {
        constexpr int m = decltype(count)::value;
        Vec<S> gate[m];
        UNROLL for (int i = 0; i < m; i++) gate[i] = j.read(a, i);
        for (int64_t t = 0; t < s.T; t++) {
          const int64_t at = c * P + t * s.V;
          const Vec<S> both = splat(totals[t]);
          Vec<S> v[m];
          UNROLL for (int i = 0; i < m; i++) v[i] = j.read(from + at, i) * (gate[i] * both);
          UNROLL for (int i = 0; i < m; i++) j.write(to + at, i, v[i]);
        }
      });
    }
  });
}

// Of one sample, what the gradients of the weights are made of: dL/d of the arguments of the sigmoids (those along joints and
// frames between zeros, see spread_taps) and of the hidden units.
template <class S>
struct AttendArguments {
  S *joint, *frame, *channel, *hidden;
  static int64_t row(int64_t length, int64_t taps) { return length + taps - 1 + 2 * lanes<S>; }
  static int64_t size(const AttendShape& s) { return row(s.V, s.joint_taps) + row(s.T, s.frame_taps) + s.C + s.H; }
  AttendArguments(const AttendShape& s, S* base, int64_t n) {
    joint = base + n * size(s);
    frame = joint + row(s.V, s.joint_taps);
    channel = frame + row(s.T, s.frame_taps);
    hidden = channel + s.C;
  }
};

template <class S>
void attend_backward_sample(const AttendShape& s, const S* y, const S* dout, const AttendWeights<S>& w,
                            const AttendState<S>& keep, const AttendArguments<S>& d, S* dy) {
  const int64_t P = s.T * s.V, joints = padded<S>(s.V), frames = padded<S>(s.T);
  task_scratch.reserve(3 * Scratch::room<S>(joints) + 2 * Scratch::room<S>(frames) + Scratch::room<double>(s.V) +
                       Scratch::room<double>(s.T) + Scratch::room<S>(s.C) + Scratch::room<S>(s.C * frames));
  S *a = task_scratch.take<S>(joints), *along = task_scratch.take<S>(joints), *dm1 = task_scratch.take<S>(joints),
    *b = task_scratch.take<S>(frames), *sums = task_scratch.take<S>(frames);
  double *da = task_scratch.take<double>(s.V), *db = task_scratch.take<double>(s.T);
  S *dm3 = task_scratch.take<S>(s.C), *dm2 = task_scratch.take<S>(s.C * frames);
  for (int64_t v = 0; v < s.V; v++) a[v] = 1 + keep.joint[v], da[v] = 0;
  for (int64_t t = 0; t < s.T; t++) b[t] = 1 + keep.frame[t], db[t] = 0;

  for (int64_t c = 0; c < s.C; c++) {  // sums[t] = sum over v of d y a, along[v] = sum over t of d y b
    std::memset(sums, 0, s.T * sizeof(S));
    over_joints<S>(s.V, [&](auto count, const auto& j) __attribute__((always_inline)) {
      constexpr int m = decltype(count)::value;
      Vec<S> gate[m], total[m] = {};
      UNROLL for (int i = 0; i < m; i++) gate[i] = j.read(a, i);
      for (int64_t t = 0; t < s.T; t++) {
        const int64_t at = c * P + t * s.V;
        const Vec<S> of_frame = splat(b[t]);
        Vec<S> v[m];
        UNROLL for (int i = 0; i < m; i++) {
          const Vec<S> product = j.read(dout + at, i) * j.read(y + at, i);
          total[i] += product * of_frame;
          v[i] = product * gate[i];
        }
        sums[t] += j.sum(v);
      }
      UNROLL for (int i = 0; i < m; i++) j.write(along, i, total[i]);
    });
    const S sigmoid = keep.channel[c], gate = 1 + sigmoid;
    d.channel[c] = dot(sums, b, s.T) * sigmoid * (1 - sigmoid);
    for (int64_t v = 0; v < s.V; v++) da[v] += (double)gate * (double)along[v];
    for (int64_t t = 0; t < s.T; t++) db[t] += (double)gate * (double)sums[t];
  }

  std::memset(d.hidden, 0, s.H * sizeof(S));
  for (int64_t c = 0; c < s.C; c++) add_scaled(d.channel[c], w.fc2 + c * s.H, d.hidden, s.H);
  std::memset(dm3, 0, s.C * sizeof(S));
  for (int64_t h = 0; h < s.H; h++) {
    if (!(keep.hidden[h] > 0)) d.hidden[h] = 0;
    add_scaled(d.hidden[h], w.fc1 + h * s.C, dm3, s.C);
  }
  const S per_frame = (S)(1 / (double)s.T), per_joint = (S)(1 / (double)s.V);
  for (int64_t c = 0; c < s.C; c++) dm3[c] *= per_frame;
  for (int64_t c = 0; c < s.C; c++)
    for (int64_t t = 0; t < s.T; t++) db[t] += (double)dm3[c] * (double)keep.frame_mean[c * s.T + t];
  std::memset(d.frame, 0, d.row(s.T, s.frame_taps) * sizeof(S));
  for (int64_t t = 0; t < s.T; t++)
    d.frame[(s.frame_taps - 1) / 2 + t] = (S)db[t] * keep.frame[t] * (1 - keep.frame[t]);
  for (int64_t c = 0; c < s.C; c++) {  // dm2 / V
    S* row = dm2 + c * frames;
    spread_taps(s.frame_taps, s.T, d.frame, w.frame + c * s.frame_taps, row);
    for (int64_t t = 0; t < s.T; t++) row[t] = (row[t] + dm3[c] * b[t]) * per_joint;
  }

  for (int64_t c = 0; c < s.C; c++) {
    over_joints<S>(s.V, [&](auto count, const auto& j) __attribute__((always_inline)) {
      constexpr int m = decltype(count)::value;
      Vec<S> total[m] = {};
      for (int64_t t = 0; t < s.T; t++) {
        const Vec<S> of_frame = splat(dm2[c * frames + t]);
        UNROLL for (int i = 0; i < m; i++) total[i] += of_frame * j.read(y + c * P + t * s.V, i);
      }
      UNROLL for (int i = 0; i < m; i++) j.write(along, i, total[i]);
    });
    for (int64_t v = 0; v < s.V; v++) da[v] += (double)along[v];
  }
  std::memset(d.joint, 0, d.row(s.V, s.joint_taps) * sizeof(S));
  for (int64_t v = 0; v < s.V; v++)
    d.joint[(s.joint_taps - 1) / 2 + v] = (S)da[v] * keep.joint[v] * (1 - keep.joint[v]);

  for (int64_t c = 0; c < s.C; c++) {
    spread_taps(s.joint_taps, s.V, d.joint, w.joint + c * s.joint_taps, dm1);
    for (int64_t t = 0; t < s.T; t++) sums[t] = b[t] * (1 + keep.channel[c]);
    over_joints<S>(s.V, [&](auto count, const auto& j) __attribute__((always_inline)) {
      constexpr int m = decltype(count)::value;
      Vec<S> gate[m], rest[m];
      UNROLL for (int i = 0; i < m; i++) gate[i] = j.read(a, i), rest[i] = j.read(dm1, i) * splat(per_frame);
      for (int64_t t = 0; t < s.T; t++) {
        const int64_t at = c * P + t * s.V;
        const Vec<S> both = splat(sums[t]), more = splat(dm2[c * frames + t]);
        Vec<S> v[m];
        UNROLL for (int i = 0; i < m; i++) v[i] = gate[i] * (j.read(dout + at, i) * both + more) + rest[i];
        UNROLL for (int i = 0; i < m; i++) j.write(dy + at, i, v[i]);
      }
    });
  }
}

// dw[c,k] = sum over n, l of d[n,l] x[n, c, l + k - (taps-1)/2]; d between zeros, see spread_taps. sums: room for whole vectors.
template <class S, class D, class X>
INLINE void tap_gradient(int64_t N, int64_t taps, int64_t length, D d, X x, S* sums, S* dw) {
  for (int64_t k0 = 0; k0 < taps; k0 += lanes<S>) {
    Vec<S> total = {};
    for (int64_t n = 0; n < N; n++) {
      const S *pad = d(n) + k0, *row = x(n);
      Vec<S> sum = {};
      for (int64_t l = 0; l < length; l++) sum += splat(row[l]) * load(pad + l);
      total += sum;
    }
    store(sums + k0, total);
  }
  for (int64_t k = 0; k < taps; k++) dw[k] = sums[taps - 1 - k];
}

template <class S>
void attend_backward(const AttendShape& s, const S* y, const S* dout, const AttendWeights<S>& w, const S* state, S* dy,
                     const AttendGradients<S>& g, int threads) {
  const int64_t taps = max64(s.joint_taps, s.frame_taps);
  call_scratch.reserve(Scratch::room<S>(s.N * AttendArguments<S>::size(s)));
  S* base = call_scratch.take<S>(s.N * AttendArguments<S>::size(s));
  auto kept = [&](int64_t n) { return AttendState<S>(s, const_cast<S*>(state), n); };
  auto arguments = [&](int64_t n) { return AttendArguments<S>(s, base, n); };
  parallel(s.N, threads, [&](int64_t n) {
    const int64_t first = n * s.C * s.T * s.V;
    attend_backward_sample(s, y + first, dout + first, w, kept(n), arguments(n), dy + first);
  });
  parallel(s.C, threads, [&](int64_t c) {
    task_scratch.reserve(Scratch::room<S>(padded<S>(taps)));
    S* sums = task_scratch.take<S>(padded<S>(taps));
    tap_gradient<S>(s.N, s.joint_taps, s.V, [&](int64_t n) { return arguments(n).joint; },
                    [&](int64_t n) { return kept(n).joint_mean + c * s.V; }, sums, g.joint + c * s.joint_taps);
    tap_gradient<S>(s.N, s.frame_taps, s.T, [&](int64_t n) { return arguments(n).frame; },
                    [&](int64_t n) { return kept(n).frame_mean + c * s.T; }, sums, g.frame + c * s.frame_taps);
    std::memset(g.fc2 + c * s.H, 0, s.H * sizeof(S));
    S sum = 0;
    for (int64_t n = 0; n < s.N; n++) {
      add_scaled(arguments(n).channel[c], kept(n).hidden, g.fc2 + c * s.H, s.H);
      sum += arguments(n).channel[c];
    }
    g.fc2_bias[c] = sum;
    for (int64_t h = c; h < s.H; h += s.C) {
      std::memset(g.fc1 + h * s.C, 0, s.C * sizeof(S));
      S of_hidden = 0;
      for (int64_t n = 0; n < s.N; n++) {
        add_scaled(arguments(n).hidden[h], kept(n).mean, g.fc1 + h * s.C, s.C);
        of_hidden += arguments(n).hidden[h];
      }
      g.fc1_bias[h] = of_hidden;
    }
    if (c > 0) return;
    double along_joints = 0, along_frames = 0;
    for (int64_t n = 0; n < s.N; n++) {
      for (int64_t v = 0; v < s.V; v++) along_joints += (double)arguments(n).joint[(s.joint_taps - 1) / 2 + v];
      for (int64_t t = 0; t < s.T; t++) along_frames += (double)arguments(n).frame[(s.frame_taps - 1) / 2 + t];
    }
    *g.joint_bias = (S)along_joints, *g.frame_bias = (S)along_frames;
  });
}
