"""JSON lines as a table, and Amazon's metadata of 2014, which are Python's literals."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recbole_ssm.data.archives import File
from recbole_ssm.data.lines import MOST_COLUMNS, BadLines, original
from recbole_ssm.data.tables import CONTAINERS, Row, Rows, batches, cell_of
from recbole_ssm.errors import UserError, excerpt

# Bytes of a line of JSON, and of one of Python's literals, which take four hundred times their size to be read.
LONGEST_OBJECT = 1 << 22
LONGEST_LITERAL = 1 << 18
# Objects of a table of events whose keys are its columns.
FIRST = 10_000


@dataclass
class JsonLines:
    """One JSON object a line; Amazon's metadata of 2014 are Python's literals instead, which are read too, as data.

    Attributes:
        file: where it stands.
        encoding: of the file.
        single: keys under which a list or an object is a fault of its line.
        whole: its columns are the keys of all objects, and not of the first :data:`FIRST` alone.
    """

    file: File
    encoding: str = "utf-8"
    single: Collection[str] = ()
    whole: bool = False

    def columns(self) -> tuple[str, ...]:
        """Its keys, in the order in which they appear."""
        return tuple(self._kinds)

    def kinds(self) -> dict[str, str]:
        """The keys under which it has lists, which become ``token_seq``, or objects: ``token``."""
        kinds = {key: kind for key, kind in self._kinds.items() if issubclass(kind, CONTAINERS)}
        return {key: "token_seq" if kind is list else "token" for key, kind in kinds.items()}

    @cached_property
    def _kinds(self) -> dict[str, type]:
        """Each key and the class of the first of its values that is not null."""
        line = self.file.first_line(self.encoding)
        try:
            _object(line)
        except ValueError as error:
            raise UserError(
                f"{self.file}, line 1: no JSON object: {line[:60]!r}; write one a line, as pandas does by "
                "to_json(orient='records', lines=True)"
            ) from error
        kinds: dict[str, type] = {}
        objects = self.objects(BadLines(str(self.file), "skip"))
        for _, _, found in itertools.islice(objects, None if self.whole else FIRST):
            for key, value in found.items():
                if kinds.setdefault(key, type(None)) is type(None):
                    kinds[key] = type(value)
            if len(kinds) > MOST_COLUMNS:
                raise UserError(f"{self.file}: more than {MOST_COLUMNS:,} keys; a row must be an object, not a key")
        return kinds

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
        yield from batches(self._sound(fields, bad), fields)

    def _sound(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Row]:
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
    if not isinstance(found, dict) or not all(isinstance(key, str) and not _broken(key) for key in found):
        raise ValueError("no object whose keys are text")
    return found


def _broken(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
