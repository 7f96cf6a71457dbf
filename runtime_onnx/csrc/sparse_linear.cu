// SparseLinear on CUDA: plain kernels, meant to be right and readable. They compile for sm_80 to sm_90 and PTX; they have not been run on a GPU yet.
//
// x and float weights in float32, float16 or bfloat16, or int8 weights; sums in float32. One block per (columns, 256 input channels, token) lists its active
// channels in rising order and adds their rows; a second kernel adds these partial sums in rising order. No atomics and fixed grids: results repeat bit for
// bit and do not depend on the tokens beside. Everything is queued on ORT's stream; the host never waits and nothing is copied back.
#include <algorithm>
#include <type_traits>

#include "device.cuh"
#include "sparse_linear.h"

namespace sparsegate {
namespace sparse_linear {
namespace {

constexpr int kChunk = kThreads;  // channels per partial sum
constexpr int64_t kTokens = 32;   // per pass: bounds the scratch memory

// partial[t, chunk, c] = sum over the chunk's active channels of x_j * w[j, c]; grid (columns / 256, chunks, tokens). s_w is nullptr for float weights.
template <class X, class W>
__global__ void rows(const X* x, const float* tau, const float* s_w, const W* w, int64_t d_in, int64_t d_out, float* partial) {
  __shared__ int64_t row[kChunk];
  __shared__ float scale[kChunk];
  const int64_t chunk = blockIdx.y, t = blockIdx.z, j = chunk * kChunk + threadIdx.x;
  const float value = j < d_in ? load(x + t * d_in + j) : 0.f;
  const bool kept = j < d_in && fabsf(value) > tau[j];
  int total;
  const int place = place_of(kept, total);
  if (kept) {
    row[place] = j;
    scale[place] = s_w ? value * s_w[j] : value;
  }
  __syncthreads();
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= d_out) return;
  float sum = 0.f;
  for (int k = 0; k < total; ++k) sum = fmaf(scale[k], load(w + row[k] * d_out + c), sum);
  partial[(t * gridDim.y + chunk) * d_out + c] = sum;
}

// y[t, c] = b[c] + the partial sums in rising order; grid (columns / 256, tokens)
template <class X>
__global__ void join(const float* partial, const float* b, int64_t d_out, int64_t chunks, X* y) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, t = blockIdx.y;
  if (c >= d_out) return;
  float sum = b ? b[c] : 0.f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[(t * chunks + chunk) * d_out + c];
  save(y + t * d_out + c, sum);
}

struct CudaKernel {
  static constexpr const char *kName = "SparseLinear", *kProvider = "CUDAExecutionProvider";
  static constexpr bool kSameShape = false;
  Node node;

  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type) { return node.init(api, info, x_type, false); }

  ort::StatusPtr compute(ort::KernelContext* context) const {
    const ort::Api* api = node.api;
    Tensors in;
    Shape shape;
    Rows io;
    ORT_TRY(node.fetch(context, in, shape));
    const int64_t d_in = shape.d_in, d_out = shape.d_out, chunks = (d_in + kChunk - 1) / kChunk;
    ORT_TRY(open_rows(node, context, node.variant.x, d_in, d_out, io));
    if (io.tokens == 0) return nullptr;
    void* raw = nullptr;
    ORT_TRY(api->KernelContext_GetGPUComputeStream(context, &raw));
    const auto stream = static_cast<cudaStream_t>(raw);
    const ort::MemoryInfo* memory = nullptr;
    const int64_t pass = std::min(io.tokens, kTokens);
    ORT_TRY(api->GetTensorMemoryInfo(io.value, &memory));
    ORT_TRY(api->KernelContext_GetScratchBuffer(context, memory, static_cast<size_t>(pass * chunks * d_out) * sizeof(float), &raw));
    float* partial = static_cast<float*>(raw);  // reused by the next pass: both run in order on one stream

    const auto floats_of = [&](Role role) { return static_cast<const float*>(in[role].data); };
    for (int64_t first = 0; first < io.tokens; first += pass) {
      const unsigned tokens = static_cast<unsigned>(std::min(pass, io.tokens - first));
      const dim3 grid(blocks(d_out, kThreads), static_cast<unsigned>(chunks), tokens);
      with_type(node.variant.x, [&](auto* x_type) {
        using X = std::remove_const_t<std::remove_pointer_t<decltype(x_type)>>;
        const X* x = static_cast<const X*>(io.x) + first * d_in;
        const auto launch = [&](auto* w_type) {
          using W = std::remove_const_t<std::remove_pointer_t<decltype(w_type)>>;
          rows<X, W><<<grid, kThreads, 0, stream>>>(x, floats_of(kTau), floats_of(kSW), static_cast<const W*>(in[kW].data), d_in, d_out, partial);
        };
        if (node.variant.quantised)
          launch(static_cast<const int8_t*>(nullptr));
        else
          with_type(in[kW].type, launch);
        join<X><<<dim3(grid.x, tokens), kThreads, 0, stream>>>(partial, floats_of(kB), d_out, chunks, static_cast<X*>(io.y) + first * d_out);
      });
    }
    const cudaError_t failed = cudaGetLastError();
    return failed == cudaSuccess ? nullptr : node.error(ort::kFail, std::string("CUDA: ") + cudaGetErrorString(failed));
  }
};

}  // namespace
}  // namespace sparse_linear

void sparse_linear_cuda_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) { append_ops<sparse_linear::CudaKernel>(api, ops); }

bool sparse_linear_cuda_supports(const char* name) {
  sparse_linear::Variant variant;
  return sparse_linear::variant_of_name(name, variant).empty();
}

}  // namespace sparsegate
