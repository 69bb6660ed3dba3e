// The gated activation of the MLP: `silu(gate) * up`, forward, and backward in place.
//
// A thread has one pack of 16 bytes of each row of gate and up; a row is some blocks' own. Forward: reads gate and up,
// writes out. Backward: reads gate, up and d_out, writes over gate and up. Rows of other widths or alignments go
// element by element.
#include "arl.cuh"

namespace swiglu {

constexpr int MOST_THREADS = 256;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

__device__ __forceinline__ float forward(float gate, float up) { return gate * sigmoid(gate) * up; }

// `d_gate = d_out up s (1 + gate (1 - s))` and `d_up = d_out gate s`, with `s = sigmoid(gate)`.
__device__ __forceinline__ void backward(float &gate, float &up, float d_out) {
    const float s = sigmoid(gate);
    const float d_gate = d_out * up * s * (1.0f + gate * (1.0f - s));
    up = d_out * gate * s;
    gate = d_gate;
}

// `row` of a matrix and the first unit of this thread, where `chunks` blocks share a row.
struct Place {
    long long row;
    int first, step;
};

__device__ __forceinline__ Place place(int chunks) {
    const int row = blockIdx.x / chunks, chunk = blockIdx.x - row * chunks;
    return {row, int(chunk * blockDim.x + threadIdx.x), int(chunks * blockDim.x)};
}

template <typename T> __device__ __forceinline__ void forward_row(const T *gate_up, T *out, int width, int chunks) {
    constexpr int SIZE = Pack<T>::SIZE;
    const Place at = place(chunks);
    const T *gate = gate_up + at.row * 2 * width, *up = gate + width;
    out += at.row * width;
    if (packs(gate_up, width) && packs(out, width)) {
        for (int i = at.first; i < width / SIZE; i += at.step) {
            Pack<T> g = load_pack(gate + i * SIZE), u = load_pack(up + i * SIZE);
#pragma unroll
            for (int j = 0; j < SIZE; j++) g.at[j] = store<T>(forward(load(g.at[j]), load(u.at[j])));
            store_pack(out + i * SIZE, g);
        }
        return;
    }
    for (int i = at.first; i < width; i += at.step) out[i] = store<T>(forward(load(gate[i]), load(up[i])));
}

template <typename T> __device__ __forceinline__ void backward_row(T *gate_up, const T *d_out, int width, int chunks) {
    constexpr int SIZE = Pack<T>::SIZE;
    const Place at = place(chunks);
    T *gate = gate_up + at.row * 2 * width, *up = gate + width;
    d_out += at.row * width;
    if (packs(gate_up, width) && packs(d_out, width)) {
        for (int i = at.first; i < width / SIZE; i += at.step) {
            Pack<T> g = load_pack(gate + i * SIZE), u = load_pack(up + i * SIZE);
            Pack<T> d = load_pack(d_out + i * SIZE);
#pragma unroll
            for (int j = 0; j < SIZE; j++) {
                float of_gate = load(g.at[j]), of_up = load(u.at[j]);
                backward(of_gate, of_up, load(d.at[j]));
                g.at[j] = store<T>(of_gate);
                u.at[j] = store<T>(of_up);
            }
            store_pack(gate + i * SIZE, g);
            store_pack(up + i * SIZE, u);
        }
        return;
    }
    for (int i = at.first; i < width; i += at.step) {
        float of_gate = load(gate[i]), of_up = load(up[i]);
        backward(of_gate, of_up, load(d_out[i]));
        gate[i] = store<T>(of_gate);
        up[i] = store<T>(of_up);
    }
}

} // namespace swiglu

#define SWIGLU(name, T)                                                                                                \
    ARL_KERNEL(swiglu_##name, swiglu::MOST_THREADS, const T *gate_up, T *out, int width, int chunks) {                 \
        swiglu::forward_row(gate_up, out, width, chunks);                                                              \
    }                                                                                                                  \
    ARL_KERNEL(swiglu_backward_##name, swiglu::MOST_THREADS, T *gate_up, const T *d_out, int width, int chunks) {      \
        swiglu::backward_row(gate_up, d_out, width, chunks);                                                           \
    }
ARL_FOR_TYPES(SWIGLU)
#undef SWIGLU
