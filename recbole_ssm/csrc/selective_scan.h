// The selective scan, forward and backward, with softplus, skip and gate fused.
//
// A vector holds VL channels. A block of channels runs through a chunk of time with NB states of each in registers, then
// with the next NB, so that all it touches stays in the first cache. Nothing of size [L, D, N] is ever written: the
// forward keeps the state at every CHUNK-th position, and the backward computes those between again.

#pragma once
#include "simd.h"

namespace {

const i64 NB = 4;

struct ScanCall {
  const Scan* a;
  i64 width;             // channels, padded
  i64 parts, pieces;     // of the channels: sums of their own, by the shape alone; tasks of their own, by the threads
  float* A2;             // [N, width]: A log2(e), transposed
  float *gA, *gskip, *gbias;  // one of each a group of sequences: [groups, N, width], [groups, width] twice
  float *gB, *gC;        // [pieces, rows, N]: sums over the channels of a piece
  char* scratch;
  i64 scratch_bytes;     // of one thread
  i64 channel(i64 part) const { return width / VL * part / parts * VL; }  // the first of a part
};

i64 scan_rows(const Scan& a) { return a.offsets ? a.offsets[a.S] : a.S * a.L; }

// Few sequences leave threads idle unless their channels are split too.
i64 scan_parts(const Scan& a) { return a.S >= 8 ? 1 : min_of(4, padded(a.D) / VL); }

i64 scan_scratch(const Scan& a, i64 backward) {
  const i64 width = padded(a.D), tile = CHUNK * NB * VL;
  if (a.last)
    return backward ? 2 * room(CHUNK * a.N) + 4 * room(CHUNK * width) + 2 * room(width, 8) + 2 * room(width)
                    : room(CHUNK * a.N) + 2 * room(width);
  return backward ? 7 * room(CHUNK * width) + 2 * room(a.N * width) + 4 * room(tile)
                  : 3 * room(CHUNK * VL) + room(a.N * width);
}

i64 scan_workspace(const Scan& a, i64 backward) {
  const i64 width = padded(a.D), groups = row_groups(a.S), parts = scan_parts(a);
  i64 bytes = 64 + room(a.N * width) + a.threads * room(scan_scratch(a, backward), 1);
  if (backward) {
    bytes += room(groups * a.N * width) + 2 * room(groups * width);
    if (!a.last && a.threads > 1 && parts > 1) bytes += 2 * room(parts * scan_rows(a) * a.N);
  }
  return bytes;
}

ScanCall scan_call(const Scan& a, i64 backward) {
  ScanCall call = {};
  Arena arena(a.workspace);
  const i64 width = padded(a.D), groups = row_groups(a.S);
  call.a = &a;
  call.width = width;
  call.parts = scan_parts(a);
  call.pieces = !backward ? forward_parts(a.threads, a.S, width / VL) : a.threads == 1 ? 1 : call.parts;
  call.A2 = arena.floats(a.N * width);
  zero(call.A2, a.N * width);
  for (i64 d = 0; d < a.D; d++)
    for (i64 n = 0; n < a.N; n++) call.A2[n * width + d] = a.A[d * a.N + n] * LOG2E;
  if (backward) {
    call.gA = arena.floats(groups * a.N * width);
    call.gskip = arena.floats(groups * width);
    call.gbias = arena.floats(groups * width);
    zero(call.gA, groups * a.N * width);
    zero(call.gskip, groups * width);
    zero(call.gbias, groups * width);
    call.gB = a.gB;
    call.gC = a.gC;
    if (!a.last && call.pieces > 1) {
      call.gB = arena.floats(call.pieces * scan_rows(a) * a.N);
      call.gC = arena.floats(call.pieces * scan_rows(a) * a.N);
    }
  }
  call.scratch_bytes = room(scan_scratch(a, backward), 1);
  call.scratch = arena.at;
  return call;
}

INLINE vec step_size(const Scan& a, i64 row, i64 d, i64 lanes) {
  vec dt = load(a.dt + row * a.sdt + d, lanes);
  if (a.dt_bias) dt += load(a.dt_bias + d, lanes);
  return a.dt_softplus ? softplus(dt) : dt;
}
// Derivative of the step size by what was given.
INLINE vec step_slope(const Scan& a, i64 row, i64 d, i64 lanes) {
  if (!a.dt_softplus) return all(1.f);
  vec dt = load(a.dt + row * a.sdt + d, lanes);
  if (a.dt_bias) dt += load(a.dt_bias + d, lanes);
  return sigmoid(dt);
}
INLINE vec skip_of(const Scan& a, i64 d, i64 lanes) { return a.skip ? load(a.skip + d, lanes) : all(0.f); }

// --- all positions ------------------------------------------------------------------------------------------------

// K states of one vector of channels through `steps` positions: h in and out, C h added to y.
template <int K>
INLINE void scan_tile(i64 steps, const float* A2, i64 width, const float* B, i64 sB, const float* C, i64 sC,
                      const float* dt, const float* v, float* y, float* h) {
  vec A[K], state[K];
  for (int k = 0; k < K; k++) {
    A[k] = load(A2 + k * width);
    state[k] = load(h + k * VL);
  }
  for (i64 t = 0; t < steps; t++) {
    const float *Bt = B + t * sB, *Ct = C + t * sC;
    const vec step = load(dt + t * VL), in = load(v + t * VL);
    vec out = load(y + t * VL);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      state[k] = exp2_of(step * A[k]) * state[k] + in * Bt[k];
      out += state[k] * Ct[k];
    }
    store(y + t * VL, out);
  }
  for (int k = 0; k < K; k++) store(h + k * VL, state[k]);
}

