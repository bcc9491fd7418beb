// Products of float32 matrices for kernels of the CPU with AVX2: what fits the registers.
//
// A panel holds 16 columns of a matrix side by side, row after row. Six rows by one panel are
// twelve accumulators of eight lanes, which hides the latency of the multiplication.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t kPanel = 16;  // columns of a panel
constexpr int kRows = 6;        // rows that are multiplied with a panel at a time

struct Wide {  // 16 columns
  __m256 left, right;
};

inline Wide load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

inline void store(float* to, Wide v) {
  _mm256_storeu_ps(to, v.left);
  _mm256_storeu_ps(to + 8, v.right);
}

inline void add(Wide& sum, float a, Wide b) {
  const __m256 both = _mm256_set1_ps(a);
  sum.left = _mm256_fmadd_ps(both, b.left, sum.left);
  sum.right = _mm256_fmadd_ps(both, b.right, sum.right);
}

// sums[i] += the row i, contiguous, of `depth` values, times the panel.
template <int ROWS>
inline void rows_by_panel(const float* const* rows, const float* panel, int64_t depth,
                          Wide (&sums)[kRows]) {
  const float* row[ROWS];
  for (int i = 0; i < ROWS; i++) row[i] = rows[i];
  for (int64_t k = 0; k < depth; k++) {
    const Wide b = load(panel + k * kPanel);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) add(sums[i], row[i][k], b);
  }
}

// to[i][0..16) = (or, if not `first`, +=) sum over k of left[k][i] right[k][0..16): ROWS columns of
// one panel times another panel.
template <int ROWS>
inline void panel_by_panel(const float* left, const float* right, int64_t depth, bool first,
                           float* to, int64_t stride) {
  Wide sums[ROWS];
  for (int i = 0; i < ROWS; i++) {
    sums[i] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    if (!first) _mm_prefetch(reinterpret_cast<const char*>(to + i * stride), _MM_HINT_T0);
  }
  for (int64_t k = 0; k < depth; k++) {
    const Wide b = load(right + k * kPanel);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) add(sums[i], left[k * kPanel + i], b);
  }
  for (int i = 0; i < ROWS; i++) {
    if (!first) {
      const Wide before = load(to + i * stride);
      sums[i] = {_mm256_add_ps(sums[i].left, before.left),
                 _mm256_add_ps(sums[i].right, before.right)};
    }
    store(to + i * stride, sums[i]);
  }
}

// The same for all 16 columns of the left panel.
inline void multiply_panels(const float* left, const float* right, int64_t depth, bool first,
                            float* to, int64_t stride) {
  panel_by_panel<6>(left, right, depth, first, to, stride);
  panel_by_panel<5>(left + 6, right, depth, first, to + 6 * stride, stride);
  panel_by_panel<5>(left + 11, right, depth, first, to + 11 * stride, stride);
}

// to[k][i] = from[i][k] for 8 rows i and 8 columns k; rows of `from` are `stride` apart, of `to`
// 16.
inline void transpose8(const float* from, int64_t stride, float* to) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * stride);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * kPanel, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * kPanel, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

// panel[k][i] = rows[i * stride + k] for 16 rows and `depth` columns.
inline void transpose_panel(const float* rows, int64_t stride, int64_t depth, float* panel) {
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    transpose8(rows + k, stride, panel + k * kPanel);
    transpose8(rows + 8 * stride + k, stride, panel + k * kPanel + 8);
  }
  for (; k < depth; k++) {
    for (int i = 0; i < kPanel; i++) panel[k * kPanel + i] = rows[i * stride + k];
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
