"""Training on recbole.trainer.Trainer."""

from recbole_ssm.trainer.hooks import Hook
from recbole_ssm.trainer.latency import Latency
from recbole_ssm.trainer.ranks import Ranks
from recbole_ssm.trainer.trainer import Interrupted, SSMTrainer

__all__ = ["Hook", "Interrupted", "Latency", "Ranks", "SSMTrainer"]
