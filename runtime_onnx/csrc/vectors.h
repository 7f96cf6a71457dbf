// Vectors of 16 float lanes in every build (1, 2 or 4 registers), so that all builds add in the same order; avx512 and
// avx2 agree bit for bit.
//
// Included by the files that are compiled once per instruction set, with -DSPARSEGATE_ISA=avx512vnni | avx512 | avx2 |
// portable and that set's flags. Everything here has internal linkage and no standard template is used: the linker must
// never pick, for code that runs on every CPU, a copy of an inline function that was compiled for AVX-512.
#pragma once

#include <cstdint>

#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

constexpr int LANES = 16;
constexpr int LINE = 64;  // bytes

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
using reg = __m512;
using four = __m128;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
using reg = __m256;
using four = __m128;
#elif defined(__aarch64__)
constexpr int WIDTH = 4;
using reg = float32x4_t;
using four = float32x4_t;
#else
constexpr int WIDTH = 4;
typedef float reg __attribute__((vector_size(16)));
using four = reg;
#endif
constexpr int PARTS = LANES / WIDTH;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};
struct vec {
  reg part[PARTS];
};

template <class T>
inline T unaligned(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

inline reg fma(reg a, reg b, reg c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline vec fma(const vec& a, const vec& b, const vec& c) {
  vec out;
  for (int i = 0; i < PARTS; ++i) out.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return out;
}

inline vec fma(reg a, const vec& b, const vec& c) {
  vec out;
  for (int i = 0; i < PARTS; ++i) out.part[i] = fma(a, b.part[i], c.part[i]);
  return out;
}

inline reg splat(float s) { return s - reg{}; }  // s - 0 is s, -0 included

// float32 of the WIDTH values at p
inline reg load_part(const float* p) { return unaligned<reg>(p); }

inline reg load_part(const half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(unaligned<uint16x4_t>(p)));
#else
  typedef uint32_t word __attribute__((vector_size(16)));
  const word h = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  // exponent and mantissa moved up by 13 bits are the value times 2^-112, subnormals included; exponent 31 is inf or
  // NaN
  word bits = (word)((reg)((h & 0x7fffu) << 13) * 0x1p112f) | (h & 0x8000u) << 16;
  bits |= (word)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (reg)bits;
#endif
}

inline reg load_part(const bfloat* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#elif defined(__aarch64__)
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(unaligned<uint16x4_t>(p)), 16));
#else
  typedef uint32_t word __attribute__((vector_size(16)));
  const word h = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  return (reg)(h << 16);
#endif
}

inline reg load_part(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(unaligned<uint32_t>(p))))));
#else
  return reg{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
#endif
}

template <class W>
inline vec load(const W* p) {
  vec out;
  for (int i = 0; i < PARTS; ++i) out.part[i] = load_part(p + i * WIDTH);
  return out;
}

// The first `count` < LANES values, zeros behind them: nothing past the row is read.
template <class W>
inline vec load_tail(const W* p, int64_t count) {
  W values[LANES];
  memset(values, 0, sizeof values);
  memcpy(values, p, static_cast<size_t>(count) * sizeof(W));
  return load(values);
}

inline void store(float* p, const vec& value) { memcpy(p, &value, sizeof value); }

// The first `count` <= 4 values
inline void store_some(float* p, const four& values, int count) {
  if (count == 4)
    memcpy(p, &values, sizeof values);
  else
    memcpy(p, &values, static_cast<size_t>(count) * sizeof(float));
}

#if !defined(__AVX512F__)
// Lanes i, i + 4, i + 8 and i + 12 into lane i: (v[i] + v[i + 8]) + (v[i + 4] + v[i + 12])
inline four fold(const vec& v) {
#if defined(__AVX2__)
  const __m256 eight = _mm256_add_ps(v.part[0], v.part[1]);
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  return (v.part[0] + v.part[2]) + (v.part[1] + v.part[3]);
#endif
}
#endif

// The sums of four vectors: (lane 0 + 1) + (lane 2 + 3) of each folded vector
inline four sums(const vec& first, const vec& second, const vec& third, const vec& fourth) {
#if defined(__AVX512F__)
  const reg a = first.part[0], b = second.part[0], c = third.part[0], d = fourth.part[0];
  // 4 lanes each: a 0 + 2, a 1 + 3, b 0 + 2, b 1 + 3
  const reg ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  const reg cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
  const reg folded = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
  const reg pairs = folded + _mm512_permute_ps(folded, 0xb1);
  const reg total = pairs + _mm512_permute_ps(pairs, 0x4e);
  return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, total));
#else
  const four a = fold(first), b = fold(second), c = fold(third), d = fold(fourth);
#if defined(__AVX2__)
  return _mm_hadd_ps(_mm_hadd_ps(a, b), _mm_hadd_ps(c, d));
#elif defined(__aarch64__)
  return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
#else
  return four{(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]), (c[0] + c[1]) + (c[2] + c[3]),
              (d[0] + d[1]) + (d[2] + d[3])};
#endif
#endif
}

}  // namespace
}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
