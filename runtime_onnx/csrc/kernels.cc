// What the CPU kernels of all ops share beside their inner loops: the choice of a build, scratch memory, the way back
// to narrow types.
#include <cmath>
#include <cstring>

#include "integer_rows.h"
#include "memory.h"
#include "ort_abi.h"
#include "row_kernels.h"
#include "swish.h"

namespace sparsegate {

thread_local Arena call_arena;
thread_local Arena task_arena;
thread_local Arena sum_arena;

// Builds of the sources that are compiled once per instruction set
#define SPARSEGATE_BUILD(isa)                                     \
  namespace isa {                                                 \
  extern const Kernels float_rows;                                \
  extern const IntegerRows integer_rows;                          \
  void swish(float* v, int64_t count, float linear, float cubic); \
  }
SPARSEGATE_BUILD(portable)
#ifdef SPARSEGATE_X86
SPARSEGATE_BUILD(avx2)
SPARSEGATE_BUILD(avx512)
SPARSEGATE_BUILD(avx512vnni)
#endif
#undef SPARSEGATE_BUILD

const Kernels& kernels(Isa isa) {
#ifdef SPARSEGATE_X86
  if (isa == Isa::kAvx512vnni) return avx512vnni::float_rows;
  if (isa == Isa::kAvx512) return avx512::float_rows;
  if (isa == Isa::kAvx2) return avx2::float_rows;
#endif
  (void)isa;
  return portable::float_rows;
}

const IntegerRows& integer_rows(Isa isa) {
#ifdef SPARSEGATE_X86
  if (isa == Isa::kAvx512vnni) return avx512vnni::integer_rows;
  if (isa == Isa::kAvx512) return avx512::integer_rows;
  if (isa == Isa::kAvx2) return avx2::integer_rows;
#endif
  (void)isa;
  return portable::integer_rows;
}

Swish swish(Isa isa) {
#ifdef SPARSEGATE_X86
  if (isa == Isa::kAvx512vnni) return avx512vnni::swish;
  if (isa == Isa::kAvx512) return avx512::swish;
  if (isa == Isa::kAvx2) return avx2::swish;
#endif
  (void)isa;
  return portable::swish;
}

namespace {

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

uint16_t to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (size < 0x38800000u) {                                               // below 2^-14: in units of 2^-24
    float scaled;
    std::memcpy(&scaled, &size, sizeof scaled);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(scaled * 16777216.f)));
  }
  return static_cast<uint16_t>(sign | (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13);
}

}  // namespace

void narrow(int type, const float* values, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = type == ort::kFloat16 ? to_float16(values[i]) : to_bfloat16(values[i]);
}

}  // namespace sparsegate
