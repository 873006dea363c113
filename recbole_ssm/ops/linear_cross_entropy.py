"""Cross-entropy of next-item prediction against a whole catalogue, whose logits are never held.

    loss = sum_r weight_r (log sum_v exp(l_rv) - l_rt)      l_rv = output_r . items_v / temperature + bias_v

with t the target of row r. Loss and gradients come from one pass over tiles of the logits: a tile is made, turned into
its gradient where it stands, multiplied into the gradients of output and items, and dropped. So no logit is computed
twice, and the backward has only to scale what the forward has found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import automatic, dispatch, implementations, implements
from recbole_ssm.ops.numerics import without_autocast
from recbole_ssm.ops.table import check


def linear_cross_entropy(
    output_nd: Tensor,
    items_Vd: Tensor,
    target_n: Tensor,
    *,
    weight_n: Tensor | None = None,
    bias_V: Tensor | None = None,
    mask_V: Tensor | None = None,
    candidates_K: Tensor | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weighted sum of the cross-entropies of ``output_nd @ items_Vd.T`` against ``target_n``; their mean by default.

    Args:
        output_nd: vectors that predict ``[n, d]``.
        items_Vd: item embeddings ``[V, d]``.
        target_n: rows of the items that came ``[n]``, int64.
        weight_n: weight of each row ``[n]``, without a gradient; by default 1 / n.
        bias_V: what is added to the logit of each item ``[V]``, without a gradient.
        mask_V: items that take part ``[V]``; by default all do. A target must be among them, or its loss is infinite.
        candidates_K: items that were sampled ``[K]``, int64: each row's sum then goes over its target and those of
            them that are not its target, as often as they were drawn. The bias is added to the logits of candidates,
            not to the target's: minus the logarithm of their expected counts (logQ) makes the sum an unbiased estimate
            of the sum over all items (Bengio and Senecal 2008).
        temperature: what the products are divided by.
        label_smoothing: this part of each target is spread evenly over all items that take part, the target included.

    Returns:
        A scalar, of type float32 at least; 0 where there are no rows.

    Raises:
        ValueError: a shape does not fit, there are no candidates, the temperature is not positive, label smoothing is
            not within [0, 1) or is combined with candidates, or the weight or the bias requires a gradient.
        IndexError: a target or a candidate is none of the items; on a GPU nothing checks it.
    """
    if not temperature > 0:
        raise ValueError(f"linear_cross_entropy: temperature must be positive, got {temperature}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be within [0, 1), got {label_smoothing}")
    if label_smoothing and candidates_K is not None:
        raise ValueError("linear_cross_entropy: label smoothing needs all items, so it takes no candidates")
    if candidates_K is not None and not candidates_K.numel():
        raise ValueError("linear_cross_entropy: candidates_K is empty; give one candidate or more")
    plain = weight_n is bias_V is mask_V is candidates_K is None and temperature == 1 and not label_smoothing
    if plain and _fits_pytorch(output_nd, items_Vd, target_n):
        return F.cross_entropy(output_nd @ items_Vd.T, target_n, ignore_index=_NO_TARGET)
    if any(t is not None and t.requires_grad for t in (weight_n, bias_V)):
        raise ValueError("linear_cross_entropy: weight and bias get no gradient, so they must not require one")
    dtype = wide(output_nd, items_Vd)
    if mask_V is not None:
        bias_V = output_nd.new_zeros(len(items_Vd), dtype=dtype) if bias_V is None else bias_V
        bias_V = bias_V.masked_fill(~mask_V, -torch.inf)
    weight_n, bias_V = (None if t is None else t.to(dtype) for t in (weight_n, bias_V))
    tensors = (output_nd, items_Vd, target_n, weight_n, bias_V, candidates_K)
    check("linear_cross_entropy", *tensors)
    logits = len(output_nd) * len(items_Vd if candidates_K is None else candidates_K)
    small = logits < _small(output_nd) and automatic()
    function = _reference if small else dispatch("linear_cross_entropy", output_nd)
    loss: Tensor = without_autocast(function)(*tensors, float(temperature), float(label_smoothing))
    return loss


_NO_TARGET = -(2**63)
"""PyTorch's loss leaves rows out whose target is -100, unless another number is named; here every row counts."""
SMALL = {"native": 2**17, "cpu": 2**21, "cuda": 2**26}
"""Fewer logits than this are not worth tiles, where no backend is asked for: with the kernels of C++, by PyTorch on a
CPU, on a GPU.

On a CPU they fit the cache whole and PyTorch is as fast on them; a GPU reads its 256 MiB in a tenth of a millisecond.
"""


