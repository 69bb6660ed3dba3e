// What vision towers have besides the decoder's kernels and LayerNorm: GELU, positions interpolated from a learned table, and rows
// that are added or cleared by their numbers.
//
// GELU: reads x, or x and the gradient, and writes one of them; packs of 16 bytes.
// Interpolation: a warp a row, four rows of the table in. Backward, without atomics: a block owns a row of the table, looks at the
// taps of all patches in their order, 32 patches at a time, and adds those of its row. Bytes: all taps a row of the table, which
// come from the second-level cache, and the rows that have the tap.
#include "arl.cuh"

namespace gelu {

// `2 sqrt(2 / pi)`, and 0.044715 times as much; most of x^2, beyond which the slope is 0 or 1.
constexpr float ROOT = 1.5957691f, CUBIC = 0.071354814f, MOST_SQUARE = 1e4f;

struct Tanh {
    // `x / 2 (1 + tanh(u)) = x sigmoid(2 u)`.
    static __device__ __forceinline__ float value(float x) {
        const float v = x * (ROOT + CUBIC * fminf(x * x, MOST_SQUARE)), e = expf(-fabsf(v)), s = __fdividef(1.0f, 1.0f + e);
        return x * (v >= 0 ? s : e * s);
    }

    static __device__ __forceinline__ float slope(float x) {
        const float squared = fminf(x * x, MOST_SQUARE);
        const float v = x * (ROOT + CUBIC * squared), e = expf(-fabsf(v)), s = __fdividef(1.0f, 1.0f + e);
        return (v >= 0 ? s : e * s) + x * (e * s * s) * (ROOT + 3 * CUBIC * squared);
    }
};

struct Erf {
    // With the tail `q` of the normal distribution from |x| on: `x (1 - q)` above 0, `x q` below.
    static __device__ __forceinline__ float value(float x) {
        const float a = fabsf(x);
        return fmaxf(x, 0.0f) - a * tail(a);
    }

    // The distribution's integral up to x, and x times its density.
    static __device__ __forceinline__ float slope(float x) {
        const float q = tail(fabsf(x)), density = 0.3989423f * expf(-0.5f * x * x);
        return (x > 0 ? 1.0f - q : q) + x * density;
    }

    static __device__ __forceinline__ float tail(float a) { return 0.5f * erfcf(a * 0.70710678f); }
};

template <bool ALIGNED, typename F, typename T> __device__ __forceinline__ void forward_pack(const T *x, T *out, int valid) {
    Pack<T> pack = load_pack<ALIGNED>(x, valid);
#pragma unroll
    for (int j = 0; j < Pack<T>::SIZE; j++) pack.at[j] = store<T>(F::value(load(pack.at[j])));
    store_pack<ALIGNED>(out, pack, valid);
}

template <bool ALIGNED, typename F, typename T> __device__ __forceinline__ void backward_pack(const T *x, T *d_x, int valid) {
    Pack<T> values = load_pack<ALIGNED>(x, valid), d = load_pack<ALIGNED>(d_x, valid);
#pragma unroll
    for (int j = 0; j < Pack<T>::SIZE; j++) d.at[j] = store<T>(load(d.at[j]) * F::slope(load(values.at[j])));
    store_pack<ALIGNED>(d_x, d, valid);
}

// Calls `f(start, valid)` for this thread's packs of `len` elements; neighbouring threads have neighbouring packs.
template <typename T, typename F> __device__ __forceinline__ void each_pack(long long len, F f) {
    constexpr int SIZE = Pack<T>::SIZE;
    const long long block = blockIdx.x * (long long)THREADS * STEP;
#pragma unroll
    for (int i = 0; i < STEP / SIZE; i++) {
        const long long start = block + (i * THREADS + threadIdx.x) * SIZE;
        if (start < len) f(start, int(min(len - start, (long long)SIZE)));
    }
}

template <typename F, typename T> __device__ __forceinline__ void forward(const T *x, T *out, long long len) {
    const bool aligned = vectorizable(x, Pack<T>::SIZE) && vectorizable(out, Pack<T>::SIZE);
    each_pack<T>(len, [&](long long start, int valid) {
        if (aligned && valid == Pack<T>::SIZE) forward_pack<true, F>(x + start, out + start, valid);
        else forward_pack<false, F>(x + start, out + start, valid);
    });
}

template <typename F, typename T> __device__ __forceinline__ void backward(const T *x, T *d_x, long long len) {
    const bool aligned = vectorizable(x, Pack<T>::SIZE) && vectorizable(d_x, Pack<T>::SIZE);
    each_pack<T>(len, [&](long long start, int valid) {
        if (aligned && valid == Pack<T>::SIZE) backward_pack<true, F>(x + start, d_x + start, valid);
        else backward_pack<false, F>(x + start, d_x + start, valid);
    });
}

} // namespace gelu

