// The backward pass of attention on tensor cores: the two kinds of blocks that `attention_backward.cu` describes.
#pragma once

#include "attention.cuh"

namespace attention {

// What the backward pass reads besides the inputs: the gradient of `out`, and f32 [query_heads, tokens].
template <typename T> struct BackwardInputs {
    Matrix<const T> d_out;
    const float *log_sum_exp, *delta;
};

// Rows of the tiles that a block loops over (operand B).
constexpr int TILE_N = BACKWARD_BLOCK_N;

// Rows of a block's own tile (operand A): as many as leave registers for their gradients; and a warp's fragments of 16 of them.
template <int D> constexpr int TILE_M = D == 64 ? BACKWARD_BLOCK_M_64 : BACKWARD_BLOCK_M_128;
template <int D> constexpr int FRAGMENTS_OF = TILE_M<D> / 16 / WARPS;

template <int N, bool CAUSAL, typename T>
__device__ __forceinline__ void keys_backward_tensor(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                                     const Shape &shape, const BackwardInputs<T> &inputs,
                                                     Matrix<T> d_qkv, int key_head, int slot) {
    constexpr int D = ROW_OF<N>, FRAGMENTS = FRAGMENTS_OF<D>, COLUMNS = TILE_N / 8;
    ARL_SHARED(T, k_tile);
    const int dim = N == D ? D : shape.dim;
    T *v_tile = k_tile + TILE_M<D> * D, *q_tiles = v_tile + TILE_M<D> * D, *d_out_tiles = q_tiles + 2 * TILE_N * D;
    // [2, 2, TILE_N]: log_sum_exp (of base 2) and delta, for two tiles.
    float *statistics = reinterpret_cast<float *>(d_out_tiles + 2 * TILE_N * D);
    Tile tile = tile_at(shape, TILE_M<D>, slot);
    if (tile.first >= tile.length) return;
    int group = shape.query_heads / shape.key_heads, end = min(tile.first + TILE_M<D>, tile.length);
    // The end of the queries that see a key of the tile.
    int query_end = int(min((long long)tile.length, end - 1 + (long long)shape.window));
    // Without the mask a window reaches as far back.
    const int first_query = CAUSAL ? tile.first : max(tile.first - shape.window, 0);
    int head = key_head * group, head_end = head + group, query = first_query;

    // Stages the next tile of queries in the half of the buffers that is `at` elements from their beginning.
    auto stage_queries = [&](int at) {
        stage_async<N, TILE_N>(q_tiles + at, q.at(tile.start + query, head * dim), q.stride, query_end - query, dim);
        stage_async<N, TILE_N>(d_out_tiles + at, inputs.d_out.at(tile.start + query, head * dim), inputs.d_out.stride,
                               query_end - query, dim);
        cp_async_commit();
    };
    // Its LSE and delta, one number a thread; a query beyond the end has probabilities of zero.
    auto load_statistic = [&]() {
        int i = query + threadIdx.x % TILE_N;
        bool is_delta = threadIdx.x >= TILE_N;
        if (i >= query_end) return is_delta ? 0.0f : INFINITY;
        long long at = (long long)head * shape.tokens + tile.start + i;
        return is_delta ? inputs.delta[at] : inputs.log_sum_exp[at] * LOG2_E;
    };
    stage_async<N, TILE_M<D>>(k_tile, k.at(tile.start + tile.first, key_head * dim), k.stride, end - tile.first, dim);
    stage_async<N, TILE_M<D>>(v_tile, v.at(tile.start + tile.first, key_head * dim), v.stride, end - tile.first, dim);
    stage_queries(0);
    if (threadIdx.x < 2 * TILE_N) statistics[threadIdx.x] = load_statistic();

    int lane = threadIdx.x % 32, warp_row = warp_number() * 16 * FRAGMENTS, row = tile.first + warp_row;
    float scale_log2 = shape.scale * LOG2_E;
    float d_k[FRAGMENTS][N / 8][4], d_v[FRAGMENTS][N / 8][4];
    fill(d_k, 0);
    fill(d_v, 0);
    for (int half = 0; head < head_end; half ^= 1) {
        cp_async_wait<0>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        int current = query;
        query += TILE_N;
        if (query >= query_end) {
            query = first_query;
            head++;
        }
        float next = 0;
        if (head < head_end) {
            stage_queries((half ^ 1) * TILE_N * D);
            if (threadIdx.x < 2 * TILE_N) next = load_statistic();
        }
        const T *q_tile = q_tiles + half * TILE_N * D, *d_out_tile = d_out_tiles + half * TILE_N * D;
        const float *lse_log2 = statistics + half * 2 * TILE_N, *delta = lse_log2 + TILE_N;
        if (row < end && any_visible<CAUSAL>(shape, current, current + TILE_N, row, row + 16 * FRAGMENTS)) {
            // Transposed: [keys, queries].
            float p[FRAGMENTS][COLUMNS][4], d_s[FRAGMENTS][COLUMNS][4];
            fill(p, 0);
            fill(d_s, 0);
#pragma unroll
            for (int step = 0; step < N / 16; step++) {
                unsigned a[FRAGMENTS][4];
                load_a_fragments<D>(a, k_tile, warp_row, step);
                gemm_abt<D>(p, a, q_tile, step);
            }
#pragma unroll
            for (int step = 0; step < N / 16; step++) {
                unsigned a[FRAGMENTS][4];
                load_a_fragments<D>(a, v_tile, warp_row, step);
                gemm_abt<D>(d_s, a, d_out_tile, step);
            }
            // Gradients of keys behind the sequence's end are not stored.
            bool all = !CAUSAL || all_visible<CAUSAL>(shape, current, current + TILE_N, row, row + 16 * FRAGMENTS, end);
            int distance = current + lane % 4 * 2 - row - lane / 4;
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
                            if (!all && !is_visible<CAUSAL>(shape, distance + (n * 8 + j - m * 16 - e / 2 * 8), 1)) x = 0;
                            p[m][n][e] = x;
                            d_s[m][n][e] = x * (d_s[m][n][e] - delta_of);
                        }
                }
            gemm_ab<D>(d_v, p, d_out_tile);
            gemm_ab<D>(d_k, d_s, q_tile);
        }
        if (threadIdx.x < 2 * TILE_N) statistics[(half ^ 1) * 2 * TILE_N + threadIdx.x] = next;
    }
    float ones[FRAGMENTS][2], scales[FRAGMENTS][2];
    fill(ones, 1);
    fill(scales, shape.scale);
    T *target = d_qkv.at(tile.start + tile.first, (shape.query_heads + key_head) * dim);
    store_tile<N>(d_k, scales, k_tile, warp_row, end - tile.first, target, d_qkv.stride, dim);
    store_tile<N>(d_v, ones, v_tile, warp_row, end - tile.first, target + shape.key_heads * dim, d_qkv.stride, dim);
}

