// The norm of each value head with a gate, behind a delta rule: forward and backward.
//
// A warp a head, of which a lane has the columns `lane`, `lane + 32`, .. in registers. Backward: reads x, the gate and the gradient,
// and writes the last two; a warp continues with other heads, and what its block sums of the weight's gradient goes to `parts`.
#include "arl.cuh"

namespace gated_norm {

constexpr int WARPS = THREADS / 32;
// Columns of the largest head that a lane has.
constexpr int COLUMNS = MOST_DIM / 32;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// `1 / sqrt(mean(x^2) + epsilon)` of the warp's head.
__device__ __forceinline__ float inverse_rms(const float (&x)[COLUMNS], int dim, float epsilon) {
    float squares = 0;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) squares += x[c] * x[c];
    return rsqrtf(warp_sum(squares) / dim + epsilon);
}

// This lane's columns of a row; zeroes behind its end.
template <typename T> __device__ __forceinline__ void load_row(const T *row, float (&values)[COLUMNS], int dim) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int i = threadIdx.x % 32 + 32 * c;
        values[c] = i < dim ? load(row[i]) : 0.0f;
    }
}

// `out = weight x / rms(x) silu(gate)`; the normed value is rounded before it meets the weight, and the product before the gate.
template <typename T>
__device__ __forceinline__ void forward(const T *x, const T *gate, long long stride, const T *weight, float epsilon, T *out,
                                        long long rows, int heads, int dim) {
    const long long row = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const long long token = row / heads;
    float xs[COLUMNS], gates[COLUMNS];
    load_row(x + row * dim, xs, dim);
    load_row(gate + token * stride + (row - token * heads) * dim, gates, dim);
    const float factor = inverse_rms(xs, dim, epsilon);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int i = threadIdx.x % 32 + 32 * c;
        if (i >= dim) continue;
        const float normed = rounded<T>(load(weight[i]) * rounded<T>(xs[c] * factor));
        out[row * dim + i] = store<T>(normed * (gates[c] * sigmoid(gates[c])));
    }
}

// With `n = x / rms`, `s = sigmoid(gate)` and `u = gate s`: the gate becomes `d weight n s (1 + gate (1 - s))`, `d` the gradient of x,
// RMSNorm's for `d weight u`, and into row `blockIdx.x` of `parts` goes the sum of `d n u` over the block's heads.
template <typename T>
__device__ __forceinline__ void backward(const T *x, T *gate, long long stride, const T *weight, float epsilon, T *d,
                                         float *parts, long long rows, int heads, int dim) {
    __shared__ float sums[WARPS][MOST_DIM];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float weights[COLUMNS], d_weight[COLUMNS] = {};
    load_row(weight, weights, dim);
    for (long long row = blockIdx.x * (long long)WARPS + warp; row < rows; row += (long long)gridDim.x * WARPS) {
        const long long token = row / heads;
        T *gate_row = gate + token * stride + (row - token * heads) * dim;
        float xs[COLUMNS], gates[COLUMNS], ds[COLUMNS];
        load_row(x + row * dim, xs, dim);
        load_row(gate_row, gates, dim);
        load_row(d + row * dim, ds, dim);
        const float factor = inverse_rms(xs, dim, epsilon);
        float product = 0;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) product += ds[c] * weights[c] * (gates[c] * sigmoid(gates[c])) * xs[c];
        const float pull = warp_sum(product) / dim * factor * factor * factor;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int i = lane + 32 * c;
            if (i >= dim) continue;
            const float s = sigmoid(gates[c]), normed = xs[c] * factor, silu = gates[c] * s;
            d_weight[c] += ds[c] * normed * silu;
            gate_row[i] = store<T>(ds[c] * weights[c] * normed * s * (1.0f + gates[c] * (1.0f - s)));
            d[row * dim + i] = store<T>(ds[c] * weights[c] * silu * factor - xs[c] * pull);
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) sums[warp][lane + 32 * c] = d_weight[c];
    __syncthreads();
    for (int i = threadIdx.x; i < dim; i += THREADS) {
        float total = 0;
        for (int w = 0; w < WARPS; w++) total += sums[w][i];
        parts[blockIdx.x * (long long)dim + i] = total;
    }
}

} // namespace gated_norm

#define GATED_NORM(name, T)                                                                                            \
    ARL_KERNEL(gated_norm_##name, gated_norm::THREADS, const T *x, const T *gate, long long stride, const T *weight,   \
               float epsilon, T *out, long long rows, int heads, int dim) {                                            \
        gated_norm::forward(x, gate, stride, weight, epsilon, out, rows, heads, dim);                                  \
    }                                                                                                                  \
    ARL_KERNEL(gated_norm_backward_##name, gated_norm::THREADS, const T *x, T *gate, long long stride,                 \
               const T *weight, float epsilon, T *d, float *parts, long long rows, int heads, int dim) {               \
        gated_norm::backward(x, gate, stride, weight, epsilon, d, parts, rows, heads, dim);                            \
    }
ARL_FOR_TYPES(GATED_NORM)
#undef GATED_NORM
