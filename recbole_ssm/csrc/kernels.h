// The C interface between the Python side (ops/native.py) and the kernels. Python derives the members of a structure
// from the row of the op in ops/table.py, in this order: sizes, threads, options, offsets, inputs, outputs, gradients of
// outputs, gradients of inputs, workspace; a test compares the two.
//
// No header of PyTorch or Python: one build serves every version of either. All fields are eight bytes wide, so that
// the structures look the same from ctypes. Python checks every shape; pointers may be null where a comment says so.
// Sequence s owns rows [offsets[s], offsets[s + 1]), or [s L, (s + 1) L) where offsets is null. A row stride is counted
// in floats and belongs to the field before it; rows without one are contiguous.

#pragma once
#include <cstdint>

typedef int64_t i64;

enum { CHUNK = 64 };  // positions between two states that the forward keeps for the backward

// selective scan: D channels with a state of N each; states are stored [S, N, D]
struct Scan {
  i64 S, L, D, N, threads, dt_softplus;
  i64 last;                                  // only y of each sequence's last position; C and z have S rows
  const i64* offsets;                        // or null
  const float *x; i64 sx; const float *dt; i64 sdt;
  const float* A;                            // [D, N]
  const float *B; i64 sB; const float *C; i64 sC;
  const float *skip, *z; i64 sz;             // or null
  const float *dt_bias, *state;              // or null
  float *y, *final, *kept;                   // final, kept: or null; kept: state at the start of each chunk but the first
  const float *gy; i64 sgy;                  // or null
  const float* gfinal;                       // or null
  float *gx, *gdt, *gA, *gB, *gC;
  float *gskip, *gz, *gdt_bias, *gstate;     // or null
  char* workspace;
};

// SSD: H heads of P channels in G groups; states are stored [S, H, N, P]
struct Ssd {
  i64 S, L, H, P, G, N, threads;
  i64 reverse, shift;                        // time runs backward; y_t lands one place later in time, zeros first
  i64 accumulate;                            // add to y (forward) or gx and gA (backward) instead of writing
  const i64* offsets;                        // or null
  const float *x; i64 sx; const float *dt; i64 sdt;
  const float* A;                            // [H]
  const float *B; i64 sB; const float *C; i64 sC;
  const float *skip, *state;                 // or null
  float *y, *final, *kept;                   // final, kept: or null
  const float *gy; i64 sgy;
  const float* gfinal;                       // or null
  float *gx, *gdt;
  double* gA;
  float *gB, *gC;
  double* gskip;                             // or null
  float* gstate;                             // or null
  char* workspace;
};

// y of SSD at the last position of each sequence
struct SsdLast {
  i64 S, L, H, P, G, N, threads;
  const i64* offsets;                        // or null
  const float *x; i64 sx; const float *dt; i64 sdt;
  const float* A;
  const float *B; i64 sB;
  const float* C;                            // [S, G, N]
  const float* skip;                         // or null
  float* y;                                  // [S, H, P]
  const float* gy;
  float *gx, *gdt;
  double* gA;
  float *gB, *gC;
  double* gskip;                             // or null
  char* workspace;
};

// depthwise convolution of K taps, `lead` of them before the present; states are stored [S, K, D]
struct Conv {
  i64 S, L, D, K, threads, lead, silu;
  const i64* offsets;                        // or null
  const float *x; i64 sx;
  const float* weight;                       // [D, K]
  const float *bias, *state;                 // or null
  float *y, *final;                          // final or null
  const float *gy; i64 sgy;
  const float* gfinal;                       // or null
  float *gx, *gweight;
  float *gbias, *gstate;                     // or null
  char* workspace;
};

struct Norm { const float *weight, *bias; double eps; };

