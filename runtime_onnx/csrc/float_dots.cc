// Products of rows with tokens: see `dots` in row_kernels.h. Compiled once per instruction set: see vectors.h.
//
// A product is 16 sums, one per lane, over rising d, and their fold, whatever the tiles. For several tokens a block of
// rows comes into the second-level cache with the first kMaskTokens of them, then the others read it, TILES x TILE at a
// time. TILE tokens x ROWS rows are summed in registers, one part of the lanes after the other where a vector takes
// several registers: 7 loads for 12 fma (both parts of 2 rows would need 10, and loads decide). d is cut evenly to at
// most DEPTH columns, so that x stays in the caches nearest; between two cuts the sums wait in memory.
#include "float_rows.h"

#include <string.h>

#include "dispatch.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

constexpr int ROWS = 4;
constexpr int TILE = REGISTERS == 32 ? 6 : 3;   // tokens: 6 x 4 sums in 32 registers, 3 x 4 in 16
constexpr int TILES = REGISTERS == 32 ? 2 : 4;  // of a group of tokens
// columns: cuts cost time; parts of vectors need the rows' cut in the first-level cache
constexpr int64_t DEPTH = REGISTERS == 32 ? 2048 : 320;
constexpr int64_t PIECE = 512;                          // rows
constexpr int64_t BLOCK = 64, BLOCK_BYTES = 512 << 10;  // most rows in a block

// Products of ROWS rows with one token, the form for memory's speed: `next` are the rows to come, if any.
template <class W>
inline void dot_rows(const W* const* row, const W* const* next, int valid, const float* x, int64_t d, float* out) {
  constexpr int STEP = LINE / static_cast<int>(sizeof(W));
  vec sum[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) sum[r] = vec{};
  int64_t j = 0;
  for (; j + STEP <= d; j += STEP) {
    if (next)  // rows far apart: the hardware prefetcher stops at the page's end
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next[r] + j, 0, 2);
    for (int k = 0; k < STEP; k += LANES) {
      const vec q = load(x + j + k);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sum[r] = fma(q, load(row[r] + j + k), sum[r]);
    }
  }
  for (; j < d; j += LANES) {
    const int64_t left = d - j;
    const vec q = left < LANES ? load_tail(x + j, left) : load(x + j);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
      sum[r] = fma(q, left < LANES ? load_tail(row[r] + j, left) : load(row[r] + j), sum[r]);
  }
  const four total = sums(sum[0], sum[1], sum[2], sum[3]);
  memcpy(out, &total, static_cast<size_t>(valid) * sizeof(float));
}

template <class W>
void one_token(const W* weights, const int32_t* rows, int64_t count, int64_t d, const float* x, float* out,
               const W* then) {
  const auto row_of = [&](const W* base, int64_t k) { return base + (rows ? rows[k] : k) * d; };
  for (int64_t k = 0; k < count; k += ROWS) {
    const int valid = count - k < ROWS ? static_cast<int>(count - k) : ROWS;
    const bool last = k + ROWS >= count;
    const W *row[ROWS], *ahead[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      row[r] = row_of(weights, k + (r < valid ? r : 0));
      const int64_t q = last ? r : k + ROWS + r;
      ahead[r] = row_of(last && then ? then : weights, q < count ? q : count - 1);
    }
    dot_rows(row, last && !then ? nullptr : ahead, valid, x, d, out + k);
  }
}

// Memory decides: the form that reads rows once, in their order
template <class W>
void few_tokens(int type, const W* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
                int64_t x_stride, int64_t tokens, float* out, int64_t stride, const W* then) {
  uint16_t masks[PIECE];
  for (uint16_t& mask : masks) mask = static_cast<uint16_t>((1u << tokens) - 1u);
  for (int64_t first = 0; first < count; first += PIECE) {
    const int64_t left = count - first;
    dots_kept(type, rows ? weights : weights + first * d, rows ? rows + first : nullptr, left < PIECE ? left : PIECE, d,
              x, x_stride, tokens, masks, out + first, stride, left <= PIECE ? then : nullptr);
  }
}

// Part `part` of the sums of T tokens x ROWS rows over one cut, added to `acc`.
template <class W, int T, int NEAR>
__attribute__((always_inline)) inline void add_cut(const W* const* row, const W* const* near, const float* x,
                                                   int64_t x_stride, const Cut& cut, int part,
                                                   reg (&acc)[T][ROWS]) {  // a call would keep the sums in memory
  constexpr int STEP = LINE / static_cast<int>(sizeof(W));
  const W* mine[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) mine[r] = row[r] + part * WIDTH;
  const float* y = x + part * WIDTH;
  const auto step = [&](int64_t j) __attribute__((always_inline)) {
    reg q[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) q[t] = load_part(y + t * x_stride + j);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const reg w = load_part(mine[r] + j);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[t][r] = fma(q[t], w, acc[t][r]);
    }
  };
  int64_t j = 0;
  for (; j + STEP <= cut.whole; j += STEP) {
#pragma GCC unroll 4
    for (int r = 0; r < NEAR; ++r) __builtin_prefetch(near[r] + j, 0, 3);
#pragma GCC unroll 4
    for (int k = 0; k < STEP; k += LANES) step(j + k);
  }
  for (; j < cut.whole; j += LANES) step(j);
  if (!cut.left) return;
  reg q[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) q[t] = load_tail(x + t * x_stride + j, cut.left).part[part];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    const reg w = load_tail(row[r] + j, cut.left).part[part];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t][r] = fma(q[t], w, acc[t][r]);
  }
}