def _small(output: Tensor) -> int:
    """The number of logits from which tiles are worth it."""
    device = output.device.type
    compiled = device == "cpu" and output.dtype == torch.float32 and implementations("linear_cross_entropy", "native")
    return SMALL.get("native" if compiled else device, 0)


def _fits_pytorch(output: Tensor, items: Tensor, target: Tensor) -> bool:
    """Whether a call without options is so small that all that surrounds the op would take longer than PyTorch does."""
    shape, other = output.shape, items.shape
    if len(shape) != 2 or len(other) != 2 or shape[1] != other[1] or target.shape != shape[:1]:
        return False
    dtype = output.dtype
    if dtype not in (torch.float32, torch.float64) or items.dtype != dtype or target.dtype != torch.int64:
        return False
    small = 0 < shape[0] * other[0] < _small(output)
    return small and automatic() and not torch.is_autocast_enabled(output.device.type)


def wide(output: Tensor, items: Tensor) -> torch.dtype:
    """The type that sums are taken in."""
    return torch.promote_types(torch.promote_types(output.dtype, items.dtype), torch.float32)


# --- reference: the whole matrix ---


@implements("linear_cross_entropy", "reference")
def _reference(
    output: Tensor,
    items: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    candidates: Tensor | None,
    temperature: float,
    label_smoothing: float,
) -> Tensor:
    dtype = wide(output, items)
    output, items = output.to(dtype), items.to(dtype)
    if temperature != 1:
        output = output / temperature
    logits = output @ (items if candidates is None else items.index_select(0, candidates)).T  # [n, V]
    if bias is not None:
        logits = logits + (bias if candidates is None else bias[candidates])
    if candidates is not None:
        own = (output * items.index_select(0, target)).sum(1, keepdim=True)
        others = logits.masked_fill(candidates == target[:, None], -torch.inf)
        losses = torch.cat([own, others], 1).logsumexp(1) - own[:, 0]
    elif bias is None:
        if weight is None and len(output):
            return F.cross_entropy(logits, target, label_smoothing=label_smoothing, ignore_index=_NO_TARGET)
        losses = F.cross_entropy(
            logits, target, label_smoothing=label_smoothing, reduction="none", ignore_index=_NO_TARGET
        )
    else:
        log_p = logits.log_softmax(1)
        losses = -(1 - label_smoothing) * log_p.gather(1, target[:, None])[:, 0]
        losses = losses - label_smoothing * log_p[:, bias > -torch.inf].mean(1)
    return losses.sum() / max(len(losses), 1) if weight is None else (weight * losses).sum()


# --- torch: tiles of rows ---

TILE = {"cpu": 2**20, "cuda": 2**26}  # logits that are worked on at once: on a CPU they stay in its cache
LEAST_ROWS = 16  # of a tile: the product with fewer is bound by reading the items


