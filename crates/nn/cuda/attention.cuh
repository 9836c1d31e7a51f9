// Attention softmax(q·kᵀ/√e)·v from packed qkv (B, T, 3, H, e), without the T×T matrix ever being there: FlashAttention-2
// (Dao 2023, arXiv 2307.08691). Forward keeps the logarithm of every row's sum; backward computes the probabilities again
// from it, dQ with a block per tile of queries and dK, dV with a block per tile of keys, so nothing is added atomically
// and results do not depend on the order in which blocks run.
//
// A block has rows of its own, some per warp ("own": queries, or keys for dK and dV), and walks over tiles of COLUMNS rows of
// the other side ("other"). Scores are kept in base 2: exp2 is what the hardware has. This file is what the kernels of both
// types share; attention_mma.cuh has those of bf16, on tensor cores, attention_fma.cuh those of float.
#pragma once

#include "common.cuh"

constexpr int WARPS = 4, BLOCK = 32 * WARPS;

struct Problem {
    int t, heads, e;
    float scale; // 1/√e
};

constexpr float LOG2_E = 1.4426950409f;

/// By how much (base 2) a row's maximum may grow before what was summed is scaled down: exact, since sums are divided by
/// each other in the end, and rarely needed.
constexpr float SLACK = 8.0f;

/// Where the head of this block lies: rows of q, k and v are 3·H·e apart, rows of the output H·e.
template <typename T> struct Head {
    size_t width, at; // H·e, and the first value of the sample's head in a tensor (B, T, H·e)
    const T *qkv;
    size_t row; // first row of the sample's head in (B, H, T)
    __device__ __forceinline__ Head(const T *all, const Problem &p)
        : width((size_t)p.heads * p.e), at(blockIdx.z * (size_t)p.t * width + (size_t)blockIdx.y * p.e),
          qkv(all + blockIdx.z * (size_t)p.t * 3 * width + (size_t)blockIdx.y * p.e),
          row(((size_t)blockIdx.z * p.heads + blockIdx.y) * p.t) {}
    __device__ __forceinline__ const T *part(int i) const { return qkv + i * width; }
};

/// The factors of dropout for (query, key) of this block's head.
struct HeadDrop {
    Drop drop;
    uint64_t key, head;
    int t;
    __device__ __forceinline__ HeadDrop(const Drop &d, int t)
        : drop(d), key(d.keys ? d.keys[blockIdx.z] : 0), head(blockIdx.y), t(t) {}
    __device__ __forceinline__ bool keeps(int query, int key_row) const {
        return drop.keeps(key, (head * t + query) * t + key_row);
    }
    __device__ __forceinline__ float operator()(int query, int key_row) const {
        return !drop.keys || keeps(query, key_row) ? drop.scale : 0.0f;
    }
};

// delta (B, H, T) = Σ dout·out over a head's values, which is Σ dP·P over the keys. Eight lanes per row, W values at once.
template <int W, typename T>
__device__ __forceinline__ void attention_delta(const T *dout, const T *out, float *delta, Problem p, int rows) {
    constexpr int LANES = 8;
    const int row = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; // of (B, T, H)
    float sum = 0.0f;
    if (row < rows)
        for (int i = threadIdx.x % LANES * W; i < p.e; i += LANES * W) {
            const size_t at = (size_t)row * p.e + i;
            const Pack<T, W> a = read<W>(dout + at), b = read<W>(out + at);
            for (int v = 0; v < W; v++) sum += to_float(a.values[v]) * to_float(b.values[v]);
        }
    for (int apart = LANES / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
    if (row < rows && threadIdx.x % LANES == 0) {
        const int token = row / p.heads, head = row % p.heads;
        delta[((size_t)(token / p.t) * p.heads + head) * p.t + token % p.t] = sum;
    }
}

// Exports the kernels of a head size, whose sizes are Chosen<E>::Forward, Dq and Dkv; BLOCKS of a kernel are meant to fit on a
// multiprocessor, which bounds a thread's registers. The driver compiles a whole source when the first of its kernels
// is used, hence one per type, and per head size where they are long.
#define EXPORT_SIZE(T, suffix, E)                                                                                      \
    extern "C" __global__ void __launch_bounds__(BLOCK, Chosen<E>::Forward::BLOCKS)                                    \
        attention_##E##_##suffix(const T *qkv, T *out, float *lse, int t, int heads, int e, float scale,               \
                                 const uint64_t *keys, uint32_t threshold, float kept) {                               \
        attention<Chosen<E>::Forward>(qkv, out, lse, Problem{t, heads, e, scale}, Drop{keys, threshold, kept});        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, Chosen<E>::Dq::BLOCKS)                                         \
        attention_dq_##E##_##suffix(const T *qkv, const T *dout, const float *lse, const float *delta, T *dqkv, int t, \
                                    int heads, int e, float scale, const uint64_t *keys, uint32_t threshold,           \
                                    float kept) {                                                                      \
        attention_dq<Chosen<E>::Dq>(qkv, dout, lse, delta, dqkv, Problem{t, heads, e, scale},                          \
                                    Drop{keys, threshold, kept});                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, Chosen<E>::Dkv::BLOCKS)                                        \
        attention_dkv_##E##_##suffix(const T *qkv, const T *dout, const float *lse, const float *delta, T *dqkv,       \
                                     int t, int heads, int e, float scale, const uint64_t *keys, uint32_t threshold,   \
                                     float kept) {                                                                     \
        attention_dkv<Chosen<E>::Dkv>(qkv, dout, lse, delta, dqkv, Problem{t, heads, e, scale},                        \
                                      Drop{keys, threshold, kept});                                                    \
    }
#define EXPORT_DELTA(T, suffix)                                                                                        \
    extern "C" __global__ void attention_delta_##suffix(const T *dout, const T *out, float *delta, int t, int heads,   \
                                                        int e, int rows) {                                             \
        const Problem p{t, heads, e, 0.0f};                                                                            \
        WIDE_IF(e % WIDE<T> == 0 && aligned(dout, out), T, attention_delta, dout, out, delta, p, rows);                \
    }
