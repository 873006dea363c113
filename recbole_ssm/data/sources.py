"""The raw downloads of MovieLens and Amazon, and tables with named columns, as rows of text cells.

Whatever the format (separated text, JSON lines, Parquet; plain, gzip or a member of a zip), a source is read in blocks
of bounded memory, and each row keeps the number of its line, so that a fault is named where it stands.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import errno
import gzip
import io
import itertools
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from recbole_ssm.data.lines import (
    BLOCK,
    BadLines,
    Block,
    is_utf8,
    progress,
    raw_lines,
    read_blocks,
    sound_lines,
    split_columns,
)
from recbole_ssm.errors import UserError, did_you_mean

ROWS = 100_000  # rows of a batch, where a format is read row by row
EVENT = ("user", "item", "time", "rating")
# Column names by which a source is known, in the order of EVENT.
KNOWN = {
    "MovieLens": ("userId", "movieId", "timestamp", "rating"),
    "Amazon Reviews 2023": ("user_id", "parent_asin", "timestamp", "rating"),
    "Amazon Reviews 2014 or 2018": ("reviewerID", "asin", "unixReviewTime", "overall"),
    "a table": ("user_id", "item_id", "timestamp", "rating"),
}
ML_100K_ITEM = ("item", "title", "date", "video", "url")
ML_100K_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
# Names of MovieLens' files of ratings -> of items.
MOVIELENS = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}
TEXT, JSON, PARQUET = (".csv", ".tsv", ".txt", ".dat", ".data", ".inter"), (".json", ".jsonl", ".ndjson"), (".parquet",)
ASIN = re.compile(r"[0-9A-Z]{10}")
AMAZON_USER = re.compile(r"A[0-9A-Z]{9,27}")


@dataclass(frozen=True)
class File:
    """A file, or a member of a zip archive; gzip is seen through."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        """Its name without folders and without ``.gz``."""
        return PurePosixPath(self.member or self.path.name).name.removesuffix(".gz")

    @property
    def suffix(self) -> str:
        """The kind of file that its name tells, lower-case."""
        return PurePosixPath(self.name).suffix.lower()

    def beside(self, name: str) -> File | None:
        """The file of that name in the same folder, plain or gzip, or None."""
        if not self.member:
            found = [self.path.with_name(name), self.path.with_name(name + ".gz")]
            return next((File(path) for path in found if path.is_file()), None)
        member = str(PurePosixPath(self.member).with_name(name))
        return File(self.path, member) if member in _members(self.path) else None

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], Callable[[], int], int]]:
        """The bytes of the file, how far its reading has come, and how far it will come.

        Raises:
            UserError: there is no such file, or the archive is damaged.
        """
        try:
            with contextlib.ExitStack() as stack:
                raw: IO[bytes] = stack.enter_context(open(self.path, "rb"))
                size = self.path.stat().st_size
                if self.member:
                    archive = stack.enter_context(zipfile.ZipFile(raw))
                    size = archive.getinfo(self.member).file_size
                    try:
                        raw = stack.enter_context(archive.open(self.member))
                    except RuntimeError as error:  # it is encrypted
                        raise UserError(f"{self}: {error}") from error
                told = raw.tell
                if (self.member or self.path.name).endswith(".gz"):
                    raw = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK))
                yield raw, told, size
        except FileNotFoundError as error:
            raise UserError(f"{self}: {error.strerror}") from error
        except OSError as error:
            if error.errno not in (None, errno.EINVAL):  # GzipFile has no number; a wrong place in a zip is EINVAL
                raise
            raise UserError(f"{self}: damaged or cut short ({error}); get it again") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise UserError(f"{self}: damaged or cut short ({error}); get it again") from error

    def blocks(self, encoding: str) -> Iterator[Block]:
        """Its lines, with a progress bar."""
        with self.open() as (file, told, size), progress(f"Read {self.name}", size) as bar:
            for block in read_blocks(file, str(self), encoding):
                yield block
                bar.update(told() - bar.n)

    def first_line(self, encoding: str) -> str:
        """Its first line, "" for an empty file."""
        with self.open() as (file, _, _):
            block = next(read_blocks(file, str(self), encoding, size=1 << 16), Block(1, b""))
        line = block.data.partition(b"\n")[0]
        try:
            return line.decode("utf-8" if is_utf8(encoding) else encoding)
        except UnicodeError as error:
            raise UserError(f"{self}, line 1: not {encoding} text; set encoding to what it is written in") from error


@dataclass
class Rows:
    """Some rows of a source.

    Attributes:
        cells: one column of strings a field that was asked for; a cell without content is "".
        numbers: [rows] the line of each in the source, from 1.
        lines: gives the whole line of each row, as bytes.
    """

    cells: pa.Table
    numbers: np.ndarray
    lines: Callable[[], Sequence[bytes]]


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
        try:
            cells = next(csv.reader([line], delimiter=self.separator)) if self.quoted else line.split(self.separator)
        except csv.Error as error:
            raise UserError(f"{self.file}, line 1: not a row of cells ({error}): {line[:60]!r}; correct it") from error
        names = tuple(cell.partition(":")[0] if self.file.suffix == ".inter" else cell for cell in cells)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{self.file}, line 1: column '{twice}' stands twice; rename one")
        return names

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows; ``fields`` is ``{field: column}``."""
        names = self.columns()
        blocks = _below(self.file.blocks(self.encoding), 0 if self.names is not None else 1)
        for block in blocks:
            if self.quoted and b'"' in block.data:  # a quoted cell may hold line ends: from here on row by row
                yield from self._quoted(itertools.chain([block], blocks), names, fields, bad)
                return
            lines, numbers = sound_lines(block, len(names), self.separator, self.encoding, bad)
            if len(numbers):
                cells = split_columns(lines, list(names), list(dict.fromkeys(fields.values())), self.separator)
                cells = pa.table({name: cells[column] for name, column in fields.items()})
                yield Rows(cells, numbers, partial(raw_lines, lines, self.separator, self.encoding))

    def _quoted(
        self, blocks: Iterable[Block], names: tuple[str, ...], fields: Mapping[str, str], bad: BadLines
    ) -> Iterator[Rows]:
        lines = _Lines(blocks, "utf-8" if is_utf8(self.encoding) else self.encoding)
        places = {name: names.index(column) for name, column in fields.items()}
        batch = _Batch(fields)
        reader = csv.reader(lines, delimiter=self.separator, strict=True)
        while True:
            lines.since.clear()
            fault = ""
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                fault = f"not a row of cells ({error}); correct it or drop it"
            number = lines.number - len(lines.since) + 1  # a row may take several lines
            raw = b"".join(lines.since).rstrip(b"\n")
            if lines.foreign:
                fault = f"not {self.encoding} text: {raw[:60]!r}; set encoding to what it is written in"
            elif not fault and not row:
                fault = "the line is empty; drop it"
            elif not fault and len(row) != len(names):
                fault = f"{len(row)} columns where the header has {len(names)}: {raw[:60]!r}; correct it or drop it"
            if fault:
                bad.add(number, fault, raw)
            else:
                batch.add(number, raw, [row[place] for place in places.values()])
            lines.foreign = False
            if len(batch) >= ROWS:
                yield batch.rows()
        if len(batch):
            yield batch.rows()


