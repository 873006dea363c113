// What Python calls: the choice of the instruction set, the threads, and one function for each kernel.

#include <pthread.h>
#include <cstring>

#include "kernels.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
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
  i64 tasks, next_task, next_thread;
};

void* worker(void* argument) {
  Work& work = *(Work*)argument;
  FlushDenormals flush;
  (void)flush;
  const i64 thread = __atomic_fetch_add(&work.next_thread, 1, __ATOMIC_RELAXED);
  i64 task;
  while ((task = __atomic_fetch_add(&work.next_task, 1, __ATOMIC_RELAXED)) < work.tasks)
    work.run(work.context, task, thread);
  return nullptr;
}

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

}  // namespace

// Threads live as long as a call: nothing is left behind that a fork could break, and they cost some ten microseconds.
void parallel(i64 threads, i64 tasks, void (*run)(void*, i64, i64), void* context) {
  enum { MOST = 256 };
  Work work = {run, context, tasks, 0, 0};
  pthread_t helpers[MOST];
  int started = 0;
  const i64 wanted = (threads < tasks ? threads : tasks) - 1;
  while (started < wanted && started < MOST && !pthread_create(&helpers[started], nullptr, worker, &work)) started++;
  worker(&work);
  while (started) pthread_join(helpers[--started], nullptr);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT i64 recbole_ssm_abi() { return ABI; }

// Take the instruction set of that name, or the best one for null; its name, or null where this machine lacks it.
EXPORT const char* recbole_ssm_select(const char* name) {
  for (const Choice& choice : choices)
    if ((!name || !strcmp(name, choice.name)) && supported(choice.name)) {
      chosen = &choice;
      return choice.name;
    }
  return nullptr;
}

// The size of a structure, by which Python sees that its own has as many members.
#define SIZE(op, Args) \
  EXPORT i64 recbole_ssm_##op##_size() { return sizeof(Args); }

SIZE(scan, Scan)
SIZE(ssd, Ssd)
SIZE(ssd_last, SsdLast)
SIZE(conv, Conv)
SIZE(step, Step)
SIZE(history, History)
SIZE(dropout, Dropout)
SIZE(loss, Loss)
SIZE(ranks, Ranks)

// 0, or 1 where the offsets do not rise from 0 to `rows`.
#define KERNEL(op, Args)                                                                \
  EXPORT i64 recbole_ssm_##op##_workspace(const Args* a, i64 backward) {                 \
    return chosen->kernels->op##_workspace(*a, backward);                                \
  }                                                                                      \
  EXPORT i64 recbole_ssm_##op(const Args* a, i64 rows, i64 backward) {                   \
    if (!offsets_fit(a->offsets, a->S, rows)) return 1;                                  \
    (backward ? chosen->kernels->op##_backward : chosen->kernels->op##_forward)(*a);     \
    return 0;                                                                            \
  }

KERNEL(scan, Scan)
KERNEL(ssd, Ssd)
KERNEL(ssd_last, SsdLast)
KERNEL(conv, Conv)

// `count` blocks, one after the other; 1 where a row does not exist.
EXPORT i64 recbole_ssm_step_workspace(const Step* a, i64) { return chosen->kernels->step_workspace(*a); }
EXPORT i64 recbole_ssm_step(const Step* a, i64 count, i64) {
  for (i64 i = 0; i < count; i++) {
    for (i64 b = 0; a[i].rows && b < a[i].B; b++)
      if (a[i].rows[b] < 0 || a[i].rows[b] >= a[i].items) return 1;
    chosen->kernels->step(a[i]);
  }
  return 0;
}

// 1 where the offsets do not rise from 0 to L, or an item is none of the table.
EXPORT i64 recbole_ssm_history_workspace(const History* a, i64) { return chosen->kernels->history_workspace(*a); }
EXPORT i64 recbole_ssm_history(const History* a, i64, i64) {
  if (!offsets_fit(a->offsets, a->S, a->L) || !within(a->items, a->L, a->V)) return 1;
  chosen->kernels->history(*a);
  return 0;
}

EXPORT i64 recbole_ssm_dropout_workspace(const Dropout*, i64) { return 0; }
EXPORT i64 recbole_ssm_dropout(const Dropout* a, i64, i64) {
  chosen->kernels->dropout(*a);
  return 0;
}

// 1 where a target or a candidate is none of the items.
EXPORT i64 recbole_ssm_loss_workspace(const Loss* a, i64) { return chosen->kernels->loss_workspace(*a); }
EXPORT i64 recbole_ssm_loss(const Loss* a, i64, i64) {
  if (!within(a->target, a->n, a->V) || (a->candidates && !within(a->candidates, a->K, a->V))) return 1;
  chosen->kernels->loss(*a);
  return 0;
}

EXPORT i64 recbole_ssm_ranks_workspace(const Ranks* a, i64) { return chosen->kernels->ranks_workspace(*a); }
EXPORT i64 recbole_ssm_ranks(const Ranks* a, i64, i64) {
  if (!within(a->target, a->n, a->V) || (a->seen && !within(a->seen, a->E, a->V))) return 1;
  chosen->kernels->ranks(*a);
  return 0;
}
