// AdamW with clipping in one pass over a run of parameters: f32 weights, the two halves of split masters, f32
// masters and the f16 weights that are their roundings, or bf16 weights that are rounded at random. The factor of clipping and of the loss scale is computed here from
// the sum of squares, so that the host need not wait for it. Each step of the formula is rounded by itself, as on the CPU:
// the bits of the update are the same.
//
// Bytes of a parameter: 16 read (weight, gradient, two moments), 12 written, with f32 weights and with split ones; with
// f16 weights 2 more are written. With bf16 weights alone, 14 read and 10 written.
#include "arl.cuh"

namespace optimizer {

constexpr int THREADS = 256;

// Parameters of a thread at a time: 16 bytes of f32.
constexpr int N = 4;

// Times that a block goes on, so that the factor of the clipping costs little.
constexpr int ROUNDS = 4;

// The numbers of one update, as `AdamW` of the engine has them.
struct Rates {
    float clip, keep, beta1, beta2, size, root, epsilon;
};

// The factor on the gradients where `squares` is the sum of their squares, and they are to be divided by `scale`.
__device__ float clip_factor(double squares, float scale, float max_grad_norm) {
    double factor = 1;
    if (max_grad_norm != 0) factor = fmin((double)max_grad_norm / (sqrt(squares) / (double)scale + 1e-6), 1.0);
    return (float)(factor / (double)scale);
}

// The new weight; the moments are updated. Intrinsics, lest products and sums are fused.
__device__ __forceinline__ float apply(const Rates &r, float weight, float gradient, float &moment1, float &moment2) {
    gradient = __fmul_rn(gradient, r.clip);
    // torch's own order: lerp(m, g, 1 - beta1), v * beta2 + (1 - beta2) * g * g.
    moment1 = __fadd_rn(moment1, __fmul_rn(__fsub_rn(1.0f, r.beta1), __fsub_rn(gradient, moment1)));
    float square = __fmul_rn(__fmul_rn(__fsub_rn(1.0f, r.beta2), gradient), gradient);
    moment2 = __fadd_rn(__fmul_rn(moment2, r.beta2), square);
    float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(moment2), r.root), r.epsilon);
    return __fsub_rn(__fmul_rn(weight, r.keep), __fdiv_rn(__fmul_rn(r.size, moment1), denominator));
}

// f32 weights.
struct Whole {
    float *weights;

    __device__ bool aligned() const { return groups<N>(weights, 0); }

    template <int M> struct At {
        Group<float, M> value;
        __device__ float get(int j) const { return value.at[j]; }
        __device__ void set(int j, float weight) { value.at[j] = weight; }
    };

    template <int M> __device__ At<M> load(long long i) const { return {load_group<M>(weights + i)}; }
    template <int M> __device__ void store(long long i, const At<M> &at) const { store_group(weights + i, at.value); }
};

// bf16 weights and the 16 bits that make them exact: the engine's `split_master` and `join_master`.
struct Split {
    bf16 *high;
    unsigned short *low;

    __device__ bool aligned() const { return groups<N>(high, 0) && groups<N>(low, 0); }

    template <int M> struct At {
        Group<bf16, M> high;
        Group<unsigned short, M> low;
        __device__ float get(int j) const {
            return __uint_as_float(((unsigned)__bfloat16_as_ushort(high.at[j]) << 16 | low.at[j]) - 0x8000u);
        }
        __device__ void set(int j, float weight) {
            unsigned bits = __float_as_uint(weight) + 0x8000u;
            high.at[j] = __ushort_as_bfloat16((unsigned short)(bits >> 16));
            low.at[j] = (unsigned short)bits;
        }
    };

    template <int M> __device__ At<M> load(long long i) const {
        return {load_group<M>(high + i), load_group<M>(low + i)};
    }
    template <int M> __device__ void store(long long i, const At<M> &at) const {
        store_group(high + i, at.high);
        store_group(low + i, at.low);
    }
};

// f32 masters, and the f16 weights that are their roundings.
struct Rounded {
    f16 *weights;
    float *masters;

    __device__ bool aligned() const { return groups<N>(weights, 0) && groups<N>(masters, 0); }

    template <int M> struct At {
        Group<float, M> master;
        __device__ float get(int j) const { return master.at[j]; }
        __device__ void set(int j, float weight) { master.at[j] = weight; }
    };

    template <int M> __device__ At<M> load(long long i) const { return {load_group<M>(masters + i)}; }
    template <int M> __device__ void store(long long i, const At<M> &at) const {
        Group<f16, M> rounded;
        for (int j = 0; j < M; j++) rounded.at[j] = ::store<f16>(at.master.at[j]);
        store_group(masters + i, at.master);
        store_group(weights + i, rounded);
    }
};

// bf16 weights without masters, rounded by random bits of parameter `first + i`: the engine's `StochasticRounding`.
struct Stochastic {
    bf16 *weights;
    unsigned key_low, key_high;
    long long first;

