// GatedMLP on CUDA for more than four tokens: every row is read once for all tokens of a pass, and each token's own
// selection is always applied.
//
// Passes of at most 512 tokens; six to nine launches each, their grids known from the shapes alone. M tokens, other
// letters as in gated_mlp_decode.cu:
//   hide     product_float, a block per (128 tokens, 128 ranks, 256 columns): parts of P1 x
//            reads  r d p + M d x
//   relu     adds them in rising order: hidden [M, r] in float32
//   predict  product_float, a block per (128 tokens, 128 neurons): keep [M, n]
//            reads  n r p, writes M n
//   gate_up  product, a block per (128 tokens, 64 neurons): the tile's 128 columns are eights of gate and up in turn,
//            so that a thread holds both products of a neuron and writes z = act(gate) up, or 0, once, in x's type
//            reads  2 n d b, writes 2 M n
//   rows     product, in row_tiles.cu: parts of z w_down
//            reads  n d b + 2 M n, writes 16 M d
//   close    in row_sums.cu: adds parts, residual and bias
//            reads  16 M d, writes 2 M d
// At d = 4096, n = 14336, float16, M = 512: 352 MB of weights, 0.18 TFLOP; bound by the tensor cores above about 300
// tokens (tiles.cuh), by the reading of the weights below. gate_up leaves out a tile that no token keeps, and `rows`
// the steps that such tiles would feed: both happen only when neurons go idle in groups of 64 for 128 tokens.
//
// z is rounded to x's type before it meets w_down, as in any 16-bit model; int8 row scales of w_down are multiplied
// into it before that. A float16 z overflows above 65504. Gate, up, scores and weights of any format are not rounded. A
// token's result does not depend on the other tokens of a call that takes this path and repeats bit for bit; it differs
// from decode's in rounding. Types that the tensor cores do not take together (float32, or x and weights of two 16-bit
// types) are multiplied in float32.
#include "gated_mlp.cuh"
#include "memory.h"
#include "row_sums.cuh"
#include "tiles.cuh"

namespace sparsegate::gated_mlp {
namespace {

constexpr int64_t kPass = 512;           // tokens: bounds the scratch memory
constexpr int64_t kHiddenColumns = 256;  // of a part of P1 x
constexpr int kFlagged = 64;             // neurons to a flag of `used`

// parts[z, m, k] = x[m] . p1[k] over the z-th 256 columns
struct Hide : PlainOp {
  using T = float;
  using W = float;
  static constexpr bool kRowsAreColumns = true;
  Matrix a, p1;
  float* parts = nullptr;

  __device__ const Matrix& b(int j, int64_t& row) const {
    row = blockIdx.y * int64_t{kTile} + j;
    return p1;
  }
  __device__ int64_t begin() const { return blockIdx.z * kHiddenColumns; }
  __device__ int64_t end() const { return min(begin() + kHiddenColumns, p1.columns); }
  __device__ bool finish(int64_t m, int j, float c0, float c1) const {
    put_sums(parts + blockIdx.z * a.rows * p1.rows, a.rows, p1.rows, m, j, c0, c1);
    return false;
  }
};

__global__ void __launch_bounds__(kThreads)
    add_hidden(const float* parts, int64_t count, int64_t size, Matrix p1, float* hidden) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int64_t part = 0; part < count; ++part) sum += parts[part * size + i];
  hidden[i] = relu(sum * row_scale(p1, i % p1.rows));
}

// keep [tokens, pitch] = p2 hidden > tau
struct Predict : PlainOp {
  using T = float;
  using W = float;
  static constexpr bool kRowsAreColumns = true;
  Matrix a, p2;
  const float* tau = nullptr;
  uint8_t* keep = nullptr;
  int64_t pitch = 0;

  __device__ const Matrix& b(int j, int64_t& row) const {
    row = blockIdx.y * int64_t{kTile} + j;
    return p2;
  }
  __device__ int64_t begin() const { return 0; }
  __device__ int64_t end() const { return p2.columns; }
  __device__ bool finish(int64_t m, int j, float c0, float c1) const {
    for (int half = 0; half < 2; ++half) {
      const int64_t i = blockIdx.y * int64_t{kTile} + j + 8 * half;
      if (m < a.rows && i < pitch) keep[m * pitch + i] = i < p2.rows && (half ? c1 : c0) * row_scale(p2, i) > tau[i];
    }
    return false;
  }
};

// z [tokens, pitch], 0 where a neuron is not kept, and used [tokens / 128, n / 64]
template <class T_, class W_>
struct GateUp : PlainOp {
  using T = T_;
  using W = W_;
  static constexpr bool kRowsAreColumns = true;
  Matrix a;
  Neurons p;
  Matrix w_down;  // for its row scales
  const uint8_t* keep = nullptr;
  void* z = nullptr;
  uint8_t* used = nullptr;
  int64_t pitch = 0;

  explicit GateUp(const Call& call) : p(call) {}

