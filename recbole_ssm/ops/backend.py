"""Which implementation of an op runs: one registry, one choice, one line in the log.

An op is a public function that checks its arguments and calls the implementation that
:func:`dispatch` picks. A backend is a set of implementations, which its module registers.

The compiled backends, native and cuda, prove themselves where they run: before an op's first
use on a kind of device, values and gradients of a small example are compared with the reference
(:mod:`recbole_ssm.ops.selftest`). An implementation that is wrong, or fails, is switched off
with a warning, and the next in order takes its place.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from recbole_ssm.errors import UserError, did_you_mean

BACKENDS = ("auto", "reference", "torch", "native", "cuda")
COMPILED = ("native", "cuda")
HALF = (torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its kernels on the CPU, in its interpreter: so they are tested anywhere."""


class Implementation(NamedTuple):
    """One way to compute an op."""

    function: Callable[..., Any]
    name: str
    """Of the backend, or of the library that the backend stands on."""


_implementations: dict[tuple[str, str], list[Implementation]] = {}
"""By op and backend; the first of each is used."""
_requirements: dict[str, Callable[[], str]] = {}
_lacks: dict[str, str] = {}
_selected = "auto"
_forced = threading.local()
_tested: set[tuple[str, str, str]] = set()
"""Op, backend and kind of device, once the test is over."""
_testing: dict[tuple[str, str, str], threading.Lock] = {}
"""What a test holds while it runs. Each has its own, because the example of one op may call another."""
self_test: Callable[[str, Callable[..., Any], torch.device], str] | None = None
"""Returns what is wrong with an implementation on a device, "" for nothing; set by :mod:`recbole_ssm.ops`."""
_logged: set[tuple[str, str, torch.device, torch.dtype]] = set()
_forked = False


def _mark_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_fork)


def implements(op: str, backend: str, name: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as an implementation of ``op`` in ``backend``.

    It is used where those that were registered before it are switched off.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault((op, backend), []).append(Implementation(function, name or backend))
        return function

    return register


def requires(backend: str, why_not: Callable[[], str]) -> None:
    """Let ``why_not`` return what a backend lacks on this machine, "" for nothing; it is called once, when needed."""
    _requirements[backend] = why_not


def lacks(backend: str) -> str:
    """What the backend needs and this machine does not have; "" for nothing."""
    if backend not in _lacks:
        _lacks[backend] = _requirements[backend]() if backend in _requirements else ""
    return _lacks[backend]


def implementations(op: str, backend: str) -> list[Implementation]:
    """The implementations that are not switched off, in the order of preference."""
    return [] if lacks(backend) else list(_implementations.get((op, backend), ()))


def available_backends(op: str | None = None) -> list[str]:
    """Names of the backends that have an implementation of ``op``, or of any op, on this machine."""
    present = {backend for (name, backend), found in _implementations.items() if found and op in (None, name)}
    return [backend for backend in BACKENDS if backend in present and not lacks(backend)]


def switch_off(op: str, backend: str, name: str, why: str) -> None:
    """Use the implementation of ``op`` in ``backend`` that has this name no more, in this process."""
    global _selected
    _implementations[op, backend][:] = [i for i in _implementations[op, backend] if i.name != name]
    rest = [i.name for i in _implementations[op, backend]] or ["torch"]
    called = backend if name == backend else f"{backend} ({name})"
    logging.getLogger().warning(
        f"op {op}: backend {called} is switched off: {why}; {rest[0]} takes its place. Please report what "
        "'recbole-ssm doctor --numerics' prints"
    )
    if _selected == backend and backend not in available_backends():
        _selected = "auto"


def set_backend(name: str) -> None:
    """Select the backend of every following op call: ``auto`` or one of :func:`available_backends`.

    Raises:
        UserError: ``name`` is unknown, or is not usable on this machine.
    """
    global _selected
    if name not in BACKENDS:
        raise UserError(f"ssm_backend: '{name}' is not one of {', '.join(BACKENDS)}{did_you_mean(name, BACKENDS)}")
    if name != "auto" and name not in (available := available_backends()):
        why = f" ({lacks(name)})" if lacks(name) else ""
        raise UserError(
            f"ssm_backend: '{name}' is not installed on this machine{why}; use one of {', '.join(['auto', *available])}"
        )
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


@contextmanager
def force(op: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let :func:`dispatch` return ``function`` for ``op`` in this thread: a self-test calls it, an export traces it."""
    before = getattr(_forced, "functions", {})
    _forced.functions = {**before, op: function}
    try:
        yield
    finally:
        _forced.functions = before


def automatic() -> bool:
    """Whether neither a user nor a self-test has chosen a backend."""
    return _selected == "auto" and not getattr(_forced, "functions", None)


def _order(x: torch.Tensor) -> tuple[list[str], str]:
    """The backends that may compute a tensor like ``x``, the first choice first, and why."""
    kind = f"{x.dtype} on {x.device.type}"
    # Triton's interpreter runs on the CPU, so there cuda is taken where it is asked for.
    fits = {
        "native": x.dtype == torch.float32 and x.device.type == "cpu",
        "cuda": x.dtype in (torch.float32, *HALF) and (x.is_cuda or _selected == "cuda"),
    }
    if _selected in COMPILED:
        if fits[_selected]:
            return [_selected, "torch"], f"ssm_backend: {_selected}"
        return ["torch"], f"ssm_backend: {_selected} does not compute {kind}"
    if _selected != "auto":
        return [_selected], f"ssm_backend: {_selected}"
    order = [backend for backend in COMPILED if fits[backend]]
    reason = f"first usable for {kind}" if order else f"the vectorised form serves {kind}"
    return [*order, "torch"], reason


def dispatch(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """The implementation of ``op`` for a tensor like ``x``.

    The first choice of each kind stands in the log file of the run, with its reason.
    """
    tracing = torch.compiler.is_compiling()
    # torch.compile cannot look into what belongs to a thread; torch.export calls this as it is.
    if not torch.compiler.is_dynamo_compiling() and op in getattr(_forced, "functions", {}):
        return _forced.functions[op]
    order, reason = _order(x)
    for backend in order:
        if not tracing and backend in COMPILED and (op, backend, x.device.type) not in _tested:
            _test(op, backend, x.device)
        found = implementations(op, backend)
        if found:
            choice = (op, backend, x.device, x.dtype)
            if not tracing and choice not in _logged:
                _logged.add(choice)
                name = backend if found[0].name == backend else f"{backend} ({found[0].name})"
                logging.getLogger().debug(f"op {op}: backend {name} ({reason})")
            return found[0].function
    raise UserError(f"ssm_backend: '{_selected}' has no implementation of {op}; use ssm_backend: auto")


def _test(op: str, backend: str, device: torch.device) -> None:
    """Test the implementations in order, and switch off those that fail, until one passes. Another thread that comes
    meanwhile waits, and gets what has passed.

    Nothing is tested in a forked child, where autograd does not run; while a CUDA graph is
    captured, when nothing else may run; and in Triton's interpreter, which is for tests and
    would take seconds.
    """
    interpreted = backend == "cuda" and device.type == "cpu"
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if self_test is None or _forked or interpreted or capturing:
        return
    choice = op, backend, device.type
    with _testing.setdefault(choice, threading.Lock()):
        while choice not in _tested:
            found = implementations(op, backend)
            why = self_test(op, found[0].function, device) if found else ""
            if why:
                switch_off(op, backend, found[0].name, why)
            else:
                _tested.add(choice)
