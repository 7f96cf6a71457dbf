// What every op of the library shares: tensors as ORT holds them, roles of inputs, one node, and the members of an
// OrtCustomOp.
//
// Input 0 is x; all others are one variadic list in the order that the string attribute `inputs` names, so one schema
// serves every variant.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace sparsegate {

constexpr int kMaxRoles = 16;
constexpr int64_t kGroup = 32;  // columns per scale of int4_g32

// A tensor as ORT holds it; rank is the real one, dims holds the first two. data nullptr: not there (yet).
struct Tensor {
  const void* data = nullptr;
  int type = ort::kUndefined;
  size_t rank = 0;
  int64_t dims[2] = {0, 0};
};

using Tensors = std::array<Tensor, kMaxRoles>;  // by role
using Present = std::array<bool, kMaxRoles>;    // by role

// How a matrix is stored: a float type, int8 with one float32 scale per row, int4 with one float16 scale per 32 columns
enum class Weights : int { kFloat, kInt8Row, kInt4G32 };

// A closed list of names: roles, or values of an attribute.
struct Names {
  const char* const* list;
  int count;
  template <int N>
  constexpr Names(const char* const (&names)[N]) : list(names), count(N) {}  // NOLINT: an array is its names

  int find(const std::string& text) const;  // -1: not one of them
  std::string listed() const;
};

extern const Names kTypes;    // element types by ort::Type
extern const Names kWeights;  // by Weights

bool is_float(int type);
// [1 .. 2^30, 1 .. 2^30]
bool is_matrix(const Tensor& tensor);
int64_t bytes_of(int type);
std::string type_name(int type);
std::string shape_text(const Tensor& tensor);
std::string size_text(int64_t size);  // "?" for 0, a size that is not known yet
std::vector<std::string> split(const std::string& text, char separator);

// Reads roles, separated by spaces, in the order of `roles`, each once; returns what is wrong (empty: nothing).
std::string read_roles(const Names& roles, const std::string& inputs, Present& present);

// Reads "x=float32,w=float16" with these keys; false where it is spelled in any other way or a type has no name.
bool read_types(const std::string& text, const std::vector<std::string>& keys, const std::vector<int*>& types);

// Reads the string attribute, or sets `out` to "" where the node has none.
ort::StatusPtr read_string(const ort::Api* api, const ort::KernelInfo* info, const char* name, std::string& out);
ort::StatusPtr read_tensor(const ort::Api* api, const ort::Value* value, Tensor& out);

// One node: its constant tensors by role, and how to fetch the others.
struct NodeBase {
  NodeBase(const char* op_name, const Names& role_names) : op(op_name), roles(role_names) {}

  const char* op;
  Names roles;
  const ort::Api* api = nullptr;
  std::string name;
  Tensors constant{};
  std::array<int, kMaxRoles> index{};  // input index of a role, 0 where absent
  bool all_constant = true;
  std::unique_ptr<char[], void (*)(void*)> own{nullptr, std::free};  // see keep_close

  ort::StatusPtr error(int code, const std::string& message) const;

  // The steps of a node's init: its name; then, once its roles are known, its constant inputs. `constants` false (a
  // device kernel, whose constants may move): all of them are fetched in every run.
  ort::StatusPtr open(const ort::Api* api, const ort::KernelInfo* info);
  ort::StatusPtr bind(const ort::KernelInfo* info, const Present& present, const std::string& inputs, bool constants);

  // Copies the constants into memory of its own with huge pages, where the system has them. ONNX Runtime maps them from
  // the model's file in pages of 4 KiB: rows far apart then miss the TLB one by one. The file's pages are given back
  // (ONNX Runtime's own ops do the same when they pack their weights). Matrices of each list of roles are laid row
  // beside row: row i of all of them, then row i + 1. false: nothing was copied.
  bool keep_close(const std::vector<std::vector<int>>& together);

  // Tensors of a run; `constant` where nothing else is needed.
  ort::StatusPtr gather(const ort::KernelContext* context, Tensors& tensors) const;
};

