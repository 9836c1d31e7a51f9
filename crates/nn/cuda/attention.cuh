// Attention softmax(q·kᵀ/√e)·v from packed qkv (B, T, 3, H, e), without the T×T matrix ever being there: FlashAttention-2
// (Dao 2023, arXiv 2307.08691). Forward keeps the logarithm of every row's sum; backward computes the probabilities again
// from it, dQ with a block per tile of queries and dK, dV with a block per tile of keys, so nothing is added atomically
// and results do not depend on the order in which blocks run.
//
// A block has 16 rows of its own per warp ("own": queries, or keys for dK and dV) and walks over tiles of COLUMNS rows of
// the other side ("other"). Scores are kept in base 2: exp2 is what the hardware has.
#pragma once

#include "tile.cuh"

constexpr int WARPS = 4, OWN = 16 * WARPS, BLOCK = 32 * WARPS;

struct Problem {
    int t, heads, e;
    float scale; // 1/√e
};

constexpr float LOG2_E = 1.4426950409f;

/// Sizes for values of type T, head sizes up to E, a multiple of 16, and tiles of C rows of the other side.
template <typename T, int E, int C> struct Sizes {
    typedef T Value;
    typedef Accumulator<T> Tiles[E / 16]; // a matrix (16, E) of a warp
    static constexpr int HEAD = E, COLUMNS = C;
    // Rows are longer by 16 bytes so that neighbouring ones start in different banks.
    static constexpr int LD = E + 16 / sizeof(T), SCORES_LD = C + 4, WEIGHTS_LD = C + 16 / sizeof(T);
};

/// The shared memory of a block: two tiles of its own rows, two of the other side, and scores and weights per warp.
template <typename S> struct Shared {
    typedef typename S::Value T;
    T *own[2], *other[2];
    float *scores; // (16, COLUMNS) of this warp
    T *weights;    // likewise
    __device__ __forceinline__ Shared(unsigned char *memory) {
        int warp = threadIdx.x / 32;
        T *tiles = (T *)memory;
        own[0] = tiles;
        own[1] = own[0] + OWN * S::LD;
        other[0] = own[1] + OWN * S::LD;
        other[1] = other[0] + S::COLUMNS * S::LD;
        T *all_weights = other[1] + S::COLUMNS * S::LD;
        weights = all_weights + warp * 16 * S::WEIGHTS_LD;
        scores = (float *)(all_weights + OWN * S::WEIGHTS_LD) + warp * 16 * S::SCORES_LD;
    }
    /// The rows of own[i] that are this warp's.
    __device__ __forceinline__ const T *mine(int i) const { return own[i] + threadIdx.x / 32 * 16 * S::LD; }
};

/// Where the head of this block lies: rows of q, k and v are 3·H·e apart, rows of the output H·e.
template <typename T> struct Head {
    size_t width, at; // H·e, and the first value of the sample's head in a tensor (B, T, H·e)
    const T *qkv;
    size_t row; // first row of the sample's head in (B, H, T)
    __device__ __forceinline__ Head(const T *all, const Problem &p)
        : width((size_t)p.heads * p.e), at(blockIdx.z * (size_t)p.t * width + (size_t)blockIdx.y * p.e),
          qkv(all + blockIdx.z * (size_t)p.t * 3 * width + (size_t)blockIdx.y * p.e),
          row(((size_t)blockIdx.z * p.heads + blockIdx.y) * p.t) {}
    __device__ __forceinline__ const T *part(int i) const { return qkv + i * width; }
};

/// The factors of dropout for (query, key) of this block's head.
struct HeadDrop {
    Drop drop;
    uint64_t key, head;
    int t;
    __device__ __forceinline__ HeadDrop(const Drop &d, int t)
        : drop(d), key(d.keys ? d.keys[blockIdx.z] : 0), head(blockIdx.y), t(t) {}
    __device__ __forceinline__ float operator()(int query, int key_row) const {
        return drop.keys ? drop.factor(key, (head * t + query) * t + key_row) : 1.0f;
    }
};