@dataclass
class JsonLines:
    """One JSON object a line; Amazon's metadata of 2014 are Python's literals instead, which are read too, as data."""

    file: File
    encoding: str = "utf-8"

    def columns(self) -> tuple[str, ...]:
        """The keys of its first object."""
        line = self.file.first_line(self.encoding)
        try:
            return tuple(_object(line))
        except ValueError as error:
            raise UserError(f"{self.file}, line 1: no JSON object: {line[:60]!r}") from error

    def objects(self, bad: BadLines) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """``(line number, line, object)`` of each line."""
        for block in self.file.blocks(self.encoding):
            lines = block.data.split(b"\n")
            for number, line in enumerate(lines if lines[-1] else lines[:-1], block.first):
                try:
                    found = _object(line.decode("utf-8" if is_utf8(self.encoding) else self.encoding))
                except ValueError:  # UnicodeDecodeError is one
                    bad.add(number, f"no JSON object: {line[:60]!r}; correct the line or drop it", line)
                else:
                    yield number, line, found

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows; ``fields`` is ``{field: key}``."""
        batch = _Batch(fields)
        for number, line, found in self.objects(bad):
            cells = [_cell(found.get(key)) for key in fields.values()]
            if any(map(_broken, cells)):
                bad.add(number, f"half a character (a lone surrogate): {line[:60]!r}; drop the line", line)
                continue
            batch.add(number, line, cells)
            if len(batch) >= ROWS:
                yield batch.rows()
        if len(batch):
            yield batch.rows()


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
            return tuple(parquet.schema_arrow.names)

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows; ``fields`` is ``{field: column}``. Rows count from 1."""
        start = 1
        with self._open() as parquet, progress(f"Read {self.file.name}", parquet.metadata.num_rows, "rows") as bar:
            for batch in parquet.iter_batches(ROWS, columns=list(dict.fromkeys(fields.values()))):
                batch.validate(full=True)  # that text is text
                cells = pa.table({name: _strings(batch.column(column)) for name, column in fields.items()})
                yield Rows(cells, np.arange(start, start + len(batch)), partial(_shown, cells))
                start += len(batch)
                bar.update(len(batch))


