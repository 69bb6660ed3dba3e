// Weights in NF4: codes of 4 bits, two a byte, the first in the high half, and a scale for each 64 weights, which is an f32, or a
// code of 8 bits with an f32 for each 256 of them.
//
// nf4: a rectangle of a matrix as elements that products take. Reads half a byte and writes an element a weight. A thread has 8
// weights of a row, which in matrices of whole blocks are 4 bytes of one block.
// nf4_vector: the product of a matrix with one token. Reads half a byte a weight, and the token's elements from the cache: where
// the product is as short as that, nothing else costs time. A warp has a row.
#include "arl.cuh"

namespace nf4 {

// `arl_model::NF4_VALUES`.
__device__ __forceinline__ float value_of(unsigned code) {
    switch (code) {
    case 0: return -1.0f;
    case 1: return -0.6961928009986877f;
    case 2: return -0.5250730514526367f;
    case 3: return -0.39491748809814453f;
    case 4: return -0.28444138169288635f;
    case 5: return -0.18477343022823334f;
    case 6: return -0.09105003625154495f;
    case 7: return 0.0f;
    case 8: return 0.07958029955625534f;
    case 9: return 0.16093020141124725f;
    case 10: return 0.24611230194568634f;
    case 11: return 0.33791524171829224f;
    case 12: return 0.44070982933044434f;
    case 13: return 0.5626170039176941f;
    case 14: return 0.7229568362236023f;
    default: return 1.0f;
    }
}

struct Plain {
    const float *scales;
    __device__ __forceinline__ float of(long long block) const { return scales[block]; }
};

// `largest`: what is added to every scale, then the largest of each 256 scales. `values`: those of the 256 codes.
struct Nested {
    const unsigned char *scales;
    const float *largest, *values;
    __device__ __forceinline__ float of(long long block) const {
        // Rounded as a product and a sum, on every device.
        return __fadd_rn(__fmul_rn(values[scales[block]], largest[1 + block / NESTED_BLOCK]), largest[0]);
    }
};

// The code of weight `i` of the 8 in 4 bytes.
__device__ __forceinline__ unsigned code_of(unsigned bytes, int i) { return bytes >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15; }

// `out[r, c]` is the weight `first + r * width + c`; `out` is `[len / columns, columns]`.
template <typename S, typename T>
__device__ __forceinline__ void rectangle(const unsigned char *codes, S scales, long long first, long long width,
                                          long long columns, T *out, long long len) {
    const long long groups = (columns + STEP - 1) / STEP;
    const long long thread = blockIdx.x * (long long)THREADS + threadIdx.x;
    const long long row = thread / groups, column = thread % groups * STEP;
    if (row * columns >= len) return;
    const long long source = first + row * width + column;
    out += row * columns + column;
    if (source % STEP == 0 && column + STEP <= columns && vectorizable(out, STEP)) {
        const unsigned bytes = *reinterpret_cast<const unsigned *>(codes + source / 2);
        const float scale = scales.of(source / BLOCK);
#pragma unroll
        for (int i = 0; i < STEP; i += Pack<T>::SIZE) {
            Pack<T> pack;
#pragma unroll
            for (int j = 0; j < Pack<T>::SIZE; j++) pack.at[j] = store<T>(value_of(code_of(bytes, i + j)) * scale);
            store_pack(out + i, pack);
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < STEP && column + i < columns; i++) {
        const long long at = source + i;
        const unsigned byte = codes[at / 2];
        out[i] = store<T>(value_of(at % 2 ? byte & 15 : byte >> 4) * scales.of(at / BLOCK));
    }
}

// `out[r] = bias[r] + sum over c of x[c] w[r, c]`, of `width` columns in whole blocks; weights are rounded to T before.
template <typename S, typename T>
__device__ __forceinline__ void vector(const unsigned char *codes, S scales, int rows, int width, const T *x,
                                       const T *bias, T *out) {
    const int row = blockIdx.x * ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const long long start = (long long)row * width;
    float sum = 0;
    for (int column = lane * STEP; column < width; column += 32 * STEP) {
        const unsigned bytes = *reinterpret_cast<const unsigned *>(codes + (start + column) / 2);
        const float scale = scales.of((start + column) / BLOCK);
#pragma unroll
        for (int i = 0; i < STEP; i += Pack<T>::SIZE) {
            const Pack<T> pack = load_pack(x + column + i);
#pragma unroll
            for (int j = 0; j < Pack<T>::SIZE; j++)
                sum += rounded<T>(value_of(code_of(bytes, i + j)) * scale) * load(pack.at[j]);
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) out[row] = store<T>(bias ? sum + load(bias[row]) : sum);
}

} // namespace nf4

#define NF4(name, T)                                                                                                   \
    ARL_KERNEL(nf4_##name, nf4::THREADS, const unsigned char *codes, const float *scales, long long first,             \
               long long width, long long columns, T *out, long long len) {                                            \
        nf4::rectangle(codes, nf4::Plain{scales}, first, width, columns, out, len);                                    \
    }                                                                                                                  \
    ARL_KERNEL(nf4_nested_##name, nf4::THREADS, const unsigned char *codes, const unsigned char *scales,               \
               const float *largest, const float *values, long long first, long long width, long long columns, T *out, \
               long long len) {                                                                                        \
        nf4::rectangle(codes, nf4::Nested{scales, largest, values}, first, width, columns, out, len);                  \
    }                                                                                                                  \
    ARL_KERNEL(nf4_vector_##name, nf4::THREADS, const unsigned char *codes, const float *scales, int rows, int width,  \
               const T *x, const T *bias, T *out) {                                                                    \
        nf4::vector(codes, nf4::Plain{scales}, rows, width, x, bias, out);                                             \
    }                                                                                                                  \
    ARL_KERNEL(nf4_vector_nested_##name, nf4::THREADS, const unsigned char *codes, const unsigned char *scales,        \
               const float *largest, const float *values, int rows, int width, const T *x, const T *bias, T *out) {    \
        nf4::vector(codes, nf4::Nested{scales, largest, values}, rows, width, x, bias, out);                           \
    }
ARL_FOR_TYPES(NF4)
#undef NF4
