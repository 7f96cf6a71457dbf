// The product that several tokens take with shared rows: see `multiply` in row_kernels.h. Compiled once per instruction
// set: see vectors.h.
//
// TILE tokens x a panel of columns are summed in registers over all rows. Up to TILE tokens read the rows where they
// lie, at memory's speed. For more the rows' piece is copied together as panels of float32, so that narrow types are
// widened once and all tokens find it in the caches.
#include "float_rows.h"

#include <string.h>

#include "dispatch.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

constexpr int TILE = 6;                        // tokens
constexpr int REGS = REGISTERS == 32 ? 4 : 2;  // of a tile's columns: 6 x 4 sums in 32 registers, 6 x 2 in 16
constexpr int PANEL = REGS * WIDTH;            // columns
constexpr int STRETCH = 64;                    // columns that are fetched at a time
constexpr int64_t AHEAD = 32;                  // rows
static_assert(kMultiplyWidth % STRETCH == 0 && STRETCH % PANEL == 0, "scratch holds whole panels");

// A column range of some rows
template <class W>
struct Piece {
  const W* base;  // column 0 of the range in row 0
  const int32_t* rows;
  int64_t count;
  const W* row(int64_t k, int64_t d) const { return base + rows[k] * d; }
};

// Rows of float32 that lie together
struct Packed {
  const float* base;
  const float* row(int64_t k, int64_t) const { return base + k * PANEL; }
};