    __device__ bool aligned() const { return groups<N>(weights, 0); }

    static __device__ __forceinline__ unsigned mix(unsigned x) {
        x = (x ^ x >> 16) * 0x7feb352du;
        x = (x ^ x >> 15) * 0x846ca68bu;
        return x ^ x >> 16;
    }

    template <int M> struct At {
        Group<bf16, M> value;
        unsigned key_low, key_high;
        unsigned long long index;
        __device__ float get(int j) const { return ::load(value.at[j]); }
        __device__ void set(int j, float weight) {
            unsigned long long place = index + j;
            unsigned random = mix(mix((unsigned)place ^ key_low) ^ (unsigned)(place >> 32) ^ key_high) >> 16;
            unsigned bits = __float_as_uint(weight);
            unsigned rounded = weight != weight ? bits >> 16 | 0x40 : (bits + random) >> 16;
            value.at[j] = __ushort_as_bfloat16((unsigned short)rounded);
        }
    };

    template <int M> __device__ At<M> load(long long i) const {
        return {load_group<M>(weights + i), key_low, key_high, (unsigned long long)(first + i)};
    }
    template <int M> __device__ void store(long long i, const At<M> &at) const { store_group(weights + i, at.value); }
};

// The arrays beside the weights.
struct Arrays {
    const float *gradients;
    float *moment1, *moment2;
};

// M parameters from `i` on.
template <int M, typename W>
__device__ __forceinline__ void update_group(const W &weights, const Arrays &arrays, const Rates &rates, long long i) {
    typename W::template At<M> at = weights.template load<M>(i);
    Group<float, M> gradient = load_group<M>(arrays.gradients + i);
    Group<float, M> moment1 = load_group<M>(arrays.moment1 + i);
    Group<float, M> moment2 = load_group<M>(arrays.moment2 + i);
    for (int j = 0; j < M; j++) at.set(j, apply(rates, at.get(j), gradient.at[j], moment1.at[j], moment2.at[j]));
    weights.template store<M>(i, at);
    store_group(arrays.moment1 + i, moment1);
    store_group(arrays.moment2 + i, moment2);
}

// The parameters of this block. `rates.clip` is still to be computed.
template <typename W>
__device__ void update(const W &weights, const Arrays &arrays, Rates rates, const double *grad_norm_squared,
                       float scale, float max_grad_norm, long long len) {
    __shared__ float clip;
    double squares = *grad_norm_squared;
    // Not finite: nothing is updated.
    if (!(fabs(squares) <= 1.7976931348623157e308)) return;
    if (threadIdx.x == 0) clip = clip_factor(squares, scale, max_grad_norm);
    __syncthreads();
    rates.clip = clip;
    bool whole = weights.aligned() && groups<N>(arrays.gradients, 0) && groups<N>(arrays.moment1, 0) &&
                 groups<N>(arrays.moment2, 0);
    long long start = (blockIdx.x * (long long)(THREADS * ROUNDS) + threadIdx.x) * N;
    for (int round = 0; round < ROUNDS; round++, start += THREADS * N) {
        if (whole && start + N <= len) {
            update_group<N>(weights, arrays, rates, start);
        } else {
            for (long long i = start; i < start + N && i < len; i++) update_group<1>(weights, arrays, rates, i);
        }
    }
}

} // namespace optimizer

// What all updates take after their weights.
#define ADAMW_ARGUMENTS                                                                                                \
    const float *gradients, float *moment1, float *moment2, const double *grad_norm_squared, float gradient_scale,     \
        float max_grad_norm, float keep, float beta1, float beta2, float size, float root, float epsilon, long long len
#define ADAMW_VALUES                                                                                                   \
    {gradients, moment1, moment2}, {1, keep, beta1, beta2, size, root, epsilon}, grad_norm_squared, gradient_scale,    \
        max_grad_norm, len

ARL_KERNEL(adamw_f32, optimizer::THREADS, float *weights, ADAMW_ARGUMENTS) {
    optimizer::update(optimizer::Whole{weights}, ADAMW_VALUES);
}

ARL_KERNEL(adamw_split, optimizer::THREADS, bf16 *weights, unsigned short *weights_low, ADAMW_ARGUMENTS) {
    optimizer::update(optimizer::Split{weights, weights_low}, ADAMW_VALUES);
}

ARL_KERNEL(adamw_f16, optimizer::THREADS, f16 *weights, float *masters, ADAMW_ARGUMENTS) {
    optimizer::update(optimizer::Rounded{weights, masters}, ADAMW_VALUES);
}

ARL_KERNEL(adamw_bf16, optimizer::THREADS, bf16 *weights, int key_low, int key_high, long long first,
           ADAMW_ARGUMENTS) {
    optimizer::update(optimizer::Stochastic{weights, (unsigned)key_low, (unsigned)key_high, first}, ADAMW_VALUES);
}
#undef ADAMW_ARGUMENTS
#undef ADAMW_VALUES
