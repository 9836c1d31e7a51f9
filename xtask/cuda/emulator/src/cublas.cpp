// libcublas.so.13: handles, and the matrix products that candle and cudarc ask for.
#include "cublas.hpp"
#include "statistics.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

using namespace emulator;

enum Compute {
    compute_f16 = 64,
    compute_f16_pedantic = 65,
    compute_f64 = 70,
    compute_f64_pedantic = 71,
    compute_tf32 = 77
};

struct Handle {
    void *stream = nullptr;
    int pointer_mode = 0, math_mode = 0;
};

// alpha and beta have the type that the computation has.
double scalar(const void *value, int compute) {
    if (compute == compute_f16 || compute == compute_f16_pedantic) return *static_cast<const __half *>(value);
    if (compute == compute_f64 || compute == compute_f64_pedantic) return *static_cast<const double *>(value);
    return *static_cast<const float *>(value);
}

int batched(Handle *handle, int transpose_a, int transpose_b, int m, int n, int k, const void *alpha, const void *a,
            int type_a, int leading_a, long long stride_a, const void *b, int type_b, int leading_b, long long stride_b,
            const void *beta, void *c, int type_c, int leading_c, long long stride_c, int count, int compute) {
    if (!handle) return not_initialised;
    bool known_a, known_b, known_c;
    Product product{};
    product.a = {a, format_of(type_a, known_a), leading_a, stride_a, transpose_a != 0};
    product.b = {b, format_of(type_b, known_b), leading_b, stride_b, transpose_b != 0};
    product.c = c, product.format_c = format_of(type_c, known_c);
    product.leading_c = leading_c, product.stride_c = stride_c;
    product.m = m, product.n = n, product.k = k, product.count = count;
    product.alpha = scalar(alpha, compute), product.beta = scalar(beta, compute);
    product.tf32 = compute == compute_tf32;
    if (!known_a || !known_b || !known_c || handle->pointer_mode != 0) {
        fprintf(stderr,
                "cuda emulator: cuBLAS: types %d, %d, %d, pointer mode %d: expected f32 (0), f64 (1), f16 (2) or "
                "bf16 (14), and scalars on the host (0)\n",
                type_a, type_b, type_c, handle->pointer_mode);
        return not_supported;
    }
    if (const char *wrong = check(product)) {
        fprintf(stderr, "cuda emulator: cuBLAS: (%d, %d, %d) x %d with leading dimensions %d, %d, %d: %s\n", m, n, k,
                count, leading_a, leading_b, leading_c, wrong);
        return invalid_value;
    }
    trace("cuBLAS, (%d, %d, %d) x %d", m, n, k, count);
    CountedLaunch counted("cuBLAS");
    multiply(product);
    return success;
}

}  // namespace

API int cublasCreate_v2(Handle **handle) { return give(handle, new Handle); }
API int cublasDestroy_v2(Handle *handle) {
    delete handle;
    return success;
}
API int cublasSetStream_v2(Handle *handle, void *stream) { return give(&handle->stream, stream); }
API int cublasGetStream_v2(Handle *handle, void **stream) { return give(stream, handle->stream); }
API int cublasSetPointerMode_v2(Handle *handle, int mode) { return give(&handle->pointer_mode, mode); }
API int cublasGetPointerMode_v2(Handle *handle, int *mode) { return give(mode, handle->pointer_mode); }
API int cublasSetMathMode(Handle *handle, int mode) { return give(&handle->math_mode, mode); }
API int cublasGetMathMode(Handle *handle, int *mode) { return give(mode, handle->math_mode); }
API int cublasSetWorkspace_v2(Handle *, void *, size_t) { return success; }
API int cublasGetVersion_v2(Handle *, int *version) { return give(version, 130000); }
API int cublasGetProperty(int which, int *value) { return give(value, which == 0 ? 13 : 0); }
API const char *cublasGetStatusName(int status) { return status_name(status); }
API const char *cublasGetStatusString(int status) { return status_string(status); }

API int cublasGemmStridedBatchedEx(Handle *handle, int ta, int tb, int m, int n, int k, const void *alpha,
                                   const void *a, int type_a, int lda, long long stride_a, const void *b, int type_b,
                                   int ldb, long long stride_b, const void *beta, void *c, int type_c, int ldc,
                                   long long stride_c, int count, int compute, int) {
    return batched(handle, ta, tb, m, n, k, alpha, a, type_a, lda, stride_a, b, type_b, ldb, stride_b, beta, c, type_c,
                   ldc, stride_c, count, compute);
}

API int cublasGemmEx(Handle *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type_a,
                     int lda, const void *b, int type_b, int ldb, const void *beta, void *c, int type_c, int ldc,
                     int compute, int) {
    return batched(handle, ta, tb, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1,
                   compute);
}

#define GEMM(letter, T, type, compute)                                                                                \
    API int cublas##letter##gemm_v2(Handle *handle, int ta, int tb, int m, int n, int k, const T *alpha, const T *a,  \
                                    int lda, const T *b, int ldb, const T *beta, T *c, int ldc) {                     \
        return batched(handle, ta, tb, m, n, k, alpha, a, type, lda, 0, b, type, ldb, 0, beta, c, type, ldc, 0, 1,    \
                       compute);                                                                                      \
    }                                                                                                                 \
    API int cublas##letter##gemmStridedBatched(                                                                       \
        Handle *handle, int ta, int tb, int m, int n, int k, const T *alpha, const T *a, int lda, long long stride_a, \
        const T *b, int ldb, long long stride_b, const T *beta, T *c, int ldc, long long stride_c, int count) {       \
        return batched(handle, ta, tb, m, n, k, alpha, a, type, lda, stride_a, b, type, ldb, stride_b, beta, c, type, \
                       ldc, stride_c, count, compute);                                                                \
    }
GEMM(S, float, real_f32, 68)
GEMM(D, double, real_f64, compute_f64)
GEMM(H, __half, real_f16, compute_f16)
