// The attention kernels of float (attention.cuh), with FMA: scores and weights pass through shared memory between products.
#pragma once

#include "attention.cuh"
#include "tile.cuh"

constexpr int OWN = 16 * WARPS;

/// Sizes for heads up to E, a multiple of 16, and tiles of C rows of the other side; B blocks on a multiprocessor.
template <int E, int C, int B> struct Sizes {
    typedef Accumulator Tiles[E / 16]; // a matrix (16, E) of a warp
    static constexpr int HEAD = E, COLUMNS = C, BLOCKS = B;
    // Rows are longer by 16 bytes so that neighbouring ones start in different banks.
    static constexpr int LD = E + 4, SCORES_LD = C + 4, WEIGHTS_LD = C + 4;
};

/// The shared memory of a block: two tiles of its own rows, two of the other side, and scores and weights per warp.
template <typename S> struct Shared {
    float *own[2], *other[2];
    float *scores; // (16, COLUMNS) of this warp
    float *weights; // likewise
    __device__ __forceinline__ Shared(unsigned char *memory) {
        int warp = threadIdx.x / 32;
        float *tiles = (float *)memory;
        own[0] = tiles;
        own[1] = own[0] + OWN * S::LD;
        other[0] = own[1] + OWN * S::LD;
        other[1] = other[0] + S::COLUMNS * S::LD;
        float *all_weights = other[1] + S::COLUMNS * S::LD;
        weights = all_weights + warp * 16 * S::WEIGHTS_LD;
        scores = all_weights + OWN * S::WEIGHTS_LD + warp * 16 * S::SCORES_LD;
    }
    /// The rows of own[i] that are this warp's.
    __device__ __forceinline__ const float *mine(int i) const { return own[i] + threadIdx.x / 32 * 16 * S::LD; }
};

/// scores (16, COLUMNS) of the warp = X (16, E) · Yᵀ, Y (COLUMNS, E).
template <typename S>
__device__ __forceinline__ void score(const Shared<S> &shared, const float *x, const float *y) {
    Accumulator acc[S::COLUMNS / 16];
    for (auto &a : acc) a.clear();
    product<TRANSPOSED, S::HEAD>(acc, x, S::LD, y, S::LD);
    __syncwarp(); // the last values were read
#pragma unroll
    for (int n = 0; n < S::COLUMNS / 16; n++) acc[n].store(shared.scores + n * 16, S::SCORES_LD);
    __syncwarp();
}

/// Takes accumulators (16, E) through shared memory, as many at a time as the scores' place holds, multiplied by `factor`
/// of each row: calls with(first column, columns) while they are there, and takes them back if BACK.
template <bool BACK, typename S, typename With>
__device__ __forceinline__ void scaled(const Shared<S> &shared, typename S::Tiles &acc, float factor, With with) {
    constexpr int E = S::HEAD, AT_ONCE = S::COLUMNS / 16;
    Half half;
#pragma unroll
    for (int from = 0; from < E / 16; from += AT_ONCE) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (from + i < E / 16) acc[from + i].store(shared.scores + i * 16, S::SCORES_LD);
        __syncwarp();
        for (int j = 0; j < S::COLUMNS / 2; j++) shared.scores[half.row * S::SCORES_LD + half.column(j)] *= factor;
        __syncwarp();
        if constexpr (BACK) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (from + i < E / 16) acc[from + i].load(shared.scores + i * 16, S::SCORES_LD);
        } else {
            with(from * 16, min(E - from * 16, S::COLUMNS));
        }
    }
}

/// Writes accumulators (16, E), times `factor` per row, to rows `first`… < t of a tensor, e columns each, `stride` apart.
template <typename S>
__device__ __forceinline__ void write(const Shared<S> &shared, typename S::Tiles &acc, float factor, float *to,
                                      size_t stride, int first, const Problem &p) {
    scaled<false>(shared, acc, factor, [&](int from, int columns) {
        for (int i = threadIdx.x % 32; i < 16 * columns; i += 32) {
            int row = i / columns, column = i % columns;
            if (first + row < p.t && from + column < p.e)
                to[(size_t)(first + row) * stride + from + column] =
                    shared.scores[row * S::SCORES_LD + column];
        }
    });
}

