"""The mathematics: pure functions of tensors, with several backends behind each.

:mod:`recbole_ssm.ops.table` declares each op in a row, and says how one is added.

Glossary, for the whole package. A tensor's name carries its dimensions where that helps:
``x_BLD`` is ``[B, L, D]``.

    B  batch             S  packed sequences    L  length            D  inner channels    K  convolution width
    N  state size        H  heads               P  head dimension    G  groups of heads   V  items

    x  input of a mixer  dt step size, > 0      A  decay rate, < 0   B, C  maps into and out of the state
    D  skip weight       z  gate                h  the state

A state goes in and comes out, so a sequence may be cut anywhere. A packed batch is
``[1, total, ...]`` with ``cu_seqlens`` (:mod:`recbole_ssm.ops.packing`). float64 is computed in
float64; half precision in float32, but for the convolutions, which keep it, and the GPU's
kernels, which read it and compute in float32.
"""

from recbole_ssm.ops import backend, native, selftest, triton  # noqa: F401  the backends register their kernels
from recbole_ssm.ops.attention import packed_attention
from recbole_ssm.ops.backend import available_backends, set_backend, use_backend
from recbole_ssm.ops.causal_conv1d import causal_conv1d, centered_conv1d
from recbole_ssm.ops.dropout import dropout
from recbole_ssm.ops.linear_cross_entropy import linear_cross_entropy
from recbole_ssm.ops.quasiseparable import quasiseparable
from recbole_ssm.ops.rank_targets import Seen, rank_scores, rank_targets
from recbole_ssm.ops.selective_scan import selective_scan, selective_scan_last
from recbole_ssm.ops.ssd import ssd, ssd_last

__all__ = [
    "Seen",
    "available_backends",
    "causal_conv1d",
    "centered_conv1d",
    "dropout",
    "linear_cross_entropy",
    "packed_attention",
    "quasiseparable",
    "rank_scores",
    "rank_targets",
    "selective_scan",
    "selective_scan_last",
    "set_backend",
    "ssd",
    "ssd_last",
    "use_backend",
]

backend.self_test = selftest.why_wrong
