// Causal attention over packed sequences, backward: gradients of q, k and v from that of `out`. Scores are computed again
// from the kept log-sum-exp; nothing is added by two blocks, so that sums have a fixed order.
//
// First `delta`, the scalar product of each row of `out` with its gradient. Then one launch with two kinds of blocks: the
// first ones own the gradients of a tile of keys and values of one key head, and go over the queries that see them, of
// all query heads of the group; the others own the gradients of a tile of queries and go over the keys that they see. Both
// compute the scores (seven products a pair of tiles instead of five), and share no sum. In either kind the blocks with
// the most to do go first.
//
// A block's own tile is the left operand, the other side the right one: what a warp's product leaves in registers is then
// the left operand of the next product, and no probabilities go by way of shared memory.
#include "attention.cuh"

namespace attention {

// `delta[head, token]`; packs of a row by as many lanes as it has, a warp a row where that does not go.
template <typename T>
__device__ __forceinline__ void delta(Matrix<const T> out, Matrix<const T> d_out, int heads, int dim, int tokens,
                                      float *result) {
    constexpr int SIZE = Pack<T>::SIZE;
    bool in_packs = packs(out.data, out.stride) && packs(d_out.data, d_out.stride) && dim % SIZE == 0 &&
                    32 % (dim / SIZE) == 0;
    int lanes = in_packs ? dim / SIZE : 32, lane = threadIdx.x % lanes;
    long long step = (long long)gridDim.x * THREADS / lanes, all = (long long)tokens * heads;
    // All lanes of a warp go on as long as one of them has a row.
    for (long long row = (blockIdx.x * (long long)THREADS + threadIdx.x) / lanes; row - threadIdx.x % 32 / lanes < all;
         row += step) {
        long long token = row / heads;
        int head = row % heads;
        float sum = 0;
        if (row < all) {
            const T *a = out.at(token, head * dim), *b = d_out.at(token, head * dim);
            if (in_packs) {
                Pack<T> x = load_pack(a + lane * SIZE), y = load_pack(b + lane * SIZE);
#pragma unroll
                for (int j = 0; j < SIZE; j++) sum += load(x.at[j]) * load(y.at[j]);
            } else {
                for (int i = lane; i < dim; i += 32) sum += load(a[i]) * load(b[i]);
            }
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(FULL, sum, distance);
        if (row < all && lane == 0) result[head * (long long)tokens + token] = sum;
    }
}

// What the backward pass reads beside the inputs: the gradient of `out`, and f32 [query_heads, tokens].
template <typename T> struct Results {
    Matrix<const T> d_out;
    const float *log_sum_exp, *delta;
};

// ---- Tensor cores.

// Rows of the other side's tiles.
constexpr int OTHERS = 32;

// Rows of a block's own tile: as many as leave registers for their gradients.
template <int D> constexpr int BLOCKS_OF_16 = D == 64 ? 2 : 1;
template <int D> constexpr int OWN = BLOCKS_OF_16<D> *16 * WARPS;

template <int D>
__device__ __forceinline__ void keys_backward_tensor(Matrix<const bf16> q, Matrix<const bf16> k, Matrix<const bf16> v,
                                                     const Shape &shape, const Results<bf16> &results,
                                                     Matrix<bf16> d_qkv, int key_head, int slot) {
    constexpr int BLOCKS = BLOCKS_OF_16<D>, COLUMNS = OTHERS / 8;
    ARL_SHARED(bf16, k_tile);
    bf16 *v_tile = k_tile + OWN<D> * D, *q_tiles = v_tile + OWN<D> * D, *d_out_tiles = q_tiles + 2 * OTHERS * D;
    // [2, 2, OTHERS]: log_sum_exp (of base 2) and delta, for two tiles.
    float *sums = reinterpret_cast<float *>(d_out_tiles + 2 * OTHERS * D);
    Tile tile = tile_at(shape, OWN<D>, slot);
    if (tile.first >= tile.length) return;
    int group = shape.query_heads / shape.key_heads, end = min(tile.first + OWN<D>, tile.length);
    // The end of the queries that see a key of the tile.
    int query_end = int(min((long long)tile.length, end - 1 + (long long)shape.window));
    int head = key_head * group, head_end = head + group, query = tile.first;

    // The next tile's, to the half of the buffers that is `at` elements from their beginning.
    auto stage_queries = [&](int at) {
        stage_async<D, OTHERS>(q_tiles + at, q.at(tile.start + query, head * D), q.stride, query_end - query);
        stage_async<D, OTHERS>(d_out_tiles + at, results.d_out.at(tile.start + query, head * D), results.d_out.stride,
                               query_end - query);
        cp_async_commit();
    };
    // One number of it a thread; a query that is not there has probabilities of zero.
    auto load_sum = [&]() {
        int i = query + threadIdx.x % OTHERS;
        bool is_delta = threadIdx.x >= OTHERS;
        if (i >= query_end) return is_delta ? 0.0f : INFINITY;
        long long at = (long long)head * shape.tokens + tile.start + i;
        return is_delta ? results.delta[at] : results.log_sum_exp[at] * LOG2_E;
    };
    stage_async<D, OWN<D>>(k_tile, k.at(tile.start + tile.first, key_head * D), k.stride, end - tile.first);
    stage_async<D, OWN<D>>(v_tile, v.at(tile.start + tile.first, key_head * D), v.stride, end - tile.first);
    stage_queries(0);
    if (threadIdx.x < 2 * OTHERS) sums[threadIdx.x] = load_sum();

    int lane = threadIdx.x % 32, own = warp_number() * 16 * BLOCKS, row = tile.first + own;
    float scale_log2 = shape.scale * LOG2_E;
    float d_k[BLOCKS][D / 8][4], d_v[BLOCKS][D / 8][4];
    fill(d_k, 0);
    fill(d_v, 0);
    for (int half = 0; head < head_end; half ^= 1) {
        cp_async_wait<0>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        int present = query;
        query += OTHERS;
        if (query >= query_end) {
            query = tile.first;
            head++;
        }
        float next = 0;
        if (head < head_end) {
            stage_queries((half ^ 1) * OTHERS * D);
            if (threadIdx.x < 2 * OTHERS) next = load_sum();
        }
        const bf16 *q_tile = q_tiles + half * OTHERS * D, *d_out_tile = d_out_tiles + half * OTHERS * D;
        const float *lse_log2 = sums + half * 2 * OTHERS, *delta = lse_log2 + OTHERS;
        if (row < end && any_sees(shape, present, present + OTHERS, row, row + 16 * BLOCKS)) {
            // Transposed: [keys, queries].
            float p[BLOCKS][COLUMNS][4], d_s[BLOCKS][COLUMNS][4];
            fill(p, 0);
            fill(d_s, 0);
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                unsigned a[BLOCKS][4];
                load_left<D>(a, k_tile, own, step);
                multiply_rows<D>(p, a, q_tile, step);
            }
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                unsigned a[BLOCKS][4];
                load_left<D>(a, v_tile, own, step);
                multiply_rows<D>(d_s, a, d_out_tile, step);
            }
            bool all = all_see(shape, present, present + OTHERS, row, row + 16 * BLOCKS);
            int distance = present + lane % 4 * 2 - row - lane / 4;
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    int column = n * 8 + lane % 4 * 2 + j;
                    float lse = lse_log2[column], delta_of = delta[column];
#pragma unroll
                    for (int m = 0; m < BLOCKS; m++)
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
        if (threadIdx.x < 2 * OTHERS) sums[(half ^ 1) * 2 * OTHERS + threadIdx.x] = next;
    }
    float ones[BLOCKS][2], scales[BLOCKS][2];
    fill(ones, 1);
    fill(scales, shape.scale);
    bf16 *target = d_qkv.at(tile.start + tile.first, (shape.query_heads + key_head) * D);
    store_tile<D>(d_k, scales, k_tile, own, end - tile.first, target, d_qkv.stride);
    store_tile<D>(d_v, ones, v_tile, own, end - tile.first, target + shape.key_heads * D, d_qkv.stride);
}

template <int D>
__device__ __forceinline__ void queries_backward_tensor(Matrix<const bf16> q, Matrix<const bf16> k,
                                                        Matrix<const bf16> v, const Shape &shape,
                                                        const Results<bf16> &results, Matrix<bf16> d_qkv, int head,
                                                        int slot) {
    constexpr int BLOCKS = BLOCKS_OF_16<D>, COLUMNS = OTHERS / 8;
    ARL_SHARED(bf16, q_tile);
    bf16 *d_out_tile = q_tile + OWN<D> * D, *k_tiles = d_out_tile + OWN<D> * D, *v_tiles = k_tiles + 2 * OTHERS * D;
    Tile tile = tile_at(shape, OWN<D>, slot);
    if (tile.first >= tile.length) return;
    int key_head = head / (shape.query_heads / shape.key_heads), end = min(tile.first + OWN<D>, tile.length);
    int key = max(tile.first + 1 - shape.window, 0) / OTHERS * OTHERS;
    auto stage_keys = [&](int key) {
        int at = key / OTHERS % 2 * OTHERS * D;
        stage_async<D, OTHERS>(k_tiles + at, k.at(tile.start + key, key_head * D), k.stride, end - key);
        stage_async<D, OTHERS>(v_tiles + at, v.at(tile.start + key, key_head * D), v.stride, end - key);
        cp_async_commit();
    };
    stage_async<D, OWN<D>>(q_tile, q.at(tile.start + tile.first, head * D), q.stride, end - tile.first);
    stage_async<D, OWN<D>>(d_out_tile, results.d_out.at(tile.start + tile.first, head * D), results.d_out.stride,
                           end - tile.first);
    stage_keys(key);

    int lane = threadIdx.x % 32, own = warp_number() * 16 * BLOCKS, row = tile.first + own;
    float scale_log2 = shape.scale * LOG2_E, lse_log2[BLOCKS][2], delta[BLOCKS][2];
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = min(row + m * 16 + half * 8 + lane / 4, tile.length - 1);
            long long at = (long long)head * shape.tokens + tile.start + i;
            lse_log2[m][half] = results.log_sum_exp[at] * LOG2_E;
            delta[m][half] = results.delta[at];
        }
    float d_q[BLOCKS][D / 8][4];
    fill(d_q, 0);
    for (; key < end; key += OTHERS) {
        cp_async_wait<0>();
        // This tile is here, and no warp reads the one before any more.
        __syncthreads();
        if (key + OTHERS < end) stage_keys(key + OTHERS);
        if (row >= end || !any_sees(shape, row, row + 16 * BLOCKS, key, key + OTHERS)) continue;
        const bf16 *k_tile = k_tiles + key / OTHERS % 2 * OTHERS * D, *v_tile = v_tiles + key / OTHERS % 2 * OTHERS * D;
        float p[BLOCKS][COLUMNS][4], d_s[BLOCKS][COLUMNS][4];
        fill(p, 0);
        fill(d_s, 0);
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            unsigned a[BLOCKS][4];
            load_left<D>(a, q_tile, own, step);
            multiply_rows<D>(p, a, k_tile, step);
        }
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            unsigned a[BLOCKS][4];
            load_left<D>(a, d_out_tile, own, step);
            multiply_rows<D>(d_s, a, v_tile, step);
        }
        bool all = all_see(shape, row, row + 16 * BLOCKS, key, key + OTHERS);
        int distance = row + lane / 4 - key - lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
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
    float scales[BLOCKS][2];
    fill(scales, shape.scale);
    store_tile<D>(d_q, scales, q_tile, own, end - tile.first, d_qkv.at(tile.start + tile.first, head * D),
                  d_qkv.stride);
}

