// Conversions and sums, element by element.
#include "arl.cuh"

namespace elementwise {

constexpr int THREADS = 256;

// One thread a pack of 8 elements, so that either type is read and written in 16-byte accesses.
constexpr int STEP = 8;

template <typename A, typename B> __device__ void convert(const A *source, B *target, long long len) {
    long long start = (blockIdx.x * (long long)THREADS + threadIdx.x) * STEP;
    long long end = start + STEP < len ? start + STEP : len;
    for (long long i = start; i < end; i++) target[i] = store<B>(load(source[i]));
}

template <typename T> __device__ void add(T *x, const T *delta, long long len) {
    long long start = (blockIdx.x * (long long)THREADS + threadIdx.x) * STEP;
    if (start + STEP <= len && packs(x, len) && packs(delta, len)) {
        for (long long i = start; i < start + STEP; i += Pack<T>::SIZE) {
            Pack<T> a = load_pack(x + i), b = load_pack(delta + i);
            for (int j = 0; j < Pack<T>::SIZE; j++) a.at[j] = store<T>(load(a.at[j]) + load(b.at[j]));
            store_pack(x + i, a);
        }
        return;
    }
    for (long long i = start; i < start + STEP && i < len; i++) x[i] = store<T>(load(x[i]) + load(delta[i]));
}

} // namespace elementwise

ARL_KERNEL(convert_f32_bf16, elementwise::THREADS, const float *source, bf16 *target, long long len) {
    elementwise::convert(source, target, len);
}

ARL_KERNEL(convert_bf16_f32, elementwise::THREADS, const bf16 *source, float *target, long long len) {
    elementwise::convert(source, target, len);
}

#define ADD(name, T)                                                                                                   \
    ARL_KERNEL(add_##name, elementwise::THREADS, T *x, const T *delta, long long len) { elementwise::add(x, delta, len); }
ARL_FOR_TYPES(ADD)
#undef ADD
