// One call of GatedMLP on the CPU: what its tasks share. gated_mlp.cc lays it out, gated_mlp_neurons.cc and
// gated_mlp_sums.cc do the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "gated_mlp.h"
#include "integer_rows.h"
#include "memory.h"
#include "row_kernels.h"
#include "row_sums.h"
#include "swish.h"

namespace sparsegate::gated_mlp {

constexpr int64_t kFoldedColumns = 512;  // of the strips in which partial sums are added up

// The n neurons are cut into blocks of `block`, a multiple of 32; their number depends on n alone.
struct Run {
  const Kernels* kernels;
  const IntegerRows* integers;
  Swish swish;
  const Variant* variant;
  const Tensors* tensors;
  Shape shape;
  int64_t block, blocks;
  int64_t pitch = 1;  // see Node
  // tokens of the pass share nothing but the rows: partial sums per block; otherwise strips of columns
  bool few;
  int64_t pass = 0;          // most tokens at a time
  int64_t tokens = 0;        // of this pass
  const float* x = nullptr;  // [tokens, d], rows x_stride apart
  int64_t x_stride = 0;
  float* y = nullptr;       // [tokens, d]
  float* hidden = nullptr;  // [tokens, r]: relu(P1 x)
  // the same rounded for integer rows; nullptr where nothing needs it
  char *x8 = nullptr, *x4 = nullptr, *hidden8 = nullptr;
  // few tokens
  float* partial = nullptr;  // [blocks + residual, tokens, columns]
  uint8_t* used = nullptr;   // [blocks + residual, tokens]: 0 where a partial sum is empty and was not written
  int64_t columns = 0;       // of a partial sum: d, padded for integer weights
  RowSums sums{};            // many tokens
  int64_t p1_rows = 0, strip = 0;
  std::atomic<bool> failed{false};  // out of memory in some task

  const Tensor& at(Role role) const { return (*tensors)[role]; }
  const float* floats(Role role) const { return static_cast<const float*>(at(role).data); }  // nullptr where absent
  bool integer() const { return variant->weights != Weights::kFloat; }
  bool int4() const { return variant->weights == Weights::kInt4G32; }
  int64_t first_of(int64_t index) const { return index * block; }
  int64_t size_of(int64_t index) const { return std::min(block, shape.n - index * block); }
};

// What a block's neurons give: the rows that any token keeps, and each token's factors of w_down (0 where it does not
// keep the row).
struct Neurons {
  const int32_t* rows;    // [count]
  const int32_t* places;  // [count]: rows times the pitch, which is where they lie
  const float* z;         // [tokens, count]
  int64_t count;
};

// relu(P1 x) for rows of P1; task = a piece of `p1_rows`
void hidden_task(void* run, size_t task);

// Rounds the token's x, or its hidden values, for integer rows
void round_x_task(void* run, size_t token);
void round_hidden(const Run& run);

// Scores a block, and computes gate and up for what is kept; memory is this thread's. false: out of memory.
bool compute_neurons(const Run& run, int64_t index, Neurons& out);

// Few tokens: a block's partial sums (task < blocks) or the residual's, and their sum for a token and a strip of
// columns
void block_task(void* run, size_t task);
void sum_task(void* run, size_t task);

// Many tokens: a block's factors, and all blocks' sums for a strip of columns
void factor_task(void* run, size_t task);
void strip_task(void* run, size_t task);

}  // namespace sparsegate::gated_mlp
