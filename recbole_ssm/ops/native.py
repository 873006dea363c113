"""The ``native`` backend: C++ kernels for float32 on the CPU, one library for every version of Python and PyTorch.

The library has a C interface and is loaded by ctypes (``recbole_ssm/csrc``, built by
``setup.py``). Each op is a ``torch.library`` operator with autograd and a fake kernel, so
``torch.compile`` and ``torch.export`` see through it. Where the library is missing, or a tensor
is not float32, PyTorch's own operations take its place.

Results are the same, bit for bit, for any number of threads; they differ in the last digits
between instruction sets.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.files import digest
from recbole_ssm.ops.library import (
    MOST_TAPS,
    Namespace,
    Operator,
    Shape,
    Values,
    contiguous_like,
    implement,
    kernel_name,
    no_tangents,
    one_direction,
    stored,
    taps_before,
    values_of,
    whole,
)
from recbole_ssm.ops.linear_cross_entropy import differentiable

CHUNK = 64  # positions between two states that a forward keeps for its backward
OTHER_SOURCES = "built from other sources; install again (from a clone: python setup.py -q build_ext --inplace)"
LIBRARY = Path(__file__).parent.parent / "_native.so"
SOURCES = sorted(LIBRARY.parent.glob("csrc/*.[hc]*"))
"""What the library is built from; an installed package does not have it."""


# --- the structures of csrc/kernels.h ---


def _structure(op: str, options: str = "", kept: str = "", backward: bool = True) -> type[ctypes.Structure]:
    """The structure that a kernel reads, from the row of an op.

    Sizes come first, then options, what the forward reads and writes, and what the backward
    reads and writes.

    Args:
        op: name of the row.
        options: members between the sizes and the tensors, separated by blanks; a tilde marks a
            double.
        kept: what the forward keeps for the backward.
        backward: whether there is one.
    """
    row = stored(op)
    packed = row.tensors[-1].name == "cu_seqlens"
    tensors = row.tensors[:-1] if packed else row.tensors
    letters = "".join(t.letters for t in tensors if t.letters != "norm")
    members = ["S", "L"] if packed else []
    members += [letter for letter in dict.fromkeys(letters) if not packed or letter not in "BSL"]
    members += ["threads", *options.split(), *["*offsets"] * packed]
    for t in tensors:
        members += _pointers(kernel_name(t.name), t.letters)
    members += [f"*{name}" for name in [*[output.name for output in row.outputs], *kept.split()]]
    if backward:
        members += _pointers("gy", row.outputs[0].letters)
        members += [f"*g{output.name}" for output in row.outputs[1:]]
        members += [f"*g{kernel_name(t.name)}" for t in tensors]
    kinds = {"*": ctypes.c_void_p, "~": ctypes.c_double}
    fields = [(name.lstrip("*~"), kinds.get(name[0], ctypes.c_int64)) for name in [*members, "*workspace"]]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


def _pointers(name: str, letters: str) -> list[str]:
    """The members of one tensor: its address, and the stride of its rows where it has any."""
    if letters == "norm":
        return [f"*{name}_weight", f"*{name}_bias", f"~{name}_eps"]
    return [f"*{name}", *[f"s{name}"] * letters.startswith("BL")]


STRUCTURES = {
    "scan": _structure("selective_scan", "dt_softplus last", "kept"),
    "ssd": _structure("ssd", "reverse shift accumulate", "kept"),
    "ssd_last": _structure("ssd_last"),
    "conv": _structure("causal_conv1d", "lead silu"),
    "loss": _structure("linear_cross_entropy", "~scale ~smoothing", "goutput gitems", backward=False),
    "ranks": _structure("rank_targets", backward=False),
    "dropout": _structure("dropout", "size seed threshold ~scale", backward=False),
    "history": _structure("history", "layers", backward=False),
    "step": _structure("step", " ".join(name for name, _ in stored("step").options), backward=False),
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
        library.recbole_ssm_sources.restype = ctypes.c_char_p
        if SOURCES and library.recbole_ssm_sources().decode() != digest(*SOURCES):
            return OTHER_SOURCES
        for name, structure in STRUCTURES.items():
            if library[f"recbole_ssm_{name}_size"]() != ctypes.sizeof(structure):
                return OTHER_SOURCES
            run, size = library[f"recbole_ssm_{name}"], library[f"recbole_ssm_{name}_workspace"]
            run.argtypes = [ctypes.POINTER(structure), ctypes.c_int64, ctypes.c_int64]
            size.argtypes = run.argtypes
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


# --- calls into the library ---


def _run(name: str, backward: bool, values: Values, refusal: Exception | None = None) -> None:
    """Call a kernel.

    Args:
        name: of the kernel.
        backward: whether its backward is run.
        values: the members of its structure by name; other names are ignored. The tensors must
            live until the kernel returns, which this mapping sees to.
        refusal: the error for a value that the kernel refuses; None says that ``cu_seqlens``
            are wrong.
    """
    if name not in _kernels:  # an exported program on a machine that has not built them
        raise RuntimeError(f"{name}: the native kernels are not usable here: {unusable}")
    call, rows = structure(name, **values), values.get("rows", 0)
    call.threads = min(call.threads, _threads_worth(name, backward, values))
    for member, *_ in call._fields_:
        t = values.get(member)
        # the sums gA and gskip are this module's own, and in double for SSD
        if isinstance(t, Tensor) and t.dtype not in (torch.float32, torch.int64) and member not in ("gA", "gskip"):
            raise ValueError(f"{name}: the native kernels compute float32, not {t.dtype} as given for {member}")
    refusal = refusal or ValueError(f"{name}: cu_seqlens must rise from 0 to the total length {rows}")
    _in_a_workspace(name, call, rows, backward, refusal)


def _in_a_workspace(name: str, call: Any, rows: int, backward: bool, refusal: Exception) -> None:
    """Run a kernel in a workspace that is made here; ``refusal`` is raised for a value that it refuses."""
    run, size = _kernels[name]
    needed = size(call, rows, backward)
    if needed < 0:
        raise refusal
    workspace = memory(needed, torch.uint8)
    call.workspace = address(workspace)
    if run(call, rows, backward):
        raise refusal


def memory(shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor in the CPU's memory, wherever PyTorch makes tensors by default."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def address(t: Tensor) -> int:
    """Where the numbers of a tensor lie; a ValueError if it is not in the CPU's memory."""
    if not t.is_cpu:
        raise ValueError(f"native kernels read the CPU's memory; move the tensor {list(t.shape)} there from {t.device}")
    return t.data_ptr()


