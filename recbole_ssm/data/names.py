"""What the columns of other people's tables are called, where the names are not those of a known data set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from recbole_ssm.errors import UserError, did_you_mean, excerpt, listed

EVENT = ("user", "item", "time", "rating")
# Column names by which a source is known, in the order of EVENT.
KNOWN = {
    "MovieLens": ("userId", "movieId", "timestamp", "rating"),
    "Amazon Reviews 2023": ("user_id", "parent_asin", "timestamp", "rating"),
    "Amazon Reviews 2014 or 2018": ("reviewerID", "asin", "unixReviewTime", "overall"),
    "a table": ("user_id", "item_id", "timestamp", "rating"),
}
WHAT = {
    "user": "user customer client buyer member account kunde kundin käufer nutzer benutzer",
    "item": "item product article sku artikel produkt ware",
    "time": "time datetime timestamp eventtimestamp date when orderdate ordertime orderdatetime orderedat ordered "
    "purchasedate purchasetime purchasedat createdat eventtime eventdate ts datum zeit "
    "uhrzeit zeitpunkt zeitstempel bestelldatum kaufdatum",
}
"""Names of columns, without blanks and in lower case; one of users or items may end in a word of :data:`NUMBER`."""
NUMBER = "id|no|nr|num|number|nummer|key|code"
TITLES = ("movie_title", "title", "name", "item_name", "item_title")
"""Names of columns that may hold titles, as they are looked for; ``Item title`` is taken for the last."""


def only_column(part: str, columns: Iterable[str]) -> str | None:
    """The only one of some columns whose name says that it holds users, items or times; None if there is none, or two.

    Two, such as ``Date`` and ``Time``, or ``Product`` and ``SKU``, are not chosen between: it would be a guess.
    """
    end = "" if part == "time" else f"({NUMBER})?"
    pattern = f"({'|'.join(WHAT[part].split())}){end}"
    found = [column for column in columns if re.fullmatch(pattern, re.sub(r"[\W_]", "", column.lower()))]
    return found[0] if len(found) == 1 else None


def no_column(option: str, file: object, name: str, columns: Collection[str], mend: str = "") -> UserError:
    """The error of an option that names a column which a file has not, with those that it has."""
    there = f"there are {listed(columns)}{did_you_mean(name, columns)}"
    return UserError(f"{option}: {file} has no column '{name}' ({there}){mend}")


def title_column(columns: Collection[str]) -> str | None:
    """The one of some columns of text that holds titles, by its name, or because it is the only one; None otherwise."""
    spelt = {name.lower().replace(" ", "_"): name for name in columns}
    only = next(iter(columns)) if len(columns) == 1 else None
    return next((spelt[name] for name in TITLES if name in spelt), only)


def name_titles(columns: Collection[str]) -> str:
    """What a user does whose table of items has its titles under another name, for a message."""
    return "add --title_field=COLUMN" if columns else "add a column title"


def check_names(option: str, names: Sequence[str]) -> None:
    """Make sure that names can stand in the header of an atomic file, each once.

    Raises:
        UserError: one cannot.
    """
    for name in names:
        if not name or re.search(r"[:\t\r\n\0]", name):
            raise UserError(f"{option}: {excerpt(name)} cannot name a column of an atomic file; rename it")
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{option}: there would be two columns {excerpt(twice)}; rename one in the source")
