// The gated delta rule's backward pass by chunks, what needs no order of chunks. With `X = A^T dN` and the gradients `dS` of the states
// after chunks, which a pass along the chunks finds between the first of these kernels and the others (`delta_states.cu`):
//   dV = diag(beta) X       dP = lower(dO N^T)        dM = -strictly lower(X N^T)
//   Z = dO S^T              Y = X S^T                 W = N dS^T
//   dQ = (dP . D) K + diag(e) Z
//   dK = (dP . D)^T Q + diag(r) W - diag(beta e) Y + (F + F^T) K                    F = diag(beta) (dM . D)
//   dbeta = rowsum(X . V) - e rowsum(K . Y) + rowsum(dM . D . K K^T)
//   dG = rowsum(C) - colsum(C) + e rowsum(Q . Z) - r rowsum(K . W) - beta e rowsum(K . Y)      C = dP . P + dM . M
//   dG_n += e_n sum(S . dS) + sum(r rowsum(K . W))
// and `dg` is the reversed cumulative sum of `dG`. (`X . K S` summed over a row is `K . Y` summed over it.)
//
// `local`: a block has a chunk and a value head. `within` and `between`: a block has a chunk and a key head, with the value heads that share it one
// after the other, so that the sums over them have one order; the first adds up what goes through the chunk's own tokens, the second what
// goes through the states.
#include "delta.cuh"