// The channels from d0 to d1 of a sequence, chunk by chunk, so that all of a row is read while it is near.
void scan_forward_channels(const ScanCall& call, i64 s, i64 d0, i64 d1, char* scratch) {
  const Scan& a = *call.a;
  const i64 N = a.N, D = a.D, width = call.width;
  const i64 begin = begin_of(a.offsets, a.L, s), length = begin_of(a.offsets, a.L, s + 1) - begin;
  Arena arena(scratch);
  float *states = arena.floats(N * width), *dt = arena.floats(CHUNK * VL), *v = arena.floats(CHUNK * VL);
  float* y = arena.floats(CHUNK * VL);
  for (i64 d = d0; d < d1; d += VL)
    for (i64 n = 0; n < N; n++)
      store(states + d * N + n * VL, a.state ? load(a.state + (s * N + n) * D + d, D - d) : all(0.f));
  for (i64 first = 0; first < length; first += CHUNK)
    for (i64 d = d0; d < d1; d += VL) {
      const i64 row = begin + first, steps = min_of(CHUNK, length - first), lanes = D - d;
      float* h = states + d * N;  // [N, VL]
      const vec skip = skip_of(a, d, lanes);
      if (first && a.kept) {
        float* kept = a.kept + (begin / CHUNK + first / CHUNK - 1) * N * D + d;
        for (i64 n = 0; n < N; n++) store(kept + n * D, load(h + n * VL), lanes);
      }
      for (i64 t = 0; t < steps; t++) {
        const vec x = load(a.x + (row + t) * a.sx + d, lanes), step = step_size(a, row + t, d, lanes);
        store(dt + t * VL, step);
        store(v + t * VL, step * x);
        store(y + t * VL, skip * x);
      }
      i64 n = 0;
      for (; n + NB <= N; n += NB)
        scan_tile<NB>(steps, call.A2 + n * width + d, width, a.B + row * a.sB + n, a.sB, a.C + row * a.sC + n, a.sC,
                      dt, v, y, h + n * VL);
      for (; n < N; n++)
        scan_tile<1>(steps, call.A2 + n * width + d, width, a.B + row * a.sB + n, a.sB, a.C + row * a.sC + n, a.sC,
                     dt, v, y, h + n * VL);
      for (i64 t = 0; t < steps; t++) {
        vec out = load(y + t * VL);
        if (a.z) {
          const vec z = load(a.z + (row + t) * a.sz + d, lanes);
          out *= z * sigmoid(z);
        }
        store(a.y + (row + t) * D + d, out, lanes);
      }
    }
  for (i64 d = d0; a.final && d < d1; d += VL)
    for (i64 n = 0; n < N; n++) store(a.final + (s * N + n) * D + d, load(states + d * N + n * VL), D - d);
}

