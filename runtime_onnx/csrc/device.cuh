// What the CUDA kernels of all ops share: element access, conversion kernels and launch arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ort_abi.h"

namespace sparsegate {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float load(const float* p) { return *p; }
__device__ inline float load(const __half* p) { return __half2float(*p); }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ inline float load(const int8_t* p) { return static_cast<float>(*p); }
__device__ inline void save(float* p, float v) { *p = v; }
__device__ inline void save(__half* p, float v) { *p = __float2half_rn(v); }
__device__ inline void save(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

template <class X>
__global__ void widen(const X* in, int64_t count, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = load(in + i);
}

template <class X>
__global__ void narrow(const float* in, int64_t count, X* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) save(out + i, in[i]);
}

// The place of this thread's channel among the block's kept ones, in rising order; `total` is their number. All threads of the block call it.
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

unsigned blocks(int64_t count, int64_t per) { return static_cast<unsigned>((count + per - 1) / per); }

// Calls `body` with a null pointer of the dtype's C++ type.
template <class Body>
void with_type(int type, Body body) {
  if (type == ort::kFloat16) return body(static_cast<const __half*>(nullptr));
  if (type == ort::kBfloat16) return body(static_cast<const __nv_bfloat16*>(nullptr));
  body(static_cast<const float*>(nullptr));
}

}  // namespace
}  // namespace sparsegate