// What an op's node adds to it: its variant and shape. `Check` checks the tensors that are there against each other,
// fills the shape and returns what is wrong.
template <class Variant, class Shape, std::string (*Check)(const Variant&, const Tensors&, Shape&)>
struct NodeOf : NodeBase {
  using NodeBase::NodeBase;
  Variant variant;
  Shape shape;

  // The last step of init, once the attributes are read into `variant` (`problem`: what is wrong with them)
  ort::StatusPtr finish(const ort::KernelInfo* info, int x_type, const std::string& problem, const std::string& inputs,
                        bool constants) {
    if (!problem.empty()) return error(ort::kInvalidArgument, problem);
    variant.x = x_type;
    ORT_TRY(bind(info, variant.present, inputs, constants));
    return check(constant, shape);
  }

  ort::StatusPtr fetch(const ort::KernelContext* context, Tensors& tensors, Shape& out) const {
    ORT_TRY(gather(context, tensors));
    out = shape;
    return all_constant ? nullptr : check(tensors, out);
  }

  ort::StatusPtr check(const Tensors& tensors, Shape& out) const {
    const std::string problem = Check(variant, tensors, out);
    return problem.empty() ? nullptr : error(ort::kInvalidArgument, problem);
  }
};

// x of a run and the output made for it.
struct Rows {
  const void* x = nullptr;
  void* y = nullptr;
  const ort::Value* value = nullptr;
  int64_t tokens = 0;
};

// x must be x_type [..., width]; y gets the same dimensions with `out_width` as the last.
ort::StatusPtr open_rows(const NodeBase& node, ort::KernelContext* context, int x_type, int64_t width,
                         int64_t out_width, Rows& rows);

// ParallelFor over `count` tasks, or one after the other on this thread.
ort::StatusPtr parallel(const ort::Api* api, const ort::KernelContext* context, void (*task)(void*, size_t),
                        int64_t count, bool inline_, void* user);

// Fills the members of an OrtCustomOp that are the same for every kernel.
struct OpBase : ort::CustomOp {
  const ort::Api* api;
  int x_type;
  const char* name;
  const char* provider;
  OpBase(const ort::Api* api, int x_type, const char* name, const char* provider);
  static ort::StatusPtr same_shape(const ort::CustomOp* op, ort::ShapeContext* context);
};

// The op of a kernel type: kName, kProvider, kSameShape (y has x's shape), `init(api, info, x_type)`,
// `compute(context)`, and a `node` that reports errors.
template <class Kernel>
struct Op : OpBase {
  Op(const ort::Api* ort_api, int type) : OpBase(ort_api, type, Kernel::kName, Kernel::kProvider) {
    CreateKernelV2 = [](const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info,
                        void** out) -> ort::StatusPtr {
      try {
        auto kernel = std::make_unique<Kernel>();
        ORT_TRY(kernel->init(api, info, static_cast<const Op*>(op)->x_type));
        *out = kernel.release();
        return nullptr;
      } catch (const std::exception& error) {
        return api->CreateStatus(ort::kFail, error.what());
      }
    };
    KernelComputeV2 = [](void* kernel, ort::KernelContext* context) -> ort::StatusPtr {
      const auto* self = static_cast<const Kernel*>(kernel);
      try {
        return self->compute(context);
      } catch (const std::exception& error) {
        return self->node.api->CreateStatus(ort::kFail, error.what());
      }
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    if (Kernel::kSameShape) InferOutputShapeFn = same_shape;
  }
};

// Whether the reader of an op's variants knows the name.
template <class Variant>
bool is_variant(std::string (*variant_of_name)(const std::string&, Variant&), const char* name) {
  Variant variant;
  return variant_of_name(name, variant).empty();
}

// Appends a kernel's ops, one per dtype of x.
template <class Kernel>
void append_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) {
  for (int type : {ort::kFloat32, ort::kFloat16, ort::kBfloat16})
    ops.push_back(std::make_unique<Op<Kernel>>(api, type));
}

}  // namespace sparsegate
