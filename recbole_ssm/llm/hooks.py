"""The hooks that every language model brings to its training."""

from __future__ import annotations

from typing import Any

from recbole_ssm.llm.prompt import tell_of_shortened
from recbole_ssm.trainer.hooks import Hook, Training


class TuneOnValidation(Hook):
    """Lets the model choose on the validation rows what training does not learn, before they
    are scored; where none is to come, before training.
    """

    def on_validation_start(self, trainer: Training, loader: Any) -> None:
        """Call the model's ``tune`` in evaluation mode."""
        trainer.model.eval()
        trainer.model.tune(loader)

    on_no_validation = on_validation_start


class ShortenedPrompts(Hook):
    """Logs how many prompts lost titles: of an epoch's training, and of an evaluation with the
    tuning before it.
    """

    def on_epoch_end(self, trainer: Training, epoch: int, loss: float) -> None:
        """Log those of the training."""
        tell_of_shortened(trainer.model.prompts)

    def on_evaluation_end(self, trainer: Training, result: dict[str, float]) -> None:
        """Log those of the evaluation."""
        tell_of_shortened(trainer.model.prompts)
