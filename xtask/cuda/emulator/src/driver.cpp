// The driver API as cudarc calls it: initialisation, device, context, streams, events, modules, launches.
// Memory is in driver_memory.cpp. Everything is done when a call returns, on whatever stream.
//
// A call that is missing here is reported by the program's shim ("libcuda.so.1 has no cuX"): add it to
// this file, with its prototype from cuda.h.
#include "driver.hpp"

#include "faults.hpp"
#include "statistics.hpp"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstring>
#include <mutex>
#include <set>

using namespace emulator;

namespace emulator {

std::atomic<CUresult> spoiled{CUDA_SUCCESS};

namespace {

// Contexts, streams and events need identity only, so they are small heap objects known by address.
struct Handle {
    std::chrono::steady_clock::time_point recorded;
};

class Handles {
public:
    Handle *create() {
        std::lock_guard lock(mutex_);
        auto *handle = new Handle;
        live_.insert(handle);
        return handle;
    }
    bool destroy(void *handle) {
        std::lock_guard lock(mutex_);
        if (live_.erase(handle) == 0) return false;
        delete static_cast<Handle *>(handle);
        return true;
    }
    bool known(const void *handle) {
        std::lock_guard lock(mutex_);
        return live_.count(handle) != 0;
    }

private:
    std::mutex mutex_;
    std::set<const void *> live_;
};

Handles &streams() {
    static auto *handles = new Handles;
    return *handles;
}
Handles &events() {
    static auto *handles = new Handles;
    return *handles;
}

Handle primary;
std::atomic<int> primary_users{0};
thread_local CUcontext current_context = nullptr;
std::atomic<bool> initialised{false};

CUresult refuse(CUresult result, const char *format, ...) __attribute__((format(printf, 2, 3)));
CUresult refuse(CUresult result, const char *format, ...) {
    fprintf(stderr, "cuda emulator: ");
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    return result;
}

// What precedes every call that uses the device.
CUresult ready() {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (!current_context) return refuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread");
    return spoiled;
}

// Besides created streams there are the default ones: null, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
CUresult on_stream(CUstream stream) {
    if (CUresult result = ready()) return result;
    if (reinterpret_cast<uintptr_t>(stream) <= 2 || streams().known(stream)) return CUDA_SUCCESS;
    return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no stream", static_cast<void *>(stream));
}

CUresult known_event(CUevent event) {
    if (CUresult result = ready()) return result;
    return events().known(event) ? CUDA_SUCCESS
                                 : refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no event", static_cast<void *>(event));
}

Function *function_of(CUfunction handle) {
    auto *function = reinterpret_cast<Function *>(handle);
    return is_function(function) ? function : nullptr;
}

struct ErrorText {
    CUresult result;
    const char *name, *text;
};
constexpr ErrorText error_texts[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED",
     "unspecified launch failure (the emulator said on stderr which)"},
};

// Attributes of an H100 or H200 as far as programs ask for them; 0 for the others.
int attribute(CUdevice_attribute which) {
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return warp_size;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return max_threads_per_block;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 0x7fffffff;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return int(max_shared_memory_unasked);
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return int(max_shared_memory);
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 228 * 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: return 1;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
        default: return 0;
    }
}

int blocks_per_multiprocessor(int threads, size_t shared_memory) {
    if (threads < 1 || threads > int(max_threads_per_block)) return 0;
    int by_threads = 2048 / threads;
    int by_memory = int(228 * 1024 / (shared_memory + 1024));
    return std::min({by_threads, by_memory, 32});
}

}  // namespace
}  // namespace emulator

extern "C" {

CUresult CUDAAPI cuInit(unsigned) {
    static std::once_flag once;
    std::call_once(once, [] {
        catch_faults();
        statistics_wanted();
        initialised = true;
    });
    catch_faults_on_this_thread();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDriverGetVersion(int *version) { return give(version, 13000); }

CUresult CUDAAPI cuGetErrorName(CUresult error, const char **text) {
    for (const ErrorText &known : error_texts)
        if (known.result == error) return give(text, known.name);
    return give<const char *>(text, "an error the emulator never gives", CUDA_ERROR_INVALID_VALUE);
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char **text) {
    for (const ErrorText &known : error_texts)
        if (known.result == error) return give(text, known.text);
    return give<const char *>(text, "an error the emulator never gives", CUDA_ERROR_INVALID_VALUE);
}

// The device.

CUresult CUDAAPI cuDeviceGetCount(int *count) { return give(count, 1); }

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal != 0) return refuse(CUDA_ERROR_INVALID_DEVICE, "device %d: there is only device 0", ordinal);
    return give(device, 0);
}

CUresult CUDAAPI cuDeviceGetName(char *name, int bytes, CUdevice) {
    snprintf(name, size_t(bytes), "CPU emulator");
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice) {
    memcpy(uuid->bytes, "CUDAonCPUemulatr", 16);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice) {
    return give(value, attribute(which));
}

// Contexts: there is the primary one.

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    primary_users++;
    return give(context, reinterpret_cast<CUcontext>(&primary));
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice) {
    if (primary_users-- > 0) return CUDA_SUCCESS;
    primary_users++;
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "the primary context was released more often than retained");
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext *context) { return give(context, current_context); }
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) { return give(&current_context, context); }
CUresult CUDAAPI cuCtxGetDevice(CUdevice *device) { return give(device, 0, ready()); }
CUresult CUDAAPI cuCtxSetFlags(unsigned) { return ready(); }
CUresult CUDAAPI cuCtxSetLimit(CUlimit, size_t) { return ready(); }
CUresult CUDAAPI cuCtxGetLimit(size_t *value, CUlimit) { return give(value, 0, ready()); }
CUresult CUDAAPI cuCtxSetCacheConfig(CUfunc_cache) { return ready(); }
CUresult CUDAAPI cuCtxGetCacheConfig(CUfunc_cache *config) { return give(config, CU_FUNC_CACHE_PREFER_NONE, ready()); }
CUresult CUDAAPI cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return ready();
}

