"""The events of a raw data set, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from logging import getLogger

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_ssm.data.atomic import BUILDERS, Columns, Floats, Values, Words
from recbole_ssm.data.events import Events, places
from recbole_ssm.data.lines import BadLines
from recbole_ssm.data.names import EVENT
from recbole_ssm.data.sources import Raw
from recbole_ssm.data.times import Moments, check_form
from recbole_ssm.errors import excerpt


def read_events(
    raw: Raw, bad: BadLines, kept: Mapping[str, str] | None = None, time_format: str = ""
) -> tuple[Events, int]:
    """All events of a source, checked, and how many digits behind the point their times have, which are whole here.

    Raises:
        UserError: ``time_format`` is no form of dates; the first faulty row (or none, if ``bad`` skips); or there is no
            row at all.
    """
    if time_format:
        first = next(raw.events.rows({"time": raw.fields["time"]}, BadLines(str(raw.events.file), "skip")), None)
        check_form("--time_format", time_format, first.cells["time"].to_pylist() if first else ())
    times = Moments(time_format)
    ratings = Ratings() if raw.guessed else Floats()
    known: dict[str, Words | Values] = {"user": Ids(), "item": Ids(), "time": times, "rating": ratings}
    # No column of a source is called as these are, because of the tab.
    others = {f"\t{column}": column for column in kept or ()}
    wanted = {**raw.fields, **others}
    builders = {field: known[field] for field in raw.fields} | {
        f"\t{column}": Further(kind) for column, kind in (kept or {}).items()
    }
    shown = {key: f"column {name}" if name.isdecimal() else name for key, name in wanted.items()}
    columns = Columns(builders, EVENT[:3], shown)
    for rows in raw.events.rows(wanted, bad):
        columns.add(rows.cells, rows.numbers, rows.raw, bad)
    found = columns.finish(str(raw.events.file), bad, "no event in it")
    if isinstance(ratings, Ratings) and ratings.others:
        getLogger().warning(
            f"{raw.events.file}: {ratings.others:,} cells of column {excerpt(raw.fields['rating'])} are no numbers and "
            "count as missing; where it is named by --rating, they are faults"
        )
    if "time" not in found:
        found["time"] = places(found["user"].codes)
    further = {column: found[key] for key, column in others.items()}
    return Events(found["user"], found["item"], found["time"], found.get("rating"), further), times.digits


class Further(Words):
    """A further column; with a type of numbers, other cells are faults, and any other type takes all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Look at the cells of a batch; the faults by row."""
        self._parsed = cells
        if not self._kind.startswith("float"):
            return {}
        other = self._kind.replace("float", "token")
        faults = BUILDERS[self._kind]().parse(cells, required)
        return {row: f"{fault}, or --keep it as {other}" for row, fault in faults.items()}


class Ratings(Floats):
    """A column of ratings that nobody named: a cell that is no number is missing, and no fault.

    Attributes:
        others: how many such cells there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others = 0

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Parse the cells of a batch; none is a fault."""
        self.others += len(super().parse(cells, required))
        self._parsed = np.where(np.isfinite(self._parsed), self._parsed, np.nan)
        return {}


class Ids(Words):
    """A column of ids; what would break the lines of an atomic file is refused."""

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Look at the cells of a batch; the faults by row."""
        faults = super().parse(cells, required)
        for row in np.flatnonzero(pc.match_substring_regex(cells, "[\t\r\n\\x00]").to_numpy(zero_copy_only=False)):
            faults[int(row)] = f"is {excerpt(cells[int(row)].as_py())}, with a character that no atomic file can hold"
        return faults
