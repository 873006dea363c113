"""Dropout: y = 0 with probability p, else x / (1 - p).

On a CPU torch draws its mask one element after the other and keeps it for the backward, which is
a quarter of a training step. The native backend draws one seed from torch's generator for each
call; whether an element stays is a hash of the seed and its place, computed again in the
backward. So a run can be repeated, and resumed from the state of torch's generator, as with
torch's dropout; and the mask depends neither on threads nor on the instruction set.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import dispatch, implements
from recbole_ssm.ops.table import check


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Drop elements of x, of any shape, with probability p; x itself where nothing is to be dropped.

    Raises:
        ValueError: p is not within [0, 1], or x holds no floating-point numbers.
    """
    check("dropout", x)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: the probability must be within [0, 1], got {p}")
    if not training or p == 0:
        return x
    if x.dtype != torch.float32 or not x.is_cpu:
        return F.dropout(x, p)
    return dispatch("dropout", x)(x, p)


@implements("dropout", "reference")
@implements("dropout", "torch")
def torch_dropout(x: Tensor, p: float) -> Tensor:
    """:func:`dropout` by torch's generator."""
    return F.dropout(x, p)
