// AdamW with clipping in one pass over a run of parameters: f32 weights, the two halves of split masters, f32
// masters and the f16 weights that are their roundings, or bf16 weights that are rounded at random; each with f32 moments
// or with bf16 ones that are rounded at random. The factor of clipping and of the loss scale is computed here from the sum
// of squares, so that the host need not wait for it. Each step of the formula is rounded by itself, as on the CPU: the
// bits of the update are the same.
//
// Bytes of a parameter: 16 read (weight, gradient, two moments), 12 written, with f32 weights and with split ones; with
// f16 weights 2 more are written. With bf16 weights alone, 14 read and 10 written. With bf16 moments, 4 less of each.
#include "arl.cuh"

namespace optimizer {

// Parameters of a thread at a time: 16 bytes of f32.
constexpr int N = GROUP;

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

// The engine's `StochasticRounding`: random bits of parameter `first + i`, of which weights take the upper half. Where
// nothing is rounded at random, the compiler leaves them out.
struct Rounding {
    unsigned key_low, key_high;
    long long first;

    __device__ __forceinline__ unsigned hash(long long i) const {
        unsigned long long place = (unsigned long long)(first + i);
        return mix(mix((unsigned)place ^ key_low) ^ (unsigned)(place >> 32) ^ key_high);
    }
};

// What makes the moments' bits others than the weight's.
constexpr unsigned MOMENTS = 0x9e3779b9u;

// `value` rounded by 16 random bits: they carry as often as what is cut off is large.
__device__ __forceinline__ bf16 round_by(float value, unsigned random) {
    unsigned bits = __float_as_uint(value);
    unsigned rounded = value != value ? bits >> 16 | 0x40 : (bits + random) >> 16;
    return __ushort_as_bfloat16((unsigned short)rounded);
}

// f32 weights.
struct Whole {
    float *weights;

    __device__ bool aligned() const { return vectorizable<N>(weights, 0); }

    template <int M> struct At {
        Group<float, M> value;
        __device__ float get(int j) const { return value.at[j]; }
        __device__ void set(int j, float weight, unsigned) { value.at[j] = weight; }
    };

    template <int M> __device__ At<M> load(long long i) const { return {load_group<M>(weights + i)}; }
    template <int M> __device__ void store(long long i, const At<M> &at) const { store_group(weights + i, at.value); }
};

// bf16 weights and the 16 bits that make them exact: the engine's `split_master` and `join_master`.
struct Split {
    bf16 *high;
    unsigned short *low;

    __device__ bool aligned() const { return vectorizable<N>(high, 0) && vectorizable<N>(low, 0); }

