"""The mean of an optimiser's iterates, for evaluation: less noise than its last iterate has, at no more gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recbole_ssm.errors import UserError


class IterateAverage:
    """The running mean of an optimiser's iterates, whichever optimiser it is; iterate k weighs about k^power.

    After the n-th step mean <- mean + (power + 1) / (power + n) (x_n - mean): polynomial-decay averaging (O. Shamir,
    T. Zhang, ICML 2013, section 4). Power 0 is the uniform mean, whose convergence theorems speak of; the larger it is,
    the sooner the start is forgotten: power 8 is about a mean over the last ninth of the way, however long that is.

    It lives in the optimiser's state, one buffer a parameter, so that ``optimizer.state_dict()`` holds it; build it
    before ``load_state_dict``. A parameter is averaged from its first gradient on. Every step counts, that of a passive
    start too::

        optimizer = USGM(model.parameters(), D=100)
        average = IterateAverage(optimizer)
        ...  # optimizer.step(), as always
        with average.evaluation_point():
            validate(model)

    Args:
        optimizer: any; its next steps are followed.
        power: from 0 up.

    Raises:
        UserError: an impossible power.
    """

    def __init__(self, optimizer: Optimizer, power: float = 0.0) -> None:
        if not 0 <= power < math.inf:
            raise UserError(f"IterateAverage: power is {power!r}; give a number from 0 up")
        self.optimizer, self.power = optimizer, power
        optimizer.register_step_post_hook(self._follow)

    @torch.no_grad()
    def _follow(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["averaged_steps"] = group.get("averaged_steps", 0) + 1
            # Adam and others take an empty state for their first step: nothing may be put into it before that
            params = [p for p in group["params"] if p.grad is not None or "average" in optimizer.state[p]]
            for p in params:
                if "average" not in optimizer.state[p]:
                    optimizer.state[p]["average"] = p.detach().clone()
            if params:
                share = (self.power + 1) / (self.power + group["averaged_steps"])
                torch._foreach_lerp_([optimizer.state[p]["average"] for p in params], params, share)

    def evaluation_point(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the parameters are their means; afterwards they are what they were."""
        return evaluation_point(self.optimizer, "average")


@contextlib.contextmanager
def evaluation_point(optimizer: Optimizer, buffer: str) -> Iterator[None]:
    """Within this context the parameters are what ``buffer`` of their state holds, where they have one."""
    params = [p for group in optimizer.param_groups for p in group["params"] if buffer in optimizer.state[p]]
    current = [p.detach().clone() for p in params]
    _copy(params, [optimizer.state[p][buffer] for p in params])
    try:
        yield
    finally:
        _copy(params, current)


@torch.no_grad()
def _copy(params: list[Tensor], values: list[Tensor]) -> None:
    if params:
        torch._foreach_copy_(params, values)
