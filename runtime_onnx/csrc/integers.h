// Vectors of 64 bytes for integer arithmetic, in every build: 1, 2 or 4 registers. See vectors.h; everything has
// internal linkage.
#pragma once

#include "vectors.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

#if defined(__AVX512F__)
using ireg = __m512i;
#elif defined(__AVX2__)
using ireg = __m256i;
#else
typedef int32_t ireg __attribute__((vector_size(16)));
typedef int16_t words __attribute__((vector_size(16)));
typedef uint8_t octets __attribute__((vector_size(16)));
#endif
// 64 uint8 or int8, or 16 int32
struct bytes {
  ireg part[PARTS];
};

#define SPARSEGATE_EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; ++i)

// Register by register: a copy of the whole struct would pass through memory
inline bytes load_bytes(const void* p) {
  bytes out;
  SPARSEGATE_EACH_PART out.part[i] = unaligned<ireg>(static_cast<const char*>(p) + i * sizeof(ireg));
  return out;
}

inline void store_bytes(void* p, const bytes& value) {
  SPARSEGATE_EACH_PART memcpy(static_cast<char*>(p) + i * sizeof(ireg), &value.part[i], sizeof(ireg));
}

// The first `count` < 64 bytes, zeros behind them
inline bytes load_bytes(const void* p, int64_t count) {
#if defined(__AVX512BW__)
  return bytes{{_mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, p)}};
#endif
  char padded[64] = {};
  memcpy(padded, p, static_cast<size_t>(count));
  return load_bytes(padded);
}

inline bytes spread(int32_t value) {
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_set1_epi32(value);
#elif defined(__AVX2__)
    out.part[i] = _mm256_set1_epi32(value);
#else
    out.part[i] = ireg{value, value, value, value};
#endif
  }
  return out;
}

inline bytes operator^(const bytes& a, const bytes& b) {
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_xor_si512(a.part[i], b.part[i]);
#elif defined(__AVX2__)
    out.part[i] = _mm256_xor_si256(a.part[i], b.part[i]);
#else
    out.part[i] = a.part[i] ^ b.part[i];
#endif
  }
  return out;
}

// What is added to int8 weights before `dot_weights` takes them: VNNI multiplies uint8 by int8
#if defined(__AVX512VNNI__)
constexpr int32_t WEIGHT_OFFSET = 128;
inline bytes weights_of(const bytes& a) { return a ^ spread(static_cast<int32_t>(0x80808080u)); }
#else
constexpr int32_t WEIGHT_OFFSET = 0;
inline bytes weights_of(const bytes& a) { return a; }
#endif

inline bytes low_nibbles(const bytes& a) {
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_and_si512(a.part[i], _mm512_set1_epi8(15));
#elif defined(__AVX2__)
    out.part[i] = _mm256_and_si256(a.part[i], _mm256_set1_epi8(15));
#else
    out.part[i] = a.part[i] & 0x0f0f0f0f;
#endif
  }
  return out;
}

inline bytes high_nibbles(const bytes& a) {
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_and_si512(_mm512_srli_epi16(a.part[i], 4), _mm512_set1_epi8(15));
#elif defined(__AVX2__)
    out.part[i] = _mm256_and_si256(_mm256_srli_epi16(a.part[i], 4), _mm256_set1_epi8(15));
#else
    out.part[i] = (a.part[i] >> 4) & 0x0f0f0f0f;
#endif
  }
  return out;
}

// sum + the products of four weights and four int8 s per int32, exact. dot_weights: int8 weights as `weights_of` gives
// them; dot_nibbles: 0 .. 15.
inline ireg dot_weights(ireg sum, ireg w, ireg s) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, w, s);
#elif defined(__AVX512F__)
  // even and odd bytes as int16: no step saturates
  const __m512i even =
      _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
  return _mm512_add_epi32(sum,
                          _mm512_add_epi32(even, _mm512_madd_epi16(_mm512_srai_epi16(w, 8), _mm512_srai_epi16(s, 8))));
#elif defined(__AVX2__)
  // |w| <= 128 times s with w's sign, |s| <= 127: two products fit int16
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(s, w));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (ireg)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)s);
#elif defined(__aarch64__)
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)s));
  const int16x8_t high = vmull_high_s8((int8x16_t)w, (int8x16_t)s);
  return sum + (ireg)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#else
  const words a = (words)w, b = (words)s;
  const ireg even = (ireg)(((words)(a << 8) >> 8) * ((words)(b << 8) >> 8)), odd = (ireg)((a >> 8) * (b >> 8));
  return sum + ((ireg)(even << 16) >> 16) + (even >> 16) + ((ireg)(odd << 16) >> 16) + (odd >> 16);
#endif
}

