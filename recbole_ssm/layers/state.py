"""What a mixer carries from one event to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MixerState(NamedTuple):
    """The recurrent state of one mixer for B sequences; its size does not depend on their length."""

    conv_BDK: Tensor
    """The last K inputs of the convolution, newest last."""
    ssm: Tensor
    """The state of the scan: ``[B, D, N]`` (Mamba) or ``[B, H, P, N]`` (Mamba-2)."""

    @classmethod
    def alloc(cls, conv_shape: tuple[int, ...], ssm_shape: tuple[int, ...], like: Tensor) -> MixerState:
        """The state before the first event: zeros, on the device of ``like`` and in its dtype."""
        return cls(like.new_zeros(conv_shape), like.new_zeros(ssm_shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all B sequences together."""
        return self.conv_BDK.nbytes + self.ssm.nbytes

    def to(self, target: torch.device | torch.dtype | str) -> MixerState:
        """The same state on another device or in another dtype."""
        return MixerState(self.conv_BDK.to(target), self.ssm.to(target))
