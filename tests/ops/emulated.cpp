// Runs kernels that were built for another processor, under an emulator: calls come on standard input, and what they
// leave in memory goes to standard output. All numbers are int64: kernel, rows, backward, words; then for each word of
// the kernel's structure 0 and its value, or 1 and a number of bytes, which follow.

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "kernels.h"

extern "C" {
const char* recbole_ssm_select(const char*);
#define KERNEL(name) \
  i64 recbole_ssm_##name(const void*, i64, i64), recbole_ssm_##name##_workspace(const void*, i64, i64);
KERNEL(scan) KERNEL(ssd) KERNEL(ssd_last) KERNEL(conv) KERNEL(dropout) KERNEL(loss) KERNEL(ranks)
}

static i64 number() {
  i64 value;
  if (fread(&value, 8, 1, stdin) != 1) exit(0);
  return value;
}

int main() {
  i64 (*const runs[])(const void*, i64, i64) = {
      recbole_ssm_scan, recbole_ssm_ssd, recbole_ssm_ssd_last, recbole_ssm_conv, recbole_ssm_dropout,
      recbole_ssm_loss, recbole_ssm_ranks};
  i64 (*const sizes[])(const void*, i64, i64) = {recbole_ssm_scan_workspace, recbole_ssm_ssd_workspace,
      recbole_ssm_ssd_last_workspace, recbole_ssm_conv_workspace, recbole_ssm_dropout_workspace,
      recbole_ssm_loss_workspace, recbole_ssm_ranks_workspace};
  recbole_ssm_select(nullptr);
  for (;;) {
    const i64 kernel = number(), rows = number(), backward = number(), words = number();
    i64 call[64], bytes[64] = {};
    for (i64 i = 0; i < words; i++) {
      const i64 is_memory = number();
      call[i] = number();
      if (!is_memory) continue;
      bytes[i] = call[i];
      void* memory = malloc(bytes[i] + 1);
      if (bytes[i] && fread(memory, bytes[i], 1, stdin) != 1) return 1;
      call[i] = (i64)memory;
    }
    call[words - 1] = (i64)malloc(sizes[kernel](call, rows, backward) + 1);
    const i64 status = runs[kernel](call, rows, backward);
    fwrite(&status, 8, 1, stdout);
    for (i64 i = 0; i < words; i++)
      if (bytes[i]) fwrite((void*)call[i], bytes[i], 1, stdout);
    fflush(stdout);
  }
}
