"""``recbole-ssm convert``: a raw download becomes a checked data set, with a card that says what was done to it.

Nothing of the source is changed, and the data set appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recbole_ssm import __version__
from recbole_ssm.data.atomic import TYPES, read_header
from recbole_ssm.data.events import Events, places, without_repeats
from recbole_ssm.data.events import k_core as rows_of_core
from recbole_ssm.data.lines import BadLines, check_separator
from recbole_ssm.data.names import EVENT, check_names, name_titles, no_column, title_column
from recbole_ssm.data.reading import read_events
from recbole_ssm.data.sources import Raw, open_raw
from recbole_ssm.data.writing import write_descriptions, write_inter
from recbole_ssm.errors import ArgumentParser, UserError, excerpt, listed
from recbole_ssm.files import FORMER, LITTER, digest, exchange, folder_beside, recover, write_json

TIES = "events of one user and one time keep the order of the source"
DUPLICATES = ("keep", "same_time", "first", "last")
FILE_ORDER = "the source has no times; they count each user's events in the order of the file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", type=Path, help="file, folder or zip: MovieLens, Amazon Reviews, text, JSON, Parquet")
    parser.add_argument(
        "--name", "--dataset", required=True, help="of the data set that is written: OUT/NAME/NAME.inter ..."
    )
    parser.add_argument(
        "--out", "--data_path", type=Path, default=Path("dataset"), help="folder of data sets (default: dataset/)"
    )
    for field in (*EVENT, "text"):
        what = {"text": "words that describe an item, for .item"}.get(field, f"{field} (default: guessed)")
        parser.add_argument(
            f"--{field}", metavar="COLUMN", help=f"the column with the {what}: its name, or without a header its place"
        )
    parser.add_argument("--sequences", action="store_true", help="each line is USER ITEM ITEM ..., oldest first")
    parser.add_argument("--file_order", action="store_true", help="there are no times; take the order of the file")
    parser.add_argument(
        "--time_format",
        default="",
        metavar="FORM",
        help="of dates, such as '%%d.%%m.%%Y %%H:%%M:%%S' or '%%m/%%d/%%Y %%I:%%M %%p' (AM and PM)",
    )
    parser.add_argument(
        "--keep", default="", metavar="COLUMN[:TYPE],...", help="further columns for .inter; types are guessed"
    )
    parser.add_argument(
        "--meta",
        type=Path,
        metavar="FILE",
        help="a table of the items, for .item (default: meta_... beside SOURCE, or the .item beside an .inter)",
    )
    parser.add_argument("--meta_item", metavar="COLUMN", help="of the items' ids in --meta (default: guessed)")
    parser.add_argument(
        "--k_core", type=int, default=0, metavar="K", help="keep users and items with K events, repeated"
    )
    parser.add_argument("--user_core", type=int, metavar="K", help="another K for users (default: --k_core)")
    parser.add_argument("--item_core", type=int, metavar="K", help="another K for items (default: --k_core)")
    parser.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        default="keep",
        help="of events of one user and one item, keep all (default), one of those at the same time, or only the first "
        "or the last by time",
    )
    parser.add_argument(
        "--on_bad_lines",
        choices=("error", "skip"),
        default="error",
        help="a line that cannot be used stops the command (default), or is skipped, counted and kept in NAME.skipped",
    )
    parser.add_argument("--overwrite", action="store_true", help="put the data set in the place of one that is there")
    parser.add_argument("--separator", help="between columns of text (default: guessed)")
    parser.add_argument("--encoding", default="utf-8", help="of text; a file in UTF-8 is read as such (default: utf-8)")


def main(arguments: Sequence[str]) -> None:
    """Run the command and print what became of the data at each step."""
    parser = ArgumentParser("recbole-ssm convert", __doc__)
    add_arguments(parser)
    options = parser.parse_args(list(arguments))
    card = convert(**vars(options))
    print(f"columns: {', '.join(f'{part} {column}' for part, column in card['columns'].items())}")
    for step in card["steps"]:
        print("{step:<34}{users:>12,} users{items:>12,} items{interactions:>14,} interactions".format(**step))
    first, last = card["steps"][0], card["steps"][-1]
    users, items = (first[what] - last[what] for what in ("users", "items"))
    if users or items:
        lost = "nothing is recommended to these users, nor these items to anybody"
        print(f"{users:,} users and {items:,} items are left out: {lost}")
    if card["described_items"]:
        print(f"{card['described_items']:,} of the items are described")
    if card["contradicting_descriptions"]:
        print(f"{card['contradicting_descriptions']:,} of them again in other words; the first description counts")
    if card["described_items"]:
        print(titles_in(options.out, options.name))
    if card["skipped_lines"]:
        print(f"{card['skipped_lines']:,} lines were skipped; they are in {options.out / options.name}")
    print(f"wrote {options.out / options.name}: {', '.join(card['written'])} and the card, {options.name}.card.json")
    print(f"look at it: recbole-ssm inspect {options.name} --data_path={options.out}")


def titles_in(out: Path, name: str) -> str:
    """Which column of a data set's .item file is taken for its titles, in words."""
    header = read_header(out / name / f"{name}.item")
    text = [column for column, kind in header.items() if kind.startswith("token") and column != "item_id"]
    if found := title_column(text):
        # Beside a second column only a name decides.
        why = "" if title_column([*text, ""]) else ", the only column of text"
        return f"titles: {found}{why}"
    return (
        f"no column of titles (of text: {listed(text) or 'none'}); to recommend with them, or for a language model, "
        f"{name_titles(text)}"
    )


