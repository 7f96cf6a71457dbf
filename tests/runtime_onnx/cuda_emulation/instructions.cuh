// The machine instructions of csrc/instructions.cuh by their definition; `exchange` gives every lane what the 32 lanes
// of its warp hold.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace sparsegate {

template <class Bits>
void stream(const void* from, Bits& to) {
  // the machine stops at an address that is not a multiple of the size
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Bits)) std::abort();
  std::memcpy(&to, from, sizeof to);
}

inline void load_matrices(const void* row, uint32_t (&to)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  const char* all = emulated::exchange(emulated::kMatrix, row, 16);
  for (int m = 0; m < 4; ++m)
    std::memcpy(&to[m], all + 64 * (8 * m + emulated::lane() / 4) + 4 * (emulated::lane() % 4), 4);
}

inline void load_transposed(const void* row, uint32_t (&to)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  const char* all = emulated::exchange(emulated::kMatrix, row, 16);
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e)
      std::memcpy(&pair[e], all + 64 * (8 * m + 2 * (emulated::lane() % 4) + e) + 2 * (emulated::lane() / 4), 2);
    std::memcpy(&to[m], pair, 4);
  }
}

inline float emulated_element(uint16_t bits, __half) { return __half2float(__half{bits}); }
inline float emulated_element(uint16_t bits, __nv_bfloat16) { return __bfloat162float(__nv_bfloat16{bits}); }

template <class T>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const char* all = emulated::exchange(emulated::kMultiply, mine, sizeof mine);
  const auto element = [&](int lane, int reg, int half) {
    uint32_t word;
    std::memcpy(&word, all + 64 * lane + 4 * reg, 4);
    return emulated_element(static_cast<uint16_t>(word >> 16 * half), type);
  };
  const int g = emulated::lane() / 4, q = 2 * (emulated::lane() % 4);
  for (int e = 0; e < 4; ++e) {
    const int row = g + 8 * (e / 2), column = q + e % 2;
    float products = 0.f;
    for (int k = 0; k < 16; ++k)
      products += element(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2) *
                  element(4 * column + k % 8 / 2, 4 + k / 8, k % 2);
    sum[e] += products;
  }
}

}  // namespace sparsegate
