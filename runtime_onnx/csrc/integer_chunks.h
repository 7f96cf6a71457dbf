// Products of integer rows with rounded rows, chunk by chunk. Included by files that are compiled once per instruction
// set; the AVX2 build has its own way (integers_avx2.h).
#pragma once

#include "integer_rows.h"
#include "integers.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

// Where the rounded rows of tokens lie: evenly, or anywhere
struct Even {
  const char* first;
  int64_t stride;
  const char* at(int t) const { return first + t * stride; }
};

struct Listed {
  const char* const* place;
  const char* at(int t) const { return place[t]; }
};

// One chunk of R rows, from column `at` on, for T tokens, whose rounded rows have it at byte `from`.
// WHOLE: all of the chunk is there; else its first `left` columns.
template <int T, int R, bool WHOLE, class X>
inline void add_chunk_int8(const char* const* row, int64_t at, int64_t left, const X& x, int64_t from,
                           vec (*total)[R]) {
  bytes w[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) w[r] = weights_of(WHOLE ? load_bytes(row[r] + at) : load_bytes(row[r] + at, left));
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const char* chunk = x.at(t) + from;
    const bytes q = load_bytes(chunk), correction = load_bytes(chunk + 64);
    const vec scale = load(reinterpret_cast<const float*>(chunk + 128));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[t][r] = fma(to_float(dot_weights(correction, w[r], q)), scale, total[t][r]);
  }
}

template <int T, int R, bool WHOLE, class X>
inline void add_chunk_int4(const char* const* row, const half* const* scales, int64_t at, int64_t left, const X& x,
                           int64_t from, vec (*total)[R]) {
  bytes low[R], high[R];
  vec step[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const bytes packed = WHOLE ? load_bytes(row[r] + at / 2) : load_bytes(row[r] + at / 2, left / 2);
    low[r] = low_nibbles(packed);
    high[r] = high_nibbles(packed);
    const half* mine = scales[r] + at / kRounded;
    const int64_t last = WHOLE ? 0 : few_halves(mine, left / kRounded);
    step[r] = expand(WHOLE ? mine : reinterpret_cast<const half*>(&last));
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const char* chunk = x.at(t) + from;
    const bytes even = load_bytes(chunk), odd = load_bytes(chunk + 64), correction = load_bytes(chunk + 128);
    const vec scale = load(reinterpret_cast<const float*>(chunk + 192));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const bytes dot = dot_nibbles(dot_nibbles(correction, low[r], even), high[r], odd);
      total[t][r] = fma(to_float(dot), scale * step[r], total[t][r]);
    }
  }
}

template <int T, int R, bool INT4, bool WHOLE, class X>
inline void add_chunk(const char* const* row, const half* const* scales, int64_t at, int64_t left, const X& x,
                      int64_t from, vec (*total)[R]) {
  if constexpr (INT4)
    add_chunk_int4<T, R, WHOLE>(row, scales, at, left, x, from, total);
  else
    add_chunk_int8<T, R, WHOLE>(row, at, left, x, from, total);
}

// total[t][r] += the products of R rows of `width` columns with T tokens, lane by lane. `next`: the rows to come, if
// any
template <int T, int R, bool INT4, class X>
__attribute__((always_inline)) inline void add_products(const char* const* row, const char* const* next,
                                                        const half* const* scales, int64_t width, const X& x,
                                                        vec (*total)[R]) {
  constexpr int64_t CHUNK = INT4 ? kChunkInt4 : kChunkInt8, BYTES = INT4 ? 256 : 192;
  int64_t j = 0, from = 0;
  for (; j + CHUNK <= width; j += CHUNK, from += BYTES) {
    if (next)  // rows far apart: the hardware prefetcher stops at the page's end
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + (INT4 ? j / 2 : j), 0, 2);
    add_chunk<T, R, INT4, true>(row, scales, j, 0, x, from, total);
  }
  if (j < width) add_chunk<T, R, INT4, false>(row, scales, j, width - j, x, from, total);
}

}  // namespace
}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
