"""Tables with named columns as rows of text cells: separated text, JSON lines and Parquet.

A table is read in blocks of bounded memory, and each row keeps the number of its line, so that a fault can be found.
"""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from recbole_ssm.data.archives import File
from recbole_ssm.data.lines import (
    BadLines,
    Block,
    below_header,
    not_text,
    original,
    progress,
    sound_lines,
    split_header,
)
from recbole_ssm.data.times import decimals
from recbole_ssm.errors import UserError, excerpt

# Rows of a batch and bytes of their lines, where a format is read row by row.
ROWS = 100_000
BYTES = 1 << 24
# Bytes of a line of JSON, and of one of Python's literals, which take four hundred times their size to be read.
LONGEST_OBJECT = 1 << 22
LONGEST_LITERAL = 1 << 18
# Bytes of a row of separated text that takes several lines, and of one of Parquet, on average of a group of rows.
LONGEST_ROW = 1 << 20
# Bytes that are read again behind stray quotation marks; a minute of lines of a few characters.
MOST_AGAIN = 1 << 26


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


@dataclass
class Text:
    """Separated text; ``names`` are its columns, or None if its first line names them."""

    file: File
    separator: str
    names: tuple[str, ...] | None = None
    quoted: bool = False
    encoding: str = "utf-8"

    def columns(self) -> tuple[str, ...]:
        """The names of its columns; the types of an atomic file's are left out."""
        if self.names is not None:
            return self.names
        line = self.file.first_line(self.encoding)
        if not line:
            raise UserError(f"{self.file}: the file is empty")
        cells = split_header(line, self.separator, str(self.file), self.quoted)
        names = tuple(cell.partition(":")[0] if self.file.suffix == ".inter" else cell for cell in cells)
        return _distinct(names, f"{self.file}, line 1")

    def nested(self) -> dict[str, str]:
        """The columns that hold lists or objects: none that is known as such."""
        return {}

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows; ``fields`` is ``{field: column}``."""
        names = self.columns()
        blocks = self.file.blocks(self.encoding)
        if self.names is None:
            blocks = below_header(blocks)
        for block in blocks:
            if self.quoted and b'"' in block.data:
                # A quoted cell may hold line ends: from here on the table is read row by row.
                yield from _batches(self._quoted(itertools.chain([block], blocks), names, fields, bad), fields)
                return
            lines = sound_lines(block, len(names), self.separator, self.encoding, bad)
            if len(lines.numbers):
                cells = lines.columns(names, list(dict.fromkeys(fields.values())))
                yield Rows(_renamed(cells, fields), lines.numbers, lines.raw)

    def _quoted(
        self, blocks: Iterable[Block], names: tuple[str, ...], fields: Mapping[str, str], bad: BadLines
    ) -> Iterator[_Row]:
        places = [names.index(column) for column in fields.values()]
        lines = _Decoded(blocks)
        reader = csv.reader(lines, delimiter=self.separator, strict=True)
        while True:
            fault = ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = f"not a row of cells ({error}); correct it or drop it"
                # A stray quotation mark takes sound lines along: only the line in which the row begins is refused.
                lines.give_back()
                if lines.again > MOST_AGAIN:
                    raise UserError(
                        f"{bad.path}, line {lines.taken()[0]}: here as in many lines before, a quotation mark stands "
                        "open; correct them, or drop them all"
                    ) from error
            # A row may take several lines.
            number, raw, foreign = lines.taken()
            raw = original(raw, self.encoding)
            if foreign:
                fault = f"{not_text(self.encoding)}: {raw[:60]!r}"
            elif not fault and not cells:
                fault = "the line is empty; drop it"
            elif not fault and len(cells) != len(names):
                fault = f"{len(cells)} columns where the header has {len(names)}: {raw[:60]!r}; correct it or drop it"
            if fault:
                bad.add(number, fault, raw)
            else:
                yield number, raw, [cells[place] for place in places]


@dataclass
class JsonLines:
    """One JSON object a line; Amazon's metadata of 2014 are Python's literals instead, which are read too, as data.

    Under the keys ``single`` a list or an object is a fault of its line.
    """

    file: File
    encoding: str = "utf-8"
    single: Collection[str] = ()

    def columns(self) -> tuple[str, ...]:
        """The keys of its first object."""
        line = self.file.first_line(self.encoding)
        try:
            return tuple(_object(line))
        except ValueError as error:
            raise UserError(
                f"{self.file}, line 1: no JSON object: {line[:60]!r}; write one a line, as pandas does by "
                "to_json(orient='records', lines=True)"
            ) from error

    def nested(self) -> dict[str, str]:
        """The keys under which its first object has lists, which become ``token_seq``, or objects: ``token``."""
        found = _object(self.file.first_line(self.encoding))
        kinds = ((key, isinstance(value, list)) for key, value in found.items() if isinstance(value, CONTAINERS))
        return {key: "token_seq" if lists else "token" for key, lists in kinds}

    def objects(self, bad: BadLines) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """``(line number, line, object)`` of each line."""
        for block in self.file.blocks(self.encoding):
            for number, line in enumerate(block.data.removesuffix(b"\n").split(b"\n"), block.first):
                raw = original(line, self.encoding)
                try:
                    # A line that is no text raises UnicodeDecodeError, which is a ValueError.
                    found = _object(line.decode())
                except ValueError:
                    bad.add(number, f"no JSON object: {raw[:60]!r}; correct the line or drop it", raw)
                else:
                    yield number, raw, found

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows; ``fields`` is ``{field: key}``."""
        yield from _batches(self._sound(fields, bad), fields)

    def _sound(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[_Row]:
        for number, line, found in self.objects(bad):
            cells = [cell_of(found.get(key)) for key in fields.values()]
            wrong = [key for key in self.single if isinstance(found.get(key), CONTAINERS)]
            if wrong:
                value = excerpt(cell_of(found[wrong[0]]))
                fault = f"{wrong[0]} is a list or an object, {value}, where one value must stand"
                bad.add(number, f"{fault}; correct the line or drop it", line)
            elif any(map(_broken, cells)):
                bad.add(number, f"half a character (a lone surrogate): {line[:60]!r}; drop the line", line)
            else:
                yield number, line, cells


@dataclass
class Parquet:
    """A Parquet file."""

    file: File

    @contextmanager
    def _open(self) -> Iterator[pyarrow.parquet.ParquetFile]:
        try:
            with self.file.open() as (file, _, _):
                yield pyarrow.parquet.ParquetFile(file)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.file}: no readable Parquet file ({error})") from error

    def columns(self) -> tuple[str, ...]:
        """The names of its columns."""
        with self._open() as parquet:
            return _distinct(tuple(parquet.schema_arrow.names), str(self.file))

    def nested(self) -> dict[str, str]:
        """The columns that hold lists, which become ``token_seq``, or objects: ``token``."""
        with self._open() as parquet:
            nested = [field for field in parquet.schema_arrow if pa.types.is_nested(field.type)]
        objects = (pa.StructType, pa.MapType)
        return {field.name: "token" if isinstance(field.type, objects) else "token_seq" for field in nested}

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows, counted from 1; ``fields`` is ``{field: column}``."""
        start, rows = 1, ROWS
        with self._open() as parquet, progress(f"Read {self.file.name}", parquet.metadata.num_rows, "rows") as bar:
            for number in range(parquet.num_row_groups):
                group = parquet.metadata.row_group(number)
                if group.total_byte_size > LONGEST_ROW * max(group.num_rows, 1):
                    raise UserError(f"{self.file}: rows of more than {LONGEST_ROW >> 20} MB; is it a table of events?")
                rows = min(rows, max(BYTES * group.num_rows // max(group.total_byte_size, 1), 1))
            for batch in parquet.iter_batches(rows, columns=list(dict.fromkeys(fields.values()))):
                cells = pa.table({name: self._cells(batch, column) for name, column in fields.items()})
                yield Rows(cells, np.arange(start, start + len(batch)), partial(_shown, cells))
                start += len(batch)
                bar.update(len(batch))

    def _cells(self, batch: pa.RecordBatch, name: str) -> pa.StringArray:
        column = batch.column(name)
        try:
            # That text is UTF-8, which Arrow takes on trust.
            column.validate(full=True)
            return _strings(column)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.file}: column {excerpt(name)} ({column.type}) cannot be read as text ({error}); write it as "
                "strings in UTF-8"
            ) from error


@dataclass
class Sequences:
    """Text in which each line is a user and the items of the user, oldest first; no separator is any white space."""

    file: File
    separator: str | None = None
    encoding: str = "utf-8"

    def columns(self) -> tuple[str, ...]:
        """``user`` and ``item``."""
        return ("user", "item")

    def nested(self) -> dict[str, str]:
        """None: each entry of a line is an event."""
        return {}

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """A row for each item; ``fields`` is ``{field: "user" or "item"}``."""
        for block in self.file.blocks(self.encoding):
            events: dict[str, list[str]] = {"user": [], "item": []}
            numbers: list[int] = []
            lines: list[bytes] = []
            for number, line in enumerate(block.data.removesuffix(b"\n").split(b"\n"), block.first):
                raw = original(line, self.encoding)
                try:
                    user, *items = line.decode().strip().split(self.separator) or [""]
                except UnicodeDecodeError:
                    bad.add(number, f"{not_text(self.encoding)}: {raw[:60]!r}", raw)
                    continue
                if not items:
                    bad.add(number, f"no user with items after it: {raw[:60]!r}; drop the line", raw)
                events["user"] += [user] * len(items)
                events["item"] += items
                numbers += [number] * len(items)
                lines += [raw] * len(items)
            if numbers:
                cells = {name: pa.array(events[column], pa.string()) for name, column in fields.items()}
                yield Rows(pa.table(cells), np.array(numbers), partial(list, lines))


Table = Text | JsonLines | Parquet | Sequences
# The number of a row's first line, its lines, and the cells that were asked for.
_Row = tuple[int, bytes, Sequence[str]]


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


def _renamed(cells: pa.Table, fields: Mapping[str, str]) -> pa.Table:
    return pa.table({name: cells[column] for name, column in fields.items()})


def _batches(found: Iterator[_Row], fields: Iterable[str]) -> Iterator[Rows]:
    """Rows that are read one by one, many at a time."""
    batch: list[_Row] = []
    size = 0
    for row in itertools.chain(found, [None]):
        if row is not None:
            batch.append(row)
            size += len(row[1])
        if batch and (row is None or len(batch) >= ROWS or size >= BYTES):
            numbers, raw, cells = zip(*batch)
            columns = {name: pa.array(column, pa.string()) for name, column in zip(fields, zip(*cells))}
            yield Rows(pa.table(columns), np.array(numbers), partial(list, raw))
            batch, size = [], 0


def _distinct(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Names of columns, which must all be different."""
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{where}: column {excerpt(twice)} stands twice; rename one")
    return names


