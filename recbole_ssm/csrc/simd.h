// Vectors of VL floats, by the vector extension that GCC and Clang share; and what all kernels need.
//
// This file is compiled once for each instruction set. Everything is static: an inline function of the standard library
// would be merged between the objects, and a plain machine might get the copy with AVX-512 in it.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#if defined(__AVX512DQ__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));  // aligned(4): rows begin anywhere
typedef int32_t ivec __attribute__((vector_size(VL * 4), aligned(4), may_alias));

INLINE i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 max_of(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 padded(i64 n) { return (n + VL - 1) / VL * VL; }
INLINE vec load(const float* p) { return *(const vec*)p; }
INLINE void store(float* p, vec v) { *(vec*)p = v; }
INLINE vec all(float x) { return vec{} + x; }
INLINE void zero(float* p, i64 n) { memset(p, 0, n * sizeof(float)); }

// The first n of VL lanes; the rest is zero, and is not written.
INLINE vec load(const float* p, i64 n) {
  if (n >= VL) return load(p);
#if defined(__AVX512DQ__)
  const __m512 wide = _mm512_maskz_loadu_ps((__mmask16)((1u << max_of(n, 0)) - 1), p);
  vec v;
  memcpy(&v, &wide, sizeof v);
  return v;
#else
  float lanes[VL] = {};
  for (i64 i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
#endif
}
INLINE void store(float* p, vec v, i64 n) {
  if (n >= VL) return store(p, v);
#if defined(__AVX512DQ__)
  __m512 wide;
  memcpy(&wide, &v, sizeof v);
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << max_of(n, 0)) - 1), wide);
#else
  float lanes[VL];
  store(lanes, v);
  for (i64 i = 0; i < n; i++) p[i] = lanes[i];
#endif
}

// Lanes from `count` on become 0.
INLINE vec first_lanes(vec v, i64 count) {
  if (count >= VL) return v;
  for (i64 i = count; i < VL; i++) v[i] = 0;
  return v;
}