namespace delta {

// `d_written` becomes `P^T dO`, and `d_after` of each chunk but the first of a sequence `(diag(e) Q)^T dO`.
template <typename T>
__device__ __forceinline__ void local(const T *qkv, const T *d_out, const float *query_factors, const float *key_factors,
                                      const float *decays, const float *from_start, const Shape &shape, float scale,
                                      float *d_written, float *d_after) {
    ARL_SHARED(float, scores);
    float *rows = scores + CHUNK * CHUNK_STRIDE, *columns = rows + CHUNK, *outer = columns + CHUNK;
    T *queries = reinterpret_cast<T *>(outer + CHUNK);
    // The keys; once their products with the queries are known, columns of the output's gradient.
    T *keys = queries + CHUNK * row_stride<T>(shape.key_dim);
    float *tile = reinterpret_cast<float *>(keys);
    const int slot = blockIdx.x / shape.value_heads, head = blockIdx.x % shape.value_heads, thread = threadIdx.x;
    const int key_head = head / shape.group(), width = row_stride<T>(shape.key_dim), steps = padded(shape.key_dim);
    const Chunk chunk = chunk_at(shape, slot);
    if (chunk.n == 0) return;
    stage_rows(queries, shape.query(qkv, chunk.start, key_head), shape.channels(), chunk.n, shape.key_dim);
    stage_rows(keys, shape.key(qkv, chunk.start, key_head), shape.channels(), chunk.n, shape.key_dim);
    if (thread < CHUNK) {
        const bool there = thread < chunk.n;
        const long long at = key_head * (long long)shape.tokens + chunk.start + thread;
        rows[thread] = there ? query_factors[at] * scale : 0.0f;
        columns[thread] = there ? key_factors[at] : 0.0f;
        outer[thread] = there ? from_start[head * (long long)shape.tokens + chunk.start + thread] : 0.0f;
    }
    __syncthreads();
    const int warp = thread / 32, row = warp % 4 * 16;
    const long long place = (long long)slot * shape.value_heads + head;
    {
        const int column = warp / 4 * 32;
        const float *decay = decays + place * CHUNK * CHUNK;
        float sums[4][4];
        clear(sums);
        if (row + 16 > column)
            multiply<TENSOR<T>, true, true>(
                sums, 0, steps, [&](int i, int k) { return load(queries[(row + i) * width + k]); },
                [&](int k, int j) { return load(keys[(column + j) * width + k]); });
        each(sums, [&](int i, int j, float sum) {
            i += row, j += column;
            scores[i * CHUNK_STRIDE + j] = j <= i ? sum * rows[i] * columns[j] * decay[i * CHUNK + j] : 0.0f;
        });
    }
    d_after += place * shape.state();
    const long long first = chunk.start * shape.values() + head * shape.value_dim;
    for (int value = 0; value < shape.value_dim; value += COLUMNS) {
        const int valid = min(COLUMNS, shape.value_dim - value), column = warp / 4 * 16;
        __syncthreads();
        stage_columns(tile, CHUNK, d_out + first + value, shape.values(), chunk.n, valid);
        __syncthreads();
        float sums[2][4];
        clear(sums);
        multiply<TENSOR<T>, false, true>(
            sums, row, CHUNK, [&](int i, int k) { return scores[k * CHUNK_STRIDE + row + i]; },
            [&](int k, int j) { return tile[k * COLUMNS_STRIDE + column + j]; });
        each(sums, [&](int i, int j, float sum) {
            i += row, j += column;
            if (i < chunk.n && j < valid) d_written[first + i * shape.values() + value + j] = sum;
        });
        if (chunk.first) continue;
        for (int k = warp * 16; k < steps; k += WARPS * 16) {
            float state[4][4];
            clear(state);
            multiply<TENSOR<T>, false, true>(
                state, 0, CHUNK, [&](int i, int t) { return load(queries[t * width + k + i]) * rows[t] * outer[t]; },
                [&](int t, int j) { return tile[t * COLUMNS_STRIDE + j]; });
            each(state, [&](int i, int j, float sum) {
                i += k;
                if (i < shape.key_dim && j < valid) d_after[i * (long long)shape.value_dim + value + j] = sum;
            });
        }
    }
}

// What a chunk's own tokens add: the values in `qkv` become their gradients; `d_queries` and `d_keys`, [T, key heads, key_dim], are assigned, of
// queries and keys of unit length; `d_g` and `d_beta`, [value heads, T], get their parts, the former of `dG`.
template <typename T>
__device__ __forceinline__ void within(T *qkv, const T *d_out, const float *query_factors, const float *key_factors,
                                       const float *beta, const float *decays, const float *written,
                                       const float *d_written, const Shape &shape, float scale, float *d_queries,
                                       float *d_keys, float *d_g, float *d_beta) {
    ARL_SHARED(float, of_queries);
    float *of_keys = of_queries + CHUNK, *strength = of_keys + CHUNK;
    // Sums over a row by the two warps that share it, of `dG` and of the strength's gradient; over a column by the four; of `X . V`.
    float *rows = strength + CHUNK, *columns = rows + 4 * CHUNK, *of_values = columns + 4 * CHUNK;
    float *outputs = of_values + CHUNK, *ns = outputs + CHUNK * COLUMNS_STRIDE, *xs = ns + CHUNK * COLUMNS_STRIDE;
    // In the place of the columns of values, once all of them are used.
    float *square = outputs;
    T *queries = reinterpret_cast<T *>(xs + CHUNK * COLUMNS_STRIDE), *keys = queries + CHUNK * row_stride<T>(shape.key_dim);
    const int slot = blockIdx.x / shape.key_heads, key_head = blockIdx.x % shape.key_heads, thread = threadIdx.x;
    const int width = row_stride<T>(shape.key_dim), steps = padded(shape.key_dim);
    const Chunk chunk = chunk_at(shape, slot);
    if (chunk.n == 0) return;
    stage_rows(queries, shape.query(qkv, chunk.start, key_head), shape.channels(), chunk.n, shape.key_dim);
    stage_rows(keys, shape.key(qkv, chunk.start, key_head), shape.channels(), chunk.n, shape.key_dim);
    if (thread < CHUNK) {
        const bool there = thread < chunk.n;
        const long long at = key_head * (long long)shape.tokens + chunk.start + thread;
        of_queries[thread] = there ? query_factors[at] * scale : 0.0f;
        of_keys[thread] = there ? key_factors[at] : 0.0f;
    }
    __syncthreads();
    const int warp = thread / 32, lane = thread % 32, row = warp % 4 * 16, column = warp / 4 * 32;
    // The other warps' elements are above the diagonal.
    const bool below = row + 16 > column;
    float qk[4][4], kk[4][4], of_q[4][4], of_k[4][4];
    clear(qk), clear(kk), clear(of_q), clear(of_k);
    if (below) {
        multiply<TENSOR<T>, true, true>(
            qk, 0, steps, [&](int i, int k) { return load(queries[(row + i) * width + k]); },
            [&](int k, int j) { return load(keys[(column + j) * width + k]); });
        multiply<TENSOR<T>, true, true>(
            kk, 0, steps, [&](int i, int k) { return load(keys[(row + i) * width + k]); },
            [&](int k, int j) { return load(keys[(column + j) * width + k]); });
        each(qk, [&](int i, int j, float &x) { x *= of_queries[row + i] * of_keys[column + j]; });
        each(kk, [&](int i, int j, float &x) { x *= of_keys[row + i] * of_keys[column + j]; });
    }
    for (int head = key_head * shape.group(); head < (key_head + 1) * shape.group(); head++) {
        const long long at = head * (long long)shape.tokens + chunk.start;
        const long long first = chunk.start * shape.values() + head * shape.value_dim;
        T *values = shape.value(qkv, chunk.start, head);
        if (thread < CHUNK) strength[thread] = thread < chunk.n ? beta[at + thread] : 0.0f;
        float d_p[4][4], d_m[4][4], along_values = 0;
        clear(d_p), clear(d_m);
        for (int value = 0; value < shape.value_dim; value += COLUMNS) {
            const int valid = min(COLUMNS, shape.value_dim - value);
            __syncthreads();
            stage_columns(outputs, CHUNK, d_out + first + value, shape.values(), chunk.n, valid);
            stage_columns(ns, CHUNK, written + first + value, shape.values(), chunk.n, valid);
            stage_columns(xs, CHUNK, d_written + first + value, shape.values(), chunk.n, valid);
            __syncthreads();
            if (below) {
                auto n = [&](int k, int j) { return ns[(column + j) * COLUMNS_STRIDE + k]; };
                multiply<TENSOR<T>, true, false>(
                    d_p, 0, COLUMNS, [&](int i, int k) { return outputs[(row + i) * COLUMNS_STRIDE + k]; }, n);
                multiply<TENSOR<T>, false, false>(
                    d_m, 0, COLUMNS, [&](int i, int k) { return xs[(row + i) * COLUMNS_STRIDE + k]; }, n);
            }
            // Four threads have a token.
            const int token = thread / 4;
            if (token < chunk.n)
                for (int j = thread % 4; j < valid; j += 4) {
                    T &own = values[token * shape.channels() + value + j];
                    const float x = xs[token * COLUMNS_STRIDE + j];
                    along_values += x * load(own);
                    own = store<T>(strength[token] * x);
                }
        }
        along_values = row_sum(along_values);
        if (thread % 4 == 0) of_values[thread / 4] = along_values;
        const float *decay = decays + ((long long)slot * shape.value_heads + head) * CHUNK * CHUNK;
        float row_g[2] = {}, row_beta[2] = {};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float column_g[2] = {};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = row + lane / 4 + e / 2 * 8, j = column + 8 * n + lane % 4 * 2 + e % 2;
                // On the diagonal the decay is 1 and counts for nothing.
                if (j == i) of_q[n][e] += d_p[n][e];
                if (j >= i) continue;
                const float d = decay[i * CHUNK + j], of_m = -d_m[n][e] * d;
                of_q[n][e] += d_p[n][e] * d;
                of_k[n][e] += strength[i] * of_m;
                const float product = d_p[n][e] * (qk[n][e] * d) + strength[i] * of_m * kk[n][e];
                row_g[e / 2] += product;
                column_g[e % 2] += product;
                row_beta[e / 2] += of_m * kk[n][e];
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float sum = column_sum(column_g[e]);
                if (lane < 4) columns[row / 16 * CHUNK + column + 8 * n + lane * 2 + e] = sum;
            }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float of_g = row_sum(row_g[e]), of_beta = row_sum(row_beta[e]);
            const int to = column / 32 * CHUNK + row + lane / 4 + e * 8;
            if (lane % 4 == 0) rows[to] = of_g, rows[2 * CHUNK + to] = of_beta;
        }
        __syncthreads();
        if (thread < chunk.n) {
            float sum = rows[thread] + rows[CHUNK + thread];
            for (int w = 0; w < 4; w++) sum -= columns[w * CHUNK + thread];
            d_g[at + thread] = sum;
            d_beta[at + thread] = of_values[thread] + rows[2 * CHUNK + thread] + rows[3 * CHUNK + thread];
        }
    }
    // `E K`, then `E^T Q`, then `(F + F^T) K`, each element by one thread.
    const long long stride = (long long)shape.key_heads * shape.key_dim;
    const long long target = chunk.start * stride + key_head * shape.key_dim;
    for (int part = 0; part < 2; part++) {
        __syncthreads();
        auto put = [&](int i, int j, float x) {
            i += row, j += column;
            square[i * CHUNK_STRIDE + j] = j <= i ? x : 0.0f;
        };
        // Not by a pointer to one of them: both stay in registers.
        if (part == 0) each(of_q, put);
        else each(of_k, put);
        __syncthreads();
        for (int k = warp / 4 * 16; k < steps; k += 32) {
            float sums[2][4];
            clear(sums);
            if (part == 0) {
                multiply<TENSOR<T>, false, false>(
                    sums, 0, row + 16, [&](int i, int t) { return square[(row + i) * CHUNK_STRIDE + t]; },
                    [&](int t, int j) { return of_keys[t] * load(keys[t * width + k + j]); });
                each(sums, [&](int i, int j, float sum) {
                    i += row, j += k;
                    if (i < chunk.n && j < shape.key_dim) d_queries[target + i * stride + j] = sum;
                });
                clear(sums);
                multiply<TENSOR<T>, false, false>(
                    sums, row, CHUNK, [&](int i, int t) { return square[t * CHUNK_STRIDE + row + i]; },
                    [&](int t, int j) { return of_queries[t] * load(queries[t * width + k + j]); });
                each(sums, [&](int i, int j, float sum) {
                    i += row, j += k;
                    if (i < chunk.n && j < shape.key_dim) d_keys[target + i * stride + j] = sum;
                });
            } else {
                multiply<TENSOR<T>, false, false>(
                    sums, 0, CHUNK,
                    [&](int i, int t) {
                        return square[(row + i) * CHUNK_STRIDE + t] + square[t * CHUNK_STRIDE + row + i];
                    },
                    [&](int t, int j) { return of_keys[t] * load(keys[t * width + k + j]); });
                each(sums, [&](int i, int j, float sum) {
                    i += row, j += k;
                    if (i < chunk.n && j < shape.key_dim) d_keys[target + i * stride + j] += sum;
                });
            }
        }
    }
}

} // namespace delta

#define BACKWARD(name, T)                                                                                              \
    ARL_KERNEL_ALONE(gated_delta_local_##name, delta::THREADS, const T *qkv, const T *d_out,                           \
                     const float *query_factors, const float *key_factors, const float *decays,                        \
                     const float *from_start, DELTA_SHAPE, float scale, float *d_written, float *d_after) {            \
        delta::local(qkv, d_out, query_factors, key_factors, decays, from_start, DELTA_SHAPE_VALUES, scale, d_written, \
                     d_after);                                                                                         \
    }                                                                                                                  \
    ARL_KERNEL_ALONE(gated_delta_within_##name, delta::THREADS, T *qkv, const T *d_out, const float *query_factors,    \
                     const float *key_factors, const float *beta, const float *decays, const float *written,           \
                     const float *d_written, DELTA_SHAPE, float scale, float *d_queries, float *d_keys, float *d_g,    \
                     float *d_beta) {                                                                                  \
        delta::within(qkv, d_out, query_factors, key_factors, beta, decays, written, d_written, DELTA_SHAPE_VALUES,    \
                      scale, d_queries, d_keys, d_g, d_beta);                                                          \
    }
ARL_FOR_TYPES(BACKWARD)
#undef BACKWARD