template <int N, bool CAUSAL, typename T>
__device__ __forceinline__ void queries_backward_tensor(Matrix<const T> q, Matrix<const T> k,
                                                        Matrix<const T> v, const Shape &shape,
                                                        const BackwardInputs<T> &inputs, Matrix<T> d_qkv, int head,
                                                        int slot) {
    constexpr int D = ROW_OF<N>, FRAGMENTS = FRAGMENTS_OF<D>, COLUMNS = TILE_N / 8;
    ARL_SHARED(T, q_tile);
    const int dim = N == D ? D : shape.dim;
    T *d_out_tile = q_tile + TILE_M<D> * D, *k_tiles = d_out_tile + TILE_M<D> * D, *v_tiles = k_tiles + 2 * TILE_N * D;
    Tile tile = tile_at(shape, TILE_M<D>, slot);
    if (tile.first >= tile.length) return;
    int key_head = head / (shape.query_heads / shape.key_heads), end = min(tile.first + TILE_M<D>, tile.length);
    int key_end = CAUSAL ? end : tile.length;
    int key = max(tile.first + 1 - shape.window, 0) / TILE_N * TILE_N;
    auto stage_keys = [&](int key) {
        int at = key / TILE_N % 2 * TILE_N * D;
        stage_async<N, TILE_N>(k_tiles + at, k.at(tile.start + key, key_head * dim), k.stride, key_end - key, dim);
        stage_async<N, TILE_N>(v_tiles + at, v.at(tile.start + key, key_head * dim), v.stride, key_end - key, dim);
        cp_async_commit();
    };
    stage_async<N, TILE_M<D>>(q_tile, q.at(tile.start + tile.first, head * dim), q.stride, end - tile.first, dim);
    stage_async<N, TILE_M<D>>(d_out_tile, inputs.d_out.at(tile.start + tile.first, head * dim), inputs.d_out.stride,
                              end - tile.first, dim);
    stage_keys(key);

    int lane = threadIdx.x % 32, warp_row = warp_number() * 16 * FRAGMENTS, row = tile.first + warp_row;
    float scale_log2 = shape.scale * LOG2_E, lse_log2[FRAGMENTS][2], delta[FRAGMENTS][2];
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = min(row + m * 16 + half * 8 + lane / 4, tile.length - 1);
            long long at = (long long)head * shape.tokens + tile.start + i;
            lse_log2[m][half] = inputs.log_sum_exp[at] * LOG2_E;
            delta[m][half] = inputs.delta[at];
        }
    // Where a warp has 16 rows, each fragment that it reads serves two products only. Those of operand A then stay in
    // registers.
    constexpr bool A_IN_REGISTERS = FRAGMENTS == 1;
    unsigned q_fragments[A_IN_REGISTERS ? N / 16 : 1][FRAGMENTS][4], d_out_fragments[A_IN_REGISTERS ? N / 16 : 1][FRAGMENTS][4];
    if (A_IN_REGISTERS) {
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < N / 16; step++) {
            load_a_fragments<D>(q_fragments[step], q_tile, warp_row, step);
            load_a_fragments<D>(d_out_fragments[step], d_out_tile, warp_row, step);
        }
    }
    float d_q[FRAGMENTS][N / 8][4];
    fill(d_q, 0);
    for (; key < key_end; key += TILE_N) {
        cp_async_wait<0>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        if (key + TILE_N < key_end) stage_keys(key + TILE_N);
        if (row >= end || !any_visible<CAUSAL>(shape, row, row + 16 * FRAGMENTS, key, key + TILE_N)) continue;
        const T *k_tile = k_tiles + key / TILE_N % 2 * TILE_N * D, *v_tile = v_tiles + key / TILE_N % 2 * TILE_N * D;
        float p[FRAGMENTS][COLUMNS][4], d_s[FRAGMENTS][COLUMNS][4];
        fill(p, 0);
        fill(d_s, 0);
#pragma unroll
        for (int step = 0; step < N / 16; step++) {
            int at = A_IN_REGISTERS ? step : 0;
            if (!A_IN_REGISTERS) {
                load_a_fragments<D>(q_fragments[at], q_tile, warp_row, step);
                load_a_fragments<D>(d_out_fragments[at], d_out_tile, warp_row, step);
            }
            gemm_abt<D>(p, q_fragments[at], k_tile, step);
            gemm_abt<D>(d_s, d_out_fragments[at], v_tile, step);
        }
        bool all = all_visible<CAUSAL>(shape, row, row + 16 * FRAGMENTS, key, key + TILE_N, tile.length);
        int distance = row + lane / 4 - key - lane % 4 * 2, left = tile.length - key - lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float x = exp2_fast(p[m][n][e] * scale_log2 - lse_log2[m][e / 2]);
                    bool visible = is_visible<CAUSAL>(shape, distance + (m * 16 + e / 2 * 8 - n * 8 - e % 2), left - n * 8 - e % 2);
                    if (!all && !visible) x = 0;
                    d_s[m][n][e] = x * (d_s[m][n][e] - delta[m][e / 2]);
                }
        gemm_ab<D>(d_q, d_s, k_tile);
    }
    float scales[FRAGMENTS][2];
    fill(scales, shape.scale);
    store_tile<N>(d_q, scales, q_tile, warp_row, end - tile.first, d_qkv.at(tile.start + tile.first, head * dim),
                  d_qkv.stride, dim);
}

} // namespace attention
