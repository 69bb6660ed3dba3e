// The matrix products of a mixture of experts, whose rows per expert only the device knows: a block finds its expert by
// a scan of the offsets, and blocks beyond the last tile end at once.
// 16 bits: tiles of [128, 128] by tensor cores, 4 warps of [64, 64] each (each element that ldmatrix reads is multiplied 64
// times), stages of 32 columns three deep by cp.async, chunks of 16 bytes placed so that ldmatrix meets no bank twice.
// f32: tiles of [128, 64] on CUDA cores (tile.cuh).
// Reads the token side once for each 128 (64) columns of the experts' side, an expert's matrix once for each 128 of its
// rows (from the L2 cache, mostly: the tiles of one expert are neighbours), and writes `c` once.
#include "mma.cuh"
#include "tile.cuh"

namespace grouped {

constexpr int WARPS = THREADS / 32;
constexpr int WARP_TILE = 64;
// Elements of one operand in one stage.
constexpr int STAGE_ELEMENTS = BLOCK * BLOCK_K;
static_assert(BLOCK == tile::BLOCK_M, "either kernel's tiles are found alike");

// Rows [first, end) of an expert; `end` is the expert's, not the tile's.
struct TilePosition {
    int expert, first, end;
};

struct Search {
    TilePosition place;
    int totals[tile::THREADS / 32];
};

// Where the `number`-th tile of BLOCK rows begins, counted over all experts; expert -1 beyond the last.
template <int THREADS>
__device__ __forceinline__ TilePosition find(const int *offsets, int experts, int number, Search &search) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) search.place.expert = -1;
    int before = 0;
    for (int first = 0; first < experts && before <= number; first += THREADS) {
        int expert = first + threadIdx.x, begin = 0, end = 0;
        if (expert < experts) {
            begin = offsets[expert];
            end = offsets[expert + 1];
        }
        int own = (end - begin + BLOCK - 1) / BLOCK, sum = own;
        for (int distance = 1; distance < 32; distance *= 2) {
            int other = __shfl_up_sync(FULL, sum, distance);
            if (lane >= distance) sum += other;
        }
        if (lane == 31) search.totals[warp] = sum;
        __syncthreads();
        sum += before;
        for (int i = 0; i < THREADS / 32; i++) {
            if (i < warp) sum += search.totals[i];
            before += search.totals[i];
        }
        if (sum - own <= number && number < sum) search.place = {expert, begin + (number - (sum - own)) * BLOCK, end};
        __syncthreads();
    }
    return search.place;
}

// Where the 8 elements from (row, k) on are in a stage: [BLOCK, BLOCK_K] along k, else [BLOCK_K, BLOCK]. Of the 8 rows (or ks)
// that ldmatrix reads at once, each chunk is in other banks.
template <bool ALONG_K> __device__ __forceinline__ int position(int row, int k) {
    if (ALONG_K) return row * BLOCK_K + ((k / 8) ^ (row / 2 % 4)) * 8;
    return k * BLOCK + ((row / 8) ^ (k % 8)) * 8;
}

// One side of a product from a tile's first row on (as `tile::Operand`), and what one thread copies of each stage: chunks
// of 8 elements, APART rows (or ks) from each other.
template <typename T, bool ALONG_K> struct TileLoader {
    static constexpr int ACROSS = ALONG_K ? BLOCK_K / 8 : BLOCK / 8, APART = THREADS / ACROSS;
    static_assert(APART % 8 == 0, "a thread's chunks are placed alike within their rows of shared memory");
    const T *data, *next;
    long long stride;
    int rows, row, k;
    bool aligned;

    __device__ __forceinline__ TileLoader(const T *data, long long stride, int rows)
        : data(data), stride(stride), rows(rows), aligned(vectorizable(data, stride)) {
        int along = threadIdx.x % ACROSS * 8, across = threadIdx.x / ACROSS;
        row = ALONG_K ? across : along;
        k = ALONG_K ? along : across;
        next = data + across * stride + along;
    }

    // Begins to copy the next stage, `left` columns before the sums' end; zeroes beyond it and beyond the rows.
    __device__ __forceinline__ void load_async(T *stage, int left) {
        stage += position<ALONG_K>(row, k);
#pragma unroll
        for (int i = 0; i < STAGE_ELEMENTS / 8 / THREADS; i++, stage += THREADS * 8) {
            int there = ALONG_K ? (row + i * APART < rows ? left - k : 0) : (k + i * APART < left ? rows - row : 0);
            const T *source = next + i * APART * stride;
            if (there <= 0 || (there >= 8 && aligned)) {
                cp_async_16(stage, there <= 0 ? data : source, there > 0);
                continue;
            }
            for (int j = 0; j < 8; j++) stage[j] = j < there ? source[j] : store<T>(0.0f);
        }
        next += ALONG_K ? BLOCK_K : BLOCK_K * stride;
    }
};