namespace vision {

constexpr int WARPS = THREADS / 32;
static_assert(WARPS == ROWS, "a warp a row");

// The row of this warp.
__device__ __forceinline__ long long row_of_warp() { return blockIdx.x * (long long)WARPS + threadIdx.x / 32; }

template <bool ALIGNED, typename T>
__device__ __forceinline__ void interpolate_row(const T *const (&rows)[TAPS], const float (&weights)[TAPS], T *out, int width) {
    constexpr int SIZE = Pack<T>::SIZE;
    for (int i = threadIdx.x % 32 * SIZE; i < width; i += 32 * SIZE) {
        Pack<T> result = load_pack<ALIGNED>(out + i, width - i);
        float sums[SIZE] = {};
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) {
            Pack<T> pack = load_pack<ALIGNED>(rows[tap] + i, width - i);
#pragma unroll
            for (int j = 0; j < SIZE; j++) sums[j] += weights[tap] * load(pack.at[j]);
        }
#pragma unroll
        for (int j = 0; j < SIZE; j++) result.at[j] = store<T>(load(result.at[j]) + sums[j]);
        store_pack<ALIGNED>(out + i, result, width - i);
    }
}

// `out[n] += sum over j of weights[n, j] table[taps[n, j]]` for one row n a warp; the table has `most` rows.
template <typename T>
__device__ __forceinline__ void interpolate(const T *table, const int *taps, const float *weights, T *out, long long count,
                                            long long most, int width) {
    const long long n = row_of_warp();
    if (n >= count) return;
    const T *rows[TAPS];
    float own[TAPS];
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
        const int row = taps[n * TAPS + tap];
        ARL_REFUSE(row < 0 || row >= most, "a tap is outside the table");
        rows[tap] = table + row * (long long)width;
        own[tap] = weights[n * TAPS + tap];
    }
    if (vectorizable(table, width) && vectorizable(out, width)) interpolate_row<true>(rows, own, out + n * width, width);
    else interpolate_row<false>(rows, own, out + n * width, width);
}

// Adds N columns from `column` on of what taps on row `row` of the table give it, in the order of (n, tap).
template <int N, typename T>
__device__ __forceinline__ void add_taps(const T *d_out, const int *taps, const float *weights, float *d_table, int count,
                                         int row, int most, int width, int column) {
    const int lane = threadIdx.x % 32;
    // Threads past the last column stay with their warp.
    const bool in_row = column < width;
    d_table += (long long)row * width + column;
    Group<float, N> sum{};
    if (in_row) sum = load_group<N>(d_table);
    bool any = false;
    for (int base = 0; base < count; base += 32) {
        bool named = false;
        if (base + lane < count) {
#pragma unroll
            for (int tap = 0; tap < TAPS; tap++) {
                const int to = taps[(long long)(base + lane) * TAPS + tap];
                if (THOROUGH) ARL_REFUSE(to < 0 || to >= most, "a tap is outside the table");
                named |= to == row;
            }
        }
        for (unsigned found = __ballot_sync(FULL, named); found != 0; found &= found - 1) {
            const long long n = base + __ffs(int(found)) - 1;
            any = true;
            Group<T, N> d{};
            if (in_row) d = load_group<N>(d_out + n * width + column);
#pragma unroll
            for (int tap = 0; tap < TAPS; tap++) {
                if (taps[n * TAPS + tap] != row) continue;
                const float weight = weights[n * TAPS + tap];
#pragma unroll
                for (int j = 0; j < N; j++) sum.at[j] += weight * load(d.at[j]);
            }
        }
    }
    if (any && in_row) store_group(d_table, sum);
}

// The row of the table that is the block's; `blockIdx.y` counts tiles of its columns.
template <int N, typename T>
__device__ __forceinline__ void interpolate_backward(const T *d_out, const int *taps, const float *weights, float *d_table,
                                                     int count, int width) {
    constexpr int TILE = TAP_THREADS * N;
    for (int start = blockIdx.y * TILE; start < width; start += gridDim.y * TILE)
        add_taps<N>(d_out, taps, weights, d_table, count, blockIdx.x, gridDim.x, width, start + threadIdx.x * N);
}