// K states of one vector of channels back through a chunk. The states and decays of the chunk are computed again (H, E);
// g is the gradient of the state, carried from the future into the past. outer_B and outer_C gather, lane by lane, what
// sums over all channels to the gradients of B and C.
template <int K>
INLINE void scan_tile_backward(i64 steps, bool first_block, const float* A2, i64 width, const float* B, i64 sB,
                               const float* C, i64 sC, const float* dt, const float* v, const float* gy, float* y,
                               float* gv, float* gdt, const float* h, i64 sh, float* g, float* gA, float* H, float* E,
                               float* outer_B, float* outer_C) {
  vec A[K], state[K], start[K], grad[K], gradA[K];
  for (int k = 0; k < K; k++) {
    A[k] = load(A2 + k * width);
    start[k] = state[k] = load(h + k * sh);
    grad[k] = load(g + k * width);
    gradA[k] = all(0.f);
  }
  for (i64 t = 0; t < steps; t++) {
    const float *Bt = B + t * sB, *Ct = C + t * sC;
    const vec step = load(dt + t * VL), in = load(v + t * VL);
    vec out = load(y + t * VL);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const vec decay = exp2_of(step * A[k]);
      state[k] = decay * state[k] + in * Bt[k];
      out += state[k] * Ct[k];
      store(H + (t * K + k) * VL, state[k]);
      store(E + (t * K + k) * VL, decay);
    }
    store(y + t * VL, out);
  }
  for (i64 t = steps - 1; t >= 0; t--) {
    const float *Bt = B + t * sB, *Ct = C + t * sC;
    const vec step = load(dt + t * VL), in = load(v + t * VL), gout = load(gy + t * VL);
    vec sum_v = load(gv + t * VL), sum_dt = load(gdt + t * VL);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const i64 at = (t * K + k) * VL;
      const vec before = t ? load(H + at - K * VL) : start[k];
      vec now = grad[k] + gout * Ct[k];
      vec toC = gout * load(H + at), toB = now * in;
      if (!first_block) {
        toC += load(outer_C + at);
        toB += load(outer_B + at);
      }
      store(outer_C + at, toC);
      store(outer_B + at, toB);
      sum_v += now * Bt[k];
      now *= load(E + at);
      grad[k] = now;
      const vec flow = now * before;  // gradient of the exponent
      sum_dt += flow * A[k];
      gradA[k] += flow * step;
    }
    store(gv + t * VL, sum_v);
    store(gdt + t * VL, sum_dt);
  }
  for (int k = 0; k < K; k++) {
    store(g + k * width, grad[k]);
    store(gA + k * width, load(gA + k * width) + gradA[k]);  // sums of sums keep more digits
  }
}

struct ScanBackwardScratch {
  float *dt, *v, *x, *gy, *y, *gv, *gdt;  // [width / VL, CHUNK, VL] each
  float *g, *start;                       // [N, width]: gradient of the state, state before the chunk
  float *H, *E, *outer_B, *outer_C;       // [CHUNK, NB, VL] each
};

// Sums over channels of what was gathered for K states of every step, [steps, K, VL]; to K numbers of each row.
template <int K>
INLINE void sum_outer(i64 steps, const float* outer, float* out, i64 stride, bool add) {
  float sums[VL];
  for (i64 i = 0; i < steps * K; i += VL) {
    const i64 count = min_of(VL, steps * K - i);
    vec of[VL];
    if (count == VL)
      for (int j = 0; j < VL; j++) of[j] = load(outer + (i + j) * VL);
    else
      for (int j = 0; j < VL; j++) of[j] = j < count ? load(outer + (i + j) * VL) : all(0.f);
    store(sums, sum_each(of));
    for (int j = 0; j < count; j += K) {
      float* to = out + (i + j) / K * stride;
      for (int k = 0; k < K; k++) to[k] = add ? to[k] + sums[j + k] : sums[j + k];
    }
  }
}

