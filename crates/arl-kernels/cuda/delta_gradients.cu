// The end of the gated delta rule's backward pass: what goes through the states, to queries, keys and gates, and from the gates of each token to
// what they were computed from. The formulas are in `delta_backward.cu`.
#include "delta.cuh"

namespace delta {

// Shared memory of `between`: columns of values of the output's gradient, of `N` and of `X`, and as many rows of the states; factors of each
// token; sums over rows by the two warps that share each, of `Q . Z`, `K . W` and `K . Y`; `dG`; what the last token gets of each; sums of warps.
struct Between {
    float *outputs, *ns, *xs, *states, *d_states;
    float *of_queries, *of_keys, *outer, *inner, *strength;
    float *rows, *d_sums, *to_last, *totals;

    __device__ __forceinline__ explicit Between(float *shared) {
        constexpr int TILE = CHUNK * COLUMNS_STRIDE;
        outputs = shared;
        ns = outputs + TILE, xs = ns + TILE, states = xs + TILE, d_states = states + TILE;
        of_queries = d_states + TILE, of_keys = of_queries + CHUNK, outer = of_keys + CHUNK, inner = outer + CHUNK;
        strength = inner + CHUNK, rows = strength + CHUNK, d_sums = rows + 6 * CHUNK, to_last = d_sums + CHUNK;
        totals = to_last + CHUNK;
    }
};

// The gradient of a row that `factor` brought to unit length, and `scale` to what `d` is the gradient of; a warp has the row.
template <typename T>
__device__ __forceinline__ void unit_backward(T *row, const float *d, int dim, float factor, float scale) {
    float along = 0;
    for (int i = threadIdx.x % 32; i < dim; i += 32) along += d[i] * (load(row[i]) * factor);
    along = warp_sum(along);
    for (int i = threadIdx.x % 32; i < dim; i += 32)
        row[i] = store<T>(factor * scale * (d[i] - load(row[i]) * factor * along));
}

// `dg` of a chunk from `dG`, by one warp: each token's and those of all tokens behind it, and `rest`, which is the last token's.
__device__ __forceinline__ void sum_to_the_end(const float *d_sums, float rest, int n, float *d_g) {
    const int lane = threadIdx.x % 32, last = CHUNK - 1 - 2 * lane;
    const float own = d_sums[last], both = own + d_sums[last - 1];
    float sum = both;
    for (int distance = 1; distance < 32; distance *= 2) {
        const float behind = __shfl_up_sync(FULL, sum, distance);
        if (lane >= distance) sum += behind;
    }
    float behind = __shfl_up_sync(FULL, sum, 1);
    if (lane == 0) behind = 0;
    if (last < n) d_g[last] = behind + own + rest;
    if (last - 1 < n) d_g[last - 1] = sum + rest;
}

// What goes through the states: adds it to `d_queries` and `d_keys`, from which the queries and keys in `qkv` become their gradients, and to
// `d_beta`; `d_g` becomes the gates' own.
template <typename T>
__device__ __forceinline__ void between(T *qkv, const T *d_out, const float *query_factors, const float *key_factors,
                                        const float *beta, const float *from_start, const float *to_end,
                                        const float *written, const float *d_written, const float *before,
                                        const float *d_after, const Shape &shape, float scale, float *d_queries,
                                        float *d_keys, float *d_g, float *d_beta) {
    ARL_SHARED(float, shared);
    const Between at(shared);
    const int slot = blockIdx.x / shape.key_heads, key_head = blockIdx.x % shape.key_heads, thread = threadIdx.x;
    const Chunk chunk = chunk_at(shape, slot);
    if (chunk.n == 0) return;
    const int warp = thread / 32, lane = thread % 32, row = warp % 4 * 16, column = warp / 4 * 32;
    const long long of_key_head = key_head * (long long)shape.tokens + chunk.start;
    T *queries = shape.query(qkv, chunk.start, key_head), *keys = shape.key(qkv, chunk.start, key_head);
    const long long channels = shape.channels(), stride = (long long)shape.key_heads * shape.key_dim;
    d_queries += chunk.start * stride + key_head * shape.key_dim;
    d_keys += chunk.start * stride + key_head * shape.key_dim;
    if (thread < CHUNK) {
        at.of_queries[thread] = thread < chunk.n ? query_factors[of_key_head + thread] * scale : 0.0f;
        at.of_keys[thread] = thread < chunk.n ? key_factors[of_key_head + thread] : 0.0f;
    }
    for (int head = key_head * shape.group(); head < (key_head + 1) * shape.group(); head++) {
        const long long token = head * (long long)shape.tokens + chunk.start;
        const long long first = chunk.start * shape.values() + head * shape.value_dim;
        const long long state = ((long long)slot * shape.value_heads + head) * shape.state();
        if (thread < CHUNK) {
            const bool there = thread < chunk.n;
            at.strength[thread] = there ? beta[token + thread] : 0.0f;
            at.outer[thread] = there ? from_start[token + thread] : 0.0f;
            at.inner[thread] = there ? to_end[token + thread] : 0.0f;
        }
        float along[3][2] = {}, total = 0;
        for (int key = 0; key < shape.key_dim; key += CHUNK) {
            float z[4][4], y[4][4], w[4][4];
            clear(z), clear(y), clear(w);
            for (int value = 0; value < shape.value_dim; value += COLUMNS) {
                const int valid = min(COLUMNS, shape.value_dim - value), dim = min(CHUNK, shape.key_dim - key);
                const long long of_state = state + key * (long long)shape.value_dim + value;
                __syncthreads();
                if (!chunk.first) {
                    stage_columns(at.outputs, CHUNK, d_out + first + value, shape.values(), chunk.n, valid);
                    stage_columns(at.xs, CHUNK, d_written + first + value, shape.values(), chunk.n, valid);
                    stage_columns(at.states, CHUNK, before + of_state, shape.value_dim, dim, valid);
                }
                if (!chunk.last) {
                    stage_columns(at.ns, CHUNK, written + first + value, shape.values(), chunk.n, valid);
                    stage_columns(at.d_states, CHUNK, d_after + of_state, shape.value_dim, dim, valid);
                }
                __syncthreads();
                if (!chunk.first) {
                    auto transposed = [&](int k, int j) { return at.states[(column + j) * COLUMNS_STRIDE + k]; };
                    multiply<TENSOR<T>, true, false>(
                        z, 0, COLUMNS, [&](int i, int k) { return at.outputs[(row + i) * COLUMNS_STRIDE + k]; },
                        transposed);
                    multiply<TENSOR<T>, false, false>(
                        y, 0, COLUMNS, [&](int i, int k) { return at.xs[(row + i) * COLUMNS_STRIDE + k]; }, transposed);
                }
                if (!chunk.last)
                    multiply<TENSOR<T>, false, false>(
                        w, 0, COLUMNS, [&](int i, int k) { return at.ns[(row + i) * COLUMNS_STRIDE + k]; },
                        [&](int k, int j) { return at.d_states[(column + j) * COLUMNS_STRIDE + k]; });
                if (!chunk.first && !chunk.last)
                    for (int x = thread; x < CHUNK * COLUMNS; x += THREADS) {
                        const int place = x / COLUMNS * COLUMNS_STRIDE + x % COLUMNS;
                        total += at.states[place] * at.d_states[place];
                    }
            }
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = row + lane / 4 + e / 2 * 8, j = key + column + 8 * n + lane % 4 * 2 + e % 2;
                    if (i >= chunk.n || j >= shape.key_dim) continue;
                    const float of_z = at.outer[i] * z[n][e], of_w = at.inner[i] * w[n][e];
                    const float of_y = at.strength[i] * at.outer[i] * y[n][e];
                    d_queries[i * stride + j] += of_z;
                    d_keys[i * stride + j] += of_w - of_y;
                    const float of_key = load(keys[i * channels + j]) * at.of_keys[i];
                    along[0][e / 2] += load(queries[i * channels + j]) * at.of_queries[i] * z[n][e];
                    along[1][e / 2] += of_key * w[n][e];
                    along[2][e / 2] += of_key * y[n][e];
                }
        }
        total = warp_sum(total);
        if (lane == 0) at.totals[warp] = total;
#pragma unroll
        for (int what = 0; what < 3; what++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float sum = row_sum(along[what][e]);
                const int to = (2 * what + column / 32) * CHUNK + row + lane / 4 + e * 8;
                if (lane % 4 == 0) at.rows[to] = sum;
            }
        __syncthreads();
        if (thread < CHUNK) {
            const float of_z = at.rows[thread] + at.rows[CHUNK + thread];
            const float of_w = at.inner[thread] * (at.rows[2 * CHUNK + thread] + at.rows[3 * CHUNK + thread]);
            const float of_y = at.outer[thread] * (at.rows[4 * CHUNK + thread] + at.rows[5 * CHUNK + thread]);
            const bool there = thread < chunk.n;
            if (there) d_beta[token + thread] -= of_y;
            at.d_sums[thread] =
                there ? d_g[token + thread] + at.outer[thread] * of_z - of_w - at.strength[thread] * of_y : 0.0f;
            at.to_last[thread] = there ? of_w : 0.0f;
        }
        __syncthreads();
        if (warp == 0) {
            float rest = 0;
            for (int i = 0; i < WARPS; i++) rest += at.totals[i];
            rest = at.outer[chunk.n - 1] * rest + warp_sum(at.to_last[lane] + at.to_last[lane + 32]);
            sum_to_the_end(at.d_sums, rest, chunk.n, d_g + token);
        }
        __syncthreads();
    }
    for (int i = warp; i < chunk.n; i += WARPS) {
        const float of_query = query_factors[of_key_head + i], of_key = key_factors[of_key_head + i];
        unit_backward(queries + i * channels, d_queries + i * stride, shape.key_dim, of_query, scale);
        unit_backward(keys + i * channels, d_keys + i * stride, shape.key_dim, of_key, 1.0f);
    }
}

