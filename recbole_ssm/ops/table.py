"""Every operator, declared once.

A row of :data:`OPS` names the tensors of an operator with the letters of their dimensions, then
its other arguments, then its outputs. It is the signature of all implementations: they take
these arguments in this order, and return the outputs. From a row follow

- the checks of shapes and types, with their messages (:meth:`Op.check`);
- the operators of ``torch.library``, their schemas, fake kernels and the order of their
  gradients (:class:`recbole_ssm.ops.library.Operator`);
- the structures that the C++ kernels read (:mod:`recbole_ssm.ops.native`).

A tensor is written ``name:LETTERS``, with ``?`` behind its name where it may be None, and with
its type behind a second colon where it is not simply a floating-point number
(``target:n:int64``). Without letters it may have any shape. The letters are those of
:mod:`recbole_ssm.ops`. The first tensor to use a letter decides its size, and all others must
agree. ``cu_seqlens`` bounds the S sequences of a packed batch (:mod:`recbole_ssm.ops.packing`);
without it, S is B.

Adding an op
    1. Write a row here.
    2. Write a module beside this one: the public function, which checks its arguments
       (:func:`check`) and calls the implementation that
       :func:`recbole_ssm.ops.backend.dispatch` picks; a plain loop as ``reference``; and the
       vectorised form as ``torch``. Both are registered by
       :func:`recbole_ssm.ops.backend.implements`.
    3. Export the function in ``ops/__init__.py``. With an example of a call every backend is
       compared with the reference: ``ops/selftest.py`` makes it from the row where the first
       tensor is ``[B, L, ...]``, and else needs one.
    4. Where kernels are worth it, write them. In C++ a kernel is a structure and a line of
       ``ALL_KERNELS`` in ``csrc/kernels.h``, a header that ``csrc/kernels.cpp`` includes, a
       line of ``STRUCTURES`` in ``ops/native.py``, and ``fits`` in ``csrc/library.cpp`` if it
       refuses values. Then register them in ``ops/native.py`` or ``ops/triton/operators.py``:
       a function that computes the op from the arguments of its row, or an
       :class:`recbole_ssm.ops.library.Operator`, through which a compiler can see.
    5. Tests follow from the row and the example, but for ``arguments`` and ``OPS`` in
       tests/ops/test_ops.py, which say how the op is called with random tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_ssm.ops.packing import count_sequences


class Argument(NamedTuple):
    """One tensor of a row."""

    name: str
    letters: str
    optional: bool
    dtype: str
    """``""`` for any floating-point type."""


class Op(NamedTuple):
    """A row of the table."""

    name: str
    tensors: tuple[Argument, ...]
    options: tuple[tuple[str, str], ...]
    """Name and type of the arguments that are no tensors."""
    outputs: tuple[Argument, ...]

    def check(self, tensors: Sequence[Tensor | None], read_bounds: bool = True) -> dict[str, int]:
        """Check the tensors of a call, in the order of the row.

        Args:
            tensors: as many as the row has.
            read_bounds: whether the values of ``cu_seqlens`` are checked too, where they are on
                the CPU.

        Returns:
            The size of each letter.

        Raises:
            ValueError: a tensor is missing, or its shape or type does not fit.
        """
        sizes: dict[str, int] = {}
        bounds = tensors[len(self.tensors) - 1] if self.tensors[-1].name == "cu_seqlens" else None
        for (name, letters, optional, dtype), tensor in zip(self.tensors, tensors):
            if name == "cu_seqlens":
                continue
            if tensor is None:
                if not optional:
                    raise ValueError(f"{self.name}: {name} must be given")
                continue
            shape = tensor.shape
            fits = len(shape) == len(letters) or not letters
            for letter, size in zip(letters, shape):
                fits = fits and sizes.get(letter, size) == size
            if not fits:
                expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
                raise ValueError(f"{self.name}: {name} must have shape [{expected}], got {list(shape)}")
            if dtype == "int64":
                if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                    raise ValueError(f"{self.name}: {name} must hold whole numbers, got {tensor.dtype}")
            elif not tensor.is_floating_point():
                raise ValueError(f"{self.name}: {name} must hold floating-point numbers, got {tensor.dtype}")
            sizes.update(zip(letters, shape))
            if "S" not in sizes and "L" in sizes:
                sizes["S"] = count_sequences(self.name, bounds, sizes["B"], sizes["L"], read_bounds)
        if "G" in sizes and (sizes["G"] == 0 or sizes["H"] % sizes["G"]):
            raise ValueError(f"{self.name}: the {sizes['G']} groups of B must divide the {sizes['H']} heads of x")
        return sizes


def _arguments(text: str) -> tuple[Argument, ...]:
    """The tensors of a row."""
    found = []
    for word in text.split():
        name, letters, dtype = [*word.split(":"), "", ""][:3]
        found.append(Argument(name.rstrip("?"), letters, name.endswith("?"), dtype))
    return tuple(found)


def row(name: str, tensors: str, outputs: str, options: str = "") -> Op:
    """A row of the table from its text; see the head of this module."""
    named = tuple((option.partition(":")[0], option.partition(":")[2]) for option in options.split())
    return Op(name, _arguments(tensors), named, _arguments(outputs))


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        row(
            "selective_scan",
            "x:BLD dt:BLD A:DN B:BLN C:BLN D?:D z?:BLD dt_bias?:D state?:SDN:float32 cu_seqlens?",
            "y:BLD final:SDN:float32",
            "dt_softplus:bool",
        ),
        row(
            "selective_scan_last",
            "x:BLD dt:BLD A:DN B:BLN C:SN D?:D z?:SD dt_bias?:D cu_seqlens?",
            "y:SD",
            "dt_softplus:bool",
        ),
        row(
            "ssd",
            "x:BLHP dt:BLH A:H B:BLGN C:BLGN D?:H state?:SHPN:float32 cu_seqlens?",
            "y:BLHP final:SHPN:float32",
            "return_state:bool",
        ),
        row("ssd_last", "x:BLHP dt:BLH A:H B:BLGN C:SGN D?:H cu_seqlens?", "y:SHP"),
        row(
            "quasiseparable",
            "x:BLHP dt_fwd:BLH dt_bwd:BLH A:H B_fwd:BLGN C_fwd:BLGN B_bwd:BLGN C_bwd:BLGN cu_seqlens?",
            "y:BLHP",
        ),
        row(
            "causal_conv1d",
            "x:BLD weight:DK bias?:D state?:SDK cu_seqlens?",
            "y:BLD final:SDK",
            "activation:str?",
        ),
        row("centered_conv1d", "x:BLD weight:DK bias?:D cu_seqlens?", "y:BLD", "activation:str?"),
        # Without a dimension in common with the scans: n rows, V items of d numbers, K sampled, E seen.
        row(
            "linear_cross_entropy",
            "output:nd items:Vd target:n:int64 weight?:n bias?:V candidates?:K:int64",
            "loss",
            "temperature:float label_smoothing:float",
        ),
        row("rank_targets", "output:nd items:Vd target:n:int64 bias?:V seen?:E:int64 offsets?:R:int64", "higher ties"),
        row("dropout", "x", "y", "p:float"),
        # One event of B users through a mixer, or through a whole block: run by recbole_ssm.layers.step, whose layers
        # fill in their weights. A norm is a weight, a bias and a number.
        row(
            "step",
            "rows?:B:int64 u:BM first?:norm in_weight conv_weight conv_bias x_weight? dt_weight? dt_bias A_log D "
            "diagonal? gate_norm?:norm out_weight norm?:norm w_1? b_1? w_2? b_2? last?:norm behind?:norm conv ssm",
            "conv_after ssm_after y:BM",
            "D:int N:int K:int R:int H:int G:int F:int residual:bool pre_norm:bool items:int",
        ),
        # Histories through all blocks of a model, to the output at the last event of each: run by
        # recbole_ssm.layers.history. The blocks are rows of step, one after the other in memory.
        row("history", "items:L:int64 table:VM first?:norm blocks cu_seqlens", "y:SM", "layers:int"),
    )
}


def check(op: str, *tensors: Tensor | None) -> dict[str, int]:
    """Check the tensors of a call of ``op`` as :meth:`Op.check` does, and return the size of each letter."""
    return OPS[op].check(tensors)
