"""Checkpoints: one safetensors file, tensors and a JSON header; loading one never runs code.

The header's metadata holds one entry, ``recbole_ssm``: JSON with the format's version, the model's name, its plain
configuration, the item catalogue and the state of training. A file is whole or absent: it is written under a temporary
name, flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recbole_ssm.errors import UserError

FORMAT = 1
SUFFIX = ".safetensors"


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]
    """``model.<parameter>`` and, if training state was saved, ``optimizer.<index>.<name>``; on the CPU."""
    info: dict[str, Any]
    """Everything else; JSON."""


def write(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: its final name.
        tensors: any tensors; they are stored contiguous and from the CPU.
        info: whatever JSON can hold.

    Raises:
        OSError: the disk is full or the folder cannot be written; a former file of that name is left whole.
    """
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    content = save(plain, metadata={"recbole_ssm": json.dumps({"format": FORMAT, **info})})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: the file is missing, cut short, damaged, of another kind, or of a later version of this package.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get("recbole_ssm")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = json.loads(text) if text is not None else None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {path}: cut short or damaged ({reason}); take another one") from error
    if not isinstance(info, dict) or not isinstance(info.get("format"), int):
        raise UserError(f"checkpoint {path}: a safetensors file, but none that recbole_ssm wrote")
    if info["format"] > FORMAT:
        raise UserError(
            f"checkpoint {path}: written by a later recbole_ssm (format {info['format']}); upgrade to read it"
        )
    return Checkpoint(tensors, info)
