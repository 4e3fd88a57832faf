// As much of CUDA as the kernels use, on one CPU thread: a shim for tests, found in place of the real header.
//
// Each thread of a block is a fiber with a stack of its own, and blocks run one after another. Between two barriers a
// fiber runs on without a break; the order in which fibers (and blocks) take turns can be reversed, so that a missing
// barrier shows. Shared memory starts as garbage and ends in a guard. Nothing is said of real memory ordering or speed.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorUnknown };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace host {

constexpr size_t STACK = 64 * 1024, GUARD = 64;
constexpr unsigned char GARBAGE = 0xCD;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  bool done;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void()> body;
inline std::vector<uint64_t> shared;  // words, for their alignment
inline std::map<const void*, size_t> opted_in;
inline cudaError_t last_error = cudaSuccess;
inline bool reversed = false;

inline void enter() {
  body();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

// Every fiber up to its next barrier or its end, which all must reach alike. False where they do not.
inline bool advance(unsigned threads) {
  unsigned ended = 0;
  for (unsigned turn = 0; turn < threads; ++turn) {
    const unsigned thread = reversed ? threads - 1 - turn : turn;
    running = &fibers[thread];
    threadIdx = dim3(thread % blockDim.x, thread / blockDim.x);
    swapcontext(&scheduler, &running->context);
    ended += running->done;
  }
  return ended == 0 || ended == threads;
}

inline bool run_block(size_t bytes) {
  const unsigned threads = blockDim.x * blockDim.y;
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  for (unsigned thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, enter, 0);
  }
  shared.assign((bytes + GUARD + 7) / 8, 0);
  unsigned char* memory = reinterpret_cast<unsigned char*>(shared.data());
  memset(memory, GARBAGE, bytes + GUARD);
  do {
    if (!advance(threads)) return false;
  } while (!fibers[0].done);
  for (size_t at = bytes; at < bytes + GUARD; ++at)
    if (memory[at] != GARBAGE) return false;
  return true;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes, Arguments... arguments) {
  const size_t allowed = opted_in.count((void*)kernel) ? opted_in[(void*)kernel] : 48 * 1024;
  const unsigned threads = block.x * block.y;
  if (grid.x == 0 || threads == 0 || threads > 1024) last_error = cudaErrorInvalidConfiguration;
  if (bytes > allowed) last_error = cudaErrorInvalidValue;
  if (last_error != cudaSuccess) return;
  gridDim = grid;
  blockDim = block;
  body = [&] { kernel(arguments...); };
  for (unsigned turn = 0; turn < grid.x && last_error == cudaSuccess; ++turn) {
    blockIdx = dim3(reversed ? grid.x - 1 - turn : turn);
    if (!run_block(bytes)) last_error = cudaErrorUnknown;
  }
}

}  // namespace host

// 1: threads and blocks take their turns from the last to the first.
extern "C" __attribute__((used)) inline void sctd_host_reverse(int on) { host::reversed = on; }

#define SCTD_LAUNCH(kernel, grid, block, shared, stream, ...) host::launch(kernel, grid, block, shared, __VA_ARGS__)
#define SCTD_SHARED(type, name) type* name = reinterpret_cast<type*>(host::shared.data())

inline void __syncthreads() { swapcontext(&host::running->context, &host::scheduler); }

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  host::opted_in[(void*)kernel] = bytes;
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t code = host::last_error;
  host::last_error = cudaSuccess;
  return code;
}

inline const char* cudaGetErrorString(cudaError_t code) {
  if (code == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return code == cudaErrorInvalidValue ? "invalid argument" : "threads part at a barrier, or leave their shared memory";
}
