"""Events as flat arrays of users, items and times: the filters of RecBole, and what looks odd about a file.

The functions here take and return arrays of rows; ids are codes, and nothing is copied for each event.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.compute as pc

from recbole_ssm.data import temporal
from recbole_ssm.data.atomic import Tokens
from recbole_ssm.data.lines import BadLines
from recbole_ssm.errors import excerpt


@dataclass
class Events:
    """Interactions, in the order of their file.

    Attributes:
        users: who acted; no cell is empty.
        items: on what; no cell is empty.
        times: [rows] int64 or float64, in whatever unit the file has.
        ratings: [rows] float64, or None.
        others: further columns by name.
    """

    users: Tokens
    items: Tokens
    times: np.ndarray
    ratings: np.ndarray | None = None
    others: dict[str, Tokens] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.times)

    def counts(self) -> dict[str, int]:
        """``users``, ``items`` and ``interactions``."""
        seen = [int(np.count_nonzero(np.bincount(ids.codes))) for ids in (self.users, self.items)]
        return {"users": seen[0], "items": seen[1], "interactions": len(self)}

    def take(self, rows: np.ndarray) -> Events:
        """The events at those rows (indices or a mask)."""
        return replace(
            self,
            users=self.users.take(rows),
            items=self.items.take(rows),
            times=self.times[rows],
            ratings=None if self.ratings is None else self.ratings[rows],
            others={name: column.take(rows) for name, column in self.others.items()},
        )

    def by_user_and_time(self) -> np.ndarray:
        """[rows] the order by user (as the file first names them) and time; events of one time keep their order."""
        return np.lexsort((self.times, self.users.codes))


def places(users: np.ndarray) -> np.ndarray:
    """[rows] the place of each row among those of its user, from 1; ``users`` are codes [rows]."""
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(users[order]) != 0))
    found = np.empty(len(users), dtype=np.int64)
    found[order] = np.arange(1, len(users) + 1) - np.repeat(starts, np.diff(np.append(starts, len(users))))
    return found


def k_core(users: np.ndarray, items: np.ndarray, k_users: int, k_items: int) -> np.ndarray:
    """Rows of the largest part in which every user has at least ``k_users`` rows and every item ``k_items``.

    This is what RecBole leaves for ``user_inter_num_interval`` and ``item_inter_num_interval`` of ``[k,inf)``: users
    and items with too few are dropped together, again and again until none is left to drop.

    Args:
        users: [rows] codes.
        items: [rows] codes.
        k_users: rows that each user needs.
        k_items: rows that each item needs.

    Returns:
        Indices of the rows that stay, ascending.
    """
    rows = np.arange(len(users))
    while len(rows):
        enough = np.ones(len(rows), dtype=bool)
        for codes, k in ((users[rows], k_users), (items[rows], k_items)):
            enough &= np.bincount(codes)[codes] >= k
        if enough.all():
            break
        rows = rows[enough]
    return rows


def without_repeats(events: Events, keep: str) -> np.ndarray:
    """The rows that ``rm_dup_inter`` keeps.

    Args:
        events: in the order of their file.
        keep: ``first`` or ``last`` by time of each pair of user and item, or ``same_time``: the first line of each
            user, item and time, so that real repeats stay.
    """
    if keep == "same_time":
        return np.setdiff1d(np.arange(len(events)), doubled(events), assume_unique=True)
    order = np.lexsort((events.times, events.items.codes, events.users.codes))
    again = _equal_to_the_one_before(order, events.users.codes, events.items.codes)
    again = np.append(again[1:], False) if keep == "last" else again
    return np.sort(order[~again])


def doubled(events: Events) -> np.ndarray:
    """Rows whose user, item and time an earlier row has."""
    keys = events.times, events.items.codes, events.users.codes
    order = np.lexsort(keys)
    return np.sort(order[_equal_to_the_one_before(order, *keys)])


def _equal_to_the_one_before(order: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """[rows] whether a row has the same keys as the one before it in that order."""
    same = np.ones(len(order), dtype=bool)
    for key in keys:
        # One key after the other, because each copy is as long as the data.
        ordered = key[order]
        same[1:] &= ordered[1:] == ordered[:-1]
    same[:1] = False
    return same


def oddities(
    events: Events, names: tuple[str, str, str], bad: BadLines, keep: str | None = None
) -> Iterator[tuple[int, str]]:
    """What a file may hold, but hardly means: one line each, with file, line, value and mend.

    Args:
        events: as they were read.
        names: of the columns for user, item and time.
        bad: the lines that were skipped on the way.
        keep: ``rm_dup_inter``, which will drop doubled lines.

    Yields:
        ``(level, message)``, the level as of :mod:`logging`.
    """
    user, item, time = names
    for name, ids in ((user, events.users), (item, events.items)):
        suspects = pc.match_substring_regex(ids.names, r"^[0-9]+\.0+$").to_numpy(zero_copy_only=False)
        if suspects.any():
            row = int(np.argmax(suspects[ids.codes]))
            yield (
                logging.WARNING,
                f"{bad.path}, line {bad.line_of(row)}: {name} is {excerpt(ids.names[int(ids.codes[row])].as_py())}: "
                f"{suspects.sum():,} ids look like floats, as some programs write whole numbers in a column with gaps; "
                "they match no other file; write them as whole numbers",
            )
    again = doubled(events) if keep is None else np.empty(0, dtype=np.int64)
    if len(again):
        row = int(again[0])
        yield (
            logging.WARNING,
            f"{bad.path}, line {bad.line_of(row)}: the same {user}, {item} and {time} as an earlier line, and "
            f"{len(again):,} such lines in all; rm_dup_inter: same_time drops them and keeps other repeats, as convert "
            "--duplicates=same_time does",
        )
    unit, _ = temporal.unit_of(events.times)
    row = int(events.times.argmin())
    first = events.times[row]
    if unit and 10**8 < first < next(least for least, _, name in temporal.UNITS if name == unit):
        yield (
            logging.WARNING,
            f"{bad.path}, line {bad.line_of(row)}: {time} is {temporal.shown(first)}, but others are counted in {unit} "
            f"since 1970, up to {temporal.shown(events.times.max())}; write all in one unit",
        )
    backwards = rows_back_in_time(events)
    if len(backwards):
        row = int(backwards.min())
        who = events.users.names[int(events.users.codes[row])].as_py()
        yield (
            logging.DEBUG,
            f"{bad.path}, line {bad.line_of(row)}: {time} goes back to {temporal.shown(events.times[row])} for {user} "
            f"{excerpt(who)}, and {len(backwards):,} such lines in all; events are sorted by time here, and those of "
            "one time keep the order of the file",
        )


def rows_back_in_time(events: Events) -> np.ndarray:
    """Rows that are earlier than the row of the same user before them in the file."""
    order = np.argsort(events.users.codes, kind="stable")
    codes, times = events.users.codes[order], events.times[order]
    return order[1:][(codes[1:] == codes[:-1]) & (times[1:] < times[:-1])]
