"""The folder of a run, ``<model>-<dataset>-<time>/``: which of its checkpoints there are, and what becomes of them.

``best.safetensors`` is the best by validation, ``step-<n>.safetensors`` the newest after n steps, and ``config.yaml``
holds all settings.
While a step is kept from which a run could go on, so is the checkpoint that was the best then:
``former-best-<n>.safetensors`` is the one that was the best until step n.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

from recbole_ssm.config import SETTINGS, Config
from recbole_ssm.errors import UserError
from recbole_ssm.files import lock, whole, write_text
from recbole_ssm.trainer.checkpoint import BEST, SUFFIX, read


def new_folder(parent: Path, name: str) -> Path:
    """Make the folder of a run, ``<parent>/<name>-<time>``; no two runs share one."""
    stem = f"{name}-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}"
    for attempt in itertools.count(1):
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def write_settings(folder: Path, config: Config, overwrite: bool) -> None:
    """Write all settings of a run into its folder, and say where that lies. A run that is only evaluated again does not
    overwrite those by which it was trained.
    """
    if overwrite or not (folder / SETTINGS).exists():
        write_text(folder / SETTINGS, config.as_yaml())
    getLogger().info(f"run: {folder}, with the checkpoints and all settings, {SETTINGS}")


def step_file(folder: Path, step: int) -> Path:
    """The name of the checkpoint after so many steps of a run."""
    return folder / f"step-{step:09d}{SUFFIX}"


def former_best(folder: Path, step: int) -> Path:
    """The name of the checkpoint that was the best until so many steps."""
    return folder / f"former-best-{step:09d}{SUFFIX}"


def put_best(path: Path, step: int) -> None:
    """Let a checkpoint of so many steps be the best, and the one that it replaces a former one."""
    best, former = path.with_name(BEST), former_best(path.parent, step)
    with contextlib.suppress(FileNotFoundError):
        try:
            # So there is a best one at every moment.
            former.unlink(missing_ok=True)
            os.link(best, former)
        except OSError:
            os.replace(best, former)
    os.replace(path, best)


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest ``count`` of a run's numbered checkpoints, the former bests that no kept one asks for,
    and what killed writers left half done.
    """
    steps = sorted(folder.glob(f"step-*{SUFFIX}"))
    kept = steps[-count:]
    bests = [path for path in folder.glob(f"former-best-*{SUFFIX}") if kept and _number(path) <= _number(kept[0])]
    for path in [*steps[:-count], *bests, *folder.glob(f".*{SUFFIX}")]:
        path.unlink(missing_ok=True)


def go_back(start: Path, step: int, is_best: bool) -> None:
    """Let a run's folder be what it was when a checkpoint was written, and set aside all that came later.

    Args:
        start: the checkpoint, from which the run goes on.
        step: how many steps it stands for.
        is_best: whether it was the best then.
    """
    folder = start.parent
    for path in sorted(folder.glob(f"step-*{SUFFIX}")):
        if path > step_file(folder, step):
            _set_aside(path)
    best = folder / BEST
    later = [path for path in sorted(folder.glob(f"former-best-*{SUFFIX}")) if path > former_best(folder, step)]
    if best.exists() and (later or _is_later(best, step)):
        _set_aside(best)
    if later and not _is_later(later[0], step):
        os.replace(later.pop(0), best)
    for path in later:
        _set_aside(path)
    if is_best and not best.exists():
        with whole(best) as temporary:
            shutil.copyfile(start, temporary)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; it is released when the process dies, too.

    Raises:
        UserError: another run is at work in it.
    """
    if os.name == "nt":
        # Windows opens no folders.
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(descriptor, wait=False)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is at work in this folder; wait for its end, or stop it") from None
        except OSError as error:
            getLogger().debug(f"{folder}: its file system has no locks ({error})")
        yield
    finally:
        os.close(descriptor)


def _number(path: Path) -> int:
    """The number of steps in a checkpoint's name."""
    return int(re.findall(r"\d+", path.name)[-1])


def _set_aside(path: Path) -> None:
    names = itertools.chain([f"abandoned-{path.name}"], (f"abandoned-{n}-{path.name}" for n in itertools.count(2)))
    name = next(name for name in names if not path.with_name(name).exists())
    path.rename(path.with_name(name))
    getLogger().warning(f"{path} is further than where training goes on; kept as {name}")


def _is_later(path: Path, step: int) -> bool:
    """Whether a checkpoint is of more than so many steps, or cannot be read."""
    try:
        return int(read(path).info["training"]["global_step"]) > step
    except (UserError, KeyError, TypeError):
        return True
