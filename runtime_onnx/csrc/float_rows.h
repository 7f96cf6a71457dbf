// What the files of float rows share: see row_kernels.h for the functions. Included by files that are compiled once per
// instruction set.
#pragma once

#include "row_kernels.h"
#include "vectors.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {

// float_dots.cc
void dots(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
          int64_t x_stride, int64_t tokens, float* out, int64_t stride, const void* then);
// float_kept.cc
void dots_kept(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
               int64_t x_stride, int64_t tokens, const uint16_t* masks, float* out, int64_t stride, const void* then);
void multiply_kept(int type, const void* weights, const int32_t* rows, int64_t count, const int32_t* then,
                   int64_t then_count, int64_t d, int64_t first, int64_t width, const OwnRows& own, int64_t tokens,
                   float* y, int64_t y_stride, float* scratch);
// float_panels.cc
void multiply(int type, const void* weights, const int32_t* rows, int64_t count, const int32_t* then,
              int64_t then_count, int64_t d, int64_t first, int64_t width, const float* z, int64_t z_stride,
              int64_t tokens, float* y, int64_t y_stride, float* scratch);

namespace {

// A cut [begin, begin + whole + left) of d columns, `left` < LANES of which are behind the last whole vector.
struct Cut {
  int64_t begin, whole, left;
  bool first, last;
};

// Columns of a cut where d is cut evenly, as a short cut costs as much as a long one
inline int64_t cut_depth(int64_t d, int64_t most) {
  const int64_t cuts = (d + most - 1) / most;
  return (d + cuts * 2 * LANES - 1) / (cuts * 2 * LANES) * (2 * LANES);
}

inline Cut cut_at(int64_t begin, int64_t depth, int64_t d) {
  const int64_t length = d - begin < depth ? d - begin : depth;
  return {begin, length / LANES * LANES, length % LANES, begin == 0, begin + depth >= d};
}

}  // namespace
}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
