"""The downloads of MovieLens, known by the names of their files."""

from __future__ import annotations

import re
from collections.abc import Iterator

from recbole_ssm.data.archives import File
from recbole_ssm.data.descriptions import Described, Descriptions
from recbole_ssm.data.lines import BadLines, is_utf8
from recbole_ssm.data.names import KNOWN
from recbole_ssm.data.text_tables import Text
from recbole_ssm.errors import UserError

ML_100K_ITEM = ("item", "title", "date", "video", "url")
ML_100K_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
# The places of the columns of ratings, where they have no names.
PLACES = {"user": "1", "item": "2", "rating": "3", "time": "4"}
# Names of MovieLens' files of ratings -> of items.
MOVIELENS = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}


def tables_of(file: File, encoding: str = "utf-8", items: bool = True) -> tuple[Text, Descriptions | None]:
    """The events of a file that is called as one of :data:`MOVIELENS`, and what stands beside it of the films.

    100K has u.data, 1M and 10M ratings.dat, all others ratings.csv.

    Raises:
        UserError: the table of films is none of MovieLens'.
    """
    described = file.beside(MOVIELENS[file.name]) if items else None
    names = KNOWN["MovieLens"]
    ordered = (names[0], names[1], names[3], names[2])
    columns: tuple[str, ...] | None
    if file.name == "u.data":
        events, cut, columns = Text(file, "\t", ordered), "|", (*ML_100K_ITEM, *ML_100K_GENRES)
    elif file.name == "ratings.dat":
        events, cut, columns = Text(file, "::", ordered), "::", ("item", "title", "genres")
    else:
        events, cut, columns = Text(file, ",", quoted=True), ",", None
    events.encoding = file.utf8_or(encoding)
    if not described:
        return events, None
    # 100K and 1M are in latin-1.
    encoding = described.utf8_or("latin-1" if is_utf8(encoding) else encoding)
    return events, _films(Text(described, cut, columns, quoted=columns is None, encoding=encoding))


def _films(table: Text) -> Descriptions:
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
