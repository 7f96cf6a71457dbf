// GatedMLP on the CPU: one call.
//
// The n neurons are cut into blocks. Few tokens: one task per block scores its neurons, takes the union of the tokens'
// selections, computes gate and up for it, and adds each token's own rows of w_down to a partial sum [tokens, d]; the
// partial sums are added in rising order. Many tokens: one task per block leaves the factors of w_down's rows, then one
// task per strip of columns adds all rows to it. Both ways add the same numbers in the same order: a token's y depends
// neither on the other tokens of the call nor on the threads, bit for bit, and a neuron that a token does not keep
// never touches its y.
//
// Memory comes from thread-local arenas that only grow: no lock is shared, concurrent runs are safe.
#include <algorithm>
#include <cstring>

#include "gated_mlp_run.h"

namespace sparsegate {
namespace gated_mlp {
namespace {

// above, reading rows together for all tokens costs less than partial sums
constexpr int64_t kFewTokens = 4, kFewFloatTokens = 4, kFewInt4Avx2 = 2;
constexpr int64_t kManyTokens = 128;         // at a time: their x and their part of y stay in the second-level cache
constexpr int64_t kInlineBytes = 256 << 10;  // below this much work waking the other threads costs more than it gains

struct CpuKernel {
  static constexpr const char *kName = "GatedMLP", *kProvider = "CPUExecutionProvider";
  static constexpr bool kSameShape = true;
  Node node;

  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type) {
    return node.init(api, info, x_type, true);
  }

  ort::StatusPtr compute(ort::KernelContext* context) const {
    Tensors tensors;
    Shape shape;
    Rows io;
    ORT_TRY(node.fetch(context, tensors, shape));
    ORT_TRY(open_rows(node, context, node.variant.x, shape.d, shape.d, io));
    if (io.tokens == 0) return nullptr;

    const int64_t d = shape.d, n = shape.n, r = shape.r;
    const Variant& v = node.variant;
    Run run;
    run.kernels = &kernels(isa());
    run.integers = &integer_rows(isa());
    run.swish = swish(isa());
    run.variant = &v;
    run.tensors = &tensors;
    run.shape = shape;
    run.pitch = node.pitch;
    run.block = std::min<int64_t>(512, std::max<int64_t>(64, (n / 32 + 31) / 32 * 32));
    run.blocks = (n + run.block - 1) / run.block;
    const int64_t few = run.int4() && isa() == Isa::kAvx2 ? kFewInt4Avx2 : run.integer() ? kFewTokens : kFewFloatTokens;
    run.few = io.tokens <= few;
    const int64_t pass = run.pass = std::min(io.tokens, kManyTokens);
    float *x = nullptr, *y = nullptr;
    if (!call_arena.lay_out([&](Cut& cut) { lay(run, cut, x, y); }))
      return node.error(ort::kRuntimeException, "out of memory for " + std::to_string(pass) + " tokens");

    const int64_t p1_bytes = d * (r ? bytes_of(tensors[kP1].type) : 1);
    run.p1_rows = std::max<int64_t>(4, (64 << 10) / p1_bytes / 4 * 4);
    const int64_t weight_bytes = tensors[kWUp].type == ort::kUint8 ? n * d / 2 : n * d * bytes_of(tensors[kWUp].type);
    const bool small = weight_bytes * (v.plain() ? 2 : 3) * std::min<int64_t>(pass, 4) < kInlineBytes;
    const bool wide = v.x != ort::kFloat32;
    for (int64_t t = 0; t < io.tokens; t += pass) {
      run.tokens = std::min(pass, io.tokens - t);
      run.y = wide ? y : static_cast<float*>(io.y) + t * d;
      if (x) {
        for (int64_t i = 0; i < run.tokens; ++i)
          run.kernels->widen(v.x, static_cast<const char*>(io.x) + (t + i) * d * bytes_of(v.x), d,
                             x + i * run.x_stride);
        run.x = x;
      } else {
        run.x = static_cast<const float*>(io.x) + t * d;
      }
      if (run.x8 || run.x4) ORT_TRY(parallel(node.api, context, round_x_task, run.tokens, run.few || small, &run));
      if (r) ORT_TRY(parallel(node.api, context, hidden_task, (r + run.p1_rows - 1) / run.p1_rows, small, &run));
      if (run.hidden8) round_hidden(run);
      if (run.few) {
        ORT_TRY(parallel(node.api, context, block_task, run.blocks + (v.has(kRes) ? 1 : 0), small, &run));
        if (!run.failed.load())
          ORT_TRY(parallel(node.api, context, sum_task, run.tokens * ((d + run.strip - 1) / run.strip), small, &run));
      } else {
        ORT_TRY(parallel(node.api, context, factor_task, run.blocks, small, &run));
        if (!run.failed.load())
          ORT_TRY(parallel(node.api, context, strip_task, (d + run.strip - 1) / run.strip, small, &run));
      }
      if (run.failed.load())
        return node.error(ort::kRuntimeException, "out of memory for " + std::to_string(pass) + " tokens");
      if (wide) narrow(v.x, y, run.tokens * d, static_cast<uint16_t*>(io.y) + t * d);
    }
    return nullptr;
  }

  // Takes the call's memory out of `cut`.
  static void lay(Run& run, Cut& cut, float*& x, float*& y) {
    const Variant& v = *run.variant;
    const int64_t d = run.shape.d, n = run.shape.n, r = run.shape.r, pass = run.pass;
    const int64_t tasks = run.blocks + (v.has(kRes) ? 1 : 0);
    const bool predictor8 = v.has(kSP1), integer = run.integer();
    const bool wide = v.x != ort::kFloat32;
    const bool copied = wide || pass > 1;
    run.x_stride = pass > 1 ? padded_stride(d) : d;
    x = copied ? cut.take<float>(pass * run.x_stride) : nullptr;
    y = cut.take<float>(wide ? pass * d : 0);
    run.hidden = cut.take<float>(pass * r);
    const auto rounded = [&](bool needed, bool int4, int64_t width) {
      return needed ? cut.take<char>(pass * rounded_bytes(int4, width)) : nullptr;
    };
    run.x8 = rounded(predictor8 || v.weights == Weights::kInt8Row, false, d);
    run.x4 = rounded(run.int4(), true, d);
    run.hidden8 = rounded(v.has(kSP2), false, r);
    run.columns = integer ? padded_columns(run.int4(), d) : d;
    if (run.few) {
      run.strip = kFoldedColumns;
      run.partial = cut.take<float>(tasks * pass * run.columns);
      run.used = cut.take<uint8_t>(tasks * pass);
      return;
    }
    run.sums = {run.kernels,         run.integers,        v.weights, run.at(kWDown).type,
                run.at(kWDown).data, run.at(kSDown).data, n,         d,
                run.block,           run.blocks,          pass,      true};
    run.sums.lay(cut);
    run.strip = run.sums.strip();
  }
};

}  // namespace
}  // namespace gated_mlp

void gated_mlp_cpu_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) {
  append_ops<gated_mlp::CpuKernel>(api, ops);
}

bool gated_mlp_cpu_supports(const char* name) { return is_variant(gated_mlp::variant_of_name, name); }

}  // namespace sparsegate
