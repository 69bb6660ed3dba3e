// Sums over ranks, and the sums of squares of which a norm is made.
//
// sum_ranks: reads each part once; reads and writes the sum once. The parts of all ranks but this one's are one behind the
// other in the memory that they came to; each element is added by one thread, in the order of the ranks.
// block_squares: reads each element once. A block sums BLOCK elements, products and sums in f64. What it gives depends on
// these elements alone, so that norms are the same however ranks divide what they are of.
#include "arl.cuh"

namespace ranks {

constexpr int SIZE = Pack<float>::SIZE;

template <bool ALIGNED>
__device__ __forceinline__ void add_part(Pack<float> &sum, const float *part, int valid) {
    Pack<float> pack = load_pack<ALIGNED>(part, valid);
#pragma unroll
    for (int j = 0; j < SIZE; j++) sum.at[j] += pack.at[j];
}

// Loops over ranks are not unrolled: the memory is waited for, and addresses of several parts at once spill registers.
template <bool ALIGNED>
__device__ __forceinline__ void sum(float *out, const float *before, const float *own, const float *behind, int first,
                                    int last, long long len, int valid) {
    Pack<float> sum = load_pack<ALIGNED>(out, valid);
#pragma unroll 1
    for (int r = 0; r < first; r++, before += len) add_part<ALIGNED>(sum, before, valid);
    add_part<ALIGNED>(sum, own, valid);
#pragma unroll 1
    for (int r = 0; r < last; r++, behind += len) add_part<ALIGNED>(sum, behind, valid);
    store_pack<ALIGNED>(out, sum, valid);
}

template <bool ALIGNED> __device__ __forceinline__ double thread_squares(const float *a, long long start, long long end) {
    double sum = 0;
    for (long long i = start + threadIdx.x * SIZE; i < end; i += THREADS * SIZE) {
        const int valid = int(min(end - i, (long long)SIZE));
        Pack<float> pack = load_pack<ALIGNED>(a + i, valid);
#pragma unroll
        for (int j = 0; j < SIZE; j++)
            if (j < valid) sum += double(pack.at[j]) * double(pack.at[j]);
    }
    return sum;
}

} // namespace ranks

// `first` ranks are before this one, `last` behind it.
ARL_KERNEL(sum_ranks, ranks::THREADS, float *out, const float *before, const float *own, const float *behind, int first,
           int last, long long len) {
    const long long start = (blockIdx.x * (long long)ranks::THREADS + threadIdx.x) * ranks::SIZE;
    const bool aligned = vectorizable(out, len) && vectorizable(before, len) && vectorizable(own, len) && vectorizable(behind, len);
    if (start >= len) return;
    out += start, before += start, own += start, behind += start;
    if (aligned) ranks::sum<true>(out, before, own, behind, first, last, len, ranks::SIZE);
    else ranks::sum<false>(out, before, own, behind, first, last, len, int(min(len - start, (long long)ranks::SIZE)));
}

ARL_KERNEL(block_squares, ranks::THREADS, const float *a, double *sums, long long len) {
    __shared__ double warps[ranks::THREADS / 32];
    const long long start = blockIdx.x * (long long)ranks::BLOCK;
    const long long end = min(start + ranks::BLOCK, len);
    double sum = vectorizable(a, end - start) ? ranks::thread_squares<true>(a, start, end) : ranks::thread_squares<false>(a, start, end);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(FULL, sum, distance);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    double total = 0;
    for (int i = 0; i < ranks::THREADS / 32; i++) total += warps[i];
    sums[blockIdx.x] = total;
}
