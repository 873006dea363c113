"""The step sizes that an optimiser finds for itself, over a run: a table and a plot."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from recbole_ssm import distributed
from recbole_ssm.errors import UserError
from recbole_ssm.figure import figure
from recbole_ssm.files import write_csv
from recbole_ssm.trainer.hooks import Hook, Training

ROWS = 2000
"""The most rows that are kept; beyond them every second one goes, and half as many are kept
from there on.
"""


class StepSizes(Hook):
    """Keeps the ``step_sizes()`` of the optimiser, one a parameter group, and writes them beside the checkpoints.

    After each epoch ``step_size.csv`` and, with Matplotlib, ``step_size.png`` are written.
    """

    def __init__(self) -> None:
        self.rows: list[list[float | None]] = []
        """The step, then 1 / H of each group; None where a group had no gradient yet."""
        self.every = 1

    def on_step_end(self, trainer: Training, step: Any, loss: Tensor) -> None:
        """Keep a row."""
        if trainer.global_step % self.every:
            return
        sizes = [size if math.isfinite(size) else None for size in trainer.optimizer.step_sizes()]
        self.rows.append([trainer.global_step, *sizes])
        if len(self.rows) > ROWS:
            self.every *= 2
            self.rows = [row for row in self.rows if row[0] % self.every == 0]  # type: ignore[operator]

    def on_epoch_end(self, trainer: Training, epoch: int, loss: float) -> None:
        """Log the sizes, put them on TensorBoard, and write what is there."""
        for number, size in enumerate(trainer.optimizer.step_sizes()):
            H = 1 / size if size else math.inf
            trainer.logger.info(f"{trainer.config['learner']}: group {number} H {H:.4g}, step size {size:.4g}")
            trainer.tensorboard.add_scalar(f"StepSize/{number}", size, epoch)
            trainer.tensorboard.add_scalar(f"H/{number}", H, epoch)
        if trainer.folder is not None and distributed.rank() == 0 and self.rows:
            self._write(trainer.folder)

    def _write(self, folder: Path) -> None:
        names = [f"group_{number}" for number in range(len(self.rows[0]) - 1)]
        write_csv(folder / "step_size.csv", [dict(zip(("step", *names), row)) for row in self.rows])
        steps, *groups = zip(*self.rows)
        with contextlib.suppress(UserError), figure(folder / "step_size.png", (8, 4)) as drawn:
            axes = drawn.subplots()
            for name, sizes in zip(names, groups):
                axes.plot(steps, [math.nan if size is None else size for size in sizes], label=name)
            axes.set(xlabel="step", ylabel="step size 1 / H", yscale="log")
            axes.legend()

    def state_dict(self) -> dict[str, Any]:
        """The rows, and how many steps lie between them."""
        return {"rows": self.rows, "every": self.every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.rows, self.every = state["rows"], state["every"]
