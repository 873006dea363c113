"""Reading RecBole's atomic files, with every fault named by file, line, value and mend.

RecBole's own reader shifts columns where a line has one too many, drops real ids such as ``NA``, merges lines between
quotation marks and fills what it cannot read; all silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from recbole_ssm.data.lines import (
    BadLines,
    below_header,
    check_separator,
    first_line,
    progress,
    read_blocks,
    sound_lines,
    split_header,
)
from recbole_ssm.errors import UserError, did_you_mean, excerpt, listed

TYPES = ("token", "token_seq", "float", "float_seq")
MISSING_NUMBERS = ("", "nan", "na", "null", "none")
# From here on, float64 does not hold every whole number.
EXACT = 2.0**53
# Cells that wait for the words of a column to be merged.
MERGE_AT = 4_000_000


def read_header(path: Path, separator: str = "\t", encoding: str = "utf-8") -> dict[str, str]:
    """The columns of an atomic file, ``{name: type}`` in file order.

    Raises:
        UserError: the file is missing, empty or not text, or its first line is no header.
    """
    check_separator("field_separator", separator)
    try:
        with open(path, "rb") as file:
            line = first_line(file, path, encoding)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not line:
        raise UserError(f"{path}: the file is empty; its first line must name the columns, as user_id:token")
    columns: dict[str, str] = {}
    cells = split_header(line, separator, path)
    for cell in cells:
        name, colon, kind = cell.partition(":")
        if not colon or not name:
            hint = "; is field_separator right?" if len(cells) == 1 else ""
            raise UserError(f"{path}, line 1: column {excerpt(cell)} must read name:type, as user_id:token{hint}")
        if kind not in TYPES:
            raise UserError(f"{path}, line 1: column {name[:60]} has type {excerpt(kind)}; known are {listed(TYPES)}")
        if name in columns:
            raise UserError(f"{path}, line 1: column {name[:60]} stands twice; keep one")
        columns[name] = kind
    return columns


@dataclass
class Tokens:
    """A column of ids, each distinct one kept once.

    Attributes:
        codes: [rows] int32, index into ``names``; -1 where the cell is empty.
        names: the distinct ids, in the order in which they first appear.
    """

    codes: np.ndarray
    names: pa.StringArray

    def take(self, rows: np.ndarray) -> Tokens:
        """The cells of those rows (indices or a mask)."""
        return Tokens(self.codes[rows], self.names)

    def objects(self) -> np.ndarray:
        """[rows] ``str``, NaN where the cell is empty; equal ids are one object, so a row costs 8 bytes."""
        names = np.empty(len(self.names) + 1, dtype=object)
        names[:-1] = self.names.to_numpy(zero_copy_only=False)
        names[-1] = np.nan
        return names[self.codes]


def as_frame(columns: dict[str, Any]) -> pd.DataFrame:
    """Columns of :func:`read_columns` as RecBole wants them.

    Tokens become ``str`` (missing: NaN), floats float64, sequences arrays. Tokens such as ``NA`` and quotation marks
    are kept as they stand.
    """
    cells = {name: column.objects() if isinstance(column, Tokens) else column for name, column in columns.items()}
    # with their dtype, because pandas 3 would copy an array of str into one of its own
    series = {name: pd.Series(column, dtype=column.dtype, copy=False) for name, column in cells.items()}
    return pd.DataFrame(series, copy=False)


def read_columns(
    path: Path,
    columns: dict[str, str],
    *,
    required: Container[str] = (),
    separator: str = "\t",
    seq_separator: str = " ",
    encoding: str = "utf-8",
    bad: BadLines | None = None,
) -> dict[str, Any]:
    """Read the given columns of an atomic file, block by block.

    Args:
        path: the file.
        columns: ``{name: type}`` of the columns wanted, a part of :func:`read_header`; a float may be a ``time`` here.
        required: columns in which no cell may be empty; a float there must be finite.
        separator: between columns.
        seq_separator: between the entries of a sequence.
        encoding: of the text; a byte-order mark is passed over.
        bad: what becomes of faulty lines; by default the first one is an error.

    Returns:
        ``{name: column}`` in the order of ``columns``: tokens as :class:`Tokens`, floats as float64 [rows], times as
        int64 [rows] or, where some have fractions, float64 [rows], sequences as an object array [rows] of arrays.

    Raises:
        UserError: the first fault, with its line; or no line remains.
    """
    if not seq_separator:
        raise UserError("seq_separator: must not be empty; a space is written ' '")
    bad = BadLines(path) if bad is None else bad
    names = list(read_header(path, separator, encoding))
    found = Columns({name: BUILDERS[kind](seq_separator) for name, kind in columns.items()}, required)
    with open(path, "rb") as file, progress(f"Read {path.name}", path.stat().st_size) as bar:
        for block in below_header(read_blocks(file, path, encoding)):
            bar.update(file.tell() - bar.n)
            lines = sound_lines(block, len(names), separator, encoding, bad)
            if len(lines.numbers):
                found.add(lines.columns(names, list(columns)), lines.numbers, lines.raw, bad)
    return found.finish(path, bad, "there is a header but no line below it")


def read_configured(
    path: Path, columns: dict[str, str], config: Any, required: Container[str] = ()
) -> tuple[dict[str, Any], BadLines]:
    """:func:`read_columns` with the separators, the encoding and the ``on_bad_lines`` of a configuration, and the lines
    that were skipped, which are counted in the log and kept in ``checkpoint_dir``.
    """
    side = Path(config["checkpoint_dir"]) / f"{path.name}.skipped"
    with BadLines(path, config["on_bad_lines"], side) as bad:
        found = read_columns(
            path,
            columns,
            required=required,
            separator=config["field_separator"],
            seq_separator=config["seq_separator"],
            encoding=config["encoding"] or "utf-8",
            bad=bad,
        )
    if len(bad):
        getLogger().warning(bad)
    return found, bad


def contradictions(frame: pd.DataFrame, field: str, bad: BadLines) -> str:
    """One line on the ids, in column ``field``, that a later line describes in another way; "" without any.

    The frame has a row for each line that was read, and ``bad`` has the others.
    """
    again = frame[frame[field].duplicated()]
    first = frame[frame[field].isin(again[field])].drop_duplicates(field).set_index(field)
    contradicting: dict[str, int] = {}
    for row, values in zip(again.index, again.to_dict("records")):
        former = first.loc[values.pop(field)]
        # What is missing, which is NaN, contradicts nothing.
        told = {name: value for name, value in values.items() if not np.all(pd.isna(value))}
        if not all(np.array_equal(former[name], value) for name, value in told.items()):
            contradicting.setdefault(former.name, row)
    if not contradicting:
        return ""
    who, row = next(iter(contradicting.items()))
    return (
        f"{bad.path}, line {bad.line_of(row)}: {field} {excerpt(who)} again, with other values, and "
        f"{len(contradicting):,} such ids in all; the first line of each counts"
    )


def require_column(path: Path, header: dict[str, str], key: str, name: str, kind: str) -> None:
    """Check that the column which config key ``key`` names is in the file and of the right type.

    Raises:
        UserError: it is not; the message lists the columns there are.
    """
    if name not in header:
        there = f"there are {listed(header)}{did_you_mean(name, header)}"
        raise UserError(f"{path}, line 1: no column {name}:{kind} ({there}); rename one, or set {key}")
    if header[name] != kind:
        raise UserError(f"{path}, line 1: column {name} must be {name}:{kind}, got {name}:{header[name]}")


class Columns:
    """Collects columns a block of rows at a time; a row with a faulty cell goes to ``bad`` and to no column.

    Args:
        builders: what collects each column.
        required: columns in which no cell may be empty.
        shown: the names that messages give them, where those are others.
    """

    def __init__(
        self,
        builders: Mapping[str, Words | Values],
        required: Container[str] = (),
        shown: Mapping[str, str] | None = None,
    ) -> None:
        self._builders, self._required, self._shown = builders, required, shown or {}
        self._rows = 0

    def add(self, cells: pa.Table, numbers: np.ndarray, raw: Callable[[], Sequence[bytes]], bad: BadLines) -> None:
        """Add rows.

        Args:
            cells: a column of strings for each builder.
            numbers: [rows] their line numbers.
            raw: gives their lines.
            bad: where faulty ones go.
        """
        faults: dict[int, str] = {}
        for name, builder in self._builders.items():
            for row, fault in builder.parse(cells[name].combine_chunks(), name in self._required).items():
                faults.setdefault(row, f"{self._shown.get(name, name)} {fault}")
        keep = np.ones(len(numbers), dtype=bool)
        lines = raw() if faults else ()
        for row in sorted(faults):
            keep[row] = False
            bad.add(int(numbers[row]), faults[row], lines[row])
        for builder in self._builders.values():
            builder.take(keep)
        self._rows += int(keep.sum())

    def finish(self, path: Path | str, bad: BadLines, nothing: str) -> dict[str, Any]:
        """The whole columns.

        Raises:
            UserError: there is no row; ``nothing`` says so where none was faulty. Or a column as a whole is faulty.
        """
        if not self._rows:
            raise UserError(f"{path}: {f'every line has a fault; the first is {bad.first}' if len(bad) else nothing}")
        found = {}
        for name, builder in self._builders.items():
            try:
                found[name] = builder.finish()
            except ValueError as error:
                raise UserError(f"{path}: {self._shown.get(name, name)} {error}") from error
        return found


class Words:
    """Collects a column of tokens; cells wait as dictionary arrays until their words are merged into one list."""

    def __init__(self, seq_separator: str = " ") -> None:
        self._parsed: pa.StringArray
        self._waiting: list[pa.DictionaryArray] = []
        self._words = pa.array([], pa.string())
        self._codes: list[np.ndarray] = []

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Look at the cells of a block; the faults by row."""
        self._parsed = cells
        faults = dict.fromkeys(_rows(pc.equal(cells, "[PAD]")), "is '[PAD]', RecBole's padding; rename that id")
        if required:
            faults |= dict.fromkeys(_rows(pc.equal(cells, "")), "is empty; fill it in or drop the line")
        return faults

    def take(self, keep: np.ndarray) -> None:
        """Add those cells of the block."""
        cells = self._parsed if keep.all() else self._parsed.filter(pa.array(keep))
        self._waiting.append(cells.dictionary_encode())
        if sum(map(len, self._waiting)) >= MERGE_AT:
            self._merge()

    def _merge(self) -> None:
        known = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), self._words)
        merged = pa.chunked_array([known, *self._waiting]).unify_dictionaries()
        self._waiting = []
        self._words = merged.chunk(0).dictionary
        self._codes += [chunk.indices.to_numpy() for chunk in merged.chunks[1:]]

    def finish(self) -> Tokens:
        """The whole column."""
        self._merge()
        codes = np.concatenate(self._codes) if self._codes else np.empty(0, dtype=np.int32)
        self._codes = []
        empty = pc.index(self._words, "").as_py()
        if empty >= 0:
            codes[codes == empty] = -1
        return Tokens(codes, self._words)


