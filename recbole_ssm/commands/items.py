"""What a run's data set says of the items of its checkpoint: titles and categories."""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_ssm.data.atomic import read_header
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.llm.titles import entries_of_items, read_titles

CATEGORY_FIELDS = ("categories", "category", "genres", "genre", "class")
"""Names of columns that may hold categories, in the order in which they are looked for."""


def titles_of(config: Any, items: Sequence[str], title_field: str | None = None) -> dict[str, str] | None:
    """``{item token: title}``, where the data set of the run has titles.

    Args:
        config: of the run.
        items: tokens by id; the first is the padding's.
        title_field: the column; None takes the configuration's, or one whose name says so.

    Raises:
        UserError: there are none in the column that was asked for.
    """
    if not title_field and not _file(config).is_file():
        how = "recbole-ssm convert --meta=FILE or --text=COLUMN writes it"
        getLogger().warning(f"the items have no titles: there is no file {_file(config)}; {how}")
        return None
    try:
        return dict(zip(items, read_titles(config, items, title_field)))
    except UserError as error:
        if title_field:
            raise
        getLogger().warning(f"the items have no titles: {error}")
        return None


def categories_of(config: Any, field: str | None = None) -> dict[str, list[str]]:
    """``{category: its item tokens}``, where the data set of the run has categories.

    A text such as ``Games, Puzzles`` is cut at its commas; where no cell has a comma, at the separator of lists.

    Args:
        config: of the run.
        field: the column; None takes the first of :data:`CATEGORY_FIELDS` that is there.

    Raises:
        UserError: there is no column of that name.
    """
    path, item_field, encoding = _file(config), config["ITEM_ID_FIELD"], config["encoding"] or "utf-8"
    if not path.is_file():
        if field is None:
            return {}
        raise UserError(f"--category_field: there is no file {path}")
    header = read_header(path, config["field_separator"], encoding)
    names = [name for name, kind in header.items() if kind.startswith("token") and name != item_field]
    if field is None:
        field = next((name for name in CATEGORY_FIELDS if name in names), None)
        if field is None:
            return {}
    if field not in names:
        raise UserError(f"--category_field: {path} has no column {field} of text{did_you_mean(field, names)}")
    separator = config["seq_separator"]
    entries = entries_of_items(path, field, header[field], config)
    texts = {item: separator.join(parts) for item, parts in entries.items()}
    mark = "," if any("," in text for text in texts.values()) else separator
    found: dict[str, list[str]] = {}
    for item, text in texts.items():
        for name in dict.fromkeys(part.strip() for part in text.split(mark)):
            if name:
                found.setdefault(name, []).append(item)
    return found


def _file(config: Any) -> Path:
    return Path(config["data_path"], f"{config['dataset']}.item")
