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

from recbole_ssm.ops.backend import implements
from recbole_ssm.ops.causal_conv1d import torch_causal, torch_centered
from recbole_ssm.ops.dropout import torch_dropout
from recbole_ssm.ops.library import Namespace, expect_groups, expect_shape, no_tangents
from recbole_ssm.ops.library import sequences as _sequences
from recbole_ssm.ops.quasiseparable import torch_quasiseparable
from recbole_ssm.ops.selective_scan import torch_scan, torch_scan_last
from recbole_ssm.ops.ssd import torch_ssd, torch_ssd_last

ABI = 2  # of csrc/kernels.h
CHUNK = 64  # positions between two states that a forward keeps for its backward
MOST_TAPS = 16  # of a convolution; wider ones are PyTorch's
LIBRARY = Path(__file__).parent.parent / "_native.so"


def _structure(fields: str) -> type[ctypes.Structure]:
    """A structure of csrc/kernels.h: a star marks a pointer, a tilde a double, all else is an int64."""
    kinds = {"*": ctypes.c_void_p, "~": ctypes.c_double}
    members = [(name.lstrip("*~"), kinds.get(name[0], ctypes.c_int64)) for name in fields.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": members})


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
    "step": _structure(
        "B M D N K R H G F residual threads *rows items *u *first_weight *first_bias ~first_eps "
        "*in_weight *conv_weight *conv_bias *x_weight *dt_weight *dt_bias *A_log *skip "
        "*gate_norm_weight *gate_norm_bias ~gate_norm_eps *out_weight *norm_weight *norm_bias ~norm_eps "
        "*w_1 *b_1 *w_2 *b_2 *last_weight *last_bias ~last_eps *conv *ssm *conv_after *ssm_after *y *workspace"
    ),
    "dropout": _structure("size threads seed threshold ~scale *x *y *workspace"),
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
    call = structure(name, **fields)
    run, size = _kernels[name]
    workspace = torch.empty(size(call, backward), dtype=torch.uint8)
    call.workspace = workspace.data_ptr()
    if run(call, rows, backward):
        raise ValueError(f"{name}: cu_seqlens must rise from 0 to the total length {rows}")


def structure(name: str, **fields: Any) -> Any:
    """A structure of csrc/kernels.h with the addresses of the tensors, which have to outlive it."""
    values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
    return _STRUCTURES[name](threads=torch.get_num_threads(), **values)


def step_workspace(call: Any) -> Tensor:
    """What one block's step writes in between."""
    return torch.empty(_kernels["step"][1](call, False), dtype=torch.uint8)


def run_steps(calls: Any, count: int) -> None:
    """Run one event through ``count`` blocks, whose structures stand in a row with all their tensors and workspaces."""
    if _kernels["step"][0](calls, count, False):
        raise IndexError("step: there is no item of such an id")


def _offsets(x: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """S, L and offsets."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    return {"S": _sequences(x, cu_seqlens), "L": x.shape[1], "offsets": cu_seqlens}


def _kept(x: Tensor, keep: bool, *state: int) -> tuple[int, ...]:
    """The shape of the states at the start of every chunk but each sequence's first: at most one a CHUNK of rows."""
    return (x.shape[0] * x.shape[1] // CHUNK if keep else 0, *state)


def _usable(*tensors: Tensor | None) -> bool:
    """Whether all are float32 on the CPU, and none carries a tangent: PyTorch would drop it without a word."""
    given = [t for t in tensors if t is not None]
    if not all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given):
        return False
    return no_tangents(*given)


_operators = Namespace("recbole_ssm", ["CPU"])


class _Operator:
    """An operator of torch.library and its backward, around one kernel.

    In tables of names, those that begin with ``kept`` are what the forward keeps for the backward, ``name@1`` belongs
    to the second run of a kernel that runs twice, and ``*name`` is a sum in double. An operator returns tensors alone,
    so an empty one, whose address is null, stands for None.

    Args:
        name: of the operator.
        kernel: what it runs.
        tensors: the inputs that are tensors, the last of them ``cu_seqlens``, by their schema.
        flags: the inputs that are not; ``bool keep``, if there is something to keep, comes after them.
        outputs: the kernel's fields for the outputs, separated by blanks: ``y``, then perhaps ``final``, then the kept.
        gradients: the kernel's fields for the gradients of the first tensors.
        shapes: all inputs -> the shapes of the outputs.
        fields: all inputs but ``keep``, and gy or None -> the kernel's other fields, for each run; it checks shapes.
    """

    def __init__(
        self, name: str, kernel: str, tensors: str, flags: str, outputs: str, gradients: str, shapes: Any, fields: Any
    ) -> None:
        self.name, self.kernel, self.shapes, self.fields = name, kernel, shapes, fields
        self.outputs, self.gradients = outputs.split(), gradients.split()
        self.inputs = tensors.count(",") + 1
        self.keeps = sum(output.startswith("kept") for output in self.outputs)
        given = f"{tensors}, {flags}" if flags else tensors
        returns = {"y": "Tensor gy", "final": "Tensor? gfinal"}
        back = ", ".join(returns.get(output, f"Tensor {output.replace('@', '_')}") for output in self.outputs)
        results = f"({', '.join(['Tensor'] * len(self.outputs))})" if self.outputs[1:] else "Tensor"
        self.backward_operator = _operators.define(
            f"{name}_backward({back}, {given}) -> ({', '.join(['Tensor'] * len(self.gradients))})",
            self.backward,
            self.backward_fake,
        )
        self.operator = _operators.define(
            f"{name}({given}{', bool keep' if self.keeps else ''}) -> {results}", self.forward, self.forward_fake
        )
        _operators.differentiate(self.operator, self.backward_operator, self.autograd, self.setup)

    def __call__(self, *inputs: Any) -> Any:
        """The outputs; without ``keep``, which is whether gradients are wanted."""
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return self.operator(*inputs, keep) if self.keeps else self.operator(*inputs)

    def forward_fake(self, *inputs: Any) -> Any:
        """The outputs, not yet computed."""
        outputs = tuple(inputs[0].new_empty(shape) for shape in self.shapes(*inputs))
        return outputs if self.outputs[1:] else outputs[0]

    def forward(self, *inputs: Any) -> Any:
        """Run the kernel."""
        runs = self.fields(*(inputs[:-1] if self.keeps else inputs), None)
        outputs = self.forward_fake(*inputs)
        self._run(runs, False, inputs[0], zip(self.outputs, outputs if self.outputs[1:] else [outputs]))
        return outputs

    def backward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The gradients, not yet computed; arguments are those of the outputs, then the inputs but ``keep``."""
        return tuple(
            torch.empty(0) if t is None
            else torch.empty(t.shape, dtype=torch.float64 if name[0] == "*" else t.dtype, device=t.device)
            for name, t in zip(self.gradients, arguments[len(self.outputs) :])
        )  # fmt: skip

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the kernel backward."""
        incoming, inputs = arguments[: len(self.outputs)], arguments[len(self.outputs) :]
        shapes = self.shapes(*inputs, True) if self.keeps else self.shapes(*inputs)
        for output, given, shape in zip(self.outputs, incoming, shapes):
            if not output.startswith("kept"):
                expect_shape(self.name, **{f"g{output}": (given, tuple(shape))})
            elif given.shape != shape:  # an exported program may run backward although traced without gradients
                message = "the forward kept no states for a backward; run or export it with gradients enabled"
                raise ValueError(f"{self.name}: {message}")
        gradients = self.backward_fake(*arguments)
        fields = [*zip(self.gradients, gradients), *zip(self.outputs[1:], incoming[1:])]
        fields = [("gfinal", _whole(t)) if name == "final" else (name, t) for name, t in fields]
        self._run(self.fields(*inputs, incoming[0]), True, inputs[0], fields)
        return gradients

    def _run(self, runs: list[dict[str, Any]], backward: bool, x: Tensor, fields: Any) -> None:
        names = [(name.lstrip("*").partition("@"), t) for name, t in fields]
        for number, run in enumerate(runs):
            own = {field: t for (field, _, only), t in names if only in ("", str(number))}
            _run(self.kernel, x.shape[0] * x.shape[1], backward, {**run, **own})

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """What the backward will need."""
        kept = output[-self.keeps :] if self.keeps else ()
        ctx.save_for_backward(*inputs[: self.inputs], *kept)
        ctx.flags = inputs[self.inputs : -1] if self.keeps else inputs[self.inputs :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)

    def autograd(self, ctx: Any, gy: Tensor | None, *more: Tensor | None) -> tuple[Any, ...]:
        """A gradient or None for every input."""
        saved = ctx.saved_tensors
        inputs, kept = saved[: self.inputs], saved[self.inputs :]
        if gy is None:  # the final state alone was used, so this is not the last position's op
            gy = torch.zeros_like(inputs[0])
        incoming = gy, *more[: len(more) - self.keeps], *kept
        gradients = self.backward_operator(*incoming, *inputs, *ctx.flags)
        found = [None if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs)]
        return *found, *[None] * (self.inputs - len(found) + len(ctx.flags) + bool(self.keeps))


# --- selective scan -----------------------------------------------------------------------------------------------


def _scan_shapes(x: Tensor, *arguments: Any) -> tuple[Any, ...]:
    _, A, *_, cu_seqlens, _, last, keep = arguments
    S, (D, N) = _sequences(x, cu_seqlens), A.shape
    return (S, D) if last else x.shape, (0,) if last else (S, N, D), _kept(x, keep and not last, N, D)


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
    gy: Tensor | None,
) -> list[dict[str, Any]]:
    (batch, L, channels), N, S = x.shape, A.shape[1], _sequences(x, cu_seqlens)
    rows, outputs = (batch, L), (S,) if last else (batch, L)
    expect_shape(
        "selective_scan", dt=(dt, (*rows, channels)), A=(A, (channels, N)), B=(B, (*rows, N)), C=(C, (*outputs, N)),
        D=(D, (channels,)), z=(z, (*outputs, channels)), dt_bias=(dt_bias, (channels,)),
        state=(state_SND, (S, N, channels)),
    )  # fmt: skip
    if last:  # one row a sequence
        C, z, gy = C[:, None], None if z is None else z[:, None], None if gy is None else gy[:, None]
    return [{
        **_offsets(x, cu_seqlens), "D": channels, "N": N, "softplus": softplus, "last": last,
        **_rows("x", x), **_rows("dt", dt), **_rows("B", B), **_rows("C", C), **_rows("z", z), **_rows("gy", gy),
        "A": _whole(A), "skip": _whole(D), "bias": _whole(dt_bias), "state": _whole(state_SND),
    }]  # fmt: skip


