// What all CUDA sources of the package share.
//
// Launchers are plain C: pointers, 64-bit sizes and a stream in, the code of cudaError_t out. None of them allocates,
// synchronises, or knows of torch. The two macros are what a C++ compiler without CUDA cannot read; the tests define
// them otherwise, to run the kernels on a CPU.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#ifndef SCTD_LAUNCH
#define SCTD_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SCTD_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif
