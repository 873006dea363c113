"""The losses of RecBole's own models over tiles: the same numbers without the matrix of all logits.

Only losses that are known to the letter are computed here: cross-entropy over all items, as
SASRec and nine others of RecBole's have it, and BERT4Rec's over masked items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recbole_ssm import compat
from recbole_ssm.ops import linear_cross_entropy

compat.install()

from recbole.model.sequential_recommender import BERT4Rec, SASRec  # noqa: E402


def loss_of(model: Any, batch: Any) -> Any:
    """What ``model.calculate_loss(batch)`` returns."""
    function = None if "calculate_loss" in vars(model) else _tiled(model)
    return model.calculate_loss(batch) if function is None else function(model, batch)


def _tiled(model: Any) -> Callable[[Any, Any], Tensor] | None:
    """The function that takes the place of the model's loss; None where there is none."""
    if getattr(model, "loss_type", None) != "CE":
        return None
    theirs = type(model).calculate_loss
    if _same(theirs, BERT4Rec.calculate_loss):
        return _masked_items
    loss: Any = getattr(model, "loss_fct", None)
    plain = type(loss) is nn.CrossEntropyLoss and loss.weight is None and loss.reduction == "mean"
    if not plain or loss.label_smoothing or not _same(theirs, SASRec.calculate_loss):
        return None
    return _next_item


def _same(one: Any, other: Any) -> bool:
    """Whether two functions were compiled from the same lines: RecBole's models hold copies of one another's."""
    a, b = getattr(one, "__code__", None), other.__code__
    return a is not None and (a.co_code, a.co_consts, a.co_names) == (b.co_code, b.co_consts, b.co_names)


def _next_item(model: Any, interaction: Any) -> Tensor:
    output = model.forward(interaction[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN])
    return linear_cross_entropy(output, model.item_embedding.weight, interaction[model.POS_ITEM_ID])


def _masked_items(model: Any, interaction: Any) -> Tensor:
    """The mean over masked places. The learned bias of an item counts as one more number of its embedding."""
    output = model.forward(interaction[model.MASK_ITEM_SEQ])  # [B, L, hidden_size]
    # The places [B, most], filled up with zeros.
    places = interaction[model.MASK_INDEX]
    row, column = places.nonzero(as_tuple=True)
    masked = output[row, places[row, column]]  # [n, hidden_size]
    items = torch.cat([model.item_embedding.weight[: model.n_items], model.output_bias[:, None]], 1)
    target = interaction[model.POS_ITEMS][row, column]
    return linear_cross_entropy(torch.cat([masked, masked.new_ones(len(masked), 1)], 1), items, target)