// sums[i][j] is the fragment of rows 16 i and columns 8 j of the warp's tile.
struct Accumulators {
    static constexpr int HEIGHT = WARP_TILE / 16, WIDTH = WARP_TILE / 8;
    float at[HEIGHT][WIDTH][4];
};

template <bool A_ALONG_K, bool B_ALONG_K, typename T>
__device__ __forceinline__ void multiply_stage(const T *a, const T *b, int row, int column, Accumulators &sums) {
    // Lane 8 i + r gives the address of row r of matrix i.
    int lane = threadIdx.x % 32, r = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < BLOCK_K; k += 16) {
        unsigned left[Accumulators::HEIGHT][4], right[Accumulators::WIDTH][2];
        for (int i = 0; i < Accumulators::HEIGHT; i++) {
            // Matrices: rows 0, rows 8, and both again 8 columns further.
            const T *from = a + (A_ALONG_K ? position<true>(row + 16 * i + low + r, k + high)
                                              : position<false>(row + 16 * i + low, k + high + r));
            if (A_ALONG_K) ldmatrix_x4(left[i], from);
            else ldmatrix_x4_transposed(left[i], from);
        }
        for (int j = 0; j < Accumulators::WIDTH / 2; j++) {
            // Matrices: k 0, k 8, and both again 8 columns further.
            const T *from = b + (B_ALONG_K ? position<true>(column + 16 * j + high + r, k + low)
                                              : position<false>(column + 16 * j + high, k + low + r));
            unsigned both[4];
            if (B_ALONG_K) ldmatrix_x4(both, from);
            else ldmatrix_x4_transposed(both, from);
            for (int h = 0; h < 2; h++) {
                right[2 * j][h] = both[h];
                right[2 * j + 1][h] = both[2 + h];
            }
        }
        for (int i = 0; i < Accumulators::HEIGHT; i++)
            for (int j = 0; j < Accumulators::WIDTH; j++) mma<T>(sums.at[i][j], left[i], right[j]);
    }
}

// The first row and column of this warp in the tile.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 64 * WARP_TILE; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 2 * WARP_TILE; }

// sums = a b over k in [0, depth). Shared memory is free again on return.
template <typename T, bool A_ALONG_K, bool B_ALONG_K>
__device__ __forceinline__ void multiply(TileLoader<T, A_ALONG_K> &a, TileLoader<T, B_ALONG_K> &b, int depth, T *shared,
                                         Accumulators &sums) {
    for (int i = 0; i < Accumulators::HEIGHT; i++)
        for (int j = 0; j < Accumulators::WIDTH; j++)
            for (int e = 0; e < 4; e++) sums.at[i][j][e] = 0;
    auto begin = [&](int k_block) {
        if (k_block * BLOCK_K < depth) {
            T *stage = shared + k_block % STAGES * 2 * STAGE_ELEMENTS;
            a.load_async(stage, depth - k_block * BLOCK_K);
            b.load_async(stage + STAGE_ELEMENTS, depth - k_block * BLOCK_K);
        }
        // Also where there is nothing to copy, so that the number of groups says which stage has arrived.
        cp_async_commit();
    };
    for (int k_block = 0; k_block < STAGES - 1; k_block++) begin(k_block);
    // Experts may have few rows: a warp without any only helps to copy.
    bool busy = warp_row() < a.rows && warp_column() < b.rows;
    for (int k_block = 0; k_block * BLOCK_K < depth; k_block++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        // Into the stage that all have left, as they are past the barrier.
        begin(k_block + STAGES - 1);
        const T *stage = shared + k_block % STAGES * 2 * STAGE_ELEMENTS;
        if (busy) multiply_stage<A_ALONG_K, B_ALONG_K>(stage, stage + STAGE_ELEMENTS, warp_row(), warp_column(), sums);
    }
    cp_async_wait<0>();
    __syncthreads();
}

// A row of the finished tile in shared memory; 8 more elements, so that fragments meet no bank twice.
constexpr int ROW = BLOCK + 8;
static_assert(BLOCK * ROW <= STAGES * 2 * STAGE_ELEMENTS, "the finished tile is where the stages were");