// One event of each of B users through a block: Mamba where H is 0, else Mamba-2 of H heads in G groups; the mixer alone
// where F is 0. Weights are PyTorch's, [out, in]. States may be written where they were read.
struct Step {
  i64 B, M, threads, D, N, K, R, H, G, F, residual;
  i64 pre_norm;                              // norm and last stand before the two parts of the block, not behind them
  i64 items; const i64* rows;                // or null: u of user b is row rows[b] of that many
  const float* u;                            // [B, M]
  Norm first;                                // LayerNorm of u, or null
  const float *in_weight, *conv_weight, *conv_bias;
  const float *x_weight, *dt_weight;         // of Mamba
  const float *dt_bias, *A_log, *skip;       // Mamba: [D], [D, N], [D]; Mamba-2: [H] each
  const float* diagonal;                     // of Hydra, [H, D]: no step, but History takes it
  Norm gate_norm;                            // of Mamba-2 and Hydra, without a bias
  const float* out_weight;
  Norm norm; const float *w_1, *b_1, *w_2, *b_2; Norm last;
  Norm behind;                               // LayerNorm behind the block, or null
  const float *conv, *ssm;                   // [B, D (Mamba-2: D + 2 G N), K], [B, D, N]
  float *conv_after, *ssm_after, *y;
  char* workspace;
};

// Whole histories through `layers` blocks, to the output at the last event of each. Of the blocks the sizes and weights
// are read.
struct History {
  i64 S, L, V, M, threads, layers;           // L: events of all histories
  const i64 *offsets, *items;                // [S + 1], [L]
  const float* table;                        // [V, M]
  Norm first;                                // LayerNorm of the rows of the table, or null
  const Step* blocks;
  float* y;                                  // [S, M]
  char* workspace;
};

struct Dropout {
  i64 threads, size, seed, threshold;        // an element stays where its 32 random bits are not below the threshold
  double scale;
  const float* x;
  float* y;
  char* workspace;                           // of no size
};

// Weighted sum of the cross-entropies of n rows of output against V items, and its gradients where they have a place to
// go to. Logits are scale output items^T + bias; a bias of minus infinity leaves an item out. With candidates a row's sum
// goes over its target, whose logit has no bias, and those of the K that are not its target.
struct Loss {
  i64 n, d, V, K, threads;
  double scale, smoothing;                   // no smoothing with candidates
  const float *output, *items;               // [n, d], [V, d]
  const i64* target;                         // [n]
  const float* weight;                       // [n], or null for 1 / n each
  const float* bias;                         // [V] or null
  const i64* candidates;                     // [K] or null
  float* loss;                               // of one number
  float *goutput, *gitems;                   // or null
  char* workspace;
};

// Of each row of output: how many items score higher than its target and how many others alike, first among all V items,
// then without those seen. What cannot be compared (NaN) counts as higher.
struct Ranks {
  i64 n, d, V, E, R, threads;
  const float *output, *items;               // [n, d], [V, d]
  const i64* target;                         // [n]
  const float* bias;                         // [V] or null, added to the scores; minus infinity leaves an item out
  const i64 *seen, *offsets;                 // [E], [R] or null: row r has seen [offsets[r], offsets[r + 1]) of them,
                                             // which rise and hold no target
  i64 *higher, *ties;                        // [n, 2]
  char* workspace;
};

// Every kernel by the name that Python calls it by, with its structure. Those of the first kind have a forward and a
// backward. A new kernel is a structure above, a line here, and a header among those of kernels.cpp with its functions;
// `fits` in library.cpp says which values it refuses.
#define ALL_KERNELS(TWO_WAYS, ONE_WAY) \
  TWO_WAYS(scan, Scan)                 \
  TWO_WAYS(ssd, Ssd)                   \
  TWO_WAYS(ssd_last, SsdLast)          \
  TWO_WAYS(conv, Conv)                 \
  ONE_WAY(step, Step)                  \
  ONE_WAY(history, History)            \
  ONE_WAY(dropout, Dropout)            \
  ONE_WAY(loss, Loss)                  \
  ONE_WAY(ranks, Ranks)

// What one instruction set offers. A workspace is the bytes that a call needs.
#define TWO_WAYS(op, Args)           \
  void (*op##_forward)(const Args&);  \
  void (*op##_backward)(const Args&); \
  i64 (*op##_workspace)(const Args&, i64 backward);
#define ONE_WAY(op, Args)  \
  void (*op)(const Args&); \
  i64 (*op##_workspace)(const Args&);
struct Kernels {
  ALL_KERNELS(TWO_WAYS, ONE_WAY)
};
#undef TWO_WAYS
#undef ONE_WAY

// Run task(0) ... task(tasks - 1) on several threads, each task once, in any order. `run(context, task, thread)`.
__attribute__((visibility("hidden"))) void parallel(i64 threads, i64 tasks, void (*run)(void*, i64, i64), void* context);
