"""Packed batches: sequences laid end to end in ``[1, total, ...]``, with their bounds in ``cu_seqlens``.

``cu_seqlens`` is an int64 tensor ``[S + 1]`` that starts with 0, never falls and ends with
``total``; sequence s is ``[cu_seqlens[s], cu_seqlens[s + 1])``. State never crosses a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def cu_seqlens_of(lengths_S: Tensor) -> Tensor:
    """Bounds ``[S + 1]`` of sequences of the given lengths."""
    return torch.nn.functional.pad(lengths_S.long().cumsum(0), (1, 0))


def count_sequences(op: str, cu_seqlens: Tensor | None, batch: int, total: int, read: bool = True) -> int:
    """Number of sequences in ``[batch, total, ...]``: its rows, or what ``cu_seqlens`` bounds.

    The values of ``cu_seqlens`` are checked where ``read`` is true and they are on the CPU. On
    a GPU they are taken as
    they are: to read them the CPU would have to wait, and no CUDA graph could be captured.

    Raises:
        ValueError: ``cu_seqlens`` does not describe a packed batch of that shape.
    """
    if cu_seqlens is None:
        return batch
    if not read:
        return cu_seqlens.numel() - 1
    if batch != 1:
        raise ValueError(f"{op}: a packed batch has shape [1, total, ...], got [{batch}, {total}, ...]")
    if cu_seqlens.is_cuda and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0:
        return cu_seqlens.numel() - 1
    rises = cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0 and bool((cu_seqlens.diff() >= 0).all())
    if not rises or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to the total length {total}, got {cu_seqlens.tolist()}")
    return cu_seqlens.numel() - 1


def positions_of(cu_seqlens: Tensor, total: int | None = None) -> Tensor:
    """Position ``[total]`` of each packed token within its own sequence, from 0; without ``total``, it is read."""
    total = int(cu_seqlens[-1]) if total is None else total
    begins = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
    return torch.arange(total, device=cu_seqlens.device) - begins


def last_of(x_1L: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Last position of each sequence, ``[S, ...]``; zeros for an empty one. Without ``cu_seqlens``, ``x[:, -1]``."""
    if x_1L.shape[1] == 0:
        return x_1L.new_zeros(len(x_1L) if cu_seqlens is None else len(cu_seqlens) - 1, *x_1L.shape[2:])
    if cu_seqlens is None:
        return x_1L[:, -1]
    last = x_1L[0, (cu_seqlens[1:] - 1).clamp(min=0)]
    empty = (cu_seqlens.diff() == 0).view(-1, *[1] * (last.dim() - 1))
    return last.masked_fill(empty, 0.0)


def at_every_position(x_S: Tensor, length: int, cu_seqlens: Tensor | None) -> Tensor:
    """What each sequence has one of ``[S, ...]``, at each of its positions: ``[B, L, ...]``."""
    if cu_seqlens is not None:
        return x_S.repeat_interleave(cu_seqlens.diff(), 0)[None]
    return x_S[:, None].expand(-1, length, *x_S.shape[1:])


