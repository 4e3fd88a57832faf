// Selection as one kernel, a block for each row; nothing is kept in device memory between its steps.
//
// A key is 64 bits, the score as an ordered integer above a hash of (row seed, position), so no two keys of a row are
// equal. The K-th largest is found digit by digit from the top, by histograms of the keys that agree with the digits
// found so far; one that leaves no choice ends the search. A prefix sum then ranks the kept and the dropped positions.
// Histograms are integer sums, so the order in which threads add does not matter: equal inputs give equal results.
//
// S positions a row, K kept positions a row, N = S - K dropped ones, V vocabulary.

#include <cuda_fp16.h>

#include "../launch.cuh"

namespace {

enum Kind : int64_t { FLOAT32, BFLOAT16, FLOAT16, IDS32, IDS64 };

struct Carry {
  const void* whole_BS;
  void* kept_BK;
  int64_t size;  // bytes of an entry: 1, 4 or 8
};

struct Job {
  const void* scores_BS;
  int64_t kind;
  const float* table_V;
  int64_t vocabulary;
  const int64_t* seed_B;
  const uint8_t *forced_keep_BS, *forced_drop_BS;
  Carry carry[2];
  int64_t *kept_BK, *dropped_BN, *inverse_BS;
  int64_t length, keep;
};

constexpr int MOST_THREADS = 1024, BINS = 256, GROUP = 16;
constexpr int64_t WITHOUT_OPT_IN = 48 * 1024;
constexpr uint32_t INFINITE = 0x7F800000, SIGN = 0x80000000;

struct Histogram {
  uint32_t bins[BINS];
  uint32_t groups[BINS / GROUP];  // sums of GROUP bins each
};

// What a digit's histogram says: the digit of the key that is sought, how many keys lie above, how many share it.
struct Found {
  uint32_t digit, above, count;
};

// The block's shared memory; behind it lie S keys, and then two counts for each thread.
struct Shared {
  Histogram histograms[2];
  Found found;
  uint32_t padding;
};
static_assert(sizeof(Shared) % sizeof(uint64_t) == 0, "keys lie behind it");

__device__ uint32_t fmix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6B;
  x ^= x >> 13;
  x *= 0xC2B2AE35;
  return x ^ (x >> 16);
}

__device__ uint32_t float_bits(const Job& job, int64_t at) {
  switch (job.kind) {
    case BFLOAT16:
      return uint32_t(static_cast<const uint16_t*>(job.scores_BS)[at]) << 16;
    case FLOAT16:
      return __float_as_uint(__half2float(static_cast<const __half*>(job.scores_BS)[at]));
    case FLOAT32:
      return static_cast<const uint32_t*>(job.scores_BS)[at];
  }
  int64_t id = job.kind == IDS32 ? static_cast<const int32_t*>(job.scores_BS)[at]
                                 : static_cast<const int64_t*>(job.scores_BS)[at];
  id = id < 0 ? 0 : id < job.vocabulary ? id : job.vocabulary - 1;
  return __float_as_uint(job.table_V[id]);
}

// Integer that orders as the score does: -0.0 as 0.0, NaN as -inf.
__device__ uint32_t ordered(const Job& job, int64_t at) {
  uint32_t bits = float_bits(job, at);
  const uint32_t magnitude = bits & ~SIGN;
  if (magnitude == 0) bits = 0;
  if (magnitude > INFINITE) bits = SIGN | INFINITE;
  if (job.forced_keep_BS && job.forced_keep_BS[at]) bits = INFINITE;
  if (job.forced_drop_BS && job.forced_drop_BS[at]) bits = SIGN | INFINITE;
  return bits & SIGN ? ~bits : bits | SIGN;
}

__device__ void clear(Histogram& histogram) {
  for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) histogram.bins[bin] = 0;
  for (int group = threadIdx.x; group < BINS / GROUP; group += blockDim.x) histogram.groups[group] = 0;
}

// Exactly one bin holds the wanted-th key from the top; the thread that looks after it says so.
__device__ void find_digit(const Histogram& histogram, uint32_t wanted, Found& found) {
  for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) {
    const uint32_t count = histogram.bins[bin];
    if (count == 0) continue;
    uint32_t above = 0;
    for (int other = bin / GROUP + 1; other < BINS / GROUP; ++other) above += histogram.groups[other];
    for (int other = bin + 1; other < (bin / GROUP + 1) * GROUP; ++other) above += histogram.bins[other];
    if (above < wanted && wanted <= above + count) found = {uint32_t(bin), above, count};
  }
}

