"""The curves of a run on TensorBoard and on Weights & Biases."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from recbole_ssm.data.loader import Step
from recbole_ssm.errors import UserError, require
from recbole_ssm.trainer.hooks import Hook, Training


def require_wandb(config: Any) -> None:
    """Make sure, before anything is read or trained, that what ``log_wandb`` needs is there.

    Raises:
        UserError: wandb is not installed.
    """
    if not config["log_wandb"]:
        return
    missing = "log_wandb: wandb is not installed; run: pip install wandb, or take log_wandb: False"
    # The folder wandb/ that former runs left where they stood can be imported too.
    if not hasattr(require("wandb", missing), "init"):
        raise UserError(missing)


class Records(Hook):
    """Counts what an epoch costs and tells evaluations of validation from tests, for those who write it down."""

    def __init__(self) -> None:
        self.epoch = 0
        self.validates = False
        self._begin = 0.0
        self._targets = self._steps = 0

    def on_fit_start(self, trainer: Training, loader: Any) -> None:
        """Take the epoch, which a run that goes on with its validation is not told."""
        self.epoch = trainer.start_epoch

    def on_epoch_start(self, trainer: Training, epoch: int) -> None:
        """Start the clock."""
        self.epoch, self._targets, self._begin = epoch, 0, time.perf_counter()

    def on_step_end(self, trainer: Training, step: Step, loss: Tensor) -> None:
        """Count the step's targets."""
        self._targets += step.targets
        self._steps = step.number + 1

    def on_epoch_end(self, trainer: Training, epoch: int, loss: float) -> None:
        """Write down the mean loss of a step, the learning rate, and targets a second."""
        speed = self._targets / (time.perf_counter() - self._begin)
        rates = {"learning_rate": float(trainer.step_size), "events_per_second": speed}
        self.write_training(trainer, {"loss": loss, **rates}, self._steps)

    def on_validation_start(self, trainer: Training, loader: Any) -> None:
        """The next evaluation is one of validation."""
        self.validates = True

    def on_evaluation_end(self, trainer: Training, result: Any) -> None:
        """Write down all metrics."""
        self.write_evaluation(trainer, result)
        self.validates = False

    def write_training(self, trainer: Training, values: dict[str, float], steps: int) -> None:
        """Write down an epoch of so many steps."""
        raise NotImplementedError

    def write_evaluation(self, trainer: Training, result: Any) -> None:
        """Write down a :class:`~recbole_ssm.evaluation.metrics.Result`."""
        raise NotImplementedError


class TensorBoardRecords(Records):
    """Draws ``Train/loss``, ``Train/learning_rate`` and ``Train/events_per_second``, and every metric by epoch.

    The metrics are called as ``Valid/ndcg@10`` and ``Valid/masked ndcg@10``; those of the test stand beside them under
    ``Test/``.
    """

    def write_training(self, trainer: Training, values: dict[str, float], steps: int) -> None:
        """Draw a point of each curve."""
        for name, value in values.items():
            trainer.tensorboard.add_scalar(f"Train/{name}", value, self.epoch)

    def write_evaluation(self, trainer: Training, result: Any) -> None:
        """Draw a point of each metric."""
        part = "Valid" if self.validates else "Test"
        for name, value in result.both().items():
            trainer.tensorboard.add_scalar(f"{part}/{name}", value, self.epoch)


class WandbRecords(Records):
    """Sends what TensorBoard shows to Weights & Biases, under RecBole's names.

    Args:
        logger: RecBole's WandbLogger, which has begun the run there.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    def write_training(self, trainer: Training, values: dict[str, float], steps: int) -> None:
        """Send an epoch; RecBole's ``train_loss`` is the sum over its steps."""
        told = {"epoch": self.epoch, "train_step": self.epoch, "train_loss": values["loss"] * steps}
        self._logger.log_metrics({**values, **told}, head="train")

    def write_evaluation(self, trainer: Training, result: Any) -> None:
        """Send all metrics."""
        if self.validates:
            step = self.epoch // trainer.config["eval_step"]
            self._logger.log_metrics({**result.both(), "valid_step": step}, head="valid")
        self._logger.log_eval_metrics(result.both(), head="eval")
