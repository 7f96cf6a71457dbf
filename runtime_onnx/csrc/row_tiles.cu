// Sums of kept rows for many tokens: a product of tiles v [tokens, rows] w [rows, columns] in which rows that a token
// does not keep are 0.
//
// A block per (128 tokens, 128 columns, part of the rows). Four parts, whatever the number of tokens, so that up to 128
// tokens still fill the machine: 128 blocks at 4096 columns; their sums are written once, 16 bytes a token and column,
// and added by `close`. At 512 tokens that is 33 MB beside 117 MB of w in 16 bits at 14336 rows. A step of 32 rows that
// no token of the tile keeps is left out: it would add zeros. (So a NaN or infinity in a row of w reaches every token
// of a tile that keeps the row: weights must be finite, as in any dense product.) int4 rows times their scales do not
// fit into 16 bits: they are multiplied as the sum of two numbers, at twice the operations (tiles.cuh).
#include "row_sums.cuh"
#include "tiles.cuh"

namespace sparsegate {
namespace {

constexpr int kParts = 4;

template <class T_, class W_>
struct RowTiles : PlainOp {
  using T = T_;
  using W = W_;
  static constexpr bool kRowsAreColumns = false;
  Matrix a, w;
  const uint8_t* used = nullptr;
  int64_t length = 0;  // rows to a part
  float* sums = nullptr;

  __device__ const Matrix& b() const { return w; }
  __device__ int64_t begin() const { return blockIdx.z * length; }
  __device__ int64_t end() const { return min(begin() + length, w.rows); }
  __device__ int64_t next(int64_t k) const {
    const uint8_t* flags = used ? used + blockIdx.x * ((w.rows + 63) / 64) : nullptr;
    while (flags && k < end() && !flags[k / 64]) k = (k / 64 + 1) * 64;
    return k;
  }
  __device__ bool finish(int64_t m, int j, float c0, float c1) const {
    put_sums(sums + blockIdx.z * a.rows * w.columns, a.rows, w.columns, m, j, c0, c1);
    return false;
  }
};

}  // namespace

int64_t tile_row_parts(int64_t) { return kParts; }

void add_row_tiles(const Matrix& v, const uint8_t* used, const Matrix& w, Partials& partials, cudaStream_t stream) {
  with_tile_types(v.type, w.type, [&](auto t, auto stored) {
    RowTiles<decltype(t), decltype(stored)> op;
    op.a = v;
    op.w = w;
    op.used = used;
    op.length = blocks(blocks(w.rows, kParts), 64) * 64;
    op.sums = partials.sums;
    launch_product(op, v.rows, blocks(w.columns, kTile), kParts, stream);
  });
  partials.parts = kParts;
}

void add_residual(const Matrix& hidden, const Matrix& residual, Partials& partials, cudaStream_t stream) {
  RowTiles<float, float> op;
  op.a = hidden;
  op.w = residual;
  op.length = residual.rows;
  op.sums = partials.sums + partials.parts * hidden.rows * residual.columns;
  launch_product(op, hidden.rows, blocks(residual.columns, kTile), 1, stream);
  ++partials.parts;
}

}  // namespace sparsegate
