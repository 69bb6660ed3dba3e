// Gates of the hybrid families: attention's output gate, head by head next to its query, and the shared expert's, one a token.
//
// Parting and joining: a thread a group of elements; each once in, once out. The gate of each element: packs of 16 bytes; reads x
// and the gate, writes one of them, or both gradients over the operands. The gate of each row: a warp a row.
#include "arl.cuh"

namespace gates {

constexpr int WARPS = THREADS / 32;
static_assert(WARPS == ROWS, "a warp a row");

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// Between rows `joined`, of `heads` pairs of a query and a gate and then `rest` columns, and rows `qkv` and `gates`; N elements a
// thread.
template <int N, bool SPLIT, typename J, typename T>
__device__ __forceinline__ void move(J *joined, T *qkv, T *gate, int heads, int dim, int rest, long long tokens) {
    const int queries = heads * dim, all = 2 * queries + rest;
    const long long at = (blockIdx.x * (long long)THREADS + threadIdx.x) * N;
    const long long token = at / all;
    if (token >= tokens) return;
    const int column = int(at - token * all);
    const int head = column / (2 * dim), within = column - head * 2 * dim;
    T *other;
    if (column >= 2 * queries) other = qkv + token * (queries + rest) + column - queries;
    else if (within < dim) other = qkv + token * (queries + rest) + head * dim + within;
    else other = gate + token * queries + head * dim + within - dim;
    if constexpr (SPLIT) store_group(other, load_group<N>(joined + at));
    else store_group(joined + at, load_group<N>(other));
}

// `out = x sigmoid(gate)`.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void gate_pack(const T *x, const T *gate, T *out, int valid) {
    Pack<T> xs = load_pack<ALIGNED>(x, valid), gs = load_pack<ALIGNED>(gate, valid);
#pragma unroll
    for (int j = 0; j < Pack<T>::SIZE; j++) xs.at[j] = store<T>(load(xs.at[j]) * sigmoid(load(gs.at[j])));
    store_pack<ALIGNED>(out, xs, valid);
}

// With `s = sigmoid(gate)`: `d` becomes `d s`, the gate `d x s (1 - s)`, and `1 - s = sigmoid(-gate)` without loss.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void gate_backward_pack(T *d, const T *x, T *gate, int valid) {
    Pack<T> ds = load_pack<ALIGNED>(d, valid), xs = load_pack<ALIGNED>(x, valid), gs = load_pack<ALIGNED>(gate, valid);
#pragma unroll
    for (int j = 0; j < Pack<T>::SIZE; j++) {
        const float g = load(gs.at[j]), of_out = load(ds.at[j]), s = sigmoid(g);
        ds.at[j] = store<T>(of_out * s);
        gs.at[j] = store<T>(of_out * load(xs.at[j]) * s * sigmoid(-g));
    }
    store_pack<ALIGNED>(d, ds, valid);
    store_pack<ALIGNED>(gate, gs, valid);
}

// This thread's pack of `len` elements: its first one, and how many it has.
template <typename T> __device__ __forceinline__ long long pack_start() {
    return (blockIdx.x * (long long)THREADS + threadIdx.x) * Pack<T>::SIZE;
}

template <typename T> __device__ __forceinline__ void gate(const T *x, const T *gate, T *out, long long len) {
    constexpr int SIZE = Pack<T>::SIZE;
    const long long start = pack_start<T>();
    const bool aligned = vectorizable(x, SIZE) && vectorizable(gate, SIZE) && vectorizable(out, SIZE);
    if (aligned && start + SIZE <= len) gate_pack<true>(x + start, gate + start, out + start, SIZE);
    else if (start < len) gate_pack<false>(x + start, gate + start, out + start, int(min(len - start, (long long)SIZE)));
}

template <typename T> __device__ __forceinline__ void gate_backward(T *d, const T *x, T *gate, long long len) {
    constexpr int SIZE = Pack<T>::SIZE;
    const long long start = pack_start<T>();
    const bool aligned = vectorizable(x, SIZE) && vectorizable(gate, SIZE) && vectorizable(d, SIZE);
    if (aligned && start + SIZE <= len) gate_backward_pack<true>(d + start, x + start, gate + start, SIZE);
    else if (start < len) gate_backward_pack<false>(d + start, x + start, gate + start, int(min(len - start, (long long)SIZE)));
}

