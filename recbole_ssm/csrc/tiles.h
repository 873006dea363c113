// Tiles of the matrix output [n, d] x items [V, d]^T, which is never held whole: what the loss and the ranks share.
//
// All matrices here stand in panels: WIDE columns (the last panel may have VL) of all rows, one panel after the other. A
// tile is computed transposed, [items, rows], so that a vector holds one item's numbers for VL rows of the output: a
// maximum, a sum or a count of each row then needs no step across lanes.

#pragma once
#include "simd.h"

namespace {

const i64 WIDE = 2 * VL;
const int TALL = VL == 16 ? 8 : 6;  // rows of a product at a time: TALL x WIDE sums fit the registers
const i64 SOME = 48;                // items that stay together in the nearest cache, a multiple of TALL

INLINE i64 width_of(i64 columns, i64 first) { return columns - first <= VL ? VL : WIDE; }

// Rows of `columns` floats (those of `ids`, or all in turn) into panels of `height` rows; what is beyond is zero.
void pack_panels(i64 rows, i64 height, i64 columns, const float* from, const i64* ids, float* to) {
  const i64 whole = columns / VL * VL;
  for (i64 r = 0; r < height; r++) {
    const float* row = from + (ids && r < rows ? ids[r] : r) * columns;
    for (i64 j = 0; j < padded(columns); j += VL) {
      const i64 first = j / WIDE * WIDE;
      float* at = to + first * height + r * width_of(columns, first) + j - first;
      store(at, r >= rows ? all(0.f) : j < whole ? load(row + j) : load(row + j, columns - j));
    }
  }
}

// Panels [rows, columns] into panels [columns, rows]; both are multiples of VL.
void transpose_panels(i64 rows, i64 columns, const float* from, float* to) {
  for (i64 c = 0; c < columns; c += WIDE)
    for (i64 r = 0; r < rows; r += WIDE) {
      const i64 wide = width_of(columns, c), tall = width_of(rows, r);
      transpose(tall, wide, from + c * rows + r * wide, wide, to + r * columns + c * tall, tall);
    }
}

// c += A B with A[i, p] at A + i rs + p cs and B [k, W VL].
template <int ROWS, int W>
INLINE void add_products(i64 k, const float* A, i64 rs, i64 cs, const float* B, vec (*c)[W]) {
#pragma GCC unroll 4
  for (i64 p = 0; p < k; p++) {
    vec b[W];
    for (int j = 0; j < W; j++) b[j] = load(B + (p * W + j) * VL);
    for (int i = 0; i < ROWS; i++) {
      const float a = A[i * rs + p * cs];
      for (int j = 0; j < W; j++) c[i][j] += a * b[j];
    }
  }
}

// c = TALL rows, from `row` on, of A [height, k] in panels, by B [k, W VL].
template <int W>
INLINE void row_products(i64 height, i64 k, const float* A, i64 row, const float* B, vec (*c)[W]) {
  for (int i = 0; i < TALL; i++)
    for (int j = 0; j < W; j++) c[i][j] = all(0.f);
  i64 p = 0;
  for (; p + WIDE <= k; p += WIDE)
    add_products<TALL, W>(WIDE, A + p * height + row * WIDE, WIDE, 1, B + p * W * VL, c);
  if (p < k) {
    const i64 width = width_of(k, p);
    add_products<TALL, W>(k - p, A + p * height + row * width, width, 1, B + p * W * VL, c);
  }
}

// Items of a tile: packed they fit the second cache beside the rows of a block.
INLINE i64 tile_items(i64 d) { return SOME * max_of(1, min_of(5, (1 << 15) / d / SOME)); }
INLINE i64 tiles_of(i64 items, i64 d) { return (items + tile_items(d) - 1) / tile_items(d); }
INLINE i64 tall(i64 rows) { return (rows + TALL - 1) / TALL * TALL; }

// The output's rows that are worked on together, and the same transposed; both in panels.
void pack_output(i64 rows, i64 d, const float* from, float* output, float* outputT) {
  pack_panels(rows, padded(rows), d, from, nullptr, output);
  transpose_panels(padded(rows), padded(d), output, outputT);
}

// Items in panels, and their bias times `unit`; what fills up the height is left out, as a bias of minus infinity says.
struct Tile {
  i64 first, items, height;
  float *packed, *bias, *logits;
};

i64 tile_room(i64 d) { return room(tile_items(d) * padded(d)) + room(tile_items(d)) + room(tile_items(d) * WIDE); }

// Tile `number` of `count` items: those of `ids`, or all in turn.
Tile pack_tile(i64 number, i64 count, i64 d, const float* items, const i64* ids, const float* bias, float unit,
               char* scratch) {
  Arena arena(scratch);
  Tile tile = {};
  const i64 most = tile_items(d);
  tile.first = number * most;
  tile.items = min_of(most, count - tile.first);
  tile.height = tall(tile.items);
  tile.packed = arena.floats(most * padded(d));
  tile.bias = arena.floats(most);
  tile.logits = arena.floats(most * WIDE);
  const float* from = ids ? items : items + tile.first * d;
  pack_panels(tile.items, tile.height, d, from, ids ? ids + tile.first : nullptr, tile.packed);
  for (i64 v = 0; v < tile.height; v++) {
    const i64 item = v < tile.items ? ids ? ids[tile.first + v] : tile.first + v : -1;
    tile.bias[v] = item < 0 ? -INFINITY : bias ? bias[item] * unit : 0.f;
  }
  return tile;
}

// Logits [items, W VL rows], scale output items^T + bias; `highest` gets their maxima.
template <int W>
INLINE void logits_of(const Tile& tile, i64 d, const float* outputT, float scale, float* logits, vec* highest) {
  for (int j = 0; j < W; j++) highest[j] = all(-INFINITY);
  for (i64 v = 0; v < tile.height; v += TALL) {
    vec c[TALL][W];
    row_products<W>(tile.height, d, tile.packed, v, outputT, c);
    for (int i = 0; i < TALL; i++)
      for (int j = 0; j < W; j++) {
        const vec x = c[i][j] * scale + tile.bias[v + i];
        store(logits + ((v + i) * W + j) * VL, x);
        highest[j] = highest[j] > x ? highest[j] : x;
      }
  }
}

// Threads that so many products of an output and an item are worth: a million numbers take some fifty microseconds,
// which is what a thread costs.
INLINE i64 threads_for(i64 threads, i64 products, i64 d) { return min_of(threads, 1 + products * d / (1 << 20)); }

}  // namespace
