// libcublasLt.so.13: products with an epilogue, as far as this project asks for them. The numbers are those of
// cublasLt.h; what it says of alignment, sizes of attributes and leading dimensions is checked.
#include "cublas.hpp"
#include "memory.hpp"
#include "statistics.hpp"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

namespace {

using namespace emulator;

constexpr int compute_f32 = 68;

struct Handle {};

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};

enum Epilogues : uint32_t { nothing = 1, with_bias = 4, with_gelu = 32, with_auxiliary = 128 };

struct Multiplication {
    int compute, scale;
    int32_t transpose_a = 0, transpose_b = 0;
    uint32_t epilogue = nothing;
    const void *bias = nullptr;
    void *auxiliary = nullptr;
    int64_t leading_auxiliary = 0;

    bool has(uint32_t part) const { return epilogue & part; }
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = 7;
    uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C and D
};

// What the library hands out as 64 opaque bytes: the problem that it chose it for.
struct Algorithm {
    int32_t m, n, k;
    uint32_t epilogue;
    int32_t transpose_a, transpose_b;
    uint16_t alignment[6];  // of A, B, C, D, the bias and the auxiliary matrix
    uint32_t workspace, made;
    uint64_t unused[2];
};
static_assert(sizeof(Algorithm) == 64);
constexpr uint32_t made_here = 0x4c744c74;

struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);

// Some algorithms need one on a GPU, so all of them do here.
constexpr size_t own_workspace = 1 << 20;

int refuse(Status status, const char *call, const char *why) {
    fprintf(stderr, "cuda emulator: cuBLASLt: %s: %s\n", call, why);
    return status;
}

uint16_t alignment_of(const void *address) {
    uint64_t bits = reinterpret_cast<uint64_t>(address) | 256;
    return uint16_t(bits & -bits);
}

// What is wrong with a problem, or null. `product` has everything of it but the addresses of A, B and C.
const char *problem_of(const Multiplication &op, const Layout &a, const Layout &b, const Layout &c, const Layout &d,
                       Product &product, Status &status) {
    status = not_supported;
    if (op.compute != compute_f32 || op.scale != real_f32)
        return "another computation than in f32 (68) with f32 factors (0)";
    if (op.epilogue & ~uint32_t(nothing | with_bias | with_gelu | with_auxiliary))
        return "an epilogue that the emulator has not";
    if (op.has(with_auxiliary) && !op.has(with_gelu)) return "an auxiliary matrix without GELU";
    bool known_a, known_b, known_d;
    product.a = {nullptr, format_of(a.type, known_a), a.leading, 0, op.transpose_a != 0};
    product.b = {nullptr, format_of(b.type, known_b), b.leading, 0, op.transpose_b != 0};
    product.format_c = format_of(d.type, known_d), product.leading_c = d.leading;
    if (!known_a || !known_b || !known_d || a.type != b.type || c.type != d.type || a.type == real_f64)
        return "these types";
    product.m = int64_t(d.rows), product.n = int64_t(d.columns), product.count = 1;
    product.k = int64_t(op.transpose_a ? a.rows : a.columns);

    status = invalid_value;
    auto is = [](const Layout &layout, int64_t rows, int64_t columns, bool transposed) {
        if (transposed) std::swap(rows, columns);
        return int64_t(layout.rows) == rows && int64_t(layout.columns) == columns && layout.leading >= rows &&
               rows <= INT32_MAX && columns <= INT32_MAX;
    };
    if (!is(a, product.m, product.k, product.a.transposed) || !is(b, product.k, product.n, product.b.transposed) ||
        !is(c, product.m, product.n, false) || !is(d, product.m, product.n, false))
        return "matrices whose sizes or leading dimensions do not fit";
    if (op.has(with_bias)) {
        if (!op.bias) return "no bias";
        product.epilogue.bias = op.bias;
    }
    if (op.has(with_auxiliary)) {
        if (!op.auxiliary) return "no auxiliary matrix";
        if (op.leading_auxiliary % 8 || op.leading_auxiliary < product.m)
            return "the auxiliary matrix' leading dimension is not a multiple of 8, or less than the rows";
        product.epilogue.auxiliary = op.auxiliary, product.epilogue.leading_auxiliary = op.leading_auxiliary;
    }
    product.epilogue.gelu = op.has(with_gelu);

    // The library has slower kernels for other rows; a program that needs them should do without the library.
    status = not_supported;
    for (const Layout *layout : {&a, &b, &d})
        if (layout->type != real_f32 && layout->leading % 8)
            return "16-bit columns that do not begin at multiples of 16 bytes";
    return nullptr;
}

