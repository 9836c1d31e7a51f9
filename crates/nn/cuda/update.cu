// AdamW with the exponential moving average, and the norm by which gradients are clipped. All in float; sums in double.
#include "common.cuh"

constexpr int THREADS = 256;

// Σ xᵢ² of this block's share of x, at partial[first + block].
extern "C" __global__ void __launch_bounds__(THREADS)
    squares_f32(const float *x, double *partial, uint32_t first, size_t n) {
    __shared__ double threads[THREADS];
    double sum = 0.0;
    for (size_t i = grid_thread(); i < n; i += grid_threads()) sum += (double)x[i] * x[i];
    threads[threadIdx.x] = sum;
    __syncthreads();
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        if (threadIdx.x < apart) threads[threadIdx.x] += threads[threadIdx.x + apart];
        __syncthreads();
    }
    if (threadIdx.x == 0) partial[first + blockIdx.x] = threads[0];
}

// norm = √Σ partial, and scale = min(1, clip/(norm + 1e-6)), 1 where clip is negative, NaN where the loss or the norm
// is not finite. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    clip_f32(const double *partial, uint32_t count, const float *loss, float clip, float *norm, float *scale) {
    __shared__ double threads[THREADS];
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) sum += partial[i];
    threads[threadIdx.x] = sum;
    __syncthreads();
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        if (threadIdx.x < apart) threads[threadIdx.x] += threads[threadIdx.x + apart];
        __syncthreads();
    }
    if (threadIdx.x > 0) return;
    double length = sqrt(threads[0]);
    *norm = (float)length;
    bool finite = isfinite(length) && isfinite(*loss);
    *scale = !finite ? nanf("") : clip >= 0.0f ? (float)fmin(1.0, clip / (length + 1e-6)) : 1.0f;
}

/// The numbers of one update: see `Pass` in src/update.rs.
struct Pass {
    float keep_m, add_m, keep_v, add_v, scale, keep, step, root_c2, eps, share;
};

// One AdamW step of n values in place; `average` may be null. The gradient is multiplied by pass.scale and, where there
// is one, by *scale; if that is NaN, nothing is written.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw_f32(float *p, float *m, float *v, float *average, const float *grad, const float *scale, Pass pass,
              size_t n) {
    float by = scale ? *scale : pass.scale;
    if (isnan(by)) return;
    for (size_t i = grid_thread(); i < n; i += grid_threads()) {
        // Scaled before it is squared: see `Pass::piece`.
        float g = by * grad[i];
        float first = pass.keep_m * m[i] + pass.add_m * g;
        float second = pass.keep_v * v[i] + pass.add_v * (g * g);
        float value = pass.keep * p[i] - pass.step * first / (sqrtf(second) / pass.root_c2 + pass.eps);
        m[i] = first;
        v[i] = second;
        p[i] = value;
        if (average) average[i] += pass.share * (value - average[i]);
    }
}

// sum = x, or sum += x if `add`; n values.
template <int W> __device__ void accumulate(float *sum, const float *x, uint32_t add, size_t n) {
    for (size_t i = grid_thread() * W; i < n; i += grid_threads() * W) {
        Pack<float, W> pack = read<W>(x + i);
        if (add) {
            Pack<float, W> before = read<W>(sum + i);
            for (int w = 0; w < W; w++) pack.values[w] += before.values[w];
        }
        write(sum + i, pack);
    }
}

extern "C" __global__ void accumulate_f32(float *sum, const float *x, uint32_t add, size_t n) {
    WIDE_IF(aligned(sum, x) && n % WIDE<float> == 0, float, accumulate, sum, x, add, n);
}