_scan_op = _Operator(
    name="selective_scan",
    kernel="scan",
    tensors="Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state, "
    "Tensor? cu_seqlens",
    flags="bool softplus, bool last",
    outputs="y final kept",
    gradients="gx gdt gA gB gC gskip gz gbias gstate",
    shapes=_scan_shapes,
    fields=_scan_fields,
)


def _selective_scan(
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
    tensors = (x, dt, A, B, C, D, z, dt_bias, state)
    if not _usable(*tensors):
        return torch_scan(x, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, softplus)
    state_SND = None if state is None else state.transpose(1, 2)
    y, final, _ = _scan_op(x, dt, A, B, C, D, z, dt_bias, state_SND, cu_seqlens, softplus, False)
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
    cu_seqlens: Tensor | None,
    softplus: bool,
) -> Tensor:
    if not _usable(x, dt, A, B, C_SN, D, z_SD, dt_bias):
        return torch_scan_last(x, dt, A, B, C_SN, D, z_SD, dt_bias, cu_seqlens, softplus)
    return _scan_op(x, dt, A, B, C_SN, D, z_SD, dt_bias, None, cu_seqlens, softplus, True)[0]


# --- SSD ----------------------------------------------------------------------------------------------------------


def _ssd_shapes(x: Tensor, *arguments: Any) -> tuple[Any, ...]:
    B, *_, cu_seqlens, carry, keep = arguments[2:]
    H, P, N = x.shape[2], x.shape[3], B.shape[3]
    return x.shape, (_sequences(x, cu_seqlens) if carry else 0, H, N, P), _kept(x, keep, H, N, P)


