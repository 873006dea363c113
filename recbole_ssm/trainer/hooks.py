"""What may happen beside training: the moments at which a trainer calls, and what hangs on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from recbole_ssm.data.loader import Step

if TYPE_CHECKING:
    from recbole_ssm.trainer.trainer import Trainer


class Hook:
    """Override what you need; pass instances to :class:`Trainer` as ``hooks``.

    A hook's state is saved in checkpoints and restored from them, by the name of its class; a hook that a checkpoint
    does not know starts fresh. Hooks are called in the order in which they were given, on every process.
    """

    def on_fit_start(self, trainer: Trainer, loader: Any) -> None:
        """Before the first epoch, after a checkpoint was restored."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last epoch, also when training stops early; not when it fails or is interrupted."""

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Before an epoch's first step, or the first that is left of it."""

    def on_epoch_end(self, trainer: Trainer, epoch: int, loss: float) -> None:
        """After an epoch's last step and before its evaluation; ``loss`` is the mean over steps."""

    def on_step_start(self, trainer: Trainer, step: Step) -> None:
        """Before a step's first forward pass; its batches are on the device."""

    def on_gradients(self, trainer: Trainer, step: Step) -> None:
        """When the gradients are complete, unscaled and not yet clipped."""

    def on_step_end(self, trainer: Trainer, step: Step, loss: float) -> None:
        """After the optimiser's step; ``loss`` is the mean over the step's targets."""

    def on_evaluation_start(self, trainer: Trainer) -> None:
        """Before the first batch of an evaluation."""

    def on_evaluation_batch_start(self, trainer: Trainer) -> None:
        """When a batch has been read and nothing is computed yet."""

    def on_scores(self, trainer: Trainer, rows: int) -> None:
        """When the scores of a batch are there, and its best items are not yet chosen."""

    def on_evaluation_batch_end(self, trainer: Trainer, rows: int) -> None:
        """When the best items of a batch are chosen."""

    def on_ranking(
        self, trainer: Trainer, dataset: Any, interaction: Any, scores: Tensor, row: Tensor, item: Tensor
    ) -> None:
        """After a batch of full ranking: ``scores`` [rows, items], and the ``item`` of each target and its ``row``."""

    def on_evaluation_end(self, trainer: Trainer, result: dict[str, float]) -> None:
        """With the metrics."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold of this hook; JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
