// Instructions of the tensor cores and of what feeds them, one warp at a time: mma.m16n8k16 in bf16 or f16 and mma.m16n8k8 in TF32
// with f32 accumulators, ldmatrix, cp.async (PTX ISA, from compute capability 8.0 on). Each instruction has its counterpart for the
// host.
//
// Fragments, with g = lane / 4 and t = lane % 4 (each register holds two neighbours, the lower column or k first):
//   a [16, 16]: a0 (row g, columns 2t, 2t+1), a1 (g+8, 2t), a2 (g, 2t+8), a3 (g+8, 2t+8)
//   b [16, 8], k by n: b0 (k 2t, 2t+1; n g), b1 (k 2t+8, 2t+9; n g)
//   d [16, 8]: d0, d1 (row g, columns 2t, 2t+1), d2, d3 (row g+8)
// In TF32 a register holds one value:
//   a [16, 8]: a0 (row g, column t), a1 (g+8, t), a2 (g, t+4), a3 (g+8, t+4)
//   b [8, 8], k by n: b0 (k t; n g), b1 (k t+4; n g)
#pragma once

#include "arl.cuh"

// Two values as one register, the first in the lower half.
template <typename T> __device__ __forceinline__ unsigned pair(float low, float high) {
    T values[2] = {store<T>(low), store<T>(high)};
    unsigned bits;
    memcpy(&bits, values, 4);
    return bits;
}

#ifdef ARL_EMULATION

namespace emulation {

template <typename T> float half_of(unsigned bits, int which) {
    return load(T{uint16_t(which == 0 ? bits : bits >> 16)});
}

struct Fragments {
    unsigned a[4], b[2];
};

} // namespace emulation

template <typename T> void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulation::Fragments own;
    memcpy(own.a, a, sizeof own.a);
    memcpy(own.b, b, sizeof own.b);
    const auto all = emulation::exchange(FULL, own);
    unsigned g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (int i = 0; i < 4; i++) {
        unsigned row = g + (i / 2) * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            unsigned from = (k % 8) / 2;
            float left = emulation::half_of<T>(all[row % 8 * 4 + from].a[row / 8 + 2 * (k / 8)], k % 2);
            float right = emulation::half_of<T>(all[column * 4 + from].b[k / 8], k % 2);
            d[i] += left * right;
        }
    }
}

// The nearest TF32, halves away from zero: ten bits behind the point, in the place of those of f32.
inline unsigned tf32(float x) {
    const unsigned bits = __float_as_uint(x);
    return x != x ? bits : (bits + 0x1000) & ~0x1fffu;
}

// As the tensor cores, it does not look at the bits that TF32 has not.
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulation::Fragments own;
    memcpy(own.a, a, sizeof own.a);
    memcpy(own.b, b, sizeof own.b);
    const auto all = emulation::exchange(FULL, own);
    unsigned g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (int i = 0; i < 4; i++) {
        unsigned row = g + (i / 2) * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 8; k++) {
            unsigned left = all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)], right = all[column * 4 + k % 4].b[k / 4];
            d[i] += __uint_as_float(left & ~0x1fffu) * __uint_as_float(right & ~0x1fffu);
        }
    }
}

namespace emulation {

inline void load_matrices(unsigned (&d)[4], const void *row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix from an address that is no multiple of 16");
    const auto rows = exchange(FULL, row);
    for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t halves[2];
        for (unsigned i = 0; i < 2; i++) {
            unsigned r = lane() / 4, c = 2 * (lane() % 4) + i;
            if (transposed) std::swap(r, c);
            memcpy(&halves[i], static_cast<const uint16_t *>(rows[matrix * 8 + r]) + c, 2);
        }
        d[matrix] = halves[0] | unsigned(halves[1]) << 16;
    }
}

} // namespace emulation

inline void ldmatrix_x4(unsigned (&d)[4], const void *row) { emulation::load_matrices(d, row, false); }
inline void ldmatrix_x4_transposed(unsigned (&d)[4], const void *row) { emulation::load_matrices(d, row, true); }

// On the host a copy is made when it is waited for, so that reading what was not waited for shows.
inline void cp_async_16(void *target, const void *source, bool valid) {
    auto *t = emulation::thread;
    if (t->copy_count == emulation::Thread::MOST_COPIES) emulation::fail("more asynchronous copies than expected");
    if (reinterpret_cast<uintptr_t>(target) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(source) % 16 != 0))
        emulation::fail("cp.async of 16 bytes at an address that is no multiple of 16");
    t->copies[t->copy_count++] = {target, source, valid ? 16u : 0u, 16u};
}

inline void cp_async_commit() {
    auto *t = emulation::thread;
    if (t->group_count == emulation::Thread::MOST_GROUPS) emulation::fail("more groups of copies than expected");
    unsigned in_groups = 0;
    for (unsigned i = 0; i < t->group_count; i++) in_groups += t->groups[i];
    t->groups[t->group_count++] = t->copy_count - in_groups;
}

template <int PENDING> void cp_async_wait() {
    auto *t = emulation::thread;
    if (t->group_count <= PENDING) return;
    unsigned finished = t->group_count - PENDING, copies = 0;
    for (unsigned i = 0; i < finished; i++) copies += t->groups[i];
    for (unsigned i = 0; i < copies; i++) {
        auto &copy = t->copies[i];
        memset(copy.target, 0, copy.filled);
        if (copy.bytes > 0) memcpy(copy.target, copy.source, copy.bytes);
    }
    for (unsigned i = copies; i < t->copy_count; i++) t->copies[i - copies] = t->copies[i];
    for (unsigned i = finished; i < t->group_count; i++) t->groups[i - finished] = t->groups[i];
    t->copy_count -= copies;
    t->group_count -= finished;
}

#else

#define MMA(T, TYPE)                                                                                                   \
    template <> __device__ __forceinline__ void mma<T>(float(&d)[4], const unsigned(&a)[4], const unsigned(&b)[2]) {   \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                            \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                      \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
    }

// d += a b, for values of type T.
template <typename T> __device__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
MMA(bf16, "bf16")
MMA(f16, "f16")
#undef MMA

// The nearest TF32, halves away from zero: ten bits behind the point, in the place of those of f32.
__device__ __forceinline__ unsigned tf32(float x) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// d += a b, for values of TF32.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned shared_address(const void *p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Matrices of 8 x 8 from shared memory: lane 8 i + r gives the address of row r of matrix i (16 bytes, aligned);
// register i then holds row g, columns 2t and 2t+1 of it, or with `transposed` rows 2t and 2t+1 of column g.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&d)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&d)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Copies 16 bytes from global to shared memory in the background, or fills them with zeroes.
__device__ __forceinline__ void cp_async_16(void *target, const void *source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(target)), "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last PENDING groups of this thread are done. Other threads see them after a barrier.
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif
