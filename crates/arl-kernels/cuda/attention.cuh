// What the attention kernels share: which tile of which sequence a block owns, the mask (CAUSAL, or none but the sequence's end),
// and products of tiles, on tensor cores and on CUDA cores.
//
// A block owns a tile of rows (queries, or keys where their gradients are formed) of one sequence and one head, and
// loops over the tiles of the other operand that the mask lets its rows see. Nothing is ever [T, T]. Each sum is in the
// order of those tiles.
#pragma once

#include "mma.cuh"

// The arguments that all passes over packed sequences have in common.
#define ATTENTION_INPUTS(T)                                                                                            \
    const T *q, long long q_stride, const T *k, long long k_stride, const T *v, long long v_stride,                    \
        const int *cu_seqlens, int count, int query_heads, int key_heads, int dim, int tokens, int window, float scale
#define ATTENTION_INPUT_VALUES                                                                                         \
    {q, q_stride}, {k, k_stride}, {v, v_stride}, {                                                                     \
        cu_seqlens, count, query_heads, key_heads, dim, tokens, window, scale                                          \
    }

namespace attention {

constexpr int WARPS = THREADS / 32;
constexpr float LOG2_E = 1.4426950408889634f;

// The running maximum before the first key. Not minus infinity, from which a masked score has no difference.
constexpr float MIN_SCORE = -1e30f;

// The number of this thread's warp, as a value that the compiler knows to be the same for all lanes: branches on it
// cost no registers and no second copy of what they guard.
__device__ __forceinline__ int warp_number() { return __shfl_sync(FULL, int(threadIdx.x / 32), 0); }

// Rows `stride` elements apart.
template <typename T> struct Matrix {
    T *data;
    long long stride;

    // From column `column` of row `row` on.
    __device__ __forceinline__ T *at(long long row, int column) const { return data + row * stride + column; }
};

struct Shape {
    const int *cu_seqlens;
    int count, query_heads, key_heads, dim, tokens, window;
    float scale;
};

// Rows `first`, `first + 1`, .. of a sequence that is tokens `start .. start + length` of the batch.
struct Tile {
    int start, length, first;
};

// Tile number `slot` of all sequences in tiles of `size`; none where `first >= length`. Sequence `s` has the slots from
// `cu_seqlens[s] / size + s` on, enough for its tiles, so that all of them are `tokens / size + count`.
__device__ __forceinline__ Tile tile_at(const Shape &shape, int size, int slot) {
    int sequence = 0;
    for (int end = shape.count; end - sequence > 1;) {
        int middle = (sequence + end) / 2;
        if (shape.cu_seqlens[middle] / size + middle <= slot) {
            sequence = middle;
        } else {
            end = middle;
        }
    }
    int start = shape.cu_seqlens[sequence];
    return {start, shape.cu_seqlens[sequence + 1] - start, (slot - start / size - sequence) * size};
}

// Whether the mask shows query `i` key `i - distance`: CAUSAL, as an unsigned number a negative distance is beyond every window;
// else a key of which `left` are left before the sequence ends, itself included.
template <bool CAUSAL> __device__ __forceinline__ bool is_visible(const Shape &shape, int distance, int left) {
    return CAUSAL ? static_cast<unsigned>(distance) < static_cast<unsigned>(shape.window) : left > 0;
}

// Whether any pair of the queries `i .. i_end` and the keys `j .. j_end` is visible, and whether all of them are, in a sequence of
// `length` tokens. No query: `i_end` is 0.
template <bool CAUSAL> __device__ __forceinline__ bool any_visible(const Shape &shape, int i, int i_end, int j, int j_end) {
    return CAUSAL ? j < i_end && i - (j_end - 1) < shape.window : i < i_end;
}
template <bool CAUSAL>
__device__ __forceinline__ bool all_visible(const Shape &shape, int i, int i_end, int j, int j_end, int length) {
    return CAUSAL ? j_end - 1 <= i && i_end - 1 - j < shape.window : j_end <= length;
}

// Sets all values of an array, of however many dimensions.
__device__ __forceinline__ void fill(float &target, float value) { target = value; }
template <typename A, int N> __device__ __forceinline__ void fill(A (&target)[N], float value) {
#pragma unroll
    for (int i = 0; i < N; i++) fill(target[i], value);
}

// ---- Tensor cores: tiles [rows, D] of bf16 or f16 in shared memory, swizzled: the 16-byte chunks of a row are permuted by its
// number, so that eight rows at one column are in different banks. Of D columns N are computed with: a head of 72 or 80 elements is
// 80 of 128, and has zeroes behind its end.

// Columns of a tile's rows whose products take N.
template <int N> constexpr int ROW_OF = N <= 64 ? 64 : N <= 128 ? 128 : 256;

#ifdef ARL_EMULATION
inline float exp2_fast(float x) { return exp2f(x); }
#else
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// The offset of chunk `chunk` of row `row` in a tile. That of `row + 8 y` is `offset + 8 y D`: so a lane needs one offset for all
// that it reads of a tile.
template <int D> __device__ __forceinline__ int swizzled(int row, int chunk) { return row * D + (chunk ^ (row & 7)) * 8; }

// The offset of `chunk ^ x`, where `offset` is that of a chunk below eight. Rows permute eight chunks among themselves, so that eights
// can be added, as constants of addresses, which take no registers: those that heads of 256 lack.
template <int D> __device__ __forceinline__ int chunk_at(int offset, int x) {
    return D == 256 ? (offset ^ x % 8 * 8) + x / 8 * 64 : offset ^ x * 8;
}

// The order of the steps of 16 columns over heads of 256: those that read at one permuted chunk, four constants apart, follow each
// other, so that its offset need not be kept.
__device__ __forceinline__ constexpr int step_256(int i) { return i / 4 + i % 4 * 4; }

// Begins to copy `ROWS` rows from global memory to a tile (cp.async), by a block of BLOCK_THREADS; those from `valid` on become
// zeroes, as do columns from `dim` on, which only a tile with N < D has.
template <int N, int ROWS, int BLOCK_THREADS = THREADS, typename T>
__device__ __forceinline__ void stage_async(T *tile, const T *source, long long stride, int valid, int dim) {
    constexpr int D = ROW_OF<N>;
    constexpr int CHUNKS = D / 8, AT_ONCE = BLOCK_THREADS / CHUNKS;
    static_assert(ROWS % AT_ONCE == 0 && AT_ONCE % 8 == 0, "whole rounds of copies, of whole groups of rows");
    int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    T *to = tile + swizzled<D>(row, chunk);
    // Within a tile, an int: the strides that tensor cores are given are small enough.
    const T *from = source + (row * static_cast<int>(stride) + chunk * 8);
    int rows_left = N == D || chunk * 8 < dim ? valid - row : 0;
#pragma unroll
    for (int i = 0; i < ROWS; i += AT_ONCE) {
        cp_async_16(to + i * D, from, i < rows_left);
        from += AT_ONCE * stride;
    }
}

// The fragments of operand A: rows `row ..` (a multiple of 16) of a tile, columns `16 step .. 16 step + 16`.
template <int D, typename T, int FRAGMENTS>
__device__ __forceinline__ void load_a_fragments(unsigned (&a)[FRAGMENTS][4], const T *tile, int row, int step) {
    int lane = threadIdx.x % 32, from = row * D + chunk_at<D>(swizzled<D>(lane % 16, lane / 16), 2 * step);
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++) ldmatrix_x4(a[m], tile + from + m * 16 * D);
}

