// LayerNorm, scaled and shifted: y = x̂·(base + scale) + shift, x̂ = (x − mean)/σ over rows of d values.
//
// Scale and shift of a row stand `stride` values apart per group of `t` rows: one group per sample for adaLN (base 1),
// stride 0 for a norm with weights (base 0). One warp works on a row; statistics are float.
#include "common.cuh"

/// Mean and 1/σ of a row (biased variance), in two passes: the difference of squares loses digits when |mean| is
/// large against σ.
template <typename T> __device__ __forceinline__ float2 moments(const T *x, uint32_t d, float eps) {
    uint32_t lane = threadIdx.x % 32;
    float total = 0.0f, squares = 0.0f;
    for (uint32_t i = lane; i < d; i += 32) total += to_float(x[i]);
    float mean = warp_sum(total) / d;
    for (uint32_t i = lane; i < d; i += 32) {
        float away = to_float(x[i]) - mean;
        squares += away * away;
    }
    return make_float2(mean, 1.0f / sqrtf(warp_sum(squares) / d + eps));
}

/// The row of this warp.
__device__ __forceinline__ size_t warp_row() { return (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

template <typename T>
__device__ void layer_norm(const T *x, const T *scale, const T *shift, T *y, size_t rows, uint32_t d, size_t t,
                           size_t stride, float base, float eps) {
    size_t row = warp_row();
    if (row >= rows) return;
    x += row * d;
    y += row * d;
    scale += row / t * stride;
    shift += row / t * stride;
    float2 of = moments(x, d, eps);
    for (uint32_t i = threadIdx.x % 32; i < d; i += 32) {
        float hat = (to_float(x[i]) - of.x) * of.y;
        y[i] = from_float<T>(hat * (base + to_float(scale[i])) + to_float(shift[i]));
    }
}

// dx = (dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂))/σ with dx̂ = dy·(base + scale); and (mean, 1/σ) of every row, from which the
// gradients of scale and shift are summed (sums.cu). dx may be null.
template <typename T>
__device__ void layer_norm_backward(const T *dy, const T *x, const T *scale, T *dx, float2 *stats, size_t rows,
                                    uint32_t d, size_t t, size_t stride, float base, float eps) {
    size_t row = warp_row();
    if (row >= rows) return;
    uint32_t lane = threadIdx.x % 32;
    x += row * d;
    dy += row * d;
    scale += row / t * stride;
    float2 of = moments(x, d, eps);
    if (lane == 0) stats[row] = of;
    if (!dx) return;
    dx += row * d;
    float total = 0.0f, along = 0.0f;
    for (uint32_t i = lane; i < d; i += 32) {
        float g = to_float(dy[i]) * (base + to_float(scale[i]));
        total += g;
        along += g * (to_float(x[i]) - of.x) * of.y;
    }
    total = warp_sum(total) / d;
    along = warp_sum(along) / d;
    for (uint32_t i = lane; i < d; i += 32) {
        float g = to_float(dy[i]) * (base + to_float(scale[i]));
        dx[i] = from_float<T>(of.y * (g - total - (to_float(x[i]) - of.x) * of.y * along));
    }
}

#define EXPORT(T, suffix)                                                                                              \
    extern "C" __global__ void layer_norm_##suffix(const T *x, const T *scale, const T *shift, T *y, size_t rows,      \
                                                   uint32_t d, size_t t, size_t stride, float base, float eps) {       \
        layer_norm(x, scale, shift, y, rows, d, t, stride, base, eps);                                                 \
    }                                                                                                                  \
    extern "C" __global__ void layer_norm_backward_##suffix(const T *dy, const T *x, const T *scale, T *dx,            \
                                                            float2 *stats, size_t rows, uint32_t d, size_t t,          \
                                                            size_t stride, float base, float eps) {                    \
        layer_norm_backward(dy, x, scale, dx, stats, rows, d, t, stride, base, eps);                                   \
    }
FOR_EACH_TYPE(EXPORT)
