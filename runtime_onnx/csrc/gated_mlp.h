// What every kernel of GatedMLP shares: the variant, its inputs by role, and the checks. The Python twin is
// ops/gated_mlp.py.
#pragma once

#include <cstdint>
#include <string>

#include "op.h"

namespace sparsegate::gated_mlp {

enum Role : int { kWGate, kWUp, kWDown, kSGate, kSUp, kSDown, kBGate, kBUp, kBDown, kTau, kP1, kP2, kSP1, kSP2, kRes };
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kDrelu, kIdentity, kFatrelu, kShiftedRelu };
enum class Score : int { kPredictor, kGate, kExact, kAll };

struct Variant {
  Activation activation;
  float parameter = 0.f;  // of kFatrelu: v where v > parameter, else 0; of kShiftedRelu: relu(v - parameter)
  Score score;
  Weights weights;
  Present present{};
  int x = ort::kFloat32, w = ort::kFloat32, p = ort::kFloat32;  // ort::Type; w is of float weights, p of p1, p2 and res

  bool has(Role role) const { return present[role]; }
  bool plain() const { return !present[kWGate]; }
  // Whether act gives exact zeros: whatever multiplies one is neither read nor added, so that y is the same for any
  // finite weights.
  bool relu() const {
    return activation == Activation::kRelu || activation == Activation::kRelu2 || activation == Activation::kDrelu ||
           activation == Activation::kFatrelu || activation == Activation::kShiftedRelu;
  }
};

// Fill `out`, or return what is wrong (empty: nothing). Dtypes stay untouched in the first, which reads a node's
// attributes.
std::string variant_of_attributes(const std::string& activation, const std::string& score, const std::string& weights,
                                  const std::string& inputs, Variant& out);
std::string variant_of_name(const std::string& name, Variant& out);

struct Shape {
  int64_t d = 0, n = 0, r = 0;  // width of x, neurons, rank of the predictor
};

// Checks the tensors that are there against each other; fills shape (r stays 0 without p1). Empty: all is well.
std::string check_tensors(const Variant& variant, const Tensors& tensors, Shape& shape);

struct Node : NodeOf<Variant, Shape, check_tensors> {
  // rows from one neuron to the next in w_gate, w_up, w_down (and int4 scales): they may lie row beside row
  int64_t pitch = 1;

  Node();
  // `constants` false: a device kernel, whose constants may move; all of them are fetched in every run.
  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type, bool constants);
};

}  // namespace sparsegate::gated_mlp
