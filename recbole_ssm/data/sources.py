"""What a raw data set is: the downloads of MovieLens and Amazon, or a table whose columns are named."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path, PurePosixPath

from recbole_ssm.data import movielens
from recbole_ssm.data.archives import File, members
from recbole_ssm.data.atomic import Floats
from recbole_ssm.data.descriptions import Descriptions, amazon_items, described_by, whole_table
from recbole_ssm.data.json_lines import JsonLines
from recbole_ssm.data.lines import BadLines, split_header
from recbole_ssm.data.movielens import MOVIELENS
from recbole_ssm.data.names import EVENT, KNOWN, WHAT, no_column, only_column
from recbole_ssm.data.parquet import Parquet
from recbole_ssm.data.tables import Table
from recbole_ssm.data.text_tables import ATOMIC, Sequences, Text
from recbole_ssm.data.times import is_time
from recbole_ssm.errors import UserError, excerpt, listed

# Separators in the order in which they are preferred; one that stands in no first line leaves white space.
SEPARATORS = ("\t", ",", ";", "|", "\x01", "::")
TEXT = (".csv", ".tsv", ".txt", ".dat", ".data", *ATOMIC)
JSON, PARQUET = (".json", ".jsonl", ".ndjson"), (".parquet",)
ASIN = re.compile(r"[0-9A-Z]{10}")
AMAZON_USER = re.compile(r"A[0-9A-Z]{9,27}")


@dataclass
class Raw:
    """A raw data set.

    Attributes:
        kind: what it is, in words.
        events: the table of its events.
        fields: ``{user, item, time, rating: column}``; rating may be absent, and time where the order is the file's.
        items: what it says of its items, if anything.
        guessed: nobody named the rating, so a cell of it that is no number is no fault.
    """

    kind: str
    events: Table
    fields: dict[str, str]
    items: Descriptions | None = None
    guessed: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns of ``.inter`` that are made of the fields."""
        return ["user_id", "item_id", "timestamp", *(["rating"] if "rating" in self.fields else [])]

    @property
    def files(self) -> list[File]:
        """All files that are read, the events first."""
        events = self.events.file
        items = self.items.file if self.items else events
        same = items.member == events.member and items.path.samefile(events.path)
        return [events] if same else [events, items]


def open_raw(
    source: Path,
    named: Mapping[str, str],
    meta: Path | None = None,
    meta_item: str | None = None,
    *,
    sequences: bool = False,
    file_order: bool = False,
    separator: str | None = None,
    encoding: str = "utf-8",
    items: bool = True,
) -> Raw:
    """Find out what a raw data set is.

    Args:
        source: a file, a folder or a zip archive.
        named: the columns that the caller names, ``{user, item, time, rating, text: column}``; they win over ours. All
            of them numbers: the file has no header, and these are the places of the columns, from 1.
        meta: a file that describes the items; by default what stands beside SOURCE, ``.item`` beside an ``.inter`` or
            Amazon's ``meta_<name of source>``.
        meta_item: the column of item ids in that file.
        sequences: each line is a user and the items of the user.
        file_order: there are no times; events are in the order of the file.
        separator: between the columns of the events; None guesses.
        encoding: of each text that is not UTF-8.
        items: what is said of the items is looked for.

    Raises:
        UserError: it is nothing that we know; the message says how to name its columns.
    """
    file = _find(source)
    given = ("--meta", str(meta)) if meta else ("--meta_item", meta_item) if meta_item else ()
    if sequences:
        if named or file.suffix not in TEXT:
            raise UserError(f"--sequences: each line of a text file is a user and items, so no column is named: {file}")
        raw = Raw("sequences", Sequences(file, separator, file.utf8_or(encoding)), {"user": "user", "item": "item"})
    elif not file_order and _is_movielens(file, named, encoding):
        if given:
            raise UserError(
                f"{given[0]}: MovieLens describes its items itself, in {MOVIELENS[file.name]}; drop {' '.join(given)}"
            )
        ratings, films = movielens.tables_of(file, encoding, items)
        raw = Raw("MovieLens", ratings, dict(zip(EVENT, KNOWN["MovieLens"])), films)
    else:
        raw = _raw_table(file, named, file_order, separator, encoding)
    raw.guessed = "rating" not in named
    if separator and separator != getattr(raw.events, "separator", None):
        raise UserError(f"--separator: {file} ({raw.kind}) needs none; drop --separator {separator}")
    if "text" in named and given:
        raise UserError(f"--text {named['text']} and {' '.join(given)} both describe the items; give one of them")
    if "text" in named:
        read = described_by(raw.events, raw.fields["item"], {"title": named["text"]})
        raw.items = Descriptions(file, {"title": "token_seq"}, read)
    elif items and raw.items is None:
        raw.items = _meta(file, raw.fields["item"], meta, meta_item, encoding)
    return raw


