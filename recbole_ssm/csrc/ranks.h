// How many items score higher than each row's target, and how many like it, over tiles of the scores; with all items in the
// list, and without those that the row has seen. The target's own score goes through the same products as all others, so
// that it is equal to itself to the last bit.

#pragma once
#include "tiles.h"

namespace {

const i64 RANK_ROWS = 256, MOST_RANK_PARTS = 16;

struct RanksCall {
  const Ranks* a;
  i64 tiles, rows, blocks;         // tiles of the items, rows of a block at most, blocks
  i64 parts, threads;              // parts of the tiles
  i64 (*counts)[4];                // of each row: below the target and like it, among all items and among the seen
  char* scratch;
  i64 scratch_bytes;               // of one thread
};

RanksCall ranks_call(const Ranks& a) {
  RanksCall call = {};
  call.a = &a;
  call.tiles = tiles_of(a.V, a.d);
  call.rows = min_of(max_of(padded(a.n), VL), RANK_ROWS);
  call.blocks = (a.n + call.rows - 1) / call.rows;
  call.threads = threads_for(a.threads, a.n * a.V, a.d);
  call.parts = forward_parts(call.threads, call.blocks, min_of(MOST_RANK_PARTS, call.tiles));  // counts have no rounding
  call.scratch_bytes = tile_room(a.d) + 2 * room(call.rows * padded(a.d)) + room(call.rows) +
                       room(call.rows, sizeof(i64));
  return call;
}

i64 ranks_workspace(const Ranks& a) {
  return 64 + room(4 * a.n, sizeof(i64)) + ranks_call(a).threads * ranks_call(a).scratch_bytes;
}

struct RankedRows {
  i64 first, rows;
  float *output, *outputT, *own;  // the rows in panels, transposed too; the score of each row's target
  i64* next;                      // the first seen item of each row that no tile has had yet
  char* tile;
};

template <int W>
void score_targets(const RanksCall& call, const RankedRows& b, i64 row) {
  const Ranks& a = *call.a;
  const i64 count = min_of(W * VL, b.rows - row);
  const Tile tile = pack_tile(0, count, a.d, a.items, a.target + b.first + row, a.bias, 1.f, b.tile);
  vec highest[W];
  logits_of<W>(tile, a.d, b.outputT + row * padded(a.d), 1.f, tile.logits, highest);
  for (i64 r = 0; r < W * VL; r++) b.own[row + r] = r < count ? tile.logits[r * W * VL + r] : 0.f;
}

template <int W>
void count_tile(const RanksCall& call, const RankedRows& b, const Tile& tile, i64 row) {
  const Ranks& a = *call.a;
  vec highest[W];
  logits_of<W>(tile, a.d, b.outputT + row * padded(a.d), 1.f, tile.logits, highest);
  ivec below[W] = {}, alike[W] = {};
  for (int j = 0; j < W; j++) {
    const vec own = load(b.own + row + j * VL);
    for (i64 v = 0; v < tile.items; v++) {
      const vec x = load(tile.logits + (v * W + j) * VL);
      below[j] -= x < own;  // a lane where it holds is -1
      alike[j] -= x == own;
    }
  }
  for (i64 r = 0; r < min_of(W * VL, b.rows - row); r++) {
    const i64 at = b.first + row + r;
    i64 found[4] = {below[r / VL][r % VL], alike[r / VL][r % VL], 0, 0};
    i64& next = b.next[row + r];
    for (; a.seen && next < a.offsets[at + 1] && a.seen[next] < tile.first + tile.items; next++) {
      const float x = tile.logits[(a.seen[next] - tile.first) * W * VL + r];
      found[2] += x < b.own[row + r];
      found[3] += x == b.own[row + r];
    }
    for (int i = 0; i < 4; i++)
      if (found[i]) __atomic_fetch_add(&call.counts[at][i], found[i], __ATOMIC_RELAXED);
  }
}

void ranks_task(void* context, i64 task, i64 thread) {
  const RanksCall& call = *(const RanksCall*)context;
  const Ranks& a = *call.a;
  const i64 part = task % call.parts, begin = call.tiles * part / call.parts;
  Arena arena(call.scratch + thread * call.scratch_bytes);
  RankedRows b = {};
  b.first = task / call.parts * call.rows;
  b.rows = min_of(call.rows, a.n - b.first);
  b.tile = arena.take<char>(tile_room(a.d));
  b.output = arena.floats(call.rows * padded(a.d));
  b.outputT = arena.floats(call.rows * padded(a.d));
  b.own = arena.floats(call.rows);
  b.next = arena.take<i64>(call.rows);
  pack_output(b.rows, a.d, a.output + b.first * a.d, b.output, b.outputT);
  for (i64 row = 0; row < padded(b.rows); row += WIDE) {
    if (width_of(padded(b.rows), row) > VL) score_targets<2>(call, b, row);
    else score_targets<1>(call, b, row);
  }
  for (i64 r = 0; a.seen && r < b.rows; r++) {
    b.next[r] = a.offsets[b.first + r];
    while (b.next[r] < a.offsets[b.first + r + 1] && a.seen[b.next[r]] < begin * tile_items(a.d)) b.next[r]++;
  }
  for (i64 t = begin; t < call.tiles * (part + 1) / call.parts; t++) {
    const Tile tile = pack_tile(t, a.V, a.d, a.items, nullptr, a.bias, 1.f, b.tile);
    for (i64 row = 0; row < padded(b.rows); row += WIDE) {
      if (width_of(padded(b.rows), row) > VL) count_tile<2>(call, b, tile, row);
      else count_tile<1>(call, b, tile, row);
    }
  }
}

void ranks(const Ranks& a) {
  RanksCall call = ranks_call(a);
  Arena arena(a.workspace);
  call.counts = (i64(*)[4])arena.take<i64>(4 * a.n);
  call.scratch = arena.at;
  memset(call.counts, 0, 4 * a.n * sizeof(i64));
  parallel(call.threads, call.blocks * call.parts, ranks_task, &call);
  for (i64 r = 0; r < a.n; r++) {
    const i64* all_items = call.counts[r];
    for (int masked = 0; masked < 2; masked++) {
      const i64 seen = masked && a.seen ? a.offsets[r + 1] - a.offsets[r] : 0;
      const i64 below = all_items[0] - masked * all_items[2], alike = all_items[1] - masked * all_items[3];
      a.ties[2 * r + masked] = max_of(alike, 1) - 1;  // a NaN is not even like itself
      a.higher[2 * r + masked] = a.V - seen - below - max_of(alike, 1);
    }
  }
}

}  // namespace
