// Scores, selection, gate and up of GatedMLP on the CPU; see gated_mlp_run.h.
#include <cmath>
#include <cstring>

#include "gated_mlp_run.h"

namespace sparsegate::gated_mlp {
namespace {

float relu(float v) { return v < 0.f ? 0.f : v; }  // NaN stays NaN

void activate(const Run& run, float* v, int64_t count) {
  const float parameter = run.variant->parameter;
  switch (run.variant->activation) {
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
    case Activation::kFatrelu:
      for (int64_t i = 0; i < count; ++i) v[i] = v[i] <= parameter ? 0.f : v[i];
      break;
    case Activation::kShiftedRelu:
      for (int64_t i = 0; i < count; ++i) v[i] = relu(v[i] - parameter);
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

constexpr int64_t kMost = 512;  // rows of a block

// out[t, k] times the scale and plus the bias of row k, where the roles are there
void shift(const Run& run, Role scale, Role bias, int64_t first, const int32_t* rows, int64_t count, float* out,
           int64_t stride) {
  for (Role role : {scale, bias}) {
    const float* by = role == kTau ? nullptr : run.floats(role);
    if (!by) continue;
    float own[kMost];
    const float* values = by + first;
    if (rows) {
      for (int64_t k = 0; k < count; ++k) own[k] = by[rows[k]];
      values = own;
    }
    for (int64_t t = 0; t < run.tokens; ++t) {
      float* row = out + t * stride;
      if (role == scale)
        for (int64_t k = 0; k < count; ++k) row[k] *= values[k];
      else
        for (int64_t k = 0; k < count; ++k) row[k] += values[k];
    }
  }
}

// Products of rows of a matrix with every token, or with those of `masks`, without the scales of int8 rows: rows at
// `places`, or the first `count`. `next`: the matrix whose rows at the same places are read next, if any
void dots(const Run& run, Role role, const void* weights, const int32_t* places, int64_t count, const uint16_t* masks,
          float* out, int64_t stride, const void* next) {
  const int type = run.at(role).type;
  const bool hidden = role == kP2;
  const int64_t width = hidden ? run.shape.r : run.shape.d;
  if (type == ort::kUint8 && masks)
    run.integers->dots_kept(true, weights, static_cast<const uint16_t*>(run.at(scale_of(role)).data), places, count,
                            width, run.x4, run.tokens, masks, out, stride);
  else if (type == ort::kInt8 && masks)
    run.integers->dots_kept(false, weights, nullptr, places, count, width, run.x8, run.tokens, masks, out, stride);
  else if (type == ort::kUint8)
    run.integers->dots(true, weights, static_cast<const uint16_t*>(run.at(scale_of(role)).data), places, count, width,
                       run.x4, run.tokens, out, stride, next);
  else if (type == ort::kInt8)
    run.integers->dots(false, weights, nullptr, places, count, width, hidden ? run.hidden8 : run.x8, run.tokens, out,
                       stride, next);
  else if (masks)
    run.kernels->dots_kept(type, weights, places, count, width, hidden ? run.hidden : run.x,
                           hidden ? width : run.x_stride, run.tokens, masks, out, stride, next);
  else
    run.kernels->dots(type, weights, places, count, width, hidden ? run.hidden : run.x, hidden ? width : run.x_stride,
                      run.tokens, out, stride, next);
}

// The role of the scales of int8 rows, kTau where there are none
Role row_scale(const Run& run, Role role) { return run.at(role).type == ort::kInt8 ? scale_of(role) : kTau; }

// Products with the `count` rows of p1 or p2 from `first` on
void predictor_products(const Run& run, Role role, int64_t first, int64_t count, float* out, int64_t stride) {
  const Tensor& m = run.at(role);
  const int64_t width = role == kP2 ? run.shape.r : run.shape.d;
  dots(run, role, static_cast<const char*>(m.data) + first * width * bytes_of(m.type), nullptr, count, nullptr, out,
       stride, nullptr);
  shift(run, row_scale(run, role), kTau, first, nullptr, count, out, stride);
}

// Products with listed rows of w_gate or w_up, plus the bias; `masks` as in `dots_kept`, or nullptr for every token
void weight_products(const Run& run, Role role, Role bias, const int32_t* rows, const int32_t* places, int64_t count,
                     const uint16_t* masks, float* out, int64_t stride, const void* next) {
  dots(run, role, run.at(role).data, places, count, masks, out, stride, next);
  shift(run, row_scale(run, role), bias, 0, rows, count, out, stride);
}

// Both products at once, where a neuron's rows of w_gate and w_up lie beside each other; `both` is [tokens, 2 * count]
void gate_and_up(const Run& run, const int32_t* rows, const int32_t* places, int64_t count, float* both, float* gate,
                 float* up) {
  int32_t pairs[2 * kMost] = {};
  for (int64_t k = 0; k < count; ++k) {
    pairs[2 * k] = places[k];
    pairs[2 * k + 1] = places[k] + 1;
  }
  dots(run, kWGate, run.at(kWGate).data, pairs, 2 * count, nullptr, both, 2 * count, run.at(kWDown).data);
  for (int64_t t = 0; t < run.tokens; ++t)
    for (int64_t k = 0; k < count; ++k) {
      gate[t * count + k] = both[(t * count + k) * 2];
      up[t * count + k] = both[(t * count + k) * 2 + 1];
    }
  shift(run, row_scale(run, kWGate), kBGate, 0, rows, count, gate, count);
  shift(run, row_scale(run, kWUp), kBUp, 0, rows, count, up, count);
}

// Where v [tokens, count] is 0, a token does not keep the row any more (NaN is not 0); rows that no token keeps are
// taken out of the list and of v. Returns how many are left.
int64_t drop_zeros(const Run& run, int64_t index, uint8_t* keep, int32_t* rows, int32_t* places, int64_t count,
                   float* v) {
  const int64_t tokens = run.tokens, first = run.first_of(index), m = run.size_of(index);
  uint8_t any[kMost] = {};
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < count; ++k) any[k] |= keep[t * m + rows[k] - first] &= v[t * count + k] != 0.f;
  int64_t left = 0;
  for (int64_t k = 0; k < count; ++k) left += any[k];
  if (left == count) return count;
  for (int64_t t = 0; t < tokens; ++t) {
    float* to = v + t * left;
    for (int64_t k = 0; k < count; ++k)
      if (any[k]) *to++ = v[t * count + k];
  }
  for (int64_t k = 0, to = 0; k < count; ++k) {
    rows[to] = rows[k];
    places[to] = places[k];
    to += any[k];
  }
  return left;
}

// The tokens of every row, as `dots_kept` takes them; nullptr where most tokens keep most rows
const uint16_t* own_masks(const Run& run, int64_t index, const uint8_t* keep, const int32_t* rows, int64_t count,
                          uint16_t* masks) {
  const int64_t tokens = run.tokens, first = run.first_of(index), m = run.size_of(index);
  std::memset(masks, 0, static_cast<size_t>((tokens + kMaskTokens - 1) / kMaskTokens * count) * sizeof(uint16_t));
  int64_t kept = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const uint8_t* mine = keep + t * m - first;
    uint16_t* group = masks + t / kMaskTokens * count;
    const int bit = static_cast<int>(t % kMaskTokens);
    for (int64_t k = 0; k < count; ++k) {
      group[k] = static_cast<uint16_t>(group[k] | mine[rows[k]] << bit);
      kept += mine[rows[k]];
    }
  }
  if (!run.integer() && tokens <= kMaskTokens) return masks;  // the form for memory's speed
  const float most = run.integer() ? run.integers->most_kept : run.kernels->most_kept;
  return static_cast<float>(kept) > most * static_cast<float>(tokens * count) ? nullptr : masks;
}

// The rows of the next block at this one's places, if it is as long: many tokens come to w_down when all blocks are
// done
const void* next_block(const Run& run, int64_t index, Role role) {
  const Tensor& m = run.at(role);
  if (run.size_of(index + 1) < run.size_of(index)) return nullptr;
  const int64_t bytes = m.type == ort::kUint8 ? run.shape.d / 2 : run.shape.d * bytes_of(m.type);
  return static_cast<const char*>(m.data) + run.block * run.pitch * bytes;
}

// Asks for memory that is read soon: what is not one long row the hardware does not foresee.
void fetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
}

// The scales of the listed rows of an integer matrix [n, d]
void fetch_scales(const Run& run, Role role, int64_t first, int64_t size, const int32_t* places, int64_t count) {
  const Tensor& scales = run.at(role);
  if (!scales.data || !run.integer()) return;
  const auto* data = static_cast<const char*>(scales.data);
  if (!run.int4()) return fetch(data + first * 4, size * 4);
  const int64_t bytes = run.shape.d / kGroup * 2;
  for (int64_t k = 0; k < count; ++k) fetch(data + places[k] * bytes, bytes);
}

// What `compute_neurons` works on: block `index`, rows [first, first + size).
struct Work {
  int64_t index, first, size;
  bool full;    // the activated product of all rows is the score
  bool paired;  // gate and up in one product
  bool shared;  // products with the tokens that keep a row alone may pay

