"""The loss of next-item prediction, over the whole catalogue or against samples; ``loss_type`` names it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.loss import BPRLoss
from torch import Tensor, nn

from recbole_ssm.errors import UserError
from recbole_ssm.ops import linear_cross_entropy

LARGEST_MULTINOMIAL = 2**24
"""The most items from which ``torch.multinomial`` draws."""


class NextItemLoss(nn.Module):
    """Mean loss over targets, from the vectors that predict them and the item embeddings.

    - ``CE``: cross-entropy over all items; ``label_smoothing`` spreads that part of each target evenly over all of them
      (Szegedy et al., CVPR 2016, section 7).
    - ``BPR``: RecBole's BPRLoss against one sampled item for each target.
    - ``sampled_softmax``: cross-entropy over the target and ``num_negatives`` sampled items, which all targets of a
      batch share. An item's logit is lowered by the logarithm of how often it is expected in
      the sample (logQ correction; Bengio and Senecal 2008, Yi et al. 2019), so that the sum
      over samples estimates the sum over all other items without bias. The target's own logit
      stays: it is in the sum for certain. Without ``logq_correction`` logits stay as they are (eSASRec).
    - ``gBCE``: generalised binary cross-entropy of gSASRec (Petrov and Macdonald, RecSys 2023, equations 11 to 13),
      with calibration ``gbce_t``. The paper draws negatives for each target; that all targets
      of a batch share them is our choice.

    Samples are drawn with replacement: uniformly for ``gBCE``; for ``sampled_softmax`` in
    proportion to (occurrences in training, 1 at least) ** ``negative_power``. A sample that is
    the target itself does not count.

    Args:
        config: ``loss_type``, ``num_negatives``, ``negative_power``, ``logq_correction``, ``gbce_t``,
            ``label_smoothing``.
        dataset: its item counts are read where ``negative_power`` is above 0.
        n_items: catalogue size, padding included.

    Raises:
        UserError: ``gBCE`` is to sample more items than there are beside the target.
    """

    def __init__(self, config: Any, dataset: Any, n_items: int) -> None:
        super().__init__()
        self.loss_type = config["loss_type"]
        self.n_items = n_items
        self.num_negatives = config["num_negatives"]
        self.t = config["gbce_t"]
        # Settings of former versions do not hold these.
        self.label_smoothing: float = config["label_smoothing"] or 0.0
        self.corrected = config["logq_correction"] is not False
        if self.loss_type == "gBCE" and self.num_negatives > n_items - 2:
            raise UserError(
                f"num_negatives: gBCE samples among the {n_items - 2} items that are not the target, got "
                f"{self.num_negatives}; try num_negatives: {max((n_items - 2) // 2, 1)}"
            )
        self.bpr = BPRLoss()
        # The padding is never drawn.
        counts = torch.ones(n_items)
        counts[0] = 0.0
        if self.loss_type == "sampled_softmax" and config["negative_power"]:
            for item, count in dataset.item_counter.items():
                counts[item] = float(count) ** config["negative_power"]
        self.register_buffer("log_q", (counts / counts.sum()).log(), persistent=False)
        self.log_q: Tensor
        # Of the larger catalogues, from which torch.multinomial cannot draw.
        self.cumulative: Tensor | None
        shares = counts.double().cumsum(0) if n_items > LARGEST_MULTINOMIAL else None
        self.register_buffer("cumulative", None if shares is None else shares / shares[-1], persistent=False)

    def forward(self, output: Tensor, items: Tensor, target: Tensor, negative: Tensor | None = None) -> Tensor:
        """The mean loss, a scalar.

        Args:
            output: vectors that predict ``[n, d]``.
            items: item embeddings ``[V, d]``.
            target: ids of the items that came ``[n]``.
            negative: for BPR, an id of an item that did not ``[n]``.
        """
        if self.loss_type == "CE":
            return linear_cross_entropy(output, items, target, label_smoothing=self.label_smoothing)
        if self.loss_type == "sampled_softmax":
            sample = self._drawn()
            # The logarithm of K q_j, the expected count of item j in the sample.
            bias = -(math.log(self.num_negatives) + self.log_q) if self.corrected else None
            return linear_cross_entropy(output, items, target, candidates_K=sample, bias_V=bias)
        positive = (output * items[target]).sum(-1)
        if self.loss_type == "BPR":
            return self.bpr(positive, (output * items[negative]).sum(-1))
        sample = torch.randint(1, self.n_items, (self.num_negatives,), device=output.device)
        # alpha is the share of the other items that is sampled.
        alpha = self.num_negatives / (self.n_items - 2)
        beta = alpha * (self.t * (1 - 1 / alpha) + 1 / alpha)
        against = F.softplus(output @ items[sample].T).masked_fill(sample == target[:, None], 0.0).sum(-1)
        return ((beta * F.softplus(-positive) + against) / (self.num_negatives + 1)).mean()

    def _drawn(self) -> Tensor:
        """``num_negatives`` items, drawn by their shares with replacement."""
        if self.cumulative is None:
            return self.log_q.exp().multinomial(self.num_negatives, replacement=True)
        point = torch.rand(self.num_negatives, dtype=self.cumulative.dtype, device=self.cumulative.device)
        return torch.searchsorted(self.cumulative, point, right=True)
