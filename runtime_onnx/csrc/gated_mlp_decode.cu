// GatedMLP on CUDA for one to four tokens: only the rows that a token keeps are read, once per token.
//
// Four launches, their grids known from the shapes alone; nothing is allocated, copied to the host or waited for,
// so a CUDA graph can capture them.
// d, n, r: width, neurons, rank; k: neurons kept; b: bytes of a stored weight, p: of a predictor's.
//   open     a block per (row of P1, token): hidden = relu(P1 x), and x in float32
//            reads  r d p
//   neurons  a block per (32 neurons, token): see below
//            reads  n (r p + 4) + 2 k d b, writes 5 n
//   down     a block per (2048 columns, 128 neurons, token), in row_sums.cu: partial sums
//            reads  k d b + 5 n, writes 4 d n / 128
//   close    a block per (32 columns, token), in row_sums.cu: adds them, biases and residual
//            reads  4 d n / 128 + r d p
// At d = 4096, n = 14336, r = 128, float16, k = n / 5: 1.0, 50.7, 25.4 and 1.8 MB, of which the partial sums stay in
// the second-level cache: 75 MB or 25 us at 3 TB/s, against 352 MB of the dense MLP. With score gate the gate is read
// in full: 1/3 + 2/3 k/n of dense.
//
// neurons: warps and neurons. Warp w of 8 scores neurons 4 w .. 4 w + 3 of the block's 32, four rows of P2 in flight,
// and the scores meet in shared memory; every warp compares them with tau and holds the selection as one 32-bit vote,
// so there is no list, no compaction and no second pass over memory. Then all 8 warps work on the same kept rows, each
// on its own 256 columns of every 2048, eight rows in flight (16 bytes a lane and row in 16 bits: 32 kB a block); no
// warp waits for another that got more kept neurons. A lane's eight partial sums are folded into one by 3 shuffles of
// halves and 2 of sums, the warps' sums meet in shared memory and are added in rising order.
//
// Roofline: memory. A weight costs a conversion and a multiply-add, in 16 bits about a seventh of what an H100's
// ordinary cores do in the time of reading it; int4, with some four operations to half a byte, comes near their limit.
// Expected share of the copy bandwidth (not measured), 16 bits: 80 % in neurons and down when they fill the machine (at
// least 2 blocks a multiprocessor: n >= 10000), less in the two small launches, whose time is latency (2 us each): 75 %
// in all at k = n / 5 on an H100, less below. Not used: programmatic launches, which would hide some of the gaps
// between the four.
//
// Sums are float32, added in an order that depends on shapes alone: results repeat bit for bit and do not depend on the
// other tokens of the call. They differ from prefill's in rounding. Weights are widened in registers, activations are
// never rounded to integers.
#include "gated_mlp.cuh"
#include "memory.h"
#include "row_sums.cuh"

namespace sparsegate::gated_mlp {
namespace {

constexpr int kOpenThreads = 512;  // d = 4096 in one step
constexpr int kGroup = 32;         // neurons of a block: one vote
constexpr int kSlots = 8;          // rows in flight per warp
constexpr int kStride = kWarps * 256;

// wide [tokens, d] = x; hidden [tokens, r] = relu(P1 x). Grid (tokens, r, or what d needs without a predictor)
__global__ void __launch_bounds__(kOpenThreads) open(Matrix x, Matrix p1, float* wide, float* hidden) {
  const int64_t t = blockIdx.x, k = blockIdx.y, d = x.columns, step = blockDim.x;
  for (int64_t j = k * step + threadIdx.x; j < d; j += gridDim.y * step)
    wide[t * d + j] = load(x.data, x.type, t * d + j);
  float sum = 0.f;
  for (int64_t c = threadIdx.x * 8; k < p1.rows && c < d; c += step * 8) {
    float row[8], v[8];
    eight(p1, k, c, row);
    eight(x, t, c, v);
    for (int j = 0; j < 8; ++j) sum = fmaf(row[j], v[j], sum);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0 && k < p1.rows) hidden[t * p1.rows + k] = relu(sum * row_scale(p1, k));
}

// Adds each slot over the lanes of the warp: lane l gets the sum of slot l / 4.
__device__ inline float fold(const float (&v)[kSlots]) {
  const int lane = threadIdx.x % 32;
  float half[4], quarter[2];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float other = __shfl_xor_sync(kAllLanes, lane & 16 ? v[k] : v[k + 4], 16);
    half[k] = (lane & 16 ? v[k + 4] : v[k]) + other;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float other = __shfl_xor_sync(kAllLanes, lane & 8 ? half[k] : half[k + 2], 8);
    quarter[k] = (lane & 8 ? half[k + 2] : half[k]) + other;
  }
  const float other = __shfl_xor_sync(kAllLanes, lane & 4 ? quarter[0] : quarter[1], 4);
  float sum = (lane & 4 ? quarter[1] : quarter[0]) + other;
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  return sum + __shfl_xor_sync(kAllLanes, sum, 1);
}

// Products with v of the first `count` of these rows over the columns begin, begin + step, ... of every lane: lane l
// gets that of slot l / 4. No row scales.
template <class W, int kRows>
__device__ float dots(const Matrix& m, const int (&rows)[kRows], int count, int begin, int step, const float* v) {
  float sum[kSlots] = {};
  for (int c = begin; c < m.columns; c += step) {
    Eight<W> row[kRows];
    read_rows<W, kRows>(m, rows, count, c, row);
    float x[8];
    eight_floats(v, c, m.columns, m.whole, x);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (k >= count) continue;
      float w[8], part = 0.f;
      widen(row[k], w);
#pragma unroll
      for (int j = 0; j < 8; ++j) part = fmaf(w[j], x[j], part);
      sum[k] = fmaf(group_scale<W>(m, rows[k], c), part, sum[k]);
    }
  }
  return fold(sum);
}