inline ireg dot_nibbles(ireg sum, ireg u, ireg s) {
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(u, s), _mm512_set1_epi16(1)));
#elif defined(__AVX2__) && !defined(__AVX512VNNI__)
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#else
  return dot_weights(sum, u, s);
#endif
}

inline bytes dot_weights(const bytes& sum, const bytes& w, const bytes& s) {
  bytes out;
  SPARSEGATE_EACH_PART out.part[i] = dot_weights(sum.part[i], w.part[i], s.part[i]);
  return out;
}

inline bytes dot_nibbles(const bytes& sum, const bytes& u, const bytes& s) {
  bytes out;
  SPARSEGATE_EACH_PART out.part[i] = dot_nibbles(sum.part[i], u.part[i], s.part[i]);
  return out;
}

// In every 16 bytes: the low or high halves of a and b, in turns of one byte or of two
#if defined(__AVX512F__)
#define SPARSEGATE_ZIP(name, bits, half) \
  inline ireg name(ireg a, ireg b) { return _mm512_unpack##half##_epi##bits(a, b); }
#elif defined(__AVX2__)
#define SPARSEGATE_ZIP(name, bits, half) \
  inline ireg name(ireg a, ireg b) { return _mm256_unpack##half##_epi##bits(a, b); }
#endif
#if defined(__AVX2__)
SPARSEGATE_ZIP(zip8_low, 8, lo)
SPARSEGATE_ZIP(zip8_high, 8, hi)
SPARSEGATE_ZIP(zip16_low, 16, lo)
SPARSEGATE_ZIP(zip16_high, 16, hi)
#undef SPARSEGATE_ZIP
#elif defined(__clang__)
inline ireg zip8_low(ireg a, ireg b) {
  return (ireg)__builtin_shufflevector((octets)a, (octets)b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline ireg zip8_high(ireg a, ireg b) {
  return (ireg)__builtin_shufflevector((octets)a, (octets)b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                       31);
}
inline ireg zip16_low(ireg a, ireg b) {
  return (ireg)__builtin_shufflevector((words)a, (words)b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline ireg zip16_high(ireg a, ireg b) {
  return (ireg)__builtin_shufflevector((words)a, (words)b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
inline ireg zip8_low(ireg a, ireg b) {
  return (ireg)__builtin_shuffle((octets)a, (octets)b, octets{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}
inline ireg zip8_high(ireg a, ireg b) {
  return (ireg)__builtin_shuffle((octets)a, (octets)b,
                                 octets{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
inline ireg zip16_low(ireg a, ireg b) {
  return (ireg)__builtin_shuffle((words)a, (words)b, words{0, 8, 1, 9, 2, 10, 3, 11});
}
inline ireg zip16_high(ireg a, ireg b) {
  return (ireg)__builtin_shuffle((words)a, (words)b, words{4, 12, 5, 13, 6, 14, 7, 15});
}
#endif

// Four rows of 64 bytes -> out[v]: int32 4 L + e holds the rows' bytes of column 16 L + 4 v + e
inline void interleave(const bytes* row, bytes* out) {
  SPARSEGATE_EACH_PART {
    const ireg a = zip8_low(row[0].part[i], row[1].part[i]), b = zip8_high(row[0].part[i], row[1].part[i]);
    const ireg c = zip8_low(row[2].part[i], row[3].part[i]), d = zip8_high(row[2].part[i], row[3].part[i]);
    out[0].part[i] = zip16_low(a, c);
    out[1].part[i] = zip16_high(a, c);
    out[2].part[i] = zip16_low(b, d);
    out[3].part[i] = zip16_high(b, d);
  }
}

// Four int32, each four times
inline bytes expand(const int32_t* p) {
  bytes out;
#if defined(__AVX512F__)
  const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  out.part[0] = _mm512_permutexvar_epi32(places, _mm512_castsi128_si512(unaligned<__m128i>(p)));
#elif defined(__AVX2__)
  const __m256i four = _mm256_castsi128_si256(unaligned<__m128i>(p));
  out.part[0] = _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  out.part[1] = _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3));
#else
  SPARSEGATE_EACH_PART out.part[i] = ireg{p[i], p[i], p[i], p[i]};
#endif
  return out;
}

inline vec as_floats(const bytes& a) {
  vec out;
  SPARSEGATE_EACH_PART memcpy(&out.part[i], &a.part[i], sizeof(reg));
  return out;
}

inline vec expand(const float* p) {
  int32_t bits[4];
  memcpy(bits, p, sizeof bits);
  return as_floats(expand(bits));
}

inline vec to_float(const bytes& a) {
  vec out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_cvtepi32_ps(a.part[i]);
#elif defined(__AVX2__)
    out.part[i] = _mm256_cvtepi32_ps(a.part[i]);
#else
    out.part[i] = __builtin_convertvector(a.part[i], reg);
#endif
  }
  return out;
}

// To the nearest, ties to even
inline bytes to_int(const vec& a) {
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_cvtps_epi32(a.part[i]);
#elif defined(__AVX2__)
    out.part[i] = _mm256_cvtps_epi32(a.part[i]);
#elif defined(__aarch64__)
    out.part[i] = (ireg)vcvtnq_s32_f32(a.part[i]);
#elif defined(__SSE2__)
    out.part[i] = (ireg)_mm_cvtps_epi32(a.part[i]);
#else
    for (int k = 0; k < WIDTH; ++k) out.part[i][k] = static_cast<int32_t>(__builtin_rintf(a.part[i][k]));
#endif
  }
  return out;
}

inline bytes as_bytes(const vec& a) {
  bytes out;
  SPARSEGATE_EACH_PART memcpy(&out.part[i], &a.part[i], sizeof(reg));
  return out;
}

inline bytes operator+(const bytes& a, const bytes& b) {  // int32
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_add_epi32(a.part[i], b.part[i]);
#elif defined(__AVX2__)
    out.part[i] = _mm256_add_epi32(a.part[i], b.part[i]);
#else
    out.part[i] = a.part[i] + b.part[i];
#endif
  }
  return out;
}

inline bytes operator&(const bytes& a, const bytes& b) {
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_and_si512(a.part[i], b.part[i]);
#elif defined(__AVX2__)
    out.part[i] = _mm256_and_si256(a.part[i], b.part[i]);
#else
    out.part[i] = a.part[i] & b.part[i];
#endif
  }
  return out;
}

// The larger of a and the magnitude of b's floats, as bits: NaN is above infinity
inline bytes larger_magnitude(const bytes& a, const vec& b) {
  const bytes bits = as_bytes(b);
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] = _mm512_max_epi32(a.part[i], _mm512_and_si512(bits.part[i], _mm512_set1_epi32(0x7fffffff)));
#elif defined(__AVX2__)
    out.part[i] = _mm256_max_epi32(a.part[i], _mm256_and_si256(bits.part[i], _mm256_set1_epi32(0x7fffffff)));
#else
    const ireg size = bits.part[i] & 0x7fffffff, above = size > a.part[i];
    out.part[i] = (size & above) | (a.part[i] & ~above);
#endif
  }
  return out;
}

// a | (lowest byte of b's int32) << 8 * place
template <int PLACE>
inline bytes with_byte(const bytes& a, const bytes& b) {
  bytes out;
  SPARSEGATE_EACH_PART {
#if defined(__AVX512F__)
    out.part[i] =
        _mm512_or_si512(a.part[i], _mm512_slli_epi32(_mm512_and_si512(b.part[i], _mm512_set1_epi32(255)), 8 * PLACE));
#elif defined(__AVX2__)
    out.part[i] =
        _mm256_or_si256(a.part[i], _mm256_slli_epi32(_mm256_and_si256(b.part[i], _mm256_set1_epi32(255)), 8 * PLACE));
#else
    out.part[i] = a.part[i] | (b.part[i] & 255) << (8 * PLACE);
#endif
  }
  return out;
}

// Four float16, each four times
inline vec expand(const half* p) {
#if defined(__AVX512F__)
  const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return vec{{_mm512_permutexvar_ps(
      places, _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))))}};
#elif defined(__AVX2__)
  const __m256 four_floats = _mm256_castps128_ps256(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  return vec{{_mm256_permutevar8x32_ps(four_floats, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
              _mm256_permutevar8x32_ps(four_floats, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))}};
#else
  float values[LANES];
  store(values, load_tail(p, 4));
  return expand(values);
#endif
}

// The first `count` <= 4 of 4 values, zeros behind them: through a register, as short stores and a long load would wait
// for each other
inline int64_t few_halves(const half* p, int64_t count) {
  if (count >= 4) return unaligned<int64_t>(p);
  const int64_t low = count & 2 ? unaligned<uint32_t>(p) : 0;
  return count & 1 ? low | static_cast<int64_t>(p[count - 1].bits) << 16 * (count - 1) : low;
}

// The first `count` < 16 of 16 values
inline vec load_some(const half* p, int64_t count) {
#if defined(__AVX512BW__)
  return vec{{_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << count) - 1), p))}};
#else
  return load_tail(p, count);
#endif
}

inline vec operator*(const vec& a, const vec& b) {
  vec out;
  SPARSEGATE_EACH_PART out.part[i] = a.part[i] * b.part[i];
  return out;
}

inline vec spread(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return as_floats(spread(bits));
}

inline vec quotient(const vec& a, const vec& b) {
  vec out;
  for (int i = 0; i < PARTS; ++i) out.part[i] = a.part[i] / b.part[i];
  return out;
}

}  // namespace
}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
