"""Splitting all events by two moments in time, and how much of the future leave-one-out trains on.

Leave-one-out takes each user's last event to test, whenever it was: a model is trained on what other users did later
(Ji et al., "A critical study on data leakage in recommender system offline evaluation", TOIS 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recbole_ssm.data.times import date_of
from recbole_ssm.errors import UserError

# The name in eval_args.split, beside RecBole's RS, LS and TS.
NAME = "GTS"
EXAMPLE = f"split: {{'{NAME}': [0.8, 0.1, 0.1]}}"
EXAMPLE_ENTRY = EXAMPLE.replace("split", "'split'", 1)
DATES = f"split: {{'{NAME}': ['2020-01-01', '2020-07-01']}}"
# Units of clock times: above which the newest of them is counted in it, and how many of them make a second.
UNITS = (
    (10**17, 10**9, "nanoseconds"),
    (10**14, 10**6, "microseconds"),
    (10**11, 10**3, "milliseconds"),
    (10**8, 1, "seconds"),
)


def unit_of(times: np.ndarray) -> tuple[str, int]:
    """The unit since 1970 in which times are counted, by their size, and how many of it make a second.

    It is ``("", 1)`` for what is no clock time between 1973 and 5138: days, or positions of events.
    """
    first, last = times.min(), times.max()
    for least, per_second, unit in UNITS:
        if first >= 0 and least < last < least * 1000:
            return unit, per_second
    return "", 1


def in_seconds(times: np.ndarray) -> np.ndarray:
    """Clock times [events] in whole seconds, int64; others as they are, rounded down."""
    return np.floor_divide(times, unit_of(times)[1]).astype(np.int64)


def shown(time: float) -> str:
    """A time in a message: whole numbers in all their digits."""
    return str(time) if isinstance(time, (int, np.integer)) else f"{time:.15g}"


def check_parts(parts: Any) -> list[float] | list[int]:
    """What ``GTS`` may be.

    Args:
        parts: three positive shares of the events, to train, validate and test; or two dates, from which on events
            validate and test.

    Returns:
        The shares, scaled to a sum of 1; or the dates in nanoseconds since 1970.

    Raises:
        UserError: they are anything else.
    """
    count = len(parts) if isinstance(parts, (list, tuple)) else 0
    if count == 3 and all(type(share) in (int, float) and 0 < share < float("inf") for share in parts):
        return [share / sum(parts) for share in parts]
    if count == 2:
        # YAML makes dates of unquoted ones, which are spelt alike.
        dates = [date_of(str(date)) for date in parts]
        moments = [date[0] * 10**9 + date[1] for date in dates if date]
        if len(moments) == 2 and moments[0] < moments[1]:
            return moments
    raise UserError(
        f"eval_args: {NAME} takes three positive shares of the events, got {parts!r}; try {EXAMPLE}, or two dates, "
        f"from which on events validate and test: {DATES}"
    )


def split_by_time(times: np.ndarray, parts: Sequence[float]) -> np.ndarray:
    """The part of each event: 0 trains, 1 validates, 2 tests; every event of a part is later than all of those before.

    Of shares, the moments are those at which they are reached; all events of one time fall to the same side.

    Args:
        times: [events].
        parts: as of :func:`check_parts`.

    Returns:
        [events] int8.

    Raises:
        UserError: a part stays empty, or dates are given and the times are no clock times.
    """
    span = f"from {shown(times.min())} to {shown(times.max())}"
    if len(parts) == 2:
        unit, per_second = unit_of(times)
        if not unit:
            raise UserError(f"eval_args: {NAME} by dates needs clock times, and these go {span}; try {EXAMPLE}")
        # Rounded up to the unit, because an event that is not before the moment comes after it.
        moments = np.array([-(-moment * per_second // 10**9) for moment in parts])
        found = np.searchsorted(moments, times, side="right").astype(np.int8)
        fault = f"as all of them ({span}) lie on one side of a date; choose other dates"
    else:
        moments = np.quantile(times, np.cumsum(parts)[:2], method="inverted_cdf")
        found = np.searchsorted(moments, times, side="left").astype(np.int8)
        fault = f"as too many of them share one time ({span}); choose other shares"
    if not all(np.any(found == part) for part in range(3)):
        raise UserError(f"eval_args: {NAME} leaves a part without events, {fault}, or split by LS")
    return found


def parts_of_targets(parts: np.ndarray, users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The part of each row that RecBole makes of events: by user and time, without the first event of each user.

    Args:
        parts: [events] as of :func:`split_by_time`.
        users: [events] codes.
        times: [events].

    Returns:
        [events - users].

    Raises:
        UserError: a part has no row, as all its events are the first of their users.
    """
    order = np.lexsort((times, users))
    users = users[order]
    rows = parts[order][1:][users[1:] == users[:-1]]
    for part, name in enumerate(("training", "validation", "test")):
        if not np.any(rows == part):
            raise UserError(
                f"eval_args: {NAME} leaves {name} with nothing but first events of users, which cannot be predicted; "
                "choose other shares or dates"
            )
    return rows


