"""Fill the store of a server from a file of events, or write the events that it holds.

Both work beside a server that runs on the same store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice, repeat
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_ssm.arguments import path_that
from recbole_ssm.commands.histories import Histories, events_of
from recbole_ssm.commands.options import add_arguments, parse
from recbole_ssm.commands.serve import add_state_arguments, load_served, state_options
from recbole_ssm.data.lines import progress
from recbole_ssm.errors import ArgumentParser, UserError
from recbole_ssm.files import check_writable, digest, whole
from recbole_ssm.serving.engine import Engine
from recbole_ssm.serving.record import LONGEST_ID, PART, DamagedError, whole_record
from recbole_ssm.serving.store import Store, StoreError
from recbole_ssm.serving.visits import Event, Visit, in_time

USERS_AT_ONCE = 64
IMPORT = PART + b"import"
"""Before the SHA-256 of a file, the key of how many of its users were taken by an import that has not ended."""


def import_events(engine: Engine, file: str | Path) -> tuple[int, int]:
    """Take every event of a file, in the order of its users' times.

    An import that was cut short, by an error or by a kill, goes on behind the users that it took when it is called
    again with the same file.

    Args:
        engine: what takes them.
        file: an atomic file, Parquet, CSV or JSON lines, as ``recbole-ssm convert`` reads them. Its events come beside
            those that a user has already, so a file that is taken twice counts twice. Where its times are no clock
            times, the order of a user's events is kept, and they count as of now.

    Returns:
        How many events were taken by this call, and how many were of items that the model does not know.

    Raises:
        UserError: the file cannot be read, an id is too long, or a time has not come yet, and nothing was taken; or the
            store takes no more, and the line says how many users were taken.
    """
    histories = events_of(Path(file))
    for name in chain(histories.users, histories.items):
        if len(str(name).encode()) > LONGEST_ID:
            raise UserError(f"--import: the id {str(name)[:60]!r}... has more than {LONGEST_ID} bytes of UTF-8")
    now = time.time()
    for user, seconds in zip(histories.users, histories.times or ()):
        try:
            in_time(max(seconds, default=now), user, now)
        except UserError as error:
            raise UserError(f"--import: {file}: {error}, or drop the event") from error
    key = IMPORT + bytes.fromhex(digest(Path(file)))
    total, done = len(histories.users), int(engine.store.read(lambda get: get([key]))[key] or 0)
    if done:
        getLogger().warning(
            f"{file}: the first {done:,} of {total:,} users were taken before; this goes on behind them"
        )
    visits, taken, skipped = islice(_visits(histories), done, None), 0, 0
    with progress("Import", total, "user") as bar:
        bar.update(done)
        while piece := list(islice(visits, USERS_AT_ONCE)):
            after = done + len(piece)
            try:
                found = engine.visit_together(piece, {key: b"%d" % after if after < total else None})
            except (StoreError, UserError) as error:
                line = getattr(error, "strerror", None) or str(error)
                raise UserError(
                    f"{line}; {done:,} of {total:,} users were taken, import {file} again to go on"
                ) from error
            done = after
            taken, skipped = taken + sum(one.taken for one in found), skipped + sum(one.skipped for one in found)
            bar.update(len(piece))
    return taken, skipped


def _visits(histories: Histories) -> Iterator[Visit]:
    waiting: Iterator[Any] = histories.times or repeat(None)
    for user, items, seconds in zip(histories.users, iter(histories), waiting):
        times = [None] * len(items) if seconds is None else seconds
        yield Visit(user, [Event(str(item), time) for item, time in zip(items, times)])


def export_events(store: Store, file: Path) -> int:
    """Write the events of all users that are kept, as JSON lines of user_id, item_id and timestamp; how many there are.

    The file is whole or not there. Users whose record is damaged are left out, and counted in the log.
    """
    events = damaged = 0
    with whole(file) as temporary, open(temporary, "w", encoding="utf-8") as output:
        for user in store.users():
            try:
                record = store.read(partial(whole_record, user))
            except DamagedError:
                damaged += 1
                continue
            if record is None:
                continue
            for item, time in zip(record.items.texts(), record.moments()):
                output.write(
                    json.dumps({"user_id": user, "item_id": item, "timestamp": time}, ensure_ascii=False) + "\n"
                )
                events += 1
    if damaged:
        getLogger().warning(f"{damaged:,} users are left out, because their records are damaged")
    return events


def main(arguments: Sequence[str]) -> None:
    """Run the command and say how many events there were."""
    parser = ArgumentParser("recbole-ssm state", __doc__)
    add_arguments(parser)
    add_state_arguments(parser)
    parser.add_argument("--import", dest="file", metavar="FILE", help="take its events: .inter, .parquet, .csv, .jsonl")
    parser.add_argument(
        "--export", type=path_that(check_writable), metavar="FILE.jsonl", help="write the events that are kept"
    )
    options, command_line = parse(parser, arguments)
    if options.state is None or (options.file is None) == (options.export is None):
        raise UserError("state: name a store and one file: --state=PLACE --import=FILE, or --state=PLACE --export=FILE")
    store, settings = state_options(options, create=options.export is None)
    try:
        if options.export is not None:
            print(f"wrote {options.export}: {export_events(store, options.export):,} events")
            return
        served = load_served(options.checkpoint, model=options.model, device=options.device, command_line=command_line)
        taken, skipped = import_events(Engine(served, store, **settings), options.file)
        print(f"{options.state}: {taken:,} events were taken, {skipped:,} are of items that the model does not know")
    finally:
        store.close()
