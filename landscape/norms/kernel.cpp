// Ghost normalization of batches that are contiguous or channels_last in memory.
//
// A slice, one channel in one group of samples, is normalized by its own mean and biased variance:
//
//     forward:  mean; sum of squared deviations; y = (x - mean) * inv_std * weight + bias
//     backward: sums of dy and of dy * (x - mean); dx
//
// Where channels are innermost in memory, as in (M, C) and channels_last images, neighbouring ones are handled together,
// a value of each in a lane of a vector. Else the lanes are positions of one channel. In both cases the values stay in
// the cache between the passes over them.
//
// Sums are taken in blocks, and blocks are added in double precision: a plain float sum over the 100,000 values of a
// slice has errors of 1e-4. Comparisons are avoided, so that NaN and infinity stay what they are.
//
// It needs no header of torch: landscape/norms/kernel.py hands over the addresses of tensors.

#include <algorithm>
#include <cmath>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
// Compiled for each set of instructions; the loader takes the best one that the processor has.
#define FOR_ALL_PROCESSORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_ALL_PROCESSORS
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int kWidth = 32;        // channels that are handled together
constexpr int kAccumulators = 64; // taken by the rows in turn, so that additions need not wait for each other
constexpr int kBlock = 64;        // rows that are added before the sum is
constexpr int kLanes = 64;        // positions that are handled together

struct Shape {
  int64_t samples, positions, channels, groups;
  bool interleaved, channels_innermost;

  // If the groups are uneven, the first ones have a sample more.
  int64_t size(int64_t group) const { return samples / groups + (group < samples % groups); }
  int64_t first(int64_t group) const {
    return interleaved ? group : group * (samples / groups) + std::min(group, samples % groups);
  }
  // Runs of rows at equal distances: a whole group, or one image of an interleaved group.
  bool has_runs() const { return interleaved && positions > 1; }
  int64_t runs(int64_t group) const { return has_runs() ? size(group) : 1; }
  int64_t run_length(int64_t group) const { return has_runs() ? positions : size(group) * positions; }
  int64_t run_start(int64_t group, int64_t run) const { return (first(group) + run * groups) * positions * channels; }
  int64_t row_step() const { return interleaved && positions == 1 ? groups * channels : channels; }
  double count(int64_t group) const { return double(size(group) * positions); }

  // With positions innermost: where those of a channel begin, in the k-th sample of a group.
  int64_t image(int64_t group, int64_t k, int64_t channel) const {
    return ((first(group) + k * (interleaved ? groups : 1)) * channels + channel) * positions;
  }
};

// Calls body(offset, rows) for blocks of rows of a group.
template <typename Body>
INLINE void for_blocks(const Shape& shape, int64_t group, Body body) {
  const int64_t length = shape.run_length(group);
  for (int64_t run = 0; run < shape.runs(group); ++run) {
    const int64_t start = shape.run_start(group, run);
    for (int64_t row = 0; row < length; row += kBlock) {
      body(start + row * shape.row_step(), std::min<int64_t>(kBlock, length - row));
    }
  }
}

// Adds value(offset of a row, channel) of a group's rows to totals of `W` channels.
template <typename T, int W, typename Value>
INLINE void add_rows(const Shape& shape, int64_t group, double* totals, Value value) {
  constexpr int kRows = std::min(8, kAccumulators / W);
  const int64_t step = shape.row_step();
  std::fill(totals, totals + W, 0.0);
  T sums[kRows][W] = {};
  int64_t added = 0;
  const auto flush = [&] {
    for (int k = 0; k < kRows; ++k) {
      for (int c = 0; c < W; ++c) {
        totals[c] += sums[k][c];
        sums[k][c] = 0;
      }
    }
    added = 0;
  };
  for_blocks(shape, group, [&](int64_t offset, int64_t rows) {
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
      for (int k = 0; k < kRows; ++k) {
        for (int c = 0; c < W; ++c) sums[k][c] += value(offset + (row + k) * step, c);
      }
    }
    for (; row < rows; ++row) {
      for (int c = 0; c < W; ++c) sums[0][c] += value(offset + row * step, c);
    }
    if ((added += rows) >= kBlock) flush();
  });
  flush();
}