CUresult CUDAAPI cuCtxSynchronize() {
    statistics().context_synchronisations.add();
    trace("cuCtxSynchronize");
    return ready();
}

// Streams and events.

CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned) {
    if (CUresult result = ready()) return result;
    return give(stream, reinterpret_cast<CUstream>(streams().create()));
}

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}

CUresult CUDAAPI cuStreamDestroy_v2(CUstream stream) {
    return streams().destroy(stream)
               ? CUDA_SUCCESS
               : refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no stream", static_cast<void *>(stream));
}

CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
    statistics().stream_synchronisations.add();
    trace("cuStreamSynchronize");
    return on_stream(stream);
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    statistics().event_calls.add();
    if (CUresult result = on_stream(stream)) return result;
    return known_event(event);
}

CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return give(status, CU_STREAM_CAPTURE_STATUS_NONE, on_stream(stream));
}

CUresult CUDAAPI cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
    if (CUresult result = on_stream(stream)) return result;
    function(data);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned) {
    statistics().event_calls.add();
    if (CUresult result = ready()) return result;
    return give(event, reinterpret_cast<CUevent>(events().create()));
}

CUresult CUDAAPI cuEventDestroy_v2(CUevent event) {
    return events().destroy(event) ? CUDA_SUCCESS
                                   : refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no event", static_cast<void *>(event));
}

CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
    statistics().event_calls.add();
    if (CUresult result = on_stream(stream)) return result;
    if (CUresult result = known_event(event)) return result;
    reinterpret_cast<Handle *>(event)->recorded = std::chrono::steady_clock::now();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuEventQuery(CUevent event) { return known_event(event); }

CUresult CUDAAPI cuEventSynchronize(CUevent event) {
    statistics().event_synchronisations.add();
    return known_event(event);
}

CUresult CUDAAPI cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
    if (CUresult result = known_event(start)) return result;
    if (CUresult result = known_event(end)) return result;
    auto time = reinterpret_cast<Handle *>(end)->recorded - reinterpret_cast<Handle *>(start)->recorded;
    return give(milliseconds, std::chrono::duration<float, std::milli>(time).count());
}

// Modules, functions, launches.

CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image) {
    if (CUresult result = ready()) return result;
    load_plugins();
    Module *loaded = load_module(static_cast<const char *>(image));
    return give(module, reinterpret_cast<CUmodule>(loaded), loaded ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE);
}

CUresult CUDAAPI cuModuleUnload(CUmodule module) {
    auto *loaded = reinterpret_cast<Module *>(module);
    if (!is_module(loaded)) return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no module", static_cast<void *>(module));
    unload_module(loaded);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if (CUresult result = ready()) return result;
    auto *loaded = reinterpret_cast<Module *>(module);
    if (!is_module(loaded)) return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no module", static_cast<void *>(module));
    Function *found = find_function(loaded, name);
    return give(function, reinterpret_cast<CUfunction>(found), found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND);
}

CUresult CUDAAPI cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction handle) {
    const Function *function = function_of(handle);
    if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no kernel", static_cast<void *>(handle));
    *value = 0;
    if (which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = int(function->max_threads);
    if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) *value = int(function->dynamic_shared_limit);
    if (which == CU_FUNC_ATTRIBUTE_PTX_VERSION || which == CU_FUNC_ATTRIBUTE_BINARY_VERSION) *value = 90;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction handle, CUfunction_attribute which, int value) {
    Function *function = function_of(handle);
    if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no kernel", static_cast<void *>(handle));
    if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value < 0 || size_t(value) > max_shared_memory)
        return refuse(CUDA_ERROR_INVALID_VALUE, "kernel %s: %d bytes of dynamic shared memory, a block can have %zu",
                      function->name.c_str(), value, max_shared_memory);
    return give(&function->dynamic_shared_limit, size_t(value));
}

CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return ready(); }

CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction handle, int threads,
                                                             size_t shared_memory) {
    const Function *function = function_of(handle);
    if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no kernel", static_cast<void *>(handle));
    return give(blocks, blocks_per_multiprocessor(threads, shared_memory));
}

CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, CUfunction function, int threads,
                                                                      size_t shared_memory, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared_memory);
}

CUresult CUDAAPI cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                unsigned block_y, unsigned block_z, unsigned shared_memory, CUstream stream,
                                void **arguments, void **extra) {
    if (CUresult result = on_stream(stream)) return result;
    const Function *function = function_of(handle);
    if (!function)
        return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no kernel, or its module was unloaded",
                      static_cast<void *>(handle));
    if (extra || (!arguments && function->kernel->argument_count))
        return refuse(CUDA_ERROR_NOT_SUPPORTED, "kernel %s: arguments must come as an array of pointers",
                      function->name.c_str());
    CUresult result =
        launch_kernel(*function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_memory, arguments);
    // A launch that was refused leaves the context alone; a kernel that ran and failed does not.
    if (result == CUDA_ERROR_LAUNCH_FAILED || result == CUDA_ERROR_ILLEGAL_ADDRESS) spoiled = result;
    return result;
}

}  // extern "C"