def _object(line: str) -> dict[str, Any]:
    """The object that a line of JSON, or of Python's literals, spells.

    Raises:
        ValueError: it spells none, or is too long for one.
    """
    if len(line) > LONGEST_OBJECT:
        raise ValueError("too long")
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:
        if len(line) > LONGEST_LITERAL:
            raise
        try:
            found = ast.literal_eval(line.strip())
        except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError("neither JSON nor a Python literal") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError("no object whose keys are text")
    return found


def _broken(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _strings(column: pa.Array) -> pa.StringArray:
    """A column of Parquet as text; dates and times as seconds since 1970; lists with spaces; null and NaN as ""."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        return _decimals(column.cast(pa.int64()), {"s": 0, "ms": 3, "us": 6, "ns": 9}[kind.unit])
    if pa.types.is_date(kind):
        days = column.cast(pa.date32()).cast(pa.int32()).cast(pa.int64())
        return _decimals(pc.multiply(days, 86_400), 0)
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type) or pa.types.is_floating(column.type):
        return pa.array(list(map(cell_of, column.to_pylist())), pa.string())
    return column.cast(pa.string()).fill_null("")


def _decimals(ticks: pa.Array, digits: int) -> pa.StringArray:
    text = decimals(ticks.fill_null(0).to_numpy(), digits)
    return pc.if_else(ticks.is_valid(), text, "")


def _shown(cells: pa.Table) -> list[bytes]:
    return [
        "\t".join(row).replace("\n", " ").encode() for row in zip(*(column.to_pylist() for column in cells.columns))
    ]


class _Decoded:
    """Feeds lines to the csv module, and remembers those that the row at hand took.

    The lines end within a row of more than :data:`LONGEST_ROW` bytes, which is then a row without its end.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._lines = (
            (number, line) for block in blocks for number, line in enumerate(io.BytesIO(block.data), block.first)
        )
        self._given_back: deque[tuple[int, bytes]] = deque()
        self._taken: list[tuple[int, bytes]] = []
        self._size = 0
        self.again = 0
        """Bytes that were given back until now."""

    def __iter__(self) -> _Decoded:
        return self

    def __next__(self) -> str:
        if self._size > LONGEST_ROW:
            raise StopIteration
        number, line = self._given_back.popleft() if self._given_back else next(self._lines)
        self._taken.append((number, line))
        self._size += len(line)
        return line.decode(errors="replace")

    def give_back(self) -> None:
        """Let the lines of the row at hand come again, but for its first."""
        self._given_back.extendleft(reversed(self._taken[1:]))
        self.again += sum(len(line) for _, line in self._taken[1:])
        del self._taken[1:]

    def taken(self) -> tuple[int, bytes, bool]:
        """The number of the first line since the last call, all those lines, and whether one of them is no text."""
        number = self._taken[0][0]
        raw = b"".join(line for _, line in self._taken).removesuffix(b"\n")
        self._taken, self._size = [], 0
        try:
            raw.decode()
        except UnicodeDecodeError:
            return number, raw, True
        return number, raw, False
