"""The universal gradient method and adaptive batch sizes, for any PyTorch model: no RecBole in here."""

from recbole_ssm.optim.adaptive_batch import AdaptiveBatchSize, HolderFit
from recbole_ssm.optim.gradient_noise import GradientProbe, Measurement
from recbole_ssm.optim.usgm import USFGM, USGM

__all__ = ["USFGM", "USGM", "AdaptiveBatchSize", "GradientProbe", "HolderFit", "Measurement"]