// `rows`, strengths and decays as they came, become their own gradients. A block has a value head of GATE_TOKENS tokens, and writes its part of
// the gradients of `a_log` and `dt_bias`, [parts, value heads], for `add_parts`.
template <typename T>
__device__ __forceinline__ void gates_backward(T *rows, long long stride, const T *a_log, const T *dt_bias, const float *g,
                                               const float *beta, const float *d_g, const float *d_beta,
                                               const Shape &shape, float *of_log, float *of_bias) {
    __shared__ float scratch[2][WARPS];
    const int head = blockIdx.x % shape.value_heads, part = blockIdx.x / shape.value_heads;
    const int first = part * GATE_TOKENS, end = min(first + GATE_TOKENS, shape.tokens);
    const float rate = expf(load(a_log[head])), bias = load(dt_bias[head]);
    float log_sum = 0, bias_sum = 0;
    for (int token = first + threadIdx.x; token < end; token += THREADS) {
        const long long at = head * (long long)shape.tokens + token;
        T *b = rows + token * stride + head, *a = b + shape.value_heads;
        const float x = load(*a) + bias, d = d_g[at] * -rate * (x > LINEAR ? 1.0f : sigmoid(x));
        log_sum += d_g[at] * g[at];
        bias_sum += d;
        *a = store<T>(d);
        *b = store<T>(d_beta[at] * beta[at] * (1.0f - beta[at]));
    }
    log_sum = group_sum(log_sum, scratch[0], 0, WARPS);
    bias_sum = group_sum(bias_sum, scratch[1], 0, WARPS);
    if (threadIdx.x == 0) of_log[blockIdx.x] = log_sum, of_bias[blockIdx.x] = bias_sum;
}

} // namespace delta

