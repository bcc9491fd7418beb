// Batch normalization, residual addition and ReLU over rows of channels (NHWC memory) on the CPU.
//
// A tensor is groups x rows x channels; each group is normalized by itself. The forward reads the
// input twice and writes once; the backward reads input and gradient twice and writes once; with a
// residual come one read in the forward, one read and one write in the backward. Sums are taken
// chunk by chunk in float32, around a value of the channel itself because a mean far from zero would
// cost digits, and added up in float64. Neither chunks nor results depend on the thread count.
// Compiled at run time by batch_norm_cpu.py, whose Arguments has the same fields.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "memory.h"

struct Arguments {
  const void *x, *residual;  // residual is null without one, which needs relu
  void* y;
  const void* dy;  // from here to grad_bias for the backward only
  void *dx, *d_residual;
  float *grad_weight, *grad_bias;
  const float *weight, *bias;
  float *mean, *invstd;  // (groups, channels): results of a training forward, otherwise inputs
  float *running_mean, *running_var;
  double momentum, eps;
  int64_t groups, rows, channels;
  int32_t is_bf16, relu, training, threads;
};

namespace {

constexpr int64_t kElements = 1 << 17;  // of a task at most: some ten microseconds
constexpr int64_t kRows = 1 << 11;      // of a task at most: longer float32 sums lose digits
constexpr int64_t kTogether = 4;        // rows that are summed up before memory is touched

// Runs of rows of one group, the unit of parallel work.
struct Chunks {
  int64_t rows, channels, step, per_group, all;

  explicit Chunks(const Arguments& a) : rows(a.rows), channels(a.channels) {
    step = std::clamp<int64_t>(kElements / channels, 1, kRows);
    per_group = (rows + step - 1) / step;
    all = a.groups * per_group;
  }
  int64_t group(int64_t k) const { return k / per_group; }
  int64_t size(int64_t k) const { return std::min(step, rows - k % per_group * step); }
  int64_t offset(int64_t k) const { return (group(k) * rows + k % per_group * step) * channels; }
};

// sums[c] = sum of x - origin, sums[channels + c] = sum of its square, over n rows.
template <class T>
void moments(const T* x, const T* origin, int64_t n, int64_t channels, float* sums) {
  float* squares = sums + channels;
  for (int64_t r = 0; r < n; r += kTogether, x += kTogether * channels) {
    const T* rows[kTogether];
    for (int64_t j = 0; j < kTogether; ++j) rows[j] = r + j < n ? x + j * channels : origin;
    fetch(x, kTogether * channels);
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      const float o = value(origin[i]);
      float sum = 0, square = 0;
      for (int64_t j = 0; j < kTogether; ++j) {
        const float away = value(rows[j][i]) - o;
        sum += away;
        square += away * away;
      }
      sums[i] += sum;
      squares[i] += square;
    }
  }
}

template <class T, bool RELU, bool RESIDUAL>
void normalize(const T* x, const T* residual, T* y, int64_t n, int64_t channels,
               const float* scale, const float* shift) {
  for (int64_t r = 0; r < n; ++r, x += channels, y += channels) {
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      float v = value(x[i]) * scale[i] + shift[i];
      if (RESIDUAL) v += value(residual[r * channels + i]);
      if (RELU) v = v < 0.0f ? 0.0f : v;  // written so that NaN stays
      store(y + i, v);
    }
  }
}

// sums[c] = sum of dz, sums[channels + c] = sum of dz (x - mean), over ROWS rows; dz is dy behind the
// ReLU. Whether that was open is read from y, or recomputed from x where nothing was added.
template <int64_t ROWS, class T, bool RELU, bool RESIDUAL>
inline void gradient_rows(const T* dy, const T* x, const T* y, T* dz, int64_t channels,
                          const float* scale, const float* shift, const float* mean, float* sums) {
  float* products = sums + channels;
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) {
    float sum = 0, product = 0;
    for (int64_t r = 0; r < ROWS; ++r) {
      const int64_t at = r * channels + i;
      const float u = value(x[at]), d = value(dy[at]);
      const float out = RESIDUAL ? value(y[at]) : u * scale[i] + shift[i];
      const float g = !RELU || out > 0.0f ? d : 0.0f;
      if (RESIDUAL) store(dz + at, g);
      sum += g;
      product += g * (u - mean[i]);
    }
    sums[i] += sum;
    products[i] += product;
  }
}

template <class T, bool RELU, bool RESIDUAL>
void gradient_sums(const T* dy, const T* x, const T* y, T* dz, int64_t n, int64_t channels,
                   const float* scale, const float* shift, const float* mean, float* sums) {
  int64_t r = 0, at = 0;
  for (; !RESIDUAL && r + kTogether <= n; r += kTogether, at += kTogether * channels) {
    fetch(x + at, kTogether * channels);
    fetch(dy + at, kTogether * channels);
    gradient_rows<kTogether, T, RELU, false>(dy + at, x + at, y, dz, channels, scale, shift, mean,
                                             sums);
  }
  for (; r < n; ++r, at += channels)
    gradient_rows<1, T, RELU, RESIDUAL>(dy + at, x + at, y + RESIDUAL * at, dz + RESIDUAL * at,
                                        channels, scale, shift, mean, sums);
}

// dx = scale dz + slope x + level
template <class T, bool RELU>
void input_gradient(const T* dz, const T* x, T* dx, int64_t n, int64_t channels, const float* scale,
                    const float* shift, const float* slope, const float* level) {
  for (int64_t at = 0; at < n * channels; at += channels) {
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      const float u = value(x[at + i]), d = value(dz[at + i]);
      const float g = !RELU || u * scale[i] + shift[i] > 0.0f ? d : 0.0f;
      store(dx + at + i, scale[i] * g + (slope[i] * u + level[i]));
    }
  }
}