template <int K>
INLINE void scan_states_backward(const ScanCall& call, const ScanBackwardScratch& w, i64 row, i64 steps, i64 n,
                                 i64 part0, i64 part, float* gA) {
  const Scan& a = *call.a;
  const i64 width = call.width, d0 = call.channel(part), d1 = call.channel(part + 1);
  const i64 at = (part0 * scan_rows(a) + row) * a.N + n;
  for (i64 d = d0; d < d1; d += VL)
    scan_tile_backward<K>(steps, d == d0, call.A2 + n * width + d, width, a.B + row * a.sB + n, a.sB,
                          a.C + row * a.sC + n, a.sC, w.dt + d * CHUNK, w.v + d * CHUNK, w.gy + d * CHUNK, w.y + d * CHUNK,
                          w.gv + d * CHUNK, w.gdt + d * CHUNK,
                          w.start + n * width + d, width, w.g + n * width + d, gA + n * width + d, w.H, w.E, w.outer_B,
                          w.outer_C);
  sum_outer<K>(steps, w.outer_B, call.gB + at, a.N, part > part0);
  sum_outer<K>(steps, w.outer_C, call.gC + at, a.N, part > part0);
}

void scan_backward_task(void* context, i64 task, i64 thread) {
  const ScanCall& call = *(const ScanCall*)context;
  const Scan& a = *call.a;
  const i64 N = a.N, D = a.D, width = call.width, piece = task % call.pieces, group = task / call.pieces;
  const i64 part0 = call.parts * piece / call.pieces, part1 = call.parts * (piece + 1) / call.pieces;
  const i64 d0 = call.channel(part0), d1 = call.channel(part1);
  Arena arena(call.scratch + thread * call.scratch_bytes);
  ScanBackwardScratch w;
  w.dt = arena.floats(CHUNK * width);
  w.v = arena.floats(CHUNK * width);
  w.x = arena.floats(CHUNK * width);
  w.gy = arena.floats(CHUNK * width);
  w.y = arena.floats(CHUNK * width);
  w.gv = arena.floats(CHUNK * width);
  w.gdt = arena.floats(CHUNK * width);
  w.g = arena.floats(N * width);
  w.start = arena.floats(N * width);
  w.H = arena.floats(CHUNK * NB * VL);
  w.E = arena.floats(CHUNK * NB * VL);
  w.outer_B = arena.floats(CHUNK * NB * VL);
  w.outer_C = arena.floats(CHUNK * NB * VL);
  float *gA = call.gA + group * N * width, *gskip = call.gskip + group * width, *gbias = call.gbias + group * width;

  for (i64 s = group_begin(a.offsets, a.S, group); s < group_begin(a.offsets, a.S, group + 1); s++) {
    const i64 begin = begin_of(a.offsets, a.L, s), length = begin_of(a.offsets, a.L, s + 1) - begin;
    for (i64 n = 0; n < N; n++)
      for (i64 d = d0; d < d1; d += VL)
        store(w.g + n * width + d, a.gfinal ? load(a.gfinal + (s * N + n) * D + d, D - d) : all(0.f));
    for (i64 first = length ? (length - 1) / CHUNK * CHUNK : -1; first >= 0; first -= CHUNK) {
      const i64 row = begin + first, steps = min_of(CHUNK, length - first);
      for (i64 t = 0; t < steps; t++)
        for (i64 d = d0; d < d1; d += VL) {
          const i64 at = d * CHUNK + t * VL, lanes = D - d;
          const vec x = load(a.x + (row + t) * a.sx + d, lanes), step = step_size(a, row + t, d, lanes);
          vec gy = load(a.gy + (row + t) * a.sgy + d, lanes);
          if (a.z) {
            const vec z = load(a.z + (row + t) * a.sz + d, lanes);
            gy *= z * sigmoid(z);
          }
          store(w.dt + at, step);
          store(w.v + at, step * x);
          store(w.x + at, x);
          store(w.gy + at, gy);
          store(w.y + at, skip_of(a, d, lanes) * x);
          store(w.gv + at, all(0.f));
          store(w.gdt + at, all(0.f));
        }
      const float* start = first ? a.kept + (begin / CHUNK + first / CHUNK - 1) * N * D
                                 : (a.state ? a.state + s * N * D : nullptr);
      for (i64 n = 0; n < N; n++)
        for (i64 d = d0; d < d1; d += VL)
          store(w.start + n * width + d, start ? load(start + n * D + d, D - d) : all(0.f));
      for (i64 part = part0; part < part1; part++) {
        i64 n = 0;
        for (; n + NB <= N; n += NB) scan_states_backward<NB>(call, w, row, steps, n, part0, part, gA);
        for (; n < N; n++) scan_states_backward<1>(call, w, row, steps, n, part0, part, gA);
      }
      for (i64 t = 0; t < steps; t++)
        for (i64 d = d0; d < d1; d += VL) {
          const i64 at = d * CHUNK + t * VL, lanes = D - d;
          const vec x = load(w.x + at), gv = load(w.gv + at), gy = load(w.gy + at);
          const vec gdt = (gv * x + load(w.gdt + at) * LN2) * step_slope(a, row + t, d, lanes);  // LN2: A2 = A log2(e)
          store(a.gx + (row + t) * D + d, gv * load(w.dt + at) + gy * skip_of(a, d, lanes), lanes);
          store(a.gdt + (row + t) * D + d, gdt, lanes);
          store(gbias + d, load(gbias + d) + gdt);
          store(gskip + d, load(gskip + d) + gy * x);
          if (a.z) {
            const vec z = load(a.z + (row + t) * a.sz + d, lanes), gate = sigmoid(z);
            const vec out = load(a.gy + (row + t) * a.sgy + d, lanes) * load(w.y + at);
            store(a.gz + (row + t) * D + d, out * gate * (1.f + z * (1.f - gate)), lanes);
          }
        }
    }
    if (a.gstate)
      for (i64 n = 0; n < N; n++)
        for (i64 d = d0; d < d1; d += VL) store(a.gstate + (s * N + n) * D + d, load(w.g + n * width + d), D - d);
  }
}

