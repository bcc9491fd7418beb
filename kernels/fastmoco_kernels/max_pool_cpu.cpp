// 3x3 max pooling with stride 2 and padding 1 over NHWC memory on the CPU: that of ResNet's stem.
//
// The forward keeps which of the nine taps was taken in a byte, not in ATen's eight, and the
// backward gathers: every input pixel asks the one, two or four windows that hold it. So nothing is
// zeroed first, each tensor is touched once, and the order of sums does not depend on the thread
// count. Channels come in vectors of the compiler, a multiple of 32. Compiled at run time by
// max_pool_cpu.py, whose Arguments has the same fields.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

struct Arguments {
  const void* x;  // (n, height, width, channels)
  void* y;        // (n, out_height, out_width, channels)
  uint8_t* taps;  // of the shape of y: 3 ky + kx; null where no gradient is wanted
  const void* dy;
  void* dx;
  int64_t n, height, width, channels, out_height, out_width;
  int32_t is_bf16, threads;
};

namespace {

template <class T, int LANES>
using Vector __attribute__((vector_size(LANES * sizeof(T)))) = T;

template <class V, class T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Integers that order like the floating-point numbers of these bits, -0 like 0, NaN above all.
template <class Bits, class V>
inline V order(V bits) {
  constexpr Bits most = std::numeric_limits<Bits>::max();
  constexpr Bits infinity = static_cast<Bits>(sizeof(Bits) == 2 ? 0x7f80 : 0x7f800000);
  const V size = bits & most, key = bits < 0 ? -size : size;
  return size > infinity ? V{} + most : key;
}

// The first of equal values is taken.
template <class Bits, int LANES = 32 / sizeof(Bits)>
void pool_row(const Arguments& a, int64_t row) {
  using V = Vector<Bits, LANES>;
  const int64_t oy = row % a.out_height, stride = a.width * a.channels;
  const Bits* image = static_cast<const Bits*>(a.x) + row / a.out_height * a.height * stride;
  const int64_t top = std::max<int64_t>(2 * oy - 1, 0), bottom = std::min(2 * oy + 2, a.height);
  for (int64_t ox = 0; ox < a.out_width; ++ox) {
    const int64_t left = std::max<int64_t>(2 * ox - 1, 0), right = std::min(2 * ox + 2, a.width);
    const int64_t at = (row * a.out_width + ox) * a.channels;
    for (int64_t c = 0; c < a.channels; c += LANES) {
      V most = V{} + std::numeric_limits<Bits>::min(), taken = {};
      for (int64_t iy = top; iy < bottom; ++iy) {
        for (int64_t ix = left; ix < right; ++ix) {
          const V key = order<Bits>(load<V>(image + iy * stride + ix * a.channels + c));
          const auto tap = static_cast<Bits>(3 * (iy - 2 * oy + 1) + ix - 2 * ox + 1);
          taken = key > most ? V{} + tap : taken;
          most = key > most ? key : most;
        }
      }
      const V y = most < 0 ? -most | std::numeric_limits<Bits>::min() : most;
      std::memcpy(static_cast<Bits*>(a.y) + at + c, &y, sizeof y);
      const auto bytes = __builtin_convertvector(taken, Vector<uint8_t, LANES>);
      if (a.taps) std::memcpy(a.taps + at + c, &bytes, sizeof bytes);
    }
  }
}

using Floats = Vector<float, 8>;
using Words = Vector<uint32_t, 8>;

inline Floats values(const float* from) { return load<Floats>(from); }

inline Floats values(const uint16_t* from) {  // bfloat16
  const auto bits = load<Vector<uint16_t, 8>>(from);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// To nearest, ties to even. A NaN among sums of bfloat16 has no low bits that rounding could carry.
inline void store(uint16_t* to, Floats v) {
  const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto half = __builtin_convertvector(rounded, Vector<uint16_t, 8>);
  std::memcpy(to, &half, sizeof half);
}

template <class T>
void gather_row(const Arguments& a, int64_t row) {
  const int64_t image = row / a.height, iy = row % a.height;
  const int64_t bottom = std::min((iy + 1) / 2, a.out_height - 1);
  for (int64_t ix = 0; ix < a.width; ++ix) {
    const int64_t right = std::min((ix + 1) / 2, a.out_width - 1);
    T* dx = static_cast<T*>(a.dx) + (row * a.width + ix) * a.channels;
    for (int64_t c = 0; c < a.channels; c += 8) {
      Floats sum = {};
      for (int64_t oy = iy / 2; oy <= bottom; ++oy) {
        for (int64_t ox = ix / 2; ox <= right; ++ox) {
          const int64_t at = ((image * a.out_height + oy) * a.out_width + ox) * a.channels + c;
          const auto tap = static_cast<uint32_t>(3 * (iy + 1 - 2 * oy) + ix + 1 - 2 * ox);
          // Widened twice: at once GCC 12 does it lane by lane.
          const auto byte = load<Vector<uint8_t, 8>>(a.taps + at);
          const auto half = __builtin_convertvector(byte, Vector<uint16_t, 8>);
          const Floats dy = values(static_cast<const T*>(a.dy) + at);
          sum += __builtin_convertvector(half, Words) == tap ? dy : Floats{};
        }
      }
      store(dx + c, sum);
    }
  }
}

}  // namespace

extern "C" void max_pool_forward(const Arguments* a) {
#pragma omp parallel for num_threads(a->threads)
  for (int64_t row = 0; row < a->n * a->out_height; ++row)
    a->is_bf16 ? pool_row<int16_t>(*a, row) : pool_row<int32_t>(*a, row);
}

extern "C" void max_pool_backward(const Arguments* a) {
#pragma omp parallel for num_threads(a->threads)
  for (int64_t row = 0; row < a->n * a->height; ++row)
    a->is_bf16 ? gather_row<uint16_t>(*a, row) : gather_row<float>(*a, row);
}
