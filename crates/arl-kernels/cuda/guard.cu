// Whether a step may change anything, decided where its numbers are: the host reads them later. Read: one number a
// micro-batch, two an expert; a block is enough.
#include "arl.cuh"

namespace guard {

template <typename T> __device__ bool finite(T value) { return fabs((double)value) <= 1.7976931348623157e308; }

} // namespace guard

// `norm_squared` becomes NaN where the first of the `stride` elements of one of `count` rows, or a balance, is not finite.
// Several threads may write it: the same bits.
ARL_KERNEL(guard_norm, guard::THREADS, const double *losses, int stride, int count, const float *balances, int len,
           double *norm_squared) {
    bool good = true;
    for (int i = threadIdx.x; i < count; i += guard::THREADS) good &= guard::finite(losses[(long long)i * stride]);
    for (int i = threadIdx.x; i < len; i += guard::THREADS) good &= guard::finite(balances[i]);
    if (!good) *norm_squared = nan("");
}
