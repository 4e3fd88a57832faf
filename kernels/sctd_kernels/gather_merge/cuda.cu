// Moves of whole rows, each one launch that reads and writes every number once.
//
// A row is W units, the widest of 16, 8, 4, 2 or 1 bytes that its size and the addresses allow. A block moves rows of
// one sequence; each of its threads has FLIGHT of them under way at once, to hide the latency of memory. Every row of
// an output has one writer, so nothing is atomic. Offsets are 64 bits.
//
// S positions a sequence, K kept positions a sequence, W units a row.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <initializer_list>

#include "../launch.cuh"

namespace {

constexpr int THREADS = 256, FLIGHT = 4;

// Rows of one sequence that this thread moves: first, first + step, ...
struct Rows {
  int64_t sequence, first, step;
};

__device__ Rows own_rows(unsigned parts) {
  const unsigned sequence = blockIdx.x / parts;
  return {sequence, int64_t(blockIdx.x - sequence * parts) * blockDim.y * FLIGHT + threadIdx.y, blockDim.y};
}

// Copies the given rows to the rows of `out` that this thread has; null where it has none.
template <typename Unit>
__device__ void copy(const Unit* const (&from)[FLIGHT], Unit* out, Rows rows, int64_t width) {
  for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
    Unit values[FLIGHT];
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i)
      if (from[i]) values[i] = from[i][column];
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i)
      if (from[i]) out[(rows.first + i * rows.step) * width + column] = values[i];
  }
}

// An index out of range is moved to the nearest one.
template <typename Unit>
__global__ void gather_kernel(
    const int64_t* index_BK, const Unit* hidden_BSW, Unit* out_BKW, int64_t length, int64_t keep, int64_t width,
    unsigned parts) {
  const Rows rows = own_rows(parts);
  const Unit* hidden_SW = hidden_BSW + rows.sequence * length * width;
  const Unit* from[FLIGHT];
#pragma unroll
  for (int i = 0; i < FLIGHT; ++i) {
    const int64_t k = rows.first + i * rows.step;
    int64_t index = k < keep ? index_BK[rows.sequence * keep + k] : 0;
    index = index < 0 ? 0 : index < length ? index : length - 1;
    from[i] = k < keep ? hidden_SW + index * width : nullptr;
  }
  copy(from, out_BKW + rows.sequence * keep * width, rows, width);
}

template <typename Unit>
__global__ void merge_kernel(
    const int64_t* inverse_BS, const Unit* hidden_BSW, const Unit* kept_BKW, Unit* out_BSW, int64_t length,
    int64_t keep, int64_t width, unsigned parts) {
  const Rows rows = own_rows(parts);
  const int64_t start = rows.sequence * length;
  const Unit* kept_KW = kept_BKW + rows.sequence * keep * width;
  const Unit* from[FLIGHT];
#pragma unroll
  for (int i = 0; i < FLIGHT; ++i) {
    const int64_t s = rows.first + i * rows.step;
    const int64_t rank = s < length ? inverse_BS[start + s] : -1;
    from[i] = s >= length ? nullptr : rank < 0 ? hidden_BSW + (start + s) * width : kept_KW + rank * width;
  }
  copy(from, out_BSW + start * width, rows, width);
}

template <typename Unit>
__global__ void merge_backward_kernel(
    const int64_t* inverse_BS, const Unit* grad_BSW, Unit* hidden_BSW, Unit* kept_BKW, int64_t length, int64_t keep,
    int64_t width, unsigned parts) {
  const Rows rows = own_rows(parts);
  const int64_t start = rows.sequence * length;
  Unit* kept_KW = kept_BKW + rows.sequence * keep * width;
  int64_t rank[FLIGHT];
#pragma unroll
  for (int i = 0; i < FLIGHT; ++i) {
    const int64_t s = rows.first + i * rows.step;
    rank[i] = s < length ? inverse_BS[start + s] : -1;
  }
  for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
    Unit values[FLIGHT];
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int64_t s = rows.first + i * rows.step;
      if (s < length) values[i] = grad_BSW[(start + s) * width + column];
    }
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int64_t s = rows.first + i * rows.step;
      if (s >= length) continue;
      hidden_BSW[(start + s) * width + column] = rank[i] < 0 ? values[i] : Unit{};
      if (rank[i] >= 0) kept_KW[rank[i] * width + column] = values[i];
    }
  }
}

