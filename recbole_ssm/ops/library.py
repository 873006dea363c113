"""What the compiled backends share: a row of the table as an operator of ``torch.library``, with autograd and fakes.

So ``torch.compile`` and ``torch.export`` see through the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from recbole_ssm.ops.backend import implementations, implements
from recbole_ssm.ops.table import OPS, Argument, Op

MOST_TAPS = 16  # of a convolution; wider ones are PyTorch's
KERNEL_NAMES = {"D": "skip", "cu_seqlens": "offsets"}
"""Arguments that the kernels call otherwise: to them D is a size."""


class Namespace:
    """The operators of one backend, ``torch.ops.<name>``.

    Args:
        name: of the namespace.
        devices: dispatch keys (``"CPU"``, ``"CUDA"``) that the functions serve.
    """

    def __init__(self, name: str, devices: Sequence[str]) -> None:
        self._name, self._devices = name, devices
        self._library = torch.library.Library(name, "DEF")

    def define(self, schema: str, function: Any, fake: Any) -> Any:
        """Make an operator; ``fake`` returns its outputs with their shapes alone."""
        name = schema.partition("(")[0]
        self._library.define(schema)
        for device in self._devices:
            self._library.impl(name, function, device)
        torch.library.register_fake(f"{self._name}::{name}", fake, lib=self._library)
        return getattr(getattr(torch.ops, self._name), name).default

    def differentiate(self, operator: Any, backward_operator: Any, backward: Any, setup: Any) -> None:
        """Give an operator its gradient; a second derivative is an error (PyTorch would warn and return zeros).

        ``backward_operator`` is the operator that ``backward`` calls, None where it calls the first one again.
        """

        def refuse(ctx: Any, *gradients: Any) -> None:
            raise NotImplementedError(f"{operator} has no second derivative; use ssm_backend: reference")

        torch.library.register_autograd(operator, backward, setup_context=setup, lib=self._library)
        if backward_operator is not None:
            torch.library.register_autograd(backward_operator, refuse, lib=self._library)


class Call(NamedTuple):
    """One call of an operator."""

    op: Op
    sizes: Mapping[str, int]
    """The size of each letter."""
    given: Mapping[str, Any]
    """The arguments by their names in the row."""

    @property
    def rows(self) -> int:
        """Positions of all sequences together."""
        return self.sizes["B"] * self.sizes["L"]

    def fields(self, gy: Tensor | None = None) -> dict[str, Any]:
        """What kernels are given: sizes, options, and each tensor.

        A tensor ``[B, L, ...]`` lies as it may, with contiguous rows; ``sx`` is the stride of the rows of ``x``. All
        others are contiguous.
        """
        # to kernels B is a tensor, and of the batch they know its rows
        found: dict[str, Any] = {letter: size for letter, size in self.sizes.items() if letter != "B"}
        if "L" in found:
            found["rows"] = self.rows
        for option, _ in self.op.options:
            found[option] = self.given[option]
        for argument in self.op.tensors:
            name, t = KERNEL_NAMES.get(argument.name, argument.name), self.given[argument.name]
            if argument.name == "cu_seqlens":
                found[name] = None if t is None else t.to(torch.int64).contiguous()
            else:
                wide = t is not None and argument.dtype == "float32"
                found |= _laid_out(name, argument.letters, t.float() if wide else t)
        return found | _laid_out("gy", self.op.outputs[0].letters, gy)

    def directions(self) -> list[Call]:
        """The two scans of a quasiseparable product, as calls of ``ssd``."""
        return [
            Call(
                stored("ssd"),
                self.sizes,
                {
                    **dict.fromkeys(("D", "state")),
                    "return_state": False,
                    **{name: self.given[name] for name in ("x", "A", "cu_seqlens")},
                    **{name: self.given[f"{name}_{direction}"] for name in ("dt", "B", "C")},
                },
            )
            for direction in ("fwd", "bwd")
        ]


def _laid_out(name: str, letters: str, t: Tensor | None) -> dict[str, Any]:
    """A tensor as kernels read it, and the stride of its rows (b, t) where it has any; a copy where it must be."""
    if not letters.startswith("BL"):
        return {name: whole(t)}
    if t is None:
        return {name: None, f"s{name}": 0}
    stride = t[0, 0].numel() if t.numel() else 1
    if t.data_ptr() % t.element_size():
        t = t.clone(memory_format=torch.contiguous_format)
    if not t.is_contiguous():
        strides, shape = t.stride(), t.shape
        evenly = shape[0] == 1 or strides[0] == shape[1] * strides[1]
        unbroken = strides[-1] == 1 and (t.dim() == 3 or strides[2] == shape[3])
        if evenly and unbroken and shape[1] > 1:
            stride = strides[1]
        else:
            t = t.contiguous()
    return {name: t, f"s{name}": stride}


def whole(t: Tensor | None) -> Tensor | None:
    """A contiguous tensor that begins at a whole number."""
    if t is None:
        return None
    return t.clone(memory_format=torch.contiguous_format) if t.data_ptr() % t.element_size() else t.contiguous()


def _stored(argument: Argument) -> Argument:
    """States lie in memory with their last two dimensions swapped, so that channels are neighbours."""
    if argument.name not in ("state", "final"):
        return argument
    return argument._replace(letters=argument.letters[:-2] + argument.letters[:-3:-1])


@functools.cache
def stored(op: str) -> Op:
    """The row of an op as kernels see it."""
    tensors, outputs = ([_stored(argument) for argument in side] for side in (OPS[op].tensors, OPS[op].outputs))
    return OPS[op]._replace(tensors=tuple(tensors), outputs=tuple(outputs))


class Operator:
    """A row of the table as an operator with a backward, around the kernels of one backend.

    The operator takes the arguments of the row and, where the forward keeps something for the backward, ``keep``. It
    returns the outputs of the row and what is kept. The backward's operator takes the gradients of the outputs, what
    was kept and the arguments, and returns the gradients of all tensors of floating-point numbers. An operator returns
    tensors alone: an empty one stands for None.

    Args:
        namespace: of the backend.
        op: name of the row.
        forward: takes a :class:`Call` and the outputs by name, with None for what is not wanted, and writes them.
        backward: takes a :class:`Call` and a dictionary of ``gy``, ``gfinal`` (or None) and what was kept; returns the
            gradients by the names of the tensors.
        kept: names of what the forward keeps, and their shapes as functions of the sizes.
    """

    def __init__(
        self,
        namespace: Namespace,
        op: str,
        forward: Callable[[Call, dict[str, Any]], None],
        backward: Callable[[Call, dict[str, Any]], Mapping[str, Tensor | None]],
        kept: Mapping[str, Callable[[Mapping[str, int]], Sequence[int]]] | None = None,
    ) -> None:
        self._op, self._run_forward, self._run_backward, self._kept = stored(op), forward, backward, kept or {}
        self._namespace = namespace  # it holds the operators
        tensors, options, outputs = self._op.tensors, self._op.options, self._op.outputs
        self._names = [*[t.name for t in tensors], *[name for name, _ in options]]
        self._differentiable = [t.name for t in tensors if t.name != "cu_seqlens" and t.dtype != "int64"]
        self._returned = [*[output.name for output in outputs], *self._kept]
        arguments = [f"Tensor{'?' * t.optional} {t.name}" for t in tensors]
        arguments += [f"{kind} {name}" for name, kind in options]
        incoming = [f"Tensor{'?' * (output.name != 'y')} g{output.name}" for output in outputs]
        incoming += [f"Tensor {name}" for name in self._kept]
        self._backward_operator = namespace.define(
            f"{op}_backward({', '.join(incoming + arguments)}) -> {_tensors(len(self._differentiable))}",
            self._backward,
            self._backward_fake,
        )
        keep = ["bool keep"] if self._kept else []
        self._operator = namespace.define(
            f"{op}({', '.join(arguments + keep)}) -> {_tensors(len(self._returned))}", self._forward, self._fake
        )
        namespace.differentiate(self._operator, self._backward_operator, self._autograd, self._setup)

    def __call__(self, *arguments: Any) -> Any:
        """Compute the op from the arguments of its row, and return the outputs of its row."""
        given = dict(zip(self._names, arguments))
        if given.get("state") is not None:
            given["state"] = given["state"].transpose(-1, -2)
        if self._kept:
            given["keep"] = torch.is_grad_enabled() and any(
                isinstance(t, Tensor) and t.requires_grad for t in arguments
            )
        outputs = self._operator(*given.values())
        if len(self._returned) > 1 and len(self._op.outputs) == 1:
            return outputs[0]
        if len(self._op.outputs) == 1:
            return outputs
        y, final = outputs[:2]
        return y, final.transpose(-1, -2) if given.get("return_state", True) else None

    def _call(self, arguments: Sequence[Any]) -> Call:
        sizes = self._op.check(arguments, read_bounds=False)
        return Call(self._op, sizes, dict(zip(self._names, arguments)))

    def _shapes(self, call: Call, keep: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of all that the operator returns; nothing is in a state that is not wanted."""
        shapes = {output.name: tuple(call.sizes[letter] for letter in output.letters) for output in self._op.outputs}
        if not call.given.get("return_state", True):
            shapes["final"] = (0, *shapes["final"][1:])
        for name, shape in self._kept.items():
            first, *rest = shape(call.sizes)
            shapes[name] = (first if keep else 0, *rest)
        return shapes

    def _empty(self, call: Call, keep: bool) -> tuple[Tensor, ...]:
        """Memory for all that the operator returns."""
        x = call.given[self._names[0]]
        like_x = [output.name for output in self._op.outputs if not output.dtype]
        shapes = self._shapes(call, keep)
        return tuple(x.new_empty(shapes[n], dtype=x.dtype if n in like_x else torch.float32) for n in shapes)

    def _fake(self, *arguments: Any) -> Any:
        outputs = self._empty(self._call(arguments), bool(self._kept) and arguments[-1])
        return outputs if self._returned[1:] else outputs[0]

    def _forward(self, *arguments: Any) -> Any:
        call, keep = self._call(arguments), bool(self._kept) and arguments[-1]
        outputs = self._empty(call, keep)
        written: dict[str, Any] = dict(zip(self._returned, outputs))
        if not call.given.get("return_state", True):
            written["final"] = None
        if not keep:
            written |= dict.fromkeys(self._kept)
        self._run_forward(call, written)
        return outputs if self._returned[1:] else outputs[0]

    def _backward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        given = dict(zip(self._names, arguments[len(self._returned) :]))
        return tuple(
            torch.empty(0) if given[name] is None else contiguous_like(given[name]) for name in self._differentiable
        )

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = self._call(arguments[len(self._returned) :])
        incoming = {}
        for (name, shape), t in zip(self._shapes(call, True).items(), arguments):
            if name in self._kept and tuple(t.shape) != shape:
                # an exported program may run backward although its forward was traced without gradients
                message = "the forward kept no states for a backward; run or export it with gradients enabled"
                raise ValueError(f"{self._op.name}: {message}")
            if name not in self._kept and t is not None and tuple(t.shape) != shape:
                raise ValueError(f"{self._op.name}: g{name} must have shape {list(shape)}, got {list(t.shape)}")
            incoming[name if name in self._kept else f"g{name}"] = t
        if not call.given.get("return_state", True):
            incoming["gfinal"] = None
        found = self._run_backward(call, incoming)
        return tuple(
            torch.empty(0) if call.given[name] is None else found[name].to(call.given[name].dtype)  # type: ignore[union-attr]
            for name in self._differentiable
        )

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = len(self._op.tensors)
        kept = output[len(self._op.outputs) :] if self._kept else ()
        ctx.save_for_backward(*inputs[:tensors], *kept)
        ctx.options = inputs[tensors : len(self._names)]
        ctx.shape = output[0].shape if self._returned[1:] else output.shape
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)

    def _autograd(self, ctx: Any, gy: Tensor | None, *more: Tensor | None) -> tuple[Any, ...]:
        """A gradient or None for every argument."""
        tensors = ctx.saved_tensors[: len(self._op.tensors)]
        kept = ctx.saved_tensors[len(self._op.tensors) :]
        if gy is None:  # only the final state was used
            gy = tensors[0].new_zeros(ctx.shape)
        incoming = (gy, *more[: len(self._op.outputs) - 1], *kept)
        gradients = dict(zip(self._differentiable, self._backward_operator(*incoming, *tensors, *ctx.options)))
        found = [None if t is None else gradients.get(name) for name, t in zip(self._names, tensors)]
        return *found, *[None] * (len(ctx.options) + bool(self._kept))


def _tensors(count: int) -> str:
    """The type of so many tensors, in a schema."""
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def taps_before(call: Call) -> int:
    """How many taps of a convolution meet what was before the present.

    Raises:
        ValueError: no kernel has so many taps.
    """
    taps = call.sizes["K"]
    if taps > MOST_TAPS:
        raise ValueError(f"{call.op.name}: no kernel for {taps} taps; they have up to {MOST_TAPS}")
    return taps - 1 if call.op.name == "causal_conv1d" else taps // 2


def no_tangents(*tensors: Tensor | None) -> bool:
    """Whether none carries a tangent of forward differentiation: an operator would drop it without a word."""
    return torch.compiler.is_compiling() or all(t is None or unpack_dual(t).tangent is None for t in tensors)


def contiguous_like(t: Tensor) -> Tensor:
    """New contiguous memory of its shape."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def implement(op: str, backend: str, function: Callable[..., Any], takes: Callable[..., bool], name: str = "") -> None:
    """Register an implementation that leaves the calls that it does not take to the torch form."""

    def implementation(*arguments: Any) -> Any:
        if takes(*arguments):
            return function(*arguments)
        return implementations(op, "torch")[0].function(*arguments)

    implements(op, backend, name)(implementation)
