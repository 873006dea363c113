// Dropout whose mask is a function of a seed and the place of an element alone, so that backward computes it again, any
// number of threads gives the same one, and nothing of it is ever stored.
//
// The bits are those of Threefry-2x32 with 13 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
// a counter-based generator of additions, rotations and exclusive ors.

#pragma once
#include "simd.h"

namespace {

typedef uint32_t uvec __attribute__((vector_size(VL * 4), aligned(4), may_alias));

const i64 STRIPE = 16;             // counters side by side; a multiple of every VL: the mask does not depend on VL
const i64 DROPOUT_TASK = 1 << 15;  // elements of a task, a multiple of 2 STRIPE

INLINE uvec rotate(uvec x, int bits) { return x << bits | x >> (32 - bits); }

// Two words for each counter (low, high), in place.
INLINE void threefry(uint32_t key_low, uint32_t key_high, uvec& low, uvec& high) {
  const uint32_t keys[3] = {key_low, key_high, 0x1BD11BDA ^ key_low ^ key_high};
  const int rotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  low += keys[0];
  high += keys[1];
#pragma GCC unroll 13
  for (int round = 0; round < 13; round++) {
    low += high;
    high = rotate(high, rotations[round % 8]) ^ low;
    if (round % 4 == 3) {
      const uint32_t turn = round / 4 + 1;
      low += keys[turn % 3];
      high += keys[(turn + 1) % 3] + turn;
    }
  }
}

INLINE void drop(const Dropout& a, i64 at, uvec bits) {
  if (at >= a.size) return;
  const i64 lanes = a.size - at;
  const vec zeros = all(0.f), kept = load(a.x + at, lanes) * (float)a.scale;
  store(a.y + at, bits >= (uint32_t)a.threshold ? kept : zeros, lanes);
}

void dropout_task(void* context, i64 task, i64) {
  const Dropout& a = *(const Dropout*)context;
  uvec lane;
  for (int i = 0; i < VL; i++) lane[i] = i;
  const i64 end = min_of(a.size, (task + 1) * DROPOUT_TASK);
  for (i64 at = task * DROPOUT_TASK; at < end; at += 2 * STRIPE)
    for (i64 i = 0; i < STRIPE; i += VL) {
      const i64 counter = at / 2 + i;  // STRIPE divides 2^32, so its upper half is the same for all lanes
      uvec low = lane + (uint32_t)counter, high = uvec{} + (uint32_t)((uint64_t)counter >> 32);
      threefry((uint32_t)a.seed, (uint32_t)((uint64_t)a.seed >> 32), low, high);
      drop(a, at + i, low);
      drop(a, at + STRIPE + i, high);
    }
}

i64 dropout_workspace(const Dropout&) { return 0; }

void dropout(const Dropout& a) {
  parallel(a.threads, (a.size + DROPOUT_TASK - 1) / DROPOUT_TASK, dropout_task, (void*)&a);
}

}  // namespace