  __device__ bool plain() const { return !p.up.data; }
  __device__ int width() const { return plain() ? kTile : kTile / 2; }  // neurons of the tile
  __device__ int64_t first() const { return blockIdx.y * static_cast<int64_t>(width()); }
  __device__ const Matrix& b(int j, int64_t& row) const {
    row = first() + (plain() ? j : j / 16 * 8 + j % 8);
    return plain() || j % 16 < 8 ? p.first : p.up;
  }
  __device__ int64_t begin() const { return 0; }
  __device__ int64_t end() const { return p.first.columns; }
  __device__ void put(int64_t m, int64_t i, float v) const {
    if constexpr (std::is_same_v<T, float>)
      static_cast<float*>(z)[m * pitch + i] = v;
    else
      static_cast<T*>(z)[m * pitch + i] = narrow(v, T{});
  }
  __device__ bool neuron(int64_t m, int64_t i, float gate, float up) const {
    if (m >= a.rows || i >= pitch) return false;
    float value = 0.f;
    if (i < p.first.rows && (!keep || keep[m * pitch + i])) {
      const float g = p.gate(i, gate);
      if (p.kept(i, g)) value = plain() ? g : g * p.factor(i, up);
      if (!p.zeros || value != 0.f) value *= row_scale(w_down, i);
    }
    put(m, i, value);
    return value != 0.f;
  }
  __device__ bool finish(int64_t m, int j, float c0, float c1) const {
    if (!plain()) return neuron(m, first() + j / 16 * 8 + j % 8, c0, c1);
    const bool one = neuron(m, first() + j, c0, 0.f), other = neuron(m, first() + j + 8, c1, 0.f);
    return one || other;
  }
  __device__ void leave(bool any) const {
    const int64_t flags = (p.first.rows + kFlagged - 1) / kFlagged, i = first() / kFlagged + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < width() / kFlagged && i < flags) used[blockIdx.x * flags + i] = any;
  }
  // A tile that no token keeps.
  __device__ bool skip() const {
    if (!keep) return false;
    bool any = false;
    const int64_t top = blockIdx.x * int64_t{kTile};
    for (int at = threadIdx.x; at < kTile * width(); at += kThreads) {
      const int64_t m = top + at / width(), i = first() + at % width();
      any |= m < a.rows && i < pitch && keep[m * pitch + i];
    }
    if (__syncthreads_or(any)) return false;
    for (int at = threadIdx.x; at < kTile * width(); at += kThreads) {
      const int64_t m = top + at / width(), i = first() + at % width();
      if (m < a.rows && i < pitch) put(m, i, 0.f);
    }
    leave(false);
    return true;
  }
};

// Scratch memory of a pass, reused by the next: both run in order on one stream.
struct Scratch {
  float *hidden_parts, *hidden, *sums;
  uint8_t *keep, *used;
  char* z;
};

void pass(const Call& call, const Scratch& s, int type, int64_t pitch, cudaStream_t stream) {
  const int64_t tokens = call.tokens, d = call.shape.d, r = call.shape.r;
  const Matrix x = call.rows_of_x(), hidden = matrix_of(s.hidden, ort::kFloat32, tokens, r);
  const Matrix w_down = call.matrix(kWDown, kSDown);
  if (r) {
    Hide op;
    op.a = x;
    op.p1 = call.matrix(kP1, kSP1);
    op.parts = s.hidden_parts;
    const int64_t parts = blocks(d, kHiddenColumns);
    launch_product(op, tokens, blocks(r, kTile), parts, stream);
    launch(add_hidden, grid(blocks(tokens * r, kThreads)), kThreads, stream, s.hidden_parts, parts, tokens * r, op.p1,
           s.hidden);
  }
  if (call.variant.has(kP2)) {
    Predict op;
    op.a = hidden;
    op.p2 = call.matrix(kP2, kSP2);
    op.tau = call.floats(kTau);
    op.keep = s.keep;
    op.pitch = pitch;
    launch_product(op, tokens, blocks(pitch, kTile), 1, stream);
  }
  with_tile_types(call.variant.x, call.tensors[kWUp].type, [&](auto t, auto stored) {
    GateUp<decltype(t), decltype(stored)> op(call);
    op.a = x;
    op.w_down = w_down;
    op.keep = call.variant.has(kP2) ? s.keep : nullptr;
    op.z = s.z;
    op.used = s.used;
    op.pitch = pitch;
    launch_product(op, tokens, blocks(pitch, call.variant.plain() ? kTile : kTile / 2), 1, stream);
  });
  Partials partials;
  partials.sums = s.sums;
  add_row_tiles(matrix_of(s.z, type, tokens, pitch), s.used, w_down, partials, stream);
  if (call.variant.has(kRes)) add_residual(hidden, call.matrix(kRes, kRes), partials, stream);
  Ending end;
  end.bias = call.floats(kBDown);
  end.y = call.y;
  end.type = call.variant.x;
  close(partials, tokens, d, end, stream);
}

}  // namespace

size_t prefill(const Call& call, char* base, cudaStream_t stream) {
  const int64_t tokens = std::min(call.tokens, kPass), d = call.shape.d, n = call.shape.n, r = call.shape.r;
  const int64_t pitch = blocks(n, 32) * 32;  // rows of z and keep: whole steps
  const int type = tile_type(call.variant.x, call.tensors[kWUp].type);
  Cut cut(base);
  Scratch s{};
  s.hidden_parts = cut.take<float>(blocks(d, kHiddenColumns) * tokens * r);
  s.hidden = cut.take<float>(tokens * r);
  s.sums = cut.take<float>((tile_row_parts(n) + (call.variant.has(kRes) ? 1 : 0)) * tokens * d);
  s.keep = cut.take<uint8_t>(call.variant.has(kP2) ? tokens * pitch : 0);
  s.used = cut.take<uint8_t>(blocks(tokens, kTile) * blocks(n, kFlagged));
  s.z = cut.take<char>(bytes_of_columns(type, tokens * pitch));
  if (!base) return cut.used();

  Call part = call;
  for (int64_t first = 0; first < call.tokens; first += tokens) {
    part.tokens = std::min(tokens, call.tokens - first);
    part.x = static_cast<const char*>(call.x) + bytes_of_columns(call.variant.x, first * d);
    part.y = static_cast<char*>(call.y) + bytes_of_columns(call.variant.x, first * d);
    pass(part, s, type, pitch, stream);
  }
  return cut.used();
}

}  // namespace sparsegate::gated_mlp
