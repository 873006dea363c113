"""The histories of many users: of a data set, of some of its users, or of a file of events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recbole_ssm.arguments import names
from recbole_ssm.data import create_dataset, temporal, ties
from recbole_ssm.data.lines import BadLines
from recbole_ssm.data.names import KNOWN
from recbole_ssm.data.reading import read_events
from recbole_ssm.data.sources import open_raw
from recbole_ssm.errors import UserError, did_you_mean, excerpt, shown
from recbole_ssm.starting import require_data
from recbole_ssm.trainer.refusals import recbole_refusals

TABLES = (".inter", ".csv", ".tsv", ".parquet", ".json", ".jsonl", ".gz", ".zip")
"""A file of events ends so; any other holds a user's id in each line."""
ALL_EVENTS = {"user_inter_num_interval": "[0,inf)", "item_inter_num_interval": "[0,inf)"}
"""A run may have left out users and items with few events; here every user has all events."""


class Histories(NamedTuple):
    """Users and their events, oldest first."""

    users: list[str]
    """The users' ids, in the order of the answers."""
    items: np.ndarray
    """The item tokens of all events, user by user [events]."""
    bounds: np.ndarray
    """Where each user's events begin and end in ``items`` [users, 2]; a user without events has none."""
    seconds: np.ndarray | None
    """When all events were, in seconds since 1970 [events]; None where the times are no clock times."""
    strangers: int = 0
    """How many of the users were asked for and are not in the data set."""
    typed_as: str = ""
    """The option by which the history was typed; empty for histories of users."""

    def __iter__(self) -> Iterator[list[str]]:  # type: ignore[override]
        for start, end in self.bounds:
            yield list(self.items[start:end])

    @property
    def times(self) -> Iterator[list[int]] | None:
        """When each user's events were, one user after the other; None where that is not known."""
        seconds = self.seconds
        return None if seconds is None else (seconds[start:end].tolist() for start, end in self.bounds)

    @classmethod
    def typed(cls, items: Iterable[str]) -> Histories:
        """One history that somebody typed: items, oldest first, without times; its user is called ``history``."""
        tokens = np.array(list(items), dtype=object)
        return cls(["history"], tokens, np.array([[0, len(tokens)]]), None, typed_as="--history")

    def called(self, part: str, number: int) -> str:
        """What an error calls a part of the history of a number: of what user it is, or what option was typed."""
        if self.typed_as:
            return self.typed_as if part == "history" else part
        return f"{part} of user {excerpt(self.users[number])}"

    def of(self, users: Iterable[str]) -> Histories:
        """The histories of these users, in their order; a user who is not known has none."""
        known = {user: number for number, user in enumerate(self.users)}
        wanted = [str(user) for user in users]
        nobody = np.zeros(2, dtype=np.int64)
        strangers = sum(user not in known for user in wanted)
        bounds = [self.bounds[known[user]] if user in known else nobody for user in wanted]
        return Histories(wanted, self.items, np.array(bounds, dtype=np.int64).reshape(-1, 2), self.seconds, strangers)


def histories_of(users: str | Path | Iterable[str] | Histories, config: Any) -> Histories:
    """The histories that ``users`` stands for.

    Args:
        users: ``all`` for every user of the configuration's data set; ids of some of them, as a list
            or with commas between them; the path of a text file that holds an id in each line; the
            path of a file of events, which needs no data set: an atomic file, Parquet, CSV or JSON
            lines, whose columns are found as ``recbole-ssm convert`` finds them; or histories, which
            stay as they are.
        config: names the data set; its filters hold, but for the least numbers of events.

    Raises:
        UserError: there is no such file or user, or it cannot be read.
    """
    if isinstance(users, Histories):
        return users
    if not isinstance(users, (str, Path)):
        return _of_dataset(config).of(users)
    if users == "all":
        return _of_dataset(config)
    path = Path(users)
    if not path.is_file():
        return _of_ids(str(users), _of_dataset(config))
    if path.suffix.lower() in TABLES:
        return events_of(path)
    try:
        found = _lines_of(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8; a file of events ends in {', '.join(TABLES)}") from error
    if not found:
        raise UserError(f"{path}: holds no user; write one id in each line")
    histories = _of_dataset(config).of(found)
    # A list of users has some of them; what has next to none is another file.
    if 100 * (len(found) - histories.strangers) < len(found):
        raise UserError(
            f"--users: of {len(found):,} lines of {path}, {histories.strangers:,} are no user of data set "
            f"{config['dataset']}, such as {excerpt(found[0])}; write one id in each line, or call a file of events "
            f"{path.stem}.csv"
        )
    return histories


def _of_ids(text: str, everybody: Histories) -> Histories:
    """The histories of a user, or of several with commas between their ids, all of whom are known."""
    known = set(everybody.users)
    wanted = [text] if text in known else names(text)
    if strange := next((user for user in wanted or [text] if user not in known), None):
        raise UserError(
            f"--users: must be all, a file or ids, and there is no file {excerpt(text)} and no user "
            f"{excerpt(strange)}{did_you_mean(strange, known)}"
        )
    return everybody.of(wanted)


def _of_dataset(config: Any) -> Histories:
    require_data(config)
    with recbole_refusals(config["dataset"]):
        dataset = create_dataset(config)
    events = dataset.inter_feat
    times = events[dataset.time_field].to_numpy()
    order = ties.rows_of(dataset)
    order = order[np.argsort(events[dataset.uid_field].to_numpy()[order], kind="stable")]
    users = events[dataset.uid_field].to_numpy()[order]
    tokens = dataset.field2id_token[dataset.uid_field]
    items = dataset.field2id_token[dataset.iid_field].astype(object)[events[dataset.iid_field].to_numpy()[order]]
    return _by_user(users, items, times[order], [str(token) for token in tokens])


def events_of(path: Path) -> Histories:
    """The histories that a file of events holds.

    Raises:
        UserError: there is no such file, or it is of another kind, or must be converted first.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        raw = open_raw(path, {}, items=False)
        with BadLines(str(raw.events.file)) as bad:
            events, digits = read_events(raw, bad)
    except UserError as error:
        if " --" not in str(error):
            raise
        raise UserError(
            f"{error} (these are options of recbole-ssm convert: convert the file, then give dataset/NAME/NAME.inter)"
        ) from error
    if not any(set(raw.fields.values()) <= set(columns) for columns in KNOWN.values()):
        getLogger().warning(f"{path}: {', '.join(f'{part} is {column}' for part, column in raw.fields.items())}")
    events = events.take(events.by_user_and_time())
    tokens = [str(token) for token in events.users.names.to_pylist()]
    return _by_user(events.users.codes, events.items.objects(), events.times // 10**digits, tokens)


def _by_user(users: np.ndarray, items: np.ndarray, times: np.ndarray, tokens: list[str]) -> Histories:
    """Histories of events that are sorted by user and time; ``tokens`` are the users' by number."""
    starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    bounds = np.stack([starts, np.append(starts[1:], len(users))], axis=1)
    seconds = temporal.in_seconds(times) if len(times) and temporal.unit_of(times)[0] else None
    return Histories([tokens[number] for number in users[starts]], items, bounds, seconds)


def read_items(option: str, path: Path | None) -> list[str] | None:
    """The item tokens in a text file, one in each line; None where no file is named.

    Raises:
        UserError: the file is missing, empty or no text.
    """
    if path is None:
        return None
    try:
        found = _lines_of(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read ({error})") from error
    if not found:
        raise UserError(f"{option}: {shown(str(path))} names no item; write one in each line")
    return found


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without the blanks around them."""
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
