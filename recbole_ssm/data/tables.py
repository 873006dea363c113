"""Tables with named columns as rows of text cells, whatever format holds them.

A table is read in blocks of bounded memory, and each row keeps the number of its line, so that a fault can be found.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from recbole_ssm.data.archives import File
from recbole_ssm.data.lines import BadLines
from recbole_ssm.errors import UserError, excerpt

# Rows of a batch and bytes of their lines, where a format is read row by row.
ROWS = 100_000
BYTES = 1 << 24
# Bytes of a row of separated text that takes several lines, and of one of Parquet, on average of a group of rows.
LONGEST_ROW = 1 << 20
# The number of a row's first line, its lines, and the cells that were asked for.
Row = tuple[int, bytes, Sequence[str]]


@dataclass
class Rows:
    """Some rows of a table.

    Attributes:
        cells: a column of strings for each field that was asked for; a cell without content is "".
        numbers: [rows] the line of each in the file, from 1.
        raw: gives the whole line of each row.
    """

    cells: pa.Table
    numbers: np.ndarray
    raw: Callable[[], Sequence[bytes]]


class Table(Protocol):
    """What every format of tables gives."""

    file: File

    def columns(self) -> tuple[str, ...]:
        """The names of its columns."""

    def kinds(self) -> dict[str, str]:
        """The types of those columns whose type is known before they are read."""

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows, counted from 1; ``fields`` is ``{field: column}``."""


# What JSON and Parquet hold beside single values; a tuple is an entry of Arrow's maps.
CONTAINERS = (list, tuple, dict)


def cell_of(value: Any) -> str:
    """A value as a cell: text as it is, numbers as they are spelt, whole ones without a point, nothing and NaN as "".

    True and false are words, the entries of a list have spaces between them, and what lies deeper is JSON.
    """
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, list):
        return " ".join(filter(None, (_json(one) if isinstance(one, CONTAINERS) else cell_of(one) for one in value)))
    if isinstance(value, CONTAINERS):
        return _json(value)
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str, skipkeys=True)


def batches(found: Iterator[Row], fields: Iterable[str]) -> Iterator[Rows]:
    """Rows that are read one by one, many at a time."""
    batch: list[Row] = []
    size = 0
    for row in itertools.chain(found, [None]):
        if row is not None:
            batch.append(row)
            size += len(row[1]) + 8 * len(row[2])
        if batch and (row is None or len(batch) >= ROWS or size >= BYTES):
            numbers, raw, cells = zip(*batch)
            columns = {name: pa.array(column, pa.string()) for name, column in zip(fields, zip(*cells))}
            yield Rows(pa.table(columns), np.array(numbers), partial(list, raw))
            batch, size = [], 0


def distinct(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Names of columns, which must all be different; those without a name are none that anybody asks for."""
    twice, count = Counter(filter(None, names)).most_common(1)[0] if any(names) else ("", 0)
    if count > 1:
        raise UserError(f"{where}: column {excerpt(twice)} stands twice; rename one")
    return names
