// What the attention kernels of bf16 (attention_mma.cuh) are made of: tiles in shared memory, and what a warp does with them.
#pragma once

#include "attention.cuh"
#include "tensor_cores.cuh"

/// How the left operands of scores are had: read from shared memory for every tile, or once, for more registers.
enum Left { READ, KEPT };

/// Sizes for heads up to E, a multiple of 8: 16·M rows per warp, tiles of C rows of the other side, B blocks on a
/// multiprocessor.
template <int E, int M_, int C, Left L, int B> struct Sizes {
    static constexpr int M = M_, COLUMNS = C, BLOCKS = B, OWN = 16 * M * WARPS;
    static constexpr Left LEFT = L;
    static constexpr int STEPS = (E + 15) / 16; // of 16 values, in a product over a head
    static constexpr int HEAD = 16 * STEPS, LD = HEAD + 8;
    typedef float Scores[M][C / 8][4];      // (16·M, COLUMNS)
    typedef uint32_t Weights[M][C / 16][4]; // the same as left operands
    typedef float Sums[M][E / 8][4];        // (16·M, E)
};

/// This thread's part of its warp's matrices.
struct Lane {
    int lane, g, t;
    __device__ __forceinline__ Lane() : lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {}
    /// The row that the lane names for a left operand (16, 16), or, transposed, for two right ones side by side.
    template <int LD> __device__ __forceinline__ int by_rows() const { return lane % 16 * LD + lane / 16 * 8; }
    /// That for two right operands whose columns are rows in memory.
    template <int LD> __device__ __forceinline__ int by_columns() const {
        return (lane / 16 * 8 + lane % 8) * LD + lane / 8 % 2 * 8;
    }
    /// Row and column of value i in piece n of a fragment (16, 8·N).
    __device__ __forceinline__ int row(int m, int i) const { return 16 * m + g + i / 2 * 8; }
    __device__ __forceinline__ int column(int n, int i) const { return 8 * n + 2 * t + i % 2; }
    /// Over the lanes of a row.
    static __device__ __forceinline__ float sum(float x) {
        x += __shfl_xor_sync(ALL_LANES, x, 1);
        return x + __shfl_xor_sync(ALL_LANES, x, 2);
    }
    static __device__ __forceinline__ float max(float x) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
        return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
    }
};

/// The shared memory of a block: OWNED matrices of its own rows, and twice two of the other side's.
template <typename S, int OWNED> struct Shared {
    bf16 *own, *other;
    float *numbers; // behind all of them
    __device__ __forceinline__ Shared(unsigned char *memory) : own((bf16 *)memory) {
        other = own + OWNED * S::OWN * S::LD;
        numbers = (float *)(other + 4 * S::COLUMNS * S::LD);
    }
    __device__ __forceinline__ bf16 *tile(int stage, int i) const {
        return other + (2 * stage + i) * S::COLUMNS * S::LD;
    }
    __device__ __forceinline__ bf16 *owned(int i) const { return own + i * S::OWN * S::LD; }
    /// The rows of owned(i) that are this warp's.
    __device__ __forceinline__ bf16 *mine(int i) const { return owned(i) + threadIdx.x / 32 * 16 * S::M * S::LD; }
};

/// A matrix (t, e) in the device's memory, whose rows are `stride` apart.
template <typename T> struct Matrix {
    T *at;
    int stride;
    const Problem &p;
    bool wide; // whether rows are pieces of 16 bytes
};

