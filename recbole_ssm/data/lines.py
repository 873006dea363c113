"""Text files of any size as blocks of whole lines, and what becomes of a line that cannot be used."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
from tqdm import tqdm

from recbole_ssm.errors import UserError
from recbole_ssm.files import whole

BLOCK = 1 << 24  # bytes that are read at a time
LONGEST = 1 << 26  # bytes of a line; beyond, the file is no text
UNIT = "\x1f"  # stands for a separator that is no single byte, as :: is not


class Source(Protocol):
    """What blocks are read from: a file, a member of an archive, a decompressor."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


@dataclass
class Block:
    """Whole lines of a file: the number of the first of them (from 1), and their bytes; lines end in ``\\n``."""

    first: int
    data: bytes


class BadLines:
    """The lines of a file that cannot be used: the first one is an error, or all are skipped, counted and kept aside.

    Args:
        path: the file, as messages name it.
        mode: ``error`` or ``skip``.
        side: where skipped lines go, each as number, fault and the line itself, separated by tabs. The file appears
            whole when this context ends, and not at all if nothing was skipped or an error ends it.
    """

    def __init__(self, path: Path | str, mode: str = "error", side: Path | None = None) -> None:
        if mode not in ("error", "skip"):
            raise UserError(f"on_bad_lines: must be error or skip, got {mode!r}")
        self.path, self.mode, self.side = path, mode, side
        self.first = ""  # the first fault and its line
        self.numbers = array("q")  # of the lines that were skipped
        self._file: IO[bytes] | None = None
        self._stack = ExitStack()

    def add(self, line: int, fault: str, raw: bytes) -> None:
        """Refuse a line.

        Raises:
            UserError: in mode ``error``.
        """
        if self.mode == "error":
            raise UserError(f"{self.path}, line {line}: {fault}")
        self.first = self.first or f"line {line}: {fault}"
        self.numbers.append(line)
        if self.side is not None:
            if self._file is None:
                self.side.parent.mkdir(parents=True, exist_ok=True)
                temporary = self._stack.enter_context(whole(self.side))
                self._file = self._stack.enter_context(temporary.open("wb"))
            self._file.write(f"{line}\t{fault}\t".encode() + raw + b"\n")

    def __len__(self) -> int:
        return len(self.numbers)

    def __str__(self) -> str:
        kept = f"; they are kept in {self.side}" if self.side else ""
        return f"{self.path}: {len(self):,} lines skipped, the first because {self.first}{kept}"

    def line_of(self, row: int) -> int:
        """Number in the file of the ``row``-th line (from 0) that was read; line 1 is the header."""
        skipped = np.sort(self.numbers)
        return row + 2 + int(np.searchsorted(skipped - np.arange(len(skipped)) - 2, row, side="right"))

    def __enter__(self) -> BadLines:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def progress(what: str, size: int, unit: str = "B") -> tqdm[NoReturn]:
    """A bar that appears on a terminal, and only when the work takes more than a second."""
    return tqdm(total=size, desc=what, unit=unit, unit_scale=True, delay=1, disable=None)


def codec(encoding: str) -> codecs.CodecInfo:
    """The codec of that name.

    Raises:
        UserError: there is none.
    """
    try:
        found = codecs.lookup(encoding)
        "".encode(encoding)  # base64 and its like are codecs, but not of text
    except LookupError as error:
        raise UserError(f"encoding: there is no encoding '{encoding}'; try encoding: latin-1") from error
    return found


def read_blocks(source: Source, path: Path | str, encoding: str = "utf-8", size: int = 0) -> Iterator[Block]:
    """The lines of ``source``, about ``size`` bytes (or 16 MB) at a time; memory is bounded whatever the file holds.

    Lines keep the encoding of the file, except that UTF-16 and UTF-32 become UTF-8 (their bytes hide line ends), that
    ``\\r\\n`` becomes ``\\n`` and that a byte-order mark is passed over.

    Raises:
        UserError: a line is longer than 64 MB, or UTF-16 or UTF-32 is broken.
    """
    wide = codec(encoding).name.startswith(("utf-16", "utf-32"))
    source = _Transcoded(source, path, encoding) if wide else source
    line, rest = 1, b""
    while True:
        read = source.read(size or BLOCK)
        rest += read
        cut = rest.rfind(b"\n") + 1 if read else len(rest)
        if cut:
            data, rest = rest[:cut], rest[cut:]
            if line == 1 and is_utf8(encoding):
                data = data.removeprefix(codecs.BOM_UTF8)
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n")
                data = data if read else data.removesuffix(b"\r")
            if data:
                yield Block(line, data)
                line += data.count(b"\n")
        elif len(rest) > LONGEST:
            raise UserError(f"{path}, line {line}: the line is longer than 64 MB; is this a text file?")
        if not read:
            return


