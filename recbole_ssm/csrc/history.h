// Histories through all blocks of a model in one call: what step.h does event by event, here layer by layer.
//
// Histories are taken in groups of whole ones, each group by one thread. Linear layers, norms and activations work on
// panels of WIDE events: a panel [channels, WIDE] holds one channel's numbers of WIDE events side by side. So weights are
// used as PyTorch holds them, [out, in], and nothing is summed across lanes. Convolutions and scans are the kernels of
// their ops, which read rows of events. In the last block only the last event of each history goes on behind the scan.

#pragma once
#include "conv1d.h"
#include "selective_scan.h"
#include "ssd.h"
#include "step.h"
#include "tiles.h"

namespace {

const i64 GROUP_ROWS = 128;  // events of a group, unless one history is longer: what is kept of them fits the second cache

// --- panels -------------------------------------------------------------------------------------------------------

// y [ROWS, W VL] = weight [ROWS, inner] x [inner, W VL] + bias
template <int ROWS, int W>
INLINE void panel_rows(i64 inner, const float* weight, const float* bias, const float* x, float* y) {
  vec c[ROWS][W];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < W; j++) c[i][j] = all(bias ? bias[i] : 0.f);
  add_products<ROWS, W>(inner, weight, inner, 1, x, c);
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < W; j++) store(y + (i * W + j) * VL, c[i][j]);
}

template <int W>
void panel_linear(i64 inner, const float* x, i64 outer, const float* weight, const float* bias, float* y) {
  if (outer < TALL)
    for (i64 o = 0; o < outer; o++) panel_rows<1, W>(inner, weight + o * inner, bias ? bias + o : bias, x, y + o * W * VL);
  else
    for (i64 o = 0; o < outer; o += TALL) {
      const i64 at = min_of(o, outer - TALL);  // the last rows may be computed twice
      panel_rows<TALL, W>(inner, weight + at * inner, bias ? bias + at : bias, x, y + at * W * VL);
    }
}

void panel_linear(i64 width, i64 inner, const float* x, i64 outer, const float* weight, const float* bias, float* y) {
  if (width > VL) panel_linear<2>(inner, x, outer, weight, bias, y);
  else panel_linear<1>(inner, x, outer, weight, bias, y);
}

// Rows [width, columns] <-> a panel; both have room for whole vectors.
INLINE void to_panel(i64 width, i64 columns, const float* rows, i64 stride, float* panel) {
  transpose(width, padded(columns), rows, stride, panel, width);
}
INLINE void to_rows(i64 width, i64 columns, const float* panel, float* rows, i64 stride) {
  transpose(padded(columns), width, panel, width, rows, stride);
}

// LayerNorm of each event, or RMSNorm.
void panel_norm(i64 width, i64 n, float* x, const Norm& norm, bool centred) {
  for (i64 j = 0; j < width; j += VL) {
    vec mean = all(0.f), squares = all(0.f), scale;
    for (i64 i = 0; centred && i < n; i++) mean += load(x + i * width + j);
    mean = mean / (float)n;
    for (i64 i = 0; i < n; i++) {
      const vec rest = load(x + i * width + j) - mean;
      squares += rest * rest;
    }
    squares = squares / (float)n + (float)norm.eps;
    for (int lane = 0; lane < VL; lane++) scale[lane] = 1.f / sqrtf(squares[lane]);
    for (i64 i = 0; i < n; i++) {
      float* at = x + i * width + j;
      store(at, (load(at) - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.f));
    }
  }
}

// y SiLU(z), for as many floats
INLINE void gate(i64 n, float* y, const float* z) {
  for (i64 i = 0; i < n; i += VL) {
    const vec in = load(z + i, n - i);
    store(y + i, load(y + i, n - i) * in * sigmoid(in), n - i);
  }
}

// --- a group of histories in a block ------------------------------------------------------------------------------

// The events of some histories, and what a block makes of them.
struct Group {
  i64 rows, S, width;    // width: of a row of `in`
  i64* offsets;          // [S + 1], from 0
  float* u;              // input and output of a block: panels [M, width] of all events
  float* in;             // rows: what enters the convolution, then the step sizes of heads
  float *conv, *y;       // rows [rows, channels of the convolution], [rows, D]; of the last block y is [S, D]
  float *maps, *dt, *A;  // rows: dt, B and C of Mamba; step sizes; decays
  float *x, *z, *hidden; // one panel each
  float *last_u, *last_z, *last_C, *out, *last_hidden;  // rows of the last events
  char* workspace;
  const float* last(const float* rows_of, i64 stride, i64 s) const {
    return offsets[s + 1] > offsets[s] ? rows_of + (offsets[s + 1] - 1) * stride : nullptr;
  }
};

