// The backward pass of attention on tensor cores: the two kinds of blocks that `attention_backward.cu` describes.
#pragma once

#include "attention.cuh"

namespace attention {

// What the backward pass reads besides the inputs: the gradient of `out`, and f32 [query_heads, tokens].
template <typename T> struct Results {
    Matrix<const T> d_out;
    const float *log_sum_exp, *delta;
};

// Rows of the other side's tiles.
constexpr int BLOCK_J = BACKWARD_BLOCK_N;

// Rows of a block's own tile: as many as leave registers for their gradients; and a warp's fragments of 16 of them.
template <int D> constexpr int BLOCK_I = D == 64 ? BACKWARD_BLOCK_M_64 : BACKWARD_BLOCK_M_128;
template <int D> constexpr int FRAGMENTS_OF = BLOCK_I<D> / 16 / WARPS;

template <int D, typename T>
__device__ __forceinline__ void keys_backward_tensor(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                                     const Shape &shape, const Results<T> &results,
                                                     Matrix<T> d_qkv, int key_head, int slot) {
    constexpr int FRAGMENTS = FRAGMENTS_OF<D>, COLUMNS = BLOCK_J / 8;
    ARL_SHARED(T, k_tile);
    T *v_tile = k_tile + BLOCK_I<D> * D, *q_tiles = v_tile + BLOCK_I<D> * D, *d_out_tiles = q_tiles + 2 * BLOCK_J * D;
    // [2, 2, BLOCK_J]: log_sum_exp (of base 2) and delta, for two tiles.
    float *sums = reinterpret_cast<float *>(d_out_tiles + 2 * BLOCK_J * D);
    Tile tile = tile_at(shape, BLOCK_I<D>, slot);
    if (tile.first >= tile.length) return;
    int group = shape.query_heads / shape.key_heads, end = min(tile.first + BLOCK_I<D>, tile.length);
    // The end of the queries that see a key of the tile.
    int query_end = int(min((long long)tile.length, end - 1 + (long long)shape.window));
    int head = key_head * group, head_end = head + group, query = tile.first;

    // The next tile's, to the half of the buffers that is `at` elements from their beginning.
    auto stage_queries = [&](int at) {
        stage_async<D, BLOCK_J>(q_tiles + at, q.at(tile.start + query, head * D), q.stride, query_end - query);
        stage_async<D, BLOCK_J>(d_out_tiles + at, results.d_out.at(tile.start + query, head * D), results.d_out.stride,
                               query_end - query);
        cp_async_commit();
    };
    // One number of it a thread; a query that is not there has probabilities of zero.
    auto load_sum = [&]() {
        int i = query + threadIdx.x % BLOCK_J;
        bool is_delta = threadIdx.x >= BLOCK_J;
        if (i >= query_end) return is_delta ? 0.0f : INFINITY;
        long long at = (long long)head * shape.tokens + tile.start + i;
        return is_delta ? results.delta[at] : results.log_sum_exp[at] * LOG2_E;
    };
    stage_async<D, BLOCK_I<D>>(k_tile, k.at(tile.start + tile.first, key_head * D), k.stride, end - tile.first);
    stage_async<D, BLOCK_I<D>>(v_tile, v.at(tile.start + tile.first, key_head * D), v.stride, end - tile.first);
    stage_queries(0);
    if (threadIdx.x < 2 * BLOCK_J) sums[threadIdx.x] = load_sum();

    int lane = threadIdx.x % 32, own = warp_number() * 16 * FRAGMENTS, row = tile.first + own;
    float scale_log2 = shape.scale * LOG2_E;
    float d_k[FRAGMENTS][D / 8][4], d_v[FRAGMENTS][D / 8][4];
    fill(d_k, 0);
    fill(d_v, 0);
    for (int half = 0; head < head_end; half ^= 1) {
        cp_async_wait<0>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        int present = query;
        query += BLOCK_J;
        if (query >= query_end) {
            query = tile.first;
            head++;
        }
        float next = 0;
        if (head < head_end) {
            stage_queries((half ^ 1) * BLOCK_J * D);
            if (threadIdx.x < 2 * BLOCK_J) next = load_sum();
        }
        const T *q_tile = q_tiles + half * BLOCK_J * D, *d_out_tile = d_out_tiles + half * BLOCK_J * D;
        const float *lse_log2 = sums + half * 2 * BLOCK_J, *delta = lse_log2 + BLOCK_J;
        if (row < end && any_sees(shape, present, present + BLOCK_J, row, row + 16 * FRAGMENTS)) {
            // Transposed: [keys, queries].
            float p[FRAGMENTS][COLUMNS][4], d_s[FRAGMENTS][COLUMNS][4];
            fill(p, 0);
            fill(d_s, 0);
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                unsigned a[FRAGMENTS][4];
                load_left<D>(a, k_tile, own, step);
                multiply_rows<D>(p, a, q_tile, step);
            }
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                unsigned a[FRAGMENTS][4];
                load_left<D>(a, v_tile, own, step);
                multiply_rows<D>(d_s, a, d_out_tile, step);
            }
            bool all = all_see(shape, present, present + BLOCK_J, row, row + 16 * FRAGMENTS);
            int distance = present + lane % 4 * 2 - row - lane / 4;
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    int column = n * 8 + lane % 4 * 2 + j;
                    float lse = lse_log2[column], delta_of = delta[column];
#pragma unroll
                    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                        for (int e = j; e < 4; e += 2) {
                            float x = exp2_fast(p[m][n][e] * scale_log2 - lse);
                            if (!all && !sees(shape, distance + (n * 8 + j - m * 16 - e / 2 * 8))) x = 0;
                            p[m][n][e] = x;
                            d_s[m][n][e] = x * (d_s[m][n][e] - delta_of);
                        }
                }
            multiply_columns<D>(d_v, p, d_out_tile);
            multiply_columns<D>(d_k, d_s, q_tile);
        }
        if (threadIdx.x < 2 * BLOCK_J) sums[(half ^ 1) * 2 * BLOCK_J + threadIdx.x] = next;
    }
    float ones[FRAGMENTS][2], scales[FRAGMENTS][2];
    fill(ones, 1);
    fill(scales, shape.scale);
    T *target = d_qkv.at(tile.start + tile.first, (shape.query_heads + key_head) * D);
    store_tile<D>(d_k, scales, k_tile, own, end - tile.first, target, d_qkv.stride);
    store_tile<D>(d_v, ones, v_tile, own, end - tile.first, target + shape.key_heads * D, d_qkv.stride);
}