// Returns the sum of value(offset) over a slice with positions innermost.
template <typename T, typename Value>
INLINE double add_positions(const Shape& shape, int64_t group, int64_t channel, Value value) {
  double total = 0;
  T sums[kLanes] = {};
  int64_t added = 0;
  const auto flush = [&] {
    for (int width = kLanes / 2; width >= 8; width /= 2) {
      for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
    }
    for (int k = 0; k < 8; ++k) total += sums[k];
    std::fill(sums, sums + kLanes, T(0));
    added = 0;
  };
  for (int64_t sample = 0; sample < shape.size(group); ++sample) {
    const int64_t start = shape.image(group, sample, channel);
    int64_t position = 0;
    for (; position + kLanes <= shape.positions; position += kLanes) {
      for (int k = 0; k < kLanes; ++k) sums[k] += value(start + position + k);
      if (++added >= kBlock) flush();
    }
    const int rest = int(shape.positions - position);
    for (int k = 0; k < rest; ++k) sums[k] += value(start + position + k);
    if (++added >= kBlock) flush();
  }
  flush();
  return total;
}

template <typename T>
struct Forward {
  Shape shape;
  double eps;
  const T *x, *weight, *bias;
  T *y, *mean, *var, *inv_std;

  template <int W>
  INLINE void run(int64_t group, int64_t channel) const {
    const T* in = x + channel;
    T* out = y + channel;
    const int64_t at = group * shape.channels + channel;
    const int64_t step = shape.row_step();
    const double count = shape.count(group), share = 1 / count, unbiased = 1 / (count - 1);
    double totals[W];
    T center[W], scale[W], shift[W];
    add_rows<T, W>(shape, group, totals, [&](int64_t offset, int c) { return in[offset + c]; });
    for (int c = 0; c < W; ++c) mean[at + c] = center[c] = T(totals[c] * share);
    add_rows<T, W>(shape, group, totals, [&](int64_t offset, int c) {
      const T deviation = in[offset + c] - center[c];
      return deviation * deviation;
    });
    for (int c = 0; c < W; ++c) {
      scale[c] = finish(at + c, channel + c, totals[c], share, unbiased);
      shift[c] = bias ? bias[channel + c] : T(0);
    }
    for_blocks(shape, group, [&](int64_t offset, int64_t rows) {
      for (int64_t row = 0; row < rows; ++row, offset += step) {
        for (int c = 0; c < W; ++c) out[offset + c] = (in[offset + c] - center[c]) * scale[c] + shift[c];
      }
    });
  }

  INLINE void run_positions(int64_t group, int64_t channel) const {
    const int64_t at = group * shape.channels + channel;
    const double count = shape.count(group), share = 1 / count;
    const T center = T(add_positions<T>(shape, group, channel, [&](int64_t offset) { return x[offset]; }) * share);
    const double squares = add_positions<T>(shape, group, channel, [&](int64_t offset) {
      const T deviation = x[offset] - center;
      return deviation * deviation;
    });
    mean[at] = center;
    const T scale = finish(at, channel, squares, share, 1 / (count - 1)), shift = bias ? bias[channel] : T(0);
    for (int64_t sample = 0; sample < shape.size(group); ++sample) {
      const T* in = x + shape.image(group, sample, channel);
      T* out = y + shape.image(group, sample, channel);
      for (int64_t k = 0; k < shape.positions; ++k) out[k] = (in[k] - center) * scale + shift;
    }
  }

  // Stores what follows from the squared deviations of a slice, and returns its scale.
  INLINE T finish(int64_t at, int64_t channel, double squares, double share, double unbiased) const {
    const T inverse = 1 / std::sqrt(T(squares * share + eps));
    var[at] = T(squares * unbiased);
    inv_std[at] = inverse;
    return weight ? inverse * weight[channel] : inverse;
  }
};

