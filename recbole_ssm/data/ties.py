"""Ties: events of one user at one time, whose order the times do not tell.

RecBole keeps the order of the file, as does everybody whose sort is stable. A file may hold them in an order that tells
what comes next (films of one page, items by their ids), so a result may stand on it. ``ties: random`` is the twin to
compare with: there a number drawn for each event decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def drawn_numbers(
    users: tuple[np.ndarray, Sequence[str]], items: tuple[np.ndarray, Sequence[str]], times: np.ndarray, seed: int
) -> np.ndarray:
    """A number for each event, which depends on the seed, the user, the item and the time, and on nothing else.

    So the order that it gives ties is the same however the file orders its lines, and whichever other events it holds.
    Only events that agree in all three have one number.

    Args:
        users: codes ``[events]``, and the token of each code.
        items: likewise.
        times: ``[events]``.
        seed: of the numbers, from 0 to 2^32 - 1.

    Returns:
        uint64 ``[events]``.
    """
    times = np.ascontiguousarray(times).astype(times.dtype.newbyteorder("="), copy=False)
    if times.dtype.kind == "f":
        # A fraction in one row makes floats of the whole numbers in all the others.
        times = np.where(times == np.floor(times), times.astype(np.int64), times.view(np.int64))
    found = _mixed(times.view(np.uint64))
    for codes, tokens in (users, items):
        of_tokens = pd.util.hash_array(np.array(tokens, dtype=object), hash_key=f"{seed:016d}", categorize=False)
        found = _mixed(found ^ of_tokens[codes])
    return found


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers that hang on every bit of those given: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def rows_by_time(users: np.ndarray, times: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """Rows in the order of time; those of one time keep their order, but for ties where there are numbers.

    Args:
        users: codes ``[rows]``.
        times: ``[rows]``.
        numbers: by which a user's events of one time are ordered ``[rows]``; None keeps their order.
    """
    order = np.argsort(times, kind="stable")
    if numbers is None:
        return order
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # Both name the same rows tie by tie, so each tie keeps its places.
    as_they_stand, as_drawn = np.lexsort((users, times)), np.lexsort((numbers, users, times))
    order[place[as_they_stand]] = as_drawn
    return order


def rows_of(dataset: Any) -> np.ndarray:
    """The rows of a data set's events in the order of time, ties as its keys ``ties`` and ``ties_seed`` say."""
    fields = dataset.uid_field, dataset.iid_field, dataset.time_field
    users, items, times = (dataset.inter_feat[field].to_numpy() for field in fields)
    numbers = None
    if dataset.config["ties"] == "random":
        names = [dataset.field2id_token[field] for field in fields[:2]]
        numbers = drawn_numbers((users, names[0]), (items, names[1]), times, dataset.config["ties_seed"])
    return rows_by_time(users, times, numbers)


def are_tied(users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Whether each event has the time of the one before it, of the same user.

    Args:
        users: codes ``[events]``, events sorted by user and time.
        times: ``[events]``.
    """
    return np.append(False, (users[1:] == users[:-1]) & (times[1:] == times[:-1]))[: len(users)]


def sentence(ties: str, seed: int, users: np.ndarray, times: np.ndarray) -> str:
    """How many events are tied, and what orders them, as a line of the log.

    Args:
        ties: the key of that name.
        seed: ``ties_seed``.
        users: codes ``[events]`` in any order.
        times: ``[events]``.
    """
    order = np.lexsort((times, users))
    tied = int(are_tied(users[order], times[order]).sum())
    pairs = len(users) - len(np.unique(users))
    how = "they keep the order of the file" if ties == "file" else f"their order is drawn by ties_seed {seed}"
    return f"ties: {ties}; {tied / max(pairs, 1):.1%} of consecutive events of a user have one time, and {how}"
