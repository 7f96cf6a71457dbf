// The list of rows that `IntegerRows::sum` reads four at a time.
#pragma once

#include <cstdint>

#include "integer_rows.h"

namespace sparsegate {

// Memory of a Quads over rows out of a range of `size` that starts at a multiple of 32.
struct QuadSpace {
  int32_t* rows;      // [size + 32]
  int32_t* segments;  // [size / 32 + 2]
  int32_t* filled;    // [size / 32 + 2]
};

constexpr int64_t quad_rows(int64_t size) { return (size + kRounded - 1) / kRounded * kRounded; }
constexpr int64_t quad_segments(int64_t size) { return (size + kRounded - 1) / kRounded + 1; }

// Fills `space` from `count` rising rows, which lie at `places` of the matrix.
inline Quads make_quads(const int32_t* rows, const int32_t* places, int64_t count, const QuadSpace& space) {
  int64_t segments = 0, quads = 0;
  for (int64_t k = 0; k < count;) {
    const int64_t begin = k, group = rows[k] / kRounded;
    space.segments[segments] = static_cast<int32_t>(quads);
    space.filled[segments++] = static_cast<int32_t>(begin);
    for (; k < count && rows[k] / kRounded == group; ++k) space.rows[quads * 4 + (k - begin)] = places[k];
    const int64_t end = (k - begin + 3) / 4 * 4;
    for (int64_t i = k - begin; i < end; ++i) space.rows[quads * 4 + i] = places[k - 1];
    quads += end / 4;
  }
  space.segments[segments] = static_cast<int32_t>(quads);
  space.filled[segments] = static_cast<int32_t>(count);
  return {space.rows, space.segments, space.filled, segments};
}

}  // namespace sparsegate
