"""The mean of an optimiser's iterates, for evaluation: less noise than its last iterate has, at no more gradients."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recbole_ssm.errors import UserError


class IterateAverage:
    """The running mean of an optimiser's iterates, whichever optimiser it is; iterate k weighs about k^power.

    After the n-th iterate mean <- mean + (power + 1) / (power + n) (x_n - mean): polynomial-decay averaging (O. Shamir,
    T. Zhang, ICML 2013, section 4). Power 0 is the uniform mean, whose convergence theorems speak of; the larger it is,
    the sooner the start is forgotten: power 8 is about a mean over the last fifth of the way, however long that is.

    It lives in the optimiser's state, one buffer a parameter (float32 of 16-bit parameters, whose own rounding would
    stop the mean), so that ``optimizer.state_dict()`` holds it; build it before ``load_state_dict``. A parameter's
    iterates count from its first gradient on; the tentative step of :class:`~recbole_ssm.optim.USGM` does not count::

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
        if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power < float("inf"):
            raise UserError(f"the mean's power is {power!r}; give a number from 0 up")
        self.optimizer, self.power = optimizer, power
        self._loading: Mapping[str, Any] = {}
        optimizer.register_step_post_hook(self._follow)
        optimizer.register_load_state_dict_pre_hook(self._before_loading)
        optimizer.register_load_state_dict_post_hook(self._after_loading)

    @torch.no_grad()
    def _follow(self, optimizer: Optimizer, *_: Any) -> None:
        alike: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            if group.get("tentative"):
                continue
            for p in group["params"]:
                state = optimizer.state[p]
                # Adam and others take an empty state for a first step: nothing may be put into it before that
                if p.grad is None and "average" not in state:
                    continue
                if "average" not in state:
                    precise = torch.promote_types(p.dtype, torch.float32)
                    state.update(average=p.detach().to(precise, copy=True), averaged_steps=0)
                state["averaged_steps"] += 1
                alike[state["averaged_steps"], p.dtype].append(p)
        for (steps, _dtype), params in alike.items():
            averages = [optimizer.state[p]["average"] for p in params]
            iterates = [p.to(average.dtype) for p, average in zip(params, averages)]
            torch._foreach_lerp_(averages, iterates, (self.power + 1) / (self.power + steps))

    def _before_loading(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        self._loading = state_dict

    def _after_loading(self, optimizer: Optimizer) -> None:
        restore_uncast(optimizer, self._loading, ("average",))
        self._loading = {}

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


def restore_uncast(optimizer: Optimizer, state_dict: Mapping[str, Any], names: Iterable[str]) -> None:
    """Take these tensors as the state dict has them; PyTorch casts a state to its parameter's type."""
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, index in zip(group["params"], saved_group["params"]):
            saved = state_dict["state"].get(index, {})
            for name in saved.keys() & set(names):
                optimizer.state[p][name] = saved[name].clone().to(p.device)


@torch.no_grad()
def _copy(params: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(params, values):
        p.copy_(value)
