"""A model as a server serves it: with its digest, titles and categories, and rules of what may be recommended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.serving.nearest import Nearest
from recbole_ssm.serving.recommender import Recommender
from recbole_ssm.serving.session import moments_of
from recbole_ssm.serving.states import States, Unread

EXAMPLES = 64
"""Histories by which the recall of an index is measured."""


@dataclass(slots=True)
class Rules:
    """What may be recommended; nothing given means everything."""

    allow: Sequence[str] | None = None
    deny: Sequence[str] | None = None
    categories: Sequence[str] | None = None
    """Items of one of these at least."""


class Served:
    """A model as it is served.

    Args:
        recommender: the model and its items.
        digest: of the checkpoint file, in hexadecimal.
        titles: by item token, where the data has them.
        categories: the tokens of each category's items, where the data has them.
        ann_above: catalogues of more items are searched by an index, where the model carries a state; None means none.
    """

    def __init__(
        self,
        recommender: Recommender,
        digest: str,
        titles: Mapping[str, str] | None = None,
        categories: Mapping[str, Sequence[str]] | None = None,
        ann_above: int | None = None,
    ) -> None:
        self.recommender, self.digest, self.titles = recommender, digest, titles or {}
        self.key = bytes.fromhex(digest)[:16]
        self.catalogue = recommender.catalogue
        self.states = States(recommender.model) if getattr(recommender.model, "carries_state", False) else None
        self.nearest: Nearest | None = None
        if self.states is not None and ann_above is not None and len(self.catalogue.items) - 1 > ann_above:
            self.nearest = Nearest(recommender.model.item_vectors(), self._example_queries(self.states))
        self._categories = {
            name: torch.tensor(self.catalogue.known(tokens, name, True)[0], dtype=torch.int64)
            for name, tokens in (categories or {}).items()
        }

    def _example_queries(self, states: States) -> Tensor:
        """The vectors after some random histories ``[n, d]``, whose events came one after the other without a pause."""
        generator = torch.Generator().manual_seed(0)
        histories = torch.randint(1, len(self.catalogue.items), (EXAMPLES, 20), generator=generator).tolist()
        moments = moments_of([0] * 20, 0) if self.recommender.reads_times else []
        events = [Unread(history, moments) for history in histories]
        rows = states.step([states.start()] * EXAMPLES, events, [False] * EXAMPLES)
        return torch.from_numpy(states.queries(rows, [moments[-1] if moments else None] * EXAMPLES))

    def refused(self, rules: Rules | None) -> Tensor | None:
        """Which items the rules rule out ``[V]``; None where they rule out nothing.

        Raises:
            UserError: there is no such category, or none is named, or no item of ``allow`` is known.
        """
        if rules is None:
            return None
        refused = self.catalogue.refused(rules.allow, rules.deny)
        if rules.categories is None:
            return refused
        if not rules.categories:
            raise UserError("categories: names none; name one at least, or leave it out for items of all")
        allowed = torch.zeros(len(self.catalogue.items), dtype=torch.bool)
        for name in rules.categories:
            if name not in self._categories:
                raise UserError(f"categories: there is no {name!r} among the {len(self._categories):,} of this data")
            allowed[self._categories[name]] = True
        return ~allowed if refused is None else refused | ~allowed

    def find(self, text: str, k: int) -> list[str]:
        """The first items, by their ids, whose token or title holds a text, in any case of its letters."""
        wanted = text.casefold()
        tokens = self.catalogue.items[1:]
        fits = (token for token in tokens if wanted in f"{token} {self.titles.get(token, '')}".casefold())
        return list(islice(fits, k))