class Values:
    """Collects a column whose cells are parsed one block at a time."""

    def __init__(self, seq_separator: str = " ") -> None:
        self._seq_separator = seq_separator
        self._parsed: np.ndarray
        self._blocks: list[np.ndarray] = []

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Parse the cells of a block; the faults by row."""
        raise NotImplementedError

    def take(self, keep: np.ndarray) -> None:
        """Add those cells of the block."""
        self._blocks.append(self._parsed if keep.all() else self._parsed[keep])

    def finish(self) -> np.ndarray:
        """The whole column."""
        return np.concatenate(self._blocks)


class Floats(Values):
    """Collects a column of numbers; an empty cell and ``NA``, ``null``, ``None`` or ``nan`` are NaN."""

    def number(self, cell: str) -> float:
        """The number that a cell spells; NaN if it spells none. Python would read 1_0 as 10."""
        try:
            return math.nan if "_" in cell else float(cell)
        except ValueError:
            return math.nan

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Parse the cells of a block; the faults by row."""
        try:
            self._parsed = cells.cast(pa.float64()).to_numpy()
        except pa.ArrowInvalid:
            # An empty cell, a number in another form than Arrow's (+1), or none at all.
            self._parsed = np.array([self.number(cell) for cell in cells.to_pylist()])
        doubtful = np.flatnonzero(~np.isfinite(self._parsed))
        faults = {}
        for row in doubtful:
            cell = cells[int(row)].as_py()
            if not cell and required:
                faults[int(row)] = "is empty; fill it in or drop the line"
            elif required or cell.strip().lower() not in MISSING_NUMBERS:
                faults[int(row)] = f"is {excerpt(cell)}, which is no finite number; correct it or drop the line"
        return faults


