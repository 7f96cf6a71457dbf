// GatedMLP on the CPU.
//
// The n neurons are cut into blocks (their number depends on n alone). One task per block scores its neurons, takes the union of the tokens'
// selections, computes gate and up for it, and adds each token's own rows of w_down to a partial sum [tokens, d]; the partial sums are
// added in rising order. So a token's y depends neither on the other tokens of the call nor on the threads, bit for bit, and a neuron that a
// token does not keep never touches its y. Quantised weights are widened to float32 in registers: activations are never quantised.
//
// Memory comes from two thread-local arenas that only grow, one for the call, one for its tasks: no lock is shared, concurrent runs are safe.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "gated_mlp.h"
#include "memory.h"
#include "row_kernels.h"

namespace sparsegate {
namespace gated_mlp {
namespace {

constexpr int64_t kPartialBytes = 8 << 20;  // bound of the partial sums, which bounds the tokens per pass
constexpr int64_t kStripBytes = 256 << 10;  // rows of w_down that several tokens share stay in the second-level cache
constexpr int64_t kFewTokens = 4;           // up to here long pieces of rows are read, for the sake of memory; above, panels, for the registers
constexpr int64_t kInlineBytes = 256 << 10;  // below this much work waking the other threads costs more than it gains

float relu(float v) { return v < 0.f ? 0.f : v; }  // NaN stays NaN

void activate(Activation activation, float* v, int64_t count) {
  switch (activation) {
    case Activation::kSilu:
      for (int64_t i = 0; i < count; ++i) v[i] = v[i] / (1.f + std::exp(-v[i]));
      break;
    case Activation::kGelu:
      for (int64_t i = 0; i < count; ++i) v[i] = 0.5f * v[i] * (1.f + std::erf(v[i] * 0.70710678f));
      break;
    case Activation::kGeluTanh:
      for (int64_t i = 0; i < count; ++i) v[i] = 0.5f * v[i] * (1.f + std::tanh(0.79788456f * (v[i] + 0.044715f * v[i] * v[i] * v[i])));
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

struct Run {
  const Kernels* kernels;
  const Variant* variant;
  const Tensors* tensors;
  Shape shape;
  int64_t block, blocks, tasks;  // neurons per block, blocks, and blocks plus one for the residual
  int64_t tokens = 0;            // of this pass
  const float* x = nullptr;      // [tokens, d]
  float* y = nullptr;            // [tokens, d]
  float* hidden = nullptr;       // [tokens, r]: relu(P1 x)
  float* partial = nullptr;      // [tasks, tokens, d]
  uint8_t* used = nullptr;       // [tasks, tokens]: 0 where a partial sum is empty and was not written
  int64_t p1_rows = 0, strip = 0;
  std::atomic<bool> failed{false};  // out of memory in some task

  const Tensor& at(Role role) const { return (*tensors)[role]; }
  const float* floats(Role role) const { return static_cast<const float*>(at(role).data); }  // nullptr where absent

  // Products of the listed (or, without a list, the first `count` from `first` on) rows of a matrix with every token.
  void dots(Role role, int64_t first, const int32_t* rows, int64_t count, int64_t width, const float* v, float* out, int64_t stride, const void* then = nullptr) const {
    const Tensor& m = at(role);
    kernels->dots(m.type, static_cast<const char*>(m.data) + first * width * bytes_of(m.type), rows, count, width, v, tokens, out, stride, then);
  }
  // v[t, k] = v[t, k] * scale[row k] + bias[row k], where there are any
  void affine(const float* scale, const float* bias, int64_t first, const int32_t* rows, int64_t count, float* v, int64_t stride) const {
    if (!scale && !bias) return;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < count; ++k) {
        const int64_t row = rows ? rows[k] : first + k;
        float& value = v[t * stride + k];
        if (scale) value *= scale[row];
        if (bias) value += bias[row];
      }
  }
};

void hidden_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t r = run.shape.r, first = static_cast<int64_t>(task) * run.p1_rows, count = std::min(run.p1_rows, r - first);
  float* out = run.hidden + first;
  run.dots(kP1, first, nullptr, count, run.shape.d, run.x, out, r);
  run.affine(run.floats(kSP1), nullptr, first, nullptr, count, out, r);
  for (int64_t t = 0; t < run.tokens; ++t)
    for (int64_t k = 0; k < count; ++k) out[t * r + k] = relu(out[t * r + k]);
}

// res^T hidden into the last partial sum
void residual(Run& run, uint8_t* used, float* partial) {
  const int64_t d = run.shape.d, r = run.shape.r;
  Cut size(nullptr);
  size.take<int32_t>(r), size.take<float>(r);
  char* base = task_arena.reserve(size.used());
  if (!base) return run.failed.store(true);
  Cut cut(base);
  int32_t* rows = cut.take<int32_t>(r);
  float* scale = cut.take<float>(r);
  for (int64_t t = 0; t < run.tokens; ++t) {
    int64_t count = 0;
    for (int64_t k = 0; k < r; ++k) {
      const float h = run.hidden[t * r + k];
      if (h == 0.f) continue;
      rows[count] = static_cast<int32_t>(k);
      scale[count++] = h;
    }
    used[t] = count > 0;
    if (!count) continue;
    std::memset(partial + t * d, 0, static_cast<size_t>(d) * sizeof(float));
    run.kernels->accumulate(run.at(kRes).type, run.at(kRes).data, rows, scale, count, d, 0, d, partial + t * d);
  }
}

void block_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const Variant& v = *run.variant;
  const int64_t d = run.shape.d, r = run.shape.r, tokens = run.tokens, index = static_cast<int64_t>(task);
  uint8_t* used = run.used + index * tokens;
  float* partial = run.partial + index * tokens * d;
  if (index == run.blocks) return residual(run, used, partial);
  const int64_t first = index * run.block, m = std::min(run.block, run.shape.n - first);