// One step of `s += a b^T` over columns `16 step ..` of the tile `b` [8 COLUMNS, D].
template <int D, typename T, int FRAGMENTS, int COLUMNS>
__device__ __forceinline__ void gemm_abt(float (&s)[FRAGMENTS][COLUMNS][4], const unsigned (&a)[FRAGMENTS][4],
                                              const T *b, int step) {
    int lane = threadIdx.x % 32, from = chunk_at<D>(swizzled<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2), 2 * step);
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
        unsigned b_fragments[4];
        ldmatrix_x4(b_fragments, b + from + n * 8 * D);
        unsigned low[2] = {b_fragments[0], b_fragments[1]}, high[2] = {b_fragments[2], b_fragments[3]};
#pragma unroll
        for (int m = 0; m < FRAGMENTS; m++) {
            mma<T>(s[m][n], a[m], low);
            mma<T>(s[m][n + 1], a[m], high);
        }
    }
}

// `o += p b` for 8 WIDTH columns of the tile `b` [8 COLUMNS, D]; the accumulators `p` of another product are rounded to its type.
template <int D, typename T, int FRAGMENTS, int COLUMNS, int WIDTH>
__device__ __forceinline__ void gemm_ab(float (&o)[FRAGMENTS][WIDTH][4], const float (&p)[FRAGMENTS][COLUMNS][4],
                                        const T *b) {
    int lane = threadIdx.x % 32, from = swizzled<D>(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < COLUMNS / 2; step++) {
        // The accumulator's layout is that of operand A: a product's columns are the next one's steps.
        unsigned a[FRAGMENTS][4];
#pragma unroll
        for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&from)[4] = p[m][2 * step + i / 2];
                a[m][i] = pair<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < WIDTH; n += 2) {
            unsigned b_fragments[4];
            ldmatrix_x4_transposed(b_fragments, b + chunk_at<D>(from, n) + step * 16 * D);
            unsigned low[2] = {b_fragments[0], b_fragments[1]}, high[2] = {b_fragments[2], b_fragments[3]};
#pragma unroll
            for (int m = 0; m < FRAGMENTS; m++) {
                mma<T>(o[m][n], a[m], low);
                mma<T>(o[m][n + 1], a[m], high);
            }
        }
    }
}

