// Weight gradient of a convolution over NHWC memory with AVX-512 bfloat16 dot products.
//
// dw[o][ky][kx][c] is the sum over output pixels of dy[pixel][o] * x[input pixel][c]: a matrix
// product over pixels for every tap. The dot product instruction wants neighbouring pixels of a
// channel side by side, so blocks of pixels are packed that way and then multiplied from cache,
// while the rows of the next block are fetched. Sums are float32, in an order that depends on the
// shape alone: the number of threads does not change a bit.
// Compiled at run time by convolution_cpu.py, whose Arguments has the same fields.
#include <cstdint>

struct Arguments {
  const uint16_t* x;   // (n, height, width, channels), bits of bfloat16
  const uint16_t* dy;  // (n, out_height, out_width, outputs), bits of bfloat16
  float* dw;           // (outputs, kernel, kernel, channels)
  float* partial;      // (parts, outputs, kernel, kernel, channels), unused for one part
  int64_t n, height, width, channels, out_height, out_width, outputs, kernel, stride, padding;
  int64_t parts;
  int32_t threads;
};

#if defined(__AMX_BF16__)
extern "C" const char* unavailable() { return "oneDNN has AMX to itself"; }
extern "C" void weight_gradient(const Arguments*) {}
#elif !defined(__AVX512BF16__) || !defined(__AVX512BW__)
extern "C" const char* unavailable() { return "no AVX-512 bfloat16 dot product"; }
extern "C" void weight_gradient(const Arguments*) {}
#else

#include <immintrin.h>

#include <algorithm>

namespace {

constexpr int kPairs = 128;                  // pixel pairs of a block: 16 channels are 8 KiB
constexpr int kPixels = 2 * kPairs;
constexpr int kPanel = (kPairs + 1) * 16;    // words of 16 packed channels; +1: not a power of two
constexpr int64_t kWide = 1024;              // channels that are packed at once at most
constexpr int kRows = 8;                     // outputs of a tile, which is 32 channels wide

alignas(64) const uint16_t zeros[1 << 14] = {};  // the row of a pixel outside of the image

// Rows of one block of output pixels: of dy, and of x at the leftmost tap.
struct Block {
  int count;
  const uint16_t *dy[kPixels + 1], *x[kPixels + 1];
  int64_t column[kPixels];
  bool inside[kPixels];  // whether the row of the image exists
};

// Walks over the output pixels [at, end) block by block, at one row ky of the kernel.
struct Walk {
  const Arguments& a;
  int64_t ky, at, end, n, y, x;

  Walk(const Arguments& a, int64_t ky, int64_t begin, int64_t end)
      : a(a), ky(ky), at(begin), end(end) {
    n = begin / (a.out_height * a.out_width);
    y = begin / a.out_width % a.out_height;
    x = begin % a.out_width;
  }
  bool more() const { return at < end; }
  void next(Block& block) {
    block.count = static_cast<int>(std::min<int64_t>(kPixels, end - at));
    for (int i = 0; i < block.count; i++, at++) {
      const int64_t row = y * a.stride - a.padding + ky, column = x * a.stride - a.padding;
      block.dy[i] = a.dy + at * a.outputs;
      block.x[i] = a.x + ((n * a.height + row) * a.width + column) * a.channels;
      block.column[i] = column;
      block.inside[i] = row >= 0 && row < a.height;
      if (++x < a.out_width) continue;
      x = 0;
      if (++y < a.out_height) continue;
      y = 0, n++;
    }
    block.dy[block.count] = zeros;  // makes the last pair whole
  }
};

// Brings rows into the second cache, a line at a time, between multiplications.
struct Fetch {
  const uint16_t *const *row = nullptr, *const *end = nullptr;
  int64_t first = 0, width = 0, at = 0;

  void one() {
    if (row == end) return;
    _mm_prefetch(reinterpret_cast<const char*>(*row + first + at), _MM_HINT_T1);
    at += 32;
    if (at >= width) at = 0, row++;
  }
};

// packed[channel / 16][pair][channel % 16] = (pixel 2 pair, pixel 2 pair + 1) of that channel.
void pack(const uint16_t* const* rows, int pairs, int64_t first, int64_t width, uint32_t* packed) {
  alignas(64) static const uint16_t low[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,
                                             37, 6, 38, 7, 39, 8,  40, 9,  41, 10, 42,
                                             11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i lower = _mm512_load_si512(low);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  for (int64_t c = 0; c < width; c += 64) {
    for (int pair = 0; pair < pairs; pair++) {
      const uint16_t *even = rows[2 * pair] + first + c, *odd = rows[2 * pair + 1] + first + c;
      uint32_t* to = packed + c / 16 * kPanel + pair * 16;
      for (int half = 0; half < 64; half += 32, to += 2 * kPanel) {
        const __m512i e = _mm512_loadu_si512(even + half), o = _mm512_loadu_si512(odd + half);
        _mm512_store_si512(to, _mm512_permutex2var_epi16(e, lower, o));
        _mm512_store_si512(to + kPanel, _mm512_permutex2var_epi16(e, upper, o));
      }
    }
  }
}

// dw of 8 outputs and 32 channels, set by the first block of pixels, added to by the others.
inline void multiply(const uint32_t* dy, const uint32_t* x, float* dw, int64_t stride, int pairs,
                     bool first, Fetch& fetch) {
  __m512 sum[kRows][2];
  for (int i = 0; i < kRows; i++) {
    for (int j = 0; j < 2; j++) {
      sum[i][j] = _mm512_setzero_ps();
      if (!first) __builtin_prefetch(dw + i * stride + 16 * j, 1);
    }
  }
  for (int pair = 0; pair < pairs; pair++) {
    fetch.one();
    const __m512bh left = (__m512bh)_mm512_load_si512(x + pair * 16);
    const __m512bh right = (__m512bh)_mm512_load_si512(x + kPanel + pair * 16);
    for (int i = 0; i < kRows; i++) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(dy[pair * 16 + i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, left);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, right);
    }
  }
  for (int i = 0; i < kRows; i++) {
    for (int j = 0; j < 2; j++) {
      float* to = dw + i * stride + 16 * j;
      _mm512_storeu_ps(to, first ? sum[i][j] : _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]));
    }
  }
}