// c = sums, by way of shared memory, so that whole lines are written.
template <typename T>
__device__ __forceinline__ void store_epilogue(const Accumulators &sums, T *shared, T *c, long long stride, int rows, int columns) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Accumulators::HEIGHT; i++)
#pragma unroll
        for (int j = 0; j < Accumulators::WIDTH; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = warp_row() + 16 * i + 8 * half + lane / 4, column = warp_column() + 8 * j + lane % 4 * 2;
                const float *values = sums.at[i][j] + 2 * half;
                *reinterpret_cast<unsigned *>(shared + row * ROW + column) = pair<T>(values[0], values[1]);
            }
    __syncthreads();
    bool aligned = vectorizable(c, stride);
    for (int chunk = threadIdx.x; chunk < BLOCK * BLOCK / 8; chunk += THREADS) {
        int row = chunk / (BLOCK / 8), column = chunk % (BLOCK / 8) * 8;
        if (row >= rows) break;
        const T *source = shared + row * ROW + column;
        T *target = c + row * stride + column;
        if (aligned && column + 8 <= columns) store_pack(target, load_pack(source));
        else
            for (int j = 0; j < 8 && column + j < columns; j++) target[j] = source[j];
    }
}

// c += sums. Four lanes write 32 bytes of a row.
__device__ __forceinline__ void add_epilogue(const Accumulators &sums, float *c, long long stride, int rows, int columns) {
    int lane = threadIdx.x % 32;
    bool aligned = vectorizable(c, stride);
#pragma unroll
    for (int i = 0; i < Accumulators::HEIGHT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp_row() + 16 * i + 8 * half + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int j = 0; j < Accumulators::WIDTH; j++) {
                int column = warp_column() + 8 * j + lane % 4 * 2;
                const float *values = sums.at[i][j] + 2 * half;
                float *target = c + row * stride + column;
                if (aligned && column + 2 <= columns) {
                    auto *vector = reinterpret_cast<tile::Vector<float, 2> *>(target);
                    tile::Vector<float, 2> held = *vector;
                    *vector = {held.at[0] + values[0], held.at[1] + values[1]};
                    continue;
                }
                for (int h = 0; h < 2; h++)
                    if (column + h < columns) target[h] += values[h];
            }
        }
}

// Behind the stages is a `Search`.
static_assert(sizeof(Search) <= SEARCH_BYTES, "what the launch asks for");

__device__ __forceinline__ Search &search_after_stages() {
    ARL_SHARED(unsigned char, bytes);
    return *reinterpret_cast<Search *>(bytes + STAGES_BYTES);
}

// Nt (B_ALONG_K) and Nn: blockIdx.x is (tile of rows, tile of columns), the columns first.
template <typename T, bool B_ALONG_K>
__device__ void tokens(const int *offsets, int experts, const T *a, long long a_stride, const T *b,
                       long long b_stride, T *c, long long c_stride, int n, int k) {
    ARL_SHARED(T, shared);
    int tiles_n = (n + BLOCK - 1) / BLOCK, column = blockIdx.x % tiles_n * BLOCK;
    TilePosition place = find<THREADS>(offsets, experts, blockIdx.x / tiles_n, search_after_stages());
    if (place.expert < 0) return;
    b += place.expert * (B_ALONG_K ? n : k) * b_stride + (B_ALONG_K ? column * b_stride : column);
    TileLoader<T, true> left(a + place.first * a_stride, a_stride, place.end - place.first);
    TileLoader<T, B_ALONG_K> right(b, b_stride, n - column);
    Accumulators sums;
    multiply(left, right, k, shared, sums);
    store_epilogue(sums, shared, c + place.first * c_stride + column, c_stride, left.rows, right.rows);
}

// Tn: blockIdx.x is (expert, tile of rows, tile of columns), the columns first; the sums are over the expert's tokens.
template <typename T>
__device__ __forceinline__ void gradients(const int *offsets, const T *a, long long a_stride, const T *b,
                                          long long b_stride, float *c, long long c_stride, int n, int k) {
    ARL_SHARED(T, shared);
    int tiles_n = (n + BLOCK - 1) / BLOCK, tiles_m = (k + BLOCK - 1) / BLOCK;
    int column = blockIdx.x % tiles_n * BLOCK, row = blockIdx.x / tiles_n % tiles_m * BLOCK;
    int expert = blockIdx.x / tiles_n / tiles_m;
    int first = offsets[expert], tokens = offsets[expert + 1] - first;
    if (tokens == 0) return;
    TileLoader<T, false> left(a + first * a_stride + row, a_stride, k - row);
    TileLoader<T, false> right(b + first * b_stride + column, b_stride, n - column);
    Accumulators sums;
    multiply(left, right, tokens, shared, sums);
    add_epilogue(sums, c + ((long long)expert * k + row) * c_stride + column, c_stride, left.rows, right.rows);
}

