// What the kernels of the gated delta rule (Yang et al., 2024, arXiv 2412.06464, section 3.3) share: which chunk a block owns, tiles
// of a chunk in shared memory, and their products.
//
// Within a chunk of `n` tokens, of one value head, with K and Q of unit length (Q over the root of a head's size), `D[i, j]` the decay
// from token `j` to token `i`, `e` that from before the chunk to a token, `r` that from a token to the chunk's end, `S` the state before
// the chunk and `A` the inverse of `I + M`, `M = strictly lower(diag(beta) (K K^T . D))`:
//   N = A diag(beta) (V - diag(e) K S)       what is written
//   P = lower(Q K^T . D)
//   O = diag(e) Q S + P N                    S' = e_n S + (diag(r) K)^T N
//
// Queries and keys stay in shared memory as they came, in their own type; the factors that bring them to unit length go to the other
// operand or to the result. Rows of a short chunk behind its end are zeroes, with a decay of 1 and a strength of 0.
#pragma once

#include "mma.cuh"

namespace delta {

constexpr int WARPS = THREADS / 32;
// Above this softplus is its argument, as in torch.
constexpr float LINEAR = 20.0f;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

struct Shape {
    const int *cu_seqlens;
    int count, tokens, key_heads, value_heads, key_dim, value_dim;

    // Value heads that share a key head.
    __device__ __forceinline__ int group() const { return value_heads / key_heads; }
    __device__ __forceinline__ long long channels() const {
        return 2LL * key_heads * key_dim + (long long)value_heads * value_dim;
    }
    // Columns of all value heads.
    __device__ __forceinline__ long long values() const { return (long long)value_heads * value_dim; }
    // Elements of a state.
    __device__ __forceinline__ long long state() const { return (long long)key_dim * value_dim; }
    __device__ __forceinline__ int value_blocks() const { return (value_dim + COLUMNS - 1) / COLUMNS; }

    // Of a token's row of queries, keys and values.
    template <typename T> __device__ __forceinline__ T *query(T *qkv, int token, int key_head) const {
        return qkv + token * channels() + key_head * key_dim;
    }
    template <typename T> __device__ __forceinline__ T *key(T *qkv, int token, int key_head) const {
        return qkv + token * channels() + (key_heads + key_head) * key_dim;
    }
    template <typename T> __device__ __forceinline__ T *value(T *qkv, int token, int head) const {
        return qkv + token * channels() + 2 * key_heads * key_dim + head * value_dim;
    }
};

#define DELTA_SHAPE                                                                                                    \
    const int *cu_seqlens, int count, int tokens, int key_heads, int value_heads, int key_dim, int value_dim
#define DELTA_SHAPE_VALUES                                                                                             \
    { cu_seqlens, count, tokens, key_heads, value_heads, key_dim, value_dim }

// Tokens `start .. start + n` of the batch: none where `n` is 0.
struct Chunk {
    int start, n;
    // Of its sequence.
    bool first, last;
};

// Where the chunks of a sequence are: its first one is number `tokens before / CHUNK + sequence`, so that all have at most
// `tokens / CHUNK + count` places.
__device__ __forceinline__ int first_slot(const Shape &shape, int sequence) {
    return shape.cu_seqlens[sequence] / CHUNK + sequence;
}

__device__ __forceinline__ Chunk chunk_at(const Shape &shape, int slot) {
    int sequence = 0;
    for (int end = shape.count; end - sequence > 1;) {
        const int middle = (sequence + end) / 2;
        if (first_slot(shape, middle) <= slot) sequence = middle;
        else end = middle;
    }
    const int start = shape.cu_seqlens[sequence], end = shape.cu_seqlens[sequence + 1];
    const int first = start + (slot - first_slot(shape, sequence)) * CHUNK;
    return {first, max(min(CHUNK, end - first), 0), first == start, first + CHUNK >= end};
}

// ---- Tiles in shared memory.

__device__ __forceinline__ int padded(int dim) { return (dim + PADDING - 1) / PADDING * PADDING; }

// From one row of queries or keys to the next: 16 bytes more than they are padded to, so that eight rows are in different banks.
template <typename T> __device__ __forceinline__ int row_stride(int dim) { return padded(dim) + Pack<T>::SIZE; }

template <typename T> __device__ __forceinline__ int row_floats(int dim) {
    return CHUNK * row_stride<T>(dim) * int(sizeof(T)) / int(sizeof(float));
}

// The rows of queries or keys of a chunk; zeroes behind its end and behind that of each row.
template <typename T>
__device__ __forceinline__ void stage_rows(T *tile, const T *source, long long stride, int n, int dim) {
    constexpr int SIZE = Pack<T>::SIZE;
    const int width = row_stride<T>(dim), packs = padded(dim) / SIZE;
    const bool aligned = vectorizable(source, stride) && dim % SIZE == 0;
    for (int i = threadIdx.x; i < CHUNK * packs; i += THREADS) {
        const int row = i / packs, c = i % packs * SIZE;
        Pack<T> pack{};
        if (row < n && c < dim) {
            if (aligned) pack = load_pack(source + row * stride + c);
            else pack = load_pack<false>(source + row * stride + c, dim - c);
        }
        store_pack(tile + row * width + c, pack);
    }
}

// `rows` rows of at most COLUMNS columns as f32, of which the first `n` and `columns` are there and the others become zeroes.
template <typename T>
__device__ __forceinline__ void stage_columns(float *tile, int rows, const T *source, long long stride, int n,
                                              int columns) {
    constexpr int SIZE = Pack<T>::SIZE, PACKS = COLUMNS / SIZE;
    const bool aligned = vectorizable(source, stride);
    for (int i = threadIdx.x; i < rows * PACKS; i += THREADS) {
        const int row = i / PACKS, c = i % PACKS * SIZE;
        Pack<T> pack{};
        if (row < n && c < columns) {
            if (aligned && c + SIZE <= columns) pack = load_pack(source + row * stride + c);
            else pack = load_pack<false>(source + row * stride + c, columns - c);
        }
#pragma unroll
        for (int j = 0; j < SIZE; j++) tile[row * COLUMNS_STRIDE + c + j] = load(pack.at[j]);
    }
}

// A matrix of a chunk by a chunk, whose rows have no gaps.
__device__ __forceinline__ void stage_square(float *tile, const float *source) {
    constexpr int SIZE = Pack<float>::SIZE;
    for (int i = threadIdx.x * SIZE; i < CHUNK * CHUNK; i += THREADS * SIZE)
        store_pack(tile + i / CHUNK * CHUNK_STRIDE + i % CHUNK, load_pack(source + i));
}

// ---- Products of tiles, a warp 16 rows and 8 COUNT columns of the result. Lane `l` has rows `l / 4` and `l / 4 + 8`, and of each eight
// columns `l % 4 * 2` and the next, as `mma` has them.

template <int COUNT> using Sums = float[COUNT][4];

template <int COUNT> __device__ __forceinline__ void clear(Sums<COUNT> &sums) {
#pragma unroll
    for (int n = 0; n < COUNT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[n][i] = 0;
}

// `f(row, column, sum)` of each of the lane's elements.
template <int COUNT, typename F> __device__ __forceinline__ void each(Sums<COUNT> &sums, F f) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < COUNT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) f(row + i / 2 * 8, 8 * n + column + i % 2, sums[n][i]);
}

