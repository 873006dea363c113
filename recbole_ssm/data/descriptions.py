"""What a raw data set says of its items: a table of them, Amazon's metadata, or a column of the events."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from logging import getLogger

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_ssm.data.archives import File
from recbole_ssm.data.atomic import BUILDERS, EXACT
from recbole_ssm.data.json_lines import JsonLines
from recbole_ssm.data.lines import BadLines
from recbole_ssm.data.tables import Table, cell_of
from recbole_ssm.errors import excerpt, listed

# The columns that pandas writes for its index.
INDEX = re.compile(r"(Unnamed: \d+(\.\d+)*|__index_level_\d+__)?")
# What is read of Amazon's metadata.
AMAZON_ITEM = ("parent_asin", "asin", "title", "categories", "category", "brand", "store")
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
    """Any table of items; all of its columns are kept.

    Args:
        table: the table.
        item: its column of item ids.
    """
    if isinstance(table, JsonLines):
        table = replace(table, single=(item,), whole=True)
    columns = table.columns()
    index = [name for name in columns if INDEX.fullmatch(name) and name != item]
    for name in index:
        getLogger().warning(f"{table.file}: column {excerpt(name)}, as pandas writes its index, is left out")
    names = {name: name for name in columns if name not in (item, *index)}
    kinds, given = dict.fromkeys(names, 0), table.kinds()
    for rows in table.rows(names, BadLines(str(table.file), "skip")) if names else ():
        for name in names:
            cells = rows.cells[name].combine_chunks()
            kinds[name] = max(kinds[name], kind_of(cells))
            if given.get(name, "") in ("float", "float_seq") and BUILDERS[given[name]](" ").parse(cells, False):
                # An .item whose cells are not what its header says.
                del given[name]
    types = {name: given.get(name) or KINDS[kind] or "token" for name, kind in kinds.items()}
    return Descriptions(table.file, types, described_by(table, item, names))


def described_by(table: Table, item: str, names: Mapping[str, str]) -> Callable[[BadLines], Iterator[Described]]:
    """What reads the descriptions in a table; ``names`` is ``{column of .item: column of the table}``."""

    def read(bad: BadLines) -> Iterator[Described]:
        for rows in table.rows({"": item, **names}, bad):
            for name, *cells in zip(*(column.to_pylist() for column in rows.cells.columns)):
                yield name, dict(zip(names, cells))

    return read


def amazon_items(table: JsonLines) -> Descriptions:
    """Amazon's metadata of a category, of which title, categories and brand are kept."""
    if others := [name for name in table.columns() if name not in AMAZON_ITEM]:
        getLogger().warning(
            f"{table.file}: of Amazon's metadata title, categories and brand are kept; {listed(others, 8)} go; with "
            "--meta and --meta_item all columns stay as they are"
        )

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
