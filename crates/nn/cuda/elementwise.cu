// Activations, biases, modulation, gates and dropout, value by value.
#include "common.cuh"

// As `Act` in src/kernels/elementwise.rs.
enum Act : uint32_t { NOTHING = 0, GELU_TANH = 1, GELU_ERF = 2, SILU = 3 };

// √(2/π) and the cubic coefficient of the tanh form of GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415).
constexpr float SQRT_2_OVER_PI = 0.7978845608f, CUBIC = 0.044715f;
// 1/√2 and 1/√(2π).
constexpr float SQRT_HALF = 0.7071067812f, DENSITY_AT_0 = 0.3989422804f;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// Φ(x), the normal distribution function; erfc keeps its lower tail exact.
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * erfcf(-x * SQRT_HALF); }

__device__ __forceinline__ float act(uint32_t kind, float x) {
    switch (kind) {
    // 0.5·x·(1 + tanh u) = x·σ(2u)
    case GELU_TANH: return x / (1.0f + expf(-2.0f * SQRT_2_OVER_PI * (x + CUBIC * x * x * x)));
    case GELU_ERF: return x * normal_cdf(x);
    case SILU: return x / (1.0f + expf(-x));
    default: return x;
    }
}

/// d act / dx.
__device__ __forceinline__ float slope(uint32_t kind, float x) {
    switch (kind) {
    case GELU_TANH: {
        float s = sigmoid(2.0f * SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
        return s + x * s * (1.0f - s) * 2.0f * SQRT_2_OVER_PI * (1.0f + 3.0f * CUBIC * x * x);
    }
    case GELU_ERF: return normal_cdf(x) + x * DENSITY_AT_0 * expf(-0.5f * x * x);
    case SILU: {
        float s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
    }
    default: return 1.0f;
    }
}

// y = act(x).
template <int W, typename T> __device__ void activate(const T *x, T *y, uint32_t kind, size_t n) {
    for (size_t i = grid_thread() * W; i < n; i += grid_threads() * W) {
        Pack<T, W> pack = read<W>(x + i);
        for (T &value : pack.values) value = from_float<T>(act(kind, to_float(value)));
        write(y + i, pack);
    }
}

// dx = dy·act′(x).
template <int W, typename T>
__device__ void activate_backward(const T *x, const T *dy, T *dx, uint32_t kind, size_t n) {
    for (size_t i = grid_thread() * W; i < n; i += grid_threads() * W) {
        Pack<T, W> at = read<W>(x + i), g = read<W>(dy + i);
        for (int w = 0; w < W; w++)
            g.values[w] = from_float<T>(to_float(g.values[w]) * slope(kind, to_float(at.values[w])));
        write(dx + i, g);
    }
}

// y (rows, d) += bias (d,), in place; and out = act(y), of the rounded y so that backward sees what forward saw.
template <int W, typename T>
__device__ void bias_act(T *y, const T *bias, T *out, uint32_t kind, uint32_t rows, uint32_t d) {
    over<W>(rows, d, [=](uint32_t row, uint32_t column) {
        size_t i = (size_t)row * d + column;
        Pack<T, W> pre = read<W>(y + i), b = read<W>(bias + column);
        for (int w = 0; w < W; w++) pre.values[w] = from_float<T>(to_float(pre.values[w]) + to_float(b.values[w]));
        write(y + i, pre);
        if (!out) return;
        for (T &value : pre.values) value = from_float<T>(act(kind, to_float(value)));
        write(out + i, pre);
    });
}

// y (rows, d) = x·(1 + scale) + shift, with both in row `row` of m (rows, width).
template <int W, typename T>
__device__ void modulate(const T *x, const T *m, T *y, uint32_t rows, uint32_t d, uint32_t width, uint32_t shift,
                         uint32_t scale) {
    over<W>(rows, d, [=](uint32_t row, uint32_t column) {
        size_t i = (size_t)row * d + column;
        const T *own = m + (size_t)row * width + column;
        Pack<T, W> pack = read<W>(x + i), times = read<W>(own + scale), plus = read<W>(own + shift);
        for (int w = 0; w < W; w++)
            pack.values[w] = from_float<T>(to_float(pack.values[w]) * (1.0f + to_float(times.values[w])) +
                                           to_float(plus.values[w]));
        write(y + i, pack);
    });
}

// dx = dy·(1 + scale), dshift = dy, dscale = dy·x; dm was zeroed. Either of dx and dm may be null.
template <int W, typename T>
__device__ void modulate_backward(const T *dy, const T *x, const T *m, T *dx, T *dm, uint32_t rows, uint32_t d,
                                  uint32_t width, uint32_t shift, uint32_t scale) {
    over<W>(rows, d, [=](uint32_t row, uint32_t column) {
        size_t i = (size_t)row * d + column, own = (size_t)row * width + column;
        Pack<T, W> g = read<W>(dy + i), result;
        if (dx) {
            Pack<T, W> times = read<W>(m + own + scale);
            for (int w = 0; w < W; w++)
                result.values[w] = from_float<T>(to_float(g.values[w]) * (1.0f + to_float(times.values[w])));
            write(dx + i, result);
        }
        if (dm) {
            Pack<T, W> at = read<W>(x + i);
            for (int w = 0; w < W; w++) result.values[w] = from_float<T>(to_float(g.values[w]) * to_float(at.values[w]));
            write(dm + own + shift, g);
            write(dm + own + scale, result);
        }
    });
}

// out = x + gate·y, or gate·y where x is null; `t` rows share a gate, at `gate` in rows of `width`. x has the type of out.
template <int W, typename Out, typename Y, typename M>
__device__ void gated(const Out *x, const Y *y, const M *m, Out *out, uint32_t rows, uint32_t t, uint32_t d,
                      uint32_t width, uint32_t gate) {
    over<W>(rows, d, [=](uint32_t row, uint32_t column) {
        size_t i = (size_t)row * d + column;
        Pack<Y, W> pack = read<W>(y + i);
        Pack<M, W> by = read<W>(m + (size_t)(row / t) * width + gate + column);
        Pack<Out, W> sum;
        if (x) sum = read<W>(x + i);
        for (int w = 0; w < W; w++) {
            float through = to_float(by.values[w]) * to_float(pack.values[w]);
            sum.values[w] = from_float<Out>(x ? to_float(sum.values[w]) + through : through);
        }
        write(out + i, sum);
    });
}

// out = x + y, in the type of x.
template <int W, typename X, typename Y> __device__ void residual(const X *x, const Y *y, X *out, size_t n) {
    for (size_t i = grid_thread() * W; i < n; i += grid_threads() * W) {
        Pack<X, W> sum = read<W>(x + i);
        Pack<Y, W> plus = read<W>(y + i);
        for (int w = 0; w < W; w++)
            sum.values[w] = from_float<X>(to_float(sum.values[w]) + to_float(plus.values[w]));
        write(out + i, sum);
    }
}

// y = x times the factors of a dropout, for samples of `sample` values.
template <typename T> __device__ void drop_out(const T *x, T *y, size_t n, size_t sample, Drop drop) {
    for (size_t i = grid_thread(); i < n; i += grid_threads())
        y[i] = from_float<T>(to_float(x[i]) * drop.factor(drop.keys[i / sample], i % sample));
}

#define EXPORT(T, suffix)                                                                                              \
    extern "C" __global__ void activate_##suffix(const T *x, T *y, uint32_t kind, size_t n) {                          \
        WIDE_IF(aligned(x, y) && n % WIDE<T> == 0, T, activate, x, y, kind, n);                                        \
    }                                                                                                                  \
    extern "C" __global__ void activate_backward_##suffix(const T *x, const T *dy, T *dx, uint32_t kind, size_t n) {   \
        WIDE_IF(aligned(x, dy, dx) && n % WIDE<T> == 0, T, activate_backward, x, dy, dx, kind, n);                     \
    }                                                                                                                  \
    extern "C" __global__ void bias_act_##suffix(T *y, const T *bias, T *out, uint32_t kind, uint32_t rows,            \
                                                 uint32_t d) {                                                         \
        WIDE_IF(aligned(y, bias, out) && d % WIDE<T> == 0, T, bias_act, y, bias, out, kind, rows, d);                  \
    }                                                                                                                  \
    extern "C" __global__ void modulate_##suffix(const T *x, const T *m, T *y, uint32_t rows, uint32_t d,              \
                                                 uint32_t width, uint32_t shift, uint32_t scale) {                     \
        bool wide = aligned(x, m, y) && (d | width | shift | scale) % WIDE<T> == 0;                                    \
        WIDE_IF(wide, T, modulate, x, m, y, rows, d, width, shift, scale);                                             \
    }                                                                                                                  \
    extern "C" __global__ void modulate_backward_##suffix(const T *dy, const T *x, const T *m, T *dx, T *dm,           \
                                                          uint32_t rows, uint32_t d, uint32_t width, uint32_t shift,   \
                                                          uint32_t scale) {                                            \
        bool wide = aligned(dy, x, m, dx, dm) && (d | width | shift | scale) % WIDE<T> == 0;                           \
        WIDE_IF(wide, T, modulate_backward, dy, x, m, dx, dm, rows, d, width, shift, scale);                           \
    }                                                                                                                  \
    extern "C" __global__ void dropout_##suffix(const T *x, T *y, size_t n, size_t sample, const uint64_t *keys,       \
                                                uint32_t threshold, float scale) {                                     \
        drop_out(x, y, n, sample, Drop{keys, threshold, scale});                                                       \
    }
