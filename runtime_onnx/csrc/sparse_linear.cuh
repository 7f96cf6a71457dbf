// One run of SparseLinear on the device.
#pragma once

#include "cuda_op.cuh"
#include "sparse_linear.h"

namespace sparsegate::sparse_linear {

// x [tokens, d_in], y [tokens, d_out]
using Call = CallOf<Variant, Shape>;

// As CudaKernel wants it
size_t run(const Call& call, char* base, cudaStream_t stream);

}  // namespace sparsegate::sparse_linear