  float* score = nullptr;  // [tokens, size]: scores, or the activated product where `full`
  float* z = nullptr;      // [tokens, count]
  float *up = nullptr, *both = nullptr;
  int32_t *rows = nullptr, *places = nullptr;  // [count]: kept by any token; where they lie
  uint8_t *keep = nullptr, *any = nullptr;     // [tokens, size]; [size]
  uint16_t* masks = nullptr;
  int64_t count = 0;

  Work(const Run& run, int64_t block) : index(block), first(run.first_of(block)), size(run.size_of(block)) {
    const Variant& v = *run.variant;
    full = v.score == Score::kGate || v.score == Score::kExact;
    paired = run.few && run.pitch > 1 && !v.plain() && !full && !v.relu();
    shared = run.tokens > 1 && !paired && v.score != Score::kAll;
  }

  void lay(Cut& cut, int64_t tokens) {
    score = cut.take<float>(tokens * size);
    z = cut.take<float>(tokens * size);
    up = cut.take<float>(tokens * size);
    rows = cut.take<int32_t>(size);
    places = cut.take<int32_t>(size);
    both = cut.take<float>(paired ? 2 * tokens * size : 0);
    keep = cut.take<uint8_t>(tokens * size);
    any = cut.take<uint8_t>(size);
    masks = cut.take<uint16_t>(shared ? (tokens + kMaskTokens - 1) / kMaskTokens * size : 0);
  }

