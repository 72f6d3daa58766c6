// Selective scan with 16 states for many sequences: forward and backward, one warp a program.
//
// Compiled at run time (nvrtc.py) with ELEMENT one of 0 float, 1 bfloat16, 2 float16, and the flags
// GRID_ORDER, HAS_INDEX, PADDED, HAS_D, HAS_BIAS, SOFTPLUS, SAVE, SEGMENTED, and SPLIT. The maths and the letters
// stand in ops/README.md. Where Triton's kernels hold a chunk's states in registers and run short of
// them, these hold them in shared memory, and load the next steps while they work on the present
// ones. Channels come in whole blocks of 32, rows aligned to 16 bytes: warp_scan.py sees to it.

#ifndef SPLIT
#define SPLIT 1  // lanes that share a channel in the forward pass: 1, 2 or 4
#endif
#define N 16
#define WARP 32
#define CHUNK_STEPS 64  // steps between two kept states
#define GROUP 8  // steps staged together: a lane loads 8 channels of row lane / 4
#define FULL 0xffffffffu
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

typedef long long i64;
typedef unsigned int u32;

// Outputs in float16 saturate: an infinity would make a loss non-finite that float32 keeps finite.
// Gradients do not: an infinity there is what tells a gradient scaler to take a smaller scale.

// Eight neighbouring channels of a row, as they lie in memory.
#if ELEMENT == 0
typedef float element;
struct Eight {
  float4 x, y;
};
#else
typedef unsigned short element;
struct Eight {
  uint4 x;
};
#endif

__device__ __forceinline__ Eight load_eight(const element* p) {
  return *reinterpret_cast<const Eight*>(p);
}

#if ELEMENT == 0
__device__ __forceinline__ void unpack(const Eight& from, float* to) {
  to[0] = from.x.x, to[1] = from.x.y, to[2] = from.x.z, to[3] = from.x.w;
  to[4] = from.y.x, to[5] = from.y.y, to[6] = from.y.z, to[7] = from.y.w;
}
template <bool SATURATE>
__device__ __forceinline__ Eight pack(const float* x) {
  return {make_float4(x[0], x[1], x[2], x[3]), make_float4(x[4], x[5], x[6], x[7])};
}
#else
__device__ __forceinline__ void unpack_two(u32 from, float* to) {
#if ELEMENT == 1
  to[0] = __uint_as_float(from << 16);
  to[1] = __uint_as_float(from & 0xffff0000u);
#else
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(to[0]), "=f"(to[1])
      : "r"(from));
