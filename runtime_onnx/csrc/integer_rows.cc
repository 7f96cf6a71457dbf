// See integer_rows.h. Compiled once per instruction set, as vectors.h says.
#include "integer_rows.h"

#include "dispatch.h"
#include "integers.h"
#include "integers_avx2.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {

// integer_kept.cc
void integer_dots_kept(bool int4, const void* weights, const uint16_t* scales, const int32_t* rows, int64_t count,
                       int64_t width, const void* rounded, int64_t tokens, const uint16_t* masks, float* out,
                       int64_t stride);

namespace {

constexpr int ROWS = 4;                      // rows per pass of a product, and of a quad
constexpr int TOKENS = WIDTH == 16 ? 6 : 1;  // tokens per pass, so that the sums fit into the registers
constexpr int TOKENS_INT4 = WIDTH == 16 ? 4 : 1;
#ifdef SPARSEGATE_INTEGERS_AVX2
constexpr int TOKENS_DOTS = TILE_AVX2, TOKENS_DOTS_INT4 = TILE_AVX2;
#else
constexpr int TOKENS_DOTS = TOKENS, TOKENS_DOTS_INT4 = TOKENS_INT4;
#endif
// of rounded rows that a block of rows is multiplied with at a time: they stay in the first-level cache
constexpr int64_t NEAR_BYTES = 20 << 10;
constexpr int64_t BLOCK = 64;  // rows
constexpr float TINY = 1e-30f;
// with dot products of bytes the products cost less than finding them
constexpr float MOST_KEPT = WIDTH == 4 ? 0.f : WIDTH == 16 ? 0.35f : 0.75f;

// The integers of `count` <= 32 values, and their scale; see quantisation.round_activations. Writes 32 values.
inline float round_group(const float* values, int count, int8_t* out) {
  alignas(64) float padded[kRounded];
  memset(padded, 0, sizeof padded);
  memcpy(padded, values, static_cast<size_t>(count) * sizeof(float));
  uint32_t bits[kRounded], largest = 0;
  memcpy(bits, padded, sizeof bits);
  // NaN is above infinity
  for (int i = 0; i < kRounded; ++i) largest = (bits[i] & 0x7fffffffu) > largest ? bits[i] & 0x7fffffffu : largest;
  float size;
  memcpy(&size, &largest, sizeof size);
  const bool finite = largest < 0x7f800000u, usable = finite && size >= TINY;
  const vec inverse = spread(usable ? 127.f / size : 0.f);
  alignas(64) int32_t q[kRounded];
  for (int i = 0; i < kRounded; i += LANES) {
    const bytes rounded = to_int(load(padded + i) * inverse);
    memcpy(q + i, &rounded, sizeof rounded);
  }
  for (int i = 0; i < kRounded; ++i) out[i] = static_cast<int8_t>(usable ? q[i] : 0);
  return usable ? size / 127.f : finite ? 0.f : __builtin_nanf("");
}

void round(bool int4, const float* x, int64_t width, void* out) {
  auto* to = static_cast<char*>(out);
  const int64_t chunk = int4 ? kChunkInt4 : kChunkInt8, offset = int4 ? -8 : -WEIGHT_OFFSET;
  for (int64_t j = 0; j < width; j += chunk) {
    alignas(64) int8_t q[kChunkInt4];
    memset(q, 0, sizeof q);
    alignas(64) float scale[LANES];
    const int lanes = static_cast<int>(kRounded * LANES / chunk);  // per group
    for (int64_t g = 0; g * kRounded < chunk; ++g) {
      const int64_t first = j + g * kRounded, left = width - first;
      const float step =
          left > 0 ? round_group(x + first, static_cast<int>(left < kRounded ? left : kRounded), q + g * kRounded)
                   : 0.f;
      for (int l = 0; l < lanes; ++l) scale[g * lanes + l] = step;
    }
    alignas(64) int32_t correction[LANES];
    const int per_lane = static_cast<int>(chunk) / LANES;
    for (int l = 0; l < LANES; ++l) {
      int32_t sum = 0;
      for (int k = 0; k < per_lane; ++k) sum += q[l * per_lane + k];
      correction[l] = static_cast<int32_t>(offset) * sum;
    }
    if (int4) {  // even columns, then odd ones, as the nibbles of a row come apart
      for (int k = 0; k < 64; ++k) to[k] = q[2 * k];
      for (int k = 0; k < 64; ++k) to[64 + k] = q[2 * k + 1];
      to += 128;
    } else {
      memcpy(to, q, 64);
      to += 64;
    }
    memcpy(to, correction, 64);
    memcpy(to + 64, scale, 64);
    to += 128;
  }
}

// T tokens times four rows
template <int T, bool INT4>
inline void dot_tile(const char* const* row, const char* const* next, const half* const* scales, int valid,
                     int64_t width, const char* x, int64_t x_stride, float* out, int64_t stride) {
#ifdef SPARSEGATE_INTEGERS_AVX2
  return dot_rows_avx2<T, INT4>(row, next, scales, valid, width, x, x_stride, out, stride);
#endif
  vec total[T][ROWS];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) total[t][r] = vec{};
  add_products<T, ROWS, INT4>(row, next, scales, width, Even{x, x_stride}, total);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    store_some(out + t * stride, sums(total[t][0], total[t][1], total[t][2], total[t][3]), valid);
}

