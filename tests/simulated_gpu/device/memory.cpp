// Memory: device memory is address space that is never written, so it costs nothing; what is counted is real.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <unordered_map>
#include <utility>

#include "simulated.h"

namespace simulated {

enum Kind { DEVICE, PINNED, REGISTERED };

struct Block {
  size_t bytes;
  int device;
  Kind kind;
};

static std::map<uintptr_t, Block> blocks;
static size_t used[MOST_DEVICES], most[MOST_DEVICES];
static size_t pinned, most_pinned;
static bool ones = false;      // whether a copy of one byte to the host reads 1
static long left_to_take = -1;  // device allocations that still succeed; -1: all that fit

static size_t pinnable() {
  static double bytes = setting("PINNED_GB", 1e6) * (1ull << 30);
  return (size_t)bytes;
}

static size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

static Block* find(const void* address) {
  auto it = blocks.upper_bound((uintptr_t)address);
  if (it == blocks.begin()) return nullptr;
  --it;
  return (uintptr_t)address < it->first + it->second.bytes ? &it->second : nullptr;
}

bool take(int device, size_t bytes) {
  if (left_to_take == 0 || used[device] + bytes + context_bytes() > device_bytes()) {
    refused++;
    log("device memory %zu REFUSED", bytes);
    return false;
  }
  if (left_to_take > 0) left_to_take--;
  used[device] += bytes;
  if (used[device] > most[device]) most[device] = used[device];
  return true;
}

void give_back(int device, size_t bytes) { used[device] -= bytes; }

void* reserve(size_t bytes) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* start = mmap(nullptr, whole_pages(bytes) + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  return (void*)whole_pages((size_t)start);  // what lies before stays mapped: address space is plenty
}

void map_block(void* address, size_t bytes, int device) { blocks[(uintptr_t)address] = {bytes, device, DEVICE}; }

void unmap_blocks(uintptr_t start, size_t bytes) {
  auto it = blocks.lower_bound(start);
  while (it != blocks.end() && it->first < start + bytes) it = blocks.erase(it);
}

static const char* place(const void* address) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  Block* block = find(address);
  return !block ? "pageable" : block->kind == DEVICE ? "device" : "pinned";
}

static cudaError_t copy(const char* call, void* to, const void* from, size_t bytes, void* stream) {
  const char *source = place(from), *target = place(to);
  log("%s %zu %s->%s stream %p", call, bytes, source, target, stream);
  if (bytes == 1 && ones && *source == 'd' && *target != 'd')
    *(char*)to = 1;
  else if (bytes <= COPIED_BYTES)
    memmove(to, from, bytes);
  return cudaSuccess;
}

static cudaError_t pin(void* address, size_t bytes, Kind kind) {
  if (pinned + bytes > pinnable()) {
    log("pinned memory %zu REFUSED", bytes);
    return fail(cudaErrorMemoryAllocation);
  }
  blocks[(uintptr_t)address] = {bytes ? bytes : 1, current_device, kind};
  pinned += bytes;
  if (pinned > most_pinned) most_pinned = pinned;
  log("pinned memory %zu", bytes);
  return cudaSuccess;
}

}  // namespace simulated

using namespace simulated;
typedef std::lock_guard<std::recursive_mutex> Guard;

// ---- what tests read and set
API size_t simulated_gpu_used(int device) { return used[device]; }
API size_t simulated_gpu_most(int device) { return most[device]; }
API void simulated_gpu_reset_most(int device) { most[device] = used[device]; }
API size_t simulated_gpu_most_pinned() { return most_pinned; }
API long simulated_gpu_launches() { return launches; }
API long simulated_gpu_refused() { return refused; }
API long simulated_gpu_host_waits() { return host_waits; }
API void simulated_gpu_answer_ones(int on) { ones = on; }
API void simulated_gpu_refuse_after(long allocations) { left_to_take = allocations; }

// Host memory of any size in 64 MB of real memory, the same again and again: for weights whose values do not matter.
API void* simulated_gpu_repeated(size_t bytes) {
  const size_t part = 64u << 20;
  static int file = -1;
  if (file < 0) {
    file = memfd_create("repeated", 0);
    if (file < 0 || ftruncate(file, part)) return nullptr;
  }
  char* start = (char*)mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  for (size_t at = 0; at < bytes; at += part) {
    size_t length = bytes - at < part ? bytes - at : part;
    mmap(start + at, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
  }
  return start;
}

// ---- CUDA's runtime
API cudaError_t cudaMalloc(void** out, size_t bytes) {
  Guard guard(lock);
  size_t whole = whole_pages(bytes);
  if (!take(current_device, whole)) return fail(cudaErrorMemoryAllocation);
  void* address = reserve(bytes);
  if (!address) {
    give_back(current_device, whole);
    return fail(cudaErrorMemoryAllocation);
  }
  blocks[(uintptr_t)address] = {whole, current_device, DEVICE};
  *out = address;
  log("cudaMalloc %zu", bytes);
  return cudaSuccess;
}

API cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  Guard guard(lock);
  auto it = blocks.find((uintptr_t)address);
  if (it == blocks.end()) return fail(cudaErrorInvalidValue);
  give_back(it->second.device, it->second.bytes);
  munmap(address, it->second.bytes);
  log("cudaFree %zu", it->second.bytes);
  blocks.erase(it);
  return cudaSuccess;
}

API cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) { return cudaMalloc(out, bytes); }
API cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
API cudaError_t cudaMallocManaged(void** out, size_t bytes, unsigned) { return cudaMalloc(out, bytes); }

API cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  Guard guard(lock);
  void* address = reserve(bytes);
  if (!address) return fail(cudaErrorMemoryAllocation);
  cudaError_t error = pin(address, bytes, PINNED);
  if (error) munmap(address, whole_pages(bytes));
  if (!error) *out = address;
  return error;
}

API cudaError_t cudaFreeHost(void* address) {
  Guard guard(lock);
  auto it = blocks.find((uintptr_t)address);
  if (it == blocks.end()) return fail(cudaErrorInvalidValue);
  pinned -= it->second.bytes;
  munmap(address, it->second.bytes);
  blocks.erase(it);
  return cudaSuccess;
}

API cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  Guard guard(lock);
  if (find(address)) return fail(cudaErrorHostMemoryAlreadyRegistered);
  return pin(address, bytes, REGISTERED);
}

API cudaError_t cudaHostUnregister(void* address) {
  Guard guard(lock);
  auto it = blocks.find((uintptr_t)address);
  if (it == blocks.end() || it->second.kind != REGISTERED) return fail(cudaErrorHostMemoryNotRegistered);
  pinned -= it->second.bytes;
  blocks.erase(it);
  return cudaSuccess;
}

API cudaError_t cudaHostGetDevicePointer(void** out, void* address, unsigned) {
  *out = address;
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  Guard guard(lock);
  memset(found, 0, sizeof *found);
  Block* block = find(address);
  bool on_device = block && block->kind == DEVICE;
  found->type = !block ? cudaMemoryTypeUnregistered : on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  found->device = block ? block->device : -2;
  found->devicePointer = block ? (void*)address : nullptr;
  found->hostPointer = block && !on_device ? (void*)address : nullptr;
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  Guard guard(lock);
  *total = device_bytes();
  *unused = device_bytes() - context_bytes() - used[current_device];
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return copy("cudaMemcpy", to, from, bytes, nullptr);
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy("cudaMemcpyAsync", to, from, bytes, stream);
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy("cudaMemcpyPeerAsync", to, from, bytes, stream);
}

API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t height, cudaMemcpyKind, cudaStream_t stream) {
  log("cudaMemcpy2DAsync %zu stream %p", width * height, stream);
  for (size_t row = 0; row < height && width * height <= COPIED_BYTES; row++)
    memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  return cudaSuccess;
}

API cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  if (bytes <= COPIED_BYTES) memset(address, value, bytes);
  return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  log("cudaMemsetAsync %zu stream %p", bytes, stream);
  return cudaMemset(address, value, bytes);
}

// ---- the driver, as PyTorch's expandable segments ask it
static std::unordered_map<uintptr_t, std::pair<size_t, int>> physical;

API CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) { return (CUresult)cudaMalloc((void**)out, bytes); }
API CUresult cuMemFree_v2(CUdeviceptr address) { return (CUresult)cudaFree((void*)address); }

#undef cuMemAddressReserve
API CUresult cuMemAddressReserve(CUdeviceptr* out, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  void* address = reserve(bytes);
  *out = (CUdeviceptr)address;
  return address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

API CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
  munmap((void*)address, bytes);
  return CUDA_SUCCESS;
}

API CUresult cuMemCreate(CUmemGenericAllocationHandle* out, size_t bytes, const CUmemAllocationProp* properties,
                         unsigned long long) {
  Guard guard(lock);
  int device = properties->location.id;
  if (!take(device, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  *out = (CUmemGenericAllocationHandle)handle();
  physical[*out] = {bytes, device};
  return CUDA_SUCCESS;
}

API CUresult cuMemRelease(CUmemGenericAllocationHandle which) {
  Guard guard(lock);
  auto it = physical.find(which);
  if (it == physical.end()) return CUDA_ERROR_INVALID_VALUE;
  give_back(it->second.second, it->second.first);
  physical.erase(it);
  return CUDA_SUCCESS;
}

API CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t, CUmemGenericAllocationHandle which,
                      unsigned long long) {
  Guard guard(lock);
  map_block((void*)address, bytes, physical[which].second);
  return CUDA_SUCCESS;
}

API CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
  Guard guard(lock);
  unmap_blocks((uintptr_t)address, bytes);
  return CUDA_SUCCESS;
}
