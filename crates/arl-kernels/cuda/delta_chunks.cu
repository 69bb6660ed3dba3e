// The gated delta rule by chunks, what needs no state: the gates of each token; the decays of a chunk and the inverse by which its tokens'
// writes depend on each other; and the outputs, once the states before chunks and what is written are known (`delta_states.cu`).
//
// A block has a chunk of a sequence, with a key head and the value heads that share it (decays, inverses), or with a value head
// (outputs), so that all chunks are computed at once.
#include "delta.cuh"

namespace delta {

// Added to the sum of squares of a query or a key.
constexpr float EPSILON = 1e-6f;
// A decay below this counts as none left, as on the CPU.
constexpr float FORGOTTEN = 1e-30f;

__device__ __forceinline__ float softplus(float x) { return x > LINEAR ? x : log1pf(expf(x)); }

// One over the length of a row of `dim` elements, for all lanes of a warp.
template <typename T> __device__ __forceinline__ float unit_factor(const T *row, int dim) {
    float squares = 0;
    for (int i = threadIdx.x % 32; i < dim; i += 32) squares += load(row[i]) * load(row[i]);
    return 1.0f / sqrtf(warp_sum(squares) + EPSILON);
}

// A warp has a token: the logarithm of its decay and the strength of its write, [value heads, T] each, and what brings its queries and
// keys to unit length, [key heads, T] each.
template <typename T>
__device__ __forceinline__ void gates(const T *qkv, const T *rows, long long stride, const T *a_log, const T *dt_bias,
                                      const Shape &shape, float *g, float *beta, float *query_factors,
                                      float *key_factors) {
    const int token = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= shape.tokens) return;
    for (int head = lane; head < shape.value_heads; head += 32) {
        const float a = load(rows[token * stride + shape.value_heads + head]) + load(dt_bias[head]);
        g[head * (long long)shape.tokens + token] = -expf(load(a_log[head])) * softplus(a);
        beta[head * (long long)shape.tokens + token] = sigmoid(load(rows[token * stride + head]));
    }
    for (int head = 0; head < shape.key_heads; head++) {
        const float of_query = unit_factor(shape.query(qkv, token, head), shape.key_dim);
        const float of_key = unit_factor(shape.key(qkv, token, head), shape.key_dim);
        if (lane == 0) {
            query_factors[head * (long long)shape.tokens + token] = of_query;
            key_factors[head * (long long)shape.tokens + token] = of_key;
        }
    }
}

// From the inverses of the diagonal blocks of SIZE rows to those of twice as many: below the diagonal `-A22 M21 A11`. What `m` holds
// there is lost.
template <int SIZE> __device__ __forceinline__ void join_inverses(float *m, float *a) {
    constexpr int EACH = CHUNK / (2 * SIZE) * SIZE * SIZE / THREADS;
    float sums[EACH];
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int x = 0; x < EACH; x++) {
            const int at = x * THREADS + threadIdx.x, pair = at / (SIZE * SIZE) * 2 * SIZE;
            const int i = at / SIZE % SIZE, j = at % SIZE;
            // The first product's right side is the block's own columns of the inverse, the second one's the first product.
            const float *left = half == 0 ? m + (pair + SIZE + i) * CHUNK_STRIDE + pair
                                          : a + (pair + SIZE + i) * CHUNK_STRIDE + pair + SIZE;
            const float *right = half == 0 ? a + pair * CHUNK_STRIDE + pair + j
                                           : m + (pair + SIZE) * CHUNK_STRIDE + pair + j;
            float sum = 0;
            for (int k = 0; k < SIZE; k++) sum += left[k] * right[k * CHUNK_STRIDE];
            sums[x] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int x = 0; x < EACH; x++) {
            const int at = x * THREADS + threadIdx.x, pair = at / (SIZE * SIZE) * 2 * SIZE;
            const int to = (pair + SIZE + at / SIZE % SIZE) * CHUNK_STRIDE + pair + at % SIZE;
            if (half == 0) m[to] = sums[x];
            else a[to] = -sums[x];
        }
        __syncthreads();
    }
}

// `a`, the inverse of `I + m`, where `m` is strictly lower-triangular: blocks of 16 rows on the diagonal by forward substitution, a thread a
// column, then the blocks below them. `m` is lost.
__device__ __forceinline__ void invert(float *m, float *a) {
    constexpr int SIZE = 16;
    for (int i = threadIdx.x; i < CHUNK * CHUNK; i += THREADS)
        if (i / CHUNK / SIZE < i % CHUNK / SIZE) a[i / CHUNK * CHUNK_STRIDE + i % CHUNK] = 0;
    if (threadIdx.x < CHUNK) {
        const int first = threadIdx.x / SIZE * SIZE, column = threadIdx.x % SIZE;
        m += first * (CHUNK_STRIDE + 1);
        float *own = a + first * (CHUNK_STRIDE + 1) + column;
        float x[SIZE];
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
            for (int j = 0; j < i; j++) x[i] -= m[i * CHUNK_STRIDE + j] * x[j];
            own[i * CHUNK_STRIDE] = x[i];
        }
        m -= first * (CHUNK_STRIDE + 1);
    }
    __syncthreads();
    join_inverses<SIZE>(m, a);
    join_inverses<2 * SIZE>(m, a);
}

