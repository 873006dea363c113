"""Writing files so that they are whole or absent, and the digests by which contents are told apart."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from recbole_ssm.errors import UserError

try:
    import fcntl
except ImportError:
    # Windows has none; there two processes must not share a folder.
    fcntl = None  # type: ignore[assignment]


def check_writable(path: Path) -> None:
    """Before long work: that a file can be written there.

    Raises:
        UserError: it cannot; the message does not say what the file is for.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    if not os.access(folder, os.W_OK):
        raise UserError(f"nothing can be written to {folder}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to: it becomes ``path`` when the context ends well, else it goes.

    A former file of that name is left until then. Each thread of each process has a name of its own, so of several that
    write to one path at a time the last one stays, whole.
    """
    temporary = path.with_name(f".{os.getpid()}.{threading.get_ident()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def exchange(new: Path, target: Path, former: Path | None) -> None:
    """Give a folder its name ``target``; one that has it already becomes ``former``, and comes back if that fails.

    Raises:
        OSError: a folder that is not empty has that name, and ``former`` is None; or the disk's own.
    """
    if former is not None and target.exists():
        os.replace(target, former)
    else:
        former = None
    try:
        os.replace(new, target)
    except BaseException:
        if former is not None:
            os.replace(former, target)
        raise


LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What the file managers of macOS and Windows leave in folders that they show."""
FORMER = "former"
"""What :func:`folder_beside` calls the folder that another takes the place of."""


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A hidden temporary folder beside ``target``, in which to prepare that; held by this process until it goes.

    A kill leaves it there, and perhaps the former target in it as :data:`FORMER`; see :func:`recover`. Where the file
    system has no locks, it is not recovered.
    """
    with (
        TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True) as temporary,
        open(Path(temporary, "not_locked"), "w") as file,
    ):
        with suppress(OSError):
            lock(file)
            # Only now recover may find it: a lock that nobody holds is that of a dead process.
            os.replace(file.name, Path(temporary, "lock"))
        yield Path(temporary)


def recover(target: Path) -> None:
    """Remove what killed processes left of :func:`folder_beside`, and put a target back that one had moved away.

    Without locks a process that lives cannot be told from a killed one, and nothing is removed.
    """
    if fcntl is None:
        return
    # The names end in eight characters; so nothing of target-2 is taken for target's.
    for lock_file in target.parent.glob(f".{glob.escape(target.name)}-{'?' * 8}/lock"):
        left = lock_file.parent
        with suppress(OSError), locked(left, wait=False):
            if not target.exists() and (left / FORMER).is_dir():
                os.replace(left / FORMER, target)
            shutil.rmtree(left)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all; the folder is made if it is not there.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as comma-separated values, whole or not at all; every key is a column, in the order of its first use.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    with whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Journal:
    """A file of JSON lines, as Optuna's journals are, that several processes may add to.

    A kill at any moment leaves it readable. After Optuna's own class for such a file was killed with its lock, others
    wait half a minute, and behind a torn line it cannot read on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def read_logs(self, log_number_from: int) -> list[Any]:
        """The values from a number on; a last line without its end is not there yet."""
        return [json.loads(line) for line in self._path.read_bytes().split(b"\n")[log_number_from:-1]]

    def append_logs(self, logs: Iterable[Any]) -> None:
        """Add values and wait for the disk; what a kill or a full disk left of a line is overwritten."""
        with open(self._path, "rb+") as file:
            lock(file)
            file.truncate(file.seek(file.read().rfind(b"\n") + 1))
            file.write(b"".join(json.dumps(value).encode() + b"\n" for value in logs))
            file.flush()
            os.fsync(file.fileno())


def digest(*paths: Path) -> str:
    """The SHA-256 of the content of a file, or of several one after the other, in hexadecimal."""
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()


def digest_of_json(value: Any) -> str:
    """The SHA-256 of a value as JSON, in hexadecimal; the order of a mapping's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder's ``lock``, a file that names this process; it is released when the process dies, too.

    Args:
        folder: a folder that is there.
        wait: wait for the process that holds it.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
    """
    with open(folder / "lock", "a") as file:
        lock(file, wait)
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield


def lock(file: IO[Any] | int, wait: bool = True) -> None:
    """Lock an open file until it is closed or the process dies.

    Args:
        file: open to write, or the descriptor of a folder.
        wait: for whoever holds it.

    Raises:
        BlockingIOError: another process holds it, and we do not wait.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def claim(file: IO[Any], number: int) -> bool:
    """Claim a number in an open file until the file is closed or the process dies; whether no other process has it.

    Within one process a number can be claimed again and again. The file stays empty; the system keeps the claims.
    """
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
    return True
