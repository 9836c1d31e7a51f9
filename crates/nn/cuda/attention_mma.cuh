// The attention kernels of bf16 (attention.cuh), whose scores and weights never leave the registers, as in FlashAttention-2
// (Dao 2023, arXiv 2307.08691). A warp has 16·M rows of its own side, all of their scores against a tile, and their sums:
//   scores = own · tileᵀ         left operands from own rows, kept in registers where there is room; a tile's rows are the
//                                right operand's columns, which is what ldmatrix gives
//   sums += weights · tile       weights are made of scores in place: the fragment that a product leaves (c0…c3 of columns
//                                16k…16k+15) is, rounded and packed, the left operand of the next. ldmatrix transposes tiles
// A lane holds rows g and g+8 of each 16, so what a row has one of (maximum, sum, log-sum-exp) is shared by the four lanes of
// a quad. For dK and dV everything is transposed: own rows are keys, tiles are of queries.
// Tiles come by asynchronous copies, the next one while one is worked on, with one barrier for each. Rows of tiles stand an odd
// multiple of 16 bytes apart, so that the eight that ldmatrix reads at once lie in different banks.
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
    typedef float Scores[M][C / 8][4];       // (16·M, COLUMNS)
    typedef uint32_t Weights[M][C / 16][4];  // the same as left operands
    typedef float Sums[M][E / 8][4];         // (16·M, E)
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
    size_t stride;
    int t, e;
    bool wide; // whether rows are pieces of 16 bytes
    __device__ __forceinline__ Matrix(T *at, size_t stride, const Problem &p)
        : at(at), stride(stride), t(p.t), e(p.e), wide((stride | p.e) % 8 == 0 && aligned(at)) {}
};

/// Begins to copy rows first… of a matrix to shared memory, ROWS of them, with zeros beyond t and e. All threads of the block
/// take part.
template <typename S, int ROWS>
__device__ __forceinline__ void load(Copies &copies, bf16 *to, const Matrix<const bf16> &from, int first) {
    constexpr int PIECES = S::HEAD / 8;
    static_assert(ROWS * PIECES % BLOCK == 0);
#pragma unroll
    for (int n = 0; n < ROWS * PIECES / BLOCK; n++) {
        int i = n * BLOCK + threadIdx.x, row = i / PIECES, column = i % PIECES * 8;
        bool inside = first + row < from.t;
        const bf16 *source = from.at + (size_t)(first + row) * from.stride + column;
        bf16 *target = to + row * S::LD + column;
        if (from.wide) {
            copies.begin<16>(target, source, inside && column < from.e);
        } else {
            for (int v = 0; v < 8; v++) target[v] = inside && column + v < from.e ? source[v] : from_float<bf16>(0.0f);
        }
    }
}

