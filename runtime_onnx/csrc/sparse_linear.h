// What every kernel of SparseLinear shares: the variant, its inputs by role, and the checks. The Python twin is
// ops/sparse_linear.py.
#pragma once

#include <cstdint>
#include <string>

#include "op.h"

namespace sparsegate::sparse_linear {

enum Role : int { kW, kSW, kB, kTau };

struct Variant {
  Weights weights = Weights::kFloat;
  Present present{};
  int x = ort::kFloat32, w = ort::kFloat32;  // ort::Type; w is of float weights
};

struct Shape {
  int64_t d_in = 0, d_out = 0;
};

// Fill `out`, or return what is wrong (empty: nothing). Dtypes stay untouched in the first, which reads a node's
// attributes.
std::string variant_of_attributes(const std::string& weights, const std::string& inputs, Variant& out);
std::string variant_of_name(const std::string& name, Variant& out);

// Checks the tensors that are there against each other; fills shape once w is there. Empty: all is well.
std::string check_tensors(const Variant& variant, const Tensors& tensors, Shape& shape);

struct Node : NodeOf<Variant, Shape, check_tensors> {
  Node();
  // `constants` false: a device kernel, whose constants may move; all of them are fetched in every run.
  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type, bool constants);
};

}  // namespace sparsegate::sparse_linear
