// GatedMLP on CUDA: the op as ONNX Runtime sees it. The kernels are in gated_mlp_decode.cu (few tokens),
// gated_mlp_prefill.cu (many) and row_sums.cu, tiles.cuh (shared with SparseLinear).
//
// Everything is queued on ORT's stream; the host never waits, nothing is copied back, no launch depends on data, and
// the only allocation is ORT's scratch buffer: a CUDA graph can capture it. The kernels have been compiled for sm_80 to
// sm_90 and emulated on a CPU; they have not been run on a GPU yet.
#include "gated_mlp.cuh"

namespace sparsegate {
namespace gated_mlp {
namespace {

struct CudaKernel {
  static constexpr const char *kName = "GatedMLP", *kProvider = "CUDAExecutionProvider";
  static constexpr bool kSameShape = true;
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
    ORT_TRY(open_rows(node, context, node.variant.x, call.shape.d, call.shape.d, io));
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
}  // namespace gated_mlp

void gated_mlp_cuda_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) {
  append_ops<gated_mlp::CudaKernel>(api, ops);
}

bool gated_mlp_cuda_supports(const char* name) {
  gated_mlp::Variant variant;
  return gated_mlp::variant_of_name(name, variant).empty();
}

}  // namespace sparsegate
