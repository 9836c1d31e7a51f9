// Sums over rows, for the gradients of biases, gates and modulations. In two passes, so that the order of every addition
// is fixed: blocks add up `chunk` rows each, then one thread per column adds up the blocks.
//
// Rows of d columns come in groups of t; a group has gridDim.y chunks. Partial sums are (groups, chunks, SUMS, d).
#include "common.cuh"

constexpr int COLUMNS = 32, LANES = 8; // of a block: rows are dealt out over the lanes

/// Sums of what `of(index, row)` gives for every value of this block's columns: SUMS of its two numbers.
template <int SUMS, typename Of>
__device__ void column_sums(float *partial, uint32_t t, uint32_t d, uint32_t chunk, Of of) {
    __shared__ float lanes[2][LANES][COLUMNS];
    uint32_t column = blockIdx.x * COLUMNS + threadIdx.x, lane = threadIdx.y;
    uint32_t first = blockIdx.y * chunk, end = min(first + chunk, t);
    float2 sum = make_float2(0.0f, 0.0f);
    if (column < d)
        for (uint32_t r = first + lane; r < end; r += LANES) {
            size_t row = (size_t)blockIdx.z * t + r;
            float2 one = of(row * d + column, row);
            sum.x += one.x;
            sum.y += one.y;
        }
    lanes[0][lane][threadIdx.x] = sum.x;
    lanes[1][lane][threadIdx.x] = sum.y;
    __syncthreads();
    if (lane < SUMS && column < d) {
        float total = 0.0f;
        for (int l = 0; l < LANES; l++) total += lanes[lane][l][threadIdx.x];
        partial[(((size_t)blockIdx.z * gridDim.y + blockIdx.y) * SUMS + lane) * d + column] = total;
    }
}

/// out[group·stride + at + column], at = first for sum 0 and second for sum 1: the sums of `chunks` partial sums, added to what
/// is there if `add`.
template <typename T>
__device__ void finish_sums(const float *partial, T *out, uint32_t d, uint32_t chunks, size_t stride, uint32_t first,
                            uint32_t second, uint32_t add) {
    uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= d) return;
    partial += ((size_t)blockIdx.z * chunks * gridDim.y + blockIdx.y) * d + column;
    float total = 0.0f;
    for (uint32_t c = 0; c < chunks; c++) total += partial[(size_t)c * gridDim.y * d];
    out += blockIdx.z * stride + (blockIdx.y ? second : first) + column;
    *out = from_float<T>(add ? to_float(*out) + total : total);
}

#define EXPORT(T, suffix)                                                                                              \
    /* Σ a */                                                                                                          \
    extern "C" __global__ void sum_rows_##suffix(const T *a, float *partial, uint32_t t, uint32_t d,                   \
                                                 uint32_t chunk) {                                                     \
        column_sums<1>(partial, t, d, chunk,                                                                           \
                       [=](size_t i, size_t) { return make_float2(to_float(a[i]), 0.0f); });                           \
    }                                                                                                                  \
    extern "C" __global__ void finish_sums_##suffix(const float *partial, T *out, uint32_t d, uint32_t chunks,         \
                                                    size_t stride, uint32_t first, uint32_t second, uint32_t add) {    \
        finish_sums(partial, out, d, chunks, stride, first, second, add);                                              \
    }
FOR_EACH_TYPE(EXPORT)

#define EXPORT_PAIR(A, B, suffix)                                                                                      \
    /* Σ a·b */                                                                                                        \
    extern "C" __global__ void sum_products_##suffix(const A *a, const B *b, float *partial, uint32_t t, uint32_t d,   \
                                                     uint32_t chunk) {                                                 \
        column_sums<1>(partial, t, d, chunk,                                                                           \
                       [=](size_t i, size_t) { return make_float2(to_float(a[i]) * to_float(b[i]), 0.0f); });          \
    }                                                                                                                  \
    /* Σ dy·x̂ and Σ dy, with (mean, 1/σ) of the rows of x */                                                           \
    extern "C" __global__ void sum_norm_##suffix(const A *x, const B *dy, const float2 *stats, float *partial,         \
                                                 uint32_t t, uint32_t d, uint32_t chunk) {                             \
        column_sums<2>(partial, t, d, chunk, [=](size_t i, size_t row) {                                               \
            float2 of = stats[row];                                                                                    \
            float g = to_float(dy[i]);                                                                                 \
            return make_float2(g * (to_float(x[i]) - of.x) * of.y, g);                                                 \
        });                                                                                                            \
    }
EXPORT_PAIR(float, float, f32_f32)
EXPORT_PAIR(bf16, bf16, bf16_bf16)
EXPORT_PAIR(float, bf16, f32_bf16)
