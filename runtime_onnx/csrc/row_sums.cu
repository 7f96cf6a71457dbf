// Sums of kept rows for few tokens, and the end of both paths.
//
// down: a block per (token, 2048 columns, 128 rows). Its threads look at one row each and gather the kept ones in
// rising order in shared memory (a vote per warp, no atomics); then warp w takes 256 columns, a lane eight of them,
// eight kept rows in flight (16 bytes a lane and row in 16 bits: 32 kB a block), each a contiguous 4 kB piece of a row
// to the block. Sums stay in registers and are written once: 4 bytes a column for 128 rows, of which at a fifth kept 26
// are read, so 8 % of the traffic in 16 bits, and that in the second-level cache.
// close: a block per (token, 32 columns): 8 warps add a rising eighth of the parts (and of the residual's rows) each,
// coalesced over the columns, and the eighths meet in shared memory.
// Both are bound by memory; expected share of the copy bandwidth in down, not measured: 80 % from 2 blocks a
// multiprocessor on.
#include "row_sums.cuh"

namespace sparsegate {
namespace {

constexpr int kChunk = 128;                 // rows to a part
constexpr int64_t kColumns = kThreads * 8;  // of a block
constexpr int kFlight = 8;                  // rows in flight

template <class W>
__global__ void __launch_bounds__(kThreads) down(KeptRows rows, Matrix w, float* partial) {
  __shared__ int64_t row[kChunk];
  __shared__ float scale[kChunk];
  const int64_t t = blockIdx.x, chunk = blockIdx.z, i = chunk * kChunk + threadIdx.x, at = t * w.rows + i;
  const bool mine = threadIdx.x < kChunk && i < w.rows;
  const float v = mine ? load(rows.v.data, rows.v.type, at) : 0.f;
  const bool kept = mine && (rows.keep ? rows.keep[at] != 0 : fabsf(v) > rows.tau[i]);
  int total;
  const int place = place_of(kept, total);
  if (kept) {
    row[place] = i;
    scale[place] = v * row_scale(w, i);
  }
  __syncthreads();
  const int64_t c = blockIdx.y * kColumns + threadIdx.x * 8;
  if (c >= w.columns) return;
  float sum[8] = {};
  for (int k = 0; k < total; k += kFlight) {
    Eight<W> read_ahead[kFlight];
    read_rows<W, kFlight>(w, row + k, total - k, c, read_ahead);
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      if (k + j >= total) continue;
      float value[8];
      widen(read_ahead[j], value);
      const float factor = scale[k + j] * group_scale<W>(w, row[k + j], c);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] = fmaf(factor, value[e], sum[e]);
    }
  }
  float* out = partial + (chunk * gridDim.x + t) * w.columns + c;
  if (w.whole) {
    *reinterpret_cast<float4*>(out) = make_float4(sum[0], sum[1], sum[2], sum[3]);
    *reinterpret_cast<float4*>(out + 4) = make_float4(sum[4], sum[5], sum[6], sum[7]);
  } else {
    for (int e = 0; e < 8; ++e)
      if (c + e < w.columns) out[e] = sum[e];
  }
}

__global__ void __launch_bounds__(kThreads) finish(Partials partials, int64_t tokens, int64_t columns, Ending end) {
  __shared__ float sums[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t t = blockIdx.x, c = blockIdx.y * int64_t{32} + lane, r = end.residual.rows;
  const int64_t parts = (partials.parts + kWarps - 1) / kWarps, ranks = (r + kWarps - 1) / kWarps;
  float sum = 0.f;
  if (c < columns) {
#pragma unroll 8
    for (int64_t k = warp * parts; k < min((warp + 1) * parts, partials.parts); ++k)
      sum += partials.sums[(k * tokens + t) * columns + c];
#pragma unroll 8
    for (int64_t k = warp * ranks; k < min((warp + 1) * ranks, r); ++k)
      sum = fmaf(end.hidden[t * r + k], load(end.residual.data, end.residual.type, k * columns + c), sum);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= columns) return;
  float y = end.bias ? end.bias[c] : 0.f;
  for (int w = 0; w < kWarps; ++w) y += sums[w][lane];
  save(end.y, end.type, t * columns + c, y);
}

}  // namespace

int64_t few_row_parts(int64_t rows) { return blocks(rows, kChunk); }

void add_few_rows(const KeptRows& rows, const Matrix& w, Partials& partials, cudaStream_t stream) {
  partials.parts = few_row_parts(w.rows);
  with_type(w.type, [&](auto type) {
    launch(down<decltype(type)>, grid(rows.v.rows, blocks(w.columns, kColumns), partials.parts), kThreads, stream, rows,
           w, partials.sums);
  });
}

void close(const Partials& partials, int64_t tokens, int64_t columns, const Ending& end, cudaStream_t stream) {
  launch(finish, grid(tokens, blocks(columns, 32)), kThreads, stream, partials, tokens, columns, end);
}

}  // namespace sparsegate
