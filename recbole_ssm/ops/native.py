"""The ``native`` backend: C++ kernels for float32 on the CPU, one library for every version of Python and PyTorch.

The library has a C interface and is loaded by ctypes (``recbole_ssm/csrc``, built by ``setup.py``). Each op is a
``torch.library`` operator with autograd and a fake kernel, so ``torch.compile`` and ``torch.export`` see through it.
Where the library is missing, or a tensor is not float32, PyTorch's own operations take its place.

Results are the same, bit for bit, for any number of threads; they differ in the last digits between instruction sets.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.arguments import expect_groups, expect_shape
from recbole_ssm.ops.backend import implements
from recbole_ssm.ops.causal_conv1d import torch_causal, torch_centered
from recbole_ssm.ops.operators import Namespace, no_tangents
from recbole_ssm.ops.operators import absent as _absent
from recbole_ssm.ops.operators import like as _like
from recbole_ssm.ops.operators import needs_gradient as _needs_gradient
from recbole_ssm.ops.operators import present as _present
from recbole_ssm.ops.operators import sequences as _sequences
from recbole_ssm.ops.quasiseparable import torch_quasiseparable
from recbole_ssm.ops.selective_scan import torch_scan, torch_scan_last
from recbole_ssm.ops.ssd import torch_ssd, torch_ssd_last

ABI = 1  # of csrc/kernels.h
CHUNK = 64  # positions between two states that a forward keeps for its backward
MOST_TAPS = 16  # of a convolution; wider ones are PyTorch's
LIBRARY = Path(__file__).parent.parent / "_native.so"


def _structure(fields: str) -> type[ctypes.Structure]:
    """A structure of csrc/kernels.h: a star marks a pointer, all else is an int64."""
    kinds = [(name.lstrip("*"), ctypes.c_void_p if name[0] == "*" else ctypes.c_int64) for name in fields.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": kinds})


_STRUCTURES = {
    "scan": _structure(
        "S L D N threads softplus last *offsets *x sx *dt sdt *A *B sB *C sC *skip *z sz *bias *state *y *final *kept "
        "*gy sgy *gfinal *gx *gdt *gA *gB *gC *gskip *gz *gbias *gstate *workspace"
    ),
    "ssd": _structure(
        "S L H P G N threads reverse shift accumulate *offsets *x sx *dt sdt *A *B sB *C sC *skip *state "
        "*y *final *kept *gy sgy *gfinal *gx *gdt *gB *gC *gA *gskip *gstate *workspace"
    ),
    "ssd_last": _structure(
        "S L H P G N threads *offsets *x sx *dt sdt *A *B sB *C *skip *y *gy *gx *gdt *gB *gC *gA *gskip *workspace"
    ),
    "conv": _structure(
        "S L D K lead silu threads *offsets *x sx *weight *bias *state *y *final "
        "*gy sgy *gfinal *gx *gweight *gbias *gstate *workspace"
    ),
}
_kernels: dict[str, tuple[Any, Any]] = {}  # name -> (run, size of the workspace)
_select: Any = None
instruction_set = ""


def load(path: Path) -> str:
    """Load the library; "" if it is usable, else why it is not."""
    global _select
    if not path.exists():
        return "not built"
    try:
        library = ctypes.CDLL(str(path))
        if library.recbole_ssm_abi() != ABI:
            return "built from other sources; install again"
        for name, structure in _STRUCTURES.items():
            run, size = library[f"recbole_ssm_{name}"], library[f"recbole_ssm_{name}_workspace"]
            run.argtypes = [ctypes.POINTER(structure), ctypes.c_int64, ctypes.c_int64]
            size.argtypes = [ctypes.POINTER(structure), ctypes.c_int64]
            run.restype = size.restype = ctypes.c_int64
            _kernels[name] = (run, size)
        _select = library.recbole_ssm_select
        _select.argtypes, _select.restype = [ctypes.c_char_p], ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"cannot be loaded: {error}"
    return select(os.environ.get("RECBOLE_SSM_ISA", ""))


def select(name: str) -> str:
    """Use the kernels of one instruction set, ``avx512``, ``avx2`` or ``baseline``; "" takes the best.

    Returns:
        "" if it is done, else why not.
    """
    global instruction_set
    found = _select(name.encode() or None)
    if found is None:
        return f"this machine has no instruction set '{name}'"
    instruction_set = found.decode()
    return ""


# --- calls into the library ---------------------------------------------------------------------------------------


def _rows(name: str, t: Tensor | None) -> dict[str, Any]:
    """t ``[B, L, ...]`` and the stride of its rows (b, t), each contiguous in itself; a copy where t is not so."""
    if t is None:
        return {}
    inner = t[0, 0].numel() if t.numel() else 1
    if t.data_ptr() % 4:
        t = t.clone(memory_format=torch.contiguous_format)
    if not t.is_contiguous():
        strides, shape = t.stride(), t.shape
        evenly = shape[0] == 1 or strides[0] == shape[1] * strides[1]
        whole = strides[-1] == 1 and (t.dim() == 3 or strides[2] == shape[3])
        if evenly and whole and shape[1] > 1:
            return {name: t, f"s{name}": strides[1]}
        t = t.contiguous()
    return {name: t, f"s{name}": inner}


def _whole(t: Tensor | None) -> Tensor | None:
    """A contiguous tensor that begins at a whole float."""
    if t is None:
        return None
    return t.contiguous() if t.data_ptr() % 4 == 0 else t.clone(memory_format=torch.contiguous_format)


def _run(name: str, rows: int, backward: bool, fields: dict[str, Any]) -> None:
    """Call a kernel; ``fields`` holds the tensors until it returns."""
    if name not in _kernels:  # an exported program on a machine that has not built them
        raise RuntimeError(f"{name}: the native kernels are not usable here: {unusable}")
    for field, value in fields.items():  # the sums gA and gskip are this module's own, and in double for SSD
        if isinstance(value, Tensor) and value.dtype != torch.float32 and field not in ("offsets", "gA", "gskip"):
            raise ValueError(f"{name}: the native kernels compute float32, not {value.dtype} as given for {field}")
    values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
    call = _STRUCTURES[name](threads=torch.get_num_threads(), **values)
    run, size = _kernels[name]
    workspace = torch.empty(size(call, backward), dtype=torch.uint8)
    call.workspace = workspace.data_ptr()
    if run(call, rows, backward):
        raise ValueError(f"{name}: cu_seqlens must rise from 0 to the total length {rows}")


def _offsets(x: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """S, L and offsets."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    return {"S": _sequences(x, cu_seqlens), "L": x.shape[1], "offsets": cu_seqlens}


