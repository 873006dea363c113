"""The mixer of Hydra (Hwang et al. 2024, arXiv 2407.09941, section 3.3): bidirectional.

    z, (x, (B, C)_fwd, (B, C)_bwd), dt_fwd, dt_bwd = in_proj(u)
    x, B, C = SiLU(conv(x, B, C))                  a centred convolution of K taps
    dt = softplus(dt + dt_bias)                    of either direction
    y = quasiseparable(x, dt, A, B, C)             below and above the diagonal of a matrix
      + (fc_D(x) + D) x                            the diagonal, which is free
    out = out_proj(RMSNorm(y) SiLU(z))

Parameters carry the names of the reference implementation, so weights can be exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.errors import UserError
from recbole_ssm.layers.init import head_sizes, init_dt_bias
from recbole_ssm.layers.state import MixerState
from recbole_ssm.layers.step import ssd_fields
from recbole_ssm.ops import centered_conv1d, quasiseparable, ssd_last
from recbole_ssm.ops.packing import cu_seqlens_of, last_of

_NO_STATE = "Hydra is bidirectional: it has no state to carry; run forward over the whole history"


class Hydra(nn.Module):
    """A bidirectional mixer: every position sees all others of its sequence.

    Args:
        d_model: width of input and output (config key ``hidden_size``).
        d_state: N.
        d_conv: taps of the centred convolution, K; odd.
        expand: inner channels, D = expand * d_model.
        head_dim: P; it divides D, and H = D / P.
        n_groups: groups of heads that share B and C; it divides H.
        dt_init: how step sizes start, see :func:`recbole_ssm.layers.init.init_dt_bias`.

    Raises:
        UserError: a size is below 1, d_conv is even, a size does not divide what it must, or
            ``dt_init`` is unknown.
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
    ) -> None:
        super().__init__()
        sizes = (d_state, d_conv, expand, head_dim, n_groups)
        self.d_inner, self.n_heads = head_sizes(d_model, *sizes)
        if d_conv % 2 == 0:
            raise UserError(f"d_conv: a centred convolution needs an odd width, got {d_conv}; try d_conv: {d_conv + 1}")
        self.d_state, self.d_conv, self.dt_init = d_state, d_conv, dt_init
        self.head_dim, self.n_groups = head_dim, n_groups
        # x, and B and C of either direction, pass through the convolution
        self.d_conv_in = self.d_inner + 4 * n_groups * d_state
        d_in_proj = self.d_inner + self.d_conv_in + 2 * self.n_heads
        self.in_proj = nn.Linear(d_model, d_in_proj, bias=False)
        # the module only holds the taps: ops.centered_conv1d reads them
        self.conv1d: Any = nn.Conv1d(self.d_conv_in, self.d_conv_in, d_conv, groups=self.d_conv_in)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.zeros(self.n_heads))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.fc_D = nn.Linear(self.d_inner, self.n_heads, bias=False)
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_dt()

    def reset_dt(self) -> None:
        """Start the step sizes as ``dt_init`` says; a model calls it after its own initialisation."""
        init_dt_bias(self.dt_bias, self.dt_init)

    def forward(
        self,
        u: Tensor,
        state: MixerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        return_state: bool = True,
    ) -> tuple[Tensor, None]:
        """Mix whole sequences.

        Args:
            u: ``[B, L, d_model]``, all rows of full length, or a packed batch
                ``[1, total, d_model]`` with ``cu_seqlens``.
            state: must be None: a bidirectional mixer has none to carry.
            cu_seqlens: bounds ``[S + 1]`` of the packed sequences.
            last_only: return the last position of each sequence alone, exactly and for less.
            return_state: has no effect, as there is none.

        Returns:
            y in the shape of u (``[S, d_model]`` with ``last_only``), and None.
        """
        if state is not None:
            raise NotImplementedError(_NO_STATE)
        d_rest = self.d_conv_in + 2 * self.n_heads
        to_z, to_rest = self.in_proj.weight.split([self.d_inner, d_rest])
        xBC, dt = F.linear(u, to_rest).split([self.d_conv_in, 2 * self.n_heads], -1)
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        xBC = centered_conv1d(xBC, taps, bias, activation="silu", cu_seqlens=cu_seqlens)
        x, *maps = xBC.split([self.d_inner, *[self.n_groups * self.d_state] * 4], -1)
        x = x.unflatten(-1, (self.n_heads, self.head_dim))  # [B, L, H, P]
        groups = (self.n_groups, self.d_state)
        B_fwd, C_fwd, B_bwd, C_bwd = (t.unflatten(-1, groups) for t in maps)
        dt = F.softplus(dt.unflatten(-1, (2, self.n_heads)) + self.dt_bias)
        dt_fwd, dt_bwd = dt.unbind(-2)  # [B, L, H] each
        A = -self.A_log.exp()
        if last_only:
            y = self._last_row(x, dt_fwd, A, B_fwd, C_fwd, cu_seqlens)
            x, u = last_of(x, cu_seqlens), last_of(u, cu_seqlens)
        else:
            maps = [B_fwd, C_fwd, B_bwd, C_bwd]
            y = quasiseparable(x, dt_fwd, dt_bwd, A, *maps, cu_seqlens=cu_seqlens)
        # the diagonal
        y = y + (self.fc_D(x.flatten(-2)) + self.D)[..., None] * x
        return self.out_proj(self.norm(y.flatten(-2)) * F.silu(F.linear(u, to_z))), None

    @staticmethod
    def _last_row(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The last row of the quasiseparable matrix, which has nothing above the diagonal.

        It is what a forward scan knew one position earlier.
        """
        if cu_seqlens is None:
            batch, L = x.shape[:2]
            cu_seqlens = cu_seqlens_of(torch.full((batch,), L, device=x.device))
            x, dt, B, C = (t.flatten(0, 1)[None] for t in (x, dt, B, C))
        last = (cu_seqlens[1:].long() - 1).clamp(min=0)
        # A step of size 0 at the last position leaves the state as the position before it left
        # it. An empty sequence has no last position; it marks one behind the end, so that no
        # number is read from the GPU.
        total = x.shape[1]
        silenced = torch.where(cu_seqlens.diff() > 0, last, total)
        steps = dt.new_ones(total + 1, 1).index_fill(0, silenced, 0.0)[:total]
        C_before = C[0, (last - 1).clamp(min=0)]
        return ssd_last(x, dt * steps, A, B, C_before, cu_seqlens=cu_seqlens)

    def step(self, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """There is no such thing: a new event changes the output at every earlier position.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(_NO_STATE)

    def kernel_weights(self) -> dict[str, Any]:
        """What the kernel of whole histories (``csrc/history.h``) reads of this layer; there is none of a step."""
        return {**ssd_fields(self), "diagonal": self.fc_D.weight}
