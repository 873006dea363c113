"""How many targets fit into memory at once, found by trying, after it ran out."""

from __future__ import annotations

from typing import Any

import torch

from recbole_ssm.data.loader import PackedBatch, Part
from recbole_ssm.optim.gradient_noise import is_out_of_memory


def what_fits(part: Part, parts: int, backward: Any, optimizer: torch.optim.Optimizer) -> str:
    """What to do about a part of a step that did not fit into memory, as one line for the user.

    Args:
        part: one of the step's parts, which is tried again in halves until one fits.
        parts: how many parts the step has.
        backward: takes a part through the model and back.
        optimizer: of the run, whose gradients are cleared.
    """
    batch, asked = part.batch, _targets(part.batch)
    while (targets := _targets(batch)) > 1:
        batch = _first_half(batch)
        if _fits(part._replace(batch=batch), backward, optimizer):
            fits = -(-targets // 2)
            return (
                f"train_batch_size: memory runs out with {asked} targets at once, and {fits} fit; take "
                f"train_batch_size: {fits * parts}, or keep it and take gradient_accumulation_steps: "
                f"{-(-asked // fits) * parts}"
            )
    return "train_batch_size: memory runs out with a single target; take a smaller model or MAX_ITEM_LIST_LENGTH"


def _fits(part: Part, backward: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a part goes through the model and back, with room for the two states that Adam makes of a weight."""
    optimizer.zero_grad()
    try:
        weights = [] if optimizer.state else [p for group in optimizer.param_groups for p in group["params"]]
        later = [torch.empty_like(weight) for weight in 2 * weights]
        backward(part)
        del later
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _targets(batch: Any) -> int:
    return len(batch.target if isinstance(batch, PackedBatch) else batch)


def _first_half(batch: Any) -> Any:
    """The first half of a batch's targets, with their histories."""
    half = -(-_targets(batch) // 2)
    if not isinstance(batch, PackedBatch):
        return batch[:half]
    total = int(batch.at[half - 1]) + 1
    bounds = batch.cu_seqlens.clamp(max=total)
    negative, times, now = (
        None if values is None else values[:end]
        for values, end in ((batch.negative, half), (batch.times, total), (batch.now, total))
    )
    return PackedBatch(batch.items[:total], bounds, batch.at[:half], batch.target[:half], negative, times, now)
