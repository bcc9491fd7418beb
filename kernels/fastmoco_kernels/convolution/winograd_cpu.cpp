// 3x3 convolution with stride 1 and padding 1 in float32 over NHWC memory by Winograd's
// F(2x2, 3x3), for CPUs with AVX2 (Lavin and Gray, arXiv 1509.09308).
//
// A tile of 4x4 pixels becomes 16 numbers per channel, as does a 3x3 kernel; products of those, one
// matrix product for each of the 16, become 2x2 pixels of the result: 16 multiplications instead of
// 36. The input's gradient is the same with the kernel turned around. The weight's gradient is the
// adjoint: 2x2 pixels of dy become 16 numbers, whose products with those of x add up over tiles.
// The order of sums depends on shapes alone, not on the number of threads.
// Compiled at run time by winograd_cpu.py, whose Arguments has the same fields.
#include <algorithm>
#include <cstdint>
#include <vector>

struct Arguments {
  const float *x, *w, *dy;  // (n, height, width, channels), (outputs, 3, 3, channels), and
                            // (n, height, width, outputs)
  float* to;                // y like dy, or dx like x, or dw like w
  float* work;              // (16, channels, outputs) transformed weights
  float* tiles;             // for the weight's gradient: (16, chunk, channels + outputs)
  int64_t n, height, width, channels, outputs, chunk;
  int32_t threads;
};

#if defined(__AVX512F__)
#define UNAVAILABLE "oneDNN has AVX-512 in fp32"
#elif !defined(__AVX2__) || !defined(__FMA__)
#define UNAVAILABLE "no AVX2"
#endif

#if defined(UNAVAILABLE)
extern "C" const char* unavailable() { return UNAVAILABLE; }
extern "C" void forward(const Arguments*) {}
extern "C" void input_gradient(const Arguments*) {}
extern "C" void weight_gradient(const Arguments*) {}
#else

#include "products.h"
#include "winograd.h"

namespace {

constexpr int kTiles = 48;             // of a task, in rows of six
constexpr int64_t kColumns = 64;       // of the result that are transformed back at a time
constexpr int64_t kDepth = 256;        // tiles of one product of the weight's gradient

alignas(64) const float zeros[1 << 14] = {};  // a pixel outside of the image

// Tiles of an image of (n, height, width, depth) and their pixels.
struct Map {
  int64_t n, height, width, depth;

  int64_t columns() const { return (width + 1) / 2; }
  int64_t rows() const { return (height + 1) / 2; }
  int64_t tiles() const { return n * rows() * columns(); }
  // Where the SIDE x SIDE pixels of a tile lie, from `edge` before its 2x2 pixels; or `outside`.
  template <int SIDE, class T>
  void pixels(T* image, int64_t tile, int64_t edge, T* outside, T* (&at)[SIDE * SIDE]) const {
    const int64_t map = tile / (rows() * columns());
    const int64_t top = tile / columns() % rows() * 2 - edge, left = tile % columns() * 2 - edge;
    for (int i = 0; i < SIDE * SIDE; i++) {
      const int64_t y = top + i / SIDE, x = left + i % SIDE;
      const bool in = y >= 0 && y < height && x >= 0 && x < width;
      at[i] = in ? image + ((map * height + y) * width + x) * depth : outside;
    }
  }
};

// work[16][columns / 16][depth][16] of the weight; for the input's gradient columns are channels.
template <bool GRADIENT>
void transform_weight(const Arguments& a, int64_t panel) {
  const int64_t row = 9 * a.channels, columns = GRADIENT ? a.channels : a.outputs;
  const int64_t depth = GRADIENT ? a.outputs : a.channels, size = columns * depth;
  float* to = a.work + panel * depth * kPanel;
  for (int64_t k = 0; k < depth; k += 8) {
    float block[16][kPanel * 8];
    for (int i = 0; i < kPanel; i++) {
      // Forward: output panel * 16 + i, channels k.. ; gradient: output k + i / 2, half a panel.
      const float* w = GRADIENT ? a.w + (k + i / 2) * row + panel * kPanel + i % 2 * 8
                                : a.w + (panel * kPanel + i) * row + k;
      V g[9], u[16];
      for (int t = 0; t < 9; t++) g[t] = _mm256_loadu_ps(w + (GRADIENT ? 8 - t : t) * a.channels);
      transform<OfTaps>(g, u);
      for (int t = 0; t < 16; t++)
        _mm256_storeu_ps(GRADIENT ? to + t * size + k * kPanel + i * 8 : block[t] + i * 8, u[t]);
    }
    for (int t = 0; !GRADIENT && t < 16; t++) {
      transpose8(block[t], 8, to + t * size + k * kPanel);
      transpose8(block[t] + 64, 8, to + t * size + k * kPanel + 8);
    }
  }
}

// The result of `kTiles` tiles: `from` is (n, height, width, depth), `to` (.., .., .., columns).
void convolve(const Arguments& a, const float* from, int64_t depth, int64_t columns, int64_t first,
              std::vector<float>& memory) {
  const Map in = {a.n, a.height, a.width, depth}, out = {a.n, a.height, a.width, columns};
  const int64_t count = std::min<int64_t>(kTiles, in.tiles() - first);
  memory.resize(std::max<size_t>(memory.size(), 16 * kTiles * (depth + kColumns)));
  float *tiles = memory.data(), *products = tiles + 16 * kTiles * depth;
  for (int64_t i = 0; i < count; i++) {
    const float* pixel[16];
    in.pixels<4>(from, first + i, 1, zeros, pixel);
    for (int64_t c = 0; c < depth; c += 8) {
      V d[16], v[16];
      for (int t = 0; t < 16; t++) d[t] = _mm256_loadu_ps(pixel[t] + c);
      transform<OfPixels>(d, v);
      for (int t = 0; t < 16; t++) _mm256_storeu_ps(tiles + (t * kTiles + i) * depth + c, v[t]);
    }
  }
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, columns);
    for (int t = 0; t < 16; t++) {
      for (int64_t column = begin; column < end; column += kPanel) {
        const float* panel = a.work + (t * columns + column) * depth;
        for (int64_t i = 0; i < count; i += kRows) {  // up to five rows of an earlier task
          const float* rows[kRows];
          Wide sums[kRows];
          for (int r = 0; r < kRows; r++) {
            rows[r] = tiles + (t * kTiles + i + r) * depth;
            sums[r] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
          }
          rows_by_panel<kRows>(rows, panel, depth, sums);
          float* to = products + (t * kTiles + i) * kColumns + column - begin;
          for (int r = 0; r < kRows; r++) store(to + r * kColumns, sums[r]);
        }
      }
    }
    for (int64_t i = 0; i < count; i++) {
      float* pixel[4];
      out.pixels<2, float>(a.to, first + i, 0, nullptr, pixel);
      for (int64_t c = begin; c < end; c += 8) {
        V m[16], y[4];
        for (int t = 0; t < 16; t++)
          m[t] = _mm256_loadu_ps(products + (t * kTiles + i) * kColumns + c - begin);
        transform<OfProducts>(m, y);
        for (int t = 0; t < 4; t++)
          if (pixel[t]) _mm256_storeu_ps(pixel[t] + c, y[t]);
      }
    }
  }
}

