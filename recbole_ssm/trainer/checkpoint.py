"""Checkpoints: one safetensors file, tensors and a JSON header; loading one never runs code.

The header's metadata holds two entries. ``recbole_ssm`` is JSON with the format's version, the
model's name, its plain configuration, the item catalogue and the state of training; ``sha256``
is the digest of that text and of all tensors, so that a damaged file is known as such. A file
is whole or absent: it is written under a temporary name, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.files import whole
from recbole_ssm.keys import MACHINE_KEYS, renamed

FORMAT = 2
SUFFIX = ".safetensors"
BEST = "best" + SUFFIX


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]
    """``model.<parameter>``; to train on, ``optimizer.<index>.<name>`` and
    ``rng.<process>.<name>``; on the CPU.
    """
    info: dict[str, Any]
    """Everything else; JSON."""


def write(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: its final name.
        tensors: any tensors; they are stored contiguous and from the CPU.
        info: whatever JSON can hold.

    Raises:
        OSError: the disk is full or the folder cannot be written; a former file of that name is
            left whole.
    """
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **info})
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as temporary:
            save_file(plain, temporary, metadata={"recbole_ssm": text, "sha256": _digest(plain, text)})
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
    except SafetensorError as error:
        # The writer of safetensors reports a failing disk in this way.
        raise OSError(f"checkpoint {path} was not written: {error}") from error
    except OSError as error:
        text = f"checkpoint {path} was not written: {error.strerror or error}"
        raise (OSError(error.errno, text) if error.errno else OSError(text)) from error


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: the file is missing, cut short, damaged, of another kind, or of another
            version of this package.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # They lie in the mapped file, which could not be replaced on Windows while they do:
            # so they are cloned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = metadata.get("recbole_ssm")
        info = json.loads(text) if text is not None else None
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {path}: cut short or damaged ({reason}); take another one") from error
    if text is None or not isinstance(info, dict) or not isinstance(info.get("format"), int):
        raise UserError(f"checkpoint {path}: a safetensors file, but none that recbole_ssm wrote")
    if info["format"] != FORMAT:
        other = "a later" if info["format"] > FORMAT else "an earlier"
        raise UserError(
            f"checkpoint {path}: written by {other} recbole_ssm (format {info['format']}, here {FORMAT}); "
            "read it with that version"
        )
    if metadata.get("sha256") != _digest(tensors, text):
        raise UserError(f"checkpoint {path}: damaged (its content is not what was written); take another one")
    if "config" in info:
        info["config"] = renamed(info["config"])
    return Checkpoint(tensors, info)


def read_pickle(path: Path) -> Checkpoint:
    """Read weights, optimiser and epoch from RecBole's own ``.pth``. This runs whatever code
    the file holds.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=False)
        weights, optimizer = saved["state_dict"], saved["optimizer"]
        best = float(saved["best_valid_score"])
        name, epoch, patience = saved["config"]["model"], int(saved["epoch"]), int(saved["cur_step"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path}: not one of RecBole's ({error})") from error
    except (AttributeError, ImportError) as error:
        raise UserError(f"checkpoint {path}: its pickle asks for code that is not here ({error})") from error
    tensors = {f"model.{key}": value for key, value in weights.items()}
    state_tensors, state = flatten_optimizer(optimizer)
    training = {"epoch": epoch + 1, "cur_step": patience, "best_valid_score": best, "optimizer": state}
    return Checkpoint({**tensors, **state_tensors}, {"model": name, "training": training})


def find(path: Path) -> tuple[Path, Checkpoint]:
    """A checkpoint to go on from: a file, or the newest whole one of a run's folder; and where it lies.

    A folder of runs stands for the run in it that was written to last.

    Raises:
        UserError: as of :func:`read` and :func:`newest`.
    """
    return newest(run_folder(path)) if path.is_dir() else (path, read(path))


def find_best(path: Path) -> tuple[Path, Checkpoint]:
    """A checkpoint to test or to serve: a file, or the best one of a run's folder; as :func:`find`."""
    path = run_folder(path) / BEST if path.is_dir() else path
    return path, read(path)


def run_folder(path: Path) -> Path:
    """The folder of a run: this one, or the one in it that was written to last, which is logged."""
    if any(path.glob(f"*{SUFFIX}")):
        return path
    written = {file.parent: file.stat().st_mtime_ns for file in path.glob(f"*/*{SUFFIX}")}
    if not written:
        return path
    newest_run = max(written, key=lambda folder: (written[folder], folder.name))
    getLogger().info(f"{path}: its newest run is {newest_run.name}")
    return newest_run