INLINE i64 directions(const Step& a) { return a.diagonal ? 2 : 1; }
INLINE i64 row_of_maps(const Step& a) { return padded(a.R + 2 * a.N); }
INLINE i64 whole_panels(i64 rows) { return (rows + WIDE - 1) / WIDE * WIDE; }

Conv conv_of(const Step& a, const Group& g) {
  Conv c = {};
  c.S = g.S, c.D = widths_of(a).conv, c.K = a.K, c.threads = 1, c.silu = 1;
  c.lead = a.diagonal ? a.K / 2 : a.K - 1;
  c.offsets = g.offsets, c.x = g.in, c.sx = g.width, c.weight = a.conv_weight, c.bias = a.conv_bias, c.y = g.conv;
  c.workspace = g.workspace;
  return c;
}

Scan scan_of(const Step& a, const Group& g, bool last) {
  Scan c = {};
  c.S = g.S, c.D = a.D, c.N = a.N, c.threads = 1, c.dt_softplus = 1, c.last = last;
  c.offsets = g.offsets, c.x = g.conv, c.sx = a.D, c.dt = g.dt, c.sdt = padded(a.D), c.dt_bias = a.dt_bias, c.A = g.A;
  c.B = g.maps + a.R, c.sB = c.sC = row_of_maps(a), c.C = c.B + a.N;
  if (last) c.C = g.last_C, c.sC = a.N;
  c.skip = a.skip, c.y = g.y, c.workspace = g.workspace;
  return c;
}

Ssd ssd_of(const Step& a, const Group& g, i64 direction) {
  Ssd c = {};
  const i64 channels = widths_of(a).conv, maps = a.G * a.N;
  c.S = g.S, c.H = a.H, c.P = a.D / a.H, c.G = a.G, c.N = a.N, c.threads = 1, c.offsets = g.offsets;
  c.x = g.conv, c.sx = channels, c.dt = g.dt + direction * a.H, c.sdt = directions(a) * a.H, c.A = g.A;
  c.B = g.conv + a.D + 2 * direction * maps, c.C = c.B + maps, c.sB = c.sC = channels;
  c.skip = a.diagonal ? nullptr : a.skip, c.shift = directions(a) - 1, c.reverse = c.accumulate = direction;
  c.y = g.y, c.workspace = g.workspace;
  return c;
}

SsdLast ssd_last_of(const Step& a, const Group& g) {
  const Ssd whole = ssd_of(a, g, 0);
  SsdLast c = {};
  c.S = whole.S, c.H = whole.H, c.P = whole.P, c.G = whole.G, c.N = whole.N, c.threads = 1, c.offsets = whole.offsets;
  c.x = whole.x, c.sx = whole.sx, c.dt = whole.dt, c.sdt = whole.sdt, c.A = whole.A, c.B = whole.B, c.sB = whole.sB;
  c.C = g.last_C, c.skip = whole.skip, c.y = whole.y, c.workspace = whole.workspace;
  return c;
}

// What a block needs beside u and the offsets, from the arena on.
void lay_out(const Step& a, Group& g, Arena& arena) {
  const Widths w = widths_of(a);
  const i64 rows = whole_panels(g.rows), S = g.S, widest = padded(max_of(max_of(a.D, a.M), w.in - a.D));
  g.width = padded(w.in - a.D);
  g.in = arena.floats(rows * g.width);
  g.conv = arena.floats(rows * w.conv + VL);
  g.y = arena.floats(max_of(rows, S) * a.D + VL);
  g.maps = arena.floats(a.H ? 0 : rows * row_of_maps(a));
  g.dt = arena.floats(a.H ? g.rows * directions(a) * a.H : rows * padded(a.D));
  g.A = arena.floats(a.H ? a.H : a.D * a.N);
  g.x = arena.floats(max_of(widest, row_of_maps(a)) * WIDE);
  g.z = arena.floats(max_of(widest, row_of_maps(a)) * WIDE);
  g.hidden = arena.floats(padded(max_of(max_of(a.F, a.M), a.H)) * WIDE);
  g.last_u = arena.floats(S * a.M);
  g.last_z = arena.floats(S * a.D);
  g.last_C = arena.floats(S * max_of(a.G, 1) * a.N);
  g.out = arena.floats(S * a.M);
  g.last_hidden = arena.floats(S * a.F);
  i64 most = conv_workspace(conv_of(a, g), 0);
  if (a.H) most = max_of(most, max_of(ssd_workspace(ssd_of(a, g, 0), 0), ssd_last_workspace(ssd_last_of(a, g), 0)));
  else most = max_of(most, max_of(scan_workspace(scan_of(a, g, 0), 0), scan_workspace(scan_of(a, g, 1), 0)));
  g.workspace = arena.take<char>(most);
}