#define GRADIENTS(name, T)                                                                                             \
    ARL_KERNEL_ALONE(gated_delta_between_##name, delta::THREADS, T *qkv, const T *d_out, const float *query_factors,   \
                     const float *key_factors, const float *beta, const float *from_start, const float *to_end,        \
                     const float *written, const float *d_written, const float *before, const float *d_after,          \
                     DELTA_SHAPE, float scale, float *d_queries, float *d_keys, float *d_g, float *d_beta) {           \
        delta::between(qkv, d_out, query_factors, key_factors, beta, from_start, to_end, written, d_written, before,   \
                       d_after, DELTA_SHAPE_VALUES, scale, d_queries, d_keys, d_g, d_beta);                            \
    }                                                                                                                  \
    ARL_KERNEL(gated_delta_gates_backward_##name, delta::THREADS, T *rows, long long stride, const T *a_log,           \
               const T *dt_bias, const float *g, const float *beta, const float *d_g, const float *d_beta,             \
               DELTA_SHAPE, float *of_log, float *of_bias) {                                                           \
        delta::gates_backward(rows, stride, a_log, dt_bias, g, beta, d_g, d_beta, DELTA_SHAPE_VALUES, of_log,          \
                              of_bias);                                                                                \
    }
ARL_FOR_TYPES(GRADIENTS)
#undef GRADIENTS