template <int D, typename T>
__device__ __forceinline__ void queries_backward_tensor(Matrix<const T> q, Matrix<const T> k,
                                                        Matrix<const T> v, const Shape &shape,
                                                        const Results<T> &results, Matrix<T> d_qkv, int head,
                                                        int slot) {
    constexpr int FRAGMENTS = FRAGMENTS_OF<D>, COLUMNS = BLOCK_J / 8;
    ARL_SHARED(T, q_tile);
    T *d_out_tile = q_tile + BLOCK_I<D> * D, *k_tiles = d_out_tile + BLOCK_I<D> * D, *v_tiles = k_tiles + 2 * BLOCK_J * D;
    Tile tile = tile_at(shape, BLOCK_I<D>, slot);
    if (tile.first >= tile.length) return;
    int key_head = head / (shape.query_heads / shape.key_heads), end = min(tile.first + BLOCK_I<D>, tile.length);
    int key = max(tile.first + 1 - shape.window, 0) / BLOCK_J * BLOCK_J;
    auto stage_keys = [&](int key) {
        int at = key / BLOCK_J % 2 * BLOCK_J * D;
        stage_async<D, BLOCK_J>(k_tiles + at, k.at(tile.start + key, key_head * D), k.stride, end - key);
        stage_async<D, BLOCK_J>(v_tiles + at, v.at(tile.start + key, key_head * D), v.stride, end - key);
        cp_async_commit();
    };
    stage_async<D, BLOCK_I<D>>(q_tile, q.at(tile.start + tile.first, head * D), q.stride, end - tile.first);
    stage_async<D, BLOCK_I<D>>(d_out_tile, results.d_out.at(tile.start + tile.first, head * D), results.d_out.stride,
                           end - tile.first);
    stage_keys(key);

    int lane = threadIdx.x % 32, own = warp_number() * 16 * FRAGMENTS, row = tile.first + own;
    float scale_log2 = shape.scale * LOG2_E, lse_log2[FRAGMENTS][2], delta[FRAGMENTS][2];
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = min(row + m * 16 + half * 8 + lane / 4, tile.length - 1);
            long long at = (long long)head * shape.tokens + tile.start + i;
            lse_log2[m][half] = results.log_sum_exp[at] * LOG2_E;
            delta[m][half] = results.delta[at];
        }
    // Where a warp has 16 rows, each fragment that it reads serves two products only. The left ones then stay in
    // registers.
    constexpr bool STAY = FRAGMENTS == 1;
    unsigned q_left[STAY ? D / 16 : 1][FRAGMENTS][4], d_out_left[STAY ? D / 16 : 1][FRAGMENTS][4];
    if (STAY) {
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            load_left<D>(q_left[step], q_tile, own, step);
            load_left<D>(d_out_left[step], d_out_tile, own, step);
        }
    }
    float d_q[FRAGMENTS][D / 8][4];
    fill(d_q, 0);
    for (; key < end; key += BLOCK_J) {
        cp_async_wait<0>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        if (key + BLOCK_J < end) stage_keys(key + BLOCK_J);
        if (row >= end || !any_sees(shape, row, row + 16 * FRAGMENTS, key, key + BLOCK_J)) continue;
        const T *k_tile = k_tiles + key / BLOCK_J % 2 * BLOCK_J * D, *v_tile = v_tiles + key / BLOCK_J % 2 * BLOCK_J * D;
        float p[FRAGMENTS][COLUMNS][4], d_s[FRAGMENTS][COLUMNS][4];
        fill(p, 0);
        fill(d_s, 0);
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            int at = STAY ? step : 0;
            if (!STAY) {
                load_left<D>(q_left[at], q_tile, own, step);
                load_left<D>(d_out_left[at], d_out_tile, own, step);
            }
            multiply_rows<D>(p, q_left[at], k_tile, step);
            multiply_rows<D>(d_s, d_out_left[at], v_tile, step);
        }
        bool all = all_see(shape, row, row + 16 * FRAGMENTS, key, key + BLOCK_J);
        int distance = row + lane / 4 - key - lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float x = exp2_fast(p[m][n][e] * scale_log2 - lse_log2[m][e / 2]);
                    if (!all && !sees(shape, distance + (m * 16 + e / 2 * 8 - n * 8 - e % 2))) x = 0;
                    d_s[m][n][e] = x * (d_s[m][n][e] - delta[m][e / 2]);
                }
        multiply_columns<D>(d_q, d_s, k_tile);
    }
    float scales[FRAGMENTS][2];
    fill(scales, shape.scale);
    store_tile<D>(d_q, scales, q_tile, own, end - tile.first, d_qkv.at(tile.start + tile.first, head * D),
                  d_qkv.stride);
}

} // namespace attention