template <bool INT4>
void dots_of(const char* weights, const half* scales, const int32_t* rows, int64_t count, int64_t width, const char* x,
             int64_t tokens, float* out, int64_t stride, const char* then) {
  constexpr int MOST = INT4 ? TOKENS_DOTS_INT4 : TOKENS_DOTS;
  const int64_t bytes_per_row = INT4 ? width / 2 : width, groups = width / kRounded;
  const int64_t x_stride = rounded_bytes(INT4, width);
  const int64_t fits = NEAR_BYTES / x_stride < 2 ? 2 : NEAR_BYTES / x_stride, most = fits < MOST ? fits : MOST;
  const auto place = [&](int64_t k) { return rows ? rows[k] : k; };
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t end = first + BLOCK < count ? first + BLOCK : count;
    each_tile(tokens, tile_count(tokens, most), [&](int64_t t, int64_t tile_tokens) __attribute__((always_inline)) {
      for (int64_t k = first; k < end; k += ROWS) {
        const int valid = count - k < ROWS ? static_cast<int>(count - k) : ROWS;
        const bool last = k + ROWS >= count;
        const char *row[ROWS], *ahead[ROWS];
        const half* scale[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          const int64_t mine = place(k + (r < valid ? r : 0));
          row[r] = weights + mine * bytes_per_row;
          scale[r] = scales + mine * groups;
        }
        for (int r = 0; t == 0 && r < ROWS; ++r) {  // the first tokens fetch the rows to come
          const int64_t q = last ? r : k + ROWS + r, coming = place(q < count ? q : count - 1);
          ahead[r] = (last && then ? then : weights) + coming * bytes_per_row;
          for (int64_t g = 0; INT4 && !last && g < groups; g += 32)
            __builtin_prefetch(scales + coming * groups + g, 0, 2);
        }
        const char* const* next = t > 0 || (last && !then) ? nullptr : ahead;
        with_size<MOST>(tile_tokens, [&](auto size) __attribute__((always_inline)) {
          dot_tile<size.value, INT4>(row, next, scale, valid, width, x + t * x_stride, x_stride, out + t * stride + k,
                                     stride);
        });
      }
    });
  }
}

void dots(bool int4, const void* weights, const uint16_t* scales, const int32_t* rows, int64_t count, int64_t width,
          const void* rounded, int64_t tokens, float* out, int64_t stride, const void* then) {
  const auto *w = static_cast<const char*>(weights), *x = static_cast<const char*>(rounded),
             *after = static_cast<const char*>(then);
  const auto* s = reinterpret_cast<const half*>(scales);
  if (int4)
    dots_of<true>(w, s, rows, count, width, x, tokens, out, stride, after);
  else
    dots_of<false>(w, s, rows, count, width, x, tokens, out, stride, after);
}

// Four int8 of one row of a sum in every int32, rows lowest first
inline int32_t quad_of(const int8_t* q) {
  int32_t out;
  memcpy(&out, q, sizeof out);
  return out;
}

