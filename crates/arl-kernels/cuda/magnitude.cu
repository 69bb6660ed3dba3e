// Magnitudes of weights with an adapter (DoRA): norms of rows, columns scaled by them, and their gradient.
//
// magnitude_norms: reads each weight once; A and B come from the cache. A block has 4 rows, so that what it reads of A serves all of
// them.
// magnitude_rescale: reads and writes each element once. A thread has 8 columns of a row.
// magnitude_gradient: reads both arrays once. A block has 32 columns of a part of the rows, which its warps share; what it has summed
// goes to `parts`, for `add_parts`.
// The order of each sum depends on the shape alone.
#include "arl.cuh"

namespace magnitude {

constexpr int WARPS = THREADS / 32;

// `out[o] = |weight[o] + factor b[o] a|`, of `width` columns.
template <typename T>
__device__ __forceinline__ void norms(const T *weight, const T *a, const T *b, float factor, float *out, int rows, int width,
                                      int rank) {
    __shared__ float scratch[WARPS];
    const long long first = blockIdx.x * (long long)ROWS;
    const int count = int(min((long long)ROWS, rows - first));
    float squares[ROWS] = {};
    for (int column = threadIdx.x; column < width; column += THREADS) {
        float low[ROWS] = {};
        for (int j = 0; j < rank; j++) {
            const float x = load(a[(long long)j * width + column]);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                if (i < count) low[i] += load(b[(first + i) * rank + j]) * x;
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (i < count) {
                const float value = load(weight[(first + i) * width + column]) + factor * low[i];
                squares[i] += value * value;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float sum = group_sum(squares[i], scratch, 0, WARPS);
        if (threadIdx.x == 0 && i < count) out[first + i] = sqrtf(sum);
        __syncthreads();
    }
}

// `x = bias + magnitude / norm (x - bias)`, as many columns as are `valid`.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void rescale_step(T *x, const float *magnitudes, const float *norms, const T *bias, int valid) {
#pragma unroll
    for (int i = 0; i < STEP; i += Pack<T>::SIZE) {
        if (i >= valid) return;
        Pack<T> pack = load_pack<ALIGNED>(x + i, valid - i);
#pragma unroll
        for (int j = 0; j < Pack<T>::SIZE; j++) {
            if (i + j < valid) {
                const float added = bias ? load(bias[i + j]) : 0.0f;
                pack.at[j] = store<T>(added + magnitudes[i + j] / norms[i + j] * (load(pack.at[j]) - added));
            }
        }
        store_pack<ALIGNED>(x + i, pack, valid - i);
    }
}

template <typename T>
__device__ __forceinline__ void rescale(T *x, long long stride, long long rows, int columns, const float *magnitudes,
                                        const float *norms, const T *bias) {
    const int groups = (columns + STEP - 1) / STEP;
    const long long thread = blockIdx.x * (long long)THREADS + threadIdx.x;
    const long long row = thread / groups;
    const int column = int(thread % groups) * STEP;
    if (row >= rows) return;
    const int valid = min(STEP, columns - column);
    const T *own = bias ? bias + column : nullptr;
    T *place = x + row * stride + column;
    if (valid == STEP && vectorizable(x, stride)) {
        rescale_step<true>(place, magnitudes + column, norms + column, own, STEP);
    } else {
        rescale_step<false>(place, magnitudes + column, norms + column, own, valid);
    }
}

// `parts[p, o] = sum over rows of part p of d_out[r, o] x[r, o] / norm[o]`.
template <typename T>
__device__ __forceinline__ void gradient(const T *d_out, long long d_stride, const T *x, long long stride, int rows,
                                         int columns, const float *norms, float *parts) {
    // One more than 32, so that a column's sums are in 32 banks.
    __shared__ float sums[WARPS][33];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const int step = gridDim.y * WARPS;
    float sum = 0;
    if (column < columns) {
#pragma unroll 4
        for (int row = blockIdx.y * WARPS + warp; row < rows; row += step)
            sum += load(d_out[row * d_stride + column]) * load(x[row * stride + column]);
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    sum = 0;
    for (int i = 0; i < WARPS; i++) sum += sums[i][lane];
    parts[(long long)blockIdx.y * columns + column] = sum / norms[column];
}

} // namespace magnitude

#define MAGNITUDE(name, T)                                                                                             \
    ARL_KERNEL(magnitude_norms_##name, magnitude::THREADS, const T *weight, const T *a, const T *b, float factor,      \
               float *out, int rows, int width, int rank) {                                                            \
        magnitude::norms(weight, a, b, factor, out, rows, width, rank);                                                \
    }                                                                                                                  \
    ARL_KERNEL(magnitude_rescale_##name, magnitude::THREADS, T *x, long long stride, long long rows, int columns,      \
               const float *magnitudes, const float *norms, const T *bias) {                                            \
        magnitude::rescale(x, stride, rows, columns, magnitudes, norms, bias);                                          \
    }                                                                                                                  \
    ARL_KERNEL(magnitude_gradient_##name, magnitude::THREADS, const T *d_out, long long d_stride, const T *x,          \
               long long stride, int rows, int columns, const float *norms, float *parts) {                            \
        magnitude::gradient(d_out, d_stride, x, stride, rows, columns, norms, parts);                                  \
    }
ARL_FOR_TYPES(MAGNITUDE)
#undef MAGNITUDE