def sound_lines(block: Block, width: int, separator: str, encoding: str, bad: BadLines) -> tuple[bytes, np.ndarray]:
    """The lines of a block that are text in ``width`` columns, and their numbers; the others are refused.

    Args:
        block: lines in ``encoding``.
        width: columns that each line must have.
        separator: between columns.
        encoding: of the block.
        bad: where the others go.

    Returns:
        ``(lines, numbers [lines])``: the lines as UTF-8, each with its ``\\n`` and with one byte between its columns,
        as :func:`split_columns` wants them; and the line numbers.
    """
    coded = separator.encode("utf-8" if is_utf8(encoding) else encoding)
    if _delimiter(separator) == UNIT:
        block = Block(block.first, block.data.replace(coded, UNIT.encode()))
        coded = UNIT.encode()
    data = np.frombuffer(block.data, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if block.data[-1:] != b"\n":
        ends = np.append(ends, len(data))
    starts = np.append(0, ends[:-1] + 1)
    cells = np.diff(np.searchsorted(np.flatnonzero(data == coded[0]), ends), prepend=0) + 1
    control = _lines_with(data, b"\0\r", ends)
    foreign = _undecodable(block.data, len(ends), encoding)
    faulty = (cells != width) | (starts == ends) | control | foreign
    for row in np.flatnonzero(faulty):
        raw = block.data[starts[row] : ends[row]]
        if coded == UNIT.encode():
            raw = raw.replace(coded, separator.encode("utf-8" if is_utf8(encoding) else encoding))
        shown = repr(raw[:60].decode(encoding, "replace"))
        if foreign[row]:
            fault = f"not {encoding} text; set encoding to what the file is written in: {shown}"
        elif not raw.strip():
            fault = "the line is empty; drop it"
        elif control[row]:
            fault = f"a control character within the line: {shown}; drop it"
        else:
            fault = f"{cells[row]} columns where the header has {width}: {shown}; correct the line or drop it"
        bad.add(block.first + int(row), fault, raw)
    sound = block.data
    if faulty.any():
        sound = b"".join(block.data[starts[row] : ends[row]] + b"\n" for row in np.flatnonzero(~faulty))
    if not is_utf8(encoding):
        sound = sound.decode(encoding).encode()
    return sound, block.first + np.flatnonzero(~faulty)


def raw_lines(lines: bytes, separator: str, encoding: str) -> list[bytes]:
    """Sound lines as they stand in their file."""
    if _delimiter(separator) == UNIT:
        lines = lines.replace(UNIT.encode(), separator.encode())
    return (lines if is_utf8(encoding) else lines.decode().encode(encoding)).split(b"\n")


def split_columns(lines: bytes, names: list[str], wanted: list[str], separator: str) -> pa.Table:
    """Sound lines as a table of strings; nothing is quoted and nothing is missing."""
    if lines.startswith(codecs.BOM_UTF8):  # Arrow drops the mark, which is part of an id within a file
        lines = codecs.BOM_UTF8 + lines
    return pyarrow.csv.read_csv(
        pa.BufferReader(lines),
        read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=len(lines) + 1),
        parse_options=pyarrow.csv.ParseOptions(delimiter=_delimiter(separator), quote_char=False),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )


def _delimiter(separator: str) -> str:
    """What stands between the columns of sound lines: the separator if it is one ASCII character, else UNIT."""
    return separator if len(separator) == 1 and separator.isascii() else UNIT


def is_utf8(encoding: str) -> bool:
    """Whether blocks of a file of that encoding are UTF-8."""
    return codec(encoding).name.startswith(("utf-8", "utf-16", "utf-32"))


def _lines_with(data: np.ndarray, characters: bytes, ends: np.ndarray) -> np.ndarray:
    """[lines] whether one of those characters is in the line."""
    found = np.zeros(len(ends), dtype=bool)
    for character in characters:
        found[np.searchsorted(ends, np.flatnonzero(data == character))] = True
    return found


def _undecodable(data: bytes, lines: int, encoding: str) -> np.ndarray:
    """[lines] whether the line is no text in that encoding."""
    name = "utf-8" if is_utf8(encoding) else encoding

    def fails(raw: bytes) -> bool:
        try:
            raw.decode(name)
        except UnicodeDecodeError:
            return True
        return False

    if not fails(data):
        return np.zeros(lines, dtype=bool)
    return np.array([fails(raw) for raw in data.split(b"\n")[:lines]])


class _Transcoded:
    """A source in an encoding whose line ends are no single bytes, as UTF-8."""

    def __init__(self, source: Source, path: Path | str, encoding: str) -> None:
        self._source = source
        self._decoder = codec(encoding).incrementaldecoder()
        self._fault = f"{path}: not {encoding} text; set encoding to what the file is written in"

    def read(self, size: int, /) -> bytes:
        try:
            while True:
                read = self._source.read(size)
                text = self._decoder.decode(read, final=not read)
                if text or not read:
                    return text.encode()
        except UnicodeError as error:
            raise UserError(self._fault) from error
