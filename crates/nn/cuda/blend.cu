// The exact blend: samples are picked for a block, and joined behind it with those that went past. A row here is a whole
// sample of n values. `place` says where a sample stands among the `kept` ones with the dropped ones behind them.
#include "common.cuh"

constexpr uint32_t WARPS = 8; // of a block of gate_sums

// out[r] = x[index[r]], for `rows` rows.
template <int W, typename T>
__device__ void pick(const T *x, const uint32_t *index, T *out, uint32_t rows, uint32_t n) {
    over<W>(rows, n, [=](uint32_t row, uint32_t column) {
        write(out + (size_t)row * n + column, read<W>(x + (size_t)index[row] * n + column));
    });
}

// out[index[r]] = x[r]; the other rows stay.
template <int W, typename T>
__device__ void put(const T *x, const uint32_t *index, T *out, uint32_t rows, uint32_t n) {
    over<W>(rows, n, [=](uint32_t row, uint32_t column) {
        write(out + (size_t)index[row] * n + column, read<W>(x + (size_t)row * n + column));
    });
}

// out[b] = ran[place[b]] if b was kept, else h[b].
template <int W, typename T>
__device__ void join(const T *h, const T *ran, const uint32_t *place, uint32_t kept, T *out, uint32_t batch,
                     uint32_t n) {
    over<W>(batch, n, [=](uint32_t b, uint32_t column) {
        const T *from = place[b] < kept ? ran + (size_t)place[b] * n : h + (size_t)b * n;
        write(out + (size_t)b * n + column, read<W>(from + column));
    });
}

// dran[place[b]] = dout[b] and dh[b] = 0 if b was kept, else dh[b] = dout[b].
template <int W, typename T>
__device__ void join_backward(const T *dout, const uint32_t *place, uint32_t kept, T *dh, T *dran, uint32_t batch,
                              uint32_t n) {
    over<W>(batch, n, [=](uint32_t b, uint32_t column) {
        size_t i = (size_t)b * n + column;
        Pack<T, W> g = read<W>(dout + i);
        if (place[b] < kept) {
            write(dran + (size_t)place[b] * n + column, g);
            for (T &value : g.values) value = from_float<T>(0.0f);
        }
        write(dh + i, g);
    });
}

// partial[b, chunk] = Σ dout·(block(h) − h) over `share` values of sample b, in an order that the sizes fix.
template <int W, typename T>
__device__ void gate_sums(const T *dout, const T *h, const T *ran, const T *past, const uint32_t *place, uint32_t kept,
                          float *partial, uint32_t n, uint32_t share) {
    uint32_t b = blockIdx.y, first = blockIdx.x * share, end = min(first + share, n);
    const T *after = place[b] < kept ? ran + (size_t)place[b] * n : past + (size_t)(place[b] - kept) * n;
    dout += (size_t)b * n;
    h += (size_t)b * n;
    float sum = 0.0f;
    for (uint32_t i = first + threadIdx.x * W; i < end; i += blockDim.x * W) {
        Pack<T, W> g = read<W>(dout + i), to = read<W>(after + i), from = read<W>(h + i);
        for (int w = 0; w < W; w++)
            sum += to_float(g.values[w]) * (to_float(to.values[w]) - to_float(from.values[w]));
    }
    __shared__ float warps[WARPS];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (uint32_t w = 0; w < WARPS; w++) total += warps[w];
        partial[b * gridDim.x + blockIdx.x] = total;
    }
}

#define EXPORT(T, suffix)                                                                                              \
    extern "C" __global__ void pick_##suffix(const T *x, const uint32_t *index, T *out, uint32_t rows, uint32_t n) {   \
        WIDE_IF(aligned(x, out) && n % WIDE<T> == 0, T, pick, x, index, out, rows, n);                                 \
    }                                                                                                                  \
    extern "C" __global__ void put_##suffix(const T *x, const uint32_t *index, T *out, uint32_t rows, uint32_t n) {    \
        WIDE_IF(aligned(x, out) && n % WIDE<T> == 0, T, put, x, index, out, rows, n);                                  \
    }                                                                                                                  \
    extern "C" __global__ void join_##suffix(const T *h, const T *ran, const uint32_t *place, uint32_t kept, T *out,   \
                                             uint32_t batch, uint32_t n) {                                             \
        WIDE_IF(aligned(h, ran, out) && n % WIDE<T> == 0, T, join, h, ran, place, kept, out, batch, n);                \
    }                                                                                                                  \
    extern "C" __global__ void join_backward_##suffix(const T *dout, const uint32_t *place, uint32_t kept, T *dh,      \
                                                      T *dran, uint32_t batch, uint32_t n) {                           \
        bool wide = aligned(dout, dh, dran) && n % WIDE<T> == 0;                                                       \
        WIDE_IF(wide, T, join_backward, dout, place, kept, dh, dran, batch, n);                                        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                           \
        gate_sums_##suffix(const T *dout, const T *h, const T *ran, const T *past, const uint32_t *place,              \
                           uint32_t kept, float *partial, uint32_t n, uint32_t share) {                                \
        bool wide = aligned(dout, h, ran, past) && (n | share) % WIDE<T> == 0;                                         \
        WIDE_IF(wide, T, gate_sums, dout, h, ran, past, place, kept, partial, n, share);                               \
    }
FOR_EACH_TYPE(EXPORT)
