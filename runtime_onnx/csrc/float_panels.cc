// The product that many tokens take with shared rows: see `multiply` in row_kernels.h. Compiled once per instruction set: see vectors.h.
//
// The rows' piece is copied together as panels [rows, PANEL columns] of float32, so that narrow types are widened once and every token finds the
// panel in the caches; then TILE tokens x one panel are summed in registers over all rows.
#include "row_kernels.h"

#include <string.h>

#include "ort_abi.h"
#include "vectors.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {

void multiply(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, int64_t first, int64_t width, const float* z, int64_t z_stride,
              int64_t tokens, float* y, int64_t y_stride, float* scratch);

namespace {

constexpr int TILE = 6;                                  // tokens
constexpr int REGS = REGISTERS == 32 ? 4 : 2;            // of a tile's columns: 6 x 4 sums in 32 registers, 6 x 2 in 16
constexpr int PANEL = REGS * WIDTH;                      // columns
constexpr int PACKED = PANEL > LANES ? PANEL : LANES;    // columns of a stretch that is packed at a time
static_assert(kMultiplyWidth % PACKED == 0, "scratch holds whole panels");

// What the next call reads, to be fetched while this one computes: `lines` cache lines of each row.
struct Ahead {
  const char* base;  // nullptr: nothing
  int64_t row_bytes;
  const int32_t* rows;
  int lines;
};

template <class W>
void pack(const W* weights, const int32_t* rows, int64_t count, int64_t d, int64_t width, float* out) {
  constexpr int64_t AHEAD = 8;  // rows
  for (int64_t k = 0; k < count; ++k) {
    const W* row = weights + rows[k] * d;
    const char* later = reinterpret_cast<const char*>(weights + rows[k + AHEAD < count ? k + AHEAD : count - 1] * d);
    for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(W)); i += LINE) __builtin_prefetch(later + i);
    for (int64_t c = 0; c < width; c += LANES) {
      const vec wide = width - c < LANES ? load_tail(row + c, width - c) : load(row + c);
      for (int i = 0; i < PARTS; ++i) {
        const int64_t column = c + i * WIDTH;
        memcpy(out + (column / PANEL * count + k) * PANEL + column % PANEL, &wide.part[i], sizeof(reg));
      }
    }
  }
}

// y[t * y_stride + c] += panel^T z for T tokens and `width` <= PANEL columns
template <int T>
void tile(const float* panel, int64_t count, const float* z, int64_t z_stride, float* y, int64_t y_stride, int64_t width, const Ahead& ahead) {
  reg sum[T][REGS];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < REGS; ++v) sum[t][v] = reg{};
  for (int64_t k = 0; k < count; ++k) {
    if (ahead.base)
      for (int i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.base + ahead.rows[k] * ahead.row_bytes + i * LINE, 0, 2);
    reg w[REGS];
#pragma GCC unroll 4
    for (int v = 0; v < REGS; ++v) w[v] = unaligned<reg>(panel + k * PANEL + v * WIDTH);
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
        const reg total = unaligned<reg>(out + v * WIDTH) + sum[t][v];
        memcpy(out + v * WIDTH, &total, sizeof total);
      }
    } else {
      float totals[PANEL];
      memcpy(totals, sum[t], sizeof totals);
      for (int64_t c = 0; c < width; ++c) out[c] += totals[c];
    }
  }
}

template <class W>
void multiply_of(const W* weights, const int32_t* rows, int64_t count, int64_t d, int64_t width, int64_t left, const float* z, int64_t z_stride, int64_t tokens,
                 float* y, int64_t y_stride, float* scratch) {
  pack(weights, rows, count, d, width, scratch);
  const int64_t tiles = (tokens + TILE - 1) / TILE;
  const int64_t next_bytes = (left < width ? left : width) * static_cast<int64_t>(sizeof(W));  // of each row, for the next call
  const int64_t panels = (width + PANEL - 1) / PANEL, share = (next_bytes + panels - 1) / panels;
  for (int64_t c = 0; c < width; c += PANEL) {
    const int64_t lines = (share + LINE - 1) / LINE, per_tile = (lines + tiles - 1) / tiles;
    int64_t fetched = 0, t = 0;
    for (int64_t i = tiles; i > 0; --i) {
      const int64_t size = (tokens - t + i - 1) / i;  // even tiles: 8 tokens are 4 and 4, not 6 and 2
      Ahead ahead{nullptr, d * static_cast<int64_t>(sizeof(W)), rows, static_cast<int>(per_tile)};
      if (fetched < lines && next_bytes) ahead.base = reinterpret_cast<const char*>(weights + width) + c / PANEL * share + fetched * LINE;
      fetched += per_tile;
      const float* panel = scratch + c * count;
      const int64_t columns = width - c < PANEL ? width - c : PANEL;
      switch (size) {
#define SPARSEGATE_TILE(n)                                                                               \
  case n:                                                                                                \
    tile<n>(panel, count, z + t * z_stride, z_stride, y + t * y_stride + c, y_stride, columns, ahead); \
    break;
        SPARSEGATE_TILE(1)
        SPARSEGATE_TILE(2)
        SPARSEGATE_TILE(3)
        SPARSEGATE_TILE(4)
        SPARSEGATE_TILE(5)
        SPARSEGATE_TILE(6)
#undef SPARSEGATE_TILE
        default:
          break;
      }
      t += size;
    }
  }
}

}  // namespace

void multiply(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, int64_t first, int64_t width, const float* z, int64_t z_stride,
              int64_t tokens, float* y, int64_t y_stride, float* scratch) {
  switch (type) {
#define SPARSEGATE_TYPE(id, W) \
  case id:                     \
    return multiply_of(static_cast<const W*>(weights) + first, rows, count, d, width, d - first - width, z, z_stride, tokens, y, y_stride, scratch);
    SPARSEGATE_TYPE(ort::kFloat32, float)
    SPARSEGATE_TYPE(ort::kFloat16, half)
    SPARSEGATE_TYPE(ort::kBfloat16, bfloat)
    SPARSEGATE_TYPE(ort::kInt8, int8_t)
#undef SPARSEGATE_TYPE
    default:
      break;
  }
}

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
