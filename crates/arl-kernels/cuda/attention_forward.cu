// Attention over packed sequences, causal or of whole sequences, forward: softmax(scale q k^T) v with the softmax taken on the way
// (FlashAttention-2), and each row's log-sum-exp (LSE) for the backward pass.
//
// A block owns a tile of queries of one head; the last tiles of a causal sequence, which see the most keys, go first. It reads its
// queries once and the keys and values that they see once a tile (of one key head for all query heads of its group, which run side
// by side and find them in the second-level cache); it writes its rows of `out` and of `log_sum_exp`.
#include "attention_forward_256.cuh"

namespace attention {

// Fragments of 16 queries, of a warp.
constexpr int FRAGMENTS = BLOCK_M / WARPS / 16;

template <int N, bool CAUSAL, typename T>
__device__ __forceinline__ void forward_tensor(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                               const Shape &shape, Matrix<T> out, float *log_sum_exp) {
    constexpr int D = ROW_OF<N>;
    ARL_SHARED(T, q_tile);
    T *k_tile = q_tile + BLOCK_M * D, *v_tile = k_tile + BLOCK_N * D;
    const int dim = N == D ? D : shape.dim;
    int head = blockIdx.x % shape.query_heads, key_head = head / (shape.query_heads / shape.key_heads);
    Tile tile = tile_at(shape, BLOCK_M, (gridDim.x - 1 - blockIdx.x) / shape.query_heads);
    if (tile.first >= tile.length) return;
    const T *keys = k.at(tile.start, key_head * dim), *values = v.at(tile.start, key_head * dim);
    int end = min(tile.first + BLOCK_M, tile.length), key_end = CAUSAL ? end : tile.length;
    int key = max(tile.first + 1 - shape.window, 0) / BLOCK_N * BLOCK_N;
    stage_async<N, BLOCK_M>(q_tile, q.at(tile.start + tile.first, head * dim), q.stride, end - tile.first, dim);
    keys += key * k.stride;
    values += key * v.stride;
    stage_async<N, BLOCK_N>(k_tile, keys, k.stride, key_end - key, dim);
    cp_async_commit();

    int lane = threadIdx.x % 32, warp_row = warp_number() * 16 * FRAGMENTS, row = tile.first + warp_row;
    // None where the warp has no row.
    int row_end = row < end ? row + 16 * FRAGMENTS : 0;
    float scale_log2 = shape.scale * LOG2_E;
    float o[FRAGMENTS][N / 8][4], row_max[FRAGMENTS][2], row_sum[FRAGMENTS][2];
    fill(o, 0);
    fill(row_max, MIN_SCORE);
    fill(row_sum, 0);
    for (; key < key_end; key += BLOCK_N) {
        bool needed = any_visible<CAUSAL>(shape, row, row_end, key, key + BLOCK_N);
        float s[FRAGMENTS][BLOCK_N / 8][4];
        cp_async_wait<0>();
        // The keys are here, and no warp reads the last tile's values any more.
        __syncthreads();
        stage_async<N, BLOCK_N>(v_tile, values, v.stride, key_end - key, dim);
        values += BLOCK_N * v.stride;
        cp_async_commit();
        if (needed) {
            fill(s, 0);
#pragma unroll
            for (int step = 0; step < N / 16; step++) {
                unsigned a[FRAGMENTS][4];
                load_a_fragments<D>(a, q_tile, warp_row, step);
                gemm_abt<D>(s, a, k_tile, step);
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        if (key + BLOCK_N < key_end) {
            keys += BLOCK_N * k.stride;
            stage_async<N, BLOCK_N>(k_tile, keys, k.stride, key_end - key - BLOCK_N, dim);
            cp_async_commit();
        }
        if (!needed) continue;
        if (!all_visible<CAUSAL>(shape, row, row + 16 * FRAGMENTS, key, key + BLOCK_N, tile.length)) {
            int distance = row + lane / 4 - key - lane % 4 * 2, left = tile.length - key - lane % 4 * 2;
#pragma unroll
            for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (!is_visible<CAUSAL>(shape, distance + (m * 16 + i / 2 * 8 - n * 8 - i % 2), left - n * 8 - i % 2))
                            s[m][n][i] = -INFINITY;
        }
        online_softmax(s, o, row_max, row_sum, scale_log2);
        gemm_ab<D>(o, s, v_tile);
    }

    float inverse_sum[FRAGMENTS][2];
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = row_sum[m][half];
            sum += __shfl_xor_sync(FULL, sum, 1);
            sum += __shfl_xor_sync(FULL, sum, 2);
            inverse_sum[m][half] = 1 / sum;
            int i = row + m * 16 + half * 8 + lane / 4;
            if (i < end && lane % 4 == 0)
                log_sum_exp[(long long)head * shape.tokens + tile.start + i] =
                    row_max[m][half] * shape.scale + logf(sum);
        }
    store_tile<N>(o, inverse_sum, q_tile, warp_row, end - tile.first, out.at(tile.start + tile.first, head * dim), out.stride,
                  dim);
}

// The same for every type and head size, on CUDA cores: 8 queries a warp, 32 keys a tile.
template <bool CAUSAL, typename T>
__device__ __forceinline__ void forward(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const Shape &shape,
                                        Matrix<T> out, float *log_sum_exp) {
    int warp = warp_number(), lane = threadIdx.x % 32, dim = shape.dim, queries = blockDim.x / 32 * ROWS;
    ARL_SHARED(float, q_tile);
    float *k_tile = q_tile + queries * row_stride(dim), *v_tile = k_tile + 32 * row_stride(dim);
    float *weights = v_tile + 32 * row_stride(dim) + warp * ROWS * WEIGHTS_STRIDE;
    int head = blockIdx.x % shape.query_heads, key_head = head / (shape.query_heads / shape.key_heads);
    Tile tile = tile_at(shape, queries, (gridDim.x - 1 - blockIdx.x) / shape.query_heads);
    if (tile.first >= tile.length) return;
    int end = min(tile.first + queries, tile.length), key_end = CAUSAL ? end : tile.length;
    int row = tile.first + warp * ROWS;
    stage(q_tile, queries, q.at(tile.start + tile.first, head * dim), q.stride, end - tile.first, dim);

    float scale_log2 = shape.scale * LOG2_E;
    float o[ROWS][LANE_COLUMNS], row_max[ROWS], row_sum[ROWS];
    fill(o, 0);
    fill(row_max, MIN_SCORE);
    fill(row_sum, 0);
    for (int key = max(tile.first + 1 - shape.window, 0) / 32 * 32; key < key_end; key += 32) {
        __syncthreads();
        stage(k_tile, 32, k.at(tile.start + key, key_head * dim), k.stride, key_end - key, dim);
        stage(v_tile, 32, v.at(tile.start + key, key_head * dim), v.stride, key_end - key, dim);
        __syncthreads();
        if (row >= end || !any_visible<CAUSAL>(shape, row, row + ROWS, key, key + 32)) continue;
        float s[ROWS];
        scores(s, q_tile + warp * ROWS * row_stride(dim), k_tile, dim);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (!is_visible<CAUSAL>(shape, row + r - key - lane, tile.length - key - lane)) s[r] = -INFINITY;
            float now = fmaxf(row_max[r], warp_max(s[r])), factor = exp2f((row_max[r] - now) * scale_log2);
            row_max[r] = now;
            s[r] = exp2f((s[r] - now) * scale_log2);
            row_sum[r] = row_sum[r] * factor + s[r];
#pragma unroll
            for (int x = 0; x < LANE_COLUMNS; x++) o[r][x] *= factor;
        }
        share_weights(weights, s);
        accumulate(o, weights, v_tile, dim);
    }
    float inverse_sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = warp_sum(row_sum[r]);
        inverse_sum[r] = 1 / sum;
        if (row + r < end && lane == 0)
            log_sum_exp[(long long)head * shape.tokens + tile.start + row + r] =
                row_max[r] * shape.scale + logf(sum);
    }
    store_rows(o, inverse_sum, end - row, out.at(tile.start + row, head * dim), out.stride, dim);
}

} // namespace attention

