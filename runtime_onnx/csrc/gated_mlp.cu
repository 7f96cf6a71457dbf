// GatedMLP on CUDA: plain kernels, meant to be right and readable. They compile for sm_80 to sm_90 and PTX; they have not been run on a GPU yet.
//
// Float weights, x and predictor in float32, float16 or bfloat16, sums in float32. One warp per (token, neuron) scores the neuron and, if it is kept,
// computes its gate and up products; one block per (columns, 256 neurons, token) gathers the kept neurons in rising order and adds their rows of w_down;
// a last kernel adds these partial sums in rising order. No atomics and fixed grids: results repeat bit for bit and do not depend on the tokens beside.
// Everything is queued on ORT's stream; the host never waits and nothing is copied back.
#include <algorithm>
#include <type_traits>

#include "device.cuh"
#include "gated_mlp.h"

namespace sparsegate {
namespace gated_mlp {
namespace {

constexpr int kChunk = kThreads;   // neurons per partial sum
constexpr int64_t kTokens = 32;    // per pass: bounds the scratch memory

__device__ inline float relu(float v) { return v < 0.f ? 0.f : v; }  // NaN stays NaN

__device__ inline float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kSilu:
      return v / (1.f + expf(-v));
    case Activation::kGelu:
      return 0.5f * v * (1.f + erff(v * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case Activation::kRelu:
    case Activation::kDrelu:
      return relu(v);
    case Activation::kRelu2:
      return relu(v) * relu(v);
    default:
      return v;
  }
}

// row . v, by one warp; every lane gets the sum.
template <class W>
__device__ float warp_dot(const W* row, const float* v, int64_t d) {
  float sum = 0.f;
  for (int64_t j = threadIdx.x % 32; j < d; j += 32) sum = fmaf(load(row + j), v[j], sum);
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

// hidden[t, k] = relu(p1[k] . x[t]); one warp per (k, t)
template <class P>
__global__ void hide(const P* p1, const float* x, int64_t d, int64_t r, float* hidden) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, t = blockIdx.y;
  if (k >= r) return;
  const float sum = warp_dot(p1 + k * d, x + t * d, d);
  if (threadIdx.x % 32 == 0) hidden[t * r + k] = relu(sum);
}

// keep[t, i] = p2[i] . hidden[t] > tau[i]; one warp per (i, t)
template <class P>
__global__ void predict(const P* p2, const float* hidden, const float* tau, int64_t n, int64_t r, uint8_t* keep) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, t = blockIdx.y;
  if (i >= n) return;
  const float score = warp_dot(p2 + i * r, hidden + t * r, r);
  if (threadIdx.x % 32 == 0) keep[t * n + i] = score > tau[i];
}

struct Neurons {
  Activation activation;
  Score score;
  int64_t d, n;
  const float *b_gate, *b_up, *tau;  // nullptr where absent
};

// z[t, i] and keep[t, i]; one warp per (i, t). w_gate is nullptr in a plain MLP.
template <class W>
__global__ void neurons(Neurons p, const W* w_gate, const W* w_up, const float* x, float* z, uint8_t* keep) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, t = blockIdx.y, at = t * p.n + i;
  if (i >= p.n) return;
  if (p.score == Score::kPredictor && !keep[at]) return;
  x += t * p.d;
  const W* first = w_gate ? w_gate : w_up;
  const float* bias = w_gate ? p.b_gate : p.b_up;
  float value = activate(p.activation, warp_dot(first + i * p.d, x, p.d) + (bias ? bias[i] : 0.f));
  const bool kept = p.score == Score::kGate ? fabsf(value) > p.tau[i] : p.score != Score::kExact || value != 0.f;
  if (kept && w_gate) {  // the same for all lanes of the warp
    const float up = warp_dot(w_up + i * p.d, x, p.d) + (p.b_up ? p.b_up[i] : 0.f);
    value *= p.activation == Activation::kDrelu ? relu(up) : up;
  }
  if (threadIdx.x % 32 == 0) {
    z[at] = value;
    keep[at] = kept;
  }
}

// partial[t, chunk, c] = sum over the chunk's kept neurons of z * w_down[i, c]; grid (columns / 256, chunks, tokens)
template <class W>
__global__ void down(const W* w_down, const float* z, const uint8_t* keep, int64_t d, int64_t n, float* partial) {
  __shared__ int64_t rows[kChunk];
  __shared__ float scale[kChunk];
  const int64_t chunk = blockIdx.y, t = blockIdx.z, i = chunk * kChunk + threadIdx.x;
  const bool kept = i < n && keep[t * n + i];
  int total;
  const int place = place_of(kept, total);
  if (kept) {
    rows[place] = i;
    scale[place] = z[t * n + i];
  }
  __syncthreads();
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= d) return;
  float sum = 0.f;
  for (int k = 0; k < total; ++k) sum = fmaf(scale[k], load(w_down + rows[k] * d + c), sum);
  partial[(t * gridDim.y + chunk) * d + c] = sum;
}

// y[t, c] = b_down[c] + the partial sums in rising order + res^T hidden; grid (columns / 256, tokens)
template <class P>
__global__ void gather(const float* partial, const float* b_down, const P* res, const float* hidden, int64_t d, int64_t r, int64_t chunks, float* y) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, t = blockIdx.y;
  if (c >= d) return;
  float sum = b_down ? b_down[c] : 0.f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[(t * chunks + chunk) * d + c];
  float residual = 0.f;
  for (int64_t k = 0; res && k < r; ++k) residual = fmaf(hidden[t * r + k], load(res + k * d + c), residual);
  y[t * d + c] = sum + residual;
}

