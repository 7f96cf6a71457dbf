// Products of rows with the tokens that keep them: see `dots_kept` in row_kernels.h. Compiled once per instruction set:
// see vectors.h.
//
// A group of tokens stays in the first-level cache while a block of rows passes, each row for TILE of its tokens at a
// time: every sum has its 16 lanes in registers, and x is read straight into the multiplications. A load a
// multiplication is the price of leaving the others out. The first group reads rows in their order, as memory likes it;
// for the others rows go by falling numbers of tokens, so that the processor foresees which tile is next.
#include "float_rows.h"

#include <string.h>

#include "dispatch.h"
#include "kept_order.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

constexpr int FITS = (REGISTERS - 4) / PARTS;
constexpr int TILE = FITS > 8 ? 8 : FITS;   // tokens
constexpr int64_t NEAR_BYTES = 20 << 10;    // of x, for all tokens of a group
constexpr int64_t BLOCK_BYTES = 256 << 10;  // of a block of rows

// rows that are fetched ahead, where no earlier pass has fetched them
constexpr int64_t AHEAD = 8;

// One cut of one row for T tokens: `sum` holds what the cuts before gave. `far`, if any, is fetched.
template <class W, int T, bool FETCH>
inline void add_cut(const W* row, const W* far, const float* const* x, const Cut& cut, reg (*sum)[PARTS],
                    float* const* out) {
  // columns: of a line, and of a turn, whose turns the processor can count
  constexpr int STEP = LINE / static_cast<int>(sizeof(W)), STEPS = 64;
  reg acc[T][PARTS];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) acc[t][p] = cut.first ? reg{} : sum[t][p];
  const auto step = [&](int64_t j) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) {
      const reg w = load_part(row + j + p * WIDTH);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[t][p] = fma(w, load_part(x[t] + j + p * WIDTH), acc[t][p]);
    }
  };
  int64_t j = 0;
  for (; j + STEPS <= cut.whole; j += STEPS) {
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; k += LANES) {
      if (FETCH && k % STEP == 0) __builtin_prefetch(far + j + k, 0, 2);
      step(j + k);
    }
  }
  for (; j < cut.whole; j += LANES) step(j);
  if (cut.left) {
    const vec w = load_tail(row + j, cut.left);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const vec q = load_tail(x[t] + j, cut.left);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) acc[t][p] = fma(w.part[p], q.part[p], acc[t][p]);
    }
  }
  if (!cut.last) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) sum[t][p] = acc[t][p];
    return;
  }
  const auto lanes = [&](int t) __attribute__((always_inline)) {
    vec sums_of_t;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) sums_of_t.part[p] = acc[t][p];
    return sums_of_t;
  };
  store_sums<T>(lanes, out);
}

template <class W, bool FETCH>
inline void add_cut_of(int n, const W* row, const W* far, const float* const* x, const Cut& cut, reg (*sum)[PARTS],
                       float* const* out) {
  with_size<TILE>(
      n, [&](auto size) __attribute__((always_inline)) { add_cut<W, size.value, FETCH>(row, far, x, cut, sum, out); });
}

template <class W>
void dots_of(const W* weights, const int32_t* rows, int64_t count, int64_t d, const float* x, int64_t x_stride,
             int64_t tokens, const uint16_t* masks, float* out, int64_t stride, const W* then) {
  const auto row_of = [&](const W* base, int64_t k) { return base + (rows ? rows[k] : k) * d; };
  int64_t block = BLOCK_BYTES / (d * static_cast<int64_t>(sizeof(W)));
  block = block < 4 ? 4 : block > kOrderRows ? kOrderRows : block;
  const int64_t group = tokens < kMaskTokens ? tokens : kMaskTokens;
  const int64_t fits = NEAR_BYTES / (group * static_cast<int64_t>(sizeof(float)));
  const int64_t depth = cut_depth(d, fits);
  alignas(LINE) reg sum[kOrderRows][kMaskTokens][PARTS];
  Order order;
  for (int64_t first = 0; first < count; first += block) {
    const int64_t size = count - first < block ? count - first : block;
    const bool last = first + block >= count;
    for (int64_t t0 = 0; t0 < tokens; t0 += kMaskTokens) {
      // memory decides: the first group reads rows in their order and fetches those ahead
      const bool streams = t0 == 0;
      sort(masks + t0 / kMaskTokens * count + first, size, streams, order);
      for (int64_t begin = 0; begin < d; begin += depth) {
        const Cut cut = cut_at(begin, depth, d);
        for (int i = 0; i < order.count; ++i) {
          const int64_t k = first + order.rows[i];
          const W *row = row_of(weights, k) + begin, *far = nullptr;
          const int64_t ahead = i + AHEAD, later = ahead - order.count;  // `later`: in what comes after the block
          if (streams && later < 0)
            far = row_of(weights, first + order.rows[ahead]) + begin;
          else if (streams && !last)
            far = row_of(weights, first + block + later < count ? first + block + later : k) + begin;
          else if (streams)
            far = then && later < count ? row_of(then, later) + begin : nullptr;
          const int n = order.sizes[i];
          each_tile(n, tile_count(n, TILE), [&](int done, int now) __attribute__((always_inline)) {
            const float* from[TILE];
            float* to[TILE];
            for (int t = 0; t < now; ++t) {
              const int64_t token = t0 + order.tokens[i][done + t];
              from[t] = x + token * x_stride + begin;
              to[t] = out + token * stride + k;
            }
            if (far && !done)
              add_cut_of<W, true>(now, row, far, from, cut, sum[i] + done, to);
            else
              add_cut_of<W, false>(now, row, far, from, cut, sum[i] + done, to);
          });
        }
      }
    }
  }
}

