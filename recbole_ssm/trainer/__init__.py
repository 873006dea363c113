"""Training on recbole.trainer.Trainer."""

from typing import Any

from recbole_ssm.trainer.hooks import Hook
from recbole_ssm.trainer.ranks import Ranks
from recbole_ssm.trainer.timing import Latency
from recbole_ssm.trainer.trainer import Interrupted, Trainer

__all__ = ["Hook", "Interrupted", "Latency", "Ranks", "Trainer"]


def __getattr__(name: str) -> Any:
    if name == "SSMTrainer":  # its name in 0.1.0
        return Trainer
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
