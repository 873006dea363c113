"""The titles of a catalogue, by item id.

They are read straight from the .item file. Through RecBole's load_col that file would add items
without a single event to the catalogue (177 of them in ml-1m), and another ranking would be
measured.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_ssm.data.atomic import Tokens, read_configured, read_header
from recbole_ssm.data.names import name_titles, title_column
from recbole_ssm.data.outline import item_tokens
from recbole_ssm.errors import UserError, did_you_mean


def titles_of(dataset: Any, config: Any) -> list[str]:
    """The title of each item of a data set.

    White space is made single and HTML entities become characters (Amazon's titles are full of
    both). An item without a title, or without a line in the file, gets its token for one; how
    many is logged.

    Args:
        dataset: a data set whose ids are assigned, or the catalogue of a checkpoint, which
            holds its titles.
        config: ``title_field`` names the column; empty takes the first of
            :data:`recbole_ssm.data.names.TITLES` that is there.

    Returns:
        Titles by internal item id; id 0, the padding, has the empty one.

    Raises:
        UserError: there is no .item file, no such column in it, or not one title.
    """
    kept = vars(dataset).get("titles")
    if kept is not None:
        return list(kept)
    return read_titles(config, item_tokens(dataset))


def read_titles(config: Any, tokens: Sequence[str], title_field: str | None = None) -> list[str]:
    """:func:`titles_of` items that are named by their tokens, of which the first is the padding's.

    ``title_field`` wins over the configuration's.
    """
    path = Path(config["data_path"]) / f"{config['dataset']}.item"
    item_field, separator, encoding = config["ITEM_ID_FIELD"], config["field_separator"], config["encoding"] or "utf-8"
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file, and {config['model']} reads titles from it; write one with the columns "
            f"{item_field}:token and title:token_seq"
        )
    header = read_header(path, separator, encoding)
    if item_field not in header:
        raise UserError(f"{path}, line 1: no column {item_field}:token (there are {', '.join(header)})")
    field = _title_field(path, header, title_field or config["title_field"], item_field)
    found = entries_of_items(path, field, header[field], config)
    titles = [" ".join(html.unescape(" ".join(found.get(token, ()))).split()) for token in tokens[1:]]
    missing = titles.count("")
    if missing == len(titles):
        raise UserError(
            f"{path}: its column {field} has no title for any of the {missing} items; add --title_field=COLUMN, with "
            "another one"
        )
    if missing:
        getLogger().warning(f"{path}: {missing} of {len(titles)} items have no {field}; their ids stand for them")
    return ["", *(title or token for title, token in zip(titles, tokens[1:]))]


def _title_field(path: Path, header: dict[str, str], wanted: str | None, item_field: str) -> str:
    text = [name for name, kind in header.items() if kind.startswith("token") and name != item_field]
    there = f"its columns of text are {', '.join(text) or 'none'}"
    if wanted is None:
        known = title_column(text)
        if known is None:
            raise UserError(f"{path}, line 1: no column of titles ({there}); {name_titles(text)}")
        return known
    if wanted not in text:
        raise UserError(f"title_field: {path} has no column {wanted} of text{did_you_mean(wanted, text)} ({there})")
    return wanted


def entries_of_items(path: Path, field: str, kind: str, config: Any) -> dict[str, list[str]]:
    """``{item token: entries}`` of a column of text; the first line of each item counts, as where models read features.

    Args:
        path: the .item file.
        field: the column.
        kind: its type, ``token`` or ``token_seq``; a token is one entry, and an empty cell has none.
        config: names the column of the items, and says how files are read.
    """
    item_field = config["ITEM_ID_FIELD"]
    columns, _ = read_configured(path, {item_field: "token", field: kind}, config, required=(item_field,))
    cells = columns[field]
    if isinstance(cells, Tokens):
        cells = [[] if isinstance(cell, float) else [cell] for cell in cells.objects()]
    found: dict[str, list[str]] = {}
    for item, entries in zip(columns[item_field].objects(), cells):
        found.setdefault(item, list(entries))
    return found
