"""Where each row's target stands among all items, counted over tiles of the scores: no [rows, items] matrix is held.

scores_rv = output_r . items_v       rank_r = 1 + items that score higher + half of those that score alike
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recbole_ssm.ops.backend import dispatch, implements
from recbole_ssm.ops.numerics import without_autocast
from recbole_ssm.ops.table import check


class TargetRanks(NamedTuple):
    """Counts of each row, ``[n, 2]`` int64: in column 0 among all items, in column 1 without those seen."""

    higher: Tensor
    """Items that score higher than the target, or whose score cannot be compared with its (NaN)."""
    ties: Tensor
    """Other items that score alike."""

    @property
    def ranks(self) -> Tensor:
        """Ranks ``[n, 2]``, float64, 1 the best; items of one score share the mean of their ranks."""
        return 1 + self.higher + self.ties.double() / 2


class Seen(NamedTuple):
    """What each of n rows has seen: each item once, in rising order, and without the row's target."""

    item: Tensor
    """The items of all rows, end to end ``[E]``, int64."""
    offsets: Tensor
    """Where each row's items begin, and the last end ``[n + 1]``, int64."""

    @property
    def row(self) -> Tensor:
        """The row of each item ``[E]``."""
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def part(self, rows: slice) -> Seen:
        """What some rows in a row have seen."""
        bounds = self.offsets[rows.start : rows.stop + 1]
        return Seen(self.item[bounds[0] : bounds[-1]], bounds - bounds[0])


@torch.no_grad()
@without_autocast
def rank_targets(
    output_nd: Tensor,
    items_Vd: Tensor,
    target_n: Tensor,
    *,
    mask_V: Tensor | None = None,
    seen: Seen | tuple[Tensor, Tensor] | None = None,
) -> TargetRanks:
    """Count the items that score higher than each row's target, and those that score alike.

    Args:
        output_nd: vectors that predict ``[n, d]``.
        items_Vd: item embeddings ``[V, d]``.
        target_n: rows of the items that came ``[n]``, int64.
        mask_V: items that take part ``[V]``, bool; one that does not stands below all others.
        seen: what was seen before: rows and items ``[E]`` each, int64, in any order and perhaps several times; or lists
            of each row (:class:`Seen`). A row's target always stays in its list. Without it both columns are alike.

    Raises:
        ValueError: a shape does not fit, or ``seen`` names a row or an item that is not there.
        IndexError: the lists of a :class:`Seen` do not fit the rows and the items; on a GPU nothing checks it.
    """
    bias = None
    if mask_V is not None:
        bias = torch.zeros_like(mask_V, dtype=output_nd.dtype).masked_fill(~mask_V, -torch.inf)
    lists = _lists(seen, target_n, len(items_Vd))
    tensors = (output_nd, items_Vd, target_n, bias, *lists)
    check("rank_targets", *tensors)
    higher, ties = dispatch("rank_targets", output_nd)(*tensors)
    return TargetRanks(higher, ties)


@torch.no_grad()
def rank_scores(
    scores_nV: Tensor, target_n: Tensor, *, seen: Seen | tuple[Tensor, Tensor] | None = None
) -> TargetRanks:
    """As :func:`rank_targets`, where the scores are there and may be of any kind of model.

    Args:
        scores_nV: scores of a list of items ``[n, V]``.
        target_n: columns of the items that came ``[n]``, int64.
        seen: the columns of what was seen before; as of :func:`rank_targets`.
    """
    return TargetRanks(*_count(scores_nV, target_n, *_lists(seen, target_n, scores_nV.shape[1])))


def _lists(seen: Seen | tuple[Tensor, Tensor] | None, target: Tensor, items: int) -> Seen | tuple[None, None]:
    if seen is None:
        return None, None
    if isinstance(seen, Seen):
        return seen
    for ids, count, what in ((seen[0], len(target), "rows"), (seen[1], items, "items")):
        if ids.numel() and not 0 <= ids.min() <= ids.max() < count:
            raise ValueError(f"rank_targets: seen names {what} from {ids.min()} to {ids.max()}, and there are {count}")
    pairs = torch.unique(seen[0].long() * items + seen[1])
    row, item = pairs // items, pairs % items
    others = item != target[row]
    counts = torch.bincount(row[others], minlength=len(target))
    return Seen(item[others], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def _counts(below: Tensor, alike: Tensor, items: Tensor | int) -> tuple[Tensor, Tensor]:
    """Items that are neither below nor alike, and how many beside the target are alike."""
    ties = alike.clamp(min=1) - 1  # a NaN is not even like itself
    return items - below - ties - 1, ties


@implements("rank_targets", "reference")
def _reference(
    output: Tensor, items: Tensor, target: Tensor, bias: Tensor | None, seen: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    found = []
    for r in range(len(output)):
        scores = items @ output[r] if bias is None else items @ output[r] + bias
        for masked in (False, True):
            stays = torch.ones(len(items), dtype=torch.bool, device=items.device)
            if masked and seen is not None and offsets is not None:
                stays[seen[offsets[r] : offsets[r + 1]]] = False
            own, rest = scores[target[r]], scores[stays]
            found.append(torch.stack(_counts((rest < own).sum(), (rest == own).sum(), len(rest))))
    counts = torch.stack(found) if found else target.new_zeros(0, 2)
    higher, ties = counts.view(-1, 2, 2).unbind(2)
    return higher, ties


TILE = 2**22  # scores that are held at once


@implements("rank_targets", "torch")
def torch_ranks(
    output: Tensor, items: Tensor, target: Tensor, bias: Tensor | None, seen: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`rank_targets` on any device and in any precision, a few rows at a time."""
    found = []
    rows = max(1, TILE // max(len(items), 1))
    for first in range(0, len(output), rows):
        o, t = output[first : first + rows], target[first : first + rows]
        scores = o @ items.T if bias is None else o @ items.T + bias
        found.append(_count(scores, t, seen, None if offsets is None else offsets[first : first + rows + 1]))
    higher, ties = torch.cat(found, 1) if found else target.new_zeros(2, 0, 2)
    return higher, ties


def _count(scores: Tensor, target: Tensor, seen: Tensor | None, bounds: Tensor | None) -> Tensor:
    """Higher and ties ``[2, rows, 2]`` of scores that are there."""
    own = scores.gather(1, target[:, None])
    below, alike = (scores < own).sum(1), (scores == own).sum(1)
    count = torch.full_like(target, scores.shape[1])
    columns = [torch.stack(_counts(below, alike, count))] * 2  # [2, rows] each
    if seen is not None and bounds is not None:
        row = torch.arange(len(target), device=target.device).repeat_interleave(bounds.diff())
        scores, own = scores[row, seen[bounds[0] : bounds[-1]]], own[row, 0]
        below = below.index_add(0, row, -(scores < own).long())
        alike = alike.index_add(0, row, -(scores == own).long())
        columns[1] = torch.stack(_counts(below, alike, count - bounds.diff()))
    return torch.stack(columns, 2)
