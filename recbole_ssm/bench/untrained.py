"""Untrained models and random histories: times depend neither on weights nor on tastes, so no data set is needed."""

from __future__ import annotations

from typing import Any

import torch

from recbole_ssm import compat

compat.install()

from recbole.data.interaction import Interaction  # noqa: E402
from recbole.model.sequential_recommender import SASRec  # noqa: E402

from recbole_ssm.data.outline import DatasetOutline  # noqa: E402
from recbole_ssm.model.registry import build_model  # noqa: E402
from recbole_ssm.quick_start import configure  # noqa: E402

RECBOLE = "RecBole SASRec"


def untrained_model(name: str, items: int, device: torch.device, **options: Any) -> Any:
    """A model of its own default sizes.

    Args:
        name: as users type it, or ``RecBole SASRec``, RecBole's own.
        items: how many items its catalogue has, the padding not counted.
        device: where it lives.
        **options: config keys, such as ``MAX_ITEM_LIST_LENGTH``.
    """
    config = configure("SASRec" if name == RECBOLE else name, "generated", config_dict={"state": "ERROR", **options})
    model_class = SASRec if name == RECBOLE else None
    return build_model(config.final_config_dict, DatasetOutline(items + 1), device, model_class)


def model_of_a_step(name: str, items: int, device: torch.device, length: int, layers: int) -> Any:
    """A model that trains with the loss over all items. ``layers`` are those of our models; SASRec has RecBole's 2."""
    options = {"MAX_ITEM_LIST_LENGTH": length, "train_neg_sample_args": None, "loss_type": "CE"}
    sizes = {} if "SASRec" in name else {"num_layers": layers}
    return untrained_model(name, items, device, **options, **sizes)


def random_histories(batch: int, length: int, items: int, device: torch.device) -> Interaction:
    """A batch as RecBole's loaders make it: histories of full length and an item that comes next."""
    rows = {
        "item_id_list": torch.randint(1, items + 1, (batch, length)),
        "item_length": torch.full((batch,), length),
        "item_id": torch.randint(1, items + 1, (batch,)),
    }
    return Interaction(rows).to(device)
