"""Whether language models could read all that they were asked."""

from __future__ import annotations

from typing import Any

from recbole_ssm.llm.prompt import tell_of_shortened
from recbole_ssm.trainer.hooks import Hook


class ShortenedPrompts(Hook):
    """Logs how many prompts lost titles: of an epoch's training, and of an evaluation with the tuning before it."""

    def on_epoch_end(self, trainer: Any, epoch: int, loss: float) -> None:
        """Of training."""
        tell_of_shortened(trainer.model.prompts)

    def on_evaluation_end(self, trainer: Any, result: dict[str, float]) -> None:
        """Of an evaluation."""
        tell_of_shortened(trainer.model.prompts)
