"""
Mamba4Rec
################################################
Reference:
    Chengkai Liu et al. "Mamba4Rec: Towards Efficient Sequential Recommendation with Selective State Space Models."
    arXiv 2403.03900, 2024.
"""

from __future__ import annotations

from typing import Any

from recbole_ssm.layers import Mamba
from recbole_ssm.model.recommender import SSMRecommender


class Mamba4Rec(SSMRecommender):
    """Mamba4Rec encodes a history with Mamba's selective scan: one state of N numbers for each channel."""

    def build_mixer(self, config: Any) -> Mamba:
        """Mamba, sized by the config."""
        return Mamba(
            d_model=config["hidden_size"],
            d_state=config["d_state"],
            d_conv=config["d_conv"],
            expand=config["expand"],
            dt_init=config["dt_init"],
        )
