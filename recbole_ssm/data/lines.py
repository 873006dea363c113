"""Text files of any size as blocks of whole lines, and what becomes of a line that cannot be used."""

from __future__ import annotations

import codecs
import csv
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv

from recbole_ssm.console import progress_bar
from recbole_ssm.errors import UserError
from recbole_ssm.files import whole

if TYPE_CHECKING:
    from tqdm.auto import tqdm

# Bytes that are read at a time. A block of nothing but line ends takes fifty times its size for a moment.
BLOCK = 1 << 22
# Bytes of the longest line; a file with a longer one is no text.
LONGEST = 1 << 24
# Bytes of the longest first line, which names the columns, and how many it may name.
LONGEST_HEADER = 1 << 20
MOST_COLUMNS = 10_000
# One that a block does not hold stands for a separator that is no single byte, as :: is not.
STAND_INS = [chr(code) for code in (*range(31, 27, -1), *range(1, 9), 11, 12, *range(14, 28))]


class Source(Protocol):
    """What blocks are read from: a file, a member of an archive, a decompressor."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


@dataclass
class Block:
    """Whole lines of a file in UTF-8, each with its ``\\n``, and the number of the first of them (from 1)."""

    first: int
    data: bytes


class BadLines:
    """The lines of a file that cannot be used: the first one is an error, or all are skipped, counted and kept aside.

    Args:
        path: the file, as messages name it.
        mode: ``error`` or ``skip``.
        side: where skipped lines go, each as number, fault and the line itself, separated by tabs. The file appears
            whole when this context ends, and not at all if nothing was skipped or an error ends it.

    Attributes:
        first: the first fault and its line.
        numbers: the numbers of the lines that were skipped.
    """

    def __init__(self, path: Path | str, mode: str = "error", side: Path | None = None) -> None:
        if mode not in ("error", "skip"):
            raise UserError(f"on_bad_lines: must be error or skip, got {mode!r}")
        self.path, self.mode, self.side = path, mode, side
        self.first = ""
        self.numbers = array("q")
        self._file: IO[bytes] | None = None
        self._stack = ExitStack()

    def add(self, line: int, fault: str, raw: bytes) -> None:
        """Refuse a line, or all lines of a row that takes several; ``line`` is then the number of the first.

        Raises:
            UserError: in mode ``error``.
        """
        if self.mode == "error":
            raise UserError(f"{self.path}, line {line}: {fault}")
        if line in self.numbers[-1:]:
            # One line of a sequence holds many events, and so may hold many faults.
            return
        self.first = self.first or f"line {line}: {fault}"
        lines = raw.split(b"\n")
        self.numbers.extend(range(line, line + len(lines)))
        if self.side is not None:
            if self._file is None:
                self.side.parent.mkdir(parents=True, exist_ok=True)
                temporary = self._stack.enter_context(whole(self.side))
                self._file = self._stack.enter_context(temporary.open("wb"))
            for number, content in enumerate(lines, line):
                self._file.write(f"{number}\t{fault}\t".encode() + content + b"\n")

    def __len__(self) -> int:
        return len(self.numbers)

    def __str__(self) -> str:
        kept = f"; they are kept in {self.side}" if self.side else ""
        return f"{self.path}: {len(self):,} lines skipped, the first because {self.first}{kept}"

    def line_of(self, row: int) -> int:
        """The number in the file of the ``row``-th line (from 0) that was read; line 1 is the header."""
        skipped = np.sort(self.numbers)
        return row + 2 + int(np.searchsorted(skipped - np.arange(len(skipped)) - 2, row, side="right"))

    def __enter__(self) -> BadLines:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def progress(what: str, size: int, unit: str = "B") -> tqdm[Any]:
    """A bar that appears on a terminal, and only when the work takes more than a second."""
    return progress_bar(total=size, desc=what, unit=unit, unit_scale=True, delay=1)


def read_blocks(
    source: Source, path: Path | str, encoding: str = "utf-8", size: int = 0, longest: int = 0
) -> Iterator[Block]:
    """The lines of ``source`` as UTF-8, about ``size`` bytes (or 4 MB) at a time, whatever the file holds.

    ``\\r\\n`` becomes ``\\n``, and a byte-order mark is passed over. Bytes that are no text in ``encoding`` become
    bytes that are no UTF-8, so that :func:`sound_lines` finds them.

    Raises:
        UserError: a line is longer than ``longest`` (or 16 MB), or UTF-16 or UTF-32 is broken.
    """
    pieces = iter(lambda: source.read(size or BLOCK), b"")
    if not is_utf8(encoding):
        pieces = _as_utf8(pieces, path, encoding)
    longest = longest or LONGEST
    line = 1
    waiting: list[bytes] = []
    # An empty piece stands for the end of the file.
    for piece in itertools.chain(pieces, [b""]):
        cut = piece.rfind(b"\n") + 1
        if cut or not piece:
            data = b"".join([*waiting, piece[:cut]])
            waiting = []
            if line == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n")
                data = data if piece else data.removesuffix(b"\r")
            if data:
                yield Block(line, data)
                line += data.count(b"\n")
        waiting.append(piece[cut:])
        if sum(map(len, waiting)) > longest:
            raise UserError(f"{path}, line {line}: the line is longer than {longest >> 20} MB; is this a text file?")


def first_line(source: Source, path: Path | str, encoding: str = "utf-8") -> str:
    """The first line of ``source`` without its end; "" for an empty file.

    Raises:
        UserError: it is no text in that encoding, or longer than 1 MB.
    """
    block = next(read_blocks(source, path, encoding, size=1 << 16, longest=LONGEST_HEADER), Block(1, b""))
    try:
        return block.data.partition(b"\n")[0].decode()
    except UnicodeDecodeError as error:
        wide = block.data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise UserError(f"{path}, line 1: {not_text(encoding, 'utf-16' if wide else 'latin-1')}") from error


def split_header(line: str, separator: str, path: Path | str, quoted: bool = False) -> list[str]:
    """The cells of a first line; ``quoted`` ones may hold the separator, and have no blanks around them.

    Raises:
        UserError: there are more than anybody names, or a quotation mark stands wrong.
    """
    if line.count(separator) >= MOST_COLUMNS:
        raise UserError(f"{path}, line 1: more than {MOST_COLUMNS:,} columns; is the separator right?")
    if not (quoted and line):
        return line.split(separator)
    try:
        cells = csv.reader([line], delimiter=separator, strict=True, skipinitialspace=separator != " ")
        return [cell.strip() for cell in next(cells)]
    except csv.Error as error:
        if separator == "\t":
            return line.split(separator)
        raise UserError(f"{path}, line 1: not a row of cells ({error}): {line[:60]!r}; correct it") from error


def check_separator(key: str, separator: str) -> None:
    """Make sure that a separator can stand within a line.

    Raises:
        UserError: it is empty, holds a line end or a NUL, or is no text.
    """
    fault = "must not be empty; a tab is written '\\t'" if not separator else ""
    if set(separator) & set("\n\r\0"):
        fault = f"must stand within a line, got {separator!r}"
    try:
        separator.encode()
    except UnicodeEncodeError:
        fault = f"must be text, got {separator!r}"
    if fault:
        raise UserError(f"{key}: {fault}")


def below_header(blocks: Iterator[Block]) -> Iterator[Block]:
    """The blocks without their first line."""
    for block in blocks:
        if block.first == 1:
            block = Block(2, block.data.partition(b"\n")[2])
        if block.data:
            yield block


@dataclass
class Lines:
    """Lines that are text in the right number of columns.

    Attributes:
        data: the lines as UTF-8, each with its ``\\n``, with ``delimiter`` between their columns.
        numbers: [lines] their numbers in the file.
        delimiter: the one byte that takes the place of the separator.
        separator: what the file has between columns.
        encoding: of the file.
    """

    data: bytes
    numbers: np.ndarray
    delimiter: str
    separator: str
    encoding: str

    def columns(self, names: Sequence[str], wanted: Sequence[str]) -> pa.Table:
        """The wanted ones of the columns as strings; nothing is quoted and nothing is missing."""
        data = self.data
        if data.startswith(codecs.BOM_UTF8):
            # Arrow drops a byte-order mark, which is a part of an id where it does not open the file.
            data = codecs.BOM_UTF8 + data
        return pyarrow.csv.read_csv(
            pa.BufferReader(data),
            read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=len(data) + 1),
            parse_options=pyarrow.csv.ParseOptions(delimiter=self.delimiter, quote_char=False),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )

    def raw(self) -> list[bytes]:
        """The lines as they stand in the file."""
        lines = self.data.replace(self.delimiter.encode(), self.separator.encode())
        return [original(line, self.encoding) for line in lines.split(b"\n")]


def sound_lines(block: Block, width: int, separator: str, encoding: str, bad: BadLines) -> Lines:
    """The lines of a block that are text in ``width`` columns; the others are refused.

    Args:
        block: lines as of :func:`read_blocks`.
        width: columns that each line must have.
        separator: between columns.
        encoding: of the file.
        bad: where the others go.
    """
    content, delimiter = block.data, separator
    if len(separator) > 1 or not separator.isascii():
        delimiter = next((mark for mark in STAND_INS if mark.encode() not in content), "")
        if not delimiter:
            # All are there, so the lines with the first of them are refused, as those with a NUL are.
            delimiter = STAND_INS[0]
            content = content.replace(delimiter.encode(), b"\0")
        content = content.replace(separator.encode(), delimiter.encode())
    data = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if content[-1:] != b"\n":
        ends = np.append(ends, len(data))
    starts = np.append(0, ends[:-1] + 1)
    cells = np.diff(np.searchsorted(np.flatnonzero(data == ord(delimiter)), ends), prepend=0) + 1
    control = _lines_with(data, b"\0\r", ends)
    foreign = _undecodable(content, len(ends))
    faulty = (cells != width) | (starts == ends) | control | foreign
    for row in np.flatnonzero(faulty):
        raw = content[starts[row] : ends[row]].replace(delimiter.encode(), separator.encode())
        shown = repr(raw[:60].decode(errors="replace"))
        if foreign[row]:
            fault = f"{not_text(encoding)}: {shown}"
        elif not raw.strip():
            fault = "the line is empty; drop it"
        elif control[row]:
            fault = f"a control character within the line: {shown}; drop it"
        else:
            fault = f"{cells[row]} columns where the header has {width}: {shown}; correct the line or drop it"
        bad.add(block.first + int(row), fault, original(raw, encoding))
    if faulty.any():
        content = b"".join(content[starts[row] : ends[row]] + b"\n" for row in np.flatnonzero(~faulty))
    return Lines(content, block.first + np.flatnonzero(~faulty), delimiter, separator, encoding)


def is_utf8(encoding: str) -> bool:
    """Whether that is a name of UTF-8.

    Raises:
        UserError: there is no such encoding.
    """
    try:
        found = codecs.lookup(encoding)
        # base64 and its like are codecs too, but not of text
        "".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise UserError(f"encoding: there is no encoding '{encoding}'; try encoding: latin-1") from error
    return found.name.startswith("utf-8")


def original(line: bytes, encoding: str) -> bytes:
    """A line of a block in the encoding of its file, but UTF-16 and UTF-32 stay UTF-8."""
    if is_utf8(encoding) or is_wide(encoding):
        return line
    try:
        return line.decode("utf-8", "surrogatepass").encode(encoding, "surrogateescape")
    except UnicodeError:
        return line


def is_wide(encoding: str) -> bool:
    """Whether that is a name of UTF-16 or UTF-32."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def not_text(encoding: str, other: str = "latin-1") -> str:
    """The fault of bytes that are no text in an encoding, but perhaps in another."""
    return f"not {encoding} text; set encoding to what the file is written in, such as --encoding={other}"


def _lines_with(data: np.ndarray, characters: bytes, ends: np.ndarray) -> np.ndarray:
    """[lines] whether one of those characters is in the line."""
    found = np.zeros(len(ends), dtype=bool)
    for character in characters:
        found[np.searchsorted(ends, np.flatnonzero(data == character))] = True
    return found


def _undecodable(data: bytes, lines: int) -> np.ndarray:
    """[lines] whether the line is no UTF-8."""

    def fails(raw: bytes) -> bool:
        try:
            raw.decode()
        except UnicodeDecodeError:
            return True
        return False

    if not fails(data):
        return np.zeros(lines, dtype=bool)
    return np.array([fails(raw) for raw in data.split(b"\n")[:lines]])


def _as_utf8(pieces: Iterable[bytes], path: Path | str, encoding: str) -> Iterator[bytes]:
    """Text in another encoding as UTF-8; each byte that is no text becomes a lone surrogate, which is no UTF-8."""
    try:
        for text in codecs.iterdecode(pieces, encoding, "strict" if is_wide(encoding) else "surrogateescape"):
            yield text.encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise UserError(f"{path}: {not_text(encoding)}") from error
