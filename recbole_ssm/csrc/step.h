// One event of each of B users through one block: mixer (Mamba or Mamba-2), residual, norm, feed-forward part, norm; or
// each norm before its part.
//
// At one user all of it is reading weights and states once, so nothing is laid out anew: weights are used as PyTorch
// holds them, [out, in], by VL dot products at a time. Up to USERS users pass through together and share what is read.

#pragma once
#include "simd.h"

namespace {

const i64 USERS = 16;

// --- linear layers ------------------------------------------------------------------------------------------------

// The products of ROWS rows of W with x of VL / ROWS users; those of one user stand together.
template <int ROWS>
INLINE vec dot_products(i64 inner, i64 rows, const float* W, const float* x, i64 ldx) {
  const int users = VL / ROWS;
  const float* w[ROWS];
  for (int r = 0; r < ROWS; r++) w[r] = W + min_of(r, rows - 1) * inner;
  vec c[VL];
  for (int i = 0; i < VL; i++) c[i] = all(0.f);
  i64 k = 0;
  for (; k + VL <= inner; k += VL) {
    vec in[users];
    for (int u = 0; u < users; u++) in[u] = load(x + u * ldx + k);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      const vec weight = load(w[r] + k);
      for (int u = 0; u < users; u++) c[u * ROWS + r] += weight * in[u];
    }
  }
  if (k < inner)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      const vec weight = load(w[r] + k, inner - k);
      for (int u = 0; u < users; u++) c[u * ROWS + r] += weight * load(x + u * ldx + k, inner - k);
    }
  return sum_each(c);
}

// y[u, o] = bias[o] + sum_k W[o, k] x[u, k]
void linear(i64 users, i64 inner, const float* x, i64 ldx, i64 outer, const float* W, const float* bias, float* y,
            i64 ldy) {
  const int TOGETHER = 4, ROWS = VL / TOGETHER;
  const i64 whole = users / TOGETHER * TOGETHER;
  if (whole)
    for (i64 o = 0; o < outer; o += ROWS) {
      const i64 rows = min_of(ROWS, outer - o);
      for (i64 u = 0; u < whole; u += TOGETHER) {
        float found[VL];
        store(found, dot_products<ROWS>(inner, rows, W + o * inner, x + u * ldx, ldx));
        for (int i = 0; i < TOGETHER; i++)
          for (i64 r = 0; r < rows; r++)
            y[(u + i) * ldy + o + r] = found[i * ROWS + r] + (bias ? bias[o + r] : 0.f);
      }
    }
  for (i64 u = whole; u < users; u++)
    for (i64 o = 0; o < outer; o += VL) {
      const i64 rows = min_of(VL, outer - o);
      vec found = dot_products<VL>(inner, rows, W + o * inner, x + u * ldx, ldx);
      if (bias) found += load(bias + o, rows);
      store(y + u * ldy + o, found, rows);
    }
}

// --- norms and activations ----------------------------------------------------------------------------------------

void layer_norm(i64 n, const float* x, const Norm& norm, float* y) {
  vec total = all(0.f), squares = all(0.f);
  for (i64 i = 0; i < n; i += VL) total += load(x + i, n - i);
  const float mean = sum(total) / n;
  for (i64 i = 0; i < n; i += VL) {
    const vec rest = first_lanes(load(x + i, n - i) - mean, n - i);
    squares += rest * rest;
  }
  const float scale = 1.f / sqrtf(sum(squares) / n + (float)norm.eps);
  for (i64 i = 0; i < n; i += VL) {
    const i64 lanes = n - i;
    store(y + i, (load(x + i, lanes) - mean) * scale * load(norm.weight + i, lanes) + load(norm.bias + i, lanes), lanes);
  }
}

// LayerNorm of x where there is one, else x.
INLINE void normed(i64 n, const float* x, const Norm& norm, float* y) {
  if (norm.weight) layer_norm(n, x, norm, y);
  else memcpy(y, x, n * sizeof(float));
}

// Each of some groups of n neighbouring channels by itself.
void rms_norm(i64 groups, i64 n, float* x, const Norm& norm) {
  const float* weight = norm.weight;
  for (i64 g = 0; g < groups; g++, x += n, weight += n) {
    vec squares = all(0.f);
    for (i64 i = 0; i < n; i += VL) squares += load(x + i, n - i) * load(x + i, n - i);
    const float scale = 1.f / sqrtf(sum(squares) / n + (float)norm.eps);
    for (i64 i = 0; i < n; i += VL) store(x + i, load(x + i, n - i) * scale * load(weight + i, n - i), n - i);
  }
}

// x (1 + erf(x / sqrt 2)) / 2; erf by Abramowitz and Stegun 7.1.26, to 1.5e-7
INLINE vec gelu(vec x) {
  const vec zeros = all(0.f), scaled = x * 0.707106781186547f, size = scaled < zeros ? -scaled : scaled;
  const vec t = 1.f / (1.f + 0.3275911f * size);
  vec p = all(1.061405429f) * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vec erf = 1.f - p * t * exp2_of(size * size * -LOG2E);
  return 0.5f * x * (1.f + (x < zeros ? -erf : erf));
}

