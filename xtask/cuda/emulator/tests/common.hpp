// What the emulator's tests share.
#pragma once

#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

int failures = 0;

void expect(bool good, const std::string &what) {
    printf("%s %s\n", good ? "ok  " : "FAIL", what.c_str());
    if (!good) failures++;
}

void must(CUresult result, const char *call) {
    if (result == CUDA_SUCCESS) return;
    const char *name;
    cuGetErrorName(result, &name);
    printf("FAIL %s: %s\n", call, name);
    exit(1);
}
#define MUST(call) must(call, #call)

template <class T>
struct Buffer {
    CUdeviceptr address = 0;
    size_t count;
    explicit Buffer(const std::vector<T> &values) : count(values.size()) {
        MUST(cuMemAllocAsync(&address, count * sizeof(T), nullptr));
        MUST(cuMemcpyHtoDAsync_v2(address, values.data(), count * sizeof(T), nullptr));
    }
    std::vector<T> read() const {
        std::vector<T> values(count);
        MUST(cuMemcpyDtoHAsync_v2(values.data(), address, count * sizeof(T), nullptr));
        return values;
    }
};

// Makes the device's context the thread's.
void start() {
    MUST(cuInit(0));
    CUcontext context;
    MUST(cuDevicePrimaryCtxRetain(&context, 0));
    MUST(cuCtxSetCurrent(context));
}

}  // namespace