/// Begins to copy rows first… of a matrix to shared memory, ROWS of them, with zeros beyond t and e. All threads of the block
/// take part, four to a row, so that what a warp reads at once lies together and a thread has few addresses. `thread` is
/// threadIdx.x.
template <typename S, int ROWS>
__device__ __forceinline__ void load(Copies &copies, bf16 *to, const Matrix<const bf16> &from, int first,
                                     unsigned thread = threadIdx.x) {
    constexpr int PIECES = S::HEAD / 8, AT_ONCE = BLOCK / 4;
    static_assert(ROWS % AT_ONCE == 0);
    const int row = thread / 4, column = thread % 4 * 8;
#pragma unroll
    for (int r = 0; r < ROWS; r += AT_ONCE) {
        const bf16 *source = from.at + (size_t)(first + row + r) * from.stride + column;
        bf16 *target = to + (row + r) * S::LD + column;
        const int columns = first + row + r < from.p.t ? from.p.e - column : 0; // that there are from this one on
        if (from.wide) {
#pragma unroll
            for (int n = 0; n < PIECES; n += 4)
                if (n + 4 <= PIECES || column < (PIECES - n) * 8)
                    copies.begin<16>(target + n * 8, source + n * 8, n * 8 < columns);
        } else {
#pragma unroll 1
            for (int n = 0; column + n < S::HEAD; n += n % 8 == 7 ? 25 : 1)
                target[n] = n < columns ? source[n] : from_float<bf16>(0.0f);
        }
    }
}

/// Calls with(first row, stage) for every tile of the other side, while load(first row, stage) brings the next. The first one
/// is on its way.
template <typename S, typename Load, typename With>
__device__ __forceinline__ void walk(Copies &copies, int t, Load load, With with) {
    for (int tile = 0; tile < t; tile += S::COLUMNS) {
        const int stage = tile / S::COLUMNS % 2;
        copies.wait();
        __syncthreads(); // this tile is there, and the one before it was read
        if (tile + S::COLUMNS < t) load(tile + S::COLUMNS, stage ^ 1);
        with(tile, stage);
    }
}

/// A warp's own rows as left operands.
template <typename S> struct Own {
    static constexpr bool KEEPS = S::LEFT == KEPT;
    const bf16 *rows; // the one that this lane names
    uint32_t kept[KEEPS ? S::M : 1][KEEPS ? S::STEPS : 1][4];

    __device__ __forceinline__ Own(const bf16 *mine) : rows(mine + Lane().by_rows<S::LD>()) {
        if constexpr (KEEPS)
#pragma unroll
            for (int m = 0; m < S::M; m++)
#pragma unroll
                for (int k = 0; k < S::STEPS; k++) load_matrices(kept[m][k], rows + m * 16 * S::LD + k * 16);
    }
    __device__ __forceinline__ void operand(uint32_t (&to)[4], int m, int k) const {
        if constexpr (KEEPS)
            for (int i = 0; i < 4; i++) to[i] = kept[m][k][i];
        else
            load_matrices(to, rows + m * 16 * S::LD + k * 16);
    }
};

template <int M, int N> __device__ __forceinline__ void clear(float (&fragments)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 4; i++) fragments[m][n][i] = 0.0f;
}

