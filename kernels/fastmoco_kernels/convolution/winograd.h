// The transforms of F(2x2, 3x3), eight channels at a time: part of winograd_cpu.cpp.
#pragma once
#include <immintrin.h>

namespace {

using V = __m256;

inline V half(V v) { return v * _mm256_set1_ps(0.5f); }

// One dimension of each transform: 4 pixels, 3 taps, 4 products to 2 pixels; and the adjoint ones.
struct OfPixels {
  static constexpr int from = 4, to = 4;
  static void run(const V* d, V* v) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
  }
};
struct OfTaps {
  static constexpr int from = 3, to = 4;
  static void run(const V* g, V* v) {
    const V ends = half(g[0] + g[2]), middle = half(g[1]);
    v[0] = g[0], v[1] = ends + middle, v[2] = ends - middle, v[3] = g[2];
  }
};
struct OfProducts {
  static constexpr int from = 4, to = 2;
  static void run(const V* m, V* y) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }
};
struct OfResult {
  static constexpr int from = 2, to = 4;
  static void run(const V* y, V* m) {
    m[0] = y[0], m[1] = y[0] + y[1], m[2] = y[0] - y[1], m[3] = -y[1];
  }
};
struct ToTaps {
  static constexpr int from = 4, to = 3;
  static void run(const V* v, V* g) {
    const V sum = half(v[1] + v[2]);
    g[0] = v[0] + sum, g[1] = half(v[1] - v[2]), g[2] = sum + v[3];
  }
};

// Both dimensions of a square of vectors.
template <class T>
inline void transform(const V (&from)[T::from * T::from], V (&to)[T::to * T::to]) {
  V columns[T::to * T::from];  // [to][from]
#pragma GCC unroll 4
  for (int x = 0; x < T::from; x++) {
    V in[T::from], out[T::to];
    for (int y = 0; y < T::from; y++) in[y] = from[y * T::from + x];
    T::run(in, out);
    for (int y = 0; y < T::to; y++) columns[y * T::from + x] = out[y];
  }
#pragma GCC unroll 4
  for (int y = 0; y < T::to; y++) T::run(columns + y * T::from, to + y * T::to);
}

}  // namespace
