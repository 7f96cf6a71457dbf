// SparseLinear on CUDA. The kernels are in sparse_linear_kernels.cu, row_sums.cu and row_tiles.cu.
#include "sparse_linear.cuh"

namespace sparsegate {
namespace sparse_linear {
namespace {

struct CudaOp {
  static constexpr const char* kName = "SparseLinear";
  static constexpr bool kSameShape = false;
  using Node = sparse_linear::Node;
  using Call = sparse_linear::Call;
  static int64_t width_in(const Shape& shape) { return shape.d_in; }
  static int64_t width_out(const Shape& shape) { return shape.d_out; }
};

}  // namespace
}  // namespace sparse_linear

void sparse_linear_cuda_ops(const ort::Api* api, std::vector<std::unique_ptr<ort::CustomOp>>& ops) {
  append_ops<CudaKernel<sparse_linear::CudaOp>>(api, ops);
}

bool sparse_linear_cuda_supports(const char* name) { return is_variant(sparse_linear::variant_of_name, name); }

}  // namespace sparsegate