// `...` are the arguments of the template `pass`.
#define FORWARD(KERNEL, name, T, threads, pass, ...)                                                                   \
    KERNEL(attention_forward_##name, threads, ATTENTION_INPUTS(T), T *out, long long out_stride, float *log_sum_exp) { \
        attention::pass<__VA_ARGS__>(ATTENTION_INPUT_VALUES, {out, out_stride}, log_sum_exp);                          \
    }
// With `_full` a query sees the whole of its sequence.
#define FORWARDS(name, T)                                                                                              \
    FORWARD(ARL_KERNEL, name, T, attention::THREADS, forward, true, T)                                                 \
    FORWARD(ARL_KERNEL, full_##name, T, attention::THREADS, forward, false, T)
ARL_FOR_TYPES(FORWARDS)
#undef FORWARDS
#define FORWARDS_OF(N, name, T)                                                                                        \
    FORWARD(ARL_KERNEL, N##_##name, T, attention::THREADS, forward_tensor, N, true, T)                                 \
    FORWARD(ARL_KERNEL, full_##N##_##name, T, attention::THREADS, forward_tensor, N, false, T)
#define FORWARDS(name, T)                                                                                              \
    FORWARDS_OF(64, name, T) FORWARDS_OF(80, name, T) FORWARDS_OF(128, name, T)                                        \
    FORWARD(ARL_KERNEL_ALONE, 256_##name, T, attention::THREADS_256, forward_256, true, T)                             \
    FORWARD(ARL_KERNEL_ALONE, full_256_##name, T, attention::THREADS_256, forward_256, false, T)
ARL_FOR_NARROW(FORWARDS)
#undef FORWARDS
#undef FORWARDS_OF
#undef FORWARD
