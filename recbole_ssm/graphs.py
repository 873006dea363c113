"""CUDA graphs: a function of fixed shapes is recorded once and replayed, all its kernels in one launch.

A step of one event and the scores of a few users are dozens of kernels of microseconds; on a GPU their launches, one by
one from Python, are most of the time. On a CPU, or wherever a graph does not serve, the function runs as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from recbole_ssm.errors import UserError

WARM_UP = 3  # calls before one is recorded: kernels are compiled and tested, and memory is found


class Recording(NamedTuple):
    """What is replayed for one kind of arguments."""

    inputs: list[Tensor]  # where the graph reads
    outputs: Any  # where it writes
    replay: Callable[[], None]


def capture(function: Callable[..., Any], inputs: list[Tensor], structure: Any) -> Recording:
    """Record ``function`` on copies of its arguments' tensors.

    Raises:
        RuntimeError: a graph cannot hold the function, for example because Python reads a tensor's value in it. The
            process can go on with random numbers as if nothing had been tried.
    """
    inputs = [t.clone() for t in inputs]
    device = inputs[0].device

    def call() -> Any:
        return function(*pytree.tree_unflatten(inputs, structure))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
        _refuse_waits(call)
    torch.cuda.current_stream().wait_stream(stream)
    outputs, replay = record(call, device)
    return Recording(inputs, outputs, replay)


def record(call: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[Any, Callable[[], None]]:
    """Record what a function launches, without running it: what it returned, and a function that replays it.

    Args:
        call: what to record; all that it needs was compiled by an earlier call.
        device: the GPU.
        pool: of ``torch.cuda.graph_pool_handle``: recordings of one pool share memory for what none of them returns.

    Raises:
        RuntimeError: as of :func:`capture`.
    """
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.get_rng_state(device)
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = call()
    except RuntimeError as error:
        # The generator still believes that it is recorded, and every later random number would be an error. One in
        # the same state takes its place.
        fresh = torch.Generator(device)
        fresh.set_state(before)
        torch.cuda.default_generators[device.index or 0].graphsafe_set_state(fresh)
        # What PyTorch raises last says only that something failed before.
        raise error.__context__ or error from None
    return outputs, graph.replay


def _refuse_waits(call: Callable[[], Any]) -> None:
    """Call a function; wherever the CPU would wait for the GPU, which no graph can hold, that is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def on_gpu(tensors: list[Tensor]) -> bool:
    """Whether a graph can read them."""
    return all(t.is_cuda for t in tensors)


class Graphed:
    """A function of tensors, or of tuples and lists of them, that is replayed as a CUDA graph.

    It must not read a tensor's value in Python, nor train. Weights are read where they lie when it is recorded: load
    new ones into them, and make a new ``Graphed`` after a move. Each kind of arguments (shapes, dtypes, devices) is
    recorded on its first call and keeps its memory; beyond ``most`` kinds, or where recording fails, the function runs
    as it is.

    Args:
        function: what to run.
        most: kinds of arguments that are recorded.
        serves: whether tensors like these can be recorded; by default, whether all are on a GPU.
        record: takes function, tensors and their structure to a :class:`Recording`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        most: int = 8,
        serves: Callable[[list[Tensor]], bool] = on_gpu,
        record: Callable[[Callable[..., Any], list[Tensor], Any], Recording] = capture,
    ) -> None:
        self._function, self._most, self._serves, self._record = function, most, serves, record
        self._recordings: dict[Any, Recording] = {}
        self._failed = False

    def __call__(self, *arguments: Any) -> Any:
        """Run or replay; what comes back is the caller's own, no later call writes over it."""
        tensors, structure = pytree.tree_flatten(arguments)
        if self._failed or torch.is_grad_enabled() or not tensors or not self._serves(tensors):
            return self._function(*arguments)
        key = structure, *[(t.shape, t.dtype, t.device) for t in tensors]
        if key not in self._recordings:
            if len(self._recordings) >= self._most:
                return self._function(*arguments)
            try:
                self._recordings[key] = self._record(self._function, tensors, structure)
            except RuntimeError as error:
                self._failed = True
                line = (str(error).splitlines() or [""])[0]
                logging.getLogger().warning(f"CUDA graphs are switched off: recording failed ({line})")
                return self._function(*arguments)
        recording = self._recordings[key]
        for place, tensor in zip(recording.inputs, tensors):
            place.copy_(tensor)
        recording.replay()
        return pytree.tree_map(torch.clone, recording.outputs)


def graphed_step(model: Any) -> Graphed:
    """``model.step(item_B, state)`` of a recurrent model, recorded for each number of users."""
    return Graphed(model.step)


def score_by_graphs(model: Any) -> None:
    """Let ``full_sort_predict`` of a model on a GPU replay a graph; on a CPU it stays as it is.

    Raises:
        UserError: it is not a model of ours that reads the last position.
    """
    if not hasattr(model, "fixed_shape_scores") or getattr(model, "readout", "") != "last":
        raise UserError(f"cuda_graphs: {type(model).__name__} is no model of ours with readout: last; leave it out")
    if model.item_embedding.weight.is_cuda:
        model.graphed = graphed_scores(model)


def graphed_scores(model: Any) -> Graphed:
    """``(item_seq [B, L], item_seq_len [B]) -> scores [B, V]`` of a model that reads the last position."""
    return Graphed(model.fixed_shape_scores)