def segment_sum_after(x_LD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """For each packed position, the sum of x over the later positions of its sequence, ``[total, D]``.

    Taken as a difference of running sums of the whole batch, and so in float64: in float32 the
    sum of a hundred thousand tokens would swallow the digits of one sequence. What is not finite
    would reach all sequences behind its own: it is left out, and NaN stands in its place alone.
    """
    if len(x_LD) == 0:
        return x_LD
    finite = x_LD.isfinite()
    running = torch.where(finite, x_LD, 0.0).double().cumsum(0)
    lengths = cu_seqlens.diff()
    ends = running[(cu_seqlens[1:] - 1).clamp(min=0)].repeat_interleave(lengths, 0)
    return torch.where(finite, (ends - running).to(x_LD.dtype), torch.nan)


class Bucket(NamedTuple):
    """Sequences of similar lengths, as a padded batch."""

    rows_b: Tensor
    """The numbers of the sequences."""
    index_bl: Tensor
    """The packed index of each cell; 0 at pads."""
    mask_bl: Tensor
    """False at pads."""

    def padded(self, x_L: Tensor) -> Tensor:
        """What packed tokens ``[total, ...]`` have, in each cell ``[b, l, ...]``; 0 at pads.

        A pad must not keep a value of a real token: even with no weight, NaN of one sequence would reach another.
        """
        x_bl = x_L[self.index_bl]
        return x_bl.masked_fill_(~self.mask_bl.view(*self.mask_bl.shape, *[1] * (x_bl.dim() - 2)), 0)


def buckets(cu_seqlens: Tensor) -> list[Bucket]:
    """Group the non-empty sequences so that each group, padded to its longest, wastes little.

    Lengths within a factor of the square root of two share a bucket; where padding everything
    together costs less than a quarter of the cells, one bucket saves the calls.
    """
    lengths = cu_seqlens.diff()
    filled = torch.nonzero(lengths).squeeze(1)
    if not filled.numel():
        return []
    total, longest = int(cu_seqlens[-1]), int(lengths.max())
    if filled.numel() * longest * 3 <= total * 4:
        groups = [filled]
    else:
        # below 8 tokens the calls cost more than the padding
        size = (2 * lengths[filled].double().log2()).ceil().long().clamp(min=6)
        groups = [filled[size == value] for value in size.unique()]
    result = []
    for rows in groups:
        cells = torch.arange(int(lengths[rows].max()), device=rows.device)
        mask = cells < lengths[rows, None]
        result.append(Bucket(rows, (cu_seqlens[rows, None] + cells) * mask, mask))
    return result


def map_padded(
    function: Callable[..., tuple[Tensor, Any]],
    packed: tuple[Tensor, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Any]:
    """Run ``function(*padded, state) -> (y, state)`` over padded groups of a packed batch.

    Without ``cu_seqlens`` the batch is a padded one, and is one group.

    Args:
        packed: tensors ``[1, total, ...]``; their pads are 0, and so is the step size of a pad, which silences it:
            decay 1, input 0.
        state: initial states ``[S, ...]``, or None for zeros.

    Returns:
        y ``[1, total, ...]`` and the final states ``[S, ...]`` (None where ``function`` gives
        none).
    """
    if cu_seqlens is None:
        return function(*packed, state)
    count = cu_seqlens.numel() - 1
    total = packed[0].shape[1]
    if total == 0:
        return _of_nothing(function, packed, state, count)
    if count * int(cu_seqlens[1]) == total and bool((cu_seqlens.diff() == cu_seqlens[1]).all()):
        # equal lengths: the packed batch is a padded one already
        views = [t.view(count, -1, *t.shape[2:]) for t in packed]
        y, final = function(*views, state)
        return y.reshape(1, total, *y.shape[2:]), final
    ys, tokens, finals, rows = [], [], [], []
    for bucket in buckets(cu_seqlens):
        padded = [bucket.padded(t[0]) for t in packed]
        y, final = function(*padded, None if state is None else state[bucket.rows_b])
        ys.append(y[bucket.mask_bl])
        tokens.append(bucket.index_bl[bucket.mask_bl])
        finals.append(final)
        rows.append(bucket.rows_b)
    y = ys[0] if len(ys) == 1 else torch.cat(ys)[torch.cat(tokens).argsort()]
    if finals[0] is None:
        return y[None], None
    first = finals[0]
    start = first.new_zeros(count, *first.shape[1:]) if state is None else state.to(first.dtype)
    return y[None], start.index_copy(0, torch.cat(rows), torch.cat(finals))


def map_sequences(
    function: Callable[..., tuple[Tensor, Any]],
    packed: tuple[Tensor, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Any]:
    """Run ``function(*sequence, state) -> (y, state)`` on one packed sequence after another.

    Without ``cu_seqlens`` all rows of the padded batch are run at once.
    """
    if cu_seqlens is None:
        return function(*packed, state)
    if packed[0].shape[1] == 0:
        return _of_nothing(function, packed, state, len(cu_seqlens) - 1)
    ys, finals = [], []
    for s, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])):
        y, final = function(*[t[:, begin:end] for t in packed], None if state is None else state[s : s + 1])
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, 1), None if finals[0] is None else torch.cat(finals)


def _of_nothing(
    function: Callable[..., tuple[Tensor, Any]], packed: tuple[Tensor, ...], state: Tensor | None, count: int
) -> tuple[Tensor, Any]:
    """What ``function`` gives of a packed batch of ``count`` sequences, all of them empty."""
    y, final = function(*[t.reshape(count, 0, *t.shape[2:]) for t in packed], state)
    return y.reshape(1, 0, *y.shape[2:]), final
