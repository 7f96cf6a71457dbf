// From numbers known at run time to template parameters: tokens of a tile, types of elements. Included by files that
// are compiled once per instruction set; everything has internal linkage. All is inlined, bodies too (they say so): so
// the compiler sees the constants of a call before it decides on clones.
#pragma once

#include "ort_abi.h"
#include "vectors.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

// Cuts tokens into this many tiles, as even as can be (8 in two are 4 and 4, not 6 and 2): body(first token, tokens)
template <class Int, class Body>
__attribute__((always_inline)) inline void each_tile(Int tokens, Int tiles, const Body& body) {
  for (Int first = 0; tiles > 0; --tiles) {
    const Int size = (tokens - first + tiles - 1) / tiles;
    body(first, size);
    first += size;
  }
}

template <class Int>
inline Int tile_count(Int tokens, Int most) {
  return (tokens + most - 1) / most;
}

template <int T>
struct Size {
  static constexpr int value = T;
};

// body(Size<size>) for 1 <= size <= MOST
template <int MOST, class Body>
__attribute__((always_inline)) inline void with_size(int64_t size, const Body& body) {
  static_assert(MOST <= 8, "one case per size");
  switch (size) {
#define SPARSEGATE_SIZE(n)                           \
  case n:                                            \
    if constexpr (n <= MOST) return body(Size<n>{}); \
    break;
    SPARSEGATE_SIZE(1)
    SPARSEGATE_SIZE(2)
    SPARSEGATE_SIZE(3)
    SPARSEGATE_SIZE(4)
    SPARSEGATE_SIZE(5)
    SPARSEGATE_SIZE(6)
    SPARSEGATE_SIZE(7)
    SPARSEGATE_SIZE(8)
#undef SPARSEGATE_SIZE
    default:
      break;
  }
}

// body(weights) with a pointer to the elements that an ort::Type of float weights means, with INT8 also to int8
template <bool INT8, class Body>
__attribute__((always_inline)) inline void with_type(int type, const void* weights, const Body& body) {
  switch (type) {
    case ort::kFloat32:
      return body(static_cast<const float*>(weights));
    case ort::kFloat16:
      return body(static_cast<const half*>(weights));
    case ort::kBfloat16:
      return body(static_cast<const bfloat*>(weights));
    case ort::kInt8:
      if constexpr (INT8) return body(static_cast<const int8_t*>(weights));
      break;
    default:
      break;
  }
}

}  // namespace
}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
