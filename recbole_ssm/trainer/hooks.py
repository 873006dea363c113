"""What may happen beside training: the moments at which a trainer calls, and what is called.

Hooks come from three sides: whoever starts a run gives some, the configuration asks for some
(``measure_latency``), and a model may bring its own by a method ``hooks()`` that returns a list
of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recbole_ssm.data.loader import Step
from recbole_ssm.evaluation.ranks import Ranking


class Training(Protocol):
    """What a hook may see of the trainer that calls it."""

    config: Any
    """The configuration of the run."""
    model: Any
    """The model, which is in training mode or in evaluation mode as the moment wants."""
    optimizer: Any
    """The optimiser, whose state hooks read and do not change."""
    device: torch.device
    logger: Any
    tensorboard: Any
    """TensorBoard's writer; on all processes but the first it writes nothing."""
    folder: Path | None
    """Where the run's checkpoints and reports are written; None before there is a folder."""
    epochs: int
    """How many epochs the run has at most."""
    start_epoch: int
    """The epoch, from 0, with which training begins or goes on."""
    global_step: int
    """How many steps of the optimiser were taken since the start of the run."""
    valid_metric: str
    """The metric, in lower case, by which validation compares epochs."""

    @property
    def batch_size(self) -> int:
        """Targets of the next step."""

    @property
    def step_size(self) -> float:
        """The learning rate of the first parameter group, or the step size that the optimiser
        found for it.
        """


class Hook:
    """Override what you need; pass instances to :class:`~recbole_ssm.trainer.Trainer` as ``hooks``.

    A hook's state is saved in checkpoints and restored from them, by the name of its class; a
    hook that a checkpoint does not know starts fresh. Hooks are called in the order in which
    they were given, on every process.
    """

    def on_fit_start(self, trainer: Training, loader: Any) -> None:
        """Before the first epoch, after a checkpoint was restored."""

    def on_fit_end(self, trainer: Training) -> None:
        """After the last epoch, also when training stops early; not when it fails or is
        interrupted.
        """

    def on_epoch_start(self, trainer: Training, epoch: int) -> None:
        """Before an epoch's first step, or the first that is left of it."""

    def on_epoch_end(self, trainer: Training, epoch: int, loss: float) -> None:
        """After an epoch's last step and before its evaluation; ``loss`` is the mean over steps."""

    def on_step_start(self, trainer: Training, step: Step) -> None:
        """Before a step's first forward pass; its batches are on the device."""

    def on_gradients(self, trainer: Training, step: Step) -> None:
        """When the gradients are complete, unscaled and not yet clipped."""

    def on_step_end(self, trainer: Training, step: Step, loss: Tensor) -> None:
        """After the optimiser's step; ``loss`` is the mean over the step's targets, a scalar on the device.

        ``float(loss)`` reads it, and on a GPU waits until the step is done.
        """

    def on_validation_start(self, trainer: Training, loader: Any) -> None:
        """Before an epoch's evaluation on the validation rows that ``loader`` gives."""

    def on_no_validation(self, trainer: Training, loader: Any) -> None:
        """Before the first epoch of a fit that validates none: ``loader`` gives no rows (or is None), or fewer epochs
        are left than ``eval_step`` asks for.
        """

    def on_evaluation_start(self, trainer: Training) -> None:
        """Before the first batch of an evaluation."""

    def on_evaluation_batch_start(self, trainer: Training) -> None:
        """When a batch has been read and nothing is computed yet."""

    def on_scores(self, trainer: Training, rows: int) -> None:
        """When a batch is scored and its targets are ranked."""

    def on_evaluation_batch_end(self, trainer: Training, rows: int) -> None:
        """When a batch's ranks are on the CPU."""

    def on_ranking(self, trainer: Training, ranking: Ranking, dataset: Any) -> None:
        """Before the metrics of an evaluation that ranks: its rows, which are of the split ``dataset``."""

    def on_evaluation_end(self, trainer: Training, result: dict[str, float]) -> None:
        """With the metrics, a :class:`recbole_ssm.evaluation.metrics.Result`."""

    def result(self) -> dict[str, Any]:
        """What the run's result holds of this hook, beside the metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold of this hook, in JSON's terms."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
