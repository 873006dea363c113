"""Whether a kernel computes what modules would, and the weights that it then reads.

A kernel computes the formula of the classes that this package has. What a subclass, a part that was put in place of
another, or a hook computes, nobody but PyTorch knows; then the formula runs, whatever it has become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

Method = TypeVar("Method", bound=Callable[..., Any])


class Weights:
    """What a kernel reads of modules, good as long as these compute what they computed.

    Args:
        modules: those whose formula the kernel computes, with all modules within them.
        fields: of the kernel's structure; tensors among them are weights.
        shapes: of the weights that the kernel reads, by their fields.
        within: the module whose children they are, if not all of it is computed by the kernel.

    Attributes:
        usable: whether the kernel computes what the modules would: each is of a class that it knows and has no hook,
            and the weights are their parameters, no more and no less, and lie as they should.
        weights: what the fields point to, if it is usable.
        drops: whether one of the modules drops out as it stands.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        fields: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        within: nn.Module | None = None,
    ) -> None:
        modules = list(dict.fromkeys(inner for module in modules for inner in module.modules()))
        self.weights = [value for value in fields.values() if isinstance(value, Tensor)]
        self.drops = any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in modules)
        self._hooks = hooks_of(modules)
        parameters = {id(p) for module in modules for p in module.parameters(recurse=False)}
        known = all(map(_is_known, modules))
        self.usable = (
            bool(self.weights)
            and parameters == set(map(id, self.weights))
            and all(getattr(fields.get(name), "shape", None) == shape for name, shape in shapes.items())
            and all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.is_cpu for p in self.weights)
            and all(p.is_contiguous() for p in self.weights)
            and known
            and not any(self._hooks)
        )
        # No setting makes a class known.
        self._settings = [vars(module).values() for module in modules] if known else []
        self._settings_then = list(chain(*self._settings))
        holders = modules if within is None else [within, *modules]
        self._members = [held.values() for m in holders for held in (m._modules, m._parameters) if held]
        self._members_then = list(chain(*self._members))
        if not self.usable:
            self.weights = []
        self._addresses = list(map(Tensor.data_ptr, self.weights))
        # nothing else can come to lie where the weights lie while this holds their memory
        self._memory = [p.detach() for p in self.weights]

    def holds(self) -> bool:
        """Whether the modules have the settings, the children and the parameters that they had, every weight lies in
        its place, and no hook has joined.
        """
        if any(self._hooks) or list(map(Tensor.data_ptr, self.weights)) != self._addresses:
            return False
        return _same(self._members, self._members_then) and _same(self._settings, self._settings_then)


def _same(now: Iterable[Iterable[Any]], then: list[Any]) -> bool:
    """Whether these are the very objects of then."""
    found = list(chain(*now))
    return len(found) == len(then) and all(map(is_, found, then))


def hooks_of(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """The hooks around the forward of modules, as PyTorch keeps them."""
    own = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    return [*own, torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]


PARTS = {nn.Linear, nn.Conv1d, nn.LayerNorm, nn.RMSNorm, nn.Embedding}
"""Classes of PyTorch that have weights which kernels read."""
NOTHING = {nn.Identity, nn.ModuleList, nn.Dropout}
"""Classes of PyTorch that compute nothing, where :attr:`Weights.drops` is false."""


def _is_known(module: Any) -> bool:
    """Whether a module computes what kernels take it for.

    One of ours does so by the methods of the class that says what kernels read of it. A subclass may choose options;
    where it, or the module itself, has a method of its own in place of one of that class, nobody knows what that does.
    """
    if type(module) in PARTS:  # one without weights is none that a kernel reads
        return bool(module._parameters) and "forward" not in vars(module) and not getattr(module, "max_norm", None)
    if type(module) in NOTHING:
        return "forward" not in vars(module)
    classes = type(module).__mro__
    number = next((n for n, one in enumerate(classes) if "kernel_weights" in vars(one)), None)
    if number is None:
        return False
    formula = {name for name in vars(classes[number]) if not name.startswith("__")} | {"__call__"}
    return formula.isdisjoint(chain(vars(module), *map(vars, classes[:number])))


# --- methods of a model ---

_known: set[Callable[..., Any]] = set()


def in_kernels_too(method: Method) -> Method:
    """Note of a method that kernels compute what it says. A subclass's own one is not noted."""
    _known.add(method)
    return method


def kernels_know(model: Any, name: str) -> bool:
    """Whether a model's method is one that :func:`in_kernels_too` has noted."""
    return getattr(getattr(model, name), "__func__", None) in _known
