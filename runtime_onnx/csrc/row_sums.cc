// See row_sums.h.
#include "row_sums.h"

namespace sparsegate {
namespace {

bool finite(const float* v, int64_t count) {
  uint32_t bits, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(&bits, v + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest < 0x7f800000u;
}

}  // namespace

void RowSums::lay(Cut& cut) {
  rows = cut.take<int32_t>(n);
  counts = cut.take<int32_t>(blocks);
  if (format != Weights::kInt8Row) z = cut.take<float>(blocks * pass * block);
  if (format == Weights::kFloat && shared)
    entries = cut.take<uint16_t>(blocks * pass * block), own_counts = cut.take<int32_t>(blocks * pass);
  if (format == Weights::kFloat) return;
  segments = cut.take<int32_t>(blocks);
  quads = {cut.take<int32_t>(blocks * quad_rows(block)), cut.take<int32_t>(segment_stride()),
           cut.take<int32_t>(segment_stride())};
  if (format == Weights::kInt4G32) return;
  q = cut.take<int32_t>(pass * blocks * quad_rows(block) / 4);
  step = cut.take<float>(pass * segment_stride());
  offset = cut.take<int32_t>(pass * segment_stride());
}

bool RowSums::take_own(int64_t index, const float* factors, int64_t count, int64_t tokens) {
  int64_t kept = 0;
  for (int64_t i = 0; i < tokens * count; ++i) kept += factors[i] != 0.f;
  int32_t* counts_of = own_counts + index * pass;
  counts_of[0] = -1;
  if (static_cast<float>(kept) > kernels->most_kept * static_cast<float>(tokens * count)) return false;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* mine = factors + t * count;
    uint16_t* entry = entries + (index * pass + t) * block;
    float* scale = z + (index * pass + t) * block;
    int32_t found = 0;
    for (int64_t k = 0; k < count; ++k) {  // no branch: half of them would be guessed wrong
      entry[found] = static_cast<uint16_t>(k);
      scale[found] = mine[k];
      found += mine[k] != 0.f;
    }
    counts_of[t] = found;
  }
  return true;
}

void RowSums::take(int64_t index, const int32_t* own, const int32_t* places, const float* factors, int64_t count,
                   int64_t tokens) {
  const int64_t first = index * block;
  counts[index] = static_cast<int32_t>(count);
  std::memcpy(rows + first, places, static_cast<size_t>(count) * sizeof(int32_t));
  if (own_counts && take_own(index, factors, count, tokens)) return;
  if (z)
    for (int64_t t = 0; t < tokens; ++t)
      std::memcpy(z + (index * pass + t) * block, factors + t * count, static_cast<size_t>(count) * sizeof(float));
  if (format == Weights::kFloat) return;
  const int64_t s = index * quad_segments(block), at = index * quad_rows(block);
  const Quads found = make_quads(own, places, count, {quads.rows + at, quads.segments + s, quads.filled + s});
  segments[index] = static_cast<int32_t>(found.count);
  if (format == Weights::kInt4G32) return;  // their factors depend on the columns
  const int64_t q_stride = blocks * quad_rows(block) / 4, s_stride = segment_stride();
  for (int64_t t = 0; t < tokens; ++t)
    integers->factors(false, found, factors + t * count, nullptr, d, 0, 1, q + t * q_stride + at / 4,
                      step + t * s_stride + s, offset + t * s_stride + s);
}

bool RowSums::sum(int64_t first, int64_t width, int64_t tokens, const float* bias, float* y, int64_t y_stride) const {
  for (int64_t t = 0; t < tokens; ++t) start(y + t * y_stride, bias, first, width);
  return format == Weights::kFloat ? sum_float(first, width, tokens, bias, y, y_stride)
                                   : sum_integer(first, width, tokens, y, y_stride);
}

bool RowSums::sum_float(int64_t first, int64_t width, int64_t tokens, const float* bias, float* y,
                        int64_t y_stride) const {
  float *panel = nullptr, *scale = nullptr, *sums = nullptr;
  int32_t* list = nullptr;
  const auto lay = [&](Cut& cut) {
    panel = cut.take<float>(shared ? block * kMultiplyWidth : 0), sums = cut.take<float>(width);
    scale = cut.take<float>(block + 1), list = cut.take<int32_t>(block + 1);
  };
  if (!task_arena.lay_out(lay)) return false;
  const auto is_own = [&](int64_t b) { return own_counts && own_counts[b * pass] >= 0; };
  // one token's strip with its own rows only
  const auto alone = [&](int64_t t) {
    for (int64_t b = 0; b < blocks; ++b) {
      const float* factors = z + (b * pass + t) * block;
      int64_t count = 0;
      if (is_own(b)) {
        const uint16_t* entry = entries + (b * pass + t) * block;
        for (count = 0; count < own_counts[b * pass + t]; ++count)
          list[count] = rows[b * block + entry[count]], scale[count] = factors[count];
      } else {
        count = own_rows(rows + b * block, factors, counts[b], list, scale);
      }
      if (!count) continue;
      std::memset(sums, 0, static_cast<size_t>(width) * sizeof(float));
      kernels->accumulate(type, weights, list, scale, count, d, first, width, sums);
      add(y + t * y_stride, sums, width);
    }
  };
  if (!shared) {
    for (int64_t t = 0; t < tokens; ++t) alone(t);
    return true;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    if (!counts[b]) continue;
    const int32_t* then = b + 1 < blocks ? rows + (b + 1) * block : nullptr;
    const int64_t then_count = then ? counts[b + 1] : 0;
    if (is_own(b))
      kernels->multiply_kept(type, weights, rows + b * block, counts[b], then, then_count, d, first, width,
                             own_rows_of(b), tokens, y, y_stride, panel);
    else
      kernels->multiply(type, weights, rows + b * block, counts[b], then, then_count, d, first, width,
                        z + b * pass * block, block, tokens, y, y_stride, panel);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (finite(y + t * y_stride, width)) continue;
    // another token's row may hold NaN or infinity, and 0 times these is NaN
    start(y + t * y_stride, bias, first, width);
    alone(t);
  }
  return true;
}

bool RowSums::sum_integer(int64_t first, int64_t width, int64_t tokens, float* y, int64_t y_stride) const {
  const bool int4 = format == Weights::kInt4G32;
  const int64_t columns = padded_columns(int4, width), groups = int4 ? columns / kGroup : 1;
  const int64_t quads_most = quad_rows(block) / 4, segments_most = quad_segments(block);
  float *folded = nullptr, *sums = nullptr, *own_step = nullptr;
  int32_t *own_q = nullptr, *own_offset = nullptr;
  char* panel = nullptr;
  const auto lay = [&](Cut& cut) {
    folded = cut.take<float>(tokens * columns);
    sums = cut.take<float>(tokens * columns);
    panel = cut.take<char>(sum_panel_bytes(quads_most));
    own_q = cut.take<int32_t>(int4 ? tokens * quads_most * groups : 0);
    own_offset = cut.take<int32_t>(int4 ? tokens * segments_most * groups : 0);
    own_step = cut.take<float>(int4 ? tokens * segments_most * groups : 0);
  };
  if (!task_arena.lay_out(lay)) return false;
  std::memset(folded, 0, static_cast<size_t>(tokens * columns) * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b) {
    if (!counts[b]) continue;
    const int64_t s = b * segments_most, at = b * quad_rows(block);
    const Quads found{quads.rows + at, quads.segments + s, quads.filled + s, segments[b]};
    const int32_t *mine = q + at / 4, *offsets = offset + s;
    const float* steps = step + s;
    int64_t q_stride = blocks * quads_most, s_stride = segment_stride();
    if (int4) {
      mine = own_q, offsets = own_offset, steps = own_step;
      q_stride = quads_most * groups, s_stride = segments_most * groups;
      for (int64_t t = 0; t < tokens; ++t)
        integers->factors(true, found, z + (b * pass + t) * block, static_cast<const uint16_t*>(scales), d,
                          first / kGroup, groups, own_q + t * q_stride, own_step + t * s_stride,
                          own_offset + t * s_stride);
    }
    std::memset(sums, 0, static_cast<size_t>(tokens * columns) * sizeof(float));
    integers->sum(int4, weights, d, found, first, width, mine, q_stride, steps, offsets, s_stride, tokens, sums,
                  columns, shared ? panel : nullptr);
    add(folded, sums, tokens * columns);
  }
  for (int64_t t = 0; t < tokens; ++t) integers->unfold(int4, folded + t * columns, width, y + t * y_stride);
  return true;
}

}  // namespace sparsegate
