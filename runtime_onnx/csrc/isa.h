// Which build of the CPU kernels runs: chosen from the CPU's features, once per process, or forced by a test.
#pragma once

namespace sparsegate {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512vnni = 3 };

Isa isa();
const char* isa_name(Isa isa);
bool force_isa(const char* name);

}  // namespace sparsegate