// `decays` and `inverses`, [places of chunks, value heads, CHUNK, CHUNK]: `D` and `A`. `from_start` and `to_end`, [value heads, T]: `e` and `r`.
template <typename T>
__device__ __forceinline__ void prepare(const T *qkv, const float *g, const float *beta, const float *key_factors,
                                        const Shape &shape, float *decays, float *inverses, float *from_start,
                                        float *to_end) {
    ARL_SHARED(float, products);
    float *m = products + CHUNK * CHUNK_STRIDE, *a = m + CHUNK * CHUNK_STRIDE;
    float *factors = a + CHUNK * CHUNK_STRIDE, *strengths = factors + CHUNK, *steps = strengths + CHUNK;
    T *keys = reinterpret_cast<T *>(steps + CHUNK);
    const int slot = blockIdx.x / shape.key_heads, key_head = blockIdx.x % shape.key_heads, thread = threadIdx.x;
    const Chunk chunk = chunk_at(shape, slot);
    if (chunk.n == 0) return;
    const int width = row_stride<T>(shape.key_dim);
    stage_rows(keys, shape.key(qkv, chunk.start, key_head), shape.channels(), chunk.n, shape.key_dim);
    if (thread < CHUNK)
        factors[thread] =
            thread < chunk.n ? key_factors[key_head * (long long)shape.tokens + chunk.start + thread] : 0.0f;
    __syncthreads();
    const int row = thread / 32 % 4 * 16, column = thread / 128 * 32;
    if (row + 16 > column) {
        float sums[4][4];
        clear(sums);
        multiply<TENSOR<T>, true, true>(
            sums, 0, padded(shape.key_dim), [&](int i, int k) { return load(keys[(row + i) * width + k]); },
            [&](int k, int j) { return load(keys[(column + j) * width + k]); });
        each(sums, [&](int i, int j, float sum) {
            products[(row + i) * CHUNK_STRIDE + column + j] = sum * factors[row + i] * factors[column + j];
        });
    }
    for (int head = key_head * shape.group(); head < (key_head + 1) * shape.group(); head++) {
        const long long at = head * (long long)shape.tokens + chunk.start;
        const long long square = ((long long)slot * shape.value_heads + head) * CHUNK * CHUNK;
        if (thread < CHUNK) {
            steps[thread] = thread < chunk.n ? expf(g[at + thread]) : 1.0f;
            strengths[thread] = thread < chunk.n ? beta[at + thread] : 0.0f;
        }
        __syncthreads();
        // A thread a column of the decays, from one row to the next: nothing overflows where a head forgets at once, and no
        // difference of large sums is formed. One more thread has the column of what was before the chunk.
        if (thread <= CHUNK) {
            float decay = thread < CHUNK ? 0.0f : 1.0f;
            for (int i = 0; i < CHUNK; i++) {
                decay *= steps[i];
                if (decay < FORGOTTEN) decay = 0;
                if (i == thread) decay = 1;
                if (thread < CHUNK) m[i * CHUNK_STRIDE + thread] = decay;
                else if (i < chunk.n) from_start[at + i] = decay;
            }
        }
        __syncthreads();
        for (int x = thread; x < CHUNK * CHUNK; x += THREADS) {
            const int i = x / CHUNK, j = x % CHUNK, to = i * CHUNK_STRIDE + j;
            const float decay = m[to];
            decays[square + x] = decay;
            if (i == CHUNK - 1 && j < chunk.n) to_end[at + j] = decay;
            m[to] = j < i ? strengths[i] * (products[to] * decay) : 0.0f;
        }
        __syncthreads();
        invert(m, a);
        for (int x = thread; x < CHUNK * CHUNK; x += THREADS)
            inverses[square + x] = a[x / CHUNK * CHUNK_STRIDE + x % CHUNK];
    }
}

