#include "isa.h"

#include <atomic>
#include <cstring>

namespace sparsegate {
namespace {

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAvx512vnni:
      return has(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512:
      return has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    default:
      break;
  }
#endif
  return isa == Isa::kPortable;
}

constexpr Isa kBestFirst[] = {Isa::kAvx512vnni, Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

Isa best() {
  for (Isa isa : kBestFirst)
    if (has(isa)) return isa;
  return Isa::kPortable;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512vnni"};
  return names[static_cast<int>(isa)];
}

bool force_isa(const char* name) {
  if (!std::strcmp(name, "auto")) return chosen().store(best()), true;
  for (Isa isa : kBestFirst)
    if (!std::strcmp(name, isa_name(isa)) && has(isa)) return chosen().store(isa), true;
  return false;
}

}  // namespace sparsegate