  float *score = nullptr, *z = nullptr, *up = nullptr;
  int32_t *rows = nullptr, *list = nullptr, *counts = nullptr;
  uint8_t* keep = nullptr;
  const auto lay = [&](char* base) {
    Cut cut(base);
    score = cut.take<float>(tokens * m);   // scores, or the activated product that score gate computes in full
    z = cut.take<float>(tokens * m);       // [tokens, count]: gate, then what w_down is multiplied by, then only the kept ones
    up = cut.take<float>(tokens * m);
    rows = cut.take<int32_t>(m);           // union of the selections, rising
    list = cut.take<int32_t>(tokens * m);  // each token's own rows, rising
    counts = cut.take<int32_t>(tokens);
    keep = cut.take<uint8_t>(tokens * m);
    return cut.used();
  };
  char* base = task_arena.reserve(lay(nullptr));
  if (!base) return run.failed.store(true);
  lay(base);

  // 1. scores of the block, and the union of what the tokens keep
  const bool predictor = v.score == Score::kPredictor, full = v.score == Score::kGate || v.score == Score::kExact;
  const float* tau = run.floats(kTau);
  if (predictor) {
    run.dots(kP2, first, nullptr, m, r, run.hidden, score, m);
    run.affine(run.floats(kSP2), nullptr, first, nullptr, m, score, m);
  } else if (full) {
    const Role role = v.plain() ? kWUp : kWGate;
    run.dots(role, first, nullptr, m, d, run.x, score, m);
    run.affine(run.floats(v.plain() ? kSUp : kSGate), run.floats(v.plain() ? kBUp : kBGate), first, nullptr, m, score, m);
    activate(v.activation, score, tokens * m);
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < m; ++k) {
      const int64_t at = t * m + k;
      keep[at] = v.score == Score::kAll || (v.score == Score::kExact ? score[at] != 0.f : (predictor ? score[at] : std::fabs(score[at])) > tau[first + k]);
    }
  int64_t count = 0;
  for (int64_t k = 0; k < m; ++k) {
    bool any = false;
    for (int64_t t = 0; t < tokens && !any; ++t) any = keep[t * m + k];
    if (any) rows[count++] = static_cast<int32_t>(first + k);
  }

  // 2. z [tokens, count] of the union
  const void* down = run.at(kWDown).data;
  if (full) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < count; ++k) z[t * count + k] = score[t * m + rows[k] - first];
  } else {
    const bool plain = v.plain();
    run.dots(plain ? kWUp : kWGate, 0, rows, count, d, run.x, z, count, plain ? down : run.at(kWUp).data);
    run.affine(run.floats(plain ? kSUp : kSGate), run.floats(plain ? kBUp : kBGate), 0, rows, count, z, count);
    activate(v.activation, z, tokens * count);
  }
  if (!v.plain()) {
    run.dots(kWUp, 0, rows, count, d, run.x, up, count, down);
    run.affine(run.floats(kSUp), run.floats(kBUp), 0, rows, count, up, count);
    if (v.activation == Activation::kDrelu) activate(Activation::kRelu, up, tokens * count);
    for (int64_t i = 0; i < tokens * count; ++i) z[i] *= up[i];
  }
  run.affine(run.floats(kSDown), nullptr, 0, rows, count, z, count);

  // 3. each token's own rows of w_down
  for (int64_t t = 0; t < tokens; ++t) {
    int32_t kept = 0;
    for (int64_t k = 0; k < count; ++k) {
      const float value = z[t * count + k];
      if (!keep[t * m + rows[k] - first] || (v.score == Score::kExact && value == 0.f)) continue;
      list[t * count + kept] = rows[k];
      z[t * count + kept++] = value;
    }
    counts[t] = kept;
    used[t] = kept > 0;
    if (kept) std::memset(partial + t * d, 0, static_cast<size_t>(d) * sizeof(float));
  }
  const int type = run.at(kWDown).type;
  const int64_t fits = kStripBytes / std::max<int64_t>(1, count * bytes_of(type)) / kPanel * kPanel;
  const int64_t strip = tokens == 1 ? d : tokens > kFewTokens ? kPanel : std::min(d, std::max(2 * kPanel, fits));
  for (int64_t c = 0; c < d; c += strip)
    for (int64_t t = 0; t < tokens; ++t)
      if (counts[t]) run.kernels->accumulate(type, down, list + t * count, z + t * count, counts[t], d, c, std::min(strip, d - c), partial + t * d + c);
}

