"""The mean of an optimiser's iterates, for evaluation: less noisy than the last iterate, without more gradients."""

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
    """The running mean of any optimiser's iterates, in which iterate k has a weight of about k^power.

    After the n-th iterate x_n

        mean <- mean + (power + 1) / (power + n) (x_n - mean)

    which is polynomial-decay averaging (O. Shamir, T. Zhang, ICML 2013, section 4). Power 0 is the uniform mean, of
    which the convergence theorems speak. A larger power forgets the start sooner: power 8 is about the mean over the
    last fifth of the way, however long that is.

    The mean is in the optimiser's state, one buffer a parameter, so that ``optimizer.state_dict()`` holds it. Make this
    object before ``load_state_dict``. The buffers of 16-bit parameters are float32, because rounding to 16 bits would
    stop the mean. A parameter's iterates count from its first gradient on. The tentative step of
    :class:`~recbole_ssm.optim.USGM` does not count::

        optimizer = USGM(model.parameters(), D=100)
        average = IterateAverage(optimizer)
        ...  # optimizer.step(), as always
        with average.evaluation_point():
            validate(model)

    Args:
        optimizer: its steps from now on are averaged.
        power: from 0 up.

    Raises:
        UserError: the power is impossible, or the optimiser has a mean already, whose buffers both would change.
    """

    def __init__(self, optimizer: Optimizer, power: float = 0.0) -> None:
        if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power < float("inf"):
            raise UserError(f"the mean's power is {power!r}; give a number from 0 up")
        followers = optimizer._optimizer_step_post_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), IterateAverage) for hook in followers):
            raise UserError("IterateAverage: this optimiser has one already; use that one")
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
                # Adam and others take an empty state for a first step, so nothing is put into it before that.
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
        """Within this context the parameters are their means; afterwards they are as before."""
        return evaluation_point(self.optimizer, "average")


@contextlib.contextmanager
def evaluation_point(optimizer: Optimizer, buffer: str) -> Iterator[None]:
    """Within this context parameters have the value of that buffer of their state, where there is one."""
    params = [p for group in optimizer.param_groups for p in group["params"] if buffer in optimizer.state[p]]
    current = [p.detach().clone() for p in params]
    _copy(params, [optimizer.state[p][buffer] for p in params])
    try:
        yield
    finally:
        _copy(params, current)


def restore_uncast(optimizer: Optimizer, state_dict: Mapping[str, Any], names: Iterable[str]) -> None:
    """Take these tensors as the state dict holds them; PyTorch has cast them to the parameter's type."""
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, index in zip(group["params"], saved_group["params"]):
            saved = state_dict["state"].get(index, {})
            for name in saved.keys() & set(names):
                optimizer.state[p][name] = saved[name].clone().to(p.device)


@torch.no_grad()
def _copy(params: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(params, values):
        p.copy_(value)