__device__ double added(double a, double b) { return a + b; }
__device__ float added(float a, float b) { return a + b; }
__device__ __half added(__half a, __half b) { return __float2half_rn(__half2float(a) + __half2float(b)); }
__device__ __nv_bfloat16 added(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __float2bfloat16_rn(__bfloat162float(a) + __bfloat162float(b));
}

template <typename Number, int LANES>
struct alignas(sizeof(Number) * LANES) Lanes {
  Number lane[LANES];
};

// Gradient of a split: rows of `kept` added to those of `rest`, which is null where it is nothing but zeros.
template <typename Number, int LANES>
__global__ void split_backward_kernel(
    const Lanes<Number, LANES>* kept_BKW, const Lanes<Number, LANES>* rest_BSW, const int64_t* inverse_BS,
    Lanes<Number, LANES>* out_BSW, int64_t length, int64_t keep, int64_t width, unsigned parts) {
  using Unit = Lanes<Number, LANES>;
  const Rows rows = own_rows(parts);
  const int64_t start = rows.sequence * length;
  const Unit* kept_KW = kept_BKW + rows.sequence * keep * width;
  int64_t rank[FLIGHT];
#pragma unroll
  for (int i = 0; i < FLIGHT; ++i) {
    const int64_t s = rows.first + i * rows.step;
    rank[i] = s < length ? inverse_BS[start + s] : -1;
  }
  for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
    Unit kept[FLIGHT], rest[FLIGHT];
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int64_t s = rows.first + i * rows.step;
      kept[i] = rank[i] < 0 ? Unit{} : kept_KW[rank[i] * width + column];
      if (rest_BSW && s < length) rest[i] = rest_BSW[(start + s) * width + column];
    }
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int64_t s = rows.first + i * rows.step;
      if (s >= length) continue;
      if (rest_BSW && rank[i] < 0) kept[i] = rest[i];  // not 0 + rest, which is 0 where rest is -0
      if (rest_BSW && rank[i] >= 0)
        for (int lane = 0; lane < LANES; ++lane) kept[i].lane[lane] = added(kept[i].lane[lane], rest[i].lane[lane]);
      out_BSW[(start + s) * width + column] = kept[i];
    }
  }
}

// A block is one row of threads for each row of data, as many as fit; a sequence takes `parts` blocks.
struct Shape {
  dim3 grid, block;
  unsigned parts;

  Shape(int64_t batch, int64_t rows, int64_t width) {
    const int64_t across = width < THREADS ? width : THREADS, down = THREADS / across;
    const int64_t needed = (rows + down * FLIGHT - 1) / (down * FLIGHT);
    block = dim3(unsigned(across), unsigned(down));
    parts = unsigned(needed);
    grid = dim3(batch * needed > INT32_MAX ? 0 : unsigned(batch * needed));  // which the launch refuses
  }
};

int64_t widest_unit(int64_t row_bytes, std::initializer_list<const void*> states) {
  uint64_t all = uint64_t(row_bytes) | 16;
  for (const void* address : states) all |= uint64_t(address);
  return int64_t(all & -all);
}

