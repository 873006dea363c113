"""What a checkpoint knows of items: their tokens, their titles where the model reads them, and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.data.outline import item_counts, item_tokens
from recbole_ssm.errors import UserError
from recbole_ssm.trainer.checkpoint import Checkpoint
from recbole_ssm.trainer.tensorfile import packed, unpacked


def catalogue_of(dataset: Any, model: Any = None) -> Checkpoint:
    """What recommending needs of a data set: the item tokens and how often each was a target, by id, and the sizes
    that models ask for.

    A model that reads titles has them by item id as its attribute ``titles``; they are added.
    """
    fields = [field for field in dataset.field2type if field in dataset.field2id_token]
    texts = {"items": item_tokens(dataset)}
    if hasattr(model, "titles"):
        texts["titles"] = model.titles
    tensors = {f"catalogue.{name}.{part}": t for name, list_ in texts.items() for part, t in packed(list_).items()}
    tensors["catalogue.counts"] = torch.from_numpy(item_counts(dataset, len(texts["items"])))
    return Checkpoint(tensors, {"catalogue": {"sizes": {field: dataset.num(field) for field in fields}}})


def counts_of(saved: Checkpoint, path: Path) -> Tensor | None:
    """How often each item of a checkpoint was a training target, by id ``[V]``; None where it does not say so.

    Raises:
        UserError: they are no counts of its items.
    """
    counts = saved.tensors.get("catalogue.counts")
    if counts is not None and (
        counts.dtype != torch.int64 or list(counts.shape) != [len(items_of(saved, path))] or bool((counts < 0).any())
    ):
        raise UserError(f"checkpoint {path}: inconsistent, its counts are not those of its items; take another one")
    return counts


def texts_in(saved: Checkpoint, path: Path, name: str) -> list[str] | None:
    """The ``items`` or the ``titles`` of a checkpoint's catalogue, by item id; None where it has none.

    Raises:
        UserError: they are no list of texts.
    """
    found = saved.info["catalogue"].get(name)
    try:
        if f"catalogue.{name}.bytes" in saved.tensors:
            found = unpacked(*(saved.tensors[f"catalogue.{name}.{part}"] for part in ("bytes", "offsets")))
        if found is not None and not (isinstance(found, list) and all(isinstance(text, str) for text in found)):
            raise ValueError("no list of texts")
    except (KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path}: inconsistent, its {name} cannot be read ({error})") from error
    return found


def items_of(saved: Checkpoint, path: Path) -> list[str]:
    """The item tokens of a checkpoint by id; id 0 is padding.

    Raises:
        UserError: there are none, or they do not fit what the checkpoint says of them.
    """
    try:
        items, size = (
            texts_in(saved, path, "items"),
            saved.info["catalogue"]["sizes"][saved.info["config"]["ITEM_ID_FIELD"]],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: its header is incomplete ({error})") from error
    if items is None or not len(items) == len(set(items)) == size:
        raise UserError(f"checkpoint {path}: inconsistent, its items are not {size:,} different ones; take another one")
    return items
