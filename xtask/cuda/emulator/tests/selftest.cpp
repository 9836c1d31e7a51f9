// The emulator's own test: selftest [what]. Without an argument everything but what ends the process.
// The kernels are those of kernels.cu, built as a plug-in; the PTX here only declares them.
#include "common.hpp"

#include <cmath>
#include <cstring>

namespace {

// "px" and so on: p a pointer, u an unsigned, f a float.
std::string entry(const std::string &name, const std::string &parameters, const std::string &directives = "") {
    std::string text = ".visible .entry " + name + "(";
    for (size_t i = 0; i < parameters.size(); i++) {
        const char *type = parameters[i] == 'p' ? ".u64 .ptr .align 1" : parameters[i] == 'f' ? ".f32" : ".u32";
        text += std::string(i ? ", " : "") + ".param " + type + " " + name + "_param_" + std::to_string(i);
    }
    return text + ")\n" + directives + "{ // a body the emulator does not read\nret; }\n";
}

std::string ptx() {
    return "// A comment, as nvcc writes one\n.version 9.0\n.target sm_90\n.address_size 64\n" + entry("axpy", "ufpp") +
           entry("reverse", "pp") + entry("sums", "pp", ".maxntid 128, 1, 1\n") + entry("count", "pp") +
           entry("tensor_product", "ppp") + entry("fragments", "pppp") + entry("reads_before_writing", "p") +
           entry("barrier_for_some", "p") + entry("two_barriers", "p") + entry("shuffles_apart", "p") +
           entry("past_shared_memory", "p") + entry("asserts", "p") + entry("past_the_end", "up") +
           entry("without_barrier", "p") + entry("shuffle_for_order", "p") + entry("without_race", "p") +
           entry("without_code", "p") +
           // Declared otherwise than the plug-in has it.
           ".visible .entry changed(.param .u64 changed_param_0) { ret; }\n";
}

CUmodule module_;

CUfunction function(const char *name) {
    CUfunction found;
    MUST(cuModuleGetFunction(&found, module_, name));
    return found;
}

template <class... Arguments>
CUresult launch(const char *name, unsigned grid, unsigned block, unsigned shared, Arguments... arguments) {
    void *pointers[] = {&arguments...};
    return cuLaunchKernel(function(name), grid, 1, 1, block, 1, 1, shared, nullptr, pointers, nullptr);
}

std::vector<float> ramp(size_t count) {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; i++) values[i] = float(i);
    return values;
}

void right_results() {
    Buffer<float> x(ramp(1000)), y(ramp(1000));
    MUST(launch("axpy", 8, 128, 0, 1000u, 2.0f, x.address, y.address));
    expect(y.read()[999] == 3 * 999.0f && y.read()[0] == 0.0f, "a kernel without barriers");

    Buffer<float> many(ramp(64 * 256)), reversed(ramp(64 * 256));
    MUST(launch("reverse", 64, 256, 1024, many.address, reversed.address));
    auto out = reversed.read();
    bool good = true;
    for (size_t i = 0; i < out.size(); i++) good &= out[i] == float(i / 256 * 256 + 255 - i % 256);
    expect(good, "dynamic shared memory and a barrier, on several blocks");

    Buffer<float> sums(std::vector<float>(3));
    MUST(launch("sums", 1, 128, 0, x.address, sums.address));
    out = sums.read();
    expect(out[0] == 127 * 128 / 2 && out[1] == 4 && out[2] == 16,
           "shuffles, a ballot, and one shared array per instance of a template");

    Buffer<unsigned> counter({0});
    Buffer<float> halves({0.0f});
    MUST(launch("count", 300, 96, 0, counter.address, halves.address));
    expect(counter.read()[0] == 300 * 96 && halves.read()[0] == 150 * 96, "atomics from all blocks");

    std::vector<unsigned short> a(256), b(256);
    auto bf16 = [](int value) {
        float f = float(value);
        unsigned bits;
        memcpy(&bits, &f, 4);
        return (unsigned short)(bits >> 16);
    };
    for (int i = 0; i < 256; i++) a[i] = bf16(i % 7 - 3), b[i] = bf16(i % 5 - 2);
    Buffer<unsigned short> tile_a(a), tile_b(b);
    Buffer<float> tile_c(std::vector<float>(256));
    MUST(launch("tensor_product", 1, 32, 0, tile_a.address, tile_b.address, tile_c.address));
    out = tile_c.read();
    good = true;
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 16; column++) {
            int sum = 0;
            for (int k = 0; k < 16; k++) sum += ((row * 16 + k) % 7 - 3) * ((column * 16 + k) % 5 - 2);
            good &= out[row * 16 + column] == float(2 * sum);
        }
    expect(good, "wmma: a by rows, b by columns, an element-wise step");

    Buffer<float> early(std::vector<float>(32));
    MUST(launch("fragments", 1, 32, 0, tile_a.address, tile_b.address, tile_c.address, early.address));
    out = tile_c.read();
    good = true;
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 16; column++) {
            int sum = 0;
            for (int k = 0; k < 16; k++) sum += ((row * 16 + k) % 7 - 3) * ((k * 16 + column) % 5 - 2);
            good &= out[row * 16 + column] == float(sum);
        }
    expect(good, "ldmatrix and mma: a by rows, b transposed on the way");
    good = true;
    for (float found : early.read()) good &= std::isnan(found);
    expect(good, "what is copied is not there before it is waited for");

    Buffer<float> undefined(std::vector<float>(4));
    MUST(launch("reads_before_writing", 1, 4, 0, undefined.address));
    expect(std::isnan(undefined.read()[0]), "shared memory that was never written holds NaNs");
    CUdeviceptr fresh;
    MUST(cuMemAllocAsync(&fresh, 64, nullptr));
    float value;
    MUST(cuMemcpyDtoH_v2(&value, fresh, sizeof value));
    expect(std::isnan(value), "device memory that was never written holds NaNs");

    size_t before, after, total;
    MUST(cuMemGetInfo_v2(&before, &total));
    MUST(cuMemFreeAsync(fresh, nullptr));
    MUST(cuMemGetInfo_v2(&after, &total));
    expect(after == before + 64, "free memory counts");
}

