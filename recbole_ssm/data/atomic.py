"""Reading RecBole's atomic files, with every fault named by file, line, value and mend.

RecBole's own reader shifts columns where a line has one too many, drops real ids such as ``NA``, merges lines between
quotation marks and fills what it cannot read; all silently.
"""

from __future__ import annotations

import csv
from collections.abc import Container
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_ssm.errors import UserError, did_you_mean

TYPES = ("token", "token_seq", "float", "float_seq")


def read_header(path: Path, separator: str = "\t", encoding: str = "utf-8") -> dict[str, str]:
    """The columns of an atomic file, ``{name: type}`` in file order.

    Raises:
        UserError: the file is missing, empty or not text, or its first line is no header.
    """
    try:
        with open(path, encoding=_without_mark(encoding), newline="") as file:
            line = file.readline().rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except LookupError as error:
        raise UserError(f"encoding: there is no encoding '{encoding}'; try encoding: latin-1") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line 1: not {encoding} text; set encoding to what the file is written in") from error
    if not line:
        raise UserError(f"{path}: the file is empty; its first line must name the columns, as user_id:token")
    columns: dict[str, str] = {}
    for cell in line.split(separator):
        name, colon, kind = cell.partition(":")
        if not colon or not name:
            hint = "; is field_separator right?" if len(line.split(separator)) == 1 else ""
            raise UserError(f"{path}, line 1: column '{cell[:60]}' must read name:type, as user_id:token{hint}")
        if kind not in TYPES:
            raise UserError(f"{path}, line 1: column {name} has type '{kind}'; known are {', '.join(TYPES)}")
        if name in columns:
            raise UserError(f"{path}, line 1: column {name} stands twice; keep one")
        columns[name] = kind
    return columns


def read_atomic(
    path: Path,
    columns: dict[str, str],
    *,
    required: Container[str] = (),
    separator: str = "\t",
    seq_separator: str = " ",
    encoding: str = "utf-8",
) -> pd.DataFrame:
    """Read the given columns of an atomic file.

    Args:
        path: the file.
        columns: ``{name: type}`` of the columns wanted, a part of :func:`read_header`.
        required: columns in which no cell may be empty; a float there must be finite.
        separator: between columns.
        seq_separator: between the entries of a sequence.
        encoding: of the text; a byte-order mark is passed over.

    Returns:
        One column a field, in the order of ``columns``: tokens as ``str`` (missing: NaN), floats as float64, sequences
        as arrays. Tokens such as ``NA`` and quotation marks are kept as they stand.

    Raises:
        UserError: the first fault, with its line.
    """
    header = read_header(path, separator, encoding)
    _check_lines(path, len(header), separator, encoding)
    frame = pd.read_csv(
        path,
        sep=separator,
        names=list(header),
        usecols=list(columns),
        header=None,
        skiprows=1,
        index_col=False,
        dtype=object,
        quoting=csv.QUOTE_NONE,
        keep_default_na=False,
        na_filter=False,
        skip_blank_lines=False,
        encoding=_without_mark(encoding),
        engine="c",
    )[list(columns)]
    if frame.empty:
        raise UserError(f"{path}: there is a header but no line below it")
    for name, kind in columns.items():
        cells = frame[name]
        empty = (cells == "").to_numpy()
        if name in required and empty.any():
            raise UserError(f"{path}, line {_line(empty)}: {name} is empty; fill it in or drop the line")
        if kind == "float":
            frame[name] = _floats(path, name, cells, empty, name in required)
        elif kind == "token":
            padding = (cells == "[PAD]").to_numpy()
            if padding.any():
                raise UserError(f"{path}, line {_line(padding)}: {name} is '[PAD]', RecBole's padding; rename that id")
            frame[name] = cells.where(~empty, np.nan)
        else:
            entries = [[entry for entry in cell.split(seq_separator) if entry] for cell in cells]
            frame[name] = _sequences(path, name, kind, entries)
    return frame


def require_column(path: Path, header: dict[str, str], key: str, name: str, kind: str) -> None:
    """Check that the column which config key ``key`` names is in the file and of the right type.

    Raises:
        UserError: it is not; the message lists the columns there are.
    """
    if name not in header:
        there = f"there are {', '.join(header)}{did_you_mean(name, header)}"
        raise UserError(f"{path}, line 1: no column {name}:{kind} ({there}); rename one, or set {key}")
    if header[name] != kind:
        raise UserError(f"{path}, line 1: column {name} must be {name}:{kind}, got {name}:{header[name]}")


def _without_mark(encoding: str) -> str:
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def _line(faults: np.ndarray) -> int:
    """Line number of the first fault; line 1 is the header."""
    return int(np.flatnonzero(faults)[0]) + 2


def _check_lines(path: Path, width: int, separator: str, encoding: str) -> None:
    """Every line must have as many cells as the header: pandas would shift, cut or fill silently."""
    number = 1
    try:
        with open(path, encoding=_without_mark(encoding), newline="\n") as file:
            for number, line in enumerate(file, 1):
                cells = line.count(separator) + 1
                if cells != width:
                    if not line.strip():
                        raise UserError(f"{path}, line {number}: the line is empty; drop it")
                    raise UserError(
                        f"{path}, line {number}: {cells} columns where the header has {width}: {line[:60]!r}"
                    )
                if "\0" in line or "\r" in line[:-2]:
                    raise UserError(f"{path}, line {number}: a control character within the line: {line[:60]!r}")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, after line {number}: not {encoding} text; set encoding to what the file is written in"
        ) from error


def _floats(path: Path, name: str, cells: pd.Series, empty: np.ndarray, required: bool) -> np.ndarray:
    values = pd.to_numeric(cells.where(~empty, "nan"), errors="coerce").to_numpy(dtype=np.float64, copy=True)
    known_nan = empty | cells.str.lower().isin(["nan", "na", "null", "none"]).to_numpy()
    faults = (np.isnan(values) & ~known_nan) | np.isinf(values)
    if required:
        faults |= np.isnan(values)
    if faults.any():
        line = _line(faults)
        raise UserError(
            f"{path}, line {line}: {name} is {cells.iloc[line - 2]!r}, which is no finite number; correct it"
        )
    return values


def _sequences(path: Path, name: str, kind: str, entries: list[list[str]]) -> pd.Series:
    if kind == "token_seq":
        rows = [np.array(row, dtype=object) for row in entries]
    else:
        rows = []
        for number, row in enumerate(entries, 2):
            try:
                rows.append(np.array(row, dtype=np.float64))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {name} is {' '.join(row)!r}, which are no numbers") from error
    column = np.empty(len(rows), dtype=object)
    column[:] = rows
    return pd.Series(column)
