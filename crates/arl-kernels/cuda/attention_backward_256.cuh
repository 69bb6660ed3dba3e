// The backward pass of attention on tensor cores for heads of 256 elements: the two kinds of blocks that `attention_backward.cu`
// describes, as kernels of their own, with 64 rows a block. The gradients of 16 keys and values would fill a warp's registers, and
// its operands a second time, so two warps share 16 rows and divide the work by operand:
//
//   keys:    warp 0 has K, computes P^T = exp(K Q^T) and sums dV += P^T dO;  warp 1 has V, computes V dO^T and sums dK += dS^T Q
//   queries: warp 0 has Q, computes P = exp(Q K^T);  warp 1 has dO, computes dO V^T;  each sums half of the columns of dQ += dS K
//
// Each computes one of the two products that dS = P (dP - delta) is made of and gives it to the other through shared memory, in f32
// and lane by lane: the layouts are the same. So no product is computed twice, both warps have as much to do, and an
// `ldmatrix` feeds two products of 16 x 8. A thread's registers hold its operand (64) and its gradients (128 or 64).
#pragma once

#include "attention_backward_tensor.cuh"

namespace attention {

// What the two kinds of blocks share: columns of a head, rows of the block's own tile and of those that it loops over, pairs of warps.
constexpr int D_256 = 256, M_256 = BACKWARD_BLOCK_M_256, N_256 = BLOCK_N_256, PAIRS = M_256 / 16;
static_assert(2 * PAIRS == THREADS_256 / 32 && BACKWARD_STAGES_256 == 2 && M_256 == 2 * N_256,
              "two warps for 16 rows; two stages of two tiles hold the block's own two tiles");

// A warp's products [16, N] as it gives them to another: fours of a lane, side by side.
__device__ __forceinline__ void give(float *to, const float (&s)[1][N_256 / 8][4]) {
#pragma unroll
    for (int n = 0; n < N_256 / 8; n++) {
        Float4 four = {{s[0][n][0], s[0][n][1], s[0][n][2], s[0][n][3]}};
        store_pack(to + (n * 32 + threadIdx.x % 32) * 4, four);
    }
}
__device__ __forceinline__ void multiply_by_given(float (&s)[1][N_256 / 8][4], const float *from) {
#pragma unroll
    for (int n = 0; n < N_256 / 8; n++) {
        Float4 four = load_pack(from + (n * 32 + threadIdx.x % 32) * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) s[0][n][i] *= four.at[i];
    }
}

// Stages both operands of a block's own tile, and loads the warp's rows of its own one as fragments of operand A.
template <typename T>
__device__ __forceinline__ void load_own(unsigned (&fragments)[D_256 / 16][1][4], T *tiles, Matrix<const T> first,
                                         Matrix<const T> second, int valid, int warp_row, int role) {
    stage_async<D_256, M_256, THREADS_256>(tiles, first.data, first.stride, valid, D_256);
    stage_async<D_256, M_256, THREADS_256>(tiles + M_256 * D_256, second.data, second.stride, valid, D_256);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < D_256 / 16; step++)
        load_a_fragments<D_256>(fragments[step], tiles + role * M_256 * D_256, warp_row, step);
    // No warp reads what the first tiles of the loop are written over.
    __syncthreads();
}

