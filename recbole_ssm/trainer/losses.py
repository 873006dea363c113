"""The losses of an epoch's steps, added up where they are computed, so that no step waits to be read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.trainer.checkpoint import SUFFIX

LOOK_EVERY = 8
"""On a GPU, the steps between two looks at the losses. A look sees what the GPU had done at the one before, so that a
loss that is not finite is found at most twice as many steps later.
"""


class Losses:
    """Sums of the terms of the loss over the steps of an epoch.

    On a CPU every loss is looked at when it comes. A GPU is asked every :data:`LOOK_EVERY` steps, and the answer is
    read when it is asked the next time: training never waits for the newest step.

    Args:
        trainer: whose device computes them, and whose epoch and folder an error names.

    Raises:
        UserError: from all methods that look at a loss, if one is not finite.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.every = 1 if trainer.device.type == "cpu" else LOOK_EVERY
        self.begin(0, ())

    def begin(self, number: int, sums: tuple[float, ...]) -> None:
        """Step ``number`` comes next, after steps whose losses had these sums."""
        self._first, self._added = number, 0
        # How many of the added steps had finite sums, and after it the sums.
        self._state = torch.tensor([0.0, *sums], dtype=torch.float64, device=self.trainer.device)
        self._asked: Tensor | None = None
        self._answered: torch.cuda.Event | None = None

    def add(self, terms: Tensor) -> None:
        """Take in the loss of the next step, the terms ``[n]`` in float64."""
        sums = self._state[1:] + terms if len(self._state) > 1 else terms
        # Once a sum is infinite or no number, it stays so.
        self._state = torch.cat([self._state[:1] + sums.isfinite().all(), sums])
        self._added += 1
        if self.every == 1:
            self._judge(self._state)
        elif self._added % self.every == 0:
            if self._answered is not None:
                self._answered.synchronize()
            if self._asked is not None:
                self._judge(self._asked)
            self._asked = self._state.to("cpu", non_blocking=True)
            if self._state.is_cuda:
                self._answered = torch.cuda.Event()
                self._answered.record()

    def sums(self) -> tuple[float, ...]:
        """The sums of each term; a GPU is waited for."""
        return self._judge(self._state)

    def _judge(self, state: Tensor) -> tuple[float, ...]:
        good, *sums = state.tolist()
        if not all(map(math.isfinite, sums)):
            raise UserError(self._refusal(self._first + int(good), sum(sums)))
        return tuple(sums)

    def _refusal(self, number: int, value: float) -> str:
        trainer = self.trainer
        written = trainer.folder is not None and any(trainer.folder.glob(f"*{SUFFIX}"))
        kept = f"; the last good checkpoint is in {trainer.folder}" if written else ""
        smaller = f"a smaller learning_rate than {trainer.learning_rate}"
        if hasattr(trainer.optimizer, "step_sizes"):
            smaller = f"a smaller D or rho in learner_args than {trainer.config['learner_args']}"
        return (
            f"epoch {trainer.position.epoch}, step {number}: the training loss became {value}; "
            f"try {smaller} or clip_grad_norm: {{'max_norm': 5}}{kept}"
        )
