// The matrix products of a mixture of experts, whose rows per expert only the device knows: a block finds its expert by
// a scan of the offsets, and blocks beyond the last tile end at once.
// 16 bits: tiles of [128, 128] by tensor cores, 4 warps of [64, 64] each (each element that ldmatrix reads is multiplied 64
// times), slabs of 32 columns three deep by cp.async, chunks of 16 bytes placed so that ldmatrix meets no bank twice.
// f32: tiles of [128, 64] on CUDA cores (tile.cuh).
// Reads the token side once for each 128 (64) columns of the experts' side, an expert's matrix once for each 128 of its
// rows (from the L2 cache, mostly: the tiles of one expert are neighbours), and writes `c` once.
#include "mma.cuh"
#include "tile.cuh"

namespace grouped {

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int TILE = 128, WARP_TILE = 64, DEPTH = 32, STAGES = 3;
// Elements of one operand in one stage.
constexpr int SLAB = TILE * DEPTH;
static_assert(TILE == tile::M, "either kernel's tiles are found alike");

// Rows [first, end) of an expert; `end` is the expert's, not the tile's.
struct Place {
    int expert, first, end;
};

struct Search {
    Place place;
    int totals[tile::THREADS / 32];
};

// Where the `number`-th tile of TILE rows begins, counted over all experts; expert -1 beyond the last.
template <int THREADS>
__device__ __forceinline__ Place find(const int *offsets, int experts, int number, Search &search) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) search.place.expert = -1;
    int before = 0;
    for (int first = 0; first < experts && before <= number; first += THREADS) {
        int expert = first + threadIdx.x, begin = 0, end = 0;
        if (expert < experts) {
            begin = offsets[expert];
            end = offsets[expert + 1];
        }
        int own = (end - begin + TILE - 1) / TILE, sum = own;
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
        if (sum - own <= number && number < sum) search.place = {expert, begin + (number - (sum - own)) * TILE, end};
        __syncthreads();
    }
    return search.place;
}

// Where the 8 elements from (row, k) on lie in a slab: [TILE, DEPTH] along k, else [DEPTH, TILE]. Of the 8 rows (or ks)
// that ldmatrix reads at once, each chunk is in other banks.
template <bool ALONG_K> __device__ __forceinline__ int position(int row, int k) {
    if (ALONG_K) return row * DEPTH + ((k / 8) ^ (row / 2 % 4)) * 8;
    return k * TILE + ((row / 8) ^ (k % 8)) * 8;
}

// One side of a product from a tile's first row on (as `tile::Operand`), and what one thread copies of each slab: chunks
// of 8 elements, APART rows (or ks) from each other.
template <typename T, bool ALONG_K> struct Feed {
    static constexpr int ACROSS = ALONG_K ? DEPTH / 8 : TILE / 8, APART = THREADS / ACROSS;
    static_assert(APART % 8 == 0, "a thread's chunks lie alike within their rows of shared memory");
    const T *data, *next;
    long long stride;
    int rows, row, k;
    bool aligned;

    __device__ __forceinline__ Feed(const T *data, long long stride, int rows)
        : data(data), stride(stride), rows(rows), aligned(packs(data, stride)) {
        int along = threadIdx.x % ACROSS * 8, across = threadIdx.x / ACROSS;
        row = ALONG_K ? across : along;
        k = ALONG_K ? along : across;
        next = data + across * stride + along;
    }

    // Begins to copy the next slab, `left` columns before the sums' end; zeroes beyond it and beyond the rows.
    __device__ __forceinline__ void fetch(T *slab, int left) {
        slab += position<ALONG_K>(row, k);
#pragma unroll
        for (int i = 0; i < SLAB / 8 / THREADS; i++, slab += THREADS * 8) {
            int there = ALONG_K ? (row + i * APART < rows ? left - k : 0) : (k + i * APART < left ? rows - row : 0);
            const T *source = next + i * APART * stride;
            if (there <= 0 || (there >= 8 && aligned)) {
                cp_async_16(slab, there <= 0 ? data : source, there > 0);
                continue;
            }
            for (int j = 0; j < 8; j++) slab[j] = j < there ? source[j] : store<T>(0.0f);
        }
        next += ALONG_K ? DEPTH : DEPTH * stride;
    }
};

// sums[i][j] is the fragment of rows 16 i and columns 8 j of the warp's tile.
struct Sums {
    static constexpr int HEIGHT = WARP_TILE / 16, WIDTH = WARP_TILE / 8;
    float at[HEIGHT][WIDTH][4];
};

