"""What a ranker learns from: the likelihood of the right candidate (SFT), and its odds against wrong ones (ORPO).

Reference:
    Hong, Lee and Thorne. "ORPO: Monolithic Preference Optimization without Reference Model."
    arXiv 2403.07691, 2024, equations 4 to 7.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OBJECTIVES = ("sft", "orpo")


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0, to the precision of x wherever x lies.

    Of the two usual forms each is taken where it keeps its digits (Maechler 2012), and neither
    sees a value for which its gradient would be infinite.
    """
    near = x > -math.log(2.0)
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)


def log_odds(log_p: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``log p``, equation 4.

    A probability that rounds to 1 counts as one rounding error less, where its odds are large
    and finite.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - log1mexp(log_p)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """L_OR of equation 7, elementwise: ``-log sigmoid`` of the log odds ratio of two (mean)
    log-probabilities.
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def orpo_loss(nll: Tensor, chosen: Tensor, rejected: Tensor, weight: float) -> Tensor:
    """ORPO's loss of each row ``[B]``, equation 6: ``nll + weight * L_OR``.

    Args:
        nll: negative log-likelihood of what should be answered ``[B]``.
        chosen: mean log-probability of its tokens ``[B]``.
        rejected: the same of what should not be answered ``[B]``, or ``[B, R]`` for several,
            whose L_OR are averaged.
        weight: the paper's lambda.
    """
    ratio = odds_ratio_loss(chosen[:, None], rejected.reshape(len(chosen), -1))
    return nll + weight * ratio.mean(1)


def choose_rejected(scores: Tensor, target: Tensor, which: str) -> Tensor:
    """Columns of wrong candidates ``[B, R]``.

    Args:
        scores: of the candidates ``[B, C]``; only ``hardest`` looks at their values.
        target: the column of the right one ``[B]``.
        which: ``random``, one of the others; ``hardest``, the one with the highest score;
            ``all``.
    """
    rows, columns = scores.shape
    if which == "hardest":
        return scores.detach().scatter(1, target[:, None], -torch.inf).argmax(1, keepdim=True)
    if which == "random":
        others = torch.randint(columns - 1, (rows, 1), device=scores.device)
    else:
        others = torch.arange(columns - 1, device=scores.device).expand(rows, -1)
    return others + (others >= target[:, None])
