// Selective scan with 16 states for many sequences: forward and backward, one warp per CTA.
//
// Compiled at run time (nvrtc.py) with ELEMENT one of 0 float, 1 bfloat16, 2 float16, the flags
// GRID_ORDER, HAS_INDEX, PADDED, HAS_D, HAS_BIAS, SOFTPLUS, SAVE and SEGMENTED, and SPLIT. The
// maths and the letters stand in ops/README.md. Where Triton's kernels hold a chunk's states in
// registers and run short of them, these hold them in shared memory, and load the next steps while
// they work on the present ones. Channels come in whole blocks of 32, rows aligned to 16 bytes:
// warp_scan.py ensures it.

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
#define INLINE __device__ __forceinline__

typedef long long i64;
typedef unsigned int u32;

// Eight neighboring channels of a row, as they lie in memory.
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

INLINE Eight load_eight(const element* p) {
  return *reinterpret_cast<const Eight*>(p);
}

#if ELEMENT == 0
INLINE void unpack(const Eight& from, float* to) {
  to[0] = from.x.x, to[1] = from.x.y, to[2] = from.x.z, to[3] = from.x.w;
  to[4] = from.y.x, to[5] = from.y.y, to[6] = from.y.z, to[7] = from.y.w;
}
template <bool SATURATE>
INLINE Eight pack(const float* x) {
  return {make_float4(x[0], x[1], x[2], x[3]), make_float4(x[4], x[5], x[6], x[7])};
}
#else
INLINE void unpack_two(u32 from, float* to) {
#if ELEMENT == 1
  to[0] = __uint_as_float(from << 16);
  to[1] = __uint_as_float(from & 0xffff0000u);
#else
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(to[0]), "=f"(to[1])
      : "r"(from));
