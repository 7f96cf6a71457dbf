// As much of ONNX Runtime as a CPU kernel of the library asks for: the slots of ort_abi.h, tensors, attributes, and a
// ParallelFor over threads that all runs share.
//
// It stands in for ORT where ORT itself cannot come along: under a thread sanitizer (ORT's own threads are not
// instrumented) and on an emulated processor.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "ort_abi.h"

namespace ort {

struct Status {
  int code;
  std::string message;
};

struct TensorInfo {
  int type;
  std::vector<int64_t> dims;
};

struct Value {
  TensorInfo info;
  std::vector<char> storage;  // of an output
  void* data = nullptr;
};

struct Domain {
  std::map<std::string, const CustomOp*> ops;  // "name of the op" + element type of x
};

struct SessionOptions {
  Domain* domain = nullptr;
};

// One node: attributes and constants; x is input 0.
struct KernelInfo {
  std::string name;
  std::map<std::string, std::string> attributes;
  std::vector<const Value*> inputs;  // nullptr: not constant
};

class Threads;

struct KernelContext {
  std::vector<const Value*> inputs;
  Value output;
  Threads* threads = nullptr;
  int64_t elements = 0;
};

inline size_t element_bytes(int type) { return type == kFloat32 ? 4 : type == kFloat16 || type == kBfloat16 ? 2 : 1; }

// Workers that take tasks of all concurrent runs in turns; the caller works, too.
class Threads {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i)
      workers_.emplace_back([this] {
        for (std::function<void()> job; next(job);) job();
      });
  }
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void run(void (*task)(void*, size_t), size_t total, void* user) {
    struct Shared {
      std::atomic<size_t> next{0}, left;
      std::mutex mutex;
      std::condition_variable done;
    };
    auto shared = std::make_shared<Shared>();
    shared->left = total;
    const auto work = [shared, task, total, user] {
      for (size_t i; (i = shared->next.fetch_add(1)) < total;) {
        task(user, i);
        if (shared->left.fetch_sub(1) == 1) {
          std::lock_guard<std::mutex> lock(shared->mutex);
          shared->done.notify_all();
        }
      }
    };
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = 0; i < workers_.size(); ++i) jobs_.push_back(work);
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->done.wait(lock, [&] { return shared->left.load() == 0; });
  }

 private:
  bool next(std::function<void()>& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
    if (jobs_.empty()) return false;
    job = std::move(jobs_.front());
    jobs_.pop_front();
    return true;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  std::vector<std::thread> workers_;
  bool stop_ = false;
};