FOR_EACH_TYPE(EXPORT)

#define EXPORT_GATED(Out, Y, M, NARROWEST, suffix)                                                                     \
    extern "C" __global__ void gated_##suffix(const Out *x, const Y *y, const M *m, Out *out, uint32_t rows,           \
                                              uint32_t t, uint32_t d, uint32_t width, uint32_t gate) {                 \
        bool wide = aligned(x, y, m, out) && (d | width | gate) % WIDE<NARROWEST> == 0;                                \
        WIDE_IF(wide, NARROWEST, gated, x, y, m, out, rows, t, d, width, gate);                                        \
    }
EXPORT_GATED(float, float, float, float, f32_f32_f32)
EXPORT_GATED(bf16, bf16, bf16, bf16, bf16_bf16_bf16)
EXPORT_GATED(float, bf16, bf16, bf16, f32_bf16_bf16)
EXPORT_GATED(bf16, float, bf16, bf16, bf16_f32_bf16)

#define EXPORT_RESIDUAL(X, Y, NARROWEST, suffix)                                                                       \
    extern "C" __global__ void residual_##suffix(const X *x, const Y *y, X *out, size_t n) {                           \
        WIDE_IF(aligned(x, y, out) && n % WIDE<NARROWEST> == 0, NARROWEST, residual, x, y, out, n);                    \
    }
EXPORT_RESIDUAL(float, float, float, f32_f32)
EXPORT_RESIDUAL(bf16, bf16, bf16, bf16_bf16)
EXPORT_RESIDUAL(float, bf16, bf16, f32_bf16)