def is_position(users: np.ndarray, times: np.ndarray) -> bool:
    """Whether times only count the events of each user (0, 1, 2 ... or 1, 2, 3 ...), and tell nothing across users.

    Args:
        users: [events] codes.
        times: [events].
    """
    first = times.min()
    if first not in (0, 1) or times.max() - first >= np.bincount(users).max():
        # Clock times end here, before all are sorted.
        return False
    order = np.lexsort((times, users))
    new_user = np.diff(users[order]) != 0
    times = times[order]
    return bool(
        new_user.any()
        and times[0] == first
        and np.all(times[1:][new_user] == first)
        and np.all(np.diff(times)[~new_user] == 1)
    )


def leak_of_leave_one_out(users: np.ndarray, times: np.ndarray) -> dict[str, float]:
    """How much of the training events of leave-one-out lies in the future of what it tests.

    Each user's last event tests, the one before validates, the others train; users with fewer than three events are
    left out.

    Args:
        users: [events] codes.
        times: [events].

    Returns:
        ``targets``, how many events test; ``after_targets``, the share of them that some training event is later than;
        ``median_future``, the share of all training events that are later than the test event, at the median of users.
    """
    order = np.lexsort((times, users))
    last = np.flatnonzero(np.append(np.diff(users[order]) != 0, True))
    times = times[order]
    # These arrays are as long as the data, so none is kept for longer than it is needed.
    del order
    counts = np.diff(np.append(-1, last))
    last = last[counts >= 3]
    if not len(last):
        return {"targets": 0, "after_targets": 0.0, "median_future": 0.0}
    trains = np.repeat(counts >= 3, counts)
    trains[last] = trains[last - 1] = False
    training = times[trains]
    training.sort()
    future = len(training) - np.searchsorted(training, times[last], side="right")
    return {
        "targets": len(last),
        "after_targets": float(np.mean(future > 0)),
        "median_future": float(np.median(future) / len(training)),
    }


def leave_one_out_warning(users: np.ndarray, times: np.ndarray) -> str:
    """One line on what leave-one-out leaks in these events; "" if nothing."""
    if is_position(users, times):
        return (
            "leave-one-out: the times only count each user's events, so nobody can tell how much of the future of a "
            "test event is trained on"
        )
    leak = leak_of_leave_one_out(users, times)
    if not leak["after_targets"]:
        return ""
    return (
        f"leave-one-out: {leak['after_targets']:.1%} of the {leak['targets']:,} test events are older than some that "
        f"train the model (the median one is older than {leak['median_future']:.1%} of these), so the figures of the "
        "test may flatter it; recommendations are not concerned; to test on what comes after all training: "
        f'--eval_args="{{{EXAMPLE_ENTRY}}}"'
    )


def describe(parts: np.ndarray, users: np.ndarray, items: np.ndarray, times: np.ndarray) -> dict[str, Any]:
    """What a split by time holds: events of each part, its moments, and how much of the test is new.

    Args:
        parts: [events] as of :func:`split_by_time`.
        users: [events] codes.
        items: [events] codes.
        times: [events].

    Returns:
        ``events`` of the three parts; ``validation_after`` and ``test_after``, the last times before them;
        ``new_users`` and ``new_items``, the shares of test events whose user or item has no training event.
    """
    train, test = parts == 0, parts == 2
    return {
        "events": np.bincount(parts, minlength=3).tolist(),
        "validation_after": times[train].max().item(),
        "test_after": times[parts < 2].max().item(),
        "new_users": _share_of_new(users, train, test),
        "new_items": _share_of_new(items, train, test),
    }


def _share_of_new(codes: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Of the test events, the share whose code no training event has."""
    known = np.zeros(codes.max() + 1, dtype=bool)
    known[codes[train]] = True
    return float(np.mean(~known[codes[test]]))


def sentence(split: dict[str, Any]) -> str:
    """A description as words."""
    train, validation, test = split["events"]
    return (
        f"{train:,} events train, {validation:,} after {shown(split['validation_after'])} validate, {test:,} after "
        f"{shown(split['test_after'])} test; of those, {split['new_users']:.1%} are of users and "
        f"{split['new_items']:.1%} of items without a training event"
    )
