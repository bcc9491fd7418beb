// Convolution in float32 over NHWC memory as products of matrices, for CPUs with AVX2.
//
// A row of the left matrix is the channels of a pixel, read in place. Only the weight is packed, 16
// outputs side by side, just before it is used. On small maps six rows are one pixel of six images,
// so a tap outside of the image is left out.
// The input's gradient is the same product with dy for x; for a stride s its pixels fall into s * s
// classes, each of which sees its own taps. The weight's gradient is a product over pixels for each
// tap. The order of sums depends on shapes alone, not on the number of threads.
// Compiled at run time by direct_convolution_cpu.py, whose Arguments has the same fields.
#include <algorithm>
#include <cstdint>
#include <vector>

struct Arguments {
  const float *x, *w, *dy;  // (n, height, width, channels), (outputs, kernel, kernel, channels),
                            // (n, out_height, out_width, outputs)
  float *y, *dx, *dw;       // like dy, x and w
  float* partial;           // (parts, outputs, kernel, kernel, channels), unused for one part
  int64_t n, height, width, channels, out_height, out_width, outputs, kernel, stride, padding;
  int64_t parts;
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

#include "direct_weight_gradient.h"
#include "products.h"

namespace {

constexpr int64_t kPacked = 1 << 16;  // floats of packed weight that stay in the second cache
constexpr int64_t kLeft = 1 << 14;    // floats of rows that are multiplied with all of it in turn
constexpr int64_t kTiles = 32;        // of kRows pixels, that are multiplied in turn at most
constexpr int64_t kSmall = 16;        // pixels of a map up to which rows are of one pixel
constexpr int kTaps = 9;

alignas(64) const float zeros[1 << 14] = {};  // the row of a pixel outside of the image

struct Tap {
  int64_t y, x, index;  // where it reads, relative to the pixel's own place, and its place in w
};

// Pixels (n, rows, columns) of the result that see the same taps, and where these read.
struct Grid {
  const float* from;
  float* to;
  int64_t n, height, width, depth, step;                  // of what is read
  int64_t rows, columns, to_height, to_width, to_depth, to_step, to_y, to_x;
  int taps;
  Tap tap[kTaps];

