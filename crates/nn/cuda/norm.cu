// LayerNorm, scaled and shifted: y = x̂·(base + scale) + shift, x̂ = (x − mean)/σ over rows of d values.
//
// Scale and shift of a row stand `stride` values apart per group of `t` rows: one group per sample for adaLN (base 1),
// stride 0 for a norm with weights (base 0). One warp works on a row; statistics are float. X is the type of the rows and
// their gradients, M that of scale and shift, Y that of the outputs and their gradients.
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

template <int W, typename X, typename M, typename Y>
__device__ void layer_norm(const X *x, const M *scale, const M *shift, Y *y, size_t rows, uint32_t d, size_t t,
                           size_t stride, float base, float eps) {
    size_t row = warp_row();
    if (row >= rows) return;
    x += row * d;
    y += row * d;
    scale += row / t * stride;
    shift += row / t * stride;
    float2 of = moments<W>(x, d, eps);
    for (uint32_t i = threadIdx.x % 32 * W; i < d; i += 32 * W) {
        Pack<X, W> at = read<W>(x + i);
        Pack<M, W> times = read<W>(scale + i), plus = read<W>(shift + i);
        Pack<Y, W> out;
        for (int w = 0; w < W; w++) {
            float hat = (to_float(at.values[w]) - of.x) * of.y;
            out.values[w] = from_float<Y>(hat * (base + to_float(times.values[w])) + to_float(plus.values[w]));
        }
        write(y + i, out);
    }
}

// dx = (dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂))/σ with dx̂ = dy·(base + scale); and (mean, 1/σ) of every row, from which the
// gradients of scale and shift are summed (sums.cu). dx may be null. Where there is an `onto`, it is added: the gradient of
// a residual stream comes from the branch and from beside it.
template <int W, typename X, typename M, typename Y>
__device__ void layer_norm_backward(const Y *dy, const X *x, const M *scale, const X *onto, X *dx, float2 *stats,
                                    size_t rows, uint32_t d, size_t t, size_t stride, float base, float eps) {
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
    if (onto) onto += row * d;
    float total = 0.0f, along = 0.0f;
    for (uint32_t i = lane * W; i < d; i += 32 * W) {
        Pack<X, W> at = read<W>(x + i);
        Pack<M, W> times = read<W>(scale + i);
        Pack<Y, W> g = read<W>(dy + i);
        for (int w = 0; w < W; w++) {
            float dhat = to_float(g.values[w]) * (base + to_float(times.values[w]));
            total += dhat;
            along += dhat * (to_float(at.values[w]) - of.x) * of.y;
        }
    }
    total = warp_sum(total) / d;
    along = warp_sum(along) / d;
    for (uint32_t i = lane * W; i < d; i += 32 * W) {
        Pack<X, W> at = read<W>(x + i);
        Pack<M, W> times = read<W>(scale + i);
        Pack<Y, W> g = read<W>(dy + i);
        for (int w = 0; w < W; w++) {
            float dhat = to_float(g.values[w]) * (base + to_float(times.values[w]));
            float hat = (to_float(at.values[w]) - of.x) * of.y;
            at.values[w] = from_float<X>(of.y * (dhat - total - hat * along));
        }
        if (onto) {
            Pack<X, W> beside = read<W>(onto + i);
            // Not contracted with the product: as if it were a pass of its own.
            for (int w = 0; w < W; w++)
                at.values[w] = from_float<X>(__fadd_rn(to_float(beside.values[w]), to_float(at.values[w])));
        }
        write(dx + i, at);
    }
}

#define EXPORT(X, M, Y, NARROWEST, suffix)                                                                             \
    extern "C" __global__ void layer_norm_##suffix(const X *x, const M *scale, const M *shift, Y *y, size_t rows,      \
                                                   uint32_t d, size_t t, size_t stride, float base, float eps) {       \
        bool wide = aligned(x, scale, shift, y) && (d | stride) % WIDE<NARROWEST> == 0;                            \
        WIDE_IF(wide, NARROWEST, layer_norm, x, scale, shift, y, rows, d, t, stride, base, eps);                       \
    }                                                                                                                  \
    extern "C" __global__ void layer_norm_backward_##suffix(const Y *dy, const X *x, const M *scale,                   \
                                                            const X *onto, X *dx, float2 *stats, size_t rows,          \
                                                            uint32_t d, size_t t, size_t stride, float base,           \
                                                            float eps) {                                               \
        bool wide = aligned(dy, x, scale, onto, dx) && (d | stride) % WIDE<NARROWEST> == 0;                            \
        WIDE_IF(wide, NARROWEST, layer_norm_backward, dy, x, scale, onto, dx, stats, rows, d, t, stride, base, eps);   \
    }
EXPORT(float, float, float, float, f32_f32_f32)
EXPORT(bf16, bf16, bf16, bf16, bf16_bf16_bf16)
EXPORT(float, bf16, bf16, bf16, f32_bf16_bf16)
EXPORT(float, float, bf16, bf16, f32_f32_bf16)