/// scores (16, COLUMNS) of the warp = X (16, E) · Yᵀ, Y (COLUMNS, E).
template <typename S, typename T>
__device__ __forceinline__ void score(const Shared<S> &shared, const T *x, const T *y) {
    Accumulator<T> acc[S::COLUMNS / 16];
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
template <typename S, typename T>
__device__ __forceinline__ void write(const Shared<S> &shared, typename S::Tiles &acc, float factor, T *to,
                                      size_t stride, int first, const Problem &p) {
    scaled<false>(shared, acc, factor, [&](int from, int columns) {
        for (int i = threadIdx.x % 32; i < 16 * columns; i += 32) {
            int row = i / columns, column = i % columns;
            if (first + row < p.t && from + column < p.e)
                to[(size_t)(first + row) * stride + from + column] =
                    from_float<T>(shared.scores[row * S::SCORES_LD + column]);
        }
    });
}

/// By how much (base 2) a row's maximum may grow before what was summed is scaled down: exact, since sums are divided by
/// each other in the end, and rarely needed.
constexpr float SLACK = 8.0f;

template <typename S, typename T = typename S::Value>
__device__ void attention(const T *qkv, T *out, float *lse, Problem p, Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared<S> shared(memory);
    Head<T> head(qkv, p);
    HeadDrop drop(dropped, p.t);
    Half half;
    const int block = blockIdx.x * OWN, first = block + threadIdx.x / 32 * 16, query = first + half.row;
    const float scale = p.scale * LOG2_E;

    load_tile<T, S::HEAD>(shared.own[0], S::LD, head.part(0), 3 * head.width, block, OWN, p.t, p.e);
    typename S::Tiles acc;
    for (auto &a : acc) a.clear();
    float top = -INFINITY, total = 0.0f;
    for (int tile = 0; tile < p.t; tile += S::COLUMNS) {
        __syncthreads(); // the last tile was read
        for (int i = 0; i < 2; i++)
            load_tile<T, S::HEAD>(shared.other[i], S::LD, head.part(1 + i), 3 * head.width, tile, S::COLUMNS, p.t, p.e);
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
            shared.weights[half.row * S::WEIGHTS_LD + column] = from_float<T>(weight * drop(query, tile + column));
        }
        total = total * factor + Half::sum(sum);
        if (__any_sync(ALL_LANES, grown) && tile > 0) scaled<true>(shared, acc, factor, 0);
        __syncwarp();
        product<BY_ROWS, S::COLUMNS>(acc, shared.weights, S::WEIGHTS_LD, shared.other[1], S::LD);
    }
    write(shared, acc, 1.0f / total, out + head.at, head.width, first, p);
    if (query < p.t && half.odd == 0) lse[head.row + query] = top + log2f(total);
}

// delta (B, H, T) = Σ dout·out over a head's values, which is Σ dP·P over the keys. One warp per row.
template <typename T> __device__ void attention_delta(const T *dout, const T *out, float *delta, Problem p, int rows) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; // of (B, T, H)
    if (row >= rows) return;
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < p.e; i += 32)
        sum += to_float(dout[(size_t)row * p.e + i]) * to_float(out[(size_t)row * p.e + i]);
    sum = warp_sum(sum);
    int token = row / p.heads, head = row % p.heads;
    if (threadIdx.x % 32 == 0) delta[((size_t)(token / p.t) * p.heads + head) * p.t + token % p.t] = sum;
}

// With P the probabilities and S the scaled scores: dP = dO·Vᵀ, dS = P∘(dP − delta), dQ = dS·K/√e. Where P is dropped by
// the factors M, dP = (dO·Vᵀ)∘M. dqkv is packed as qkv.
template <typename S, typename T = typename S::Value>
__device__ void attention_dq(const T *qkv, const T *dout, const float *lse, const float *delta, T *dqkv, Problem p,
                             Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared<S> shared(memory);
    Head<T> head(qkv, p);
    HeadDrop drop(dropped, p.t);
    Half half;
    const int block = blockIdx.x * OWN, first = block + threadIdx.x / 32 * 16, query = first + half.row;
    const float scale = p.scale * LOG2_E;
    const float own_lse = query < p.t ? lse[head.row + query] : 0.0f;
    const float own_delta = query < p.t ? delta[head.row + query] : 0.0f;

    load_tile<T, S::HEAD>(shared.own[0], S::LD, head.part(0), 3 * head.width, block, OWN, p.t, p.e);
    load_tile<T, S::HEAD>(shared.own[1], S::LD, dout + head.at, head.width, block, OWN, p.t, p.e);
    typename S::Tiles acc;
    for (auto &a : acc) a.clear();
    for (int tile = 0; tile < p.t; tile += S::COLUMNS) {
        __syncthreads();
        for (int i = 0; i < 2; i++)
            load_tile<T, S::HEAD>(shared.other[i], S::LD, head.part(1 + i), 3 * head.width, tile, S::COLUMNS, p.t, p.e);
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
            shared.weights[half.row * S::WEIGHTS_LD + column] = from_float<T>(weight[j] * (through - own_delta));
        }
        __syncwarp();
        product<BY_ROWS, S::COLUMNS>(acc, shared.weights, S::WEIGHTS_LD, shared.other[0], S::LD);
    }
    write(shared, acc, p.scale, dqkv + (head.qkv - qkv), 3 * head.width, first, p);
}

