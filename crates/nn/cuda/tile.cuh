// Products of small matrices of float in shared memory, worked on by a warp with FMA.
//
// An Accumulator is 16×16 floats held by a warp. Only clear, product, store and load touch it, so nothing else depends on
// which lane holds what.
#pragma once

#include "common.cuh"

/// A lane holds two rows of four columns.
struct Accumulator {
    float values[2][4];

    static __device__ __forceinline__ int row() { return threadIdx.x % 32 / 4 * 2; }
    static __device__ __forceinline__ int column() { return threadIdx.x % 4 * 4; }
    __device__ __forceinline__ void clear() {
        for (int r = 0; r < 2; r++)
            for (int c = 0; c < 4; c++) values[r][c] = 0.0f;
    }
    __device__ __forceinline__ void store(float *to, int ld) const {
        for (int r = 0; r < 2; r++)
            for (int c = 0; c < 4; c++) to[(row() + r) * ld + column() + c] = values[r][c];
    }
    __device__ __forceinline__ void load(const float *from, int ld) {
        for (int r = 0; r < 2; r++)
            for (int c = 0; c < 4; c++) values[r][c] = from[(row() + r) * ld + column() + c];
    }
};

/// How B lies in memory: by rows (depth, 16·N), or transposed, (16·N, depth).
enum Lies { BY_ROWS, TRANSPOSED };

/// Rows of four floats, aligned as the tiles are.
__device__ __forceinline__ void load_four(float (&to)[4], const float *from) {
    float4 four = *(const float4 *)from;
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

/// acc (16, 16·N) += A (16, DEPTH) · B (DEPTH, 16·N).
template <Lies LIES, int DEPTH, int N>
__device__ __forceinline__ void product(Accumulator (&acc)[N], const float *a, int lda, const float *b,
                                        int ldb) {
    int row = Accumulator::row(), column = Accumulator::column();
    // Not unrolled: the loop is long, and its registers are those of the accumulators.
#pragma unroll 1
    for (int k = 0; k < DEPTH; k += 4) {
        float left[2][4], right[4][4];
        for (int r = 0; r < 2; r++) load_four(left[r], a + (row + r) * lda + k);
#pragma unroll
        for (int n = 0; n < N; n++) {
            for (int i = 0; i < 4; i++)
                load_four(right[i], LIES == TRANSPOSED ? b + (n * 16 + column + i) * ldb + k
                                                       : b + (k + i) * ldb + n * 16 + column);
            for (int r = 0; r < 2; r++)
                for (int c = 0; c < 4; c++)
                    for (int i = 0; i < 4; i++)
                        acc[n].values[r][c] += left[r][i] * (LIES == TRANSPOSED ? right[c][i] : right[i][c]);
        }
    }
}

/// `rows` rows from `first` of a matrix (t, e) whose rows stand `stride` apart, into shared memory: as rows of E values,
/// `ld` apart, with zeros beyond t and e. All threads of the block take part.
template <int E>
__device__ __forceinline__ void load_tile(float *to, int ld, const float *from, size_t stride, int first, int rows, int t,
                                          int e) {
    constexpr int WIDE = 4; // values that are copied at once where rows are aligned
    bool aligned = e % WIDE == 0 && stride % WIDE == 0 && (uintptr_t)from % 16 == 0;
    for (int i = threadIdx.x; i < rows * (E / WIDE); i += blockDim.x) {
        int row = i / (E / WIDE), column = i % (E / WIDE) * WIDE;
        bool inside = first + row < t;
        const float *source = from + (size_t)(first + row) * stride + column;
        float *target = to + row * ld + column;
        if (aligned && inside && column < e) {
            *(uint4 *)target = *(const uint4 *)source;
        } else {
            for (int v = 0; v < WIDE; v++)
                target[v] = inside && column + v < e ? source[v] : 0.0f;
        }
    }
}

/// Values of a matrix (16, COLUMNS) of a warp in shared memory: lane l has every second value of row l/2, so that a row's
/// sums and maxima are shared by two neighbours.
struct Half {
    int row, odd;
    __device__ __forceinline__ Half() : row(threadIdx.x % 32 / 2), odd(threadIdx.x % 2) {}
    __device__ __forceinline__ int column(int j) const { return 2 * j + odd; }
    static __device__ __forceinline__ float sum(float x) { return x + __shfl_xor_sync(ALL_LANES, x, 1); }
    static __device__ __forceinline__ float max(float x) { return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1)); }
};
