"""Universal gradient methods, adaptive batch sizes and averaged iterates, for any PyTorch model, without RecBole."""

import torch

from recbole_ssm.optim.adaptive_batch import AdaptiveBatchSize, HolderFit
from recbole_ssm.optim.averaging import IterateAverage
from recbole_ssm.optim.gradient_noise import GradientProbe, Measurement
from recbole_ssm.optim.groups import parameter_groups
from recbole_ssm.optim.usgm import USFGM, USGM

LEARNERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sparse_adam": torch.optim.SparseAdam,
    "usgm": USGM,
    "usfgm": USFGM,
}
"""Optimisers by the names that users type; all but the last two are RecBole's."""

__all__ = [
    "LEARNERS",
    "USFGM",
    "USGM",
    "AdaptiveBatchSize",
    "GradientProbe",
    "HolderFit",
    "IterateAverage",
    "Measurement",
    "parameter_groups",
]
