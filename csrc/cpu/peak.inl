// Nothing but multiply-adds of this instruction set, in enough independent chains to hide their latency: the peak that a
// benchmark divides by. Returns the number of float operations done.
inline int64_t fma_burst(int64_t rounds) {
  constexpr int chains = MAX_ROWS == 8 ? 24 : 12;
  Vec<float> sum[chains], factor = splat(0.5f), term = splat(0.25f);
  UNROLL for (int i = 0; i < chains; i++) sum[i] = splat((float)i);
  for (int64_t r = 0; r < rounds; r++)
    UNROLL for (int i = 0; i < chains; i++) {
      sum[i] = sum[i] * factor + term;
      KEEP(sum[i]);  // every round is executed
    }
  for (int i = 1; i < chains; i++) sum[0] += sum[i];
  volatile float used = sum_lanes<float>(sum[0]);
  (void)used;
  return rounds * chains * lanes<float> * 2;
}
