// All kernels for one instruction set: compiled with its flags, VL (floats in a vector) and KERNELS (the table's name).

#include "simd.h"

#include "conv1d.h"
#include "dropout.h"
#include "history.h"
#include "loss.h"
#include "ranks.h"
#include "selective_scan.h"
#include "ssd.h"
#include "step.h"

#define TWO_WAYS(op, Args) op##_forward, op##_backward, op##_workspace,
#define ONE_WAY(op, Args) op, op##_workspace,
extern const Kernels KERNELS;
const Kernels KERNELS = {ALL_KERNELS(TWO_WAYS, ONE_WAY)};