Table = Text | JsonLines | Parquet


@dataclass
class Raw:
    """A raw data set: where its events stand, and where its items are described.

    Attributes:
        kind: what it is, in words.
        events: the table of events. fields: ``{user, item, time, rating: column}``; rating may be absent.
        items: gives ``(item id, {column: text})`` of each described item, or None.
        item_columns: ``{name: type}`` of those descriptions.
        files: all files that are read.
    """

    kind: str
    events: Table
    fields: dict[str, str]
    files: list[File]
    items: Callable[[BadLines], Iterator[tuple[str, dict[str, str]]]] | None = None
    item_columns: dict[str, str] = field(default_factory=dict)
    item_file: File | None = None


def open_raw(source: Path, named: Mapping[str, str], meta: Path | None = None, **reading: str) -> Raw:
    """Find out what a raw data set is.

    Args:
        source: a file, a folder or a zip archive.
        named: the columns that the caller names, ``{user, item, time, rating, text: column}``; they win over ours.
        meta: a file that describes the items (Amazon); by default ``meta_<name of source>`` beside it.
        reading: ``separator`` and ``encoding``, where they are not to be guessed.

    Raises:
        UserError: it is nothing that we know, and how to name its columns.
    """
    file = _find(source)
    if file.name in MOVIELENS and not named and (file.suffix != ".csv" or "movieId" in file.first_line("utf-8")):
        if meta:
            raise UserError(
                f"--meta: MovieLens describes its items itself, in {MOVIELENS[file.name]}; drop --meta {meta}"
            )
        return _movielens(file)
    table = _table(file, reading)
    columns = table.columns()
    kind, known = "a table", None
    for kind, names in KNOWN.items():  # noqa: B007
        if set(names[:3]) <= set(columns):
            known = {part: name for part, name in zip(EVENT, names) if name in columns}
            break
    fields = {**(known or {}), **{part: name for part, name in named.items() if part in EVENT}}
    there = f"there are {', '.join(columns)}"
    for part, name in named.items():
        if name not in columns:
            raise UserError(f"--{part}: {file} has no column '{name}' ({there}{did_you_mean(name, columns)})")
    if missing := [part for part in EVENT[:3] if part not in fields]:
        raise UserError(f"{file}: name its columns by --{', --'.join(missing)} ({there})")
    raw = Raw(kind if not named else "a table", table, {part: fields[part] for part in EVENT if part in fields}, [file])
    if "text" in named and meta:
        raise UserError(f"--text {named['text']} and --meta {meta} both describe the items; give one of them")
    if "text" in named:
        raw.items, raw.item_columns = _texts(table, fields["item"], named["text"]), {"title": "token_seq"}
        raw.item_file = file
        return raw
    described = _find(meta) if meta else _metadata(file)
    if described and described.suffix in JSON:
        raw.items = _amazon_items(JsonLines(described))
        raw.item_columns = {"title": "token_seq", "categories": "token_seq", "brand": "token"}
        raw.item_file = described
        raw.files.append(described)
    elif meta:
        raise UserError(f"--meta: {meta} is no JSON file; Amazon's metadata are named meta_<category>.json or .jsonl")
    return raw


def seconds(cell: str) -> float:
    """A time as a number: the number itself, or the seconds since 1970 of an ISO date (UTC unless it says otherwise).

    Raises:
        ValueError: it is neither.
    """
    try:
        return float("nan") if "_" in cell else float(cell)
    except ValueError:
        date = datetime.fromisoformat(re.sub("Z$", "+00:00", cell.strip()))
        return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()


def _find(source: Path) -> File:
    """The one file of events in a folder or an archive, or the file itself."""
    if not source.exists():
        raise UserError(f"{source}: No such file or directory")
    if source.is_dir():
        found = [File(path) for path in sorted(source.rglob("*")) if path.is_file()]
    elif source.suffix == ".zip":
        found = [File(source, name) for name in _members(source)]
    else:
        return File(source)
    found = [file for file in found if not file.name.startswith((".", "meta_")) and "__MACOSX" not in str(file)]
    likely = [file for file in found if file.name in MOVIELENS] or [
        file for file in found if file.suffix in (*JSON, *PARQUET, ".csv", ".tsv", ".inter")
    ]
    if len(likely) != 1:
        several = [file.name for file in likely or found]
        names = ", ".join(several[:8] + ["..."] * (len(several) > 8)) or "nothing"
        raise UserError(f"{source}: which file holds the interactions? it has {names}; name one as the source")
    return likely[0]


