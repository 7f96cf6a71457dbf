// Products of integer rows with the tokens that keep them: see `dots_kept` in integer_rows.h. Compiled once per
// instruction set, as vectors.h says.
#include "integer_rows.h"

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

#ifndef SPARSEGATE_INTEGERS_AVX2
// One chunk of a row for T tokens, whose rounded rows have it at `from`. WHOLE: all of the chunk is there.
template <int T, bool WHOLE>
inline void add_chunk_int8(const char* row, int64_t left, const char* const* x, int64_t from, vec* total) {
  const bytes w = weights_of(WHOLE ? load_bytes(row) : load_bytes(row, left));
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const char* q = x[t] + from;
    total[t] = fma(to_float(dot_weights(load_bytes(q + 64), w, load_bytes(q))),
                   load(reinterpret_cast<const float*>(q + 128)), total[t]);
  }
}

template <int T, bool WHOLE>
inline void add_chunk_int4(const char* row, const half* scales, int64_t left, const char* const* x, int64_t from,
                           vec* total) {
  const bytes packed = WHOLE ? load_bytes(row) : load_bytes(row, left / 2), low = low_nibbles(packed);
  const bytes high = high_nibbles(packed);
  const int64_t last = WHOLE ? 0 : few_halves(scales, left / kRounded);
  const vec step = expand(WHOLE ? scales : reinterpret_cast<const half*>(&last));
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const char* q = x[t] + from;
    const bytes dot = dot_nibbles(dot_nibbles(load_bytes(q + 128), low, load_bytes(q)), high, load_bytes(q + 64));
    total[t] = fma(to_float(dot), load(reinterpret_cast<const float*>(q + 192)) * step, total[t]);
  }
}
#endif

// One row times T tokens
template <int T, bool INT4>
void dot_row(const char* row, const half* scales, int64_t width, const char* const* x, float* const* out) {
  vec total[T];
#ifdef SPARSEGATE_INTEGERS_AVX2
  __m256 sum[2][T];
  dot_row_avx2<T, INT4>(row, scales, width, Listed{x}, sum);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = {{sum[0][t], sum[1][t]}};
#else
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = vec{};
  constexpr int64_t CHUNK = INT4 ? kChunkInt4 : kChunkInt8, BYTES = INT4 ? 256 : 192;
  int64_t j = 0, from = 0;
  for (; j + CHUNK <= width; j += CHUNK, from += BYTES) {
    if (INT4)
      add_chunk_int4<T, true>(row + j / 2, scales + j / kRounded, 0, x, from, total);
    else
      add_chunk_int8<T, true>(row + j, 0, x, from, total);
  }
  if (j < width) {
    if (INT4)
      add_chunk_int4<T, false>(row + j / 2, scales + j / kRounded, width - j, x, from, total);
    else
      add_chunk_int8<T, false>(row + j, width - j, x, from, total);
  }
#endif
#pragma GCC unroll 2
  for (int t = 0; t < T; t += 4) {
    const auto of = [&](int i) { return total[t + i < T ? t + i : t]; };
    alignas(16) float four_sums[4];
    const four y = sums(of(0), of(1), of(2), of(3));
    memcpy(four_sums, &y, sizeof y);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if (t + i < T) *out[t + i] = four_sums[i];
  }
}

template <bool INT4>
void dot_row_of(int n, const char* row, const half* scales, int64_t width, const char* const* x, float* const* out) {
  switch (n) {
#define SPARSEGATE_TILE(n) \
  case n:                  \
    return dot_row<(n <= TILE ? n : 1), INT4>(row, scales, width, x, out);
    SPARSEGATE_TILE(1)
    SPARSEGATE_TILE(2)
    SPARSEGATE_TILE(3)
    SPARSEGATE_TILE(4)
    SPARSEGATE_TILE(5)
    SPARSEGATE_TILE(6)
    SPARSEGATE_TILE(7)
    SPARSEGATE_TILE(8)
#undef SPARSEGATE_TILE
    default:
      break;
  }
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
        const int n = order.sizes[i], tiles = (n + TILE - 1) / TILE;
        for (int tile = 0, done = 0; tile < tiles; ++tile) {
          const int now = (n - done + tiles - tile - 1) / (tiles - tile);
          const char* from[TILE];
          float* to[TILE];
          for (int t = 0; t < now; ++t) {
            const int64_t token = t0 + order.tokens[i][done + t];
            from[t] = x + token * x_stride;
            to[t] = out + token * stride + k;
          }
          dot_row_of<INT4>(now, weights + mine_at * bytes_per_row, scales + mine_at * groups, width, from, to);
          done += now;
        }
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