def _kept(x: Tensor, keep: bool, *state: int) -> Tensor:
    """Room for the state at the start of every chunk but each sequence's first: at most one a CHUNK of rows."""
    return x.new_empty(x.shape[0] * x.shape[1] // CHUNK if keep else 0, *state)


def _expect_kept(op: str, kept: Tensor, x: Tensor, *state: int) -> None:
    """An exported program may run backward although its forward was traced without gradients."""
    if tuple(kept.shape) != (x.shape[0] * x.shape[1] // CHUNK, *state):
        raise ValueError(f"{op}: the forward kept no states for a backward; run or export it with gradients enabled")


def _usable(*tensors: Tensor | None) -> bool:
    """Whether all are float32 on the CPU, and none carries a tangent: PyTorch would drop it without a word."""
    given = [t for t in tensors if t is not None]
    if not all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given):
        return False
    return no_tangents(*given)


_operators = Namespace("recbole_ssm", ["CPU"])
_operator, _with_gradient = _operators.define, _operators.differentiate


# --- selective scan -----------------------------------------------------------------------------------------------

_SCAN = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state, "
_SCAN += "Tensor? cu_seqlens, bool softplus, bool last"


def _scan_fields(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_SND: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    last: bool,
) -> dict[str, Any]:
    (batch, L, channels), N, S = x.shape, A.shape[1], _sequences(x, cu_seqlens)
    rows, outputs = (batch, L), (S,) if last else (batch, L)
    expect_shape(
        "selective_scan", dt=(dt, (*rows, channels)), A=(A, (channels, N)), B=(B, (*rows, N)), C=(C, (*outputs, N)),
        D=(D, (channels,)), z=(z, (*outputs, channels)), dt_bias=(dt_bias, (channels,)),
        state=(state_SND, (S, N, channels)),
    )  # fmt: skip
    if last:  # one row a sequence
        C, z = C[:, None], None if z is None else z[:, None]
    return {
        **_offsets(x, cu_seqlens), "D": channels, "N": N, "softplus": softplus, "last": last,
        **_rows("x", x), **_rows("dt", dt), **_rows("B", B), **_rows("C", C), **_rows("z", z),
        "A": _whole(A), "skip": _whole(D), "bias": _whole(dt_bias), "state": _whole(state_SND),
    }  # fmt: skip


def _scan_outputs(x: Tensor, A: Tensor, cu_seqlens: Tensor | None, last: bool, keep: bool) -> tuple[Tensor, ...]:
    S, (D, N) = _sequences(x, cu_seqlens), A.shape
    y = x.new_empty((S, D) if last else x.shape)
    return y, x.new_empty((0,) if last else (S, N, D)), _kept(x, keep and not last, N, D)


def _scan_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, keep = arguments
    fields = _scan_fields(x, *given)
    y, final, kept = _scan_outputs(x, given[1], given[-3], given[-1], keep)
    _run("scan", x.shape[0] * x.shape[1], False, {**fields, "y": y, "final": final, "kept": kept if keep else None})
    return y, final, kept


def _scan_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, keep = arguments
    return _scan_outputs(x, given[1], given[-3], given[-1], keep)


def _scan_gradients(gy: Tensor, gfinal: Any, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return _present(*[_like(t) for t in given[:9]])


def _scan_backward(gy: Tensor, gfinal: Tensor | None, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    fields = _scan_fields(*given)
    x, last, (D, N), S = given[0], given[-1], given[2].shape, fields["S"]
    expect_shape("selective_scan", gy=(gy, (S, D) if last else tuple(x.shape)), gfinal=(gfinal, (S, N, D)))
    if not last:
        _expect_kept("selective_scan", kept, x, N, D)
    gradients = _scan_gradients(gy, gfinal, kept, *given)
    names = ("gx", "gdt", "gA", "gB", "gC", "gskip", "gz", "gbias", "gstate")
    fields |= {name: _absent(g, t) for name, g, t in zip(names, gradients, given)}
    fields |= {**_rows("gy", gy[:, None] if last else gy), "gfinal": _whole(gfinal), "kept": kept}
    _run("scan", x.shape[0] * x.shape[1], True, fields)
    return gradients


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10], output[2])
    ctx.flags = inputs[10:12]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _scan_autograd(ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *given, kept = ctx.saved_tensors
    if gy is None:
        gy = torch.zeros_like(given[0])  # the final state alone was used, so this is not the last position's op
    gradients = _scan_backward_op(gy, None if ctx.flags[1] else gfinal, kept, *given, *ctx.flags)
    return *[_absent(g, t) for g, t in zip(gradients, given)], None, None, None, None


_scan_op = _operator(f"selective_scan({_SCAN}, bool keep) -> (Tensor, Tensor, Tensor)", _scan_forward, _scan_fake)
_scan_backward_op = _operator(
    f"selective_scan_backward(Tensor gy, Tensor? gfinal, Tensor kept, {_SCAN}) -> ({', '.join(['Tensor'] * 9)})",
    _scan_backward,
    _scan_gradients,
)
_with_gradient(_scan_op, _scan_backward_op, _scan_autograd, _scan_setup)


def _selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = (x, dt, A, B, C, D, z, dt_bias, state)
    if not _usable(*tensors):
        return torch_scan(x, dt, A, B, C, D, z, dt_bias, softplus, state, cu_seqlens)
    state_SND = None if state is None else state.transpose(1, 2)
    keep = _needs_gradient(*tensors)
    y, final, _ = _scan_op(x, dt, A, B, C, D, z, dt_bias, state_SND, cu_seqlens, softplus, False, keep)
    return y, final.transpose(1, 2)


def _selective_scan_last(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C_SN: Tensor,
    D: Tensor | None,
    z_SD: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    if not _usable(x, dt, A, B, C_SN, D, z_SD, dt_bias):
        return torch_scan_last(x, dt, A, B, C_SN, D, z_SD, dt_bias, softplus, cu_seqlens)
    return _scan_op(x, dt, A, B, C_SN, D, z_SD, dt_bias, None, cu_seqlens, softplus, True, False)[0]


# --- SSD ----------------------------------------------------------------------------------------------------------

_SSD = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor? cu_seqlens"


def _ssd_fields(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state_SHNP: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> dict[str, Any]:
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    maps = (batch, L, G, N)
    expect_groups("ssd", G, H)
    expect_shape(
        "ssd", dt=(dt, (batch, L, H)), A=(A, (H,)), B=(B, maps), C=(C, maps), D=(D, (H,)),
        state=(state_SHNP, (_sequences(x, cu_seqlens), H, N, P)),
    )  # fmt: skip
    return {
        **_offsets(x, cu_seqlens), "H": H, "P": P, "G": G, "N": N,
        **_rows("x", x), **_rows("dt", dt), **_rows("B", B), **_rows("C", C),
        "A": _whole(A), "skip": _whole(D), "state": _whole(state_SHNP),
    }  # fmt: skip


def _ssd_outputs(x: Tensor, B: Tensor, cu_seqlens: Tensor | None, carry: bool, keep: bool) -> tuple[Tensor, ...]:
    H, P, N = x.shape[2], x.shape[3], B.shape[3]
    final = x.new_empty(_sequences(x, cu_seqlens) if carry else 0, H, N, P)
    return x.new_empty(x.shape), final, _kept(x, keep, H, N, P)


def _ssd_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, carry, keep = arguments
    fields = _ssd_fields(x, *given)
    y, final, kept = _ssd_outputs(x, given[2], given[-1], carry, keep)
    fields |= {"y": y, "final": final if carry else None, "kept": kept if keep else None}
    _run("ssd", x.shape[0] * x.shape[1], False, fields)
    return y, final, kept


def _ssd_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, carry, keep = arguments
    return _ssd_outputs(x, given[2], given[-1], carry, keep)


def _ssd_gradients(gy: Tensor, gfinal: Any, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, D, state, _ = given
    gA, gD = (None if t is None else t.new_empty(t.shape, dtype=torch.float64) for t in (A, D))
    return _present(_like(x), _like(dt), gA, _like(B), _like(C), gD, _like(state))


def _ssd_backward(gy: Tensor, gfinal: Tensor | None, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    fields, x = _ssd_fields(*given), given[0]
    states = fields["H"], fields["N"], fields["P"]
    expect_shape("ssd", gy=(gy, tuple(x.shape)), gfinal=(gfinal, (fields["S"], *states)))
    _expect_kept("ssd", kept, x, *states)
    gradients = _ssd_gradients(gy, gfinal, kept, *given)
    names = ("gx", "gdt", "gA", "gB", "gC", "gskip", "gstate")
    fields |= {name: _absent(g, t) for name, g, t in zip(names, gradients, given)}
    _run("ssd", x.shape[0] * x.shape[1], True, {**fields, **_rows("gy", gy), "gfinal": _whole(gfinal), "kept": kept})
    return gradients


def _ssd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], output[2])
    ctx.carry = inputs[8]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _ssd_autograd(ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *given, kept = ctx.saved_tensors
    gy = torch.zeros_like(given[0]) if gy is None else gy
    gradients = _ssd_backward_op(gy, gfinal if ctx.carry else None, kept, *given)
    return *[None if t is None else g.to(t.dtype) for g, t in zip(gradients, given)], None, None, None


_ssd_op = _operator(f"ssd({_SSD}, bool carry, bool keep) -> (Tensor, Tensor, Tensor)", _ssd_forward, _ssd_fake)
_ssd_backward_op = _operator(
    f"ssd_backward(Tensor gy, Tensor? gfinal, Tensor kept, {_SSD}) -> ({', '.join(['Tensor'] * 7)})",
    _ssd_backward,
    _ssd_gradients,
)
_with_gradient(_ssd_op, _ssd_backward_op, _ssd_autograd, _ssd_setup)


def _ssd(
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
    if not _usable(x, dt, A, B, C, D, state):
        return torch_ssd(x, dt, A, B, C, D, state, cu_seqlens, return_state)
    state_SHNP = None if state is None else state.transpose(2, 3)
    keep = _needs_gradient(x, dt, A, B, C, D, state)
    y, final, _ = _ssd_op(x, dt, A, B, C, D, state_SHNP, cu_seqlens, return_state, keep)
    return y, final.transpose(2, 3) if return_state else None


# --- SSD at the last position -------------------------------------------------------------------------------------

_SSD_LAST = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? cu_seqlens"


def _ssd_last_fields(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cu_seqlens: Tensor | None
) -> dict[str, Any]:
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    expect_groups("ssd_last", G, H)
    expect_shape(
        "ssd_last", dt=(dt, (batch, L, H)), A=(A, (H,)), B=(B, (batch, L, G, N)),
        C=(C, (_sequences(x, cu_seqlens), G, N)), D=(D, (H,)),
    )  # fmt: skip
    return {
        **_offsets(x, cu_seqlens), "H": H, "P": P, "G": G, "N": N,
        **_rows("x", x), **_rows("dt", dt), **_rows("B", B), "A": _whole(A), "C": _whole(C), "skip": _whole(D),
    }  # fmt: skip


def _ssd_last_fake(x: Tensor, *given: Any) -> Tensor:
    return x.new_empty(_sequences(x, given[-1]), x.shape[2], x.shape[3])


def _ssd_last_forward(x: Tensor, *given: Any) -> Tensor:
    fields = _ssd_last_fields(x, *given)
    y = _ssd_last_fake(x, *given)
    _run("ssd_last", x.shape[0] * x.shape[1], False, {**fields, "y": y})
    return y


def _ssd_last_gradients(gy: Tensor, *given: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, D, _ = given
    gA, gD = (None if t is None else t.new_empty(t.shape, dtype=torch.float64) for t in (A, D))
    return _present(_like(x), _like(dt), gA, _like(B), _like(C), gD)


def _ssd_last_backward(gy: Tensor, *given: Any) -> tuple[Tensor, ...]:
    fields, x = _ssd_last_fields(*given), given[0]
    expect_shape("ssd_last", gy=(gy, (fields["S"], *x.shape[2:])))
    gradients = _ssd_last_gradients(gy, *given)
    names = ("gx", "gdt", "gA", "gB", "gC", "gskip")
    fields |= {name: _absent(g, t) for name, g, t in zip(names, gradients, given)}
    _run("ssd_last", x.shape[0] * x.shape[1], True, {**fields, "gy": _whole(gy)})
    return gradients


def _ssd_last_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ssd_last_autograd(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    given = ctx.saved_tensors
    gradients = _ssd_last_backward_op(gy, *given)
    return *[None if t is None else g.to(t.dtype) for g, t in zip(gradients, given)], None


_ssd_last_op = _operator(f"ssd_last({_SSD_LAST}) -> Tensor", _ssd_last_forward, _ssd_last_fake)
_ssd_last_backward_op = _operator(
    f"ssd_last_backward(Tensor gy, {_SSD_LAST}) -> ({', '.join(['Tensor'] * 6)})",
    _ssd_last_backward,
    _ssd_last_gradients,
)
_with_gradient(_ssd_last_op, _ssd_last_backward_op, _ssd_last_autograd, _ssd_last_setup)


def _ssd_last(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if not _usable(x, dt, A, B, C, D):
        return torch_ssd_last(x, dt, A, B, C, D, cu_seqlens)
    return _ssd_last_op(x, dt, A, B, C, D, cu_seqlens)


# --- quasiseparable: SSD in either direction, shifted by one position ---------------------------------------------

_QUASI = "Tensor x, Tensor dt_fwd, Tensor dt_bwd, Tensor A, Tensor B_fwd, Tensor C_fwd, Tensor B_bwd, Tensor C_bwd, "
_QUASI += "Tensor? cu_seqlens"


def _directions(x: Tensor, *given: Any) -> list[dict[str, Any]]:
    """The fields of the forward and of the backward scan; the second adds to what the first has written."""
    dt_fwd, dt_bwd, A, B_fwd, C_fwd, B_bwd, C_bwd, cu_seqlens = given
    return [
        {**_ssd_fields(x, dt, A, B, C, cu_seqlens=cu_seqlens), "shift": 1, "reverse": second, "accumulate": second}
        for second, dt, B, C in ((0, dt_fwd, B_fwd, C_fwd), (1, dt_bwd, B_bwd, C_bwd))
    ]


def _quasi_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, keep = arguments
    states = (x.shape[2], given[3].shape[3], x.shape[3])
    return x.new_empty(x.shape), _kept(x, keep, *states), _kept(x, keep, *states)


def _quasi_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, keep = arguments
    y, *kept = _quasi_fake(x, *arguments)
    for fields, states in zip(_directions(x, *given), kept):
        _run("ssd", x.shape[0] * x.shape[1], False, {**fields, "y": y, "kept": states if keep else None})
    return y, *kept


def _quasi_gradients(gy: Tensor, kept_fwd: Tensor, kept_bwd: Tensor, *given: Any) -> tuple[Tensor, ...]:
    gA = given[3].new_empty(given[3].shape, dtype=torch.float64)
    return _present(*[gA if i == 3 else _like(t) for i, t in enumerate(given[:8])])


def _quasi_backward(gy: Tensor, kept_fwd: Tensor, kept_bwd: Tensor, *given: Any) -> tuple[Tensor, ...]:
    x = given[0]
    expect_shape("quasiseparable", gy=(gy, tuple(x.shape)))
    gradients = _quasi_gradients(gy, kept_fwd, kept_bwd, *given)
    gx, gdt_fwd, gdt_bwd, gA, gB_fwd, gC_fwd, gB_bwd, gC_bwd = gradients
    each = ((gdt_fwd, gB_fwd, gC_fwd, kept_fwd), (gdt_bwd, gB_bwd, gC_bwd, kept_bwd))
    for fields, (gdt, gB, gC, kept) in zip(_directions(*given), each):
        _expect_kept("quasiseparable", kept, x, fields["H"], fields["N"], fields["P"])
        fields |= {**_rows("gy", gy), "gx": gx, "gA": gA, "gdt": gdt, "gB": gB, "gC": gC, "kept": kept}
        _run("ssd", gy.shape[0] * gy.shape[1], True, fields)
    return gradients


def _quasi_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _quasi_autograd(ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
    *given, kept_fwd, kept_bwd = ctx.saved_tensors
    gradients = _quasi_backward_op(gy, kept_fwd, kept_bwd, *given)
    return *[g.to(t.dtype) for g, t in zip(gradients, given)], None, None


_quasi_op = _operator(f"quasiseparable({_QUASI}, bool keep) -> (Tensor, Tensor, Tensor)", _quasi_forward, _quasi_fake)
_quasi_backward_op = _operator(
    f"quasiseparable_backward(Tensor gy, Tensor kept_fwd, Tensor kept_bwd, {_QUASI}) -> ({', '.join(['Tensor'] * 8)})",
    _quasi_backward,
    _quasi_gradients,
)
_with_gradient(_quasi_op, _quasi_backward_op, _quasi_autograd, _quasi_setup)


def _quasiseparable(x: Tensor, *given: Any) -> Tensor:
    if not _usable(x, *given[:-1]):
        return torch_quasiseparable(x, *given)
    return _quasi_op(x, *given, _needs_gradient(x, *given[:-1]))[0]


# --- convolutions -------------------------------------------------------------------------------------------------

_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, int lead, bool silu, bool carry"


def _conv_fields(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_SKD: Tensor | None,
    cu_seqlens: Tensor | None,
    lead: int,
    silu: bool,
    carry: bool,
) -> dict[str, Any]:
    D, K = weight.shape
    expect_shape(
        "conv1d", x=(x, (*x.shape[:2], D)), bias=(bias, (D,)), state=(state_SKD, (_sequences(x, cu_seqlens), K, D))
    )
    if not 0 <= lead < K <= MOST_TAPS or (state_SKD is not None and lead != K - 1):
        raise ValueError(f"conv1d: no kernel for {K} taps of which {lead} lead")
    return {
        **_offsets(x, cu_seqlens), "D": D, "K": K, "lead": lead, "silu": silu, **_rows("x", x),
        "weight": _whole(weight), "bias": _whole(bias), "state": _whole(state_SKD),
    }  # fmt: skip


def _conv_fake(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    D, K = given[0].shape
    return x.new_empty(x.shape), x.new_empty(_sequences(x, given[3]) if given[-1] else 0, K, D)


def _conv_forward(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    fields = _conv_fields(x, *given)
    y, final = _conv_fake(x, *given)
    _run("conv", x.shape[0] * x.shape[1], False, {**fields, "y": y, "final": final if given[-1] else None})
    return y, final


def _conv_gradients(gy: Tensor, gfinal: Any, *given: Any) -> tuple[Tensor, ...]:
    return _present(*[_like(t) for t in given[:4]])


def _conv_backward(gy: Tensor, gfinal: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    fields, x = _conv_fields(*given), given[0]
    S = fields["S"] if given[-1] else 0
    expect_shape("conv1d", gy=(gy, tuple(x.shape)), gfinal=(gfinal, (S, fields["K"], fields["D"])))
    gradients = _conv_gradients(gy, gfinal, *given)
    names = ("gx", "gweight", "gbias", "gstate")
    fields |= {name: _absent(g, t) for name, g, t in zip(names, gradients, given)}
    _run("conv", x.shape[0] * x.shape[1], True, {**fields, **_rows("gy", gy), "gfinal": _whole(gfinal)})
    return gradients


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.flags = inputs[5:]
    ctx.set_materialize_grads(False)


def _conv_autograd(ctx: Any, gy: Tensor | None, gfinal: Tensor | None) -> tuple[Any, ...]:
    given = ctx.saved_tensors
    gy = torch.zeros_like(given[0]) if gy is None else gy
    gradients = _conv_backward_op(gy, gfinal, *given, *ctx.flags)
    return *[_absent(g, t) for g, t in zip(gradients, given)], None, None, None, None


_conv_op = _operator(f"conv1d({_CONV}) -> (Tensor, Tensor)", _conv_forward, _conv_fake)
_conv_backward_op = _operator(
    f"conv1d_backward(Tensor gy, Tensor? gfinal, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_gradients,
)
_with_gradient(_conv_op, _conv_backward_op, _conv_autograd, _conv_setup)


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    state_BDK: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    K = weight.shape[1]
    if K > MOST_TAPS or not _usable(x, weight, bias, state_BDK):
        options: dict[str, Any] = {"activation": activation, "state_BDK": state_BDK, "cu_seqlens": cu_seqlens}
        return torch_causal(x, weight, bias, **options)
    state_SKD = None if state_BDK is None else state_BDK.transpose(1, 2)
    y, final = _conv_op(x, weight, bias, state_SKD, cu_seqlens, K - 1, activation == "silu", True)
    return y, final.transpose(1, 2)


def _centered_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None, cu_seqlens: Tensor | None
) -> Tensor:
    K = weight.shape[1]
    if K > MOST_TAPS or not _usable(x, weight, bias):
        return torch_centered(x, weight, bias, activation=activation, cu_seqlens=cu_seqlens)
    return _conv_op(x, weight, bias, None, cu_seqlens, K // 2, activation == "silu", False)[0]


# --- availability -------------------------------------------------------------------------------------------------

unusable = load(LIBRARY)  # why there is no native backend; "" where there is one
if not unusable:
    for _op, _function in (
        ("selective_scan", _selective_scan),
        ("selective_scan_last", _selective_scan_last),
        ("ssd", _ssd),
        ("ssd_last", _ssd_last),
        ("quasiseparable", _quasiseparable),
        ("causal_conv1d", _causal_conv1d),
        ("centered_conv1d", _centered_conv1d),
    ):
        implements(_op, "native")(_function)
elif unusable != "not built":
    logging.getLogger().warning(f"native kernels: {unusable}; PyTorch's operations take their place")
