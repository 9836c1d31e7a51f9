// What every kernel shares: values are float or bf16 in memory and float in registers.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;

/// Kernels are templates; each is exported once per type: FOR_EACH_TYPE(M) is M(float, f32) M(bf16, bf16). Where a residual
/// stream is float and what reads it or is added to it is bf16, a name ends in all types in the order of the parameters.
#define FOR_EACH_TYPE(M) M(float, f32) M(bf16, bf16)

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

/// W neighbouring values, read and written at once. A thread that has one value of two bytes on its way leaves most of the
/// memory's bandwidth unused; kernels over large tensors take 16 bytes where sizes and addresses allow.
template <typename T, int W> struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Pack {
    T values[W];
};

template <int W, typename T> __device__ __forceinline__ Pack<T, W> read(const T *from) {
    return *(const Pack<T, W> *)from;
}

template <int W, typename T> __device__ __forceinline__ void write(T *to, const Pack<T, W> &pack) {
    *(Pack<T, W> *)to = pack;
}

/// Values in 16 bytes.
template <typename T> constexpr int WIDE = 16 / sizeof(T);

/// Whether all of these stand at multiples of 16 bytes (null does).
template <typename... P> __device__ __forceinline__ bool aligned(const P *...pointers) {
    return (... | (uintptr_t)pointers) % 16 == 0;
}

/// Calls f<WIDE<T>>(…) if `wide`, else f<1>(…); T is the narrowest of the types.
#define WIDE_IF(wide, T, f, ...)                                                                                       \
    if (wide)                                                                                                          \
        f<WIDE<T>>(__VA_ARGS__);                                                                                       \
    else                                                                                                               \
        f<1>(__VA_ARGS__)

/// Σ over the lanes of a warp, the same in each.
__device__ __forceinline__ float warp_sum(float x) {
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
    return x;
}

/// Number of this thread in the whole grid, and of threads in it.
__device__ __forceinline__ size_t grid_thread() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ size_t grid_threads() { return (size_t)gridDim.x * blockDim.x; }

/// Calls f(row, column) for every W neighbouring values of a matrix. Threads keep to their columns: the index of a running
/// number would cost a division per value, which takes longer than the memory does.
template <int W, typename F> __device__ __forceinline__ void over(uint32_t rows, uint32_t d, F f) {
    for (uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * W; column < d; column += gridDim.x * blockDim.x * W)
        for (uint32_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y)
            f(row, column);
}

/// Dropout as on the CPU (src/kernels/dropout.rs): a value's factor is a function of its sample's key and its place.
struct Drop {
    const uint64_t *keys; // one per sample; null: nothing is dropped
    uint32_t threshold;
    float scale;

    __device__ __forceinline__ bool keeps(uint64_t key, uint64_t place) const {
        constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15ull;
        // The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
        uint64_t z = key + place * GOLDEN + GOLDEN;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        return (uint32_t)(z >> 32) >= threshold;
    }
    __device__ __forceinline__ float factor(uint64_t key, uint64_t place) const {
        return keeps(key, place) ? scale : 0.0f;
    }
};
