// The part of ONNX Runtime's C ABI that a custom-op library needs, in place of ORT's headers.
//
// OrtApi is a table of function pointers that is only ever appended to (ORT asserts the last slot of each release), so
// a slot number is as stable as a function's name. Every slot here is below 280, the end of API version 18: one binary
// serves ONNX Runtime 1.18 and later. OrtCustomOp carries its own version; ORT reads no member newer than that.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define ORT_CALL __stdcall
#define SPARSEGATE_EXPORT extern "C" __declspec(dllexport)
#else
#define ORT_CALL
#define SPARSEGATE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace ort {

constexpr uint32_t kApiVersion = 18;

struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct TensorInfo;
struct MemoryInfo;
struct Domain;
struct SessionOptions;
struct CustomOp;
using StatusPtr = Status*;  // nullptr means success

enum ErrorCode : int {
  kFail = 1,
  kInvalidArgument = 2,
  kRuntimeException = 6,
  kNotImplemented = 9,
  kInvalidGraph = 10
};

// ONNXTensorElementDataType
enum Type : int { kUndefined = 0, kFloat32 = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10, kBfloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
constexpr int kMemoryDefault = 0;

struct ApiBase {
  const struct Api*(ORT_CALL* GetApi)(uint32_t version) noexcept;
  const char*(ORT_CALL* GetVersionString)() noexcept;
};

struct Api {
  void* slots[280];

#define SPARSEGATE_SLOT(slot, name, result, ...)                                            \
  template <class... Args>                                                                  \
  result name(Args... args) const {                                                         \
    return reinterpret_cast<result(ORT_CALL*)(__VA_ARGS__) noexcept>(slots[slot])(args...); \
  }
  SPARSEGATE_SLOT(0, CreateStatus, StatusPtr, int code, const char* message)
  SPARSEGATE_SLOT(93, ReleaseStatus, void, Status*)
  SPARSEGATE_SLOT(26, CreateCustomOpDomain, StatusPtr, const char* name, Domain** out)
  SPARSEGATE_SLOT(27, CustomOpDomain_Add, StatusPtr, Domain*, const CustomOp*)
  SPARSEGATE_SLOT(28, AddCustomOpDomain, StatusPtr, SessionOptions*, Domain*)
  SPARSEGATE_SLOT(51, GetTensorMutableData, StatusPtr, Value*, void** out)
  SPARSEGATE_SLOT(60, GetTensorElementType, StatusPtr, const TensorInfo*, int* out)
  SPARSEGATE_SLOT(61, GetDimensionsCount, StatusPtr, const TensorInfo*, size_t* out)
  SPARSEGATE_SLOT(62, GetDimensions, StatusPtr, const TensorInfo*, int64_t* dims, size_t count)
  SPARSEGATE_SLOT(65, GetTensorTypeAndShape, StatusPtr, const Value*, TensorInfo** out)
  SPARSEGATE_SLOT(99, ReleaseTensorTypeAndShapeInfo, void, TensorInfo*)
  SPARSEGATE_SLOT(87, KernelInfoGetAttribute_string, StatusPtr, const KernelInfo*, const char* name, char* out,
                  size_t* size)
  SPARSEGATE_SLOT(230, KernelInfo_GetInputCount, StatusPtr, const KernelInfo*, size_t* out)
  SPARSEGATE_SLOT(244, KernelInfo_GetNodeName, StatusPtr, const KernelInfo*, char* out, size_t* size)
  SPARSEGATE_SLOT(249, KernelInfoGetConstantInput_tensor, StatusPtr, const KernelInfo*, size_t index, int* is_constant,
                  const Value** out)
  SPARSEGATE_SLOT(88, KernelContext_GetInputCount, StatusPtr, const KernelContext*, size_t* out)
  SPARSEGATE_SLOT(90, KernelContext_GetInput, StatusPtr, const KernelContext*, size_t index, const Value** out)
  SPARSEGATE_SLOT(91, KernelContext_GetOutput, StatusPtr, KernelContext*, size_t index, const int64_t* dims,
                  size_t rank, Value** out)
  SPARSEGATE_SLOT(193, KernelContext_GetGPUComputeStream, StatusPtr, const KernelContext*, void** out)
  SPARSEGATE_SLOT(194, GetTensorMemoryInfo, StatusPtr, const Value*, const MemoryInfo** out)
  // batches 0: tasks are handed out one by one, in rising order, to whichever thread is free
  SPARSEGATE_SLOT(274, KernelContext_ParallelFor, StatusPtr, const KernelContext*, void (*task)(void*, size_t),
                  size_t total, size_t batches, void* user)
  // not on the CPU: 1.18 dies there
  SPARSEGATE_SLOT(277, KernelContext_GetScratchBuffer, StatusPtr, const KernelContext*, const MemoryInfo*, size_t bytes,
                  void** out)
  SPARSEGATE_SLOT(268, ShapeInferContext_GetInputTypeShape, StatusPtr, const ShapeContext*, size_t index,
                  TensorInfo** out)
  SPARSEGATE_SLOT(270, ShapeInferContext_SetOutputTypeShape, StatusPtr, const ShapeContext*, size_t index,
                  const TensorInfo*)
#undef SPARSEGATE_SLOT
};

// OrtCustomOp of API version 18
struct CustomOp {
  uint32_t version = kApiVersion;
  void*(ORT_CALL* CreateKernel)(const CustomOp*, const Api*, const KernelInfo*) = nullptr;
  const char*(ORT_CALL* GetName)(const CustomOp*) = nullptr;
  const char*(ORT_CALL* GetExecutionProviderType)(const CustomOp*) = nullptr;
  int(ORT_CALL* GetInputType)(const CustomOp*, size_t index) = nullptr;
  size_t(ORT_CALL* GetInputTypeCount)(const CustomOp*) = nullptr;
  int(ORT_CALL* GetOutputType)(const CustomOp*, size_t index) = nullptr;
  size_t(ORT_CALL* GetOutputTypeCount)(const CustomOp*) = nullptr;
  void(ORT_CALL* KernelCompute)(void* kernel, KernelContext*) = nullptr;
  void(ORT_CALL* KernelDestroy)(void* kernel) = nullptr;
  int(ORT_CALL* GetInputCharacteristic)(const CustomOp*, size_t index) = nullptr;
  int(ORT_CALL* GetOutputCharacteristic)(const CustomOp*, size_t index) = nullptr;
  int(ORT_CALL* GetInputMemoryType)(const CustomOp*, size_t index) = nullptr;
  int(ORT_CALL* GetVariadicInputMinArity)(const CustomOp*) = nullptr;
  int(ORT_CALL* GetVariadicInputHomogeneity)(const CustomOp*) = nullptr;
  int(ORT_CALL* GetVariadicOutputMinArity)(const CustomOp*) = nullptr;
  int(ORT_CALL* GetVariadicOutputHomogeneity)(const CustomOp*) = nullptr;
  StatusPtr(ORT_CALL* CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel) = nullptr;
  StatusPtr(ORT_CALL* KernelComputeV2)(void* kernel, KernelContext*) = nullptr;
  StatusPtr(ORT_CALL* InferOutputShapeFn)(const CustomOp*, ShapeContext*) = nullptr;
  int(ORT_CALL* GetStartVersion)(const CustomOp*) = nullptr;
  int(ORT_CALL* GetEndVersion)(const CustomOp*) = nullptr;
  size_t(ORT_CALL* GetMayInplace)(int** inputs, int** outputs) = nullptr;
  void(ORT_CALL* ReleaseMayInplace)(int* inputs, int* outputs) = nullptr;
  size_t(ORT_CALL* GetAliasMap)(int** inputs, int** outputs) = nullptr;
  void(ORT_CALL* ReleaseAliasMap)(int* inputs, int* outputs) = nullptr;
};
static_assert(sizeof(void*) != 8 || sizeof(CustomOp) == 208, "OrtCustomOp of API version 18 has 208 bytes");

// Returns from the calling function if an ORT call failed.
#define ORT_TRY(call)                                    \
  do {                                                   \
    if (ort::StatusPtr status_ = (call)) return status_; \
  } while (0)

}  // namespace ort
