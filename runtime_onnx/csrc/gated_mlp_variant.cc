// Variants, inputs and checks of GatedMLP: everything that does not depend on the execution provider.
#include "gated_mlp.h"

#include <locale>
#include <sstream>

namespace sparsegate::gated_mlp {
namespace {

const char* const kRoleNames[] = {"w_gate", "w_up", "w_down", "s_gate", "s_up", "s_down", "b_gate", "b_up",
                                  "b_down", "tau",  "p1",     "p2",     "s_p1", "s_p2",   "res"};
const char* const kActivationNames[] = {"silu",  "gelu",     "gelu_tanh", "relu",        "relu2",
                                        "drelu", "identity", "fatrelu",   "shifted_relu"};
const char* const kScoreNames[] = {"predictor", "gate", "exact", "all"};
constexpr Names kRoles(kRoleNames), kActivations(kActivationNames), kScores(kScoreNames);

constexpr float kMostParameter = 1e6f;
constexpr int kMostDecimals = 200;

// The parameter of "kind(b)", spelled as split_activation in ops/activation.py wants it: the fewest decimals, at least
// one, that give the float32.
bool read_parameter(const std::string& text, bool signed_, float& out) {
  double value = 0;
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  if (text.find_first_not_of("-.0123456789") != std::string::npos || !(in >> value) || !in.eof()) return false;
  if (!(value >= (signed_ ? -kMostParameter : 0.f) && value <= kMostParameter)) return false;
  out = static_cast<float>(value) + 0.f;
  for (int decimals = 1; decimals < kMostDecimals; ++decimals) {
    std::stringstream spelled;
    spelled.imbue(std::locale::classic());
    spelled.setf(std::ios::fixed);
    spelled.precision(decimals);
    spelled << out;
    const std::string found = spelled.str();
    spelled >> value;
    if (static_cast<float>(value) == out) return found == text;
  }
  return false;
}

// silu, or fatrelu(0.01)
bool read_activation(const std::string& text, Variant& out) {
  const size_t open = text.find('(');
  const int a = kActivations.find(text.substr(0, open));
  if (a < 0) return false;
  out.activation = static_cast<Activation>(a);
  out.parameter = 0.f;
  const bool parametric = out.activation == Activation::kFatrelu || out.activation == Activation::kShiftedRelu;
  if (open == std::string::npos || !parametric) return open == std::string::npos && !parametric;
  return text.back() == ')' && read_parameter(text.substr(open + 1, text.size() - open - 2),
                                              out.activation == Activation::kShiftedRelu, out.parameter);
}

// The same rules as Variant in ops/gated_mlp.py: 1 the role must be there, 0 it must not, -1 both are right.
int allows(const Variant& v, int role) {
  const bool quantised = v.weights != Weights::kFloat, predictor = v.score == Score::kPredictor;
  switch (role) {
    case kWUp:
    case kWDown:
      return 1;
    case kSGate:
      return quantised && !v.plain();
    case kSUp:
    case kSDown:
      return quantised;
    case kBGate:
      return v.plain() ? 0 : -1;
    case kTau:
      return predictor || v.score == Score::kGate;
    case kP1:
      return predictor || v.has(kRes);
    case kP2:
      return predictor;
    case kSP2:
      return v.has(kSP1) && v.has(kP2);
    case kSP1:
      return v.has(kP1) && !v.has(kRes) ? -1 : 0;  // whether p1 is int8 is known from its tensor
    default:
      return -1;
  }
}

std::string check_variant(const Variant& v) {
  for (int role = 0; role < kRoles.count; ++role) {
    const int rule = allows(v, role);
    if (rule >= 0 && rule != static_cast<int>(v.present[role]))
      return std::string("inputs must ") + (rule ? "" : "not ") + "hold " + kRoles.list[role] + " with activation " +
             kActivations.list[static_cast<int>(v.activation)] + ", score " + kScores.list[static_cast<int>(v.score)] +
             ", weights " + kWeights.list[static_cast<int>(v.weights)];
  }
  if (v.activation == Activation::kDrelu && v.plain()) return "activation must not be drelu without w_gate";
  if (v.score == Score::kExact && !v.relu())
    return "activation must be one of relu, relu2, drelu, fatrelu, shifted_relu with score exact";
  return "";
}

}  // namespace

std::string variant_of_attributes(const std::string& activation, const std::string& score, const std::string& weights,
                                  const std::string& inputs, Variant& out) {
  const int s = kScores.find(score), w = kWeights.find(weights);
  if (!read_activation(activation, out))
    return "attribute activation must be one of " + kActivations.listed() +
           ", the last two with a parameter as in fatrelu(0.01), got '" + activation + "'";
  if (s < 0) return "attribute score must be one of " + kScores.listed() + ", got '" + score + "'";
  if (w < 0) return "attribute weights must be one of " + kWeights.listed() + ", got '" + weights + "'";
  out.score = static_cast<Score>(s);
  out.weights = static_cast<Weights>(w);
  const std::string problem = read_roles(kRoles, inputs, out.present);
  return problem.empty() ? check_variant(out) : problem;
}

std::string variant_of_name(const std::string& name, Variant& out) {
  const std::string wrong = "not a variant of GatedMLP.1";
  const std::vector<std::string> parts = split(name, '/');
  if (parts.size() != 6 || parts[0] != "GatedMLP.1" || parts[5].find(' ') != std::string::npos) return wrong;
  std::string roles = parts[5];
  for (char& c : roles)
    if (c == '+') c = ' ';
  const std::string problem = variant_of_attributes(parts[1], parts[2], parts[3], roles, out);
  if (!problem.empty()) return problem;
  if (!read_types(parts[4], {"x", "w", "p"}, {&out.x, &out.w, &out.p})) return wrong;
  if (!is_float(out.x) || !is_float(out.w) || !(is_float(out.p) || out.p == ort::kInt8)) return wrong;
  if (out.weights != Weights::kFloat && out.w != ort::kFloat32) return wrong;
  if (!out.has(kP1) && out.p != ort::kFloat32) return wrong;
  if (out.has(kSP1) != (out.p == ort::kInt8)) return wrong;
  return "";
}

std::string check_tensors(const Variant& variant, const Tensors& tensors, Shape& shape) {
  shape = Shape{};
  const bool int4 = variant.weights == Weights::kInt4G32;
  for (int role : {kWUp, kWDown, kWGate}) {
    const Tensor& t = tensors[role];
    if (!t.data || shape.n) continue;
    if (!is_matrix(t)) return std::string("input ") + kRoles.list[role] + " must be [n, d], got " + shape_text(t);
    shape.n = t.dims[0];
    shape.d = t.dims[1] * (int4 ? 2 : 1);
    if (int4 && shape.d % kGroup)
      return std::string("input ") + kRoles.list[role] +
             " must have a multiple of 16 columns with weights int4_g32, got " + shape_text(t);
  }
  for (int role : {kP1, kP2, kRes}) {
    const Tensor& t = tensors[role];
    if (!t.data || shape.r) continue;
    shape.r = t.dims[role == kP2 ? 1 : 0];
    if (t.rank != 2 || shape.r < 1 || shape.r > INT32_MAX / 2)
      return std::string("input ") + kRoles.list[role] +
             (role == kP2 ? " must be [n, r], got " : " must be [r, d], got ") + shape_text(t);
  }
  // float weights share the dtype of w_up, the predictor that of p1
  const auto float_or_none = [&](Role role) -> int {
    return tensors[role].data && is_float(tensors[role].type) ? tensors[role].type : ort::kUndefined;
  };
  const int integer_type = int4 ? ort::kUint8 : ort::kInt8;
  int w_type = variant.weights == Weights::kFloat ? float_or_none(kWUp) : integer_type;
  int p_type = variant.has(kSP1) ? ort::kInt8 : float_or_none(kP1);
  for (int role = 0; role < kRoles.count; ++role) {
    const Tensor& t = tensors[role];
    if (!variant.present[role] || !t.data) continue;
    const bool weight = role <= kWDown, predictor = role == kP1 || role == kP2 || role == kRes;
    const bool groups = int4 && role >= kSGate && role <= kSDown;
    const bool matrix = weight || predictor || groups;
    const int64_t rows = role == kBDown ? shape.d : role == kP1 || role == kRes || role == kSP1 ? shape.r : shape.n;
    const int64_t columns = role == kP2 ? shape.r : groups ? shape.d / kGroup : weight && int4 ? shape.d / 2 : shape.d;
    std::string type = groups ? "float16" : "float32";
    bool right = t.type == (groups ? ort::kFloat16 : ort::kFloat32);
    if (weight || predictor) {
      int& expected = weight ? w_type : p_type;
      type = expected ? type_name(expected) : "float32, float16 or bfloat16";
      right = expected ? t.type == expected : is_float(t.type);
      if (right) expected = t.type;
    }
    // measured by an input that is not constant: checked in every run
    const bool unknown = rows == 0 || (matrix && columns == 0);
    right = right && t.rank == (matrix ? 2u : 1u);
    right = right && (unknown || (t.dims[0] == rows && (!matrix || t.dims[1] == columns)));
    if (right) continue;
    return std::string("input ") + kRoles.list[role] + " must be " + type + " [" + size_text(rows) +
           (matrix ? ", " + size_text(columns) : "") + "], got " + shape_text(t);
  }
  return "";
}

Node::Node() : NodeOf("GatedMLP", kRoles) {}

ort::StatusPtr Node::init(const ort::Api* ort_api, const ort::KernelInfo* info, int x_type, bool constants) {
  ORT_TRY(open(ort_api, info));
  std::string activation, score, weights, inputs;
  ORT_TRY(read_string(api, info, "activation", activation));
  ORT_TRY(read_string(api, info, "score", score));
  ORT_TRY(read_string(api, info, "weights", weights));
  ORT_TRY(read_string(api, info, "inputs", inputs));
  ORT_TRY(finish(info, x_type, variant_of_attributes(activation, score, weights, inputs, variant), inputs, constants));
  if (!constants) return nullptr;
  std::vector<int> weights_together, scales_together;
  for (int role : {kWGate, kWUp, kWDown})
    if (variant.has(static_cast<Role>(role))) weights_together.push_back(role);
  for (int role : {kSGate, kSUp, kSDown})
    if (variant.has(static_cast<Role>(role)) && variant.weights == Weights::kInt4G32) scales_together.push_back(role);
  bool all = true;
  for (const auto* list : {&weights_together, &scales_together})
    for (int role : *list) all = all && constant[role].data;
  std::vector<std::vector<int>> together;
  if (all) together.push_back(weights_together);
  if (all && !scales_together.empty()) together.push_back(scales_together);
  if (keep_close(together) && all) pitch = static_cast<int64_t>(weights_together.size());
  return nullptr;
}

}  // namespace sparsegate::gated_mlp