// dV = (P∘M)ᵀ·dO and dK = dSᵀ·Q/√e: the transposed matrices are formed, a warp's 16 keys against a tile of queries.
template <typename S, typename T = typename S::Value>
__device__ void attention_dkv(const T *qkv, const T *dout, const float *lse, const float *delta, T *dqkv, Problem p,
                              Drop dropped) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ float tile_lse[S::COLUMNS], tile_delta[S::COLUMNS];
    Shared<S> shared(memory);
    Head<T> head(qkv, p);
    HeadDrop drop(dropped, p.t);
    Half half;
    const int block = blockIdx.x * OWN, first = block + threadIdx.x / 32 * 16, key = first + half.row;
    const float scale = p.scale * LOG2_E;

    for (int i = 0; i < 2; i++)
        load_tile<T, S::HEAD>(shared.own[i], S::LD, head.part(1 + i), 3 * head.width, block, OWN, p.t, p.e);
    typename S::Tiles dk, dv;
    for (auto &a : dk) a.clear();
    for (auto &a : dv) a.clear();
    for (int tile = 0; tile < p.t; tile += S::COLUMNS) {
        __syncthreads();
        load_tile<T, S::HEAD>(shared.other[0], S::LD, head.part(0), 3 * head.width, tile, S::COLUMNS, p.t, p.e);
        load_tile<T, S::HEAD>(shared.other[1], S::LD, dout + head.at, head.width, tile, S::COLUMNS, p.t, p.e);
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
                from_float<T>(weight[j] * drop(tile + column, key));
        }
        __syncwarp();
        product<BY_ROWS, S::COLUMNS>(dv, shared.weights, S::WEIGHTS_LD, shared.other[1], S::LD);
        score(shared, shared.mine(1), shared.other[1]);
#pragma unroll
        for (int j = 0; j < S::COLUMNS / 2; j++) {
            int column = half.column(j);
            float through = shared.scores[half.row * S::SCORES_LD + column] * drop(tile + column, key);
            shared.weights[half.row * S::WEIGHTS_LD + column] =
                from_float<T>(weight[j] * (through - tile_delta[column]));
        }
        __syncwarp();
        product<BY_ROWS, S::COLUMNS>(dk, shared.weights, S::WEIGHTS_LD, shared.other[0], S::LD);
    }
    T *to = dqkv + (head.qkv - qkv);
    write(shared, dk, p.scale, to + head.width, 3 * head.width, first, p);
    write(shared, dv, 1.0f, to + 2 * head.width, 3 * head.width, first, p);
}

// Exports the kernels of a head size, BLOCKS of which are meant to fit on a multiprocessor, which bounds a thread's
// registers. Sources: one per type, since the driver compiles a whole file when the first of its kernels is used.
#define EXPORT_SIZE(T, suffix, E, BLOCKS, COLUMNS, COLUMNS_DKV)                                                        \
    extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)                                                        \
        attention_##E##_##suffix(const T *qkv, T *out, float *lse, int t, int heads, int e, float scale,               \
                                 const uint64_t *keys, uint32_t threshold, float kept) {                               \
        attention<Sizes<T, E, COLUMNS>>(qkv, out, lse, Problem{t, heads, e, scale}, Drop{keys, threshold, kept});      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)                                                        \
        attention_dq_##E##_##suffix(const T *qkv, const T *dout, const float *lse, const float *delta, T *dqkv, int t, \
                                    int heads, int e, float scale, const uint64_t *keys, uint32_t threshold,           \
                                    float kept) {                                                                      \
        attention_dq<Sizes<T, E, COLUMNS>>(qkv, dout, lse, delta, dqkv, Problem{t, heads, e, scale},                   \
                                           Drop{keys, threshold, kept});                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2)                                                             \
        attention_dkv_##E##_##suffix(const T *qkv, const T *dout, const float *lse, const float *delta, T *dqkv,       \
                                     int t, int heads, int e, float scale, const uint64_t *keys, uint32_t threshold,   \
                                     float kept) {                                                                     \
        attention_dkv<Sizes<T, E, COLUMNS_DKV>>(qkv, dout, lse, delta, dqkv, Problem{t, heads, e, scale},              \
                                                Drop{keys, threshold, kept});                                          \
    }
#define EXPORT_DELTA(T, suffix)                                                                                        \
    extern "C" __global__ void attention_delta_##suffix(const T *dout, const T *out, float *delta, int t, int heads,   \
                                                        int e, int rows) {                                             \
        attention_delta(dout, out, delta, Problem{t, heads, e, 0.0f}, rows);                                           \
    }

