"""What a raw data set says of its items: a table of them, Amazon's metadata, or a column of the events."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging import getLogger

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_ssm.data.archives import File
from recbole_ssm.data.atomic import EXACT
from recbole_ssm.data.json_lines import JsonLines
from recbole_ssm.data.lines import BadLines
from recbole_ssm.data.tables import Table, cell_of
from recbole_ssm.errors import UserError, did_you_mean, excerpt, listed

# An item's id, and what is said of it: ``{column: text}``.
Described = tuple[str, dict[str, str]]


@dataclass
class Descriptions:
    """What a raw data set says of its items.

    Attributes:
        file: where it stands.
        columns: ``{name: type}``, as in the header of an atomic file.
        read: gives each item that is described.
    """

    file: File
    columns: dict[str, str]
    read: Callable[[BadLines], Iterator[Described]]


def whole_table(table: Table, item: str) -> Descriptions:
    """Any table of items; all of its columns are kept."""
    columns = table.columns()
    if item not in columns:
        there = f"there are {listed(columns)}{did_you_mean(item, columns)}"
        raise UserError(f"--meta_item: {table.file} has no column '{item}' ({there})")
    index = [name for name in columns if re.fullmatch(r"(Unnamed: \d+(\.\d+)*)?", name)]
    for name in index:
        getLogger().warning(f"{table.file}: column {excerpt(name)}, as pandas writes its index, is left out")
    names = {name: name for name in columns if name not in (item, *index)}
    if isinstance(table, JsonLines):
        table.single = (item,)
    kinds = dict.fromkeys(names, 0)
    for rows in table.rows(names, BadLines(str(table.file), "skip")) if names else ():
        for name in names:
            kinds[name] = max(kinds[name], kind_of(rows.cells[name].combine_chunks()))
    kinds |= {name: KINDS.index(kind) for name, kind in table.nested().items() if name in names}

    def read(bad: BadLines) -> Iterator[Described]:
        for rows in table.rows({"": item, **names}, bad):
            for name, *cells in zip(*(column.to_pylist() for column in rows.cells.columns)):
                yield name, dict(zip(names, cells))

    return Descriptions(table.file, {name: KINDS[kind] or "token" for name, kind in kinds.items()}, read)


def texts(table: Table, item: str, text: str) -> Descriptions:
    """The column of a table of events that describes the items."""

    def read(bad: BadLines) -> Iterator[Described]:
        for rows in table.rows({"item": item, "text": text}, bad):
            for name, title in zip(*(rows.cells[column].to_pylist() for column in ("item", "text"))):
                yield name, {"title": title}

    return Descriptions(table.file, {"title": "token_seq"}, read)


def amazon_items(table: JsonLines) -> Descriptions:
    """Amazon's metadata of a category."""

    def read(bad: BadLines) -> Iterator[Described]:
        for number, line, found in table.objects(bad):
            item = found.get("parent_asin") or found.get("asin")
            if not isinstance(item, str):
                bad.add(number, "neither parent_asin nor asin; correct the line or drop it", line)
                continue
            # In 2014 the categories are a list of paths, each of which is a list.
            names: list[str] = []
            groups = found.get("categories") or found.get("category")
            for path in groups if isinstance(groups, list) else []:
                names += map(str, path if isinstance(path, list) else [path])
            brand = found.get("brand") or found.get("store")
            categories = ", ".join(dict.fromkeys(names))
            yield item, {"title": cell_of(found.get("title")), "categories": categories, "brand": cell_of(brand)}

    return Descriptions(table.file, {"title": "token_seq", "categories": "token_seq", "brand": "token"}, read)


# What a column may be, each the more general; "" is one without content.
KINDS = ("", "float", "token", "token_seq")


def kind_of(cells: pa.StringArray) -> int:
    """What some cells of a column are, as an index of :data:`KINDS`.

    Numbers are ``float``, but not those with zeros before them, nor those that a float64 would merge; words with spaces
    between them are ``token_seq``, but the JSON of an object is one ``token``.
    """
    cells = pc.utf8_trim_whitespace(cells)
    cells = cells.filter(pc.not_equal(cells, ""))
    if not len(cells):
        return 0
    words = pc.match_substring_regex(cells, r"\s")
    if pc.any(pc.and_not(words, pc.match_substring_regex(cells, r'^\{".*\}$'))).as_py():
        return 3
    try:
        sizes = np.abs(cells.cast(pa.float64()).to_numpy())
    except pa.ArrowInvalid:
        return 2
    # Of what Arrow takes for a number, the reader of atomic files knows no -nan.
    other = pc.any(pc.match_substring_regex(cells, "^[+-]?0[0-9]|[+-]nan", ignore_case=True)).as_py()
    return 2 if other or np.any(sizes >= EXACT) else 1
