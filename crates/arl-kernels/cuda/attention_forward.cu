// Causal attention over packed sequences, forward: softmax(scale q k^T) v with the softmax taken on the way
// (FlashAttention-2), and the log of each row's sum of exponentials for the backward pass.
//
// A block owns a tile of queries of one head; the last tiles of a sequence, which see the most keys, go first. It reads
// its queries once and the keys and values that they see once a tile (of one key head for all query heads of its group,
// which run side by side and find them in the second-level cache); it writes its rows of `out` and of `log_sum_exp`.
#include "attention.cuh"

namespace attention {

// Fragments of 16 queries, of a warp.
constexpr int FRAGMENTS = BLOCK_M / WARPS / 16;

// Turns masked scores into exp(scale (score - maximum)), and brings maxima, this thread's part of the sums, and values
// up to date.
template <int D>
__device__ __forceinline__ void online(float (&s)[FRAGMENTS][BLOCK_N / 8][4], float (&o)[FRAGMENTS][D / 8][4],
                                       float (&max_)[FRAGMENTS][2], float (&total)[FRAGMENTS][2], float scale_log2) {
    float factor[FRAGMENTS][2];
    bool changed = false;
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float greatest = max_[m][half];
#pragma unroll
            for (int n = 0; n < BLOCK_N / 8; n++)
                greatest = fmaxf(greatest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            greatest = fmaxf(greatest, __shfl_xor_sync(FULL, greatest, 1));
            greatest = fmaxf(greatest, __shfl_xor_sync(FULL, greatest, 2));
            changed |= greatest != max_[m][half];
            factor[m][half] = exp2_fast((max_[m][half] - greatest) * scale_log2);
            max_[m][half] = greatest;
            float offset = greatest * scale_log2, sum = 0;
#pragma unroll
            for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[m][n][i] = exp2_fast(s[m][n][i] * scale_log2 - offset);
                    sum += s[m][n][i];
                }
            total[m][half] = total[m][half] * factor[m][half] + sum;
        }
    // Most tiles after the first few bring no new maximum.
    if (!__any_sync(FULL, changed)) return;
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[m][n][i] *= factor[m][i / 2];
}

template <int D, typename T>
__device__ __forceinline__ void forward_tensor(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                               const Shape &shape, Matrix<T> out, float *log_sum_exp) {
    ARL_SHARED(T, q_tile);
    T *k_tile = q_tile + BLOCK_M * D, *v_tile = k_tile + BLOCK_N * D;
    int head = blockIdx.x % shape.query_heads, key_head = head / (shape.query_heads / shape.key_heads);
    Tile tile = tile_at(shape, BLOCK_M, (gridDim.x - 1 - blockIdx.x) / shape.query_heads);
    if (tile.first >= tile.length) return;
    const T *keys = k.at(tile.start, key_head * D), *values = v.at(tile.start, key_head * D);
    int end = min(tile.first + BLOCK_M, tile.length);
    int key = max(tile.first + 1 - shape.window, 0) / BLOCK_N * BLOCK_N;
    stage_async<D, BLOCK_M>(q_tile, q.at(tile.start + tile.first, head * D), q.stride, end - tile.first);
    keys += key * k.stride;
    values += key * v.stride;
    stage_async<D, BLOCK_N>(k_tile, keys, k.stride, end - key);
    cp_async_commit();

    int lane = threadIdx.x % 32, own = warp_number() * 16 * FRAGMENTS, row = tile.first + own;
    // None where the warp has no row.
    int row_end = row < end ? row + 16 * FRAGMENTS : 0;
    float scale_log2 = shape.scale * LOG2_E;
    float o[FRAGMENTS][D / 8][4], greatest[FRAGMENTS][2], total[FRAGMENTS][2];
    fill(o, 0);
    fill(greatest, NOTHING);
    fill(total, 0);
    for (; key < end; key += BLOCK_N) {
        bool seen = any_sees(shape, row, row_end, key, key + BLOCK_N);
        float s[FRAGMENTS][BLOCK_N / 8][4];
        cp_async_wait<0>();
        // The keys are here, and no warp reads the last tile's values any more.
        __syncthreads();
        stage_async<D, BLOCK_N>(v_tile, values, v.stride, end - key);
        values += BLOCK_N * v.stride;
        cp_async_commit();
        if (seen) {
            fill(s, 0);
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                unsigned a[FRAGMENTS][4];
                load_left<D>(a, q_tile, own, step);
                multiply_rows<D>(s, a, k_tile, step);
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        if (key + BLOCK_N < end) {
            keys += BLOCK_N * k.stride;
            stage_async<D, BLOCK_N>(k_tile, keys, k.stride, end - key - BLOCK_N);
            cp_async_commit();
        }
        if (!seen) continue;
        if (!all_see(shape, row, row + 16 * FRAGMENTS, key, key + BLOCK_N)) {
            int distance = row + lane / 4 - key - lane % 4 * 2;
#pragma unroll
            for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (!sees(shape, distance + (m * 16 + i / 2 * 8 - n * 8 - i % 2))) s[m][n][i] = -INFINITY;
        }
        online<D>(s, o, greatest, total, scale_log2);
        multiply_columns<D>(o, s, v_tile);
    }

#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(FULL, sum, 1);
            sum += __shfl_xor_sync(FULL, sum, 2);
            total[m][half] = 1 / sum;
            int i = row + m * 16 + half * 8 + lane / 4;
            if (i < end && lane % 4 == 0)
                log_sum_exp[(long long)head * shape.tokens + tile.start + i] =
                    greatest[m][half] * shape.scale + logf(sum);
        }
    store_tile<D>(o, total, q_tile, own, end - tile.first, out.at(tile.start + tile.first, head * D), out.stride);
}

