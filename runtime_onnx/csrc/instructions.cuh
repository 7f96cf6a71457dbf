// The machine instructions that CUDA C++ has no name for: loads that leave the first-level cache to x, and the tensor
// cores (sm_80 and later).
//
// Included in angle brackets: the emulation that the tests compile on a machine without a GPU puts a file of this name,
// which implements the same functions by their definition, before this folder.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sparsegate {

// 16, 8 or 4 bytes that are read once; the address must be a multiple of the size.
__device__ inline void stream(const void* from, uint4& to) {
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
      : "l"(from));
}
__device__ inline void stream(const void* from, uint2& to) {
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
}
__device__ inline void stream(const void* from, uint32_t& to) {
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to) : "l"(from));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8 (16
// bytes, aligned) and gets, of each matrix, the elements (l / 4, 2 (l % 4)) and the next of that row.
__device__ inline void load_matrices(const void* row, uint32_t (&to)[4]) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}
// The same of the transposed matrices: elements (2 (l % 4), l / 4) and the next of that column.
__device__ inline void load_transposed(const void* row, uint32_t (&to)[4]) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8], sums in float32. With g = lane / 4, q = 2 (lane % 4), two elements to a
// register: a holds (g, q), (g + 8, q), (g, q + 8), (g + 8, q + 8) and the next column of each;
// b holds (q, g), (q + 8, g) and the next row;
// sum holds (g, q), (g, q + 1), (g + 8, q), (g + 8, q + 1).
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace sparsegate
