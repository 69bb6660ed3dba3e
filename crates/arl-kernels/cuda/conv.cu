// The depthwise causal convolution with SiLU before a delta rule: forward, backward, and one token at a time.
//
// A thread has a channel. Fewer taps than TAPS are TAPS of which the first weights are zeroes.
// Forward: a block has a tile of tokens; each x is read once from memory and again from the first-level cache. Backward: x becomes
// its own gradient in place, so that a block goes over its tokens in order with a window of x and of the sums' gradients in
// registers; what it needs of other blocks' rows, TAPS - 1 on either side of its tile, is copied first (`causal_conv_edges`). Each
// block writes its part of the weight's gradient, for `add_parts`.
#include "arl.cuh"

namespace conv {

// Tokens before one that its sum takes.
constexpr int BEFORE = TAPS - 1;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// A channel's weights; those of taps that there are not are zeroes.
template <typename T> struct Weights {
    float at[TAPS];

    __device__ __forceinline__ Weights(const T *weight, int channel, int taps) {
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
            const int tap = j - (TAPS - taps);
            at[j] = tap < 0 ? 0.0f : load(weight[channel * (long long)taps + tap]);
        }
    }

    // The sum for the token whose x is `x[BEFORE]`.
    __device__ __forceinline__ float sum(const float *x) const {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < TAPS; j++) sum += at[j] * x[j];
        return sum;
    }
};

// The sequence that has a token: the last one that does not begin behind it.
__device__ __forceinline__ int sequence_of(const int *cu_seqlens, int count, int token) {
    int sequence = 0;
    for (int end = count; end - sequence > 1;) {
        const int middle = (sequence + end) / 2;
        if (cu_seqlens[middle] <= token) sequence = middle;
        else end = middle;
    }
    return sequence;
}

template <typename T>
__device__ __forceinline__ void forward(const T *x, long long stride, const T *weight, const int *cu_seqlens, int count,
                                        T *out, int tokens, int channels, int taps) {
    const int channel = blockIdx.y * THREADS + threadIdx.x;
    const int first = blockIdx.x * TOKENS, end = min(first + TOKENS, tokens);
    if (channel >= channels) return;
    const Weights<T> weights(weight, channel, taps);
    x += channel;
    out += channel;
    int start = 0, sequence_end = 0;
    float window[TAPS];
    for (int t = first; t < end; t++) {
        if (t >= sequence_end) {
            const int sequence = sequence_of(cu_seqlens, count, t);
            start = cu_seqlens[sequence];
            sequence_end = cu_seqlens[sequence + 1];
#pragma unroll
            for (int j = 0; j < BEFORE; j++) {
                const int from = t - BEFORE + j;
                window[j + 1] = from < start ? 0.0f : load(x[from * stride]);
            }
        }
#pragma unroll
        for (int j = 0; j < BEFORE; j++) window[j] = window[j + 1];
        window[BEFORE] = load(x[t * stride]);
        const float sum = weights.sum(window);
        out[t * (long long)channels] = store<T>(sum * sigmoid(sum));
    }
}

// `edges[tile, row, channel]`: x of the BEFORE tokens before a tile of `size`, then of those behind it; zeroes where there are none.
template <typename T>
__device__ __forceinline__ void edges(const T *x, long long stride, float *edges, int size, int tokens, int channels) {
    const int channel = blockIdx.y * THREADS + threadIdx.x;
    if (channel >= channels) return;
    const int first = blockIdx.x * size, end = min(first + size, tokens);
    for (int row = 0; row < 2 * BEFORE; row++) {
        const int token = row < BEFORE ? first - BEFORE + row : end + row - BEFORE;
        const float value = token < 0 || token >= tokens ? 0.0f : load(x[token * stride + channel]);
        edges[(blockIdx.x * 2LL * BEFORE + row) * channels + channel] = value;
    }
}

// What a block of the backward pass knows of its channel and of the sequence that it is in.
template <typename T> struct Rows {
    T *x;
    long long stride;
    const float *edges;
    const T *d_out;
    int first, end, channels;
    int start, sequence_end;

    __device__ __forceinline__ bool has(int token) const { return token >= start && token < sequence_end; }

    __device__ __forceinline__ float x_of(int token) const {
        if (!has(token)) return 0;
        if (token < first) return edges[(token - first + BEFORE) * (long long)channels];
        if (token >= end) return edges[(token - end + BEFORE) * (long long)channels];
        return load(x[token * stride]);
    }

    // The gradient of a token's sum, where `window` has the x that it is of.
    __device__ __forceinline__ float d_sum(const Weights<T> &weights, const float *window, int token) const {
        if (!has(token)) return 0;
        const float sum = weights.sum(window), s = sigmoid(sum);
        return load(d_out[token * (long long)channels]) * s * (1.0f + sum * (1.0f - s));
    }
};

