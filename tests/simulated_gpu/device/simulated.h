// What the files of the simulated device share: settings from the environment, and its state.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#define API extern "C" __attribute__((visibility("default")))

namespace simulated {

const int MOST_DEVICES = 16;
const size_t PAGE = 2u << 20;        // device memory is given in multiples of this, as a GPU's driver gives it
const size_t COPIED_BYTES = 4u << 20;  // copies up to this size are made: flags, indices and losses, but no weights

double setting(const char* name, double otherwise);  // SIMULATED_GPU_<name>
const char* text_setting(const char* name, const char* otherwise);
int device_count();
int capability();  // 89 stands for 8.9
int multiprocessors();
size_t device_bytes();   // of each device
size_t context_bytes();  // what a process' context takes on each device

extern std::recursive_mutex lock;
extern std::atomic<long> launches, refused, host_waits;
extern thread_local int current_device;

cudaError_t fail(cudaError_t error);  // remembers the error, as cudaGetLastError reports it
void* handle();                       // a number that no other handle has
int attribute(int which);             // of every device; cudaDeviceAttr and CUdevice_attribute have the same numbers
size_t shared_memory();               // bytes that a block can ask for
bool take(int device, size_t bytes);  // counts device memory as used; false if there is not enough
void give_back(int device, size_t bytes);
void* reserve(size_t bytes);  // address space that takes no memory until it is written
void map_block(void* address, size_t bytes, int device);
void unmap_blocks(uintptr_t start, size_t bytes);
void name_kernel(const void* kernel, const char* name);
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void* stream);
void reach_all();  // all launches have ended
bool logs();
void log(const char* format, ...);

}  // namespace simulated
