"""Which implementation of an op runs: one registry, one choice, one line in the log.

An op is a public function that checks its arguments and calls the implementation that :func:`dispatch` picks.
A backend is a set of implementations; it takes part as soon as its module registers them, so that a native or
a GPU backend drops in without a change to ops, layers or models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from recbole_ssm.errors import UserError, did_you_mean

BACKENDS = ("auto", "reference", "torch", "native", "cuda")

_implementations: dict[tuple[str, str], Callable[..., Any]] = {}
_selected = "auto"
_logged: set[tuple[str, str, torch.device, torch.dtype]] = set()


def implements(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as ``backend``'s implementation of ``op``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations[op, backend] = function
        return function

    return register


def available_backends(op: str | None = None) -> list[str]:
    """Names of the backends that have an implementation of ``op``, or of any op, on this machine."""
    present = {backend for name, backend in _implementations if op in (None, name)}
    return [backend for backend in BACKENDS if backend in present]


def switch_off(backend: str) -> None:
    """Take a backend out of every following choice, in this process: a self-test has found it wrong."""
    global _selected
    for op, name in list(_implementations):
        if name == backend:
            del _implementations[op, name]
    if _selected == backend:
        _selected = "auto"


def set_backend(name: str) -> None:
    """Select the backend of every following op call: ``auto`` or one of :func:`available_backends`.

    Raises:
        UserError: ``name`` is unknown, or is not usable on this machine.
    """
    global _selected
    if name not in BACKENDS:
        raise UserError(f"ssm_backend: '{name}' is not one of {', '.join(BACKENDS)}{did_you_mean(name, BACKENDS)}")
    if name != "auto" and name not in available_backends():
        usable = ", ".join(["auto", *available_backends()])
        raise UserError(f"ssm_backend: '{name}' is not installed on this machine; use one of {usable}")
    _selected = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select a backend within a ``with`` block."""
    previous = _selected
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def dispatch(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """The implementation of ``op`` for a tensor like ``x``; the first choice of each kind is logged with its reason."""
    if _selected == "native" and not (x.dtype == torch.float32 and x.device.type == "cpu"):
        order, reason = ["torch"], f"ssm_backend: native computes float32 on the CPU, not {x.dtype} on {x.device.type}"
    elif _selected != "auto":
        order, reason = [_selected], f"ssm_backend: {_selected}"
    elif x.is_cuda:
        order, reason = ["cuda", "torch"], "first usable for a GPU tensor"
    elif x.dtype == torch.float32 and x.device.type == "cpu":
        order, reason = ["native", "torch"], "first usable for a float32 CPU tensor"
    else:
        order, reason = ["torch"], f"the vectorised form serves {x.dtype} on {x.device.type}"
    for backend in order:
        function = _implementations.get((op, backend))
        if function is not None:
            choice = (op, backend, x.device, x.dtype)
            if choice not in _logged:
                _logged.add(choice)
                logging.getLogger().info(f"op {op}: backend {backend} ({reason})")
            return function
    raise UserError(f"ssm_backend: '{_selected}' has no implementation of {op}; use ssm_backend: auto")