template <typename T>
__device__ __forceinline__ void backward(T *x, long long stride, const T *weight, const int *cu_seqlens, int count,
                                         const T *d_out, const float *edges, float *parts, int size, int tokens,
                                         int channels, int taps) {
    const int channel = blockIdx.y * THREADS + threadIdx.x;
    if (channel >= channels) return;
    const Weights<T> weights(weight, channel, taps);
    const int first = blockIdx.x * size;
    Rows<T> rows = {x + channel,      stride,   edges + blockIdx.x * 2LL * BEFORE * channels + channel,
                    d_out + channel, first,    min(first + size, tokens),
                    channels,        0,        0};
    // x from BEFORE tokens before to BEFORE tokens behind, and the gradients of the sums from the token on.
    float window[2 * BEFORE + 1], d_sums[TAPS], d_weight[TAPS] = {};
    for (int t = first; t < rows.end; t++) {
        if (t >= rows.sequence_end) {
            const int sequence = sequence_of(cu_seqlens, count, t);
            rows.start = cu_seqlens[sequence];
            rows.sequence_end = cu_seqlens[sequence + 1];
#pragma unroll
            for (int j = 0; j < 2 * BEFORE; j++) window[j + 1] = rows.x_of(t - BEFORE + j);
#pragma unroll
            for (int j = 0; j < BEFORE; j++) d_sums[j + 1] = rows.d_sum(weights, window + 1 + j, t + j);
        }
#pragma unroll
        for (int j = 0; j < 2 * BEFORE; j++) window[j] = window[j + 1];
        window[2 * BEFORE] = rows.x_of(t + BEFORE);
#pragma unroll
        for (int j = 0; j < BEFORE; j++) d_sums[j] = d_sums[j + 1];
        d_sums[BEFORE] = rows.d_sum(weights, window + BEFORE, t + BEFORE);
        float d_x = 0;
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
            d_x += weights.at[j] * d_sums[BEFORE - j];
            d_weight[j] += d_sums[0] * window[j];
        }
        rows.x[t * stride] = store<T>(d_x);
    }
    for (int tap = 0; tap < taps; tap++) {
        float own = 0;
#pragma unroll
        for (int j = 0; j < TAPS; j++) own = j == tap + TAPS - taps ? d_weight[j] : own;
        parts[(blockIdx.x * (long long)channels + channel) * taps + tap] = own;
    }
}

// The last `taps - 1` rows of x of each sequence, zeroes before its start: `inputs` is [sequences, taps - 1, channels].
template <typename T>
__device__ __forceinline__ void keep(const T *x, long long stride, const int *cu_seqlens, T *inputs, int channels, int taps) {
    const int channel = blockIdx.y * THREADS + threadIdx.x;
    if (channel >= channels) return;
    const int sequence = blockIdx.x / (taps - 1), row = blockIdx.x % (taps - 1);
    const int token = cu_seqlens[sequence + 1] - (taps - 1) + row;
    inputs[blockIdx.x * (long long)channels + channel] =
        token < cu_seqlens[sequence] ? store<T>(0) : x[token * stride + channel];
}

// One new token a sequence, which joins the kept inputs.
template <typename T>
__device__ __forceinline__ void step(const T *x, long long stride, const T *weight, T *inputs, T *out, int channels, int taps) {
    const int channel = blockIdx.y * THREADS + threadIdx.x;
    if (channel >= channels) return;
    const Weights<T> weights(weight, channel, taps);
    inputs += (long long)blockIdx.x * (taps - 1) * channels + channel;
    float window[TAPS] = {};
#pragma unroll
    for (int j = 0; j < BEFORE; j++) {
        const int row = j - (TAPS - taps);
        if (row >= 0) window[j] = load(inputs[row * (long long)channels]);
    }
    const T own = x[blockIdx.x * stride + channel];
    window[BEFORE] = load(own);
    const float sum = weights.sum(window);
    out[blockIdx.x * (long long)channels + channel] = store<T>(sum * sigmoid(sum));
    for (int row = 0; row + 1 < taps - 1; row++) inputs[row * (long long)channels] = inputs[(row + 1LL) * channels];
    if (taps > 1) inputs[(taps - 2LL) * channels] = own;
}

} // namespace conv

#define CONV(name, T)                                                                                                  \
    ARL_KERNEL(causal_conv_##name, conv::THREADS, const T *x, long long stride, const T *weight,                       \
               const int *cu_seqlens, int count, T *out, int tokens, int channels, int taps) {                         \
        conv::forward(x, stride, weight, cu_seqlens, count, out, tokens, channels, taps);                              \
    }                                                                                                                  \
    ARL_KERNEL(causal_conv_edges_##name, conv::THREADS, const T *x, long long stride, float *edges, int size,          \
               int tokens, int channels) {                                                                             \
        conv::edges(x, stride, edges, size, tokens, channels);                                                         \
    }                                                                                                                  \
    ARL_KERNEL(causal_conv_backward_##name, conv::THREADS, T *x, long long stride, const T *weight,                    \
               const int *cu_seqlens, int count, const T *d_out, const float *edges, float *parts, int size,           \
               int tokens, int channels, int taps) {                                                                   \
        conv::backward(x, stride, weight, cu_seqlens, count, d_out, edges, parts, size, tokens, channels, taps);       \
    }                                                                                                                  \
    ARL_KERNEL(causal_conv_keep_##name, conv::THREADS, const T *x, long long stride, const int *cu_seqlens, T *inputs, \
               int channels, int taps) {                                                                               \
        conv::keep(x, stride, cu_seqlens, inputs, channels, taps);                                                     \
    }                                                                                                                  \
    ARL_KERNEL(causal_conv_step_##name, conv::THREADS, const T *x, long long stride, const T *weight, T *inputs,       \
               T *out, int channels, int taps) {                                                                       \
        conv::step(x, stride, weight, inputs, out, channels, taps);                                                    \
    }
ARL_FOR_TYPES(CONV)
#undef CONV
