"""
Hydra4Rec
################################################
Reference:
    arXiv 2408.05606, 2024, names the model, and no definition beyond the name is public. Ours is Mamba4Rec with the
    mixer of Hydra (Hwang et al., arXiv 2407.09941).
"""

from __future__ import annotations

from logging import getLogger
from typing import Any

from recbole_ssm.layers import Hydra
from recbole_ssm.model.recommender import SSMRecommender


class Hydra4Rec(SSMRecommender):
    """Hydra4Rec encodes a history with Hydra's quasiseparable mixer: every event sees those before and after it.

    The last position has no future. So a single layer that is read there never uses its backward half; two layers,
    or the readout ``mean``, make the model bidirectional, and two layers are the default.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if self.num_layers == 1 and self.readout == "last":
            getLogger().warning(
                "Hydra4Rec with num_layers: 1 and readout: last never uses its backward half; "
                "for a bidirectional model take num_layers: 2 or readout: mean"
            )

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """A bidirectional model would see its targets."""
        return "Hydra4Rec is bidirectional: within a whole history every position sees the target that it must predict"

    def build_mixer(self, config: Any) -> Hydra:
        """Hydra, sized by the config."""
        return Hydra(
            d_model=config["hidden_size"],
            d_state=config["d_state"],
            d_conv=config["d_conv"],
            expand=config["expand"],
            head_dim=config["head_dim"],
            n_groups=config["n_groups"],
            dt_init=config["dt_init"],
        )