def _ssd_fields(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state_SHNP: Tensor | None,
    cu_seqlens: Tensor | None,
    carry: bool,
    gy: Tensor | None,
) -> list[dict[str, Any]]:
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    maps = (batch, L, G, N)
    expect_groups("ssd", G, H)
    expect_shape(
        "ssd", dt=(dt, (batch, L, H)), A=(A, (H,)), B=(B, maps), C=(C, maps), D=(D, (H,)),
        state=(state_SHNP, (_sequences(x, cu_seqlens), H, N, P)),
    )  # fmt: skip
    return [{
        **_offsets(x, cu_seqlens), "H": H, "P": P, "G": G, "N": N,
        **_rows("x", x), **_rows("dt", dt), **_rows("B", B), **_rows("C", C), **_rows("gy", gy),
        "A": _whole(A), "skip": _whole(D), "state": _whole(state_SHNP),
    }]  # fmt: skip


_ssd_op = _Operator(
    name="ssd",
    kernel="ssd",
    tensors="Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor? cu_seqlens",
    flags="bool carry",
    outputs="y final kept",
    gradients="gx gdt *gA gB gC *gskip gstate",
    shapes=_ssd_shapes,
    fields=_ssd_fields,
)


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
    y, final, _ = _ssd_op(x, dt, A, B, C, D, state_SHNP, cu_seqlens, return_state)
    return y, final.transpose(2, 3) if return_state else None