template <bool CAUSAL, typename T>
__device__ __forceinline__ void keys_backward_256(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                                  const Shape &shape, const BackwardInputs<T> &inputs, Matrix<T> d_qkv,
                                                  int key_head, int slot) {
    constexpr int D = D_256, M = M_256, N = N_256, COLUMNS = N / 8;
    // [2, queries and gradients, N, D], for two tiles; before that the block's keys and values, in the end their gradients.
    ARL_SHARED(T, tiles);
    // [PAIRS, 16, N]: probabilities. [2, 2, N]: log_sum_exp (of base 2) and delta, for two tiles.
    float *probabilities = reinterpret_cast<float *>(tiles + 4 * N * D), *statistics = probabilities + 2 * PAIRS * 16 * N;
    Tile tile = tile_at(shape, M, slot);
    if (tile.first >= tile.length) return;
    // Tokens are numbered through the batch.
    int first = tile.start + tile.first, sequence_end = tile.start + tile.length, end = min(first + M, sequence_end);
    int group = shape.query_heads / shape.key_heads;
    // The end of the queries that see a key of the tile.
    int query_end = int(min((long long)sequence_end, end - 1 + (long long)shape.window));
    const int first_query = CAUSAL ? first : tile.start;
    int head = key_head * group, query = first_query;

    // Stages the next tile of queries in one half of the buffers.
    auto stage_queries = [&](int half) {
        T *to = tiles + half * 2 * N * D;
        stage_async<D, N, THREADS_256>(to, q.at(query, head * D), q.stride, query_end - query, D);
        stage_async<D, N, THREADS_256>(to + N * D, inputs.d_out.at(query, head * D), inputs.d_out.stride, query_end - query, D);
        cp_async_commit();
    };
    // Its LSE and delta, one number a thread; a query beyond the end has probabilities of zero.
    auto load_statistic = [&]() {
        int i = query + threadIdx.x % N;
        bool is_delta = threadIdx.x >= N;
        if (i >= query_end) return is_delta ? 0.0f : INFINITY;
        long long at = (long long)head * shape.tokens + i;
        return is_delta ? inputs.delta[at] : inputs.log_sum_exp[at] * LOG2_E;
    };
    int warp = warp_number(), role = warp / PAIRS, warp_row = warp % PAIRS * 16, row = first + warp_row;
    // Not the number of a token, so that the loop has a register less to keep.
    int lane = threadIdx.x % 32, rows = end - first;
    unsigned own[D / 16][1][4];
    load_own<T>(own, tiles, {k.at(first, key_head * D), k.stride}, {v.at(first, key_head * D), v.stride}, rows, warp_row, role);
    stage_queries(0);
    if (threadIdx.x < 2 * N) statistics[threadIdx.x] = load_statistic();

    float *given = probabilities + warp % PAIRS * 16 * N, scale_log2 = shape.scale * LOG2_E;
    // Of values where `role` is 0, else of keys.
    float gradient[1][D / 8][4];
    fill(gradient, 0);
    for (int half = 0; head < (key_head + 1) * group; half ^= 1) {
        cp_async_wait<0>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        int current = query;
        query += N;
        if (query >= query_end) {
            query = first_query;
            head++;
        }
        float next = 0;
        if (head < (key_head + 1) * group) {
            stage_queries(half ^ 1);
            if (threadIdx.x < 2 * N) next = load_statistic();
        }
        const T *tile_of_role = tiles + (half * 2 + role) * N * D, *other_tile = tiles + (half * 2 + 1 - role) * N * D;
        const float *lse_log2 = statistics + half * 2 * N, *delta = lse_log2 + N;
        bool needed = warp_row < rows && any_visible<CAUSAL>(shape, current, current + N, row, row + 16);
        // Transposed: [keys, queries].
        float s[1][COLUMNS][4];
        if (needed) {
            fill(s, 0);
#pragma unroll
            for (int i = 0; i < D / 16; i++) gemm_abt<D>(s, own[step_256(i)], tile_of_role, step_256(i));
            if (role == 0) {
                // Gradients of keys behind the sequence's end are not stored.
                bool all = !CAUSAL || all_visible<CAUSAL>(shape, current, current + N, row, row + 16, end);
                int distance = current + lane % 4 * 2 - row - lane / 4;
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float x = exp2_fast(s[0][n][e] * scale_log2 - lse_log2[n * 8 + lane % 4 * 2 + e % 2]);
                        bool visible = is_visible<CAUSAL>(shape, distance + (n * 8 + e % 2 - e / 2 * 8), 1);
                        s[0][n][e] = all || visible ? x : 0;
                    }
                give(given, s);
            } else {
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[0][n][e] -= delta[n * 8 + lane % 4 * 2 + e % 2];
            }
        }
        if (threadIdx.x < 2 * N) statistics[(half ^ 1) * 2 * N + threadIdx.x] = next;
        // The probabilities are here.
        __syncthreads();
        if (needed) {
            if (role == 1) multiply_by_given(s, given);
            gemm_ab<D>(gradient, s, other_tile);
        }
    }
    // No warp reads queries any more.
    __syncthreads();
    float factor[1][2];
    // Found again: kept over the loop, they would take registers that it lacks.
    role = warp_number() / PAIRS;
    warp_row = warp_number() % PAIRS * 16;
    fill(factor, role == 0 ? 1 : shape.scale);
    int first_column = (shape.query_heads + key_head + (role == 0 ? shape.key_heads : 0)) * D;
    store_tile<D>(gradient, factor, tiles + role * M * D, warp_row, end - first, d_qkv.at(first, first_column), d_qkv.stride,
                  D);
}

