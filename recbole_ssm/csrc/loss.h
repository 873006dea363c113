// Cross-entropy of output [n, d] against items [V, d], with its gradients, over tiles of the logits.
//
//   logits = scale output items^T + bias,  loss_r = log(sum_v exp(logit_rv)) - logit_r,target
//
// Rows are taken in blocks. Three products are made of a tile, some items by the rows of a block:
//
//   logits [items, rows] = items [items, d]          output^T [d, rows]     the sums run over d
//   gitems [items, d]    = gradient [items, rows]    output [rows, d]       over rows
//   goutput [rows, d]    = gradient^T [rows, items]  items [items, d]       over items
//
// The first pass over a block leaves exponentials, relative to the maximum of each row in the tile, where the logits
// were; then the maxima and sums of the tiles give those of the rows; the second pass scales the exponentials into
// gradients, in place, and makes the other two products. So each logit is computed once, and what is kept is one block.
//
// Who adds what to which sum is decided by the shape alone, so the number of threads changes no bit. Many items: one
// block at a time, whose items fall into parts; a part owns its rows of gitems and a goutput of its own, and these are
// added in order. Few items: the blocks fall into groups, each with a gitems of its own.

#pragma once
#include "tiles.h"

namespace {

const i64 FEW_TILES = 8;   // below it the rows are shared out, not the items
const i64 FAIR_GROUPS = 8, MOST_GROUPS = 16, MOST_ROWS = 256, LEAST_ROWS = 64;
const i64 KEPT = 1 << 22;  // exponentials that a block keeps, unless LEAST_ROWS need more

// --- one call -----------------------------------------------------------------------------------------------------

struct LossCall {
  const Loss* a;
  bool backward;
  i64 depth, items, tiles;     // d, padded; items (or candidates) and their tiles
  i64 rows, blocks;            // rows of a block, at most, and how many blocks there are
  i64 groups, parts, threads;  // groups of blocks and parts of tiles; at least one of the two is 1
  i64 places;                  // blocks that are worked on at once
  float scale, left_in;        // of base-2 logarithms; items that the bias does not leave out
  float* gitems;               // [groups, items, d]; of one group the result itself, unless candidates are sampled
  float *losses, *gown;        // [n]; of the targets' logits, where candidates are sampled
  char *memory, *scratch;
  i64 block_bytes, scratch_bytes;
};

// What one block of rows works on.
struct RowBlock {
  i64 first, rows;
  float *output, *outputT;       // [rows, d] and [d, rows] in panels
  float* tiles;                  // exponentials, then gradients of the logits: [items, rows] in panels, tile by tile
  float *highest, *sums, *flat;  // of a tile and row: maximum; sum of exponentials, then their factor; sum of logits
  float *own, *uniform, *hot;    // of a row: the target's logit; what smoothing and the target take off a gradient
  int32_t* wanted;               // of a row: the target, where candidates are sampled
  float* goutput;                // [parts, rows, d padded]
};

LossCall loss_call(const Loss& a) {
  LossCall call = {};
  call.a = &a;
  call.backward = a.goutput || a.gitems;
  call.depth = padded(a.d);
  call.items = a.candidates ? a.K : a.V;
  call.tiles = tiles_of(call.items, a.d);
  const bool few = call.tiles < FEW_TILES && a.n > 2 * LEAST_ROWS;
  const i64 wanted = few ? a.n / FAIR_GROUPS : KEPT / max_of(call.items, 1);
  const i64 most = max_of(LEAST_ROWS, min_of(MOST_ROWS, wanted));
  call.rows = min_of(max_of(padded(a.n), VL), most / WIDE * WIDE);
  call.blocks = (a.n + call.rows - 1) / call.rows;
  call.groups = few ? min_of(MOST_GROUPS, call.blocks) : 1;
  // each part has a gradient of the block's rows, and all of these should stay in the cache
  const i64 parts = max_of(8, min_of(32, (1 << 20) / (call.rows * call.depth)));
  call.parts = few ? 1 : min_of(parts, call.tiles);
  call.threads = threads_for(a.threads, a.n * call.items, a.d);
  call.places = few ? min_of(call.threads, call.groups) : 1;
  const i64 rows = call.rows;
  call.block_bytes = 2 * room(rows * call.depth) + room(call.backward ? tall(call.items) * rows : 0) +
                     3 * room(call.tiles * rows) + 4 * room(rows) + room(call.parts * rows * call.depth);
  call.scratch_bytes = tile_room(a.d);
  return call;
}

// Whether the gradient of the items is put together in the workspace.
bool apart(const LossCall& call) { return call.a->gitems && (call.groups > 1 || call.a->candidates); }

i64 loss_workspace(const Loss& a) {
  const LossCall call = loss_call(a);
  return 64 + 2 * room(a.n) + room(apart(call) ? call.groups * call.items * a.d : 0) +
         call.places * call.block_bytes + call.threads * call.scratch_bytes;
}

RowBlock row_block(const LossCall& call, i64 place, i64 number) {
  const i64 rows = call.rows;
  Arena arena(call.memory + place * call.block_bytes);
  RowBlock b = {};
  b.first = number * rows;
  b.rows = min_of(rows, call.a->n - b.first);
  b.output = arena.floats(rows * call.depth);
  b.outputT = arena.floats(rows * call.depth);
  b.tiles = arena.floats(call.backward ? tall(call.items) * rows : 0);
  b.highest = arena.floats(call.tiles * rows);
  b.sums = arena.floats(call.tiles * rows);
  b.flat = arena.floats(call.tiles * rows);
  b.own = arena.floats(rows);
  b.uniform = arena.floats(rows);
  b.hot = arena.floats(rows);
  b.wanted = arena.take<int32_t>(rows);
  b.goutput = arena.floats(call.parts * rows * call.depth);
  return b;
}

Tile tile_of(const LossCall& call, i64 number, i64 thread) {
  const Loss& a = *call.a;
  return pack_tile(number, call.items, a.d, a.items, a.candidates, a.bias, LOG2E,
                   call.scratch + thread * call.scratch_bytes);
}

// --- first pass: logits, and their exponentials relative to the tile's maximum ------------------------------------

// A sampled item that is the row's target counts as left out there.
template <int W>
INLINE void leave_targets_out(const LossCall& call, const Tile& tile, const int32_t* wanted, float* logits, vec* highest) {
  for (int j = 0; j < W; j++) {
    const ivec target = *(const ivec*)(wanted + j * VL);
    const vec nothing = all(-INFINITY);
    highest[j] = nothing;
    for (i64 v = 0; v < tile.items; v++) {
      float* at = logits + (v * W + j) * VL;
      const vec x = target == (int32_t)call.a->candidates[tile.first + v] ? nothing : load(at);
      store(at, x);
      highest[j] = highest[j] > x ? highest[j] : x;
    }
  }
}

template <int W>
void first_pass(const LossCall& call, const RowBlock& b, i64 number, const Tile& tile, i64 row) {
  const Loss& a = *call.a;
  float* logits = call.backward ? b.tiles + (tile.first * call.rows + row * tile.height) : tile.logits;
  vec highest[W];
  logits_of<W>(tile, a.d, b.outputT + row * call.depth, call.scale, logits, highest);
  if (a.candidates) leave_targets_out<W>(call, tile, b.wanted + row, logits, highest);
  else
    for (i64 r = row; r < min_of(row + W * VL, b.rows); r++) {
      const i64 v = a.target[b.first + r] - tile.first;
      if (v >= 0 && v < tile.items) b.own[r] = logits[v * W * VL + r - row];
    }
  const vec least = all(-3e38f);  // where all is left out, minus infinity less itself would be no number
  for (int j = 0; j < W; j++) {
    const vec most = highest[j] > least ? highest[j] : least;
    vec sums = all(0.f), flat = all(0.f);
    if (a.smoothing > 0)
      for (i64 v = 0; v < tile.items; v++)
        if (tile.bias[v] > -INFINITY) flat += load(logits + (v * W + j) * VL);
    for (i64 v = 0; v < tile.height; v++) {
      float* at = logits + (v * W + j) * VL;
      const vec e = exp2_of(load(at) - most);
      store(at, e);
      sums += e;
    }
    const i64 to = number * call.rows + row + j * VL;
    store(b.highest + to, most);
    store(b.sums + to, sums);
    store(b.flat + to, flat);
  }
}

void first_pass(const LossCall& call, const RowBlock& b, i64 part, i64 thread) {
  for (i64 t = call.tiles * part / call.parts; t < call.tiles * (part + 1) / call.parts; t++) {
    const Tile tile = tile_of(call, t, thread);
    for (i64 row = 0; row < padded(b.rows); row += WIDE) {
      if (padded(b.rows) - row > VL) first_pass<2>(call, b, t, tile, row);
      else first_pass<1>(call, b, t, tile, row);
    }
  }
}

// --- between the passes: a block of rows comes in, and its tiles' sums become losses and factors ------------------

INLINE float dot_of(const float* a, const float* b, i64 n) {
  vec both = all(0.f);
  for (i64 i = 0; i < n; i += VL) both += load(a + i, n - i) * load(b + i, n - i);
  return sum(both);
}

void take_in(const LossCall& call, const RowBlock& b) {
  const Loss& a = *call.a;
  pack_output(b.rows, a.d, a.output + b.first * a.d, b.output, b.outputT);
  for (i64 r = 0; a.candidates && r < b.rows; r++) {
    const i64 at = b.first + r;
    b.wanted[r] = (int32_t)a.target[at];
    b.own[r] = call.scale * dot_of(a.output + at * a.d, a.items + a.target[at] * a.d, a.d);
  }
  for (i64 r = b.rows; r < padded(b.rows); r++) b.wanted[r] = -1;
}

INLINE double weight_of(const Loss& a, i64 row) { return a.weight ? a.weight[row] : 1.0 / a.n; }

void settle(const LossCall& call, const RowBlock& b) {
  const Loss& a = *call.a;
  const double smoothing = a.smoothing;
  for (i64 r = 0; r < padded(b.rows); r += VL) {
    const i64 lanes = min_of(VL, b.rows - r);
    vec most = a.candidates ? load(b.own + r, lanes) : all(-3e38f);
    for (i64 t = 0; t < call.tiles; t++) {
      const vec x = load(b.highest + t * call.rows + r);
      most = most > x ? most : x;
    }
    double sums[VL] = {}, flat[VL] = {};
    for (i64 t = 0; t < call.tiles; t++) {
      float* at = b.sums + t * call.rows + r;
      const vec factor = exp2_of(load(b.highest + t * call.rows + r) - most), part = factor * load(at);
      for (i64 i = 0; i < VL; i++) sums[i] += part[i];
      for (i64 i = 0; i < VL; i++) flat[i] += b.flat[t * call.rows + r + i];
      store(at, factor);
    }
    vec weight = all(0.f);
    for (i64 i = 0; i < lanes; i++) {
      const i64 at = b.first + r + i;
      const double own = a.candidates ? exp2((double)b.own[r + i] - most[i]) : 0, total = sums[i] + own;
      const double smooth = smoothing > 0 ? smoothing / call.left_in * flat[i] : 0;
      call.losses[at] = (float)(0.6931471805599453 * (most[i] + log2(total) - (1 - smoothing) * b.own[r + i] - smooth));
      const double scaled = weight_of(a, at) * a.scale;
      weight[i] = (float)(scaled / total);
      b.uniform[r + i] = (float)(scaled * smoothing / call.left_in);
      b.hot[r + i] = (float)(scaled * (1 - smoothing));
      call.gown[at] = (float)(scaled * (own / total - 1));
    }
    for (i64 i = lanes; i < VL; i++) b.uniform[r + i] = 0;
    for (i64 t = 0; t < call.tiles; t++) {
      float* at = b.sums + t * call.rows + r;
      store(at, load(at) * weight);
    }
  }
}

// --- second pass: gradients of the logits, and what they give to output and items ---------------------------------

void scale_tile(const LossCall& call, const RowBlock& b, i64 number, const Tile& tile, float* gradient) {
  const Loss& a = *call.a;
  const i64 height = padded(b.rows);
  for (i64 row = 0; row < height; row += WIDE) {
    const i64 width = width_of(height, row);
    float* panel = gradient + row * tile.height;
    for (i64 j = 0; j < width; j += VL) {
      const vec factor = load(b.sums + number * call.rows + row + j), uniform = load(b.uniform + row + j);
      for (i64 v = 0; v < tile.items; v++) {
        float* at = panel + v * width + j;
        store(at, load(at) * factor - uniform);
      }
    }
    for (i64 v = 0; a.bias && v < tile.items; v++)
      if (tile.bias[v] == -INFINITY) zero(panel + v * width, width);
    for (i64 r = row; !a.candidates && r < min_of(row + width, b.rows); r++) {
      const i64 v = a.target[b.first + r] - tile.first;
      if (v >= 0 && v < tile.items) panel[v * width + r - row] -= b.hot[r];
    }
  }
}

// gitems [items, W VL of d] from `row` of the tile on
template <int W>
INLINE void give_items(const RowBlock& b, const Tile& tile, const float* gradient, i64 row, const float* output, i64 d,
                       i64 lanes, float* gitems, bool add) {
  vec c[TALL][W];
  row_products<W>(tile.height, b.rows, gradient, row, output, c);
  for (i64 i = 0; i < min_of(TALL, tile.items - row); i++)
    for (int j = 0; j < W; j++) {
      if (j * VL >= lanes) continue;
      float* at = gitems + (tile.first + row + i) * d + j * VL;
      store(at, add ? load(at, lanes - j * VL) + c[i][j] : c[i][j], lanes - j * VL);
    }
}

// goutput [ROWS, W VL of d], the gradient's columns from `column` on
template <int ROWS, int W>
INLINE void give_output(const Tile& tile, const float* gradient, i64 width, const float* items, float* goutput, i64 depth,
                        bool add) {
  vec c[ROWS][W];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < W; j++) c[i][j] = add ? load(goutput + i * depth + j * VL) : all(0.f);
  add_products<ROWS, W>(tile.items, gradient, 1, width, items, c);
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < W; j++) store(goutput + i * depth + j * VL, c[i][j]);
}

