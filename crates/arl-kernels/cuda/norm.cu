// RMSNorm by rows: forward, alone or with the residual sum before it, recomputed from the kept factors, and backward.
//
// Forward: one block a row, at most PACKS packs of 16 bytes a thread, which stay in registers between the sum of squares and the
// result, so that each tensor crosses the bus once: x and out, with the sum also delta and sum; 4 bytes a row for the factor; the
// weight comes from caches.
// Backward: a block has one or more rows at once, each some warps' own with 8 elements a thread, and continues with others.
// Read: d_out, x, d_x, 4 bytes a row for the factor; written: d_x, and the block's own sum of the weight's gradient,
// which stays in registers until its last row. `add_parts` then adds up the blocks' sums.
#include "arl.cuh"

namespace rms_norm {

template <typename T> constexpr int BACKWARD_PACKS = BACKWARD_ELEMENTS / Pack<T>::SIZE;

// The normalised value is rounded to T before it meets the weight, but where an offset is added to that, as on the CPU.
template <typename T> __device__ __forceinline__ T scaled(T x, T weight, float offset, float factor) {
    const float normed = load(x) * factor;
    return offset == 0 ? store<T>(load(weight) * rounded<T>(normed)) : store<T>((load(weight) + offset) * normed);
}

__device__ __forceinline__ float factor_of(float squares, int width, float epsilon) {
    return rsqrtf(squares / width + epsilon);
}

// With ADD `sum = x + delta` first (`sum` may be either), rounded to T before it is normed. With RECOMPUTE the factor is
// `known[row]`; else it is found, and kept in `inverse_rms[row]`.
template <typename T, bool ALIGNED, bool ADD, bool RECOMPUTE>
__device__ __forceinline__ void forward(const T *x, const T *delta, T *sum, const T *weight, float offset,
                                        float epsilon, const float *known, T *out, float *inverse_rms, int width) {
    constexpr int SIZE = Pack<T>::SIZE;
    __shared__ float scratch[MOST_THREADS / 32];
    const int threads = blockDim.x, thread = threadIdx.x;
    // ALIGNED, a row is a whole number of packs.
    const int count = ALIGNED ? width / SIZE : packs_of<T>(width);
    const long long row = blockIdx.x;
    x += row * width;
    out += row * width;
    if (ADD) {
        delta += row * width;
        sum += row * width;
    }
    Pack<T> values[PACKS], added[PACKS];
#pragma unroll(ALIGNED ? PACKS : 1)
    for (int p = 0; p < PACKS; p++) {
        int i = thread + p * threads;
        if (i < count) {
            values[p] = load_pack<ALIGNED>(x + i * SIZE, width - i * SIZE);
            if (ADD) added[p] = load_pack<ALIGNED>(delta + i * SIZE, width - i * SIZE);
        }
    }
    float squares = 0;
#pragma unroll(ALIGNED ? PACKS : 1)
    for (int p = 0; p < PACKS; p++) {
        int i = thread + p * threads;
        if (i < count) {
#pragma unroll(ALIGNED ? SIZE : 1)
            for (int j = 0; j < SIZE; j++) {
                if (ADD) values[p].at[j] = store<T>(load(values[p].at[j]) + load(added[p].at[j]));
                squares += load(values[p].at[j]) * load(values[p].at[j]);
            }
            if (ADD) store_pack<ALIGNED>(sum + i * SIZE, values[p], width - i * SIZE);
        }
    }
    float factor;
    if (RECOMPUTE) factor = known[row];
    else factor = factor_of(group_sum(squares, scratch, 0, threads / 32), width, epsilon);
#pragma unroll(ALIGNED ? PACKS : 1)
    for (int p = 0; p < PACKS; p++) {
        int i = thread + p * threads;
        if (i < count) {
            Pack<T> weights = load_pack<ALIGNED>(weight + i * SIZE, width - i * SIZE);
#pragma unroll(ALIGNED ? SIZE : 1)
            for (int j = 0; j < SIZE; j++) values[p].at[j] = scaled(values[p].at[j], weights.at[j], offset, factor);
            store_pack<ALIGNED>(out + i * SIZE, values[p], width - i * SIZE);
        }
    }
    if (!RECOMPUTE && thread == 0) inverse_rms[row] = factor;
}

// With `g = (weight + offset) d_out` and `r` the kept factor: `d_x += r g - x r^3 mean(g x)`, and into row `blockIdx.x` of `parts`
// the sum of `d_out x r` over the block's rows. Dynamic shared memory: a float for each element of a block's rows.
template <typename T, bool ALIGNED>
__device__ __forceinline__ void backward(const T *d_out, const T *x, const T *weight, float offset,
                                         const float *inverse_rms, T *d_x, float *parts, int rows, int width) {
    constexpr int SIZE = Pack<T>::SIZE, COUNT = BACKWARD_PACKS<T>;
    // Two halves by turns, so that one barrier a row is enough.
    __shared__ float scratch[2][MOST_BACKWARD_THREADS / 32];
    ARL_SHARED(float, sums);
    const int threads = blockDim.x, thread = threadIdx.x;
    // ALIGNED, a row is a whole number of packs.
    const int count = ALIGNED ? width / SIZE : packs_of<T>(width);
    // Warps of a row. The launch has a whole number of such groups.
    const int group_warps = (count + 32 * COUNT - 1) / (32 * COUNT);
    const int groups = threads / 32 / group_warps, group = thread / 32 / group_warps;
    const int group_threads = 32 * group_warps, first = thread - group * group_threads;
    parts += (long long)blockIdx.x * width;
    Pack<T> weights[COUNT];
    float d_weight[COUNT][SIZE] = {};
#pragma unroll(ALIGNED ? COUNT : 1)
    for (int p = 0; p < COUNT; p++) {
        int i = first + p * group_threads;
        if (i < count) weights[p] = load_pack<ALIGNED>(weight + i * SIZE, width - i * SIZE);
    }
    int half = 0;
    for (unsigned base = blockIdx.x * groups; base < unsigned(rows); base += gridDim.x * groups) {
        const unsigned row = base + group;
        const int end = row < unsigned(rows) ? count : 0;
        const float factor = end > 0 ? inverse_rms[row] : 0.0f;
        const long long start = row * (long long)width;
        Pack<T> ds[COUNT], xs[COUNT], results[COUNT];
#pragma unroll(ALIGNED ? COUNT : 1)
        for (int p = 0; p < COUNT; p++) {
            int i = first + p * group_threads;
            if (i < end) {
                ds[p] = load_pack<ALIGNED>(d_out + start + i * SIZE, width - i * SIZE);
                xs[p] = load_pack<ALIGNED>(x + start + i * SIZE, width - i * SIZE);
                results[p] = load_pack<ALIGNED>(d_x + start + i * SIZE, width - i * SIZE);
            }
        }
        float product = 0;
#pragma unroll(ALIGNED ? COUNT : 1)
        for (int p = 0; p < COUNT; p++)
            if (first + p * group_threads < end)
#pragma unroll(ALIGNED ? SIZE : 1)
                for (int j = 0; j < SIZE; j++)
                    product += (load(weights[p].at[j]) + offset) * load(ds[p].at[j]) * load(xs[p].at[j]);
        product = group_sum(product, scratch[half], group * group_warps, group_warps);
        half ^= 1;
        const float x_factor = product / width * factor * factor * factor;
#pragma unroll(ALIGNED ? COUNT : 1)
        for (int p = 0; p < COUNT; p++) {
            int i = first + p * group_threads;
            if (i < end) {
#pragma unroll(ALIGNED ? SIZE : 1)
                for (int j = 0; j < SIZE; j++) {
                    float d = load(ds[p].at[j]), value = load(xs[p].at[j]);
                    d_weight[p][j] += d * (value * factor);
                    float d_value = (load(weights[p].at[j]) + offset) * d * factor - value * x_factor;
                    results[p].at[j] = store<T>(load(results[p].at[j]) + d_value);
                }
                store_pack<ALIGNED>(d_x + start + i * SIZE, results[p], width - i * SIZE);
            }
        }
    }
#pragma unroll(ALIGNED ? COUNT : 1)
    for (int p = 0; p < COUNT; p++) {
        int i = first + p * group_threads;
        if (i < count)
#pragma unroll(ALIGNED ? SIZE : 1)
            for (int j = 0; j < SIZE; j++)
                if (ALIGNED || i * SIZE + j < width) sums[group * width + i * SIZE + j] = d_weight[p][j];
    }
    __syncthreads();
    for (int i = thread; i < width; i += threads) {
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += sums[g * width + i];
        parts[i] = sum;
    }
}

} // namespace rms_norm