inline void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// y[t * y_stride + c] += panel^T z for T tokens and `width` <= PANEL columns; fetched(k) runs before row k is read.
template <int T, class Rows, class Fetch>
inline void tile(const Rows& panel, int64_t count, int64_t d, const float* z, int64_t z_stride, float* y,
                 int64_t y_stride, int64_t width, const Fetch& fetched) {
  reg sum[T][REGS];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < REGS; ++v) sum[t][v] = reg{};
  for (int64_t k = 0; k < count; ++k) {
    fetched(k);
    const auto* row = panel.row(k, d);
    reg w[REGS];
#pragma GCC unroll 4
    for (int v = 0; v < REGS; ++v) w[v] = load_part(row + v * WIDTH);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const reg s = splat(z[t * z_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < REGS; ++v) sum[t][v] = fma(s, w[v], sum[t][v]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    float* out = y + t * y_stride;
    if (width == PANEL) {
#pragma GCC unroll 4
      for (int v = 0; v < REGS; ++v) {
        const reg total = load_part(out + v * WIDTH) + sum[t][v];
        memcpy(out + v * WIDTH, &total, sizeof total);
      }
    } else {
      float totals[PANEL];
      memcpy(totals, sum[t], sizeof totals);
      for (int64_t c = 0; c < width; ++c) out[c] += totals[c];
    }
  }
}

template <class Rows, class Fetch>
void tile_of(int64_t tokens, const Rows& panel, int64_t count, int64_t d, const float* z, int64_t z_stride, float* y,
             int64_t y_stride, int64_t width, const Fetch& fetched) {
  with_size<TILE>(tokens, [&](auto size) __attribute__((always_inline)) {
    tile<size.value>(panel, count, d, z, z_stride, y, y_stride, width, fetched);
  });
}

template <class W>
void pack(const Piece<W>& piece, int64_t d, int64_t width, float* out) {
  constexpr int64_t NEAR = 8;  // rows: what an earlier call has fetched is at hand
  for (int64_t k = 0; k < piece.count; ++k) {
    const W* row = piece.row(k, d);
    if (k + NEAR < piece.count) fetch(piece.row(k + NEAR, d), width * static_cast<int64_t>(sizeof(W)));
    for (int64_t c = 0; c < width; c += LANES) {
      const vec wide = width - c < LANES ? load_tail(row + c, width - c) : load(row + c);
      for (int i = 0; i < PARTS; ++i) {
        const int64_t column = c + i * WIDTH;
        memcpy(out + (column / PANEL * piece.count + k) * PANEL + column % PANEL, &wide.part[i], sizeof(reg));
      }
    }
  }
}

// Whole panels for at most TILE tokens, straight from the rows; gives back the columns done. While a stretch of columns
// is read, AHEAD rows later are fetched, at its end the next stretch's first ones, at the last one's the first stretch
// of `then`.
template <class W>
int64_t multiply_few(const Piece<W>& piece, const Piece<W>& then, int64_t d, int64_t width, const float* z,
                     int64_t z_stride, int64_t tokens, float* y, int64_t y_stride) {
  const int64_t whole = width / PANEL * PANEL;
  for (int64_t c = 0; c < whole; c += PANEL) {
    const Piece<W> panel{piece.base + c, piece.rows, piece.count};
    const bool first = c % STRETCH == 0, last = c + STRETCH >= width;
    const Piece<W> later{last ? then.base : panel.base + STRETCH, last ? then.rows : panel.rows,
                         last ? then.count : panel.count};
    const auto fetched = [&](int64_t k) __attribute__((always_inline)) {
      if (!first) return;
      constexpr int64_t bytes = STRETCH * sizeof(W);
      if (k + AHEAD < panel.count)
        fetch(panel.row(k + AHEAD, d), bytes);
      else if (k + AHEAD - panel.count < later.count)
        fetch(later.row(k + AHEAD - panel.count, d), bytes);
    };
    tile_of(tokens, panel, piece.count, d, z, z_stride, y + c, y_stride, PANEL, fetched);
  }
  return whole;
}

// The same for any number of tokens and any width, by way of packed panels. Every tile fetches its share of `then`.
template <class W>
void multiply_many(const Piece<W>& piece, const Piece<W>& then, int64_t d, int64_t width, const float* z,
                   int64_t z_stride, int64_t tokens, float* y, int64_t y_stride, float* scratch) {
  pack(piece, d, width, scratch);
  const int64_t tiles = tile_count<int64_t>(tokens, TILE), panels = (width + PANEL - 1) / PANEL;
  const int64_t lines = (width * static_cast<int64_t>(sizeof(W)) + LINE - 1) / LINE;
  const int64_t share = (lines + tiles * panels - 1) / (tiles * panels);
  int64_t line = 0;
  for (int64_t c = 0; c < width; c += PANEL) {
    const Packed panel{scratch + c * piece.count};
    each_tile(tokens, tiles, [&](int64_t t, int64_t size) __attribute__((always_inline)) {
      const int64_t bytes = (lines - line < share ? lines - line : share) * LINE;
      const auto fetched = [&](int64_t k) __attribute__((always_inline)) {
        if (k < then.count && bytes > 0) fetch(reinterpret_cast<const char*>(then.row(k, d)) + line * LINE, bytes);
      };
      tile_of(size, panel, piece.count, d, z + t * z_stride, z_stride, y + t * y_stride + c, y_stride,
              width - c < PANEL ? width - c : PANEL, fetched);
      line += share;
    });
  }
}

template <class W>
void multiply_of(const W* weights, const int32_t* rows, int64_t count, const int32_t* then, int64_t then_count,
                 int64_t d, int64_t width, const float* z, int64_t z_stride, int64_t tokens, float* y, int64_t y_stride,
                 float* scratch) {
  const Piece<W> piece{weights, rows, count}, later{weights, then, then ? then_count : 0};
  const int64_t done = tokens <= TILE ? multiply_few(piece, later, d, width, z, z_stride, tokens, y, y_stride) : 0;
  if (done == width) return;
  const Piece<W> rest{weights + done, rows, count}, later_rest{weights + done, then, later.count};
  multiply_many(rest, later_rest, d, width - done, z, z_stride, tokens, y + done, y_stride, scratch);
}

}  // namespace

void multiply(int type, const void* weights, const int32_t* rows, int64_t count, const int32_t* then,
              int64_t then_count, int64_t d, int64_t first, int64_t width, const float* z, int64_t z_stride,
              int64_t tokens, float* y, int64_t y_stride, float* scratch) {
  with_type<true>(type, weights, [&](const auto* w) __attribute__((always_inline)) {
    multiply_of(w + first, rows, count, then, then_count, d, width, z, z_stride, tokens, y, y_stride, scratch);
  });
}

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