void refused_calls() {
    Buffer<float> x(ramp(256));
    expect(launch("sums", 1, 256, 0, x.address, x.address) == CUDA_ERROR_INVALID_VALUE,
           "more threads than the launch bounds");
    expect(launch("axpy", 1, 2048, 0, 0u, 0.0f, x.address, x.address) == CUDA_ERROR_INVALID_VALUE,
           "more threads than a block can have");
    expect(launch("reverse", 1, 256, 50 << 10, x.address, x.address) == CUDA_ERROR_INVALID_VALUE,
           "more shared memory than was opted into");
    MUST(cuFuncSetAttribute(function("reverse"), CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 200 << 10));
    MUST(launch("reverse", 1, 256, 200 << 10, x.address, x.address));
    CUfunction found;
    expect(cuModuleGetFunction(&found, module_, "unheard_of") == CUDA_ERROR_NOT_FOUND,
           "a kernel that the module lacks");
    expect(cuModuleGetFunction(&found, module_, "without_code") == CUDA_ERROR_NOT_FOUND,
           "a kernel that no plug-in has");
    expect(cuModuleGetFunction(&found, module_, "changed") == CUDA_ERROR_NOT_FOUND, "a plug-in older than the PTX");
    CUmodule module;
    expect(cuModuleLoadData(&module,
                            "\x7f"
                            "ELF") == CUDA_ERROR_INVALID_IMAGE,
           "a module that is no PTX");
    float host[300];
    expect(cuMemcpyDtoH_v2(host, x.address, sizeof host) == CUDA_ERROR_INVALID_VALUE, "a copy of more than there is");
    MUST(cuMemFreeAsync(x.address, nullptr));
    expect(cuMemFreeAsync(x.address, nullptr) == CUDA_ERROR_INVALID_VALUE, "a second release");
    CUdeviceptr huge;
    expect(cuMemAllocAsync(&huge, size_t(1) << 50, nullptr) == CUDA_ERROR_OUT_OF_MEMORY, "more memory than there is");
}

// Each in a process of its own, as they spoil the context.
int one_kernel(const std::string &name) {
    Buffer<float> out(std::vector<float>(64));
    CUresult result;
    if (name == "without_barrier" || name == "shuffle_for_order" || name == "without_race") {
        for (int i = 0; i < 3; i++) MUST(launch(name.c_str(), 2, 64, 0, out.address));
        return 0;  // whether there was a race is ThreadSanitizer's to say
    }
    if (name == "past_the_end") {
        MUST(launch("past_the_end", 1, 2, 0, 64u, out.address));
        result = cuMemFreeAsync(out.address, nullptr);
        return result == CUDA_ERROR_INVALID_VALUE ? 0 : 1;
    }
    if (name == "released_pointer") {
        MUST(cuMemFreeAsync(out.address, nullptr));
        result = launch("axpy", 1, 64, 0, 64u, 1.0f, out.address, out.address);
        return result == CUDA_ERROR_ILLEGAL_ADDRESS ? 0 : 1;
    }
    result = launch(name.c_str(), 1, 64, 0, out.address);
    bool lasting = cuStreamSynchronize(nullptr) == CUDA_ERROR_LAUNCH_FAILED;
    return result == CUDA_ERROR_LAUNCH_FAILED && lasting ? 0 : 1;
}

}  // namespace

int main(int count, char **arguments) {
    start();
    MUST(cuModuleLoadData(&module_, ptx().c_str()));
    if (count > 1) return one_kernel(arguments[1]);
    right_results();
    refused_calls();
    return failures != 0;
}