def _is_movielens(file: File, named: Mapping[str, str], encoding: str) -> bool:
    """Whether it is a file of MovieLens' ratings, whose columns are called as the caller calls them."""
    if file.name not in MOVIELENS:
        return False
    own = dict(zip(EVENT, KNOWN["MovieLens"]))
    line = file.first_line(file.utf8_or(encoding))
    if file.suffix == ".csv":
        return named.items() <= own.items() and set(own.values()) <= {cell.strip('"') for cell in line.split(",")}
    # Others call their files so too.
    ours = line.count("\t" if file.name == "u.data" else "::") == 3
    return ours and any(named.items() <= names.items() for names in (own, movielens.PLACES))


def _raw_table(file: File, named: Mapping[str, str], file_order: bool, separator: str | None, encoding: str) -> Raw:
    """A table of events, without what is said of its items."""
    places = named if all(column.isdecimal() for column in named.values()) else {}
    table = _table(file, separator, encoding, places)
    kind, fields = _events(table, named, file_order)
    if "rating" not in named and "rating" in fields and not _are_numbers(table, fields["rating"]):
        getLogger().warning(
            f"{file}: column {excerpt(fields.pop('rating'))} is left out, because it is no rating in numbers; "
            "another one is named by --rating"
        )
    if isinstance(table, JsonLines):
        # A rating that nobody named may be anything.
        table.single = [name for part, name in fields.items() if part in named or part != "rating"]
    return Raw(kind, table, fields)


def _find(source: Path, what: str = "interactions") -> File:
    """The one file of events, or of ``what``, in a folder or an archive, or the file itself."""
    if not source.exists():
        raise UserError(f"{source}: No such file or directory")
    if source.is_dir():
        paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
        there = [(path.relative_to(source).as_posix(), File(path)) for path in paths]
    elif source.suffix.lower() == ".zip":
        there = [(name, File(source, name)) for name in members(source)]
    else:
        return File(source)
    # What is hidden, and what a Mac packs beside the files, is none of the data.
    found = [file for name, file in there if not re.search(r"(^|/)(\.[^./]|__MACOSX/)", name)]
    described = [file for file in found if file.name.startswith("meta_")]
    if what == "interactions":
        found = [file for file in found if file not in described]
    likely = described if what == "items" else [file for file in found if file.name in MOVIELENS]
    # A text without further ending may be a note beside the data.
    for endings in ((*JSON, *PARQUET, ".csv", ".tsv", ".inter"), TEXT):
        likely = likely or [file for file in found if file.suffix in endings]
    if len(likely) != 1:
        several = [file.name for file in likely or found]
        names = ", ".join(several[:8] + ["..."] * (len(several) > 8)) or "nothing"
        mend = "name" if source.is_dir() else "unpack it and name"
        option = "the source" if what == "interactions" else "--meta"
        raise UserError(f"{source}: which file holds the {what}? it has {names}; {mend} one as {option}")
    return likely[0]


