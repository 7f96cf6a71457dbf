// In which order a block's rows are multiplied with the tokens of a group that keep them, and where the products go.
// Included by files that are
// compiled once per instruction set.
#pragma once

#include <cstdint>

#include "row_kernels.h"
#include "vectors.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

constexpr int64_t kOrderRows = 64;  // of a block, at most

// The rows of a block that some token of a group keeps, and those tokens.
struct Order {
  uint8_t rows[kOrderRows], sizes[kOrderRows], tokens[kOrderRows][kMaskTokens];
  int count;
};

// Rows as they come (`as_listed`), or by falling numbers of their tokens
void sort(const uint16_t* masks, int64_t size, bool as_listed, Order& order) {
  uint8_t number[kMaskTokens + 1] = {}, sizes[kOrderRows];
  for (int64_t k = 0; k < size; ++k) ++number[sizes[k] = static_cast<uint8_t>(__builtin_popcount(masks[k]))];
  if (as_listed) {  // as if all numbers were one
    for (int n = 2; n <= kMaskTokens; ++n) number[1] = static_cast<uint8_t>(number[1] + number[n]), number[n] = 0;
  }
  uint8_t place[kMaskTokens + 1], next = 0;
  for (int n = kMaskTokens; n > 0; --n) {
    place[n] = next;
    next = static_cast<uint8_t>(next + number[n]);
  }
  order.count = next;
  for (int64_t k = 0; k < size; ++k) {
    if (!sizes[k]) continue;
    const int at = place[as_listed ? 1 : sizes[k]]++;
    order.rows[at] = static_cast<uint8_t>(k);
    order.sizes[at] = sizes[k];
    int n = 0;
    for (unsigned mask = masks[k]; mask; mask &= mask - 1)
      order.tokens[at][n++] = static_cast<uint8_t>(__builtin_ctz(mask));
  }
}

// *out[t] = the sum of the lanes of lanes(t) for T tokens
template <int T, class Lanes>
__attribute__((always_inline)) inline void store_sums(const Lanes& lanes, float* const* out) {
#pragma GCC unroll 2
  for (int t = 0; t < T; t += 4) {
    const auto at = [&](int i) __attribute__((always_inline)) { return lanes(t + i < T ? t + i : t); };
    alignas(16) float four_sums[4];
    const four y = sums(at(0), at(1), at(2), at(3));
    memcpy(four_sums, &y, sizeof y);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if (t + i < T) *out[t + i] = four_sums[i];
  }
}

}  // namespace
}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
