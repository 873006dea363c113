"""Where the records of users lie: in memory, in a folder (lmdb), or on a Redis server."""

from __future__ import annotations

from pathlib import Path

from recbole_ssm.errors import UserError
from recbole_ssm.serving.lmdb_store import LmdbStore
from recbole_ssm.serving.redis_store import RedisStore
from recbole_ssm.serving.store import MemoryStore, Store

DURABILITIES = ("each", "batched")


def open_store(place: str | None, *, durability: str = "each", most_bytes: int = 1 << 36, create: bool = True) -> Store:
    """The store at a place.

    Args:
        place: a folder, made if it is not there; ``redis://host:port/number``; None for memory alone.
        durability: of a folder. ``each``: an update is on the disk when it returns. ``batched``: it outlives a crash of
            the process when it returns, and a crash of the machine after the next :meth:`Store.sync`.
        most_bytes: a folder never takes more; an update that would is refused.
        create: make a folder that is not there; without it, that is an error.

    Raises:
        UserError: a package is missing, or there is no store there that can be opened.
    """
    if durability not in DURABILITIES:
        raise UserError(f"durability: must be {' or '.join(DURABILITIES)}, got {durability}")
    if place is None:
        return MemoryStore()
    if place.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(place)
    return LmdbStore(Path(place), durability, most_bytes, create)
