"""Modules with ``forward`` over whole sequences and ``step`` over one event, side by side: one formula, two ways.

Dimension letters are those of :mod:`recbole_ssm.ops`.
"""

from recbole_ssm.layers.block import Block, Dropout, FeedForward
from recbole_ssm.layers.hydra import Hydra
from recbole_ssm.layers.mamba import Mamba
from recbole_ssm.layers.mamba2 import Mamba2
from recbole_ssm.layers.state import MixerState

__all__ = ["Block", "Dropout", "FeedForward", "Hydra", "Mamba", "Mamba2", "MixerState"]
