// What the AVX2 build does in another way than the others in integer_rows.cc: 16 registers and no dot product of bytes.
// Same integers, same order of float sums, so the same bits.
//
// Per 32 bytes of weights and token, instructions of arithmetic: int8 5 (sign, maddubs, madd, convert, fma), int4 8 for
// 64 columns (2 maddubs, add of 16 bits, madd, add, convert, mul, fma). What a row alone costs, its absolute values or
// nibbles and the expanded scales, is paid once for TILE_AVX2 tokens. In a sum of int4 rows two maddubs of a quad stay
// below 2^15 / 8, so a segment's 8 quads are added as 16 bits and widened once.
#pragma once

#include "integer_chunks.h"
#include "integers.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define SPARSEGATE_INTEGERS_AVX2 1

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

// tokens: one sum each, a row's bytes and scale, and what a product needs, in 16 registers
constexpr int TILE_AVX2 = 6;

inline __m256i load_part_bytes(const void* p) { return unaligned<__m256i>(p); }

// The first `count` bytes, a multiple of 16 or more than 31, zeros behind them
inline __m256i load_halves(const char* p, int64_t count) {
  if (count >= 32) return unaligned<__m256i>(p);
  return count >= 16 ? _mm256_zextsi128_si256(unaligned<__m128i>(p)) : _mm256_setzero_si256();
}

// The first `count` < 8 of 8 values
inline __m256 load_few_halves(const half* p, int64_t count) {
  return _mm256_cvtph_ps(_mm_set_epi64x(count > 4 ? few_halves(p + 4, count - 4) : 0, few_halves(p, count)));
}

// One row's products with T tokens, P parts of it from PART on: `sum` has a lane-wise sum for each part and token.
template <int T, int P, int PART, class X>
inline void dot_parts_int8(const char* row, int64_t width, const X& x, __m256 (*sum)[T]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 total[P][T];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) total[p][t] = _mm256_setzero_ps();
  const auto step = [&](const char* weights, int64_t from) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const __m256i w = load_part_bytes(weights + p * 32), size = _mm256_abs_epi8(w);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const char* q = x.at(t) + from + p * 32;
        const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(load_part_bytes(q), w));
        total[p][t] = fma(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones)),
                          load_part(reinterpret_cast<const float*>(q + 128)), total[p][t]);
      }
    }
  };
  int64_t j = 0, from = PART * 32;
  for (; j + kChunkInt8 <= width; j += kChunkInt8, from += 192) step(row + PART * 32 + j, from);
  if (j < width) {
    char last[64] = {};
    memcpy(last, row + j, static_cast<size_t>(width - j));
    step(last + PART * 32, from);
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[p][t] = total[p][t];
}

template <int T, int P, int PART, class X>
inline void dot_parts_int4(const char* row, const half* scales, int64_t width, const X& x, __m256 (*sum)[T]) {
  const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
  const __m256i first = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(2 * PART));
  __m256 total[P][T];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) total[p][t] = _mm256_setzero_ps();
  row += PART * 32;
  const auto step = [&](int p, __m256i packed, __m256 four_scales, int64_t from) __attribute__((always_inline)) {
    const __m256i low = _mm256_and_si256(packed, nibble), high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
    const __m256 scale =
        _mm256_permutevar8x32_ps(four_scales, p ? _mm256_add_epi32(first, _mm256_set1_epi32(2)) : first);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const char* q = x.at(t) + from + p * 32;
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, load_part_bytes(q)),
                                             _mm256_maddubs_epi16(high, load_part_bytes(q + 64)));
      const __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), load_part_bytes(q + 128));
      total[p][t] =
          fma(_mm256_cvtepi32_ps(dot), load_part(reinterpret_cast<const float*>(q + 192)) * scale, total[p][t]);
    }
  };
  const auto widened = [](int64_t four_halves) {
    return _mm256_castps128_ps256(_mm_cvtph_ps(_mm_cvtsi64_si128(four_halves)));
  };
  int64_t j = 0, from = PART * 32;
  for (; j + kChunkInt4 <= width; j += kChunkInt4, from += 256) {
    const __m256 four_scales = widened(unaligned<int64_t>(scales + j / kRounded));
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) step(p, load_part_bytes(row + j / 2 + p * 32), four_scales, from);
  }
  if (j < width) {
    const __m256 four_scales = widened(few_halves(scales + j / kRounded, (width - j) / kRounded));
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
      step(p, load_halves(row + j / 2 + p * 32, (width - j) / 2 - (PART + p) * 32), four_scales, from);
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[p][t] = total[p][t];
}

// The products of one row with T tokens: few of them with both parts at once, so that sums enough are on their way
template <int T, bool INT4, class X>
inline void dot_row_avx2(const char* row, const half* scales, int64_t width, const X& x, __m256 (*sum)[T]) {
  constexpr int P = 2 * T <= TILE_AVX2 ? 2 : 1;
  if (INT4) {
    dot_parts_int4<T, P, 0>(row, scales, width, x, sum);
    if (P == 1) dot_parts_int4<T, 1, 1>(row, scales, width, x, sum + 1);
  } else {
    dot_parts_int8<T, P, 0>(row, width, x, sum);
    if (P == 1) dot_parts_int8<T, 1, 1>(row, width, x, sum + 1);
  }
}