constexpr int PANEL_REGS = static_cast<int>(kPanel) / WIDTH;
// of a panel's columns in registers at a time
constexpr int HELD = PANEL_REGS > REGISTERS / 2 ? REGISTERS / 2 : PANEL_REGS;

// The sum of the entries' rows of a panel, HELD * WIDTH columns of it, added to `to`; fetched(i) runs before entry i
template <class Fetch>
inline void add_own(const uint16_t* entry, const float* scale, int64_t count, const float* panel, float* to,
                    int64_t width, const Fetch& fetched) {
  reg sum[HELD];
#pragma GCC unroll 16
  for (int v = 0; v < HELD; ++v) sum[v] = reg{};
  for (int64_t i = 0; i < count; ++i) {
    fetched(i);
    const float* row = panel + entry[i] * kPanel;
    const reg s = splat(scale[i]);
#pragma GCC unroll 16
    for (int v = 0; v < HELD; ++v) sum[v] = fma(s, load_part(row + v * WIDTH), sum[v]);
  }
  if (width == HELD * WIDTH) {
#pragma GCC unroll 16
    for (int v = 0; v < HELD; ++v) {
      const reg total = load_part(to + v * WIDTH) + sum[v];
      memcpy(to + v * WIDTH, &total, sizeof total);
    }
  } else {
    float totals[HELD * WIDTH];
    memcpy(totals, sum, sizeof totals);
    for (int64_t c = 0; c < width; ++c) to[c] += totals[c];
  }
}

// A panel of columns of some rows
template <class W>
struct Piece {
  const W* base;
  const int32_t* rows;
  int64_t count, columns;

  void fetch(int64_t k, int64_t d) const {
    const W* row = base + rows[k] * d;
    for (int64_t i = 0; i < columns; i += LINE / static_cast<int64_t>(sizeof(W))) __builtin_prefetch(row + i, 0, 2);
  }
};

template <class W>
void multiply_panel(const Piece<W>& piece, const Piece<W>& then, int64_t d, const OwnRows& own, int64_t tokens,
                    float* y, int64_t y_stride, float* panel) {
  for (int64_t k = 0; k < piece.count; ++k) {
    if (k + AHEAD < piece.count) piece.fetch(k + AHEAD, d);
    const W* row = piece.base + piece.rows[k] * d;
    for (int64_t i = 0; i < piece.columns; i += LANES)
      store(panel + k * kPanel + i, piece.columns - i < LANES ? load_tail(row + i, piece.columns - i) : load(row + i));
  }
  const int64_t share = (then.count + tokens - 1) / tokens;  // rows to come that each token's sum fetches
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t v = 0; v < piece.columns; v += HELD * WIDTH) {
      const int64_t begin = t * share;
      const int64_t left = v || begin >= then.count ? 0 : then.count - begin < share ? then.count - begin : share;
      const auto fetched = [&](int64_t i) __attribute__((always_inline)) {
        if (i < left) then.fetch(begin + i, d);
      };
      const int64_t width = piece.columns - v;
      add_own(own.entries + t * own.stride, own.scales + t * own.stride, own.counts[t], panel + v, y + t * y_stride + v,
              width < HELD * WIDTH ? width : HELD * WIDTH, fetched);
    }
}

template <class W>
void multiply_of(const W* weights, const int32_t* rows, int64_t count, const int32_t* then, int64_t then_count,
                 int64_t d, int64_t width, const OwnRows& own, int64_t tokens, float* y, int64_t y_stride,
                 float* panel) {
  const auto panel_of = [&](int64_t c, const int32_t* listed, int64_t size) {
    return Piece<W>{weights + c, listed, size, width - c < kPanel ? width - c : kPanel};
  };
  for (int64_t c = 0; c < width; c += kPanel) {
    const bool last = c + kPanel >= width;
    multiply_panel(panel_of(c, rows, count),
                   last ? panel_of(0, then, then ? then_count : 0) : panel_of(c + kPanel, rows, count), d, own, tokens,
                   y + c, y_stride, panel);
  }
}

}  // namespace

void multiply_kept(int type, const void* weights, const int32_t* rows, int64_t count, const int32_t* then,
                   int64_t then_count, int64_t d, int64_t first, int64_t width, const OwnRows& own, int64_t tokens,
                   float* y, int64_t y_stride, float* scratch) {
  with_type<true>(type, weights, [&](const auto* w) __attribute__((always_inline)) {
    multiply_of(w + first, rows, count, then, then_count, d, width, own, tokens, y, y_stride, scratch);
  });
}

void dots_kept(int type, const void* weights, const int32_t* rows, int64_t count, int64_t d, const float* x,
               int64_t x_stride, int64_t tokens, const uint16_t* masks, float* out, int64_t stride, const void* then) {
  with_type<false>(type, weights, [&](const auto* w) __attribute__((always_inline)) {
    dots_of(w, rows, count, d, x, x_stride, tokens, masks, out, stride, static_cast<decltype(w)>(then));
  });
}

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