// As `tokens`, in f32.
__device__ __forceinline__ void tokens_f32(const int *offsets, int experts, const float *a, long long a_stride,
                                           const float *b, long long b_stride, bool b_along_k, float *c,
                                           long long c_stride, int n, int k) {
    __shared__ tile::SharedStages stages;
    __shared__ Search search;
    int tiles_n = (n + tile::BLOCK_N - 1) / tile::BLOCK_N, column = blockIdx.x % tiles_n * tile::BLOCK_N;
    TilePosition place = find<tile::THREADS>(offsets, experts, blockIdx.x / tiles_n, search);
    if (place.expert < 0) return;
    b += place.expert * (b_along_k ? n : k) * b_stride + (b_along_k ? column * b_stride : column);
    tile::Operand<float> left{a + place.first * a_stride, a_stride, true, place.end - place.first};
    tile::Operand<float> right{b, b_stride, b_along_k, n - column};
    tile::Accumulators sums;
    tile::multiply(left, right, 0, k, stages, sums);
    tile::epilogue(sums, c + place.first * c_stride + column, c_stride, left.rows, right.rows, false,
                 [](int, float sum, float) { return sum; });
}

// As `gradients`, in f32.
__device__ __forceinline__ void gradients_f32(const int *offsets, const float *a, long long a_stride, const float *b,
                                              long long b_stride, float *c, long long c_stride, int n, int k) {
    __shared__ tile::SharedStages stages;
    int tiles_n = (n + tile::BLOCK_N - 1) / tile::BLOCK_N, tiles_m = (k + tile::BLOCK_M - 1) / tile::BLOCK_M;
    int column = blockIdx.x % tiles_n * tile::BLOCK_N, row = blockIdx.x / tiles_n % tiles_m * tile::BLOCK_M;
    int expert = blockIdx.x / tiles_n / tiles_m;
    int first = offsets[expert], tokens = offsets[expert + 1] - first;
    if (tokens == 0) return;
    tile::Operand<float> left{a + first * a_stride + row, a_stride, false, k - row};
    tile::Operand<float> right{b + first * b_stride + column, b_stride, false, n - column};
    tile::Accumulators sums;
    tile::multiply(left, right, 0, tokens, stages, sums);
    tile::epilogue(sums, c + ((long long)expert * k + row) * c_stride + column, c_stride, left.rows, right.rows, true,
                 [](int, float sum, float before) { return before + sum; });
}

} // namespace grouped

// Parameters of Nt and Nn, and of Tn (where `k` is the rows of one expert's `c`).
#define TOKENS(T)                                                                                                      \
    int experts, const int *offsets, const T *a, long long a_stride, const T *b, long long b_stride, T *c,             \
        long long c_stride, int n, int k
#define GRADIENTS(T)                                                                                                   \
    const int *offsets, const T *a, long long a_stride, const T *b, long long b_stride, float *c, long long c_stride,  \
        int n, int k

#define GROUPED(name, T)                                                                                               \
    ARL_KERNEL(grouped_nt_##name, grouped::THREADS, TOKENS(T)) {                                                       \
        grouped::tokens<T, true>(offsets, experts, a, a_stride, b, b_stride, c, c_stride, n, k);                       \
    }                                                                                                                  \
    ARL_KERNEL(grouped_nn_##name, grouped::THREADS, TOKENS(T)) {                                                       \
        grouped::tokens<T, false>(offsets, experts, a, a_stride, b, b_stride, c, c_stride, n, k);                      \
    }                                                                                                                  \
    ARL_KERNEL(grouped_tn_##name, grouped::THREADS, GRADIENTS(T)) {                                                    \
        grouped::gradients<T>(offsets, a, a_stride, b, b_stride, c, c_stride, n, k);                                   \
    }
ARL_FOR_NARROW(GROUPED)
#undef GROUPED

ARL_KERNEL(grouped_nt_f32, tile::THREADS, TOKENS(float)) {
    grouped::tokens_f32(offsets, experts, a, a_stride, b, b_stride, true, c, c_stride, n, k);
}
ARL_KERNEL(grouped_nn_f32, tile::THREADS, TOKENS(float)) {
    grouped::tokens_f32(offsets, experts, a, a_stride, b, b_stride, false, c, c_stride, n, k);
}
ARL_KERNEL(grouped_tn_f32, tile::THREADS, GRADIENTS(float)) {
    grouped::gradients_f32(offsets, a, a_stride, b, b_stride, c, c_stride, n, k);
}
#undef TOKENS
#undef GRADIENTS