// --- the mixers, up to their gates --------------------------------------------------------------------------------

// The rows of in_proj that give what enters the convolution (and step sizes), and those that give the gate.
INLINE const float* rest_weight(const Step& a) { return a.in_weight + (a.H ? a.D * a.M : 0); }
INLINE const float* gate_weight(const Step& a) { return a.in_weight + (a.H ? 0 : a.D * a.M); }

// What the mixer reads of a panel of the block's input: that panel, or its norm, which is written to `normed`.
const float* input_of(const Step& a, i64 width, const float* u, float* normed) {
  if (!a.pre_norm) return u;
  memcpy(normed, u, a.M * width * sizeof(float));
  panel_norm(width, a.M, normed, a.norm, true);
  return normed;
}

void project_in(const Step& a, const Group& g) {
  const i64 outer = widths_of(a).in - a.D;
  for (i64 first = 0; first < g.rows; first += WIDE) {
    const i64 width = width_of(g.rows, first);
    panel_linear(width, a.M, input_of(a, width, g.u + first * a.M, g.z), outer, rest_weight(a), nullptr, g.x);
    to_rows(width, outer, g.x, g.in + first * g.width, g.width);
  }
}

void decays(i64 n, const float* A_log, float* A) {
  const vec most = all(126.f);
  for (i64 i = 0; i < n; i += VL) {
    const vec log2 = load(A_log + i, n - i) * LOG2E;
    store(A + i, -exp2_of(most < log2 ? most : log2), n - i);
  }
}

void mix_scan(const Step& a, const Group& g, bool last) {
  const i64 D = a.D, maps = a.R + (last ? 1 : 2) * a.N;  // C is read at the last events alone
  for (i64 first = 0; first < g.rows; first += WIDE) {
    const i64 width = width_of(g.rows, first);
    to_panel(width, D, g.conv + first * D, D, g.x);
    panel_linear(width, D, g.x, maps, a.x_weight, nullptr, g.z);
    to_rows(width, maps, g.z, g.maps + first * row_of_maps(a), row_of_maps(a));
    panel_linear(width, a.R, g.z, D, a.dt_weight, nullptr, g.x);
    to_rows(width, D, g.x, g.dt + first * padded(D), padded(D));
  }
  for (i64 s = 0; last && s < g.S; s++) {
    const float* x = g.last(g.conv, D, s);
    if (x) linear(1, D, x, D, a.N, a.x_weight + maps * D, nullptr, g.last_C + s * a.N, a.N);
    else zero(g.last_C + s * a.N, a.N);
  }
  decays(D * a.N, a.A_log, g.A);
  scan_forward(scan_of(a, g, last));
}

void mix_ssd(const Step& a, const Group& g, bool last) {
  const i64 heads = directions(a) * a.H, channels = widths_of(a).conv, maps = a.G * a.N;
  for (i64 t = 0; t < g.rows; t++)
    for (i64 h = 0; h < heads; h++) g.dt[t * heads + h] = g.in[t * g.width + channels + h] + a.dt_bias[h % a.H];
  for (i64 i = 0; i < g.rows * heads; i += VL) {
    const i64 lanes = g.rows * heads - i;
    store(g.dt + i, softplus(load(g.dt + i, lanes)), lanes);
  }
  decays(a.H, a.A_log, g.A);
  if (!last) {
    for (i64 direction = 0; direction < directions(a); direction++) ssd_forward(ssd_of(a, g, direction));
    return;
  }
  // Hydra's last row is what a scan knew one event earlier: a step of size 0 leaves the state as it was.
  for (i64 s = 0; s < g.S; s++) {
    const i64 end = g.offsets[s + 1], at = end - directions(a);
    if (at >= g.offsets[s]) memcpy(g.last_C + s * maps, g.conv + at * channels + a.D + maps, maps * sizeof(float));
    else zero(g.last_C + s * maps, maps);
    for (i64 h = 0; a.diagonal && end > g.offsets[s] && h < a.H; h++) g.dt[(end - 1) * heads + h] = 0;
  }
  ssd_last_forward(ssd_last_of(a, g));
}

