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

#include "attention_tiles.cuh"

template <typename S> __device__ void attention(const bf16 *qkv, bf16 *out, float *lse, Problem p, Drop drop) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Shared<S, 1> shared(memory);
    const Head<bf16> head(qkv, p);
    const Lane lane;
    const int block = blockIdx.x * S::OWN, first = block + threadIdx.x / 32 * 16 * S::M;
    const float scale = p.scale * LOG2_E;
    const int width = p.heads * p.e;
    const bool wide = p.e % 8 == 0 && aligned(qkv, out);
    auto part = [&](int i) { return Matrix<const bf16>{head.part(i), 3 * width, p, wide}; };
    const Matrix<const bf16> q = part(0), k = part(1), v = part(2);

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
        const Dropped<S> dropped(drop, p, lane, [&](const HeadDrop &head_drop, int row, int column) {
            return head_drop.keeps(first + row, tile + column);
        });
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
                float highest = -INFINITY, sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; n++) highest = fmaxf(highest, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                highest = Lane::max(highest) * scale;
                bool grown = highest > top[m][r] + SLACK;
                float base = grown ? highest : top[m][r];
                factor[m][r] = power_of_two(top[m][r] - base);
                top[m][r] = base;
                any_grown |= grown;
#pragma unroll
                for (int n = 0; n < N; n++)
                    for (int i = 2 * r; i < 2 * r + 2; i++) {
                        s[m][n][i] = power_of_two(fmaf(s[m][n][i], scale, -base));
                        sum += s[m][n][i];
                    }
                total[m][r] = total[m][r] * factor[m][r] + sum;
            }
        dropped.apply(s);
        typename S::Weights weights;
        as_operands(weights, s);
        if (__any_sync(ALL_LANES, any_grown) && tile > 0)
#pragma unroll
            for (int m = 0; m < S::M; m++)
                for (auto &piece : sums[m])
                    for (int i = 0; i < 4; i++) piece[i] *= factor[m][i / 2];
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
    write<S>(Matrix<bf16>{out + head.at, width, p, wide}, sums, factor, shared.mine(0), first);
}

// With P the probabilities and S the scaled scores: dP = dO·Vᵀ, dS = P∘(dP − delta), dQ = dS·K/√e. Where P is dropped by
// the factors D, dP = (dO·Vᵀ)∘D. dqkv is packed as qkv.
template <typename S>
__device__ void attention_dq(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, bf16 *dqkv,
                             Problem p, Drop drop) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Shared<S, 2> shared(memory);
    const Head<bf16> head(qkv, p);
    const Lane lane;
    const int block = blockIdx.x * S::OWN, first = block + threadIdx.x / 32 * 16 * S::M;
    const float scale = p.scale * LOG2_E;
    const int width = p.heads * p.e;
    const bool wide = p.e % 8 == 0 && aligned(qkv, dout, dqkv);
    auto part = [&](int i) { return Matrix<const bf16>{head.part(i), 3 * width, p, wide}; };
    const Matrix<const bf16> q = part(0), k = part(1), v = part(2), d_out{dout + head.at, width, p, wide};

    Copies copies;
    auto load_both = [&](int tile, int stage) {
        load<S, S::COLUMNS>(copies, shared.tile(stage, 0), k, tile);
        load<S, S::COLUMNS>(copies, shared.tile(stage, 1), v, tile);
    };
    load<S, S::OWN>(copies, shared.owned(0), q, block);
    load<S, S::OWN>(copies, shared.owned(1), d_out, block);
    load_both(0, 0);
    float own_lse[S::M][2], own_delta[S::M][2];
#pragma unroll
    for (int m = 0; m < S::M; m++)
        for (int r = 0; r < 2; r++) {
            int query = first + lane.row(m, 2 * r);
            own_lse[m][r] = query < p.t ? lse[head.row + query] : 0.0f;
            own_delta[m][r] = query < p.t ? delta[head.row + query] : 0.0f;
        }
    copies.wait();
    __syncthreads();
    const Own<S> queries(shared.mine(0)), d_outs(shared.mine(1));
    typename S::Sums sums;
    clear(sums);

    walk<S>(copies, p.t, load_both, [&](int tile, int stage) {
        if (first >= p.t) return;
        const Dropped<S> dropped(drop, p, lane, [&](const HeadDrop &head_drop, int row, int column) {
            return head_drop.keeps(first + row, tile + column);
        });
        typename S::Scores s, dp;
        score(s, queries, shared.tile(stage, 0));
        score(dp, d_outs, shared.tile(stage, 1));
        dropped.apply(dp);
        const bool ragged = tile + S::COLUMNS > p.t;
#pragma unroll
        for (int m = 0; m < S::M; m++)
#pragma unroll
            for (int n = 0; n < S::COLUMNS / 8; n++)
                for (int i = 0; i < 4; i++) {
                    float weight = power_of_two(fmaf(s[m][n][i], scale, -own_lse[m][i / 2]));
                    bool outside = ragged && tile + lane.column(n, i) >= p.t;
                    s[m][n][i] = outside ? 0.0f : weight * (dp[m][n][i] - own_delta[m][i / 2]);
                }
        typename S::Weights ds;
        as_operands(ds, s);
        add_product<S>(sums, ds, shared.tile(stage, 0));
    });
    if (first >= p.t) return;
    float scales[S::M][2];
    for (int m = 0; m < S::M; m++)
        for (int r = 0; r < 2; r++) scales[m][r] = p.scale;
    write<S>(Matrix<bf16>{dqkv + (head.qkv - qkv), 3 * width, p, wide}, sums, scales, shared.mine(0), first);
}