// `O = diag(e) Q S + P N` of a chunk and a value head: `before`, [places, value heads, key_dim, value_dim], are the states before chunks,
// `written`, [T, value heads, value_dim], is `N`.
template <typename T>
__device__ __forceinline__ void outputs(const T *qkv, const float *query_factors, const float *key_factors,
                                        const float *decays, const float *from_start, const float *before,
                                        const float *written, const Shape &shape, float scale, T *out) {
    ARL_SHARED(float, scores);
    float *rows = scores + CHUNK * CHUNK_STRIDE, *columns = rows + CHUNK, *outer = columns + CHUNK;
    T *queries = reinterpret_cast<T *>(outer + CHUNK);
    // The keys; once their products with the queries are known, columns of the state and of what is written.
    T *keys = queries + CHUNK * row_stride<T>(shape.key_dim);
    float *tile = reinterpret_cast<float *>(keys), *state = tile + CHUNK * COLUMNS_STRIDE;
    const int slot = blockIdx.x / shape.value_heads, head = blockIdx.x % shape.value_heads, thread = threadIdx.x;
    const int key_head = head / shape.group(), width = row_stride<T>(shape.key_dim), steps = padded(shape.key_dim);
    const Chunk chunk = chunk_at(shape, slot);
    if (chunk.n == 0) return;
    const long long channels = shape.channels();
    stage_rows(queries, shape.query(qkv, chunk.start, key_head), channels, chunk.n, shape.key_dim);
    stage_rows(keys, shape.key(qkv, chunk.start, key_head), channels, chunk.n, shape.key_dim);
    if (thread < CHUNK) {
        const bool there = thread < chunk.n;
        const long long at = key_head * (long long)shape.tokens + chunk.start + thread;
        rows[thread] = there ? query_factors[at] * scale : 0.0f;
        columns[thread] = there ? key_factors[at] : 0.0f;
        outer[thread] = there ? from_start[head * (long long)shape.tokens + chunk.start + thread] : 0.0f;
    }
    __syncthreads();
    const int row = thread / 32 % 4 * 16;
    {
        const int column = thread / 128 * 32;
        const float *decay = decays + ((long long)slot * shape.value_heads + head) * CHUNK * CHUNK;
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
    before += ((long long)slot * shape.value_heads + head) * shape.state();
    const long long first = chunk.start * shape.values() + head * shape.value_dim;
    for (int value = 0; value < shape.value_dim; value += COLUMNS) {
        const int valid = min(COLUMNS, shape.value_dim - value), column = thread / 128 * 16;
        __syncthreads();
        stage_columns(tile, CHUNK, written + first + value, shape.values(), chunk.n, valid);
        if (!chunk.first) stage_columns(state, steps, before + value, shape.value_dim, shape.key_dim, valid);
        __syncthreads();
        float sums[2][4];
        clear(sums);
        if (!chunk.first) {
            multiply<TENSOR<T>, true, false>(
                sums, 0, steps, [&](int i, int k) { return load(queries[(row + i) * width + k]); },
                [&](int k, int j) { return state[k * COLUMNS_STRIDE + column + j]; });
            each(sums, [&](int i, int, float &sum) { sum *= rows[row + i] * outer[row + i]; });
        }
        multiply<TENSOR<T>, false, false>(
            sums, 0, row + 16, [&](int i, int k) { return scores[(row + i) * CHUNK_STRIDE + k]; },
            [&](int k, int j) { return tile[k * COLUMNS_STRIDE + column + j]; });
        each(sums, [&](int i, int j, float sum) {
            i += row, j += column;
            if (i < chunk.n && j < valid) out[first + i * shape.values() + value + j] = store<T>(sum);
        });
    }
}

} // namespace delta

#define CHUNKS(name, T)                                                                                                \
    ARL_KERNEL(gated_delta_gates_##name, delta::THREADS, const T *qkv, const T *rows, long long stride,                \
               const T *a_log, const T *dt_bias, DELTA_SHAPE, float *g, float *beta, float *query_factors,             \
               float *key_factors) {                                                                                   \
        delta::gates(qkv, rows, stride, a_log, dt_bias, DELTA_SHAPE_VALUES, g, beta, query_factors, key_factors);      \
    }                                                                                                                  \
    ARL_KERNEL(gated_delta_chunks_##name, delta::THREADS, const T *qkv, const float *g, const float *beta,             \
               const float *key_factors, DELTA_SHAPE, float *decays, float *inverses, float *from_start,               \
               float *to_end) {                                                                                        \
        delta::prepare(qkv, g, beta, key_factors, DELTA_SHAPE_VALUES, decays, inverses, from_start, to_end);           \
    }                                                                                                                  \
    ARL_KERNEL(gated_delta_outputs_##name, delta::THREADS, const T *qkv, const float *query_factors,                   \
               const float *key_factors, const float *decays, const float *from_start, const float *before,            \
               const float *written, DELTA_SHAPE, float scale, T *out) {                                               \
        delta::outputs(qkv, query_factors, key_factors, decays, from_start, before, written, DELTA_SHAPE_VALUES,       \
                       scale, out);                                                                                    \
    }
ARL_FOR_TYPES(CHUNKS)
#undef CHUNKS