// --- from the mixer's sums to the block's output ------------------------------------------------------------------

void finish_panels(const Step& a, const Group& g) {
  const i64 channels = widths_of(a).conv, P = a.H ? a.D / a.H : 0;
  for (i64 first = 0; first < g.rows; first += WIDE) {
    const i64 width = width_of(g.rows, first);
    float *y = g.x, *u = g.u + first * a.M, *out = g.z;
    if (a.diagonal) {  // of Hydra: y += (diagonal x + skip) x
      to_panel(width, a.D, g.conv + first * channels, channels, g.z);
      panel_linear(width, a.D, g.z, a.H, a.diagonal, a.skip, g.hidden);
    }
    to_panel(width, a.D, g.y + first * a.D, a.D, y);
    for (i64 d = 0; a.diagonal && d < a.D; d++)
      for (i64 j = 0; j < width; j += VL) {
        const i64 at = d * width + j;
        store(y + at, load(y + at) + load(g.hidden + d / P * width + j) * load(g.z + at));
      }
    if (a.diagonal) panel_norm(width, a.D, y, a.gate_norm, false);
    panel_linear(width, a.M, input_of(a, width, u, g.hidden), a.D, gate_weight(a), nullptr, g.z);
    gate(a.D * width, y, g.z);
    for (i64 k = 0, n = a.H && !a.diagonal ? a.D / a.G : 0; n && k < a.G; k++) {
      Norm of_group = a.gate_norm;
      of_group.weight += k * n;
      panel_norm(width, n, y + k * n * width, of_group, false);
    }
    panel_linear(width, a.D, y, a.M, a.out_weight, nullptr, out);
    for (i64 i = 0; a.residual && i < a.M * width; i += VL) store(out + i, load(out + i) + load(u + i));
    if (a.pre_norm) {
      memcpy(u, out, a.M * width * sizeof(float));
      panel_norm(width, a.M, u, a.last, true);
    } else {
      panel_norm(width, a.M, out, a.norm, true);
    }
    panel_linear(width, a.M, a.pre_norm ? u : out, a.F, a.w_1, a.b_1, g.hidden);
    for (i64 i = 0; i < a.F * width; i += VL) store(g.hidden + i, gelu(load(g.hidden + i)));
    panel_linear(width, a.F, g.hidden, a.M, a.w_2, a.b_2, u);
    for (i64 i = 0; i < a.M * width; i += VL) store(u + i, load(u + i) + load(out + i));
    if (!a.pre_norm) panel_norm(width, a.M, u, a.last, true);
  }
}

void finish_last(const Step& a, const Group& g, float* result) {
  const i64 channels = widths_of(a).conv, P = a.H ? a.D / a.H : 0;
  for (i64 s = 0; s < g.S; s++) {
    const i64 at = g.offsets[s + 1] - 1, first = at / WIDE * WIDE;
    const bool empty = at < g.offsets[s];
    for (i64 m = 0; m < a.M; m++)
      g.last_u[s * a.M + m] = empty ? 0.f : g.u[first * a.M + m * width_of(g.rows, first) + at - first];
    float* y = g.y + s * a.D;
    const float* x = g.last(g.conv, channels, s);
    for (i64 h = 0; a.diagonal && x && h < a.H; h++) {
      const float diagonal = dot(a.diagonal + h * a.D, x, a.D) + a.skip[h];
      for (i64 p = h * P; p < (h + 1) * P; p++) y[p] += diagonal * x[p];
    }
    if (a.diagonal) rms_norm(1, a.D, y, a.gate_norm);
  }
  for (i64 s = 0; a.pre_norm && s < g.S; s++) layer_norm(a.M, g.last_u + s * a.M, a.norm, g.out + s * a.M);
  linear(g.S, a.M, a.pre_norm ? g.out : g.last_u, a.M, a.D, gate_weight(a), nullptr, g.last_z, a.D);
  gate(g.S * a.D, g.y, g.last_z);
  for (i64 s = 0; a.H && !a.diagonal && s < g.S; s++) rms_norm(a.G, a.D / a.G, g.y + s * a.D, a.gate_norm);
  finish_rows(a, g.S, g.last_u, g.y, g.out, g.last_hidden, result);
}

