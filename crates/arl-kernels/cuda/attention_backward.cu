// Attention over packed sequences, causal or of whole sequences, backward: gradients of q, k and v from that of `out`. Probabilities
// are recomputed from the kept log-sum-exp (LSE); nothing is added by two blocks, so that sums have a fixed order.
//
// First `delta`, the scalar product of each row of `out` with its gradient. Then one launch with two kinds of blocks:
// the first ones own the gradients of a tile of keys and values of one key head, and loop over the queries that see them,
// of all query heads of the group; the others own the gradients of a tile of queries and loop over the keys that they
// see. Both compute the scores (seven products a pair of tiles instead of five), and share no sum. In either kind the
// blocks with the most to do go first. Heads of 256 have a launch for each kind: as one kernel the two need more registers than
// a thread has, though either alone does not.
//
// A block's own tile is operand A, the tiles that it loops over are operand B: a warp's accumulators are then operand A of the
// next product, and no probabilities go through shared memory.
#include "attention_backward_256.cuh"

namespace attention {

// `delta[head, token]`. A row has as many lanes of a warp as it has packs, rounded up to a power of two, at most all of them.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void delta(Matrix<const T> out, Matrix<const T> d_out, int heads, int dim, int tokens,
                                      float *result) {
    constexpr int SIZE = Pack<T>::SIZE;
    int lanes = 1;
    while (lanes < 32 && lanes < packs_of<T>(dim)) lanes *= 2;
    int lane = threadIdx.x % lanes;
    long long step = (long long)gridDim.x * THREADS / lanes, all = (long long)tokens * heads;
    // All lanes of a warp continue as long as one of them has a row.
    for (long long row = (blockIdx.x * (long long)THREADS + threadIdx.x) / lanes; row - threadIdx.x % 32 / lanes < all;
         row += step) {
        long long token = row / heads;
        int head = row % heads;
        float sum = 0;
        if (row < all) {
            const T *a = out.at(token, head * dim), *b = d_out.at(token, head * dim);
            for (int i = lane * SIZE; i < dim; i += lanes * SIZE) {
                Pack<T> x = load_pack<ALIGNED>(a + i, dim - i), y = load_pack<ALIGNED>(b + i, dim - i);
#pragma unroll
                for (int j = 0; j < SIZE; j++) sum += load(x.at[j]) * load(y.at[j]);
            }
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(FULL, sum, distance);
        if (row < all && lane == 0) result[head * (long long)tokens + token] = sum;
    }
}

// ---- CUDA cores: 8 rows a warp, 32 rows in each tile that the block loops over.

template <bool CAUSAL, typename T>
__device__ __forceinline__ void keys_backward(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                              const Shape &shape, const BackwardInputs<T> &inputs, Matrix<T> d_qkv,
                                              int key_head, int slot) {
    int warp = warp_number(), lane = threadIdx.x % 32, dim = shape.dim, stride = row_stride(dim);
    int keys = blockDim.x / 32 * ROWS, group = shape.query_heads / shape.key_heads;
    ARL_SHARED(float, k_tile);
    float *v_tile = k_tile + keys * stride, *q_tile = v_tile + keys * stride, *d_out_tile = q_tile + 32 * stride;
    float *weights = d_out_tile + 32 * stride + warp * ROWS * WEIGHTS_STRIDE;
    Tile tile = tile_at(shape, keys, slot);
    if (tile.first >= tile.length) return;
    int end = min(tile.first + keys, tile.length), row = tile.first + warp * ROWS;
    int query_end = int(min((long long)tile.length, end - 1 + (long long)shape.window));
    const int first_query = CAUSAL ? tile.first : 0;
    stage(k_tile, keys, k.at(tile.start + tile.first, key_head * dim), k.stride, end - tile.first, dim);
    stage(v_tile, keys, v.at(tile.start + tile.first, key_head * dim), v.stride, end - tile.first, dim);
    float scale_log2 = shape.scale * LOG2_E;
    float d_k[ROWS][LANE_COLUMNS], d_v[ROWS][LANE_COLUMNS];
    fill(d_k, 0);
    fill(d_v, 0);
    for (int head = key_head * group; head < (key_head + 1) * group; head++)
        for (int query = first_query; query < query_end; query += 32) {
            __syncthreads();
            int valid = query_end - query;
            stage(q_tile, 32, q.at(tile.start + query, head * dim), q.stride, valid, dim);
            stage(d_out_tile, 32, inputs.d_out.at(tile.start + query, head * dim), inputs.d_out.stride, valid, dim);
            __syncthreads();
            if (row >= end || !any_visible<CAUSAL>(shape, query, query + 32, row, row + ROWS)) continue;
            float p[ROWS], d_s[ROWS];
            scores(p, k_tile + warp * ROWS * stride, q_tile, dim);
            scores(d_s, v_tile + warp * ROWS * stride, d_out_tile, dim);
            long long at = (long long)head * shape.tokens + tile.start + query + lane;
            float lse_log2 = lane < valid ? inputs.log_sum_exp[at] * LOG2_E : 0;
            float delta = lane < valid ? inputs.delta[at] : 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                bool visible = lane < valid && is_visible<CAUSAL>(shape, query + lane - row - r, end - row - r);
                p[r] = visible ? exp2f(p[r] * scale_log2 - lse_log2) : 0;
                d_s[r] = p[r] * (d_s[r] - delta);
            }
            share_weights(weights, p);
            accumulate(d_v, weights, d_out_tile, dim);
            share_weights(weights, d_s);
            accumulate(d_k, weights, q_tile, dim);
        }
    float ones[ROWS], scales[ROWS];
    fill(ones, 1);
    fill(scales, shape.scale);
    T *target = d_qkv.at(tile.start + row, (shape.query_heads + key_head) * dim);
    store_rows(d_k, scales, end - row, target, d_qkv.stride, dim);
    store_rows(d_v, ones, end - row, target + shape.key_heads * dim, d_qkv.stride, dim);
}

