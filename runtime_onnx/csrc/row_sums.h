// Sums of a matrix's rows for many tokens, y[t] += sum over the rows that t keeps of z[t, i] row(i): the end of
// GatedMLP, and all of SparseLinear.
//
// The rows are cut into blocks. First, block by block, the union of the rows that the tokens keep and each token's
// factors are handed over; then strips of columns are summed independently. A column takes one sum per block, in rising
// order; within a block rows are added in rising order (float weights: one by one; integers: segment by segment). The
// result depends neither on the other tokens nor on the strips.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "integer_rows.h"
#include "memory.h"
#include "op.h"
#include "quads.h"
#include "row_kernels.h"

namespace sparsegate {

// The rows whose factor is not 0, with their factors; returns their number. list and scale hold count + 1.
inline int64_t own_rows(const int32_t* rows, const float* z, int64_t count, int32_t* list, float* scale) {
  int64_t kept = 0;
  for (int64_t k = 0; k < count; ++k) {
    list[kept] = rows[k];
    scale[kept] = z[k];
    kept += z[k] != 0.f;
  }
  return kept;
}

inline void add(float* y, const float* v, int64_t count) {
  for (int64_t c = 0; c < count; ++c) y[c] += v[c];
}

inline void start(float* y, const float* bias, int64_t first, int64_t count) {
  if (bias)
    std::memcpy(y, bias + first, static_cast<size_t>(count) * sizeof(float));
  else
    std::memset(y, 0, static_cast<size_t>(count) * sizeof(float));
}

struct RowSums {
  const Kernels* kernels;
  const IntegerRows* integers;
  Weights format;
  int type;             // of float rows
  const void* weights;  // [n, d]
  const void* scales;   // int4: float16 [n, d / 32]; int8: the factors hold the rows' scales
  int64_t n, d;
  int64_t block, blocks;  // rows per block, at most 512 and a multiple of 32
  int64_t pass;           // most tokens
  bool shared;            // many tokens: rows are copied together for all of them before they are summed

  int32_t *rows = nullptr, *counts = nullptr, *segments = nullptr;  // [n]; [blocks]
  QuadSpace quads{};
  float* z = nullptr;  // [blocks, pass, block]: the factors of all rows, or of a token's own ones (int8: not used)
  uint16_t* entries = nullptr;    // [blocks, pass, block]: the own rows' numbers in `rows`
  int32_t* own_counts = nullptr;  // [blocks, pass]: how many a token has; the first is -1 where z has all rows
  int32_t *q = nullptr, *offset = nullptr;
  float* step = nullptr;

  // Takes the memory of a call out of `cut`.
  void lay(Cut& cut);

  // The union `own` [count] of a block's rows, rising, where they lie in the matrix (`places`), and the factors z
  // [tokens, count], 0 where a token does not keep a row. Blocks may come at once, on threads.
  void take(int64_t index, const int32_t* own, const int32_t* places, const float* factors, int64_t count,
            int64_t tokens);

  // y[t * y_stride + c] += the sums for the columns [first, first + width) of all tokens; `first` is a multiple of 128.
  // `bias`: what y starts from, nullptr for zeros. Uses task_arena; false: out of memory.
  bool sum(int64_t first, int64_t width, int64_t tokens, const float* bias, float* y, int64_t y_stride) const;

  // Columns for one call of `sum` with many tokens: narrow rows are cut finer, so that threads get even shares
  int64_t strip() const { return (format == Weights::kInt4G32 ? 512 : 256) / (d <= 1024 ? 2 : 1); }

 private:
  OwnRows own_rows_of(int64_t b) const {
    return {entries + b * pass * block, z + b * pass * block, own_counts + b * pass, block};
  }
  // The block's own rows, where they are few enough; false: nothing is taken.
  bool take_own(int64_t index, const float* factors, int64_t count, int64_t tokens);
  int64_t segment_stride() const { return blocks * quad_segments(block); }
  bool sum_float(int64_t first, int64_t width, int64_t tokens, const float* bias, float* y, int64_t y_stride) const;
  bool sum_integer(int64_t first, int64_t width, int64_t tokens, float* y, int64_t y_stride) const;
};

}  // namespace sparsegate
