// SparseLinear on the CPU: y = (x where |x_j| > tau_j) W + b, W [d_in, d_out] input-major, so an active channel is one contiguous row.
//
// Every token's active channels are listed in rising order. The d_out columns are cut into strips, one task each: no two tasks write one column, so
// nothing is summed across threads. A column's sum starts at b and takes one sum per block of kBlock channels, which takes the token's own channels one by
// one in rising order, however the strips and the tokens of the call are cut: y depends neither on the other tokens nor on the threads, bit for
// bit, and a channel that a token drops never touches its y. (One sum over all channels of a wide layer would miss the bound of float32.)
// Quantised weights are widened to float32 in registers.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "memory.h"
#include "row_kernels.h"
#include "sparse_linear.h"

namespace sparsegate {
namespace sparse_linear {
namespace {

constexpr int64_t kPassBytes = 8 << 20;      // bound of the lists of active channels, which bounds the tokens per pass
constexpr int64_t kPassTokens = 64;
constexpr int64_t kBlock = 512;              // channels per sum
constexpr int64_t kShared = kBlock / 4;      // channels whose rows several tokens read one after the other: a panel of them stays in the first-level cache
constexpr int64_t kFewTokens = 4;            // up to here long pieces of rows are read where they lie; above, panels are copied together and widened once
constexpr int64_t kInlineBytes = 256 << 10;  // below this much work waking the other threads costs more than it gains
constexpr int64_t kStrip = 512, kLongStrip = 2048, kShortStrip = 4 * kPanel;  // columns of a task: least and most with one token, with many

struct Run {
  const Kernels* kernels;
  const Tensors* tensors;
  Shape shape;
  int64_t tokens = 0;            // of this pass
  int64_t chunk, chunks;         // input channels whose rows the tokens read together, a divisor of kBlock, and their number
  int64_t strip, piece;          // columns of a task, and of a part of it that is summed at a time
  bool pack;                     // whether a chunk's piece is copied together before the tokens read it
  const float* x = nullptr;      // [tokens, d_in]
  float* y = nullptr;            // [tokens, d_out]
  int32_t* list = nullptr;       // [tokens, d_in]: a token's active channels, rising, counted from the start of their chunk
  float* scale = nullptr;        // [tokens, d_in]: their values, times the rows' scales
  int32_t* first = nullptr;      // [tokens, chunks + 1]: where each chunk starts in a token's list

  const float* floats(Role role) const { return static_cast<const float*>((*tensors)[role].data); }  // nullptr where absent
};

void select_task(void* user, size_t task) {
  const Run& run = *static_cast<Run*>(user);
  const int64_t d = run.shape.d_in, t = static_cast<int64_t>(task);
  const float *x = run.x + t * d, *tau = run.floats(kTau), *row_scale = run.floats(kSW);
  int32_t *list = run.list + t * d, *first = run.first + t * (run.chunks + 1), count = 0;
  float* scale = run.scale + t * d;
  for (int64_t c = 0; c < run.chunks; ++c) {
    const int64_t begin = c * run.chunk, size = std::min(run.chunk, d - begin);
    first[c] = count;
    for (int64_t j = 0; j < size; ++j) {  // without a branch: which channels are active is not to be guessed
      list[count] = static_cast<int32_t>(j);
      scale[count] = x[begin + j];
      count += std::fabs(x[begin + j]) > tau[begin + j];
    }
    for (int32_t k = first[c]; row_scale && k < count; ++k) scale[k] *= row_scale[begin + list[k]];
  }
  first[run.chunks] = count;
}

// One strip of columns for all tokens of the pass.
void strip_task(void* user, size_t task) {
  const Run& run = *static_cast<Run*>(user);
  const int64_t d_in = run.shape.d_in, d_out = run.shape.d_out, begin = static_cast<int64_t>(task) * run.strip, width = std::min(run.strip, d_out - begin);
  const Tensor& w = (*run.tensors)[kW];
  const float* bias = run.floats(kB);
  for (int64_t t = 0; t < run.tokens; ++t) {
    float* y = run.y + t * d_out + begin;
    if (bias)
      std::memcpy(y, bias + begin, static_cast<size_t>(width) * sizeof(float));
    else
      std::memset(y, 0, static_cast<size_t>(width) * sizeof(float));
  }
  alignas(kAlignment) float sums[std::max({kPassTokens * kPanel, kFewTokens * kStrip, kLongStrip})];  // [tokens, columns]
  alignas(kAlignment) float packed[kShared * kPanel];                                                // [channels of a chunk, columns]
  const int64_t per_block = kBlock / run.chunk, bytes = bytes_of(w.type);
  for (int64_t block = 0; block < run.chunks; block += per_block) {
    const int64_t end = std::min(run.chunks, block + per_block);
    for (int64_t at = 0; at < width; at += run.piece) {
      const int64_t columns = std::min(run.piece, width - at);
      std::memset(sums, 0, static_cast<size_t>(run.tokens * columns) * sizeof(float));
      for (int64_t c = block; c < end; ++c) {
        const int64_t row = c * run.chunk;
        const char* rows = static_cast<const char*>(w.data) + row * d_out * bytes;
        if (run.pack)
          for (int64_t j = 0, size = std::min(run.chunk, d_in - row); j < size; ++j)
            run.kernels->widen(w.type, rows + (j * d_out + begin + at) * bytes, columns, packed + j * columns);
        for (int64_t t = 0; t < run.tokens; ++t) {
          const int32_t* first = run.first + t * (run.chunks + 1) + c;
          const int64_t list = t * d_in + first[0], count = first[1] - first[0];
          float* sum = sums + t * columns;
          if (count && run.pack)
            run.kernels->accumulate(ort::kFloat32, packed, run.list + list, run.scale + list, count, columns, 0, columns, sum);
          else if (count)
            run.kernels->accumulate(w.type, rows, run.list + list, run.scale + list, count, d_out, begin + at, columns, sum);
        }
      }
      for (int64_t t = 0; t < run.tokens; ++t) {
        const int32_t* first = run.first + t * (run.chunks + 1);
        float* y = run.y + t * d_out + begin + at;
        for (int64_t c = 0; c < columns && first[end] > first[block]; ++c) y[c] += sums[t * columns + c];
      }
    }
  }
}

struct CpuKernel {
  static constexpr const char *kName = "SparseLinear", *kProvider = "CPUExecutionProvider";
  static constexpr bool kSameShape = false;
  Node node;

  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type) { return node.init(api, info, x_type, true); }

