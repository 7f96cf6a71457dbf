// Variants, inputs and checks of GatedMLP: everything that does not depend on the execution provider.
#include <cstring>
#include <vector>

#include "gated_mlp.h"

namespace sparsegate {
namespace {

const char* const kRoleNames[kRoles] = {"w_gate", "w_up", "w_down", "s_gate", "s_up", "s_down", "b_gate", "b_up",
                                        "b_down", "tau",  "p1",     "p2",     "s_p1", "s_p2",   "res"};
const char* const kActivations[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2", "drelu", "identity"};
const char* const kScores[] = {"predictor", "gate", "exact", "all"};
const char* const kWeights[] = {"float", "int8_row"};
const char* const kTypeNames[] = {"undefined", "float32", "uint8",   "int8",   "uint16", "int16",     "int32",      "int64",  "string",
                                  "bool",      "float16", "float64", "uint32", "uint64", "complex64", "complex128", "bfloat16"};

template <size_t N>
int find(const char* const (&names)[N], const std::string& text) {
  for (size_t i = 0; i < N; ++i)
    if (text == names[i]) return static_cast<int>(i);
  return -1;
}

template <size_t N>
std::string listed(const char* const (&names)[N]) {
  std::string out = names[0];
  for (size_t i = 1; i < N; ++i) out += std::string(", ") + names[i];
  return out;
}

std::string type_name(int type) {
  return type >= 0 && type < static_cast<int>(sizeof kTypeNames / sizeof *kTypeNames) ? kTypeNames[type] : "type " + std::to_string(type);
}

bool is_float(int type) { return type == ort::kFloat32 || type == ort::kFloat16 || type == ort::kBfloat16; }

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
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
  for (int role = 0; role < kRoles; ++role) {
    const int rule = allows(v, role);
    if (rule >= 0 && rule != static_cast<int>(v.present[role]))
      return std::string("inputs must ") + (rule ? "" : "not ") + "hold " + kRoleNames[role] + " with activation " + kActivations[static_cast<int>(v.activation)] +
             ", score " + kScores[static_cast<int>(v.score)] + ", weights " + kWeights[static_cast<int>(v.weights)];
  }
  if (v.activation == Activation::kDrelu && v.plain()) return "activation must not be drelu without w_gate";
  const bool relu = v.activation == Activation::kRelu || v.activation == Activation::kRelu2 || v.activation == Activation::kDrelu;
  if (v.score == Score::kExact && !relu) return "activation must be relu, relu2 or drelu with score exact";
  return "";
}

// Reads the string attribute, or sets `out` to "" where the node has none.
ort::StatusPtr read_string(const ort::Api* api, const ort::KernelInfo* info, const char* name, std::string& out) {
  size_t size = 0;
  if (ort::StatusPtr status = api->KernelInfoGetAttribute_string(info, name, nullptr, &size)) {
    api->ReleaseStatus(status);
    out.clear();
    return nullptr;
  }
  std::vector<char> text(size + 1);
  ORT_TRY(api->KernelInfoGetAttribute_string(info, name, text.data(), &size));
  out = text.data();
  return nullptr;
}

std::string shape_text(const Tensor& tensor) {
  std::string out = type_name(tensor.type) + " [";
  for (size_t i = 0; i < tensor.rank && i < 2; ++i) out += (i ? ", " : "") + std::to_string(tensor.dims[i]);
  return out + (tensor.rank > 2 ? ", ...]" : "]");
}

}  // namespace

std::string variant_of_attributes(const std::string& activation, const std::string& score, const std::string& weights, const std::string& inputs, Variant& out) {
  const int a = find(kActivations, activation), s = find(kScores, score), w = find(kWeights, weights);
  if (a < 0) return "attribute activation must be one of " + listed(kActivations) + ", got '" + activation + "'";
  if (s < 0) return "attribute score must be one of " + listed(kScores) + ", got '" + score + "'";
  if (w < 0) return "attribute weights must be one of " + listed(kWeights) + ", got '" + weights + "'";
  out.activation = static_cast<Activation>(a);
  out.score = static_cast<Score>(s);
  out.weights = static_cast<Weights>(w);
  int last = -1;
  for (const std::string& name : split(inputs, ' ')) {
    const int role = find(kRoleNames, name);
    if (role <= last) return "attribute inputs must name roles in the order " + listed(kRoleNames) + ", each once, got '" + inputs + "'";
    out.present[role] = true;
    last = role;
  }
  return check_variant(out);
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
  const std::vector<std::string> dtypes = split(parts[4], ',');
  if (dtypes.size() != 3) return wrong;
  int* const types[] = {&out.x, &out.w, &out.p};
  for (int i = 0; i < 3; ++i) {
    if (dtypes[i].compare(0, 2, i == 0 ? "x=" : i == 1 ? "w=" : "p=")) return wrong;
    *types[i] = find(kTypeNames, dtypes[i].substr(2));
    if (!is_float(*types[i]) && !(i == 2 && *types[i] == ort::kInt8)) return wrong;
  }
  if (out.weights != Weights::kFloat && out.w != ort::kFloat32) return wrong;
  if (!out.has(kP1) && out.p != ort::kFloat32) return wrong;
  if (out.has(kSP1) != (out.p == ort::kInt8)) return wrong;
  return "";
}

std::string check_tensors(const Variant& variant, const std::array<Tensor, kRoles>& tensors, Shape& shape) {
  shape = Shape{};
  for (int role : {kWUp, kWDown, kWGate}) {
    const Tensor& t = tensors[role];
    if (!t.data || shape.n) continue;
    if (t.rank != 2 || t.dims[0] < 1 || t.dims[1] < 1 || t.dims[0] > INT32_MAX / 2 || t.dims[1] > INT32_MAX / 2)
      return std::string("input ") + kRoleNames[role] + " must be [n, d], got " + shape_text(t);
    shape.n = t.dims[0];
    shape.d = t.dims[1];
  }
  for (int role : {kP1, kP2, kRes}) {
    const Tensor& t = tensors[role];
    if (!t.data || shape.r) continue;
    shape.r = t.dims[role == kP2 ? 1 : 0];
    if (t.rank != 2 || shape.r < 1 || shape.r > INT32_MAX / 2)
      return std::string("input ") + kRoleNames[role] + (role == kP2 ? " must be [n, r], got " : " must be [r, d], got ") + shape_text(t);
  }
  // float weights share the dtype of w_up, the predictor that of p1
  const auto float_or_none = [&](Role role) -> int { return tensors[role].data && is_float(tensors[role].type) ? tensors[role].type : ort::kUndefined; };
  int w_type = variant.weights == Weights::kFloat ? float_or_none(kWUp) : ort::kInt8, p_type = variant.has(kSP1) ? ort::kInt8 : float_or_none(kP1);
  for (int role = 0; role < kRoles; ++role) {
    const Tensor& t = tensors[role];
    if (!variant.present[role] || !t.data) continue;
    const bool weight = role <= kWDown, predictor = role == kP1 || role == kP2 || role == kRes, matrix = weight || predictor;
    const int64_t rows = role == kBDown ? shape.d : role == kP1 || role == kRes || role == kSP1 ? shape.r : shape.n;
    const int64_t columns = role == kP2 ? shape.r : shape.d;
    std::string type = "float32";
    bool right = t.type == ort::kFloat32;
    if (matrix) {
      int& expected = weight ? w_type : p_type;
      type = expected ? type_name(expected) : "float32, float16 or bfloat16";
      right = expected ? t.type == expected : is_float(t.type);
      if (right) expected = t.type;
    }
    const bool unknown = rows == 0 || (matrix && columns == 0);  // measured by an input that is not constant: checked in every run
    right = right && t.rank == (matrix ? 2u : 1u);
    right = right && (unknown || (t.dims[0] == rows && (!matrix || t.dims[1] == columns)));
    if (right) continue;
    const auto size = [](int64_t dim) { return dim ? std::to_string(dim) : "?"; };
    return std::string("input ") + kRoleNames[role] + " must be " + type + " [" + size(rows) + (matrix ? ", " + size(columns) : "") + "], got " + shape_text(t);
  }
  return "";
}

ort::StatusPtr read_tensor(const ort::Api* api, const ort::Value* value, Tensor& out) {
  ort::TensorInfo* info = nullptr;
  ORT_TRY(api->GetTensorTypeAndShape(value, &info));
  ort::StatusPtr status = api->GetTensorElementType(info, &out.type);
  if (!status) status = api->GetDimensionsCount(info, &out.rank);
  if (!status) status = api->GetDimensions(info, out.dims, out.rank < 2 ? out.rank : 2);
  api->ReleaseTensorTypeAndShapeInfo(info);
  if (status) return status;
  void* data = nullptr;
  ORT_TRY(api->GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  static const char empty = 0;
  out.data = data ? data : &empty;  // a tensor without elements is still there: its shape is what is wrong
  return nullptr;
}

ort::StatusPtr Node::error(int code, const std::string& message) const {
  return api->CreateStatus(code, ("GatedMLP" + (name.empty() ? "" : " " + name) + ": " + message + ".").c_str());
}

ort::StatusPtr Node::init(const ort::Api* ort_api, const ort::KernelInfo* info, int x_type, bool constants) {
  api = ort_api;
  size_t size = 0;
  if (ort::StatusPtr status = api->KernelInfo_GetNodeName(info, nullptr, &size)) api->ReleaseStatus(status);
  std::vector<char> text(size + 1);
  ORT_TRY(api->KernelInfo_GetNodeName(info, text.data(), &size));
  name = text.data();
  std::string activation, score, weights, inputs;
  ORT_TRY(read_string(api, info, "activation", activation));
  ORT_TRY(read_string(api, info, "score", score));
  ORT_TRY(read_string(api, info, "weights", weights));
  ORT_TRY(read_string(api, info, "inputs", inputs));
  std::string problem = variant_of_attributes(activation, score, weights, inputs, variant);
  if (!problem.empty()) return error(ort::kInvalidArgument, problem);
  variant.x = x_type;
  size_t count = 0, expected = 1;
  ORT_TRY(api->KernelInfo_GetInputCount(info, &count));
  for (int role = 0; role < kRoles; ++role)
    if (variant.present[role]) index[role] = static_cast<int>(expected++);
  if (count != expected)
    return error(ort::kInvalidArgument, "attribute inputs must name every input after x, got " + std::to_string(count) + " inputs and '" + inputs + "'");
  all_constant = constants;
  for (int role = 0; role < kRoles && constants; ++role) {
    if (!index[role]) continue;
    int is_constant = 0;
    const ort::Value* value = nullptr;
    ORT_TRY(api->KernelInfoGetConstantInput_tensor(info, static_cast<size_t>(index[role]), &is_constant, &value));
    if (is_constant && value)
      ORT_TRY(read_tensor(api, value, constant[role]));
    else
      all_constant = false;
  }
  problem = check_tensors(variant, constant, shape);
  return problem.empty() ? nullptr : error(ort::kInvalidArgument, problem);
}

ort::StatusPtr Node::fetch(const ort::KernelContext* context, std::array<Tensor, kRoles>& tensors, Shape& out) const {
  tensors = constant;
  out = shape;
  if (all_constant) return nullptr;
  for (int role = 0; role < kRoles; ++role) {
    if (!index[role] || tensors[role].data) continue;
    const ort::Value* value = nullptr;
    ORT_TRY(api->KernelContext_GetInput(context, static_cast<size_t>(index[role]), &value));
    if (!value) return error(ort::kInvalidArgument, std::string("input ") + kRoleNames[role] + " must be a tensor, got none");
    ORT_TRY(read_tensor(api, value, tensors[role]));
  }
  const std::string problem = check_tensors(variant, tensors, out);
  return problem.empty() ? nullptr : error(ort::kInvalidArgument, problem);
}

ort::StatusPtr open_rows(const Node& node, ort::KernelContext* context, int64_t d, Rows& rows) {
  constexpr size_t kMaxRank = 16;
  const ort::Api* api = node.api;
  ORT_TRY(api->KernelContext_GetInput(context, 0, &rows.value));
  if (!rows.value) return node.error(ort::kInvalidArgument, "input x must be a tensor, got none");
  ort::TensorInfo* info = nullptr;
  int64_t dims[kMaxRank];
  size_t rank = 0;
  int type = ort::kUndefined;
  ORT_TRY(api->GetTensorTypeAndShape(rows.value, &info));
  ort::StatusPtr status = api->GetTensorElementType(info, &type);
  if (!status) status = api->GetDimensionsCount(info, &rank);
  if (!status && rank <= kMaxRank) status = api->GetDimensions(info, dims, rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  if (status) return status;
  if (rank == 0 || rank > kMaxRank || dims[rank - 1] != d || type != node.variant.x) {
    std::string got = type_name(type) + " [";
    for (size_t i = 0; i < rank && i < kMaxRank; ++i) got += (i ? ", " : "") + std::to_string(dims[i]);
    return node.error(ort::kInvalidArgument, "input x must be " + type_name(node.variant.x) + " [..., " + std::to_string(d) + "], got " + got + "]");
  }
  rows.tokens = 1;
  for (size_t i = 0; i + 1 < rank; ++i) rows.tokens *= dims[i];
  void* x = nullptr;
  ORT_TRY(api->GetTensorMutableData(const_cast<ort::Value*>(rows.value), &x));
  rows.x = x;
  ort::Value* y = nullptr;
  ORT_TRY(api->KernelContext_GetOutput(context, 0, dims, rank, &y));
  return api->GetTensorMutableData(y, &rows.y);
}

GatedMlpOp::GatedMlpOp(const ort::Api* ort_api, int type, const char* provider_name) : api(ort_api), x_type(type), provider(provider_name) {
  // One input x, then one variadic list of tensors of any type: no input is ever empty, one schema serves every variant.
  using Op = const ort::CustomOp*;
  GetName = [](Op) -> const char* { return "GatedMLP"; };
  GetExecutionProviderType = [](Op op) -> const char* { return static_cast<const GatedMlpOp*>(op)->provider; };
  GetInputTypeCount = [](Op) -> size_t { return 2; };
  GetInputType = [](Op op, size_t i) -> int { return i == 0 ? static_cast<const GatedMlpOp*>(op)->x_type : static_cast<int>(ort::kUndefined); };
  GetInputCharacteristic = [](Op, size_t i) -> int { return i == 0 ? ort::kRequired : ort::kVariadic; };
  GetInputMemoryType = [](Op, size_t) -> int { return ort::kMemoryDefault; };
  GetVariadicInputMinArity = [](Op) -> int { return 2; };
  GetVariadicInputHomogeneity = [](Op) -> int { return 0; };
  GetOutputTypeCount = [](Op) -> size_t { return 1; };
  GetOutputType = [](Op op, size_t) -> int { return static_cast<const GatedMlpOp*>(op)->x_type; };
  GetOutputCharacteristic = [](Op, size_t) -> int { return ort::kRequired; };
  GetVariadicOutputMinArity = [](Op) -> int { return 1; };
  GetVariadicOutputHomogeneity = [](Op) -> int { return 0; };
  GetStartVersion = [](Op) -> int { return 1; };
  GetEndVersion = [](Op) -> int { return 1; };
  InferOutputShapeFn = [](Op op, ort::ShapeContext* context) -> ort::StatusPtr {
    const ort::Api* api = static_cast<const GatedMlpOp*>(op)->api;
    ort::TensorInfo* info = nullptr;
    ORT_TRY(api->ShapeInferContext_GetInputTypeShape(context, 0, &info));
    return api->ShapeInferContext_SetOutputTypeShape(context, 0, info);
  };
}

}  // namespace sparsegate