def _events(table: Table, named: Mapping[str, str], file_order: bool) -> tuple[str, dict[str, str]]:
    """What kind of table it is, and which of its columns are user, item, time and rating."""
    columns = table.columns()
    if file_order and "time" in named:
        raise UserError(f"--file_order: the events would be in the order of --time {named['time']}; give one of them")
    for part, name in named.items():
        if name not in columns:
            raise no_column(f"--{part}", table.file, name, columns)
    fields = {part: name for part, name in named.items() if part in EVENT}
    for (part, name), (other, same) in itertools.combinations(fields.items(), 2):
        if name == same:
            raise UserError(f"--{part} and --{other} both name column '{name}' of {table.file}; name two columns")
    parts = EVENT[:2] if file_order else EVENT[:3]
    whole = [kind for kind, names in KNOWN.items() if set(names[: len(parts)]) <= set(columns)]
    guessed = EVENT if whole or not set(parts) <= set(named) else ()
    for kind in [*whole[:1], *KNOWN]:
        for part, name in zip(EVENT, KNOWN[kind]):
            if part in guessed and name in columns and name not in fields.values():
                fields.setdefault(part, name)
    for part in parts:
        others = [name for name in columns if name not in fields.values()]
        if part not in fields and (likely := only_column(part, others)):
            fields[part] = likely
    if file_order:
        fields.pop("time", None)
    if isinstance(table, Text) and table.names is None and is_time(fields.get("time", "")):
        raise UserError(
            f"{table.file}, line 1: no header, but an event at {fields['time'][:60]}; write a line above it that "
            "names the columns, or give their places, as --user=1 --item=2 --time=3"
        )
    if missing := [part for part in parts if part not in fields]:
        hint = "" if "time" not in missing else "; without times, say --file_order"
        if isinstance(table, Text) and any(map(is_time, columns)):
            hint += "; without a header, give their places, as --user=1 --item=2; lines of many items are --sequences"
        there = f"there are {listed(columns)}"
        raise UserError(f"{table.file}: name its columns by --{', --'.join(missing)} ({there}){hint}")
    _check_single(table, fields, named)
    known = not named and not file_order and whole
    return whole[0] if known else "a table", {part: fields[part] for part in EVENT if part in fields}


def _check_single(table: Table, fields: Mapping[str, str], named: Mapping[str, str]) -> None:
    """Make sure that no column of the events holds lists or objects."""
    nested = () if isinstance(table, Text) else table.kinds()
    for part, name in fields.items():
        # A rating that is only guessed is left out where it is no number.
        if name in nested and (part in named or part != "rating"):
            raise UserError(
                f"--{part}: column '{name}' of {table.file} holds lists or objects, and each row must be one event; "
                "with pandas, explode writes a row for each entry, json_normalize a column for each key, and "
                "to_json(orient='records', lines=True) an event a line"
            )


def _are_numbers(table: Table, column: str) -> bool:
    """Whether half of a column's first cells, or more, are numbers or empty."""
    rows = next(table.rows({"": column}, BadLines(str(table.file), "skip")), None)
    return rows is None or 2 * len(Floats().parse(rows.cells[""].combine_chunks(), False)) <= len(rows.numbers)


def _table(file: File, separator: str | None, encoding: str, places: Mapping[str, str] | None = None) -> Table:
    """The table that a file holds; with ``places``, which are ``{user, item, ...: place}``, it has no header."""
    if file.suffix in PARQUET:
        return Parquet(file)
    if file.suffix not in (*TEXT, *JSON):
        kinds = ", ".join((*TEXT, *JSON, *PARQUET))
        raise UserError(f"{file}: what file is this? known are {kinds}, each also as .gz or within a .zip")
    encoding = file.utf8_or(encoding)
    if file.suffix in JSON:
        return JsonLines(file, encoding)
    line = file.first_line(encoding)
    between = re.sub('"[^"]*"', "", line)
    guess = max(SEPARATORS, key=lambda mark: (between.count(mark), line.count(mark)))
    separator = separator or (guess if guess in line or " " not in line else " ")
    quoted = file.suffix not in ATOMIC and len(separator) == 1 and separator != '"'
    spaced = quoted and separator != " " and 0 < between.count(separator) == between.count(f"{separator} ")
    table = Text(file, separator, quoted=quoted, encoding=encoding, spaced=spaced)
    cells = split_header(line, separator, str(file), quoted)
    headless = len(cells) == 4 and re.fullmatch(r"[0-9.]+", cells[2]) and re.fullmatch(r"[0-9]+", cells[3])
    if places:
        columns = {str(place): cell for place, cell in enumerate(cells, 1)}
        _check_event(file, cells, {part: columns[place] for part, place in places.items() if place in columns})
        table.names = tuple(columns)
    elif headless:
        table.names = _amazon_ratings(file, cells)
    return table