class Times(Floats):
    """Collects a column of times: int64 where all are whole numbers, else float64.

    A float64 holds whole numbers up to 2^53 only; nanoseconds since 1970 are beyond that.
    """

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Parse the cells of a block; the faults by row."""
        try:
            self._parsed = whole_numbers(pc.replace_substring_regex(cells, r"^(-?[0-9]+)\.0+$", r"\1")).to_numpy()
            return {}
        except pa.ArrowInvalid:
            faults = super().parse(cells, required)
        numbers = self._parsed.copy()
        for row in np.flatnonzero(np.abs(numbers) >= 2.0**63):
            cell = excerpt(cells[int(row)].as_py())
            faults.setdefault(int(row), f"is {cell}, which is no time; correct it or drop the line")
        numbers[list(faults)] = 0
        if np.all(numbers == np.floor(numbers)):
            self._parsed = numbers.astype(np.int64)
            for row in np.flatnonzero(np.abs(numbers) >= EXACT):
                self._parsed[row] = int(Decimal(cells[int(row)].as_py().strip()))
        return faults

    def finish(self) -> np.ndarray:
        """The whole column.

        Raises:
            ValueError: it has fractions, and whole numbers that a float64 cannot hold beside them.
        """
        kinds = {block.dtype.kind for block in self._blocks}
        if "f" in kinds and any(np.any(np.abs(block) >= EXACT) for block in self._blocks):
            raise ValueError(
                "holds fractions and numbers beyond 2^53, which cannot stand in one column; write whole ones"
            )
        return super().finish()


class TokenLists(Values):
    """Collects a column of lists of tokens."""

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Parse the cells of a block; the faults by row."""
        self._parsed = np.empty(len(cells), dtype=object)
        faults = {}
        for row, cell in enumerate(cells.to_pylist()):
            entries = [entry for entry in cell.split(self._seq_separator) if entry]
            if required and not entries:
                faults[row] = "is empty; fill it in or drop the line"
            elif fault := self.fault(row, entries):
                faults[row] = f"is {excerpt(cell)}, {fault}"
        return faults

    def fault(self, row: int, entries: list[str]) -> str:
        """Keep the entries of a cell, or tell what is wrong with them."""
        self._parsed[row] = np.array(entries, dtype=object)
        return "which holds '[PAD]', RecBole's padding; rename that id" if "[PAD]" in entries else ""


