"""Training on recbole.trainer.Trainer."""

from recbole_ssm.trainer.trainer import SSMTrainer, get_trainer

__all__ = ["SSMTrainer", "get_trainer"]
