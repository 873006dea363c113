"""The items that a recommender knows: tokens to ids on the way in, scores to tokens on the way
out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.keys import shown

Recommendations = list[tuple[str, float]]
"""Item tokens and their scores, best first."""


class Catalogue:
    """The items of a trained model.

    Args:
        items: the token of each item id; id 0 is padding.
    """

    def __init__(self, items: Sequence[str]) -> None:
        self.items = list(items)
        self._ids = {token: index for index, token in enumerate(self.items) if index}

    def ids(self, tokens: Sequence[str]) -> list[int]:
        """Item ids of tokens.

        Raises:
            UserError: it is one text in place of a list, or a token is not in the catalogue.
        """
        # The characters of a text are no tokens, though each of them may be one of the catalogue.
        if isinstance(tokens, (str, bytes)):
            raise UserError(f"history: must be a list of item tokens, got {shown(tokens)}; write [{shown(tokens)}]")
        try:
            return [self._ids[str(token)] for token in tokens]
        except KeyError as error:
            token = str(error.args[0])
            raise UserError(f"history: item '{token}' is not in the catalogue of {len(self._ids)} items") from None

    def best(self, scores: Tensor, k: int, excluded: Sequence[Sequence[int]] | None = None) -> list[Recommendations]:
        """The k best items of each row; fewer where there are not so many. Padding is never among them.

        Args:
            scores: of all items ``[B, V]``; they are written into.
            k: how many items.
            excluded: for each row, item ids that are left out.

        Raises:
            UserError: k is below 1.
        """
        if k < 1:
            raise UserError(f"k: must be at least 1, got {k}")
        scores = scores[:, : len(self.items)]
        scores[:, 0] = -torch.inf
        for row, seen in enumerate(excluded or ()):
            scores[row, seen] = -torch.inf
        best = scores.topk(min(k, len(self.items) - 1))
        return [
            [(self.items[item], score) for item, score in zip(items, row) if score > -torch.inf]
            for items, row in zip(best.indices.tolist(), best.values.tolist())
        ]