// The least key that is kept, or a bound between it and the next below. Call with histograms[0] clear.
__device__ uint64_t threshold(Shared& shared, const uint64_t* keys, int length, uint32_t wanted) {
  uint64_t least = 0, settled = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    const int turn = shift / 8 & 1;  // one histogram is in use while the other is cleared
    Histogram& histogram = shared.histograms[turn ^ 1];
    for (int s = threadIdx.x; s < length; s += blockDim.x) {
      if ((keys[s] & settled) != least) continue;
      const uint32_t digit = keys[s] >> shift & 0xFF;
      atomicAdd(&histogram.bins[digit], 1u);
      atomicAdd(&histogram.groups[digit / GROUP], 1u);
    }
    __syncthreads();
    find_digit(histogram, wanted, shared.found);
    clear(shared.histograms[turn]);
    __syncthreads();
    const Found found = shared.found;
    least |= uint64_t(found.digit) << shift;
    settled |= uint64_t(0xFF) << shift;
    wanted -= found.above;
    if (wanted == found.count) break;  // all of them are kept
  }
  return least;
}

// Sum of the counts of all threads up to this one; `counts` has two places for each.
__device__ uint32_t running_sum(uint32_t count, uint32_t* counts) {
  const uint32_t thread = threadIdx.x, threads = blockDim.x;
  uint32_t *from = counts, *to = counts + threads;
  from[thread] = count;
  __syncthreads();
  for (uint32_t step = 1; step < threads; step *= 2) {
    count += thread < step ? 0 : from[thread - step];
    to[thread] = count;
    __syncthreads();
    uint32_t* last = from;
    from = to;
    to = last;
  }
  return count;
}

__device__ void keep_entry(const Carry& carry, int64_t from, int64_t to) {
  if (carry.size == 1) static_cast<uint8_t*>(carry.kept_BK)[to] = static_cast<const uint8_t*>(carry.whole_BS)[from];
  if (carry.size == 4) static_cast<uint32_t*>(carry.kept_BK)[to] = static_cast<const uint32_t*>(carry.whole_BS)[from];
  if (carry.size == 8) static_cast<uint64_t*>(carry.kept_BK)[to] = static_cast<const uint64_t*>(carry.whole_BS)[from];
}

__global__ void __launch_bounds__(MOST_THREADS) select_kernel(const Job job) {
  SCTD_SHARED(uint64_t, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint64_t* keys = memory + sizeof(Shared) / sizeof(uint64_t);
  uint32_t* counts = reinterpret_cast<uint32_t*>(keys + job.length);

  const int64_t row = blockIdx.x, start = row * job.length;
  const int length = int(job.length), keep = int(job.keep);
  const uint64_t seed = job.seed_B[row];
  for (int s = threadIdx.x; s < length; s += blockDim.x) {
    const uint32_t hash = fmix32(fmix32(uint32_t(s) + uint32_t(seed)) ^ uint32_t(seed >> 32));
    keys[s] = uint64_t(ordered(job, start + s)) << 32 | hash;
  }
  clear(shared.histograms[0]);
  __syncthreads();
  const uint64_t least = threshold(shared, keys, length, keep);

  // Each thread ranks a few neighbouring positions.
  const int each = (length + blockDim.x - 1) / blockDim.x;
  const int first = threadIdx.x * each, end = first + each < length ? first + each : length;
  uint32_t count = 0;
  for (int s = first; s < end; ++s) count += keys[s] >= least;
  int rank = int(running_sum(count, counts) - count);
  for (int s = first; s < end; ++s) {
    if (keys[s] < least) {
      job.inverse_BS[start + s] = -1;
      job.dropped_BN[row * (length - keep) + s - rank] = s;
      continue;
    }
    const int64_t to = row * keep + rank;
    job.inverse_BS[start + s] = rank++;
    job.kept_BK[to] = s;
    for (const Carry& carry : job.carry) keep_entry(carry, start + s, to);
  }
}

}  // namespace

extern "C" const char* sctd_error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

extern "C" int sctd_select(
    const void* scores_BS, int64_t kind, const float* table_V, int64_t vocabulary, const int64_t* seed_B,
    const uint8_t* forced_keep_BS, const uint8_t* forced_drop_BS, const void* carry0_BS, void* carried0_BK,
    int64_t size0, const void* carry1_BS, void* carried1_BK, int64_t size1, int64_t* kept_BK, int64_t* dropped_BN,
    int64_t* inverse_BS, int64_t rows, int64_t length, int64_t keep, void* stream) {
  const Carry carry[2] = {{carry0_BS, carried0_BK, size0}, {carry1_BS, carried1_BK, size1}};
  const Job job = {scores_BS, kind, table_V, vocabulary, seed_B, forced_keep_BS, forced_drop_BS, {carry[0], carry[1]},
                   kept_BK, dropped_BN, inverse_BS, length, keep};
  const int64_t threads = length < MOST_THREADS ? (length + 31) / 32 * 32 : MOST_THREADS;
  const int64_t bytes = sizeof(Shared) + length * sizeof(uint64_t) + 2 * threads * sizeof(uint32_t);
  if (bytes > WITHOUT_OPT_IN) {
    const cudaError_t code =
        cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (code != cudaSuccess) return code;
  }
  const dim3 grid(rows > INT32_MAX ? 0 : unsigned(rows));  // a grid of 0 is refused by the launch
  SCTD_LAUNCH(select_kernel, grid, dim3(unsigned(threads)), size_t(bytes), stream, job);
  return cudaGetLastError();
}
