// The matrix product behind cuBLAS: C = alpha op(A) op(B) + beta C, all column-major, batched.
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

struct Product {
    Operand a, b;  // op(A) is m x k, op(B) is k x n
    void *c;
    Format format_c;
    long long leading_c, stride_c;
    long long m, n, k, count;
    double alpha, beta;
    bool tf32;  // f32 operands are rounded to TF32 first
};

// Null, or what cuBLAS would refuse.
const char *check(const Product &product);
// Products and sums in f32 (f64 if C is f64) of operands that may be rounded to TF32, one rounding to C's format at the end.
void multiply(const Product &product);

}  // namespace emulator