GRAIN = 1e5
"""Nanoseconds of work that are worth a thread: starting one costs some twenty thousand, and on a
busy machine a call is as late as its last thread."""

# Nanoseconds that a row takes forward on one thread (AVX2); backward it takes three times as long.
_ROW: dict[str, Callable[[Values], float]] = {
    "scan": lambda sizes: 0.4 * sizes["D"] * sizes["N"],
    "ssd": lambda sizes: 0.05 * sizes["H"] * sizes["P"] * (sizes["N"] + CHUNK),
    "ssd_last": lambda sizes: 0.5 * (sizes["H"] * sizes["P"] + sizes["G"] * sizes["N"]),
    "conv": lambda sizes: 0.35 * sizes["D"] * sizes["K"],
}


def _threads_worth(name: str, backward: bool, values: Values) -> int:
    """How many threads a call keeps busy; the kernels that are not listed see to it themselves."""
    if name not in _ROW:
        return torch.get_num_threads()
    return 1 + int(_ROW[name](values) * values["rows"] * (3 if backward else 1) / GRAIN)


def structure(name: str, **fields: Any) -> Any:
    """A structure of csrc/kernels.h with the addresses of the tensors, which have to outlive it.

    Of the fields it takes those that it has.
    """
    made = STRUCTURES[name](threads=torch.get_num_threads())
    fill(made, fields)
    return made


def fill(made: Any, fields: Mapping[str, Any]) -> None:
    """Give a structure those of the fields that it has, and that are not None."""
    for member, *_ in made._fields_:
        value = fields.get(member)
        if value is not None:
            setattr(made, member, address(value) if isinstance(value, Tensor) else value)


def step_workspace(call: Any) -> Tensor:
    """What one block's step writes in between."""
    return memory(_kernels["step"][1](call, 1, False), torch.uint8)


