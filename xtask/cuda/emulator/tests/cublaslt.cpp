// The test of libcublasLt.so.13: results of every epilogue, and refusals. Its functions are declared here, as a program
// without cublasLt.h has to.
#include "common.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" {
int cublasLtCreate(void **);
int cublasLtMatrixLayoutCreate(void **, int, uint64_t, uint64_t, int64_t);
int cublasLtMatmulDescCreate(void **, int, int);
int cublasLtMatmulDescSetAttribute(void *, int, const void *, size_t);
int cublasLtMatmulPreferenceCreate(void **);
int cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t);
int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *, int *);
int cublasLtMatmul(void *, void *, const void *, const void *, void *, const void *, void *, const void *, const void *,
                   void *, void *, void *, const void *, void *, size_t, void *);
}

namespace {

using Half = uint16_t;  // bf16
enum { success = 0, invalid_value = 7, not_supported = 15 };
enum { bf16 = 14, f32 = 0, compute_f32 = 68 };
enum { transpose_a = 3, epilogue = 7, bias_pointer = 8, auxiliary_pointer = 11, auxiliary_leading = 12 };

Half narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return Half((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float wide(Half value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

std::vector<Half> numbers(size_t count, int seed) {
    std::vector<Half> values(count);
    for (size_t i = 0; i < count; i++) values[i] = narrow(float(int((i * 37 + size_t(seed) * 11) % 23) - 11) / 8);
    return values;
}

struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

// y (rows, o) = x (rows, i) by the transpose of w (o, i), as a program that counts along rows asks for it.
struct Case {
    int64_t rows = 10, o = 24, i = 16, leading = 32;
    unsigned after = 164;
    uint32_t alignment = 256;
    int64_t shift = 0;  // elements that x begins behind its allocation
    size_t missing = 0;  // bytes of workspace
    std::vector<Half> x, w, bias, y, pre;

    int run() {
        x = numbers(size_t(rows * i + shift), 1), w = numbers(size_t(o * i), 2), bias = numbers(size_t(o), 3);
        Buffer<Half> device_x(x), device_w(w), device_bias(bias), device_y(std::vector<Half>(size_t(rows * o), 1)),
            device_pre(std::vector<Half>(size_t(rows * leading), 1));
        void *handle, *operation, *layout_w, *layout_x, *layout_y, *preference;
        int32_t transposed = 1;
        cublasLtCreate(&handle);
        cublasLtMatmulDescCreate(&operation, compute_f32, f32);
        cublasLtMatmulDescSetAttribute(operation, transpose_a, &transposed, 4);
        cublasLtMatmulDescSetAttribute(operation, epilogue, &after, 4);
        cublasLtMatmulDescSetAttribute(operation, bias_pointer, &device_bias.address, 8);
        if (after & 128) {
            cublasLtMatmulDescSetAttribute(operation, auxiliary_pointer, &device_pre.address, 8);
            cublasLtMatmulDescSetAttribute(operation, auxiliary_leading, &leading, 8);
        }
        cublasLtMatrixLayoutCreate(&layout_w, bf16, uint64_t(i), uint64_t(o), i);
        cublasLtMatrixLayoutCreate(&layout_x, bf16, uint64_t(i), uint64_t(rows), i);
        cublasLtMatrixLayoutCreate(&layout_y, bf16, uint64_t(o), uint64_t(rows), o);
        cublasLtMatmulPreferenceCreate(&preference);
        uint64_t most = 32 << 20;
        cublasLtMatmulPreferenceSetAttribute(preference, 1, &most, 8);
        for (int matrix = 5; matrix < 9; matrix++)
            cublasLtMatmulPreferenceSetAttribute(preference, matrix, &alignment, 4);
        Heuristic found;
        int count = 0;
        int status = cublasLtMatmulAlgoGetHeuristic(handle, operation, layout_w, layout_x, layout_y, layout_y,
                                                    preference, 1, &found, &count);
        if (status != success) return status;
        Buffer<uint8_t> workspace(std::vector<uint8_t>(found.workspace - missing));
        float one = 1, zero = 0;
        auto at = [](CUdeviceptr address) { return reinterpret_cast<void *>(address); };
        status = cublasLtMatmul(handle, operation, &one, at(device_w.address), layout_w,
                                at(device_x.address + CUdeviceptr(shift) * 2), layout_x, &zero, at(device_y.address),
                                layout_y, at(device_y.address), layout_y, &found, at(workspace.address),
                                workspace.count, nullptr);
        y = device_y.read(), pre = device_pre.read();
        return status;
    }

    bool right() const {
        bool good = true;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < o; c++) {
                float sum = 0;  // exact: the numbers are eighths
                for (int64_t k = 0; k < i; k++)
                    sum += wide(x[size_t(shift + r * i + k)]) * wide(w[size_t(c * i + k)]);
                if (after & 4) sum += wide(bias[size_t(c)]);
                float out = sum;
                if (after & 32) out = 0.5f * sum * (1 + std::tanh(0.79788456f * (sum + 0.044715f * sum * sum * sum)));
                float got = wide(y[size_t(r * o + c)]);
                good &= std::abs(got - out) <= 0.004f * std::abs(out) + 1e-6f;
                if (after & 128) good &= pre[size_t(r * leading + c)] == narrow(sum);
            }
        for (int64_t r = 0; r < rows && after & 128; r++)
            for (int64_t c = o; c < leading; c++) good &= pre[size_t(r * leading + c)] == 1;
        return good;
    }
};

template <class Change>
Case changed(Change change) {
    Case one;
    change(one);
    return one;
}

void refused(int status, const std::string &what, Case one) { expect(one.run() == status, what); }

}  // namespace

int main() {
    start();
    for (unsigned after : {1u, 4u, 32u, 36u, 160u, 164u}) {
        Case one = changed([&](Case &c) { c.after = after; });
        expect(one.run() == success && one.right(), "epilogue " + std::to_string(after));
    }
    Case shifted = changed([](Case &c) { c.shift = 8, c.alignment = 16; });
    expect(shifted.run() == success && shifted.right(), "an operand aligned to 16 bytes, as it was said to be");
    Case large = changed([](Case &c) { c.rows = 300, c.o = c.leading = 264, c.i = 512; });
    expect(large.run() == success && large.right(), "several tiles");

    refused(invalid_value, "an operand less aligned than said", changed([](Case &c) { c.shift = 8; }));
    refused(invalid_value, "a leading dimension of the auxiliary matrix that 8 does not divide",
            changed([](Case &c) { c.leading = 28; }));
    refused(invalid_value, "one that is less than the rows", changed([](Case &c) { c.leading = 16; }));
    refused(invalid_value, "a workspace too small", changed([](Case &c) { c.missing = 1; }));
    refused(not_supported, "an epilogue that is not there", changed([](Case &c) { c.after = 208; }));
    refused(not_supported, "rows that do not begin at multiples of 16 bytes", changed([](Case &c) { c.i = 12; }));
    void *operation;
    cublasLtMatmulDescCreate(&operation, compute_f32, f32);
    uint64_t wrong = 4;
    expect(cublasLtMatmulDescSetAttribute(operation, epilogue, &wrong, sizeof wrong) == invalid_value,
           "an attribute of another size");
    return failures != 0;
}