template <bool CAUSAL, typename T>
__device__ __forceinline__ void queries_backward(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                                 const Shape &shape, const BackwardInputs<T> &inputs, Matrix<T> d_qkv,
                                                 int head, int slot) {
    int warp = warp_number(), lane = threadIdx.x % 32, dim = shape.dim, stride = row_stride(dim);
    int queries = blockDim.x / 32 * ROWS, key_head = head / (shape.query_heads / shape.key_heads);
    ARL_SHARED(float, q_tile);
    float *d_out_tile = q_tile + queries * stride, *k_tile = d_out_tile + queries * stride;
    float *v_tile = k_tile + 32 * stride, *weights = v_tile + 32 * stride + warp * ROWS * WEIGHTS_STRIDE;
    Tile tile = tile_at(shape, queries, slot);
    if (tile.first >= tile.length) return;
    int end = min(tile.first + queries, tile.length), row = tile.first + warp * ROWS, valid = end - tile.first;
    int key_end = CAUSAL ? end : tile.length;
    stage(q_tile, queries, q.at(tile.start + tile.first, head * dim), q.stride, valid, dim);
    stage(d_out_tile, queries, inputs.d_out.at(tile.start + tile.first, head * dim), inputs.d_out.stride, valid, dim);
    float scale_log2 = shape.scale * LOG2_E, lse_log2[ROWS], delta[ROWS];
    for (int r = 0; r < ROWS; r++) {
        long long at = (long long)head * shape.tokens + tile.start + min(row + r, tile.length - 1);
        lse_log2[r] = inputs.log_sum_exp[at] * LOG2_E;
        delta[r] = inputs.delta[at];
    }
    float d_q[ROWS][LANE_COLUMNS];
    fill(d_q, 0);
    for (int key = max(tile.first + 1 - shape.window, 0) / 32 * 32; key < key_end; key += 32) {
        __syncthreads();
        stage(k_tile, 32, k.at(tile.start + key, key_head * dim), k.stride, key_end - key, dim);
        stage(v_tile, 32, v.at(tile.start + key, key_head * dim), v.stride, key_end - key, dim);
        __syncthreads();
        if (row >= end || !any_visible<CAUSAL>(shape, row, row + ROWS, key, key + 32)) continue;
        float p[ROWS], d_s[ROWS];
        scores(p, q_tile + warp * ROWS * stride, k_tile, dim);
        scores(d_s, d_out_tile + warp * ROWS * stride, v_tile, dim);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool visible = is_visible<CAUSAL>(shape, row + r - key - lane, tile.length - key - lane);
            float x = visible ? exp2f(p[r] * scale_log2 - lse_log2[r]) : 0;
            d_s[r] = x * (d_s[r] - delta[r]);
        }
        share_weights(weights, d_s);
        accumulate(d_q, weights, k_tile, dim);
    }
    float scales[ROWS];
    fill(scales, shape.scale);
    store_rows(d_q, scales, end - row, d_qkv.at(tile.start + row, head * dim), d_qkv.stride, dim);
}

} // namespace attention

