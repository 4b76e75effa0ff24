// group_lasso: the squares of the masked weights, and their gradient scale * W on masked entries, 0 on kept ones.
// w (O, I, K) with any strides, kept (O, I, K) contiguous flags. Runs on the calling thread: one read of the weights.

// In double, row by row in a fixed order: a group has up to a million weights.
template <class S>
double lasso_square(int64_t O, int64_t I, int64_t K, const S* w, const int64_t stride[3], const uint8_t* kept) {
  double total = 0;
  for (int64_t o = 0; o < O; o++) {
    double row[8] = {};
    for (int64_t i = 0; i < I; i++)
      for (int64_t k = 0; k < K; k++) {
        const double x = *kept++ ? 0 : (double)w[o * stride[0] + i * stride[1] + k * stride[2]];
        row[i & 7] += x * x;
      }
    total += ((row[0] + row[1]) + (row[2] + row[3])) + ((row[4] + row[5]) + (row[6] + row[7]));
  }
  return total;
}

template <class S>
void lasso_gradient(int64_t O, int64_t I, int64_t K, const S* w, const int64_t stride[3], const uint8_t* kept, S scale,
                    S* gradient) {
  for (int64_t o = 0; o < O; o++)
    for (int64_t i = 0; i < I; i++)
      for (int64_t k = 0; k < K; k++) {
        const int64_t at = o * stride[0] + i * stride[1] + k * stride[2];
        gradient[at] = *kept++ ? 0 : scale * w[at];
      }
}
