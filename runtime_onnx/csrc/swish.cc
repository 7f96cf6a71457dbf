// See swish.h. Compiled once per instruction set, as vectors.h says.
#include "swish.h"

#include "integers.h"

namespace sparsegate {
namespace SPARSEGATE_ISA {
namespace {

// Each lane into [low, high]; NaN becomes one of the two
inline vec between(const vec& a, float low, float high) {
  vec out;
  for (int i = 0; i < PARTS; ++i) {
#if defined(__AVX512F__)
    out.part[i] = _mm512_min_ps(_mm512_max_ps(a.part[i], _mm512_set1_ps(low)), _mm512_set1_ps(high));
#elif defined(__AVX2__)
    out.part[i] = _mm256_min_ps(_mm256_max_ps(a.part[i], _mm256_set1_ps(low)), _mm256_set1_ps(high));
#else
    for (int k = 0; k < WIDTH; ++k) {
      const float v = a.part[i][k] > low ? a.part[i][k] : low;
      out.part[i][k] = v < high ? v : high;
    }
#endif
  }
  return out;
}

// 2^n for -126 <= n <= 127
inline vec power_of_two(const bytes& n) {
  bytes out;
  for (int i = 0; i < PARTS; ++i) {
#if defined(__AVX512F__)
    out.part[i] = _mm512_slli_epi32(_mm512_add_epi32(n.part[i], _mm512_set1_epi32(127)), 23);
#elif defined(__AVX2__)
    out.part[i] = _mm256_slli_epi32(_mm256_add_epi32(n.part[i], _mm256_set1_epi32(127)), 23);
#else
    out.part[i] = (n.part[i] + 127) << 23;
#endif
  }
  return as_floats(out);
}

// e^x for -87 <= x <= 88: 2^n e^r with |r| <= ln 2 / 2 and the Taylor series of e^r up to r^7, whose rest is below 3e-8
inline vec exponential(const vec& x) {
  const bytes n = to_int(x * spread(1.44269504f));
  const vec whole = to_float(n);
  // ln 2 in two pieces: the first has few bits, so that n times it is exact
  vec r = fma(whole, spread(-0.693145752f), x);
  r = fma(whole, spread(-1.42860677e-6f), r);
  vec p = spread(1.f / 5040.f);
  p = fma(p, r, spread(1.f / 720.f));
  p = fma(p, r, spread(1.f / 120.f));
  p = fma(p, r, spread(1.f / 24.f));
  p = fma(p, r, spread(1.f / 6.f));
  p = fma(p, r, spread(.5f));
  p = fma(p, r, spread(1.f));
  p = fma(p, r, spread(1.f));
  return p * power_of_two(n);
}

inline vec swish_of(const vec& v, float linear, float cubic) {
  const vec u = v * fma(v * v, spread(-cubic), spread(-linear));
  return quotient(v, fma(exponential(between(u, -87.f, 88.f)), spread(1.f), spread(1.f)));
}

}  // namespace

void swish(float* v, int64_t count, float linear, float cubic);
void swish(float* v, int64_t count, float linear, float cubic) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(v + i, swish_of(load(v + i), linear, cubic));
  if (i == count) return;
  float last[LANES];
  store(last, swish_of(load_tail(v + i, count - i), linear, cubic));
  memcpy(v + i, last, static_cast<size_t>(count - i) * sizeof(float));
}

}  // namespace SPARSEGATE_ISA
}  // namespace sparsegate
