// The matrix product behind cuBLAS and cuBLASLt: C = alpha op(A) op(B) + beta C, all column-major, batched, and what
// may follow before C is rounded.
#pragma once

#include "../include/emulator/narrow.hpp"

namespace emulator {

enum class Format { f32, f64, f16, bf16 };

struct Operand {
    const void *data;
    Format format;
    long long leading, stride;
    bool transposed;
};

// Of every element: the bias of its row, then a copy beside C, then GELU in its tanh form. Null is without.
struct Epilogue {
    const void *bias;
    void *auxiliary;
    long long leading_auxiliary;
    bool gelu;
};

struct Product {
    Operand a, b;  // op(A) is m x k, op(B) is k x n
    void *c;
    Format format_c;
    long long leading_c, stride_c;
    long long m, n, k, count;
    double alpha, beta;
    bool tf32;  // f32 operands are rounded to TF32 first
    Epilogue epilogue;  // bias and auxiliary are of C's format; not batched
};

// Null, or what cuBLAS would refuse.
const char *check(const Product &product);
// Products and sums in f32 (f64 if C is f64) of operands that may be rounded to TF32, one rounding to C's format at the end.
void multiply(const Product &product);

}  // namespace emulator