/// scores (16·M, COLUMNS) = own · tileᵀ.
template <typename S>
__device__ __forceinline__ void score(typename S::Scores &scores, const Own<S> &own, const bf16 *tile) {
    const bf16 *rows = tile + Lane().by_columns<S::LD>();
    clear(scores);
#pragma unroll
    for (int k = 0; k < S::STEPS; k++) {
        uint32_t left[S::M][4];
#pragma unroll
        for (int m = 0; m < S::M; m++) own.operand(left[m], m, k);
#pragma unroll
        for (int n = 0; n < S::COLUMNS / 8; n += 2) {
            uint32_t right[4];
            load_matrices(right, rows + n * 8 * S::LD + k * 16);
#pragma unroll
            for (int m = 0; m < S::M; m++) {
                mma_16x8x16(scores[m][n], left[m], right[0], right[1]);
                mma_16x8x16(scores[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

/// What dropout keeps of a lane's scores, found before there are any: bit 4n + i of number m.
template <typename S> struct Dropped {
    const Drop &drop;
    uint32_t bits[S::M];

    /// keeps(drop of this head, row, column) is asked where anything is dropped at all.
    template <typename F>
    __device__ __forceinline__ Dropped(const Drop &drop, const Problem &p, const Lane &lane, F keeps) : drop(drop) {
        static_assert(S::COLUMNS <= 64);
        if (!drop.keys) return;
        const HeadDrop head(drop, p.t);
#pragma unroll
        for (int m = 0; m < S::M; m++) {
            bits[m] = 0;
#pragma unroll 1 // a hash is long, and this is the rarer way
            for (int n = 0; n < S::COLUMNS / 8; n++)
                for (int i = 0; i < 4; i++)
                    bits[m] |= (uint32_t)keeps(head, lane.row(m, i), lane.column(n, i)) << (4 * n + i);
        }
    }
    /// Multiplies by the factors.
    __device__ __forceinline__ void apply(typename S::Scores &to) const {
        if (!drop.keys) return;
#pragma unroll
        for (int m = 0; m < S::M; m++)
#pragma unroll
            for (int n = 0; n < S::COLUMNS / 8; n++)
                for (int i = 0; i < 4; i++) to[m][n][i] *= bits[m] >> (4 * n + i) & 1 ? drop.scale : 0.0f;
    }
};

/// Scores, or what was made of them, as left operands.
template <int M, int N>
__device__ __forceinline__ void as_operands(uint32_t (&to)[M][N / 2][4], const float (&from)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 2; i++) to[m][n / 2][n % 2 * 2 + i] = pack(from[m][n][2 * i], from[m][n][2 * i + 1]);
}

/// sums (16·M, E) += weights (16·M, COLUMNS) · tile.
template <typename S>
__device__ __forceinline__ void add_product(typename S::Sums &sums, const typename S::Weights &weights,
                                            const bf16 *tile) {
    constexpr int N = sizeof(sums[0]) / sizeof(sums[0][0]), STEPS = S::COLUMNS / 16;
    const bf16 *rows = tile + Lane().by_rows<S::LD>();
    uint32_t right[4];
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int n = 0; n + 2 <= N; n += 2) {
            load_transposed(right, rows + k * 16 * S::LD + n * 8);
#pragma unroll
            for (int m = 0; m < S::M; m++) {
                mma_16x8x16(sums[m][n], weights[m][k], right[0], right[1]);
                mma_16x8x16(sums[m][n + 1], weights[m][k], right[2], right[3]);
            }
        }
    if constexpr (N % 2 == 1) { // of the last columns, operands for two steps at once
        const bf16 *last = tile + Lane().lane * S::LD + (N - 1) * 8;
#pragma unroll
        for (int k = 0; k < STEPS; k += 2) {
            load_transposed(right, last + k * 16 * S::LD);
#pragma unroll
            for (int m = 0; m < S::M; m++) {
                mma_16x8x16(sums[m][N - 1], weights[m][k], right[0], right[1]);
                mma_16x8x16(sums[m][N - 1], weights[m][k + 1], right[2], right[3]);
            }
        }
    }
}

/// Writes sums, times factors per row, to rows first… of a matrix, those of them that it has. `staging` is the warp's own
/// rows in shared memory, which nothing needs any more: from there whole pieces of 16 bytes are written.
template <typename S>
__device__ __forceinline__ void write(const Matrix<bf16> &to, const typename S::Sums &sums,
                                      const float (&factors)[S::M][2], bf16 *staging, int first) {
    constexpr int N = sizeof(sums[0]) / sizeof(sums[0][0]), PIECES = S::HEAD / 8;
    Lane lane;
    __syncwarp(); // the rows were read
#pragma unroll
    for (int m = 0; m < S::M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 4; i += 2) {
                float factor = factors[m][i / 2];
                *(uint32_t *)(staging + lane.row(m, i) * S::LD + lane.column(n, i)) =
                    pack(sums[m][n][i] * factor, sums[m][n][i + 1] * factor);
            }
    __syncwarp();
    for (int i = lane.lane; i < 16 * S::M * PIECES; i += 32) {
        int row = i / PIECES, column = i % PIECES * 8;
        if (first + row >= to.p.t || column >= to.p.e) continue;
        const bf16 *source = staging + row * S::LD + column;
        bf16 *target = to.at + (size_t)(first + row) * to.stride + column;
        if (to.wide)
            *(uint4 *)target = *(const uint4 *)source;
        else
            for (int v = 0; v < 8 && column + v < to.p.e; v++) target[v] = source[v];
    }
}
