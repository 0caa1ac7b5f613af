// Streams, events and kernels: every launch is counted, checked for its limits, and computes nothing.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "simulated.h"

namespace simulated {

static std::unordered_map<const void*, std::string> names;
static std::unordered_map<void*, long> recorded;  // launches before each event
static std::atomic<long> ended{0};                // all launches up to here have ended

static long lag() {
  static long launches = (long)setting("LAG", 0);
  return launches;
}

static void reach(long launch) {
  long now = ended;
  while (launch > now && !ended.compare_exchange_weak(now, launch)) {
  }
}

void reach_all() { reach(launches); }

static bool has_ended(cudaEvent_t event) {
  long launch = recorded[event];
  return !lag() || launch <= ended || launches - launch >= lag();
}

void name_kernel(const void* kernel, const char* name) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  names[kernel] = name;
}

static std::string name_of(const void* kernel) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto it = names.find(kernel);
  if (it == names.end()) return "?";
  int status;
  char* plain = abi::__cxa_demangle(it->second.c_str(), nullptr, nullptr, &status);
  std::string name = plain ? plain : it->second;
  free(plain);
  return name.substr(0, 300);
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void* stream) {
  launches++;
  size_t threads = (size_t)block.x * block.y * block.z;
  bool empty = !grid.x || !grid.y || !grid.z || !threads;
  bool valid = !empty && threads <= 1024 && shared <= shared_memory() && grid.y <= 65535 && grid.z <= 65535;
  if (logs())
    log("launch%s stream %p grid %u,%u,%u block %zu shared %zu %s", valid ? "" : " INVALID", stream, grid.x, grid.y,
        grid.z, threads, shared, name_of(kernel).c_str());
  return valid ? cudaSuccess : fail(cudaErrorInvalidConfiguration);
}

}  // namespace simulated

using namespace simulated;
typedef std::lock_guard<std::recursive_mutex> Guard;

// ---- streams
API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = (cudaStream_t)handle();
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }

API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  log("cudaStreamSynchronize %p", stream);
  reach_all();
  return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  log("wait stream %p event %p", stream, event);
  return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                         size_t* dependencies) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (dependencies) *dependencies = 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}

API CUresult cuStreamGetCtx(CUstream, CUcontext* context) {
  *context = (CUcontext)0x77;
  return CUDA_SUCCESS;
}

// ---- events
API cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = (cudaEvent_t)handle();
  return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Guard guard(lock);
  recorded[event] = launches;
  log("record stream %p event %p", stream, event);
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
  Guard guard(lock);
  return has_ended(event) ? cudaSuccess : cudaErrorNotReady;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Guard guard(lock);
  if (!has_ended(event)) {
    host_waits++;
    log("the host waits for event %p", event);
  }
  reach(recorded[event]);
  return cudaSuccess;
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// ---- kernels of the runtime
static int binary;
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;
static char symbols[1 << 16];

API void** __cudaRegisterFatBinary(void*) {
  static void* registered = &binary;
  return &registered;
}

API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

API void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  name_kernel(kernel, name);
}

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return cudaErrorMissingConfiguration;
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *(void**)stream = last.stream;
  return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}

API cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared,
                                            cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void**) {
  return launch(kernel, how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream);
}

API cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* kernel) {
  *out = (cudaKernel_t)kernel;
  return cudaSuccess;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                                   cudaStream_t stream) {
  return launch((const void*)kernel, grid, block, shared, stream);
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 64;
  found->ptxVersion = found->binaryVersion = capability();
  found->maxDynamicSharedSizeBytes = shared_memory();
  found->preferredShmemCarveout = -1;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                       unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = multiprocessors() / 2;
  return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  *address = symbols;
  return cudaSuccess;
}

API cudaError_t cudaGetFuncBySymbol(cudaFunction_t* out, const void* symbol) {
  *out = (cudaFunction_t)symbol;
  return cudaSuccess;
}

// ---- kernels of the driver: Triton's
API CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = (CUmodule)handle();
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}

API CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }

API CUresult cuModuleGetFunction(CUfunction* out, CUmodule, const char* name) {
  *out = (CUfunction)handle();
  name_kernel(*out, name);
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  bool threads = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : threads ? 1024 : 0;
  return CUDA_SUCCESS;
}

static CUresult launched(CUfunction kernel, dim3 grid, dim3 block, unsigned shared, CUstream stream) {
  return launch(kernel, grid, block, shared, stream) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

API CUresult cuLaunchKernel(CUfunction kernel, unsigned a, unsigned b, unsigned c, unsigned x, unsigned y, unsigned z,
                            unsigned shared, CUstream stream, void**, void**) {
  return launched(kernel, dim3{a, b, c}, dim3{x, y, z}, shared, stream);
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* how, CUfunction kernel, void**, void**) {
  dim3 grid{how->gridDimX, how->gridDimY, how->gridDimZ}, block{how->blockDimX, how->blockDimY, how->blockDimZ};
  return launched(kernel, grid, block, how->sharedMemBytes, how->hStream);
}

API CUresult cuLaunchCooperativeKernel(CUfunction kernel, unsigned a, unsigned b, unsigned c, unsigned x, unsigned y,
                                       unsigned z, unsigned shared, CUstream stream, void**) {
  return launched(kernel, dim3{a, b, c}, dim3{x, y, z}, shared, stream);
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
  *blocks = 2;
  return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = multiprocessors() / 2;
  return CUDA_SUCCESS;
}
