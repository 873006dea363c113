"""What a model asks of a data set when it is built, where no data set is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_ssm.errors import UserError


class DatasetOutline:
    """As much of a data set as a sequential model of items asks for.

    Args:
        sizes: ``{field: how many tokens it has, padding included}``, or one number for every field.
        model: the name of the model, for the error.
        titles: of the items by internal id, where the model reads them.
    """

    # Only training reads how often each item occurs.
    item_counter: Mapping[int, int] = {}

    def __init__(self, sizes: Mapping[str, int] | int, model: str = "", titles: Sequence[str] | None = None) -> None:
        self._sizes, self._model, self.titles = sizes, model, titles

    def num(self, field: str) -> int:
        """How many tokens a field has, padding included."""
        return self._sizes if isinstance(self._sizes, int) else self._sizes[field]

    def __getattr__(self, attribute: str) -> Any:
        raise UserError(f"{self._model} reads its data set's {attribute}; recommend() serves models of items alone")


def item_counts(dataset: Any, n_items: int) -> NDArray[np.int64]:
    """How often each item is a target in a part of a data set, by id ``[n_items]``; in an outline none is."""
    if isinstance(dataset, DatasetOutline):
        return np.zeros(n_items, dtype=np.int64)
    return np.bincount(dataset.inter_feat[dataset.iid_field].numpy(), minlength=n_items)


def item_tokens(dataset: Any) -> list[str]:
    """The tokens of a data set's items by id; id 0 is padding."""
    return [str(token) for token in dataset.field2id_token[dataset.iid_field]]
