// One run of SparseLinear on the device.
#pragma once

#include "matrix.cuh"
#include "sparse_linear.h"

namespace sparsegate::sparse_linear {

// tensors, x [tokens, d_in] and y [tokens, d_out] lie on the device
struct Call {
  Variant variant;
  Tensors tensors;
  Shape shape;
  int64_t tokens = 0;
  const void* x = nullptr;
  void* y = nullptr;

  // nullptr where absent
  const float* floats(Role role) const { return static_cast<const float*>(tensors[role].data); }
  Matrix w() const { return matrix_of(tensors[kW], tensors[kSW]); }
};

// Queues the op on the stream and returns the bytes of scratch memory that it needs at `base` (aligned to 64); with
// base nullptr it only counts.
size_t run(const Call& call, char* base, cudaStream_t stream);

}  // namespace sparsegate::sparse_linear
