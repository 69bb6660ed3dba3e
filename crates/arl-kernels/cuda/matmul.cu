// Matrix products whose operands are of unlike types (a router's f32 gradient times rows or weights of 16 bits), which the
// vendor's library does not take. One block a tile of [128, 64] and a part of k; each operand is read once for each tile
// of the other side, `c` is written once. Where a product has too few tiles to fill a GPU, k is split: each part's sums
// go to `parts` [parts, m, n] and a second kernel adds them up in their order.
#include "tile.cuh"

namespace matmul {

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

template <typename A, typename B, typename C>
__device__ void mixed(tile::Operand<A> a, tile::Operand<B> b, C *c, long long c_stride, int k, bool accumulate, Bias bias,
                      float *parts, int k_per_part) {
    __shared__ tile::Slabs slabs;
    int m = a.rows, n = b.rows, tiles_n = (n + tile::N - 1) / tile::N;
    int row = blockIdx.x / tiles_n * tile::M, column = blockIdx.x % tiles_n * tile::N;
    a.data += a.along_k ? row * a.stride : row;
    b.data += b.along_k ? column * b.stride : column;
    a.rows -= row;
    b.rows -= column;
    long long from = blockIdx.y * (long long)k_per_part;
    int end = from + k_per_part < k ? from + k_per_part : k;
    tile::Sums sums;
    tile::multiply(a, b, from, end, slabs, sums);
    if (parts != nullptr) {
        parts += (blockIdx.y * (long long)m + row) * n + column;
        tile::finish(sums, parts, n, a.rows, b.rows, false, [](int, float sum, float) { return sum; });
        return;
    }
    c += row * c_stride + column;
    tile::finish(sums, c, c_stride, a.rows, b.rows, accumulate,
                 [&](int j, float sum, float before) { return sum + before + bias.at(column + j); });
}

constexpr int SUM_THREADS = 256;

// One thread an element of `c`.
template <typename C>
__device__ void sum(const float *parts, int count, C *c, long long c_stride, int m, int n, bool accumulate, Bias bias) {
    long long i = blockIdx.x * (long long)SUM_THREADS + threadIdx.x, len = (long long)m * n;
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

#define MIXED(name, A, B, C)                                                                                           \
    ARL_KERNEL(matmul_##name, tile::THREADS, const A *a, long long a_stride, int a_along_k, const B *b,                \
               long long b_stride, int b_along_k, C *c, long long c_stride, int m, int n, int k, int accumulate,       \
               const unsigned char *bias, int bias_type, float *parts, int k_per_part) {                            \
        matmul::mixed<A, B, C>({a, a_stride, a_along_k != 0, m}, {b, b_stride, b_along_k != 0, n}, c, c_stride, k,     \
                               accumulate != 0, {bias, bias_type}, parts, k_per_part);                         \
    }
#define MIXED_WITH(name, T)                                                                                            \
    MIXED(f32_##name##_f32, float, T, float)                                                                           \
    MIXED(f32_##name##_##name, float, T, T)                                                                            \
    MIXED(name##_f32_f32, T, float, float)                                                                             \
    MIXED(name##_f32_##name, T, float, T)                                                                              \
    MIXED(f32_f32_##name, float, float, T)
ARL_FOR_NARROW(MIXED_WITH)
#undef MIXED_WITH
#undef MIXED

#define SUM(name, C)                                                                                                   \
    ARL_KERNEL(matmul_sum_##name, matmul::SUM_THREADS, const float *parts, int count, C *c, long long c_stride, int m, \
               int n, int accumulate, const unsigned char *bias, int bias_type) {                                   \
        matmul::sum<C>(parts, count, c, c_stride, m, n, accumulate != 0, {bias, bias_type});                   \
    }
ARL_FOR_TYPES(SUM)
#undef SUM
