// An op on CUDA as ONNX Runtime sees it.
//
// Everything is queued on ORT's stream; the host never waits, nothing is copied back, no launch depends on data, and
// the only allocation is ORT's scratch buffer: a CUDA graph can capture it. The kernels have been compiled for sm_80 to
// sm_90 and emulated on a CPU; they have not been run on a GPU yet.
#pragma once

#include "matrix.cuh"

namespace sparsegate {

// One run of an op: the tensors, x and y lie on the device.
template <class Variant, class Shape>
struct CallOf {
  Variant variant;
  Tensors tensors;
  Shape shape;
  int64_t tokens = 0;
  const void* x = nullptr;
  void* y = nullptr;

  // nullptr where absent
  const float* floats(int role) const { return static_cast<const float*>(tensors[role].data); }
  // without data where absent
  Matrix matrix(int role, int scale) const { return matrix_of(tensors[role], tensors[scale]); }
};

// The kernel of an op with kName, kSameShape (y has x's shape), Node, Call, the widths of x and y by its shape, and
// `run(call, base, stream)`: queues the op on the stream and returns the bytes of scratch memory that it needs at
// `base` (aligned to 64); with base nullptr it only counts.
template <class Op>
struct CudaKernel {
  static constexpr const char *kName = Op::kName, *kProvider = "CUDAExecutionProvider";
  static constexpr bool kSameShape = Op::kSameShape;
  typename Op::Node node;

  ort::StatusPtr init(const ort::Api* api, const ort::KernelInfo* info, int x_type) {
    return node.init(api, info, x_type, false);
  }

  ort::StatusPtr compute(ort::KernelContext* context) const {
    const ort::Api* api = node.api;
    typename Op::Call call;
    Rows io;
    call.variant = node.variant;
    ORT_TRY(node.fetch(context, call.tensors, call.shape));
    ORT_TRY(open_rows(node, context, node.variant.x, Op::width_in(call.shape), Op::width_out(call.shape), io));
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

}  // namespace sparsegate
