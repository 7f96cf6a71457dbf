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

// Builds of the sources that are compiled once per instruction set, in the order of Isa
#ifdef SPARSEGATE_X86
#define SPARSEGATE_BUILDS(each) each(portable) each(avx2) each(avx512) each(avx512vnni)
#else
#define SPARSEGATE_BUILDS(each) each(portable)
#endif

#define SPARSEGATE_DECLARE(isa)                                   \
  namespace isa {                                                 \
  extern const Kernels float_rows;                                \
  extern const IntegerRows integer_rows;                          \
  void swish(float* v, int64_t count, float linear, float cubic); \
  }
SPARSEGATE_BUILDS(SPARSEGATE_DECLARE)
#undef SPARSEGATE_DECLARE

namespace {

struct Build {
  const Kernels* kernels;
  const IntegerRows* integer_rows;
  Swish swish;
};

#define SPARSEGATE_BUILD(isa) {&isa::float_rows, &isa::integer_rows, isa::swish},
constexpr Build kBuilds[] = {SPARSEGATE_BUILDS(SPARSEGATE_BUILD)};
#undef SPARSEGATE_BUILD

const Build& build_of(Isa isa) { return kBuilds[static_cast<int>(isa)]; }

}  // namespace

const Kernels& kernels(Isa isa) { return *build_of(isa).kernels; }

const IntegerRows& integer_rows(Isa isa) { return *build_of(isa).integer_rows; }

Swish swish(Isa isa) { return build_of(isa).swish; }

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
