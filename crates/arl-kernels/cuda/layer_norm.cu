// LayerNorm by rows, as vision towers have it: forward and backward.
//
// Forward: a block a row, whose packs stay in registers between the mean, the variance and the result. Bytes: x once in, out once
// out, 8 bytes a row for the statistics; weight and bias come from caches.
// Backward: as RMSNorm's (`norm.cu`): a block has one or more rows at once, each some warps' own with 8 elements a thread, and
// continues with others; what it sums of the gradients of weight and bias stays in registers until its last row. `add_parts` then
// adds up the blocks' sums.
#include "arl.cuh"

namespace layer_norm {

template <typename T> constexpr int BACKWARD_PACKS = BACKWARD_ELEMENTS / Pack<T>::SIZE;

template <typename T, bool ALIGNED>
__device__ __forceinline__ void forward(const T *x, const T *weight, const T *bias, float epsilon, T *out,
                                        float *statistics, int width) {
    constexpr int SIZE = Pack<T>::SIZE;
    __shared__ float scratch[2][MOST_THREADS / 32];
    const int threads = blockDim.x, thread = threadIdx.x;
    // ALIGNED, a row is a whole number of packs.
    const int count = ALIGNED ? width / SIZE : packs_of<T>(width);
    const long long row = blockIdx.x;
    x += row * width;
    out += row * width;
    Pack<T> values[PACKS];
    float sum = 0;
#pragma unroll(ALIGNED ? PACKS : 1)
    for (int p = 0; p < PACKS; p++) {
        int i = thread + p * threads;
        if (i < count) {
            values[p] = load_pack<ALIGNED>(x + i * SIZE, width - i * SIZE);
#pragma unroll(ALIGNED ? SIZE : 1)
            for (int j = 0; j < SIZE; j++) sum += load(values[p].at[j]);
        }
    }
    const float mean = group_sum(sum, scratch[0], 0, threads / 32) / width;
    float squares = 0;
#pragma unroll(ALIGNED ? PACKS : 1)
    for (int p = 0; p < PACKS; p++) {
        int i = thread + p * threads;
        if (i < count) {
#pragma unroll(ALIGNED ? SIZE : 1)
            for (int j = 0; j < SIZE; j++) {
                // Behind the end of a row there is no difference from the mean.
                const float difference = load(values[p].at[j]) - mean;
                if (ALIGNED || i * SIZE + j < width) squares += difference * difference;
            }
        }
    }
    const float factor = rsqrtf(group_sum(squares, scratch[1], 0, threads / 32) / width + epsilon);
#pragma unroll(ALIGNED ? PACKS : 1)
    for (int p = 0; p < PACKS; p++) {
        int i = thread + p * threads;
        if (i < count) {
            Pack<T> weights = load_pack<ALIGNED>(weight + i * SIZE, width - i * SIZE);
            Pack<T> biases = load_pack<ALIGNED>(bias + i * SIZE, width - i * SIZE);
#pragma unroll(ALIGNED ? SIZE : 1)
            for (int j = 0; j < SIZE; j++) {
                const float normed = (load(values[p].at[j]) - mean) * factor;
                values[p].at[j] = store<T>(normed * load(weights.at[j]) + load(biases.at[j]));
            }
            store_pack<ALIGNED>(out + i * SIZE, values[p], width - i * SIZE);
        }
    }
    if (thread == 0) {
        statistics[2 * row] = mean;
        statistics[2 * row + 1] = factor;
    }
}

// With `g = weight d_out`, `n = (x - mean) factor`: `d_x += factor (g - mean(g) - n mean(g n))`, and into row `blockIdx.x` of
// `weight_parts` and `bias_parts` the sums of `d_out n` and of `d_out` over the block's rows. Dynamic shared memory: a float for each
// element of a block's rows.
template <typename T, bool ALIGNED>
__device__ __forceinline__ void backward(const T *d_out, const T *x, const T *weight, const float *statistics, T *d_x,
                                         float *weight_parts, float *bias_parts, int rows, int width) {
    constexpr int SIZE = Pack<T>::SIZE, COUNT = BACKWARD_PACKS<T>;
    // Two halves by turns, so that one barrier a row and sum is enough.
    __shared__ float scratch[2][2][MOST_BACKWARD_THREADS / 32];
    ARL_SHARED(float, sums);
    const int threads = blockDim.x, thread = threadIdx.x;
    const int count = ALIGNED ? width / SIZE : packs_of<T>(width);
    // Warps of a row. The launch has a whole number of such groups.
    const int group_warps = (count + 32 * COUNT - 1) / (32 * COUNT);
    const int groups = threads / 32 / group_warps, group = thread / 32 / group_warps;
    const int group_threads = 32 * group_warps, first = thread - group * group_threads;
    float d_weight[COUNT][SIZE] = {}, d_bias[COUNT][SIZE] = {};
    int half = 0;
    for (unsigned base = blockIdx.x * groups; base < unsigned(rows); base += gridDim.x * groups) {
        const unsigned row = base + group;
        const int end = row < unsigned(rows) ? count : 0;
        const float mean = end > 0 ? statistics[2 * (long long)row] : 0.0f;
        const float factor = end > 0 ? statistics[2 * (long long)row + 1] : 0.0f;
        const long long start = row * (long long)width;
        Pack<T> ds[COUNT], xs[COUNT];
        float sum = 0, product = 0;
#pragma unroll(ALIGNED ? COUNT : 1)
        for (int p = 0; p < COUNT; p++) {
            int i = first + p * group_threads;
            if (i < end) {
                ds[p] = load_pack<ALIGNED>(d_out + start + i * SIZE, width - i * SIZE);
                xs[p] = load_pack<ALIGNED>(x + start + i * SIZE, width - i * SIZE);
                // From a cache each time: in registers it would take the place of a gradient.
                Pack<T> weights = load_pack<ALIGNED>(weight + i * SIZE, width - i * SIZE);
#pragma unroll(ALIGNED ? SIZE : 1)
                for (int j = 0; j < SIZE; j++) {
                    // Behind the end of a row both are 0.
                    const float g = load(weights.at[j]) * load(ds[p].at[j]);
                    sum += g;
                    product += g * ((load(xs[p].at[j]) - mean) * factor);
                }
            }
        }
        const float mean_g = group_sum(sum, scratch[half][0], group * group_warps, group_warps) / width;
        const float mean_gn = group_sum(product, scratch[half][1], group * group_warps, group_warps) / width;
        half ^= 1;
#pragma unroll(ALIGNED ? COUNT : 1)
        for (int p = 0; p < COUNT; p++) {
            int i = first + p * group_threads;
            if (i < end) {
                Pack<T> results = load_pack<ALIGNED>(d_x + start + i * SIZE, width - i * SIZE);
                Pack<T> weights = load_pack<ALIGNED>(weight + i * SIZE, width - i * SIZE);
#pragma unroll(ALIGNED ? SIZE : 1)
                for (int j = 0; j < SIZE; j++) {
                    const float d = load(ds[p].at[j]), n = (load(xs[p].at[j]) - mean) * factor;
                    d_weight[p][j] += d * n;
                    d_bias[p][j] += d;
                    const float d_value = factor * (load(weights.at[j]) * d - mean_g - n * mean_gn);
                    results.at[j] = store<T>(load(results.at[j]) + d_value);
                }
                store_pack<ALIGNED>(d_x + start + i * SIZE, results, width - i * SIZE);
            }
        }
    }
    // What the groups have of one gradient, then of the other, through the same memory.
    auto add_groups = [&](const float (&own)[COUNT][SIZE], float *parts) {
        __syncthreads();
#pragma unroll(ALIGNED ? COUNT : 1)
        for (int p = 0; p < COUNT; p++) {
            int i = first + p * group_threads;
            if (i < count)
#pragma unroll(ALIGNED ? SIZE : 1)
                for (int j = 0; j < SIZE; j++)
                    if (ALIGNED || i * SIZE + j < width) sums[group * width + i * SIZE + j] = own[p][j];
        }
        __syncthreads();
        for (int i = thread; i < width; i += threads) {
            float total = 0;
            for (int g = 0; g < groups; g++) total += sums[g * width + i];
            parts[(long long)blockIdx.x * width + i] = total;
        }
    };
    add_groups(d_weight, weight_parts);
    add_groups(d_bias, bias_parts);
}

} // namespace layer_norm

#define LAYER_NORM(name, T, ALIGNED)                                                                                   \
    ARL_KERNEL(layer_norm_##name, layer_norm::MOST_THREADS, const T *x, const T *weight, const T *bias, float epsilon, \
               T *out, float *statistics, int width) {                                                                 \
        layer_norm::forward<T, ALIGNED>(x, weight, bias, epsilon, out, statistics, width);                             \
    }                                                                                                                  \
    ARL_KERNEL(layer_norm_backward_##name, layer_norm::MOST_BACKWARD_THREADS, const T *d_out, const T *x,              \
               const T *weight, const float *statistics, T *d_x, float *weight_parts, float *bias_parts, int rows,     \
               int width) {                                                                                            \
        layer_norm::backward<T, ALIGNED>(d_out, x, weight, statistics, d_x, weight_parts, bias_parts, rows, width);    \
    }
#define LAYER_NORMS(name, T) LAYER_NORM(name, T, true) LAYER_NORM(unaligned_##name, T, false)
ARL_FOR_TYPES(LAYER_NORMS)
#undef LAYER_NORMS
#undef LAYER_NORM