// --- the last position alone --------------------------------------------------------------------------------------
//
// With w_s the sum of the steps after s: y_last = sum_s v_s sum_n C_n B_sn exp(w_s A_n), v_s = dt_s x_s. No recurrence:
// nothing has to be kept, and the backward computes every exponential once.

// C_n B_tn of a chunk, [steps, N].
void products(const Scan& a, i64 s, i64 row, i64 steps, float* CB) {
  for (i64 t = 0; t < steps; t++)
    for (i64 n = 0; n < a.N; n++) CB[t * a.N + n] = a.C[s * a.sC + n] * a.B[(row + t) * a.sB + n];
}

void scan_last_forward(const ScanCall& call, i64 s, char* scratch) {
  const Scan& a = *call.a;
  const i64 N = a.N, D = a.D, width = call.width;
  const i64 begin = begin_of(a.offsets, a.L, s), end = begin_of(a.offsets, a.L, s + 1);
  Arena arena(scratch);
  float *CB = arena.floats(CHUNK * N), *later = arena.floats(width), *y = arena.floats(width);
  zero(later, width);
  zero(y, width);
  for (i64 stop = end; stop > begin; stop -= CHUNK) {  // from the end, where the sum of later steps is 0
    const i64 row = max_of(begin, stop - CHUNK);
    products(a, s, row, stop - row, CB);
    for (i64 d = 0; d < D; d += VL) {
      vec after = load(later + d), out = load(y + d);
      for (i64 r = stop - 1; r >= row; r--) {
        const float* cb = CB + (r - row) * N;
        const vec step = step_size(a, r, d, D - d), v = step * load(a.x + r * a.sx + d, D - d);
        vec even = all(0.f), odd = all(0.f);
        i64 n = 0;
        for (; n + 2 <= N; n += 2) {
          even += exp2_of(after * load(call.A2 + n * width + d)) * cb[n];
          odd += exp2_of(after * load(call.A2 + (n + 1) * width + d)) * cb[n + 1];
        }
        if (n < N) even += exp2_of(after * load(call.A2 + n * width + d)) * cb[n];
        out += v * (even + odd);
        after += step;
      }
      store(later + d, after);
      store(y + d, out);
    }
  }
  for (i64 d = 0; d < D; d += VL) {
    vec out = load(y + d);
    if (end > begin) out += skip_of(a, d, D - d) * load(a.x + (end - 1) * a.sx + d, D - d);
    if (a.z) {
      const vec z = load(a.z + s * a.sz + d, D - d);
      out *= z * sigmoid(z);
    }
    store(a.y + s * D + d, out, D - d);
  }
}