void factors_int8(const Quads& quads, const float* z, int32_t* q, float* step, int32_t* offset) {
  for (int64_t s = 0; s < quads.count; ++s) {
    int8_t rounded[kRounded];
    step[s] = round_group(z + quads.filled[s], quads.filled[s + 1] - quads.filled[s], rounded);
    int32_t sum = 0;
    for (int i = 0; i < kRounded; ++i) sum += rounded[i];
    offset[s] = -WEIGHT_OFFSET * sum;
    for (int64_t k = quads.segments[s], i = 0; k < quads.segments[s + 1]; ++k, i += ROWS) q[k] = quad_of(rounded + i);
  }
}

#ifndef SPARSEGATE_INTEGERS_AVX2
void factors_int4(const Quads& quads, const float* z, const half* scales, int64_t row_groups, int64_t group,
                  int64_t groups, int32_t* q, float* step, int32_t* offset) {
  for (int64_t s = 0; s < quads.count; ++s) {
    const int64_t begin = quads.segments[s], end = quads.segments[s + 1];
    const int filled = quads.filled[s + 1] - quads.filled[s];
    for (int64_t g = 0; g < groups; g += LANES) {  // 16 column groups at a time
      const int64_t left = groups - g < LANES ? groups - g : LANES;
      const int64_t there = row_groups - group - g < left ? row_groups - group - g : left;
      vec scaled[kRounded];
      bytes most = spread(0);
      for (int k = 0; k < filled; ++k) {
        const half* row = scales + quads.rows[begin * ROWS + k] * row_groups + group + g;
        const float factor = z[quads.filled[s] + k];
        const vec scale = there >= LANES ? load(row) : there > 0 ? load_some(row, there) : vec{};
        // 0 * NaN is 0, and no branch: half of them would be guessed wrong
        scaled[k] = as_floats(as_bytes(spread(factor) * scale) & spread(factor != 0.f ? -1 : 0));
        most = larger_magnitude(most, scaled[k]);
      }
      alignas(64) float inverse[LANES], steps[LANES], size[LANES];
      const vec sizes = as_floats(most);
      store(size, sizes);
      store(inverse, quotient(spread(127.f), sizes));
      store(steps, quotient(sizes, spread(127.f)));
      for (int l = 0; l < LANES; ++l) {
        const bool finite = size[l] < __builtin_inff(), usable = finite && size[l] >= TINY;
        inverse[l] = usable ? inverse[l] : 0.f;
        steps[l] = usable ? steps[l] : finite ? 0.f : __builtin_nanf("");  // what q is then does not matter
      }
      for (int k = filled; k < (end - begin) * ROWS; ++k) scaled[k] = vec{};
      const vec by = load(inverse);
      bytes total = spread(0);
      for (int64_t k = begin; k < end; ++k) {
        const vec* four_rows = scaled + (k - begin) * ROWS;
        const bytes a = to_int(four_rows[0] * by), b = to_int(four_rows[1] * by), c = to_int(four_rows[2] * by);
        const bytes d = to_int(four_rows[3] * by);
        total = total + ((a + b) + (c + d));
        const bytes packed = with_byte<3>(with_byte<2>(with_byte<1>(with_byte<0>(spread(0), a), b), c), d);
        memcpy(q + k * groups + g, &packed, static_cast<size_t>(left) * sizeof(int32_t));
      }
      uint32_t sum[LANES];
      memcpy(sum, &total, sizeof sum);
      for (int l = 0; l < LANES; ++l) sum[l] *= 0u - 8u;
      memcpy(step + s * groups + g, steps, static_cast<size_t>(left) * sizeof(float));
      memcpy(offset + s * groups + g, sum, static_cast<size_t>(left) * sizeof(int32_t));
    }
  }
}

#endif

void factors(bool int4, const Quads& quads, const float* z, const uint16_t* scales, int64_t width, int64_t group,
             int64_t groups, int32_t* q, float* step, int32_t* offset) {
  if (int4)
#ifdef SPARSEGATE_INTEGERS_AVX2
    factors_int4_avx2(quads, z, reinterpret_cast<const half*>(scales), width / kRounded, group, groups, q, step, offset,
                      TINY);
#else
    factors_int4(quads, z, reinterpret_cast<const half*>(scales), width / kRounded, group, groups, q, step, offset);
#endif
  else
    factors_int8(quads, z, q, step, offset);
}

