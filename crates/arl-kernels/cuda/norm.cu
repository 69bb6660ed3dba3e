// RMSNorm by rows, alone and with the sum before it. One block a row; the row stays in registers or is read again from
// the cache.
#include "arl.cuh"

namespace norm {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

// `sum = x + delta` where there is a `delta` (`sum` may be either), then `out = weight * sum * inverse_rms`.
// The sum is rounded to T before it is normed, as if it had been stored and read.
template <typename T>
__device__ void forward(const T *x, const T *delta, T *sum, const T *weight, float epsilon, T *out, float *inverse_rms,
                        int width) {
    __shared__ float scratch[WARPS];
    long long row = blockIdx.x;
    x += row * width;
    out += row * width;
    if (delta != nullptr) {
        delta += row * width;
        sum += row * width;
    }
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float value = load(x[i]);
        if (delta != nullptr) {
            T stored = store<T>(value + load(delta[i]));
            sum[i] = stored;
            value = load(stored);
        }
        squares += value * value;
    }
    float factor = rsqrtf(block_sum<WARPS>(squares, scratch) / width + epsilon);
    const T *normed = delta != nullptr ? sum : x;
    // Each thread reads what it wrote itself.
    for (int i = threadIdx.x; i < width; i += THREADS) out[i] = store<T>(load(weight[i]) * (load(normed[i]) * factor));
    if (threadIdx.x == 0) inverse_rms[row] = factor;
}

} // namespace norm

#define NORM(name, T)                                                                                                  \
    ARL_KERNEL(rms_norm_##name, norm::THREADS, const T *x, const T *weight, float epsilon, T *out, float *inverse_rms,  \
               int width) {                                                                                            \
        norm::forward<T>(x, nullptr, nullptr, weight, epsilon, out, inverse_rms, width);                               \
    }                                                                                                                  \
    ARL_KERNEL(add_rms_norm_##name, norm::THREADS, const T *x, const T *delta, T *sum, const T *weight, float epsilon,  \
               T *out, float *inverse_rms, int width) {                                                                \
        norm::forward<T>(x, delta, sum, weight, epsilon, out, inverse_rms, width);                                     \
    }
ARL_FOR_TYPES(NORM)
#undef NORM