template <typename T>
struct Backward {
  Shape shape;
  const T *dy, *x, *weight, *mean, *inv_std;
  T *dx, *dweight, *dbias;  // the last two (groups, channels), of slices

  template <int W>
  INLINE void run(int64_t group, int64_t channel) const {
    const T *in = x + channel, *above = dy + channel;
    T* out = dx + channel;
    const int64_t at = group * shape.channels + channel;
    const int64_t step = shape.row_step();
    const T share = T(1 / shape.count(group));
    double totals[W], products[W];
    T center[W], scale[W], slope[W], shift[W];
    std::copy(mean + at, mean + at + W, center);
    add_rows<T, W>(shape, group, totals, [&](int64_t offset, int c) { return above[offset + c]; });
    add_rows<T, W>(shape, group, products, [&](int64_t offset, int c) {
      return above[offset + c] * (in[offset + c] - center[c]);
    });
    for (int c = 0; c < W; ++c) finish(at + c, channel + c, totals[c], products[c], share, scale[c], slope[c], shift[c]);
    for_blocks(shape, group, [&](int64_t offset, int64_t rows) {
      for (int64_t row = 0; row < rows; ++row, offset += step) {
        for (int c = 0; c < W; ++c) {
          out[offset + c] = above[offset + c] * scale[c] + (in[offset + c] - center[c]) * slope[c] + shift[c];
        }
      }
    });
  }

  INLINE void run_positions(int64_t group, int64_t channel) const {
    const int64_t at = group * shape.channels + channel;
    const T center = mean[at];
    const double total = add_positions<T>(shape, group, channel, [&](int64_t offset) { return dy[offset]; });
    const double product = add_positions<T>(shape, group, channel, [&](int64_t offset) {
      return dy[offset] * (x[offset] - center);
    });
    T scale, slope, shift;
    finish(at, channel, total, product, T(1 / shape.count(group)), scale, slope, shift);
    for (int64_t sample = 0; sample < shape.size(group); ++sample) {
      const int64_t start = shape.image(group, sample, channel);
      const T *in = x + start, *above = dy + start;
      T* out = dx + start;
      for (int64_t k = 0; k < shape.positions; ++k) out[k] = above[k] * scale + (in[k] - center) * slope + shift;
    }
  }

  // Stores the gradients of a slice, and sets dx = dy * scale + (x - mean) * slope + shift.
  INLINE void finish(int64_t at, int64_t channel, double total, double product, T share, T& scale, T& slope,
                     T& shift) const {
    const T inverse = inv_std[at];
    scale = weight ? inverse * weight[channel] : inverse;
    dweight[at] = T(product) * inverse;
    dbias[at] = T(total);
    slope = -scale * inverse * share * dweight[at];
    shift = -scale * share * dbias[at];
  }
};

// Handles kWidth channels from `channel` on, the last ones of a row in smaller parts.
template <typename Task>
INLINE void run_channels(const Task& task, int64_t group, int64_t channel) {
  int64_t left = std::min<int64_t>(kWidth, task.shape.channels - channel);
  if (!task.shape.channels_innermost) {
    for (; left > 0; --left, ++channel) task.run_positions(group, channel);
    return;
  }
  if (left == kWidth) return task.template run<kWidth>(group, channel);
  for (; left >= 16; left -= 16, channel += 16) task.template run<16>(group, channel);
  for (; left >= 8; left -= 8, channel += 8) task.template run<8>(group, channel);
  for (; left >= 4; left -= 4, channel += 4) task.template run<4>(group, channel);
  for (; left > 0; --left, ++channel) task.template run<1>(group, channel);
}

template <typename Task>
INLINE void run_range(const Task& task, int64_t begin, int64_t end) {
  const int64_t parts = (task.shape.channels + kWidth - 1) / kWidth;
  for (int64_t k = begin; k < end; ++k) run_channels(task, k / parts, k % parts * kWidth);
}