// --- the whole call -----------------------------------------------------------------------------------------------

struct HistoryCall {
  const History* a;
  i64 groups, rows, S;  // how many; events and histories of a group, at most
  i64* first;           // [groups + 1]: the first history of each
  i64 threads;
  char* scratch;
  i64 scratch_bytes;    // of one thread
};

// Divides the histories; `first` may be null.
void divide(HistoryCall& call, i64* first) {
  const History& a = *call.a;
  i64 begin = 0;
  for (i64 s = 0; s < a.S; s++) {
    if (s && a.offsets[s + 1] - a.offsets[begin] <= GROUP_ROWS && s - begin < GROUP_ROWS) continue;
    begin = s;
    if (first) first[call.groups] = s;
    call.groups++;
  }
  if (first) first[call.groups] = a.S;
}

HistoryCall history_call(const History& a) {
  HistoryCall call = {};
  call.a = &a;
  i64 longest = 0;
  for (i64 s = 0; s < a.S; s++) longest = max_of(longest, a.offsets[s + 1] - a.offsets[s]);
  call.rows = max_of(longest, min_of(GROUP_ROWS, a.L));
  call.S = min_of(a.S, GROUP_ROWS);
  call.threads = min_of(a.threads, 1 + a.L * a.layers / 64);  // a thread costs as much as some ten events
  for (i64 i = 0; i < a.layers; i++) {
    Arena arena((char*)64);
    Group g = {};
    g.rows = call.rows, g.S = call.S;
    lay_out(a.blocks[i], g, arena);
    call.scratch_bytes = max_of(call.scratch_bytes, arena.at - (char*)64);
  }
  call.scratch_bytes += 64 + room(call.S + 1, sizeof(i64)) + room(whole_panels(call.rows) * padded(a.M));
  return call;
}

i64 history_workspace(const History& a) {
  const HistoryCall call = history_call(a);
  return 64 + room(a.S + 1, sizeof(i64)) + call.threads * room(call.scratch_bytes, 1);
}

void history_task(void* context, i64 group, i64 thread) {
  const HistoryCall& call = *(const HistoryCall*)context;
  const History& a = *call.a;
  const i64 s0 = call.first[group], begin = a.offsets[s0];
  Arena arena(call.scratch + thread * room(call.scratch_bytes, 1));
  Group g = {};
  g.S = call.first[group + 1] - s0;
  g.rows = a.offsets[s0 + g.S] - begin;
  g.offsets = arena.take<i64>(g.S + 1);
  g.u = arena.floats(whole_panels(g.rows) * padded(a.M));
  for (i64 s = 0; s <= g.S; s++) g.offsets[s] = a.offsets[s0 + s] - begin;
  for (i64 layer = 0; layer < a.layers; layer++) {
    const Step& b = a.blocks[layer];
    Arena rest = arena;
    lay_out(b, g, rest);
    for (i64 first = 0; !layer && first < g.rows; first += WIDE) {
      const i64 width = width_of(g.rows, first);
      for (i64 i = 0; i < width; i++) {
        float* row = g.x + i * padded(a.M);
        if (first + i < g.rows) normed(a.M, a.table + a.items[begin + first + i] * a.M, a.first, row);
        else zero(row, a.M);
      }
      to_panel(width, a.M, g.x, padded(a.M), g.z);
      memcpy(g.u + first * a.M, g.z, width * a.M * sizeof(float));
    }
    const bool last = layer + 1 == a.layers;
    project_in(b, g);
    conv_forward(conv_of(b, g));
    if (b.H) mix_ssd(b, g, last);
    else mix_scan(b, g, last);
    if (last) finish_last(b, g, a.y + s0 * a.M);
    else finish_panels(b, g);
  }
}

void history(const History& a) {
  HistoryCall call = history_call(a);
  Arena arena(a.workspace);
  call.first = arena.take<i64>(a.S + 1);
  call.scratch = arena.at;
  divide(call, call.first);
  parallel(call.threads, call.groups, history_task, &call);
}

}  // namespace
