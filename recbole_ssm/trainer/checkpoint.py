"""Checkpoints: one safetensors file, tensors and a JSON header; loading one never runs code.

The header's metadata holds two entries. ``recbole_ssm`` is JSON with the format's version, the
model's name, its plain configuration and the state of training, and, where the model is a first stage that
is trained for another model, that one's name and options (``for``); ``sha256`` is the digest of that
text and of all tensors, so that a damaged file is known as such. The tokens of the items are
tensors too, since a header of safetensors may not be large. Equal checkpoints are equal files:
all entries of a header are sorted. A file is whole or absent: it is written under a temporary
name, flushed to the disk and renamed.

Format 2, of version 0.1.0, is read as well. There the tokens stand in the JSON, and Mamba-2 with
several groups normalises over all of its channels at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from recbole_ssm.errors import UserError, first_line
from recbole_ssm.files import digest as file_digest
from recbole_ssm.files import whole
from recbole_ssm.keys import MACHINE_KEYS
from recbole_ssm.kinds import NONE, OPTIONS, Either, Fields, Flag, KindError, Many, Number, Table, Text
from recbole_ssm.synonyms import renamed
from recbole_ssm.trainer.tensorfile import bytes_of, digest, header, in_order

FORMAT, FORMER = 3, 2
SUFFIX = ".safetensors"
BEST = "best" + SUFFIX
MOST_LISTS = 1_000_000
"""How many lists and mappings a header may hold, so that a small file cannot take much memory."""

_COUNT = Number("[0, inf)", whole=True)
INFO = {
    "model": Text(),
    "config": OPTIONS,
    "for": Fields({"model": Text(), "options": OPTIONS}, open=True, needs=("model", "options")),
    "catalogue": Fields({"sizes": Table(_COUNT, "{'item_id': 5}")}, open=True, needs=("sizes",)),
    "training": Either(
        NONE,
        Fields(
            {
                **dict.fromkeys(("epoch", "number", "seen", "global_step", "cur_step"), _COUNT),
                "loss": Many(Number()),
                "ended": Flag(),
                "best_valid_score": Either(NONE, Number()),
                "best_valid_result": Either(NONE, OPTIONS),
                "train_losses": Table(Number(), "{'0': 0.5}"),
                "optimizer": Fields({"param_groups": Many(OPTIONS), "others": Table(OPTIONS, "{'0': {}}")}),
                "scheduler": Either(NONE, OPTIONS),
                "scaler": OPTIONS,
                "adaptive": Either(NONE, OPTIONS),
                "hooks": Table(OPTIONS, "{'Latency': {}}"),
                "fingerprint": Text(),
                "options": OPTIONS,
            },
            open=True,
        ),
    ),
}
"""What the entries of a header may be."""


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
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **info})
    beginning = header(plain, {"recbole_ssm": text, "sha256": digest(plain, text)})
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as temporary, open(temporary, "wb") as file:
            file.write(beginning)
            for name in in_order(plain):
                file.write(bytes_of(plain[name]))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"checkpoint {path} was not written: {error.strerror or error}"
        raise (OSError(error.errno, text) if error.errno else OSError(text)) from error


def check_room(folder: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Before training: that a checkpoint of these can be written to a folder.

    Raises:
        UserError: what is no tensor is more than a header may hold, or the disk is too full.
    """
    header(tensors, {"recbole_ssm": json.dumps(info), "sha256": "0" * 64})
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"checkpoint_dir: a checkpoint takes {needed / 2**20:,.0f} MiB, and {folder} has {free / 2**20:,.0f} MiB "
            "left; make room or name another folder"
        )


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: the file is missing, cut short, damaged, of another kind, or of another
            version of this package.
    """
    if not path.is_file():
        hint = ""
        if path.name == BEST and path.parent.is_dir():
            hint = "; name the folder of a run of recbole-ssm train (compare and other studies keep no models)"
        raise UserError(f"checkpoint {path}: there is no such file{hint}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            text = metadata.get("recbole_ssm")
            if text is not None and text.count("[") + text.count("{") > MOST_LISTS:
                raise ValueError(f"more than {MOST_LISTS:,} lists in its header")
            # They lie in the mapped file, which could not be replaced on Windows while they do:
            # so they are cloned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        info = json.loads(text) if text is not None else None
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"checkpoint {path}: cut short or damaged ({reason}); take another one") from error
    if text is None or not isinstance(info, dict) or not isinstance(info.get("format"), int):
        raise UserError(f"checkpoint {path}: a safetensors file, but none that recbole_ssm wrote")
    if info["format"] not in (FORMAT, FORMER):
        other = "a later" if info["format"] > FORMAT else "an earlier"
        raise UserError(
            f"checkpoint {path}: written by {other} recbole_ssm (format {info['format']}, here {FORMAT}); "
            "read it with that version"
        )
    if metadata.get("sha256") != digest(tensors, text):
        raise UserError(f"checkpoint {path}: damaged (its content is not what was written); take another one")
    _check_info(path, info)
    if "config" in info:
        info["config"] = renamed(info["config"])
    if info["format"] == FORMER:
        _keep_former_norm(info)
    _forbid_downloads(info)
    return Checkpoint(tensors, info)


def _check_info(path: Path, info: Mapping[str, Any]) -> None:
    """That what a header holds is of the right types."""
    for name, kind in INFO.items():
        try:
            if name in info:
                kind.take(info[name])
        except KindError as error:
            raise UserError(f"checkpoint {path}: inconsistent, its {name} {error}; take another one") from error


def _forbid_downloads(settings: dict[str, Any]) -> None:
    """Let no base model be downloaded because a file says so, wherever in its settings it does."""
    for key, value in settings.items():
        if key == "base_model_download":
            settings[key] = False
        elif isinstance(value, dict):
            _forbid_downloads(value)


def _keep_former_norm(info: dict[str, Any]) -> None:
    """Let 2Mamba4Rec normalise as it did when an earlier version trained it, where it has several groups."""
    config = info.get("config", {})
    options = (info.get("training") or {}).get("options", {})
    for settings in (config, config.get("retriever_settings") or {}):
        if settings.get("model") == "2Mamba4Rec" and settings.get("n_groups", 1) != 1:
            settings["joint_norm"] = True
            if settings is config:
                options["joint_norm"] = True


def read_with_digest(path: Path) -> tuple[Checkpoint, str]:
    """:func:`read`, and the SHA-256 of the file that was read: a run that still trains may put another in its place."""
    former = file_digest(path) if path.is_file() else ""
    while True:
        found, now = read(path), file_digest(path)
        if now == former:
            return found, now
        former = now


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
    path = best_file(path)
    return path, read(path)


def best_file(path: Path) -> Path:
    """The file that :func:`find_best` reads; it need not be there."""
    return run_folder(path, BEST) / BEST if path.is_dir() else path


def run_folder(path: Path, needed: str = f"*{SUFFIX}") -> Path:
    """The folder of a run: this one, or the one in it that was written to last, which is logged.

    ``needed`` is a file that it must hold, or a pattern.
    """
    if any(path.glob(f"*{SUFFIX}")):
        return path
    written = {file.parent: file.stat().st_mtime_ns for file in path.glob(f"*/{needed}")}
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


@contextlib.contextmanager
def doubted(saved: Checkpoint, path: Path) -> Iterator[None]:
    """While a model is built from a checkpoint's settings: it has hardly more weights than the checkpoint holds.

    A frozen base model is no part of a checkpoint; a random one has 100 million weights at most.

    Raises:
        UserError: it has more, or its class does not take the settings.
    """
    weights = [tensor.numel() for name, tensor in saved.tensors.items() if name.startswith("model.")]
    base = saved.info.get("config", {}).get("base_model")
    spare = {"None": 0, "random": 10**8}.get(str(base), math.inf)
    tensors, numbers = 4 * len(weights) + 1000, 4 * sum(weights) + 10**6 + spare

    def count(module: Any, name: str, value: Any) -> None:
        nonlocal tensors, numbers
        if value is not None:
            tensors, numbers = tensors - 1, numbers - value.numel()
        if min(tensors, numbers) < 0 and spare < math.inf:
            raise UserError(f"checkpoint {path}: inconsistent, its settings are of a larger model than its weights")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Constructors raise anything of settings that are not theirs.
        raise UserError(f"checkpoint {path}: its settings do not fit its model ({first_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()


def load_weights(model: torch.nn.Module, saved: Checkpoint, path: Path) -> None:
    """Copy a checkpoint's weights into a model, on whatever device that is.

    Args:
        model: the model.
        saved: the checkpoint.
        path: where it was read from, for the error.

    Raises:
        UserError: the names or sizes of the weights do not fit, or one is not a finite number.
    """
    weights = {name.removeprefix("model."): t for name, t in saved.tensors.items() if name.startswith("model.")}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"checkpoint {path}: its weight {name} holds values that are not finite; take an earlier one"
            )
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
