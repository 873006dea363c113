"""The Triton kernels as operators of ``torch.library``: ``torch.ops.recbole_ssm_cuda``.

Inputs are float32, bfloat16 or float16; states and sums are float32. Where many programs
contribute to one gradient,
each writes its share and PyTorch adds them: in one order, so results repeat bit for bit, and in
float64 for dA and dD.

Triton is imported when the first kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.library import (
    Namespace,
    Operator,
    Shape,
    Values,
    contiguous_like,
    one_direction,
    taps_before,
    whole,
)
from recbole_ssm.ops.numerics import tf32_allowed
from recbole_ssm.ops.triton import pieces
from recbole_ssm.ops.triton.launch import cdiv, empty_float32, launch, processors, width
from recbole_ssm.ops.triton.tiles import TILES, Tile, best

MOST_STATE = 256
"""N of a selective scan."""
MOST_CELLS = 128 * 64
"""N P of SSD: what fits the 99 KiB of shared memory of the smaller GPUs."""
_SCAN_CHUNK = 16
"""Steps between two states that a scan's forward keeps for its backward."""
MOST_SHARES = 16
"""How many programs share one sum at most."""
_PROGRAMS = 8
"""Programs of a backward that walks over the sequences, for each multiprocessor."""


def _like(t: Tensor | None) -> Tensor | None:
    return None if t is None else contiguous_like(t)


def _shares(x: Tensor, given: Tensor | None, *shape: int) -> Tensor | None:
    """Room for the shares of a small gradient, one for each program, where the tensor is given."""
    return None if given is None else empty_float32(x, *shape)


def _total(shares: Tensor | None) -> Any:
    """The sum of the shares of a small gradient, or None."""
    return None if shares is None else shares.sum(0, dtype=torch.float64)


# --- selective scan ---


def _scan_constants(values: Values) -> Values:
    # the kernels keep A as they keep a state, [N, D]
    A_ND = values["A"].t().contiguous()
    return {"BN": width(values["N"]), "CHUNK": _SCAN_CHUNK, "SOFTPLUS": values["dt_softplus"], "A": A_ND}