  int64_t pixels() const { return n * rows * columns; }
  // Whether any pixel reads inside of the image.
  bool sees(const Tap& t) const {
    const auto any = [this](int64_t at, int64_t count, int64_t size) {
      return at + (count - 1) * step >= 0 && at < size &&
             (at >= 0 || (-at + step - 1) / step * step + at < size);
    };
    return any(t.y, rows, height) && any(t.x, columns, width);
  }
};

// Six pixels of the result, and the rows that each of the taps reads.
struct Tile {
  int count, taps;
  float* to[kRows];
  int tap[kTaps];  // which of the packed ones
  const float* rows[kTaps][kRows];
};

void place(const Grid& g, int64_t first, int64_t end, Tile& tile) {
  int64_t n[kRows], y[kRows], x[kRows];
  tile.count = static_cast<int>(std::min<int64_t>(kRows, end - first));
  for (int i = 0; i < tile.count; i++) {
    const int64_t at = first + i, map = g.rows * g.columns;
    const int64_t pixel = map <= kSmall ? at / g.n : at % map;
    n[i] = map <= kSmall ? at % g.n : at / map;
    y[i] = pixel / g.columns, x[i] = pixel % g.columns;
    const int64_t row = g.to_y + y[i] * g.to_step, column = g.to_x + x[i] * g.to_step;
    tile.to[i] = g.to + ((n[i] * g.to_height + row) * g.to_width + column) * g.to_depth;
  }
  tile.taps = 0;
  for (int t = 0; t < g.taps; t++) {
    bool any = false;
    for (int i = 0; i < tile.count; i++) {
      const int64_t row = y[i] * g.step + g.tap[t].y, column = x[i] * g.step + g.tap[t].x;
      const bool in = row >= 0 && row < g.height && column >= 0 && column < g.width;
      any |= in;
      tile.rows[tile.taps][i] =
          in ? g.from + ((n[i] * g.height + row) * g.width + column) * g.depth : zeros;
    }
    tile.tap[tile.taps] = t;
    tile.taps += any;
  }
}

template <int ROWS>
void multiply(const Tile& tile, const float* panel, int64_t depth, int64_t column) {
  Wide sums[kRows];
  for (int i = 0; i < ROWS; i++) sums[i] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int t = 0; t < tile.taps; t++)
    rows_by_panel<ROWS>(tile.rows[t], panel + tile.tap[t] * depth * kPanel, depth, sums);
  for (int i = 0; i < ROWS; i++) store(tile.to[i] + column, sums[i]);
}

void multiply(const Tile& tile, const float* panel, int64_t depth, int64_t column) {
  switch (tile.count) {
    case 1: return multiply<1>(tile, panel, depth, column);
    case 2: return multiply<2>(tile, panel, depth, column);
    case 3: return multiply<3>(tile, panel, depth, column);
    case 4: return multiply<4>(tile, panel, depth, column);
    case 5: return multiply<5>(tile, panel, depth, column);
    default: return multiply<6>(tile, panel, depth, column);
  }
}

// Some of the pixels of a grid, and some columns of the result.
struct Task {
  const Grid* grid;
  int64_t begin, end, first, panels;
};

// Columns of the result are outputs, or for the input's gradient channels.
template <bool GRADIENT>
void run(const Arguments& a, const Task& task, std::vector<float>& packed) {
  const Grid& g = *task.grid;
  const int64_t row = a.kernel * a.kernel * a.channels, panel = g.taps * g.depth * kPanel;
  packed.resize(std::max<int64_t>(packed.size(), task.panels * panel));
  for (int64_t p = 0; p < task.panels; p++) {
    const int64_t column = (task.first + p) * kPanel;
    for (int t = 0; t < g.taps; t++) {
      float* to = packed.data() + p * panel + t * g.depth * kPanel;
      const float* tap = a.w + g.tap[t].index * a.channels;
      if (!GRADIENT) transpose_panel(tap + column * row, row, g.depth, to);
      for (int64_t o = 0; GRADIENT && o < g.depth; o++)
        store(to + o * kPanel, load(tap + o * row + column));
    }
  }
  Tile tiles[kTiles];
  const int64_t most = std::clamp<int64_t>(kLeft / (kRows * g.depth), 2, kTiles);
  for (int64_t at = task.begin; at < task.end;) {
    int64_t count = 0;
    for (; count < most && at < task.end; count++, at += kRows)
      place(g, at, task.end, tiles[count]);
    for (int64_t p = 0; p < task.panels; p++) {
      for (int64_t i = 0; i < count; i++)
        multiply(tiles[i], packed.data() + p * panel, g.depth, (task.first + p) * kPanel);
    }
  }
}

template <bool GRADIENT>
void run_all(const Arguments& a, const std::vector<Grid>& grids, int64_t columns) {
  std::vector<Task> tasks;
  for (const Grid& g : grids) {
    const int64_t all = columns / kPanel, size = std::max<int64_t>(g.taps, 1) * g.depth * kPanel;
    const int64_t panels = std::clamp<int64_t>(kPacked / size, 1, all);
    const int64_t blocks = ceil_div(all, panels);
    int64_t pixels = ceil_div(g.pixels(), ceil_div(4 * a.threads, blocks));
    pixels = ceil_div(std::max<int64_t>(pixels, 384), kRows) * kRows;
    for (int64_t p = 0; p < all; p += panels) {
      for (int64_t at = 0; at < g.pixels(); at += pixels)
        tasks.push_back({&g, at, std::min(at + pixels, g.pixels()), p, std::min(panels, all - p)});
    }
  }
#pragma omp parallel num_threads(a.threads)
  {
    static thread_local std::vector<float> packed;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) run<GRADIENT>(a, tasks[i], packed);
  }
}

}  // namespace

extern "C" const char* unavailable() { return ""; }

extern "C" void forward(const Arguments* arguments) {
  const Arguments& a = *arguments;
  Grid g = {a.x,          a.y,         a.n,          a.height,    a.width,   a.channels, a.stride,
            a.out_height, a.out_width, a.out_height, a.out_width, a.outputs, 1,          0,
            0,            0,           {}};
  for (int64_t i = 0; i < a.kernel * a.kernel; i++) {
    const Tap tap = {i / a.kernel - a.padding, i % a.kernel - a.padding, i};
    if (g.sees(tap)) g.tap[g.taps++] = tap;
  }
  run_all<false>(a, {g}, a.outputs);
}

extern "C" void input_gradient(const Arguments* arguments) {
  const Arguments& a = *arguments;
  std::vector<Grid> grids;
  for (int64_t i = 0; i < a.stride * a.stride; i++) {
    const int64_t y = i / a.stride, x = i % a.stride;
    if (y >= a.height || x >= a.width) continue;
    Grid g = {a.dy, a.dx, a.n, a.out_height, a.out_width, a.outputs, 1,
              ceil_div(a.height - y, a.stride), ceil_div(a.width - x, a.stride),
              a.height, a.width, a.channels, a.stride, y, x, 0, {}};
    for (int64_t k = 0; k < a.kernel * a.kernel; k++) {
      const int64_t up = y + a.padding - k / a.kernel, left = x + a.padding - k % a.kernel;
      if (up % a.stride || left % a.stride) continue;
      const Tap tap = {up / a.stride, left / a.stride, k};
      if (g.sees(tap)) g.tap[g.taps++] = tap;
    }
    grids.push_back(g);
  }
  run_all<true>(a, grids, a.channels);
}
#endif