  const uint16_t* masks_of(const Run& run) const {
    return shared ? own_masks(run, index, keep, rows, count, masks) : nullptr;
  }
  void drop(const Run& run) { count = drop_zeros(run, index, keep, rows, places, count, z); }
};

void compute_scores(const Run& run, Work& work) {
  const int64_t first = work.first, m = work.size;
  const bool plain = run.variant->plain();
  if (run.floats(kTau)) fetch(run.floats(kTau) + first, m * 4);
  if (run.variant->score == Score::kPredictor) {
    if (run.floats(kSP2)) fetch(run.floats(kSP2) + first, m * 4);
    predictor_products(run, kP2, first, m, work.score, m);
  } else if (work.full) {
    for (int64_t k = 0; k < m; ++k) {  // all rows of the block, for now
      work.rows[k] = static_cast<int32_t>(first + k);
      work.places[k] = static_cast<int32_t>((first + k) * run.pitch);
    }
    weight_products(run, plain ? kWUp : kWGate, plain ? kBUp : kBGate, work.rows, work.places, m, nullptr, work.score,
                    m, plain || run.tokens == 1 ? nullptr : run.at(kWUp).data);
    activate(run, work.score, run.tokens * m);
  }
}

// What each token keeps, and the union of it
void select(const Run& run, Work& work) {
  const Variant& v = *run.variant;
  const int64_t tokens = run.tokens, first = work.first, m = work.size;
  const float* tau = run.floats(kTau);
  const bool zeros = v.relu();
  uint8_t* any = work.any;
  std::memset(any, v.score == Score::kAll, static_cast<size_t>(m));
  if (v.score == Score::kAll) std::memset(work.keep, 1, static_cast<size_t>(tokens * m));
  for (int64_t t = 0; t < tokens && v.score != Score::kAll; ++t) {
    const float* s = work.score + t * m;
    uint8_t* kept = work.keep + t * m;
    if (v.score == Score::kExact)
      for (int64_t k = 0; k < m; ++k) kept[k] = s[k] != 0.f;
    else if (v.score == Score::kPredictor)
      for (int64_t k = 0; k < m; ++k) kept[k] = s[k] > tau[first + k];
    else
      for (int64_t k = 0; k < m; ++k) kept[k] = std::fabs(s[k]) > tau[first + k] && !(zeros && s[k] == 0.f);
    for (int64_t k = 0; k < m; ++k) any[k] |= kept[k];
  }
  int32_t* rows = work.rows;
  int64_t count = 0;
  for (int64_t k = 0; k < m; ++k) {
    rows[count] = static_cast<int32_t>(first + k);
    count += any[k];
  }
  for (int64_t k = 0; k < count; ++k) work.places[k] = static_cast<int32_t>(rows[k] * run.pitch);
  work.count = count;
}

// act(gate), or act(up) without a gate; `after`: as in `dots`, what is read after the last product
void compute_first(const Run& run, Work& work, const void* after) {
  const int64_t tokens = run.tokens, count = work.count;
  const bool plain = run.variant->plain(), zeros = run.variant->relu();
  if (work.full) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < count; ++k) work.z[t * count + k] = work.score[t * work.size + work.rows[k] - work.first];
    return;
  }
  if (work.paired) {
    gate_and_up(run, work.rows, work.places, count, work.both, work.z, work.up);
  } else {
    const void* next = zeros ? nullptr : plain ? after : run.at(kWUp).data;
    weight_products(run, plain ? kWUp : kWGate, plain ? kBUp : kBGate, work.rows, work.places, count,
                    work.masks_of(run), work.z, count, next);
  }
  activate(run, work.z, tokens * count);
  if (zeros) work.drop(run);
}

