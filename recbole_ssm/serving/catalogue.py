"""The items that a recommender knows: tokens to ids on the way in, scores to tokens on the way
out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from logging import getLogger
from typing import Any, Literal

import torch
from torch import Tensor

from recbole_ssm.errors import UserError, shown
from recbole_ssm.graphs import GraphedModel

Ids = list[int]
BLOCK = 64
"""A row of scores is cut into blocks of so many; only blocks with a large maximum are searched further."""
WORTH_IT = 1 << 16
"""Fewer scores than these are not cut into blocks."""


class Recommendations(list[tuple[str, float]]):
    """Item tokens and their scores, best first; of equal scores, the item with the lower id first."""

    source: Literal["model", "popularity"] = "model"
    """Who answers: the model, or, for a history without a known item, how often items were training targets."""
    skipped: int = 0
    """How many items of the history the catalogue does not know."""


class Catalogue:
    """The items of a trained model.

    Args:
        items: the token of each item id; id 0 is padding.
        counts: how often each item was a training target, by id; None where that is not known.
    """

    def __init__(self, items: Sequence[str], counts: Tensor | None = None) -> None:
        self.items = list(items)
        self._counts = counts
        self._ids = {token: index for index, token in enumerate(self.items) if index}

    def ids(self, tokens: Iterable[Any], what: str = "history") -> Ids:
        """Item ids of the tokens of a history, in their order; as :meth:`known`, which skips nothing."""
        return self.known(tokens, what, skip_unknown=False)[0]

    def known(self, tokens: Iterable[Any], what: str, skip_unknown: bool) -> tuple[Ids, int]:
        """The ids of those tokens that are items, in their order, and how many are not.

        Args:
            tokens: a list, an array, or whatever else gives one token after the other.
            what: its name in an error.
            skip_unknown: leave out what the catalogue does not know.

        Raises:
            UserError: it is one text or has no order, or a token is not in the catalogue.
        """
        places = self.places(tokens, what, skip_unknown)
        found = [index for index in places if index is not None]
        return found, len(places) - len(found)

    def places(self, tokens: Iterable[Any], what: str, skip_unknown: bool) -> list[int | None]:
        """The id of each token, as :meth:`known`; None stands for what is skipped."""
        # The characters of a text are no tokens, though each of them may be one of the catalogue.
        if isinstance(tokens, (str, bytes)):
            raise UserError(f"{what}: must be a list of item tokens, got {shown(tokens)}; write [{shown(tokens)}]")
        if isinstance(tokens, (Set, Mapping)) or not isinstance(tokens, Iterable):
            raise UserError(f"{what}: must be a list of item tokens, oldest first, got {shown(tokens)}")
        found = []
        for token in tokens:
            index = self._ids.get(str(token))
            if index is None and not skip_unknown:
                raise UserError(f"{what}: item '{token}' is not in the catalogue of {len(self._ids):,} items")
            found.append(index)
        return found

    def refused(self, allow: Iterable[Any] | None, deny: Iterable[Any] | None) -> Tensor | None:
        """Which ids are never recommended ``[V]``: what is denied or not allowed; None where neither is given.

        Args:
            allow: tokens of the items that may be recommended; None means all.
            deny: tokens of items that may not be.

        Tokens that are no items here are passed over, as what is in stock need not have been in the
        training data; how many is logged.

        Raises:
            UserError: no token of ``allow`` is in the catalogue, or one text stands in place of a list.
        """
        if allow is None and deny is None:
            return None
        mask = torch.zeros(len(self.items), dtype=torch.bool)
        for name, tokens in (("allow", allow), ("deny", deny)):
            if tokens is None:
                continue
            # A set will do here: no order is needed.
            ids, skipped = self.known(list(tokens) if isinstance(tokens, Set) else tokens, name, skip_unknown=True)
            if skipped:
                getLogger().info(f"{name}: {skipped:,} of {skipped + len(ids):,} items are not in the catalogue")
            if name == "allow" and not ids:
                raise UserError(f"allow: none of its items is in the catalogue of {len(self._ids):,} items")
            chosen = torch.zeros_like(mask)
            chosen[ids] = True
            mask |= ~chosen if name == "allow" else chosen
        return mask

    def best(
        self,
        scores: Tensor,
        k: int,
        excluded: Sequence[Ids] | None = None,
        refused: Tensor | None = None,
    ) -> list[Recommendations]:
        """The k best items of each row; fewer where there are not so many. Padding is never among them.

        Args:
            scores: of all items ``[B, V]``; they are written into.
            k: how many items.
            excluded: for each row, item ids that are left out.
            refused: as of :meth:`refused`.

        Raises:
            UserError: k is no whole number from 1 up.
        """
        k = whole_number("k", k)
        scores = scores[:, : len(self.items)]
        scores[:, 0] = -torch.inf
        if refused is not None:
            scores[:, refused.to(scores.device)] = -torch.inf
        for row, ids in enumerate(excluded or ()):
            if ids:
                scores[row, ids] = -torch.inf
        k = min(k, len(self.items) - 1)
        # With the score behind the k-th: where both are equal topk takes any, and the lowest ids are wanted.
        values, indices = largest(scores, min(k + 1, scores.shape[1]))
        tied = values[:, k - 1] == values[:, -1]
        values, indices = values[:, :k], indices[:, :k]
        if k < scores.shape[1] and tied.any():
            by_score = scores[tied].sort(dim=1, descending=True, stable=True)
            values[tied], indices[tied] = (part[:, :k] for part in by_score)
        return [self._in_order(row, ids) for row, ids in zip(values.tolist(), indices.tolist())]

    def best_by_graph(self, graphed: GraphedModel, vector: Tensor, k: int, excluded: Ids) -> Recommendations | None:
        """As :meth:`best` for a vector ``[1, hidden_size]``, by one replay and one copy to the CPU; None where scores
        are equal at the end of the list, so that all of them must be looked at.
        """
        k = min(whole_number("k", k), len(self.items) - 1)
        more = 1 << max(len(excluded) - 1, 0).bit_length()
        filled = torch.zeros(1, more, dtype=torch.int64)
        filled[0, : len(excluded)] = torch.tensor([*excluded], dtype=torch.int64)
        ((scores,), (ids,)) = graphed.best(vector, filled.to(vector.device), k + 1, len(self.items)).tolist()
        return None if scores[-1] == scores[-2] > -torch.inf else self._in_order(scores[:k], map(int, ids))

    def _in_order(self, scores: Iterable[float], ids: Iterable[int]) -> Recommendations:
        """Items by their scores, those of equal ones by their ids, without what may not be recommended."""
        order = sorted(zip(scores, ids), key=lambda pair: (-pair[0], pair[1]))
        return Recommendations((self.items[item], score) for score, item in order if score > -torch.inf)

    @property
    def has_counts(self) -> bool:
        """Whether it is known how often items occur."""
        return self._counts is not None

    def popular(self, k: int, excluded: Ids, refused: Tensor | None) -> Recommendations:
        """The k items that were training targets most often, as :meth:`best`.

        Raises:
            UserError: the counts are not known.
        """
        if self._counts is None:
            raise UserError(
                "history: must be a list of one item token or more that the catalogue knows; this checkpoint does not "
                "say how often items occur, so it cannot answer by popularity"
            )
        found = self.best(self._counts[None].double(), k, [excluded], refused)[0]
        found.source = "popularity"
        return found


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``scores.topk(k)``, several times as fast for a few of many columns.

    A row is cut into blocks. The k blocks of the largest maxima hold k scores that no score of another block exceeds,
    so only they are looked at again.
    """
    rows, columns = scores.shape
    blocks = columns // BLOCK
    if not scores.is_cpu or 4 * k > blocks or scores.numel() < WORTH_IT:
        return scores.topk(k)
    whole = scores[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    chosen = whole.amax(2).topk(k, sorted=False).indices
    places = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    rest = torch.arange(blocks * BLOCK, columns).expand(rows, -1)
    places = torch.cat([places, rest], 1)
    values, best = scores.gather(1, places).topk(k)
    return values, places.gather(1, best)


def whole_number(name: str, value: Any) -> int:
    """A number from 1 up.

    Raises:
        UserError: it is something else.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"{name}: must be a whole number, got {shown(value)}")
    number = operator.index(value)
    if number < 1:
        raise UserError(f"{name}: must be at least 1, got {number}")
    return number
