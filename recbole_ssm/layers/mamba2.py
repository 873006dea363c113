"""The mixer of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7.1 and figure 6).

All that the scan reads is projected from u at once, in parallel:

    z, (x, B, C), dt = in_proj(u)
    x, B, C = SiLU(conv(x, B, C))                a causal convolution of K taps
    dt = softplus(dt + dt_bias)                  one step size for each head
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T   a state [P, N] and one decay for each head
    y_t = h_t C_t + D x_t
    out = out_proj(RMSNorm(y SiLU(z)))           each group of heads by itself

With ``gap_decays`` the time since the event before takes part in the decay, and not in what an event adds (ours; the
idea is that of event-based state-space models, where elapsed time is a decay of its own):

    h_t = exp((dt_t + r s_t) A) h_{t-1} + dt_t x_t B_t^T        s = log(1 + gap) / 4, and r > 0 one number for each head

Parameters carry the names of the reference implementation, so weights can be exchanged.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.layers.init import head_sizes, init_dt_bias
from recbole_ssm.layers.state import MixerState
from recbole_ssm.layers.step import in_one_kernel, ssd_fields
from recbole_ssm.ops import causal_conv1d, ssd, ssd_last
from recbole_ssm.ops.packing import last_of


class Mamba2(nn.Module):
    """A causal mixer of H heads, each with a state of P x N numbers and one decay.

    Args:
        d_model: width of input and output (config key ``hidden_size``).
        d_state: N.
        d_conv: taps of the causal convolution, K.
        expand: inner channels, D = expand * d_model.
        head_dim: P; it divides D, and H = D / P.
        n_groups: groups of heads that share B and C; it divides H.
        dt_init: how step sizes start, see :func:`recbole_ssm.layers.init.init_dt_bias`.
        joint_norm: one norm over all channels, whatever the groups, as weights of version 0.1.0
            were trained.
        gap_decays: whether the state decays through the gap before each event.

    Raises:
        UserError: a size is below 1 or does not divide what it must, or ``dt_init`` is unknown.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        d_conv: int,
        expand: int,
        head_dim: int,
        n_groups: int = 1,
        dt_init: str = "log_uniform",
        joint_norm: bool = False,
        gap_decays: bool = False,
    ) -> None:
        super().__init__()
        sizes = (d_state, d_conv, expand, head_dim, n_groups)
        self.d_inner, self.n_heads = head_sizes(d_model, *sizes)
        self.d_state, self.d_conv, self.dt_init = d_state, d_conv, dt_init
        self.head_dim, self.n_groups = head_dim, n_groups
        self.norm_groups = 1 if joint_norm else n_groups
        # x, B and C pass through the convolution
        self.d_conv_in = self.d_inner + 2 * n_groups * d_state
        d_in_proj = self.d_inner + self.d_conv_in + self.n_heads
        self.in_proj = nn.Linear(d_model, d_in_proj, bias=False)
        # the module only holds the taps: ops.causal_conv1d reads them
        self.conv1d: Any = nn.Conv1d(self.d_conv_in, self.d_conv_in, d_conv, groups=self.d_conv_in)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        # r before its softplus. At the start a gap of a million units decays the state less than a middling step does.
        self.gap_rate = nn.Parameter(torch.full((self.n_heads,), -6.0)) if gap_decays else None
        self.reset_dt()

    def reset_dt(self) -> None:
        """Start the step sizes as ``dt_init`` says; a model calls it after its own initialisation."""
        init_dt_bias(self.dt_bias, self.dt_init)

    def alloc_state(self, batch: int) -> MixerState:
        """The state of ``batch`` sequences before their first event."""
        conv = (batch, self.d_conv_in, self.d_conv)
        ssm = (batch, self.n_heads, self.head_dim, self.d_state)
        return MixerState.alloc(conv, ssm, self.A_log)

    def forward(
        self,
        u: Tensor,
        state: MixerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        return_state: bool = True,
        gap: Tensor | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        """Mix whole sequences; arguments and returns as in :meth:`Mamba.forward`.

        With ``gap_decays`` it needs the gap before each event, ``[B, L]`` or, packed, ``[total]``.

        Raises:
            ValueError: there are none.
        """
        to_z, to_rest = self.in_proj.weight.split([self.d_inner, self.d_conv_in + self.n_heads])
        xBC, dt = F.linear(u, to_rest).split([self.d_conv_in, self.n_heads], -1)
        conv, ssm = state or (None, None)
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        xBC, conv = causal_conv1d(xBC, taps, bias, activation="silu", state_BDK=conv, cu_seqlens=cu_seqlens)
        x, B, C = self._split(xBC)
        A = -self.A_log.exp()
        steps: dict[str, Any] = {"dt_bias": self.dt_bias, "dt_softplus": True}
        v, D = x, cast("Tensor | None", self.D)
        if self.gap_rate is not None:
            v, dt = self._longer_steps(x, dt, gap)
            # The skip is of x, not of v, and follows below.
            steps, D = {}, None
        after: MixerState | None = None
        if last_only and state is None:
            C, u, x = (last_of(t, cu_seqlens) for t in (C, u, x))
            y = ssd_last(v, dt, A, B, C, D, **steps, cu_seqlens=cu_seqlens)
        else:
            y, ssm = ssd(
                v, dt, A, B, C, D, **steps,
                state_BHPN=ssm, cu_seqlens=cu_seqlens, return_state=return_state,
            )  # fmt: skip
            after = None if ssm is None else MixerState(conv, ssm)
            if last_only:
                y, u, x = (last_of(t, cu_seqlens) for t in (y, u, x))
        if D is None:
            y = torch.addcmul(y, x, self.D[:, None])
        return self._gate_and_project(y, F.linear(u, to_z)), after

    def _longer_steps(self, x: Tensor, dt: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inputs x dt / (dt + r s) and step sizes dt + r s with which an ordinary SSD decays through gaps too."""
        if gap is None:
            raise ValueError("gap: a mixer with gap_decays needs the gap before each event; give gap=")
        dt = F.softplus(dt + self.dt_bias)
        longer = dt + self._through(gap)
        # A step may be so short that its size is 0; behind no gap it is the whole of the longer one all the same.
        part = torch.where(longer > 0, dt / longer.clamp(min=torch.finfo(longer.dtype).tiny), 1.0)
        return x * part.to(x.dtype)[..., None], longer

    def _through(self, gap: Tensor) -> Tensor:
        """What gaps ``[...]`` add to step sizes, r s ``[..., H]``."""
        rate = F.softplus(self.gap_rate)  # type: ignore[arg-type]
        return rate * (gap.to(rate.dtype).log1p() / 4)[..., None]

    def after_gap(self, state: MixerState, gap_B: Tensor) -> MixerState:
        """The state through whose gap ``[B]`` before the next event it has decayed: what :meth:`step` is then given."""
        decay = torch.exp(self._through(gap_B) * -self.A_log.exp())
        return MixerState(state.conv_BDK, state.ssm * decay[..., None, None])

    @in_one_kernel
    def step(self, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """One event ``[B, d_model]`` of each sequence: y ``[B, d_model]`` and the next state."""
        z, xBC, dt = self.in_proj(u_t).split([self.d_inner, self.d_conv_in, self.n_heads], -1)
        conv = torch.cat([state.conv_BDK[..., 1:], xBC[..., None]], -1)
        x, B, C = self._split(F.silu((conv * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias))
        B, C = (t.repeat_interleave(self.n_heads // self.n_groups, 1) for t in (B, C))  # [B, H, N]
        dt = F.softplus(dt + self.dt_bias)  # [B, H]
        decay = torch.exp(dt * -self.A_log.exp())[..., None, None]
        ssm = decay * state.ssm + (dt[..., None] * x)[..., None] * B[:, :, None]
        y = (ssm * C[:, :, None]).sum(-1) + self.D[:, None] * x
        return self._gate_and_project(y, z), MixerState(conv, ssm)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[..., H, P]``, B and C ``[..., G, N]``."""
        x, B, C = xBC.split([self.d_inner, *[self.n_groups * self.d_state] * 2], -1)
        heads, groups = (self.n_heads, self.head_dim), (self.n_groups, self.d_state)
        return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _gate_and_project(self, y: Tensor, z: Tensor) -> Tensor:
        gated = y.flatten(-2) * F.silu(z)
        if self.norm_groups == 1:
            return self.out_proj(self.norm(gated))
        grouped = gated.unflatten(-1, (self.norm_groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=self.norm.eps).flatten(-2)
        return self.out_proj(normed * self.norm.weight)

    def kernel_weights(self) -> dict[str, Any]:
        """What the kernels of a step and of whole histories (``csrc/step.h``) read of this layer.

        They have no joint norm of several groups. With ``gap_decays`` a step is the same, after :meth:`after_gap`; its
        ``gap_rate`` is named for whoever must know of it.
        """
        if self.norm_groups != self.n_groups:
            return {}
        return {**ssd_fields(self), "gap_rate": self.gap_rate}