void multiply_by_up(const Run& run, Work& work, const void* after) {
  const bool drelu = run.variant->activation == Activation::kDrelu;
  if (!work.paired)
    weight_products(run, kWUp, kBUp, work.rows, work.places, work.count, work.masks_of(run), work.up, work.count,
                    drelu ? nullptr : after);
  float *z = work.z, *up = work.up;
  const int64_t size = run.tokens * work.count;
  for (int64_t i = 0; drelu && i < size; ++i) up[i] = relu(up[i]);
  for (int64_t i = 0; i < size; ++i) z[i] *= up[i];
  if (run.variant->relu()) work.drop(run);
}

// z times the scale of w_down's row, 0 where a token does not keep the row
void scale_kept(const Run& run, const Work& work) {
  const int64_t first = work.first, m = work.size, count = work.count;
  const int32_t* rows = work.rows;
  const float* down = run.variant->weights == Weights::kInt8Row ? run.floats(kSDown) : nullptr;
  for (int64_t t = 0; t < run.tokens; ++t) {
    const uint8_t* kept = work.keep + t * m;
    float* own = work.z + t * count;
    // all rows, so that the loops can run in vectors; not 0 times the scale, which may be NaN
    if (count == m && down) {
      for (int64_t k = 0; k < m; ++k) own[k] = kept[k] ? own[k] * down[first + k] : 0.f;
    } else if (count == m) {
      for (int64_t k = 0; k < m; ++k) own[k] = kept[k] ? own[k] : 0.f;
    } else {
      for (int64_t k = 0; k < count; ++k)
        own[k] = kept[rows[k] - first] ? (down ? own[k] * down[rows[k]] : own[k]) : 0.f;
    }
  }
}

}  // namespace

void hidden_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t r = run.shape.r, first = static_cast<int64_t>(task) * run.p1_rows;
  const int64_t count = std::min(run.p1_rows, r - first);
  float* out = run.hidden + first;
  predictor_products(run, kP1, first, count, out, r);
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
  for (int64_t t = 0; t < run.tokens; ++t)
    run.integers->round(false, run.hidden + t * r, r, run.hidden8 + t * rounded_bytes(false, r));
}

bool compute_neurons(const Run& run, int64_t index, Neurons& out) {
  const bool plain = run.variant->plain(), zeros = run.variant->relu();
  Work work(run, index);
  if (!task_arena.lay_out([&](Cut& cut) { work.lay(cut, run.tokens); })) return false;
  compute_scores(run, work);
  select(run, work);
  const void* after = run.few ? run.at(kWDown).data : next_block(run, index, plain ? kWUp : kWGate);
  const auto ask_for = [&](Role role, int64_t count) {
    fetch_scales(run, role, work.first, work.size, work.places, count);
  };
  if (run.few) {
    if (!work.full && !plain) ask_for(kSGate, std::min<int64_t>(work.count, 4));
    if (!work.full || !plain) ask_for(kSUp, std::min<int64_t>(work.count, 4));
    if (!zeros) ask_for(kSDown, work.count);
  }
  compute_first(run, work, after);
  if (!plain) multiply_by_up(run, work, after);
  if (zeros && run.few) ask_for(kSDown, work.count);
  scale_kept(run, work);
  out = {work.rows, work.places, work.z, work.count};
  return true;
}

}  // namespace sparsegate::gated_mlp
