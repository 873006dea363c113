"""RecBole's augmented interactions without the augmentation: an index into the events, gathered on the fly.

RecBole turns a user's events i1 .. in into the rows ``i1 | i2``, ``i1 i2 | i3`` and so on, and stores each history
padded to full length, for every field: some 800 bytes an event. Here a row is two numbers, 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor


class Prefixes:
    """Rows of (history, next event), as SequentialDataset's ``inter_feat`` after data_augmentation.

    Row r predicts event ``target[r]`` from the ``length[r]`` events before it. Selecting rows gives RecBole's
    Interaction with the same columns: ``<field>`` of the target, and ``<field>_list [rows, max_length]``, padded with
    zeros on the right, for all fields but the user.

    Args:
        events: field -> values ``[events, ...]``, sorted by user and, within a user, by time.
        target: the events that rows predict, int32 ``[rows]``.
        length: how many events each row sees, int32 ``[rows]``.
        user_field: the field that has no list.
        list_suffix: what RecBole appends to a field for its list.
        length_field: the name of the column that holds ``length``.
        max_length: width of the lists.
    """

    def __init__(
        self,
        events: Mapping[str, Tensor],
        target: np.ndarray,
        length: np.ndarray,
        *,
        user_field: str,
        list_suffix: str,
        length_field: str,
        max_length: int,
    ) -> None:
        self.events = dict(events)
        self.target = target
        self.length = length
        self.user_field = user_field
        self.list_suffix = list_suffix
        self.length_field = length_field
        self.max_length = max_length

    @classmethod
    def of_events(cls, events: Mapping[str, Tensor], user_field: str, max_length: int, **names: str) -> Prefixes:
        """One row for each event but a user's first, with the ``max_length`` events before it at most."""
        user = events[user_field].numpy()
        first = np.concatenate([[True], user[1:] != user[:-1]])
        starts = np.flatnonzero(first)
        counts = np.diff(np.append(starts, len(user)))
        target = np.flatnonzero(~first).astype(np.int32)
        length = np.arange(len(user), dtype=np.int32) - np.repeat(starts.astype(np.int32), counts)
        length = np.minimum(length[~first], max_length)
        return cls(events, target, length, user_field=user_field, max_length=max_length, **names)

    # --- what RecBole's data set and loaders ask of an Interaction ---------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in RecBole's order."""
        lists = [field + self.list_suffix for field in self.events if field != self.user_field]
        return [*self.events, self.length_field, *lists]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Any) -> Any:
        """The whole column of a name; or the rows of an index, a slice, a mask or a list, as an Interaction."""
        if isinstance(index, str):
            if index == self.length_field:
                return torch.from_numpy(self.length).long()
            if index in self.events:
                return self.events[index].index_select(0, torch.from_numpy(self.target))
            return self._list(
                self.events[index.removesuffix(self.list_suffix)], *self._sources(self.target, self.length)
            )
        if isinstance(index, (int, np.integer)):
            return self[[index]][0]
        index = index if isinstance(index, slice) else np.asarray(index)
        return self._gather(self.target[index], self.length[index])

    def select(self, index: np.ndarray | slice) -> Prefixes:
        """Only these rows, over the same events."""
        return self._with(self.target[index], self.length[index])

    def sort(self, by: str | Sequence[str], ascending: bool | Sequence[bool] = True) -> None:
        """Sort the rows stably by columns of their targets, as Interaction.sort does."""
        fields = [by] if isinstance(by, str) else list(by)
        rising = [ascending] * len(fields) if isinstance(ascending, bool) else list(ascending)
        for field, up in zip(reversed(fields), reversed(rising)):
            key = self[field].numpy()
            order = np.argsort(key if key.ndim == 1 else key[..., 0], kind="stable")
            self.reorder(order if up else order[::-1])

    def reorder(self, order: np.ndarray) -> None:
        """Put the rows in that order."""
        self.target, self.length = self.target[order], self.length[order]

    def shuffle(self) -> None:
        """Reorder the rows at random, as Interaction.shuffle does."""
        self.reorder(torch.randperm(len(self)).numpy())

    def drop(self, columns: str, inplace: bool = True) -> None:
        """Remove a field of the events and its list; RecBole calls this as it would call DataFrame.drop."""
        self.events.pop(columns.removesuffix(self.list_suffix), None)

    def histories(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All that the users of some rows did before the targets, however long ago.

        Returns:
            How many events each row has ``[rows]``, and the events, row by row ``[E]``.
        """
        user = self.events[self.user_field].numpy()
        target = self.target[index].astype(np.int64)
        length = target - np.searchsorted(user, user[target], side="left")
        return length, np.arange(length.sum()) + np.repeat(target - length.cumsum(), length)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _with(self, target: np.ndarray, length: np.ndarray) -> Prefixes:
        return Prefixes(
            self.events,
            target,
            length,
            user_field=self.user_field,
            list_suffix=self.list_suffix,
            length_field=self.length_field,
            max_length=self.max_length,
        )

    def _gather(self, target: np.ndarray, length: np.ndarray) -> Interaction:
        targets = torch.from_numpy(target).long()
        rows: dict[str, Tensor] = {field: values[targets] for field, values in self.events.items()}
        rows[self.length_field] = torch.from_numpy(length).long()
        source, pad = self._sources(target, length)
        for field, values in self.events.items():
            if field != self.user_field:
                rows[field + self.list_suffix] = self._list(values, source, pad)
        return Interaction(rows)

    def _sources(self, target: np.ndarray, length: np.ndarray) -> tuple[Tensor, Tensor]:
        """The event in each cell of the lists, and which cells are padding, ``[rows, max_length]`` each."""
        lengths = torch.from_numpy(length).long()[:, None]
        position = torch.arange(self.max_length)
        pad = position >= lengths
        return (torch.from_numpy(target).long()[:, None] - lengths + position).masked_fill_(pad, 0), pad

    @staticmethod
    def _list(values: Tensor, source: Tensor, pad: Tensor) -> Tensor:
        listed = values[source]
        listed[pad] = 0
        return listed
