// The forward pass of attention on tensor cores for heads of 256 elements: 128 queries a block, 16 a warp, whose accumulators take
// half of a thread's registers and whose queries a quarter. Keys and values of 32 tokens at a time go through a ring of three
// stages, two of which hold the queries at first. Of what a multiprocessor has, a block takes all registers and 96 KiB of
// shared memory. An `ldmatrix` feeds two products of 16 x 8; each key is read once for 128 queries.
#pragma once

#include "attention.cuh"

namespace attention {

template <bool CAUSAL, typename T>
__device__ __forceinline__ void forward_256(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const Shape &shape,
                                            Matrix<T> out, float *log_sum_exp) {
    constexpr int D = 256, M = BLOCK_M_256, N = BLOCK_N_256, STAGE = 2 * N * D;
    static_assert(M == 16 * (THREADS_256 / 32) && M * D <= (STAGES_256 - 1) * STAGE && STAGES_256 == 3,
                  "a warp has one fragment of queries; all of them fit behind the first stage");
    // [STAGES, keys and values, N, D]; in the end the tile of `out`.
    ARL_SHARED(T, stages);
    T *q_tile = stages + STAGE;
    int head = blockIdx.x % shape.query_heads, key_head = head / (shape.query_heads / shape.key_heads);
    Tile tile = tile_at(shape, M, (gridDim.x - 1 - blockIdx.x) / shape.query_heads);
    if (tile.first >= tile.length) return;
    // Tokens are numbered through the batch: a sequence's beginning would take a register of its own.
    int first = tile.start + tile.first, sequence_end = tile.start + tile.length, end = min(first + M, sequence_end);
    int key = tile.start + max(tile.first + 1 - shape.window, 0) / N * N, key_end = CAUSAL ? end : sequence_end;
    auto stage_keys = [&](int key, int stage) {
        T *to = stages + stage * STAGE;
        stage_async<D, N, THREADS_256>(to, k.at(key, key_head * D), k.stride, key_end - key, D);
        stage_async<D, N, THREADS_256>(to + N * D, v.at(key, key_head * D), v.stride, key_end - key, D);
    };
    stage_async<D, M, THREADS_256>(q_tile, q.at(first, head * D), q.stride, end - first, D);
    stage_keys(key, 0);
    cp_async_commit();

    int lane = threadIdx.x % 32, warp_row = warp_number() * 16, row = first + warp_row;
    float scale_log2 = shape.scale * LOG2_E;
    float o[1][D / 8][4], row_max[1][2], row_sum[1][2];
    fill(o, 0);
    fill(row_max, MIN_SCORE);
    fill(row_sum, 0);
    cp_async_wait<0>();
    __syncthreads();
    unsigned q_fragments[D / 16][1][4];
#pragma unroll
    for (int step = 0; step < D / 16; step++) load_a_fragments<D>(q_fragments[step], q_tile, warp_row, step);

    // No warp reads the queries any more.
    __syncthreads();
    if (key + N < key_end) stage_keys(key + N, 1);
    cp_async_commit();

    for (int stage = 0; key < key_end; key += N, stage = stage == 2 ? 0 : stage + 1) {
        cp_async_wait<1>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        // The tile after the next. Where there is none the group is empty: groups are counted.
        if (key + 2 * N < key_end) stage_keys(key + 2 * N, stage == 0 ? 2 : stage - 1);
        cp_async_commit();
        if (row >= end || !any_visible<CAUSAL>(shape, row, row + 16, key, key + N)) continue;
        const T *k_tile = stages + stage * STAGE, *v_tile = k_tile + N * D;
        float s[1][N / 8][4];
        fill(s, 0);
#pragma unroll
        for (int i = 0; i < D / 16; i++) gemm_abt<D>(s, q_fragments[step_256(i)], k_tile, step_256(i));
        if (!all_visible<CAUSAL>(shape, row, row + 16, key, key + N, key_end)) {
            int distance = row + lane / 4 - key - lane % 4 * 2, left = key_end - key - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (!is_visible<CAUSAL>(shape, distance + (i / 2 * 8 - n * 8 - i % 2), left - n * 8 - i % 2))
                        s[0][n][i] = -INFINITY;
        }
        online_softmax(s, o, row_max, row_sum, scale_log2);
        gemm_ab<D>(o, s, v_tile);
    }

    float inverse_sum[1][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = row_sum[0][half];
        sum += __shfl_xor_sync(FULL, sum, 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        inverse_sum[0][half] = 1 / sum;
        int i = row + half * 8 + lane / 4;
        if (i < end && lane % 4 == 0)
            log_sum_exp[(long long)head * shape.tokens + i] = row_max[0][half] * shape.scale + logf(sum);
    }
    // No warp reads keys or values any more.
    __syncthreads();
    store_tile<D>(o, inverse_sum, stages, warp_row, end - first, out.at(first, head * D), out.stride, D);
}

} // namespace attention
