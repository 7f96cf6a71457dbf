// Products of integer rows with the tokens that keep them: see `dots_kept` in integer_rows.h. Compiled once per
// instruction set, as vectors.h says.
#include "integer_rows.h"

#include "dispatch.h"
#include "integers.h"
#include "integers_avx2.h"
#include "kept_order.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {

void integer_dots_kept(bool int4, const void* weights, const uint16_t* scales, const int32_t* rows, int64_t count,
                       int64_t width, const void* rounded, int64_t tokens, const uint16_t* masks, float* out,
                       int64_t stride);

namespace {

#ifdef SPARSEGATE_INTEGERS_AVX2
constexpr int TILE = TILE_AVX2;
#else
constexpr int TILE = WIDTH == 16 ? 8 : 2;  // tokens
#endif
constexpr int64_t NEAR_BYTES = 20 << 10;  // of a group's rounded rows: they stay in the first-level cache
constexpr int64_t AHEAD = 8;              // rows that are fetched ahead

// One row times T tokens
template <int T, bool INT4>
void dot_row(const char* row, const half* scales, int64_t width, const char* const* x, float* const* out) {
  vec total[T][1];
#ifdef SPARSEGATE_INTEGERS_AVX2
  __m256 sum[2][T];
  dot_row_avx2<T, INT4>(row, scales, width, Listed{x}, sum);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t][0] = {{sum[0][t], sum[1][t]}};
#else
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t][0] = vec{};
  add_products<T, 1, INT4>(&row, nullptr, &scales, width, Listed{x}, total);
#endif
  store_sums<T>([&](int t) __attribute__((always_inline)) { return total[t][0]; }, out);
}

template <bool INT4>
void dots_of(const char* weights, const half* scales, const int32_t* rows, int64_t count, int64_t width, const char* x,
             int64_t tokens, const uint16_t* masks, float* out, int64_t stride) {
  const int64_t bytes_per_row = INT4 ? width / 2 : width, groups = width / kRounded;
  const int64_t x_stride = rounded_bytes(INT4, width);
  const auto place = [&](int64_t k) { return rows ? rows[k] : k; };
  int part = kMaskTokens;  // tokens of a mask at a time
  while (part > 2 && part * x_stride > NEAR_BYTES) part /= 2;
  Order order;
  for (int64_t first = 0; first < count; first += kOrderRows) {
    const int64_t size = count - first < kOrderRows ? count - first : kOrderRows;
    for (int64_t t0 = 0; t0 < tokens; t0 += part) {
      uint16_t own[kOrderRows];
      const uint16_t* mine = masks + t0 / kMaskTokens * count + first;
      for (int64_t k = 0; k < size; ++k)
        own[k] = static_cast<uint16_t>(mine[k] >> t0 % kMaskTokens & ((1 << part) - 1));
      sort(own, size, t0 == 0, order);
      for (int i = 0; i < order.count; ++i) {
        const int64_t k = first + order.rows[i], mine_at = place(k);
        if (t0 == 0 && i + AHEAD < order.count) {
          const int64_t coming = place(first + order.rows[i + AHEAD]);
          for (int64_t j = 0; j < bytes_per_row; j += LINE)
            __builtin_prefetch(weights + coming * bytes_per_row + j, 0, 2);
          for (int64_t g = 0; INT4 && g < groups; g += 32) __builtin_prefetch(scales + coming * groups + g, 0, 2);
        }
        const int n = order.sizes[i];
        each_tile(n, tile_count(n, TILE), [&](int done, int now) __attribute__((always_inline)) {
          const char* from[TILE];
          float* to[TILE];
          for (int t = 0; t < now; ++t) {
            const int64_t token = t0 + order.tokens[i][done + t];
            from[t] = x + token * x_stride;
            to[t] = out + token * stride + k;
          }
          with_size<TILE>(now, [&](auto taken) __attribute__((always_inline)) {
            dot_row<taken.value, INT4>(weights + mine_at * bytes_per_row, scales + mine_at * groups, width, from, to);
          });
        });
      }
    }
  }
}

}  // namespace

void integer_dots_kept(bool int4, const void* weights, const uint16_t* scales, const int32_t* rows, int64_t count,
                       int64_t width, const void* rounded, int64_t tokens, const uint16_t* masks, float* out,
                       int64_t stride) {
  const auto *w = static_cast<const char*>(weights), *x = static_cast<const char*>(rounded);
  const auto* s = reinterpret_cast<const half*>(scales);
  if (int4)
    dots_of<true>(w, s, rows, count, width, x, tokens, masks, out, stride);
  else
    dots_of<false>(w, s, rows, count, width, x, tokens, masks, out, stride);
}

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
