"""The ``cuda`` backend: float32, bfloat16 and float16 on an NVIDIA GPU, with states and sums in float32.

Of each op it takes the first implementation that passes its self-test there: the kernels of
mamba-ssm and causal-conv1d where they are installed (:mod:`recbole_ssm.ops.triton.upstream`),
then ours in Triton (:mod:`recbole_ssm.ops.triton.operators`), then PyTorch's operations, which
also take what no kernel does. Triton comes with PyTorch's wheels for CUDA and is imported when
the first kernel runs, not before.

With ``TRITON_INTERPRET=1`` in the environment Triton runs the kernels on the CPU, slowly: so
they are tested anywhere.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.backend import HALF, INTERPRETED, requires
from recbole_ssm.ops.library import MOST_TAPS, implement, no_tangents
from recbole_ssm.ops.linear_cross_entropy import differentiable, tiled_loss
from recbole_ssm.ops.table import OPS
from recbole_ssm.ops.triton import last, operators, upstream


def unusable() -> str:
    """Why there is no cuda backend on this machine; "" where there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or more"
    return ""


def _takes(op: str, *arguments: Any) -> bool:
    """Whether the kernels take a call: all on the GPU, none in float64 or with a tangent, and not too large."""
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    given = dict(zip([t.name for t in OPS[op].tensors], arguments))
    if not all(t.is_cuda or INTERPRETED for t in tensors) or not no_tangents(*tensors):
        return False
    if not all(t.dtype in (torch.float32, *HALF) for t in tensors if t.is_floating_point()):
        return False
    if "weight" in given:
        return given["weight"].shape[1] <= MOST_TAPS
    if given["x"].dim() == 3:
        return given["A"].shape[1] <= operators.MOST_STATE
    B = given["B_fwd"] if "B_fwd" in given else given["B"]
    return operators.cells(given["x"].shape[-1], B.shape[-1]) <= operators.MOST_CELLS


_cut = {"selective_scan_last": last.selective_scan_last}
_walks = {**operators.WALKS, **{op: operators.OPERATORS[op] for op in _cut}}
for _op, _ours in {**operators.OPERATORS, **_cut}.items():
    if not INTERPRETED:
        for _name, _theirs in upstream.installed(_op):
            implement(_op, "cuda", _theirs, partial(_takes, _op), _name)
    implement(_op, "cuda", _ours, partial(_takes, _op), "triton")
    if _op in _walks:
        # where long sequences in pieces fail the self-test
        implement(_op, "cuda", _walks[_op], partial(_takes, _op), "triton, without pieces")


def _takes_loss(output: Tensor, items: Tensor, *rest: Any) -> bool:
    """As the other kernels; beyond so many numbers in a vector the products in memory are as good."""
    tensors = [t for t in (output, items, *rest) if isinstance(t, Tensor)]
    types = [t.dtype in (torch.float32, *HALF) for t in tensors if t.is_floating_point()]
    placed = all(t.is_cuda or INTERPRETED for t in tensors) and no_tangents(*tensors)
    return placed and all(types) and 0 < output.shape[1] <= operators.MOST_NUMBERS and len(output) * len(items) > 0


implement(
    "linear_cross_entropy",
    "cuda",
    differentiable(partial(tiled_loss, tiles=operators.loss_tiles)),
    _takes_loss,
    "triton",
)
requires("cuda", unusable)