class FloatLists(TokenLists):
    """Collects a column of lists of numbers."""

    def fault(self, row: int, entries: list[str]) -> str:
        """Keep the entries of a cell, or tell what is wrong with them."""
        try:
            self._parsed[row] = np.array(entries, dtype=np.float64)
        except ValueError:
            return "which are no numbers; correct it or drop the line"
        # NumPy would read 1_0 as 10.
        sound = np.all(np.isfinite(self._parsed[row])) and not any("_" in entry for entry in entries)
        return "" if sound else "which are not all finite numbers; correct it or drop the line"


BUILDERS: dict[str, type[Words] | type[Values]] = {
    "token": Words,
    "float": Floats,
    "token_seq": TokenLists,
    "float_seq": FloatLists,
    "time": Times,
}


def whole_numbers(cells: pa.StringArray) -> pa.Int64Array:
    """The whole numbers that cells spell in decimal digits.

    Raises:
        pyarrow.ArrowInvalid: a cell spells none. Arrow itself would read 0x5F as 95.
    """
    if pc.any(pc.or_(pc.starts_with(cells, "0x"), pc.starts_with(cells, "0X"))).as_py():
        raise pa.ArrowInvalid("hexadecimal digits")
    return cells.cast(pa.int64())


def _rows(mask: pa.BooleanArray) -> list[int]:
    return [int(row) for row in np.flatnonzero(mask.to_numpy(zero_copy_only=False))]
