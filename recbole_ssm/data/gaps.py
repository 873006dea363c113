"""The gaps between the events of a training set: in what unit its times are counted, and how long a gap can be."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recbole_ssm.data import temporal
from recbole_ssm.data.outline import DatasetOutline
from recbole_ssm.data.prefixes import Prefixes
from recbole_ssm.errors import UserError

DAY = 86_400


class TimeScale(NamedTuple):
    """How a training set counts time."""

    origin: int = 0
    """A moment at which its units begin, in seconds since 1970, less than a unit after 1970."""
    resolution: int = 1
    """Its unit in seconds: the largest of which all times are whole numbers."""
    longest: int = 0
    """The longest gap between two neighbours of one user's events, in such units."""


def reads_times(time: str | None) -> bool:
    """Whether a value of the key ``time`` means that a model reads times; ``none`` and an empty one mean that not."""
    return time not in (None, "none")


def require_clock_times(config: Any, dataset: Any) -> None:
    """Make sure that a data set has what a model of times reads.

    Args:
        config: names the columns.
        dataset: a split, as RecBole's ``build`` gives it.

    Raises:
        UserError: there are no times, or they are no clock times, such as positions.
    """
    field, suffix = dataset.time_field, config["LIST_SUFFIX"]
    for column in (field, field + suffix):
        if column not in dataset.inter_feat:
            raise UserError(
                f"time: {config['time']} reads the column {column}, which is not loaded; name it in load_col, or take "
                "time: none"
            )
    first, last = _span(dataset)
    if not temporal.unit_of(np.array([first, last]))[0]:
        raise UserError(
            f"time: {config['time']} needs clock times, and {field} goes from {first} to {last}; give seconds since "
            "1970, as recbole-ssm convert makes them of dates, or take time: none"
        )


def time_scale(dataset: Any) -> TimeScale:
    """The scale of a training set; of an outline, which has no events, one that a checkpoint's takes the place of.

    Args:
        dataset: the training split, of clock times in seconds.
    """
    if isinstance(dataset, DatasetOutline):
        return TimeScale()
    before, after = _neighbours(dataset)
    if not len(after):
        return TimeScale()
    start = int(after[0])
    # Where all times are one, every unit fits.
    resolution = int(np.gcd(np.gcd.reduce(after - start), np.gcd.reduce(before - start))) or 1
    longest = int((after - before).max()) // resolution
    return TimeScale(start % resolution, resolution, max(longest, 0))


def of_whole_days(dataset: Any) -> bool:
    """Whether all times of a data set are whole days apart."""
    times = _times(dataset)
    return bool(np.gcd.reduce((times - times.min()).astype(np.int64)) % DAY == 0)


def pauses(config: Any, dataset: Any) -> np.ndarray | None:
    """How long before each row's target the newest event of its history was, in seconds ``[rows]``, int64.

    Args:
        config: names the columns.
        dataset: a split.

    Returns:
        None where the data have no clock times, or ``legacy_time_order`` rounds them.
    """
    field = dataset.time_field
    there = {field, f"{field}{config['LIST_SUFFIX']}"} <= set(dataset.inter_feat)
    if not there or not len(dataset.inter_feat) or config["legacy_time_order"]:
        return None
    if not temporal.unit_of(np.array(_span(dataset)))[0]:
        return None
    before, after = _neighbours(dataset)
    return after - before


def _span(dataset: Any) -> tuple[int, int]:
    """The first and the last time of a data set."""
    times = _times(dataset)
    return int(times.min()), int(times.max())


def _times(dataset: Any) -> np.ndarray:
    """The times of a data set's events, or of its rows where it has no events."""
    rows = dataset.inter_feat
    times: np.ndarray = (rows.events if isinstance(rows, Prefixes) else rows)[dataset.time_field].numpy()
    return times


def _neighbours(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """The times of the events before the targets of rows, and of the targets ``[n]``, in seconds."""
    rows, field = dataset.inter_feat, dataset.time_field
    if isinstance(rows, Prefixes):
        times = rows.events[field].numpy()
        return times[rows.target - 1], times[rows.target]
    config = dataset.config
    listed, length = rows[field + config["LIST_SUFFIX"]], rows[config["ITEM_LIST_LENGTH_FIELD"]]
    # Some of RecBole's data sets hold lists as floats.
    newest = listed.gather(1, (length.long() - 1)[:, None])[:, 0].long()
    return newest.numpy(), rows[field].numpy()