#define DELTA(name, T)                                                                                                 \
    ARL_KERNEL(attention_delta_##name, attention::THREADS, const T *out, long long out_stride, const T *d_out,         \
               long long d_out_stride, int heads, int dim, int tokens, float *delta) {                                 \
        if (vectorizable(out, out_stride) && vectorizable(d_out, d_out_stride) && dim % Pack<T>::SIZE == 0)            \
            attention::delta<true, T>({out, out_stride}, {d_out, d_out_stride}, heads, dim, tokens, delta);            \
        else attention::delta<false, T>({out, out_stride}, {d_out, d_out_stride}, heads, dim, tokens, delta);          \
    }
ARL_FOR_TYPES(DELTA)
#undef DELTA

namespace attention {
// What the blocks of a kernel own. Of both, those from `key_blocks` on own queries.
enum class Owned { KEYS, QUERIES, BOTH };
} // namespace attention

// `...` are the arguments of both templates.
#define BACKWARD(KERNEL, name, T, threads, owned, kind, ...)                                                           \
    KERNEL(name, threads, ATTENTION_INPUTS(T), const T *d_out, long long d_out_stride, const float *log_sum_exp,       \
           const float *delta, T *d_qkv, int key_blocks) {                                                             \
        attention::BackwardInputs<T> inputs = {{d_out, d_out_stride}, log_sum_exp, delta};                             \
        attention::Matrix<T> d = {d_qkv, (long long)(query_heads + 2 * key_heads) * dim};                              \
        constexpr attention::Owned OWNED = attention::Owned::owned;                                                    \
        int block = blockIdx.x;                                                                                        \
        if (OWNED == attention::Owned::BOTH ? block < key_blocks : OWNED == attention::Owned::KEYS) {                  \
            attention::keys_##kind<__VA_ARGS__>(ATTENTION_INPUT_VALUES, inputs, d, block % key_heads,                  \
                                                block / key_heads);                                                    \
        } else {                                                                                                       \
            int last = gridDim.x - 1 - block;                                                                          \
            attention::queries_##kind<__VA_ARGS__>(ATTENTION_INPUT_VALUES, inputs, d, last % query_heads,              \
                                                   last / query_heads);                                                \
        }                                                                                                              \
    }
// With `_full` a query sees the whole of its sequence.
#define BACKWARDS(name, T)                                                                                             \
    BACKWARD(ARL_KERNEL, attention_backward_##name, T, attention::THREADS, BOTH, backward, true, T)                    \
    BACKWARD(ARL_KERNEL, attention_backward_full_##name, T, attention::THREADS, BOTH, backward, false, T)
ARL_FOR_TYPES(BACKWARDS)
#undef BACKWARDS
#define ALONE(name, T, threads, ...) BACKWARD(ARL_KERNEL_ALONE, attention_backward_##name, T, threads, __VA_ARGS__)
#define BACKWARDS_OF(N, name, T)                                                                                       \
    ALONE(N##_##name, T, attention::THREADS, BOTH, backward_tensor, N, true, T)                                        \
    ALONE(full_##N##_##name, T, attention::THREADS, BOTH, backward_tensor, N, false, T)
#define BACKWARDS(name, T)                                                                                             \
    BACKWARDS_OF(64, name, T) BACKWARDS_OF(80, name, T) BACKWARDS_OF(128, name, T)                                     \
    ALONE(keys_256_##name, T, attention::THREADS_256, KEYS, backward_256, true, T)                                     \
    ALONE(keys_full_256_##name, T, attention::THREADS_256, KEYS, backward_256, false, T)                               \
    ALONE(queries_256_##name, T, attention::THREADS_256, QUERIES, backward_256, true, T)                               \
    ALONE(queries_full_256_##name, T, attention::THREADS_256, QUERIES, backward_256, false, T)
ARL_FOR_NARROW(BACKWARDS)
#undef BACKWARDS
#undef BACKWARDS_OF
#undef ALONE
#undef BACKWARD
