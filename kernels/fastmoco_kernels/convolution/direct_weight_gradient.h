// The weight's gradient of a convolution: part of direct_convolution_cpu.cpp, which includes it.
//
// For each tap a product over the pixels whose tap is inside of the image, block by block: rows of
// both sides are gathered into panels and multiplied from cache.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "products.h"

namespace {

constexpr int64_t kPixels = 256;      // of a block
constexpr int64_t kOutputs = 128;     // of such a block at most
constexpr int64_t kChannels = 256;    // of such a block at most

// One tap of the weight's gradient, over a part of the pixels that read inside of the image.
struct Product {
  int64_t ky, kx, output, outputs, channel, channels, part;
};

// Pixels [first, second) along one axis whose tap at `offset` reads inside of the image.
std::pair<int64_t, int64_t> inside(int64_t offset, int64_t size, int64_t out, int64_t stride) {
  const int64_t first = offset < 0 ? ceil_div(-offset, stride) : 0;
  const int64_t end = size - offset <= 0 ? 0 : ceil_div(size - offset, stride);
  return {std::min(first, out), std::max(std::min(first, out), std::min(end, out))};
}

// to[width / 16][kPixels][16] of `count` rows.
void gather(const float* const* rows, int64_t count, int64_t width, float* to) {
  // Four panels at a time: whole pieces of memory are read, and what is written fits the cache.
  for (int64_t c = 0; c < width; c += 4 * kPanel) {
    const int64_t end = std::min(c + 4 * kPanel, width);
    for (int64_t i = 0; i < count; i++)
      for (int64_t at = c; at < end; at += kPanel)
        store(to + at * kPixels + i * kPanel, load(rows[i] + at));
  }
}

void run(const Arguments& a, const Product& p, float* left, float* right) {
  const int64_t row = a.kernel * a.kernel * a.channels;
  float* dw = a.parts == 1 ? a.dw : a.partial + p.part * a.outputs * row;
  dw += p.output * row + (p.ky * a.kernel + p.kx) * a.channels + p.channel;
  const auto [top, bottom] = inside(p.ky - a.padding, a.height, a.out_height, a.stride);
  const auto [begin, end] = inside(p.kx - a.padding, a.width, a.out_width, a.stride);
  const int64_t map = (bottom - top) * (end - begin), each = ceil_div(a.n * map, a.parts);
  const int64_t last = std::min(a.n * map, (p.part + 1) * each);
  if (p.part * each >= last) {
    for (int64_t o = 0; o < p.outputs; o++) std::fill_n(dw + o * row, p.channels, 0.0f);
    return;
  }
  const float *dy[kPixels], *v[kPixels];
  for (int64_t at = p.part * each; at < last; at += kPixels) {
    const int64_t count = std::min(kPixels, last - at);
    for (int64_t i = 0; i < count; i++) {
      const int64_t n = (at + i) / map, pixel = (at + i) % map;
      const int64_t y = top + pixel / (end - begin), x = begin + pixel % (end - begin);
      const int64_t in_y = y * a.stride - a.padding + p.ky, in_x = x * a.stride - a.padding + p.kx;
      dy[i] = a.dy + ((n * a.out_height + y) * a.out_width + x) * a.outputs + p.output;
      v[i] = a.x + ((n * a.height + in_y) * a.width + in_x) * a.channels + p.channel;
    }
    gather(dy, count, p.outputs, left);
    gather(v, count, p.channels, right);
    for (int64_t c = 0; c < p.channels; c += kPanel) {
      for (int64_t o = 0; o < p.outputs; o += kPanel)
        multiply_panels(left + o * kPixels, right + c * kPixels, count, at == p.part * each,
                        dw + o * row + c, row);
    }
  }
}

}  // namespace

extern "C" void weight_gradient(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const int64_t size = a.outputs * a.kernel * a.kernel * a.channels;
  std::vector<Product> products;
  for (int64_t part = 0; part < a.parts; part++)
    for (int64_t k = 0; k < a.kernel * a.kernel; k++)
      for (int64_t o = 0; o < a.outputs; o += kOutputs)
        for (int64_t c = 0; c < a.channels; c += kChannels)
          products.push_back({k / a.kernel, k % a.kernel, o, std::min(kOutputs, a.outputs - o), c,
                              std::min(kChannels, a.channels - c), part});
#pragma omp parallel num_threads(a.threads)
  {
    static thread_local std::vector<float> left(kOutputs * kPixels), right(kChannels * kPixels);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < products.size(); i++) run(a, products[i], left.data(), right.data());
    if (a.parts > 1) {
#pragma omp for
      for (int64_t i = 0; i < size; i += kPanel) {
        Wide sum = load(a.partial + i);
        for (int64_t part = 1; part < a.parts; part++) {
          const Wide more = load(a.partial + part * size + i);
          sum = {_mm256_add_ps(sum.left, more.left), _mm256_add_ps(sum.right, more.right)};
        }
        store(a.dw + i, sum);
      }
    }
  }
}