template <bool A_ALONG_K, bool B_ALONG_K, typename T>
__device__ __forceinline__ void multiply_slab(const T *a, const T *b, int row, int column, Sums &sums) {
    // Lane 8 i + r gives the address of row r of matrix i.
    int lane = threadIdx.x % 32, r = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        unsigned left[Sums::HEIGHT][4], right[Sums::WIDTH][2];
        for (int i = 0; i < Sums::HEIGHT; i++) {
            // Matrices: rows 0, rows 8, and both again 8 columns further.
            const T *from = a + (A_ALONG_K ? position<true>(row + 16 * i + low + r, k + high)
                                              : position<false>(row + 16 * i + low, k + high + r));
            if (A_ALONG_K) ldmatrix_x4(left[i], from);
            else ldmatrix_x4_transposed(left[i], from);
        }
        for (int j = 0; j < Sums::WIDTH / 2; j++) {
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
        for (int i = 0; i < Sums::HEIGHT; i++)
            for (int j = 0; j < Sums::WIDTH; j++) mma<T>(sums.at[i][j], left[i], right[j]);
    }
}

// The first row and column of this warp in the tile.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 64 * WARP_TILE; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 2 * WARP_TILE; }

// sums = a b over k in [0, depth). Shared memory is free again on return.
template <typename T, bool A_ALONG_K, bool B_ALONG_K>
__device__ __forceinline__ void multiply(Feed<T, A_ALONG_K> &a, Feed<T, B_ALONG_K> &b, int depth, T *shared,
                                         Sums &sums) {
    for (int i = 0; i < Sums::HEIGHT; i++)
        for (int j = 0; j < Sums::WIDTH; j++)
            for (int e = 0; e < 4; e++) sums.at[i][j][e] = 0;
    auto begin = [&](int slab) {
        if (slab * DEPTH < depth) {
            T *stage = shared + slab % STAGES * 2 * SLAB;
            a.fetch(stage, depth - slab * DEPTH);
            b.fetch(stage + SLAB, depth - slab * DEPTH);
        }
        // Also where there is nothing to copy, so that the number of groups tells which slab is there.
        cp_async_commit();
    };
    for (int slab = 0; slab < STAGES - 1; slab++) begin(slab);
    // Experts may have few rows: a warp without any only helps to copy.
    bool busy = warp_row() < a.rows && warp_column() < b.rows;
    for (int slab = 0; slab * DEPTH < depth; slab++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        // Into the stage that all have left, as they are past the barrier.
        begin(slab + STAGES - 1);
        const T *stage = shared + slab % STAGES * 2 * SLAB;
        if (busy) multiply_slab<A_ALONG_K, B_ALONG_K>(stage, stage + SLAB, warp_row(), warp_column(), sums);
    }
    cp_async_wait<0>();
    __syncthreads();
}

// A row of the finished tile in shared memory; 8 more elements, so that fragments meet no bank twice.
constexpr int ROW = TILE + 8;
static_assert(TILE * ROW <= STAGES * 2 * SLAB, "the finished tile lies where the stages were");

// c = sums, by way of shared memory, so that whole lines are written.
template <typename T>
__device__ __forceinline__ void assign(const Sums &sums, T *shared, T *c, long long stride, int rows, int columns) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Sums::HEIGHT; i++)
#pragma unroll
        for (int j = 0; j < Sums::WIDTH; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = warp_row() + 16 * i + 8 * half + lane / 4, column = warp_column() + 8 * j + lane % 4 * 2;
                const float *values = sums.at[i][j] + 2 * half;
                *reinterpret_cast<unsigned *>(shared + row * ROW + column) = pair<T>(values[0], values[1]);
            }
    __syncthreads();
    bool aligned = packs(c, stride);
    for (int chunk = threadIdx.x; chunk < TILE * TILE / 8; chunk += THREADS) {
        int row = chunk / (TILE / 8), column = chunk % (TILE / 8) * 8;
        if (row >= rows) break;
        const T *source = shared + row * ROW + column;
        T *target = c + row * stride + column;
        if (aligned && column + 8 <= columns) store_pack(target, load_pack(source));
        else
            for (int j = 0; j < 8 && column + j < columns; j++) target[j] = source[j];
    }
}

// c += sums. Four lanes write 32 bytes of a row.
__device__ __forceinline__ void add(const Sums &sums, float *c, long long stride, int rows, int columns) {
    int lane = threadIdx.x % 32;
    bool aligned = packs(c, stride);
#pragma unroll
    for (int i = 0; i < Sums::HEIGHT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp_row() + 16 * i + 8 * half + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int j = 0; j < Sums::WIDTH; j++) {
                int column = warp_column() + 8 * j + lane % 4 * 2;
                const float *values = sums.at[i][j] + 2 * half;
                float *target = c + row * stride + column;
                if (aligned && column + 2 <= columns) {
                    auto *run = reinterpret_cast<tile::Run<float, 2> *>(target);
                    tile::Run<float, 2> held = *run;
                    *run = {held.at[0] + values[0], held.at[1] + values[1]};
                    continue;
                }
                for (int h = 0; h < 2; h++)
                    if (column + h < columns) target[h] += values[h];
            }
        }
}

