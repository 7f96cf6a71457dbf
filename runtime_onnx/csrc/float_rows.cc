// Rows of float types (and int8 widened to float32): see row_kernels.h. Compiled once per instruction set: see
// vectors.h.
#include "float_rows.h"

#include <string.h>

#include "dispatch.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
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
  with_type<true>(type, weights, [&](const auto* w) __attribute__((always_inline)) {
    accumulate_of(w + first, rows, scale, count, d, y, width);
  });
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
  if (type == ort::kFloat32) {
    memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  with_type<true>(type, values, [&](const auto* v) __attribute__((always_inline)) { widen_of(v, count, out); });
}

}  // namespace

extern const Kernels float_rows;
const Kernels float_rows = {
    dots, dots_kept, accumulate, multiply, multiply_kept, widen, REGISTERS == 32 ? 0.6f : 0.75f};

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
