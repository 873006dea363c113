"""Where the targets of an evaluation stand in their lists, for any sequential model, within bounded memory.

Each target is ranked twice: ``unmasked``, in a list that holds the items of the user's history too, as RecBole does,
and ``masked``, in one without them. A rank is 1 + the items that score higher + half of those that score alike: items
of one score share the mean of their ranks, so that a model that scores all alike is not taken for a good one. What
cannot be compared with the target (NaN) stands before it, and no rank is beyond its list. Whatever ``eval_batch_size``
says, at most :data:`LARGEST_SCORES` scores are held at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_ssm import distributed
from recbole_ssm.data.evaluation import EvalBatch
from recbole_ssm.ops import Seen, rank_scores, rank_targets

LARGEST_SCORES = 2**24
PROTOCOLS = ("unmasked", "masked")
"""The columns of all arrays of two lists."""


@dataclass(frozen=True)
class Ranking:
    """The rows of an evaluation, of all processes, in the order of the split."""

    user: NDArray[np.int64]
    """Internal ids of the users ``[n]``."""
    item: NDArray[np.int64]
    """Internal ids of the targets ``[n]``."""
    events: NDArray[np.int64]
    """How many events of the user were known before the target ``[n]``."""
    ranks: NDArray[np.float64]
    """``[n, 2]``, 1 the best; the columns are :data:`PROTOCOLS`."""
    listed: NDArray[np.int64]
    """How many items stand in each list ``[n, 2]``."""
    best: NDArray[np.int64]
    """The first items of each list ``[n, 2, k]``, -1 behind the end of a shorter one; k is 0 where no metric needs
    them.
    """

    @classmethod
    def of(cls, batches: Iterable[tuple[Tensor, ...]]) -> Ranking:
        """Put the batches of this process and of all others together."""
        columns = [distributed.gather_rows(torch.cat(column)).numpy() for column in zip(*batches)]
        return cls(*columns)

    def of_rows(self, rows: NDArray[Any]) -> Ranking:
        """Only these rows, by their numbers or a mask."""
        return Ranking(*(values[rows] for values in vars(self).values()))


class Scorer:
    """Scores of a model, which is in evaluation mode and may be ours or RecBole's.

    Args:
        model: the model.
        dataset: its item features complete the rows where a model scores pairs of a history and an item.
        pairs: how many pairs such a model may score at once.
    """

    def __init__(self, model: Any, dataset: Any, pairs: int) -> None:
        self.model, self.pairs = model, pairs
        self._factors = _factors(model)
        self.item_num: int = dataset.item_num
        self._item_field: str = dataset.iid_field
        self._dataset = dataset
        self._features: Any = None

    def all_items(self, interaction: Any) -> Iterator[tuple[slice, Tensor]]:
        """Scores ``[b, V]`` of all items for a few rows at a time, and which rows they are."""
        rows = max(1, LARGEST_SCORES // self.item_num)
        for first in range(0, len(interaction), rows):
            piece = interaction[first : first + rows]
            try:
                scores = self.model.full_sort_predict(piece).view(len(piece), -1)
            except NotImplementedError:
                everything = torch.arange(self.item_num, device=interaction[self._item_field].device)
                scores = self.among(piece, everything.expand(len(piece), -1))
            scores[:, 0] = -torch.inf
            yield slice(first, first + rows), scores

    def among(self, interaction: Any, items_BC: Tensor) -> Tensor:
        """Scores ``[B, C]`` of some items of each row, as the model's ``predict`` gives them."""
        if self._factors is not None:
            output, vectors = self._factors(interaction)
            rows = max(1, LARGEST_SCORES // max(1, items_BC.shape[1] * output.shape[1]))
            pieces = zip(output.split(rows), items_BC.split(rows))
            return torch.cat([torch.einsum("bd,bcd->bc", o, vectors[items]) for o, items in pieces])
        if self._features is None:
            self._features = self._dataset.get_item_feature().to(items_BC.device)
        items = items_BC.flatten()
        found = []
        for first in range(0, len(items), self.pairs):
            piece = items[first : first + self.pairs]
            row = torch.arange(first, first + len(piece), device=items.device) // items_BC.shape[1]
            pairs = {field: values[row] for field, values in interaction.interaction.items()}
            pairs |= {field: values[piece] for field, values in self._features.interaction.items()}
            found.append(self.model.predict(Interaction(pairs)).view(-1))
        return torch.cat(found).view(items_BC.shape)

    def rank(self, batch: EvalBatch, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ranks ``[B, 2]`` of the targets, how long the lists are ``[B, 2]``, and their first ``k`` items."""
        if batch.candidates is None:
            ranks, listed, best = self._rank_all(batch, k)
        else:
            ranks, listed, best = self._rank_candidates(batch, batch.candidates, k)
        # The padding is counted as an item, which would put a target of NaN or minus infinity behind the list's end.
        return torch.minimum(ranks, listed), listed, best

    def _rank_all(self, batch: EvalBatch, k: int) -> tuple[Tensor, Tensor, Tensor]:
        seen = batch.seen
        hidden = seen.offsets.diff()
        listed = self.item_num - 1 - torch.stack([torch.zeros_like(hidden), hidden], 1)
        if k == 0 and self._factors is not None and self.model.graphed is None:
            output, items = self._factors(batch.interaction)
            real = torch.arange(len(items), device=items.device) > 0
            ranks = rank_targets(output, items, batch.target, mask_V=real, seen=seen).ranks
            return ranks, listed, listed.new_empty(len(listed), 2, 0)
        found = []
        for rows, scores in self.all_items(batch.interaction):
            own = seen.part(rows)
            found.append((rank_scores(scores, batch.target[rows], seen=own).ranks, _best(scores, own, k)))
        ranks, best = (torch.cat(column) for column in zip(*found))
        return ranks, listed, best

    def _rank_candidates(self, batch: EvalBatch, items_BC: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        row = torch.arange(len(items_BC), device=items_BC.device)[:, None]
        pairs = batch.seen.row * self.item_num + batch.seen.item
        hidden = torch.isin(row * self.item_num + items_BC, pairs)
        counts = hidden.sum(1)
        seen = Seen(hidden.nonzero()[:, 1], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
        scores = self.among(batch.interaction, items_BC)
        ranks = rank_scores(scores, torch.zeros_like(batch.target), seen=seen).ranks
        listed = items_BC.shape[1] - torch.stack([torch.zeros_like(counts), counts], 1)
        best = _best(scores, seen, k)
        return ranks, listed, items_BC[row[:, :, None], best].masked_fill(best < 0, -1)


def _factors(model: Any) -> Any:
    """The model's method ``factors``; None where it has none, or where a class below that one scores in its own way."""
    for kind in type(model).__mro__:
        if "factors" in vars(kind):
            return model.factors
        if {"full_sort_predict", "predict"} & set(vars(kind)):
            return None
    return None


def _best(scores: Tensor, seen: Seen, k: int) -> Tensor:
    """The columns of the ``k`` highest scores, with and without what was seen ``[B, 2, k]``; it overwrites scores.

    Where fewer items have a score above minus infinity, -1 stands in the place of the others.
    """
    if k == 0:
        return torch.zeros(len(scores), 2, 0, dtype=torch.int64, device=scores.device)
    k = min(k, scores.shape[1])
    unmasked = scores.topk(k)
    scores[seen.row, seen.item] = -torch.inf
    best = [top.indices.masked_fill(top.values == -torch.inf, -1) for top in (unmasked, scores.topk(k))]
    return torch.stack(best, 1)
