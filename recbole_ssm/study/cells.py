"""Figures as tables hold them: means with deviations, and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def average(values: Iterable[float]) -> float | None:
    """The mean of some values; None where there are none."""
    values = list(values)
    return statistics.fmean(values) if values else None


def spread(key: str, values: Sequence[float]) -> dict[str, float | None]:
    """The mean as ``key``, and the sample standard deviation as ``key_sd``; None where there are too few values."""
    return {key: average(values), f"{key}_sd": statistics.stdev(values) if len(values) > 1 else None}


def mean(key: str, latex: bool = False) -> Callable[[Mapping[str, Any]], str]:
    """A function of a row: the text of what :func:`spread` put there."""

    def text(row: Mapping[str, Any]) -> str:
        if row[key] is None:
            return ""
        deviation = row[f"{key}_sd"]
        plus = "" if deviation is None else f" $\\pm$ {_part(deviation)}" if latex else f" ± {_part(deviation)}"
        return f"{_part(row[key])}{plus}"

    return text


def _part(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def grid(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (titles, ["---"] * len(titles), *rows))


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, for a line of a log."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