// The online softmax: turns masked scores into exp(scale (score - maximum)), and rescales this thread's part of the sums and the
// accumulators by the change of the maximum.
template <int FRAGMENTS, int COLUMNS, int WIDTH>
__device__ __forceinline__ void online_softmax(float (&s)[FRAGMENTS][COLUMNS][4], float (&o)[FRAGMENTS][WIDTH][4],
                                               float (&row_max)[FRAGMENTS][2], float (&row_sum)[FRAGMENTS][2],
                                               float scale_log2) {
    float factor[FRAGMENTS][2];
    bool changed = false;
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float now = row_max[m][half];
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
                now = fmaxf(now, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
            changed |= now != row_max[m][half];
            factor[m][half] = exp2_fast((row_max[m][half] - now) * scale_log2);
            row_max[m][half] = now;
            float offset = now * scale_log2, sum = 0;
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[m][n][i] = exp2_fast(s[m][n][i] * scale_log2 - offset);
                    sum += s[m][n][i];
                }
            row_sum[m][half] = row_sum[m][half] * factor[m][half] + sum;
        }
    // Most tiles after the first few bring no new maximum.
    if (!__any_sync(FULL, changed)) return;
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int n = 0; n < WIDTH; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[m][n][i] *= factor[m][i / 2];
}

// The epilogue: writes `dim` columns of `o`, times `factor` of its row, to those of the rows `row .. row + 16 FRAGMENTS` that are
// below `end`, through the same rows of `tile`, which only this warp uses.
template <int N, typename T, int FRAGMENTS>
__device__ __forceinline__ void store_tile(const float (&o)[FRAGMENTS][N / 8][4], const float (&factor)[FRAGMENTS][2],
                                           T *tile, int row, int end, T *target, long long stride, int dim) {
    constexpr int D = ROW_OF<N>;
    int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float *values = &o[m][n][2 * half];
                unsigned bits = pair<T>(values[0] * factor[m][half], values[1] * factor[m][half]);
                int to = chunk_at<D>(swizzled<D>(lane / 4, 0), n) + (row + m * 16 + half * 8) * D + lane % 4 * 2;
                memcpy(tile + to, &bits, 4);
            }
    __syncwarp();
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < FRAGMENTS * 16 * CHUNKS / 32; i++) {
        int r = row + (i * 32 + lane) / CHUNKS, chunk = lane % CHUNKS;
        if (r < end && (N == D || chunk * 8 < dim))
            store_pack(target + r * stride + chunk * 8, load_pack(tile + swizzled<D>(r, chunk)));
    }
}

// ---- CUDA cores: tiles of f32 in shared memory, for every type and head size. A warp owns ROWS rows of its block's
// tile, a lane has one row of the tile that the block loops over.