// Launches a kernel that copies rows, for the widest unit they allow; threads are for `rows` of each sequence.
template <typename KernelFor, typename... States>
int move_rows(
    KernelFor kernel_for, int64_t batch, int64_t rows, int64_t length, int64_t keep, int64_t row_bytes, void* stream,
    const int64_t* map, States*... states) {
  const auto launch = [&](auto unit) -> int {
    using Unit = decltype(unit);
    const int64_t width = row_bytes / int64_t(sizeof(Unit));
    const Shape shape(batch, rows, width);
    const auto kernel = kernel_for(unit);
    SCTD_LAUNCH(kernel, shape.grid, shape.block, 0, stream, map, (Unit*)states..., length, keep, width, shape.parts);
    return cudaGetLastError();
  };
  switch (widest_unit(row_bytes, {states...})) {
    case 16: return launch(uint4{});
    case 8: return launch(uint2{});
    case 4: return launch(uint32_t{});
    case 2: return launch(uint16_t{});
    default: return launch(uint8_t{});
  }
}

template <typename Number, int LANES>
int split_backward(
    const void* kept_BKD, const void* rest_BSD, const int64_t* inverse_BS, void* out_BSD, int64_t batch,
    int64_t length, int64_t keep, int64_t numbers, void* stream) {
  using Unit = Lanes<Number, LANES>;
  const int64_t width = numbers / LANES;
  const Shape shape(batch, length, width);
  auto kernel = split_backward_kernel<Number, LANES>;
  SCTD_LAUNCH(
      kernel, shape.grid, shape.block, 0, stream, static_cast<const Unit*>(kept_BKD),
      static_cast<const Unit*>(rest_BSD), inverse_BS, static_cast<Unit*>(out_BSD), length, keep, width, shape.parts);
  return cudaGetLastError();
}

}  // namespace

extern "C" int sctd_gather(
    const void* hidden_BSD, const int64_t* index_BK, void* out_BKD, int64_t batch, int64_t length, int64_t keep,
    int64_t row_bytes, void* stream) {
  const auto kernel_for = [](auto unit) { return gather_kernel<decltype(unit)>; };
  return move_rows(kernel_for, batch, keep, length, keep, row_bytes, stream, index_BK, hidden_BSD, out_BKD);
}

extern "C" int sctd_merge(
    const void* hidden_BSD, const void* kept_BKD, const int64_t* inverse_BS, void* out_BSD, int64_t batch,
    int64_t length, int64_t keep, int64_t row_bytes, void* stream) {
  const auto kernel_for = [](auto unit) { return merge_kernel<decltype(unit)>; };
  return move_rows(
      kernel_for, batch, length, length, keep, row_bytes, stream, inverse_BS, hidden_BSD, kept_BKD, out_BSD);
}

extern "C" int sctd_merge_backward(
    const void* grad_BSD, const int64_t* inverse_BS, void* hidden_BSD, void* kept_BKD, int64_t batch, int64_t length,
    int64_t keep, int64_t row_bytes, void* stream) {
  const auto kernel_for = [](auto unit) { return merge_backward_kernel<decltype(unit)>; };
  return move_rows(
      kernel_for, batch, length, length, keep, row_bytes, stream, inverse_BS, grad_BSD, hidden_BSD, kept_BKD);
}

extern "C" int sctd_split_backward(
    const void* kept_BKD, const void* rest_BSD, const int64_t* inverse_BS, void* out_BSD, int64_t kind, int64_t batch,
    int64_t length, int64_t keep, int64_t numbers, void* stream) {
  const auto launch = [=](auto number) -> int {
    using Number = decltype(number);
    constexpr int LANES = 16 / sizeof(Number);
    const int64_t row_bytes = numbers * int64_t(sizeof(Number));
    const bool wide = widest_unit(row_bytes, {kept_BKD, rest_BSD, out_BSD}) == 16;
    const auto run = wide ? split_backward<Number, LANES> : split_backward<Number, 1>;
    return run(kept_BKD, rest_BSD, inverse_BS, out_BSD, batch, length, keep, numbers, stream);
  };
  switch (kind) {
    case 0: return launch(float{});
    case 1: return launch(__nv_bfloat16{});
    case 2: return launch(__half{});
    default: return launch(double{});
  }
}