Algorithm algorithm_for(const Multiplication &op, const Product &product, const uint16_t (&alignment)[4]) {
    Algorithm algorithm{};
    algorithm.m = int32_t(product.m), algorithm.n = int32_t(product.n), algorithm.k = int32_t(product.k);
    algorithm.epilogue = op.epilogue;
    algorithm.transpose_a = op.transpose_a, algorithm.transpose_b = op.transpose_b;
    memcpy(algorithm.alignment, alignment, sizeof alignment);
    algorithm.alignment[4] = alignment_of(op.has(with_bias) ? op.bias : nullptr);
    algorithm.alignment[5] = alignment_of(op.has(with_auxiliary) ? op.auxiliary : nullptr);
    algorithm.made = made_here;
    return algorithm;
}

// Copies an attribute's value if it has the size of its place.
template <class T>
int set(T &place, const void *value, size_t size) {
    if (!value || size != sizeof place) return refuse(invalid_value, "an attribute", "a value of another size");
    memcpy(&place, value, size);
    return success;
}

}  // namespace

API int cublasLtCreate(Handle **handle) { return give(handle, new Handle); }
API int cublasLtDestroy(Handle *handle) {
    delete handle;
    return success;
}
API size_t cublasLtGetVersion() { return 130000; }
API const char *cublasLtGetStatusName(int status) { return status_name(status); }
API const char *cublasLtGetStatusString(int status) { return status_string(status); }

API int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    return give(layout, new Layout{type, rows, columns, leading});
}
API int cublasLtMatrixLayoutDestroy(Layout *layout) {
    delete layout;
    return success;
}

API int cublasLtMatmulDescCreate(Multiplication **operation, int compute, int scale) {
    return give(operation, new Multiplication{compute, scale});
}
API int cublasLtMatmulDescDestroy(Multiplication *operation) {
    delete operation;
    return success;
}
API int cublasLtMatmulDescSetAttribute(Multiplication *operation, int attribute, const void *value, size_t size) {
    const char *call = "cublasLtMatmulDescSetAttribute";
    if (!operation) return refuse(invalid_value, call, "no descriptor");
    switch (attribute) {
        case 3: return set(operation->transpose_a, value, size);
        case 4: return set(operation->transpose_b, value, size);
        case 7: return set(operation->epilogue, value, size);
        case 8: return set(operation->bias, value, size);
        case 11: return set(operation->auxiliary, value, size);
        case 12: return set(operation->leading_auxiliary, value, size);
        default: return refuse(invalid_value, call, "an attribute that the emulator has not");
    }
}

API int cublasLtMatmulPreferenceCreate(Preference **preference) { return give(preference, new Preference); }
API int cublasLtMatmulPreferenceDestroy(Preference *preference) {
    delete preference;
    return success;
}
API int cublasLtMatmulPreferenceSetAttribute(Preference *preference, int attribute, const void *value, size_t size) {
    const char *call = "cublasLtMatmulPreferenceSetAttribute";
    if (!preference) return refuse(invalid_value, call, "no descriptor");
    switch (attribute) {
        case 1: return set(preference->workspace, value, size);
        case 3: return set(preference->reductions, value, size);
        case 5: case 6: case 7: case 8: return set(preference->alignment[attribute - 5], value, size);
        default: return refuse(invalid_value, call, "an attribute that the emulator has not");
    }
}