def convert(
    source: str | Path,
    name: str,
    out: str | Path = Path("dataset"),
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    rating: str | None = None,
    text: str | None = None,
    sequences: bool = False,
    file_order: bool = False,
    time_format: str = "",
    keep: str = "",
    meta: str | Path | None = None,
    meta_item: str | None = None,
    k_core: int = 0,
    user_core: int | None = None,
    item_core: int | None = None,
    duplicates: str = "keep",
    on_bad_lines: str = "error",
    overwrite: bool = False,
    separator: str | None = None,
    encoding: str = "utf-8",
) -> dict[str, Any]:
    """Write ``out/name/`` with ``name.inter``, ``name.item`` where the source describes its items, and the card.

    Args:
        source: what :func:`recbole_ssm.data.sources.open_raw` knows.
        name: of the data set.
        out: the folder of data sets.
        user: the column of users; None guesses, here and in the next three.
        item: the column of items.
        time: the column of times.
        rating: the column of ratings.
        text: the column of words that describe an item, for ``.item``.
        sequences: each line of the source is a user and the items of the user, oldest first.
        file_order: the source has no times; each user's events are counted from 1 in the order of the file.
        time_format: how its dates are written, as of :meth:`datetime.datetime.strptime`; "" knows those of ISO 8601.
        keep: further columns for ``.inter``, as ``"price:float,shop"``; a type that is not given is guessed.
        meta: a file that describes the items.
        meta_item: its column of item ids; None guesses.
        k_core: keep users and items with so many events, until all have them; 0 or 1 keeps all. After ``duplicates``,
            as in RecBole.
        user_core: of users, if not ``k_core``.
        item_core: of items, if not ``k_core``.
        duplicates: ``keep``; ``same_time`` for one event of each user, item and time, where there are times; or
            ``first`` or ``last`` of each pair of user and item.
        on_bad_lines: ``error``, or ``skip``.
        overwrite: a data set of that name goes, once the new one is whole; nothing but what this function wrote.
        separator: between columns; None guesses.
        encoding: of each text that is not UTF-8.

    Returns:
        The card, as written to ``name.card.json``.

    Raises:
        UserError: the source is missing, unknown or faulty; the data set is there already; or nothing would remain.
    """
    if not re.fullmatch(r"[\w][\w.\-]*", name):
        raise UserError(f"--name: {name!r} is no name of a folder; use letters, digits, - and _")
    cores = checked_cores(k_core, user_core, item_core)
    if duplicates not in DUPLICATES:
        raise UserError(f"--duplicates: must be {', '.join(DUPLICATES)}, got {excerpt(duplicates)}")
    order = "--sequences" if sequences else "--file_order" if file_order else ""
    if order and time_format:
        raise UserError(f"--time_format: with {order} there are no times; leave it out")
    if order and duplicates == "same_time":
        raise UserError(f"--duplicates=same_time: with {order} there are no times; use --duplicates=first")
    target = Path(out, name)
    recover(target)
    check_target(target, overwrite)
    named = {"user": user, "item": item, "time": time, "rating": rating, "text": text}
    asked = {field: column for field, column in named.items() if column is not None}
    if separator is not None:
        separator = separator.replace("\\t", "\t")
        check_separator("--separator", separator)
    raw = open_raw(
        Path(source),
        asked,
        None if meta is None else Path(meta),
        meta_item,
        sequences=sequences,
        file_order=file_order,
        encoding=encoding,
        separator=separator,
    )
    kept = columns_to_keep(raw, keep)
    check_descriptions(raw, kept, "--text" if "text" in asked else "--meta")
    if inside := [file for file in raw.files if target.resolve() in file.path.resolve().parents]:
        raise UserError(f"--overwrite: {inside[0]} is read, and would go with {target}; choose another --name")

    target.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(target) as temporary:
        scratch = temporary / name
        scratch.mkdir()
        with BadLines(str(raw.events.file), on_bad_lines, scratch / f"{name}.skipped") as bad:
            events, digits = read_events(raw, bad, kept, time_format)
        events, steps = filtered(events, duplicates, *cores)
        if not len(events):
            raise UserError(f"{raw.events.file}: {steps[-1]['step']} leaves nothing; choose a smaller --k_core")
        if "time" not in raw.fields:
            # Counted again, because the filters left gaps.
            events = replace(events, times=places(events.users.codes))
        events = events.take(events.by_user_and_time())
        write_inter(scratch / f"{name}.inter", events, digits, kept)
        counts = write_descriptions(scratch, raw, events, on_bad_lines)
        counts["skipped_lines"] += len(bad)
        times = [int(time) / 10**digits if digits else int(time) for time in (events.times.min(), events.times.max())]
        card = card_of(raw, scratch, steps, counts, times)
        write_json(scratch / f"{name}.card.json", card)
        # Another process may have made a data set of that name meanwhile.
        check_target(target, overwrite)
        exchange(scratch, target, temporary / FORMER if overwrite else None)
    return card


