// How the C++ kernels of this folder touch memory. They compute in float32.
#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
  uint16_t bits;
};

inline float value(float x) { return x; }

inline float value(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline void store(float* to, float x) { *to = x; }

inline void store(bf16* to, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Asks for n values from 8 KiB further on. Where nothing is written the processor's own prefetcher
// reaches half of the memory's rate; loops that write as well gain nothing from it.
template <class T>
inline void fetch(const T* at, int64_t n) {
  const char* from = reinterpret_cast<const char*>(at) + (1 << 13);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}
