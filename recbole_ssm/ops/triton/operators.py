"""The Triton kernels as operators of ``torch.library``, with autograd and fake kernels: ``torch.ops.recbole_ssm_cuda``.

Inputs are float32, bfloat16 or float16; states and sums are float32. What many programs share in a gradient each
writes by itself, and PyTorch adds: in one order, so results repeat bit for bit; of dA and D in float64.

Triton is imported when the first kernel runs.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.library import (
    Namespace,
    absent,
    expect_groups,
    expect_kept,
    expect_shape,
    like,
    needs_gradient,
    present,
    sequences,
)

_SCAN_CHUNK = 16  # steps between two states that a scan's forward keeps for its backward
_PROGRAMS = 8  # of a backward that walks over the sequences, for each multiprocessor
MOST_STATE = 256  # N of a selective scan
MOST_CELLS = 128 * 64  # N P of SSD: what fits the 99 KiB of shared memory of the smaller GPUs
MOST_TAPS = 16  # of a convolution; what is wider or larger is PyTorch's

_operators = Namespace("recbole_ssm_cuda", ["CPU", "CUDA"])  # on the CPU Triton's interpreter runs them


def _launch(kernel: str, grid: tuple[int, int], *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Run a kernel, ``"scan.scan_forward"`` for one; nothing is run for an empty grid."""
    module, _, name = kernel.partition(".")
    function = getattr(importlib.import_module(f"recbole_ssm.ops.triton.{module}"), name)
    x = next(a for a in arguments if isinstance(a, Tensor))
    if grid[0] and grid[1]:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            function[grid](*arguments, num_warps=warps, num_stages=1, **constants)


def _rows(t: Tensor | None) -> tuple[Tensor | None, int]:
    """t ``[B, L, ...]`` and the stride of its rows (b, t), each contiguous in itself; a copy where t is not so."""
    if t is None:
        return None, 0
    inner = t[0, 0].numel() if t.numel() else 1
    if not t.is_contiguous():
        strides, shape = t.stride(), t.shape
        evenly = shape[0] == 1 or strides[0] == shape[1] * strides[1]
        whole = strides[-1] == 1 and (t.dim() == 3 or strides[2] == shape[3])
        if evenly and whole:
            return t, strides[1]
        t = t.contiguous()
    return t, inner


def _whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def _width(size: int, least: int = 1) -> int:
    """The next power of two, as blocks must have."""
    return max(least, 1 << (size - 1).bit_length()) if size else least


def _kept(x: Tensor, keep: bool, chunk: int, *state: int) -> Tensor:
    """Room for the state at the start of every chunk but each sequence's first: at most one a ``chunk`` of rows."""
    return x.new_empty(x.shape[0] * x.shape[1] // chunk if keep else 0, *state, dtype=torch.float32)


def _float(x: Tensor, *shape: int) -> Tensor:
    """New memory in float32."""
    return x.new_empty(shape, dtype=torch.float32)


def _total(shares: Tensor, given: Tensor) -> Tensor:
    """The sum of all shares of a small gradient, in float64 until it is done."""
    return shares.sum(0, dtype=torch.float64).to(given.dtype)


# --- selective scan -----------------------------------------------------------------------------------------------

_SCAN = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "


def _scan_blocks(D: int, N: int) -> dict[str, int]:
    """A lane holds one channel and at most 32 states: where N is larger, several lanes share a channel."""
    BN = _width(N)
    return {"BN": BN, "BD": min(_width(D, 8), 32 if BN <= 32 else 16)}


def _scan_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state_SND: Tensor | None = None,
    last: bool = False,
) -> None:
    (batch, L, channels), N, S = x.shape, A.shape[1], sequences(x, cu_seqlens)
    rows, outputs = (batch, L), (S,) if last else (batch, L)
    expect_shape(
        "selective_scan", dt=(dt, (*rows, channels)), A=(A, (channels, N)), B=(B, (*rows, N)), C=(C, (*outputs, N)),
        D=(D, (channels,)), z=(z, (*outputs, channels)), dt_bias=(dt_bias, (channels,)),
        state=(state_SND, (S, N, channels)),
    )  # fmt: skip