template <int W>
void give_output(const RowBlock& b, const Tile& tile, const float* gradient, const float* items, float* goutput, i64 depth,
                 bool add) {
  const i64 height = padded(b.rows);
  for (i64 row = 0; row < height; row += WIDE) {
    const i64 width = width_of(height, row);
    for (i64 r = 0; r < width;) {
      const float* from = gradient + row * tile.height + r;
      float* to = goutput + (row + r) * depth;
      const i64 left = width - r;
      if (left >= TALL && left != 8) give_output<TALL, W>(tile, from, width, items, to, depth, add), r += TALL;
      else give_output<4, W>(tile, from, width, items, to, depth, add), r += 4;
    }
  }
}

void second_pass(const LossCall& call, const RowBlock& b, i64 part, i64 thread, float* gitems, bool add) {
  const Loss& a = *call.a;
  const i64 d = a.d, height = padded(b.rows), begin = call.tiles * part / call.parts;
  for (i64 t = begin; t < call.tiles * (part + 1) / call.parts; t++) {
    const Tile tile = tile_of(call, t, thread);
    float* gradient = b.tiles + tile.first * call.rows;
    scale_tile(call, b, t, tile, gradient);
    for (i64 first = 0; a.gitems && first < tile.items; first += SOME)
      for (i64 k = 0; k < d; k += WIDE) {
        const float* output = b.output + k * height;
        for (i64 v = first; v < min_of(first + SOME, tile.items); v += TALL) {
          if (width_of(d, k) > VL) give_items<2>(b, tile, gradient, v, output, d, d - k, gitems + k, add);
          else give_items<1>(b, tile, gradient, v, output, d, d - k, gitems + k, add);
        }
      }
    for (i64 k = 0; a.goutput && k < d; k += WIDE) {
      float* to = b.goutput + part * call.rows * call.depth + k;
      if (width_of(d, k) > VL) give_output<2>(b, tile, gradient, tile.packed + k * tile.height, to, call.depth, t > begin);
      else give_output<1>(b, tile, gradient, tile.packed + k * tile.height, to, call.depth, t > begin);
    }
  }
}