def checked_cores(k_core: int, user_core: int | None, item_core: int | None) -> tuple[int, int]:
    """How many events a user needs, and how many an item: ``k_core``, where there is no number of their own.

    Raises:
        UserError: one is negative.
    """
    cores = (k_core if user_core is None else user_core, k_core if item_core is None else item_core)
    for key, core in (("k_core", k_core), ("user_core", cores[0]), ("item_core", cores[1])):
        if core < 0:
            raise UserError(f"--{key}: must be 0 or more, got {core}")
    return cores


def card_of(
    raw: Raw, folder: Path, steps: list[dict[str, Any]], counts: Mapping[str, int], times: Sequence[float]
) -> dict[str, Any]:
    """The card of a data set: what its files in a folder were made of and how; ``times`` are the first and the last."""
    return {
        "name": folder.name,
        "source": [{"file": str(file), **_content(file.path)} for file in raw.files],
        "kind": raw.kind,
        "columns": raw.fields,
        "steps": steps,
        **counts,
        "ties": TIES if "time" in raw.fields else FILE_ORDER,
        "time": dict(zip(("first", "last"), times)),
        "written": {path.name: _content(path) for path in sorted(folder.iterdir())},
        "by": f"recbole_ssm {__version__}",
    }


def _content(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a data set may be written to a folder.

    Raises:
        UserError: it is there already, or something that :func:`convert` did not write is to be overwritten.
    """
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} is there already, and stays as it is; say --overwrite or choose another --name")
    card = target / f"{target.name}.card.json"
    try:
        written = {name: content["sha256"] for name, content in json.loads(card.read_bytes())["written"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"--overwrite: {target} is none of convert's data sets; remove it or choose another --name"
        ) from error
    for path in sorted(target.iterdir()):
        if path != card and path.name not in LITTER and not (path.is_file() and written.get(path.name) == digest(path)):
            raise UserError(
                f"--overwrite: {target} holds {path.name}, which convert did not write, or which was changed since; "
                "move it away or choose another --name"
            )


def columns_to_keep(raw: Raw, keep: str) -> dict[str, str]:
    """``"price:float,shop"`` as ``{column: type}``; "" is a type to be guessed.

    Raises:
        UserError: the source has no such column, there is no such type, or the header would hold a name twice.
    """
    kept: dict[str, str] = {}
    columns, known = raw.events.columns(), raw.events.kinds()
    for entry in filter(None, keep.split(",")):
        column, colon, kind = entry.rpartition(":") if entry not in columns else (entry, "", "")
        column = column if colon else entry
        if column not in columns:
            raise no_column("--keep", raw.events.file, column, columns)
        if colon and kind not in TYPES:
            raise UserError(f"--keep: {column} has type {excerpt(kind)}; known are {listed(TYPES)}")
        kept[column] = kind if colon else known.get(column, "")
    check_names("--keep", [*raw.columns, *kept])
    return kept


def check_descriptions(raw: Raw, kept: Mapping[str, str], option: str) -> None:
    """Make sure that no column of ``.item`` is called as one of ``.inter``: RecBole would put the item's value there.

    Raises:
        UserError: one is; ``option`` says where the items are described.
    """
    if raw.items is None:
        return
    events, columns = {*raw.columns, *kept} - {"item_id"}, raw.items.columns
    if both := [name for name in columns if name in events]:
        raise UserError(
            f"{option}: {excerpt(both[0])} would be a column of the items and of the events, and RecBole would put the "
            f"items' in place of the events'; rename it in {raw.items.file}"
        )
    check_names(option, ["item_id", *columns])


def filtered(events: Events, duplicates: str, user_core: int, item_core: int) -> tuple[Events, list[dict[str, Any]]]:
    """The events that the filters leave, and what each step left."""
    steps: list[dict[str, Any]] = [{"step": "read", **events.counts()}]
    if duplicates != "keep":
        events = events.take(without_repeats(events, duplicates))
        same = "first of each user, item and time"
        kept = same if duplicates == "same_time" else f"{duplicates} of each user and item"
        steps.append({"step": kept, **events.counts()})
    if max(user_core, item_core) > 1:
        events = events.take(rows_of_core(events.users.codes, events.items.codes, user_core, item_core))
        cores = {"users": user_core, "items": item_core}
        own = ", ".join(f"{core}-core of {what}" for what, core in cores.items() if core > 1)
        step = f"{user_core}-core" if user_core == item_core else own
        steps.append({"step": step, **events.counts()})
    return events, steps