  ort::StatusPtr compute(ort::KernelContext* context) const {
    const Variant& variant = node.variant;
    Tensors tensors;
    Run run;
    ORT_TRY(node.fetch(context, tensors, run.shape));
    const int64_t d_in = run.shape.d_in, d_out = run.shape.d_out;
    Rows io;
    ORT_TRY(open_rows(node, context, variant.x, d_in, d_out, io));
    if (io.tokens == 0) return nullptr;

    run.kernels = &kernels(isa());
    run.tensors = &tensors;
    const int64_t bytes = bytes_of(tensors[kW].type), pass = std::min(io.tokens, std::clamp<int64_t>(kPassBytes / (8 * d_in), kFewTokens, kPassTokens));
    const bool few = pass <= kFewTokens, wide = variant.x != ort::kFloat32;
    const int64_t sixteenth = (d_out / 16 + kPanel - 1) / kPanel * kPanel;  // more strips than threads, so that none waits long for another
    run.strip = few ? std::clamp(sixteenth, kStrip, pass == 1 ? kLongStrip : kStrip) : kShortStrip;
    run.piece = few ? run.strip : kPanel;
    run.pack = !few;
    run.chunk = pass == 1 ? kBlock : kShared;
    run.chunks = (d_in + run.chunk - 1) / run.chunk;
    float *x = nullptr, *y = nullptr;
    const auto lay = [&](char* base) {
      Cut cut(base);
      run.list = cut.take<int32_t>(pass * d_in);
      run.scale = cut.take<float>(pass * d_in);
      run.first = cut.take<int32_t>(pass * (run.chunks + 1));
      x = cut.take<float>(wide ? pass * d_in : 0);
      y = cut.take<float>(wide ? pass * d_out : 0);
      return cut.used();
    };
    char* base = call_arena.reserve(lay(nullptr));
    if (!base) return node.error(ort::kRuntimeException, "out of memory for " + std::to_string(pass) + " tokens");
    lay(base);

    const bool small = d_in * d_out * bytes * std::min<int64_t>(pass, 4) < kInlineBytes;
    for (int64_t t = 0; t < io.tokens; t += pass) {
      run.tokens = std::min(pass, io.tokens - t);
      if (wide) {
        run.kernels->widen(variant.x, static_cast<const uint16_t*>(io.x) + t * d_in, run.tokens * d_in, x);
        run.x = x;
        run.y = y;
      } else {
        run.x = static_cast<const float*>(io.x) + t * d_in;
        run.y = static_cast<float*>(io.y) + t * d_out;
      }
      ORT_TRY(parallel(node.api, context, select_task, run.tokens, few || small, &run));
      ORT_TRY(parallel(node.api, context, strip_task, (d_out + run.strip - 1) / run.strip, small, &run));
      if (wide) narrow(variant.x, y, run.tokens * d_out, static_cast<uint16_t*>(io.y) + t * d_out);
    }
    return nullptr;
  }
};

}  // namespace
}  // namespace sparse_linear

void sparse_linear_cpu_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) { append_ops<sparse_linear::CpuKernel>(api, ops); }

bool sparse_linear_cpu_supports(const char* name) {
  sparse_linear::Variant variant;
  return sparse_linear::variant_of_name(name, variant).empty();
}

}  // namespace sparsegate
