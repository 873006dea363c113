"""Separated text as a table: rows of columns, or sequences of items."""

from __future__ import annotations

import csv
import io
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_ssm.data.archives import File
from recbole_ssm.data.atomic import TYPES
from recbole_ssm.data.lines import (
    BadLines,
    Block,
    below_header,
    not_text,
    original,
    sound_lines,
    split_header,
)
from recbole_ssm.data.tables import LONGEST_ROW, Row, Rows, batches, distinct
from recbole_ssm.errors import UserError

# Endings of RecBole's files, whose first line holds types too, and which quote nothing.
ATOMIC = (".inter", ".item")
# Bytes that are read again behind stray quotation marks; a minute of lines of a few characters.
MOST_AGAIN = 1 << 26


@dataclass
class Text:
    """Separated text.

    Attributes:
        file: where it stands.
        separator: between its columns.
        names: its columns, or None if its first line names them.
        quoted: cells may stand between quotation marks.
        encoding: of the file.
        spaced: blanks around a cell are none of it, as behind the commas of ``a, b, c``.
    """

    file: File
    separator: str
    names: tuple[str, ...] | None = None
    quoted: bool = False
    encoding: str = "utf-8"
    spaced: bool = False

    def columns(self) -> tuple[str, ...]:
        """The names of its columns; the types of an atomic file's are left out."""
        return distinct(tuple(name for name, _ in self._header()), f"{self.file}, line 1")

    def kinds(self) -> dict[str, str]:
        """The types that an atomic file gives its columns."""
        return {name: kind for name, kind in self._header() if kind in TYPES}

    def _header(self) -> list[tuple[str, str]]:
        """The name of each column, and its type or ""."""
        if self.names is not None:
            return [(name, "") for name in self.names]
        line = self.file.first_line(self.encoding)
        if not line:
            raise UserError(f"{self.file}: the file is empty, or its first line, which must name the columns")
        cells = split_header(line, self.separator, str(self.file), self.quoted)
        typed = self.file.suffix in ATOMIC
        return [(name, kind) for name, _, kind in (cell.partition(":") if typed else (cell, "", "") for cell in cells)]

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows; ``fields`` is ``{field: column}``."""
        names = self.columns()
        blocks = self.file.blocks(self.encoding)
        if self.names is None:
            blocks = below_header(blocks)
        for block in blocks:
            if self.quoted and b'"' in block.data:
                # A quoted cell may hold line ends: from here on the table is read row by row.
                yield from batches(self._quoted(itertools.chain([block], blocks), names, fields, bad), fields)
                return
            lines = sound_lines(block, len(names), self.separator, self.encoding, bad)
            if len(lines.numbers):
                cells = lines.columns(names, list(dict.fromkeys(fields.values())))
                if self.spaced:
                    cells = pa.table([pc.utf8_trim(column, " ") for column in cells.columns], cells.column_names)
                yield Rows(_renamed(cells, fields), lines.numbers, lines.raw)

    def _quoted(
        self, blocks: Iterable[Block], names: tuple[str, ...], fields: Mapping[str, str], bad: BadLines
    ) -> Iterator[Row]:
        places = [names.index(column) for column in fields.values()]
        lines = _Decoded(blocks, len(names) - 1 if self.separator == "\t" else 0)
        # Descriptions are longer than what the module takes for a cell; the row is bounded below.
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ROW))
        reader = csv.reader(lines, delimiter=self.separator, strict=True, skipinitialspace=self.spaced)
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
            if fault and self.separator == "\t" and raw.count(b"\t") == len(names) - 1:
                # The line has all its tabs, so its quotation mark quotes nothing: "Heroes" by Bowie.
                fault, cells = "", raw.decode(errors="replace").split("\t")
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
                cells = [cells[place] for place in places]
                yield number, raw, [cell.rstrip(" ") for cell in cells] if self.spaced else cells


@dataclass
class Sequences:
    """Text in which each line is a user and the items of the user, oldest first; no separator is any white space."""

    file: File
    separator: str | None = None
    encoding: str = "utf-8"

    def columns(self) -> tuple[str, ...]:
        """``user`` and ``item``."""
        return ("user", "item")

    def kinds(self) -> dict[str, str]:
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
                    text = line.decode().strip(" ") if self.separator == " " else line.decode()
                    user, *items = [cell.strip() for cell in text.split(self.separator)] or [""]
                except UnicodeDecodeError:
                    bad.add(number, f"{not_text(self.encoding)}: {raw[:60]!r}", raw)
                    continue
                while items and not items[-1]:
                    # A separator ends the line.
                    items.pop()
                if not items:
                    bad.add(number, f"no user with items after it: {raw[:60]!r}; drop the line", raw)
                events["user"] += [user] * len(items)
                events["item"] += items
                numbers += [number] * len(items)
                lines += [raw] * len(items)
            if numbers:
                cells = {name: pa.array(events[column], pa.string()) for name, column in fields.items()}
                yield Rows(pa.table(cells), np.array(numbers), partial(list, lines))


def _renamed(cells: pa.Table, fields: Mapping[str, str]) -> pa.Table:
    return pa.table({name: cells[column] for name, column in fields.items()})


class _Decoded:
    """Feeds lines to the csv module, and remembers those that the row at hand took.

    The lines end within a row of more than :data:`LONGEST_ROW` bytes, which is then a row without its end. So do they
    behind one that holds a whole row: ``tabs`` tabs, and no quotation that is open in its last cell; 0 knows none.
    """

    def __init__(self, blocks: Iterable[Block], tabs: int) -> None:
        self._tabs = tabs
        self._alone = False
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
        if self._size > LONGEST_ROW or self._alone:
            raise StopIteration
        number, line = self._given_back.popleft() if self._given_back else next(self._lines)
        if self._tabs and not self._taken:
            self._alone = line.count(b"\t") == self._tabs and line.rpartition(b"\t")[2].count(b'"') % 2 == 0
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
        self._taken, self._size, self._alone = [], 0, False
        try:
            raw.decode()
        except UnicodeDecodeError:
            return number, raw, True
        return number, raw, False