template <typename S>
__device__ void attention(const float *qkv, float *out, float *lse, Problem p, Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared<S> shared(memory);
    Head<float> head(qkv, p);
    HeadDrop drop(dropped, p.t);
    Half half;
    const int block = blockIdx.x * OWN, first = block + threadIdx.x / 32 * 16, query = first + half.row;
    const float scale = p.scale * LOG2_E;

    load_tile<S::HEAD>(shared.own[0], S::LD, head.part(0), 3 * head.width, block, OWN, p.t, p.e);
    typename S::Tiles acc;
    for (auto &a : acc) a.clear();
    float top = -INFINITY, total = 0.0f;
    for (int tile = 0; tile < p.t; tile += S::COLUMNS) {
        __syncthreads(); // the last tile was read
        for (int i = 0; i < 2; i++)
            load_tile<S::HEAD>(shared.other[i], S::LD, head.part(1 + i), 3 * head.width, tile, S::COLUMNS, p.t, p.e);
        __syncthreads();
        score(shared, shared.mine(0), shared.other[0]);
        float s[S::COLUMNS / 2], highest = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 2; j++) {
            int column = half.column(j);
            s[j] = tile + column < p.t ? shared.scores[half.row * S::SCORES_LD + column] * scale : -INFINITY;
            highest = fmaxf(highest, s[j]);
        }
        highest = Half::max(highest);
        bool grown = highest > top + SLACK;
        float base = grown ? highest : top, factor = exp2f(top - base);
        top = base;
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 2; j++) {
            int column = half.column(j);
            float weight = exp2f(s[j] - base);
            sum += weight;
            shared.weights[half.row * S::WEIGHTS_LD + column] = (weight * drop(query, tile + column));
        }
        total = total * factor + Half::sum(sum);
        if (__any_sync(ALL_LANES, grown) && tile > 0) scaled<true>(shared, acc, factor, 0);
        __syncwarp();
        product<BY_ROWS, S::COLUMNS>(acc, shared.weights, S::WEIGHTS_LD, shared.other[1], S::LD);
    }
    write(shared, acc, 1.0f / total, out + head.at, head.width, first, p);
    if (query < p.t && half.odd == 0) lse[head.row + query] = top + log2f(total);
}

// With P the probabilities and S the scaled scores: dP = dO·Vᵀ, dS = P∘(dP − delta), dQ = dS·K/√e. Where P is dropped by
// the factors M, dP = (dO·Vᵀ)∘M. dqkv is packed as qkv.
template <typename S>
__device__ void attention_dq(const float *qkv, const float *dout, const float *lse, const float *delta, float *dqkv, Problem p,
                             Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared<S> shared(memory);
    Head<float> head(qkv, p);
    HeadDrop drop(dropped, p.t);
    Half half;
    const int block = blockIdx.x * OWN, first = block + threadIdx.x / 32 * 16, query = first + half.row;
    const float scale = p.scale * LOG2_E;
    const float own_lse = query < p.t ? lse[head.row + query] : 0.0f;
    const float own_delta = query < p.t ? delta[head.row + query] : 0.0f;

    load_tile<S::HEAD>(shared.own[0], S::LD, head.part(0), 3 * head.width, block, OWN, p.t, p.e);
    load_tile<S::HEAD>(shared.own[1], S::LD, dout + head.at, head.width, block, OWN, p.t, p.e);
    typename S::Tiles acc;
    for (auto &a : acc) a.clear();
    for (int tile = 0; tile < p.t; tile += S::COLUMNS) {
        __syncthreads();
        for (int i = 0; i < 2; i++)
            load_tile<S::HEAD>(shared.other[i], S::LD, head.part(1 + i), 3 * head.width, tile, S::COLUMNS, p.t, p.e);
        __syncthreads();
        score(shared, shared.mine(0), shared.other[0]);
        float weight[S::COLUMNS / 2];
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 2; j++) {
            int column = half.column(j);
            float s = shared.scores[half.row * S::SCORES_LD + column] * scale;
            weight[j] = tile + column < p.t ? exp2f(s - own_lse) : 0.0f;
        }
        score(shared, shared.mine(1), shared.other[1]);
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 2; j++) {
            int column = half.column(j);
            float through = shared.scores[half.row * S::SCORES_LD + column] * drop(query, tile + column);
            shared.weights[half.row * S::WEIGHTS_LD + column] = (weight[j] * (through - own_delta));
        }
        __syncwarp();
        product<BY_ROWS, S::COLUMNS>(acc, shared.weights, S::WEIGHTS_LD, shared.other[0], S::LD);
    }
    write(shared, acc, p.scale, dqkv + (head.qkv - qkv), 3 * head.width, first, p);
}

