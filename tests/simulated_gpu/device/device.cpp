// Devices: how many, what each says of itself, and errors. Settings and the log are read here too.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "simulated.h"

namespace simulated {

std::recursive_mutex lock;
std::atomic<long> launches{0}, refused{0}, host_waits{0};
thread_local int current_device = 0;
static thread_local cudaError_t last_error = cudaSuccess;

const char* text_setting(const char* name, const char* otherwise) {
  const char* value = getenv((std::string("SIMULATED_GPU_") + name).c_str());
  return value ? value : otherwise;
}

double setting(const char* name, double otherwise) {
  const char* value = text_setting(name, nullptr);
  return value ? atof(value) : otherwise;
}

int device_count() {
  static int count = (int)setting("COUNT", 1);
  return count;
}

int capability() {
  static int number = (int)setting("CAPABILITY", 90);
  return number;
}

int multiprocessors() {
  static int number = (int)setting("MULTIPROCESSORS", 132);
  return number;
}

size_t device_bytes() {
  static size_t bytes = (size_t)(setting("GB", 80) * (1ull << 30));
  return bytes;
}

size_t context_bytes() {
  static size_t bytes = (size_t)(setting("CONTEXT_MB", 500) * (1ull << 20));
  return bytes;
}

cudaError_t fail(cudaError_t error) { return last_error = error; }

void* handle() {
  static std::atomic<uintptr_t> next{0x1000};
  return (void*)(next += 0x10);
}

static FILE* log_file() {
  static const char* path = text_setting("LOG", nullptr);
  static FILE* file = path ? fopen(path, "a") : nullptr;
  return file;
}

bool logs() { return log_file(); }

void log(const char* format, ...) {
  if (!log_file()) return;
  std::lock_guard<std::recursive_mutex> guard(lock);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(log_file(), format, arguments);
  va_end(arguments);
  fputc('\n', log_file());
}

size_t shared_memory() {
  int number = capability();
  if (number == 80 || number == 87) return 163 << 10;
  if (number / 10 == 7) return 64 << 10;
  return number / 10 == 8 || number / 10 == 12 ? 99 << 10 : 227 << 10;
}

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 48 << 10;
    case cudaDevAttrTotalConstantMemory:
      return 64 << 10;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrClockRate:
      return 1980000;
    case cudaDevAttrMultiProcessorCount:
      return multiprocessors();
    case cudaDevAttrL2CacheSize:
      return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return capability() / 10 == 8 && capability() != 80 ? 1536 : 2048;
    case cudaDevAttrComputeCapabilityMajor:
      return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor:
      return capability() % 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return shared_memory() + 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return shared_memory();
    case cudaDevAttrMemoryClockRate:
      return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrTextureAlignment:
      return 512;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCooperativeLaunch:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
      return 1;
    default:
      return 0;
  }
}

static void write_name(char* text, size_t size) { snprintf(text, size, "%s", text_setting("NAME", "Simulated GPU")); }

}  // namespace simulated

using namespace simulated;

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}

API cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() {
  log("cudaDeviceSynchronize");
  reach_all();
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = (cudaMemPool_t)handle();
  return cudaSuccess;
}

API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *(uint64_t*)value = 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int device) {
  if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
  memset(found, 0, sizeof *found);
  write_name(found->name, sizeof found->name);
  found->uuid.bytes[0] = 1 + device;
  found->totalGlobalMem = device_bytes();
  found->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  found->regsPerBlock = found->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  found->warpSize = attribute(cudaDevAttrWarpSize);
  found->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  for (int i = 0; i < 3; i++) {
    found->maxThreadsDim[i] = attribute(cudaDevAttrMaxBlockDimX + i);
    found->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
  }
  found->totalConstMem = attribute(cudaDevAttrTotalConstantMemory);
  found->major = capability() / 10;
  found->minor = capability() % 10;
  found->textureAlignment = attribute(cudaDevAttrTextureAlignment);
  found->multiProcessorCount = multiprocessors();
  found->concurrentKernels = found->unifiedAddressing = found->cooperativeLaunch = found->memoryPoolsSupported = 1;
  found->pciBusID = device + 1;
  found->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  found->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  found->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  found->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  found->sharedMemPerBlockOptin = shared_memory();
  found->asyncEngineCount = 3;
  return cudaSuccess;
}

API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

API cudaError_t cudaPeekAtLastError() { return last_error; }

API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "error of the simulated GPU";
  }
}

API const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorSimulated";
}

// ---- the driver
API CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int* count) {
  *count = device_count();
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char* text, int size, CUdevice) {
  write_name(text, size);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = attribute((int)which);
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : error ? "error of the simulated GPU" : "no error";
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult, const char** text) {
  *text = "CUDA_ERROR";
  return CUDA_SUCCESS;
}
