// Products of tiles, for many tokens: C [128 tokens, 128 columns] += A [128, k] B [k, 128] per block, for all products
// of prefill.
//
// product: tensor cores, 16-bit elements (mma.sync m16n8k16, sums in float32). 8 warps, 2 over the tokens and 4 over
// the columns: a warp holds 64 x 32 of C, 64 sums a lane. Steps of 32 along k: while a step is multiplied out of shared
// memory, every thread holds its share of the next one in registers (2 x 16 bytes of A, as many stored eights of B),
// widens it to 16 bits and stores it into the other half of shared memory: one barrier a step, one path for weights of
// every format. Rows of shared memory are padded by 16 bytes, so that the eight rows of a matrix load lie in different
// banks. product_float: the same tile in float32 on the ordinary cores (8 x 8 sums a thread, steps of 16): for float32,
// for mixed types, and for the predictor, whose scores must not be rounded to 16 bits before they meet tau.
//
// Bytes of a block and step: A 8 kB (from the second-level cache: the tokens' tiles are neighbours in the grid) and B
// 8, 4 or 2 kB in 16, 8 or 4 bits. Roofline: one tile of tokens costs 128 x 2 operations a weight, more than memory
// gives in 16 bits above about 300 tokens a pass on an H100 (dense 990 TFLOP/s over 3.3 TB/s); below, the products are
// bound by the reading of B. mma.sync reaches at best some 60 % of what an H100's wgmma does; expected here, not
// measured, is half of that, since registers and not the copy engine feed shared memory.
//
// An operation Op is passed by value:
//   T, W            elements of A and B (float: product_float, B of any type)
//   kRowsAreColumns B's stored rows are columns of C, k runs along them
//   a               Matrix of A [tokens, k]
//   b(j, row)       the matrix and `row` of B that column j of the tile is (kRowsAreColumns), or b() whose rows are k
//                   and whose columns those of C
//   begin, end      the range of k
//   next(k)         the first step at or after k that is not known to be zero
//   skip()          all threads: true if the tile needs no product; has then written what is needed
//   finish(m, j, c0, c1)
//                   takes C of token m at the tile's columns j and j + 8, where j % 16 < 8
//   leave(any)      ends the block, with the or of what finish returned

#include "matrix.cuh"

namespace sparsegate {

constexpr int kTile = 128;
constexpr int kStep = 32, kFloatStep = 16;
constexpr int kPad = 8;  // 16 bytes

__device__ inline __half narrow(float v, __half) { return __float2half_rn(v); }
__device__ inline __nv_bfloat16 narrow(float v, __nv_bfloat16) { return __float2bfloat16_rn(v); }

// Eight stored numbers as eight of T, without scales: integers are exact.
template <class T, class W>
__device__ inline uint4 pack(const Eight<W>& e) {
  if constexpr (std::is_same_v<T, W>) {
    return e.bits;
  } else {
    float v[8];
    widen(e, v);
    T out[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) out[k] = narrow(v[k], T{});
    uint4 bits;
    memcpy(&bits, out, sizeof bits);
    return bits;
  }
}

// Two numbers of T times their scales, as the sum of two pairs of T: the rounding error of the first is the second.
template <class T>
__device__ inline void scale_pair(uint32_t& pair, uint32_t& rest, const float* scale, T type) {
  float v[2], rounded[2];
  widen_words(pair, v, type);
  T out[2] = {narrow(v[0] * scale[0], type), narrow(v[1] * scale[1], type)};
  memcpy(&pair, out, sizeof pair);
  widen_words(pair, rounded, type);
  out[0] = narrow(v[0] * scale[0] - rounded[0], type);
  out[1] = narrow(v[1] * scale[1] - rounded[1], type);
  memcpy(&rest, out, sizeof rest);
}

// A thread's share of a step, on its way from memory to shared memory.
template <class Op>
struct Share {
  using T = typename Op::T;
  using W = typename Op::W;
  static constexpr bool kInt4 = std::is_same_v<W, Int4>;
  Eight<T> a[2];
  Eight<W> b[2];
  float scale[2] = {1.f, 1.f};  // of B's eights

  __device__ void fetch(const Op& op, int64_t k) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = threadIdx.x + i * kThreads, along = at % 4 * 8;
      a[i] = read_bounded<T>(op.a, blockIdx.x * int64_t{kTile} + at / 4, k + along);
      if constexpr (Op::kRowsAreColumns) {
        int64_t row;
        const Matrix& m = op.b(at / 4, row);
        b[i] = read_bounded<W>(m, row, k + along);
        if (kInt4) scale[i] = row < m.rows && k < m.columns ? group_scale<W>(m, row, k) : 0.f;
      } else {
        const Matrix& m = op.b();
        const int64_t row = k + at / 16, column = blockIdx.y * int64_t{kTile} + at % 16 * 8;
        b[i] = read_bounded<W>(m, row, column);
        if (kInt4) scale[i] = row < m.rows && column < m.columns ? group_scale<W>(m, row, column) : 0.f;
      }
    }
  }
};

