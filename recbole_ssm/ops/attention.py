"""Attention within packed sequences (Vaswani et al. 2017, arXiv 1706.03762, section 3.2): causal, or at the last event.

    y_i = sum_j softmax_j(q_i . k_j / sqrt(P)) v_j        j over the positions of i's sequence up to i

On a GPU PyTorch's memory-efficient kernel takes the bounds of the sequences where they lie: nothing is padded, and
Python reads no length, so a CUDA graph can hold it. Elsewhere sequences of similar lengths are padded together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import HALF, INTERPRETED, dispatch, implements
from recbole_ssm.ops.packing import buckets


def packed_attention(
    q_LHP: Tensor,
    k_LHP: Tensor,
    v_LHP: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    *,
    last_only: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within each sequence of a packed batch.

    Args:
        q_LHP: queries ``[total, H, P]``; with ``last_only`` one for each sequence ``[S, H, P]``.
        k_LHP: keys ``[total, H, P]``.
        v_LHP: values ``[total, H, P]``.
        cu_seqlens: bounds ``[S + 1]`` of the sequences; None for rows ``[B, L, H, P]``, which the operators of
            :mod:`recbole_ssm.ops.plain` alone take.
        longest: no sequence is longer.
        last_only: every query stands at the end of its sequence; otherwise it stands at its own position.
        dropout: the probability with which each weight of the softmax is dropped.

    Returns:
        y in the shape of the queries; zeros for an empty sequence.
    """
    function = dispatch("attention", q_LHP)
    found: Tensor = function(q_LHP, k_LHP, v_LHP, cu_seqlens, longest, last_only, dropout)
    return found


def reads_no_length(x_LHP: Tensor) -> bool:
    """Whether :func:`packed_attention` of such tensors leaves the bounds of the sequences on the device."""
    return _fits_kernel(x_LHP) and dispatch("attention", x_LHP) is _on_a_gpu


def _fits_kernel(x: Tensor) -> bool:
    """Whether the kernel takes such tensors; its loads are of 16 bytes."""
    return x.is_cuda and x.dtype in (torch.float32, *HALF) and x.shape[-1] % 8 == 0


@implements("attention", "reference")
@implements("attention", "torch")
def _padded(
    q_LHP: Tensor, k_LHP: Tensor, v_LHP: Tensor, cu_seqlens: Tensor, longest: int, last_only: bool, dropout: float
) -> Tensor:
    """Sequences of similar lengths as padded batches."""
    y_LHP = torch.zeros_like(q_LHP)
    for bucket in buckets(cu_seqlens):
        k, v = bucket.padded(k_LHP).transpose(1, 2), bucket.padded(v_LHP).transpose(1, 2)  # [b, H, l, P]
        if last_only:
            q, mask = q_LHP[bucket.rows_b, None].transpose(1, 2), bucket.mask_bl[:, None, None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            y_LHP = y_LHP.index_put((bucket.rows_b,), y[:, :, 0])
        else:
            # Padding stands behind all events, where causal attention does not look.
            q = bucket.padded(q_LHP).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
            y = y.transpose(1, 2)[bucket.mask_bl]
            y_LHP = y_LHP.index_put((bucket.index_bl[bucket.mask_bl],), y)
    return y_LHP


_CAUSAL = 1
"""``custom_mask_type`` of the kernel: the diagonal begins at the first query and the first key."""


def _varlen(
    q_LHP: Tensor, k_LHP: Tensor, v_LHP: Tensor, cu_seqlens: Tensor, longest: int, last_only: bool, dropout: float
) -> Tensor:
    """PyTorch's memory-efficient attention, which also stands behind its nested tensors; with its backward."""
    bounds = cu_seqlens.int()
    of_queries = torch.arange(len(bounds), dtype=torch.int32, device=bounds.device) if last_only else bounds
    y: Tensor = _kernel(
        *(x.contiguous()[None] for x in (q_LHP, k_LHP, v_LHP)),
        bias=None,
        cu_seqlens_q=of_queries,
        cu_seqlens_k=bounds,
        max_seqlen_q=1 if last_only else longest,
        max_seqlen_k=longest,
        dropout_p=dropout,
        custom_mask_type=0 if last_only else _CAUSAL,
        compute_log_sumexp=True,
    )[0][0]
    return y.masked_fill((bounds.diff() == 0)[:, None, None], 0.0) if last_only else y


def _on_a_gpu(q_LHP: Tensor, *arguments: Any) -> Tensor:
    return (_varlen if _fits_kernel(q_LHP) else _padded)(q_LHP, *arguments)


def _kernel(*tensors: Tensor, **options: Any) -> Any:
    return torch.ops.aten._efficient_attention_forward(*tensors, **options)


if hasattr(torch.ops.aten, "_efficient_attention_forward") and not INTERPRETED:
    implements("attention", "cuda", "PyTorch's memory-efficient kernel")(_on_a_gpu)
