"""Ready-made splits: files whose rows hold a history written out beside its target (``benchmark_filename``).

Each row stays in the part that its file is, as it stands. RecBole numbers the items of histories apart from targets
unless an alias is set, takes zeros that pad a history for an item, and gives models histories of any length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

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