// Whether a row before this one names the same.
__device__ __forceinline__ void refuse_twice(const int *rows, long long row, int to) {
    if (THOROUGH)
        for (long long i = threadIdx.x % 32; i < row; i += 32) ARL_REFUSE(rows[i] == to, "a row is named twice");
}

template <bool ALIGNED, typename T> __device__ __forceinline__ void add_row(const T *x, T *out, int width) {
    constexpr int SIZE = Pack<T>::SIZE;
    for (int i = threadIdx.x % 32 * SIZE; i < width; i += 32 * SIZE) {
        Pack<T> a = load_pack<ALIGNED>(out + i, width - i), b = load_pack<ALIGNED>(x + i, width - i);
#pragma unroll
        for (int j = 0; j < SIZE; j++) a.at[j] = store<T>(load(a.at[j]) + load(b.at[j]));
        store_pack<ALIGNED>(out + i, a, width - i);
    }
}

// `out[rows[r]] += x[r]` for one row r a warp; out has `most` rows.
template <typename T>
__device__ __forceinline__ void add_rows(const T *x, const int *rows, T *out, long long count, long long most, int width) {
    const long long row = row_of_warp();
    if (row >= count) return;
    const int to = rows[row];
    ARL_REFUSE(to < 0 || to >= most, "a row to add to is outside the matrix");
    refuse_twice(rows, row, to);
    const bool aligned = vectorizable(x, width) && vectorizable(out, width);
    x += row * width;
    out += to * (long long)width;
    if (aligned) add_row<true>(x, out, width);
    else add_row<false>(x, out, width);
}

// `x[rows[r]] = 0` for one row r a warp; x has `most` rows.
template <typename T>
__device__ __forceinline__ void zero_rows(const int *rows, T *x, long long count, long long most, int width) {
    constexpr int SIZE = Pack<T>::SIZE;
    const long long row = row_of_warp();
    if (row >= count) return;
    const int to = rows[row];
    ARL_REFUSE(to < 0 || to >= most, "a row to clear is outside the matrix");
    refuse_twice(rows, row, to);
    const bool aligned = vectorizable(x, width);
    x += to * (long long)width;
    const int lane = threadIdx.x % 32;
    if (aligned)
        for (int i = lane * SIZE; i < width; i += 32 * SIZE) store_pack(x + i, Pack<T>{});
    else
        for (int i = lane; i < width; i += 32) x[i] = T{};
}

} // namespace vision

#define GELU(form, F, name, T)                                                                                         \
    ARL_KERNEL(gelu_##form##_##name, gelu::THREADS, const T *x, T *out, long long len) {                               \
        gelu::forward<gelu::F>(x, out, len);                                                                           \
    }                                                                                                                  \
    ARL_KERNEL(gelu_##form##_backward_##name, gelu::THREADS, const T *x, T *d_x, long long len) {                      \
        gelu::backward<gelu::F>(x, d_x, len);                                                                          \
    }
#define GELUS(name, T) GELU(tanh, Tanh, name, T) GELU(erf, Erf, name, T)
ARL_FOR_TYPES(GELUS)
#undef GELUS
#undef GELU

#define VISION(name, T)                                                                                                \
    ARL_KERNEL_ALONE(interpolate_##name, vision::THREADS, const T *table, const int *taps, const float *weights,       \
                     T *out, long long count, long long most, int width) {                                             \
        vision::interpolate(table, taps, weights, out, count, most, width);                                            \
    }                                                                                                                  \
    ARL_KERNEL(interpolate_backward_##name, vision::TAP_THREADS, const T *d_out, const int *taps,                      \
               const float *weights, float *d_table, int count, int width) {                                           \
        constexpr int N = vision::COLUMNS;                                                                             \
        if (vectorizable<N>(d_out, width) && vectorizable<N>(d_table, width))                                          \
            vision::interpolate_backward<N>(d_out, taps, weights, d_table, count, width);                              \
        else vision::interpolate_backward<1>(d_out, taps, weights, d_table, count, width);                             \
    }                                                                                                                  \
    ARL_KERNEL(add_rows_##name, vision::THREADS, const T *x, const int *rows, T *out, long long count, long long most, \
               int width) {                                                                                            \
        vision::add_rows(x, rows, out, count, most, width);                                                            \
    }                                                                                                                  \
    ARL_KERNEL(zero_rows_##name, vision::THREADS, const int *rows, T *x, long long count, long long most, int width) { \
        vision::zero_rows(rows, x, count, most, width);                                                                \
    }
ARL_FOR_TYPES(VISION)
#undef VISION
