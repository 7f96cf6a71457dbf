// Variants, inputs and checks of SparseLinear: everything that does not depend on the execution provider.
#include "sparse_linear.h"

#include <algorithm>

namespace sparsegate::sparse_linear {
namespace {

const char* const kRoleNames[] = {"w", "s_w", "b", "tau"};
constexpr Names kRoles(kRoleNames);

}  // namespace

// The same rules as Variant in ops/sparse_linear.py.
std::string variant_of_attributes(const std::string& weights, const std::string& inputs, Variant& out) {
  const int found = kWeights.find(weights);
  if (found < 0) return "attribute weights must be one of " + kWeights.listed() + ", got '" + weights + "'";
  out.weights = static_cast<Weights>(found);
  const std::string problem = read_roles(kRoles, inputs, out.present);
  if (!problem.empty()) return problem;
  for (int role : {kW, kSW, kTau}) {
    const bool needed = role != kSW || out.weights != Weights::kFloat;
    if (needed != out.present[role])
      return std::string("inputs must ") + (needed ? "" : "not ") + "hold " + kRoles.list[role] + " with weights " +
             weights;
  }
  return "";
}

std::string variant_of_name(const std::string& name, Variant& out) {
  const std::string wrong = "not a variant of SparseLinear.1";
  const std::vector<std::string> parts = split(name, '/');
  if (parts.size() != 4 || parts[0] != "SparseLinear.1" || parts[3].find(' ') != std::string::npos) return wrong;
  std::string roles = parts[3];
  std::replace(roles.begin(), roles.end(), '+', ' ');
  const std::string problem = variant_of_attributes(parts[1], roles, out);
  if (!problem.empty()) return problem;
  if (!read_types(parts[2], {"x", "w"}, {&out.x, &out.w}) || !is_float(out.x) || !is_float(out.w)) return wrong;
  return out.weights != Weights::kFloat && out.w != ort::kFloat32 ? wrong : "";
}

std::string check_tensors(const Variant& variant, const Tensors& tensors, Shape& shape) {
  shape = Shape{};
  const Tensor& w = tensors[kW];
  const bool int4 = variant.weights == Weights::kInt4G32;
  if (w.data) {
    const char* const types[] = {"float32, float16 or bfloat16", "int8", "uint8"};
    const bool right =
        variant.weights == Weights::kFloat ? is_float(w.type) : w.type == (int4 ? ort::kUint8 : ort::kInt8);
    if (!right || !is_matrix(w))
      return std::string("input w must be ") + types[static_cast<int>(variant.weights)] +
             (int4 ? " [d_in, d_out / 2], got " : " [d_in, d_out], got ") + shape_text(w);
    shape.d_in = w.dims[0];
    shape.d_out = w.dims[1] * (int4 ? 2 : 1);
    if (int4 && shape.d_out % kGroup)
      return "input w must have a multiple of 16 columns with weights int4_g32, got " + shape_text(w);
  }
  for (int role : {kSW, kB, kTau}) {
    const Tensor& t = tensors[role];
    const int64_t size = role == kB ? shape.d_out : shape.d_in;  // 0: w is not constant, checked in every run
    const bool groups = int4 && role == kSW;
    const int64_t columns = shape.d_out / kGroup;
    const bool fits =
        t.rank == (groups ? 2u : 1u) && (size == 0 || (t.dims[0] == size && (!groups || t.dims[1] == columns)));
    if (!t.data || (fits && t.type == (groups ? ort::kFloat16 : ort::kFloat32))) continue;
    return std::string("input ") + kRoles.list[role] + " must be " + (groups ? "float16 [" : "float32 [") +
           size_text(size) + (groups ? ", " + size_text(columns) : "") + "], got " + shape_text(t);
  }
  return "";
}

Node::Node() : NodeOf("SparseLinear", kRoles) {}

ort::StatusPtr Node::init(const ort::Api* ort_api, const ort::KernelInfo* info, int x_type, bool constants) {
  ORT_TRY(open(ort_api, info));
  std::string weights, inputs;
  ORT_TRY(read_string(api, info, "weights", weights));
  ORT_TRY(read_string(api, info, "inputs", inputs));
  ORT_TRY(finish(info, x_type, variant_of_attributes(weights, inputs, variant), inputs, constants));
  if (constants) keep_close({});
  return nullptr;
}

}  // namespace sparsegate::sparse_linear