#endif
}
// Outputs in float16 saturate: an infinity would make a loss non-finite that float32 keeps finite.
// Gradients do not: an infinity there is what tells a gradient scaler to take a smaller scale.
template <bool SATURATE>
INLINE u32 pack_two(float low, float high) {
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
INLINE void unpack(const Eight& from, float* to) {
  unpack_two(from.x.x, to);
  unpack_two(from.x.y, to + 2);
  unpack_two(from.x.z, to + 4);
  unpack_two(from.x.w, to + 6);
}
template <bool SATURATE>
INLINE Eight pack(const float* x) {
  return {make_uint4(pack_two<SATURATE>(x[0], x[1]), pack_two<SATURATE>(x[2], x[3]),
                     pack_two<SATURATE>(x[4], x[5]), pack_two<SATURATE>(x[6], x[7]))};
}
#endif

INLINE void put_eight(float* to, const float* x) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

INLINE void get_eight(const float* from, float* x) {
  float4 low = reinterpret_cast<const float4*>(from)[0];
  float4 high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

INLINE void get_four(const float* from, float* x) {
  float4 four = *reinterpret_cast<const float4*>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

INLINE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

INLINE float step_size(float x) {
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
INLINE float softplus_grad(float delta) {
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

// One sequence: image b, direction k, a block of channels, a segment of time from first to end.
struct Sequence {
  int lane, k, block, first, end;
  i64 b, bk, segment;
};

INLINE Sequence locate(int K, int blocks, int steps, int segment_chunks, int segments) {
  Sequence s;
  s.lane = threadIdx.x;
  s.block = blockIdx.x % blocks;
  s.bk = blockIdx.x / blocks;
  s.b = s.bk / K;
  s.k = s.bk % K;
  s.segment = s.bk * segments + blockIdx.y;
  s.first = (int)blockIdx.y * segment_chunks * CHUNK_STEPS;
  s.end = min(steps, s.first + segment_chunks * CHUNK_STEPS);
  return s;
}

// Eight channels of an array's rows [step, channel], seen from one sequence.
struct Rows {
  const element* p;
  int t;  // stride of a step
  // Rows that do not count, below 0, are read from row 0 and made harmless afterwards.
  INLINE const element* at(int row) const { return p + (i64)(row < 0 ? 0 : row) * t; }
  INLINE Eight load(int row) const { return load_eight(at(row)); }
};

// `b`, `k` and `t` are the strides of image, direction and step.
INLINE Rows rows_of(const element* p, i64 b, i64 k, int t, const Sequence& s, int eight) {
  return {p + s.b * b + s.k * k + eight * 8, t};
}

// Selects; a branch would leave ptxas unsure that the warp converges, and cost it registers.
INLINE Rows select(bool first, const Rows& x, const Rows& y) {
  return {first ? x.p : y.p, first ? x.t : y.t};
}

// The row that the lane loads in a group of steps, and the token it writes; -1 for none.
struct Row {
  int row, token;
};

INLINE Row locate_row(const int* index, int first, int end, int step) {
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

// delta of eight channels. Past the end it is 0, which leaves a state alone; a padded step of
// inputs in grid order has dt = 0.
INLINE void step_sizes(const Eight& dt, const float* bias, int row, bool inside, float* delta) {
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

// u of eight channels, 0 at padding.
INLINE void inputs(const Eight& u, int row, float* x) {
  unpack(u, x);
#if GRID_ORDER && PADDED
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = row < 0 ? 0.f : x[i];
#endif
}

// dy of eight channels, 0 where no output was written.
INLINE void gradients(const Eight& dy, int token, float* x) {
  unpack(dy, x);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = token < 0 ? 0.f : x[i];
}

// The bias of eight channels from the first of them on; 0 without.
INLINE void load_bias(const float* dt_bias, int first, float* bias) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    bias[i] = 0.f;
#if HAS_BIAS
    bias[i] = dt_bias[first + i];
#endif
  }
}

// Sums 4 values per lane over the lanes that differ from it in these two bits; each lane gets one.
// The lane is read from threadIdx: as a field of a struct it makes the compiler branch at shuffles.
template <int FIRST, int SECOND>
INLINE float sum_four(const float* v) {
  float w[2];
  bool up = threadIdx.x & FIRST;
#pragma unroll
  for (int i = 0; i < 2; i++)
    w[i] = (up ? v[i + 2] : v[i]) + __shfl_xor_sync(FULL, up ? v[i] : v[i + 2], FIRST);
  up = threadIdx.x & SECOND;
  return (up ? w[1] : w[0]) + __shfl_xor_sync(FULL, up ? w[0] : w[1], SECOND);
}

// Forward: SPLIT lanes share a channel, each with some of its states. One lane per channel does the
// least work; more of them make more warps of few sequences, each through its steps in less time.
#define CHANNELS (WARP / SPLIT)  // per warp: lane = part * CHANNELS + channel
#define PART (N / SPLIT)         // states per lane
#define EIGHTS (CHANNELS / 8)    // per row: a lane loads one, of row lane / EIGHTS
#define FORWARD_GROUP (GROUP * SPLIT)
constexpr int UNROLLED = GROUP / SPLIT;  // 8 steps are unrolled

__shared__ __align__(16) float f_delta[FORWARD_GROUP][CHANNELS], f_u[FORWARD_GROUP][CHANNELS];
__shared__ __align__(16) float f_bc[FORWARD_GROUP][2 * N];
#if SPLIT == 1
#define f_y f_u
#else
// Apart from the inputs: the compiler may then load those of the next steps before it stores.
__shared__ __align__(16) float f_y[FORWARD_GROUP][CHANNELS];
#endif

// The steps of a group that the lane loads: eight channels of u and dt, eight values of B and C.
struct ForwardLoads {
  Rows u, dt, bc;
  int bc_step;
  Eight next_u, next_dt, next_bc[SPLIT];

  INLINE void load(const Row& row) {
    next_u = u.load(row.row);
    next_dt = dt.load(row.row);
#pragma unroll
    for (int i = 0; i < SPLIT; i++) {
      int bc_row = row.row;
#if SPLIT > 1
      bc_row = __shfl_sync(FULL, row.row, (bc_step + i * GROUP) * EIGHTS);
#endif
      next_bc[i] = bc.load(bc_row);
    }
  }

  INLINE void stage(const float* bias, const Row& row, bool inside) {
    int lane = threadIdx.x, eight = lane % EIGHTS, step = lane / EIGHTS;
    float x[8];
    step_sizes(next_dt, bias, row.row, inside, x);
    put_eight(&f_delta[step][eight * 8], x);
    inputs(next_u, row.row, x);
    put_eight(&f_u[step][eight * 8], x);
#pragma unroll
    for (int i = 0; i < SPLIT; i++) {
      unpack(next_bc[i], x);
      put_eight(&f_bc[bc_step + i * GROUP][(lane & 3) * 8], x);
    }
  }
};

struct StepInputs {
  float delta, input, b[PART], c[PART];
};

// Reads SPLIT steps from j on.
template <bool ENDS>
INLINE void read_steps(int j, int place, int part, StepInputs* in) {
#pragma unroll
  for (int i_s = 0; i_s < SPLIT; i_s++) {
    in[i_s].delta = f_delta[j + i_s][place], in[i_s].input = f_u[j + i_s][place];
#pragma unroll
    for (int i = 0; i < PART; i += 4) {
      get_four(&f_bc[j + i_s][part * PART + i], in[i_s].b + i);
      if (!ENDS) get_four(&f_bc[j + i_s][N + part * PART + i], in[i_s].c + i);
    }
  }
}

// States of a channel, or the lane's part of them.
struct ChannelStates {
  float a[PART], h[PART], skip, sum;  // sum of step sizes

  // Goes through SPLIT steps; the lane's parts of their outputs are `out`.
  template <bool ENDS>
  INLINE void advance(const StepInputs* in, float* out) {
#pragma unroll
    for (int i_s = 0; i_s < SPLIT; i_s++) {
      float delta = in[i_s].delta, input = in[i_s].input, drive = delta * input;
      float sums[4] = {skip * input, 0.f, 0.f, 0.f};
      sum += delta;
#pragma unroll
      for (int n = 0; n < PART; n++) {
        h[n] = fmaf(exp2_fast(delta * a[n]), h[n], drive * in[i_s].b[n]);
        if (!ENDS) sums[n % 4] = fmaf(h[n], in[i_s].c[n], sums[n % 4]);
      }
      out[i_s] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
};

// Sums one value per lane and step over the lanes of a channel; each lane gets step `own_step`.
INLINE int own_step() {
  int lane = threadIdx.x;
  return SPLIT == 1 ? 0 : SPLIT == 2 ? lane >> 4 : ((lane >> 3) & 1) * 2 + ((lane >> 4) & 1);
}

INLINE float sum_parts(const float* v) {
#if SPLIT == 1
  return v[0];
#elif SPLIT == 2
  bool up = threadIdx.x & 16;
  return (up ? v[1] : v[0]) + __shfl_xor_sync(FULL, up ? v[0] : v[1], 16);
#else
  return sum_four<8, 16>(v);
#endif
}

// With ENDS, computes the state that a segment reaches and the sum of its step sizes alone.
template <bool ENDS>
INLINE void forward(
    const Sequence& s, ForwardLoads& loads, const float* A, const float* D, const float* dt_bias,
    const int* index, element* y, float* kept, const float* starts, float* ends, float* sums,
    int steps, int length, int channels, int chunks) {
  int eight = s.lane % EIGHTS, step = s.lane / EIGHTS;
  int place = s.lane % CHANNELS, part = s.lane / CHANNELS, base = s.block * CHANNELS;
  int channel = base + place;
  element* p_y = y + s.bk * (i64)length * channels + base + eight * 8;
#if HAS_INDEX
  index += (i64)s.k * steps;
#endif
  float bias[8];
  load_bias(dt_bias, s.k * channels + base + eight * 8, bias);
  ChannelStates states;
  states.skip = states.sum = 0.f;
#if HAS_D
  if (!ENDS && part == 0) states.skip = D[s.k * channels + channel];
#endif
#pragma unroll
  for (int i = 0; i < PART; i++) {
    states.a[i] = A[((i64)s.k * channels + channel) * N + part * PART + i] * LOG2E;
    states.h[i] = 0.f;
#if SEGMENTED
    if (!ENDS) states.h[i] = starts[(s.segment * N + part * PART + i) * channels + channel];
#endif
  }
  Row row = locate_row(index, s.first, s.end, step);
  Row ahead = locate_row(index, s.first + FORWARD_GROUP, s.end, step);
  loads.load(row);
  for (int t0 = s.first; t0 < s.end; t0 += FORWARD_GROUP) {
#if SAVE
    if (!ENDS && t0 % CHUNK_STEPS == 0) {
      i64 chunk = s.bk * chunks + t0 / CHUNK_STEPS;
#pragma unroll
      for (int i = 0; i < PART; i++)
        kept[(chunk * N + part * PART + i) * channels + channel] = states.h[i];
    }
#endif
    loads.stage(bias, row, t0 + step < s.end);
    int token = row.token;
    row = ahead;
    loads.load(row);
    ahead = locate_row(index, t0 + 2 * FORWARD_GROUP, s.end, step);
    __syncwarp();
    StepInputs now[SPLIT], next[SPLIT];
    float out[SPLIT];
    read_steps<ENDS>(0, place, part, next);
#pragma unroll UNROLLED
    for (int j = 0; j < FORWARD_GROUP; j += SPLIT) {
#if SPLIT == 1
      read_steps<ENDS>(j, place, part, now);
      states.advance<ENDS>(now, out);
      if (!ENDS) f_y[j][place] = out[0];
#else
      // A shuffle is a barrier to the compiler: the next inputs are read before it.
#pragma unroll
      for (int i = 0; i < SPLIT; i++) now[i] = next[i];
      read_steps<ENDS>(min(j + SPLIT, FORWARD_GROUP - SPLIT), place, part, next);
      if (!ENDS && j > 0) f_y[j - SPLIT + own_step()][place] = sum_parts(out);
      states.advance<ENDS>(now, out);
#endif
    }
#if SPLIT > 1
    if (!ENDS) f_y[FORWARD_GROUP - SPLIT + own_step()][place] = sum_parts(out);
#endif
    __syncwarp();
    if (!ENDS) {
      float x[8];
      get_eight(&f_y[step][eight * 8], x);
      if (token >= 0) *reinterpret_cast<Eight*>(p_y + (i64)token * channels) = pack<true>(x);
      __syncwarp();
    }
  }
  if (ENDS) {
#pragma unroll
    for (int i = 0; i < PART; i++)
      ends[(s.segment * N + part * PART + i) * channels + channel] = states.h[i];
    if (part == 0) sums[s.segment * channels + channel] = states.sum;
  }
}

extern "C" __global__ void __launch_bounds__(WARP) scan_forward(
    const element* u, const element* dt, const float* A, const element* B, const element* C,
    const float* D, const float* dt_bias, const int* index, element* y, float* states,
    const float* starts, i64 u_b, i64 u_k, int u_t, i64 dt_b, i64 dt_k, int dt_t, i64 B_b, i64 B_k,
    int B_t, i64 C_b, i64 C_k, int C_t, int K, int blocks, int steps, int length, int channels,
    int chunks, int segment_chunks, int segments) {
  Sequence s = locate(K, blocks, steps, segment_chunks, segments);
  int eight = s.block * EIGHTS + s.lane % EIGHTS, bc_eight = s.lane & 3;
  ForwardLoads loads;
  loads.u = rows_of(u, u_b, u_k, u_t, s, eight);
  loads.dt = rows_of(dt, dt_b, dt_k, dt_t, s, eight);
  loads.bc = select(bc_eight < 2, rows_of(B, B_b, B_k, B_t, s, bc_eight & 1),
                    rows_of(C, C_b, C_k, C_t, s, bc_eight & 1));
  loads.bc_step = s.lane >> 2;
  forward<false>(s, loads, A, D, dt_bias, index, y, states, starts, nullptr, nullptr, steps, length,
                 channels, chunks);
}

extern "C" __global__ void __launch_bounds__(WARP) segment_end(
    const element* u, const element* dt, const float* A, const element* B, const float* dt_bias,
    const int* index, float* ends, float* sums, i64 u_b, i64 u_k, int u_t, i64 dt_b, i64 dt_k,
    int dt_t, i64 B_b, i64 B_k, int B_t, int K, int blocks, int steps, int channels,
    int segment_chunks, int segments) {
  Sequence s = locate(K, blocks, steps, segment_chunks, segments);
  int eight = s.block * EIGHTS + s.lane % EIGHTS;
  ForwardLoads loads;
  loads.u = rows_of(u, u_b, u_k, u_t, s, eight);
  loads.dt = rows_of(dt, dt_b, dt_k, dt_t, s, eight);
  loads.bc = rows_of(B, B_b, B_k, B_t, s, s.lane & 1);
  loads.bc_step = s.lane >> 2;
  forward<true>(s, loads, A, nullptr, dt_bias, index, nullptr, nullptr, nullptr, ends, sums, steps,
                0, channels, 0);
}

// Computes the gradient that a segment passes to the one before it if none reaches its end.
extern "C" __global__ void __launch_bounds__(WARP) segment_carry(
    const element* dy, const element* dt, const float* A, const element* C, const float* dt_bias,
    const int* index, float* ends, float* sums, i64 dy_b, i64 dy_k, int dy_t, i64 dt_b, i64 dt_k,
    int dt_t, i64 C_b, i64 C_k, int C_t, int K, int blocks, int steps, int channels,
    int segment_chunks, int segments) {
  __shared__ __align__(16) float s_delta[GROUP][WARP], s_dy[GROUP][WARP], s_c[GROUP][N];
  Sequence s = locate(K, blocks, steps, segment_chunks, segments);
  int eight = s.lane & 3, step = s.lane >> 2, channel = s.block * WARP + s.lane;
  Rows r_dy = rows_of(dy, dy_b, dy_k, dy_t, s, s.block * 4 + eight);
  Rows r_dt = rows_of(dt, dt_b, dt_k, dt_t, s, s.block * 4 + eight);
  Rows r_c = rows_of(C, C_b, C_k, C_t, s, eight & 1);
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
  int t0 = s.first + (s.end - s.first - 1) / GROUP * GROUP;
  Row row = locate_row(index, t0, s.end, step);
  Eight next_dy = r_dy.load(row.token), next_dt = r_dt.load(row.row), next_c = r_c.load(row.row);
  for (; t0 >= s.first; t0 -= GROUP) {
    float x[8];
    step_sizes(next_dt, bias, row.row, t0 + step < s.end, x);
    put_eight(&s_delta[step][eight * 8], x);
    gradients(next_dy, row.token, x);
    put_eight(&s_dy[step][eight * 8], x);
    unpack(next_c, x);
    if (eight < 2) put_eight(&s_c[step][eight * 8], x);
    row = locate_row(index, max(t0 - GROUP, s.first), s.end, step);
    next_dy = r_dy.load(row.token), next_dt = r_dt.load(row.row), next_c = r_c.load(row.row);
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
#pragma unroll
  for (int n = 0; n < N; n++) ends[(s.segment * N + n) * channels + channel] = carry[n];
  sums[s.segment * channels + channel] = sum;
}

// Backward, one chunk after another from the last: the states at the start of each group are
// recomputed into global scratch memory, then, group by group from the last, those of every other
// step into shared memory, then the gradients. Exponentials dominate: three per state and step.
// A lane holds 4 states of 4 channels, so that sums over channels (dB, dC) and over states
// (du, ddelta) are both mostly inside a lane. Lane = channels * 4 + states, in units of 4.
#define TILE 4
#define BACKWARD_WARPS 12  // per SM: as many as 168 registers per lane allow

struct Tile {
  float v[TILE][TILE];  // [state][channel]
};

INLINE void keep(float* to, const Tile& h) {
#pragma unroll
  for (int i = 0; i < TILE; i++)
    reinterpret_cast<float4*>(to)[i * WARP + threadIdx.x] =
        make_float4(h.v[i][0], h.v[i][1], h.v[i][2], h.v[i][3]);
}

INLINE void fetch(const float* from, Tile& h) {
#pragma unroll
  for (int i = 0; i < TILE; i++) get_four(from + (i * WARP + threadIdx.x) * 4, h.v[i]);
}

// Sums over the 8 lanes that hold the same states; the 4 with the same channels are neighbors.
INLINE float sum_channels(const float* v) {
  float x = sum_four<4, 8>(v);
  return x + __shfl_xor_sync(FULL, x, 16);
}

// Copies to shared memory without a register between; a lane reads what it copied itself.
INLINE void copy_eight(Eight* to, const element* from) {
  u32 address = (u32)__cvta_generic_to_shared(to);
#pragma unroll
  for (int i = 0; i < (int)sizeof(Eight); i += 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + i),
                 "l"(reinterpret_cast<const char*>(from) + i)
                 : "memory");
}

INLINE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A group of steps. Once a step is done, du takes the place of u, ddt that of delta, dB and dC
// those of B and C.
__shared__ __align__(16) float s_delta[GROUP][WARP], s_u[GROUP][WARP], s_dy[GROUP][WARP];
__shared__ __align__(16) float s_drive[GROUP][WARP], s_bc[GROUP][2 * N], s_dc[GROUP][N];
__shared__ __align__(16) float s_bias[WARP];
__shared__ Eight s_next[4][WARP];
__shared__ __align__(16) float s_h[GROUP / 2][N * WARP];

// The steps of a group that the lane loads: eight channels of u, dt and dy, eight of B and C.
struct BackwardLoads {
  Rows u, dt, bc, dy;

  INLINE void load(const Row& row) const {
    int lane = threadIdx.x;
    copy_eight(&s_next[0][lane], u.at(row.row));
    copy_eight(&s_next[1][lane], dt.at(row.row));
    copy_eight(&s_next[2][lane], bc.at(row.row));
  }

  INLINE void load_gradient(const Row& row) const {
    copy_eight(&s_next[3][threadIdx.x], dy.at(row.token));
  }
};

INLINE void stage(const Row& row, bool inside, bool with_gradient) {
  int lane = threadIdx.x, eight = lane & 3, step = lane >> 2;
  copies_done();
  float x[8], delta[8];
  step_sizes(s_next[1][lane], &s_bias[eight * 8], row.row, inside, delta);
  put_eight(&s_delta[step][eight * 8], delta);
  inputs(s_next[0][lane], row.row, x);
  if (with_gradient) put_eight(&s_u[step][eight * 8], x);
#pragma unroll
  for (int i = 0; i < 8; i++) delta[i] *= x[i];
  put_eight(&s_drive[step][eight * 8], delta);
  unpack(s_next[2][lane], x);
  put_eight(&s_bc[step][eight * 8], x);
  if (with_gradient) {
    gradients(s_next[3][lane], row.token, x);
    put_eight(&s_dy[step][eight * 8], x);
  }
  __syncwarp();
}

// The lane's tile: its parameters, the gradient that reaches its states, and sums over time.
struct Walk {
  int block, state;  // the tile's channels and states, in units of 4
  int own, own_state;      // after sums over states its channel, after sums over channels its state
  float skip, dD, dbias;
  Tile a, carry, dA;
};

struct TileInputs {
  float delta[TILE], drive[TILE], b[TILE];
};

INLINE TileInputs tile_inputs(const Walk& w, int j) {
  TileInputs in;
  get_four(s_delta[j] + w.block * TILE, in.delta);
  get_four(s_drive[j] + w.block * TILE, in.drive);
  get_four(s_bc[j] + w.state * TILE, in.b);
  return in;
}

INLINE void advance(Tile& h, const Walk& w, int j) {
  TileInputs in = tile_inputs(w, j);
#pragma unroll
  for (int c = 0; c < TILE; c++) {
#pragma unroll
    for (int i = 0; i < TILE; i++)
      h.v[i][c] = fmaf(exp2_fast(in.delta[c] * w.a.v[i][c]), h.v[i][c], in.drive[c] * in.b[i]);
  }
}

// Computes dC of a step from the states after it.
INLINE void output_gradient(const Tile& h, const Walk& w, int j) {
  float grad[4], dc[4];
  get_four(s_dy[j] + w.block * TILE, grad);
#pragma unroll
  for (int i = 0; i < TILE; i++) {
    dc[i] = h.v[i][0] * grad[0];
#pragma unroll
    for (int c = 1; c < TILE; c++) dc[i] = fmaf(h.v[i][c], grad[c], dc[i]);
  }
  s_dc[j][w.own_state] = sum_channels(dc);
}

// One step of the backward recurrence, from the state before it and, where it is known, its decay.
INLINE void step_back(Walk& w, int j, const TileInputs& in,
                      const Tile* decay, const Tile& before, int steps_left) {
  float grad[4], cc[4];
  get_four(s_dy[j] + w.block * TILE, grad);
  get_four(s_bc[j] + N + w.state * TILE, cc);
  float db[4] = {0.f, 0.f, 0.f, 0.f};
  float driven[4] = {0.f, 0.f, 0.f, 0.f}, decayed[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int c = 0; c < TILE; c++) {
#pragma unroll
    for (int i = 0; i < TILE; i++) {
      float g = fmaf(cc[i], grad[c], w.carry.v[i][c]);
      db[i] = fmaf(g, in.drive[c], db[i]);
      driven[c] = fmaf(g, in.b[i], driven[c]);
      w.carry.v[i][c] = (decay ? decay->v[i][c] : exp2_fast(in.delta[c] * w.a.v[i][c])) * g;
      float past = w.carry.v[i][c] * before.v[i][c];
      w.dA.v[i][c] = fmaf(past, in.delta[c], w.dA.v[i][c]);
      decayed[c] = fmaf(past, w.a.v[i][c], decayed[c]);
    }
  }
  float sum_b = sum_channels(db);
  float sum_driven = sum_four<1, 2>(driven);
  float sum_decayed = sum_four<1, 2>(decayed);
  float delta = s_delta[j][w.own], input = s_u[j][w.own], g = s_dy[j][w.own];
  float ddelta = fmaf(input, sum_driven, sum_decayed * LN2) * softplus_grad(delta);
#if HAS_BIAS
  w.dbias += j < steps_left ? ddelta : 0.f;
#endif
#if HAS_D
  w.dD = fmaf(input, g, w.dD);
#endif
  s_bc[j][w.own_state] = sum_b;
  s_u[j][w.own] = fmaf(delta, sum_driven, w.skip * g);
  s_delta[j][w.own] = ddelta;
}

// Walks two steps back: the states before the first are kept, those before the second recomputed.
INLINE void two_steps_back(Walk& w, int j, int steps_left) {
  Tile before, between, decay;
  fetch(s_h[j / 2], before);
  TileInputs in = tile_inputs(w, j);
#pragma unroll
  for (int c = 0; c < TILE; c++) {
#pragma unroll
    for (int i = 0; i < TILE; i++) {
      decay.v[i][c] = exp2_fast(in.delta[c] * w.a.v[i][c]);
      between.v[i][c] = fmaf(decay.v[i][c], before.v[i][c], in.drive[c] * in.b[i]);
    }
  }
  step_back(w, j + 1, tile_inputs(w, j + 1), nullptr, between, steps_left);
  step_back(w, j, in, &decay, before, steps_left);
}

extern "C" __global__ void __launch_bounds__(WARP, BACKWARD_WARPS) scan_backward(
    const element* dy, const element* u, const element* dt, const float* A, const element* B,
    const element* C, const float* D, const float* dt_bias, const int* index, const float* states,
    const float* carries, float* scratch, element* du, element* ddt, float* dA, float* dBC,
    float* dD, float* dbias, i64 dy_b, i64 dy_k, int dy_t, i64 u_b, i64 u_k, int u_t, i64 dt_b,
    i64 dt_k, int dt_t, i64 B_b, i64 B_k, int B_t, i64 C_b, i64 C_k, int C_t, int K, int blocks,
    int steps, int rows, int channels, int chunks, int segment_chunks, int segments, i64 sums_row) {
  Sequence s = locate(K, blocks, steps, segment_chunks, segments);
  int eight = s.lane & 3, step = s.lane >> 2;  // what the lane loads and stores of a group
  int base = s.block * WARP;
  BackwardLoads loads;
  loads.u = rows_of(u, u_b, u_k, u_t, s, s.block * 4 + eight);
  loads.dt = rows_of(dt, dt_b, dt_k, dt_t, s, s.block * 4 + eight);
  loads.dy = rows_of(dy, dy_b, dy_k, dy_t, s, s.block * 4 + eight);
  // Unlike in the forward kernel, a branch takes fewer registers here than `select`.
  loads.bc = eight < 2 ? rows_of(B, B_b, B_k, B_t, s, eight)
                       : rows_of(C, C_b, C_k, C_t, s, eight - 2);
  // Gradients of rows leave with directions before images, as the batched products after them want.
  i64 kb = s.k * (i64)(gridDim.x / (blocks * K)) + s.b;
  element* p_du = du + kb * rows * channels + base + eight * 8;
  element* p_ddt = ddt + kb * rows * channels + base + eight * 8;
  float* p_dbc = dBC + (kb * blocks + s.block) * rows * (2 * N) + eight * 8;
#if HAS_INDEX
  index += (i64)s.k * steps;
#endif
  i64 program = blockIdx.y * (i64)gridDim.x + blockIdx.x;
  float* p_scratch = scratch + program * (CHUNK_STEPS / GROUP) * (N * WARP);
  s_bias[s.lane] = 0.f;
#if HAS_BIAS
  s_bias[s.lane] = dt_bias[s.k * channels + base + s.lane];
#endif
  __syncwarp();

  Walk w;
  w.block = s.lane >> 2, w.state = s.lane & 3;
  w.own = w.block * TILE + (s.lane & 1) * 2 + ((s.lane >> 1) & 1);
  w.own_state = w.state * TILE + ((s.lane >> 2) & 1) * 2 + ((s.lane >> 3) & 1);
  w.skip = w.dD = w.dbias = 0.f;
  int d = base + w.block * TILE;  // the tile's first channel
#if HAS_D
  w.skip = D[s.k * channels + base + w.own];
#endif
#pragma unroll
  for (int i = 0; i < TILE; i++) {
#pragma unroll
    for (int c = 0; c < TILE; c++) w.dA.v[i][c] = w.carry.v[i][c] = 0.f;
#if SEGMENTED
    get_four(carries + (s.segment * N + w.state * TILE + i) * channels + d, w.carry.v[i]);
#endif
  }
#pragma unroll
  for (int c = 0; c < TILE; c++) {
    float four[4];
    get_four(A + ((i64)s.k * channels + d + c) * N + w.state * TILE, four);
#pragma unroll
    for (int i = 0; i < TILE; i++) w.a.v[i][c] = four[i] * LOG2E;
  }

  int chunk_first = (int)blockIdx.y * segment_chunks;
  int chunk_last = min(chunks, chunk_first + segment_chunks) - 1;
  for (int i_c = chunk_last; i_c >= chunk_first; i_c--) {
    int first = i_c * CHUNK_STEPS, end = min(steps, first + CHUNK_STEPS);
    int groups = (end - first + GROUP - 1) / GROUP;
    Tile h;
#pragma unroll
    for (int i = 0; i < TILE; i++)
      get_four(states + ((s.bk * chunks + i_c) * N + w.state * TILE + i) * channels + d, h.v[i]);
    // The states at the start of each group, from the kept state.
    Row row = locate_row(index, first, end, step);
    loads.load(row);
    for (int i_g = 0; i_g < groups - 1; i_g++) {
      keep(p_scratch + i_g * (N * WARP), h);
      stage(row, true, false);
      row = locate_row(index, first + (i_g + 1) * GROUP, end, step);
      loads.load(row);
#pragma unroll 4
      for (int j = 0; j < GROUP; j++) advance(h, w, j);
      __syncwarp();
    }
    loads.load_gradient(row);
    for (int i_g = groups - 1; i_g >= 0; i_g--) {
      int t0 = first + i_g * GROUP;
      if (i_g < groups - 1) fetch(p_scratch + i_g * (N * WARP), h);
      stage(row, t0 + step < end, true);
      Row written = row;
      row = locate_row(index, max(t0 - GROUP, first), end, step);
      if (i_g > 0) {
        loads.load(row);
        loads.load_gradient(row);
      }
#pragma unroll 4
      for (int j = 0; j < GROUP; j++) {
        if (j % 2 == 0) keep(s_h[j / 2], h);
        advance(h, w, j);
        output_gradient(h, w, j);
      }
#pragma unroll 1
      for (int j = GROUP - 2; j >= 0; j -= 2) two_steps_back(w, j, end - t0);
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
  // One row of partial sums per image and segment.
  i64 sums = (s.b * segments + blockIdx.y) * sums_row, first_channel = (i64)s.k * channels + base;
#pragma unroll
  for (int c = 0; c < TILE; c++)
    *reinterpret_cast<float4*>(dA + sums + (first_channel + w.block * TILE + c) * N +
                               w.state * TILE) =
        make_float4(w.dA.v[0][c], w.dA.v[1][c], w.dA.v[2][c], w.dA.v[3][c]);
#if HAS_D
  dD[sums + first_channel + w.own] = w.dD;
#endif
#if HAS_BIAS
  dbias[sums + first_channel + w.own] = w.dbias;
#endif
}
