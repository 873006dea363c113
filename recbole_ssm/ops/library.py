"""What the compiled backends share: rows of the table as operators of ``torch.library``, with autograd and fakes.

So ``torch.compile`` and ``torch.export`` see through the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from recbole_ssm.ops.backend import implementations, implements
from recbole_ssm.ops.table import OPS, Argument, Op

MOST_TAPS = 16  # of a convolution; wider ones are PyTorch's
Values = dict[str, Any]
Shape = Callable[[Mapping[str, int]], Sequence[int]]


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
        """Make an operator; ``fake`` returns outputs of the right shapes, not computed."""
        name = schema.partition("(")[0]
        self._library.define(schema)
        for device in self._devices:
            self._library.impl(name, function, device)
        torch.library.register_fake(f"{self._name}::{name}", fake, lib=self._library)
        return getattr(getattr(torch.ops, self._name), name).default

    def differentiate(self, operator: Any, backward_operator: Any, backward: Any, setup: Any) -> None:
        """Give an operator its gradient; a second derivative is an error (PyTorch would warn and return zeros).

        ``backward_operator`` is the operator that ``backward`` calls, None where it calls the
        first one again.
        """

        def refuse(ctx: Any, *gradients: Any) -> None:
            raise NotImplementedError(f"{operator} has no second derivative; use ssm_backend: reference")

        torch.library.register_autograd(operator, backward, setup_context=setup, lib=self._library)
        if backward_operator is not None:
            torch.library.register_autograd(backward_operator, refuse, lib=self._library)


# --- what kernels are given ---


def kernel_name(name: str) -> str:
    """What kernels call an argument: to them D is a size, and bounds are offsets."""
    return {"D": "skip", "cu_seqlens": "offsets"}.get(name, name)


def _stored(argument: Argument) -> Argument:
    """States lie in memory with their last two dimensions swapped, so that channels are neighbours."""
    if argument.name not in ("state", "final"):
        return argument
    return argument._replace(letters=argument.letters[:-2] + argument.letters[:-3:-1])


@functools.cache
def stored(op: str) -> Op:
    """The row of an op as kernels see it."""
    tensors, outputs = (tuple(map(_stored, side)) for side in (OPS[op].tensors, OPS[op].outputs))
    return OPS[op]._replace(tensors=tensors, outputs=outputs)


def whole(t: Tensor | None) -> Tensor | None:
    """A contiguous tensor that begins at a whole number."""
    if t is None:
        return None
    return t.clone(memory_format=torch.contiguous_format) if t.data_ptr() % t.element_size() else t.contiguous()


def laid_out(name: str, letters: str, t: Tensor | None) -> Values:
    """A tensor as kernels read it.

    A tensor ``[B, L, ...]`` lies as it may as long as its rows (b, t) are contiguous and evenly
    spaced; ``s<name>`` is the stride between them. All others are contiguous.
    """
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


def sizes_of(op: Op, arguments: Sequence[Any]) -> dict[str, int]:
    """The sizes of a call by their letters, and ``rows``, B times L, once its shapes and types are checked."""
    sizes = op.check(arguments, read_bounds=False)
    if "L" in sizes:
        sizes["rows"] = sizes["B"] * sizes["L"]
    return sizes


def values_of(op: str, *arguments: Any) -> Values:
    """What kernels are given of a call: its sizes, its options, and its tensors laid out."""
    names = [*[t.name for t in stored(op).tensors], *[name for name, _ in stored(op).options]]
    return _values(stored(op), sizes_of(stored(op), arguments), dict(zip(names, arguments)))


def _values(op: Op, sizes: Mapping[str, int], given: Values) -> Values:
    # to kernels B is a tensor
    values: Values = {name: size for name, size in sizes.items() if name != "B"}
    values |= {name: given[name] for name, _ in op.options}
    for name, letters, _, dtype in op.tensors:
        t = given[name]
        if t is not None and (name == "cu_seqlens" or dtype):
            t = t.to(torch.int64 if name == "cu_seqlens" else getattr(torch, dtype))
        values |= laid_out(kernel_name(name), letters, t)
    return values


def one_direction(values: Values, direction: str) -> Values:
    """What one scan of a quasiseparable product is given: ``dt_fwd`` becomes ``dt``, and so on."""
    return {name.removesuffix(f"_{direction}"): value for name, value in values.items()}


def taps_before(values: Values) -> int:
    """How many taps of a convolution meet what was before the present.

    Raises:
        ValueError: no kernel has so many taps.
    """
    taps, causal = values["K"], "state" in values
    if taps > MOST_TAPS:
        op = "causal_conv1d" if causal else "centered_conv1d"
        raise ValueError(f"{op}: no kernel for {taps} taps; they have up to {MOST_TAPS}")
    return taps - 1 if causal else taps // 2


def contiguous_like(t: Tensor) -> Tensor:
    """New contiguous memory of its shape."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