// dV = (P∘M)ᵀ·dO and dK = dSᵀ·Q/√e: the transposed matrices are formed, a warp's 16 keys against a tile of queries.
template <typename S>
__device__ void attention_dkv(const float *qkv, const float *dout, const float *lse, const float *delta, float *dqkv, Problem p,
                              Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ float tile_lse[S::COLUMNS], tile_delta[S::COLUMNS];
    Shared<S> shared(memory);
    Head<float> head(qkv, p);
    HeadDrop drop(dropped, p.t);
    Half half;
    const int block = blockIdx.x * OWN, first = block + threadIdx.x / 32 * 16, key = first + half.row;
    const float scale = p.scale * LOG2_E;

    for (int i = 0; i < 2; i++)
        load_tile<S::HEAD>(shared.own[i], S::LD, head.part(1 + i), 3 * head.width, block, OWN, p.t, p.e);
    typename S::Tiles dk, dv;
    for (auto &a : dk) a.clear();
    for (auto &a : dv) a.clear();
    for (int tile = 0; tile < p.t; tile += S::COLUMNS) {
        __syncthreads();
        load_tile<S::HEAD>(shared.other[0], S::LD, head.part(0), 3 * head.width, tile, S::COLUMNS, p.t, p.e);
        load_tile<S::HEAD>(shared.other[1], S::LD, dout + head.at, head.width, tile, S::COLUMNS, p.t, p.e);
        for (int i = threadIdx.x; i < S::COLUMNS; i += BLOCK) {
            tile_lse[i] = tile + i < p.t ? lse[head.row + tile + i] : 0.0f;
            tile_delta[i] = tile + i < p.t ? delta[head.row + tile + i] : 0.0f;
        }
        __syncthreads();
        score(shared, shared.mine(0), shared.other[0]);
        float weight[S::COLUMNS / 2];
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 2; j++) {
            int column = half.column(j);
            float s = shared.scores[half.row * S::SCORES_LD + column] * scale;
            weight[j] = tile + column < p.t ? exp2f(s - tile_lse[column]) : 0.0f;
            shared.weights[half.row * S::WEIGHTS_LD + column] =
                (weight[j] * drop(tile + column, key));
        }
        __syncwarp();
        product<BY_ROWS, S::COLUMNS>(dv, shared.weights, S::WEIGHTS_LD, shared.other[1], S::LD);
        score(shared, shared.mine(1), shared.other[1]);
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 2; j++) {
            int column = half.column(j);
            float through = shared.scores[half.row * S::SCORES_LD + column] * drop(tile + column, key);
            shared.weights[half.row * S::WEIGHTS_LD + column] =
                (weight[j] * (through - tile_delta[column]));
        }
        __syncwarp();
        product<BY_ROWS, S::COLUMNS>(dk, shared.weights, S::WEIGHTS_LD, shared.other[0], S::LD);
    }
    float *to = dqkv + (head.qkv - qkv);
    write(shared, dk, p.scale, to + head.width, 3 * head.width, first, p);
    write(shared, dv, 1.0f, to + 2 * head.width, 3 * head.width, first, p);
}