// The parts of goutput in their order, and what the target's own row gives where candidates are sampled.
void put_together(const LossCall& call, const RowBlock& b) {
  const Loss& a = *call.a;
  for (i64 r = 0; r < b.rows; r++)
    for (i64 k = 0; k < a.d; k += VL) {
      const i64 at = (b.first + r) * a.d + k;
      vec g = all(0.f);
      for (i64 part = 0; part < call.parts; part++) g += load(b.goutput + (part * call.rows + r) * call.depth + k);
      if (a.candidates) g += call.gown[b.first + r] * load(a.items + a.target[b.first + r] * a.d + k, a.d - k);
      store(a.goutput + at, g, a.d - k);
    }
}

// --- many items: one block after the other, its parts side by side ------------------------------------------------

struct LossStep {
  const LossCall* call;
  RowBlock block;
  bool add;
};

void loss_first_task(void* context, i64 part, i64 thread) {
  const LossStep& step = *(const LossStep*)context;
  first_pass(*step.call, step.block, part, thread);
}

void loss_second_task(void* context, i64 part, i64 thread) {
  const LossStep& step = *(const LossStep*)context;
  second_pass(*step.call, step.block, part, thread, step.call->gitems, step.add);
}

// --- few items: groups of rows side by side, each block by block --------------------------------------------------