def _scan_tiles(kernel: str, values: Values) -> list[Tile]:
    """Tiles no wider than the channels are, and half as wide where a channel has more than 32 states."""
    most, shared = width(values["D"], 8), 1 if values["BN"] <= 32 else 2
    found = [tile | {"BD": min(tile["BD"] // shared, most)} for tile in TILES[kernel]]
    return [tile for number, tile in enumerate(found) if tile not in found[:number]]


def scan_programs(D: int, N: int) -> int:
    """How many programs, of a warp each, find what a piece of a sequence adds to a state [N, D]."""
    (tile,) = _scan_tiles("scan.scan_added", {"D": D, "BN": width(N)})
    return cdiv(D, tile["BD"])


def _scan_in_pieces(values: Values) -> Values:
    """As :func:`recbole_ssm.ops.triton.pieces.in_pieces`."""
    (tile,) = _scan_tiles("scan.scan_added", values)
    blocks = scan_programs(values["D"], values["N"])
    pieces.choose(values, blocks)

    def run(own: Values) -> None:
        launch("scan.scan_added", (own["S"], blocks), own | tile)

    return pieces.in_pieces(values, values["N"] * values["D"], run)


def _scan_forward(values: Values) -> None:
    values |= _scan_constants(values)
    kernel = "scan.scan_last_forward"
    if "final" in values:
        kernel, values = "scan.scan_forward", _scan_in_pieces(values)

    def run(tile: Tile) -> None:
        launch(kernel, (values["S"], cdiv(values["D"], tile["BD"])), values | tile)

    best(kernel, values, _scan_tiles(kernel, values), run)


def _scan_backward(values: Values) -> Values:
    values |= _scan_constants(values)
    gstate = values["gstate"] = _like(values.get("state"))
    kernel = "scan.scan_last_backward"
    if "gfinal" in values:
        kernel, values = "scan.scan_backward", _scan_in_pieces(values)
    values |= {f"g{name}": _like(values[name]) for name in ("x", "dt", "z")}
    shares = best(kernel, values, _scan_tiles(kernel, values), partial(_run_scan_backward, kernel, values))
    values |= {"gA": _total(shares["gA"]).t().contiguous(), "gstate": gstate}
    values |= {name: shares[name].sum(0) for name in ("gB", "gC")}
    return values | {name: _total(shares[name]) for name in ("gskip", "gdt_bias")}


def _run_scan_backward(kernel: str, values: Values, tile: Tile) -> Values:
    """Write the gradients of x, dt and z, and return the shares of all programs in those of the parameters."""
    x, S, D, N = (values[name] for name in ("x", "S", "D", "N"))
    blocks = cdiv(D, tile["BD"])
    programs = _programs(x, S, blocks)
    shares: Values = {"gA": empty_float32(x, programs, N, D)}
    shares |= {f"g{name}": empty_float32(x, blocks, *values[name].shape) for name in ("B", "C")}
    shares |= {f"g{name}": _shares(x, values[name], programs, D) for name in ("skip", "dt_bias")}
    if "gfinal" in values:
        shares["scratch"] = empty_float32(x, programs, blocks, _SCAN_CHUNK, values["BN"], tile["BD"])
    launch(kernel, (programs, blocks), values | tile | shares)
    return shares


def _programs(x: Tensor, S: int, others: int) -> int:
    """How many programs share S sequences, where ``others`` stand beside each."""
    if not x.is_cuda:
        return min(S, 2)
    return min(S, max(1, _PROGRAMS * processors(x) // others))


def _scan_kept(sizes: Mapping[str, int]) -> Sequence[int]:
    """The shape of the states at the start of every chunk but each sequence's first: at most one a chunk of rows."""
    return sizes["rows"] // _SCAN_CHUNK, sizes["N"], sizes["D"]


# --- SSD ---


def cells(P: int, N: int) -> int:
    """Numbers in a state of SSD, as the kernels round them up: tensor cores multiply no less than 16 by 16."""
    return width(N, 16) * width(P, 16)


def _ssd_chunk(sizes: Mapping[str, int]) -> int:
    """Q fits the mean length, and the registers."""
    mean = cdiv(sizes["rows"], max(sizes["S"], 1))
    return 16 if mean <= 16 or cells(sizes["P"], sizes["N"]) > 64 * 64 else 32


def _ssd_kept(sizes: Mapping[str, int]) -> Sequence[int]:
    """As :func:`_scan_kept`."""
    return sizes["rows"] // _ssd_chunk(sizes), sizes["H"], sizes["N"], sizes["P"]


def _precision(*tensors: Tensor) -> str:
    """How tensor cores take numbers: float32 in three parts with all its bits, or the ten first, which hold a half."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if any(t.dtype == torch.float32 for t in tensors) and not tf32_allowed() else "tf32"


_AHEAD = {"REVERSE": False, "SHIFT": False, "ADD": False}
_DIRECTIONS = {
    "fwd": {**_AHEAD, "SHIFT": True},
    "bwd": {"REVERSE": True, "SHIFT": True, "ADD": True},  # it adds to what the other direction has written
}


def _ssd_warps(H: int) -> int:
    """How many warps walk along a sequence of H heads."""
    return H * TILES["ssd.ssd_added"][0]["warps"]


def _ssd_tiles(kernel: str, values: Values) -> list[Tile]:
    """The first tile, and others; at every position those whose warps have registers for 256 numbers of a state."""
    first, *others = TILES[kernel]
    least = cells(values["P"], values["N"]) // 256
    return [first, *[tile for tile in others if "last" in kernel or tile["warps"] >= least]]


def _run_ssd(kernel: str, values: Values, direction: dict[str, bool] = _AHEAD) -> None:
    constants = {
        "BN": width(values["N"], 16),
        "BP": width(values["P"], 16),
        "PRECISION": _precision(values["x"], values["B"], values["C"]),
        "per_group": values["H"] // values["G"],
        "groups": values["G"],
    }
    values = {"of_piece": None} | values | constants | direction

    def run(tile: Tile) -> None:
        launch(kernel, (values["S"], values["H"]), values | tile)

    best(kernel, values, _ssd_tiles(kernel, values), run, repeatable=not direction["ADD"])


def _ssd_in_pieces(values: Values, direction: dict[str, bool]) -> Values:
    """As :func:`recbole_ssm.ops.triton.pieces.in_pieces`."""
    H, N, P = (values[name] for name in ("H", "N", "P"))
    pieces.choose(values, _ssd_warps(H))
    values["Q"] = _ssd_chunk(values)

    def run(own: Values) -> None:
        _run_ssd("ssd.ssd_added", own, direction)

    return pieces.in_pieces(values, H * N * P, run, direction["REVERSE"])


def _run_ssd_backward(kernel: str, values: Values, direction: dict[str, bool] = _AHEAD) -> Values:
    """Write gx, or add to it, and return all gradients."""
    gstate = values["gstate"] = _like(values.get("state"))
    if "last" not in kernel:
        values = _ssd_in_pieces(values, direction)
    x, S, H, N = (values[name] for name in ("x", "S", "H", "N"))
    gA = empty_float32(x, S, H)
    # each head's share
    gB, gC = (empty_float32(x, *values[name].shape[:-2], H, N) for name in ("B", "C"))
    values |= {"gdt": empty_float32(x, *values["dt"].shape), "gA": gA, "gB": gB, "gC": gC}
    values |= {"gskip": _shares(x, values["skip"], S, H)}
    _run_ssd(kernel, values, direction)
    gB, gC = (g.unflatten(-2, (values["G"], -1)).sum(-2) for g in (gB, gC))
    return values | {"gA": _total(gA), "gB": gB, "gC": gC, "gskip": _total(values["gskip"]), "gstate": gstate}


def _ssd_forward(values: Values, direction: dict[str, bool] = _AHEAD) -> None:
    _run_ssd("ssd.ssd_forward", _ssd_in_pieces(values, direction), direction)


def _ssd_backward(values: Values) -> Values:
    return _run_ssd_backward("ssd.ssd_backward", values | {"gx": _like(values["x"])})


def _ssd_last_forward(values: Values) -> None:
    _run_ssd("ssd.ssd_last_forward", values)


def _ssd_last_backward(values: Values) -> Values:
    return _run_ssd_backward("ssd.ssd_last_backward", values | {"gx": _like(values["x"])})


def _quasi_forward(values: Values) -> None:
    y = values["y"]
    # a shifted direction leaves one row of each sequence out, which stays zero
    sums = y.zero_() if y.dtype == torch.float32 else y.new_zeros(y.shape, dtype=torch.float32)
    values |= {"y": sums, "final": None, "skip": None, "state": None}
    pieces.choose(values, _ssd_warps(values["H"]))
    for name, direction in _DIRECTIONS.items():
        _ssd_forward(one_direction(values, name), direction)
    if sums is not y:
        y.copy_(sums)


def _quasi_backward(values: Values) -> Values:
    x = values["x"]
    values |= {"gx": empty_float32(x, *x.shape), "gfinal": None, "skip": None, "state": None}
    pieces.choose(values, _ssd_warps(values["H"]))
    gA = 0.0
    for name, direction in _DIRECTIONS.items():
        found = _run_ssd_backward("ssd.ssd_backward", one_direction(values, name), direction)
        values |= {f"{gradient}_{name}": found[gradient] for gradient in ("gdt", "gB", "gC")}
        gA = gA + found["gA"].float()
    return values | {"gA": gA}


# --- loss ---

MOST_NUMBERS = 128  # of a vector whose gradient a program sums in its registers


def loss_tiles(
    output: Tensor,
    items: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    wanted: tuple[bool, bool],
    sampled: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The arguments and results of :func:`recbole_ssm.ops.linear_cross_entropy.torch_tiles`."""
    (n, d), V = output.shape, len(items)
    BR, BV = 64, 64
    by_rows, by_items = cdiv(n, BR), cdiv(V, BV)
    shares_of_items = min(_programs(output, by_items, max(by_rows, 1)), MOST_SHARES)
    shares_of_rows = min(_programs(output, by_rows, max(by_items, 1)), MOST_SHARES)
    present = torch.full((), float(V), device=output.device) if bias is None else (bias > -torch.inf).sum()
    values: dict[str, Any] = {
        "x": output, "output": whole(output), "items": whole(items), "target": whole(target), "weight": whole(weight),
        "bias": whole(bias), "ids": None if sampled is None else whole(sampled[0]), "n": n, "V": V, "d": d,
        "uniform": label_smoothing / present, "hot": 1 - label_smoothing, "SAMPLED": sampled is not None,
        "BR": BR, "BV": BV, "BK": min(width(d, 16), 64), "BD": width(d, 16), "PRECISION": _precision(output, items),
        "shares": shares_of_items, "tiles": cdiv(by_items, max(shares_of_items, 1)),
        "losses": empty_float32(output, n), "lse": empty_float32(output, n), "g_own": empty_float32(output, n),
        **{name: empty_float32(output, shares_of_items, n) for name in ("highest", "sums", "flat", "own")},
    }  # fmt: skip
    launch("loss.loss_forward", (by_rows, shares_of_items), values)
    if sampled is not None:
        values["own"] = sampled[1]
    launch("loss.loss_settle", (by_rows, 1), values)
    gradients: list[Tensor | None] = [None, None]
    if wanted[0]:
        shares = empty_float32(output, shares_of_items, n, d)
        launch("loss.loss_output", (by_rows, shares_of_items), values | {"gradient": shares})
        gradients[0] = shares.sum(0)
    if wanted[1]:
        shares = empty_float32(output, shares_of_rows, V, d)
        values["tiles"] = cdiv(by_rows, max(shares_of_rows, 1))
        launch("loss.loss_items", (by_items, shares_of_rows), values | {"gradient": shares})
        gradients[1] = shares.sum(0)
    return values["losses"].sum(), gradients[0], gradients[1], values["g_own"]


# --- convolutions ---


def _conv_grid(values: Values, tile: Tile) -> tuple[int, int]:
    """Over rows and channels."""
    return cdiv(values["rows"], tile["BT"]), cdiv(values["D"], tile["BD"])


def _conv_constants(values: Values) -> Values:
    offsets, of_row = values["offsets"], None
    if offsets is not None:
        rows = torch.arange(values["rows"], device=offsets.device)
        of_row = torch.bucketize(rows, offsets[1:-1], right=True, out_int32=True)
    return {
        "LEAD": taps_before(values),
        "SILU": values["activation"] == "silu",
        "BK": width(values["K"]),
        "of_row": of_row,
        "state": values.get("state"),
    }


def _run_conv(values: Values) -> None:
    kernel = "conv.conv_forward"

    def run(tile: Tile) -> None:
        launch(kernel, _conv_grid(values, tile), values | tile)

    best(kernel, values, TILES[kernel], run)


def _run_conv_state(kernel: str, values: Values) -> None:
    (tile,) = TILES[kernel]
    launch(kernel, (values["S"], cdiv(values["D"], tile["BD"])), values | tile)


def _conv_forward(values: Values) -> None:
    values |= _conv_constants(values)
    _run_conv(values)
    if "final" in values:
        _run_conv_state("conv.conv_state", values)


def _run_conv_gradient(values: Values, tile: Tile) -> Values:
    """Write the gradient of the sum within the activation, and return the shares in those of taps and bias."""
    grid = _conv_grid(values, tile)
    x, D, K = (values[name] for name in ("x", "D", "K"))
    shares = {"gweight": empty_float32(x, grid[0], D, K), "gbias": _shares(x, values["bias"], grid[0], D)}
    launch("conv.conv_gradient", grid, values | tile | shares)
    return shares


def _conv_backward(values: Values) -> Values:
    values |= _conv_constants(values)
    x, D, K = (values[name] for name in ("x", "D", "K"))
    gsum = empty_float32(x, *x.shape)
    values |= {"gx": _like(x), "gsum": gsum, "gstate": _like(values["state"])}
    kernel = "conv.conv_gradient"
    shares = best(kernel, values, TILES[kernel], partial(_run_conv_gradient, values))
    # x_t meets output t + lead - k with tap k: a convolution with the taps turned round
    turned = {"x": gsum, "sx": D, "weight": values["weight"].flip(1), "LEAD": K - 1 - values["LEAD"], "SILU": False}
    _run_conv(values | turned | {"bias": None, "state": None, "y": values["gx"]})
    gfinal = values.get("gfinal")
    if values["gstate"] is not None or gfinal is not None:
        _run_conv_state("conv.conv_state_gradient", values | {"gfinal": gfinal})
    return values | {name: _total(share) for name, share in shares.items()}


# --- the operators ---


def _after(letters: str) -> Shape:
    """The shape of the sums of the steps after each position, which the last position's forward keeps."""
    return lambda sizes: [sizes[letter] for letter in letters]


def _walking(run: Callable[[Values], Any]) -> Callable[[Values], Any]:
    """``run`` without pieces."""
    return lambda values: run(values | {"pieces": 0})


# on the CPU Triton's interpreter runs them
_namespace = Namespace("recbole_ssm_cuda", ["CPU", "CUDA"])
_walks = Namespace("recbole_ssm_cuda_walk", ["CPU", "CUDA"])
_KERNELS: dict[str, tuple[Callable[[Values], None], Callable[[Values], Values], dict[str, Shape]]] = {
    "selective_scan": (_scan_forward, _scan_backward, {"kept": _scan_kept}),
    "selective_scan_last": (_scan_forward, _scan_backward, {"after": _after("BLD")}),
    "ssd": (_ssd_forward, _ssd_backward, {"kept": _ssd_kept}),
    "ssd_last": (_ssd_last_forward, _ssd_last_backward, {"after": _after("BLH")}),
    "quasiseparable": (_quasi_forward, _quasi_backward, {"kept_fwd": _ssd_kept, "kept_bwd": _ssd_kept}),
    "causal_conv1d": (_conv_forward, _conv_backward, {}),
    "centered_conv1d": (_conv_forward, _conv_backward, {}),
}
OPERATORS: dict[str, Callable[..., Any]] = {
    op: Operator(_namespace, op, *functions) for op, functions in _KERNELS.items()
}
WALKS: dict[str, Callable[..., Any]] = {
    op: Operator(_walks, op, _walking(forward), _walking(backward), kept)
    for op, (forward, backward, kept) in _KERNELS.items()
    if op in ("selective_scan", "ssd", "quasiseparable")
}
"""The operators that cut long sequences, without doing so."""
