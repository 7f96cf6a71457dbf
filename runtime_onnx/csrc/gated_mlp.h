// What every kernel of GatedMLP shares: the variant, its inputs by role, and the checks. The Python twin is ops/gated_mlp.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "ort_abi.h"

namespace sparsegate {

enum Role : int { kWGate, kWUp, kWDown, kSGate, kSUp, kSDown, kBGate, kBUp, kBDown, kTau, kP1, kP2, kSP1, kSP2, kRes, kRoles };
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kDrelu, kIdentity };
enum class Score : int { kPredictor, kGate, kExact, kAll };
enum class Weights : int { kFloat, kInt8Row };

struct Variant {
  Activation activation;
  Score score;
  Weights weights;
  std::array<bool, kRoles> present{};
  int x = ort::kFloat32, w = ort::kFloat32, p = ort::kFloat32;  // ort::Type; w is of float weights, p of p1, p2 and res

  bool has(Role role) const { return present[role]; }
  bool plain() const { return !present[kWGate]; }
};

// Fill `out`, or return what is wrong (empty: nothing). Dtypes stay untouched in the first, which reads a node's attributes.
std::string variant_of_attributes(const std::string& activation, const std::string& score, const std::string& weights, const std::string& inputs, Variant& out);
std::string variant_of_name(const std::string& name, Variant& out);

// A tensor as ORT holds it; rank is the real one, dims holds the first two. data nullptr: not there (yet).
struct Tensor {
  const void* data = nullptr;
  int type = ort::kUndefined;
  size_t rank = 0;
  int64_t dims[2] = {0, 0};
};

struct Shape {
  int64_t d = 0, n = 0, r = 0;  // width of x, neurons, rank of the predictor
};

// Checks the tensors that are there against each other; fills shape (r stays 0 without p1). Empty: all is well.
std::string check_tensors(const Variant& variant, const std::array<Tensor, kRoles>& tensors, Shape& shape);

ort::StatusPtr read_tensor(const ort::Api* api, const ort::Value* value, Tensor& out);

// One node: the variant, its constant tensors, and how to fetch the others.
struct Node {
  const ort::Api* api = nullptr;
  std::string name;
  Variant variant;
  Shape shape;
  std::array<Tensor, kRoles> constant{};
  std::array<int, kRoles> index{};  // input index of a role, 0 where absent
  bool all_constant = true;

  // Reads attributes and constant inputs; `constants` false (a device kernel, whose constants may move) fetches all of them in every run.
  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type, bool constants);
  ort::StatusPtr fetch(const ort::KernelContext* context, std::array<Tensor, kRoles>& tensors, Shape& out) const;
  ort::StatusPtr error(int code, const std::string& message) const;
};

// x of a run and the output made for it.
struct Rows {
  const void* x = nullptr;
  void* y = nullptr;
  const ort::Value* value = nullptr;
  int64_t tokens = 0;
};

ort::StatusPtr open_rows(const Node& node, ort::KernelContext* context, int64_t d, Rows& rows);

// Fills the members of an OrtCustomOp that are the same for every kernel of GatedMLP.
struct GatedMlpOp : ort::CustomOp {
  const ort::Api* api;
  int x_type;
  const char* provider;
  GatedMlpOp(const ort::Api* api, int x_type, const char* provider);
};

}  // namespace sparsegate