// Not templates, of which there would be no versions for processors.
FOR_ALL_PROCESSORS void run(const Forward<float>& task, int64_t begin, int64_t end) { run_range(task, begin, end); }
FOR_ALL_PROCESSORS void run(const Forward<double>& task, int64_t begin, int64_t end) { run_range(task, begin, end); }
FOR_ALL_PROCESSORS void run(const Backward<float>& task, int64_t begin, int64_t end) { run_range(task, begin, end); }
FOR_ALL_PROCESSORS void run(const Backward<double>& task, int64_t begin, int64_t end) { run_range(task, begin, end); }

template <typename Task>
void run_in_threads(const Task& task, int threads) {
  const int64_t tasks = task.shape.groups * ((task.shape.channels + kWidth - 1) / kWidth);
  const int64_t used = std::min<int64_t>(threads, tasks);
#pragma omp parallel for num_threads(used) if (used > 1) schedule(static, 1)
  for (int64_t k = 0; k < used; ++k) run(task, tasks * k / used, tasks * (k + 1) / used);
}

// Adds share * row to out.
template <typename T>
INLINE void add_scaled(T* out, const T* row, T share, int64_t channels) {
  for (int64_t channel = 0; channel < channels; ++channel) out[channel] += share * row[channel];
}

FOR_ALL_PROCESSORS void add(float* out, const float* row, float share, int64_t n) { add_scaled(out, row, share, n); }
FOR_ALL_PROCESSORS void add(double* out, const double* row, double share, int64_t n) { add_scaled(out, row, share, n); }

template <typename T>
void add_to_first_row(T* slices, int64_t groups, int64_t channels) {
  for (int64_t group = 1; group < groups; ++group) add(slices, slices + group * channels, T(1), channels);
}

template <typename T>
void move_to_mean(T* running, const T* slices, int64_t groups, int64_t channels, T momentum) {
  for (int64_t channel = 0; channel < channels; ++channel) running[channel] *= 1 - momentum;
  for (int64_t group = 0; group < groups; ++group) {
    add(running, slices + group * channels, momentum / T(groups), channels);
  }
}

}  // namespace

#define EXPORT_FUNCTIONS(T, NAME)                                                                                        \
  extern "C" void NAME##_forward(const T* x, const T* weight, const T* bias, T* y, T* mean, T* var, T* inv_std,          \
                                 int64_t samples, int64_t positions, int64_t channels, int64_t groups, int interleaved, \
                                 int channels_innermost, int threads, double eps) {                                      \
    const Shape shape{samples, positions, channels, groups, interleaved != 0, channels_innermost != 0};                  \
    run_in_threads(Forward<T>{shape, eps, x, weight, bias, y, mean, var, inv_std}, threads);                             \
  }                                                                                                                      \
  extern "C" void NAME##_backward(const T* dy, const T* x, const T* weight, const T* mean, const T* inv_std, T* dx,      \
                                  T* dweight, T* dbias, int64_t samples, int64_t positions, int64_t channels,            \
                                  int64_t groups, int interleaved, int channels_innermost, int threads) {                \
    const Shape shape{samples, positions, channels, groups, interleaved != 0, channels_innermost != 0};                  \
    run_in_threads(Backward<T>{shape, dy, x, weight, mean, inv_std, dx, dweight, dbias}, threads);                       \
    add_to_first_row(dweight, groups, channels);                                                                         \
    add_to_first_row(dbias, groups, channels);                                                                           \
  }                                                                                                                      \
  extern "C" void NAME##_update(T* running_mean, T* running_var, const T* mean, const T* var, int64_t groups,            \
                                int64_t channels, double momentum) {                                                     \
    move_to_mean(running_mean, mean, groups, channels, T(momentum));                                                     \
    move_to_mean(running_var, var, groups, channels, T(momentum));                                                       \
  }

EXPORT_FUNCTIONS(float, float32)
EXPORT_FUNCTIONS(double, float64)