// K states of all channels of one position: adds to gv, gw and gA, and writes the gradient of C_n B_n.
template <int K>
INLINE void last_tile_backward(const ScanCall& call, i64 n, const float* cb, const float* w, const float* gyv,
                               float* gv, float* gw, float* gA, float* gCB) {
  const i64 width = call.width;
  vec outer[K];
  for (int k = 0; k < K; k++) outer[k] = all(0.f);
  for (i64 d = 0; d < width; d += VL) {
    const vec after = load(w + d), flow = load(gyv + d), flow_after = flow * after;
    vec sum_v = load(gv + d), sum_w = load(gw + d);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const vec A = load(call.A2 + (n + k) * width + d), decay = exp2_of(after * A), part = decay * cb[k];
      float* at = gA + (n + k) * width + d;
      outer[k] += decay * flow;
      sum_v += part;
      sum_w += part * A;
      store(at, load(at) + part * flow_after);
    }
    store(gv + d, sum_v);
    store(gw + d, sum_w);
  }
  for (int k = 0; k < K; k++) gCB[k] = sum(outer[k]);
}

void scan_last_backward_task(void* context, i64 group, i64 thread) {
  const ScanCall& call = *(const ScanCall*)context;
  const Scan& a = *call.a;
  const i64 N = a.N, D = a.D, width = call.width;
  Arena arena(call.scratch + thread * call.scratch_bytes);
  float *CB = arena.floats(CHUNK * N), *gCB = arena.floats(CHUNK * N);
  float *w = arena.floats(CHUNK * width), *gyv = arena.floats(CHUNK * width);
  float *gv = arena.floats(CHUNK * width), *gw = arena.floats(CHUNK * width);
  double *later = arena.take<double>(width);  // sum of the steps that still come: a difference, and so in double
  double *flowed = arena.take<double>(width); // sum of gw over the positions that were
  float *gy = arena.floats(width), *y = arena.floats(width);
  float *gA = call.gA + group * N * width, *gskip = call.gskip + group * width, *gbias = call.gbias + group * width;

  for (i64 s = group_begin(a.offsets, a.S, group); s < group_begin(a.offsets, a.S, group + 1); s++) {
    const i64 begin = begin_of(a.offsets, a.L, s), end = begin_of(a.offsets, a.L, s + 1);
    for (i64 d = 0; d < D; d += VL) {
      vec flow = load(a.gy + s * a.sgy + d, D - d);
      if (a.z) {
        const vec z = load(a.z + s * a.sz + d, D - d);
        flow *= z * sigmoid(z);
      }
      store(gy + d, flow);
    }
    zero(y, width);
    for (i64 d = 0; d < width; d++) later[d] = flowed[d] = 0;
    for (i64 r = begin; r < end; r++)
      for (i64 d = 0; d < D; d += VL) {
        float step[VL];
        store(step, step_size(a, r, d, D - d));
        for (i64 i = 0; i < VL; i++) later[d + i] += step[i];
      }
    for (i64 n = 0; n < N; n++) a.gC[s * N + n] = 0;
    for (i64 row = begin; row < end; row += CHUNK) {
      const i64 steps = min_of(CHUNK, end - row);
      products(a, s, row, steps, CB);
      for (i64 t = 0; t < steps; t++)
        for (i64 d = 0; d < D; d += VL) {
          const vec step = step_size(a, row + t, d, D - d);
          float dt[VL];
          store(dt, step);
          for (i64 i = 0; i < VL; i++) {
            later[d + i] -= dt[i];
            w[t * width + d + i] = (float)later[d + i];
          }
          store(gyv + t * width + d, load(gy + d) * step * load(a.x + (row + t) * a.sx + d, D - d));
        }
      zero(gv, steps * width);
      zero(gw, steps * width);
      for (i64 t = 0; t < steps; t++) {
        const i64 at = t * width;
        i64 n = 0;
        for (; n + NB <= N; n += NB)
          last_tile_backward<NB>(call, n, CB + t * N + n, w + at, gyv + at, gv + at, gw + at, gA, gCB + t * N + n);
        for (; n < N; n++)
          last_tile_backward<1>(call, n, CB + t * N + n, w + at, gyv + at, gv + at, gw + at, gA, gCB + t * N + n);
      }
      for (i64 t = 0; t < steps; t++) {
        for (i64 n = 0; n < N; n++) {
          a.gB[(row + t) * N + n] = gCB[t * N + n] * a.C[s * a.sC + n];
          a.gC[s * N + n] += gCB[t * N + n] * a.B[(row + t) * a.sB + n];
        }
        for (i64 d = 0; d < D; d += VL) {
          const i64 at = t * width + d, lanes = D - d;
          const vec x = load(a.x + (row + t) * a.sx + d, lanes), step = step_size(a, row + t, d, lanes);
          const vec inner = load(gv + at), gin = inner * load(gy + d);
          const bool is_last = row + t == end - 1;
          vec gx = gin * step;
          if (is_last) {
            gx += load(gy + d) * skip_of(a, d, lanes);
            store(gskip + d, load(gskip + d) + load(gy + d) * x);
          }
          store(a.gx + (row + t) * D + d, gx, lanes);
          float before[VL], now[VL];
          store(now, load(gw + at) * load(gyv + at) * LN2);
          for (i64 i = 0; i < VL; i++) {
            before[i] = (float)flowed[d + i];  // dt_t is part of w_s for every s before t
            flowed[d + i] += now[i];
          }
          const vec gdt = (gin * x + load(before)) * step_slope(a, row + t, d, lanes);
          store(a.gdt + (row + t) * D + d, gdt, lanes);
          store(gbias + d, load(gbias + d) + gdt);
          if (a.z) store(y + d, load(y + d) + inner * step * x + (is_last ? skip_of(a, d, lanes) * x : all(0.f)));
        }
      }
    }
    if (a.z)
      for (i64 d = 0; d < D; d += VL) {
        const vec z = load(a.z + s * a.sz + d, D - d), gate = sigmoid(z);
        const vec flow = load(a.gy + s * a.sgy + d, D - d) * load(y + d);
        store(a.gz + s * D + d, flow * gate * (1.f + z * (1.f - gate)), D - d);
      }
  }
}