def _check_event(file: File, cells: list[str], first: Mapping[str, str]) -> None:
    """Make sure that a first line, of which ``first`` is ``{user, item, time ...: cell}``, is an event and no header.

    Raises:
        UserError: it is a header.
    """
    if header := _header(first):
        raise UserError(f"{file}, line 1: a header, with {header[0]}; name the columns as it does, not by their places")
    # Before them an index may stand, whose column has no name.
    numbers = cells[cells[0] == "" :]
    if "time" in first and len(numbers) > 2 and numbers == [str(place) for place in range(len(numbers))]:
        raise UserError(
            f"{file}, line 1: {', '.join(numbers[:3])} ... is the header that pandas gives a table without names; drop "
            f"that line, or if it is an event write its time as {first['time']}.0"
        )


def _header(first: Mapping[str, str]) -> list[str]:
    """The names of columns among the cells of a first line, ``{user, item, time ...: cell}``; none if it is an event.

    An item may be called ``product``. So where a time is asked for, its cell decides: that of an event has a digit,
    however dates are written. Without a time one name may be chance, and two are a header.
    """
    known = {name for names in KNOWN.values() for name in names}
    names = [cell for cell in first.values() if cell in known or any(only_column(part, [cell]) for part in WHAT)]
    sound = re.search(r"\d", first["time"]) if "time" in first else len(names) < 2
    return [] if sound else names


def _amazon_ratings(file: File, cells: list[str]) -> tuple[str, ...]:
    """The columns of Amazon's ratings without a header: user first in 2014, item first in 2018."""
    _, _, time, rating = KNOWN["Amazon Reviews 2014 or 2018"]
    user_first, item_first = (
        bool(AMAZON_USER.fullmatch(user) and ASIN.fullmatch(item)) for user, item in (cells[:2], cells[1::-1])
    )
    if user_first == item_first:
        raise UserError(
            f"{file}, line 1: no header, and {excerpt(cells[0])} and {excerpt(cells[1])} do not tell user from item; "
            "write a header line and name its columns by --user and --item, or give their places, as --user=1 --item=2"
        )
    return ("reviewerID", "asin", rating, time) if user_first else ("asin", "reviewerID", rating, time)


def _meta(file: File, item: str, meta: Path | None, meta_item: str | None, encoding: str) -> Descriptions | None:
    """What describes the items: the file that is named, or ``.item`` or Amazon's metadata beside the events."""
    category = re.sub(r"^(reviews|ratings)_|_5$", "", PurePosixPath(file.name).stem)
    names = [f"meta_{category}{suffix}" for suffix in JSON]
    if file.suffix == ".inter":
        names.insert(0, PurePosixPath(file.name).with_suffix(".item").name)
    beside = (file.beside(name) for name in names)
    described = _find(meta, "items") if meta else next(filter(None, beside), None)
    if not described:
        if meta_item:
            raise UserError(f"--meta_item: {meta_item} is a column of --meta, and there is none; name that file")
        return None
    if (described.path.resolve(), described.member) == (file.path.resolve(), file.member):
        described = file
    table = _table(described, None, encoding)
    columns = table.columns()
    if meta_item and meta_item not in columns:
        raise no_column("--meta_item", described, meta_item, columns)
    likely = [name for name in (meta_item or item, *(names[1] for names in KNOWN.values()), "item") if name in columns]
    if not likely and described.suffix == ".item" and meta is None:
        getLogger().warning(f"{described}: left out, for it has no column {item!r}; --meta and --meta_item name it")
        return None
    if not likely:
        raise no_column("--meta", described, item, columns, "; name it by --meta_item")
    # A table of one's own may have an asin too.
    known = described.name.startswith("meta_") or {"categories", "category"} & set(columns)
    if isinstance(table, JsonLines) and not meta_item and likely[0] in ("parent_asin", "asin") and known:
        return amazon_items(table)
    return whole_table(table, likely[0])