API int cublasLtMatmulAlgoGetHeuristic(Handle *handle, Multiplication *operation, Layout *a, Layout *b, Layout *c,
                                       Layout *d, Preference *preference, int wanted, Heuristic *found, int *count) {
    const char *call = "cublasLtMatmulAlgoGetHeuristic";
    if (!handle) return refuse(not_initialised, call, "no handle");
    if (!operation || !a || !b || !c || !d || !preference || !found || !count || wanted <= 0)
        return refuse(invalid_value, call, "an argument is missing");
    *count = 0;
    Product product{};
    Status status;
    if (const char *wrong = problem_of(*operation, *a, *b, *c, *d, product, status)) return refuse(status, call, wrong);
    if (preference->reductions & ~7u) return refuse(invalid_value, call, "no reduction scheme");
    uint16_t alignment[4];
    for (int i = 0; i < 4; i++) {
        uint32_t promised = preference->alignment[i];
        if (!promised || promised & (promised - 1) || promised > 256)
            return refuse(invalid_value, call, "an alignment that is no power of two up to 256");
        alignment[i] = uint16_t(promised);
    }
    *found = {};
    found->algorithm = algorithm_for(*operation, product, alignment);
    found->workspace = preference->workspace < own_workspace ? 0 : own_workspace;
    found->algorithm.workspace = uint32_t(found->workspace);
    found->state = success, found->waves = 1;
    return give(count, 1);
}

API int cublasLtMatmul(Handle *handle, Multiplication *operation, const float *alpha, const void *a, Layout *layout_a,
                       const void *b, Layout *layout_b, const float *beta, const void *c, Layout *layout_c, void *d,
                       Layout *layout_d, const Algorithm *algorithm, void *workspace, size_t workspace_size, void *) {
    const char *call = "cublasLtMatmul";
    if (!handle) return refuse(not_initialised, call, "no handle");
    if (!operation || !layout_a || !layout_b || !layout_c || !layout_d || !alpha || !beta)
        return refuse(invalid_value, call, "an argument is missing");
    Product product{};
    Status status;
    if (const char *wrong = problem_of(*operation, *layout_a, *layout_b, *layout_c, *layout_d, product, status))
        return refuse(status, call, wrong);
    product.a.data = a, product.b.data = b, product.c = d;
    product.alpha = *alpha, product.beta = *beta;
    if (*beta != 0 && c != d) return refuse(not_supported, call, "a C that is not D");
    if (!algorithm || algorithm->made != made_here)
        return refuse(not_supported, call, "an algorithm that cublasLtMatmulAlgoGetHeuristic did not give");
    uint16_t alignment[4] = {alignment_of(a), alignment_of(b), alignment_of(c), alignment_of(d)};
    Algorithm asked = algorithm_for(*operation, product, alignment);
    for (int i = 0; i < 6; i++) {
        if (asked.alignment[i] < algorithm->alignment[i])
            return refuse(invalid_value, call, "an operand is less aligned than the algorithm was told");
        asked.alignment[i] = algorithm->alignment[i];
    }
    asked.workspace = algorithm->workspace;
    if (memcmp(&asked, algorithm, sizeof asked) != 0)
        return refuse(invalid_value, call, "the algorithm was chosen for another problem");
    if (workspace_size < algorithm->workspace) return refuse(invalid_value, call, "the workspace is too small");
    if (workspace_size) {
        if (alignment_of(workspace) < 256 || !contains(reinterpret_cast<uint64_t>(workspace), workspace_size))
            return refuse(invalid_value, call, "the workspace is not aligned to 256 bytes, or not in one allocation");
        memset(workspace, 0xff, workspace_size);  // NaNs, for whoever keeps anything there
    }
    if (const char *wrong = check(product)) return refuse(invalid_value, call, wrong);
    trace("cuBLASLt, (%lld, %lld, %lld), epilogue %u", product.m, product.n, product.k, operation->epilogue);
    CountedLaunch counted("cuBLASLt, epilogue " + std::to_string(operation->epilogue));
    multiply(product);
    return success;
}