# --- SSD at the last position -------------------------------------------------------------------------------------


def _ssd_last_shapes(x: Tensor, *arguments: Any) -> tuple[Any, ...]:
    return ((_sequences(x, arguments[-1]), *x.shape[2:]),)


def _ssd_last_fields(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    cu_seqlens: Tensor | None,
    gy: Tensor | None,
) -> list[dict[str, Any]]:
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    expect_groups("ssd_last", G, H)
    expect_shape(
        "ssd_last", dt=(dt, (batch, L, H)), A=(A, (H,)), B=(B, (batch, L, G, N)),
        C=(C, (_sequences(x, cu_seqlens), G, N)), D=(D, (H,)),
    )  # fmt: skip
    return [{
        **_offsets(x, cu_seqlens), "H": H, "P": P, "G": G, "N": N, **_rows("x", x), **_rows("dt", dt), **_rows("B", B),
        "A": _whole(A), "C": _whole(C), "skip": _whole(D), "gy": _whole(gy),
    }]  # fmt: skip


_ssd_last_op = _Operator(
    name="ssd_last",
    kernel="ssd_last",
    tensors="Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? cu_seqlens",
    flags="",
    outputs="y",
    gradients="gx gdt *gA gB gC *gskip",
    shapes=_ssd_last_shapes,
    fields=_ssd_last_fields,
)


