// The driver API's memory calls. Both ends of every copy are checked: device addresses must lie in one
// allocation with all their bytes.
#include "driver.hpp"

#include "memory.hpp"
#include "statistics.hpp"

#include <cstring>
#include <map>
#include <mutex>

using namespace emulator;

namespace {

// Host memory from cuMemHostAlloc: only with it are copies really asynchronous.
std::mutex pinned_mutex;
std::map<const char *, size_t> &pinned() {
    static auto *ranges = new std::map<const char *, size_t>;
    return *ranges;
}

bool is_pinned(const void *memory) {
    std::lock_guard lock(pinned_mutex);
    auto next = pinned().upper_bound(static_cast<const char *>(memory));
    return next != pinned().begin() &&
           static_cast<const char *>(memory) < std::prev(next)->first + std::prev(next)->second;
}

CUresult check(const char *call, CUdeviceptr address, size_t bytes) {
    if (CUresult result = spoiled) return result;
    if (bytes == 0 || contains(address, bytes)) return CUDA_SUCCESS;
    fprintf(stderr, "cuda emulator: %s of %zu bytes at %s\n", call, bytes, describe(address).c_str());
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult allocate_into(CUdeviceptr *address, size_t bytes) {
    if (CUresult result = spoiled) return result;
    statistics().allocations.add(bytes);
    *address = allocate(bytes);
    return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult release_address(CUdeviceptr address) {
    if (address == 0) return CUDA_SUCCESS;
    statistics().releases.add();
    return release(address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult to_device(CUdeviceptr to, const void *from, size_t bytes) {
    statistics().to_device.add(bytes);
    trace("copy of %zu bytes to the device", bytes);
    if (bytes > 64 << 10 && !is_pinned(from)) statistics().large_uploads.add(bytes);
    if (CUresult result = check("a copy to the device", to, bytes)) return result;
    memcpy(reinterpret_cast<void *>(to), from, bytes);
    return CUDA_SUCCESS;
}

CUresult to_host(void *to, CUdeviceptr from, size_t bytes) {
    statistics().to_host.add(bytes);
    if (CUresult result = check("a copy to the host", from, bytes)) return result;
    memcpy(to, reinterpret_cast<const void *>(from), bytes);
    return CUDA_SUCCESS;
}

CUresult on_device(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    statistics().on_device.add(bytes);
    if (CUresult result = check("a copy on the device from", from, bytes)) return result;
    if (CUresult result = check("a copy on the device to", to, bytes)) return result;
    memmove(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes);
    return CUDA_SUCCESS;
}

CUresult fill(CUdeviceptr to, unsigned char value, size_t bytes) {
    statistics().fills.add(bytes);
    if (CUresult result = check("a fill", to, bytes)) return result;
    memset(reinterpret_cast<void *>(to), value, bytes);
    return CUDA_SUCCESS;
}

// The calls without `Async` make the host wait.
CUresult blocking(CUresult result) {
    statistics().blocking_calls.add();
    return result;
}

}  // namespace

extern "C" {

CUresult CUDAAPI cuDeviceTotalMem_v2(size_t *bytes, CUdevice) { return give(bytes, memory_use().total); }

CUresult CUDAAPI cuMemGetInfo_v2(size_t *free, size_t *total) {
    MemoryUse use = memory_use();
    *free = use.total - use.used;
    *total = use.total;
    return spoiled;
}

// An allocation of no bytes is an error to the one and null to the other: cudarc's issue 194 has the first, from
// a GPU without memory pools, and candle's 2327 the second, where only the launch of no blocks fails.
CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    return blocking(allocate_into(address, bytes));
}
CUresult CUDAAPI cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream) {
    if (bytes == 0) return give(address, 0, spoiled);
    return allocate_into(address, bytes);
}
CUresult CUDAAPI cuMemFree_v2(CUdeviceptr address) { return blocking(release_address(address)); }
CUresult CUDAAPI cuMemFreeAsync(CUdeviceptr address, CUstream) { return release_address(address); }

CUresult CUDAAPI cuMemHostAlloc(void **memory, size_t bytes, unsigned) {
    *memory = malloc(bytes);
    if (!*memory) return CUDA_ERROR_OUT_OF_MEMORY;
    std::lock_guard lock(pinned_mutex);
    pinned()[static_cast<const char *>(*memory)] = bytes;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemFreeHost(void *memory) {
    std::lock_guard lock(pinned_mutex);
    if (pinned().erase(static_cast<const char *>(memory)) == 0) return CUDA_ERROR_INVALID_VALUE;
    free(memory);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    return blocking(to_device(to, from, bytes));
}
CUresult CUDAAPI cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream) {
    return to_device(to, from, bytes);
}
CUresult CUDAAPI cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    return blocking(to_host(to, from, bytes));
}
CUresult CUDAAPI cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream) {
    if (!is_pinned(to)) statistics().downloads.add(bytes);
    trace("copy of %zu bytes to the host%s", bytes, is_pinned(to) ? "" : ", which waits");
    return to_host(to, from, bytes);
}
CUresult CUDAAPI cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return on_device(to, from, bytes); }
CUresult CUDAAPI cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
    return on_device(to, from, bytes);
}

CUresult CUDAAPI cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) { return fill(to, value, bytes); }
CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream) {
    return fill(to, value, bytes);
}

// The device's own memory pool. There is nothing to trim or to tune.
CUresult CUDAAPI cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice) {
    static int the_pool;
    return give(pool, reinterpret_cast<CUmemoryPool>(&the_pool));
}
CUresult CUDAAPI cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) {
    return cuDeviceGetDefaultMemPool(pool, device);
}
CUresult CUDAAPI cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void *) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute which, void *value) {
    MemoryUse use = memory_use();
    bool peak = which == CU_MEMPOOL_ATTR_USED_MEM_HIGH || which == CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH;
    uint64_t bytes = peak ? use.peak : use.used;
    memcpy(value, &bytes, sizeof bytes);
    return CUDA_SUCCESS;
}

}  // extern "C"