// Each kernel for rows that are aligned to packs, and with `_unaligned` for others: apart, so that these take no registers from those.
#define NORM(name, T, ALIGNED)                                                                                         \
    ARL_KERNEL(rms_norm_##name, rms_norm::MOST_THREADS, const T *x, const T *weight, float offset, float epsilon,      \
               T *out, float *inverse_rms, int width) {                                                                \
        rms_norm::forward<T, ALIGNED, false, false>(x, nullptr, nullptr, weight, offset, epsilon, nullptr, out,        \
                                                    inverse_rms, width);                                               \
    }                                                                                                                  \
    ARL_KERNEL(add_rms_norm_##name, rms_norm::MOST_THREADS, const T *x, const T *delta, T *sum, const T *weight,       \
               float offset, float epsilon, T *out, float *inverse_rms, int width) {                                   \
        rms_norm::forward<T, ALIGNED, true, false>(x, delta, sum, weight, offset, epsilon, nullptr, out, inverse_rms,  \
                                                   width);                                                             \
    }                                                                                                                  \
    ARL_KERNEL(rms_norm_recompute_##name, rms_norm::MOST_THREADS, const T *x, const T *weight, float offset,           \
               const float *inverse_rms, T *out, int width) {                                                          \
        rms_norm::forward<T, ALIGNED, false, true>(x, nullptr, nullptr, weight, offset, 0, inverse_rms, out, nullptr,  \
                                                   width);                                                             \
    }                                                                                                                  \
    ARL_KERNEL(rms_norm_backward_##name, rms_norm::MOST_BACKWARD_THREADS, const T *d_out, const T *x, const T *weight, \
               float offset, const float *inverse_rms, T *d_x, float *parts, int rows, int width) {                    \
        rms_norm::backward<T, ALIGNED>(d_out, x, weight, offset, inverse_rms, d_x, parts, rows, width);                \
    }
#define NORMS(name, T) NORM(name, T, true) NORM(unaligned_##name, T, false)
ARL_FOR_TYPES(NORMS)
#undef NORMS
#undef NORM