// ---- CUDA cores: 8 own rows a warp, 32 rows a tile of the other side.

template <typename T>
__device__ __forceinline__ void keys_backward(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                              const Shape &shape, const Results<T> &results, Matrix<T> d_qkv,
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
    stage(k_tile, keys, k.at(tile.start + tile.first, key_head * dim), k.stride, end - tile.first, dim);
    stage(v_tile, keys, v.at(tile.start + tile.first, key_head * dim), v.stride, end - tile.first, dim);
    float scale_log2 = shape.scale * LOG2_E;
    float d_k[ROWS][STEPS], d_v[ROWS][STEPS];
    fill(d_k, 0);
    fill(d_v, 0);
    for (int head = key_head * group; head < (key_head + 1) * group; head++)
        for (int query = tile.first; query < query_end; query += 32) {
            __syncthreads();
            int there = query_end - query;
            stage(q_tile, 32, q.at(tile.start + query, head * dim), q.stride, there, dim);
            stage(d_out_tile, 32, results.d_out.at(tile.start + query, head * dim), results.d_out.stride, there, dim);
            __syncthreads();
            if (row >= end || !any_sees(shape, query, query + 32, row, row + ROWS)) continue;
            float p[ROWS], d_s[ROWS];
            scores(p, k_tile + warp * ROWS * stride, q_tile, dim);
            scores(d_s, v_tile + warp * ROWS * stride, d_out_tile, dim);
            long long at = (long long)head * shape.tokens + tile.start + query + lane;
            float lse_log2 = lane < there ? results.log_sum_exp[at] * LOG2_E : 0;
            float delta = lane < there ? results.delta[at] : 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                bool seen = lane < there && sees(shape, query + lane - row - r);
                p[r] = seen ? exp2f(p[r] * scale_log2 - lse_log2) : 0;
                d_s[r] = p[r] * (d_s[r] - delta);
            }
            show(weights, p);
            accumulate(d_v, weights, d_out_tile, dim);
            show(weights, d_s);
            accumulate(d_k, weights, q_tile, dim);
        }
    float ones[ROWS], scales[ROWS];
    fill(ones, 1);
    fill(scales, shape.scale);
    T *target = d_qkv.at(tile.start + row, (shape.query_heads + key_head) * dim);
    store_rows(d_k, scales, end - row, target, d_qkv.stride, dim);
    store_rows(d_v, ones, end - row, target + shape.key_heads * dim, d_qkv.stride, dim);
}

