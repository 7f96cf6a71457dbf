// Scores, selection, gate and up of GatedMLP on the CPU; see gated_mlp_run.h.
#include <cmath>
#include <cstring>

#include "gated_mlp_run.h"

namespace sparsegate::gated_mlp {
namespace {

float relu(float v) { return v < 0.f ? 0.f : v; }  // NaN stays NaN

void activate(const Run& run, Activation activation, float* v, int64_t count) {
  switch (activation) {
    case Activation::kSilu:
      run.swish(v, count, 1.f, 0.f);
      break;
    case Activation::kGelu:
      for (int64_t i = 0; i < count; ++i) v[i] = 0.5f * v[i] * (1.f + std::erf(v[i] * 0.70710678f));
      break;
    case Activation::kGeluTanh:
      run.swish(v, count, 1.5957691f, 0.071354816f);
      break;
    case Activation::kRelu:
    case Activation::kDrelu:
      for (int64_t i = 0; i < count; ++i) v[i] = relu(v[i]);
      break;
    case Activation::kRelu2:
      for (int64_t i = 0; i < count; ++i) v[i] = relu(v[i]) * relu(v[i]);
      break;
    case Activation::kIdentity:
      break;
  }
}

Role scale_of(Role role) {
  switch (role) {
    case kWGate:
      return kSGate;
    case kWUp:
      return kSUp;
    case kP1:
      return kSP1;
    default:
      return kSP2;
  }
}

// Products of the listed (or, without a list, the first `count` from `first` on) rows of a matrix with every token, times the rows' scales, plus `bias`.
void products(const Run& run, Role role, Role bias, int64_t first, const int32_t* rows, int64_t count, float* out, int64_t stride, Role then = kTau) {
  const Tensor& m = run.at(role);
  const bool hidden = role == kP2;
  const int64_t width = hidden ? run.shape.r : run.shape.d, bytes = m.type == ort::kUint8 ? width / 2 : width * bytes_of(m.type);
  const void *weights = static_cast<const char*>(m.data) + first * bytes, *next = then == kTau ? nullptr : run.at(then).data;
  const float* scale = nullptr;
  if (m.type == ort::kUint8) {
    const auto* groups = static_cast<const uint16_t*>(run.at(scale_of(role)).data) + first * (width / kGroup);
    run.integers->dots(true, weights, groups, rows, count, width, run.x4, run.tokens, out, stride, next);
  } else if (m.type == ort::kInt8) {
    run.integers->dots(false, weights, nullptr, rows, count, width, hidden ? run.hidden8 : run.x8, run.tokens, out, stride, next);
    scale = run.floats(scale_of(role));
  } else {
    run.kernels->dots(m.type, weights, rows, count, width, hidden ? run.hidden : run.x, hidden ? width : run.x_stride, run.tokens, out, stride, next);
  }
  const float* shift = bias == kTau ? nullptr : run.floats(bias);
  for (const float* by : {scale, shift}) {
    if (!by) continue;
    constexpr int64_t kMost = 512;  // rows of a block
    float own[kMost];
    const float* values = by + first;
    if (rows) {
      for (int64_t k = 0; k < count; ++k) own[k] = by[rows[k]];
      values = own;
    }
    for (int64_t t = 0; t < run.tokens; ++t) {
      float* row = out + t * stride;
      if (by == scale)
        for (int64_t k = 0; k < count; ++k) row[k] *= values[k];
      else
        for (int64_t k = 0; k < count; ++k) row[k] += values[k];
    }
  }
}

// Asks for memory that is read soon: what is not one long row the hardware does not foresee.
void fetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
}

// The scales of the listed rows of an integer matrix [n, d]
void fetch_scales(const Run& run, Role role, int64_t first, int64_t size, const int32_t* rows, int64_t count) {
  const Tensor& scales = run.at(role);
  if (!scales.data || !run.integer()) return;
  const auto* data = static_cast<const char*>(scales.data);
  if (!run.int4()) return fetch(data + first * 4, size * 4);
  const int64_t bytes = run.shape.d / kGroup * 2;
  for (int64_t k = 0; k < count; ++k) fetch(data + rows[k] * bytes, bytes);
}

}  // namespace

void hidden_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t r = run.shape.r, first = static_cast<int64_t>(task) * run.p1_rows, count = std::min(run.p1_rows, r - first);
  float* out = run.hidden + first;
  products(run, kP1, kTau, first, nullptr, count, out, r);
  for (int64_t t = 0; t < run.tokens; ++t)
    for (int64_t k = 0; k < count; ++k) out[t * r + k] = relu(out[t * r + k]);
}

void round_x_task(void* user, size_t token) {
  const Run& run = *static_cast<Run*>(user);
  const int64_t d = run.shape.d, t = static_cast<int64_t>(token);
  if (run.x8) run.integers->round(false, run.x + t * run.x_stride, d, run.x8 + t * rounded_bytes(false, d));
  if (run.x4) run.integers->round(true, run.x + t * run.x_stride, d, run.x4 + t * rounded_bytes(true, d));
}

