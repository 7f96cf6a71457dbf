// One run of GatedMLP on the device, and what its two paths share: decode for few tokens, prefill for many.
#pragma once

#include "cuda_op.cuh"
#include "gated_mlp.h"

namespace sparsegate::gated_mlp {

// Up to here the rows that a token keeps are read for that token alone; above, all rows are read once for all tokens.
constexpr int64_t kDecodeTokens = 4;

// x and y [tokens, d]
struct Call : CallOf<Variant, Shape> {
  Matrix rows_of_x() const { return matrix_of(x, variant.x, tokens, shape.d); }
};

// `run` of CudaKernel on its two paths
size_t decode(const Call& call, char* base, cudaStream_t stream);
size_t prefill(const Call& call, char* base, cudaStream_t stream);
inline size_t run(const Call& call, char* base, cudaStream_t stream) {
  return (call.tokens <= kDecodeTokens ? decode : prefill)(call, base, stream);
}

// What a kernel knows of the neurons, by value.
struct Neurons {
  Activation activation = Activation::kIdentity;
  float parameter = 0.f;
  bool zeros = false;  // see Variant::relu
  Score score = Score::kAll;
  // first: gate, or up in a plain MLP, whose `up` has no data
  Matrix first, up;
  const float *b_first = nullptr, *b_up = nullptr, *tau = nullptr;  // nullptr where absent

  explicit Neurons(const Call& call)
      : activation(call.variant.activation),
        parameter(call.variant.parameter),
        zeros(call.variant.relu()),
        score(call.variant.score) {
    const bool plain = call.variant.plain();
    first = plain ? call.matrix(kWUp, kSUp) : call.matrix(kWGate, kSGate);
    b_first = call.floats(plain ? kBUp : kBGate);
    if (!plain) up = call.matrix(kWUp, kSUp), b_up = call.floats(kBUp);
    tau = call.floats(kTau);
  }

  __device__ float activate(float v) const {
    switch (activation) {
      case Activation::kSilu:
        return v / (1.f + expf(-v));
      case Activation::kGelu:
        return 0.5f * v * (1.f + erff(v * 0.70710678f));
      case Activation::kGeluTanh:
        return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
      case Activation::kRelu:
      case Activation::kDrelu:
        return relu(v);
      case Activation::kRelu2:
        return relu(v) * relu(v);
      case Activation::kFatrelu:
        return v <= parameter ? 0.f : v;
      case Activation::kShiftedRelu:
        return relu(v - parameter);
      default:
        return v;
    }
  }
  // act(gate) of neuron i from the product of its row
  __device__ float gate(int64_t i, float product) const {
    return activate(product * row_scale(first, i) + (b_first ? b_first[i] : 0.f));
  }
  // what act(gate) is multiplied by
  __device__ float factor(int64_t i, float product) const {
    const float v = product * row_scale(up, i) + (b_up ? b_up[i] : 0.f);
    return activation == Activation::kDrelu ? relu(v) : v;
  }
  // whether act(gate) keeps the neuron; a predictor has decided before
  __device__ bool kept(int64_t i, float gate) const {
    return !(zeros && gate == 0.f) && (score != Score::kGate || fabsf(gate) > tau[i]);
  }
};

}  // namespace sparsegate::gated_mlp