// Sum of all lanes, by halves: the order is fixed.
INLINE float sum(vec v) {
#if VL == 16 && HAS_SHUFFLE
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#elif VL == 8 && HAS_SHUFFLE
  typedef float v4 __attribute__((vector_size(16)));
  v4 b = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  float b[4] = {};
  for (int i = 0; i < VL; i++) b[i % 4] += v[i];
#endif
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// 2^x for x <= 126; towards minus infinity it falls to zero, or nearly so, and never becomes a denormal. Relative error
// 1.2e-7; exactly 1 at 0, so that a silent step stays silent. A NaN stays one.
INLINE vec exp2_of(vec x) {
#if defined(__AVX512DQ__)
  __m512 wide, whole, rest;
  memcpy(&wide, &x, sizeof x);
  whole = _mm512_roundscale_ps(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  rest = _mm512_reduce_ps(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vec r;
  memcpy(&r, &rest, sizeof r);
#else
  const vec floor = all(-126.f), magic = all(12582912.f);  // adding this number rounds to an integer
  x = floor > x ? floor : x;                               // in this order a NaN stays one
  const vec t = x + magic, r = x - (t - magic);
#endif
  vec p = all(1.540353039338e-4f) * r + 1.333355814643e-3f;
  p = p * r + 9.618129107629e-3f;
  p = p * r + 5.550410866482e-2f;
  p = p * r + 2.402265069591e-1f;
  p = p * r + 6.931471805599e-1f;
  p = p * r + 1.f;
#if defined(__AVX512DQ__)
  memcpy(&rest, &p, sizeof p);
  rest = _mm512_scalef_ps(rest, whole);
  memcpy(&p, &rest, sizeof p);
#else
  ivec exponent, bits;  // the integer becomes the exponent
  memcpy(&exponent, &t, sizeof t);
  memcpy(&bits, &p, sizeof p);
  bits += exponent << 23;
  memcpy(&p, &bits, sizeof p);
#endif
  return p;
}

static const float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

INLINE vec sigmoid(vec x) {
  const vec most = all(88.f);
  const vec y = most < -x ? most : -x;
  return 1.f / (1.f + exp2_of(y * LOG2E));
}

// max(x, 0) + log(1 + y), y = exp(-|x|); the logarithm as 2 atanh(y / (y + 2)), whose series keeps small values exact.
INLINE vec softplus(vec x) {
  const vec zeros = all(0.f), y = exp2_of((x < zeros ? x : -x) * LOG2E);
  const vec s = y / (y + 2.f), q = s * s;
  vec p = all(2.f / 15) * q + 2.f / 13;
  p = p * q + 2.f / 11;
  p = p * q + 2.f / 9;
  p = p * q + 2.f / 7;
  p = p * q + 2.f / 5;
  p = p * q + 2.f / 3;
  p = p * q + 2.f;
  return (zeros > x ? zeros : x) + p * s;
}

#if HAS_SHUFFLE
// Lanes of the lower (upper) half of a and b in turn.
#if VL == 16
INLINE vec low_lanes(vec a, vec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
INLINE vec high_lanes(vec a, vec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif VL == 8
INLINE vec low_lanes(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE vec high_lanes(vec a, vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
INLINE vec low_lanes(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
INLINE vec high_lanes(vec a, vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif
#endif

// The sums of the lanes of each of VL vectors. Every pass halves the vectors and interleaves what they belong to.
INLINE vec sum_each(vec* a) {
#if HAS_SHUFFLE
  for (int half = VL / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] = low_lanes(a[i], a[i + half]) + high_lanes(a[i], a[i + half]);
  return a[0];
#else
  float sums[VL];
  for (int i = 0; i < VL; i++) sums[i] = sum(a[i]);
  return load(sums);
#endif
}

// [rows, columns] -> [columns, rows]; both are multiples of VL.
INLINE void transpose(i64 rows, i64 columns, const float* from, i64 ld_from, float* to, i64 ld_to) {
  for (i64 i = 0; i < rows; i += VL)
    for (i64 j = 0; j < columns; j += VL) {
#if HAS_SHUFFLE
      vec a[VL], b[VL];
      for (int r = 0; r < VL; r++) a[r] = load(from + (i + r) * ld_from + j);
      for (int width = 1; width < VL; width *= 2) {  // interleave row r with row r + VL / 2, as often as it takes
        for (int r = 0; r < VL / 2; r++) {
          b[2 * r] = low_lanes(a[r], a[r + VL / 2]);
          b[2 * r + 1] = high_lanes(a[r], a[r + VL / 2]);
        }
        for (int r = 0; r < VL; r++) a[r] = b[r];
      }
      for (int r = 0; r < VL; r++) store(to + (j + r) * ld_to + i, a[r]);
#else
      for (i64 r = 0; r < VL; r++)
        for (i64 c = 0; c < VL; c++) to[(j + c) * ld_to + i + r] = from[(i + r) * ld_from + j + c];
#endif
    }
}

INLINE i64 begin_of(const i64* offsets, i64 L, i64 s) { return offsets ? offsets[s] : s * L; }

// Sums over sequences are taken group by group and the groups in their order: the number of threads changes no bit.
static const i64 ROW_GROUPS = 32;
INLINE i64 row_groups(i64 S) { return S < ROW_GROUPS ? S : ROW_GROUPS; }
// The first sequence of a group; groups hold about as many rows each.
INLINE i64 group_begin(const i64* offsets, i64 S, i64 group) {
  const i64 groups = row_groups(S);
  if (!offsets || group >= groups) return S * group / groups;
  const i64 row = offsets[S] * group / groups;
  i64 low = 0, high = S;
  while (low < high) {
    const i64 middle = (low + high) / 2;
    if (offsets[middle] < row) low = middle + 1; else high = middle;
  }
  return group ? low : 0;
}

// In how many pieces a forward takes a sequence that could fall into `most`: none knows of another, so unlike in a
// backward the number of threads may decide.
INLINE i64 forward_parts(i64 threads, i64 S, i64 most) { return threads == 1 || S >= 8 * threads ? 1 : most; }

// A row of sums to where it belongs: as it is, or onto what is there.
INLINE void add_row(const float* from, i64 n, float* to, bool add) {
  for (i64 i = 0; i < n; i += VL) {
    const vec sums = load(from + i, n - i);
    store(to + i, add ? load(to + i, n - i) + sums : sums, n - i);
  }
}

// Pieces of the workspace, each on a cache line of its own.
struct Arena {
  char* at;
  explicit Arena(char* begin) : at((char*)(((uintptr_t)begin + 63) & ~(uintptr_t)63)) {}
  template <class T> T* take(i64 count) {
    T* piece = (T*)at;
    at += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  float* floats(i64 count) { return take<float>(count); }
};
INLINE i64 room(i64 count, i64 size = sizeof(float)) { return (count * size + 63) / 64 * 64; }
