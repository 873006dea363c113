"""The Triton kernels as operators of ``torch.library``: ``torch.ops.recbole_ssm_cuda``.

Inputs are float32, bfloat16 or float16; states and sums are float32. Where many programs contribute to one gradient,
each writes its share and PyTorch adds them: in one order, so results repeat bit for bit, and in float64 for dA and dD.

Triton is imported when the first kernel runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.library import Call, Namespace, Operator, contiguous_like, taps_before, whole

MOST_STATE = 256  # N of a selective scan
MOST_CELLS = 128 * 64  # N P of SSD: what fits the 99 KiB of shared memory of the smaller GPUs
_SCAN_CHUNK = 16  # steps between two states that a scan's forward keeps for its backward
_PROGRAMS = 8  # of a backward that walks over the sequences, for each multiprocessor

_operators = Namespace("recbole_ssm_cuda", ["CPU", "CUDA"])  # on the CPU Triton's interpreter runs them


def _launch(kernel: str, grid: tuple[int, int], values: Mapping[str, Any], warps: int = 4) -> None:
    """Run a kernel, for example ``"scan.scan_forward"``, unless its grid is empty.

    ``values`` has an entry for every parameter of the kernel, and may have others.
    """
    module, _, name = kernel.partition(".")
    function = getattr(importlib.import_module(f"recbole_ssm.ops.triton.{module}"), name)
    x = values["x"]
    if grid[0] and grid[1]:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            function[grid](*[values[parameter] for parameter in function.arg_names], num_warps=warps, num_stages=1)


def _width(size: int, least: int = 1) -> int:
    """The next power of two, as blocks must have."""
    return max(least, 1 << (size - 1).bit_length()) if size else least


def _float(x: Tensor, *shape: int) -> Tensor:
    """New memory in float32, on the device of x."""
    return x.new_empty(shape, dtype=torch.float32)


def _like(t: Tensor | None) -> Tensor | None:
    return None if t is None else contiguous_like(t)


def _total(shares: Tensor) -> Tensor:
    """The sum of all shares of a small gradient."""
    return shares.sum(0, dtype=torch.float64)


# --- selective scan -----------------------------------------------------------------------------------------------


def _scan_values(call: Call, gy: Tensor | None = None) -> dict[str, Any]:
    """What both scans read. A lane holds one channel and at most 32 states; of more, several lanes share a channel."""
    BN = _width(call.sizes["N"])
    blocks = {"BN": BN, "BD": min(_width(call.sizes["D"], 8), 32 if BN <= 32 else 16), "CHUNK": _SCAN_CHUNK}
    fields = call.fields(gy)
    return {**fields, **blocks, "A": whole(call.given["A"].t()), "SOFTPLUS": fields["dt_softplus"]}


def _scan_forward(call: Call, outputs: dict[str, Any]) -> None:
    values = _scan_values(call)
    kernel = "scan.scan_forward" if "final" in outputs else "scan.scan_last_forward"
    _launch(kernel, (call.sizes["S"], -(-call.sizes["D"] // values["BD"])), {**values, **outputs}, warps=1)


def _scan_backward(call: Call, incoming: dict[str, Any]) -> dict[str, Tensor | None]:
    given, last = call.given, "gfinal" not in incoming
    (x, B, C), (S, D, N) = (given[name] for name in "xBC"), (call.sizes[letter] for letter in "SDN")
    values = _scan_values(call, incoming["gy"])
    shares = -(-D // values["BD"])
    programs = _programs(x, S, shares)
    state = given.get("state")
    gx, gdt, gz = (_like(given[name]) for name in ("x", "dt", "z"))
    gstate = None if state is None else _float(x, *state.shape)
    gB, gC = (_float(x, shares, *t.shape) for t in (B, C))
    gA, gskip, gbias = _float(x, programs, N, D), _float(x, programs, D), _float(x, programs, D)
    values |= {"gx": gx, "gdt": gdt, "gA": gA, "gB": gB, "gC": gC, "gz": gz, "gstate": gstate}
    values["gskip"] = None if given["D"] is None else gskip
    values["gdt_bias"] = None if given["dt_bias"] is None else gbias
    if last:
        _launch("scan.scan_last_backward", (programs, shares), {**values, "after": incoming["after"]}, warps=1)
    else:
        values |= {"gfinal": whole(incoming["gfinal"]), "kept": incoming["kept"]}
        values["scratch"] = _float(x, programs, shares, _SCAN_CHUNK, values["BN"], values["BD"])
        _launch("scan.scan_backward", (programs, shares), values, warps=1)
    small = {"A": _total(gA).t().contiguous(), "D": _total(gskip), "dt_bias": _total(gbias)}
    return {"x": gx, "dt": gdt, "B": gB.sum(0), "C": gC.sum(0), "z": gz, "state": gstate, **small}


def _programs(x: Tensor, S: int, others: int) -> int:
    """How many programs share S sequences, where ``others`` stand beside each."""
    if not x.is_cuda:
        return min(S, 2)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return min(S, max(1, _PROGRAMS * processors // others))


# --- SSD ----------------------------------------------------------------------------------------------------------


def cells(P: int, N: int) -> int:
    """Numbers in a state of SSD, as the kernels round them up."""
    return _width(N, 16) * _width(P, 16)


def _ssd_chunk(sizes: Mapping[str, int]) -> int:
    """Q fits the mean length, and the registers."""
    mean = -(-sizes["B"] * sizes["L"] // max(sizes["S"], 1))
    return 16 if mean <= 16 or cells(sizes["P"], sizes["N"]) > 64 * 64 else 32


def _ssd_kept(sizes: Mapping[str, int]) -> Sequence[int]:
    """The shape of the states at the start of every chunk but each sequence's first."""
    return sizes["B"] * sizes["L"] // _ssd_chunk(sizes), sizes["H"], sizes["N"], sizes["P"]


