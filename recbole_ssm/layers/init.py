"""How step sizes start, and how impossible sizes are refused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recbole_ssm.errors import UserError, did_you_mean

DT_INIT = ("log_uniform", "zero_bias")


def init_dt_bias(bias: Tensor, dt_init: str, dt_min: float = 0.001, dt_max: float = 0.1) -> None:
    """Fill the bias that precedes the softplus of a step size, in place.

    ``log_uniform`` is Mamba's own start: softplus(bias) is log-uniform in [dt_min, dt_max],
    1e-4 at least. ``zero_bias`` starts every step size near softplus(0) = 0.69; Mamba4Rec's
    published code arrives there by zeroing all biases.

    Raises:
        UserError: ``dt_init`` is neither.
    """
    if dt_init not in DT_INIT:
        raise UserError(f"dt_init: '{dt_init}' is not one of {', '.join(DT_INIT)}{did_you_mean(dt_init, DT_INIT)}")
    with torch.no_grad():
        if dt_init == "zero_bias":
            bias.zero_()
        else:
            low, high = math.log(dt_min), math.log(dt_max)
            dt = torch.exp(torch.rand_like(bias) * (high - low) + low).clamp(min=1e-4)
            bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def require_positive(**sizes: int) -> None:
    """Raise a ``UserError`` that names the first size below 1."""
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            near = int(value) if isinstance(value, float) and 1 <= value < 2**31 else 1
            raise UserError(f"{key}: must be a whole number above 0, got {value!r}; try {key}: {near}")


def require_divisor(key: str, divisor: int, whole: int, whole_name: str) -> None:
    """Raise a ``UserError`` with the nearest value that works unless ``divisor`` divides ``whole``."""
    if divisor < 1 or whole % divisor:
        nearest = min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: (abs(d - divisor), d))
        raise UserError(f"{key}: {divisor} does not divide {whole_name} = {whole}; try {key}: {nearest}")


def head_sizes(
    hidden_size: int, d_state: int, d_conv: int, expand: int, head_dim: int, n_groups: int
) -> tuple[int, int]:
    """Inner channels D and number of heads H of a mixer with heads, from its config keys.

    Raises:
        UserError: a size is below 1, head_dim does not divide D, or n_groups does not divide H.
    """
    require_positive(
        hidden_size=hidden_size, d_state=d_state, d_conv=d_conv, expand=expand, head_dim=head_dim, n_groups=n_groups
    )
    d_inner = expand * hidden_size
    require_divisor("head_dim", head_dim, d_inner, "expand * hidden_size")
    require_divisor("n_groups", n_groups, d_inner // head_dim, "expand * hidden_size / head_dim")
    return d_inner, d_inner // head_dim
