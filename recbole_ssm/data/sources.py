"""What a raw data set is: the downloads of MovieLens and Amazon, or a table whose columns are named."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from recbole_ssm.data.archives import File, members
from recbole_ssm.data.lines import BadLines
from recbole_ssm.data.tables import JsonLines, Parquet, Table, Text, cell_of
from recbole_ssm.data.times import is_time
from recbole_ssm.errors import UserError, did_you_mean, excerpt, listed

EVENT = ("user", "item", "time", "rating")
# Column names by which a source is known, in the order of EVENT.
KNOWN = {
    "MovieLens": ("userId", "movieId", "timestamp", "rating"),
    "Amazon Reviews 2023": ("user_id", "parent_asin", "timestamp", "rating"),
    "Amazon Reviews 2014 or 2018": ("reviewerID", "asin", "unixReviewTime", "overall"),
    "a table": ("user_id", "item_id", "timestamp", "rating"),
}
ML_100K_ITEM = ("item", "title", "date", "video", "url")
ML_100K_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
# Names of MovieLens' files of ratings -> of items.
MOVIELENS = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}
TEXT, JSON, PARQUET = (".csv", ".tsv", ".txt", ".dat", ".data", ".inter"), (".json", ".jsonl", ".ndjson"), (".parquet",)
ASIN = re.compile(r"[0-9A-Z]{10}")
AMAZON_USER = re.compile(r"A[0-9A-Z]{9,27}")

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


@dataclass
class Raw:
    """A raw data set.

    Attributes:
        kind: what it is, in words.
        events: the table of its events.
        fields: ``{user, item, time, rating: column}``; rating may be absent.
        items: what it says of its items, if anything.
    """

    kind: str
    events: Table
    fields: dict[str, str]
    items: Descriptions | None = None

    @property
    def files(self) -> list[File]:
        """All files that are read, the events first."""
        return list(dict.fromkeys([self.events.file, *([self.items.file] if self.items else [])]))


def open_raw(source: Path, named: Mapping[str, str], meta: Path | None = None, **reading: str) -> Raw:
    """Find out what a raw data set is.

    Args:
        source: a file, a folder or a zip archive.
        named: the columns that the caller names, ``{user, item, time, rating, text: column}``; they win over ours.
        meta: a file that describes the items (Amazon); by default ``meta_<name of source>`` beside it.
        reading: ``separator`` and ``encoding``, where they are not to be guessed.

    Raises:
        UserError: it is nothing that we know; the message says how to name its columns.
    """
    file = _find(source)
    if file.name in MOVIELENS and not named and (file.suffix != ".csv" or "movieId" in file.first_line("utf-8")):
        if meta:
            raise UserError(
                f"--meta: MovieLens describes its items itself, in {MOVIELENS[file.name]}; drop --meta {meta}"
            )
        return _movielens(file)
    table = _table(file, reading)
    kind, fields = _events(table, named)
    if "text" in named and meta:
        raise UserError(f"--text {named['text']} and --meta {meta} both describe the items; give one of them")
    if "text" in named:
        items: Descriptions | None = _texts(table, fields["item"], named["text"])
    else:
        items = _amazon_items(file, meta)
    return Raw(kind, table, fields, items)


def _find(source: Path) -> File:
    """The one file of events in a folder or an archive, or the file itself."""
    if not source.exists():
        raise UserError(f"{source}: No such file or directory")
    if source.is_dir():
        found = [File(path) for path in sorted(source.rglob("*")) if path.is_file()]
    elif source.suffix == ".zip":
        found = [File(source, name) for name in members(source)]
    else:
        return File(source)
    found = [file for file in found if not file.name.startswith((".", "meta_")) and "__MACOSX" not in str(file)]
    likely = [file for file in found if file.name in MOVIELENS] or [
        file for file in found if file.suffix in (*JSON, *PARQUET, ".csv", ".tsv", ".inter")
    ]
    if len(likely) != 1:
        several = [file.name for file in likely or found]
        names = ", ".join(several[:8] + ["..."] * (len(several) > 8)) or "nothing"
        raise UserError(f"{source}: which file holds the interactions? it has {names}; name one as the source")
    return likely[0]


def _events(table: Table, named: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """What kind of table it is, and which of its columns are user, item, time and rating."""
    columns = table.columns()
    there = f"there are {listed(columns)}"
    kind, known = next(
        ((kind, names) for kind, names in KNOWN.items() if set(names[:3]) <= set(columns)), ("a table", ())
    )
    fields = {part: name for part, name in zip(EVENT, known) if name in columns}
    fields |= {part: name for part, name in named.items() if part in EVENT}
    for part, name in named.items():
        if name not in columns:
            raise UserError(f"--{part}: {table.file} has no column '{name}' ({there}{did_you_mean(name, columns)})")
    if isinstance(table, Text) and table.names is None and is_time(fields.get("time", "")):
        raise UserError(
            f"{table.file}, line 1: no header, but an event at {fields['time'][:60]}; write a line above it that "
            "names the columns"
        )
    if missing := [part for part in EVENT[:3] if part not in fields]:
        raise UserError(f"{table.file}: name its columns by --{', --'.join(missing)} ({there})")
    return "a table" if named else kind, {part: fields[part] for part in EVENT if part in fields}


def _table(file: File, reading: Mapping[str, str]) -> Table:
    encoding = reading.get("encoding") or "utf-8"
    if file.suffix in PARQUET:
        return Parquet(file)
    if file.suffix in JSON:
        return JsonLines(file, encoding)
    if file.suffix not in TEXT:
        kinds = ", ".join((*TEXT, *JSON, *PARQUET))
        raise UserError(f"{file}: what file is this? known are {kinds}, each also as .gz or within a .zip")
    line = file.first_line(encoding)
    separator = reading.get("separator") or max("\t", ",", ";", "|", key=line.count)
    quoted = file.suffix != ".inter" and len(separator) == 1 and separator != '"'
    cells = line.split(separator)
    headless = len(cells) == 4 and re.fullmatch(r"[0-9.]+", cells[2]) and re.fullmatch(r"[0-9]+", cells[3])
    return Text(file, separator, _amazon_ratings(file, cells) if headless else None, quoted=quoted, encoding=encoding)


# --- MovieLens ------------------------------------------------------------------------------------------------------


def _movielens(file: File) -> Raw:
    """MovieLens by the names of its files: 100K has u.data, 1M and 10M ratings.dat, all others ratings.csv."""
    described = file.beside(MOVIELENS[file.name])
    names = KNOWN["MovieLens"]
    ordered = (names[0], names[1], names[3], names[2])
    columns: tuple[str, ...] | None
    if file.name == "u.data":
        events, cut, columns = Text(file, "\t", ordered), "|", (*ML_100K_ITEM, *ML_100K_GENRES)
    elif file.name == "ratings.dat":
        events, cut, columns = Text(file, "::", ordered), "::", ("item", "title", "genres")
    else:
        events, cut, columns = Text(file, ",", quoted=True), ",", None
    raw = Raw("MovieLens", events, dict(zip(EVENT, names)))
    if described:
        # 100K and 1M are in latin-1.
        encoding = "utf-8" if _is_text(described) else "latin-1"
        raw.items = _movies(Text(described, cut, columns, quoted=columns is None, encoding=encoding))
    return raw


def _is_text(file: File) -> bool:
    """Whether a file is UTF-8."""
    with file.open() as (content, _, _):
        try:
            for _ in codecs.iterdecode(iter(lambda: content.read(1 << 20), b""), "utf-8"):
                pass
        except UnicodeDecodeError:
            return False
    return True


def _movies(table: Text) -> Descriptions:
    names = table.columns()
    wanted = dict(zip(("item", "title", "genres"), names if table.names else ("movieId", "title", "genres")))
    if "Western" in names:
        # 100K has a column for each genre.
        wanted = {name: name for name in (*ML_100K_ITEM[:2], *ML_100K_GENRES)}
    if absent := [name for name in wanted.values() if name not in names]:
        raise UserError(f"{table.file}, line 1: no column '{absent[0]}'; MovieLens has movieId,title,genres")

    def read(bad: BadLines) -> Iterator[Described]:
        for rows in table.rows(wanted, bad):
            for item, title, *genres in zip(*(column.to_pylist() for column in rows.cells.columns)):
                year, name = "", title.rstrip()
                if re.fullmatch(r"\([0-9]{4}\)", name[-6:]) and name[:-6].strip():
                    title, year = name[:-6].rstrip(), name[-5:-1]
                if len(genres) > 1:
                    genres = [genre for genre, flag in zip(ML_100K_GENRES, genres) if flag == "1"]
                else:
                    genres = genres[0].replace("(no genres listed)", "").split("|")
                yield item, {"movie_title": title, "release_year": year, "genre": " ".join(genres)}

    return Descriptions(table.file, {"movie_title": "token_seq", "release_year": "token", "genre": "token_seq"}, read)


# --- Amazon, and any table ------------------------------------------------------------------------------------------


def _amazon_ratings(file: File, cells: list[str]) -> tuple[str, ...]:
    """The columns of Amazon's ratings without a header: user first in 2014, item first in 2018."""
    _, _, time, rating = KNOWN["Amazon Reviews 2014 or 2018"]
    user_first, item_first = (
        bool(AMAZON_USER.fullmatch(user) and ASIN.fullmatch(item)) for user, item in (cells[:2], cells[1::-1])
    )
    if user_first == item_first:
        raise UserError(
            f"{file}, line 1: no header, and {excerpt(cells[0])} and {excerpt(cells[1])} do not tell user from item; "
            "write a header line and name its columns by --user and --item"
        )
    return ("reviewerID", "asin", rating, time) if user_first else ("asin", "reviewerID", rating, time)


def _amazon_items(file: File, meta: Path | None) -> Descriptions | None:
    """Amazon's metadata of a category: those that are named, or those that stand beside its reviews or ratings."""
    category = re.sub(r"^(reviews|ratings)_|_5$", "", PurePosixPath(file.name).stem)
    beside = (file.beside(f"meta_{category}{suffix}") for suffix in JSON)
    described = _find(meta) if meta else next(filter(None, beside), None)
    if not described:
        return None
    if described.suffix not in JSON:
        raise UserError(f"--meta: {meta} is no JSON file; Amazon's metadata are named meta_<category>.json or .jsonl")
    table = JsonLines(described)

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

    return Descriptions(described, {"title": "token_seq", "categories": "token_seq", "brand": "token"}, read)


def _texts(table: Table, item: str, text: str) -> Descriptions:
    """The column of a table of events that describes the items."""

    def read(bad: BadLines) -> Iterator[Described]:
        for rows in table.rows({"item": item, "text": text}, bad):
            for name, title in zip(*(rows.cells[column].to_pylist() for column in ("item", "text"))):
                yield name, {"title": title}

    return Descriptions(table.file, {"title": "token_seq"}, read)