def _precision(*tensors: Tensor) -> str:
    """How tensor cores take float32: all its digits in three parts, or those that half precision has."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if any(t.dtype == torch.float32 for t in tensors) else "tf32"


_AHEAD = {"REVERSE": False, "SHIFT": False, "ADD": False}
_SHIFTED = {**_AHEAD, "SHIFT": True}
_REVERSED = {"REVERSE": True, "SHIFT": True, "ADD": True}  # it adds to what the other direction has written


def _ssd_values(call: Call, gy: Tensor | None = None, direction: dict[str, bool] = _AHEAD) -> dict[str, Any]:
    """What the kernels of SSD read; tensor cores multiply no less than 16 by 16."""
    sizes = call.sizes
    precision = _precision(*[call.given[name] for name in "xBC"])
    blocks = {"BN": _width(sizes["N"], 16), "BP": _width(sizes["P"], 16), "PRECISION": precision, **direction}
    return {**call.fields(gy), **blocks, "per_group": sizes["H"] // sizes["G"], "groups": sizes["G"]}


def _run_ssd(call: Call, outputs: dict[str, Any], direction: dict[str, bool] = _AHEAD) -> None:
    """Write y, final and kept."""
    values = {**_ssd_values(call, None, direction), "Q": _ssd_chunk(call.sizes), **outputs}
    _launch("ssd.ssd_forward", (call.sizes["S"], call.sizes["H"]), values, warps=8)


def _run_ssd_backward(
    call: Call, incoming: dict[str, Any], gx: Tensor | None, direction: dict[str, bool] = _AHEAD
) -> dict[str, Any]:
    """Write gx, or add to it, and return all gradients."""
    given, state = call.given, call.given.get("state")
    (x, B, C), (S, H, N) = (given[name] for name in "xBC"), (call.sizes[letter] for letter in "SHN")
    gdt, gA, gskip = _float(x, *given["dt"].shape), _float(x, S, H), _float(x, S, H)
    gB, gC = (_float(x, *t.shape[:-2], H, N) for t in (B, C))  # each head's share
    values = {**_ssd_values(call, incoming["gy"], direction), "gx": gx, "gdt": gdt, "gA": gA, "gB": gB, "gC": gC}
    values["gskip"] = None if given["D"] is None else gskip
    gstate = None if state is None else _float(x, *state.shape)
    if "after" in incoming:
        _launch("ssd.ssd_last_backward", (S, H), {**values, "after": incoming["after"], "Q": 32})
    else:
        values |= {"gfinal": whole(incoming["gfinal"]), "gstate": gstate, "kept": incoming["kept"]}
        _launch("ssd.ssd_backward", (S, H), {**values, "Q": _ssd_chunk(call.sizes)}, warps=8)
    gB, gC = (g.unflatten(-2, (t.shape[-2], -1)).sum(-2) for g, t in ((gB, B), (gC, C)))
    small = {"A": _total(gA), "D": _total(gskip)}
    return {"x": gx, "dt": gdt, "B": gB, "C": gC, "state": gstate, **small}


def _ssd_backward(call: Call, incoming: dict[str, Any]) -> dict[str, Tensor | None]:
    return _run_ssd_backward(call, incoming, _like(call.given["x"]))


def _ssd_last_forward(call: Call, outputs: dict[str, Any]) -> None:
    values = {**_ssd_values(call), "Q": 32, **outputs}
    _launch("ssd.ssd_last_forward", (call.sizes["S"], call.sizes["H"]), values)


def _quasi_forward(call: Call, outputs: dict[str, Any]) -> None:
    y = outputs["y"]
    # a shifted direction leaves one row of each sequence out
    sums = y.zero_() if y.dtype == torch.float32 else y.new_zeros(y.shape, dtype=torch.float32)
    forward, backward = call.directions()
    _run_ssd(forward, {"y": sums, "final": None, "kept": outputs["kept_fwd"]}, _SHIFTED)
    _run_ssd(backward, {"y": sums, "final": None, "kept": outputs["kept_bwd"]}, _REVERSED)
    if sums is not y:
        y.copy_(sums)


def _quasi_backward(call: Call, incoming: dict[str, Any]) -> dict[str, Tensor | None]:
    x, gy = call.given["x"], incoming["gy"]
    gx = _float(x, *x.shape)
    forward, backward = call.directions()
    fwd = _run_ssd_backward(forward, {"gy": gy, "gfinal": None, "kept": incoming["kept_fwd"]}, gx, _SHIFTED)
    bwd = _run_ssd_backward(backward, {"gy": gy, "gfinal": None, "kept": incoming["kept_bwd"]}, gx, _REVERSED)
    gradients: dict[str, Tensor | None] = {"x": gx, "A": fwd["A"].float() + bwd["A"].float()}
    for direction, found in (("fwd", fwd), ("bwd", bwd)):
        gradients |= {f"{name}_{direction}": found[name] for name in ("dt", "B", "C")}
    return gradients


# --- convolutions -------------------------------------------------------------------------------------------------


def _conv_values(call: Call, gy: Tensor | None = None) -> tuple[dict[str, Any], tuple[int, int], tuple[int, int]]:
    """What the kernels of the convolutions read, the grid over rows, and the grid over sequences."""
    values = {**call.fields(gy), "LEAD": taps_before(call), "SILU": call.given["activation"] == "silu"}
    values |= {"BT": 32, "BD": 32, "BK": _width(call.sizes["K"]), "of_row": None}
    values.setdefault("state", None)
    if values["offsets"] is not None:
        rows = torch.arange(call.sizes["L"], device=values["x"].device)
        values["of_row"] = torch.bucketize(rows, values["offsets"][1:-1], right=True, out_int32=True)
    tiles = -(-call.sizes["D"] // 32)
    return values, (-(-call.rows // 32), tiles), (call.sizes["S"], tiles)


def _conv_forward(call: Call, outputs: dict[str, Any]) -> None:
    values, by_rows, by_sequences = _conv_values(call)
    _launch("conv.conv_forward", by_rows, {**values, **outputs})
    if "final" in outputs:
        _launch("conv.conv_state", by_sequences, {**values, **outputs})


def _conv_backward(call: Call, incoming: dict[str, Any]) -> dict[str, Tensor | None]:
    values, by_rows, by_sequences = _conv_values(call, incoming["gy"])
    (D, K), x, state = (call.sizes[letter] for letter in "DK"), call.given["x"], call.given.get("state")
    gx, gsum, gweight, gbias = _like(x), _float(x, *x.shape), _float(x, by_rows[0], D, K), _float(x, by_rows[0], D)
    values |= {"gsum": gsum, "gweight": gweight, "gbias": None if call.given["bias"] is None else gbias}
    _launch("conv.conv_gradient", by_rows, values)
    # x_t meets output t + lead - k with tap k: a convolution with the taps turned round
    turned = {"x": gsum, "sx": D, "weight": values["weight"].flip(1), "LEAD": K - 1 - values["LEAD"], "SILU": False}
    _launch("conv.conv_forward", by_rows, {**values, **turned, "bias": None, "state": None, "y": gx})
    gfinal, gstate = whole(incoming.get("gfinal")), _like(state)
    if gstate is not None or gfinal is not None:
        values |= {"gfinal": gfinal, "gx": gx, "gstate": gstate}
        _launch("conv.conv_state_gradient", by_sequences, values)
    return {"x": gx, "weight": _total(gweight), "bias": _total(gbias), "state": gstate}


# --- the operators ------------------------------------------------------------------------------------------------


def _states_of_scan(sizes: Mapping[str, int]) -> Sequence[int]:
    """The shape of the states at the start of every chunk but each sequence's first: at most one a chunk of rows."""
    return sizes["B"] * sizes["L"] // _SCAN_CHUNK, sizes["N"], sizes["D"]


def _of(letters: str) -> Callable[[Mapping[str, int]], Sequence[int]]:
    return lambda sizes: [sizes[letter] for letter in letters]


OPERATORS: dict[str, Callable[..., Any]] = {
    op: Operator(_operators, op, forward, backward, kept)
    for op, forward, backward, kept in (
        ("selective_scan", _scan_forward, _scan_backward, {"kept": _states_of_scan}),
        ("selective_scan_last", _scan_forward, _scan_backward, {"after": _of("BLD")}),
        ("ssd", _run_ssd, _ssd_backward, {"kept": _ssd_kept}),
        ("ssd_last", _ssd_last_forward, _ssd_backward, {"after": _of("BLH")}),
        ("quasiseparable", _quasi_forward, _quasi_backward, {"kept_fwd": _ssd_kept, "kept_bwd": _ssd_kept}),
        ("causal_conv1d", _conv_forward, _conv_backward, {}),
        ("centered_conv1d", _conv_forward, _conv_backward, {}),
    )
}
