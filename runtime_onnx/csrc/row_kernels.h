// Inner loops of the ops on the CPU: products with and sums of a matrix's rows. Their source, float_rows.cc, is
// compiled once per instruction set.
//
// What holds for every function, so that a token's result depends neither on the tokens beside it nor on the number of
// threads: a dot product runs over d in one fixed order, a sum of rows adds them one by one in rising order, column by
// column.
#pragma once

#include <cstdint>

#include "isa.h"

namespace sparsegate {

constexpr int64_t kPanel = 64;  // columns that `accumulate` keeps in registers: for many tokens that share rows

constexpr int kMaskTokens = 8;  // of one mask in `dots_kept`

constexpr int64_t kMultiplyRows = 512;
constexpr int64_t kMultiplyWidth = 256;  // columns

// The distance of rows of `width` floats that `dots` reads at its best
constexpr int64_t padded_stride(int64_t width) { return (width + 15) / 16 * 16 + 16; }

// Which of some rows each token keeps, rising, and what they are multiplied with: token t has counts[t] of them, from t
// * stride on.
struct OwnRows {
  const uint16_t* entries;  // number of the row
  const float* scales;
  const int32_t* counts;
  int64_t stride;
};

struct Kernels {
  // out[t * stride + k] = row(k) . x[t] for k < count, t < tokens; row k starts at weights + (rows ? rows[k] : k) * d.
  // x is [tokens, d], its rows x_stride apart: if that is a power of two, as d often is, they share a few sets of the
  // first-level cache; padded_stride avoids it. `then`, if any, is the matrix whose same rows are read next: they are
  // prefetched at the end.
  void (*dots)(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
               int64_t x_stride, int64_t tokens, float* out, int64_t stride, const void* then);
  // The same bits for the tokens t that keep row k: bit t % kMaskTokens of masks[t / kMaskTokens * count + k]. The
  // other places of `out` stay as they are. int8 rows have theirs in integer_rows.h.
  void (*dots_kept)(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
                    int64_t x_stride, int64_t tokens, const uint16_t* masks, float* out, int64_t stride,
                    const void* then);
  // y[c] += sum_k scale[k] * weights[rows[k] * d + first + c] for c < width, k = 0, 1, ... in this order
  void (*accumulate)(int type, const void* weights, const int32_t* rows, const float* scale, int64_t count, int64_t d,
                     int64_t first, int64_t width, float* y);
  // y[t * y_stride + c] += sum_k z[t * z_stride + k] * weights[rows[k] * d + first + c] for c < width, t < tokens: each
  // sum starts at zero, takes k = 0, 1, ... in this order and is added to y once. A row that a token does not keep has
  // z = 0 (but 0 * inf is NaN). count <= kMultiplyRows, width <= kMultiplyWidth; scratch holds count * kMultiplyWidth
  // floats. `then` [then_count], if any, are the rows of the next call with the same columns: they are fetched
  // meanwhile.
  void (*multiply)(int type, const void* weights, const int32_t* rows, int64_t count, const int32_t* then,
                   int64_t then_count, int64_t d, int64_t first, int64_t width, const float* z, int64_t z_stride,
                   int64_t tokens, float* y, int64_t y_stride, float* scratch);
  // The same with each token's own rows alone, which need not be finite for the others. scratch holds count * kPanel
  // floats.
  void (*multiply_kept)(int type, const void* weights, const int32_t* rows, int64_t count, const int32_t* then,
                        int64_t then_count, int64_t d, int64_t first, int64_t width, const OwnRows& own, int64_t tokens,
                        float* y, int64_t y_stride, float* scratch);
  // float32 of count values of a float type or int8
  void (*widen)(int type, const void* values, int64_t count, float* out);
  // Of the products that all tokens have with some rows, the share up to which leaving the others out is faster:
  // measured where d is 576.
  float most_kept;
};

const Kernels& kernels(Isa isa);

// count values of float32 rounded to a 16-bit float type, to the nearest, ties to even
void narrow(int type, const float* values, int64_t count, uint16_t* out);

}  // namespace sparsegate
