// Tiles of C are dealt out to the pool. For each, strips of A and B are converted to f32 (or f64) and laid
// out so that the innermost loop is a sum of outer products over contiguous memory, in vector registers.
#include "gemm.hpp"

#include "memory.hpp"
#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <vector>

namespace emulator {
namespace {

// Of C in the innermost loop: as many columns as there are registers for.
#ifdef __AVX512F__
constexpr int columns = 12;
#else
constexpr int columns = 6;
#endif
constexpr int rows = 16;
constexpr int tile_m = 8 * rows, tile_n = 240, depth = 256;

size_t bytes_of(Format format) { return format == Format::f64 ? 8 : format == Format::f32 ? 4 : 2; }

template <class Use>
void with_format(Format format, Use use) {
    switch (format) {
        case Format::f32: return use(float{});
        case Format::f64: return use(double{});
        case Format::f16: return use(__half{});
        case Format::bf16: return use(__nv_bfloat16{});
    }
}

// out[strip][i][r] = source(first + strip * width + r, from + i), zero past `count`. `inner` is the distance
// in memory between neighbours along the strip's width, `outer` between neighbours along the depth.
template <class T, class S>
void pack(T *out, const S *source, long long count, int width, int strips, int length, long long inner,
          long long outer) {
    for (int strip = 0; strip < strips; strip++, source += width * inner, count -= width) {
        int present = int(std::min<long long>(width, count));
        if (present < width) std::fill(out, out + width * length, T(0));
        // Along the memory, whichever way it lies.
        if (inner == 1)
            for (int i = 0; i < length; i++)
                for (int r = 0; r < present; r++) out[i * width + r] = T(source[r + i * outer]);
        else
            for (int r = 0; r < present; r++)
                for (int i = 0; i < length; i++) out[i * width + r] = T(source[r * inner + i * outer]);
        out += width * length;
    }
}

// sum[column][row] += a[i][row] * b[i][column] over i.
template <class T>
void accumulate(T *sum, const T *a, const T *b, int length) {
    typedef T Vector __attribute__((vector_size(rows * sizeof(T)), aligned(sizeof(T)), may_alias));
    Vector registers[columns];
    for (int c = 0; c < columns; c++) registers[c] = *reinterpret_cast<const Vector *>(sum + c * rows);
    for (int i = 0; i < length; i++) {
        Vector left = *reinterpret_cast<const Vector *>(a + i * rows);
        for (int c = 0; c < columns; c++) registers[c] += left * b[i * columns + c];
    }
    for (int c = 0; c < columns; c++) *reinterpret_cast<Vector *>(sum + c * rows) = registers[c];
}

template <class T>
struct Scratch {
    std::vector<T> a = std::vector<T>(tile_m * depth), b = std::vector<T>(tile_n * depth),
                   sum = std::vector<T>(tile_m * tile_n);
};

template <class T>
void pack_operand(T *out, const Operand &operand, bool left, long long batch, long long first, long long count,
                  int width, int strips, long long from, int length) {
    with_format(operand.format, [&](auto zero) {
        using S = decltype(zero);
        auto *data = static_cast<const S *>(operand.data) + batch * operand.stride;
        // Column-major: element (i, j) lies at i + j * leading. A's strips run along its rows, B's along
        // its columns; a transposition swaps the two distances.
        bool contiguous = left != operand.transposed;
        long long inner = contiguous ? 1 : operand.leading, outer = contiguous ? operand.leading : 1;
        pack(out, data + first * inner + from * outer, count, width, strips, length, inner, outer);
    });
}

// To ten bits of mantissa, ties away from zero, as tensor cores take f32 (PTX: cvt.rna.tf32.f32).
void round_to_tf32(float *values, size_t count) {
    for (size_t i = 0; i < count; i++) values[i] = bit_cast<float>((bit_cast<unsigned>(values[i]) + 0x1000) & ~0x1fffu);
}
void round_to_tf32(double *, size_t) {}

// sqrt(2 / pi) and the cubic coefficient of the tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415).
template <class T>
T gelu(T x) {
    return T(0.5) * x * (1 + std::tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)));
}