template <typename T>
__device__ __forceinline__ void queries_backward(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                                                 const Shape &shape, const Results<T> &results, Matrix<T> d_qkv,
                                                 int head, int slot) {
    int warp = warp_number(), lane = threadIdx.x % 32, dim = shape.dim, stride = row_stride(dim);
    int queries = blockDim.x / 32 * ROWS, key_head = head / (shape.query_heads / shape.key_heads);
    ARL_SHARED(float, q_tile);
    float *d_out_tile = q_tile + queries * stride, *k_tile = d_out_tile + queries * stride;
    float *v_tile = k_tile + 32 * stride, *weights = v_tile + 32 * stride + warp * ROWS * WEIGHTS_STRIDE;
    Tile tile = tile_at(shape, queries, slot);
    if (tile.first >= tile.length) return;
    int end = min(tile.first + queries, tile.length), row = tile.first + warp * ROWS, there = end - tile.first;
    stage(q_tile, queries, q.at(tile.start + tile.first, head * dim), q.stride, there, dim);
    stage(d_out_tile, queries, results.d_out.at(tile.start + tile.first, head * dim), results.d_out.stride, there, dim);
    float scale_log2 = shape.scale * LOG2_E, lse_log2[ROWS], delta[ROWS];
    for (int r = 0; r < ROWS; r++) {
        long long at = (long long)head * shape.tokens + tile.start + min(row + r, tile.length - 1);
        lse_log2[r] = results.log_sum_exp[at] * LOG2_E;
        delta[r] = results.delta[at];
    }
    float d_q[ROWS][STEPS];
    fill(d_q, 0);
    for (int key = max(tile.first + 1 - shape.window, 0) / 32 * 32; key < end; key += 32) {
        __syncthreads();
        stage(k_tile, 32, k.at(tile.start + key, key_head * dim), k.stride, end - key, dim);
        stage(v_tile, 32, v.at(tile.start + key, key_head * dim), v.stride, end - key, dim);
        __syncthreads();
        if (row >= end || !any_sees(shape, row, row + ROWS, key, key + 32)) continue;
        float p[ROWS], d_s[ROWS];
        scores(p, q_tile + warp * ROWS * stride, k_tile, dim);
        scores(d_s, d_out_tile + warp * ROWS * stride, v_tile, dim);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x = sees(shape, row + r - key - lane) ? exp2f(p[r] * scale_log2 - lse_log2[r]) : 0;
            d_s[r] = x * (d_s[r] - delta[r]);
        }
        show(weights, d_s);
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
        attention::delta<T>({out, out_stride}, {d_out, d_out_stride}, heads, dim, tokens, delta);                      \
    }
