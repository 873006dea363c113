"""Training on recbole.trainer.Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_ssm.trainer.hooks import Hook
    from recbole_ssm.trainer.ranks import Ranks
    from recbole_ssm.trainer.timing import Latency
    from recbole_ssm.trainer.trainer import Interrupted, Trainer

__all__ = ["Hook", "Interrupted", "Latency", "Ranks", "Trainer"]

_HOMES = {"Hook": "hooks", "Ranks": "ranks", "Latency": "timing"}


def __getattr__(name: str) -> Any:
    # Checkpoints and hooks are read without the training loop, so that is imported when it is
    # first needed.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'trainer')}"), name)
    if name == "SSMTrainer":  # its name in 0.1.0
        from recbole_ssm.trainer.trainer import Trainer

        return Trainer
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