void loss_group_task(void* context, i64 group, i64 thread) {
  const LossCall& call = *(const LossCall*)context;
  const i64 begin = call.blocks * group / call.groups, end = call.blocks * (group + 1) / call.groups;
  for (i64 number = begin; number < end; number++) {
    const RowBlock block = row_block(call, thread, number);
    take_in(call, block);
    first_pass(call, block, 0, thread);
    settle(call, block);
    if (!call.backward) continue;
    second_pass(call, block, 0, thread, call.gitems + group * call.items * call.a->d, number > begin);
    if (call.a->goutput) put_together(call, block);
  }
}

// --- all of it ----------------------------------------------------------------------------------------------------

// The gradient of the items from what the groups, or the candidates and the targets, have given.
void gather_items(const LossCall& call) {
  const Loss& a = *call.a;
  const i64 size = call.items * a.d;
  if (!a.candidates) {
    for (i64 group = 0; group < call.groups; group++) add_row(call.gitems + group * size, size, a.gitems, group > 0);
    return;
  }
  zero(a.gitems, a.V * a.d);
  for (i64 group = 0; group < call.groups; group++)
    for (i64 k = 0; k < a.K; k++)
      add_row(call.gitems + group * size + k * a.d, a.d, a.gitems + a.candidates[k] * a.d, true);
  for (i64 r = 0; r < a.n; r++)
    for (i64 k = 0; k < a.d; k++) a.gitems[a.target[r] * a.d + k] += call.gown[r] * a.output[r * a.d + k];
}

