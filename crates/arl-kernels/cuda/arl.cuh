// What every kernel file shares: element types, accesses of 16 bytes, sums over warps, and how a kernel is declared.
// Device code only, so that the same sources compile for a GPU (nvcc) and for the host (../emulation).
#pragma once

#include "constants.cuh"

#ifdef ARL_EMULATION

#include "../emulation/cuda.h"

// A kernel with arguments `...`; blocks have at most `threads` threads.
#define ARL_KERNEL(name, threads, ...)                                                                                 \
    static void name(__VA_ARGS__);                                                                                     \
    static const emulation::Kernel registered_##name(                                                                  \
        #name, emulation::Entry<decltype(&name)>::signature, threads, &emulation::Entry<decltype(&name)>::call<&name>); \
    static void name(__VA_ARGS__)

// The same, with all the registers that one block of a multiprocessor can have: for a kernel that would spill some so that more
// blocks fit.
#define ARL_KERNEL_ALONE(name, threads, ...) ARL_KERNEL(name, threads, __VA_ARGS__)

// Dynamic shared memory, as an array of `type`.
#define ARL_SHARED(type, name) type *name = reinterpret_cast<type *>(emulation::block->shared)

// Ends the launch with an error, which says `what`, where an argument is `wrong`.
#define ARL_REFUSE(wrong, what) ((wrong) ? emulation::fail(what) : void())

// Whether to check what a GPU has no time to check.
constexpr bool THOROUGH = true;

#else

#include <cassert>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

#define ARL_KERNEL(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
#define ARL_KERNEL_ALONE(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads, 1) name(__VA_ARGS__)

extern __shared__ __align__(128) unsigned char arl_shared_bytes[];
#define ARL_SHARED(type, name) type *name = reinterpret_cast<type *>(arl_shared_bytes)

// As a failed `assert`: the driver writes `what`, with the block and the thread, to standard error.
#define ARL_REFUSE(wrong, what) ((wrong) ? __assert_fail(what, __FILE__, __LINE__, __func__) : void())

constexpr bool THOROUGH = false;

#endif

typedef __nv_bfloat16 bf16;
typedef __half f16;

// Lines of a kernel once for each type of activations of 16 bits, or for each of all: M(name, type).
#define ARL_FOR_NARROW(M) M(bf16, bf16) M(f16, f16)
#define ARL_FOR_TYPES(M) M(f32, float) ARL_FOR_NARROW(M)

__device__ __forceinline__ float load(float value) { return value; }
__device__ __forceinline__ float load(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float load(f16 value) { return __half2float(value); }

template <typename T> struct Store;
template <> struct Store<float> {
    static __device__ __forceinline__ float of(float value) { return value; }
};
template <> struct Store<bf16> {
    static __device__ __forceinline__ bf16 of(float value) { return __float2bfloat16(value); }
};

template <> struct Store<f16> {
    static __device__ __forceinline__ f16 of(float value) { return __float2half(value); }
};

// The nearest element of type T. Arithmetic is in f32 everywhere.
template <typename T> __device__ __forceinline__ T store(float value) { return Store<T>::of(value); }

// What `value` becomes when it is stored as T and loaded again.
template <typename T> __device__ __forceinline__ float rounded(float value) { return load(store<T>(value)); }

// N elements that are read or written as one access of at most 16 bytes.
template <typename T, int N> struct alignas(N * sizeof(T)) Group {
    static constexpr int SIZE = N;
    T at[N];
};

template <int N, typename T> __device__ __forceinline__ Group<T, N> load_group(const T *source) {
    return *reinterpret_cast<const Group<T, N> *>(source);
}

template <typename T, int N> __device__ __forceinline__ void store_group(T *target, const Group<T, N> &group) {
    *reinterpret_cast<Group<T, N> *>(target) = group;
}

// Whether rows of `width` elements from `p` on can be read in groups of N.
template <int N, typename T> __device__ __forceinline__ bool vectorizable(const T *p, long long width) {
    return width % N == 0 && reinterpret_cast<uintptr_t>(p) % sizeof(Group<T, N>) == 0;
}

// The group at `source`. Kernels are written once, for groups, and compiled twice: ALIGNED, where all rows are vectorizable, as one
// access; else element by element as far as `valid`, zeroes behind, for widths and addresses that no model of ours has. That is
// a loop, so that it takes no registers from the other.
template <int N, bool ALIGNED, typename T>
__device__ __forceinline__ Group<T, N> load_group(const T *source, int valid) {
    if constexpr (ALIGNED) {
        return load_group<N>(source);
    } else {
        Group<T, N> group{};
#pragma unroll 1
        for (int j = 0; j < min(N, valid); j++) group.at[j] = source[j];
        return group;
    }
}

template <bool ALIGNED, typename T, int N>
__device__ __forceinline__ void store_group(T *target, const Group<T, N> &group, int valid) {
    if constexpr (ALIGNED) {
        store_group(target, group);
    } else {
#pragma unroll 1
        for (int j = 0; j < min(N, valid); j++) target[j] = group.at[j];
    }
}

// Elements that are read or written as one access of 16 bytes.
template <typename T> using Pack = Group<T, 16 / sizeof(T)>;

template <typename T> __device__ __forceinline__ Pack<T> load_pack(const T *source) {
    return *reinterpret_cast<const Pack<T> *>(source);
}

template <typename T> __device__ __forceinline__ void store_pack(T *target, const Pack<T> &pack) {
    *reinterpret_cast<Pack<T> *>(target) = pack;
}

template <bool ALIGNED, typename T> __device__ __forceinline__ Pack<T> load_pack(const T *source, int valid) {
    return load_group<Pack<T>::SIZE, ALIGNED>(source, valid);
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void store_pack(T *target, const Pack<T> &pack, int valid) {
    store_group<ALIGNED>(target, pack, valid);
}

// Whether rows of `width` elements from `p` on can be read in packs.
template <typename T> __device__ __forceinline__ bool vectorizable(const T *p, long long width) {
    return width % Pack<T>::SIZE == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Packs of a row, the last one perhaps in part.
template <typename T> __device__ __forceinline__ int packs_of(int width) {
    return (width + Pack<T>::SIZE - 1) / Pack<T>::SIZE;
}

constexpr unsigned FULL = 0xffffffffu;

// Chris Wellons' lowbias32, as in `backend/rounding.rs`.
__device__ __forceinline__ unsigned mix(unsigned x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL, value, distance);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(FULL, value, distance));
    return value;
}

// The sum over `warps` warps from `first` on, in the same order every time; all warps of the block take part, each in a
// group of as many. `scratch` holds a float a warp; it is free again after the next barrier.
__device__ __forceinline__ float group_sum(float value, float *scratch, int first, int warps) {
    value = warp_sum(value);
    if (warps == 1) return value;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (int i = first; i < first + warps; i++) sum += scratch[i];
    return sum;
}