template <class T>
void tile(const Product &p, Scratch<T> &scratch, long long batch, long long row, long long column) {
    long long height = std::min<long long>(tile_m, p.m - row), width = std::min<long long>(tile_n, p.n - column);
    int strips_a = int((height + rows - 1) / rows), strips_b = int((width + columns - 1) / columns);
    std::fill(scratch.sum.begin(), scratch.sum.end(), T(0));
    for (long long from = 0; from < p.k; from += depth) {
        int length = int(std::min<long long>(depth, p.k - from));
        pack_operand(scratch.a.data(), p.a, true, batch, row, height, rows, strips_a, from, length);
        pack_operand(scratch.b.data(), p.b, false, batch, column, width, columns, strips_b, from, length);
        if (p.tf32) {
            round_to_tf32(scratch.a.data(), size_t(strips_a) * rows * length);
            round_to_tf32(scratch.b.data(), size_t(strips_b) * columns * length);
        }
        for (int sb = 0; sb < strips_b; sb++)
            for (int sa = 0; sa < strips_a; sa++)
                accumulate(scratch.sum.data() + (sb * (tile_m / rows) + sa) * rows * columns,
                           scratch.a.data() + sa * rows * length, scratch.b.data() + sb * columns * length, length);
    }
    with_format(p.format_c, [&](auto zero) {
        using C = decltype(zero);
        auto *c = static_cast<C *>(p.c) + batch * p.stride_c;
        for (long long j = 0; j < width; j++)
            for (long long i = 0; i < height; i++) {
                T sum = scratch.sum[((j / columns) * (tile_m / rows) + i / rows) * rows * columns + j % columns * rows +
                                    i % rows];
                C &element = c[row + i + (column + j) * p.leading_c];
                // With beta = 0 cuBLAS does not read C: it may hold NaNs.
                T value = p.beta == 0 ? T(p.alpha) * sum : T(p.alpha) * sum + T(p.beta) * T(element);
                const Epilogue &after = p.epilogue;
                if (after.bias) value += T(static_cast<const C *>(after.bias)[row + i]);
                if (after.auxiliary)
                    static_cast<C *>(after.auxiliary)[row + i + (column + j) * after.leading_auxiliary] = C(value);
                element = C(after.gelu ? gelu(value) : value);
            }
    });
}

template <class T>
void multiply_in(const Product &p) {
    long long tiles_m = (p.m + tile_m - 1) / tile_m, tiles_n = (p.n + tile_n - 1) / tile_n;
    long long tiles = tiles_m * tiles_n * p.count;
    std::atomic<long long> next{0};
    auto work = [&] {
        static thread_local Scratch<T> scratch;
        for (long long i; (i = next++) < tiles;)
            tile<T>(p, scratch, i / (tiles_m * tiles_n), i % tiles_m * tile_m, i / tiles_m % tiles_n * tile_n);
    };
    if (tiles > 1 && double(p.m) * double(p.n) * double(p.k) * double(p.count) > 1e6) share(work);
    else work();
}

// Whether a column-major matrix with this many rows and columns lies in one allocation, in every batch.
bool on_device(const void *data, Format format, long long leading, long long stride, long long height, long long width,
               long long count) {
    long long elements = (count - 1) * stride + (width - 1) * leading + height;
    return contains(reinterpret_cast<uint64_t>(data), size_t(elements) * bytes_of(format));
}

}  // namespace

const char *check(const Product &p) {
    if (p.m < 0 || p.n < 0 || p.k < 0 || p.count < 0) return "a size is negative";
    long long rows_a = p.a.transposed ? p.k : p.m, rows_b = p.b.transposed ? p.n : p.k;
    if (p.a.leading < std::max(1LL, rows_a)) return "A's leading dimension is less than its rows";
    if (p.b.leading < std::max(1LL, rows_b)) return "B's leading dimension is less than its rows";
    if (p.leading_c < std::max(1LL, p.m)) return "C's leading dimension is less than its rows";
    if (p.m == 0 || p.n == 0 || p.count == 0) return nullptr;
    if (!on_device(p.c, p.format_c, p.leading_c, p.stride_c, p.m, p.n, p.count)) return "C is not in one allocation";
    const Epilogue &after = p.epilogue;
    if (after.bias && !on_device(after.bias, p.format_c, p.m, 0, p.m, 1, 1)) return "the bias is not in one allocation";
    if (after.auxiliary && !on_device(after.auxiliary, p.format_c, after.leading_auxiliary, 0, p.m, p.n, 1))
        return "the auxiliary matrix is not in one allocation";
    if (p.k == 0) return nullptr;
    if (!on_device(p.a.data, p.a.format, p.a.leading, p.a.stride, rows_a, p.a.transposed ? p.m : p.k, p.count))
        return "A is not in one allocation";
    if (!on_device(p.b.data, p.b.format, p.b.leading, p.b.stride, rows_b, p.b.transposed ? p.k : p.n, p.count))
        return "B is not in one allocation";
    return nullptr;
}

void multiply(const Product &product) {
    if (product.format_c == Format::f64) multiply_in<double>(product);
    else multiply_in<float>(product);
}

}  // namespace emulator
