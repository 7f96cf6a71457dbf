// The CUDA kernels of both ops without ONNX Runtime, for tests: compiled with the emulation by g++, or with the same
// sources by nvcc.
#include "gated_mlp.cuh"
#include "sparse_linear.cuh"

namespace {

using sparsegate::Tensor;

std::string message;

const char* tell(const std::string& text) {
  message = text;
  return message.empty() ? nullptr : message.c_str();
}

// type 0: not there; rows and columns as in the tensor (columns 0: a vector)
void fill(sparsegate::Tensors& tensors, int roles, const void* const* data, const int* types, const int64_t* dims) {
  for (int role = 0; role < roles; ++role) {
    Tensor& t = tensors[role];
    if (!types[role]) continue;
    t.data = data[role];
    t.type = types[role];
    t.dims[0] = dims[2 * role];
    t.dims[1] = dims[2 * role + 1];
    t.rank = t.dims[1] ? 2 : 1;
  }
}

// With scratch nullptr only tells the bytes that are needed.
template <class Call>
const char* answer(const Call& call, void* scratch, int64_t* bytes, void* stream) {
  *bytes = static_cast<int64_t>(run(call, static_cast<char*>(scratch), static_cast<cudaStream_t>(stream)));
  if (!scratch) return nullptr;
  const cudaError_t failed = cudaGetLastError();
  return failed == cudaSuccess ? nullptr : tell(cudaGetErrorString(failed));
}

template <class Call, class Read, class Check>
const char* run_op(Read read, Check check, int roles, const char* variant, const void* const* data, const int* types,
                   const int64_t* dims, const void* x, void* y, int64_t tokens, void* scratch, int64_t* bytes,
                   void* stream) {
  Call call;
  const std::string unknown = read(variant, call.variant);
  if (!unknown.empty()) return tell(unknown);
  fill(call.tensors, roles, data, types, dims);
  const std::string wrong = check(call.variant, call.tensors, call.shape);
  if (!wrong.empty()) return tell(wrong);
  call.x = x;
  call.y = y;
  call.tokens = tokens;
  return answer(call, scratch, bytes, stream);
}

}  // namespace

#define ENTRY(op, roles)                                                                                             \
  extern "C" __attribute__((visibility("default"))) const char* run_##op(                                            \
      const char* variant, const void* const* data, const int* types, const int64_t* dims, const void* x, void* y,   \
      int64_t tokens, void* scratch, int64_t* bytes, void* stream) {                                                 \
    namespace op = sparsegate::op;                                                                                   \
    return run_op<op::Call>(op::variant_of_name, op::check_tensors, roles, variant, data, types, dims, x, y, tokens, \
                            scratch, bytes, stream);                                                                 \
  }
ENTRY(gated_mlp, 15)  // returns what is wrong, or nullptr
ENTRY(sparse_linear, 4)
