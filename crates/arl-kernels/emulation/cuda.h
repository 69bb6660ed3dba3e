// CUDA's language as far as this project's kernels use it, for a C++ compiler: the threads of a block are fibers that
// run one at a time and switch only where they wait for each other. Knows nothing of any kernel.
//
// What it shows: wrong arithmetic, wrong indices, barriers that not all threads reach (an error), and missing barriers
// (threads run in ascending, descending and shuffled order by turns, so that results then differ).
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __device__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define __shared__ static thread_local

struct uint3 {
    unsigned x, y, z;
};

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

// To nearest, ties to even; a NaN stays one.
inline __nv_bfloat16 __float2bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

struct __half {
    uint16_t bits;
};

inline float __half2float(__half value) {
    uint32_t sign = uint32_t(value.bits & 0x8000) << 16, size = uint32_t(value.bits & 0x7fff) << 13;
    // As f32, the exponent is 112 too small.
    float number;
    memcpy(&number, &size, 4);
    number *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (size >= 0x7c00u << 13) bits = size | 0x7f800000;
    bits |= sign;
    memcpy(&number, &bits, 4);
    return number;
}

// To nearest, ties to even; a NaN stays one.
inline __half __float2half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (size >= 143u << 23) return {uint16_t(sign | 0x7c00)};
    if (size >= 113u << 23) return {uint16_t(sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13)};
    // Below the least normal number: the last place of a sum with 0.5 is 2^-24.
    float sum = std::fabs(value) + 0.5f;
    memcpy(&size, &sum, 4);
    return {uint16_t(sign | (size - 0x3f000000))};
}

namespace emulation {

enum class State { Ready, AtBlockBarrier, AtWarpBarrier, Done };

// One thread of a block.
struct Thread {
    uint3 index;
    unsigned linear;
    State state;
    // Lanes that a warp barrier waits for.
    unsigned mask;
    // Which half of the warp's slots its next exchange uses.
    unsigned turn;
    // cp.async copies that were asked for, and the groups they were committed in. They are elsewhere, so that the states of all
    // threads are near each other.
    struct Copy {
        void *target;
        const void *source;
        unsigned bytes, filled;
    };
    static constexpr unsigned MOST_COPIES = 512, MOST_GROUPS = 32;
    Copy *copies;
    unsigned copy_count;
    unsigned *groups;
    unsigned group_count;
};

// What the lanes of a warp show each other; two halves, so that one barrier an exchange is enough.
struct Slots {
    alignas(16) unsigned char lanes[2][32][64];
};

struct Block {
    uint3 index;
    uint3 grid;
    uint3 threads;
    unsigned char *shared;
    Slots *warps;
};

extern thread_local Thread *thread;
extern thread_local Block *block;

// Switch to another thread until all threads of the block, or the lanes of `mask`, are here.
void wait_for_block();
void wait_for_warp(unsigned mask);
// Ends the launch with an error.
[[noreturn]] void fail(const char *what);

inline unsigned lane() { return thread->linear % 32; }

// What the lanes of a warp have shown, until the exchange after the next one.
template <typename T> struct Shown {
    const unsigned char (&lanes)[32][64];
    const T &operator[](unsigned lane) const { return *reinterpret_cast<const T *>(lanes[lane]); }
};

// Shows `value` to the lanes of `mask` and returns what each of them showed.
template <typename T> Shown<T> exchange(unsigned mask, const T &value) {
    static_assert(sizeof(T) <= 64 && alignof(T) <= 16 && std::is_trivially_copyable_v<T>);
    auto &half = block->warps[thread->linear / 32].lanes[thread->turn];
    thread->turn ^= 1;
    memcpy(half[lane()], &value, sizeof(T));
    wait_for_warp(mask);
    return {half};
}

// The kinds of a kernel's arguments, one letter each; pointers to what is only read in lower case, to what is written in
// upper case: b/B bytes, f/F f32, h/H bf16, g/G f16, d/D f64, i/I i32, u/U u16, l/L i64. Values: 4 i32, 8 i64, 5 f32.
template <typename T> constexpr char kind() {
    if constexpr (std::is_pointer_v<T>) {
        using E = std::remove_pointer_t<T>;
        using P = std::remove_cv_t<E>;
        constexpr char letter = std::is_same_v<P, float>           ? 'f'
                                : std::is_same_v<P, __nv_bfloat16> ? 'h'
                                : std::is_same_v<P, __half>        ? 'g'
                                : std::is_same_v<P, double>        ? 'd'
                                : std::is_same_v<P, int>           ? 'i'
                                : std::is_same_v<P, unsigned short> ? 'u'
                                : std::is_same_v<P, long long>     ? 'l'
                                                                   : 'b';
        return std::is_const_v<E> ? letter : char(letter - 32);
    } else if constexpr (std::is_same_v<T, float>) {
        return '5';
    } else if constexpr (std::is_same_v<T, long long>) {
        return '8';
    } else {
        static_assert(std::is_same_v<T, int>, "a kernel takes pointers, int, long long and float");
        return '4';
    }
}

template <typename F> struct Entry;
template <typename... A> struct Entry<void (*)(A...)> {
    static constexpr char signature[] = {kind<A>()..., 0};
    template <void (*F)(A...), size_t... I> static void call_with(void **args, std::index_sequence<I...>) {
        F(*static_cast<A *>(args[I])...);
    }
    template <void (*F)(A...)> static void call(void **args) {
        call_with<F>(args, std::index_sequence_for<A...>{});
    }
};

// A kernel that can be launched by its name.
struct Kernel {
    const char *name;
    const char *signature;
    unsigned most_threads;
    void (*call)(void **args);
    Kernel *next;
    Kernel(const char *name, const char *signature, unsigned most_threads, void (*call)(void **));
};

} // namespace emulation

#define threadIdx (emulation::thread->index)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->threads)
#define gridDim (emulation::block->grid)

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::wait_for_warp(mask); }

template <typename T> T __shfl_sync(unsigned mask, T value, int lane) {
    return emulation::exchange(mask, value)[lane & 31];
}

template <typename T> T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return emulation::exchange(mask, value)[(emulation::lane() ^ unsigned(distance)) & 31];
}

template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
    unsigned from = emulation::lane();
    return emulation::exchange(mask, value)[from >= distance ? from - distance : from];
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto all = emulation::exchange(mask, predicate);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; i++)
        if ((mask >> i & 1) && all[i]) bits |= 1u << i;
    return bits;
}

// The lanes that hold what this one holds.
template <typename T> unsigned __match_any_sync(unsigned mask, T value) {
    const auto all = emulation::exchange(mask, value);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; i++)
        if ((mask >> i & 1) && all[i] == value) bits |= 1u << i;
    return bits;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Only whole numbers: sums of floats in no fixed order have no place in this project.
inline int atomicAdd(int *target, int value) {
    int old = *target;
    *target += value;
    return old;
}

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// Rounded one by one, on a GPU too: never part of a fused multiply-add.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif
