// Contexts of the driver, cuBLAS, cuDNN and NCCL: what has to answer more than "done". For each other name that
// PyTorch's libraries ask for, build.py makes a function that returns 0.
#include <dlfcn.h>

#include <cstring>
#include <string>

#include "simulated.h"

using namespace simulated;

// ---- the driver
static CUcontext context() { return (CUcontext)0x77; }

API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice) {
  *out = context();
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext* out) {
  *out = context();
  return CUDA_SUCCESS;
}

API CUresult cuCtxPopCurrent_v2(CUcontext* out) {
  *out = context();
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device;
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr*)value = address;
  else
    *(int*)value = 0;
  return CUDA_SUCCESS;
}

API CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*,
                                           CUmemAllocationGranularity_flags) {
  *bytes = PAGE;
  return CUDA_SUCCESS;
}

static CUresult done() { return CUDA_SUCCESS; }

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (!*function) *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) {
    log("no function %s in the driver", name);
    *function = (void*)done;
  }
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

API cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                        cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}

API CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t,
                                 CUdriverProcAddressQueryResult* result) {
  cudaGetDriverEntryPointByVersion(name, function, 0, 0, nullptr);
  if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}

// ---- cuBLAS
static int give_handle(void** out) {
  *out = handle();
  return 0;
}

static int give_zero(int* out) {
  *out = 0;
  return 0;
}

API int cublasCreate_v2(void** out) { return give_handle(out); }
API int cublasGetMathMode(void*, int* mode) { return give_zero(mode); }
API int cublasGetPointerMode_v2(void*, int* mode) { return give_zero(mode); }
API int cublasLtCreate(void** out) { return give_handle(out); }
API int cublasLtMatmulDescCreate(void** out, int, int) { return give_handle(out); }
API int cublasLtMatrixLayoutCreate(void** out, int, uint64_t, uint64_t, int64_t) { return give_handle(out); }
API int cublasLtMatmulPreferenceCreate(void** out) { return give_handle(out); }
API size_t cublasLtGetVersion() { return 130100; }

API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results,
                                       int* count) {
  memset(results, 0, 80);  // a cublasLtMatmulHeuristicResult_t: no workspace, success
  *count = 1;
  return 0;
}

// ---- NCCL: communicators of which nothing is communicated
API int ncclGetUniqueId(void* id) {
  memset(id, 7, 128);
  return 0;
}

API int ncclCommInitRank(void** out, int, ...) { return give_handle(out); }
API int ncclCommInitRankConfig(void** out, int, ...) { return give_handle(out); }
API int ncclCommSplit(void*, int, int, void** out, void*) { return give_handle(out); }
API int ncclCommGetAsyncError(void*, int* error) { return give_zero(error); }
API const char* ncclGetErrorString(int) { return "simulated"; }
API const char* ncclGetLastError(void*) { return ""; }

API int ncclGetVersion(int* version) {
  *version = 22809;
  return 0;
}

// ---- cuDNN: every graph is supported, by one engine, without workspace; with NO_CUDNN_PLAN=1 none has a plan
API int cudnnCreate(void** out) { return give_handle(out); }
API size_t cudnnGetVersion() { return 91900; }
API size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
API const char* cudnnGetErrorString(int) { return "simulated"; }
API int cudnnBackendCreateDescriptor(int, void** out) { return give_handle(out); }

API void cudnnGetLastErrorString(char* text, size_t size) {
  if (size) *text = 0;
}

API int cudnnGetStream(void*, void** stream) {
  *stream = nullptr;
  return 0;
}

static bool has_plans() {
  static bool plans = !setting("NO_CUDNN_PLAN", 0);
  return plans;
}

API int cudnnBackendFinalize(void*) {
  const int not_supported = 3000;
  return has_plans() ? 0 : not_supported;
}

API int cudnnBackendGetAttribute(void*, int, int type, int64_t asked, int64_t* count, void* out) {
  enum { INT64 = 3, VOID_PTR = 6, BOOLEAN = 2, DOUBLE = 5, HANDLE = 0, BACKEND_DESCRIPTOR = 15, CHAR = 24 };
  if (count) *count = 1;
  if (!out || asked < 1) return 0;
  if (type == INT64 || type == DOUBLE)
    memset(out, 0, 8);
  else if (type == BOOLEAN || type == CHAR)
    *(char*)out = 0;
  else if (type != BACKEND_DESCRIPTOR && type != HANDLE && type != VOID_PTR)
    memset(out, 0, 4);
  return 0;
}

API int cudnnBackendExecute(void*, void*, void*) {
  launches++;
  log("cudnnBackendExecute");
  return 0;
}

// Nothing runs at a fork: CUDA's own handlers would forbid its use in the child, which here costs nothing.
API int __register_atfork(void (*)(), void (*)(), void (*)(), void*) { return 0; }
