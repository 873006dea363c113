// Depthwise convolution along time with bias and SiLU, forward and backward; the backward computes the sums again.

#pragma once
#include "simd.h"

namespace {

const i64 MOST_TAPS = 16;  // Python sends wider filters elsewhere

struct ConvCall {
  const Conv* a;
  i64 width, parts;   // channels, padded; pieces of them that are worked on apart
  float* weight;      // [K, width]
  float* zeros;       // [width]: what stands before and after a sequence
  float* partial;     // [groups, K + 1, width]: gradients of the taps and of the bias
  char* scratch;
  i64 scratch_bytes;  // of one thread
};

i64 conv_parts(const Conv& a) { return a.S >= 8 ? 1 : min_of(4, padded(a.D) / VL); }

i64 conv_scratch(const Conv& a, i64 backward) {
  return backward ? room(a.K * padded(a.D)) + room((CHUNK + 2 * a.K) * VL) : 0;
}

i64 conv_workspace(const Conv& a, i64 backward) {
  const i64 width = padded(a.D), partial = backward ? row_groups(a.S) * (a.K + 1) * width : 0;
  return 64 + room(a.K * width) + room(width) + room(partial) + a.threads * room(conv_scratch(a, backward), 1);
}

ConvCall conv_call(const Conv& a, i64 backward) {
  ConvCall call = {};
  Arena arena(a.workspace);
  call.a = &a;
  call.width = padded(a.D);
  call.parts = conv_parts(a);
  call.weight = arena.floats(a.K * call.width);
  call.zeros = arena.floats(call.width);
  zero(call.weight, a.K * call.width);
  zero(call.zeros, call.width);
  for (i64 d = 0; d < a.D; d++)
    for (i64 k = 0; k < a.K; k++) call.weight[k * call.width + d] = a.weight[d * a.K + k];
  if (backward) {
    call.partial = arena.floats(row_groups(a.S) * (a.K + 1) * call.width);
    zero(call.partial, row_groups(a.S) * (a.K + 1) * call.width);
  }
  call.scratch_bytes = room(conv_scratch(a, backward), 1);
  call.scratch = arena.at;
  return call;
}

// The inputs at a position of sequence s; before the first come the carried ones.
INLINE const float* input_row(const ConvCall& call, i64 s, i64 begin, i64 length, i64 at) {
  const Conv& a = *call.a;
  if (at < 0) return a.state ? a.state + (s * a.K + a.K + at) * a.D : call.zeros;
  return at < length ? a.x + (begin + at) * a.sx : call.zeros;
}

// taps[k]..taps[steps - 1 + k] are the rows that tap k meets in a chunk.
template <int FIXED>
INLINE void conv_forward_tile(const ConvCall& call, const float** taps, i64 row, i64 steps, i64 d) {
  const Conv& a = *call.a;
  const i64 K = FIXED ? FIXED : a.K, lanes = a.D - d;
  vec w[FIXED ? FIXED : MOST_TAPS];
  for (i64 k = 0; k < K; k++) w[k] = load(call.weight + k * call.width + d);
  const vec bias = a.bias ? load(a.bias + d, lanes) : all(0.f);
  for (i64 t = 0; t < steps; t++) {
    vec y = bias;
    for (i64 k = 0; k < K; k++) y += w[k] * load(taps[t + k] + d, lanes);
    store(a.y + (row + t) * a.D + d, a.silu ? y * sigmoid(y) : y, lanes);
  }
}

void conv_forward_task(void* context, i64 task, i64) {
  const ConvCall& call = *(const ConvCall*)context;
  const Conv& a = *call.a;
  const i64 K = a.K, s = task / call.parts, part = task % call.parts, blocks = call.width / VL;
  const i64 d0 = blocks * part / call.parts * VL, d1 = blocks * (part + 1) / call.parts * VL;
  const i64 begin = begin_of(a.offsets, a.L, s), length = begin_of(a.offsets, a.L, s + 1) - begin;
  const float* taps[CHUNK + MOST_TAPS];
  for (i64 first = 0; first < length; first += CHUNK) {
    const i64 steps = min_of(CHUNK, length - first);
    for (i64 i = 0; i < steps + K - 1; i++) taps[i] = input_row(call, s, begin, length, first - a.lead + i);
    for (i64 d = d0; d < d1; d += VL) {
      if (K == 3) conv_forward_tile<3>(call, taps, begin + first, steps, d);
      else if (K == 4) conv_forward_tile<4>(call, taps, begin + first, steps, d);
      else if (K == 5) conv_forward_tile<5>(call, taps, begin + first, steps, d);
      else if (K == 7) conv_forward_tile<7>(call, taps, begin + first, steps, d);
      else conv_forward_tile<0>(call, taps, begin + first, steps, d);
    }
  }
  if (a.final)
    for (i64 k = 0; k < K; k++)
      for (i64 d = d0; d < d1; d += VL)
        store(a.final + (s * K + k) * a.D + d, load(input_row(call, s, begin, length, length - K + k) + d, a.D - d),
              a.D - d);
}

// One vector of channels of one chunk. `grads` holds the gradients of the sums at K - 1 positions before the chunk, then
// at the chunk's own; those before come from, and the last go to, `carried` [K - 1].
template <int FIXED>
INLINE void conv_backward_tile(const ConvCall& call, const float** taps, i64 s, i64 begin, i64 first, i64 steps,
                               i64 length, i64 d, float* carried, float* grads, float* partial) {
  const Conv& a = *call.a;
  const i64 K = FIXED ? FIXED : a.K, D = a.D, lanes = D - d, width = call.width;
  vec w[FIXED ? FIXED : MOST_TAPS], gw[FIXED ? FIXED : MOST_TAPS];
  for (i64 k = 0; k < K; k++) {
    w[k] = load(call.weight + k * width + d);
    gw[k] = load(partial + k * width + d);
  }
  vec gbias = load(partial + K * width + d);
  const vec bias = a.bias ? load(a.bias + d, lanes) : all(0.f);
  for (i64 k = 0; k < K - 1; k++) store(grads + k * VL, load(carried + k * width + d));
  for (i64 t = 0; t < steps; t++) {
    vec g = load(a.gy + (begin + first + t) * a.sgy + d, lanes);
    if (a.silu) {
      vec y = bias;
      for (i64 k = 0; k < K; k++) y += w[k] * load(taps[t + k] + d, lanes);
      const vec gate = sigmoid(y);
      g *= gate * (1.f + y * (1.f - gate));
    }
    for (i64 k = 0; k < K; k++) gw[k] += g * load(taps[t + k] + d, lanes);
    gbias += g;
    store(grads + (K - 1 + t) * VL, g);
  }
  for (i64 k = 0; k < K; k++) store(partial + k * width + d, gw[k]);
  store(partial + K * width + d, gbias);
  for (i64 k = 0; k < K - 1; k++) store(carried + k * width + d, load(grads + (steps + k) * VL));
  // the inputs whose last reader is in this chunk
  const i64 begin_in = first - a.lead, end_in = first + steps == length ? length : first + steps - a.lead;
  if (first + steps == length) zero(grads + (K - 1 + steps) * VL, a.lead * VL);
  for (i64 at = begin_in; at < end_in; at++) {
    if (at < 0 && !a.gstate) continue;
    vec g = all(0.f);
    for (i64 k = 0; k < K; k++) g += w[k] * load(grads + (at - begin_in + K - 1 - k) * VL);
    store(at < 0 ? a.gstate + (s * K + K + at) * D + d : a.gx + (begin + at) * D + d, g, lanes);
  }
}

void conv_backward_task(void* context, i64 task, i64 thread) {
  const ConvCall& call = *(const ConvCall*)context;
  const Conv& a = *call.a;
  const i64 K = a.K, D = a.D, width = call.width, part = task % call.parts, group = task / call.parts;
  const i64 blocks = width / VL, d0 = blocks * part / call.parts * VL, d1 = blocks * (part + 1) / call.parts * VL;
  Arena arena(call.scratch + thread * call.scratch_bytes);
  float *carried = arena.floats(K * width), *grads = arena.floats((CHUNK + 2 * K) * VL);
  float* partial = call.partial + group * (K + 1) * width;
  const float* taps[CHUNK + MOST_TAPS];
  for (i64 s = group_begin(a.offsets, a.S, group); s < group_begin(a.offsets, a.S, group + 1); s++) {
    const i64 begin = begin_of(a.offsets, a.L, s), length = begin_of(a.offsets, a.L, s + 1) - begin;
    if (a.gstate)
      for (i64 k = 0; k < K; k++) memset(a.gstate + (s * K + k) * D + d0, 0, (min_of(d1, D) - d0) * sizeof(float));
    zero(carried, K * width);
    for (i64 first = 0; first < length; first += CHUNK) {
      const i64 steps = min_of(CHUNK, length - first);
      for (i64 i = 0; i < steps + K - 1; i++) taps[i] = input_row(call, s, begin, length, first - a.lead + i);
      for (i64 d = d0; d < d1; d += VL) {
        if (K == 3) conv_backward_tile<3>(call, taps, s, begin, first, steps, length, d, carried, grads, partial);
        else if (K == 4) conv_backward_tile<4>(call, taps, s, begin, first, steps, length, d, carried, grads, partial);
        else if (K == 5) conv_backward_tile<5>(call, taps, s, begin, first, steps, length, d, carried, grads, partial);
        else if (K == 7) conv_backward_tile<7>(call, taps, s, begin, first, steps, length, d, carried, grads, partial);
        else conv_backward_tile<0>(call, taps, s, begin, first, steps, length, d, carried, grads, partial);
      }
    }
    if (a.gfinal)
      for (i64 k = 0; k < K; k++) {
        const i64 at = length - K + k;
        if (at < 0 && !a.gstate) continue;
        float* to = at < 0 ? a.gstate + (s * K + K + at) * D : a.gx + (begin + at) * D;
        for (i64 d = d0; d < min_of(d1, D); d++) to[d] += a.gfinal[(s * K + k) * D + d];
      }
  }
}

void conv_forward(const Conv& a) {
  ConvCall call = conv_call(a, 0);
  parallel(a.threads, a.S * call.parts, conv_forward_task, &call);
}

void conv_backward(const Conv& a) {
  ConvCall call = conv_call(a, 1);
  const i64 groups = row_groups(a.S), size = (a.K + 1) * call.width;
  parallel(a.threads, groups * call.parts, conv_backward_task, &call);
  for (i64 group = 1; group < groups; group++)
    for (i64 i = 0; i < size; i++) call.partial[i] += call.partial[group * size + i];
  for (i64 d = 0; d < a.D; d++) {
    for (i64 k = 0; k < a.K; k++) a.gweight[d * a.K + k] = groups ? call.partial[k * call.width + d] : 0.f;
    if (a.gbias) a.gbias[d] = groups ? call.partial[a.K * call.width + d] : 0.f;
  }
}

}  // namespace
