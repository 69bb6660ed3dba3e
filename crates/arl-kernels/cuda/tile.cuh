// A tile of a matrix product on CUDA cores, [M, N] a block, for operands of any two types; f32 sums in the order of k.
// Slabs of K columns go from registers to shared memory (as f32, k outermost) while the slab before is multiplied: one
// barrier a slab. Each thread holds 8 x 4 sums.
#pragma once

#include "arl.cuh"

namespace tile {

constexpr int THREADS = 256;
constexpr int M = 128, N = 64, K = 16;
// Sums of one thread.
constexpr int HEIGHT = 8, WIDTH = 4;

// One side of a product from a tile's first row on (a column, on the right side): element (row, k) is
// `data[row * stride + k]` or, if not `along_k`, `data[k * stride + row]`.
template <typename T> struct Operand {
    const T *data;
    long long stride;
    bool along_k;
    int rows;
};

// COUNT neighbours that are read or written as one access.
template <typename T, int COUNT> struct __align__(COUNT * sizeof(T)) Run {
    T at[COUNT];
};

// Two slabs a side; four more columns turn the rows against the banks and keep packs aligned.
struct Slabs {
    __align__(16) float a[2][K][M + 4];
    __align__(16) float b[2][K][N + 4];
};

struct Sums {
    float at[HEIGHT][WIDTH];
};

// What one thread carries of a slab of ROWS rows: COUNT neighbours in memory.
template <typename T, int ROWS> struct Carried {
    static constexpr int COUNT = ROWS * K / THREADS;
    static constexpr int STEP = COUNT < Pack<T>::SIZE ? COUNT : Pack<T>::SIZE;
    float at[COUNT];
    int row, k;

    __device__ __forceinline__ explicit Carried(bool along_k) {
        int t = threadIdx.x;
        // A warp writes 32 neighbouring rows of one column to shared memory, or reads whole lines.
        row = along_k ? t % ROWS : t % (ROWS / COUNT) * COUNT;
        k = along_k ? t / ROWS * COUNT : t / (ROWS / COUNT);
    }

    // Reads columns [from, from + K) as far as `end`; zeroes beyond it and beyond the rows.
    __device__ __forceinline__ void fetch(const Operand<T> &side, int from, int end) {
        int here = from + k;
        int left = side.along_k ? (row < side.rows ? end - here : 0) : (here < end ? side.rows - row : 0);
        const T *source = side.data + (side.along_k ? row * side.stride + here : here * side.stride + row);
        if (left >= COUNT && packs(side.data, side.stride)) {
            for (int i = 0; i < COUNT; i += STEP) {
                Run<T, STEP> run = *reinterpret_cast<const Run<T, STEP> *>(source + i);
                for (int j = 0; j < STEP; j++) at[i + j] = load(run.at[j]);
            }
            return;
        }
        for (int i = 0; i < COUNT; i++) at[i] = i < left ? load(source[i]) : 0.0f;
    }

    __device__ __forceinline__ void put(float (&slab)[K][ROWS + 4], bool along_k) const {
        if (along_k) {
            for (int i = 0; i < COUNT; i++) slab[k + i][row] = at[i];
            return;
        }
        for (int i = 0; i < COUNT; i += 4) {
            Pack<float> pack;
            for (int j = 0; j < 4; j++) pack.at[j] = at[i + j];
            store_pack(&slab[k][row + i], pack);
        }
    }
};

// The row (or column) of the tile that a thread's row `i` (or first column) of sums is.
__device__ __forceinline__ int row_of(int i) { return i / 4 * (M / 2) + threadIdx.x / 16 * 4 + i % 4; }
__device__ __forceinline__ int first_column() { return threadIdx.x % 16 * WIDTH; }

// sums = a b over k in [from, end); `from` is a multiple of K.
template <typename A, typename B>
__device__ __forceinline__ void multiply(const Operand<A> &a, const Operand<B> &b, int from, int end, Slabs &slabs,
                                         Sums &sums) {
    for (int i = 0; i < HEIGHT; i++)
        for (int j = 0; j < WIDTH; j++) sums.at[i][j] = 0;
    Carried<A, M> next_a(a.along_k);
    Carried<B, N> next_b(b.along_k);
    if (from < end) {
        next_a.fetch(a, from, end);
        next_b.fetch(b, from, end);
    }
    for (int turn = 0; from < end; from += K, turn ^= 1) {
        next_a.put(slabs.a[turn], a.along_k);
        next_b.put(slabs.b[turn], b.along_k);
        __syncthreads();
        if (from + K < end) {
            next_a.fetch(a, from + K, end);
            next_b.fetch(b, from + K, end);
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            Pack<float> above = load_pack(&slabs.a[turn][k][row_of(0)]), below = load_pack(&slabs.a[turn][k][row_of(4)]);
            Pack<float> right = load_pack(&slabs.b[turn][k][first_column()]);
            for (int i = 0; i < HEIGHT; i++)
                for (int j = 0; j < WIDTH; j++)
                    sums.at[i][j] += (i < 4 ? above.at[i] : below.at[i - 4]) * right.at[j];
        }
    }
}

// c[row, column] = f(column, sum, what c held) for the tile's first `rows` rows and `columns` columns; c is read only
// to accumulate.
template <typename C, typename F>
__device__ __forceinline__ void finish(const Sums &sums, C *c, long long stride, int rows, int columns, bool accumulate,
                                       F f) {
    int column = first_column();
    bool whole = column + WIDTH <= columns && packs(c, stride);
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) {
        int row = row_of(i);
        if (row >= rows) continue;
        C *target = c + row * stride + column;
        if (whole) {
            auto *runs = reinterpret_cast<Run<C, WIDTH> *>(target);
            Run<C, WIDTH> run{};
            if (accumulate) run = *runs;
            for (int j = 0; j < WIDTH; j++) run.at[j] = store<C>(f(column + j, sums.at[i][j], load(run.at[j])));
            *runs = run;
            continue;
        }
        for (int j = 0; j < WIDTH; j++)
            if (column + j < columns)
                target[j] = store<C>(f(column + j, sums.at[i][j], accumulate ? load(target[j]) : 0.0f));
    }
}

} // namespace tile
