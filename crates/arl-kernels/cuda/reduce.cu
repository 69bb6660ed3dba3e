// The second stage of sums over many rows: what blocks of another kernel have summed, each its own part of the rows, is
// added up in a fixed order. Read: the parts, a few hundred rows; read and written: one row.
#include "arl.cuh"

namespace reduce {

constexpr int WARPS = THREADS / 32;

// `out[c] += sum over p of parts[p, c]`. A block has 32 columns: its warps share the parts, then each warp adds up what
// the 32 of them have of one column.
__device__ __forceinline__ void add_parts(const float *parts, float *out, int count, int columns) {
    // One more than 32, so that a column's sums are in 32 banks.
    __shared__ float sums[WARPS][33];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < columns) {
#pragma unroll 4
        for (int p = warp; p < count; p += WARPS) sum += parts[(long long)p * columns + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    const int own = blockIdx.x * 32 + warp;
    sum = warp_sum(sums[lane][warp]);
    if (lane == 0 && own < columns) out[own] += sum;
}

} // namespace reduce

ARL_KERNEL(add_parts, reduce::THREADS, const float *parts, float *out, int count, int columns) {
    reduce::add_parts(parts, out, count, columns);
}
