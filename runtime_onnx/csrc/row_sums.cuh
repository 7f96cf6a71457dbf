// The second half of both ops: y[t] = sum over the kept rows i of v[t, i] w_i, plus bias and residual, in two stages
// without atomics.
#pragma once

#include "matrix.cuh"

namespace sparsegate {

// sums[part, t, c] in float32, or with few tokens the same; added in rising order of the parts
struct Partials {
  float* sums = nullptr;
  int64_t parts = 0;
};

// Factors v [tokens, rows]; kept are those that `keep` [tokens, rows] names, or with keep nullptr those with |v| > tau
// [rows].
struct KeptRows {
  Matrix v;
  const uint8_t* keep = nullptr;
  const float* tau = nullptr;
};

struct Ending {
  const float* bias = nullptr;    // [columns]
  Matrix residual;                // [r, columns]: y += residual^T hidden
  const float* hidden = nullptr;  // [tokens, r]
  void* y = nullptr;              // [tokens, columns] of this type
  int type = ort::kFloat32;
};

int64_t few_row_parts(int64_t rows);   // parts of add_few_rows
int64_t tile_row_parts(int64_t rows);  // parts of add_row_tiles

// Each token reads its own rows. Fills partials.parts.
void add_few_rows(const KeptRows& rows, const Matrix& w, Partials& partials, cudaStream_t stream);

// All tokens at once as a product of tiles; v [tokens, pitch] holds 0 where a row is not kept and, for int8 rows, their
// scales. `used` (nullptr: all are) [tokens / 128, rows / 64] is 0 where a tile of v is 0. Fills partials.parts.
void add_row_tiles(const Matrix& v, const uint8_t* used, const Matrix& w, Partials& partials, cudaStream_t stream);

// The product hidden [tokens, r] residual [r, columns] as one part more.
void add_residual(const Matrix& hidden, const Matrix& residual, Partials& partials, cudaStream_t stream);

void close(const Partials& partials, int64_t tokens, int64_t columns, const Ending& end, cudaStream_t stream);

}  // namespace sparsegate