// Shared memory of one step. int4 numbers stand there without their scales, which are not rounded to 16 bits either.
// Where rows are columns of C, a step is one group, and the scales of the 128 columns are multiplied into the sums of
// the step. Where rows are k, a warp's 32 columns are one group: a pair of numbers is scaled in registers and
// multiplied as the sum of two pairs, at twice the operations.
template <class Op>
struct Tiles {
  using T = typename Op::T;
  static constexpr bool kInt4 = Share<Op>::kInt4, kGroups = kInt4 && Op::kRowsAreColumns;
  static_assert(kTile == 4 * kStep, "one array holds the scales of 128 columns, or of 4 groups of columns in 32 rows");
  static constexpr int kWidth = (Op::kRowsAreColumns ? kStep : kTile) + kPad,
                       kHeight = Op::kRowsAreColumns ? kTile : kStep;
  alignas(16) T a[kTile][kStep + kPad];
  alignas(16) T b[kHeight][kWidth];
  float scale[kInt4 ? kTile : 1];

  __device__ void store(const Share<Op>& share) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = threadIdx.x + i * kThreads;
      *reinterpret_cast<uint4*>(&a[at / 4][at % 4 * 8]) = share.a[i].bits;
      T* to = Op::kRowsAreColumns ? &b[at / 4][at % 4 * 8] : &b[at / 16][at % 16 * 8];
      *reinterpret_cast<uint4*>(to) = pack<T>(share.b[i]);
      if (kInt4 && at % 4 == 0) scale[Op::kRowsAreColumns ? at / 4 : at % 16 / 4 * kStep + at / 16] = share.scale[i];
    }
  }
};

// sum += the products of one step for this warp's 64 x 32 of C.
template <class Op>
__device__ inline void step(const Tiles<Op>& tiles, float (&sum)[4][4][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, top = warp / 4 * 64, left = warp % 4 * 32;
#pragma unroll
  for (int k = 0; k < kStep; k += 16) {
    uint32_t a[4][4], b[2][4], rest[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_matrices(&tiles.a[top + i * 16 + lane % 16][k + lane / 16 * 8], a[i]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = left + j * 16 + lane / 16 * 8, along = k + lane / 8 % 2 * 8;
      if constexpr (Op::kRowsAreColumns) {
        load_matrices(&tiles.b[column + lane % 8][along], b[j]);
      } else {
        load_transposed(&tiles.b[along + lane % 8][column], b[j]);
        if constexpr (Tiles<Op>::kInt4) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            scale_pair(b[j][e], rest[j][e], &tiles.scale[warp % 4 * kStep + k + e % 2 * 8 + lane % 4 * 2],
                       typename Op::T{});
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        multiply(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], typename Op::T{});
    if constexpr (Tiles<Op>::kInt4 && !Op::kRowsAreColumns) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply(sum[i][j], a[i], rest[j / 2][j % 2 * 2], rest[j / 2][j % 2 * 2 + 1], typename Op::T{});
    }
  }
}

template <class Op>
__global__ void __launch_bounds__(kThreads, Tiles<Op>::kInt4 ? 1 : 2) product(const __grid_constant__ Op op) {
  __shared__ Tiles<Op> tiles[2];
  if (op.skip()) return;
  float sum[4][4][4] = {};
  Share<Op> share;
  int buffer = 0;
  int64_t k = op.next(op.begin());
  if (k < op.end()) {
    share.fetch(op, k);
    tiles[0].store(share);
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, top = warp / 4 * 64, left = warp % 4 * 32;
  while (k < op.end()) {
    const int64_t next = op.next(k + kStep);
    if (next < op.end()) share.fetch(op, next);
    if constexpr (Tiles<Op>::kGroups) {
      float part[4][4][4] = {};
      step(tiles[buffer], part);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* scale = &tiles[buffer].scale[left + j * 8 + lane % 4 * 2];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][j][e] = fmaf(scale[e % 2], part[i][j][e], sum[i][j][e]);
      }
    } else {
      step(tiles[buffer], sum);
    }
    buffer ^= 1;
    if (next < op.end()) tiles[buffer].store(share);
    __syncthreads();
    k = next;
  }
  // By way of shared memory, one half of the sums after the other, so that finish is compiled in a loop and not 32
  // times.
  static_assert(sizeof tiles >= 32 * kThreads * sizeof(float), "half of the sums must fit");
  float* mine = reinterpret_cast<float*>(tiles) + threadIdx.x;
  bool any = false;
#pragma unroll
  for (int half = 0; half < 4; half += 2) {
#pragma unroll
    for (int v = 0; v < 32; ++v) mine[v * kThreads] = sum[half + v / 16][v / 4 % 4][v % 4];
#pragma unroll 1
    for (int v = 0; v < 32; v += v % 8 == 3 ? 5 : 1) {  // v / 4 even: with the columns eight on it makes a pair
      const int64_t m = blockIdx.x * int64_t{kTile} + top + (half + v / 16) * 16 + lane / 4 + v % 4 / 2 * 8;
      any |= op.finish(m, left + v / 4 % 4 * 8 + lane % 4 * 2 + v % 2, mine[v * kThreads], mine[(v + 4) * kThreads]);
    }
  }
  op.leave(__syncthreads_or(any));
}

// A thread holds rows y, y + 16, ... and the columns x, x + 8 of every other sixteen of the tile, so that columns j and
// j + 8 meet in one thread.
template <class Op>
__global__ void __launch_bounds__(kThreads) product_float(const __grid_constant__ Op op) {
  __shared__ float tiles[2][2][kFloatStep][kTile + 4];
  auto &a = tiles[0], &b = tiles[1];
  if (op.skip()) return;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16 / 8 * 16 + threadIdx.x % 8;
  // this thread's eight of A, and of B where its rows are columns
  const int line = threadIdx.x / 2, along = threadIdx.x % 2 * 8;
  const int across = threadIdx.x / 16, column = threadIdx.x % 16 * 8;  // of B where its rows are k
  float sum[8][8] = {}, next_a[8], next_b[8];
  const auto fetch = [&](int64_t k) {
    eight(op.a, blockIdx.x * int64_t{kTile} + line, k + along, next_a);
    if constexpr (Op::kRowsAreColumns) {
      int64_t row;
      const Matrix& m = op.b(line, row);
      eight(m, row, k + along, next_b);
    } else {
      eight(op.b(), k + across, blockIdx.y * int64_t{kTile} + column, next_b);
    }
  };
  const auto store = [&](int buffer) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      a[buffer][along + e][line] = next_a[e];
      if constexpr (Op::kRowsAreColumns)
        b[buffer][along + e][line] = next_b[e];
      else
        b[buffer][across][column + e] = next_b[e];
    }
  };
  int buffer = 0;
  int64_t k = op.next(op.begin());
  if (k < op.end()) {
    fetch(k);
    store(0);
  }
  __syncthreads();
  while (k < op.end()) {
    const int64_t next = op.next(k + kFloatStep);
    if (next < op.end()) fetch(next);
    for (int s = 0; s < kFloatStep; ++s) {
      float u[8], v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        u[i] = a[buffer][s][y + 16 * i];
        v[i] = b[buffer][s][i / 2 * 32 + x + i % 2 * 8];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(u[i], v[j], sum[i][j]);
    }
    buffer ^= 1;
    if (next < op.end()) store(buffer);
    __syncthreads();
    k = next;
  }
  static_assert(sizeof tiles >= 32 * kThreads * sizeof(float), "half of the sums must fit");
  float* mine = &tiles[0][0][0][0] + threadIdx.x;
  bool any = false;