// One cut of T tokens x ROWS rows: `sum` holds what the cuts before gave; after the last one the first `valid` products
// go to `out`. Every part is a visit to the rows; the first ROWS / N visits fetch N of the next rows each into the
// first-level cache.
template <class W, int T, int N>
void add_tile(const W* const* row, const W* const* near, int visit, const float* x, int64_t x_stride, const Cut& cut,
              reg (*sum)[TILE][ROWS], int valid, float* out, int64_t stride) {
  constexpr int NEAR = PARTS == 1 ? 0 : N;  // with AVX-512 it does not pay
  reg acc[T][ROWS];
#pragma GCC unroll 4
  for (int part = 0; part < PARTS; ++part) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[t][r] = cut.first ? reg{} : sum[part][t][r];
    const int first = (visit + part) * N;
    if (first >= ROWS)
      add_cut<W, T, 0>(row, near, x, x_stride, cut, part, acc);
    else
      add_cut<W, T, NEAR>(row, near + first, x, x_stride, cut, part, acc);
    if (PARTS == 1 && cut.last) break;  // the sums are in registers
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sum[part][t][r] = acc[t][r];
  }
  if (!cut.last) return;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    vec total[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
      for (int part = 0; part < PARTS; ++part) total[r].part[part] = PARTS == 1 ? acc[t][r] : sum[part][t][r];
    store_some(out + t * stride, sums(total[0], total[1], total[2], total[3]), valid);
  }
}

template <class W, int N>
void tiles_of(const W* const* row, const W* const* near, int64_t tiles, int64_t tokens, const float* x,
              int64_t x_stride, const Cut& cut, reg (*sum)[PARTS][TILE][ROWS], int valid, float* out, int64_t stride) {
  int visit = 0;
  each_tile(tokens, tiles, [&](int64_t t, int64_t n) __attribute__((always_inline)) {
    with_size<TILE>(n, [&](auto size) __attribute__((always_inline)) {
      add_tile<W, size.value, N>(row, near, visit * PARTS, x + t * x_stride, x_stride, cut, sum[visit], valid,
                                 out + t * stride, stride);
    });
    ++visit;
  });
}

// The rows of a block, which lie in the second-level cache, times many tokens
template <class W>
void block_of(const W* weights, const int32_t* rows, int64_t size, int64_t d, const float* x, int64_t x_stride,
              int64_t tokens, float* out, int64_t stride) {
  const auto row_of = [&](int64_t k) { return weights + (rows ? rows[k] : k) * d; };
  alignas(LINE) reg sum[TILES * (BLOCK / ROWS)][PARTS][TILE][ROWS];
  const int64_t all_tiles = tile_count<int64_t>(tokens, TILE);
  const int64_t depth = cut_depth(d, DEPTH);
  int64_t t0 = 0, tile0 = 0;
  for (int64_t groups = (all_tiles + TILES - 1) / TILES; groups > 0; --groups) {
    const int64_t tiles = (all_tiles - tile0 + groups - 1) / groups;
    const int64_t group = ((tokens - t0) * tiles + (all_tiles - tile0) - 1) / (all_tiles - tile0);
    for (int64_t begin = 0; begin < d; begin += depth) {
      const Cut cut = cut_at(begin, depth, d);
      for (int64_t k = 0; k < size; k += ROWS) {
        const int valid = size - k < ROWS ? static_cast<int>(size - k) : ROWS;
        const bool ends = k + ROWS >= size;
        const int64_t next = ends ? 0 : k + ROWS, column = !ends ? begin : cut.last ? 0 : begin + depth;
        const W *row[ROWS], *near[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          row[r] = row_of(k + (r < valid ? r : 0)) + begin;
          near[r] = row_of(next + r < size ? next + r : size - 1) + column;
        }
        const float* from = x + t0 * x_stride + begin;
        float* to = out + t0 * stride + k;
        constexpr int ALONE = (ROWS + PARTS - 1) / PARTS, TWO = (ROWS + 2 * PARTS - 1) / (2 * PARTS);
        if (tiles == 1)
          tiles_of<W, ALONE>(row, near, 1, group, from, x_stride, cut, sum + k / ROWS * TILES, valid, to, stride);
        else
          tiles_of<W, TWO>(row, near, tiles, group, from, x_stride, cut, sum + k / ROWS * TILES, valid, to, stride);
      }
    }
    t0 += group;
    tile0 += tiles;
  }
}

template <class W>
void dots_of(int type, const W* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
             int64_t x_stride, int64_t tokens, float* out, int64_t stride, const W* then) {
  if (tokens == 1) return one_token(weights, rows, count, d, x, out, then);
  if (tokens <= kMaskTokens) return few_tokens(type, weights, rows, count, d, x, x_stride, tokens, out, stride, then);
  int64_t block = BLOCK_BYTES / (d * static_cast<int64_t>(sizeof(W))) / ROWS * ROWS;
  block = block < ROWS ? ROWS : block > BLOCK ? BLOCK : block;
  for (int64_t first = 0; first < count; first += block) {
    const bool last = first + block >= count;
    const W* own = rows ? weights : weights + first * d;
    const int32_t* listed = rows ? rows + first : nullptr;
    const int64_t size = last ? count - first : block;
    // brings the rows into the cache
    few_tokens(type, own, listed, size, d, x, x_stride, kMaskTokens, out + first, stride, last ? then : nullptr);
    block_of(own, listed, size, d, x + kMaskTokens * x_stride, x_stride, tokens - kMaskTokens,
             out + first + kMaskTokens * stride, stride);
  }
}

}  // namespace

void dots(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
          int64_t x_stride, int64_t tokens, float* out, int64_t stride, const void* then) {
  with_type<false>(type, weights, [&](const auto* w) __attribute__((always_inline)) {
    dots_of(type, w, rows, count, d, x, x_stride, tokens, out, stride, static_cast<decltype(w)>(then));
  });
}

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