// Both sums of channel i in group g, over its chunks.
std::pair<double, double> totals(const Chunks& chunks, const float* partial, int64_t g, int64_t i) {
  std::pair<double, double> sums;
  for (int64_t k = g * chunks.per_group; k < (g + 1) * chunks.per_group; ++k) {
    sums.first += partial[k * 2 * chunks.channels + i];
    sums.second += partial[(k * 2 + 1) * chunks.channels + i];
  }
  return sums;
}

// Statistics of channel i; the running ones move once, by the mean over groups.
template <class T>
void finish_moments(const Arguments& a, const Chunks& chunks, const float* partial, int64_t i) {
  const int64_t c = a.channels;
  double means = 0, variances = 0;
  for (int64_t g = 0; g < a.groups; ++g) {
    const auto [sum, square] = totals(chunks, partial, g, i);
    const double away = sum / a.rows, var = square / a.rows - away * away;
    const double mean = value(static_cast<const T*>(a.x)[g * a.rows * c + i]) + away;
    a.mean[g * c + i] = static_cast<float>(mean);
    a.invstd[g * c + i] = static_cast<float>(1 / std::sqrt((var < 0 ? 0 : var) + a.eps));
    means += mean / a.groups;
    variances += (var < 0 ? 0 : var) / a.groups;
  }
  const double m = a.momentum, unbiased = variances * a.rows / (a.rows - 1);
  a.running_mean[i] = static_cast<float>((1 - m) * a.running_mean[i] + m * means);
  a.running_var[i] = static_cast<float>((1 - m) * a.running_var[i] + m * unbiased);
}

void finish_gradients(const Arguments& a, const Chunks& chunks, const float* partial,
                      const float* scale, float* slope, float* level, int64_t i) {
  const int64_t c = a.channels;
  double of_weight = 0, of_bias = 0;
  for (int64_t g = 0; g < a.groups; ++g) {
    const auto [sum, product] = totals(chunks, partial, g, i);
    const double invstd = a.invstd[g * c + i], factor = scale[g * c + i];
    const double tilt = -factor * invstd * invstd * product / a.rows;
    slope[g * c + i] = static_cast<float>(tilt);
    level[g * c + i] = static_cast<float>(-factor * sum / a.rows - tilt * a.mean[g * c + i]);
    of_weight += product * invstd;
    of_bias += sum;
  }
  a.grad_weight[i] = static_cast<float>(of_weight);
  a.grad_bias[i] = static_cast<float>(of_bias);
}

template <class T, bool RELU, bool RESIDUAL, bool BACKWARD>
void run(const Arguments& a) {
  const Chunks chunks(a);
  const int64_t c = a.channels, n = a.groups * c;
  const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
  const T* residual = static_cast<const T*>(a.residual);
  T *y = static_cast<T*>(a.y), *dx = static_cast<T*>(a.dx), *dz = static_cast<T*>(a.d_residual);
  std::vector<float> partial(BACKWARD || a.training ? chunks.all * 2 * c : 0), scale(n), shift(n),
      slope(BACKWARD ? n : 0), level(BACKWARD ? n : 0);
#pragma omp parallel num_threads(a.threads)
  {
    if (!BACKWARD && a.training) {
#pragma omp for
      for (int64_t k = 0; k < chunks.all; ++k)
        moments(x + chunks.offset(k), x + chunks.group(k) * a.rows * c, chunks.size(k), c,
                &partial[k * 2 * c]);
#pragma omp for
      for (int64_t i = 0; i < c; ++i) finish_moments<T>(a, chunks, partial.data(), i);
    }
#pragma omp for
    for (int64_t i = 0; i < n; ++i) {
      scale[i] = a.weight[i % c] * a.invstd[i];
      shift[i] = a.bias[i % c] - a.mean[i] * scale[i];
    }
    if (BACKWARD) {
#pragma omp for
      for (int64_t k = 0; k < chunks.all; ++k) {
        const int64_t at = chunks.offset(k), g = chunks.group(k) * c;
        gradient_sums<T, RELU, RESIDUAL>(dy + at, x + at, RESIDUAL ? y + at : nullptr,
                                         RESIDUAL ? dz + at : nullptr, chunks.size(k), c, &scale[g],
                                         &shift[g], a.mean + g, &partial[k * 2 * c]);
      }
#pragma omp for
      for (int64_t i = 0; i < c; ++i)
        finish_gradients(a, chunks, partial.data(), scale.data(), slope.data(), level.data(), i);
    }
#pragma omp for
    for (int64_t k = 0; k < chunks.all; ++k) {
      const int64_t at = chunks.offset(k), g = chunks.group(k) * c;
      if (BACKWARD)
        input_gradient<T, RELU && !RESIDUAL>((RESIDUAL ? dz : dy) + at, x + at, dx + at,
                                             chunks.size(k), c, &scale[g], &shift[g], &slope[g],
                                             &level[g]);
      else
        normalize<T, RELU, RESIDUAL>(x + at, RESIDUAL ? residual + at : nullptr, y + at,
                                     chunks.size(k), c, &scale[g], &shift[g]);
    }
  }
}

template <class T, bool BACKWARD>
void choose(const Arguments& a) {
  if (a.residual) return run<T, true, true, BACKWARD>(a);
  a.relu ? run<T, true, false, BACKWARD>(a) : run<T, false, false, BACKWARD>(a);
}

}  // namespace

extern "C" void batch_norm_forward(const Arguments* a) {
  a->is_bf16 ? choose<bf16, false>(*a) : choose<float, false>(*a);
}

extern "C" void batch_norm_backward(const Arguments* a) {
  a->is_bf16 ? choose<bf16, true>(*a) : choose<float, true>(*a);
}