def _members(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as content:
            return [name for name in content.namelist() if not name.endswith("/")]
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise UserError(f"{archive}: no zip archive, or one that is cut short ({error}); get it again") from error


def _movielens(file: File) -> Raw:
    """MovieLens by the names of its files: 100K has u.data, 1M and 10M ratings.dat, all others ratings.csv."""
    described = file.beside(MOVIELENS[file.name])
    names = KNOWN["MovieLens"]
    ordered = (names[0], names[1], names[3], names[2])
    columns: tuple[str, ...] | None
    if file.name == "u.data":
        events, cut, columns = Text(file, "\t", ordered), "|", (*ML_100K_ITEM, *ML_100K_GENRES)
    elif file.name == "ratings.dat":
        events, cut, columns = Text(file, "::", ordered), "::", ("item", "title", "genres")
    else:
        events, cut, columns = Text(file, ",", quoted=True), ",", None
    raw = Raw("MovieLens", events, dict(zip(EVENT, names)), [file])
    if described:
        with described.open() as (content, _, _):
            text = content.read()
        try:
            text.decode()
            encoding = "utf-8"
        except UnicodeDecodeError:  # 100K and 1M
            encoding = "latin-1"
        table = Text(described, cut, columns, quoted=columns is None, encoding=encoding)
        raw.items, raw.item_file = _movies(table), described
        raw.item_columns = {"movie_title": "token_seq", "release_year": "token", "genre": "token_seq"}
        raw.files.append(described)
    return raw


def _movies(table: Text) -> Callable[[BadLines], Iterator[tuple[str, dict[str, str]]]]:
    names = table.columns()
    wanted = dict(zip(("item", "title", "genres"), names if table.names else ("movieId", "title", "genres")))
    if "Western" in names:  # 100K: a column for each genre
        wanted = {name: name for name in (*ML_100K_ITEM[:2], *ML_100K_GENRES)}
    if absent := [name for name in wanted.values() if name not in names]:
        raise UserError(f"{table.file}, line 1: no column '{absent[0]}'; MovieLens has movieId,title,genres")

    def items(bad: BadLines) -> Iterator[tuple[str, dict[str, str]]]:
        for rows in table.rows(wanted, bad):
            for item, title, *genres in zip(*(column.to_pylist() for column in rows.cells.columns)):
                year = ""
                if dated := re.fullmatch(r"(.*\S)\s*\((\d{4})\)\s*", title):
                    title, year = dated.groups()
                if len(genres) > 1:
                    genres = [genre for genre, flag in zip(ML_100K_GENRES, genres) if flag == "1"]
                else:
                    genres = genres[0].replace("(no genres listed)", "").split("|")
                yield item, {"movie_title": title, "release_year": year, "genre": " ".join(genres)}

    return items


def _amazon_items(table: JsonLines) -> Callable[[BadLines], Iterator[tuple[str, dict[str, str]]]]:
    def items(bad: BadLines) -> Iterator[tuple[str, dict[str, str]]]:
        for number, line, found in table.objects(bad):
            item = found.get("parent_asin") or found.get("asin")
            if not isinstance(item, str):
                bad.add(number, "neither parent_asin nor asin; correct the line or drop it", line)
                continue
            groups = found.get("categories") or found.get("category")
            paths = groups if isinstance(groups, list) else []
            names = [name for path in paths for name in (path if isinstance(path, list) else [path])]  # 2014: of paths
            yield (
                item,
                {
                    "title": _cell(found.get("title")),
                    "categories": ", ".join(dict.fromkeys(map(str, names))),
                    "brand": _cell(found.get("brand") or found.get("store")),
                },
            )

    return items


def _texts(table: Table, item: str, text: str) -> Callable[[BadLines], Iterator[tuple[str, dict[str, str]]]]:
    def items(bad: BadLines) -> Iterator[tuple[str, dict[str, str]]]:
        for rows in table.rows({"item": item, "text": text}, bad):
            for name, title in zip(*(rows.cells[column].to_pylist() for column in ("item", "text"))):
                yield name, {"title": title}

    return items


def _metadata(file: File) -> File | None:
    """Amazon's description of the items of a category, where it stands beside the reviews or ratings."""
    category = re.sub(r"^(reviews|ratings)_|_5$", "", PurePosixPath(file.name).stem)
    found = (file.beside(f"meta_{category}{suffix}") for suffix in JSON)
    return next((described for described in found if described), None)


def _table(file: File, reading: Mapping[str, str]) -> Table:
    encoding = reading.get("encoding") or "utf-8"
    if file.suffix in PARQUET:
        return Parquet(file)
    if file.suffix in JSON:
        return JsonLines(file, encoding)
    if file.suffix not in TEXT:
        kinds = ", ".join((*TEXT, *JSON, *PARQUET))
        raise UserError(f"{file}: what file is this? known are {kinds}, each also as .gz or within a .zip")
    line = file.first_line(encoding)
    separator = reading.get("separator") or max("\t", ",", ";", "|", key=line.count)
    quoted = file.suffix != ".inter" and len(separator) == 1
    text = Text(file, separator, None, quoted=quoted, encoding=encoding)
    cells = line.split(separator)
    if len(cells) == 4 and re.fullmatch(r"[0-9.]+", cells[2]) and re.fullmatch(r"[0-9]+", cells[3]):
        text.names = _amazon_ratings(file, cells)
    return text


def _amazon_ratings(file: File, cells: list[str]) -> tuple[str, ...]:
    """The columns of Amazon's ratings without a header: user first in 2014, item first in 2018."""
    _, _, time, rating = KNOWN["Amazon Reviews 2014 or 2018"]
    user_first, item_first = (
        bool(AMAZON_USER.fullmatch(user) and ASIN.fullmatch(item)) for user, item in (cells[:2], cells[1::-1])
    )
    if user_first == item_first:
        raise UserError(
            f"{file}, line 1: no header, and {cells[0]!r} and {cells[1]!r} do not tell user from item; write a header "
            "line and name its columns by --user and --item"
        )
    return ("reviewerID", "asin", rating, time) if user_first else ("asin", "reviewerID", rating, time)


def _object(line: str) -> dict[str, Any]:
    """The object that a line of JSON, or of Python's literals, spells.

    Raises:
        ValueError: it spells none.
    """
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:
        try:
            found = ast.literal_eval(line.strip())
        except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError("neither JSON nor a Python literal") from error
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def _cell(value: Any) -> str:
    """A JSON value as a cell: text as it is, numbers as they are spelt, nothing as ""."""
    if value is None or isinstance(value, (dict, list, bool)):
        return ""
    return value if isinstance(value, str) else repr(value)


def _broken(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _strings(column: pa.Array) -> pa.StringArray:
    """A column of Parquet as text; dates and times as seconds since 1970."""
    kind = column.type
    if pa.types.is_temporal(kind):
        column = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return pa.array([repr(value / 1e6) if value is not None else "" for value in column.to_pylist()], pa.string())
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type):
        return pa.array([""] * len(column), pa.string())
    return column.cast(pa.string()).fill_null("")


def _shown(cells: pa.Table) -> list[bytes]:
    return ["\t".join(row).encode() for row in zip(*(column.to_pylist() for column in cells.columns))]


def _below(blocks: Iterator[Block], header: int) -> Iterator[Block]:
    """The blocks without their first ``header`` lines."""
    for block in blocks:
        if header and block.first == 1:
            block = Block(2, block.data.partition(b"\n")[2])
        if block.data:
            yield block


class _Lines:
    """Feeds decoded lines to the csv module, and remembers those that the row at hand took."""

    def __init__(self, blocks: Iterable[Block], encoding: str) -> None:
        self._blocks, self._encoding = blocks, encoding
        self._lines = self._each()
        self.number = 0
        self.since: list[bytes] = []
        self.foreign = False

    def _each(self) -> Iterator[str]:
        for block in self._blocks:
            self.number = self.number or block.first - 1
            for line in io.BytesIO(block.data):
                self.number += 1
                self.since.append(line)
                try:
                    yield line.decode(self._encoding)
                except UnicodeDecodeError:
                    self.foreign = True
                    yield line.decode(self._encoding, "replace")

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def __next__(self) -> str:
        return next(self._lines)


class _Batch:
    """Rows that are read one by one."""

    def __init__(self, fields: Iterable[str]) -> None:
        self._columns: dict[str, list[str]] = {name: [] for name in fields}
        self._numbers: list[int] = []
        self._raw: list[bytes] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, raw: bytes, cells: Iterable[str]) -> None:
        self._numbers.append(number)
        self._raw.append(raw)
        for column, cell in zip(self._columns.values(), cells):
            column.append(cell)

    def rows(self) -> Rows:
        """What was added since the last call."""
        cells = pa.table({name: pa.array(column, pa.string()) for name, column in self._columns.items()})
        rows = Rows(cells, np.array(self._numbers), self._raw.copy)
        self.__init__(self._columns)  # type: ignore[misc]
        return rows