// T tokens times four rows, row by row. `next`: the rows to come, if any
template <int T, bool INT4>
void dot_rows_avx2(const char* const* row, const char* const* next, const half* const* scales, int valid, int64_t width,
                   const char* x, int64_t x_stride, float* out, int64_t stride) {
  __m256 sum[4][2][T];
  const int64_t bytes_per_row = INT4 ? width / 2 : width;
  for (int r = 0; r < 4; ++r) {
    if (next)
      for (int64_t j = 0; j < bytes_per_row; j += LINE) __builtin_prefetch(next[r] + j, 0, 2);
    dot_row_avx2<T, INT4>(row[r], scales[r], width, Even{x, x_stride}, sum[r]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    vec total[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) total[r] = {{sum[r][0][t], sum[r][1][t]}};
    store_some(out + t * stride, sums(total[0], total[1], total[2], total[3]), valid);
  }
}

// As factors_int4 in integer_rows.cc, 8 column groups at a time
inline void factors_int4_avx2(const Quads& quads, const float* z, const half* scales, int64_t row_groups, int64_t group,
                              int64_t groups, int32_t* q, float* step, int32_t* offset, float tiny) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), infinite = _mm256_set1_epi32(0x7f800000);
  const __m256i ones = _mm256_set1_epi16(1), octets = _mm256_set1_epi8(1);
  const __m256i turn = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13,
                                        2, 6, 10, 14, 3, 7, 11, 15);
  const __m256 most_int8 = _mm256_set1_ps(127.f), none = _mm256_setzero_ps(), nan = _mm256_set1_ps(__builtin_nanf(""));
  for (int64_t s = 0; s < quads.count; ++s) {
    const int64_t begin = quads.segments[s], end = quads.segments[s + 1];
    const int filled = quads.filled[s + 1] - quads.filled[s];
    const float* factors = z + quads.filled[s];
    const int32_t* rows = quads.rows + begin * 4;
    for (int64_t g = 0; g < groups; g += 8) {  // groups are a multiple of 4
      const int64_t there = row_groups - group - g;
      const bool whole = groups - g >= 8;
      __m256 scaled[kRounded];
      __m256i most = _mm256_setzero_si256();
      for (int k = 0; k < filled; ++k) {
        const half* from = scales + rows[k] * row_groups + group + g;
        const __m256 scale = there >= 8 ? load_part(from) : there > 0 ? load_few_halves(from, there) : none;
        const __m256 factor = _mm256_broadcast_ss(factors + k);
        scaled[k] = _mm256_and_ps(factor * scale, _mm256_cmp_ps(factor, none, _CMP_NEQ_UQ));  // 0 * NaN is 0
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(scaled[k]), magnitude));
      }
      for (int64_t k = filled; k < (end - begin) * 4; ++k) scaled[k] = none;
      const __m256 size = _mm256_castsi256_ps(most), finite = _mm256_castsi256_ps(_mm256_cmpgt_epi32(infinite, most));
      const __m256 usable = _mm256_and_ps(finite, _mm256_cmp_ps(size, _mm256_set1_ps(tiny), _CMP_GE_OQ));
      const __m256 inverse = _mm256_and_ps(most_int8 / size, usable), steps = _mm256_and_ps(size / most_int8, usable);
      __m256i sum = _mm256_setzero_si256();
      for (int64_t k = begin; k < end; ++k) {
        const __m256* v = scaled + (k - begin) * 4;
        const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0] * inverse), _mm256_cvtps_epi32(v[1] * inverse));
        const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(v[2] * inverse), _mm256_cvtps_epi32(v[3] * inverse));
        const __m256i packed = _mm256_shuffle_epi8(_mm256_packs_epi16(ab, cd), turn);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(octets, packed));
        memcpy(q + k * groups + g, &packed, whole ? 32 : 16);
      }
      const __m256 own = _mm256_blendv_ps(nan, steps, finite);
      const __m256i correction =
          _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(_mm256_madd_epi16(sum, ones), 3));
      memcpy(step + s * groups + g, &own, whole ? 32 : 16);
      memcpy(offset + s * groups + g, &correction, whole ? 32 : 16);
    }
  }
}

// One segment of one chunk of a sum of int4 rows for one token, as add_segment in integer_rows.cc; at most 8 quads
template <class Quad>
inline void add_segment_avx2(const int32_t* q, int64_t groups, const int32_t* offset, const float* step, int64_t begin,
                             int64_t end, const Quad& quad, float* y) {
  __m256i sum[4][2];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) sum[v][0] = sum[v][1] = _mm256_setzero_si256();
  for (int64_t k = begin; k < end; ++k) {
    const bytes factor = expand(q + k * groups);
    bytes u[4];
    quad(k, u);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        sum[v][i] = _mm256_add_epi16(sum[v][i], _mm256_maddubs_epi16(u[v].part[i], factor.part[i]));
  }
  const __m256i ones = _mm256_set1_epi16(1);
  const bytes start = expand(offset);
  const vec scale = expand(step);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    bytes total;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) total.part[i] = _mm256_add_epi32(start.part[i], _mm256_madd_epi16(sum[v][i], ones));
    store(y + v * LANES, fma(to_float(total), scale, load(y + v * LANES)));
  }
}

}  // namespace
}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
#endif
