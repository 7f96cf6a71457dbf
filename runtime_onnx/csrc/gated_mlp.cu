// GatedMLP on CUDA. The kernels are in gated_mlp_decode.cu (few tokens), gated_mlp_prefill.cu (many) and row_sums.cu,
// tiles.cuh (shared with SparseLinear).
#include "gated_mlp.cuh"

namespace sparsegate {
namespace gated_mlp {
namespace {

struct CudaOp {
  static constexpr const char* kName = "GatedMLP";
  static constexpr bool kSameShape = true;
  using Node = gated_mlp::Node;
  using Call = gated_mlp::Call;
  static int64_t width_in(const Shape& shape) { return shape.d; }
  static int64_t width_out(const Shape& shape) { return shape.d; }
};

}  // namespace
}  // namespace gated_mlp

void gated_mlp_cuda_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) {
  append_ops<CudaKernel<gated_mlp::CudaOp>>(api, ops);
}

bool gated_mlp_cuda_supports(const char* name) { return is_variant(gated_mlp::variant_of_name, name); }

}  // namespace sparsegate