/// Calls with(first row, stage) for every tile of the other side, while load(first row, stage) brings the next. The first one
/// is on its way.
template <typename S, typename Load, typename With>
__device__ __forceinline__ void walk(Copies &copies, int t, Load load, With with) {
    int stage = 0;
    for (int tile = 0; tile < t; tile += S::COLUMNS) {
        copies.wait();
        __syncthreads(); // this tile is there, and the one before it was read
        if (tile + S::COLUMNS < t) load(tile + S::COLUMNS, stage ^ 1);
        with(tile, stage);
        stage ^= 1;
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
    constexpr int N = sizeof(sums[0]) / sizeof(sums[0][0]);
    const bf16 *rows = tile + Lane().by_rows<S::LD>();
#pragma unroll
    for (int k = 0; k < S::COLUMNS / 16; k++)
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            load_transposed(right, rows + k * 16 * S::LD + n * 8);
#pragma unroll
            for (int m = 0; m < S::M; m++) {
                mma_16x8x16(sums[m][n], weights[m][k], right[0], right[1]);
                if (n + 1 < N) mma_16x8x16(sums[m][n + 1], weights[m][k], right[2], right[3]);
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
        if (first + row >= to.t || column >= to.e) continue;
        const bf16 *source = staging + row * S::LD + column;
        bf16 *target = to.at + (size_t)(first + row) * to.stride + column;
        if (to.wide)
            *(uint4 *)target = *(const uint4 *)source;
        else
            for (int v = 0; v < 8 && column + v < to.e; v++) target[v] = source[v];
    }
}

template <typename S> __device__ void attention(const bf16 *qkv, bf16 *out, float *lse, Problem p, Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Shared<S, 1> shared(memory);
    const Head<bf16> head(qkv, p);
    const HeadDrop drop(dropped, p.t);
    const Lane lane;
    const int block = blockIdx.x * S::OWN, first = block + threadIdx.x / 32 * 16 * S::M;
    const float scale = p.scale * LOG2_E;
    const Matrix<const bf16> q(head.part(0), 3 * head.width, p), k(head.part(1), 3 * head.width, p),
        v(head.part(2), 3 * head.width, p);

    Copies copies;
    auto load_both = [&](int tile, int stage) {
        load<S, S::COLUMNS>(copies, shared.tile(stage, 0), k, tile);
        load<S, S::COLUMNS>(copies, shared.tile(stage, 1), v, tile);
    };
    load<S, S::OWN>(copies, shared.owned(0), q, block);
    load_both(0, 0);
    copies.wait();
    __syncthreads();
    const Own<S> queries(shared.mine(0));
    typename S::Sums sums;
    clear(sums);
    float top[S::M][2], total[S::M][2]; // of the lane's rows; sums of its columns only
    for (int m = 0; m < S::M; m++)
        for (int r = 0; r < 2; r++) top[m][r] = -INFINITY, total[m][r] = 0.0f;

    walk<S>(copies, p.t, load_both, [&](int tile, int stage) {
        if (first >= p.t) return;
        constexpr int N = S::COLUMNS / 8;
        typename S::Scores s;
        score(s, queries, shared.tile(stage, 0));
        if (tile + S::COLUMNS > p.t)
#pragma unroll
            for (int m = 0; m < S::M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 0; i < 4; i++)
                        if (tile + lane.column(n, i) >= p.t) s[m][n][i] = -INFINITY;
        bool any_grown = false;
        float factor[S::M][2];
#pragma unroll
        for (int m = 0; m < S::M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float highest = -INFINITY;
#pragma unroll
                for (int n = 0; n < N; n++) highest = fmaxf(highest, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                highest = Lane::max(highest) * scale;
                bool grown = highest > top[m][r] + SLACK;
                float base = grown ? highest : top[m][r];
                factor[m][r] = power_of_two(top[m][r] - base);
                top[m][r] = base;
                any_grown |= grown;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 2 * r; i < 2 * r + 2; i++) {
                        s[m][n][i] = power_of_two(fmaf(s[m][n][i], scale, -base));
                        sum += s[m][n][i];
                    }
                total[m][r] = total[m][r] * factor[m][r] + sum;
            }
        if (__any_sync(ALL_LANES, any_grown) && tile > 0)
#pragma unroll
            for (int m = 0; m < S::M; m++)
                for (auto &piece : sums[m])
                    for (int i = 0; i < 4; i++) piece[i] *= factor[m][i / 2];
        drop.factors([&](auto kept) {
#pragma unroll
            for (int m = 0; m < S::M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 0; i < 4; i++) s[m][n][i] *= kept(first + lane.row(m, i), tile + lane.column(n, i));
        });
        typename S::Weights weights;
        as_operands(weights, s);
        add_product<S>(sums, weights, shared.tile(stage, 1));
    });

    if (first >= p.t) return;
    float factor[S::M][2];
#pragma unroll
    for (int m = 0; m < S::M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int query = first + lane.row(m, 2 * r);
            float sum = Lane::sum(total[m][r]);
            factor[m][r] = 1.0f / sum;
            if (query < p.t && lane.t == 0) lse[head.row + query] = top[m][r] + log2f(sum);
        }
    write<S>(Matrix<bf16>(out + head.at, head.width, p), sums, factor, shared.mine(0), first);
}

// With P the probabilities and S the scaled scores: dP = dO·Vᵀ, dS = P∘(dP − delta), dQ = dS·K/√e. Where P is dropped by
// the factors M, dP = (dO·Vᵀ)∘M. dqkv is packed as qkv.
template <typename S>
__device__ void attention_dq(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, bf16 *dqkv,
                             Problem p, Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Shared<S, 2> shared(memory);
    const Head<bf16> head(qkv, p);
    const HeadDrop drop(dropped, p.t);
    const Lane lane;
    const int block = blockIdx.x * S::OWN, first = block + threadIdx.x / 32 * 16 * S::M;
    const float scale = p.scale * LOG2_E;
    const Matrix<const bf16> q(head.part(0), 3 * head.width, p), k(head.part(1), 3 * head.width, p),
        v(head.part(2), 3 * head.width, p), d_out(dout + head.at, head.width, p);

    Copies copies;
    auto load_both = [&](int tile, int stage) {
        load<S, S::COLUMNS>(copies, shared.tile(stage, 0), k, tile);
        load<S, S::COLUMNS>(copies, shared.tile(stage, 1), v, tile);
    };
    load<S, S::OWN>(copies, shared.owned(0), q, block);
    load<S, S::OWN>(copies, shared.owned(1), d_out, block);
    load_both(0, 0);
    float own_lse[S::M][2], own_delta[S::M][2], factors[S::M][2];
#pragma unroll
    for (int m = 0; m < S::M; m++)
        for (int r = 0; r < 2; r++) {
            int query = first + lane.row(m, 2 * r);
            own_lse[m][r] = query < p.t ? lse[head.row + query] : 0.0f;
            own_delta[m][r] = query < p.t ? delta[head.row + query] : 0.0f;
            factors[m][r] = p.scale;
        }
    copies.wait();
    __syncthreads();
    const Own<S> queries(shared.mine(0)), d_outs(shared.mine(1));
    typename S::Sums sums;
    clear(sums);

    walk<S>(copies, p.t, load_both, [&](int tile, int stage) {
        if (first >= p.t) return;
        typename S::Scores s, dp;
        score(s, queries, shared.tile(stage, 0));
        score(dp, d_outs, shared.tile(stage, 1));
        const bool ragged = tile + S::COLUMNS > p.t;
        drop.factors([&](auto kept) {
#pragma unroll
            for (int m = 0; m < S::M; m++)
#pragma unroll
                for (int n = 0; n < S::COLUMNS / 8; n++)
                    for (int i = 0; i < 4; i++) {
                        int column = tile + lane.column(n, i);
                        float weight = power_of_two(fmaf(s[m][n][i], scale, -own_lse[m][i / 2]));
                        float through = dp[m][n][i] * kept(first + lane.row(m, i), column);
                        s[m][n][i] = ragged && column >= p.t ? 0.0f : weight * (through - own_delta[m][i / 2]);
                    }
        });
        typename S::Weights ds;
        as_operands(ds, s);
        add_product<S>(sums, ds, shared.tile(stage, 0));
    });
    if (first >= p.t) return;
    write<S>(Matrix<bf16>(dqkv + (head.qkv - qkv), 3 * head.width, p), sums, factors, shared.mine(0), first);
}

// dV = (P∘M)ᵀ·dO and dK = dSᵀ·Q/√e: the transposed matrices are formed, a warp's keys against a tile of queries. Queries
// beyond t have zeros everywhere, also for their log-sum-exp and delta, so that they add nothing.
template <typename S>
__device__ void attention_dkv(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, bf16 *dqkv,
                              Problem p, Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Shared<S, 2> shared(memory);
    const Head<bf16> head(qkv, p);
    const HeadDrop drop(dropped, p.t);
    const Lane lane;
    const int block = blockIdx.x * S::OWN, first = block + threadIdx.x / 32 * 16 * S::M;
    const float scale = p.scale * LOG2_E;
    const Matrix<const bf16> q(head.part(0), 3 * head.width, p), k(head.part(1), 3 * head.width, p),
        v(head.part(2), 3 * head.width, p), d_out(dout + head.at, head.width, p);

    Copies copies;
    auto load_both = [&](int tile, int stage) {
        load<S, S::COLUMNS>(copies, shared.tile(stage, 0), q, tile);
        load<S, S::COLUMNS>(copies, shared.tile(stage, 1), d_out, tile);
        static_assert(2 * S::COLUMNS <= BLOCK);
        int i = threadIdx.x, query = tile + i % S::COLUMNS;
        if (i < 2 * S::COLUMNS) // log-sum-exps, then deltas
            copies.begin<4>(shared.numbers + 2 * stage * S::COLUMNS + i,
                            (i < S::COLUMNS ? lse : delta) + head.row + query, query < p.t);
    };
    load<S, S::OWN>(copies, shared.owned(0), k, block);
    load<S, S::OWN>(copies, shared.owned(1), v, block);
    load_both(0, 0);
    copies.wait();
    __syncthreads();
    const Own<S> keys(shared.mine(0)), values(shared.mine(1));
    typename S::Sums dk, dv;
    clear(dk);
    clear(dv);

    walk<S>(copies, p.t, load_both, [&](int tile, int stage) {
        if (first >= p.t) return;
        typename S::Scores s, dp;
        score(s, keys, shared.tile(stage, 0));
        score(dp, values, shared.tile(stage, 1));
        const float *lses = shared.numbers + 2 * stage * S::COLUMNS, *deltas = lses + S::COLUMNS;
        drop.factors([&](auto kept) {
#pragma unroll
            for (int n = 0; n < S::COLUMNS / 8; n++) {
                float2 two_lses = *(const float2 *)(lses + lane.column(n, 0));
                float2 two_deltas = *(const float2 *)(deltas + lane.column(n, 0));
#pragma unroll
                for (int m = 0; m < S::M; m++)
                    for (int i = 0; i < 4; i++) {
                        float factor = kept(tile + lane.column(n, i), first + lane.row(m, i));
                        float weight = power_of_two(fmaf(s[m][n][i], scale, -(i % 2 ? two_lses.y : two_lses.x)));
                        s[m][n][i] = weight * factor;
                        dp[m][n][i] = weight * (dp[m][n][i] * factor - (i % 2 ? two_deltas.y : two_deltas.x));
                    }
            }
        });
        typename S::Weights weights, ds;
        as_operands(weights, s);
        as_operands(ds, dp);
        add_product<S>(dv, weights, shared.tile(stage, 1));
        add_product<S>(dk, ds, shared.tile(stage, 0));
    });
    if (first >= p.t) return;
    float ones[S::M][2], scales[S::M][2];
    for (int m = 0; m < S::M; m++)
        for (int r = 0; r < 2; r++) ones[m][r] = 1.0f, scales[m][r] = p.scale;
    bf16 *to = dqkv + (head.qkv - qkv);
    write<S>(Matrix<bf16>(to + head.width, 3 * head.width, p), dk, scales, shared.mine(0), first);
    write<S>(Matrix<bf16>(to + 2 * head.width, 3 * head.width, p), dv, ones, shared.mine(1), first);
}

/// Sizes of the kernels for heads up to E; src/cuda/attention.rs knows the rows.
template <int E> struct Chosen {
    typedef Sizes<E, 2, 64, KEPT, 2> Forward;
    typedef Sizes<E, 1, 64, KEPT, 2> Dq;
    typedef Sizes<E, 1, 64, KEPT, 2> Dkv;
};
template <> struct Chosen<128> {
    typedef Sizes<128, 1, 64, KEPT, 3> Forward;
    typedef Sizes<128, 1, 64, READ, 2> Dq;
    typedef Sizes<128, 1, 32, READ, 2> Dkv;
};