def newest(folder: Path) -> tuple[Path, Checkpoint]:
    """The checkpoint of a run's folder that is furthest in training, and whole.

    Raises:
        UserError: there is none.
    """
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := re.fullmatch(rf"step-(\d+){SUFFIX}", p.name))]
    paths = [path for _, path in sorted(numbered, reverse=True)] + [folder / BEST]
    for path in paths:
        try:
            return path, read(path)
        except UserError as error:
            if path.exists():
                getLogger().warning(f"{error}; trying an earlier one")
    raise UserError(f"folder {folder}: no checkpoint that could be read; a run's folder holds step-*{SUFFIX}")


def new_folder(parent: Path, name: str) -> Path:
    """Make the folder of a run, ``<parent>/<name>-<time>``; no two runs share one."""
    stem = f"{name}-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}"
    for attempt in itertools.count(1):
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def step_file(folder: Path, step: int) -> Path:
    """The name of the checkpoint after so many steps of a run."""
    return folder / f"step-{step:09d}{SUFFIX}"


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest ``count`` of a run's numbered checkpoints, and what killed
    writers left half done.
    """
    for path in [*sorted(folder.glob(f"step-*{SUFFIX}"))[:-count], *folder.glob(f".*{SUFFIX}")]:
        path.unlink(missing_ok=True)


def set_aside(folder: Path, step: int) -> None:
    """Rename a run's checkpoints beyond a step: a run that goes on from there comes to those
    numbers again.
    """
    for path in folder.glob(f"step-*{SUFFIX}"):
        if path > step_file(folder, step):
            path.rename(path.with_name(f"abandoned-{path.name}"))
            getLogger().warning(f"{path} is further than where training goes on; kept as abandoned-{path.name}")


def settings_of(config: Any, model: Any = None) -> dict[str, Any]:
    """A configuration in JSON's terms, without what belongs to the machine.

    Args:
        config: the configuration of a run.
        model: what was built by it. A model whose settings do not all stand in its
            configuration has an attribute ``settings``, a mapping, which is added: LlamaRec's
            says how its retriever was configured.
    """
    added = getattr(model, "settings", {})
    return plain({k: v for k, v in {**config.final_config_dict, **added}.items() if k not in MACHINE_KEYS})


def catalogue_of(dataset: Any, model: Any = None) -> dict[str, Any]:
    """What recommending needs of a data set: the item tokens by id, and the sizes that models ask for.

    A model that reads titles has them by item id as its attribute ``titles``; they are added.
    """
    fields = [field for field in dataset.field2type if field in dataset.field2id_token]
    items = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    titles = {"titles": model.titles} if hasattr(model, "titles") else {}
    return {"items": items, "sizes": {field: dataset.num(field) for field in fields}, **titles}


def items_of(saved: Checkpoint) -> list[str]:
    """The item tokens of a checkpoint by id; id 0 is padding."""
    items: list[str] = saved.info["catalogue"]["items"]
    return items


def load_weights(model: torch.nn.Module, saved: Checkpoint, path: Path) -> None:
    """Copy a checkpoint's weights into a model, on whatever device that is.

    Args:
        model: the model.
        saved: the checkpoint.
        path: where it was read from, for the error.

    Raises:
        UserError: the names or sizes of the weights do not fit.
    """
    weights = {name.removeprefix("model."): t for name, t in saved.tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        first = lines[min(1, len(lines) - 1)].strip()
        raise UserError(f"checkpoint {path}: its weights do not fit this model ({first})") from error


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors, named ``optimizer.<index>.<name>``, and JSON for all
    else.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                others.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": plain(state_dict["param_groups"]), "others": plain(others)}


def unflatten_optimizer(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in info["others"].items()}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, entry = rest.partition(".")
            state.setdefault(int(index), {})[entry] = tensor
    return {"state": state, "param_groups": info["param_groups"]}


def keyed(value: Any) -> Any:
    """:func:`plain`, but for dicts whose keys are whole numbers; :func:`unkeyed` gives those
    back.
    """
    if isinstance(value, dict) and value and all(isinstance(key, int) for key in value):
        return {"keys": list(value), "values": [keyed(entry) for entry in value.values()]}
    if isinstance(value, dict):
        return {str(key): keyed(entry) for key, entry in value.items()}
    return [keyed(entry) for entry in value] if isinstance(value, (list, tuple)) else plain(value)


def unkeyed(value: Any) -> Any:
    """The inverse of :func:`keyed`. Schedulers keep milestones in a Counter, and so it becomes
    one.
    """
    if isinstance(value, dict) and set(value) == {"keys", "values"}:
        return Counter(dict(zip(value["keys"], map(unkeyed, value["values"]))))
    if isinstance(value, dict):
        return {key: unkeyed(entry) for key, entry in value.items()}
    return [unkeyed(entry) for entry in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The value in JSON's terms; what JSON cannot hold (an enum, a device) becomes its text."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) or (hasattr(value, "__float__") and not isinstance(value, Tensor)):
        return float(value)
    return str(value)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
