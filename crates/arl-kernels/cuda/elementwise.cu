// Conversions, sums and multiples element by element, sums of rows by column, and scalar products.
//
// convert: reads and writes each element once. add: reads both, writes one. A thread has 8 elements in packs of 16
// bytes.
// scale: reads and writes each element once; which ones are dropped is a hash of their places (`backend/dropout.rs`).
// sum_rows: reads each element once. A warp reads 32 packs of a row; blocks share columns and rows, and what each has
// summed goes to `parts`, for `add_parts`.
// dot: reads each element once (one of the two where they are the same buffer); products and sums in f64. The blocks'
// sums go to `parts`, and one block of `dot_sum` adds them up.
// The order of each sum depends on the shape alone.
#include "arl.cuh"

namespace elementwise {

constexpr int WARPS = THREADS / 32;

// Converts STEP elements, or as many as are `valid`.
template <bool ALIGNED, typename A, typename B>
__device__ __forceinline__ void convert_step(const A *source, B *target, int valid) {
    constexpr int READ = Pack<A>::SIZE, WRITTEN = Pack<B>::SIZE;
    float values[STEP];
#pragma unroll
    for (int i = 0; i < STEP; i += READ) {
        Pack<A> pack = load_pack<ALIGNED>(source + i, valid - i);
#pragma unroll
        for (int j = 0; j < READ; j++) values[i + j] = load(pack.at[j]);
    }
#pragma unroll
    for (int i = 0; i < STEP; i += WRITTEN) {
        Pack<B> pack;
#pragma unroll
        for (int j = 0; j < WRITTEN; j++) pack.at[j] = store<B>(values[i + j]);
        store_pack<ALIGNED>(target + i, pack, valid - i);
    }
}

template <typename A, typename B> __device__ __forceinline__ void convert(const A *source, B *target, long long len) {
    const long long start = (blockIdx.x * (long long)THREADS + threadIdx.x) * STEP;
    if (start + STEP <= len && vectorizable(source, STEP) && vectorizable(target, STEP)) {
        convert_step<true>(source + start, target + start, STEP);
    } else if (start < len) {
        convert_step<false>(source + start, target + start, int(min(len - start, (long long)STEP)));
    }
}

template <bool ALIGNED, typename T> __device__ __forceinline__ void add_pack(T *x, const T *delta, int valid) {
    Pack<T> a = load_pack<ALIGNED>(x, valid), b = load_pack<ALIGNED>(delta, valid);
#pragma unroll
    for (int j = 0; j < Pack<T>::SIZE; j++) a.at[j] = store<T>(load(a.at[j]) + load(b.at[j]));
    store_pack<ALIGNED>(x, a, valid);
}

template <typename T> __device__ __forceinline__ void add(T *x, const T *delta, long long len) {
    constexpr int SIZE = Pack<T>::SIZE;
    const bool aligned = vectorizable(x, SIZE) && vectorizable(delta, SIZE);
    const long long block = blockIdx.x * (long long)THREADS * STEP;
#pragma unroll
    for (int i = 0; i < STEP / SIZE; i++) {
        // Neighbouring threads have neighbouring packs.
        const long long start = block + (i * THREADS + threadIdx.x) * SIZE;
        if (aligned && start + SIZE <= len) {
            add_pack<true>(x + start, delta + start, SIZE);
        } else if (start < len) {
            add_pack<false>(x + start, delta + start, int(min(len - start, (long long)SIZE)));
        }
    }
}

// `low`, `high`: the hash's key. An element whose hash is below `threshold` is dropped. `first`: the place of the first element; rows
// of `own` elements are parts of rows of `whole`.
struct Mask {
    unsigned low, high, threshold;
    long long first, own, whole;

    __device__ __forceinline__ bool drops(long long element) const {
        const long long place = own == whole ? element : element / own * whole + element % own;
        const unsigned long long at = first + place;
        return mix(mix((unsigned)at ^ low) ^ (unsigned)(at >> 32) ^ high) < threshold;
    }
};

// `start`: the first element.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void scale_pack(const T *x, float factor, const Mask &mask, T *out, long long start, int valid) {
    Pack<T> pack = load_pack<ALIGNED>(x + start, valid);
#pragma unroll
    for (int j = 0; j < Pack<T>::SIZE; j++)
        pack.at[j] = store<T>(mask.drops(start + j) ? 0.0f : factor * load(pack.at[j]));
    store_pack<ALIGNED>(out + start, pack, valid);
}

template <typename T>
__device__ __forceinline__ void scale(const T *x, float factor, const Mask &mask, T *out, long long len) {
    constexpr int SIZE = Pack<T>::SIZE;
    const bool aligned = vectorizable(x, SIZE) && vectorizable(out, SIZE);
    const long long block = blockIdx.x * (long long)THREADS * STEP;
#pragma unroll
    for (int i = 0; i < STEP / SIZE; i++) {
        const long long start = block + (i * THREADS + threadIdx.x) * SIZE;
        if (aligned && start + SIZE <= len) {
            scale_pack<true>(x, factor, mask, out, start, SIZE);
        } else if (start < len) {
            const int valid = int(min(len - start, (long long)SIZE));
            scale_pack<false>(x, factor, mask, out, start, valid);
        }
    }
}

