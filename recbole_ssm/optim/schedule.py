"""Learning rates that rise and fall once over all steps of a training."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

SHAPES = ("cosine", "one_cycle")
# As torch.optim.lr_scheduler.OneCycleLR: the first and the last rate over the highest, and the first of Adam's betas,
# which falls as the rate rises.
FIRST, LAST = 1 / 25, 1 / 25e4
HIGH_BETA, LOW_BETA = 0.95, 0.85


class Schedule(LRScheduler):
    """A schedule whose length is told when it is known; it takes a step after each of the optimiser's.

    ``cosine`` rises linearly to the optimiser's rate and falls to 0 along half a cosine (Loshchilov and Hutter, ICLR
    2017, equation 5, without restarts). ``one_cycle`` rises along half a cosine from a 25th of the rate and falls so to
    nearly 0, while the first of Adam's betas goes from 0.95 to 0.85 and back (Smith and Topin 2018, arXiv 1708.07120).
    For Adam this is torch's OneCycleLR with its defaults, which also moves the momentum of SGD and RMSprop; here that
    stays as it is.

    Args:
        optimizer: whose rates are changed; those that it has are the highest.
        shape: one of :data:`SHAPES`.
        warmup: the part of all steps in which the rate rises, in [0, 1).
    """

    def __init__(self, optimizer: Optimizer, shape: str, warmup: float) -> None:
        self.shape, self.warmup, self.total = shape, warmup, 1
        super().__init__(optimizer)

    def plan(self, total: int) -> None:
        """Tell how many steps there are in all; before the first one, and again where a training goes on."""
        self.total = max(total, 1)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr()):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self._set_betas()

    def step(self, epoch: int | None = None) -> None:
        """Change the rates to those of the next step."""
        super().step()
        self._set_betas()

    def get_lr(self) -> list[Any]:
        """The rate of each parameter group at this step."""
        at = min(self.last_epoch, self.total - 1)
        if self.shape == "cosine":
            rising = round(self.warmup * self.total)
            part = (at - rising) / max(self.total - rising, 1)
            factor = (at + 1) / rising if at < rising else _between(1, 0, part)
        else:
            rising, part = self._place_in_cycle()
            factor = _between(FIRST, 1, part) if rising else _between(1, LAST, part)
        return [base * factor for base in self.base_lrs]

    def _place_in_cycle(self) -> tuple[bool, float]:
        """Whether the rate rises at this step, and how much of its way up or down is done."""
        at, top = min(self.last_epoch, self.total - 1), self.warmup * self.total - 1
        if at <= top:
            return True, at / top if top > 0 else 1.0
        top = max(top, 0.0)
        return False, (at - top) / max(self.total - 1 - top, 1)

    def _set_betas(self) -> None:
        if self.shape != "one_cycle":
            return
        rising, part = self._place_in_cycle()
        beta = _between(HIGH_BETA, LOW_BETA, part) if rising else _between(LOW_BETA, HIGH_BETA, part)
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (beta, *group["betas"][1:])


def _between(start: float, end: float, part: float) -> float:
    """A number on the way from start to end along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))
