// Weights in NF4 as elements that products take: codes of 4 bits, two a byte, the first in the high half, and a scale for each
// 64 weights, which is an f32, or a code of 8 bits with an f32 for each 256 of them.
//
// Reads half a byte and writes an element a weight. A thread has 8 weights, which are 4 bytes of one block.
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

template <typename T>
__device__ __forceinline__ void dequantize(const unsigned char *codes, float scale, long long start, T *out,
                                           long long len) {
#pragma unroll
    for (int i = 0; i < STEP; i += 2) {
        if (start + i >= len) return;
        const unsigned byte = codes[(start + i) / 2];
        out[start + i] = store<T>(value_of(byte >> 4) * scale);
        if (start + i + 1 < len) out[start + i + 1] = store<T>(value_of(byte & 15) * scale);
    }
}

template <typename T>
__device__ __forceinline__ void plain(const unsigned char *codes, const float *scales, T *out, long long len) {
    const long long start = (blockIdx.x * (long long)THREADS + threadIdx.x) * STEP;
    if (start < len) dequantize(codes, scales[start / BLOCK], start, out, len);
}

// `largest`: what is added to every scale, then the largest of each 256 scales. `values`: those of the 256 codes.
template <typename T>
__device__ __forceinline__ void nested(const unsigned char *codes, const unsigned char *scales, const float *largest,
                                       const float *values, T *out, long long len) {
    const long long start = (blockIdx.x * (long long)THREADS + threadIdx.x) * STEP;
    if (start >= len) return;
    const long long block = start / BLOCK;
    // Rounded as a product and a sum, on every device.
    const float scale = __fadd_rn(__fmul_rn(values[scales[block]], largest[1 + block / NESTED_BLOCK]), largest[0]);
    dequantize(codes, scale, start, out, len);
}

}

#define NF4(name, T)                                                                                                   \
    ARL_KERNEL(nf4_##name, nf4::THREADS, const unsigned char *codes, const float *scales, T *out, long long len) {     \
        nf4::plain(codes, scales, out, len);                                                                           \
    }                                                                                                                  \
    ARL_KERNEL(nf4_nested_##name, nf4::THREADS, const unsigned char *codes, const unsigned char *scales,               \
               const float *largest, const float *values, T *out, long long len) {                                     \
        nf4::nested(codes, scales, largest, values, out, len);                                                         \
    }
ARL_FOR_TYPES(NF4)
#undef NF4