def _programs(x: Tensor, S: int, others: int) -> int:
    """How many programs share S sequences, where ``others`` stand beside each."""
    if not x.is_cuda:
        return min(S, 2)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return min(S, max(1, _PROGRAMS * processors // others))


def _scan_outputs(x: Tensor, dt: Tensor, A: Tensor, *given: Any) -> tuple[Tensor, ...]:
    cu_seqlens, _, keep = given[6:]
    D, N = A.shape
    final = _float(x, sequences(x, cu_seqlens), N, D)
    return x.new_empty(x.shape), final, _kept(x, keep, _SCAN_CHUNK, N, D)


def _scan_forward(x: Tensor, dt: Tensor, A: Tensor, *given: Any) -> tuple[Tensor, ...]:
    B, C, skip, z, bias, state, cu_seqlens, softplus, keep = given
    _scan_arguments(x, dt, A, B, C, skip, z, bias, cu_seqlens, state)
    (batch, L, D), N, S = x.shape, A.shape[1], sequences(x, cu_seqlens)
    y, final, kept = _scan_outputs(x, dt, A, *given)
    blocks = _scan_blocks(D, N)
    _launch(
        "scan.scan_forward", (S, -(-D // blocks["BD"])),
        *_rows(x), *_rows(dt), _whole(A.t()), *_rows(B), *_rows(C), _whole(skip), *_rows(z), _whole(bias),
        _whole(state), _offsets(cu_seqlens), y, final, kept if keep else None, batch * L, L, D, N,
        SOFTPLUS=softplus, CHUNK=_SCAN_CHUNK, warps=1, **blocks,
    )  # fmt: skip
    return y, final, kept


def _scan_gradients(gy: Tensor, gfinal: Any, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return present(*[like(t) for t in given[:9]])


def _scan_backward(gy: Tensor, gfinal: Tensor | None, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, skip, z, bias, state, cu_seqlens, softplus = given
    _scan_arguments(x, dt, A, B, C, skip, z, bias, cu_seqlens, state)
    (batch, L, D), N, S = x.shape, A.shape[1], sequences(x, cu_seqlens)
    expect_shape("selective_scan", gy=(gy, (batch, L, D)), gfinal=(gfinal, (S, N, D)))
    expect_kept("selective_scan", kept, batch * L // _SCAN_CHUNK, N, D)
    blocks = _scan_blocks(D, N)
    shares = -(-D // blocks["BD"])
    programs = _programs(x, S, shares)
    gx, gdt, gz, gstate = like(x), like(dt), like(z), like(state)
    gB, gC = (_float(x, shares, *t.shape) for t in (B, C))
    gA, gskip, gbias = _float(x, programs, N, D), _float(x, programs, D), _float(x, programs, D)
    scratch = _float(x, programs, shares, _SCAN_CHUNK, blocks["BN"], blocks["BD"])
    _launch(
        "scan.scan_backward", (programs, shares),
        *_rows(gy), _whole(gfinal), *_rows(x), *_rows(dt), _whole(A.t()), *_rows(B), *_rows(C), _whole(skip), *_rows(z),
        _whole(bias), _whole(state), _offsets(cu_seqlens), kept,
        gx, gdt, gA, gB, gC, None if skip is None else gskip, gz, None if bias is None else gbias, gstate, scratch,
        batch * L, L, D, N, S, SOFTPLUS=softplus, CHUNK=_SCAN_CHUNK, warps=1, **blocks,
    )  # fmt: skip
    return present(
        gx, gdt, _total(gA, A).t().contiguous(), gB.sum(0).to(B.dtype), gC.sum(0).to(C.dtype),
        None if skip is None else _total(gskip, skip), gz, None if bias is None else _total(gbias, bias), gstate,
    )  # fmt: skip


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10], output[2])
    ctx.softplus = inputs[10]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _scan_autograd(ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *given, kept = ctx.saved_tensors
    gy = torch.zeros_like(given[0]) if gy is None else gy
    gradients = _scan_backward_op(gy, gfinal, kept, *given, ctx.softplus)
    return *[absent(g, t) for g, t in zip(gradients, given)], None, None, None


_scan_op = _operators.define(
    f"selective_scan({_SCAN}Tensor? state, Tensor? cu_seqlens, bool softplus, bool keep) -> (Tensor, Tensor, Tensor)",
    _scan_forward,
    _scan_outputs,
)
_scan_backward_op = _operators.define(
    f"selective_scan_backward(Tensor gy, Tensor? gfinal, Tensor kept, {_SCAN}Tensor? state, Tensor? cu_seqlens, "
    f"bool softplus) -> ({', '.join(['Tensor'] * 9)})",
    _scan_backward,
    _scan_gradients,
)
_operators.differentiate(_scan_op, _scan_backward_op, _scan_autograd, _scan_setup)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`recbole_ssm.ops.selective_scan` in Triton."""
    state_SND = None if state is None else state.float().transpose(1, 2)
    tensors = (x, dt, A, B, C, D, z, dt_bias, state_SND)
    y, final, _ = _scan_op(*tensors, cu_seqlens, softplus, needs_gradient(*tensors))
    return y, final.transpose(1, 2)


# --- selective scan at the last position --------------------------------------------------------------------------


def _scan_last_outputs(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    cu_seqlens, _, keep = given[7:]
    return x.new_empty(sequences(x, cu_seqlens), x.shape[2]), _float(x, *(x.shape if keep else (0,)))


def _scan_last_forward(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    dt, A, B, C, skip, z, bias, cu_seqlens, softplus, keep = given
    _scan_arguments(x, dt, A, B, C, skip, z, bias, cu_seqlens, last=True)
    (batch, L, D), N, S = x.shape, A.shape[1], sequences(x, cu_seqlens)
    y, after = _scan_last_outputs(x, *given)
    blocks = _scan_blocks(D, N)
    _launch(
        "scan.scan_last_forward", (S, -(-D // blocks["BD"])),
        *_rows(x), *_rows(dt), _whole(A.t()), *_rows(B), _whole(C), _whole(skip), _whole(z), _whole(bias),
        _offsets(cu_seqlens), y, after if keep else None, batch * L, L, D, N, SOFTPLUS=softplus, warps=1, **blocks,
    )  # fmt: skip
    return y, after


def _scan_last_gradients(gy: Tensor, after: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return present(*[like(t) for t in given[:8]])


def _scan_last_backward(gy: Tensor, after: Tensor, *given: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, skip, z, bias, cu_seqlens, softplus = given
    _scan_arguments(x, dt, A, B, C, skip, z, bias, cu_seqlens, last=True)
    (batch, L, D), N, S = x.shape, A.shape[1], sequences(x, cu_seqlens)
    expect_shape("selective_scan_last", gy=(gy, (S, D)))
    expect_kept("selective_scan_last", after, *x.shape)
    blocks = _scan_blocks(D, N)
    shares = -(-D // blocks["BD"])
    programs = _programs(x, S, shares)
    gx, gdt, gz = like(x), like(dt), like(z)
    gB, gC = (_float(x, shares, *t.shape) for t in (B, C))
    gA, gskip, gbias = _float(x, programs, N, D), _float(x, programs, D), _float(x, programs, D)
    _launch(
        "scan.scan_last_backward", (programs, shares),
        _whole(gy), after, *_rows(x), *_rows(dt), _whole(A.t()), *_rows(B), _whole(C), _whole(skip), _whole(z),
        _whole(bias), _offsets(cu_seqlens),
        gx, gdt, gA, gB, gC, None if skip is None else gskip, gz, None if bias is None else gbias,
        batch * L, L, D, N, S, SOFTPLUS=softplus, warps=1, **blocks,
    )  # fmt: skip
    return present(
        gx, gdt, _total(gA, A).t().contiguous(), gB.sum(0).to(B.dtype), gC.sum(0).to(C.dtype),
        None if skip is None else _total(gskip, skip), gz, None if bias is None else _total(gbias, bias),
    )  # fmt: skip


def _scan_last_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.softplus = inputs[9]
    ctx.mark_non_differentiable(output[1])


def _scan_last_autograd(ctx: Any, gy: Tensor, _: Any) -> tuple[Any, ...]:
    *given, after = ctx.saved_tensors
    gradients = _scan_last_backward_op(gy, after, *given, ctx.softplus)
    return *[absent(g, t) for g, t in zip(gradients, given)], None, None, None


_scan_last_op = _operators.define(
    f"selective_scan_last({_SCAN}Tensor? cu_seqlens, bool softplus, bool keep) -> (Tensor, Tensor)",
    _scan_last_forward,
    _scan_last_outputs,
)
_scan_last_backward_op = _operators.define(
    f"selective_scan_last_backward(Tensor gy, Tensor after, {_SCAN}Tensor? cu_seqlens, bool softplus) "
    f"-> ({', '.join(['Tensor'] * 8)})",
    _scan_last_backward,
    _scan_last_gradients,
)
_operators.differentiate(_scan_last_op, _scan_last_backward_op, _scan_last_autograd, _scan_last_setup)


def selective_scan_last(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C_SN: Tensor,
    D: Tensor | None,
    z_SD: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
) -> Tensor:
    """:func:`recbole_ssm.ops.selective_scan_last` in Triton."""
    tensors = (x, dt, A, B, C_SN, D, z_SD, dt_bias)
    return _scan_last_op(*tensors, cu_seqlens, softplus, needs_gradient(*tensors))[0]


# --- SSD ----------------------------------------------------------------------------------------------------------

_SSD = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "


def cells(x: Tensor, B: Tensor) -> int:
    """Numbers of a state of SSD, as the kernels round them up."""
    return _width(B.shape[3], 16) * _width(x.shape[3], 16)


def _ssd_blocks(x: Tensor, B: Tensor, S: int) -> dict[str, int]:
    """Q fits the mean length, and the registers: products of less than 16 by 16 are none of the tensor cores'."""
    BN, BP = _width(B.shape[3], 16), _width(x.shape[3], 16)
    mean = -(-x.shape[0] * x.shape[1] // max(S, 1))
    return {"Q": 16 if mean <= 16 or BN * BP > 64 * 64 else 32, "BN": BN, "BP": BP}


def _precision(*tensors: Tensor) -> str:
    """How tensor cores take float32: all its digits in three parts, or those that half precision has."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if any(t.dtype == torch.float32 for t in tensors) else "tf32"


def _ssd_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state_SHNP: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    last: bool = False,
) -> tuple[int, ...]:
    (batch, L, H, P), (G, N), S = x.shape, B.shape[2:], sequences(x, cu_seqlens)
    expect_groups("ssd", G, H)
    expect_shape(
        "ssd", dt=(dt, (batch, L, H)), A=(A, (H,)), B=(B, (batch, L, G, N)),
        C=(C, (S, G, N) if last else (batch, L, G, N)), D=(D, (H,)), state=(state_SHNP, (S, H, N, P)),
    )  # fmt: skip
    return batch * L, L, H, P, N, H // G


_AHEAD = {"REVERSE": False, "SHIFT": False, "ADD": False}
_SHIFTED = {**_AHEAD, "SHIFT": True}
_REVERSED = {"REVERSE": True, "SHIFT": True, "ADD": True}  # it adds to what the other direction has written


def _run_forward(
    given: Any, y: Tensor, final: Tensor | None, kept: Tensor | None, direction: dict[str, bool] = _AHEAD
) -> None:
    """Write y, final and kept from x, dt, A, B, C, D, state and cu_seqlens."""
    x, dt, A, B, C, D, state, cu_seqlens = given
    sizes, S = _ssd_arguments(*given), sequences(x, cu_seqlens)
    _launch(
        "ssd.ssd_forward", (S, x.shape[2]),
        *_rows(x), *_rows(dt), _whole(A), *_rows(B), *_rows(C), _whole(D), _whole(state), _offsets(cu_seqlens),
        y, final, kept, *sizes, **direction, PRECISION=_precision(x, B, C), warps=8, **_ssd_blocks(x, B, S),
    )  # fmt: skip


def _run_backward(
    gy: Tensor,
    gfinal: Tensor | None,
    kept: Tensor,
    gx: Tensor,
    gstate: Tensor | None,
    given: Any,
    direction: dict[str, bool] = _AHEAD,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Write gx and gstate; return gdt, gA, gB, gC and gD."""
    x, dt, A, B, C, D, state, cu_seqlens = given
    sizes, S = _ssd_arguments(*given), sequences(x, cu_seqlens)
    (batch, L, H, P), N = x.shape, B.shape[3]
    blocks = _ssd_blocks(x, B, S)
    expect_shape("ssd", gy=(gy, (batch, L, H, P)), gfinal=(gfinal, (S, H, N, P)))
    expect_kept("ssd", kept, batch * L // blocks["Q"], H, N, P)
    gdt, gA, gB, gC = _float(x, *dt.shape), _float(x, S, H), _float(x, batch, L, H, N), _float(x, batch, L, H, N)
    gD = None if D is None else _float(x, S, H)
    _launch(
        "ssd.ssd_backward", (S, H),
        *_rows(gy), _whole(gfinal), *_rows(x), *_rows(dt), _whole(A), *_rows(B), *_rows(C), _whole(D), _whole(state),
        _offsets(cu_seqlens), kept, gx, gdt, gA, gB, gC, gD, gstate, *sizes,
        **direction, PRECISION=_precision(x, B, C), warps=8, **blocks,
    )  # fmt: skip
    gD = None if gD is None else _total(gD, D)
    return gdt.to(dt.dtype), _total(gA, A), _of_groups(gB, B), _of_groups(gC, C), gD


def _of_groups(shares: Tensor, given: Tensor) -> Tensor:
    """Gradient ``[..., G, N]`` from the shares of the heads ``[..., H, N]``."""
    return shares.unflatten(-2, (given.shape[-2], -1)).sum(-2).to(given.dtype)


def _ssd_outputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *given: Any) -> tuple[Tensor, ...]:
    cu_seqlens, carry, keep = given[3:]
    S, (H, P), N = sequences(x, cu_seqlens), x.shape[2:], B.shape[3]
    final = _float(x, S if carry else 0, H, N, P)
    return x.new_empty(x.shape), final, _kept(x, keep, _ssd_blocks(x, B, S)["Q"], H, N, P)


def _ssd_forward(*given: Any) -> tuple[Tensor, ...]:
    *tensors, carry, keep = given
    y, final, kept = _ssd_outputs(*given)
    _run_forward(tensors, y, final if carry else None, kept if keep else None)
    return y, final, kept


def _ssd_gradients(gy: Tensor, gfinal: Any, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return present(*[like(t) for t in given[:7]])


def _ssd_backward(gy: Tensor, gfinal: Tensor | None, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    gx, gstate = torch.empty_like(given[0], memory_format=torch.contiguous_format), like(given[6])
    gdt, gA, gB, gC, gD = _run_backward(gy, gfinal, kept, gx, gstate, given)
    return present(gx, gdt, gA, gB, gC, gD, gstate)


def _ssd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], output[2])
    ctx.carry = inputs[8]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _ssd_autograd(ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *given, kept = ctx.saved_tensors
    gy = torch.zeros_like(given[0]) if gy is None else gy
    gradients = _ssd_backward_op(gy, gfinal if ctx.carry else None, kept, *given)
    return *[absent(g, t) for g, t in zip(gradients, given)], None, None, None


_ssd_op = _operators.define(
    f"ssd({_SSD}Tensor? state, Tensor? cu_seqlens, bool carry, bool keep) -> (Tensor, Tensor, Tensor)",
    _ssd_forward,
    _ssd_outputs,
)
_ssd_backward_op = _operators.define(
    f"ssd_backward(Tensor gy, Tensor? gfinal, Tensor kept, {_SSD}Tensor? state, Tensor? cu_seqlens) "
    f"-> ({', '.join(['Tensor'] * 7)})",
    _ssd_backward,
    _ssd_gradients,
)
_operators.differentiate(_ssd_op, _ssd_backward_op, _ssd_autograd, _ssd_setup)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`recbole_ssm.ops.ssd` in Triton, from step sizes as they are."""
    tensors = (x, dt, A, B, C, D, None if state is None else state.float().transpose(2, 3))
    y, final, _ = _ssd_op(*tensors, cu_seqlens, return_state, needs_gradient(*tensors))
    return y, final.transpose(2, 3) if return_state else None


# --- SSD at the last position -------------------------------------------------------------------------------------


def _ssd_last_outputs(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    cu_seqlens, keep = given[5:]
    return x.new_empty(sequences(x, cu_seqlens), *x.shape[2:]), _float(x, *(x.shape[:3] if keep else (0,)))


def _ssd_last_blocks(x: Tensor, B: Tensor) -> dict[str, int]:
    return {"Q": 32, "BN": _width(B.shape[3], 16), "BP": _width(x.shape[3], 16)}


def _ssd_last_forward(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    dt, A, B, C, skip, cu_seqlens, keep = given
    sizes = _ssd_arguments(x, dt, A, B, C, skip, None, cu_seqlens, last=True)
    y, after = _ssd_last_outputs(x, *given)
    _launch(
        "ssd.ssd_last_forward", (sequences(x, cu_seqlens), x.shape[2]),
        *_rows(x), *_rows(dt), _whole(A), *_rows(B), _whole(C), _whole(skip), _offsets(cu_seqlens),
        y, after if keep else None, *sizes, B.shape[2], **_ssd_last_blocks(x, B),
    )  # fmt: skip
    return y, after


def _ssd_last_gradients(gy: Tensor, after: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return present(*[like(t) for t in given[:6]])


def _ssd_last_backward(gy: Tensor, after: Tensor, *given: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, skip, cu_seqlens = given
    sizes = _ssd_arguments(x, dt, A, B, C, skip, None, cu_seqlens, last=True)
    (batch, L, H, P), N, S = x.shape, B.shape[3], sequences(x, cu_seqlens)
    expect_shape("ssd_last", gy=(gy, (S, H, P)))
    expect_kept("ssd_last", after, batch, L, H)
    gx, gdt, gA, gskip = like(x), _float(x, batch, L, H), _float(x, S, H), _float(x, S, H)
    gB, gC = _float(x, batch, L, H, N), _float(x, S, H, N)
    _launch(
        "ssd.ssd_last_backward", (S, H),
        _whole(gy), after, *_rows(x), *_rows(dt), _whole(A), *_rows(B), _whole(C), _whole(skip), _offsets(cu_seqlens),
        gx, gdt, gA, gB, gC, None if skip is None else gskip, *sizes, B.shape[2], **_ssd_last_blocks(x, B),
    )  # fmt: skip
    return present(
        gx, gdt.to(dt.dtype), _total(gA, A), _of_groups(gB, B), _of_groups(gC, C),
        None if skip is None else _total(gskip, skip),
    )  # fmt: skip


def _ssd_last_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.mark_non_differentiable(output[1])


def _ssd_last_autograd(ctx: Any, gy: Tensor, _: Any) -> tuple[Any, ...]:
    *given, after = ctx.saved_tensors
    return *[absent(g, t) for g, t in zip(_ssd_last_backward_op(gy, after, *given), given)], None, None


_ssd_last_op = _operators.define(
    f"ssd_last({_SSD}Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor)", _ssd_last_forward, _ssd_last_outputs
)
_ssd_last_backward_op = _operators.define(
    f"ssd_last_backward(Tensor gy, Tensor after, {_SSD}Tensor? cu_seqlens) -> ({', '.join(['Tensor'] * 6)})",
    _ssd_last_backward,
    _ssd_last_gradients,
)
_operators.differentiate(_ssd_last_op, _ssd_last_backward_op, _ssd_last_autograd, _ssd_last_setup)


def ssd_last(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """:func:`recbole_ssm.ops.ssd_last` in Triton, from step sizes as they are."""
    return _ssd_last_op(x, dt, A, B, C, D, cu_seqlens, needs_gradient(x, dt, A, B, C, D))[0]


# --- quasiseparable: SSD in either direction, shifted by one position ---------------------------------------------

_QUASI = "Tensor x, Tensor dt_fwd, Tensor dt_bwd, Tensor A, Tensor B_fwd, Tensor C_fwd, Tensor B_bwd, Tensor C_bwd, "
_QUASI += "Tensor? cu_seqlens"


def _quasi_outputs(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    B, cu_seqlens, keep = given[3], given[7], given[8]
    chunk = _ssd_blocks(x, B, sequences(x, cu_seqlens))["Q"]
    kept = [_kept(x, keep, chunk, x.shape[2], B.shape[3], x.shape[3]) for _ in range(2)]
    return x.new_empty(x.shape), *kept


def _quasi_forward(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    dt_fwd, dt_bwd, A, B_fwd, C_fwd, B_bwd, C_bwd, cu_seqlens, keep = given
    _, kept_fwd, kept_bwd = _quasi_outputs(x, *given)
    y = x.new_zeros(x.shape, dtype=torch.float32)  # a shifted direction leaves one row of each sequence out
    ahead = x, dt_fwd, A, B_fwd, C_fwd, None, None, cu_seqlens
    back = x, dt_bwd, A, B_bwd, C_bwd, None, None, cu_seqlens
    _run_forward(ahead, y, None, kept_fwd if keep else None, _SHIFTED)
    _run_forward(back, y, None, kept_bwd if keep else None, _REVERSED)
    return y.to(x.dtype), kept_fwd, kept_bwd


def _quasi_gradients(gy: Tensor, kept_fwd: Tensor, kept_bwd: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return present(*[like(t) for t in given[:8]])


def _quasi_backward(gy: Tensor, kept_fwd: Tensor, kept_bwd: Tensor, *given: Any) -> tuple[Tensor, ...]:
    x, dt_fwd, dt_bwd, A, B_fwd, C_fwd, B_bwd, C_bwd, cu_seqlens = given
    gx = _float(x, *x.shape)
    ahead = x, dt_fwd, A, B_fwd, C_fwd, None, None, cu_seqlens
    back = x, dt_bwd, A, B_bwd, C_bwd, None, None, cu_seqlens
    one = _run_backward(gy, None, kept_fwd, gx, None, ahead, _SHIFTED)
    other = _run_backward(gy, None, kept_bwd, gx, None, back, _REVERSED)
    return present(gx.to(x.dtype), one[0], other[0], one[1] + other[1], *one[2:4], *other[2:4])


def _quasi_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _quasi_autograd(ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
    *given, kept_fwd, kept_bwd = ctx.saved_tensors
    return *_quasi_backward_op(gy, kept_fwd, kept_bwd, *given), None, None


_quasi_op = _operators.define(
    f"quasiseparable({_QUASI}, bool keep) -> (Tensor, Tensor, Tensor)", _quasi_forward, _quasi_outputs
)
_quasi_backward_op = _operators.define(
    f"quasiseparable_backward(Tensor gy, Tensor kept_fwd, Tensor kept_bwd, {_QUASI}) -> ({', '.join(['Tensor'] * 8)})",
    _quasi_backward,
    _quasi_gradients,
)
_operators.differentiate(_quasi_op, _quasi_backward_op, _quasi_autograd, _quasi_setup)


def quasiseparable(x: Tensor, *given: Any) -> Tensor:
    """:func:`recbole_ssm.ops.quasiseparable` in Triton, from step sizes as they are."""
    return _quasi_op(x, *given, needs_gradient(x, *given[:-1]))[0]


# --- convolutions -------------------------------------------------------------------------------------------------

_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, int lead, bool silu, bool carry"
_CONV_BLOCKS = {"BT": 32, "BD": 32}


def _conv_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, state_SKD: Tensor | None, cu_seqlens: Tensor | None, lead: int
) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, int]]:
    """Sizes, grid over rows, and constants."""
    (batch, L, D), K = x.shape, weight.shape[1]
    S = sequences(x, cu_seqlens)
    expect_shape("conv1d", weight=(weight, (D, K)), bias=(bias, (D,)), state=(state_SKD, (S, K, D)))
    if not 0 <= lead < K <= MOST_TAPS or (state_SKD is not None and lead != K - 1):
        raise ValueError(f"conv1d: no kernel for {K} taps of which {lead} lead")
    BT, BD = _CONV_BLOCKS.values()
    return (batch * L, L, D), (-(-batch * L // BT), -(-D // BD)), {"K": K, "LEAD": lead, **_CONV_BLOCKS}


def _packed(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Bounds, and the sequence of each row."""
    offsets = _offsets(cu_seqlens)
    if offsets is None:
        return None, None
    rows = torch.arange(x.shape[1], device=x.device)
    return offsets, torch.bucketize(rows, offsets[1:-1], right=True, out_int32=True)


def _conv_outputs(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    D, K = given[0].shape
    return x.new_empty(x.shape), x.new_empty(sequences(x, given[3]) if given[-1] else 0, K, D)


def _conv_forward(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    weight, bias, state, cu_seqlens, _, silu, carry = given
    sizes, grid, constants = _conv_arguments(x, *given[:5])
    y, final = _conv_outputs(x, *given)
    offsets, of_row = _packed(x, cu_seqlens)
    weight, bias, state = _whole(weight), _whole(bias), _whole(state)
    _launch(
        "conv.conv_forward", grid, *_rows(x), weight, bias, state, offsets, of_row, y, *sizes, SILU=silu, **constants
    )
    if carry:
        K = constants["K"]
        grid = sequences(x, cu_seqlens), grid[1]
        _launch(
            "conv.conv_state", grid, *_rows(x), state, offsets, final, *sizes, K=K, BK=_width(K), BD=constants["BD"]
        )
    return y, final


def _conv_gradients(gy: Tensor, gfinal: Any, *given: Any) -> tuple[Tensor, ...]:
    return present(*[like(t) for t in given[:4]])


def _conv_backward(gy: Tensor, gfinal: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    x, weight, bias, state, cu_seqlens, lead, silu, carry = given
    sizes, grid, constants = _conv_arguments(*given[:6])
    S, (D, K) = sequences(x, cu_seqlens), weight.shape
    expect_shape("conv1d", gy=(gy, tuple(x.shape)), gfinal=(gfinal, (S if carry else 0, K, D)))
    offsets, of_row = _packed(x, cu_seqlens)
    weight, bias_, state_ = weight.contiguous(), _whole(bias), _whole(state)
    gsum, gweight = _float(x, *x.shape), _float(x, grid[0], D, K)
    gbias = None if bias is None else _float(x, grid[0], D)
    _launch(
        "conv.conv_gradient", grid, *_rows(gy), *_rows(x), weight, bias_, state_, offsets, of_row,
        gsum, gweight, gbias, *sizes, SILU=silu, **constants,
    )  # fmt: skip
    # x_t meets output t + lead - k with tap k: a convolution with the taps turned round
    gx, turned = torch.empty_like(x, memory_format=torch.contiguous_format), weight.flip(1)
    constants = {**constants, "LEAD": K - 1 - lead}
    _launch(
        "conv.conv_forward", grid, *_rows(gsum), turned, None, None, offsets, of_row, gx, *sizes, SILU=False,
        **constants,
    )  # fmt: skip
    gstate = like(state)
    if gstate is not None or (carry and gfinal is not None):
        gfinal = _whole(gfinal) if carry else None
        _launch(
            "conv.conv_state_gradient", (S, grid[1]), gfinal, gsum, weight, offsets, gx, gstate, *sizes,
            K=K, BK=_width(K), BD=constants["BD"],
        )  # fmt: skip
    return present(gx, _total(gweight, weight), None if bias is None else _total(gbias, bias), gstate)  # type: ignore[arg-type]


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.flags = inputs[5:]
    ctx.set_materialize_grads(False)


def _conv_autograd(ctx: Any, gy: Tensor | None, gfinal: Tensor | None) -> tuple[Any, ...]:
    given = ctx.saved_tensors
    gy = torch.zeros_like(given[0]) if gy is None else gy
    gradients = _conv_backward_op(gy, gfinal, *given, *ctx.flags)
    return *[absent(g, t) for g, t in zip(gradients, given)], None, None, None, None


_conv_op = _operators.define(f"conv1d({_CONV}) -> (Tensor, Tensor)", _conv_forward, _conv_outputs)
_conv_backward_op = _operators.define(
    f"conv1d_backward(Tensor gy, Tensor? gfinal, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_gradients,
)
_operators.differentiate(_conv_op, _conv_backward_op, _conv_autograd, _conv_setup)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_BDK: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """:func:`recbole_ssm.ops.causal_conv1d` in Triton."""
    state_SKD = None if state_BDK is None else state_BDK.transpose(1, 2)
    y, final = _conv_op(x, weight, bias, state_SKD, cu_seqlens, weight.shape[1] - 1, activation == "silu", True)
    return y, final.transpose(1, 2)


def centered_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, activation: str | None
) -> Tensor:
    """:func:`recbole_ssm.ops.centered_conv1d` in Triton."""
    return _conv_op(x, weight, bias, None, cu_seqlens, weight.shape[1] // 2, activation == "silu", False)[0]
