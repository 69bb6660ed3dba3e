// A GEMM tile on CUDA cores, [BLOCK_M, BLOCK_N] a block, for operands of any two types; f32 accumulators, summed in the order of k.
// Double-buffered: a stage of BLOCK_K columns goes from registers to shared memory (as f32, k outermost) while the stage before is
// multiplied, with one barrier a stage. Each thread holds THREAD_M x THREAD_N accumulators.
#pragma once

#include "arl.cuh"

namespace tile {

// Accumulators of one thread.
constexpr int THREAD_M = 8, THREAD_N = 4;

// One side of a product from a tile's first row on (a column, on the right side): element (row, k) is
// `data[row * stride + k]` or, if not `along_k`, `data[k * stride + row]`.
template <typename T> struct Operand {
    const T *data;
    long long stride;
    bool along_k;
    int rows;
};

// COUNT neighbours that are read or written as one access.
template <typename T, int COUNT> using Vector = Group<T, COUNT>;

// Two stages of each operand; four columns of padding keep rows in different banks and packs aligned.
struct SharedStages {
    __align__(16) float a[2][BLOCK_K][BLOCK_M + 4];
    __align__(16) float b[2][BLOCK_K][BLOCK_N + 4];
};

struct Accumulators {
    float at[THREAD_M][THREAD_N];
};

// One thread's part of a stage of ROWS rows on its way from global to shared memory: COUNT neighbours.
template <typename T, int ROWS> struct TileLoader {
    static constexpr int COUNT = ROWS * BLOCK_K / THREADS;
    static constexpr int STEP = COUNT < Pack<T>::SIZE ? COUNT : Pack<T>::SIZE;
    float at[COUNT];
    int row, k;

    __device__ __forceinline__ explicit TileLoader(bool along_k) {
        int t = threadIdx.x;
        // A warp writes 32 neighbouring rows of one column to shared memory, or reads whole lines.
        row = along_k ? t % ROWS : t % (ROWS / COUNT) * COUNT;
        k = along_k ? t / ROWS * COUNT : t / (ROWS / COUNT);
    }

    // Reads columns [from, from + BLOCK_K) as far as `end`; zeroes beyond it and beyond the rows.
    __device__ __forceinline__ void load_global(const Operand<T> &side, int from, int end) {
        int here = from + k;
        int left = side.along_k ? (row < side.rows ? end - here : 0) : (here < end ? side.rows - row : 0);
        const T *source = side.data + (side.along_k ? row * side.stride + here : here * side.stride + row);
        if (left >= COUNT && vectorizable(side.data, side.stride)) {
            for (int i = 0; i < COUNT; i += STEP) {
                Vector<T, STEP> vector = load_group<STEP>(source + i);
                for (int j = 0; j < STEP; j++) at[i + j] = load(vector.at[j]);
            }
            return;
        }
        for (int i = 0; i < COUNT; i++) at[i] = i < left ? load(source[i]) : 0.0f;
    }

    __device__ __forceinline__ void store_shared(float (&shared)[BLOCK_K][ROWS + 4], bool along_k) const {
        if (along_k) {
            for (int i = 0; i < COUNT; i++) shared[k + i][row] = at[i];
            return;
        }
        for (int i = 0; i < COUNT; i += 4) {
            Pack<float> pack;
            for (int j = 0; j < 4; j++) pack.at[j] = at[i + j];
            store_pack(&shared[k][row + i], pack);
        }
    }
};

// The row of the tile of a thread's row `i` of accumulators, and the column of its first one.
__device__ __forceinline__ int row_of(int i) { return i / 4 * (BLOCK_M / 2) + threadIdx.x / 16 * 4 + i % 4; }
__device__ __forceinline__ int first_column() { return threadIdx.x % 16 * THREAD_N; }

// sums = a b over k in [from, end); `from` is a multiple of BLOCK_K.
template <typename A, typename B>
__device__ __forceinline__ void multiply(const Operand<A> &a, const Operand<B> &b, int from, int end, SharedStages &stages,
                                         Accumulators &sums) {
    for (int i = 0; i < THREAD_M; i++)
        for (int j = 0; j < THREAD_N; j++) sums.at[i][j] = 0;
    TileLoader<A, BLOCK_M> next_a(a.along_k);
    TileLoader<B, BLOCK_N> next_b(b.along_k);
    if (from < end) {
        next_a.load_global(a, from, end);
        next_b.load_global(b, from, end);
    }
    for (int stage = 0; from < end; from += BLOCK_K, stage ^= 1) {
        next_a.store_shared(stages.a[stage], a.along_k);
        next_b.store_shared(stages.b[stage], b.along_k);
        __syncthreads();
        if (from + BLOCK_K < end) {
            next_a.load_global(a, from + BLOCK_K, end);
            next_b.load_global(b, from + BLOCK_K, end);
        }
#pragma unroll
        for (int k = 0; k < BLOCK_K; k++) {
            Pack<float> a0 = load_pack(&stages.a[stage][k][row_of(0)]), a4 = load_pack(&stages.a[stage][k][row_of(4)]);
            Pack<float> b0 = load_pack(&stages.b[stage][k][first_column()]);
            for (int i = 0; i < THREAD_M; i++)
                for (int j = 0; j < THREAD_N; j++)
                    sums.at[i][j] += (i < 4 ? a0.at[i] : a4.at[i - 4]) * b0.at[j];
        }
    }
}

// c[row, column] = f(column, sum, what c held) for the tile's first `rows` rows and `columns` columns; c is read only
// to accumulate.
template <typename C, typename F>
__device__ __forceinline__ void epilogue(const Accumulators &sums, C *c, long long stride, int rows, int columns, bool accumulate,
                                       F f) {
    int column = first_column();
    bool whole = column + THREAD_N <= columns && vectorizable(c, stride);
#pragma unroll
    for (int i = 0; i < THREAD_M; i++) {
        int row = row_of(i);
        if (row >= rows) continue;
        C *target = c + row * stride + column;
        if (whole) {
            auto *vectors = reinterpret_cast<Vector<C, THREAD_N> *>(target);
            Vector<C, THREAD_N> vector{};
            if (accumulate) vector = *vectors;
            for (int j = 0; j < THREAD_N; j++) vector.at[j] = store<C>(f(column + j, sums.at[i][j], load(vector.at[j])));
            *vectors = vector;
            continue;
        }
        for (int j = 0; j < THREAD_N; j++)
            if (column + j < columns)
                target[j] = store<C>(f(column + j, sums.at[i][j], accumulate ? load(target[j]) : 0.0f));
    }
}

} // namespace tile