void round_hidden(const Run& run) {
  const int64_t r = run.shape.r;
  for (int64_t t = 0; t < run.tokens; ++t) run.integers->round(false, run.hidden + t * r, r, run.hidden8 + t * rounded_bytes(false, r));
}

bool compute_neurons(const Run& run, int64_t index, Neurons& out) {
  const Variant& v = *run.variant;
  const int64_t tokens = run.tokens, first = run.first_of(index), m = run.size_of(index);
  float *score = nullptr, *z = nullptr, *up = nullptr;
  int32_t* rows = nullptr;
  uint8_t *keep = nullptr, *any = nullptr;
  const auto lay = [&](char* base) {
    Cut cut(base);
    score = cut.take<float>(tokens * m);  // scores, or the activated product that score gate computes in full
    z = cut.take<float>(tokens * m);      // [tokens, count]
    up = cut.take<float>(tokens * m);
    rows = cut.take<int32_t>(m);
    keep = cut.take<uint8_t>(tokens * m);
    any = cut.take<uint8_t>(m);
    return cut.used();
  };
  char* base = task_arena.reserve(lay(nullptr));
  if (!base) return false;
  lay(base);

  // 1. scores of the block, and the union of what the tokens keep
  const bool predictor = v.score == Score::kPredictor, full = v.score == Score::kGate || v.score == Score::kExact, plain = v.plain();
  const float* tau = run.floats(kTau);
  if (tau) fetch(tau + first, m * 4);
  if (predictor) {
    if (run.floats(kSP2)) fetch(run.floats(kSP2) + first, m * 4);
    products(run, kP2, kTau, first, nullptr, m, score, m);
  } else if (full) {
    products(run, plain ? kWUp : kWGate, plain ? kBUp : kBGate, first, nullptr, m, score, m);
    activate(run, v.activation, score, tokens * m);
  }
  std::memset(any, v.score == Score::kAll, static_cast<size_t>(m));
  if (v.score == Score::kAll) std::memset(keep, 1, static_cast<size_t>(tokens * m));
  for (int64_t t = 0; t < tokens && v.score != Score::kAll; ++t) {
    const float* s = score + t * m;
    uint8_t* kept = keep + t * m;
    if (v.score == Score::kExact)
      for (int64_t k = 0; k < m; ++k) kept[k] = std::fabs(s[k]) > 0.f;
    else if (predictor)
      for (int64_t k = 0; k < m; ++k) kept[k] = s[k] > tau[first + k];
    else
      for (int64_t k = 0; k < m; ++k) kept[k] = std::fabs(s[k]) > tau[first + k];
    for (int64_t k = 0; k < m; ++k) any[k] |= kept[k];
  }
  int64_t count = 0;
  for (int64_t k = 0; k < m; ++k) {
    rows[count] = static_cast<int32_t>(first + k);
    count += any[k];
  }

  // 2. z [tokens, count] of the union
  if (run.few) {
    if (!full && !plain) fetch_scales(run, kSGate, first, m, rows, std::min<int64_t>(count, 4));
    if (!full || !plain) fetch_scales(run, kSUp, first, m, rows, std::min<int64_t>(count, 4));
    fetch_scales(run, kSDown, first, m, rows, count);
  }
  if (full) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < count; ++k) z[t * count + k] = score[t * m + rows[k] - first];
  } else {
    products(run, plain ? kWUp : kWGate, plain ? kBUp : kBGate, 0, rows, count, z, count, plain ? kWDown : kWUp);
    activate(run, v.activation, z, tokens * count);
  }
  if (!plain) {
    products(run, kWUp, kBUp, 0, rows, count, up, count, kWDown);
    if (v.activation == Activation::kDrelu) activate(run, Activation::kRelu, up, tokens * count);
    for (int64_t i = 0; i < tokens * count; ++i) z[i] *= up[i];
  }
  const float* down = v.weights == Weights::kInt8Row ? run.floats(kSDown) : nullptr;
  for (int64_t t = 0; t < tokens; ++t) {
    const uint8_t* kept = keep + t * m;
    float* own = z + t * count;
    if (count == m && down) {  // all rows, so that the loops can run in vectors; not 0 times the scale, which may be NaN
      for (int64_t k = 0; k < m; ++k) own[k] = kept[k] ? own[k] * down[first + k] : 0.f;
    } else if (count == m) {
      for (int64_t k = 0; k < m; ++k) own[k] = kept[k] ? own[k] : 0.f;
    } else {
      for (int64_t k = 0; k < count; ++k) own[k] = kept[rows[k] - first] ? (down ? own[k] * down[rows[k]] : own[k]) : 0.f;
    }
  }
  out = {rows, z, count};
  return true;
}

}  // namespace sparsegate::gated_mlp