    template <int M> struct At {
        Group<bf16, M> high;
        Group<unsigned short, M> low;
        __device__ float get(int j) const {
            return __uint_as_float(((unsigned)__bfloat16_as_ushort(high.at[j]) << 16 | low.at[j]) - 0x8000u);
        }
        __device__ void set(int j, float weight, unsigned) {
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

    __device__ bool aligned() const { return vectorizable<N>(weights, 0) && vectorizable<N>(masters, 0); }

    template <int M> struct At {
        Group<float, M> master;
        __device__ float get(int j) const { return master.at[j]; }
        __device__ void set(int j, float weight, unsigned) { master.at[j] = weight; }
    };

    template <int M> __device__ At<M> load(long long i) const { return {load_group<M>(masters + i)}; }
    template <int M> __device__ void store(long long i, const At<M> &at) const {
        Group<f16, M> rounded;
        for (int j = 0; j < M; j++) rounded.at[j] = ::store<f16>(at.master.at[j]);
        store_group(masters + i, at.master);
        store_group(weights + i, rounded);
    }
};

// bf16 weights without masters, rounded at random.
struct Bare {
    bf16 *weights;

    __device__ bool aligned() const { return vectorizable<N>(weights, 0); }

    template <int M> struct At {
        Group<bf16, M> value;
        __device__ float get(int j) const { return ::load(value.at[j]); }
        __device__ void set(int j, float weight, unsigned hash) { value.at[j] = round_by(weight, hash >> 16); }
    };

    template <int M> __device__ At<M> load(long long i) const { return {load_group<M>(weights + i)}; }
    template <int M> __device__ void store(long long i, const At<M> &at) const { store_group(weights + i, at.value); }
};

// The arrays next to the weights, with moments of type T.
template <typename T> struct Arrays {
    const float *gradients;
    T *moment1, *moment2;
    Rounding rounding;
};

// `value` as a moment is kept; what is cut off of a bf16 is rounded by 16 random bits.
__device__ __forceinline__ void keep(float &moment, float value, unsigned) { moment = value; }
__device__ __forceinline__ void keep(bf16 &moment, float value, unsigned random) { moment = round_by(value, random); }

// M parameters from `i` on.
template <int M, typename W, typename T>
__device__ __forceinline__ void update_group(const W &weights, const Arrays<T> &arrays, const Rates &rates,
                                             long long i) {
    typename W::template At<M> at = weights.template load<M>(i);
    Group<float, M> gradient = load_group<M>(arrays.gradients + i);
    Group<T, M> moment1 = load_group<M>(arrays.moment1 + i);
    Group<T, M> moment2 = load_group<M>(arrays.moment2 + i);
    for (int j = 0; j < M; j++) {
        unsigned hash = arrays.rounding.hash(i + j);
        unsigned random = mix(hash ^ MOMENTS);
        float first = ::load(moment1.at[j]), second = ::load(moment2.at[j]);
        at.set(j, apply(rates, at.get(j), gradient.at[j], first, second), hash);
        keep(moment1.at[j], first, random >> 16);
        keep(moment2.at[j], second, random & 0xffff);
    }
    weights.template store<M>(i, at);
    store_group(arrays.moment1 + i, moment1);
    store_group(arrays.moment2 + i, moment2);
}

// The parameters of this block. `rates.clip` is still to be computed.
template <typename W, typename T>
__device__ void update(const W &weights, const Arrays<T> &arrays, Rates rates, const double *grad_norm_squared,
                       float scale, float max_grad_norm, long long len) {
    __shared__ float clip;
    double squares = *grad_norm_squared;
    // Not finite: nothing is updated.
    if (!(fabs(squares) <= 1.7976931348623157e308)) return;
    if (threadIdx.x == 0) clip = clip_factor(squares, scale, max_grad_norm);
    __syncthreads();
    rates.clip = clip;
    bool whole = weights.aligned() && vectorizable<N>(arrays.gradients, 0) && vectorizable<N>(arrays.moment1, 0) &&
                 vectorizable<N>(arrays.moment2, 0);
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

// What all updates take after their weights, with moments of type T.
#define ADAMW_ARGUMENTS(T)                                                                                             \
    const float *gradients, T *moment1, T *moment2, int key_low, int key_high, long long first,                        \
        const double *grad_norm_squared, float gradient_scale, float max_grad_norm, float keep, float beta1,           \
        float beta2, float size, float root, float epsilon, long long len
#define ADAMW_VALUES(T)                                                                                                \
    optimizer::Arrays<T>{gradients, moment1, moment2, {(unsigned)key_low, (unsigned)key_high, first}},                 \
        {1, keep, beta1, beta2, size, root, epsilon}, grad_norm_squared, gradient_scale, max_grad_norm, len

#define ADAMW_KERNELS(T, SUFFIX)                                                                                       \
    ARL_KERNEL(adamw_f32##SUFFIX, optimizer::THREADS, float *weights, ADAMW_ARGUMENTS(T)) {                            \
        optimizer::update(optimizer::Whole{weights}, ADAMW_VALUES(T));                                                 \
    }                                                                                                                  \
    ARL_KERNEL(adamw_split##SUFFIX, optimizer::THREADS, bf16 *weights, unsigned short *weights_low,                    \
               ADAMW_ARGUMENTS(T)) {                                                                                   \
        optimizer::update(optimizer::Split{weights, weights_low}, ADAMW_VALUES(T));                                    \
    }                                                                                                                  \
    ARL_KERNEL(adamw_f16##SUFFIX, optimizer::THREADS, f16 *weights, float *masters, ADAMW_ARGUMENTS(T)) {              \
        optimizer::update(optimizer::Rounded{weights, masters}, ADAMW_VALUES(T));                                      \
    }                                                                                                                  \
    ARL_KERNEL(adamw_bf16##SUFFIX, optimizer::THREADS, bf16 *weights, ADAMW_ARGUMENTS(T)) {                            \
        optimizer::update(optimizer::Bare{weights}, ADAMW_VALUES(T));                                                  \
    }

ADAMW_KERNELS(float, )
ADAMW_KERNELS(bf16, _bf16_moments)

#undef ADAMW_KERNELS
#undef ADAMW_ARGUMENTS
#undef ADAMW_VALUES