// The bytes of four rows for one chunk of 64 sums: int8 columns, or the low (part 0) or high (part 1) nibbles of 128
// columns
template <bool INT4, bool WHOLE>
inline void take(const char* const* row, int64_t at, int64_t left, int part, bytes* out) {
  bytes loaded[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    const bytes raw = WHOLE ? load_bytes(row[r] + at) : load_bytes(row[r] + at, left);
    if (!INT4)
      loaded[r] = weights_of(raw);
    else if (part)
      loaded[r] = high_nibbles(raw);
    else
      loaded[r] = low_nibbles(raw);
  }
  interleave(loaded, out);
}

template <bool INT4>
inline void take(const char* const* row, int64_t at, int64_t left, int part, bytes* out) {
  if (left >= 64)
    take<INT4, true>(row, at, left, part, out);
  else
    take<INT4, false>(row, at, left, part, out);
}

struct Factors {
  const int32_t* q;
  const float* step;
  const int32_t* offset;
  int64_t q_stride, s_stride, groups;

  Factors of_token(int64_t t) const {
    return {q + t * q_stride, step + t * s_stride, offset + t * s_stride, q_stride, s_stride, groups};
  }
};

// One segment of one chunk for T tokens. `quad(k)` fills four vectors with the bytes of quad k; `lane` is the first of
// the chunk's column groups (int4).
template <bool INT4, int T, class Quad>
inline void add_segment(const Factors& f, int64_t s, int64_t begin, int64_t end, int64_t lane, const Quad& quad,
                        float* y, int64_t y_stride) {
#ifdef SPARSEGATE_INTEGERS_AVX2
  if (INT4)
    return add_segment_avx2(f.q + lane, f.groups, f.offset + s * f.groups + lane, f.step + s * f.groups + lane, begin,
                            end, quad, y);
#endif
  bytes sum[T][4];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const int32_t* offset = f.offset + t * f.s_stride + s * f.groups;
    const bytes start = INT4 ? expand(offset + lane) : spread(*offset);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[t][v] = start;
  }
  for (int64_t k = begin; k < end; ++k) {
    bytes u[4];
    quad(k, u);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const int32_t* q = f.q + t * f.q_stride + k * f.groups;
      const bytes factor = INT4 ? expand(q + lane) : spread(*q);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        sum[t][v] = INT4 ? dot_nibbles(sum[t][v], u[v], factor) : dot_weights(sum[t][v], u[v], factor);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const float* step = f.step + t * f.s_stride + s * f.groups;
    const vec scale = INT4 ? expand(step + lane) : spread(*step);
    float* to = y + t * y_stride;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(to + v * LANES, fma(to_float(sum[t][v]), scale, load(to + v * LANES)));
  }
}

// T tokens of few: the rows are read where they lie, and interleaved for these tokens alone
template <bool INT4, int T>
void sum_few(const char* weights, int64_t row_bytes, const Quads& quads, int64_t first, int64_t columns,
             const Factors& f, float* y, int64_t y_stride) {
  constexpr int64_t CHUNK = INT4 ? kChunkInt4 : kChunkInt8;
  const int64_t skip = INT4 ? first / 2 : first;
  for (int64_t s = 0; s < quads.count; ++s) {
    const int64_t begin = quads.segments[s], end = quads.segments[s + 1];
    const bool last = s + 1 == quads.count;
    const int ahead = last ? 0 : quads.filled[s + 2] - quads.filled[s + 1];
    for (int64_t c = 0; c < columns; c += CHUNK) {
      const int64_t at = skip + (INT4 ? c / 2 : c), left = row_bytes - at;
      for (int k = 0; k < ahead; ++k) __builtin_prefetch(weights + quads.rows[end * ROWS + k] * row_bytes + at, 0, 2);
      for (int part = 0; part < (INT4 ? 2 : 1); ++part) {
        const auto quad = [&](int64_t k, bytes* u) {
          const char* row[ROWS];
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) row[r] = weights + quads.rows[k * ROWS + r] * row_bytes;
          take<INT4>(row, at, left, part, u);
        };
        add_segment<INT4, T>(f, s, begin, end, c / kRounded, quad, y + c + part * 64, y_stride);
      }
    }
  }
}