// Columns of the largest head that a lane holds: `lane`, `lane + 32`, ..
constexpr int LANE_COLUMNS = 8;

typedef Pack<float> Float4;

// From one row of a tile to the next: whole fours, an odd number of them, so that eight rows are in different banks.
__device__ __forceinline__ int row_stride(int dim) { return ((dim + 3) / 4 | 1) * 4; }

template <bool ALIGNED, typename T>
__device__ __forceinline__ void stage_rows(float *tile, int rows, const T *source, long long stride, int valid, int dim) {
    constexpr int SIZE = Pack<T>::SIZE;
    int lane = threadIdx.x % 32, width = row_stride(dim);
    for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32)
        for (int c = lane * SIZE; c < width; c += 32 * SIZE) {
            Pack<T> pack{};
            if (row < valid && c < dim) pack = load_pack<ALIGNED>(source + row * stride + c, dim - c);
            for (int j = 0; j < SIZE; j++)
                if (c + j < width) tile[row * width + c + j] = load(pack.at[j]);
        }
}

// Copies `rows` rows from global memory to a tile; what is not there becomes zeroes.
template <typename T>
__device__ __forceinline__ void stage(float *tile, int rows, const T *source, long long stride, int valid, int dim) {
    if (vectorizable(source, stride) && dim % Pack<T>::SIZE == 0) {
        stage_rows<true>(tile, rows, source, stride, valid, dim);
    } else {
        stage_rows<false>(tile, rows, source, stride, valid, dim);
    }
}

// `s[r]`: the scalar product of row `r` of `a` and this lane's row of `b`.
__device__ __forceinline__ void scores(float (&s)[ROWS], const float *a, const float *b, int dim) {
    int stride = row_stride(dim);
    b += threadIdx.x % 32 * stride;
    for (int r = 0; r < ROWS; r++) s[r] = 0;
#pragma unroll 1
    for (int c = 0; c < dim; c += 4) {
        Float4 y = load_pack(b + c);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            Float4 x = load_pack(a + r * stride + c);
            // Fours are summed by themselves first: fewer roundings at the size of the whole sum.
            s[r] += (x.at[0] * y.at[0] + x.at[1] * y.at[1]) + (x.at[2] * y.at[2] + x.at[3] * y.at[3]);
        }
    }
}

// Exchanges the lanes' weights through shared memory, as rows [ROWS, 32] of `weights`.
__device__ __forceinline__ void share_weights(float *weights, const float (&w)[ROWS]) {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < ROWS; r++) weights[r * WEIGHTS_STRIDE + threadIdx.x % 32] = w[r];
    __syncwarp();
}

// `sum[r] += weights[r] tile`, this lane's columns: `lane + 32 x`.
__device__ __forceinline__ void accumulate(float (&sum)[ROWS][LANE_COLUMNS], const float *weights, const float *tile,
                                           int dim) {
    int lane = threadIdx.x % 32, stride = row_stride(dim);
    // As one loop: unrolled, it would take registers from the sums.
#pragma unroll 1
    for (int j = 0; j < 32; j += 4) {
        Float4 w[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) w[r] = load_pack(weights + r * WEIGHTS_STRIDE + j);
#pragma unroll
        for (int x = 0; x < LANE_COLUMNS; x++) {
            if (32 * x >= dim) continue;
            int column = min(lane + 32 * x, dim - 1);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float value = tile[(j + i) * stride + column];
#pragma unroll
                for (int r = 0; r < ROWS; r++) sum[r][x] += w[r].at[i] * value;
            }
        }
    }
}

// The epilogue: writes `sum`, times `factor` of its row, to those of this warp's rows that are below `valid`.
template <typename T>
__device__ __forceinline__ void store_rows(const float (&sum)[ROWS][LANE_COLUMNS], const float (&factor)[ROWS], int valid,
                                           T *target, long long stride, int dim) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int x = 0; x < LANE_COLUMNS; x++) {
            int column = threadIdx.x % 32 + 32 * x;
            if (r < valid && column < dim) target[r * stride + column] = store<T>(sum[r][x] * factor[r]);
        }
}

} // namespace attention
