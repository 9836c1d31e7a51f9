// nvcuda::wmma: matrix tiles held by a warp together. A lane holds 1/32 of a tile's elements in row-major
// order; which ones it holds on a GPU is unspecified, so a kernel may rely on neither.
#pragma once

#include "emulator/narrow.hpp"
#include "emulator/runtime.hpp"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

namespace precision {
struct tf32;
}

namespace detail {

template <class T>
struct Element {
    using type = T;
};
template <>
struct Element<precision::tf32> {
    using type = float;
};

template <class Use, int m, int n, int k>
struct Extent;
template <int m, int n, int k>
struct Extent<matrix_a, m, n, k> {
    static constexpr int rows = m, columns = k;
};
template <int m, int n, int k>
struct Extent<matrix_b, m, n, k> {
    static constexpr int rows = k, columns = n;
};
template <int m, int n, int k>
struct Extent<accumulator, m, n, k> {
    static constexpr int rows = m, columns = n;
};

// The shapes that sm_80 and later have for each element type.
template <class T, int m, int n, int k>
constexpr bool has_shape =
    (m == 16 && n == 16 && k == 16) || (m == 32 && n == 8 && k == 16) || (m == 8 && n == 32 && k == 16);
template <int m, int n, int k>
constexpr bool has_shape<precision::tf32, m, n, k> = m == 16 && n == 16 && k == 8;
template <int m, int n, int k>
constexpr bool has_shape<float, m, n, k> = has_shape<__half, m, n, k> || has_shape<precision::tf32, m, n, k>;

}  // namespace detail

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
    static_assert(detail::has_shape<T, m, n, k>, "wmma has no such shape for this element type");
    using element_type = typename detail::Element<T>::type;
    static constexpr int rows = detail::Extent<Use, m, n, k>::rows;
    static constexpr int columns = detail::Extent<Use, m, n, k>::columns;
    static constexpr int num_elements = rows * columns / int(emulator::warp_size);
    element_type x[num_elements];

    // Where in the tile this lane's i-th element lies.
    static int row(int i) { return (int(emulator::running.lane) * num_elements + i) / columns; }
    static int column(int i) { return (int(emulator::running.lane) * num_elements + i) % columns; }
};

namespace detail {

// The documented demands on the address and on the leading dimension; a GPU gives garbage or a fault.
template <class T>
void check_matrix(const char *function, const T *matrix, unsigned leading) {
    unsigned multiple = 16 / sizeof(T);
    if (reinterpret_cast<uintptr_t>(matrix) % 32 != 0)
        emulator::fail("%s: the matrix's address %p is not a multiple of 32 bytes", function, (const void *)matrix);
    if (leading % multiple != 0)
        emulator::fail("%s: leading dimension %u, expected a multiple of %u", function, leading, multiple);
}

inline size_t offset(int row, int column, unsigned leading, bool by_rows) {
    return by_rows ? size_t(row) * leading + column : size_t(column) * leading + row;
}

template <class Tile, class T>
void load(Tile &tile, const T *matrix, unsigned leading, bool by_rows) {
    check_matrix("load_matrix_sync", matrix, leading);
    for (int i = 0; i < Tile::num_elements; i++)
        tile.x[i] = matrix[offset(Tile::row(i), Tile::column(i), leading, by_rows)];
}

}  // namespace detail

template <class Use, int m, int n, int k, class T, class Layout, class Value>
void fill_fragment(fragment<Use, m, n, k, T, Layout> &tile, Value value) {
    for (auto &element : tile.x) element = value;
}

template <class Use, int m, int n, int k, class T, class Layout, class Memory>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout> &tile, const Memory *matrix, unsigned leading) {
    detail::load(tile, matrix, leading, std::is_same_v<Layout, row_major>);
}

template <int m, int n, int k, class T>
void load_matrix_sync(fragment<accumulator, m, n, k, T> &tile, const T *matrix, unsigned leading, layout_t layout) {
    detail::load(tile, matrix, leading, layout == mem_row_major);
}

template <int m, int n, int k, class T>
void store_matrix_sync(T *matrix, const fragment<accumulator, m, n, k, T> &tile, unsigned leading, layout_t layout) {
    using Tile = fragment<accumulator, m, n, k, T>;
    detail::check_matrix("store_matrix_sync", matrix, leading);
    for (int i = 0; i < Tile::num_elements; i++)
        matrix[detail::offset(Tile::row(i), Tile::column(i), leading, layout == mem_row_major)] = tile.x[i];
}

namespace detail {

template <int m, int n, int k, class T, class Accumulator>
struct Product {
    const typename Element<T>::type *a, *b;
    const Accumulator *c;
    Accumulator *d;

    // d = a b + c with products and sums in f32, for the whole warp at once.
    static void perform(void *const requests[emulator::warp_size], unsigned members) {
        if (members != 0xffffffff) emulator::fail("mma_sync: lanes %#x take part, expected all 32", members);
        constexpr int per_a = m * k / 32, per_b = k * n / 32, per_c = m * n / 32;
        float a[m * k], b[k * n], sum[m * n];
        for (int lane = 0; lane < 32; lane++) {
            auto *request = static_cast<const Product *>(requests[lane]);
            for (int i = 0; i < per_a; i++) a[lane * per_a + i] = request->a[i];
            for (int i = 0; i < per_b; i++) b[lane * per_b + i] = request->b[i];
            for (int i = 0; i < per_c; i++) sum[lane * per_c + i] = request->c[i];
        }
        for (int row = 0; row < m; row++)
            for (int i = 0; i < k; i++)
                for (int column = 0; column < n; column++) sum[row * n + column] += a[row * k + i] * b[i * n + column];
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < per_c; i++) static_cast<const Product *>(requests[lane])->d[i] = sum[lane * per_c + i];
    }
};

}  // namespace detail

template <int m, int n, int k, class T, class LayoutA, class LayoutB, class Accumulator>
void mma_sync(fragment<accumulator, m, n, k, Accumulator> &d, const fragment<matrix_a, m, n, k, T, LayoutA> &a,
              const fragment<matrix_b, m, n, k, T, LayoutB> &b, const fragment<accumulator, m, n, k, Accumulator> &c) {
    using Request = detail::Product<m, n, k, T, Accumulator>;
    Request request{a.x, b.x, c.x, d.x};
    emulator::collective(0xffffffff, Request::perform, &request, "mma_sync");
}

inline float __float_to_tf32(float value) {
    // 10 bits of mantissa remain, rounded to nearest, ties away from zero (cvt.rna.tf32).
    return emulator::bit_cast<float>((emulator::bit_cast<unsigned>(value) + 0x1000) & ~0x1fffu);
}

}  // namespace nvcuda::wmma