ARL_FOR_TYPES(DELTA)
#undef DELTA

// The blocks from `key_blocks` on own queries.
#define BACKWARD(name, T, keys_backward, queries_backward)                                                             \
    ARL_KERNEL(name, attention::THREADS, ATTENTION_INPUTS(T), const T *d_out, long long d_out_stride,                  \
               const float *log_sum_exp, const float *delta, T *d_qkv, int key_blocks) {                               \
        attention::Results<T> results = {{d_out, d_out_stride}, log_sum_exp, delta};                                   \
        attention::Matrix<T> d = {d_qkv, (long long)(query_heads + 2 * key_heads) * dim};                              \
        int block = blockIdx.x;                                                                                        \
        if (block < key_blocks) {                                                                                      \
            attention::keys_backward(ATTENTION_INPUT_VALUES, results, d, block % key_heads, block / key_heads);        \
        } else {                                                                                                       \
            int last = gridDim.x - 1 - block;                                                                          \
            attention::queries_backward(ATTENTION_INPUT_VALUES, results, d, last % query_heads, last / query_heads);   \
        }                                                                                                              \
    }
BACKWARD(attention_backward_f32, float, keys_backward<float>, queries_backward<float>)
BACKWARD(attention_backward_bf16, bf16, keys_backward<bf16>, queries_backward<bf16>)
BACKWARD(attention_backward_64_bf16, bf16, keys_backward_tensor<64>, queries_backward_tensor<64>)
BACKWARD(attention_backward_128_bf16, bf16, keys_backward_tensor<128>, queries_backward_tensor<128>)
#undef BACKWARD
