// What the CUDA kernels of all ops share: elements by type, launches, sums over warps and blocks, and the place of a
// kept row among the kept ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ort_abi.h"

namespace sparsegate {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline int64_t blocks(int64_t count, int64_t per) { return (count + per - 1) / per; }

inline dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// Queues a kernel; the error, if any, is what cudaGetLastError returns.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

__device__ inline float relu(float v) { return v < 0.f ? 0.f : v; }  // NaN stays NaN

__device__ inline float load(const void* data, int type, int64_t i) {
  if (type == ort::kFloat16) return __half2float(static_cast<const __half*>(data)[i]);
  if (type == ort::kBfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

__device__ inline void save(void* data, int type, int64_t i, float v) {
  if (type == ort::kFloat16)
    static_cast<__half*>(data)[i] = __float2half_rn(v);
  else if (type == ort::kBfloat16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v);
  else
    static_cast<float*>(data)[i] = v;
}

// The sum over all threads of the block, added in one order; all threads call it, thread 0 gets it.
__device__ inline float block_sum(float v) {
  __shared__ float sums[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  if (lane == 0) sums[warp] = v;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; threadIdx.x == 0 && w < static_cast<int>(blockDim.x) / 32; ++w) total += sums[w];
  return total;
}

// The place of this thread's row among the block's kept ones, in rising order; `total` is their number. All threads of
// the block call it, once.
__device__ inline int place_of(bool kept, int& total) {
  __shared__ int counts[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned vote = __ballot_sync(kAllLanes, kept);
  if (lane == 0) counts[warp] = __popc(vote);
  __syncthreads();
  int place = __popc(vote & ((1u << lane) - 1u));
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) place += counts[w];
    total += counts[w];
  }
  return place;
}

}  // namespace sparsegate
