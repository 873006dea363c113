// SSD, forward and backward, by chunks: the matrix form within a chunk, a state between them; and its last position.
//
//   y_t = sum_{s <= t} (C_t . B_s) 2^(A2 (T_t - T_s)) dt_s x_s + 2^(A2 T_t) C_t h     T: running sum of dt, A2 = A log2(e)
//
// The sums T serve for their differences: they are taken in double and kept as a float and its remainder. Everything of
// one chunk is copied into padded rows, so that the products below need no care for tails, strides or direction.

#pragma once
#include "simd.h"

namespace {

// --- small products: C [m, columns] (+)= A [m, k] B [k, columns], columns a multiple of VL -------------------------

enum Triangle {
  FULL,
  LOWER_OUT,  // only columns <= row of C are wanted
  LOWER,      // A is lower triangular
  LOWER_T     // A is the transpose of a lower triangular matrix
};

template <int MR, int NR>
INLINE void product_tile(i64 k, const float* A, i64 rs, i64 cs, const float* B, i64 ldb, float* C, i64 ldc, bool add) {
  vec c[MR][NR];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) c[i][j] = add ? load(C + i * ldc + j * VL) : all(0.f);
  for (i64 p = 0; p < k; p++) {
    vec b[NR];
    for (int j = 0; j < NR; j++) b[j] = load(B + p * ldb + j * VL);
    for (int i = 0; i < MR; i++) {
      const float a = A[i * rs + p * cs];
      for (int j = 0; j < NR; j++) c[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) store(C + i * ldc + j * VL, c[i][j]);
}

template <int MR>
INLINE void product_rows(i64 columns, i64 k, const float* A, i64 rs, i64 cs, const float* B, i64 ldb, float* C, i64 ldc,
                         bool add) {
  const int WIDE = VL == 8 ? 2 : 4;  // AVX2 has half as many registers
  i64 j = 0;
  for (; j + WIDE * VL <= columns; j += WIDE * VL)
    product_tile<MR, WIDE>(k, A, rs, cs, B + j, ldb, C + j, ldc, add);
  for (; j + 2 * VL <= columns; j += 2 * VL) product_tile<MR, 2>(k, A, rs, cs, B + j, ldb, C + j, ldc, add);
  for (; j < columns; j += VL) product_tile<MR, 1>(k, A, rs, cs, B + j, ldb, C + j, ldc, add);
}

const i64 MR = 4;

void product(Triangle triangle, i64 m, i64 columns, i64 k, const float* A, i64 rs, i64 cs, const float* B, i64 ldb,
             float* C, i64 ldc, bool add) {
  for (i64 i = 0; i < m; i += MR) {
    const i64 rows = min_of(MR, m - i);
    i64 wanted = columns, from = 0, to = k;
    if (triangle == LOWER_OUT) wanted = min_of(columns, padded(i + rows));
    if (triangle == LOWER) to = min_of(k, i + rows);
    if (triangle == LOWER_T) from = i;
    const float *a = A + i * rs + from * cs, *b = B + from * ldb;
    float* c = C + i * ldc;
    if (rows == 4) product_rows<4>(wanted, to - from, a, rs, cs, b, ldb, c, ldc, add);
    else if (rows == 3) product_rows<3>(wanted, to - from, a, rs, cs, b, ldb, c, ldc, add);
    else if (rows == 2) product_rows<2>(wanted, to - from, a, rs, cs, b, ldb, c, ldc, add);
    else product_rows<1>(wanted, to - from, a, rs, cs, b, ldb, c, ldc, add);
  }
}

// --- one call -----------------------------------------------------------------------------------------------------

const i64 Q = CHUNK;  // a multiple of every VL

struct SsdCall {
  const Ssd* a;
  i64 Pp, Np;          // P and N, padded
  i64 splits, pieces;  // of the heads of a group: with sums of their own, by the shape alone; tasks, by the threads
  double *gA, *gskip;  // [groups of sequences, H]
  float *gB, *gC;      // [pieces, rows, G, N]
  char* scratch;
  i64 scratch_bytes;   // of one thread
};

i64 ssd_rows(const Ssd& a) { return a.offsets ? a.offsets[a.S] : a.S * a.L; }
i64 ssd_splits(const Ssd& a) { return a.S >= 8 ? 1 : max_of(1, min_of(4, a.H / a.G)); }
i64 ssd_pieces(const Ssd& a, i64 backward) {
  if (backward) return a.threads == 1 ? 1 : ssd_splits(a);
  return forward_parts(a.threads, a.S * a.G, max_of(1, a.H / a.G));
}

i64 ssd_scratch(const Ssd& a, i64 backward) {
  const i64 Pp = padded(a.P), Np = padded(a.N), pieces = ssd_pieces(a, backward);
  const i64 states = (a.H / a.G + pieces - 1) / pieces * Np * Pp;
  i64 bytes = 2 * room(Q * Np) + room(Np * Q) + 2 * room(Q * Q) + 2 * room(Q * Pp) + room(Q * Np) + room(states) +
              4 * room(Q);
  if (backward)
    bytes += 2 * room(Q * Q) + 2 * room(Q * Pp) + room(Pp * Q) + 3 * room(Q * Np) + 2 * room(Np * Pp) + room(Q) +
             room(Q, 8);
  return bytes;
}

i64 ssd_workspace(const Ssd& a, i64 backward) {
  i64 bytes = 64 + a.threads * room(ssd_scratch(a, backward), 1);
  if (backward) {
    bytes += 2 * room(row_groups(a.S) * a.H, 8);
    if (ssd_pieces(a, 1) > 1) bytes += 2 * room(ssd_pieces(a, 1) * ssd_rows(a) * a.G * a.N);
  }
  return bytes;
}

SsdCall ssd_call(const Ssd& a, i64 backward) {
  SsdCall call = {};
  Arena arena(a.workspace);
  call.a = &a;
  call.Pp = padded(a.P);
  call.Np = padded(a.N);
  call.splits = ssd_splits(a);
  call.pieces = ssd_pieces(a, backward);
  if (backward) {
    const i64 partial = row_groups(a.S) * a.H, size = call.pieces * ssd_rows(a) * a.G * a.N;
    call.gA = arena.take<double>(partial);
    call.gskip = arena.take<double>(partial);
    for (i64 i = 0; i < partial; i++) call.gA[i] = call.gskip[i] = 0;
    call.gB = call.pieces > 1 ? arena.floats(size) : a.gB;
    call.gC = call.pieces > 1 ? arena.floats(size) : a.gC;
  }
  call.scratch_bytes = room(ssd_scratch(a, backward), 1);
  call.scratch = arena.at;
  return call;
}

// One sequence, heads of one group, one direction of time.
struct SsdUnit {
  const SsdCall* call;
  const Ssd* a;
  i64 s, begin, length, group, h0, h1, split0, split1;
  i64 row(i64 t) const { return a->reverse ? begin + length - 1 - t : begin + t; }
  i64 head(i64 split) const { return (group * call->splits + split) * (a->H / a->G) / call->splits; }
};

SsdUnit ssd_unit(const SsdCall& call, i64 s, i64 group, i64 piece) {
  const Ssd& a = *call.a;
  const i64 heads = a.H / a.G, begin = begin_of(a.offsets, a.L, s);
  return {&call, &a, s, begin, begin_of(a.offsets, a.L, s + 1) - begin, group,
          group * heads + heads * piece / call.pieces, group * heads + heads * (piece + 1) / call.pieces,
          call.splits * piece / call.pieces, call.splits * (piece + 1) / call.pieces};
}

// Rows of B or C of a chunk, [Q, Np]; zeros behind them.
void pack_map(const SsdUnit& u, const float* map, i64 stride, i64 first, i64 steps, float* out) {
  const i64 N = u.a->N, Np = u.call->Np;
  for (i64 t = 0; t < steps; t++) {
    const float* from = map + u.row(first + t) * stride + u.group * N;
    for (i64 n = 0; n < N; n += VL) store(out + t * Np + n, load(from + n, N - n));
  }
  zero(out + steps * Np, (Q - steps) * Np);
}

// dt and T of a chunk and head: T = high + low. Behind the last position T stays and dt is 0. Returns the last T.
double pack_steps(const SsdUnit& u, i64 h, i64 first, i64 steps, float* dt, float* high, float* low) {
  double T = 0;
  for (i64 t = 0; t < Q; t++) {
    dt[t] = t < steps ? u.a->dt[u.row(first + t) * u.a->sdt + h] : 0.f;
    T += dt[t];
    high[t] = (float)T;
    low[t] = (float)(T - high[t]);
  }
  return T;
}

// T_t - T_s for the positions s from `high` and `low` on
INLINE vec gap(float high_t, float low_t, const float* high, const float* low) {
  return (high_t - load(high)) + (low_t - load(low));
}
INLINE vec decay_over(vec time, float A2) {
  const vec zeros = all(0.f), x = time * A2;
  return exp2_of(zeros < x ? zeros : x);
}
INLINE float decay_over(double time, double A2) { return time * A2 < -126 ? 0.f : exp2f((float)(time * A2)); }
const double LOG2E_DOUBLE = 1.4426950408889634;

// State [N, P] <-> [Np, Pp]
void unpack_state(const SsdUnit& u, const float* from, float* to) {
  for (i64 n = 0; n < u.a->N; n++)
    for (i64 p = 0; p < u.a->P; p += VL) store(to + n * u.a->P + p, load(from + n * u.call->Pp + p), u.a->P - p);
}
void pack_state(const SsdUnit& u, const float* from, float* to) {
  zero(to, u.call->Np * u.call->Pp);
  if (from)
    for (i64 n = 0; n < u.a->N; n++)
      for (i64 p = 0; p < u.a->P; p += VL) store(to + n * u.call->Pp + p, load(from + n * u.a->P + p, u.a->P - p));
}

// State of head h before chunk `first`, as it was kept or came in; null for zeros.
const float* start_of(const SsdUnit& u, i64 h, i64 first) {
  const Ssd& a = *u.a;
  const i64 size = a.N * a.P;
  if (first) return a.kept + ((u.begin / Q + first / Q - 1) * a.H + h) * size;
  return a.state ? a.state + (u.s * a.H + h) * size : nullptr;
}

// y = M v of a lower triangular M. A zero above the diagonal times what is not finite would be NaN, so where v holds such
// numbers each row reads its own positions and no later ones.
void lower_product(i64 steps, i64 Pp, const float* M, const float* V, float* Y) {
  vec odd = all(0.f);
  for (i64 i = 0; i < steps * Pp; i += VL) odd += load(V + i) - load(V + i);
  if (sum(odd) == 0.f) return product(LOWER, steps, Pp, steps, M, Q, 1, V, Pp, Y, Pp, false);
  for (i64 t = 0; t < steps; t++)
    for (i64 p = 0; p < Pp; p += VL)
      product_tile<1, 1>(t + 1, M + t * Q, Q, 1, V + p, Pp, Y + t * Pp + p, Pp, false);
}

// --- forward ------------------------------------------------------------------------------------------------------

void ssd_forward_unit(const SsdUnit& u, char* scratch) {
  const Ssd& a = *u.a;
  const i64 N = a.N, P = a.P, D = a.H * P, Np = u.call->Np, Pp = u.call->Pp;
  Arena arena(scratch);
  float *B = arena.floats(Q * Np), *C = arena.floats(Q * Np), *BT = arena.floats(Np * Q);
  float *G = arena.floats(Q * Q), *M = arena.floats(Q * Q), *V = arena.floats(Q * Pp), *Y = arena.floats(Q * Pp);
  float* scaled = arena.floats(Q * Np);
  float* states = arena.floats((u.h1 - u.h0) * Np * Pp);
  float *dt = arena.floats(Q), *high = arena.floats(Q), *low = arena.floats(Q);
  for (i64 h = u.h0; h < u.h1; h++) pack_state(u, start_of(u, h, 0), states + (h - u.h0) * Np * Pp);
  if (a.shift && !a.accumulate && u.length)
    for (i64 h = u.h0; h < u.h1; h++) zero(a.y + u.row(0) * D + h * P, P);

  for (i64 first = 0; first < u.length; first += Q) {
    const i64 steps = min_of(Q, u.length - first), columns = padded(steps);
    const bool is_last = first + steps == u.length;
    pack_map(u, a.B, a.sB, first, steps, B);
    pack_map(u, a.C, a.sC, first, steps, C);
    transpose(columns, Np, B, Np, BT, Q);
    product(LOWER_OUT, steps, columns, N, C, Np, 1, BT, Q, G, Q, false);
    for (i64 h = u.h0; h < u.h1; h++) {
      const double T = pack_steps(u, h, first, steps, dt, high, low), A2 = a.A[h] * LOG2E_DOUBLE;
      float* state = states + (h - u.h0) * Np * Pp;
      if (first && a.kept) unpack_state(u, state, (float*)start_of(u, h, first));
      for (i64 t = 0; t < steps; t++) {
        const float* x = a.x + u.row(first + t) * a.sx + h * P;
        for (i64 p = 0; p < P; p += VL) store(V + t * Pp + p, dt[t] * load(x + p, P - p));
      }
      for (i64 t = 0; t < steps; t++) {
        for (i64 j = 0; j <= t; j += VL)
          store(M + t * Q + j, load(G + t * Q + j) * decay_over(gap(high[t], low[t], high + j, low + j), (float)A2));
        for (i64 j = t + 1; j < min_of(Q, t / MR * MR + MR); j++) M[t * Q + j] = 0;
      }
      lower_product(steps, Pp, M, V, Y);
      if (first || a.state) {
        for (i64 t = 0; t < steps; t++) {
          const float decay = decay_over((double)high[t] + low[t], A2);
          for (i64 n = 0; n < Np; n += VL) store(scaled + t * Np + n, decay * load(C + t * Np + n));
        }
        product(FULL, steps, Pp, N, scaled, Np, 1, state, Pp, Y, Pp, true);
      }
      for (i64 t = 0; t + (is_last && a.shift) < steps; t++) {
        const i64 row = u.row(first + t), to = u.row(first + t + a.shift);
        for (i64 p = 0; p < P; p += VL) {
          vec y = load(Y + t * Pp + p);
          if (a.skip) y += a.skip[h] * load(a.x + row * a.sx + h * P + p, P - p);
          float* out = a.y + to * D + h * P + p;
          store(out, a.accumulate ? load(out, P - p) + y : y, P - p);
        }
      }
      if (!is_last || a.final) {
        const float whole = decay_over(T, A2);
        for (i64 i = 0; i < N * Pp; i += VL) store(state + i, whole * load(state + i));
        for (i64 t = 0; t < steps; t++) {
          const float decay = decay_over(T - high[t] - low[t], A2);
          for (i64 p = 0; p < Pp; p += VL) store(V + t * Pp + p, decay * load(V + t * Pp + p));
        }
        product(FULL, N, Pp, steps, B, 1, Np, V, Pp, state, Pp, true);
      }
    }
  }
  if (a.final)
    for (i64 h = u.h0; h < u.h1; h++)
      unpack_state(u, states + (h - u.h0) * Np * Pp, a.final + (u.s * a.H + h) * N * P);
}

// --- backward -----------------------------------------------------------------------------------------------------

void ssd_backward_unit(const SsdUnit& u, double* gA, double* gskip, char* scratch) {
  const Ssd& a = *u.a;
  const i64 N = a.N, P = a.P, D = a.H * P, Np = u.call->Np, Pp = u.call->Pp;
  Arena arena(scratch);
  float *B = arena.floats(Q * Np), *C = arena.floats(Q * Np), *BT = arena.floats(Np * Q);
  float *G = arena.floats(Q * Q), *M = arena.floats(Q * Q), *X = arena.floats(Q * Pp), *U = arena.floats(Q * Pp);
  float* inner = arena.floats(Q * Np);
  float* gstates = arena.floats((u.h1 - u.h0) * Np * Pp);
  float *dt = arena.floats(Q), *high = arena.floats(Q), *low = arena.floats(Q);
  float *gM = arena.floats(Q * Q), *gG = arena.floats(Q * Q), *gY = arena.floats(Q * Pp), *gV = arena.floats(Q * Pp);
  float *XT = arena.floats(Pp * Q), *gB = arena.floats(Q * Np), *gC = arena.floats(Q * Np);
  float *start = arena.floats(Np * Pp), *stateT = arena.floats(Np * Pp), *columns_sum = arena.floats(Q);
  double* gT = arena.take<double>(Q);

  for (i64 h = u.h0; h < u.h1; h++)
    pack_state(u, a.gfinal ? a.gfinal + (u.s * a.H + h) * N * P : nullptr, gstates + (h - u.h0) * Np * Pp);

  for (i64 first = u.length ? (u.length - 1) / Q * Q : -1; first >= 0; first -= Q) {
    const i64 steps = min_of(Q, u.length - first), columns = padded(steps);
    const bool flows_back = first + steps < u.length || a.gfinal;  // the state after this chunk has a gradient
    pack_map(u, a.B, a.sB, first, steps, B);
    pack_map(u, a.C, a.sC, first, steps, C);
    transpose(columns, Np, B, Np, BT, Q);
    product(LOWER_OUT, steps, columns, N, C, Np, 1, BT, Q, G, Q, false);
    for (i64 split = u.split0; split < u.split1; split++) {
      zero(gG, Q * Q);
      zero(gB, Q * Np);
      zero(gC, Q * Np);
      for (i64 h = u.head(split); h < u.head(split + 1); h++) {
        const double T = pack_steps(u, h, first, steps, dt, high, low), A2 = a.A[h] * LOG2E_DOUBLE;
        const float skip = a.skip ? a.skip[h] : 0.f;
        double gsum = 0;
        for (i64 t = 0; t < steps; t++) {
          const float* x = a.x + u.row(first + t) * a.sx + h * P;
          const bool read = first + t + a.shift < u.length;  // a shifted output of the last position is dropped
          const float* gy = read ? a.gy + u.row(first + t + a.shift) * a.sgy + h * P : nullptr;
          vec both = all(0.f);
          for (i64 p = 0; p < P; p += VL) {
            const vec in = load(x + p, P - p), g = gy ? load(gy + p, P - p) : all(0.f);
            store(X + t * Pp + p, in);
            store(gY + t * Pp + p, g);
            both += in * g;
          }
          gsum += sum(both);
        }
        gskip[h] += gsum;
        zero(X + steps * Pp, (Q - steps) * Pp);

        // within the chunk: gM = gY X^T dt, and what it gives to B, C, x and the decays
        transpose(columns, Pp, X, Pp, XT, Q);
        product(LOWER_OUT, steps, columns, P, gY, Pp, 1, XT, Q, gM, Q, false);
        zero(columns_sum, Q);
        double sum_A = 0;  // flow times the time it decays over: taken apart, for in the sums of gT its digits cancel
        for (i64 t = 0; t < steps; t++) {
          vec row_sum = all(0.f), row_A = all(0.f);
          for (i64 j = 0; j <= t; j += VL) {
            const i64 at = t * Q + j;
            const vec time = gap(high[t], low[t], high + j, low + j);
            vec decay = decay_over(time, (float)A2);
            if (j + VL > t + 1) decay = first_lanes(decay, t + 1 - j);
            const vec m = decay * load(G + at), g = load(gM + at) * load(dt + j);
            vec flow = g * m;
            if (j + VL > t) flow = first_lanes(flow, t - j);  // on the diagonal there is no decay
            store(M + at, m);
            store(gG + at, load(gG + at) + g * decay);
            store(columns_sum + j, load(columns_sum + j) + flow);
            row_sum += flow;
            row_A += flow * time;
          }
          for (i64 j = padded(t + 1); j < min_of(Q, t / MR * MR + MR); j++) M[t * Q + j] = 0;
          gT[t] = sum(row_sum);
          sum_A += sum(row_A);
        }
        for (i64 t = 0; t < steps; t++) gT[t] -= columns_sum[t];
        product(LOWER_T, steps, Pp, steps, M, 1, Q, gY, Pp, gV, Pp, false);

        // through the states at either end
        float* gstate = gstates + (h - u.h0) * Np * Pp;
        const float* given = start_of(u, h, first);
        double gwhole = 0;  // gradient of A T at the chunk's end
        if (flows_back) {
          product(FULL, steps, Pp, N, B, Np, 1, gstate, Pp, U, Pp, false);
          transpose(Np, Pp, gstate, Pp, stateT, Np);
          for (i64 t = 0; t < steps; t++) {
            const double time = T - high[t] - low[t];
            const float decay = decay_over(time, A2), weight = decay * dt[t];
            vec both = all(0.f);
            for (i64 p = 0; p < Pp; p += VL) {
              const vec x = load(X + t * Pp + p), g = load(U + t * Pp + p);
              both += g * x;
              store(gV + t * Pp + p, load(gV + t * Pp + p) + decay * g);
              store(U + t * Pp + p, weight * x);
            }
            const double flow = weight * (double)sum(both);
            gT[t] -= flow;
            gwhole += flow;
            sum_A += flow * time;
          }
          product(FULL, steps, Np, P, U, Pp, 1, stateT, Np, gB, Np, true);
        }
        if (given) {
          pack_state(u, given, start);
          transpose(Np, Pp, start, Pp, stateT, Np);
          for (i64 t = 0; t < steps; t++) {
            const float decay = decay_over((double)high[t] + low[t], A2);
            for (i64 p = 0; p < Pp; p += VL) store(U + t * Pp + p, decay * load(gY + t * Pp + p));
          }
          product(FULL, steps, Np, P, U, Pp, 1, stateT, Np, inner, Np, false);
          for (i64 t = 0; t < steps; t++) {
            vec both = all(0.f);
            for (i64 n = 0; n < Np; n += VL) {
              const i64 at = t * Np + n;
              both += load(inner + at) * load(C + at);
              store(gC + at, load(gC + at) + load(inner + at));
            }
            const double flow = sum(both);
            gT[t] += flow;
            sum_A += flow * ((double)high[t] + low[t]);
          }
          const float whole = decay_over(T, A2);
          vec both = all(0.f);
          for (i64 i = 0; i < N * Pp; i += VL) {
            both += load(start + i) * load(gstate + i);
            store(gstate + i, whole * load(gstate + i));
          }
          const double flow = whole * (double)sum(both);
          gwhole += flow;
          sum_A += flow * T;
          product(FULL, N, Pp, steps, C, 1, Np, U, Pp, gstate, Pp, true);
        }
        gT[steps - 1] += gwhole;

        gA[h] += sum_A;
        double later = 0;  // gradient of A dt_t: T carries it to all later positions
        for (i64 t = steps - 1; t >= 0; t--) {
          const i64 row = u.row(first + t);
          later += gT[t];
          vec both = all(0.f);
          for (i64 p = 0; p < P; p += VL) {
            const vec gv = load(gV + t * Pp + p);
            both += gv * load(X + t * Pp + p);
            const vec gx = dt[t] * gv + skip * load(gY + t * Pp + p);
            float* out = a.gx + row * D + h * P + p;
            store(out, a.accumulate ? load(out, P - p) + gx : gx, P - p);
          }
          a.gdt[row * a.H + h] = (float)(later * a.A[h] + sum(both));
        }
      }
      product(LOWER, steps, Np, steps, gG, Q, 1, B, Np, gC, Np, true);
      product(LOWER_T, steps, Np, steps, gG, 1, Q, C, Np, gB, Np, true);
      for (i64 t = 0; t < steps; t++) {
        const i64 at = ((u.split0 * ssd_rows(a) + u.row(first + t)) * a.G + u.group) * N;
        add_row(gB + t * Np, N, u.call->gB + at, split > u.split0);
        add_row(gC + t * Np, N, u.call->gC + at, split > u.split0);
      }
    }
  }
  if (a.gstate)
    for (i64 h = u.h0; h < u.h1; h++)
      unpack_state(u, gstates + (h - u.h0) * Np * Pp, a.gstate + (u.s * a.H + h) * N * P);
}

void ssd_forward_task(void* context, i64 task, i64 thread) {
  const SsdCall& call = *(const SsdCall*)context;
  const i64 units = call.a->G * call.pieces, unit = task % units;
  ssd_forward_unit(ssd_unit(call, task / units, unit / call.pieces, unit % call.pieces),
                   call.scratch + thread * call.scratch_bytes);
}

void ssd_backward_task(void* context, i64 task, i64 thread) {
  const SsdCall& call = *(const SsdCall*)context;
  const Ssd& a = *call.a;
  const i64 units = a.G * call.pieces, unit = task % units, group = task / units;
  for (i64 s = group_begin(a.offsets, a.S, group); s < group_begin(a.offsets, a.S, group + 1); s++)
    ssd_backward_unit(ssd_unit(call, s, unit / call.pieces, unit % call.pieces), call.gA + group * a.H,
                      call.gskip + group * a.H, call.scratch + thread * call.scratch_bytes);
}

void ssd_forward(const Ssd& a) {
  SsdCall call = ssd_call(a, 0);
  parallel(a.threads, a.S * a.G * call.pieces, ssd_forward_task, &call);
}

void ssd_backward(const Ssd& a) {
  SsdCall call = ssd_call(a, 1);
  const i64 groups = row_groups(a.S), size = ssd_rows(a) * a.G * a.N;
  parallel(a.threads, groups * a.G * call.pieces, ssd_backward_task, &call);
  for (i64 piece = 0; call.pieces > 1 && piece < call.pieces; piece++) {
    add_row(call.gB + piece * size, size, a.gB, piece > 0);
    add_row(call.gC + piece * size, size, a.gC, piece > 0);
  }
  for (i64 h = 0; h < a.H; h++) {
    double sum_A = a.accumulate ? a.gA[h] : 0, sum_skip = 0;
    for (i64 group = 0; group < groups; group++) {
      sum_A += call.gA[group * a.H + h];
      sum_skip += call.gskip[group * a.H + h];
    }
    a.gA[h] = sum_A;
    if (a.gskip) a.gskip[h] = sum_skip;
  }
}

// --- the last position alone: one query of linear attention -------------------------------------------------------
//
//   y = sum_s weight_s x_s,  weight_s = (C . B_s) exp(A (sum of the steps after s)) dt_s

struct SsdLastCall {
  const SsdLast* a;
  double *gA, *gskip;  // [groups of sequences, H]
  char* scratch;
  i64 scratch_bytes;
};

i64 ssd_last_scratch(const SsdLast& a, i64 backward) {
  return room(a.H, 8) + (backward ? room(a.H, 8) + 2 * room(a.G) : room(a.G));
}

i64 ssd_last_workspace(const SsdLast& a, i64 backward) {
  return 64 + a.threads * room(ssd_last_scratch(a, backward), 1) +
         (backward ? 2 * room(row_groups(a.S) * a.H, 8) : 0);
}

SsdLastCall ssd_last_call(const SsdLast& a, i64 backward) {
  SsdLastCall call = {};
  Arena arena(a.workspace);
  call.a = &a;
  if (backward) {
    const i64 partial = row_groups(a.S) * a.H;
    call.gA = arena.take<double>(partial);
    call.gskip = arena.take<double>(partial);
    for (i64 i = 0; i < partial; i++) call.gA[i] = call.gskip[i] = 0;
  }
  call.scratch_bytes = room(ssd_last_scratch(a, backward), 1);
  call.scratch = arena.at;
  return call;
}

INLINE float dot(const float* a, const float* b, i64 n) {
  vec both = all(0.f);
  for (i64 i = 0; i < n; i += VL) both += load(a + i, n - i) * load(b + i, n - i);
  return sum(both);
}

void ssd_last_forward_task(void* context, i64 s, i64 thread) {
  const SsdLastCall& call = *(const SsdLastCall*)context;
  const SsdLast& a = *call.a;
  const i64 H = a.H, P = a.P, N = a.N, heads = H / a.G;
  const i64 begin = begin_of(a.offsets, a.L, s), end = begin_of(a.offsets, a.L, s + 1);
  Arena arena(call.scratch + thread * call.scratch_bytes);
  double* later = arena.take<double>(H);
  float* score = arena.floats(a.G);
  float* y = a.y + s * H * P;
  for (i64 h = 0; h < H; h++) {
    later[h] = 0;
    for (i64 p = 0; p < P; p++) y[h * P + p] = a.skip && end > begin ? a.skip[h] * a.x[(end - 1) * a.sx + h * P + p] : 0;
  }
  for (i64 row = end - 1; row >= begin; row--) {
    for (i64 g = 0; g < a.G; g++) score[g] = dot(a.B + row * a.sB + g * N, a.C + (s * a.G + g) * N, N);
    for (i64 h = 0; h < H; h++) {
      const float dt = a.dt[row * a.sdt + h];
      const float weight = score[h / heads] * decay_over(later[h], a.A[h] * LOG2E_DOUBLE) * dt;
      const float* x = a.x + row * a.sx + h * P;
      for (i64 p = 0; p < P; p += VL)
        store(y + h * P + p, load(y + h * P + p, P - p) + weight * load(x + p, P - p), P - p);
      later[h] += dt;
    }
  }
}

void ssd_last_backward_task(void* context, i64 group, i64 thread) {
  const SsdLastCall& call = *(const SsdLastCall*)context;
  const SsdLast& a = *call.a;
  const i64 H = a.H, P = a.P, N = a.N, heads = H / a.G;
  Arena arena(call.scratch + thread * call.scratch_bytes);
  double *later = arena.take<double>(H), *flowed = arena.take<double>(H);
  float *score = arena.floats(a.G), *gscore = arena.floats(a.G);
  double *gA = call.gA + group * H, *gskip = call.gskip + group * H;
  for (i64 s = group_begin(a.offsets, a.S, group); s < group_begin(a.offsets, a.S, group + 1); s++) {
    const i64 begin = begin_of(a.offsets, a.L, s), end = begin_of(a.offsets, a.L, s + 1);
    for (i64 h = 0; h < H; h++) later[h] = flowed[h] = 0;
    for (i64 row = begin; row < end; row++)
      for (i64 h = 0; h < H; h++) later[h] += a.dt[row * a.sdt + h];
    for (i64 i = 0; i < a.G * N; i++) a.gC[s * a.G * N + i] = 0;
    for (i64 row = begin; row < end; row++) {
      const float *B = a.B + row * a.sB, *C = a.C + s * a.G * N;
      const bool is_last = row == end - 1;
      for (i64 g = 0; g < a.G; g++) {
        score[g] = dot(B + g * N, C + g * N, N);
        gscore[g] = 0;
      }
      for (i64 h = 0; h < H; h++) {
        const float dt = a.dt[row * a.sdt + h];
        later[h] -= dt;
        const float decay = decay_over(later[h], a.A[h] * LOG2E_DOUBLE), s_h = score[h / heads];
        const float *x = a.x + row * a.sx + h * P, *gy = a.gy + (s * H + h) * P;
        const float gweight = dot(x, gy, P), weight = s_h * decay * dt, in = weight + (is_last && a.skip ? a.skip[h] : 0.f);
        for (i64 p = 0; p < P; p += VL) store(a.gx + (row * H + h) * P + p, in * load(gy + p, P - p), P - p);
        gscore[h / heads] += gweight * decay * dt;
        a.gdt[row * H + h] = (float)(gweight * s_h * decay + flowed[h] * a.A[h]);
        flowed[h] += (double)weight * gweight;  // gradient of the exponents so far
        gA[h] += (double)weight * gweight * later[h];
        if (is_last) gskip[h] += gweight;
      }
      for (i64 g = 0; g < a.G; g++)
        for (i64 n = 0; n < N; n++) {
          a.gB[(row * a.G + g) * N + n] = gscore[g] * C[g * N + n];
          a.gC[(s * a.G + g) * N + n] += gscore[g] * B[g * N + n];
        }
    }
  }
}

void ssd_last_forward(const SsdLast& a) {
  SsdLastCall call = ssd_last_call(a, 0);
  parallel(a.threads, a.S, ssd_last_forward_task, &call);
}

void ssd_last_backward(const SsdLast& a) {
  SsdLastCall call = ssd_last_call(a, 1);
  const i64 groups = row_groups(a.S);
  parallel(a.threads, groups, ssd_last_backward_task, &call);
  for (i64 h = 0; h < a.H; h++) {
    double sum_A = 0, sum_skip = 0;
    for (i64 group = 0; group < groups; group++) {
      sum_A += call.gA[group * a.H + h];
      sum_skip += call.gskip[group * a.H + h];
    }
    a.gA[h] = sum_A;
    if (a.gskip) a.gskip[h] = sum_skip;
  }
}

}  // namespace