// Bytes of shared memory of the tensor cores' kernels: the stages, then a `Search`.
constexpr int STAGES_BYTES = STAGES * 2 * SLAB * 2;
static_assert(STAGES_BYTES + sizeof(Search) <= (48 << 10) + 64, "what the launch asks for");

__device__ __forceinline__ Search &search_after_stages() {
    ARL_SHARED(unsigned char, bytes);
    return *reinterpret_cast<Search *>(bytes + STAGES_BYTES);
}

// Nt (B_ALONG_K) and Nn: blockIdx.x is (tile of rows, tile of columns), the columns first.
template <typename T, bool B_ALONG_K>
__device__ void tokens(const int *offsets, int experts, const T *a, long long a_stride, const T *b,
                       long long b_stride, T *c, long long c_stride, int n, int k) {
    ARL_SHARED(T, shared);
    int tiles_n = (n + TILE - 1) / TILE, column = blockIdx.x % tiles_n * TILE;
    Place place = find<THREADS>(offsets, experts, blockIdx.x / tiles_n, search_after_stages());
    if (place.expert < 0) return;
    b += place.expert * (B_ALONG_K ? n : k) * b_stride + (B_ALONG_K ? column * b_stride : column);
    Feed<T, true> left(a + place.first * a_stride, a_stride, place.end - place.first);
    Feed<T, B_ALONG_K> right(b, b_stride, n - column);
    Sums sums;
    multiply(left, right, k, shared, sums);
    assign(sums, shared, c + place.first * c_stride + column, c_stride, left.rows, right.rows);
}

// Tn: blockIdx.x is (expert, tile of rows, tile of columns), the columns first; the sums are over the expert's tokens.
template <typename T>
__device__ __forceinline__ void gradients(const int *offsets, const T *a, long long a_stride, const T *b,
                                          long long b_stride, float *c, long long c_stride, int n, int k) {
    ARL_SHARED(T, shared);
    int tiles_n = (n + TILE - 1) / TILE, tiles_m = (k + TILE - 1) / TILE;
    int column = blockIdx.x % tiles_n * TILE, row = blockIdx.x / tiles_n % tiles_m * TILE;
    int expert = blockIdx.x / tiles_n / tiles_m;
    int first = offsets[expert], tokens = offsets[expert + 1] - first;
    if (tokens == 0) return;
    Feed<T, false> left(a + first * a_stride + row, a_stride, k - row);
    Feed<T, false> right(b + first * b_stride + column, b_stride, n - column);
    Sums sums;
    multiply(left, right, tokens, shared, sums);
    add(sums, c + ((long long)expert * k + row) * c_stride + column, c_stride, left.rows, right.rows);
}

// As `tokens`, in f32.
__device__ __forceinline__ void tokens_f32(const int *offsets, int experts, const float *a, long long a_stride,
                                           const float *b, long long b_stride, bool b_along_k, float *c,
                                           long long c_stride, int n, int k) {
    __shared__ tile::Slabs slabs;
    __shared__ Search search;
    int tiles_n = (n + tile::N - 1) / tile::N, column = blockIdx.x % tiles_n * tile::N;
    Place place = find<tile::THREADS>(offsets, experts, blockIdx.x / tiles_n, search);
    if (place.expert < 0) return;
    b += place.expert * (b_along_k ? n : k) * b_stride + (b_along_k ? column * b_stride : column);
    tile::Operand<float> left{a + place.first * a_stride, a_stride, true, place.end - place.first};
    tile::Operand<float> right{b, b_stride, b_along_k, n - column};
    tile::Sums sums;
    tile::multiply(left, right, 0, k, slabs, sums);
    tile::finish(sums, c + place.first * c_stride + column, c_stride, left.rows, right.rows, false,
                 [](int, float sum, float) { return sum; });
}

// As `gradients`, in f32.
__device__ __forceinline__ void gradients_f32(const int *offsets, const float *a, long long a_stride, const float *b,
                                              long long b_stride, float *c, long long c_stride, int n, int k) {
    __shared__ tile::Slabs slabs;
    int tiles_n = (n + tile::N - 1) / tile::N, tiles_m = (k + tile::M - 1) / tile::M;
    int column = blockIdx.x % tiles_n * tile::N, row = blockIdx.x / tiles_n % tiles_m * tile::M;
    int expert = blockIdx.x / tiles_n / tiles_m;
    int first = offsets[expert], tokens = offsets[expert + 1] - first;
    if (tokens == 0) return;
    tile::Operand<float> left{a + first * a_stride + row, a_stride, false, k - row};
    tile::Operand<float> right{b + first * b_stride + column, b_stride, false, n - column};
    tile::Sums sums;
    tile::multiply(left, right, 0, tokens, slabs, sums);
    tile::finish(sums, c + ((long long)expert * k + row) * c_stride + column, c_stride, left.rows, right.rows, true,
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