namespace fake {

inline StatusPtr CreateStatus(int code, const char* message) noexcept { return new Status{code, message}; }
inline void ReleaseStatus(Status* status) noexcept { delete status; }
inline StatusPtr CreateCustomOpDomain(const char*, Domain** out) noexcept { return *out = new Domain, nullptr; }
inline StatusPtr CustomOpDomain_Add(Domain* domain, const CustomOp* op) noexcept {
  if (std::strcmp(op->GetExecutionProviderType(op), "CPUExecutionProvider") == 0)
    domain->ops[op->GetName(op) + std::to_string(op->GetInputType(op, 0))] = op;
  return nullptr;
}
inline StatusPtr AddCustomOpDomain(SessionOptions* options, Domain* domain) noexcept {
  return options->domain = domain, nullptr;
}
inline StatusPtr GetTensorMutableData(Value* value, void** out) noexcept { return *out = value->data, nullptr; }
inline StatusPtr GetTensorElementType(const TensorInfo* info, int* out) noexcept { return *out = info->type, nullptr; }
inline StatusPtr GetDimensionsCount(const TensorInfo* info, size_t* out) noexcept {
  return *out = info->dims.size(), nullptr;
}
inline StatusPtr GetDimensions(const TensorInfo* info, int64_t* dims, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) dims[i] = info->dims[i];
  return nullptr;
}
inline StatusPtr GetTensorTypeAndShape(const Value* value, TensorInfo** out) noexcept {
  return *out = new TensorInfo(value->info), nullptr;
}
inline void ReleaseTensorTypeAndShapeInfo(TensorInfo* info) noexcept { delete info; }
inline StatusPtr text(const std::string& value, char* out, size_t* size) noexcept {
  const size_t room = *size;
  *size = value.size() + 1;
  if (!out) return nullptr;
  if (room < *size) return CreateStatus(kInvalidArgument, "too small");
  std::memcpy(out, value.c_str(), *size);
  return nullptr;
}
inline StatusPtr KernelInfoGetAttribute_string(const KernelInfo* info, const char* name, char* out,
                                               size_t* size) noexcept {
  const auto found = info->attributes.find(name);
  return found == info->attributes.end() ? CreateStatus(kFail, "no such attribute") : text(found->second, out, size);
}
inline StatusPtr KernelInfo_GetInputCount(const KernelInfo* info, size_t* out) noexcept {
  return *out = info->inputs.size(), nullptr;
}
inline StatusPtr KernelInfo_GetNodeName(const KernelInfo* info, char* out, size_t* size) noexcept {
  return text(info->name, out, size);
}
inline StatusPtr KernelInfoGetConstantInput_tensor(const KernelInfo* info, size_t index, int* constant,
                                                   const Value** out) noexcept {
  *out = info->inputs[index];
  *constant = *out != nullptr;
  return nullptr;
}
inline StatusPtr KernelContext_GetInputCount(const KernelContext* context, size_t* out) noexcept {
  return *out = context->inputs.size(), nullptr;
}
inline StatusPtr KernelContext_GetInput(const KernelContext* context, size_t index, const Value** out) noexcept {
  return *out = context->inputs[index], nullptr;
}
inline StatusPtr KernelContext_GetOutput(KernelContext* context, size_t, const int64_t* dims, size_t rank,
                                         Value** out) noexcept {
  Value& y = context->output;
  y.info.dims.assign(dims, dims + rank);
  size_t bytes = element_bytes(y.info.type);
  for (size_t i = 0; i < rank; ++i) bytes *= static_cast<size_t>(dims[i]);
  if (!y.data) y.storage.resize(bytes), y.data = y.storage.data();
  *out = &y;
  return nullptr;
}
inline StatusPtr KernelContext_ParallelFor(const KernelContext* context, void (*task)(void*, size_t), size_t total,
                                           size_t, void* user) noexcept {
  return context->threads->run(task, total, user), nullptr;
}

inline const Api* api() {
  static const Api table = [] {
    Api made{};
#define SPARSEGATE_FAKE(slot, name) made.slots[slot] = reinterpret_cast<void*>(&name);
    SPARSEGATE_FAKE(0, CreateStatus)
    SPARSEGATE_FAKE(93, ReleaseStatus)
    SPARSEGATE_FAKE(26, CreateCustomOpDomain)
    SPARSEGATE_FAKE(27, CustomOpDomain_Add)
    SPARSEGATE_FAKE(28, AddCustomOpDomain)
    SPARSEGATE_FAKE(51, GetTensorMutableData)
    SPARSEGATE_FAKE(60, GetTensorElementType)
    SPARSEGATE_FAKE(61, GetDimensionsCount)
    SPARSEGATE_FAKE(62, GetDimensions)
    SPARSEGATE_FAKE(65, GetTensorTypeAndShape)
    SPARSEGATE_FAKE(99, ReleaseTensorTypeAndShapeInfo)
    SPARSEGATE_FAKE(87, KernelInfoGetAttribute_string)
    SPARSEGATE_FAKE(230, KernelInfo_GetInputCount)
    SPARSEGATE_FAKE(244, KernelInfo_GetNodeName)
    SPARSEGATE_FAKE(249, KernelInfoGetConstantInput_tensor)
    SPARSEGATE_FAKE(88, KernelContext_GetInputCount)
    SPARSEGATE_FAKE(90, KernelContext_GetInput)
    SPARSEGATE_FAKE(91, KernelContext_GetOutput)
    SPARSEGATE_FAKE(274, KernelContext_ParallelFor)
#undef SPARSEGATE_FAKE
    return made;
  }();
  return &table;
}

inline const Api* GetApi(uint32_t version) noexcept { return version <= kApiVersion ? api() : nullptr; }
inline const char* GetVersionString() noexcept { return "1.18.0"; }

}  // namespace fake
}  // namespace ort
