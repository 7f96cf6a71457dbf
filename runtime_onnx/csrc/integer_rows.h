// Inner loops of the ops on the CPU where weights are integers: products with and sums of a matrix's rows, in int8
// arithmetic.
//
// Rows are int8 (one float32 scale per row) or int4_g32 (two values per byte, low nibble first, value q - 8, one
// float16 scale per 32 columns). Activations are rounded to int8 in groups of 32 with one float32 scale each
// (ops/quantisation.py is the same arithmetic in numpy): 32 channels of a product's input, 32 consecutive rows of a sum
// of rows. Integer sums are exact, and floats are added in one fixed order, so a token's result depends neither on the
// tokens beside it nor on the build: all builds agree up to the fusing of multiply and add.
#pragma once

#include <cstdint>

#include "isa.h"

namespace sparsegate {

constexpr int64_t kRounded = 32;    // activations per scale
constexpr int64_t kChunkInt8 = 64;  // columns that lie in one chunk of a rounded row, or of a sum
constexpr int64_t kChunkInt4 = 128;

// Bytes of a rounded row: per chunk 64 bytes of integers (int4: twice), then for each of 16 lanes the correction of the
// weights' offset (int32) and the scale (float).
constexpr int64_t rounded_bytes(bool int4, int64_t width) {
  return int4 ? (width + kChunkInt4 - 1) / kChunkInt4 * 256 : (width + kChunkInt8 - 1) / kChunkInt8 * 192;
}

// Columns of a sum of rows with its last chunk full. Inside a chunk the sums lie in the order of `column_of_sum`.
constexpr int64_t padded_columns(bool int4, int64_t width) {
  const int64_t chunk = int4 ? kChunkInt4 : kChunkInt8;
  return (width + chunk - 1) / chunk * chunk;
}

// The rows that some of the tokens keep, four by four: all rows of a segment share index / 32, each segment starts a
// new quad, missing rows repeat the last.
struct Quads {
  const int32_t* rows;      // [quads * 4]
  const int32_t* segments;  // [count + 1]: the first quad of each segment
  const int32_t* filled;    // [count + 1]: the first row of each segment in a list without repeats
  int64_t count;            // segments
};

struct IntegerRows {
  // x [width] -> out [rounded_bytes], for products with rows of this type
  void (*round)(bool int4, const float* x, int64_t width, void* out);

  // out[t * stride + k] = row(k) . x[t] without the row's scale (int8), with the groups' scales (int4); rows, then: as
  // in Kernels::dots. `rounded` is [tokens, rounded_bytes(width)]; scales is [rows, width / 32] float16 (int4), unused
  // otherwise.
  void (*dots)(bool int4, const void* weights, const uint16_t* scales, const int32_t* rows, int64_t count,
               int64_t width, const void* rounded, int64_t tokens, float* out, int64_t stride, const void* then);

  // The same bits for the tokens that keep a row, as Kernels::dots_kept
  void (*dots_kept)(bool int4, const void* weights, const uint16_t* scales, const int32_t* rows, int64_t count,
                    int64_t width, const void* rounded, int64_t tokens, const uint16_t* masks, float* out,
                    int64_t stride);

  // Factors z [rows without repeats] of one token, 0 where it does not keep the row, for `sum`: q [quads * groups]
  // holds four int8 each, step and offset [segments * groups]. int8: groups = 1 and z holds the rows' scales. int4: the
  // column groups from `group` on, of `width` / 32 in a row of scales; those past the end are 0.
  void (*factors)(bool int4, const Quads& quads, const float* z, const uint16_t* scales, int64_t width, int64_t group,
                  int64_t groups, int32_t* q, float* step, int32_t* offset);

  // y[t * y_stride + c] += sum over the segments of step * (sum of q * row), segment by segment, for the columns
  // [first, first + columns) of rows of `width` columns; first is a multiple of the chunk.
  // y is [tokens, padded_columns(columns)], int4 has groups = padded_columns(columns) / 32.
  // q, step and offset of token t start at t * q_stride and t * s_stride.
  // `panel` is sum_panel_bytes(int4, quads) of scratch, or nullptr for few tokens.
  void (*sum)(bool int4, const void* weights, int64_t width, const Quads& quads, int64_t first, int64_t columns,
              const int32_t* q, int64_t q_stride, const float* step, const int32_t* offset, int64_t s_stride,
              int64_t tokens, float* y, int64_t y_stride, void* panel);

  // out[c] += sums[place of column c] for c < columns
  void (*unfold)(bool int4, const float* sums, int64_t columns, float* out);

  // Most tokens that `sum` takes at a time, which share the work on their rows
  int sum_tokens;

  // As in Kernels
  float most_kept;
};

constexpr int64_t sum_panel_bytes(int64_t quads) { return quads * 256; }

const IntegerRows& integer_rows(Isa isa);

}  // namespace sparsegate