// y of one token and one strip of columns: b_down, then the partial sums in rising order
void sum_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t d = run.shape.d, strips = (d + run.strip - 1) / run.strip;
  const int64_t t = static_cast<int64_t>(task) / strips, c = static_cast<int64_t>(task) % strips * run.strip, width = std::min(run.strip, d - c);
  constexpr int kBatch = 64;
  int32_t rows[kBatch];
  float ones[kBatch];
  std::fill(ones, ones + kBatch, 1.f);
  float* y = run.y + t * d + c;
  const float* bias = run.floats(kBDown);
  if (bias)
    std::memcpy(y, bias + c, static_cast<size_t>(width) * sizeof(float));
  else
    std::memset(y, 0, static_cast<size_t>(width) * sizeof(float));
  int count = 0;
  for (int64_t b = 0; b < run.tasks; ++b) {
    if (run.used[b * run.tokens + t]) rows[count++] = static_cast<int32_t>(b * run.tokens + t);
    if (count == kBatch || (b + 1 == run.tasks && count)) {
      run.kernels->accumulate(ort::kFloat32, run.partial, rows, ones, count, d, c, width, y);
      count = 0;
    }
  }
}

struct CpuKernel {
  static constexpr const char *kName = "GatedMLP", *kProvider = "CPUExecutionProvider";
  static constexpr bool kSameShape = true;
  Node node;

  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type) { return node.init(api, info, x_type, true); }

  ort::StatusPtr compute(ort::KernelContext* context) const {
    Tensors tensors;
    Shape shape;
    Rows io;
    ORT_TRY(node.fetch(context, tensors, shape));
    ORT_TRY(open_rows(node, context, node.variant.x, shape.d, shape.d, io));
    if (io.tokens == 0) return nullptr;

    const int64_t d = shape.d, n = shape.n, r = shape.r;
    Run run;
    run.kernels = &kernels(isa());
    run.variant = &node.variant;
    run.tensors = &tensors;
    run.shape = shape;
    run.block = std::min<int64_t>(512, std::max<int64_t>(64, (n / 32 + 15) / 16 * 16));
    run.blocks = (n + run.block - 1) / run.block;
    run.tasks = run.blocks + (node.variant.has(kRes) ? 1 : 0);
    const int64_t pass = std::min(io.tokens, std::min<int64_t>(64, std::max<int64_t>(4, kPartialBytes / (run.tasks * d * 4))));
    const int x_type = node.variant.x;
    float *x = nullptr, *y = nullptr;
    const auto lay = [&](char* base) {
      Cut cut(base);
      run.hidden = cut.take<float>(pass * r);
      run.partial = cut.take<float>(run.tasks * pass * d);
      run.used = cut.take<uint8_t>(run.tasks * pass);
      x = cut.take<float>(x_type == ort::kFloat32 ? 0 : pass * d);
      y = cut.take<float>(x_type == ort::kFloat32 ? 0 : pass * d);
      return cut.used();
    };
    char* base = call_arena.reserve(lay(nullptr));
    if (!base) return node.error(ort::kRuntimeException, "out of memory for " + std::to_string(pass) + " tokens");
    lay(base);

    const int64_t p1_bytes = d * (r ? bytes_of(tensors[kP1].type) : 1);
    run.p1_rows = std::max<int64_t>(4, (64 << 10) / p1_bytes / 4 * 4);
    run.strip = 512;
    const bool small = n * d * bytes_of(tensors[kWUp].type) * (node.variant.plain() ? 2 : 3) * std::min<int64_t>(pass, 4) < kInlineBytes;
    for (int64_t t = 0; t < io.tokens; t += pass) {
      run.tokens = std::min(pass, io.tokens - t);
      if (x_type == ort::kFloat32) {
        run.x = static_cast<const float*>(io.x) + t * d;
        run.y = static_cast<float*>(io.y) + t * d;
      } else {
        run.kernels->widen(x_type, static_cast<const uint16_t*>(io.x) + t * d, run.tokens * d, x);
        run.x = x;
        run.y = y;
      }
      if (r) ORT_TRY(parallel(node.api, context, hidden_task, (r + run.p1_rows - 1) / run.p1_rows, small, &run));
      ORT_TRY(parallel(node.api, context, block_task, run.tasks, small, &run));
      if (run.failed.load()) return node.error(ort::kRuntimeException, "out of memory for " + std::to_string(pass) + " tokens");
      ORT_TRY(parallel(node.api, context, sum_task, run.tokens * ((d + run.strip - 1) / run.strip), small, &run));
      if (x_type == ort::kFloat32) continue;
      narrow(x_type, y, run.tokens * d, static_cast<uint16_t*>(io.y) + t * d);
    }
    return nullptr;
  }
};

}  // namespace
}  // namespace gated_mlp

void gated_mlp_cpu_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) { append_ops<gated_mlp::CpuKernel>(api, ops); }

bool gated_mlp_cpu_supports(const char* name) {
  gated_mlp::Variant variant;
  return gated_mlp::variant_of_name(name, variant).empty();
}

}  // namespace sparsegate
