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
template <typename T> __device__ void activate(const T *x, T *y, uint32_t kind, size_t n) {
    for (size_t i = grid_thread(); i < n; i += grid_threads()) y[i] = from_float<T>(act(kind, to_float(x[i])));
}

// dx = dy·act′(x).
template <typename T> __device__ void activate_backward(const T *x, const T *dy, T *dx, uint32_t kind, size_t n) {
    for (size_t i = grid_thread(); i < n; i += grid_threads())
        dx[i] = from_float<T>(to_float(dy[i]) * slope(kind, to_float(x[i])));
}

/// Calls f(row, column) for every value of a matrix: threads keep their column, blocks stride over the rows. Indices of
/// one running number would cost a division per value, which takes longer than the memory does.
template <typename F> __device__ __forceinline__ void over(uint32_t rows, uint32_t d, F f) {
    uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= d) return;
    for (uint32_t row = blockIdx.y; row < rows; row += gridDim.y) f(row, column);
}

// y (rows, d) += bias (d,), in place; and out = act(y), of the rounded y so that backward sees what forward saw.
template <typename T> __device__ void bias_act(T *y, const T *bias, T *out, uint32_t kind, uint32_t rows, uint32_t d) {
    over(rows, d, [=](uint32_t row, uint32_t column) {
        size_t i = (size_t)row * d + column;
        T pre = from_float<T>(to_float(y[i]) + to_float(bias[column]));
        y[i] = pre;
        if (out) out[i] = from_float<T>(act(kind, to_float(pre)));
    });
}

// y (rows, d) = x·(1 + scale) + shift, with both in row `row` of m (rows, width).
template <typename T>
__device__ void modulate(const T *x, const T *m, T *y, uint32_t rows, uint32_t d, uint32_t width, uint32_t shift,
                         uint32_t scale) {
    over(rows, d, [=](uint32_t row, uint32_t column) {
        size_t i = (size_t)row * d + column;
        const T *own = m + (size_t)row * width + column;
        y[i] = from_float<T>(to_float(x[i]) * (1.0f + to_float(own[scale])) + to_float(own[shift]));
    });
}

// dx = dy·(1 + scale), dshift = dy, dscale = dy·x; dm was zeroed. Either of dx and dm may be null.
template <typename T>
__device__ void modulate_backward(const T *dy, const T *x, const T *m, T *dx, T *dm, uint32_t rows, uint32_t d,
                                  uint32_t width, uint32_t shift, uint32_t scale) {
    over(rows, d, [=](uint32_t row, uint32_t column) {
        size_t i = (size_t)row * d + column, own = (size_t)row * width + column;
        float g = to_float(dy[i]);
        if (dx) dx[i] = from_float<T>(g * (1.0f + to_float(m[own + scale])));
        if (dm) {
            dm[own + shift] = dy[i];
            dm[own + scale] = from_float<T>(g * to_float(x[i]));
        }
    });
}

// out = x + gate·y, or gate·y where x is null; `t` rows share a gate, at `gate` in rows of `width`.
template <typename T>
__device__ void gated(const T *x, const T *y, const T *m, T *out, uint32_t rows, uint32_t t, uint32_t d,
                      uint32_t width, uint32_t gate) {
    over(rows, d, [=](uint32_t row, uint32_t column) {
        size_t i = (size_t)row * d + column;
        float through = to_float(m[(size_t)(row / t) * width + gate + column]) * to_float(y[i]);
        out[i] = from_float<T>(x ? to_float(x[i]) + through : through);
    });
}

// y = x times the factors of a dropout, for samples of `sample` values.
template <typename T> __device__ void drop_out(const T *x, T *y, size_t n, size_t sample, Drop drop) {
    for (size_t i = grid_thread(); i < n; i += grid_threads())
        y[i] = from_float<T>(to_float(x[i]) * drop.factor(drop.keys[i / sample], i % sample));
}

#define EXPORT(T, suffix)                                                                                              \
    extern "C" __global__ void activate_##suffix(const T *x, T *y, uint32_t kind, size_t n) {                          \
        activate(x, y, kind, n);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void activate_backward_##suffix(const T *x, const T *dy, T *dx, uint32_t kind, size_t n) {   \
        activate_backward(x, dy, dx, kind, n);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void bias_act_##suffix(T *y, const T *bias, T *out, uint32_t kind, uint32_t rows,            \
                                                 uint32_t d) {                                                         \
        bias_act(y, bias, out, kind, rows, d);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void modulate_##suffix(const T *x, const T *m, T *y, uint32_t rows, uint32_t d,              \
                                                 uint32_t width, uint32_t shift, uint32_t scale) {                     \
        modulate(x, m, y, rows, d, width, shift, scale);                                                               \
    }                                                                                                                  \
    extern "C" __global__ void modulate_backward_##suffix(const T *dy, const T *x, const T *m, T *dx, T *dm,           \
                                                          uint32_t rows, uint32_t d, uint32_t width, uint32_t shift,   \
                                                          uint32_t scale) {                                            \
        modulate_backward(dy, x, m, dx, dm, rows, d, width, shift, scale);                                             \
    }                                                                                                                  \
    extern "C" __global__ void gated_##suffix(const T *x, const T *y, const T *m, T *out, uint32_t rows,               \
                                              uint32_t t, uint32_t d, uint32_t width, uint32_t gate) {                 \
        gated(x, y, m, out, rows, t, d, width, gate);                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void dropout_##suffix(const T *x, T *y, size_t n, size_t sample, const uint64_t *keys,       \
                                                uint32_t threshold, float scale) {                                     \
        drop_out(x, y, n, sample, Drop{keys, threshold, scale});                                                       \
    }
FOR_EACH_TYPE(EXPORT)