// Many tokens: a chunk of all rows is interleaved once
template <bool INT4>
void sum_many(const char* weights, int64_t row_bytes, const Quads& quads, int64_t first, int64_t columns,
              const Factors& f, int64_t tokens, float* y, int64_t y_stride, char* panel) {
  constexpr int64_t CHUNK = INT4 ? kChunkInt4 : kChunkInt8;
  const int64_t skip = INT4 ? first / 2 : first, total = quads.segments[quads.count];
  for (int64_t c = 0; c < columns; c += CHUNK)
    for (int part = 0; part < (INT4 ? 2 : 1); ++part) {
      const int64_t at = skip + (INT4 ? c / 2 : c), left = row_bytes - at;
      for (int64_t k = 0; k < total; ++k) {
        const char* row[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          row[r] = weights + quads.rows[k * ROWS + r] * row_bytes;
          const int64_t ahead = (k + 4 < total ? k + 4 : k) * ROWS + r;
          __builtin_prefetch(weights + quads.rows[ahead] * row_bytes + at, 0, 2);
        }
        bytes u[4];
        take<INT4>(row, at, left, part, u);
        for (int v = 0; v < 4; ++v) store_bytes(panel + k * 256 + v * 64, u[v]);
      }
      const auto quad = [&](int64_t k, bytes* u) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) u[v] = load_bytes(panel + k * 256 + v * 64);
      };
      each_tile(tokens, tile_count<int64_t>(tokens, TOKENS),
                [&](int64_t t, int64_t tile_tokens) __attribute__((always_inline)) {
                  const Factors mine = f.of_token(t);
                  float* to = y + t * y_stride + c + part * 64;
                  for (int64_t s = 0; s < quads.count; ++s)
                    with_size<TOKENS>(tile_tokens, [&](auto size) __attribute__((always_inline)) {
                      add_segment<INT4, size.value>(mine, s, quads.segments[s], quads.segments[s + 1], c / kRounded,
                                                    quad, to, y_stride);
                    });
                });
    }
}

template <bool INT4>
void sum_of(const char* weights, int64_t width, const Quads& quads, int64_t first, int64_t columns, const Factors& f,
            int64_t tokens, float* y, int64_t y_stride, char* panel) {
  const int64_t row_bytes = INT4 ? width / 2 : width;
  if (panel) return sum_many<INT4>(weights, row_bytes, quads, first, columns, f, tokens, y, y_stride, panel);
  each_tile(tokens, tile_count<int64_t>(tokens, TOKENS),
            [&](int64_t t, int64_t tile_tokens) __attribute__((always_inline)) {
              with_size<TOKENS>(tile_tokens, [&](auto size) __attribute__((always_inline)) {
                sum_few<INT4, size.value>(weights, row_bytes, quads, first, columns, f.of_token(t), y + t * y_stride,
                                          y_stride);
              });
            });
}

void sum(bool int4, const void* weights, int64_t width, const Quads& quads, int64_t first, int64_t columns,
         const int32_t* q, int64_t q_stride, const float* step, const int32_t* offset, int64_t s_stride, int64_t tokens,
         float* y, int64_t y_stride, void* panel) {
  const auto* w = static_cast<const char*>(weights);
  const Factors f{q, step, offset, q_stride, s_stride, int4 ? padded_columns(true, columns) / kRounded : 1};
  if (int4)
    sum_of<true>(w, width, quads, first, columns, f, tokens, y, y_stride, static_cast<char*>(panel));
  else
    sum_of<false>(w, width, quads, first, columns, f, tokens, y, y_stride, static_cast<char*>(panel));
}

void unfold(bool int4, const float* folded, int64_t columns, float* out) {
  const int64_t chunk = int4 ? kChunkInt4 : kChunkInt8;
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t in = c % chunk, byte = int4 ? in / 2 : in, part = int4 ? in % 2 : 0;
    out[c] += folded[c - in + part * 64 + byte / 4 % 4 * LANES + byte / 16 * 4 + byte % 4];
  }
}

}  // namespace

extern const IntegerRows integer_rows;
const IntegerRows integer_rows = {round, dots, integer_dots_kept, factors, sum, unfold, TOKENS, MOST_KEPT};

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
