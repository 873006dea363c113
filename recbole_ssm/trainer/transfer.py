"""The weights of a checkpoint in a model of another data set: an item keeps its vector by its token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recbole_ssm.data.outline import DatasetOutline
from recbole_ssm.errors import UserError
from recbole_ssm.trainer.checkpoint import Checkpoint
from recbole_ssm.trainer.known_items import items_of

LEARNING_KEYS = {
    *("initializer_range", "dt_init", "loss_type", "num_negatives", "negative_power", "gbce_t"),
    *("label_smoothing", "logq_correction"),
}
"""The keys of models that say how weights start and are learned, not what the model computes; and its dropout."""


def shaping_keys(saved: Checkpoint, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint that say what its model computes.

    Args:
        saved: the checkpoint.
        rows: the keys that the model has.
    """
    return {key: saved.info["config"][key] for key in _shaping(rows) if key in saved.info["config"]}


def _shaping(rows: Mapping[str, Any]) -> list[str]:
    names = [key for key, row in rows.items() if row.scope == "model" and key not in LEARNING_KEYS]
    return [key for key in names if "dropout" not in key] + ["MAX_ITEM_LIST_LENGTH"]


def require_same_shape(saved: Checkpoint, path: Path, config: Any) -> None:
    """Make sure that a configuration's model computes what the checkpoint's does.

    Raises:
        UserError: it is another model, or a key that shapes it is another one.
    """
    if saved.info["model"] != config["model"]:
        raise UserError(f"checkpoint {path}: of {saved.info['model']}, cannot start {config['model']}")
    shaping = _shaping(config.rows)
    # A key that the version did not have which wrote the checkpoint had the effect of its default.
    defaults = {key: value for key, value in config.internal_config_dict.items() if key in shaping}
    for key, before in {**defaults, **shaping_keys(saved, config.rows)}.items():
        if config[key] != before:
            raise UserError(
                f"init: {key} is {config[key]!r} here and was {before!r} in {path}; it shapes the model, so it must "
                "agree: leave it out"
            )


def transfer(
    model: nn.Module,
    items: Sequence[str],
    saved: Checkpoint,
    path: Path,
    build: Callable[[Mapping[str, Any], DatasetOutline], nn.Module],
) -> int:
    """Copy a checkpoint's weights into a model that has other items.

    A weight that has an entry for each item is copied entry by entry, by the items' tokens;
    items that the checkpoint does not know keep what the model was built with, and so do weights
    that have an entry for each user, as checkpoints do not name users. Which weights these are,
    and along which dimension, is seen from small models that differ in one number alone.

    Args:
        model: newly built; its weights are written over.
        items: its item tokens by id; id 0 is padding.
        saved: the checkpoint.
        path: where it was read from, for the errors.
        build: makes the checkpoint's model, on the CPU, from its settings and sizes.

    Returns:
        How many of the items the checkpoint knows.

    Raises:
        UserError: a weight is missing, or has another size for another reason.
    """
    settings, before = saved.info["config"], items_of(saved, path)
    sizes, field = saved.info["catalogue"]["sizes"], settings["ITEM_ID_FIELD"]
    changed: list[dict[str, int]] = [{field: 8}, {field: 9}, {field: 8, settings["USER_ID_FIELD"]: 11}]
    outlines = [DatasetOutline({**sizes, settings["USER_ID_FIELD"]: 10, **one}, settings["model"]) for one in changed]
    small, larger, more_users = (build(settings, outline).state_dict() for outline in outlines)
    known = {token: index for index, token in enumerate(before) if index}
    pairs = [(index, known[token]) for index, token in enumerate(items) if index and token in known]
    # The padding is an entry too.
    here, there = torch.tensor([(0, 0), *pairs]).T

    weights = {}
    for name, weight in model.state_dict().items():
        old, new = saved.tensors.get(f"model.{name}"), weight.to("cpu", copy=True)
        if old is None:
            raise UserError(f"checkpoint {path}: it has no weight {name}, which this model has")
        if small[name].shape != more_users[name].shape:
            continue
        axes = [axis for axis, size in enumerate(small[name].shape) if size != larger[name].shape[axis]]
        try:
            if axes:
                # Behind the items some models have entries of their own, such as BERT4Rec's mask.
                to = torch.cat([here, torch.arange(len(items), new.shape[axes[0]])])
                of = torch.cat([there, torch.arange(len(before), old.shape[axes[0]])])
                new.index_copy_(axes[0], to, old.index_select(axes[0], of))
            else:
                new.copy_(old.view(new.shape))
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"checkpoint {path}: its weight {name} is of size {list(old.shape)}, this model's {list(new.shape)}"
            ) from error
        weights[name] = new
    model.load_state_dict({**model.state_dict(), **weights})
    return len(pairs)