// --- the parts of a mixer -----------------------------------------------------------------------------------------

struct Widths {
  i64 conv, in, maps;  // channels of the convolution, outputs of in_proj, outputs of x_proj (Mamba)
};

Widths widths_of(const Step& a) {
  const i64 directions = a.diagonal ? 2 : 1, conv = a.D + 2 * directions * a.G * a.N;
  if (a.H) return {conv, a.D + conv + directions * a.H, 0};
  return {a.D, 2 * a.D, a.R + 2 * a.N};
}

// The newest input joins the K - 1 before it; their convolution, through SiLU, goes to `out`.
template <int FIXED>
INLINE void conv_step(const Step& a, i64 b, i64 channels, const float* in, float* out) {
  const i64 K = FIXED ? FIXED : a.K;
  const float *from = a.conv + b * channels * K, *weight = a.conv_weight;
  float* to = a.conv_after + b * channels * K;
  for (i64 c = 0; c < channels; c++, from += K, to += K, weight += K) {
    float y = a.conv_bias[c] + weight[K - 1] * in[c];
    for (i64 k = 0; k < K - 1; k++) {
      const float x = from[k + 1];
      y += weight[k] * x;
      to[k] = x;
    }
    to[K - 1] = in[c];
    out[c] = y;
  }
  for (i64 c = 0; c < channels; c += VL) {
    const vec y = load(out + c, channels - c);
    store(out + c, y * sigmoid(y), channels - c);
  }
}

// h = decay h + in B, returned: C h. A row of N states; `decay` gives the decays of VL of them.
template <class Decay>
INLINE vec state_step(i64 N, const float* from, float* to, float in, const float* B, const float* C, Decay decay) {
  vec y = all(0.f);
  for (i64 n = 0; n < N; n += VL) {
    const vec h = decay(n) * load(from + n, N - n) + in * load(B + n, N - n);
    store(to + n, h, N - n);
    y += h * load(C + n, N - n);
  }
  return y;
}

// All users' states of VL channels: y = (C h + skip x) SiLU(z). maps: [users, R + 2 N], of which B and C are read.
void scan_step(const Step& a, i64 b0, i64 users, i64 d, const float* x, const float* dt, const float* maps,
               const float* z, i64 ldz, float* A2, float* y) {
  const i64 N = a.N, D = a.D, lanes = min_of(VL, D - d), row = padded(N), ldm = a.R + 2 * N;
  const vec most = all(126.f);
  for (i64 r = 0; r < lanes; r++)
    for (i64 n = 0; n < N; n += VL) {
      const vec log2 = load(a.A_log + (d + r) * N + n, N - n) * LOG2E;
      store(A2 + r * row + n, exp2_of(most < log2 ? most : log2) * -LOG2E);
    }
  for (i64 u = 0; u < users; u++) {
    const float *B = maps + u * ldm + a.R, *C = B + N;
    vec sums[VL];
    for (i64 r = 0; r < VL; r++) {
      sums[r] = all(0.f);
      if (r >= lanes) continue;
      const i64 at = ((b0 + u) * D + d + r) * N;
      const float step = dt[u * D + d + r], *rate = A2 + r * row;
      sums[r] = state_step(N, a.ssm + at, a.ssm_after + at, step * x[u * D + d + r], B, C,
                           [=](i64 n) { return exp2_of(step * load(rate + n)); });
    }
    const vec gate = load(z + u * ldz + d, lanes);
    const vec out = sum_each(sums) + load(a.skip + d, lanes) * load(x + u * D + d, lanes);
    store(y + u * D + d, out * gate * sigmoid(gate), lanes);
  }
}

// One user's states of all heads, in the same way, and the norm behind the gate. in: z, x B C, dt; xBC: as convolved.
void ssd_step(const Step& a, i64 b, const float* in, const float* xBC, float* y) {
  const i64 N = a.N, D = a.D, P = D / a.H, heads = a.H / a.G;
  const float *dt = in + 2 * D + 2 * a.G * N, *B = xBC + D, *C = B + a.G * N;
  for (i64 h = 0; h < a.H; h++) {
    float lane[VL] = {dt[h] + a.dt_bias[h]}, rate[VL] = {fminf(a.A_log[h] * LOG2E, 126.f)};
    store(lane, softplus(load(lane)));
    const float step = lane[0];
    store(lane, exp2_of(load(rate)) * -step * LOG2E);
    store(lane, exp2_of(load(lane)));
    const vec decay = all(lane[0]);
    for (i64 p = 0; p < P; p += VL) {
      const i64 lanes = min_of(VL, P - p), d = h * P + p;
      vec sums[VL];
      for (i64 r = 0; r < VL; r++) {
        sums[r] = all(0.f);
        if (r >= lanes) continue;
        const i64 at = (b * D + d + r) * N;
        sums[r] = state_step(N, a.ssm + at, a.ssm_after + at, step * xBC[d + r], B + h / heads * N, C + h / heads * N,
                             [=](i64) { return decay; });
      }
      const vec gate = load(in + d, lanes), out = sum_each(sums) + a.skip[h] * load(xBC + d, lanes);
      store(y + d, out * gate * sigmoid(gate), lanes);
    }
  }
  rms_norm(a.G, D / a.G, y, a.gate_norm);
}

