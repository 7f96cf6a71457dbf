// See op.h.
#include "op.h"

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsegate {
namespace {

const char* const kTypeNames[] = {"undefined", "float32", "uint8",     "int8",       "uint16",  "int16",
                                  "int32",     "int64",   "string",    "bool",       "float16", "float64",
                                  "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};

const char* const kWeightNames[] = {"float", "int8_row", "int4_g32"};

// The first `most` dimensions go to `dims`; `rank` is the real one.
ort::StatusPtr read_shape(const ort::Api* api, const ort::Value* value, size_t most, int& type, size_t& rank,
                          int64_t* dims) {
  ort::TensorInfo* info = nullptr;
  ORT_TRY(api->GetTensorTypeAndShape(value, &info));
  ort::StatusPtr status = api->GetTensorElementType(info, &type);
  if (!status) status = api->GetDimensionsCount(info, &rank);
  if (!status) status = api->GetDimensions(info, dims, std::min(rank, most));
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

}  // namespace

const Names kTypes(kTypeNames);
const Names kWeights(kWeightNames);

int Names::find(const std::string& text) const {
  for (int i = 0; i < count; ++i)
    if (text == list[i]) return i;
  return -1;
}

std::string Names::listed() const {
  std::string out = list[0];
  for (int i = 1; i < count; ++i) out += std::string(", ") + list[i];
  return out;
}

bool is_float(int type) { return type == ort::kFloat32 || type == ort::kFloat16 || type == ort::kBfloat16; }

bool is_matrix(const Tensor& tensor) {
  constexpr int64_t kMost = INT32_MAX / 2;
  return tensor.rank == 2 && tensor.dims[0] >= 1 && tensor.dims[1] >= 1 && tensor.dims[0] <= kMost &&
         tensor.dims[1] <= kMost;
}

int64_t bytes_of(int type) { return type == ort::kFloat32 ? 4 : type == ort::kInt8 || type == ort::kUint8 ? 1 : 2; }

std::string type_name(int type) {
  return type >= 0 && type < kTypes.count ? kTypes.list[type] : "type " + std::to_string(type);
}

std::string shape_text(const Tensor& tensor) {
  std::string out = type_name(tensor.type) + " [";
  for (size_t i = 0; i < tensor.rank && i < 2; ++i) out += (i ? ", " : "") + std::to_string(tensor.dims[i]);
  return out + (tensor.rank > 2 ? ", ...]" : "]");
}

std::string size_text(int64_t size) { return size ? std::to_string(size) : "?"; }

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

std::string read_roles(const Names& roles, const std::string& inputs, Present& present) {
  present = {};
  int last = -1;
  for (const std::string& name : split(inputs, ' ')) {
    const int role = roles.find(name);
    if (role <= last)
      return "attribute inputs must name roles in the order " + roles.listed() + ", each once, got '" + inputs + "'";
    present[role] = true;
    last = role;
  }
  return "";
}

bool read_types(const std::string& text, const std::vector<std::string>& keys, const std::vector<int*>& types) {
  const std::vector<std::string> parts = split(text, ',');
  if (parts.size() != keys.size()) return false;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (parts[i].compare(0, keys[i].size() + 1, keys[i] + "=")) return false;
    *types[i] = kTypes.find(parts[i].substr(keys[i].size() + 1));
    if (*types[i] < 0) return false;
  }
  return true;
}

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

ort::StatusPtr read_tensor(const ort::Api* api, const ort::Value* value, Tensor& out) {
  ORT_TRY(read_shape(api, value, 2, out.type, out.rank, out.dims));
  void* data = nullptr;
  ORT_TRY(api->GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  static const char empty = 0;
  out.data = data ? data : &empty;  // a tensor without elements is still there: its shape is what is wrong
  return nullptr;
}

ort::StatusPtr NodeBase::error(int code, const std::string& message) const {
  return api->CreateStatus(code, (op + (name.empty() ? "" : " " + name) + ": " + message + ".").c_str());
}

ort::StatusPtr NodeBase::open(const ort::Api* ort_api, const ort::KernelInfo* info) {
  api = ort_api;
  size_t size = 0;
  if (ort::StatusPtr status = api->KernelInfo_GetNodeName(info, nullptr, &size)) api->ReleaseStatus(status);
  std::vector<char> text(size + 1);
  ORT_TRY(api->KernelInfo_GetNodeName(info, text.data(), &size));
  name = text.data();
  return nullptr;
}

ort::StatusPtr NodeBase::bind(const ort::KernelInfo* info, const Present& present, const std::string& inputs,
                              bool constants) {
  size_t count = 0, expected = 1;
  ORT_TRY(api->KernelInfo_GetInputCount(info, &count));
  for (int role = 0; role < roles.count; ++role)
    if (present[role]) index[role] = static_cast<int>(expected++);
  if (count != expected)
    return error(ort::kInvalidArgument, "attribute inputs must name every input after x, got " + std::to_string(count) +
                                            " inputs and '" + inputs + "'");
  all_constant = constants;
  for (int role = 0; role < roles.count && constants; ++role) {
    if (!index[role]) continue;
    int is_constant = 0;
    const ort::Value* value = nullptr;
    ORT_TRY(api->KernelInfoGetConstantInput_tensor(info, static_cast<size_t>(index[role]), &is_constant, &value));
    if (is_constant && value)
      ORT_TRY(read_tensor(api, value, constant[role]));
    else
      all_constant = false;
  }
  return nullptr;
}

bool NodeBase::keep_close(const std::vector<std::vector<int>>& together) {
  constexpr size_t kHuge = size_t{2} << 20, kPage = 4096, kLeast = size_t{64} << 10;
  const auto row_bytes = [](const Tensor& t) {
    return static_cast<size_t>((t.rank > 1 ? t.dims[1] : 1) * bytes_of(t.type));
  };
  const auto padded = [](size_t size, size_t to) { return (size + to - 1) / to * to; };
  std::vector<std::vector<int>> lists = together;
  for (int role = 0; role < roles.count; ++role) {
    const auto holds = [role](const std::vector<int>& list) {
      return std::find(list.begin(), list.end(), role) != list.end();
    };
    if (constant[role].data && constant[role].rank <= 2 && std::none_of(together.begin(), together.end(), holds))
      lists.push_back({role});
  }
  size_t total = 0;
  for (const auto& list : lists) {
    size_t size = 0;
    for (int role : list) size += static_cast<size_t>(constant[role].dims[0]) * row_bytes(constant[role]);
    total += padded(size, kPage);
  }
  if (total < kLeast) return false;
  const size_t alignment = total < kHuge ? kPage : kHuge;
  own.reset(static_cast<char*>(std::aligned_alloc(alignment, padded(total, alignment))));
  if (!own) return false;  // no memory for it: the rows are read where they are
#if defined(__linux__)
  if (alignment == kHuge) madvise(own.get(), padded(total, kHuge), MADV_HUGEPAGE);
#endif
  char* to = own.get();
  for (const auto& list : lists) {
    const size_t row = row_bytes(constant[list[0]]), rows = static_cast<size_t>(constant[list[0]].dims[0]);
    const size_t count = list.size();
    for (size_t k = 0; k < count; ++k) {
      Tensor& t = constant[list[k]];
      const auto* from = static_cast<const char*>(t.data);
      if (count == 1)
        std::memcpy(to, from, rows * row);
      else
        for (size_t i = 0; i < rows; ++i) std::memcpy(to + (i * count + k) * row, from + i * row, row);
#if defined(__linux__) && defined(MADV_PAGEOUT)
      // only whole pages, which is how they lie in a mapped file
      if (reinterpret_cast<uintptr_t>(from) % kPage == 0 && rows * row >= kPage)
        madvise(const_cast<void*>(t.data), rows * row / kPage * kPage, MADV_PAGEOUT);
#endif
      t.data = to + k * row;
    }
    to += padded(rows * row * count, kPage);
  }
  return true;
}

ort::StatusPtr NodeBase::gather(const ort::KernelContext* context, Tensors& tensors) const {
  tensors = constant;
  for (int role = 0; role < roles.count && !all_constant; ++role) {
    if (!index[role] || tensors[role].data) continue;
    const ort::Value* value = nullptr;
    ORT_TRY(api->KernelContext_GetInput(context, static_cast<size_t>(index[role]), &value));
    if (!value)
      return error(ort::kInvalidArgument, std::string("input ") + roles.list[role] + " must be a tensor, got none");
    ORT_TRY(read_tensor(api, value, tensors[role]));
  }
  return nullptr;
}

ort::StatusPtr open_rows(const NodeBase& node, ort::KernelContext* context, int x_type, int64_t width,
                         int64_t out_width, Rows& rows) {
  constexpr size_t kMaxRank = 16;
  const ort::Api* api = node.api;
  ORT_TRY(api->KernelContext_GetInput(context, 0, &rows.value));
  if (!rows.value) return node.error(ort::kInvalidArgument, "input x must be a tensor, got none");
  int64_t dims[kMaxRank];
  size_t rank = 0;
  int type = ort::kUndefined;
  ORT_TRY(read_shape(api, rows.value, kMaxRank, type, rank, dims));
  if (rank == 0 || rank > kMaxRank || dims[rank - 1] != width || type != x_type) {
    std::string got = type_name(type) + " [";
    for (size_t i = 0; i < rank && i < kMaxRank; ++i) got += (i ? ", " : "") + std::to_string(dims[i]);
    return node.error(ort::kInvalidArgument, "input x must be " + type_name(x_type) + " [..., " +
                                                 std::to_string(width) + "], got " + got + "]");
  }
  rows.tokens = 1;
  for (size_t i = 0; i + 1 < rank; ++i) rows.tokens *= dims[i];
  void* x = nullptr;
  ORT_TRY(api->GetTensorMutableData(const_cast<ort::Value*>(rows.value), &x));
  rows.x = x;
  dims[rank - 1] = out_width;
  ort::Value* y = nullptr;
  ORT_TRY(api->KernelContext_GetOutput(context, 0, dims, rank, &y));
  return api->GetTensorMutableData(y, &rows.y);
}

ort::StatusPtr parallel(const ort::Api* api, const ort::KernelContext* context, void (*task)(void*, size_t),
                        int64_t count, bool inline_, void* user) {
  if (!inline_ && count > 1) return api->KernelContext_ParallelFor(context, task, static_cast<size_t>(count), 0, user);
  for (int64_t i = 0; i < count; ++i) task(user, static_cast<size_t>(i));
  return nullptr;
}

OpBase::OpBase(const ort::Api* ort_api, int type, const char* op_name, const char* provider_name)
    : api(ort_api), x_type(type), name(op_name), provider(provider_name) {
  // One input x, then one variadic list of tensors of any type: no input is ever empty, one schema serves every
  // variant.
  using Self = const ort::CustomOp*;
  GetName = [](Self op) -> const char* { return static_cast<const OpBase*>(op)->name; };
  GetExecutionProviderType = [](Self op) -> const char* { return static_cast<const OpBase*>(op)->provider; };
  GetInputTypeCount = [](Self) -> size_t { return 2; };
  GetInputType = [](Self op, size_t i) -> int {
    return i == 0 ? static_cast<const OpBase*>(op)->x_type : static_cast<int>(ort::kUndefined);
  };
  GetInputCharacteristic = [](Self, size_t i) -> int { return i == 0 ? ort::kRequired : ort::kVariadic; };
  GetInputMemoryType = [](Self, size_t) -> int { return ort::kMemoryDefault; };
  GetVariadicInputMinArity = [](Self) -> int { return 2; };
  GetVariadicInputHomogeneity = [](Self) -> int { return 0; };
  GetOutputTypeCount = [](Self) -> size_t { return 1; };
  GetOutputType = [](Self op, size_t) -> int { return static_cast<const OpBase*>(op)->x_type; };
  GetOutputCharacteristic = [](Self, size_t) -> int { return ort::kRequired; };
  GetVariadicOutputMinArity = [](Self) -> int { return 1; };
  GetVariadicOutputHomogeneity = [](Self) -> int { return 0; };
  GetStartVersion = [](Self) -> int { return 1; };
  GetEndVersion = [](Self) -> int { return 1; };
}

ort::StatusPtr OpBase::same_shape(const ort::CustomOp* op, ort::ShapeContext* context) {
  const ort::Api* api = static_cast<const OpBase*>(op)->api;
  ort::TensorInfo* info = nullptr;
  ORT_TRY(api->ShapeInferContext_GetInputTypeShape(context, 0, &info));
  return api->ShapeInferContext_SetOutputTypeShape(context, 0, info);
}

}  // namespace sparsegate
