// Instructions of PTX that CUDA C++ has no function for: products of small matrices on tensor cores, what brings matrices
// from shared memory to where these want them, and copies to shared memory that go on in the background.
//
// All lanes of a warp take part in a product. With g = lane / 4 and t = lane % 4, a lane holds (PTX ISA, "Matrix Fragments
// for mma.m16n8k16"), two neighbouring bf16 in 32 bits, the first in the lower half:
//   A (16, 16)  a0: row g, columns 2t, 2t+1;  a1: row g+8;  a2, a3: the same rows, columns 2t+8, 2t+9
//   B (16, 8)   b0: rows 2t, 2t+1, column g;  b1: rows 2t+8, 2t+9
//   C (16, 8)   c0, c1: row g, columns 2t, 2t+1;  c2, c3: row g+8
#pragma once

#include "common.cuh"

#ifndef __CUDACC__
#include "emulator/tensor_cores.hpp" // the same functions where kernels are compiled for the CPU
#else

/// c (16, 8) += A (16, 16) · B (16, 8).
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four matrices of 8×8 from shared memory: lane l names row l % 8 of matrix l / 8, 16 bytes at a multiple of 16, and gets
/// of every matrix the values 2t and 2t+1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

/// The same, but a lane gets rows 2t and 2t+1 of column g.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

/// 2^x to 22 bits; zero below 2⁻¹²⁶.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// threadIdx.x, read again: what follows from it is worked out again too, where it would else take registers meanwhile.
__device__ __forceinline__ unsigned thread_again() {
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

/// Copies from the device's memory to shared memory. They are there for the thread that began them when it has waited, and
/// for the others of its block behind the barrier that follows.
struct Copies {
    /// 4 or 16 bytes at multiples of as many; zeros if not `there`, and then nothing is read.
    template <int BYTES> __device__ __forceinline__ void begin(void *to, const void *from, bool there) {
        static_assert(BYTES == 4 || BYTES == 16);
        uint32_t address = (uint32_t)__cvta_generic_to_shared(to), bytes = there ? BYTES : 0;
        if constexpr (BYTES == 16) // past the first cache
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
                         : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes)
                         : "memory");
    }
    __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
};

#endif

/// Two values as an operand holds them.
__device__ __forceinline__ uint32_t pack(float first, float second) {
    const uint32_t upper = __bfloat16_as_ushort(from_float<bf16>(second));
    return upper << 16 | __bfloat16_as_ushort(from_float<bf16>(first));
}
