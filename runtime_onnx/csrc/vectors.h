// Vectors of 16 float lanes in every build (1, 2 or 4 registers), so that all builds add in the same order; avx512 and avx2 agree bit for bit.
//
// Included by the files that are compiled once per instruction set, with -DSPARSEGATE_ISA=avx512vnni | avx512 | avx2 | portable and that set's
// flags. Everything here has internal linkage and no standard template is used: the linker must never pick, for code that runs on every CPU,
// a copy of an inline function that was compiled for AVX-512.
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

struct half { uint16_t bits; };
struct bfloat { uint16_t bits; };
struct vec { reg part[PARTS]; };

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

inline vec load(const float* p) {
  vec out;
  for (int i = 0; i < PARTS; ++i) out.part[i] = unaligned<reg>(p + i * WIDTH);
  return out;
}

inline vec load(const half* p) {
  vec out;
  for (int i = 0; i < PARTS; ++i) {
#if defined(__AVX512F__)
    out.part[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    out.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * WIDTH)));
#elif defined(__aarch64__)
    out.part[i] = vcvt_f32_f16(vreinterpret_f16_u16(unaligned<uint16x4_t>(p + i * WIDTH)));
#else
    typedef uint32_t word __attribute__((vector_size(16)));
    const half* q = p + i * WIDTH;
    const word h = {q[0].bits, q[1].bits, q[2].bits, q[3].bits};
    // exponent and mantissa moved up by 13 bits are the value times 2^-112, subnormals included; exponent 31 is inf or NaN
    word bits = (word)((reg)((h & 0x7fffu) << 13) * 0x1p112f) | (h & 0x8000u) << 16;
    bits |= (word)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    out.part[i] = (reg)bits;
#endif
  }
  return out;
}

inline vec load(const bfloat* p) {
  vec out;
  for (int i = 0; i < PARTS; ++i) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    out.part[i] = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * WIDTH)));
    out.part[i] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#elif defined(__aarch64__)
    out.part[i] = vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(unaligned<uint16x4_t>(p + i * WIDTH)), 16));
#else
    typedef uint32_t word __attribute__((vector_size(16)));
    const bfloat* q = p + i * WIDTH;
    const word h = {q[0].bits, q[1].bits, q[2].bits, q[3].bits};
    out.part[i] = (reg)(h << 16);
#endif
  }
  return out;
}

inline vec load(const int8_t* p) {
  vec out;
  for (int i = 0; i < PARTS; ++i) {
#if defined(__AVX512F__)
    out.part[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    out.part[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * WIDTH))));
#elif defined(__aarch64__)
    const int16x8_t eight = vmovl_s8(unaligned<int8x8_t>(p + i / 2 * 8));
    out.part[i] = vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(eight) : vget_low_s16(eight)));
#else
    const int8_t* q = p + i * WIDTH;
    out.part[i] = reg{static_cast<float>(q[0]), static_cast<float>(q[1]), static_cast<float>(q[2]), static_cast<float>(q[3])};
#endif
  }
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

// Lanes i, i + 4, i + 8 and i + 12 into lane i: (v[i] + v[i + 8]) + (v[i + 4] + v[i + 12])
inline four fold(const vec& v) {
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.part[0]), _mm512_extractf32x8_ps(v.part[0], 1));
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX2__)
  const __m256 eight = _mm256_add_ps(v.part[0], v.part[1]);
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  return (v.part[0] + v.part[2]) + (v.part[1] + v.part[3]);
#endif
}

// The sums of four vectors: (lane 0 + 1) + (lane 2 + 3) of each folded vector
inline four sums(const vec& first, const vec& second, const vec& third, const vec& fourth) {
  const four a = fold(first), b = fold(second), c = fold(third), d = fold(fourth);
#if defined(__AVX2__)
  return _mm_hadd_ps(_mm_hadd_ps(a, b), _mm_hadd_ps(c, d));
#elif defined(__aarch64__)
  return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
#else
  return four{(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]), (c[0] + c[1]) + (c[2] + c[3]), (d[0] + d[1]) + (d[2] + d[3])};
#endif
}

}  // namespace
}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
