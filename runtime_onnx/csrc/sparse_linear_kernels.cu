// SparseLinear on CUDA: the second half of GatedMLP with x in the place of z.
//
// Up to four tokens, two launches: `down` of row_sums.cu, a block per (token, 2048 columns, 128 input channels),
// compares |x| with tau, gathers the kept channels in rising order in shared memory and adds their rows, eight in
// flight; `close` adds the parts and the bias. Bytes: k d_out b + 6 d_in, and 4 d_in d_out / 128 of partial sums
// (second-level cache). At d_in = d_out = 4096 in 16 bits with half of the channels kept 16.8 MB or 5.6 us at 3 TB/s:
// launches and latency, about 2 us each, weigh as much; expected share of the copy bandwidth (not measured) 55 %. More
// tokens: `mask` writes x, 0 where a channel is not kept, and `rows` of row_tiles.cu multiplies tiles (its header has
// the roofline); every row of w is read once for all tokens of a pass. int8 row scales are multiplied into x before it
// is rounded to its own type.
//
// A token's result does not depend on the other tokens of a call that takes the same path and repeats bit for bit; the
// two paths differ in rounding.
#include "memory.h"
#include "row_sums.cuh"
#include "sparse_linear.cuh"
#include "tiles.cuh"

namespace sparsegate::sparse_linear {
namespace {

constexpr int64_t kFewTokens = 4;
constexpr int64_t kPass = 512;  // tokens: bounds the scratch memory

// v [tokens, pitch] of this type; grid (pitch / 256, tokens)
__global__ void __launch_bounds__(kThreads)
    mask(Matrix x, Matrix w, const float* tau, int64_t pitch, int type, void* v) {
  const int64_t j = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, t = blockIdx.y;
  if (j >= pitch) return;
  const float value = j < x.columns ? load(x.data, x.type, t * x.columns + j) : 0.f;
  const bool kept = j < x.columns && fabsf(value) > tau[j];
  save(v, type, t * pitch + j, kept ? value * row_scale(w, j) : 0.f);
}

}  // namespace

size_t run(const Call& call, char* base, cudaStream_t stream) {
  const int64_t d_in = call.shape.d_in, d_out = call.shape.d_out, tokens = std::min(call.tokens, kPass);
  const bool few = call.tokens <= kFewTokens;
  const int64_t pitch = blocks(d_in, 32) * 32;
  const int type = tile_type(call.variant.x, call.tensors[kW].type);
  Cut cut(base);
  Partials partials;
  partials.sums = cut.take<float>((few ? few_row_parts(d_in) : tile_row_parts(d_in)) * tokens * d_out);
  char* v = cut.take<char>(few ? 0 : bytes_of_columns(type, tokens * pitch));
  if (!base) return cut.used();

  const Matrix w = call.matrix(kW, kSW);
  for (int64_t first = 0; first < call.tokens; first += tokens) {
    const int64_t count = std::min(tokens, call.tokens - first);
    const char* rows = static_cast<const char*>(call.x) + bytes_of_columns(call.variant.x, first * d_in);
    const Matrix x = matrix_of(rows, call.variant.x, count, d_in);
    if (few) {
      add_few_rows(KeptRows{x, nullptr, call.floats(kTau)}, w, partials, stream);
    } else {
      launch(mask, grid(blocks(pitch, kThreads), count), kThreads, stream, x, w, call.floats(kTau), pitch, type, v);
      add_row_tiles(matrix_of(v, type, count, pitch), nullptr, w, partials, stream);
    }
    Ending end;
    end.bias = call.floats(kB);
    end.y = static_cast<char*>(call.y) + bytes_of_columns(call.variant.x, first * d_out);
    end.type = call.variant.x;
    close(partials, count, d_out, end, stream);
  }
  return cut.used();
}

}  // namespace sparsegate::sparse_linear
