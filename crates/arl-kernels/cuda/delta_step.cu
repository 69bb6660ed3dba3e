// The gated delta rule for one new token a sequence, from and to the state that is kept of it:
// S = e^g S,  S += k (beta (v - S^T k))^T,  out = S^T q.
//
// A block has COLUMNS columns of the state of one value head, a lane a column and a warp every eighth row, in registers: the state is
// read once and written once.
#include "delta.cuh"

namespace delta {

// Rows of the state that a warp has.
constexpr int WARP_ROWS = MOST_KEY_DIM / WARPS;

// The sum of a column over the warps, for all of them.
__device__ __forceinline__ float over_warps(float value, float (&sums)[WARPS][COLUMNS]) {
    const int lane = threadIdx.x % 32;
    __syncthreads();
    sums[threadIdx.x / 32][lane] = value;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += sums[w][lane];
    return sum;
}

// `states`, [sequences, value heads, key_dim, value_dim]; token `s` is of sequence `s`.
template <typename T>
__device__ __forceinline__ void step(const T *qkv, const float *g, const float *beta, const float *query_factors,
                                     const float *key_factors, const Shape &shape, float scale, float *states, T *out) {
    __shared__ float query[MOST_KEY_DIM], key[MOST_KEY_DIM], sums[WARPS][COLUMNS];
    const int blocks = shape.value_blocks(), rest = blockIdx.x / blocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = rest % shape.value_heads, token = rest / shape.value_heads, key_head = head / shape.group();
    const int column = blockIdx.x % blocks * COLUMNS + lane;
    const bool there = column < shape.value_dim;
    const long long of_key_head = key_head * (long long)shape.tokens + token, at = head * (long long)shape.tokens + token;
    const float of_query = query_factors[of_key_head] * scale, of_key = key_factors[of_key_head];
    for (int i = threadIdx.x; i < shape.key_dim; i += THREADS) {
        query[i] = load(shape.query(qkv, token, key_head)[i]) * of_query;
        key[i] = load(shape.key(qkv, token, key_head)[i]) * of_key;
    }
    __syncthreads();
    states += rest * shape.state() + column;
    const float decay = expf(g[at]);
    float own[WARP_ROWS], met = 0;
#pragma unroll
    for (int x = 0; x < WARP_ROWS; x++) {
        const int k = x * WARPS + warp;
        own[x] = 0;
        if (k < shape.key_dim && there) {
            own[x] = states[k * (long long)shape.value_dim] * decay;
            met += own[x] * key[k];
        }
    }
    met = over_warps(met, sums);
    const float value = there ? load(shape.value(qkv, token, head)[column]) : 0.0f, written = beta[at] * (value - met);
    float total = 0;
#pragma unroll
    for (int x = 0; x < WARP_ROWS; x++) {
        const int k = x * WARPS + warp;
        if (k < shape.key_dim && there) {
            own[x] += key[k] * written;
            total += query[k] * own[x];
            states[k * (long long)shape.value_dim] = own[x];
        }
    }
    total = over_warps(total, sums);
    if (warp == 0 && there) out[rest * (long long)shape.value_dim + column] = store<T>(total);
}

} // namespace delta

#define STEP(name, T)                                                                                                  \
    ARL_KERNEL(gated_delta_step_##name, delta::THREADS, const T *qkv, const float *g, const float *beta,               \
               const float *query_factors, const float *key_factors, DELTA_SHAPE, float scale, float *states,          \
               T *out) {                                                                                               \
        delta::step(qkv, g, beta, query_factors, key_factors, DELTA_SHAPE_VALUES, scale, states, out);                 \
    }
ARL_FOR_TYPES(STEP)
#undef STEP
