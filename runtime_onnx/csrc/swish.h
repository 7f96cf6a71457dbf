// v / (1 + e^-(linear v + cubic v^3)): SiLU with (1, 0);
// GELU's tanh form with (2 sqrt(2 / pi), 2 * 0.044715 sqrt(2 / pi)), because (1 + tanh u) / 2 = 1 / (1 + e^-2u).
#pragma once

#include <cstdint>

#include "isa.h"

namespace sparsegate {

// v [count] in place
using Swish = void (*)(float* v, int64_t count, float linear, float cubic);

Swish swish(Isa isa);

}  // namespace sparsegate