template <bool CAUSAL, typename T>
__device__ __forceinline__ void queries_backward_256(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                                     const Shape &shape, const BackwardInputs<T> &inputs,
                                                     Matrix<T> d_qkv, int head, int slot) {
    constexpr int D = D_256, M = M_256, N = N_256, COLUMNS = N / 8;
    // [2, keys and values, N, D], for two tiles; before that the block's queries and gradients, in the end the gradients of queries.
    ARL_SHARED(T, tiles);
    // [2, PAIRS, 16, N]: probabilities, and the differences of their gradients from delta.
    float *exchanged = reinterpret_cast<float *>(tiles + 4 * N * D);
    Tile tile = tile_at(shape, M, slot);
    if (tile.first >= tile.length) return;
    int first = tile.start + tile.first, sequence_end = tile.start + tile.length, end = min(first + M, sequence_end);
    int key_head = head / (shape.query_heads / shape.key_heads), key_end = CAUSAL ? end : sequence_end;
    int key = tile.start + max(tile.first + 1 - shape.window, 0) / N * N;
    auto stage_keys = [&](int key) {
        T *to = tiles + key / N % 2 * 2 * N * D;
        stage_async<D, N, THREADS_256>(to, k.at(key, key_head * D), k.stride, key_end - key, D);
        stage_async<D, N, THREADS_256>(to + N * D, v.at(key, key_head * D), v.stride, key_end - key, D);
        cp_async_commit();
    };
    int warp = warp_number(), role = warp / PAIRS, warp_row = warp % PAIRS * 16, row = first + warp_row;
    int lane = threadIdx.x % 32;
    unsigned own[D / 16][1][4];
    load_own<T>(own, tiles, {q.at(first, head * D), q.stride}, {inputs.d_out.at(first, head * D), inputs.d_out.stride}, end - first,
                warp_row, role);
    stage_keys(key);

    float scale_log2 = shape.scale * LOG2_E, statistic[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        long long at = (long long)head * shape.tokens + min(row + i * 8 + lane / 4, sequence_end - 1);
        statistic[i] = role == 0 ? inputs.log_sum_exp[at] * LOG2_E : inputs.delta[at];
    }
    float *mine = exchanged + warp * 16 * N, *others = exchanged + (warp + PAIRS) % (2 * PAIRS) * 16 * N;
    // Columns from D / 2 `role` on.
    float d_q[1][D / 16][4];
    fill(d_q, 0);
    for (; key < key_end; key += N) {
        cp_async_wait<0>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        if (key + N < key_end) stage_keys(key + N);
        const T *k_tile = tiles + key / N % 2 * 2 * N * D;
        bool needed = row < end && any_visible<CAUSAL>(shape, row, row + 16, key, key + N);
        float s[1][COLUMNS][4];
        if (needed) {
            fill(s, 0);
#pragma unroll
            for (int i = 0; i < D / 16; i++) gemm_abt<D>(s, own[step_256(i)], k_tile + role * N * D, step_256(i));
            if (role == 0) {
                bool all = all_visible<CAUSAL>(shape, row, row + 16, key, key + N, key_end);
                int distance = row + lane / 4 - key - lane % 4 * 2, left = key_end - key - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float x = exp2_fast(s[0][n][e] * scale_log2 - statistic[e / 2]);
                        bool visible = is_visible<CAUSAL>(shape, distance + (e / 2 * 8 - n * 8 - e % 2), left - n * 8 - e % 2);
                        s[0][n][e] = all || visible ? x : 0;
                    }
            } else {
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[0][n][e] -= statistic[e / 2];
            }
            give(mine, s);
        }
        // What the other warp of the pair computed is here.
        __syncthreads();
        if (!needed) continue;
        multiply_by_given(s, others);
        gemm_ab<D>(d_q, s, k_tile + role * (D / 2));
    }
    // No warp reads keys any more.
    __syncthreads();
    float scales[1][2];
    fill(scales, shape.scale);
    store_tile<D / 2>(d_q, scales, tiles + role * M * (D / 2), warp_row, end - first,
                      d_qkv.at(first, head * D + role * (D / 2)), d_qkv.stride, D / 2);
}

} // namespace attention