// `out[t] += sigmoid(logits[t]) x[t]` for one row t a warp.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void add_rows(const T *x, const float *logits, T *out, long long rows, int width) {
    constexpr int SIZE = Pack<T>::SIZE;
    const long long row = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const float s = sigmoid(logits[row]);
    x += row * width;
    out += row * width;
    for (int i = threadIdx.x % 32 * SIZE; i < width; i += 32 * SIZE) {
        Pack<T> xs = load_pack<ALIGNED>(x + i, width - i), sums = load_pack<ALIGNED>(out + i, width - i);
#pragma unroll
        for (int j = 0; j < SIZE; j++) sums.at[j] = store<T>(load(sums.at[j]) + s * load(xs.at[j]));
        store_pack<ALIGNED>(out + i, sums, width - i);
    }
}

// With `s = sigmoid(logit)`: `d_x = s d_out`, `d_logit = (x . d_out) s (1 - s)`, for one row a warp.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void rows_backward(const T *d_out, const T *x, float *logits, T *d_x, long long rows, int width) {
    constexpr int SIZE = Pack<T>::SIZE;
    const long long row = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const float logit = logits[row], s = sigmoid(logit);
    d_out += row * width;
    x += row * width;
    d_x += row * width;
    float product = 0;
    for (int i = threadIdx.x % 32 * SIZE; i < width; i += 32 * SIZE) {
        Pack<T> ds = load_pack<ALIGNED>(d_out + i, width - i), xs = load_pack<ALIGNED>(x + i, width - i);
#pragma unroll
        for (int j = 0; j < SIZE; j++) {
            product += load(xs.at[j]) * load(ds.at[j]);
            ds.at[j] = store<T>(s * load(ds.at[j]));
        }
        store_pack<ALIGNED>(d_x + i, ds, width - i);
    }
    product = warp_sum(product);
    if (threadIdx.x % 32 == 0) logits[row] = product * s * sigmoid(-logit);
}

} // namespace gates

// `_unaligned`: an element a thread.
#define MOVE(name, T, N)                                                                                               \
    ARL_KERNEL(split_gates_##name, gates::THREADS, const T *joined, T *qkv, T *gates, int heads, int dim, int rest,    \
               long long tokens) {                                                                                     \
        gates::move<N, true>(joined, qkv, gates, heads, dim, rest, tokens);                                            \
    }                                                                                                                  \
    ARL_KERNEL(join_gates_##name, gates::THREADS, const T *qkv, const T *gates, T *joined, int heads, int dim,         \
               int rest, long long tokens) {                                                                           \
        gates::move<N, false>(joined, qkv, gates, heads, dim, rest, tokens);                                           \
    }
#define GATES(name, T)                                                                                                 \
    MOVE(name, T, Pack<T>::SIZE)                                                                                       \
    MOVE(unaligned_##name, T, 1)                                                                                       \
    ARL_KERNEL(gate_##name, gates::THREADS, const T *x, const T *gate, T *out, long long len) {                        \
        gates::gate(x, gate, out, len);                                                                                \
    }                                                                                                                  \
    ARL_KERNEL(gate_backward_##name, gates::THREADS, T *d, const T *x, T *gate, long long len) {                       \
        gates::gate_backward(d, x, gate, len);                                                                         \
    }                                                                                                                  \
    ARL_KERNEL(add_gated_rows_##name, gates::THREADS, const T *x, const float *logits, T *out, long long rows,         \
               int width) {                                                                                            \
        if (vectorizable(x, width) && vectorizable(out, width)) gates::add_rows<true>(x, logits, out, rows, width);    \
        else gates::add_rows<false>(x, logits, out, rows, width);                                                      \
    }                                                                                                                  \
    ARL_KERNEL(gated_rows_backward_##name, gates::THREADS, const T *d_out, const T *x, float *logits, T *d_x,          \
               long long rows, int width) {                                                                            \
        if (vectorizable(d_out, width) && vectorizable(x, width) && vectorizable(d_x, width))                          \
            gates::rows_backward<true>(d_out, x, logits, d_x, rows, width);                                            \
        else gates::rows_backward<false>(d_out, x, logits, d_x, rows, width);                                          \
    }
ARL_FOR_TYPES(GATES)
#undef GATES
#undef MOVE