# --- operators ---


class Operator:
    """A row of the table as an operator with a backward, around the kernels of one backend.

    The operator takes the arguments of the row and, where the forward keeps something for the
    backward, ``keep``. It returns the outputs of the row and what is kept. The backward's
    operator takes the gradients of the outputs, what was kept and the arguments, and returns
    the gradients of all tensors of floating-point numbers. An operator can only return tensors,
    so an empty one stands for None.

    Both functions take one dictionary, ``values``: the sizes by their letters (but not B, which
    is a tensor to kernels) and ``rows``, B times L; the options; and the tensors as
    :func:`laid_out` gives them, by :func:`kernel_name`.

    Args:
        namespace: of the backend.
        op: name of the row.
        forward: writes the outputs and what is kept, which ``values`` holds too; None for what
            is not wanted.
        backward: reads ``gy``, ``gfinal`` and what was kept from ``values`` too, and returns a
            dictionary in which ``gx`` is the gradient of ``x``.
        kept: names of what the forward keeps, and their shapes as functions of the sizes.
    """

    def __init__(
        self,
        namespace: Namespace,
        op: str,
        forward: Callable[[Values], None],
        backward: Callable[[Values], Values],
        kept: Mapping[str, Shape],
    ) -> None:
        self._namespace = namespace  # it holds the operators
        self._op, self._run_forward, self._run_backward, self._kept = stored(op), forward, backward, kept
        tensors, options, outputs = self._op.tensors, self._op.options, self._op.outputs
        self._names = [*[t.name for t in tensors], *[name for name, _ in options]]
        self._differentiable = [t.name for t in tensors if t.name != "cu_seqlens" and t.dtype != "int64"]
        self._returned = [*[output.name for output in outputs], *kept]
        arguments = [f"Tensor{'?' * t.optional} {t.name}" for t in tensors]
        arguments += [f"{kind} {name}" for name, kind in options]
        incoming = [f"Tensor{'?' * (output.name == 'final')} g{output.name}" for output in outputs]
        incoming += [f"Tensor {name}" for name in kept]
        self._backward_operator = namespace.define(
            f"{op}_backward({', '.join(incoming + arguments)}) -> {_tensors(len(self._differentiable))}",
            self._backward,
            self._backward_fake,
        )
        keep = ["bool keep"] if kept else []
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
            wanted = [isinstance(t, Tensor) and t.requires_grad for t in arguments]
            given["keep"] = torch.is_grad_enabled() and any(wanted)
        outputs = self._operator(*given.values())
        if len(self._returned) == 1:
            return outputs
        if len(self._op.outputs) == 1:
            return outputs[0]
        y, final = outputs[:2]
        return y, final.transpose(-1, -2) if given.get("return_state", True) else None

    def _check(self, arguments: Sequence[Any]) -> tuple[dict[str, int], Values]:
        """Sizes, and the arguments by their names."""
        return sizes_of(self._op, arguments), dict(zip(self._names, arguments))

    def _shapes(self, sizes: Mapping[str, int], given: Values, keep: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of all that the operator returns; a state that is not wanted has no rows."""
        shapes = {output.name: tuple(sizes[letter] for letter in output.letters) for output in self._op.outputs}
        if not given.get("return_state", True):
            shapes["final"] = (0, *shapes["final"][1:])
        for name, shape in self._kept.items():
            first, *rest = shape(sizes)
            shapes[name] = (first if keep else 0, *rest)
        return shapes

    def _empty(self, x: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Tensor, ...]:
        """Memory for all that the operator returns."""
        wide = {*self._kept, *[output.name for output in self._op.outputs if output.dtype]}
        return tuple(
            x.new_empty(shape, dtype=torch.float32 if name in wide else x.dtype) for name, shape in shapes.items()
        )

    def _fake(self, *arguments: Any) -> Any:
        keep = bool(self._kept) and arguments[-1]
        outputs = self._empty(arguments[0], self._shapes(*self._check(arguments), keep))
        return outputs if len(outputs) > 1 else outputs[0]

    def _forward(self, *arguments: Any) -> Any:
        sizes, given = self._check(arguments)
        keep = bool(self._kept) and arguments[-1]
        outputs = self._empty(arguments[0], self._shapes(sizes, given, keep))
        values = _values(self._op, sizes, given) | dict(zip(self._returned, outputs))
        if not given.get("return_state", True):
            values["final"] = None
        if not keep:
            values |= dict.fromkeys(self._kept)
        self._run_forward(values)
        return outputs if len(outputs) > 1 else outputs[0]

    def _backward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        given = dict(zip(self._names, arguments[len(self._returned) :]))
        return tuple(
            torch.empty(0) if given[name] is None else contiguous_like(given[name]) for name in self._differentiable
        )

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        sizes, given = self._check(arguments[len(self._returned) :])
        values = _values(self._op, sizes, given)
        for (name, shape), t in zip(self._shapes(sizes, given, True).items(), arguments):
            if name in self._kept:
                # an exported program may run backward although its forward was traced without gradients
                if tuple(t.shape) != shape:
                    raise ValueError(
                        f"{self._op.name}: the forward kept no states for a backward; "
                        "run or export it with gradients enabled"
                    )
                values[name] = t
            else:
                if t is not None and tuple(t.shape) != shape:
                    raise ValueError(f"{self._op.name}: g{name} must have shape {list(shape)}, got {list(t.shape)}")
                letters = {output.name: output.letters for output in self._op.outputs}
                values |= laid_out(f"g{name}", letters[name], t)
        if not given.get("return_state", True):
            values["gfinal"] = None
        found = self._run_backward(values)
        return tuple(
            torch.empty(0) if given[name] is None else found[f"g{kernel_name(name)}"].to(given[name].dtype)
            for name in self._differentiable
        )

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = len(self._op.tensors)
        kept = output[len(self._op.outputs) :] if self._kept else ()
        ctx.save_for_backward(*inputs[:tensors], *kept)
        ctx.options = inputs[tensors : len(self._names)]
        ctx.shape = output.shape if len(self._returned) == 1 else output[0].shape
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


def no_tangents(*tensors: Tensor | None) -> bool:
    """Whether none carries a tangent of forward differentiation: an operator would drop it without a word."""
    return torch.compiler.is_compiling() or all(t is None or unpack_dual(t).tangent is None for t in tensors)


def implement(op: str, backend: str, function: Callable[..., Any], takes: Callable[..., bool], name: str = "") -> None:
    """Register an implementation that leaves the calls that it does not take, and empty ones, to the torch form."""

    def implementation(*arguments: Any) -> Any:
        if arguments[0].numel() and takes(*arguments):
            return function(*arguments)
        return implementations(op, "torch")[0].function(*arguments)

    implements(op, backend, name)(implementation)
