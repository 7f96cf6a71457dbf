// SparseLinear on CUDA: the op as ONNX Runtime sees it. The kernels are in sparse_linear_kernels.cu, row_sums.cu and
// row_tiles.cu.
//
// Everything is queued on ORT's stream; the host never waits, nothing is copied back, no launch depends on data, and
// the only allocation is ORT's scratch buffer: a CUDA graph can capture it. The kernels have been compiled for sm_80 to
// sm_90 and emulated on a CPU; they have not been run on a GPU yet.
#include "sparse_linear.cuh"

namespace sparsegate {
namespace sparse_linear {
namespace {

struct CudaKernel {
  static constexpr const char *kName = "SparseLinear", *kProvider = "CUDAExecutionProvider";
  static constexpr bool kSameShape = false;
  Node node;

  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type) {
    return node.init(api, info, x_type, false);
  }

  ort::StatusPtr compute(ort::KernelContext* context) const {
    const ort::Api* api = node.api;
    Call call;
    Rows io;
    call.variant = node.variant;
    ORT_TRY(node.fetch(context, call.tensors, call.shape));
    ORT_TRY(open_rows(node, context, node.variant.x, call.shape.d_in, call.shape.d_out, io));
    if (io.tokens == 0) return nullptr;
    call.tokens = io.tokens;
    call.x = io.x;
    call.y = io.y;
    void* raw = nullptr;
    ORT_TRY(api->KernelContext_GetGPUComputeStream(context, &raw));
    const auto stream = static_cast<cudaStream_t>(raw);
    const ort::MemoryInfo* memory = nullptr;
    ORT_TRY(api->GetTensorMemoryInfo(io.value, &memory));
    ORT_TRY(api->KernelContext_GetScratchBuffer(context, memory, run(call, nullptr, stream), &raw));
    run(call, static_cast<char*>(raw), stream);
    const cudaError_t failed = cudaGetLastError();
    return failed == cudaSuccess ? nullptr : node.error(ort::kFail, std::string("CUDA: ") + cudaGetErrorString(failed));
  }
};

}  // namespace
}  // namespace sparse_linear

void sparse_linear_cuda_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) {
  append_ops<sparse_linear::CudaKernel>(api, ops);
}

bool sparse_linear_cuda_supports(const char* name) {
  sparse_linear::Variant variant;
  return sparse_linear::variant_of_name(name, variant).empty();
}

}  // namespace sparsegate
