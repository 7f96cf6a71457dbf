// Entry points of the library: what ONNX Runtime, Python and C callers see.
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "ort_abi.h"

namespace sparsegate {

using Ops = std::vector<std::unique_ptr<ort::CustomOp>>;

#define SPARSEGATE_KERNEL(op, provider, prefix)     \
  void prefix##_ops(const ort::Api* api, Ops& ops); \
  bool prefix##_supports(const char* variant);
#include "ops.inc"
#undef SPARSEGATE_KERNEL

namespace {

struct Registration {
  ort::Domain* domain = nullptr;
  Ops ops;
};

// ORT keeps pointers to the domain and its ops for as long as any session lives, so they are made once per ORT in the
// process and never freed.
ort::StatusPtr domain_of(const ort::Api* api, ort::Domain** out) {
  static std::mutex mutex;
  static auto& made = *new std::map<const ort::Api*, Registration>;
  const std::lock_guard<std::mutex> lock(mutex);
  Registration& registration = made[api];
  if (!registration.domain) {
    ort::Domain* domain = nullptr;
    Ops ops;
#define SPARSEGATE_KERNEL(op, provider, prefix) prefix##_ops(api, ops);
#include "ops.inc"
#undef SPARSEGATE_KERNEL
    ORT_TRY(api->CreateCustomOpDomain("ai.sparsegate", &domain));
    for (const auto& op : ops) ORT_TRY(api->CustomOpDomain_Add(domain, op.get()));
    registration.ops = std::move(ops);
    registration.domain = domain;
  }
  *out = registration.domain;
  return nullptr;
}

}  // namespace
}  // namespace sparsegate

SPARSEGATE_EXPORT ort::StatusPtr ORT_CALL RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (!api) {  // older than API 18: status slots are as old as ORT itself
    const ort::Api* first = base->GetApi(1);
    return first ? first->CreateStatus(ort::kNotImplemented,
                                       "sparsegate needs ONNX Runtime 1.18 or later. Update onnxruntime.")
                 : nullptr;
  }
  try {
    ort::Domain* domain = nullptr;
    ORT_TRY(sparsegate::domain_of(api, &domain));
    return api->AddCustomOpDomain(options, domain);
  } catch (const std::exception& error) {
    return api->CreateStatus(ort::kFail, error.what());
  }
}

// 1 if the library runs the variant (its name as the model's metadata spells it) on the execution provider.
SPARSEGATE_EXPORT int sparsegate_supports(const char* variant, const char* provider) {
  if (!variant || !provider) return 0;
#define SPARSEGATE_KERNEL(op, name, prefix) \
  if (!std::strcmp(provider, name) && sparsegate::prefix##_supports(variant)) return 1;
#include "ops.inc"
#undef SPARSEGATE_KERNEL
  return 0;
}

SPARSEGATE_EXPORT const char* sparsegate_version(void) { return SPARSEGATE_VERSION; }

// Build of the CPU kernels in use: "avx512vnni", "avx512", "avx2" or "portable".
SPARSEGATE_EXPORT const char* sparsegate_isa(void) { return sparsegate::isa_name(sparsegate::isa()); }

// For tests: uses another build from the next run on; "auto" goes back to the best one. 1, or 0 if the CPU or the
// library does not have it.
SPARSEGATE_EXPORT int sparsegate_force_isa(const char* name) { return name && sparsegate::force_isa(name) ? 1 : 0; }
