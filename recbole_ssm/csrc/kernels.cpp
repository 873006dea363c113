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

extern const Kernels KERNELS;
const Kernels KERNELS = {
    scan_forward,       scan_backward,  ssd_forward,       ssd_backward,   ssd_last_forward, ssd_last_backward,
    conv_forward,       conv_backward,  step,              history,        dropout,          loss,
    ranks,              scan_workspace, ssd_workspace,     ssd_last_workspace, conv_workspace, step_workspace,
    history_workspace,  loss_workspace, ranks_workspace,
};
