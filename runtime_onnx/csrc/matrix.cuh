// Matrices as they lie in device memory, read eight columns at a time and widened to float32 in registers.
//
// Every kernel gives a lane eight neighbouring columns, whatever the format: 32 bytes of float32, 16 of a 16-bit float,
// 8 of int8, 4 of int4. A warp so reads 256 neighbouring columns of a row: 1024, 512, 256 or 128 bytes, whole 128-byte
// lines. A matrix whose rows are not whole eights of columns is read element by element, for the sake of odd shapes,
// not of speed.
#pragma once

#include <instructions.cuh>

#include <cstring>
#include <type_traits>

#include "device.cuh"
#include "op.h"

namespace sparsegate {

struct Int4 {};  // two to a byte, the low nibble first, value q - 8, one float16 scale for 32 columns

// data nullptr: no matrix, rows and columns 0.
struct Matrix {
  const char* data = nullptr;
  const void* scale = nullptr;               // int8: float32 [rows]; int4: float16 [rows, columns / 32]
  int64_t rows = 0, columns = 0, pitch = 0;  // bytes from row to row
  int type = ort::kFloat32;                  // kUint8 stands for int4
  // eight columns from a multiple of eight on lie at a multiple of their size
  bool whole = false;
};

inline int64_t bytes_of_columns(int type, int64_t columns) {
  return type == ort::kFloat32 ? 4 * columns
         : type == ort::kInt8  ? columns
         : type == ort::kUint8 ? columns / 2
                               : 2 * columns;
}

inline Matrix matrix_of(const void* data, int type, int64_t rows, int64_t columns, const void* scale = nullptr) {
  Matrix m;
  if (!data) return m;
  m.data = static_cast<const char*>(data);
  m.scale = scale;
  m.rows = rows;
  m.columns = columns;
  m.pitch = bytes_of_columns(type, columns);
  m.type = type;
  m.whole = columns % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return m;
}

inline Matrix matrix_of(const Tensor& t, const Tensor& scale) {
  return matrix_of(t.data, t.type, t.dims[0], t.type == ort::kUint8 ? 2 * t.dims[1] : t.dims[1], scale.data);
}

// Eight columns as they are stored, in registers.
template <class W>
struct Eight {
  uint4 bits;
};
template <>
struct Eight<float> {
  uint4 bits, more;
};
template <>
struct Eight<int8_t> {
  uint2 bits;
};
template <>
struct Eight<Int4> {
  uint32_t bits;
};

template <class W>
__device__ inline const char* address(const Matrix& m, int64_t row, int64_t column) {
  return m.data + row * m.pitch + (std::is_same_v<W, Int4> ? column / 2 : column * static_cast<int64_t>(sizeof(W)));
}

// Of a whole matrix; the column a multiple of eight.
template <class W>
__device__ inline Eight<W> read(const Matrix& m, int64_t row, int64_t column) {
  Eight<W> out;
  const char* at = address<W>(m, row, column);
  stream(at, out.bits);
  if constexpr (std::is_same_v<W, float>) stream(at + 16, out.more);
  return out;
}

// Of any matrix: columns past the end are 0. (int4 matrices are always whole.)
template <class W>
__device__ inline Eight<W> read_edge(const Matrix& m, int64_t row, int64_t column) {
  if constexpr (std::is_same_v<W, Int4>) {
    return read<W>(m, row, column);
  } else {
    using Bits = std::conditional_t<sizeof(W) == 4, uint32_t, std::conditional_t<sizeof(W) == 2, uint16_t, uint8_t>>;
    const Bits* at = reinterpret_cast<const Bits*>(address<W>(m, row, column));
    Bits bits[8];
    for (int k = 0; k < 8; ++k) bits[k] = column + k < m.columns ? at[k] : static_cast<Bits>(0);
    Eight<W> out;
    memcpy(&out, bits, sizeof out);
    return out;
  }
}

// Eight columns of each of the first `count` of kRows rows of any matrix
template <class W, int kRows, class Rows>
__device__ inline void read_rows(const Matrix& m, const Rows& rows, int count, int64_t column, Eight<W> (&out)[kRows]) {
  if (m.whole) {
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      if (k < count) out[k] = read<W>(m, rows[k], column);
  } else {
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      if (k < count) out[k] = read_edge<W>(m, rows[k], column);
  }
}

// Of any matrix at any place: 0 outside.
template <class W>
__device__ inline Eight<W> read_bounded(const Matrix& m, int64_t row, int64_t column) {
  Eight<W> out{};
  if (row < m.rows && column < m.columns) out = m.whole ? read<W>(m, row, column) : read_edge<W>(m, row, column);
  return out;
}

__device__ inline void widen_words(uint32_t word, float* v, __half) {
  v[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  v[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
__device__ inline void widen_words(uint32_t word, float* v, __nv_bfloat16) {
  v[0] = __uint_as_float(word << 16);
  v[1] = __uint_as_float(word & 0xffff0000u);
}

// The stored numbers, without their scales. Integers become floats by their bits, without a slow conversion:
// 2^23 + i, i below 2^23, is 0x4b000000 | i.
template <class W>
__device__ inline void widen(const Eight<W>& e, float (&v)[8]) {
  if constexpr (std::is_same_v<W, float>) {
    const uint32_t words[8] = {e.bits.x, e.bits.y, e.bits.z, e.bits.w, e.more.x, e.more.y, e.more.z, e.more.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __uint_as_float(words[k]);
  } else if constexpr (std::is_same_v<W, int8_t>) {
    const uint32_t words[2] = {e.bits.x ^ 0x80808080u, e.bits.y ^ 0x80808080u};  // value + 128
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __uint_as_float(0x4b000000u | (words[k / 4] >> 8 * (k % 4) & 255u)) - 8388736.f;
  } else if constexpr (std::is_same_v<W, Int4>) {
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __uint_as_float(0x4b000000u | (e.bits >> 4 * k & 15u)) - 8388616.f;  // value + 8
  } else {
    const uint32_t words[4] = {e.bits.x, e.bits.y, e.bits.z, e.bits.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) widen_words(words[k], v + 2 * k, W{});
  }
}

// The scale of an int4 matrix's eight columns; 1 for other formats.
template <class W>
__device__ inline float group_scale(const Matrix& m, int64_t row, int64_t column) {
  if constexpr (std::is_same_v<W, Int4>) {
    return __half2float(static_cast<const __half*>(m.scale)[row * (m.columns / 32) + column / 32]);
  } else {
    return 1.f;
  }
}

// The scale of a whole row of an int8 matrix; 1 for other formats.
__device__ inline float row_scale(const Matrix& m, int64_t row) {
  return m.type == ort::kInt8 ? static_cast<const float*>(m.scale)[row] : 1.f;
}

template <class W>
__device__ inline void eight_of(const Matrix& m, int64_t row, int64_t column, float (&v)[8]) {
  widen<W>(read_bounded<W>(m, row, column), v);
  if constexpr (std::is_same_v<W, Int4>) {
    const float scale = row < m.rows && column < m.columns ? group_scale<W>(m, row, column) : 0.f;
    for (int k = 0; k < 8; ++k) v[k] *= scale;
  }
}

// Eight numbers of a matrix of any type, scales of groups included, scales of rows not; 0 outside.
__device__ inline void eight(const Matrix& m, int64_t row, int64_t column, float (&v)[8]) {
  switch (m.type) {
    case ort::kFloat16:
      return eight_of<__half>(m, row, column, v);
    case ort::kBfloat16:
      return eight_of<__nv_bfloat16>(m, row, column, v);
    case ort::kInt8:
      return eight_of<int8_t>(m, row, column, v);
    case ort::kUint8:
      return eight_of<Int4>(m, row, column, v);
    default:
      return eight_of<float>(m, row, column, v);
  }
}

// Eight float32 values, those past the end 0; `whole` as in Matrix.
__device__ inline void eight_floats(const float* v, int64_t column, int64_t columns, bool whole, float (&out)[8]) {
  if (whole) {
    const float4 lo = *reinterpret_cast<const float4*>(v + column);
    const float4 hi = *reinterpret_cast<const float4*>(v + column + 4);
    out[0] = lo.x, out[1] = lo.y, out[2] = lo.z, out[3] = lo.w;
    out[4] = hi.x, out[5] = hi.y, out[6] = hi.z, out[7] = hi.w;
  } else {
    for (int k = 0; k < 8; ++k) out[k] = column + k < columns ? v[column + k] : 0.f;
  }
}

// Calls `body` with a value of the C++ type that a matrix of this type holds.
template <class Body>
void with_type(int type, Body body) {
  if (type == ort::kFloat16) return body(__half{});
  if (type == ort::kBfloat16) return body(__nv_bfloat16{});
  if (type == ort::kInt8) return body(int8_t{});
  if (type == ort::kUint8) return body(Int4{});
  body(float{});
}

}  // namespace sparsegate