#endif
}
template <bool SATURATE>
__device__ __forceinline__ u32 pack_two(float low, float high) {
  u32 r;
#if ELEMENT == 1
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  if (SATURATE) {
    low = low > 65504.f ? 65504.f : (low < -65504.f ? -65504.f : low);
    high = high > 65504.f ? 65504.f : (high < -65504.f ? -65504.f : high);
  }
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
__device__ __forceinline__ void unpack(const Eight& from, float* to) {
  unpack_two(from.x.x, to);
  unpack_two(from.x.y, to + 2);
  unpack_two(from.x.z, to + 4);
  unpack_two(from.x.w, to + 6);
}
template <bool SATURATE>
__device__ __forceinline__ Eight pack(const float* x) {
  return {make_uint4(pack_two<SATURATE>(x[0], x[1]), pack_two<SATURATE>(x[2], x[3]),
                     pack_two<SATURATE>(x[4], x[5]), pack_two<SATURATE>(x[6], x[7]))};
}
#endif

__device__ __forceinline__ void put_eight(float* to, const float* x) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void get_eight(const float* from, float* x) {
  float4 low = reinterpret_cast<const float4*>(from)[0];
  float4 high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void get_four(const float* from, float* x) {
  float4 four = *reinterpret_cast<const float4*>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float step_size(float x) {
#if SOFTPLUS
  // log(1 + exp(x)) to 3e-7 relative, for small steps too.
  float q = exp2_fast(-fabsf(x) * LOG2E);
  float p = fmaf(q, -0.008574676204479785f, 0.0442141923369347f);
  p = fmaf(p, q, -0.10785367917003512f);
  p = fmaf(p, q, 0.17757023992166363f);
  p = fmaf(p, q, -0.24499611724493794f);
  p = fmaf(p, q, 0.33276176571502103f);
  p = fmaf(p, q, -0.49997449384834663f);
  p = fmaf(p, q, 0.9999998102178483f);
  return fmaf(p, q, x > 0.f ? x : 0.f);
#else
  return x;
#endif
}

// d delta / d dt, from delta: sigmoid(x) = 1 - exp(-softplus(x)), without cancellation when small.
__device__ __forceinline__ float softplus_grad(float delta) {
#if SOFTPLUS
  float d = delta;
  float p = fmaf(d, -1.f / 720.f, 1.f / 120.f);
  p = fmaf(p, d, -1.f / 24.f);
  p = fmaf(p, d, 1.f / 6.f);
  p = fmaf(p, d, -0.5f);
  p = fmaf(p, d, 1.f);
  return d < 0.25f ? d * p : 1.f - exp2_fast(-d * LOG2E);
#else
  return 1.f;
#endif
}

// One sequence: image b, direction k, a block of 32 channels, a segment of time.
struct Sequence {
  int lane, k, block, segment;
  i64 b, bk;
};

__device__ __forceinline__ Sequence locate(int K, int blocks) {
  Sequence s;
  s.lane = threadIdx.x;
  s.block = blockIdx.x % blocks;
  s.bk = blockIdx.x / blocks;
  s.b = s.bk / K;
  s.k = s.bk % K;
  s.segment = blockIdx.y;
  return s;
}

struct Strides {  // of image, direction and step
  i64 b, k;
  int t;
};

// An array of rows [step, channel], seen from one sequence: the lane's eight channels of row 0.
__device__ __forceinline__ const element* rows_of(
    const element* p, const Strides& st, const Sequence& s, int eight) {
  return p + s.b * st.b + s.k * st.k + eight * 8;
}

// The row that the lane loads in a group of steps, and the token it writes; -1 for none.
struct Row {
  int row, token;
};

__device__ __forceinline__ Row locate_row(const int* index, int first, int end, int step) {
  int t = first + step;
  bool inside = t < end;
  int token = t;
#if HAS_INDEX
  token = index[inside ? t : end - 1];
#endif
  Row r;
  r.token = inside ? token : -1;
#if GRID_ORDER
  r.row = r.token;
#else
  r.row = inside ? t : -1;
#endif
  return r;
}

// A row to load from: rows that do not count are read from row 0, and made harmless afterwards.
__device__ __forceinline__ int safe(int row) { return row < 0 ? 0 : row; }

// delta of eight channels. Past the end it is 0, which leaves a state alone; a padded step of
// inputs in grid order has dt = 0.
__device__ __forceinline__ void step_sizes(
    const Eight& dt, const float* bias, int row, bool inside, float* delta) {
  unpack(dt, delta);
#pragma unroll
  for (int i = 0; i < 8; i++) {
#if GRID_ORDER && PADDED
    delta[i] = row < 0 ? 0.f : delta[i];
#endif
    delta[i] = step_size(delta[i] + bias[i]);
    delta[i] = inside ? delta[i] : 0.f;
  }
}

__device__ __forceinline__ void inputs(const Eight& u, int row, float* x) {
  unpack(u, x);
#if GRID_ORDER && PADDED
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = row < 0 ? 0.f : x[i];
#endif
}

// Of eight channels, from the first of them on.
__device__ __forceinline__ void load_bias(const float* dt_bias, int first, float* bias) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    bias[i] = 0.f;
#if HAS_BIAS
    bias[i] = dt_bias[first + i];
#endif
  }
}

// Of 4 values a lane, summed over the lanes that differ from it in these two bits, every lane gets one.
template <int FIRST, int SECOND>
__device__ __forceinline__ float sum_four(const float* v, int lane) {
  float w[2];
  bool up = lane & FIRST;
#pragma unroll
  for (int i = 0; i < 2; i++)
    w[i] = (up ? v[i + 2] : v[i]) + __shfl_xor_sync(FULL, up ? v[i] : v[i + 2], FIRST);
  up = lane & SECOND;
  return (up ? w[1] : w[0]) + __shfl_xor_sync(FULL, up ? w[0] : w[1], SECOND);
}

// Forward: SPLIT lanes share a channel, each with some of its states. One lane a channel does the
// least work; more of them make more warps of few sequences, each through its steps in less time.
#define CHANNELS (WARP / SPLIT)  // of a warp: lane = part * CHANNELS + channel
#define PART (N / SPLIT)         // states of a lane
#define EIGHTS (CHANNELS / 8)    // of a row: a lane loads one, of row lane / EIGHTS
#define FORWARD_GROUP (GROUP * SPLIT)
constexpr int UNROLLED = GROUP / SPLIT;  // so that 8 steps are

// Of one value a step from each of SPLIT steps, summed over the lanes of a channel, every lane gets
// the step `own_step`.
__device__ __forceinline__ int own_step(int lane) {
  return SPLIT == 1 ? 0 : SPLIT == 2 ? lane >> 4 : ((lane >> 3) & 1) * 2 + ((lane >> 4) & 1);
}

__device__ __forceinline__ float sum_parts(const float* v, int lane) {
#if SPLIT == 1
  return v[0];
#elif SPLIT == 2
  bool up = lane & 16;
  return (up ? v[1] : v[0]) + __shfl_xor_sync(FULL, up ? v[0] : v[1], 16);
#else
  return sum_four<8, 16>(v, lane);
#endif
}

// With `ends`, only the state that a segment reaches and the sum of its step sizes are wanted.
template <bool ENDS>
__device__ __forceinline__ void forward(
    const element* u, const element* dt, const float* A, const element* B, const element* C,
    const float* D, const float* dt_bias, const int* index, element* y, float* states,
    const float* starts, float* ends, float* sums, const Strides& u_s, const Strides& dt_s,
    const Strides& B_s, const Strides& C_s, int K, int blocks, int steps, int length, int channels,
    int chunks, int segment_chunks, int segments) {
  __shared__ __align__(16) float s_delta[FORWARD_GROUP][CHANNELS], s_u[FORWARD_GROUP][CHANNELS];
  __shared__ __align__(16) float s_bc[FORWARD_GROUP][2 * N];
#if SPLIT == 1
  auto& s_y = s_u;
#else
  // Apart from the inputs: the compiler may then load those of the next steps before it stores.
  __shared__ __align__(16) float s_y[FORWARD_GROUP][CHANNELS];
#endif
  Sequence s = locate(K, blocks);
  int eight = s.lane % EIGHTS, step = s.lane / EIGHTS;  // what the lane loads of u and dt
  int bc_eight = s.lane & 3, bc_step = s.lane >> 2;  // and of B and C, in each SPLIT of a group
  int place = s.lane % CHANNELS, part = s.lane / CHANNELS, base = s.block * CHANNELS;
  int channel = base + place;
  const element* p_u = rows_of(u, u_s, s, base / 8 + eight);
  const element* p_dt = rows_of(dt, dt_s, s, base / 8 + eight);
  bool loads_B = ENDS || bc_eight < 2;
  const element* p_bc = loads_B ? rows_of(B, B_s, s, bc_eight & 1) : rows_of(C, C_s, s, bc_eight & 1);
  int bc_t = loads_B ? B_s.t : C_s.t;
  element* p_y = y + s.bk * (i64)length * channels + base + eight * 8;
#if HAS_INDEX
  index += (i64)s.k * steps;
#endif
  float a[PART], h[PART], bias[8], skip = 0.f, sum = 0.f;
  load_bias(dt_bias, s.k * channels + base + eight * 8, bias);
#if HAS_D
  if (!ENDS && part == 0) skip = D[s.k * channels + channel];
#endif
  i64 segment = s.bk * segments + s.segment;
#pragma unroll
  for (int i = 0; i < PART; i++) {
    a[i] = A[((i64)s.k * channels + channel) * N + part * PART + i] * LOG2E;
    h[i] = 0.f;
#if SEGMENTED
    if (!ENDS) h[i] = starts[(segment * N + part * PART + i) * channels + channel];
#endif
  }
  int first = s.segment * segment_chunks * CHUNK_STEPS;
  int end = min(steps, first + segment_chunks * CHUNK_STEPS);

  Eight next_u, next_dt, next_bc[SPLIT];
  auto load = [&](const Row& row) {
    next_u = load_eight(p_u + (i64)safe(row.row) * u_s.t);
    next_dt = load_eight(p_dt + (i64)safe(row.row) * dt_s.t);
#pragma unroll
    for (int i = 0; i < SPLIT; i++) {
      int bc_row = row.row;
#if SPLIT > 1
      bc_row = __shfl_sync(FULL, row.row, (bc_step + i * GROUP) * EIGHTS);
#endif
      next_bc[i] = load_eight(p_bc + (i64)safe(bc_row) * bc_t);
    }
  };
  struct StepInputs {
    float delta, input, b[PART], c[PART];
  };
  auto read = [&](int j, StepInputs* in) {  // SPLIT steps from j on
#pragma unroll
    for (int i_s = 0; i_s < SPLIT; i_s++) {
      in[i_s].delta = s_delta[j + i_s][place], in[i_s].input = s_u[j + i_s][place];
#pragma unroll
      for (int i = 0; i < PART; i += 4) {
        get_four(&s_bc[j + i_s][part * PART + i], in[i_s].b + i);
        if (!ENDS) get_four(&s_bc[j + i_s][N + part * PART + i], in[i_s].c + i);
      }
    }
  };
  auto walk = [&](const StepInputs* in, float* step_sums) {
#pragma unroll
    for (int i_s = 0; i_s < SPLIT; i_s++) {
      float delta = in[i_s].delta, input = in[i_s].input, drive = delta * input;
      float out[4] = {skip * input, 0.f, 0.f, 0.f};
      sum += delta;
#pragma unroll
      for (int n = 0; n < PART; n++) {
        h[n] = fmaf(exp2_fast(delta * a[n]), h[n], drive * in[i_s].b[n]);
        if (!ENDS) out[n % 4] = fmaf(h[n], in[i_s].c[n], out[n % 4]);
      }
      step_sums[i_s] = (out[0] + out[1]) + (out[2] + out[3]);
    }
  };
  Row row = locate_row(index, first, end, step);
  Row ahead = locate_row(index, first + FORWARD_GROUP, end, step);
  load(row);
  for (int t0 = first; t0 < end; t0 += FORWARD_GROUP) {
#if SAVE
    if (!ENDS && t0 % CHUNK_STEPS == 0) {
#pragma unroll
      for (int i = 0; i < PART; i++)
        states[((s.bk * chunks + t0 / CHUNK_STEPS) * N + part * PART + i) * channels + channel] = h[i];
    }
#endif
    float x[8];
    step_sizes(next_dt, bias, row.row, t0 + step < end, x);
    put_eight(&s_delta[step][eight * 8], x);
    inputs(next_u, row.row, x);
    put_eight(&s_u[step][eight * 8], x);
#pragma unroll
    for (int i = 0; i < SPLIT; i++) {
      unpack(next_bc[i], x);
      put_eight(&s_bc[bc_step + i * GROUP][bc_eight * 8], x);
    }
    int token = row.token;
    row = ahead;
    load(row);
    ahead = locate_row(index, t0 + 2 * FORWARD_GROUP, end, step);
    __syncwarp();
    StepInputs now[SPLIT], next[SPLIT];
    float sums_now[SPLIT];
    read(0, next);
#pragma unroll UNROLLED
    for (int j = 0; j < FORWARD_GROUP; j += SPLIT) {
#if SPLIT == 1
      read(j, now);
      walk(now, sums_now);
      if (!ENDS) s_y[j][place] = sums_now[0];
#else
      // A shuffle is a barrier to the compiler: the next inputs are read before it.
#pragma unroll
      for (int i = 0; i < SPLIT; i++) now[i] = next[i];
      read(min(j + SPLIT, FORWARD_GROUP - SPLIT), next);
      if (!ENDS && j > 0) s_y[j - SPLIT + own_step(s.lane)][place] = sum_parts(sums_now, s.lane);
      walk(now, sums_now);
#endif
    }
#if SPLIT > 1
    if (!ENDS)
      s_y[FORWARD_GROUP - SPLIT + own_step(s.lane)][place] = sum_parts(sums_now, s.lane);
#endif
    __syncwarp();
    if (!ENDS) {
      get_eight(&s_y[step][eight * 8], x);
      if (token >= 0) *reinterpret_cast<Eight*>(p_y + (i64)token * channels) = pack<true>(x);
      __syncwarp();
    }
  }
  if (ENDS) {
#pragma unroll
    for (int i = 0; i < PART; i++)
      ends[(segment * N + part * PART + i) * channels + channel] = h[i];
    if (part == 0) sums[segment * channels + channel] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(WARP) scan_forward(
    const element* u, const element* dt, const float* A, const element* B, const element* C,
    const float* D, const float* dt_bias, const int* index, element* y, float* states,
    const float* starts, i64 u_b, i64 u_k, int u_t, i64 dt_b, i64 dt_k, int dt_t, i64 B_b, i64 B_k,
    int B_t, i64 C_b, i64 C_k, int C_t, int K, int blocks, int steps, int length, int channels,
    int chunks, int segment_chunks, int segments) {
  forward<false>(u, dt, A, B, C, D, dt_bias, index, y, states, starts, nullptr, nullptr,
                 {u_b, u_k, u_t}, {dt_b, dt_k, dt_t}, {B_b, B_k, B_t}, {C_b, C_k, C_t}, K, blocks,
                 steps, length, channels, chunks, segment_chunks, segments);
}

extern "C" __global__ void __launch_bounds__(WARP) segment_end(
    const element* u, const element* dt, const float* A, const element* B, const float* dt_bias,
    const int* index, float* ends, float* sums, i64 u_b, i64 u_k, int u_t, i64 dt_b, i64 dt_k,
    int dt_t, i64 B_b, i64 B_k, int B_t, int K, int blocks, int steps, int channels, int segment_chunks, int segments) {
  forward<true>(u, dt, A, B, B, nullptr, dt_bias, index, nullptr, nullptr, nullptr, ends, sums,
                {u_b, u_k, u_t}, {dt_b, dt_k, dt_t}, {B_b, B_k, B_t}, {B_b, B_k, B_t}, K, blocks,
                steps, 0, channels, 0, segment_chunks, segments);
}

// What a segment passes back to the one before it when nothing reaches it from behind.
extern "C" __global__ void __launch_bounds__(WARP) segment_carry(
    const element* dy, const element* dt, const float* A, const element* C, const float* dt_bias,
    const int* index, float* ends, float* sums, i64 dy_b, i64 dy_k, int dy_t, i64 dt_b, i64 dt_k,
    int dt_t, i64 C_b, i64 C_k, int C_t, int K, int blocks, int steps, int channels, int segment_chunks, int segments) {
  __shared__ __align__(16) float s_delta[GROUP][WARP], s_dy[GROUP][WARP], s_c[GROUP][N];
  Sequence s = locate(K, blocks);
  int eight = s.lane & 3, step = s.lane >> 2, channel = s.block * WARP + s.lane;
  const element* p_dy = rows_of(dy, {dy_b, dy_k, dy_t}, s, s.block * 4 + eight);
  const element* p_dt = rows_of(dt, {dt_b, dt_k, dt_t}, s, s.block * 4 + eight);
  const element* p_c = rows_of(C, {C_b, C_k, C_t}, s, eight & 1);
#if HAS_INDEX
  index += (i64)s.k * steps;
#endif
  float a[N], carry[N], bias[8], sum = 0.f;
  load_bias(dt_bias, s.k * channels + s.block * WARP + eight * 8, bias);
#pragma unroll
  for (int n = 0; n < N; n++) {
    a[n] = A[((i64)s.k * channels + channel) * N + n] * LOG2E;
    carry[n] = 0.f;
  }
  int first = s.segment * segment_chunks * CHUNK_STEPS;
  int end = min(steps, first + segment_chunks * CHUNK_STEPS);
  int t0 = first + (end - first - 1) / GROUP * GROUP;
  Row row = locate_row(index, t0, end, step);
  Eight next_dy = load_eight(p_dy + (i64)safe(row.token) * dy_t);
  Eight next_dt = load_eight(p_dt + (i64)safe(row.row) * dt_t);
  Eight next_c = load_eight(p_c + (i64)safe(row.row) * C_t);
  for (; t0 >= first; t0 -= GROUP) {
    float x[8];
    step_sizes(next_dt, bias, row.row, t0 + step < end, x);
    put_eight(&s_delta[step][eight * 8], x);
    unpack(next_dy, x);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = row.token < 0 ? 0.f : x[i];
    put_eight(&s_dy[step][eight * 8], x);
    unpack(next_c, x);
    if (eight < 2) put_eight(&s_c[step][eight * 8], x);
    row = locate_row(index, max(t0 - GROUP, first), end, step);
    next_dy = load_eight(p_dy + (i64)safe(row.token) * dy_t);
    next_dt = load_eight(p_dt + (i64)safe(row.row) * dt_t);
    next_c = load_eight(p_c + (i64)safe(row.row) * C_t);
    __syncwarp();
#pragma unroll
    for (int j = GROUP - 1; j >= 0; j--) {
      float delta = s_delta[j][s.lane], grad = s_dy[j][s.lane];
      sum += delta;
#pragma unroll
      for (int n = 0; n < N; n++)
        carry[n] = exp2_fast(delta * a[n]) * fmaf(s_c[j][n], grad, carry[n]);
    }
    __syncwarp();
  }
  i64 segment = s.bk * segments + s.segment;
#pragma unroll
  for (int n = 0; n < N; n++) ends[(segment * N + n) * channels + channel] = carry[n];
  sums[segment * channels + channel] = sum;
}

// Backward, a chunk at a time from the last: its states at the start of each group are made again
// and put into global scratch memory, then, group by group from the last, those of every other step
// into shared memory, then the gradients. Exponentials are what costs: three a state and step.
// A lane holds 4 states of 4 channels, so that sums over channels (dB, dC) and over states
// (du, ddelta) are both mostly inside a lane. Lane = channels * 4 + states, in units of 4.
#define TILE 4
#define BACKWARD_WARPS 12  // of a multiprocessor: as many as 168 registers a lane allow

struct Tile {
  float v[TILE][TILE];  // [state][channel]
};

__device__ __forceinline__ void advance(
    Tile& h, const Tile& a, const float* s_delta, const float* s_drive, const float* s_bc,
    int states, int block) {
  float d[4], drive[4], b[4];
  get_four(s_delta + block * TILE, d);
  get_four(s_drive + block * TILE, drive);
  get_four(s_bc + states * TILE, b);
#pragma unroll
  for (int c = 0; c < TILE; c++) {
#pragma unroll
    for (int i = 0; i < TILE; i++)
      h.v[i][c] = fmaf(exp2_fast(d[c] * a.v[i][c]), h.v[i][c], drive[c] * b[i]);
  }
}

__device__ __forceinline__ void keep(float* to, const Tile& h, int lane) {
#pragma unroll
  for (int i = 0; i < TILE; i++)
    reinterpret_cast<float4*>(to)[i * WARP + lane] =
        make_float4(h.v[i][0], h.v[i][1], h.v[i][2], h.v[i][3]);
}

__device__ __forceinline__ void fetch(const float* from, Tile& h, int lane) {
#pragma unroll
  for (int i = 0; i < TILE; i++) get_four(from + (i * WARP + lane) * 4, h.v[i]);
}

// Over the 8 lanes that hold the same states. The 4 that hold the same channels are neighbours.
__device__ __forceinline__ float sum_channels(const float* v, int lane) {
  float x = sum_four<4, 8>(v, lane);
  return x + __shfl_xor_sync(FULL, x, 16);
}

// Copies to shared memory without a register between; a lane reads what it copied itself.
__device__ __forceinline__ void copy_eight(Eight* to, const element* from) {
  u32 address = (u32)__cvta_generic_to_shared(to);
#pragma unroll
  for (int i = 0; i < (int)sizeof(Eight); i += 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + i),
                 "l"(reinterpret_cast<const char*>(from) + i)
                 : "memory");
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

extern "C" __global__ void __launch_bounds__(WARP, BACKWARD_WARPS) scan_backward(
    const element* dy, const element* u, const element* dt, const float* A, const element* B,
    const element* C, const float* D, const float* dt_bias, const int* index, const float* states,
    const float* carries, float* scratch, element* du, element* ddt, float* dA, float* dBC,
    float* dD, float* dbias, i64 dy_b, i64 dy_k, int dy_t, i64 u_b, i64 u_k, int u_t, i64 dt_b,
    i64 dt_k, int dt_t, i64 B_b, i64 B_k, int B_t, i64 C_b, i64 C_k, int C_t, int K, int blocks,
    int steps, int rows, int channels, int chunks, int segment_chunks, int segments, i64 sums_row) {
  // The gradients of a step take the place of its inputs once it is done: du that of u, ddt that of
  // delta, dB and dC those of B and C.
  __shared__ __align__(16) float s_delta[GROUP][WARP], s_u[GROUP][WARP], s_dy[GROUP][WARP];
  __shared__ __align__(16) float s_drive[GROUP][WARP], s_bc[GROUP][2 * N], s_dc[GROUP][N];
  __shared__ __align__(16) float s_bias[WARP];
  __shared__ Eight s_next[4][WARP];
  __shared__ __align__(16) float s_h[GROUP / 2][N * WARP];
  Sequence s = locate(K, blocks);
  int eight = s.lane & 3, step = s.lane >> 2;    // what the lane loads and stores of a group
  int block = s.lane >> 2, state = s.lane & 3;   // its tile, in units of 4 channels and 4 states
  int base = s.block * WARP;
  // After the sums over states the lane owns this channel of the block:
  int own = block * TILE + (s.lane & 1) * 2 + ((s.lane >> 1) & 1);
  // After the sums over channels it owns this state (with the lane 16 further):
  int own_state = state * TILE + ((s.lane >> 2) & 1) * 2 + ((s.lane >> 3) & 1);

  const element* p_u = rows_of(u, {u_b, u_k, u_t}, s, s.block * 4 + eight);
  const element* p_dt = rows_of(dt, {dt_b, dt_k, dt_t}, s, s.block * 4 + eight);
  const element* p_dy = rows_of(dy, {dy_b, dy_k, dy_t}, s, s.block * 4 + eight);
  const element* p_bc = eight < 2 ? rows_of(B, {B_b, B_k, B_t}, s, eight)
                                  : rows_of(C, {C_b, C_k, C_t}, s, eight - 2);
  int bc_t = eight < 2 ? B_t : C_t;
  // Gradients of rows leave with directions before images, as the batched products after them want.
  i64 kb = s.k * (i64)(gridDim.x / (blocks * K)) + s.b;
  element* p_du = du + kb * rows * channels + base + eight * 8;
  element* p_ddt = ddt + kb * rows * channels + base + eight * 8;
  float* p_dbc = dBC + (kb * blocks + s.block) * rows * (2 * N) + eight * 8;
#if HAS_INDEX
  index += (i64)s.k * steps;
#endif
  i64 program = s.segment * (i64)gridDim.x + blockIdx.x;
  float* p_scratch = scratch + program * (CHUNK_STEPS / GROUP) * (N * WARP);
  float skip = 0.f;
  s_bias[s.lane] = 0.f;
#if HAS_BIAS
  s_bias[s.lane] = dt_bias[s.k * channels + base + s.lane];
#endif
  __syncwarp();
#if HAS_D
  skip = D[s.k * channels + base + own];
#endif
#if SEGMENTED
  i64 segment = s.bk * segments + s.segment;
#endif
  Tile a, carry, dA_sum;
#pragma unroll
  for (int i = 0; i < TILE; i++) {
#pragma unroll
    for (int c = 0; c < TILE; c++) dA_sum.v[i][c] = carry.v[i][c] = 0.f;
#if SEGMENTED
    get_four(carries + (segment * N + state * TILE + i) * channels + base + block * TILE,
             carry.v[i]);
#endif
  }
#pragma unroll
  for (int c = 0; c < TILE; c++) {
    float four[4];
    get_four(A + ((i64)s.k * channels + base + block * TILE + c) * N + state * TILE, four);
#pragma unroll
    for (int i = 0; i < TILE; i++) a.v[i][c] = four[i] * LOG2E;
  }
  float dD_sum = 0.f, dbias_sum = 0.f;

  auto load = [&](const Row& row, bool with_gradient) {
    copy_eight(&s_next[0][s.lane], p_u + (i64)safe(row.row) * u_t);
    copy_eight(&s_next[1][s.lane], p_dt + (i64)safe(row.row) * dt_t);
    copy_eight(&s_next[2][s.lane], p_bc + (i64)safe(row.row) * bc_t);
    if (with_gradient) copy_eight(&s_next[3][s.lane], p_dy + (i64)safe(row.token) * dy_t);
  };
  auto stage = [&](const Row& row, bool inside, bool with_gradient) {
    copies_done();
    float x[8], delta[8];
    step_sizes(s_next[1][s.lane], &s_bias[eight * 8], row.row, inside, delta);
    put_eight(&s_delta[step][eight * 8], delta);
    inputs(s_next[0][s.lane], row.row, x);
    if (with_gradient) put_eight(&s_u[step][eight * 8], x);
#pragma unroll
    for (int i = 0; i < 8; i++) delta[i] *= x[i];
    put_eight(&s_drive[step][eight * 8], delta);
    unpack(s_next[2][s.lane], x);
    put_eight(&s_bc[step][eight * 8], x);
    if (with_gradient) {
      unpack(s_next[3][s.lane], x);
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = row.token < 0 ? 0.f : x[i];
      put_eight(&s_dy[step][eight * 8], x);
    }
    __syncwarp();
  };

  struct Inputs {
    float delta[TILE], drive[TILE], b[TILE];
  };
  auto inputs_of = [&](int j) {
    Inputs r;
    get_four(s_delta[j] + block * TILE, r.delta);
    get_four(s_drive[j] + block * TILE, r.drive);
    get_four(s_bc[j] + state * TILE, r.b);
    return r;
  };
  int steps_left = GROUP;  // of the group that is worked on
  // One step of the backward recurrence, from the state before it and, where it is known, its decay.
  auto step_back = [&](int j, const Inputs& in, const Tile* decay, const Tile& before) {
    float grad[4], cc[4];
    get_four(s_dy[j] + block * TILE, grad);
    get_four(s_bc[j] + N + state * TILE, cc);
    float db[4] = {0.f, 0.f, 0.f, 0.f};
    float driven[4] = {0.f, 0.f, 0.f, 0.f}, decayed[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int c = 0; c < TILE; c++) {
#pragma unroll
      for (int i = 0; i < TILE; i++) {
        float g = fmaf(cc[i], grad[c], carry.v[i][c]);
        db[i] = fmaf(g, in.drive[c], db[i]);
        driven[c] = fmaf(g, in.b[i], driven[c]);
        carry.v[i][c] = (decay ? decay->v[i][c] : exp2_fast(in.delta[c] * a.v[i][c])) * g;
        float past = carry.v[i][c] * before.v[i][c];
        dA_sum.v[i][c] = fmaf(past, in.delta[c], dA_sum.v[i][c]);
        decayed[c] = fmaf(past, a.v[i][c], decayed[c]);
      }
    }
    float sum_b = sum_channels(db, s.lane);
    float sum_driven = sum_four<1, 2>(driven, s.lane);
    float sum_decayed = sum_four<1, 2>(decayed, s.lane);
    float delta = s_delta[j][own], input = s_u[j][own], g = s_dy[j][own];
    float ddelta = fmaf(input, sum_driven, sum_decayed * LN2) * softplus_grad(delta);
#if HAS_BIAS
    dbias_sum += j < steps_left ? ddelta : 0.f;
#endif
#if HAS_D
    dD_sum = fmaf(input, g, dD_sum);
#endif
    s_bc[j][own_state] = sum_b;
    s_u[j][own] = fmaf(delta, sum_driven, skip * g);
    s_delta[j][own] = ddelta;
  };

  int chunk_first = s.segment * segment_chunks;
  int chunk_last = min(chunks, chunk_first + segment_chunks) - 1;
  for (int i_c = chunk_last; i_c >= chunk_first; i_c--) {
    int first = i_c * CHUNK_STEPS, end = min(steps, first + CHUNK_STEPS);
    int groups = (end - first + GROUP - 1) / GROUP;
    Tile h;
#pragma unroll
    for (int i = 0; i < TILE; i++) {
      int n = state * TILE + i, d = base + block * TILE;
      get_four(states + ((s.bk * chunks + i_c) * N + n) * channels + d, h.v[i]);
    }
    // The states at the start of each group, from the kept state.
    Row row = locate_row(index, first, end, step);
    load(row, false);
    for (int i_g = 0; i_g < groups - 1; i_g++) {
      keep(p_scratch + i_g * (N * WARP), h, s.lane);
      stage(row, true, false);
      row = locate_row(index, first + (i_g + 1) * GROUP, end, step);
      load(row, false);
#pragma unroll 4
      for (int j = 0; j < GROUP; j++) advance(h, a, s_delta[j], s_drive[j], s_bc[j], state, block);
      __syncwarp();
    }
    copy_eight(&s_next[3][s.lane], p_dy + (i64)safe(row.token) * dy_t);
    for (int i_g = groups - 1; i_g >= 0; i_g--) {
      int t0 = first + i_g * GROUP;
      if (i_g < groups - 1) fetch(p_scratch + i_g * (N * WARP), h, s.lane);
      stage(row, t0 + step < end, true);
      Row written = row;
      steps_left = end - t0;
      row = locate_row(index, max(t0 - GROUP, first), end, step);
      if (i_g > 0) load(row, true);
#pragma unroll 4
      for (int j = 0; j < GROUP; j++) {
        if (j % 2 == 0) keep(s_h[j / 2], h, s.lane);
        advance(h, a, s_delta[j], s_drive[j], s_bc[j], state, block);
        float grad[4], dc[4];
        get_four(s_dy[j] + block * TILE, grad);
#pragma unroll
        for (int i = 0; i < TILE; i++) {
          dc[i] = h.v[i][0] * grad[0];
#pragma unroll
          for (int c = 1; c < TILE; c++) dc[i] = fmaf(h.v[i][c], grad[c], dc[i]);
        }
        s_dc[j][own_state] = sum_channels(dc, s.lane);
      }
      // Two steps at a time: states are kept for the first, those of the second made from them.
#pragma unroll 1
      for (int j = GROUP - 2; j >= 0; j -= 2) {
        Tile before, between, decay;
        fetch(s_h[j / 2], before, s.lane);
        Inputs in = inputs_of(j);
#pragma unroll
        for (int c = 0; c < TILE; c++) {
#pragma unroll
          for (int i = 0; i < TILE; i++) {
            decay.v[i][c] = exp2_fast(in.delta[c] * a.v[i][c]);
            between.v[i][c] = fmaf(decay.v[i][c], before.v[i][c], in.drive[c] * in.b[i]);
          }
        }
        step_back(j + 1, inputs_of(j + 1), nullptr, between);
        step_back(j, in, &decay, before);
      }
      __syncwarp();
      if (written.row >= 0) {
        float out[8];
        get_eight(&s_u[step][eight * 8], out);
        *reinterpret_cast<Eight*>(p_du + (i64)written.row * channels) = pack<false>(out);
        get_eight(&s_delta[step][eight * 8], out);
        *reinterpret_cast<Eight*>(p_ddt + (i64)written.row * channels) = pack<false>(out);
        get_eight(eight < 2 ? &s_bc[step][eight * 8] : &s_dc[step][(eight - 2) * 8], out);
        put_eight(p_dbc + (i64)written.row * (2 * N), out);
      }
      __syncwarp();
    }
  }
  // A row of partial sums an image and segment.
  i64 sums = (s.b * segments + s.segment) * sums_row;
  i64 first_channel = (i64)s.k * channels + base;
#pragma unroll
  for (int c = 0; c < TILE; c++)
    *reinterpret_cast<float4*>(dA + sums + (first_channel + block * TILE + c) * N + state * TILE) =
        make_float4(dA_sum.v[0][c], dA_sum.v[1][c], dA_sum.v[2][c], dA_sum.v[3][c]);
#if HAS_D
  dD[sums + first_channel + own] = dD_sum;
#endif
#if HAS_BIAS
  dbias[sums + first_channel + own] = dbias_sum;
#endif
}
