"""The mixer of Mamba (Gu and Dao 2023, arXiv 2312.00752).

An input u becomes two branches of D channels (figure 3), x and the gate z:

    x = SiLU(conv(x))                             a causal convolution of K taps
    dt, B, C = functions of x                     the selection mechanism (section 3.2)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t      equation 2a, a state of N for each channel
    y_t = C_t h_t + D x_t                         equation 2b
    out = out_proj(y SiLU(z))

Of the discretisation (equation 4) A is exact and B its first order, dt B, as in the reference
implementation. Parameters carry that implementation's names, so weights can be exchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.layers.init import init_dt_bias, require_positive
from recbole_ssm.layers.state import MixerState
from recbole_ssm.layers.step import in_one_kernel
from recbole_ssm.ops import causal_conv1d, selective_scan, selective_scan_last
from recbole_ssm.ops.packing import last_of


class Mamba(nn.Module):
    """A causal mixer whose every channel carries a state of N numbers.

    Args:
        d_model: width of input and output (config key ``hidden_size``).
        d_state: N.
        d_conv: taps of the causal convolution, K.
        expand: inner channels, D = expand * d_model.
        dt_init: how step sizes start, see :func:`recbole_ssm.layers.init.init_dt_bias`.

    Raises:
        UserError: a size is below 1, or ``dt_init`` is unknown.
    """

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, dt_init: str = "log_uniform") -> None:
        super().__init__()
        require_positive(hidden_size=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        self.d_inner, self.d_state, self.d_conv = expand * d_model, d_state, d_conv
        self.dt_rank, self.dt_init = math.ceil(d_model / 16), dt_init
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        # the module only holds the taps: ops.causal_conv1d reads them
        self.conv1d: Any = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        # A_n = -n for every channel: the real form of S4D (section 3.6)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_dt()

    def reset_dt(self) -> None:
        """Start the step sizes as ``dt_init`` says; a model calls it after its own initialisation."""
        if self.dt_init == "log_uniform":
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_dt_bias(self.dt_proj.bias, self.dt_init)

    def alloc_state(self, batch: int) -> MixerState:
        """The state of ``batch`` sequences before their first event."""
        conv, ssm = (batch, self.d_inner, self.d_conv), (batch, self.d_inner, self.d_state)
        return MixerState.alloc(conv, ssm, self.A_log)

    def forward(
        self,
        u: Tensor,
        state: MixerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        return_state: bool = True,
    ) -> tuple[Tensor, MixerState | None]:
        """Mix whole sequences.

        Args:
            u: ``[B, L, d_model]``, or a packed batch ``[1, total, d_model]`` with
                ``cu_seqlens``.
            state: what came before, None for nothing.
            cu_seqlens: bounds ``[S + 1]`` of the packed sequences.
            last_only: return the last position of each sequence alone, exactly and for less.
            return_state: whether a state is wanted; training needs none.

        Returns:
            y in the shape of u, and the state after the last position or None. With
            ``last_only`` y is ``[S, d_model]``, and where no state came in, none goes out.
        """
        if last_only and state is None:
            return self._forward_last(u, cu_seqlens), None
        conv, ssm = state or (None, None)
        x, z = self.in_proj(u).chunk(2, -1)  # [B, L, D] each
        x, conv = self._convolve(x, conv, cu_seqlens)
        # Selection: dt, B and C depend on the event. dt has rank R before it is spread over the
        # channels (section 3.6); its bias and softplus belong to the scan.
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.linear(dt, self.dt_proj.weight)  # [B, L, D]
        y, ssm = selective_scan(
            x, dt, -self.A_log.exp(), B, C, self.D, z,
            dt_bias=self.dt_proj.bias, dt_softplus=True, state_BDN=ssm, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = last_of(y, cu_seqlens) if last_only else y
        return self.out_proj(y), MixerState(conv, ssm) if return_state else None

    @in_one_kernel
    def step(self, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """One event ``[B, d_model]`` of each sequence: y ``[B, d_model]`` and the next state."""
        x, z = self.in_proj(u_t).chunk(2, -1)  # [B, D] each
        conv = torch.cat([state.conv_BDK[..., 1:], x[..., None]], -1)
        x = F.silu((conv * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.softplus(self.dt_proj(dt))[..., None]  # [B, D, 1]
        # equations 2a and 2b
        ssm = torch.exp(dt * -self.A_log.exp()) * state.ssm + dt * B[:, None] * x[..., None]
        y = (ssm * C[:, None]).sum(-1) + self.D * x
        return self.out_proj(y * F.silu(z)), MixerState(conv, ssm)

    def _forward_last(self, u: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """As forward, with C, the gate and the output projection at the last positions alone."""
        to_x, to_z = self.in_proj.weight.chunk(2)
        x, _ = self._convolve(F.linear(u, to_x), None, cu_seqlens)
        to_dt_B, to_C = self.x_proj.weight.split([self.dt_rank + self.d_state, self.d_state])
        dt, B = F.linear(x, to_dt_B).split([self.dt_rank, self.d_state], -1)
        dt = F.linear(dt, self.dt_proj.weight)
        C, z = F.linear(last_of(x, cu_seqlens), to_C), F.linear(last_of(u, cu_seqlens), to_z)
        y = selective_scan_last(
            x, dt, -self.A_log.exp(), B, C, self.D, z,
            dt_bias=self.dt_proj.bias, dt_softplus=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return self.out_proj(y)

    def _convolve(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        return causal_conv1d(x, taps, bias, activation="silu", state_BDK=state, cu_seqlens=cu_seqlens)

    def kernel_weights(self) -> dict[str, Any]:
        """What the kernels of a step and of whole histories (``csrc/step.h``) read of this layer."""
        return {
            "M": self.in_proj.in_features,
            "D": self.d_inner,
            "N": self.d_state,
            "K": self.d_conv,
            "R": self.dt_rank,
            "H": 0,
            "in_weight": self.in_proj.weight,
            "conv_weight": self.conv1d.weight,
            "conv_bias": self.conv1d.bias,
            "x_weight": self.x_proj.weight,
            "dt_weight": self.dt_proj.weight,
            "dt_bias": self.dt_proj.bias,
            "A_log": self.A_log,
            "skip": self.D,
            "out_weight": self.out_proj.weight,
        }