// --- the whole block ----------------------------------------------------------------------------------------------

// What follows a mixer's gate: y [users, D] becomes the block's output [users, M]. u, the block's input, is written over.
void finish_rows(const Step& a, i64 users, float* u, const float* y, float* out, float* hidden, float* result) {
  const i64 M = a.M, D = a.D, F = a.F;
  if (!F) return linear(users, D, y, D, M, a.out_weight, nullptr, result, M);
  linear(users, D, y, D, M, a.out_weight, nullptr, out, M);
  for (i64 i = 0; i < users; i++) {
    float* row = out + i * M;
    if (a.residual)
      for (i64 m = 0; m < M; m++) row[m] += u[i * M + m];
    if (a.pre_norm) layer_norm(M, row, a.last, u + i * M);
    else layer_norm(M, row, a.norm, row);
  }
  linear(users, M, a.pre_norm ? u : out, M, F, a.w_1, a.b_1, hidden, F);
  for (i64 i = 0; i < users * F; i += VL) store(hidden + i, gelu(load(hidden + i, users * F - i)), users * F - i);
  linear(users, F, hidden, F, M, a.w_2, a.b_2, u, M);
  for (i64 i = 0; i < users; i++) {
    float* row = u + i * M;
    for (i64 m = 0; m < M; m++) row[m] += out[i * M + m];
    if (!a.pre_norm) layer_norm(M, row, a.last, row);
    normed(M, row, a.behind, result + i * M);
  }
}

i64 step_scratch(const Step& a) {
  const Widths w = widths_of(a);
  const i64 users = min_of(USERS, a.B);
  return room(VL * padded(a.N)) + 2 * room(users * a.M) + room(users * w.in) + room(users * w.conv) +
         room(users * w.maps) + 2 * room(users * a.D) + room(users * a.F);
}

i64 step_workspace(const Step& a) { return 64 + a.threads * room(step_scratch(a), 1); }

void step_task(void* context, i64 task, i64 thread) {
  const Step& a = *(const Step*)context;
  const Widths w = widths_of(a);
  const i64 b0 = task * USERS, users = min_of(USERS, a.B - b0), M = a.M, D = a.D;
  Arena arena(a.workspace + thread * room(step_scratch(a), 1));
  float *A2 = arena.floats(VL * padded(a.N)), *u = arena.floats(users * M), *in = arena.floats(users * w.in);
  float *conv = arena.floats(users * w.conv), *maps = arena.floats(users * w.maps), *dt = arena.floats(users * D);
  float *y = arena.floats(users * D), *out = arena.floats(users * M), *hidden = arena.floats(users * a.F);

  for (i64 i = 0; i < users; i++) {
    normed(M, a.u + (a.rows ? a.rows[b0 + i] : b0 + i) * M, a.first, u + i * M);
    if (a.pre_norm) layer_norm(M, u + i * M, a.norm, out + i * M);
  }
  linear(users, M, a.pre_norm ? out : u, M, w.in, a.in_weight, nullptr, in, w.in);
  const float* x = in + (a.H ? D : 0);  // what enters the convolution
  for (i64 i = 0; i < users; i++) {
    if (a.K == 4) conv_step<4>(a, b0 + i, w.conv, x + i * w.in, conv + i * w.conv);
    else conv_step<0>(a, b0 + i, w.conv, x + i * w.in, conv + i * w.conv);
  }
  if (a.H) {
    for (i64 i = 0; i < users; i++) ssd_step(a, b0 + i, in + i * w.in, conv + i * w.conv, y + i * D);
  } else {
    linear(users, D, conv, D, w.maps, a.x_weight, nullptr, maps, w.maps);
    linear(users, a.R, maps, w.maps, D, a.dt_weight, a.dt_bias, dt, D);
    for (i64 i = 0; i < users * D; i += VL) store(dt + i, softplus(load(dt + i, users * D - i)), users * D - i);
    for (i64 d = 0; d < D; d += VL) scan_step(a, b0, users, d, conv, dt, maps, in + D, w.in, A2, y);
  }
  finish_rows(a, users, u, y, out, hidden, a.y + b0 * M);
}

void step(const Step& a) {
  const i64 tasks = (a.B + USERS - 1) / USERS;
  parallel(tasks >= 8 ? a.threads : 1, tasks, step_task, (void*)&a);  // a thread costs as much as some ten users
}

}  // namespace
