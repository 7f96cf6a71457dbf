// The sums of rows of w_down of GatedMLP on the CPU; see gated_mlp_run.h.
//
// A column's sum starts at b_down and takes one sum per block, in rising order, then the residual's. Within a block
// rows are added one by one in rising order (float weights), or segment by segment (integers). So few and many tokens
// give the same bits.
#include <cmath>
#include <cstring>

#include "gated_mlp_run.h"

namespace sparsegate::gated_mlp {
namespace {

constexpr int64_t kStripBytes = 256 << 10;  // rows of w_down that several tokens share stay in the second-level cache

// The residual res^T hidden of every token in the columns [first, first + width): sums + t * stride gets it where there
// is any, then done(t, whether there is any) runs. false: out of memory.
template <class Done>
bool residual(const Run& run, int64_t first, int64_t width, float* sums, int64_t stride, const Done& done) {
  const int64_t r = run.shape.r;
  int32_t *rows = nullptr, *all = nullptr;
  float* scale = nullptr;
  const auto lay = [&](Cut& cut) {
    rows = cut.take<int32_t>(r + 1);
    all = cut.take<int32_t>(r);
    scale = cut.take<float>(r + 1);
  };
  if (!task_arena.lay_out(lay)) return false;
  const Tensor& res = run.at(kRes);
  for (int64_t k = 0; k < r; ++k) all[k] = static_cast<int32_t>(k);
  for (int64_t t = 0; t < run.tokens; ++t) {
    const int64_t count = own_rows(all, run.hidden + t * r, r, rows, scale);
    if (count) {
      std::memset(sums + t * stride, 0, static_cast<size_t>(width) * sizeof(float));
      run.kernels->accumulate(res.type, res.data, rows, scale, count, run.shape.d, first, width, sums + t * stride);
    }
    done(t, count > 0);
  }
  return true;
}

bool float_block(const Run& run, const Neurons& neurons, uint8_t* used, float* partial) {
  const int64_t d = run.shape.d, tokens = run.tokens, count = neurons.count;
  int32_t *list = nullptr, *counts = nullptr;
  float* scale = nullptr;
  const auto lay = [&](Cut& cut) {
    list = cut.take<int32_t>(tokens * count + 1);
    scale = cut.take<float>(tokens * count + 1);
    counts = cut.take<int32_t>(tokens);
  };
  if (!sum_arena.lay_out(lay)) return false;
  for (int64_t t = 0; t < tokens; ++t) {
    counts[t] = static_cast<int32_t>(
        own_rows(neurons.places, neurons.z + t * count, count, list + t * count, scale + t * count));
    used[t] = counts[t] > 0;
    if (used[t]) std::memset(partial + t * d, 0, static_cast<size_t>(d) * sizeof(float));
  }
  const Tensor& down = run.at(kWDown);
  const int64_t fits = kStripBytes / std::max<int64_t>(1, count * bytes_of(down.type)) / kPanel * kPanel;
  const int64_t strip = tokens == 1 ? d : std::min(d, std::max(2 * kPanel, fits));
  for (int64_t c = 0; c < d; c += strip)
    for (int64_t t = 0; t < tokens; ++t)
      if (used[t])
        run.kernels->accumulate(down.type, down.data, list + t * count, scale + t * count, counts[t], d, c,
                                std::min(strip, d - c), partial + t * d + c);
  return true;
}

// Factors of integer rows for some tokens
struct Scaled {
  int32_t *q, *offset;
  float* step;
};

bool integer_block(const Run& run, const Neurons& neurons, uint8_t* used, float* partial) {
  const int64_t d = run.shape.d, tokens = run.tokens, count = neurons.count;
  const int64_t groups = run.int4() ? run.columns / kGroup : 1, quads_most = quad_rows(run.block) / 4;
  const int64_t segments_most = quad_segments(run.block);
  // each token with its own rows, where tokens share no work
  const bool alone = tokens == 1 || run.integers->sum_tokens == 1;
  const int64_t together = alone ? 1 : tokens;
  QuadSpace space{};
  Scaled scaled{};
  int32_t *rows = nullptr, *places = nullptr;
  float* z = nullptr;
  const auto lay = [&](Cut& cut) {
    space = {cut.take<int32_t>(quad_rows(run.block)), cut.take<int32_t>(segments_most),
             cut.take<int32_t>(segments_most)};
    scaled.q = cut.take<int32_t>(together * quads_most * groups);
    scaled.offset = cut.take<int32_t>(together * segments_most * groups);
    scaled.step = cut.take<float>(together * segments_most * groups);
    rows = cut.take<int32_t>(alone ? count : 0);
    places = cut.take<int32_t>(alone ? count : 0);
    z = cut.take<float>(alone ? count : 0);
  };
  if (!sum_arena.lay_out(lay)) return false;
  const int64_t q_stride = quads_most * groups, s_stride = segments_most * groups;
  const auto* scales = static_cast<const uint16_t*>(run.at(kSDown).data);
  const auto add_rows = [&](const Quads& quads, const float* factors, int64_t stride, int64_t n, float* sums) {
    std::memset(sums, 0, static_cast<size_t>(n * run.columns) * sizeof(float));
    for (int64_t t = 0; t < n; ++t)
      run.integers->factors(run.int4(), quads, factors + t * stride, scales, d, 0, groups, scaled.q + t * q_stride,
                            scaled.step + t * s_stride, scaled.offset + t * s_stride);
    run.integers->sum(run.int4(), run.at(kWDown).data, d, quads, 0, d, scaled.q, q_stride, scaled.step, scaled.offset,
                      s_stride, n, sums, run.columns, nullptr);
  };
  if (!alone) {
    std::memset(used, count > 0, static_cast<size_t>(tokens));
    if (count) add_rows(make_quads(neurons.rows, neurons.places, count, space), neurons.z, count, tokens, partial);
    return true;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const float* mine = neurons.z + t * count;
    int64_t own = 0;
    for (int64_t k = 0; k < count; ++k) {
      rows[own] = neurons.rows[k];
      places[own] = neurons.places[k];
      z[own] = mine[k];
      own += mine[k] != 0.f;
    }
    used[t] = own > 0;
    if (own) add_rows(make_quads(rows, places, own, space), z, own, 1, partial + t * run.columns);
  }
  return true;
}

}  // namespace

void block_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t index = static_cast<int64_t>(task);
  uint8_t* used = run.used + index * run.tokens;
  float* partial = run.partial + index * run.tokens * run.columns;
  if (index == run.blocks) {
    const auto mark = [&](int64_t t, bool any) { used[t] = any; };
    if (!residual(run, 0, run.shape.d, partial, run.columns, mark)) run.failed.store(true);
    return;
  }
  Neurons neurons{};
  if (!compute_neurons(run, index, neurons) ||
      !(run.integer() ? integer_block : float_block)(run, neurons, used, partial))
    run.failed.store(true);
}