void loss(const Loss& a) {
  *a.loss = 0;
  if (!a.n && a.gitems) zero(a.gitems, a.V * a.d);
  if (!a.n) return;
  LossCall call = loss_call(a);
  Arena arena(a.workspace);
  call.losses = arena.floats(a.n);
  call.gown = arena.floats(a.n);
  call.gitems = apart(call) ? arena.floats(call.groups * call.items * a.d) : a.gitems;
  call.memory = arena.take<char>(call.places * call.block_bytes);
  call.scratch = arena.at;
  call.scale = (float)(a.scale * 1.4426950408889634);
  i64 left_in = a.V;
  for (i64 v = 0; a.bias && v < a.V; v++) left_in -= a.bias[v] == -INFINITY;
  call.left_in = (float)left_in;
  if (call.groups > 1) parallel(call.threads, call.groups, loss_group_task, &call);
  for (i64 number = 0; call.groups == 1 && number < call.blocks; number++) {
    LossStep step = {&call, row_block(call, 0, number), number > 0};
    take_in(call, step.block);
    parallel(call.threads, call.parts, loss_first_task, &step);
    settle(call, step.block);
    if (!call.backward) continue;
    parallel(call.threads, call.parts, loss_second_task, &step);
    if (a.goutput) put_together(call, step.block);
  }
  if (apart(call)) gather_items(call);
  double total = 0;
  for (i64 r = 0; r < a.n; r++) total += weight_of(a, r) * call.losses[r];
  *a.loss = (float)total;
}

}  // namespace
