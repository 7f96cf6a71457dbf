// Rows of float types (and int8 widened to float32): see row_kernels.h. Compiled once per instruction set: see
// vectors.h.
#include "row_kernels.h"

#include <string.h>

#include "ort_abi.h"
#include "vectors.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {

// float_dots.cc, float_kept.cc and float_panels.cc
void dots(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
          int64_t x_stride, int64_t tokens, float* out, int64_t stride, const void* then);
void dots_kept(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
               int64_t x_stride, int64_t tokens, const uint16_t* masks, float* out, int64_t stride, const void* then);
void multiply(int type, const void* weights, const int32_t* rows, int64_t count, const int32_t* then,
              int64_t then_count, int64_t d, int64_t first, int64_t width, const float* z, int64_t z_stride,
              int64_t tokens, float* y, int64_t y_stride, float* scratch);
void multiply_kept(int type, const void* weights, const int32_t* rows, int64_t count, const int32_t* then,
                   int64_t then_count, int64_t d, int64_t first, int64_t width, const OwnRows& own, int64_t tokens,
                   float* y, int64_t y_stride, float* scratch);

namespace {

constexpr int ADDED = 8;  // summed rows per pass over y

// R rows into y, one after the other in every column.
template <class W, int R>
inline void add_rows(const W* const* row, const W* const* next, const float* scale, int64_t width, float* y) {
  constexpr int STEP = LINE / static_cast<int>(sizeof(W));
  reg s[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) s[r] = scale[r] - reg{};
  int64_t c = 0;
  for (; c + STEP <= width; c += STEP) {
    if (next)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + c, 0, 2);
#pragma GCC unroll 4
    for (int k = 0; k < STEP; k += LANES) {
      vec sum = load(y + c + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum = fma(s[r], load(row[r] + c + k), sum);
      store(y + c + k, sum);
    }
  }
  for (; c < width; c += LANES) {
    const int64_t left = width - c;
    vec sum = left < LANES ? load_tail(y + c, left) : load(y + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum = fma(s[r], left < LANES ? load_tail(row[r] + c, left) : load(row[r] + c), sum);
    memcpy(y + c, &sum, static_cast<size_t>(left < LANES ? left : LANES) * sizeof(float));
  }
}

// The same for a panel of kPanel columns whose rows lie in the caches: y stays in registers.
template <class W>
void accumulate_panel(const W* weights, const int32_t* rows, const float* scale, int64_t count, int64_t d, float* y) {
  constexpr int VECTORS = static_cast<int>(kPanel) / LANES;
  vec sum[VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) sum[v] = load(y + v * LANES);
  for (int64_t k = 0; k < count; ++k) {
    const W* row = weights + rows[k] * d;
    const reg s = scale[k] - reg{};
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[v] = fma(s, load(row + v * LANES), sum[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) store(y + v * LANES, sum[v]);
}

template <class W>
void accumulate_of(const W* weights, const int32_t* rows, const float* scale, int64_t count, int64_t d, float* y,
                   int64_t width) {
  if (width == kPanel) return accumulate_panel(weights, rows, scale, count, d, y);
  const W *row[ADDED], *next[ADDED];
  int64_t k = 0;
  for (; k + ADDED <= count; k += ADDED) {
    for (int r = 0; r < ADDED; ++r) {
      row[r] = weights + rows[k + r] * d;
      next[r] = weights + rows[k + ADDED + r < count ? k + ADDED + r : count - 1] * d;
    }
    add_rows<W, ADDED>(row, k + ADDED < count ? next : nullptr, scale + k, width, y);
  }
  for (; k < count; k += 1) {
    row[0] = weights + rows[k] * d;
    add_rows<W, 1>(row, nullptr, scale + k, width, y);
  }
}

void accumulate(int type, const void* weights, const int32_t* rows, const float* scale, int64_t count, int64_t d,
                int64_t first, int64_t width, float* y) {
  switch (type) {
#define SPARSEGATE_TYPE(id, W) \
  case id:                     \
    return accumulate_of(static_cast<const W*>(weights) + first, rows, scale, count, d, y, width);
    SPARSEGATE_TYPE(ort::kFloat32, float)
    SPARSEGATE_TYPE(ort::kFloat16, half)
    SPARSEGATE_TYPE(ort::kBfloat16, bfloat)
    SPARSEGATE_TYPE(ort::kInt8, int8_t)
#undef SPARSEGATE_TYPE
    default:
      break;
  }
}

template <class W>
void widen_of(const W* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t left = count - i;
    const vec wide = left < LANES ? load_tail(values + i, left) : load(values + i);
    memcpy(out + i, &wide, static_cast<size_t>(left < LANES ? left : LANES) * sizeof(float));
  }
}

void widen(int type, const void* values, int64_t count, float* out) {
  switch (type) {
    case ort::kFloat16:
      return widen_of(static_cast<const half*>(values), count, out);
    case ort::kBfloat16:
      return widen_of(static_cast<const bfloat*>(values), count, out);
    case ort::kInt8:
      return widen_of(static_cast<const int8_t*>(values), count, out);
    default:
      memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
  }
}

}  // namespace

extern const Kernels float_rows;
const Kernels float_rows = {
    dots, dots_kept, accumulate, multiply, multiply_kept, widen, REGISTERS == 32 ? 0.6f : 0.75f};

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