#pragma unroll
  for (int half = 0; half < 8; half += 4) {
#pragma unroll
    for (int v = 0; v < 32; ++v) mine[v * kThreads] = sum[half + v / 8][v % 8];
#pragma unroll 1
    for (int v = 0; v < 32; v += 2) {
      const int64_t m = blockIdx.x * int64_t{kTile} + y + 16 * (half + v / 8);
      any |= op.finish(m, v % 8 / 2 * 32 + x, mine[v * kThreads], mine[(v + 1) * kThreads]);
    }
  }
  op.leave(__syncthreads_or(any));
}

// What `finish` does where C is written as it is: to out [rows, columns] where it lies inside.
__device__ inline void put_sums(float* out, int64_t rows, int64_t columns, int64_t m, int j, float c0, float c1) {
  const int64_t column = blockIdx.y * int64_t{kTile} + j;
  if (m < rows && column < columns) out[m * columns + column] = c0;
  if (m < rows && column + 8 < columns) out[m * columns + column + 8] = c1;
}

// Grid (tiles of tokens, tiles of columns, parts of k).
template <class Op>
void launch_product(const Op& op, int64_t tokens, int64_t tiles, int64_t parts, cudaStream_t stream) {
  const dim3 size = grid(blocks(tokens, kTile), tiles, parts);
  if constexpr (std::is_same_v<typename Op::T, float>) {
    launch(product_float<Op>, size, kThreads, stream, op);
  } else {
    launch(product<Op>, size, kThreads, stream, op);
  }
}

// What an operation without tricks does.
struct PlainOp {
  __device__ bool skip() const { return false; }
  __device__ int64_t next(int64_t k) const { return k; }
  __device__ void leave(bool) const {}
};

// The type that the tensor cores multiply x with such weights in; kFloat32 where they do not.
inline int tile_type(int x, int weights) {
  const bool fits = x != ort::kFloat32 && (weights == x || weights == ort::kInt8 || weights == ort::kUint8);
  return fits ? x : static_cast<int>(ort::kFloat32);
}

// Calls body with values of the types T and W of an operation.
template <class Body>
void with_tile_types(int x, int weights, Body body) {
  const auto with = [&](auto t) {
    if (weights == ort::kInt8) return body(t, int8_t{});
    if (weights == ort::kUint8) return body(t, Int4{});
    body(t, t);
  };
  const int type = tile_type(x, weights);
  if (type == ort::kFloat16) return with(__half{});
  if (type == ort::kBfloat16) return with(__nv_bfloat16{});
  body(float{}, float{});
}

}  // namespace sparsegate