// Row `blockIdx.y` of `parts` becomes the sum of rows `blockIdx.y * WARPS + warp`, and so on in steps of all warps;
// `blockIdx.x` counts tiles of 32 packs.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void sum_rows(const T *x, long long stride, float *parts, int rows, int columns) {
    constexpr int SIZE = Pack<T>::SIZE, TILE = 32 * SIZE;
    __shared__ float sums[WARPS][TILE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x * TILE, start = tile + lane * SIZE;
    const int step = gridDim.y * WARPS;
    float total[SIZE] = {};
    if (start < columns) {
#pragma unroll 4
        for (int row = blockIdx.y * WARPS + warp; row < rows; row += step) {
            Pack<T> pack = load_pack<ALIGNED>(x + row * stride + start, columns - start);
#pragma unroll
            for (int j = 0; j < SIZE; j++) total[j] += load(pack.at[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < SIZE; j++) sums[warp][lane * SIZE + j] = total[j];
    __syncthreads();
    for (int i = threadIdx.x; i < TILE && tile + i < columns; i += THREADS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sums[w][i];
        parts[(long long)blockIdx.y * columns + tile + i] = sum;
    }
}

// The sum over a block, in the same order every time, for thread 0.
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double sums[WARPS];
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL, value, distance);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < WARPS; i++) sum += sums[i];
    return sum;
}

__device__ __forceinline__ void dot_parts(const float *a, const float *b, double *parts, long long len) {
    constexpr int SIZE = Pack<float>::SIZE;
    const bool aligned = vectorizable(a, SIZE) && vectorizable(b, SIZE);
    const long long step = (long long)gridDim.x * THREADS * SIZE;
    long long i = (blockIdx.x * (long long)THREADS + threadIdx.x) * SIZE;
    double sum = 0;
    // Two packs at once, so that more of them are on their way.
    for (; aligned && i + step + SIZE <= len; i += 2 * step) {
        Pack<float> x[2], y[2];
#pragma unroll
        for (int p = 0; p < 2; p++) {
            x[p] = load_pack(a + i + p * step);
            y[p] = a == b ? x[p] : load_pack(b + i + p * step);
        }
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int j = 0; j < SIZE; j++) sum += double(x[p].at[j]) * double(y[p].at[j]);
    }
    for (; i < len; i += step)
        for (int j = 0; j < SIZE && i + j < len; j++) sum += double(a[i + j]) * double(b[i + j]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__device__ __forceinline__ void dot_sum(const double *parts, double *out, int count) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[0] += sum;
}

} // namespace elementwise

#define CONVERT(name, T)                                                                                               \
    ARL_KERNEL(convert_f32_##name, elementwise::THREADS, const float *source, T *target, long long len) {              \
        elementwise::convert(source, target, len);                                                                     \
    }                                                                                                                  \
    ARL_KERNEL(convert_##name##_f32, elementwise::THREADS, const T *source, float *target, long long len) {            \
        elementwise::convert(source, target, len);                                                                     \
    }
ARL_FOR_NARROW(CONVERT)
#undef CONVERT

#define ELEMENTWISE(name, T)                                                                                           \
    ARL_KERNEL(add_##name, elementwise::THREADS, T *x, const T *delta, long long len) {                                \
        elementwise::add(x, delta, len);                                                                               \
    }                                                                                                                  \
    ARL_KERNEL(scale_##name, elementwise::THREADS, const T *x, float factor, int key_low, int key_high, int threshold, \
               long long first, long long own, long long whole, T *out, long long len) {                               \
        const elementwise::Mask mask = {(unsigned)key_low, (unsigned)key_high, (unsigned)threshold, first, own, whole}; \
        elementwise::scale(x, factor, mask, out, len);                                                                 \
    }                                                                                                                  \
    ARL_KERNEL(sum_rows_##name, elementwise::THREADS, const T *x, long long stride, float *parts, int rows,            \
               int columns) {                                                                                          \
        if (vectorizable(x, stride) && columns % Pack<T>::SIZE == 0)                                                   \
            elementwise::sum_rows<true>(x, stride, parts, rows, columns);                                              \
        else elementwise::sum_rows<false>(x, stride, parts, rows, columns);                                            \
    }
ARL_FOR_TYPES(ELEMENTWISE)
#undef ELEMENTWISE

ARL_KERNEL(dot_parts, elementwise::THREADS, const float *a, const float *b, double *parts, long long len) {
    elementwise::dot_parts(a, b, parts, len);
}

ARL_KERNEL(dot_sum, elementwise::THREADS, const double *parts, double *out, int count) {
    elementwise::dot_sum(parts, out, count);
}
