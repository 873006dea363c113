"""
2Mamba4Rec
################################################
Reference:
    arXiv 2408.05606, 2024, names the model, and no definition beyond the name is public. Ours is Mamba4Rec with the
    mixer of Mamba-2 (Dao and Gu, arXiv 2405.21060).
"""

from __future__ import annotations

from typing import Any

from recbole_ssm.layers import Mamba2
from recbole_ssm.model.recommender import SSMRecommender


class TwoMamba4Rec(SSMRecommender):
    """2Mamba4Rec encodes a history with Mamba-2's SSD: a larger state, one decay a head, matrix products throughout."""

    def build_mixer(self, config: Any) -> Mamba2:
        """Mamba-2, sized by the config."""
        return Mamba2(
            d_model=config["hidden_size"],
            d_state=config["d_state"],
            d_conv=config["d_conv"],
            expand=config["expand"],
            head_dim=config["head_dim"],
            n_groups=config["n_groups"],
            dt_init=config["dt_init"],
        )
