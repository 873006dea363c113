"""All that the next step of training depends on, as one object: a checkpoint holds it, and a
run goes on from it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.errors import UserError, shown
from recbole_ssm.keys import FREE_KEYS
from recbole_ssm.trainer.checkpoint import Checkpoint, flatten_optimizer, plain, settings_of, unflatten_optimizer

RandomStates = Mapping[str, Tensor]
"""What :func:`random_states` returns."""


class Position(NamedTuple):
    """Where training stands within its epochs."""

    epoch: int = 0
    number: int = 0
    """How many steps of the epoch are done."""
    seen: int = 0
    """How many targets those steps had."""
    loss: tuple[float, ...] = ()
    """The sum of each term of the loss over those steps."""
    ended: bool = False
    """Whether all steps of the epoch are done, so that its evaluation comes next."""

    def validated(self, every: int) -> bool:
        """Whether this is the moment behind a validation, where there is one every so many epochs."""
        return self.epoch > 0 and self.epoch % every == 0 and self.number == 0 and not self.ended


class Snapshot(NamedTuple):
    """A moment of training."""

    weights: Mapping[str, Tensor]
    """The model's state as it is tested and served."""
    optimizer_weights: Mapping[str, Tensor]
    """Those of the weights that training goes on from, where they differ from what is tested
    and served.
    """
    optimizer: Mapping[str, Any]
    """The state of the optimiser."""
    random: list[RandomStates]
    """The random states of each process."""
    progress: Mapping[str, Any]
    """All else, in JSON's terms."""

    def checkpoint(self) -> Checkpoint:
        """The tensors of a checkpoint, and what its header says of training."""
        tensors = {f"model.{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"iterate.{name}": tensor for name, tensor in self.optimizer_weights.items()}
        optimizer_tensors, optimizer = flatten_optimizer(self.optimizer)
        tensors |= optimizer_tensors
        for rank, states in enumerate(self.random):
            tensors |= {f"rng.{rank}.{name}": tensor for name, tensor in states.items()}
        return Checkpoint(tensors, {"training": {**self.progress, "optimizer": optimizer}})

    @classmethod
    def of(cls, saved: Checkpoint) -> Snapshot:
        """The moment that a checkpoint holds; one of RecBole's own has no random states.

        Raises:
            KeyError: the checkpoint lacks something.
        """
        progress = saved.info["training"]
        kinds: dict[str, dict[str, Tensor]] = {"model": {}, "iterate": {}, "rng": {}}
        for name, tensor in saved.tensors.items():
            kind, _, rest = name.partition(".")
            kinds.setdefault(kind, {})[rest] = tensor
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in kinds["rng"].items():
            rank, _, kind = name.partition(".")
            states.setdefault(int(rank), {})[kind] = tensor
        return cls(
            weights=kinds["model"],
            optimizer_weights=kinds["iterate"],
            optimizer=unflatten_optimizer(saved.tensors, progress["optimizer"]),
            random=[states[rank] for rank in sorted(states)],
            progress=progress,
        )


def require_same_run(saved: Checkpoint, path: Path, config: Any, model: Any) -> None:
    """Make sure that a run of this configuration may go on from a checkpoint, which was read from ``path``.

    Raises:
        UserError: it is of another model, or a setting that changes results is another one.
    """
    name = saved.info.get("model")
    if saved.info.get("training") is None or name != config["model"]:
        raise UserError(f"checkpoint {path}: of {name}, cannot resume {config['model']}")
    # RecBole's own checkpoints come without a configuration that could be compared.
    if "config" not in saved.info:
        return
    now, then = settings_of(config, model), saved.info["config"]
    # A key that the version did not have which wrote the checkpoint had the effect of its default.
    defaults = plain(config.internal_config_dict)
    # Some of RecBole's models add keys of their own when they are built, such as BERT4Rec's MASK_INDEX.
    for key in sorted(set(now) if model is None else set(now) | set(then)):
        before = then.get(key, defaults.get(key))
        if now.get(key) != before and key not in FREE_KEYS:
            raise UserError(
                f"resume: {key} is {shown(now.get(key))} here and was {shown(before)} in {path}; leave it as it was, "
                "or start a new run"
            )


def random_states() -> dict[str, Tensor]:
    """The global random states of Python, NumPy and PyTorch on all devices, as tensors."""
    _, keys, position, has_gauss, gauss = tuple(np.random.get_state(legacy=True))
    assert isinstance(keys, np.ndarray)
    version, words, next_gauss = random.getstate()
    states = {
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: RandomStates) -> None:
    """Bring back what :func:`random_states` returned."""
    *keys, position, has_gauss = states["numpy"].tolist()
    gauss = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, *words = states["python"].tolist()
    next_gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), next_gauss[0] if next_gauss else None))
    torch.set_rng_state(states["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda{index}"], index)