template <bool GRADIENT>
void run(const Arguments& a) {
  const int64_t columns = GRADIENT ? a.channels : a.outputs;
  const int64_t depth = GRADIENT ? a.outputs : a.channels;
  const int64_t tiles = Map{a.n, a.height, a.width, depth}.tiles();
#pragma omp parallel num_threads(a.threads)
  {
    static thread_local std::vector<float> memory;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < columns / kPanel; i++) transform_weight<GRADIENT>(a, i);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tiles; i += kTiles)
      convolve(a, GRADIENT ? a.dy : a.x, depth, columns, i, memory);
  }
}

// to[16][depth / 16][chunk][16], one tile of it: of SIDE x SIDE pixels.
template <class T>
void transform_tile(const Map& map, const float* from, int64_t tile, int64_t edge, int64_t chunk,
                    float* to) {
  const float* pixel[T::from * T::from];
  map.pixels<T::from>(from, tile, edge, zeros, pixel);
  for (int64_t c = 0; c < map.depth; c += 8) {
    V d[T::from * T::from], v[16];
    for (int t = 0; t < T::from * T::from; t++) d[t] = _mm256_loadu_ps(pixel[t] + c);
    transform<T>(d, v);
    float* at = to + c / kPanel * chunk * kPanel + c % kPanel;
    for (int t = 0; t < 16; t++) _mm256_storeu_ps(at + t * chunk * map.depth, v[t]);
  }
}

}  // namespace

extern "C" const char* unavailable() { return ""; }
extern "C" void forward(const Arguments* a) { run<false>(*a); }
extern "C" void input_gradient(const Arguments* a) { run<true>(*a); }

extern "C" void weight_gradient(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const Map in = {a.n, a.height, a.width, a.channels}, out = {a.n, a.height, a.width, a.outputs};
  float *x = a.tiles, *dy = a.tiles + 16 * a.chunk * a.channels;
  const int64_t blocks = ceil_div(a.outputs, kColumns);
#pragma omp parallel num_threads(a.threads)
  {
    for (int64_t first = 0; first < in.tiles(); first += a.chunk) {
      const int64_t count = std::min(a.chunk, in.tiles() - first);
#pragma omp for
      for (int64_t i = 0; i < count; i++) {
        transform_tile<OfPixels>(in, a.x, first + i, 1, a.chunk, x + i * kPanel);
        transform_tile<OfResult>(out, a.dy, first + i, 0, a.chunk, dy + i * kPanel);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < 16 * blocks; i++) {
        const int64_t t = i / blocks, begin = i % blocks * kColumns;
        const int64_t end = std::min(begin + kColumns, a.outputs);
        for (int64_t at = 0; at < count; at += kDepth) {
          const int64_t depth = std::min(kDepth, count - at);
          for (int64_t c = 0; c < a.channels; c += kPanel) {
            const float* right = x + (t * a.channels + c) * a.chunk + at * kPanel;
            for (int64_t o = begin; o < end; o += kPanel) {
              const float* left = dy + (t * a.outputs + o) * a.chunk + at * kPanel;
              multiply_panels(left, right, depth, first + at == 0,
                              a.work + (t * a.outputs + o) * a.channels + c, a.channels);
            }
          }
        }
      }
    }
#pragma omp for
    for (int64_t o = 0; o < a.outputs; o++) {
      for (int64_t c = 0; c < a.channels; c += 8) {
        V u[16], g[9];
        for (int t = 0; t < 16; t++)
          u[t] = _mm256_loadu_ps(a.work + (t * a.outputs + o) * a.channels + c);
        transform<ToTaps>(u, g);
        for (int t = 0; t < 9; t++) _mm256_storeu_ps(a.to + (o * 9 + t) * a.channels + c, g[t]);
      }
    }
  }
}
#endif
