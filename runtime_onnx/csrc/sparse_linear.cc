// SparseLinear on the CPU: y = (x where |x_j| > tau_j) W + b, W [d_in, d_out] input-major, so an active channel is one
// contiguous row.
//
// The channels are cut into blocks: one task each lists the channels that any token keeps, and every token's factors.
// Then the d_out columns are cut into strips, one task each: no two tasks write one column, so nothing is summed across
// threads. See row_sums.h for the order of the sums.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "memory.h"
#include "row_sums.h"
#include "sparse_linear.h"

namespace sparsegate {
namespace sparse_linear {
namespace {

constexpr int64_t kBlock = 512;  // channels
// up to here rows are read where they lie; above, they are copied together for all tokens
constexpr int64_t kFewTokens = 4;
constexpr int64_t kManyTokens = 128;         // at a time
constexpr int64_t kInlineBytes = 256 << 10;  // below this much work waking the other threads costs more than it gains
constexpr int64_t kStrip = 512, kLongStrip = 2048;  // columns of a task with few tokens, least and most

struct Run {
  const Tensors* tensors;
  Shape shape;
  RowSums sums;
  int64_t tokens = 0;  // of this pass
  int64_t strip = 0;
  const float* x = nullptr;         // [tokens, d_in]
  float* y = nullptr;               // [tokens, d_out]
  std::atomic<bool> failed{false};  // out of memory in some task

  // nullptr where absent
  const float* floats(Role role) const { return static_cast<const float*>((*tensors)[role].data); }
};

// The channels of one block that any token keeps, and what their rows are multiplied by
void select_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t d = run.shape.d_in, first = static_cast<int64_t>(task) * kBlock, size = std::min(kBlock, d - first);
  int32_t rows[kBlock + 1];
  uint8_t any[kBlock] = {};
  const float *tau = run.floats(kTau) + first,
              *scale = run.sums.format == Weights::kInt8Row ? run.floats(kSW) : nullptr;
  for (int64_t t = 0; t < run.tokens; ++t) {
    const float* x = run.x + t * d + first;
    for (int64_t j = 0; j < size; ++j) any[j] |= std::fabs(x[j]) > tau[j];
  }
  int64_t count = 0;
  for (int64_t j = 0; j < size; ++j) {  // without a branch: which channels are active is not to be guessed
    rows[count] = static_cast<int32_t>(first + j);
    count += any[j];
  }
  char* base = task_arena.reserve(static_cast<size_t>(run.tokens * count + 1) * sizeof(float));
  if (!base) return run.failed.store(true);
  auto* z = reinterpret_cast<float*>(base);
  for (int64_t t = 0; t < run.tokens; ++t) {
    const float* x = run.x + t * d;
    for (int64_t k = 0; k < count; ++k) {
      const float value = x[rows[k]];
      z[t * count + k] = std::fabs(value) > tau[rows[k] - first] ? (scale ? value * scale[rows[k]] : value) : 0.f;
    }
  }
  run.sums.take(static_cast<int64_t>(task), rows, rows, z, count, run.tokens);
}

// One strip of columns for all tokens of the pass
void strip_task(void* user, size_t task) {
  Run& run = *static_cast<Run*>(user);
  const int64_t d_out = run.shape.d_out, begin = static_cast<int64_t>(task) * run.strip;
  const int64_t width = std::min(run.strip, d_out - begin);
  if (!run.sums.sum(begin, width, run.tokens, run.floats(kB), run.y + begin, d_out)) run.failed.store(true);
}

struct CpuKernel {
  static constexpr const char *kName = "SparseLinear", *kProvider = "CPUExecutionProvider";
  static constexpr bool kSameShape = false;
  Node node;

  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type) {
    return node.init(api, info, x_type, true);
  }

  ort::StatusPtr compute(ort::KernelContext* context) const {
    const Variant& variant = node.variant;
    Tensors tensors;
    Run run;
    ORT_TRY(node.fetch(context, tensors, run.shape));
    const int64_t d_in = run.shape.d_in, d_out = run.shape.d_out;
    Rows io;
    ORT_TRY(open_rows(node, context, variant.x, d_in, d_out, io));
    if (io.tokens == 0) return nullptr;

    run.tensors = &tensors;
    const Tensor& w = tensors[kW];
    const int64_t pass = std::min(io.tokens, kManyTokens), blocks = (d_in + kBlock - 1) / kBlock;
    const bool few = pass <= kFewTokens, wide = variant.x != ort::kFloat32;
    run.sums = {&kernels(isa()),
                &integer_rows(isa()),
                variant.weights,
                w.type,
                w.data,
                tensors[kSW].data,
                d_in,
                d_out,
                kBlock,
                blocks,
                pass,
                !few};
    // more strips than threads, so that none waits long for another
    const int64_t sixteenth = (d_out / 16 + 127) / 128 * 128;
    run.strip = few ? std::clamp(sixteenth, kStrip, pass == 1 ? kLongStrip : kStrip) : run.sums.strip();
    float *x = nullptr, *y = nullptr;
    const auto lay = [&](Cut& cut) {
      run.sums.lay(cut);
      x = cut.take<float>(wide ? pass * d_in : 0);
      y = cut.take<float>(wide ? pass * d_out : 0);
    };
    if (!call_arena.lay_out(lay))
      return node.error(ort::kRuntimeException, "out of memory for " + std::to_string(pass) + " tokens");

    const int64_t bytes = w.type == ort::kUint8 ? d_in * d_out / 2 : d_in * d_out * bytes_of(w.type);
    const bool small = bytes * std::min<int64_t>(pass, 4) < kInlineBytes;
    for (int64_t t = 0; t < io.tokens; t += pass) {
      run.tokens = std::min(pass, io.tokens - t);
      if (wide) {
        run.sums.kernels->widen(variant.x, static_cast<const uint16_t*>(io.x) + t * d_in, run.tokens * d_in, x);
        run.x = x;
        run.y = y;
      } else {
        run.x = static_cast<const float*>(io.x) + t * d_in;
        run.y = static_cast<float*>(io.y) + t * d_out;
      }
      ORT_TRY(parallel(node.api, context, select_task, blocks, few || small, &run));
      if (!run.failed.load())
        ORT_TRY(parallel(node.api, context, strip_task, (d_out + run.strip - 1) / run.strip, small, &run));
      if (run.failed.load())
        return node.error(ort::kRuntimeException, "out of memory for " + std::to_string(pass) + " tokens");
      if (wide) narrow(variant.x, y, run.tokens * d_out, static_cast<uint16_t*>(io.y) + t * d_out);
    }
    return nullptr;
  }
};

}  // namespace
}  // namespace sparse_linear

void sparse_linear_cpu_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) {
  append_ops<sparse_linear::CpuKernel>(api, ops);
}

bool sparse_linear_cpu_supports(const char* name) { return is_variant(sparse_linear::variant_of_name, name); }

}  // namespace sparsegate
