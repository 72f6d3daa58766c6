// What scan.cu needs of CUDA, for a C++ compiler: a warp is 32 contexts that take turns, each until
// the next barrier or shuffle. One warp runs at a time, so what it shares is static.

#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>

using std::max;
using std::min;

#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
static inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static int lane_now;
static struct {
  struct {
    operator int() const { return lane_now; }
  } x;
} threadIdx;
static struct {
  int x, y;
} blockIdx, gridDim;

static ucontext_t scheduler, contexts[32];
static char stacks[32][1 << 18];
static bool finished[32];
static std::function<void()>* kernel_now;
static unsigned exchanged[32];

static inline void __syncwarp() {
  int lane = lane_now;
  swapcontext(&contexts[lane], &scheduler);
  lane_now = lane;
}

template <class T>
static T read_lane(T mine, int lane) {
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  memcpy(&exchanged[lane_now], &mine, 4);
  __syncwarp();
  T found;
  memcpy(&found, &exchanged[lane], 4);
  __syncwarp();
  return found;
}
template <class T>
static T __shfl_xor_sync(unsigned, T x, int mask) {
  return read_lane(x, lane_now ^ mask);
}
template <class T>
static T __shfl_sync(unsigned, T x, int lane) {
  return read_lane(x, lane);
}

static void run_lane() {
  (*kernel_now)();
  finished[lane_now] = true;
  swapcontext(&contexts[lane_now], &scheduler);
}

static void run_grid(int columns, int rows, std::function<void()> kernel) {
  kernel_now = &kernel;
  gridDim = {columns, rows};
  for (int block = 0; block < columns * rows; block++) {
    blockIdx = {block % columns, block / columns};
    for (int lane = 0; lane < 32; lane++) {
      getcontext(&contexts[lane]);
      contexts[lane].uc_stack.ss_sp = stacks[lane];
      contexts[lane].uc_stack.ss_size = sizeof(stacks[lane]);
      finished[lane] = false;
      makecontext(&contexts[lane], run_lane, 0);
    }
    for (int running = 32; running > 0;) {
      for (lane_now = 0; lane_now < 32; lane_now++) {
        int lane = lane_now;
        if (finished[lane]) continue;
        swapcontext(&scheduler, &contexts[lane]);
        lane_now = lane;
        if (finished[lane]) running--;
      }
    }
  }
}

// The instructions that scan.cu writes in assembly.

static inline float exp2_to_zero(float x) {
  float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.f : y;
}
static inline float from_half(unsigned short bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return x;
}
static inline unsigned to_half(float x) {
  _Float16 y = x;
  unsigned short bits;
  memcpy(&bits, &y, 2);
  return bits;
}
static inline unsigned to_bfloat16(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
