// Kernels of the self-test: what the emulator must get right, and what it must refuse.
#include <cassert>
#include <cuda_bf16.h>
#include <mma.h>

#include "emulator/tensor_cores.hpp"

extern "C" __global__ void axpy(unsigned n, float a, const float *x, float *y) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}

// Each block reverses its part of x, through dynamic shared memory.
extern "C" __global__ void reverse(const float *x, float *y) {
    extern __shared__ __align__(16) unsigned char raw[];
    float *staged = reinterpret_cast<float *>(raw);
    unsigned base = blockIdx.x * blockDim.x;
    staged[threadIdx.x] = x[base + threadIdx.x];
    __syncthreads();
    y[base + threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

template <int rows>
__device__ float column_sum(float value) {
    __shared__ float tile[rows][33], total;
    tile[threadIdx.x / 32][threadIdx.x % 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        total = 0.0f;
        for (unsigned row = 0; row < blockDim.x / 32; row++) total += tile[row][1];
    }
    __syncthreads();
    return total;
}

// The sum over the block by shuffles and static shared memory, twice with arrays of one name.
extern "C" __global__ void __launch_bounds__(128) sums(const float *x, float *out) {
    float value = x[threadIdx.x];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
    float blockwide = column_sum<4>(value);
    float again = column_sum<6>(threadIdx.x % 32 == 1 ? 1.0f : 0.0f);
    unsigned odd = __ballot_sync(0xffffffff, threadIdx.x & 1);
    if (threadIdx.x == 0) out[0] = blockwide, out[1] = again, out[2] = __popc(odd);
}

extern "C" __global__ void count(unsigned *counter, float *sum) {
    atomicAdd(counter, 1);
    atomicAdd(sum, 0.5f);
}

// c = a b for 16x16 tiles, a by rows and b by columns, twice the product through an element-wise step.
extern "C" __global__ void tensor_product(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c) {
    using namespace nvcuda;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> tile_a;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> tile_b;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::load_matrix_sync(tile_a, a, 16);
    wmma::load_matrix_sync(tile_b, b, 16);
    wmma::fill_fragment(sum, 0.0f);
    wmma::mma_sync(sum, tile_a, tile_b, sum);
    for (int i = 0; i < sum.num_elements; i++) sum.x[i] *= 2.0f;
    wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
}

// c = a b for 16x16 tiles, both by rows, with fragments whose lanes are documented. What is copied before it is waited for
// goes to `early`.
extern "C" __global__ void fragments(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, float *early) {
    __shared__ __align__(16) __nv_bfloat16 tile_a[256], tile_b[256];
    unsigned lane = threadIdx.x, at = lane % 16 * 16 + lane / 16 * 8;
    Copies copies;
    copies.begin<16>(tile_a + lane * 8, a + lane * 8, true);
    copies.begin<16>(tile_b + lane * 8, b + lane * 8, true);
    early[lane] = tile_a[lane * 8];
    copies.wait();
    __syncwarp();
    unsigned left[4], right[4];
    load_matrices(left, tile_a + at);
    load_transposed(right, tile_b + at);
    for (int half = 0; half < 2; half++) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_16x8x16(sum, left, right[2 * half], right[2 * half + 1]);
        for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = sum[i];
    }
}

extern "C" __global__ void reads_before_writing(float *out) {
    __shared__ float nothing[4];
    out[threadIdx.x] = nothing[threadIdx.x % 4];
}

// What follows must fail.

extern "C" __global__ void barrier_for_some(float *out) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void two_barriers(float *out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void shuffles_apart(float *out) {
    float value = 1.0f;
    if (threadIdx.x % 2) value = __shfl_xor_sync(0xffffffff, value, 2);
    else if (__any_sync(0xffffffff, 1)) value = 2.0f;
    out[threadIdx.x] = value;
}

extern "C" __global__ void past_shared_memory(float *out) {
    __shared__ float few[8];
    for (unsigned i = 0; i < 9; i++) reinterpret_cast<volatile float *>(few)[i] = 1.0f;
    out[threadIdx.x] = few[0];
}

// The PTX of the test declares it with other parameters.
extern "C" __global__ void changed(float *out, unsigned n) { out[0] = float(n); }

extern "C" __global__ void asserts(float *out) { assert(out == nullptr); }

extern "C" __global__ void past_the_end(unsigned n, float *out) { out[n + threadIdx.x] = 1.0f; }

// Races, for build.py --races: in both, right results come about by luck.

extern "C" __global__ void without_barrier(float *out) {
    __shared__ float value;
    if (threadIdx.x == 0) value = 1.0f;
    if (threadIdx.x == 1) value += 1.0f;
    __syncthreads();
    out[threadIdx.x] = value;
}

extern "C" __global__ void shuffle_for_order(float *out) {
    __shared__ float values[64];
    values[threadIdx.x] = 1.0f;
    __shfl_sync(0xffffffff, 1.0f, 0);  // orders nothing: this wants __syncwarp()
    out[threadIdx.x] = values[threadIdx.x ^ 1];
}

extern "C" __global__ void without_race(float *out) {
    __shared__ float values[64];
    values[threadIdx.x] = 1.0f;
    __syncwarp();
    float next = values[threadIdx.x ^ 1];
    __syncthreads();
    values[63 - threadIdx.x] = next;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
}
