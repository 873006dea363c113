"""A file to read, wherever it lies: plain, compressed by gzip, or a member of a zip archive."""

from __future__ import annotations

import codecs
import contextlib
import errno
import gzip
import io
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from recbole_ssm.data.lines import BLOCK, Block, first_line, is_utf8, is_wide, progress, read_blocks
from recbole_ssm.errors import UserError

LARGEST_DICTIONARY = 1 << 28
"""Bytes; what an archive packed by LZMA may ask for."""
# What reading an archive raises that is damaged, or packed in a way that is not known here.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError)


@dataclass(frozen=True)
class File:
    """A file, or a member of a zip archive; what is compressed by gzip is read decompressed."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        """Its name without folders and without ``.gz``."""
        return re.sub(r"\.gz$", "", PurePosixPath(self.member or self.path.name).name, flags=re.IGNORECASE)

    @property
    def suffix(self) -> str:
        """The ending of that name, in lower case: the kind of file."""
        return PurePosixPath(self.name).suffix.lower()

    def beside(self, name: str) -> File | None:
        """The file of that name in the same folder, plain or compressed, or None."""
        if self.member:
            member = str(PurePosixPath(self.member).with_name(name))
            return File(self.path, member) if member in members(self.path) else None
        found = [self.path.with_name(name), self.path.with_name(name + ".gz")]
        return next((File(path) for path in found if path.is_file()), None)

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], Callable[[], int], int]]:
        """The file, a function that says how far it has been read, and how far it will be.

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
                    self._check_dictionary(raw, archive.getinfo(self.member))
                    try:
                        raw = stack.enter_context(archive.open(self.member))
                    except RuntimeError as error:
                        # The member is encrypted.
                        raise UserError(f"{self}: {error}") from error
                position = raw.tell
                if (self.member or self.path.name).lower().endswith(".gz"):
                    raw = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK))
                yield raw, position, size
        except FileNotFoundError as error:
            raise UserError(f"{self}: {error.strerror}") from error
        except OSError as error:
            # Errors of GzipFile have no number, and a wrong place within a zip is EINVAL; others are the disk's.
            if error.errno not in (None, errno.EINVAL):
                raise
            raise UserError(f"{self}: damaged or cut short ({error}); get it again") from error
        except DAMAGED as error:
            raise UserError(f"{self}: damaged or cut short ({error}); get it again") from error

    def _check_dictionary(self, raw: IO[bytes], member: zipfile.ZipInfo) -> None:
        """Refuse a member whose decompression by LZMA would take more memory than a table needs."""
        if member.compress_type != zipfile.ZIP_LZMA:
            return
        # Behind the local header and its two texts: the version, the size of the properties, and the properties.
        raw.seek(member.header_offset + 26)
        raw.seek(sum(struct.unpack("<HH", raw.read(4))), os.SEEK_CUR)
        dictionary = int.from_bytes(raw.read(9)[5:], "little")
        if dictionary > LARGEST_DICTIONARY:
            raise UserError(
                f"{self}: asks for {dictionary >> 20:,} MiB to be decompressed, and {LARGEST_DICTIONARY >> 20} may be "
                "asked for; pack it by deflate"
            )

    def blocks(self, encoding: str) -> Iterator[Block]:
        """Its lines as of :func:`recbole_ssm.data.lines.read_blocks`, with a progress bar."""
        with self.open() as (file, position, size), progress(f"Read {self.name}", size) as bar:
            for block in read_blocks(file, str(self), encoding):
                yield block
                bar.update(position() - bar.n)

    def first_line(self, encoding: str) -> str:
        """Its first line, "" for an empty file."""
        with self.open() as (file, _, _):
            return first_line(file, str(self), encoding)

    def utf8_or(self, encoding: str) -> str:
        """``utf-8`` where the file is that, and else the encoding.

        A file of nothing but ASCII proves nothing: so texts in ISO-2022-JP look, and in other encodings of 7 bits.
        """
        if is_utf8(encoding):
            return encoding
        ascii = not is_wide(encoding)
        with self.open() as (file, _, _):
            try:
                for text in codecs.iterdecode(iter(lambda: file.read(BLOCK), b""), "utf-8"):
                    ascii = ascii and text.isascii()
                    if "\0" in text:
                        # So UTF-16 looks that is read as UTF-8.
                        return encoding
            except UnicodeDecodeError:
                return encoding
        return encoding if ascii else "utf-8"


def members(archive: Path) -> list[str]:
    """The names of the files in a zip archive.

    Raises:
        UserError: it is none, or it is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            return [name for name in content.namelist() if not name.endswith("/")]
    except (*DAMAGED, ValueError, OverflowError) as error:
        raise UserError(f"{archive}: no zip archive, or one that is cut short ({error}); get it again") from error
