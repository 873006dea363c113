// What Python calls: the choice of the instruction set, the threads, and one function for each kernel.

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>
#include <cstring>

#include "kernels.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#ifndef SOURCES
#define SOURCES ""
#endif

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

namespace {

// Denormals count as zero within a kernel: they mean nothing here and cost a hundred cycles each on many machines.
struct FlushDenormals {
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"(before | (1ull << 24)));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

struct Work {
  void (*run)(void*, i64, i64);
  void* context;
  i64 threads, tasks, next_task, next_thread;
};

void* worker(void* argument) {
  Work& work = *(Work*)argument;
  const i64 thread = __atomic_fetch_add(&work.next_thread, 1, __ATOMIC_RELAXED);
  if (thread >= work.threads) return nullptr;
  FlushDenormals flush;
  (void)flush;
  i64 task;
  while ((task = __atomic_fetch_add(&work.next_task, 1, __ATOMIC_RELAXED)) < work.tasks)
    work.run(work.context, task, thread);
  return nullptr;
}

// The threads of OpenMP, where PyTorch has loaded it: they spin for a while after each of PyTorch's operations, and any
// other threads would share the cores with them. Both functions are found by name, so nothing is linked against.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*threads)() = nullptr;
  pid_t process = getpid();
  OpenMP() {
    parallel = (decltype(parallel))dlsym(RTLD_DEFAULT, "GOMP_parallel");
    threads = (decltype(threads))dlsym(RTLD_DEFAULT, "omp_get_max_threads");
  }
  // A process that was forked has none of the threads that its OpenMP counts on.
  bool usable() const { return parallel && threads && getpid() == process; }
};

const OpenMP openmp;

void open_worker(void* work) { worker(work); }

struct Choice {
  const char* name;
  const Kernels* kernels;
};

bool supported(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !strcmp(name, "baseline");
}

const Choice choices[] = {  // the best first
#if defined(__x86_64__)
    {"avx512", &kernels_avx512}, {"avx2", &kernels_avx2},
#endif
    {"baseline", &kernels_baseline}};

const Choice* chosen = nullptr;

bool offsets_fit(const i64* offsets, i64 S, i64 rows) {
  if (!offsets) return true;
  if (offsets[0] != 0 || offsets[S] != rows) return false;
  for (i64 s = 0; s < S; s++)
    if (offsets[s + 1] < offsets[s]) return false;
  return true;
}

bool within(const i64* ids, i64 count, i64 items) {
  for (i64 i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= items) return false;
  return true;
}

// Whether a kernel can read what it is given: Python checks shapes, and here is what tensors hold. Of the scans and the
// convolution, offsets must rise from 0 to `rows`.
template <class Args>
bool fits(const Args& a, i64 rows) {
  return offsets_fit(a.offsets, a.S, rows);
}

bool fits(const Step& a, i64) { return !a.rows || within(a.rows, a.B, a.items); }

bool fits(const History& a, i64) {
  for (i64 i = 0; i < a.layers; i++)
    if (!a.blocks[i].F) return false;  // a mixer alone
  return offsets_fit(a.offsets, a.S, a.L) && within(a.items, a.L, a.V);
}

bool fits(const Dropout&, i64) { return true; }

bool fits(const Loss& a, i64) {
  return within(a.target, a.n, a.V) && (!a.candidates || within(a.candidates, a.K, a.V));
}

bool fits(const Ranks& a, i64) {
  if (!within(a.target, a.n, a.V)) return false;
  if (!a.seen) return true;
  if (!a.offsets || a.R != a.n + 1 || !offsets_fit(a.offsets, a.n, a.E) || !within(a.seen, a.E, a.V)) return false;
  for (i64 r = 0; r < a.n; r++)
    for (i64 e = a.offsets[r] + 1; e < a.offsets[r + 1]; e++)
      if (a.seen[e] < a.seen[e - 1]) return false;
  return true;
}

// 0, or 1 where the values do not fit.
template <class Args>
i64 run(void (*kernel)(const Args&), const Args* a, i64 rows) {
  if (!fits(*a, rows)) return 1;
  kernel(*a);
  return 0;
}

// `count` blocks, one after the other.
i64 run(void (*kernel)(const Step&), const Step* a, i64 count) {
  for (i64 i = 0; i < count; i++) {
    if (!fits(a[i], 0)) return 1;
    kernel(a[i]);
  }
  return 0;
}

}  // namespace

// Tasks are taken in turn by at most `threads` threads, which are numbered from 0.
void parallel(i64 threads, i64 tasks, void (*run)(void*, i64, i64), void* context) {
  enum { MOST = 256 };
  const i64 most = threads < tasks ? threads : tasks;
  Work work = {run, context, most < MOST ? most : MOST, tasks, 0, 0};
  if (work.threads <= 1) {
    work.threads = 1;
    worker(&work);
    return;
  }
  if (openmp.usable()) {
    // A team of another size than PyTorch's would end threads, which PyTorch's next operation would start again. Those
    // that are not wanted return at once.
    const i64 team = openmp.threads();
    openmp.parallel(open_worker, &work, (unsigned)(team > work.threads ? team : work.threads), 0);
    return;
  }
  // Otherwise threads live as long as a call: nothing is left behind that a fork could break, and they cost some ten
  // microseconds.
  pthread_t helpers[MOST];
  int started = 0;
  while (started < work.threads - 1 && !pthread_create(&helpers[started], nullptr, worker, &work)) started++;
  worker(&work);
  while (started) pthread_join(helpers[--started], nullptr);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// The digest of the files that this was built from, by which Python tells a library of other sources.
EXPORT const char* recbole_ssm_sources() { return SOURCES; }

// Take the instruction set of that name, or the best one for null; its name, or null where this machine lacks it.
EXPORT const char* recbole_ssm_select(const char* name) {
  for (const Choice& choice : choices)
    if ((!name || !strcmp(name, choice.name)) && supported(choice.name)) {
      chosen = &choice;
      return choice.name;
    }
  return nullptr;
}

// Of each kernel: the size of its structure, by which Python sees that its own has as many members; the bytes of
// workspace that a call needs, or -1 where its values do not fit, since the size follows from them; and the call.
#define TWO_WAYS(op, Args)                                                                          \
  EXPORT i64 recbole_ssm_##op##_size() { return sizeof(Args); }                                     \
  EXPORT i64 recbole_ssm_##op##_workspace(const Args* a, i64 rows, i64 backward) {                  \
    return fits(*a, rows) ? chosen->kernels->op##_workspace(*a, backward) : -1;                     \
  }                                                                                                 \
  EXPORT i64 recbole_ssm_##op(const Args* a, i64 rows, i64 backward) {                              \
    return run(backward ? chosen->kernels->op##_backward : chosen->kernels->op##_forward, a, rows); \
  }
#define ONE_WAY(op, Args)                                                       \
  EXPORT i64 recbole_ssm_##op##_size() { return sizeof(Args); }                 \
  EXPORT i64 recbole_ssm_##op##_workspace(const Args* a, i64 rows, i64) {       \
    return fits(*a, rows) ? chosen->kernels->op##_workspace(*a) : -1;           \
  }                                                                             \
  EXPORT i64 recbole_ssm_##op(const Args* a, i64 rows, i64) { return run(chosen->kernels->op, a, rows); }

ALL_KERNELS(TWO_WAYS, ONE_WAY)
