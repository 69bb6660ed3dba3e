// The gated activation of the MLP: `silu(gate) * up`, forward, and backward in place.
//
// A thread has one pack of 16 bytes of each row of gate and up; a row is some blocks' own. Forward: reads gate and up,
// writes out. Backward: reads gate, up and d_out, writes over gate and up.
#include "arl.cuh"

namespace swiglu {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

__device__ __forceinline__ float forward(float gate, float up) { return gate * sigmoid(gate) * up; }

// `d_gate = d_out up s (1 + gate (1 - s))` and `d_up = d_out gate s`, with `s = sigmoid(gate)`.
__device__ __forceinline__ void backward(float &gate, float &up, float d_out) {
    const float s = sigmoid(gate);
    const float d_gate = d_out * up * s * (1.0f + gate * (1.0f - s));
    up = d_out * gate * s;
    gate = d_gate;
}

// The packs of a row that a thread takes, where `chunks` blocks share a row: `first`, `first + step`, ..
struct Span {
    long long row;
    int first, step;
};

__device__ __forceinline__ Span span_of(int chunks) {
    const int row = blockIdx.x / chunks, chunk = blockIdx.x - row * chunks;
    return {row, int(chunk * blockDim.x + threadIdx.x), int(chunks * blockDim.x)};
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void forward_row(const T *gate_up, T *out, int width, int chunks) {
    constexpr int SIZE = Pack<T>::SIZE;
    const Span span = span_of(chunks);
    const T *gate = gate_up + span.row * 2 * width, *up = gate + width;
    out += span.row * width;
    for (int i = span.first * SIZE; i < width; i += span.step * SIZE) {
        Pack<T> g = load_pack<ALIGNED>(gate + i, width - i), u = load_pack<ALIGNED>(up + i, width - i);
#pragma unroll
        for (int j = 0; j < SIZE; j++) g.at[j] = store<T>(forward(load(g.at[j]), load(u.at[j])));
        store_pack<ALIGNED>(out + i, g, width - i);
    }
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void backward_row(T *gate_up, const T *d_out, int width, int chunks) {
    constexpr int SIZE = Pack<T>::SIZE;
    const Span span = span_of(chunks);
    T *gate = gate_up + span.row * 2 * width, *up = gate + width;
    d_out += span.row * width;
    for (int i = span.first * SIZE; i < width; i += span.step * SIZE) {
        Pack<T> g = load_pack<ALIGNED>(gate + i, width - i), u = load_pack<ALIGNED>(up + i, width - i);
        Pack<T> d = load_pack<ALIGNED>(d_out + i, width - i);
#pragma unroll
        for (int j = 0; j < SIZE; j++) {
            float of_gate = load(g.at[j]), of_up = load(u.at[j]);
            backward(of_gate, of_up, load(d.at[j]));
            g.at[j] = store<T>(of_gate);
            u.at[j] = store<T>(of_up);
        }
        store_pack<ALIGNED>(gate + i, g, width - i);
        store_pack<ALIGNED>(up + i, u, width - i);
    }
}

} // namespace swiglu

#define SWIGLU(name, T)                                                                                                \
    ARL_KERNEL(swiglu_##name, swiglu::MOST_THREADS, const T *gate_up, T *out, int width, int chunks) {                 \
        if (vectorizable(gate_up, width) && vectorizable(out, width))                                                  \
            swiglu::forward_row<true>(gate_up, out, width, chunks);                                                    \
        else swiglu::forward_row<false>(gate_up, out, width, chunks);                                                  \
    }                                                                                                                  \
    ARL_KERNEL(swiglu_backward_##name, swiglu::MOST_THREADS, T *gate_up, const T *d_out, int width, int chunks) {      \
        if (vectorizable(gate_up, width) && vectorizable(d_out, width))                                                \
            swiglu::backward_row<true>(gate_up, d_out, width, chunks);                                                 \
        else swiglu::backward_row<false>(gate_up, d_out, width, chunks);                                               \
    }
ARL_FOR_TYPES(SWIGLU)
#undef SWIGLU
