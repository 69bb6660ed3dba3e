// The gated delta rule's passes along the chunks of a sequence: the states before chunks and what is written, from the first chunk to the
// last; and back, the gradients of the states after chunks and of what is written.
//
// A block has COLUMNS columns of the state of one value head and goes over all chunks of one sequence with it in shared memory; blocks share
// nothing. What needs no state was computed before, of all chunks at once (`delta_chunks.cu`, `delta_backward.cu`).
#include "delta.cuh"

namespace delta {

// What a block of either pass has: its sequence and its columns of a value head.
struct Part {
    int sequence, head, value, valid;

    __device__ __forceinline__ explicit Part(const Shape &shape) {
        const int blocks = shape.value_blocks(), rest = blockIdx.x / blocks;
        value = blockIdx.x % blocks * COLUMNS;
        head = rest % shape.value_heads;
        sequence = rest / shape.value_heads;
        valid = min(COLUMNS, shape.value_dim - value);
    }
};

// Shared memory of both passes: the chunk's inverse, the state's columns, columns of the chunk, factors, keys.
template <typename T> struct Memory {
    float *inverse, *state, *tile;
    // Of each token: the strength, and two factors.
    float *strength, *outer, *inner;
    T *keys;

    __device__ __forceinline__ Memory(float *shared, int key_dim) {
        inverse = shared;
        state = inverse + CHUNK * CHUNK_STRIDE;
        tile = state + padded(key_dim) * COLUMNS_STRIDE;
        strength = tile + CHUNK * COLUMNS_STRIDE;
        outer = strength + CHUNK;
        inner = outer + CHUNK;
        keys = reinterpret_cast<T *>(inner + CHUNK);
    }
};

// What is known of each token, [heads, T] each.
struct Tokens {
    const float *beta, *key_factors, *from_start, *to_end;
};

// `written`, [T, value heads, value_dim]: `N`. `before`, [places of chunks, value heads, key_dim, value_dim]: the state before each chunk
// but the first of a sequence. `after`, if any, [sequences, value heads, key_dim, value_dim]: that after the last one.
template <typename T>
__device__ __forceinline__ void states(const T *qkv, const Tokens &known, const float *inverses, const Shape &shape,
                                       float *written, float *before, float *after) {
    ARL_SHARED(float, shared);
    const Memory<T> at(shared, shape.key_dim);
    const Part part(shape);
    const int key_head = part.head / shape.group(), width = row_stride<T>(shape.key_dim), dim = padded(shape.key_dim);
    const int thread = threadIdx.x, warp = thread / 32, row = warp % 4 * 16, column = warp / 4 * 16;
    const int start = shape.cu_seqlens[part.sequence], end = shape.cu_seqlens[part.sequence + 1];
    if (after != nullptr)
        after += ((long long)part.sequence * shape.value_heads + part.head) * shape.state() + part.value;
    if (start == end && after != nullptr)
        for (int i = thread; i < shape.key_dim * part.valid; i += THREADS)
            after[i / part.valid * (long long)shape.value_dim + i % part.valid] = 0;
    long long slot = first_slot(shape, part.sequence) * (long long)shape.value_heads + part.head;
    for (int first = start; first < end; first += CHUNK, slot += shape.value_heads) {
        const int n = min(CHUNK, end - first);
        const bool is_first = first == start, is_last = first + CHUNK >= end;
        stage_rows(at.keys, shape.key(qkv, first, key_head), shape.channels(), n, shape.key_dim);
        stage_square(at.inverse, inverses + slot * CHUNK * CHUNK);
        stage_columns(at.tile, CHUNK, shape.value(qkv, first, part.head) + part.value, shape.channels(), n, part.valid);
        if (thread < CHUNK) {
            const bool there = thread < n;
            const long long token = part.head * (long long)shape.tokens + first + thread;
            const float factor = there ? known.key_factors[key_head * (long long)shape.tokens + first + thread] : 0.0f;
            at.strength[thread] = there ? known.beta[token] : 0.0f;
            at.outer[thread] = there ? known.from_start[token] * factor : 0.0f;
            at.inner[thread] = there ? known.to_end[token] * factor : 0.0f;
        }
        const float decay = known.from_start[part.head * (long long)shape.tokens + first + n - 1];
        __syncthreads();
        float sums[2][4];
        clear(sums);
        if (!is_first)
            multiply<TENSOR<T>, true, false>(
                sums, 0, dim, [&](int i, int k) { return load(at.keys[(row + i) * width + k]); },
                [&](int k, int j) { return at.state[k * COLUMNS_STRIDE + column + j]; });
        each(sums, [&](int i, int j, float met) {
            i += row, j += column;
            float &value = at.tile[i * COLUMNS_STRIDE + j];
            value = at.strength[i] * (value - at.outer[i] * met);
        });
        __syncthreads();
        clear(sums);
        multiply<TENSOR<T>, false, false>(
            sums, 0, row + 16, [&](int i, int k) { return at.inverse[(row + i) * CHUNK_STRIDE + k]; },
            [&](int k, int j) { return at.tile[k * COLUMNS_STRIDE + column + j]; });
        __syncthreads();
        float *target = written + first * shape.values() + part.head * shape.value_dim + part.value;
        each(sums, [&](int i, int j, float sum) {
            i += row, j += column;
            if (i < n && j < part.valid) target[i * shape.values() + j] = sum;
            at.tile[i * COLUMNS_STRIDE + j] = at.inner[i] * sum;
        });
        __syncthreads();
        if (is_last && after == nullptr) break;
        // Where the next chunk finds it.
        float *next = is_last ? after : before + (slot + shape.value_heads) * shape.state() + part.value;
        for (int k = warp * 16; k < dim; k += WARPS * 16) {
            float state[4][4];
            clear(state);
            multiply<TENSOR<T>, true, false>(
                state, 0, CHUNK, [&](int i, int t) { return load(at.keys[t * width + k + i]); },
                [&](int t, int j) { return at.tile[t * COLUMNS_STRIDE + j]; });
            each(state, [&](int i, int j, float sum) {
                i += k;
                float &own = at.state[i * COLUMNS_STRIDE + j];
                own = is_first ? sum : decay * own + sum;
                if (i < shape.key_dim && j < part.valid) next[i * (long long)shape.value_dim + j] = own;
            });
        }
        __syncthreads();
    }
}

// From the last chunk to the first. `d_written`, as `written`, holds `P^T dO` and becomes `X = A^T dN`, the gradient of what the inverse is
// multiplied by, where `dN = P^T dO + diag(r) K dS`. `d_after`, as `before`, holds of each chunk but the first `(diag(e) Q)^T dO` and
// becomes `dS`, the gradient of the state after it: `e_n dS + (diag(e) Q)^T dO - (diag(beta e) K)^T X` is that of the state before.
template <typename T>
__device__ __forceinline__ void states_backward(const T *qkv, const Tokens &known, const float *inverses,
                                                const Shape &shape, float *d_written, float *d_after) {
    ARL_SHARED(float, shared);
    const Memory<T> at(shared, shape.key_dim);
    const Part part(shape);
    const int key_head = part.head / shape.group(), width = row_stride<T>(shape.key_dim), dim = padded(shape.key_dim);
    const int thread = threadIdx.x, warp = thread / 32, row = warp % 4 * 16, column = warp / 4 * 16;
    const int start = shape.cu_seqlens[part.sequence], end = shape.cu_seqlens[part.sequence + 1];
    const int chunks = (end - start + CHUNK - 1) / CHUNK;
    for (int number = chunks - 1; number >= 0; number--) {
        const int first = start + number * CHUNK, n = min(CHUNK, end - first);
        const bool is_first = number == 0, is_last = number == chunks - 1;
        const long long slot =
            (first_slot(shape, part.sequence) + number) * (long long)shape.value_heads + part.head;
        float *target = d_written + first * shape.values() + part.head * shape.value_dim + part.value;
        stage_rows(at.keys, shape.key(qkv, first, key_head), shape.channels(), n, shape.key_dim);
        stage_square(at.inverse, inverses + slot * CHUNK * CHUNK);
        stage_columns(at.tile, CHUNK, target, shape.values(), n, part.valid);
        if (thread < CHUNK) {
            const bool there = thread < n;
            const long long token = part.head * (long long)shape.tokens + first + thread;
            const float factor = there ? known.key_factors[key_head * (long long)shape.tokens + first + thread] : 0.0f;
            at.outer[thread] = there ? known.beta[token] * known.from_start[token] * factor : 0.0f;
            at.inner[thread] = there ? known.to_end[token] * factor : 0.0f;
        }
        const float decay = known.from_start[part.head * (long long)shape.tokens + first + n - 1];
        __syncthreads();
        float sums[2][4];
        if (!is_last) {
            clear(sums);
            multiply<TENSOR<T>, true, false>(
                sums, 0, dim, [&](int i, int k) { return load(at.keys[(row + i) * width + k]); },
                [&](int k, int j) { return at.state[k * COLUMNS_STRIDE + column + j]; });
            each(sums, [&](int i, int j, float sum) {
                at.tile[(row + i) * COLUMNS_STRIDE + column + j] += at.inner[row + i] * sum;
            });
            __syncthreads();
        }
        clear(sums);
        multiply<TENSOR<T>, false, false>(
            sums, row, CHUNK, [&](int i, int k) { return at.inverse[k * CHUNK_STRIDE + row + i]; },
            [&](int k, int j) { return at.tile[k * COLUMNS_STRIDE + column + j]; });
        __syncthreads();
        each(sums, [&](int i, int j, float sum) {
            i += row, j += column;
            if (i < n && j < part.valid) target[i * shape.values() + j] = sum;
            at.tile[i * COLUMNS_STRIDE + j] = at.outer[i] * sum;
        });
        __syncthreads();
        float *d_state = d_after + slot * shape.state() + part.value;
        for (int k = warp * 16; k < dim; k += WARPS * 16) {
            float state[4][4];
            clear(state);
            if (!is_first)
                multiply<TENSOR<T>, true, false>(
                    state, 0, CHUNK, [&](int i, int t) { return load(at.keys[t * width + k + i]); },
                    [&](int t, int j) { return at.tile[t * COLUMNS_STRIDE + j]; });
            each(state, [&](int i, int j, float sum) {
                i += k;
                const bool there = i < shape.key_dim && j < part.valid;
                float &own = at.state[i * COLUMNS_STRIDE + j], kept = is_last ? 0.0f : own;
                const long long place = i * (long long)shape.value_dim + j;
                const float local = there && !is_first ? d_state[place] : 0.0f;
                if (there && !is_last) d_state[place] = kept;
                own = decay * kept + local - sum;
            });
        }
        __syncthreads();
    }
}

} // namespace delta

#define STATES(name, T)                                                                                                \
    ARL_KERNEL_ALONE(gated_delta_states_##name, delta::THREADS, const T *qkv, const float *beta,                       \
                     const float *key_factors, const float *from_start, const float *to_end, const float *inverses,    \
                     DELTA_SHAPE, float *written, float *before, float *after) {                                       \
        delta::states(qkv, {beta, key_factors, from_start, to_end}, inverses, DELTA_SHAPE_VALUES, written, before,     \
                      after);                                                                                          \
    }                                                                                                                  \
    ARL_KERNEL_ALONE(gated_delta_states_backward_##name, delta::THREADS, const T *qkv, const float *beta,              \
                     const float *key_factors, const float *from_start, const float *to_end, const float *inverses,    \
                     DELTA_SHAPE, float *d_written, float *d_after) {                                                  \
        delta::states_backward(qkv, {beta, key_factors, from_start, to_end}, inverses, DELTA_SHAPE_VALUES, d_written,  \
                               d_after);                                                                               \
    }
ARL_FOR_TYPES(STATES)
#undef STATES