// Outputs and channels of dw that one task computes, for one row of the kernel, over [begin, end).
struct Task {
  int64_t begin, end, output, outputs, channel, channels, ky;
  float* dw;
};

alignas(64) thread_local uint32_t packed_dy[kWide / 16 * kPanel], packed_x[kWide / 16 * kPanel];

void run(const Arguments& a, const Task& task) {
  uint32_t *const left = packed_dy, *const right = packed_x;
  const int64_t stride = a.kernel * a.kernel * a.channels;
  Block blocks[2];
  const uint16_t* rows[kPixels + 1];
  Walk walk(a, task.ky, task.begin, task.end);
  walk.next(blocks[0]);
  for (int64_t number = 0, last = 0; !last; number++) {
    const Block &block = blocks[number % 2], &following = blocks[(number + 1) % 2];
    const int pairs = (block.count + 1) / 2;
    Fetch fetch;
    last = !walk.more();
    bool fetch_x = !last;  // once the rows of dy are on their way
    if (!last) {
      walk.next(blocks[(number + 1) % 2]);
      const auto* all = following.dy;
      fetch = {all, all + following.count, task.output, task.outputs, 0};
    }
    pack(block.dy, pairs, task.output, task.outputs, left);
    for (int64_t kx = 0; kx < a.kernel; kx++) {
      for (int i = 0; i < block.count; i++) {
        const int64_t column = block.column[i] + kx;
        const bool inside = block.inside[i] & (column >= 0) & (column < a.width);
        rows[i] = inside ? block.x[i] + kx * a.channels : zeros;
      }
      rows[block.count] = zeros;
      pack(rows, pairs, task.channel, task.channels, right);
      float* to = task.dw + task.output * stride + (task.ky * a.kernel + kx) * a.channels;
      for (int64_t c = 0; c < task.channels; c += 32) {
        if (fetch_x && fetch.row == fetch.end) {
          const auto* all = following.x;
          const int64_t middle = task.channel + a.padding * a.channels;
          fetch = {all, all + following.count, middle, task.channels, 0};
          fetch_x = false;
        }
        for (int64_t o = 0; o < task.outputs; o += kRows) {
          multiply(left + o / 16 * kPanel + o % 16, right + c / 16 * kPanel,
                   to + o * stride + task.channel + c, stride, pairs, number == 0, fetch);
        }
      }
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

extern "C" const char* unavailable() { return ""; }

extern "C" void weight_gradient(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const int64_t pixels = a.n * a.out_height * a.out_width;
  const int64_t size = a.outputs * a.kernel * a.kernel * a.channels;
  const int64_t part_pixels = ceil_div(pixels, a.parts);
  // Tasks as large as cache and threads allow: each packs its rows anew.
  int64_t outputs = std::min(a.outputs, kWide), channels = std::min(a.channels, kWide);
  int64_t o_tasks, c_tasks, tasks;
  for (;;) {
    o_tasks = ceil_div(a.outputs, outputs), c_tasks = ceil_div(a.channels, channels);
    tasks = a.parts * o_tasks * c_tasks * a.kernel;
    if (tasks % a.threads == 0 || tasks >= 4 * a.threads) break;
    int64_t& larger = outputs >= channels ? outputs : channels;
    if (larger <= 64) break;
    larger = ceil_div(larger, 128) * 64;
  }
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; i++) {
      Task task;
      const int64_t part = i / (o_tasks * c_tasks * a.kernel);
      task.begin = part * part_pixels;
      task.end = std::min(pixels, task.begin + part_pixels);
      task.output = i / (c_tasks * a.kernel) % o_tasks * outputs;
      task.outputs = std::min(outputs, a.outputs - task.output);
      task.channel = i / a.kernel % c_tasks * channels;
      task.channels = std::min(channels, a.channels - task.channel);
      task.ky = i % a.kernel;
      task.dw = a.parts == 1 ? a.dw : a.partial + part * size;
      run(a, task);
    }
    if (a.parts > 1) {
#pragma omp for
      for (int64_t i = 0; i < size; i += 16) {
        __m512 sum = _mm512_loadu_ps(a.partial + i);
        for (int64_t part = 1; part < a.parts; part++) {
          sum = _mm512_add_ps(sum, _mm512_loadu_ps(a.partial + part * size + i));
        }
        _mm512_storeu_ps(a.dw + i, sum);
      }
    }
  }
}
#endif