def run_steps(calls: Any, count: int) -> None:
    """Run one event through ``count`` blocks, whose structures stand in a row with all their tensors and workspaces."""
    if _kernels["step"][0](calls, count, False):
        raise IndexError("step: there is no item of such an id")


def run_history(call: Any) -> None:
    """Run whole histories through the blocks that ``call`` points to; its workspace is made here."""
    refusal = f"history: there is no item of such an id, or cu_seqlens do not rise from 0 to {call.L}"
    _in_a_workspace("history", call, call.L, False, IndexError(refusal))


# --- the operators ---

_operators = Namespace("recbole_ssm", ["CPU"])


def _states(letters: str) -> Shape:
    """The shape of the states at the start of every chunk but each sequence's first: at most one a CHUNK of rows."""
    return lambda sizes: [sizes["rows"] // CHUNK, *[sizes[letter] for letter in letters]]


def _with_gradients(op: str, values: Values, doubles: str) -> Values:
    """Values with memory for the gradients of all tensors, in float64 for those that the kernel sums in double."""
    for t in stored(op).tensors:
        name, given = kernel_name(t.name), values[kernel_name(t.name)]
        dtype = torch.float64 if t.name in doubles.split() else torch.float32
        values[f"g{name}"] = None if given is None else given.new_empty(given.shape, dtype=dtype)
    return values


def _operator(
    op: str, kernel: str, options: Callable[[Values], Values] = lambda values: {}, states: str = "", doubles: str = ""
) -> Operator:
    """The operator of an op that is one run of a kernel.

    Args:
        op: name of its row.
        kernel: what it runs.
        options: members of the kernel's structure that the row does not have.
        states: letters of the states that the forward keeps for the backward, if it keeps any.
        doubles: tensors whose gradients the kernel sums in double.
    """

    def forward(values: Values) -> None:
        _run(kernel, False, values | options(values))

    def backward(values: Values) -> Values:
        values = _with_gradients(op, values, doubles) | options(values)
        _run(kernel, True, values)
        return values

    return Operator(_operators, op, forward, backward, {"kept": _states(states)} if states else {})


def _last_options(values: Values) -> Values:
    """At the last position of each sequence C, z and gy have one row for a sequence."""
    return {"last": True, "sC": values["N"], "sz": values["D"], "sgy": values["D"]}


def _conv_options(values: Values) -> Values:
    return {"lead": taps_before(values), "silu": values["activation"] == "silu"}


def _both_directions(values: Values, backward: bool) -> None:
    """The two scans of a quasiseparable product, each shifted by one position; the second adds to the first."""
    for second, direction in enumerate(("fwd", "bwd")):
        options = {"shift": 1, "reverse": second, "accumulate": second}
        _run("ssd", backward, one_direction(values, direction) | options)


def _quasi_forward(values: Values) -> None:
    _both_directions(values, False)


def _quasi_backward(values: Values) -> Values:
    values = _with_gradients("quasiseparable", values, "A")
    _both_directions(values, True)
    return values


_kept_twice = {"kept_fwd": _states("HNP"), "kept_bwd": _states("HNP")}
OPERATORS = {
    "selective_scan": _operator("selective_scan", "scan", states="ND"),
    "selective_scan_last": _operator("selective_scan_last", "scan", _last_options),
    "ssd": _operator("ssd", "ssd", states="HNP", doubles="A D"),
    "ssd_last": _operator("ssd_last", "ssd_last", doubles="A D"),
    "quasiseparable": Operator(_operators, "quasiseparable", _quasi_forward, _quasi_backward, _kept_twice),
    "causal_conv1d": _operator("causal_conv1d", "conv", _conv_options),
    "centered_conv1d": _operator("centered_conv1d", "conv", _conv_options),
}


def _takes(*arguments: Any) -> bool:
    """Whether all tensors are on the CPU, those of floating-point numbers in float32 and without a tangent to lose."""
    given = [t for t in arguments if isinstance(t, Tensor)]
    numbers = [t for t in given if t.is_floating_point()]
    return all(t.is_cpu for t in given) and all(t.dtype == torch.float32 for t in numbers) and no_tangents(*numbers)


def _takes_taps(x: Tensor, weight: Tensor, *rest: Any) -> bool:
    return weight.shape[1] <= MOST_TAPS and _takes(x, weight, *rest)


# --- dropout ---


def _dropout_forward(x: Tensor, p: float, seed: int) -> Tensor:
    threshold = round(p * 2**32)
    y = _dropout_fake(x, p, seed)
    fields = {"size": x.numel(), "seed": seed, "threshold": threshold, "scale": 1 / (1 - threshold / 2**32)}
    _run("dropout", False, {**fields, "x": whole(x), "y": y})
    return y


def _dropout_fake(x: Tensor, p: float, seed: int) -> Tensor:
    return contiguous_like(x)


def _dropout_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _dropout_autograd(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    return _dropout_operator(gy, *ctx.arguments), None, None  # the same mask: linear, and its own transpose


_dropout_operator = _operators.define("dropout(Tensor x, float p, int seed) -> Tensor", _dropout_forward, _dropout_fake)
_operators.differentiate(_dropout_operator, None, _dropout_autograd, _dropout_setup)


def _dropout(x: Tensor, p: float) -> Tensor:
    seed = memory((), torch.int64).random_()  # one draw a call
    return _dropout_operator(x, p, int(seed))


def _takes_dropout(x: Tensor, p: float) -> bool:
    return not torch.compiler.is_compiling() and _takes(x) and round(p * 2**32) < 2**32


# --- loss and ranks ---


def _loss_forward(
    output: Tensor,
    items: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    candidates: Tensor | None,
    temperature: float,
    label_smoothing: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    found = loss, *gradients = _loss_fake(output, items, target, weight, bias, candidates, 0, 0, wanted)
    tensors = (output, items, target, weight, bias, candidates)
    values = values_of("linear_cross_entropy", *tensors, temperature, label_smoothing)
    values |= {"scale": 1 / temperature, "smoothing": label_smoothing, "loss": loss}
    values |= {name: g if needed else None for name, g, needed in zip(("goutput", "gitems"), gradients, wanted)}
    refusal = IndexError(f"linear_cross_entropy: a target or a candidate is none of the {len(items)} items")
    _run("loss", False, values, refusal)
    return found


def _loss_fake(output: Tensor, items: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the loss and the gradients; one that is not wanted is empty."""
    gradients = [contiguous_like(t) if needed else t.new_empty(0) for t, needed in zip((output, items), rest[-1])]
    return output.new_empty(()), gradients[0], gradients[1]


_loss_operator = _operators.define(
    "linear_cross_entropy(Tensor output, Tensor items, Tensor target, Tensor? weight, Tensor? bias, "
    "Tensor? candidates, float temperature, float label_smoothing, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _loss_forward,
    _loss_fake,
)


def _loss(wanted: tuple[bool, bool], *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and its gradients where they are wanted: the backward of this op only scales them."""
    loss, g_output, g_items = _loss_operator(*arguments, list(wanted))
    return loss, g_output if wanted[0] else None, g_items if wanted[1] else None


def _ranks(output: Tensor, items: Tensor, target: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    higher, ties = (memory((len(output), 2), torch.int64) for _ in range(2))
    values = values_of("rank_targets", output, items, target, *rest) | {"higher": higher, "ties": ties}
    refusal = (
        f"rank_targets: an item is none of the {len(items)}, or the lists of what rows have seen do not rise or fit"
    )
    _run("ranks", False, values, IndexError(refusal))
    return higher, ties


def _takes_call(*arguments: Any) -> bool:
    """This is no operator that a compiler could see through."""
    return not torch.compiler.is_compiling() and _takes(*arguments)


# --- availability ---

unusable = load(LIBRARY)  # why there is no native backend; "" where there is one
if not unusable:
    for _op, _function in OPERATORS.items():
        implement(_op, "native", _function, _takes_taps if "conv" in _op else _takes)
    implement("dropout", "native", _dropout, _takes_dropout)
    implement("linear_cross_entropy", "native", differentiable(_loss), _takes)
    implement("rank_targets", "native", _ranks, _takes_call)
elif unusable != "not built":
    logging.getLogger().warning(f"native kernels: {unusable}; PyTorch's operations take their place")