// y of one token and one strip of columns
void sum_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t d = run.shape.d, strips = (d + run.strip - 1) / run.strip;
  const int64_t t = static_cast<int64_t>(task) / strips, c = static_cast<int64_t>(task) % strips * run.strip;
  const int64_t width = std::min(run.strip, d - c);
  const int64_t columns = std::min(run.strip, run.columns - c);
  float* y = run.y + t * d + c;
  start(y, run.floats(kBDown), c, width);
  alignas(kAlignment) float folded[kFoldedColumns];
  float* sums = run.integer() ? folded : y;
  if (run.integer()) std::memset(folded, 0, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t b = 0; b < run.blocks; ++b)
    if (run.used[b * run.tokens + t])
      add(sums, run.partial + (b * run.tokens + t) * run.columns + c, run.integer() ? columns : width);
  if (run.integer()) run.integers->unfold(run.int4(), folded, width, y);
  if (run.variant->has(kRes) && run.used[run.blocks * run.tokens + t])
    add(y, run.partial + (run.blocks * run.tokens + t) * run.columns + c, width);
}

void factor_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t index = static_cast<int64_t>(task);
  Neurons neurons{};
  if (!compute_neurons(run, index, neurons)) return run.failed.store(true);
  run.sums.take(index, neurons.rows, neurons.places, neurons.z, neurons.count, run.tokens);
}

void strip_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t d = run.shape.d, c = static_cast<int64_t>(task) * run.strip;
  const int64_t width = std::min(run.strip, d - c);
  if (!run.sums.sum(c, width, run.tokens, run.floats(kBDown), run.y + c, d)) return run.failed.store(true);
  if (!run.variant->has(kRes)) return;
  float* sums = nullptr;
  if (!sum_arena.lay_out([&](Cut& cut) { sums = cut.take<float>(width); })) return run.failed.store(true);
  const auto add_residual = [&](int64_t t, bool any) {
    if (any) add(run.y + t * d + c, sums, width);
  };
  if (!residual(run, c, width, sums, 0, add_residual)) run.failed.store(true);
}

}  // namespace sparsegate::gated_mlp
