"""What a model asks of a data set when it is built, where no data set is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_ssm.errors import UserError


class DatasetOutline:
    """As much of a data set as a sequential model of items asks for.

    Args:
        sizes: ``{field: how many tokens it has, padding included}``, or one number for every field.
        model: the name of the model, for the error.
        titles: of the items by internal id, where the model reads them.
    """

    # Only a loss of training reads how often each item occurs.
    item_counter: Mapping[int, int] = {}

    def __init__(self, sizes: Mapping[str, int] | int, model: str = "", titles: Sequence[str] | None = None) -> None:
        self._sizes, self._model, self.titles = sizes, model, titles

    def num(self, field: str) -> int:
        """How many tokens a field has, padding included."""
        return self._sizes if isinstance(self._sizes, int) else self._sizes[field]

    def __getattr__(self, attribute: str) -> Any:
        raise UserError(f"{self._model} reads its data set's {attribute}; recommend() serves models of items alone")