def _ssd_last(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if not _usable(x, dt, A, B, C, D):
        return torch_ssd_last(x, dt, A, B, C, D, cu_seqlens)
    return _ssd_last_op(x, dt, A, B, C, D, cu_seqlens)


# --- quasiseparable: SSD in either direction, shifted by one position ---------------------------------------------


def _quasi_shapes(x: Tensor, *arguments: Any) -> tuple[Any, ...]:
    *given, keep = arguments
    states = (x.shape[2], given[3].shape[3], x.shape[3])
    return x.shape, _kept(x, keep, *states), _kept(x, keep, *states)


def _quasi_fields(x: Tensor, *arguments: Any) -> list[dict[str, Any]]:
    """The forward and the backward scan; the second adds to what the first has written."""
    dt_fwd, dt_bwd, A, B_fwd, C_fwd, B_bwd, C_bwd, cu_seqlens, gy = arguments
    directions = (0, dt_fwd, B_fwd, C_fwd), (1, dt_bwd, B_bwd, C_bwd)
    return [
        {**run, "shift": 1, "reverse": second, "accumulate": second}
        for second, dt, B, C in directions
        for run in _ssd_fields(x, dt, A, B, C, None, None, cu_seqlens, False, gy)
    ]


_quasi_op = _Operator(
    name="quasiseparable",
    kernel="ssd",
    tensors="Tensor x, Tensor dt_fwd, Tensor dt_bwd, Tensor A, Tensor B_fwd, Tensor C_fwd, Tensor B_bwd, Tensor C_bwd, "
    "Tensor? cu_seqlens",
    flags="",
    outputs="y kept@0 kept@1",
    gradients="gx gdt@0 gdt@1 *gA gB@0 gC@0 gB@1 gC@1",
    shapes=_quasi_shapes,
    fields=_quasi_fields,
)


def _quasiseparable(x: Tensor, *given: Any) -> Tensor:
    if not _usable(x, *given[:-1]):
        return torch_quasiseparable(x, *given)
    return _quasi_op(x, *given)[0]


# --- convolutions -------------------------------------------------------------------------------------------------


def _conv_shapes(x: Tensor, *arguments: Any) -> tuple[Any, ...]:
    weight, _, _, cu_seqlens, _, _, carry = arguments
    D, K = weight.shape
    return x.shape, (_sequences(x, cu_seqlens) if carry else 0, K, D)


def _conv_fields(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_SKD: Tensor | None,
    cu_seqlens: Tensor | None,
    lead: int,
    silu: bool,
    carry: bool,
    gy: Tensor | None,
) -> list[dict[str, Any]]:
    D, K = weight.shape
    expect_shape(
        "conv1d", x=(x, (*x.shape[:2], D)), bias=(bias, (D,)), state=(state_SKD, (_sequences(x, cu_seqlens), K, D))
    )
    if not 0 <= lead < K <= MOST_TAPS or (state_SKD is not None and lead != K - 1):
        raise ValueError(f"conv1d: no kernel for {K} taps of which {lead} lead")
    return [{
        **_offsets(x, cu_seqlens), "D": D, "K": K, "lead": lead, "silu": silu, **_rows("x", x), **_rows("gy", gy),
        "weight": _whole(weight), "bias": _whole(bias), "state": _whole(state_SKD),
    }]  # fmt: skip


_conv_op = _Operator(
    name="conv1d",
    kernel="conv",
    tensors="Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens",
    flags="int lead, bool silu, bool carry",
    outputs="y final",
    gradients="gx gweight gbias gstate",
    shapes=_conv_shapes,
    fields=_conv_fields,
)


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_BDK: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    K = weight.shape[1]
    if K > MOST_TAPS or not _usable(x, weight, bias, state_BDK):
        return torch_causal(x, weight, bias, state_BDK, cu_seqlens, activation)
    state_SKD = None if state_BDK is None else state_BDK.transpose(1, 2)
    y, final = _conv_op(x, weight, bias, state_SKD, cu_seqlens, K - 1, activation == "silu", True)
    return y, final.transpose(1, 2)


def _centered_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, activation: str | None
) -> Tensor:
    K = weight.shape[1]
    if K > MOST_TAPS or not _usable(x, weight, bias):
        return torch_centered(x, weight, bias, cu_seqlens, activation)
    return _conv_op(x, weight, bias, None, cu_seqlens, K // 2, activation == "silu", False)[0]


# --- dropout ------------------------------------------------------------------------------------------------------


def _dropout_forward(x: Tensor, p: float, seed: int) -> Tensor:
    threshold = round(p * 2**32)
    y = _dropout_fake(x, p, seed)
    fields = {"size": x.numel(), "seed": seed, "threshold": threshold, "scale": 1 / (1 - threshold / 2**32)}
    _run("dropout", 0, False, {**fields, "x": _whole(x), "y": y})
    return y


def _dropout_fake(x: Tensor, p: float, seed: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dropout_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _dropout_autograd(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    return _dropout_op(gy, *ctx.arguments), None, None  # the same mask: linear, and its own transpose


_dropout_op = _operators.define("dropout(Tensor x, float p, int seed) -> Tensor", _dropout_forward, _dropout_fake)
_operators.differentiate(_dropout_op, None, _dropout_autograd, _dropout_setup)


def _dropout(x: Tensor, p: float) -> Tensor:
    if torch.compiler.is_compiling() or not _usable(x) or round(p * 2**32) == 2**32:
        return torch_dropout(x, p)
    seed = torch.empty((), dtype=torch.int64).random_()  # one draw a call
    return _dropout_op(x, p, int(seed))


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
        ("dropout", _dropout),
    ):
        implements(_op, "native")(_function)
elif unusable != "not built":
    logging.getLogger().warning(f"native kernels: {unusable}; PyTorch's operations take their place")