// The same for every type and head size, on CUDA cores: 8 queries a warp, 32 keys a tile.
template <typename T>
__device__ __forceinline__ void forward(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const Shape &shape,
                                        Matrix<T> out, float *log_sum_exp) {
    int warp = warp_number(), lane = threadIdx.x % 32, dim = shape.dim, queries = blockDim.x / 32 * ROWS;
    ARL_SHARED(float, q_tile);
    float *k_tile = q_tile + queries * row_stride(dim), *v_tile = k_tile + 32 * row_stride(dim);
    float *weights = v_tile + 32 * row_stride(dim) + warp * ROWS * WEIGHTS_STRIDE;
    int head = blockIdx.x % shape.query_heads, key_head = head / (shape.query_heads / shape.key_heads);
    Tile tile = tile_at(shape, queries, (gridDim.x - 1 - blockIdx.x) / shape.query_heads);
    if (tile.first >= tile.length) return;
    int end = min(tile.first + queries, tile.length), row = tile.first + warp * ROWS;
    stage(q_tile, queries, q.at(tile.start + tile.first, head * dim), q.stride, end - tile.first, dim);

    float scale_log2 = shape.scale * LOG2_E;
    float o[ROWS][STEPS], greatest[ROWS], total[ROWS];
    fill(o, 0);
    fill(greatest, NOTHING);
    fill(total, 0);
    for (int key = max(tile.first + 1 - shape.window, 0) / 32 * 32; key < end; key += 32) {
        __syncthreads();
        stage(k_tile, 32, k.at(tile.start + key, key_head * dim), k.stride, end - key, dim);
        stage(v_tile, 32, v.at(tile.start + key, key_head * dim), v.stride, end - key, dim);
        __syncthreads();
        if (row >= end || !any_sees(shape, row, row + ROWS, key, key + 32)) continue;
        float s[ROWS];
        scores(s, q_tile + warp * ROWS * row_stride(dim), k_tile, dim);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (!sees(shape, row + r - key - lane)) s[r] = -INFINITY;
            float now = fmaxf(greatest[r], warp_max(s[r])), factor = exp2f((greatest[r] - now) * scale_log2);
            greatest[r] = now;
            s[r] = exp2f((s[r] - now) * scale_log2);
            total[r] = total[r] * factor + s[r];
#pragma unroll
            for (int x = 0; x < STEPS; x++) o[r][x] *= factor;
        }
        share_weights(weights, s);
        accumulate(o, weights, v_tile, dim);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = warp_sum(total[r]);
        total[r] = 1 / sum;
        if (row + r < end && lane == 0)
            log_sum_exp[(long long)head * shape.tokens + tile.start + row + r] =
                greatest[r] * shape.scale + logf(sum);
    }
    store_rows(o, total, end - row, out.at(tile.start + row, head * dim), out.stride, dim);
}

} // namespace attention

#define FORWARD(name, T)                                                                                               \
    ARL_KERNEL(attention_forward_##name, attention::THREADS, ATTENTION_INPUTS(T), T *out, long long out_stride,        \
               float *log_sum_exp) {                                                                                   \
        attention::forward<T>(ATTENTION_INPUT_VALUES, {out, out_stride}, log_sum_exp);                                 \
    }
ARL_FOR_TYPES(FORWARD)
#undef FORWARD

#define FORWARD(D, T)                                                                                                  \
    ARL_KERNEL(attention_forward_##D##_##T, attention::THREADS, ATTENTION_INPUTS(T), T *out, long long out_stride,     \
               float *log_sum_exp) {                                                                                   \
        attention::forward_tensor<D, T>(ATTENTION_INPUT_VALUES, {out, out_stride}, log_sum_exp);                       \
    }
#define FORWARDS(name, T) FORWARD(64, T) FORWARD(128, T)
ARL_FOR_NARROW(FORWARDS)
#undef FORWARDS
#undef FORWARD
