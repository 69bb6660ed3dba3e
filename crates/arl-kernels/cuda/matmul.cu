// Matrix products of a router's f32 gradient and rows or weights of 16 bits, which the vendor's library does not take.
// split: an f32 matrix as the sum of two of bf16, which the library takes. Reads 4 bytes an element and writes 4.
// matmul: what cannot be split (f16 has too few exponents), on CUDA cores. One block a tile of [128, 64] and a part of k;
// each operand is read once for each tile of the other side, `c` is written once. Where a product has too few tiles to fill a
// GPU, k is split: each part's sums go to `parts` [parts, m, n] and a second kernel adds them up in their order.
#include "tile.cuh"

namespace matmul {

// Rows of `columns` elements as rows of twice as many: `high`, the nearest bf16, then `low`, the nearest to what is left. Both
// together have 16 bits and a sign: |x - high - low| <= 2^-17 |x|, as long as `low` is no subnormal. What is not finite stays so.
__device__ __forceinline__ void split(const float *x, long long x_stride, bf16 *parts, int rows, int columns) {
    typedef Group<bf16, SPLIT_STEP> Part;
    long long i = blockIdx.x * (long long)SPLIT_THREADS + threadIdx.x;
    int groups = columns / SPLIT_STEP;
    if (i >= (long long)rows * groups) return;
    long long row = i / groups;
    int column = i % groups * SPLIT_STEP;
    const float *source = x + row * x_stride + column;
    float values[SPLIT_STEP];
    if (vectorizable(x, x_stride)) {
#pragma unroll
        for (int j = 0; j < SPLIT_STEP; j += Pack<float>::SIZE) {
            Pack<float> pack = load_pack(source + j);
#pragma unroll
            for (int h = 0; h < Pack<float>::SIZE; h++) values[j + h] = pack.at[h];
        }
    } else {
        for (int j = 0; j < SPLIT_STEP; j++) values[j] = source[j];
    }
    Part high, low;
#pragma unroll
    for (int j = 0; j < SPLIT_STEP; j++) {
        high.at[j] = store<bf16>(values[j]);
        low.at[j] = store<bf16>(values[j] - load(high.at[j]));
    }
    bf16 *target = parts + row * 2 * columns + column;
    store_group(target, high);
    store_group(target + columns, low);
}

// `[n]` in any type, or null.
struct Bias {
    const unsigned char *data;
    // 0: f32, 1: bf16, 2: f16.
    int type;

    __device__ __forceinline__ float at(long long column) const {
        if (data == nullptr) return 0;
        if (type == 0) return reinterpret_cast<const float *>(data)[column];
        return type == 1 ? load(reinterpret_cast<const bf16 *>(data)[column])
                         : load(reinterpret_cast<const f16 *>(data)[column]);
    }
};

template <typename B, typename C>
__device__ void mixed(tile::Operand<float> a, tile::Operand<B> b, C *c, long long c_stride, int k, bool accumulate, Bias bias,
                      float *parts, int k_per_part) {
    __shared__ tile::SharedStages stages;
    int m = a.rows, n = b.rows, tiles_n = (n + tile::BLOCK_N - 1) / tile::BLOCK_N;
    int row = blockIdx.x / tiles_n * tile::BLOCK_M, column = blockIdx.x % tiles_n * tile::BLOCK_N;
    a.data += a.along_k ? row * a.stride : row;
    b.data += b.along_k ? column * b.stride : column;
    a.rows -= row;
    b.rows -= column;
    long long from = blockIdx.y * (long long)k_per_part;
    int end = from + k_per_part < k ? from + k_per_part : k;
    tile::Accumulators sums;
    tile::multiply(a, b, from, end, stages, sums);
    if (parts != nullptr) {
        parts += (blockIdx.y * (long long)m + row) * n + column;
        tile::epilogue(sums, parts, n, a.rows, b.rows, false, [](int, float sum, float) { return sum; });
        return;
    }
    c += row * c_stride + column;
    tile::epilogue(sums, c, c_stride, a.rows, b.rows, accumulate,
                 [&](int j, float sum, float before) { return sum + before + bias.at(column + j); });
}

// One thread an element of `c`.
template <typename C>
__device__ void sum(const float *parts, int count, C *c, long long c_stride, int m, int n, bool accumulate, Bias bias) {
    long long i = blockIdx.x * (long long)tile::THREADS + threadIdx.x, len = (long long)m * n;
    if (i >= len) return;
    float total = 0;
#pragma unroll 8
    for (int part = 0; part < count; part++) total += parts[part * len + i];
    long long row = i / n, column = i % n;
    C *target = c + row * c_stride + column;
    if (accumulate) total += load(*target);
    *target = store<C>(total + bias.at(column));
}

} // namespace matmul

ARL_KERNEL(split_f32_bf16, matmul::SPLIT_THREADS, const float *x, long long x_stride, bf16 *parts, int rows, int columns) {
    matmul::split(x, x_stride, parts, rows, columns);
}

#define MIXED(name, B, C)                                                                                              \
    ARL_KERNEL(matmul_f32_##name, tile::THREADS, const float *a, long long a_stride, int a_along_k, const B *b,        \
               long long b_stride, int b_along_k, C *c, long long c_stride, int m, int n, int k, int accumulate,       \
               const unsigned char *bias, int bias_type, float *parts, int k_per_part) {                            \
        matmul::mixed<B, C>({a, a_stride, a_along_k != 0, m}, {b, b_stride, b_along_k != 0, n}, c, c_stride, k,     \
                               accumulate != 0, {bias, bias_type}, parts, k_per_part);                         \
    }
#define MIXED_WITH(name, T)                                                                                            \
    MIXED(name##_f32, T, float)                                                                                        \
    MIXED(name##_##name, T, T)
ARL_FOR_NARROW(MIXED_WITH)
#undef MIXED_WITH
#undef MIXED

#define SUM(name, C)                                                                                                   \
    ARL_KERNEL(matmul_sum_##name, tile::THREADS, const float *parts, int count, C *c, long long c_stride, int m, \
               int n, int accumulate, const unsigned char *bias, int bias_type) {                                   \
        matmul::sum<C>(parts, count, c, c_stride, m, n, accumulate != 0, {bias, bias_type});                   \
    }
ARL_FOR_TYPES(SUM)
#undef SUM
