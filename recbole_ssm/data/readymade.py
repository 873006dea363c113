"""Ready-made splits: files whose rows hold a history written out beside its target (``benchmark_filename``).

Each row stays in the part that its file is, as it stands. RecBole numbers the items of histories apart from targets
unless an alias is set, takes zeros that pad a history for an item, and gives models histories of any length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.data import temporal
from recbole_ssm.errors import UserError


def trim_histories(frame: Any, item_field: str, lists: dict[str, str], longest: int) -> int:
    """Leave the newest events of each history, without the zeros that pad it; in place.

    A zero is padding at either end of a history, unless some target is an item ``0``.

    Args:
        frame: the rows of all files.
        item_field: the column of targets.
        lists: ``{field: the column of its histories}``; the items' are among them.
        longest: how many events stay.

    Returns:
        How many zeros went.

    Raises:
        UserError: a history is empty, or the histories of a row differ in length.
    """
    histories = {name: frame[name].tolist() for name in lists.values()}
    where = "benchmark_filename: row {} of the files together has"
    padded = not (frame[item_field] == "0").any()
    zeros = 0
    for row, items in enumerate(histories[lists[item_field]]):
        held = np.flatnonzero(items != "0") if padded else np.arange(len(items))
        if not len(held):
            raise UserError(
                f"benchmark_filename: row {row + 1} of the files together has no item in {lists[item_field]}"
            )
        first, stop = int(held[0]), int(held[-1]) + 1
        zeros += len(items) - (stop - first)
        for name, rows in histories.items():
            if len(rows[row]) != len(items):
                raise UserError(
                    f"{where.format(row + 1)} {len(items)} items in its history and {len(rows[row])} entries in {name}"
                )
            rows[row] = rows[row][max(first, stop - longest) : stop]
    for name, rows in histories.items():
        column = np.empty(len(rows), dtype=object)
        column[:] = rows
        frame[name] = column
    return zeros


def seconds_of(histories: Any) -> Tensor:
    """The times of histories as seconds ``[n, longest]``, int64, with zeros behind; RecBole rounds them to float32."""
    lengths = np.fromiter(map(len, histories), np.int64, len(histories))
    filled = np.arange(lengths.max(initial=0)) < lengths[:, None]
    found = np.zeros(filled.shape, dtype=np.int64)
    found[filled] = temporal.in_seconds(np.concatenate([np.zeros(0), *histories]))
    return torch.from_numpy(found)


def widened(short: Tensor, width: int) -> Tensor:
    """Histories ``[n, longest, ...]`` with zeros up to a width, which models expect of all ``[n, width, ...]``."""
    full = short.new_zeros(len(short), width, *short.shape[2:])
    full[:, : short.shape[1]] = short
    return full