// scores[j] = p2[first + j] . hidden of the block's neurons
template <class P>
__device__ void predict(const Matrix& p2, int64_t first, const float* hidden, float* scores) {
  constexpr int kRows = kGroup / kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, from = warp * kRows;
  const int64_t left = p2.rows - first - from;
  int rows[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) rows[k] = static_cast<int>(first) + from + k;
  const int count = static_cast<int>(left < 0 ? 0 : left < kRows ? left : kRows);
  const float score = dots<P>(p2, rows, count, lane * 8, 256, hidden);
  if (lane % 4 == 0 && lane / 4 < kRows)
    scores[from + lane / 4] = lane / 4 < left ? score * row_scale(p2, first + from + lane / 4) : 0.f;
}

// sums[k][w]: the part of warp w in the product of x with the k-th neuron of the vote
template <class W>
__device__ void products(const Matrix& m, int64_t first, unsigned vote, const float* x, float (*sums)[kWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int at = 0; vote; at += kSlots) {
    int rows[kSlots];
    int count = 0;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      rows[k] = static_cast<int>(first) + (vote ? __ffs(static_cast<int>(vote)) - 1 : 0);
      count += vote != 0;
      vote &= vote - 1;
    }
    const float sum = dots<W>(m, rows, count, static_cast<int>(threadIdx.x) * 8, kStride, x);
    if (lane % 4 == 0 && lane / 4 < count) sums[at + lane / 4][warp] = sum;
  }
}

__device__ inline float total(const float* sums) {
  float sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += sums[w];
  return sum;
}

// z and keep [tokens, n]; grid (tokens, n / 32): the tokens of one group run together and share its rows in the
// second-level cache
template <class W>
__global__ void __launch_bounds__(kThreads, sizeof(W) == 4 ? 2 : 3)
    neurons(const __grid_constant__ Neurons p, const __grid_constant__ Matrix p2, const float* x, const float* hidden,
            float* z, uint8_t* keep) {
  __shared__ float scores[kGroup], gates[kGroup][kWarps], ups[kGroup][kWarps];
  const int lane = threadIdx.x % 32;
  const unsigned below = (1u << lane) - 1u;
  const int64_t t = blockIdx.x, first = blockIdx.y * static_cast<int64_t>(kGroup), i = first + lane, n = p.first.rows;
  x += t * p.first.columns;
  unsigned vote = __ballot_sync(kAllLanes, i < n);
  if (p.score == Score::kPredictor) {
    hidden += t * p2.columns;
    switch (p2.type) {
      case ort::kFloat16:
        predict<__half>(p2, first, hidden, scores);
        break;
      case ort::kBfloat16:
        predict<__nv_bfloat16>(p2, first, hidden, scores);
        break;
      case ort::kInt8:
        predict<int8_t>(p2, first, hidden, scores);
        break;
      default:
        predict<float>(p2, first, hidden, scores);
    }
    __syncthreads();
    vote = __ballot_sync(kAllLanes, i < n && scores[lane] > p.tau[i]);
  }
  products<W>(p.first, first, vote, x, gates);
  __syncthreads();
  const bool asked = vote >> lane & 1u;
  float value = asked ? p.gate(i, total(gates[__popc(vote & below)])) : 0.f;
  bool kept = asked && p.kept(i, value);
  if (p.up.data) {
    vote = __ballot_sync(kAllLanes, kept);
    products<W>(p.up, first, vote, x, ups);
    __syncthreads();
    if (kept) value *= p.factor(i, total(ups[__popc(vote & below)]));
    if (p.zeros && value == 0.f) kept = false;  // its row of w_down is not read
  }
  if (threadIdx.x < 32 && i < n) {
    z[t * n + i] = value;
    keep[t * n + i] = kept;
  }
}

}  // namespace

size_t decode(const Call& call, char* base, cudaStream_t stream) {
  const int64_t tokens = call.tokens, d = call.shape.d, n = call.shape.n, r = call.shape.r;
  Cut cut(base);
  float* wide = cut.take<float>(tokens * d);
  float* hidden = cut.take<float>(tokens * r);
  float* z = cut.take<float>(tokens * n);
  uint8_t* keep = cut.take<uint8_t>(tokens * n);
  Partials partials;
  partials.sums = cut.take<float>(few_row_parts(n) * tokens * d);
  if (!base) return cut.used();

  const Matrix x = call.rows_of_x(), p1 = call.matrix(kP1, kSP1), p2 = call.matrix(kP2, kSP2);
  const Matrix w_down = call.matrix(kWDown, kSDown);
  launch(open, grid(tokens, r ? r : blocks(d, kOpenThreads)), kOpenThreads, stream, x, p1, wide, hidden);
  const Neurons p(call);
  with_type(p.first.type, [&](auto type) {
    launch(neurons<decltype(type)>, grid(tokens, blocks(n, kGroup)), kThreads, stream, p, p2, wide, hidden, z, keep);
  });
  add_few_rows(KeptRows{matrix_of(z, ort::kFloat32, tokens, n), keep, nullptr}, w_down, partials, stream);
  Ending end;
  end.bias = call.floats(kBDown);
  end.residual = call.matrix(kRes, kRes);
  end.hidden = hidden;
  end.y = call.y;
  end.type = call.variant.x;
  close(partials, tokens, d, end, stream);
  return cut.used();
}

}  // namespace sparsegate::gated_mlp