bool supported(const Variant& variant) { return variant.weights == Weights::kFloat && !variant.has(kSP1); }

struct CudaKernel {
  static constexpr const char *kName = "GatedMLP", *kProvider = "CUDAExecutionProvider";
  static constexpr bool kSameShape = true;
  Node node;

  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type) {
    ORT_TRY(node.init(api, info, x_type, false));
    return supported(node.variant) ? nullptr : node.error(ort::kNotImplemented, "weights and predictor must be float on CUDA, got integers");
  }

  ort::StatusPtr compute(ort::KernelContext* context) const {
    const ort::Api* api = node.api;
    const Variant& v = node.variant;
    Tensors in;
    Shape shape;
    Rows io;
    ORT_TRY(node.fetch(context, in, shape));
    ORT_TRY(open_rows(node, context, node.variant.x, shape.d, shape.d, io));
    if (io.tokens == 0) return nullptr;
    void* raw = nullptr;
    ORT_TRY(api->KernelContext_GetGPUComputeStream(context, &raw));
    const auto stream = static_cast<cudaStream_t>(raw);
    const int64_t d = shape.d, n = shape.n, r = shape.r, chunks = (n + kChunk - 1) / kChunk, pass = std::min(io.tokens, kTokens);

    // scratch of one pass, reused by the next: both run in order on one stream
    const int64_t floats = pass * (2 * d + n + r + chunks * d);
    const ort::MemoryInfo* memory = nullptr;
    ORT_TRY(api->GetTensorMemoryInfo(io.value, &memory));
    ORT_TRY(api->KernelContext_GetScratchBuffer(context, memory, static_cast<size_t>(floats * 4 + pass * n), &raw));
    float* x = static_cast<float*>(raw);
    float* y = x + pass * d;
    float* z = y + pass * d;
    float* hidden = z + pass * n;
    float* partial = hidden + pass * r;
    uint8_t* keep = reinterpret_cast<uint8_t*>(partial + pass * chunks * d);

    const auto floats_of = [&](Role role) { return static_cast<const float*>(in[role].data); };
    const Neurons p{v.activation, v.score, d, n, floats_of(kBGate), floats_of(kBUp), floats_of(kTau)};
    for (int64_t first = 0; first < io.tokens; first += pass) {
      const int64_t tokens = std::min(pass, io.tokens - first);
      const unsigned t = static_cast<unsigned>(tokens);
      with_type(v.x, [&](auto* type) {
        using X = std::decay_t<decltype(*type)>;
        widen<X><<<blocks(tokens * d, kThreads), kThreads, 0, stream>>>(static_cast<const X*>(io.x) + first * d, tokens * d, x);
      });
      with_type(r ? in[kP1].type : ort::kFloat32, [&](auto* type) {
        using P = std::decay_t<decltype(*type)>;
        if (r) hide<P><<<dim3(blocks(r, kWarps), t), kThreads, 0, stream>>>(static_cast<const P*>(in[kP1].data), x, d, r, hidden);
        if (v.has(kP2)) predict<P><<<dim3(blocks(n, kWarps), t), kThreads, 0, stream>>>(static_cast<const P*>(in[kP2].data), hidden, p.tau, n, r, keep);
      });
      with_type(in[kWUp].type, [&](auto* type) {
        using W = std::decay_t<decltype(*type)>;
        const auto weight = [&](Role role) { return static_cast<const W*>(in[role].data); };
        neurons<W><<<dim3(blocks(n, kWarps), t), kThreads, 0, stream>>>(p, weight(kWGate), weight(kWUp), x, z, keep);
        down<W><<<dim3(blocks(d, kThreads), static_cast<unsigned>(chunks), t), kThreads, 0, stream>>>(weight(kWDown), z, keep, d, n, partial);
      });
      with_type(v.has(kRes) ? in[kRes].type : ort::kFloat32, [&](auto* type) {
        using P = std::decay_t<decltype(*type)>;
        gather<P><<<dim3(blocks(d, kThreads), t), kThreads, 0, stream>>>(partial, floats_of(kBDown), static_cast<const P*>(in[kRes].data), hidden, d, r, chunks, y);
      });
      with_type(v.x, [&](auto* type) {
        using X = std::decay_t<decltype(*type)>;
        narrow<X><<<blocks(tokens * d, kThreads), kThreads, 0, stream>>>(y, tokens * d, static_cast<X*>(io.y) + first * d);
      });
    }
    const cudaError_t failed = cudaGetLastError();
    return failed == cudaSuccess ? nullptr : node.error(ort::kFail, std::string("CUDA: ") + cudaGetErrorString(failed));
  }
};

}  // namespace
}  // namespace gated_mlp

void gated_mlp_cuda_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) { append_ops<gated_mlp::CudaKernel>(api, ops); }

bool gated_mlp_cuda_supports(const char* name) {
  gated_mlp::Variant variant;
  return gated_mlp::variant_of_name(name, variant).empty() && gated_mlp::supported(variant);
}

}  // namespace sparsegate
