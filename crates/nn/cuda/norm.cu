// LayerNorm, scaled and shifted: y = x̂·(base + scale) + shift, x̂ = (x − mean)/σ over rows of d values.
//
// Scale and shift of a row stand `stride` values apart per group of `t` rows: one group per sample for adaLN (base 1),
// stride 0 for a norm with weights (base 0). One warp works on a row; statistics are float.
#include "common.cuh"

/// Calls f(value) for this lane's values of a row of d, W neighbouring ones at a time.
template <int W, typename T, typename F> __device__ __forceinline__ void over_row(const T *row, uint32_t d, F f) {
    for (uint32_t i = threadIdx.x % 32 * W; i < d; i += 32 * W) {
        Pack<T, W> pack = read<W>(row + i);
        for (T value : pack.values) f(to_float(value));
    }
}

/// Mean and 1/σ of a row (biased variance), in two passes: the difference of squares loses digits when |mean| is
/// large against σ.
template <int W, typename T> __device__ __forceinline__ float2 moments(const T *x, uint32_t d, float eps) {
    float total = 0.0f, squares = 0.0f;
    over_row<W>(x, d, [&](float value) { total += value; });
    float mean = warp_sum(total) / d;
    over_row<W>(x, d, [&](float value) { squares += (value - mean) * (value - mean); });
    return make_float2(mean, 1.0f / sqrtf(warp_sum(squares) / d + eps));
}

/// The row of this warp.
__device__ __forceinline__ size_t warp_row() { return (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

template <int W, typename T>
__device__ void layer_norm(const T *x, const T *scale, const T *shift, T *y, size_t rows, uint32_t d, size_t t,
                           size_t stride, float base, float eps) {
    size_t row = warp_row();
    if (row >= rows) return;
    x += row * d;
    y += row * d;
    scale += row / t * stride;
    shift += row / t * stride;
    float2 of = moments<W>(x, d, eps);
    for (uint32_t i = threadIdx.x % 32 * W; i < d; i += 32 * W) {
        Pack<T, W> pack = read<W>(x + i), times = read<W>(scale + i), plus = read<W>(shift + i);
        for (int w = 0; w < W; w++) {
            float hat = (to_float(pack.values[w]) - of.x) * of.y;
            pack.values[w] = from_float<T>(hat * (base + to_float(times.values[w])) + to_float(plus.values[w]));
        }
        write(y + i, pack);
    }
}

// dx = (dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂))/σ with dx̂ = dy·(base + scale); and (mean, 1/σ) of every row, from which the
// gradients of scale and shift are summed (sums.cu). dx may be null.
template <int W, typename T>
__device__ void layer_norm_backward(const T *dy, const T *x, const T *scale, T *dx, float2 *stats, size_t rows,
                                    uint32_t d, size_t t, size_t stride, float base, float eps) {
    size_t row = warp_row();
    if (row >= rows) return;
    uint32_t lane = threadIdx.x % 32;
    x += row * d;
    dy += row * d;
    scale += row / t * stride;
    float2 of = moments<W>(x, d, eps);
    if (lane == 0) stats[row] = of;
    if (!dx) return;
    dx += row * d;
    float total = 0.0f, along = 0.0f;
    for (uint32_t i = lane * W; i < d; i += 32 * W) {
        Pack<T, W> pack = read<W>(x + i), times = read<W>(scale + i), g = read<W>(dy + i);
        for (int w = 0; w < W; w++) {
            float dhat = to_float(g.values[w]) * (base + to_float(times.values[w]));
            total += dhat;
            along += dhat * (to_float(pack.values[w]) - of.x) * of.y;
        }
    }
    total = warp_sum(total) / d;
    along = warp_sum(along) / d;
    for (uint32_t i = lane * W; i < d; i += 32 * W) {
        Pack<T, W> pack = read<W>(x + i), times = read<W>(scale + i), g = read<W>(dy + i);
        for (int w = 0; w < W; w++) {
            float dhat = to_float(g.values[w]) * (base + to_float(times.values[w]));
            float hat = (to_float(pack.values[w]) - of.x) * of.y;
            pack.values[w] = from_float<T>(of.y * (dhat - total - hat * along));
        }
        write(dx + i, pack);
    }
}

#define EXPORT(T, suffix)                                                                                              \
    extern "C" __global__ void layer_norm_##suffix(const T *x, const T *scale, const T *shift, T *y, size_t rows,      \
                                                   uint32_t d, size_t t, size_t stride, float base, float eps) {       \
        bool wide = aligned(x, scale, shift, y) && (d | stride) % WIDE<T> == 0;                                        \
        WIDE_IF(wide, T, layer_norm, x, scale, shift, y, rows, d, t, stride, base, eps);                               \
    }                                                                                                                  \
    extern "C" __global__ void layer_norm_backward_##suffix(const T *dy, const T *x, const T *scale, T *dx,            \
                                                            float2 *stats, size_t rows, uint32_t d, size_t t,          \
                                                            size_t stride, float base, float eps) {                    \
        bool wide = aligned(dy, x, scale, dx) && (d | stride) % WIDE<T> == 0;                                          \
        WIDE_IF(wide, T, layer_norm_backward, dy, x, scale, dx, stats, rows, d, t, stride, base, eps);                 \
    }
FOR_EACH_TYPE(EXPORT)