class _Loss(torch.autograd.Function):
    """The loss, whose forward has found the gradients already."""

    @staticmethod
    def forward(ctx: Any, compute: Any, wanted: tuple[bool, bool], output: Tensor, items: Tensor, *rest: Any) -> Tensor:
        loss, *gradients = compute(wanted, output, items, *rest)
        ctx.save_for_backward(output, items, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        output, items, *found = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _Gradients.apply(gradient, output, items, *found)  # type: ignore[no-untyped-call]
        elif torch.compiler.is_compiling() or type(gradient) is not Tensor or not gradient.is_cpu or gradient != 1:
            # The most common gradient, 1, needs no pass over all items. To look at one on a GPU is to wait for it, and
            # no CUDA graph could hold that.
            found = _scaled(gradient, output, items, *found)
        return None, None, *found, *[None] * 6


def _scaled(gradient: Tensor, output: Tensor, items: Tensor, *found: Tensor | None) -> Any:
    """What was found, times the incoming gradient; float16 would have lost it before that."""
    return tuple(None if g is None else (gradient * g).to(t.dtype) for g, t in zip(found, (output, items)))


class _Gradients(torch.autograd.Function):
    """The same where a second derivative may follow, which it refuses."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, output: Tensor, items: Tensor, *found: Tensor | None) -> Any:
        return _scaled(gradient, output, items, *found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("linear_cross_entropy has no second derivative; use ssm_backend: reference")


def differentiable(compute: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]) -> Callable[..., Tensor]:
    """An implementation of the op from a function that returns the loss and its gradients by output and items.

    Before the arguments of the op, ``compute`` is told which of the two gradients are wanted.
    """

    def implementation(output: Tensor, items: Tensor, *rest: Any) -> Tensor:
        wanted = tuple(torch.is_grad_enabled() and t.requires_grad for t in (output, items))
        loss: Tensor = _Loss.apply(compute, wanted, output, items, *rest)  # type: ignore[no-untyped-call]
        return loss

    return implementation


def tiled_loss(
    wanted: tuple[bool, bool],
    output: Tensor,
    items: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    candidates: Tensor | None,
    temperature: float,
    label_smoothing: float,
    *,
    tiles: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor]] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and its gradients by output and items where they are wanted; all of them float32 at least.

    ``tiles`` takes the place of the products of PyTorch, with their arguments.
    """
    tiles = tiles or torch_tiles
    dtype = wide(output, items)
    o = output.to(dtype) / temperature
    w = o.new_full((len(o),), 1 / max(len(o), 1)) if weight is None else weight
    if candidates is None:
        loss, g_output, g_items, _ = tiles(o, items.to(dtype), target, w, bias, label_smoothing, wanted)
    else:
        rows, own = items.index_select(0, candidates).to(dtype), items.index_select(0, target).to(dtype)
        sampled = (candidates, (o * own).sum(1))
        bias = None if bias is None else bias[candidates]
        loss, g_output, g_rows, g_own = tiles(o, rows, target, w, bias, 0.0, wanted, sampled)
        g_items = None
        if g_rows is not None:
            g_items = torch.zeros_like(items, dtype=dtype).index_add_(0, candidates, g_rows)
            g_items.index_add_(0, target, g_own[:, None] * o)
        if g_output is not None:
            g_output.addcmul_(g_own[:, None], own)
    return loss, None if g_output is None else g_output.div_(temperature), g_items


def torch_tiles(
    output: Tensor,
    items: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    wanted: tuple[bool, bool],
    sampled: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The loss, its gradients, and that of the targets' logits, where the items are ``sampled``: ids, those logits."""
    left_out = None if bias is None else bias == -torch.inf
    present = len(items) if left_out is None else (len(items) - left_out.sum()).to(items.dtype)
    uniform = label_smoothing / present  # of a target's weight, to each item
    loss, g_own = output.new_zeros(()), torch.zeros_like(weight)
    g_output = torch.empty_like(output) if wanted[0] else None
    g_items = torch.zeros_like(items) if wanted[1] else None
    rows = min(len(output), max(TILE.get(output.device.type, TILE["cuda"]) // max(len(items), 1), LEAST_ROWS))
    memory = output.new_empty(rows, len(items))
    for first in range(0, len(output), max(rows, 1)):
        at = slice(first, first + rows)
        o, w, t = output[at], weight[at, None], target[at, None]
        tile = torch.mm(o, items.T, out=memory[: len(o)])
        if bias is not None:
            tile.add_(bias)
        if sampled is not None:
            tile.masked_fill_(sampled[0] == t, -torch.inf)
        own = tile.gather(1, t) if sampled is None else sampled[1][at, None]
        highest = torch.maximum(tile.amax(1, keepdim=True), own).clamp(min=torch.finfo(tile.dtype).min)
        terms = highest - (1 - label_smoothing) * own
        if label_smoothing:
            in_list = tile if left_out is None else tile.masked_fill(left_out, 0)
            terms = terms - uniform * in_list.sum(1, keepdim=True)
        sums = tile.sub_(highest).exp_().sum(1, keepdim=True)
        if sampled is not None:
            sums = sums + (own - highest).exp()
            g_own[at] = (w * ((own - highest).exp() / sums - 1))[:, 0]
        loss = loss + (w * (sums.log() + terms)).sum()
        if not any(wanted):
            continue
        tile.mul_(w / sums)  # from here on it is the gradient of the logits
        if label_smoothing:
            tile.sub_(w * uniform)
            if left_out is not None:
                tile.masked_fill_(left_out, 0)
        if sampled is None:
            tile.scatter_add_(1, t, (label_smoothing - 1) * w)
        if g_output is not None:
            torch.mm(tile, items, out=g_output[at])
        if g_items is not None:
            g_items.addmm_(tile.T, o)
    return loss, g_output, g_items, g_own


implements("linear_cross_entropy", "torch")(differentiable(tiled_loss))
