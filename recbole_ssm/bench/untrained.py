"""Untrained models and random histories: times depend neither on weights nor on tastes, so no data set is needed."""

from __future__ import annotations

from typing import Any

import torch

from recbole_ssm import compat

compat.install()

from recbole.data.interaction import Interaction  # noqa: E402

from recbole_ssm.data.outline import DatasetOutline  # noqa: E402
from recbole_ssm.model import get_model  # noqa: E402
from recbole_ssm.quick_start import configure  # noqa: E402


def untrained_model(
    name: str, items: int, device: torch.device, model_class: type[Any] | None = None, **options: Any
) -> Any:
    """A model of its own default sizes.

    Args:
        name: as users type it.
        items: how many items its catalogue has, the padding not counted.
        device: where it lives.
        model_class: another class with the configuration of that model, such as RecBole's own.
        **options: config keys, such as ``MAX_ITEM_LIST_LENGTH``.
    """
    config = configure(name, "generated", config_dict={"state": "ERROR", **options})
    config["device"] = device
    return (model_class or get_model(name))(config, DatasetOutline(items + 1)).to(device)


def random_histories(batch: int, length: int, items: int, device: torch.device) -> Interaction:
    """A batch as RecBole's loaders make it: histories of full length and an item that comes next."""
    rows = {
        "item_id_list": torch.randint(1, items + 1, (batch, length)),
        "item_length": torch.full((batch,), length),
        "item_id": torch.randint(1, items + 1, (batch,)),
    }
    return Interaction(rows).to(device)