// dV = (P∘D)ᵀ·dO and dK = dSᵀ·Q/√e: the transposed matrices are formed, a warp's keys against a tile of queries. Queries
// beyond t have zeros everywhere, also for their log-sum-exp and delta, so that they add nothing.
template <typename S>
__device__ void attention_dkv(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, bf16 *dqkv,
                              Problem p, Drop drop) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Shared<S, 2> shared(memory);
    const Head<bf16> head(qkv, p);
    const Lane lane;
    const int block = blockIdx.x * S::OWN, first = block + threadIdx.x / 32 * 16 * S::M;
    const float scale = p.scale * LOG2_E;
    const int width = p.heads * p.e;
    const bool wide = p.e % 8 == 0 && aligned(qkv, dout, dqkv);
    auto part = [&](int i) { return Matrix<const bf16>{head.part(i), 3 * width, p, wide}; };
    const Matrix<const bf16> q = part(0), k = part(1), v = part(2), d_out{dout + head.at, width, p, wide};

    Copies copies;
    auto load_both = [&](int tile, int stage) {
        const unsigned thread = thread_again();
        load<S, S::COLUMNS>(copies, shared.tile(stage, 0), q, tile, thread);
        load<S, S::COLUMNS>(copies, shared.tile(stage, 1), d_out, tile, thread);
        static_assert(2 * S::COLUMNS <= BLOCK);
        const int second = thread >= S::COLUMNS, query = tile + thread - second * S::COLUMNS;
        if (thread < 2 * S::COLUMNS) // log-sum-exps, then deltas
            copies.begin<4>(shared.numbers + 2 * stage * S::COLUMNS + thread, (second ? delta : lse) + head.row + query,
                            query < p.t);
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
        const Dropped<S> dropped(drop, p, lane, [&](const HeadDrop &head_drop, int row, int column) {
            return head_drop.keeps(tile + column, first + row);
        });
        typename S::Scores s, dp;
        score(dp, values, shared.tile(stage, 1));
        score(s, keys, shared.tile(stage, 0));
        const float *lses = shared.numbers + 2 * stage * S::COLUMNS, *deltas = lses + S::COLUMNS;
        dropped.apply(dp);
#pragma unroll
        for (int n = 0; n < S::COLUMNS / 8; n++) {
            float2 two_lses = *(const float2 *)(lses + lane.column(n, 0));
            float2 two_deltas = *(const float2 *)(deltas + lane.column(n, 0));
#pragma unroll
            for (int m = 0; m < S::M; m++)
                for (int i = 0; i < 4; i++) {
                    s[m][n][i] = power_of_two(fmaf(s[m][n][i], scale, -(i % 2 ? two_lses.y : two_lses.x)));
                    dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - (i % 2 ? two_deltas.y : two_deltas.x));
                }
        }
        dropped.apply(s);
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
    write<S>(Matrix<bf16>{to + width, 3 * width, p, wide}, dk, scales, shared.mine(0), first);
    write<S>(Matrix<bf16>{to + 2 * width, 3 * width, p, wide}, dv, ones, shared.mine(1), first);
}

/// Sizes of the kernels for heads up to E: what 255 registers hold, which is all of them at two blocks on a multiprocessor.
/// Two pieces of 16 rows per warp halve what is read of tiles. src/cuda/attention.rs knows the rows.
template <int E> struct Chosen {
    typedef Sizes<E, 2, 64, KEPT, 2> Forward;
    typedef Sizes<E, 2, 32, KEPT, 2> Dq;
    typedef Sizes<E, 2, 32, READ, 2> Dkv;
};
template <> struct Chosen<128> {
    typedef Sizes<128, 2, 32, READ, 2> Forward;
    typedef Sizes<128, 1, 32, KEPT, 2> Dq;
    typedef Sizes<128, 1, 32, KEPT, 2> Dkv;
};