// A value as what TF32 holds of it and what is left, itself as TF32: together 21 bits. EXACT: nothing is left, as of 16 bits.
template <bool EXACT> struct Split {
    unsigned high, low;
    __device__ __forceinline__ explicit Split(float x) : high(tf32(x)), low(0) {
        if (!EXACT) low = tf32(x - __uint_as_float(high));
    }
};

// `sums += a b` over the steps `from .. to`, multiples of 8, where `a(i, k)` are the elements of 16 rows and `b(k, j)` those of 8
// COUNT columns. With TENSOR on tensor cores in TF32: what is not EXACT is taken as a sum of two, of whose products the least is
// left out, so that a result is as near as one of f32 in all but the last two or three bits. Else in f32 on CUDA cores.
template <bool TENSOR, bool A_EXACT, bool B_EXACT, int COUNT, typename A, typename B>
__device__ __forceinline__ void multiply(Sums<COUNT> &sums, int from, int to, A a, B b) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if constexpr (TENSOR) {
#pragma unroll 1
        for (int k = from; k < to; k += 8) {
            const Split<A_EXACT> a0(a(g, k + t)), a1(a(g + 8, k + t)), a2(a(g, k + t + 4)), a3(a(g + 8, k + t + 4));
            const unsigned high[4] = {a0.high, a1.high, a2.high, a3.high}, low[4] = {a0.low, a1.low, a2.low, a3.low};
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                const Split<B_EXACT> b0(b(k + t, 8 * n + g)), b1(b(k + t + 4, 8 * n + g));
                const unsigned b_high[2] = {b0.high, b1.high}, b_low[2] = {b0.low, b1.low};
                if (!A_EXACT) mma_tf32(sums[n], low, b_high);
                if (!B_EXACT) mma_tf32(sums[n], high, b_low);
                mma_tf32(sums[n], high, b_high);
            }
        }
    } else {
#pragma unroll 1
        for (int k = from; k < to; k++) {
            const float low = a(g, k), high = a(g + 8, k);
#pragma unroll
            for (int n = 0; n < COUNT; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float x = b(k, 8 * n + 2 * t + i);
                    sums[n][i] += low * x;
                    sums[n][2 + i] += high * x;
                }
        }
    }
}

// Whether products run on tensor cores: where queries, keys and values have 16 bits.
template <typename T> constexpr bool TENSOR = sizeof(T) == 2;

// What two threads of a warp that have the same row have between them: the sum over the lanes of a row.
__device__ __forceinline__ float row_sum(float value) {
    value += __shfl_xor_sync(FULL, value, 1);
    return value + __shfl_xor_sync(FULL, value, 2);
}

// The sum over the lanes of a column.
__device__ __forceinline__ float column_sum(float value) {
    for (int distance = 4; distance < 32; distance *= 2) value += __shfl_xor_sync(FULL, value, distance);
    return value;
}

} // namespace delta
