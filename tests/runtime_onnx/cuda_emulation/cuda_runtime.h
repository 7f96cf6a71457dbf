// CUDA on the CPU, for tests: the part of the language and of the runtime that the kernels use, so that their source
// compiles as plain C++.
//
// A block's threads are fibers of one thread that run one after the other, each until it meets a barrier or an exchange
// of its warp. Blocks run one after the other. The order is rising or, with `emulated::reversed`, falling: a kernel
// whose result depends on it lacks a barrier. Threads that wait in different places stop the launch with an error, as
// does a kernel that returns before a barrier. Time and memory traffic are not emulated.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace emulated {

extern bool reversed;
extern int64_t launches;

enum Kind : int { kShuffle, kBallot, kSync, kMatrix, kMultiply };
// Deposits this lane's bytes and returns those of all 32 lanes, `size` (at most 64) apart 64, once all have come.
const char* exchange(Kind kind, const void* mine, size_t size);
void block_barrier(bool vote);
bool block_vote();
const char* failed();
void forget_failure();
void run_grid(dim3 blocks, dim3 threads, const std::function<void()>& body);
inline int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace emulated

inline void __syncthreads() { emulated::block_barrier(false); }
inline int __syncthreads_or(int value) {
  emulated::block_barrier(value != 0);
  return emulated::block_vote();
}
inline void __syncwarp() { emulated::exchange(emulated::kSync, nullptr, 0); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const char* all = emulated::exchange(emulated::kShuffle, &value, sizeof value);
  T out;
  std::memcpy(&out, all + 64 * (emulated::lane() ^ mask), sizeof out);
  return out;
}
inline unsigned __ballot_sync(unsigned, int value) {
  const char* all = emulated::exchange(emulated::kBallot, &value, sizeof value);
  unsigned vote = 0;
  for (int l = 0; l < 32; ++l) {
    int other;
    std::memcpy(&other, all + 64 * l, sizeof other);
    vote |= (other != 0 ? 1u : 0u) << l;
  }
  return vote;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float __uint_as_float(unsigned v) {
  float out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}
inline unsigned __float_as_uint(float v) {
  unsigned out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}
using std::max;
using std::min;

// the runtime
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulated::run_grid(config->gridDim, config->blockDim, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}