// --- calls --------------------------------------------------------------------------------------------------------

void scan_forward_task(void* context, i64 task, i64 thread) {
  const ScanCall& call = *(const ScanCall*)context;
  const Scan& a = *call.a;
  char* scratch = call.scratch + thread * call.scratch_bytes;
  if (a.last) return scan_last_forward(call, task, scratch);
  const i64 blocks = call.width / VL, s = task / call.pieces, piece = task % call.pieces;
  scan_forward_channels(call, s, blocks * piece / call.pieces * VL, blocks * (piece + 1) / call.pieces * VL, scratch);
}

void scan_forward(const Scan& a) {
  ScanCall call = scan_call(a, 0);
  parallel(a.threads, a.last ? a.S : a.S * call.pieces, scan_forward_task, &call);
}

void scan_backward(const Scan& a) {
  ScanCall call = scan_call(a, 1);
  const i64 N = a.N, D = a.D, width = call.width, groups = row_groups(a.S);
  if (a.last)
    parallel(a.threads, groups, scan_last_backward_task, &call);
  else
    parallel(a.threads, groups * call.pieces, scan_backward_task, &call);
  for (i64 piece = 0; call.gB != a.gB && piece < call.pieces; piece++) {
    const i64 size = scan_rows(a) * N;
    add_row(call.gB + piece * size, size, a.gB, piece > 0);
    add_row(call.gC + piece * size, size, a.gC, piece > 0);
  }
  for (i64 group = 1; group < groups; group++) {
    for (i64 i = 0; i < N * width; i++) call.gA[i] += call.gA[group * N * width + i];
    for (i64 d = 0; d < width; d++) {
      call.gskip[d] += call.gskip[group * width + d];
      call.gbias[d] += call.gbias[group * width + d];
    }
  }
  for (i64 d = 0; d < D; d++) {
    for (i64 n = 0; n < N; n++) a.gA[d * N + n] = groups ? call.gA[n * width + d] : 0.f;
    if (a.gskip) a.gskip[d] = groups ? call.gskip[d] : 0.f;
    if (a.gdt_bias) a.gdt_bias[d] = groups ? call.gbias[d] : 0.f;
  }
}

}  // namespace
