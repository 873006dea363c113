"""CUDA graphs: a function of fixed shapes is recorded once and replayed, all its kernels in one launch.

A step of one event and the scores of a few users are dozens of kernels of microseconds; on a GPU their launches, one by
one from Python, are most of the time. On a CPU, or wherever a graph does not serve, the function runs as it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache, partial
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

    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
        _refuse_waits(call)
    torch.cuda.current_stream(device).wait_stream(stream)
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
        how = {"pool": pool, "stream": _side_stream(device), "capture_error_mode": "thread_local"}
        with torch.cuda.device(device), torch.cuda.graph(graph, **how):
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


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a GPU, which share memory within a stream alone; PyTorch's is that of the first GPU."""
    return torch.cuda.Stream(device)


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
    as it is. Threads take turns, since they share that memory; but while one records, no other may wait for the GPU.

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
        self._lock = threading.RLock()

    def __call__(self, *arguments: Any) -> Any:
        """Run or replay; what comes back is the caller's own, no later call writes over it."""
        with self._lock:
            outputs, is_shared = self._run(arguments)
            return pytree.tree_map(torch.clone, outputs) if is_shared else outputs

    def into(self, places: Any, *arguments: Any) -> None:
        """Run or replay, and write what comes back, or the first part of it, into tensors of the same structure, which
        may be arguments too.
        """
        with self._lock:
            outputs, _ = self._run(arguments)
            _copy(pytree.tree_leaves(places), pytree.tree_leaves(outputs))

    def _run(self, arguments: Any) -> tuple[Any, bool]:
        """What the function returns, and whether the next replay writes over it."""
        tensors, structure = pytree.tree_flatten(arguments)
        recording = self._recording_of(tensors, structure)
        if recording is None:
            return self._function(*arguments), False
        _copy(recording.inputs, tensors)
        recording.replay()
        return recording.outputs, True

    def _recording_of(self, tensors: list[Tensor], structure: Any) -> Recording | None:
        if self._failed or torch.is_grad_enabled() or not tensors or not self._serves(tensors):
            return None
        key = structure, *[(t.shape, t.dtype, t.device) for t in tensors]
        if key not in self._recordings and len(self._recordings) < self._most:
            try:
                self._recordings[key] = self._record(self._function, tensors, structure)
            except RuntimeError as error:
                self._failed = True
                line = (str(error).splitlines() or [""])[0]
                logging.getLogger().warning(f"CUDA graphs are switched off: recording failed ({line})")
        return self._recordings.get(key)


def _copy(places: list[Tensor], tensors: list[Tensor]) -> None:
    """Copy tensors to where they are wanted, those of a kind in one launch."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for place, tensor in zip(places, tensors):
        of_kind = kinds.setdefault((place.dtype, tensor.dtype), ([], []))
        of_kind[0].append(place)
        of_kind[1].append(tensor)
    for to, of in kinds.values():
        torch._foreach_copy_(to, of)


class GraphedModel:
    """What serving asks of a model, each replayed as a graph.

    Args:
        model: a model of ours in evaluation mode that reads the last position.
        **how: of :class:`Graphed`.

    Attributes:
        scores: ``(item_seq [B, L], item_seq_len [B]) -> scores [B, V]``, recorded for each number of histories.
        step: ``(item_B, state) -> vectors [B, hidden_size], state`` of a model that carries a state, recorded for each
            number of users.
    """

    MOST_LENGTHS = 4
    """Lengths of lists for which :meth:`best` records."""

    def __init__(self, model: Any, **how: Any) -> None:
        self.scores = Graphed(model.fixed_shape_scores, **how)
        self.step = Graphed(model.step, **how) if getattr(model, "carries_state", False) else None
        self._model, self._how = model, how
        self._best: dict[tuple[int, int], Graphed] = {}

    def best(self, vectors: Tensor, excluded: Tensor, k: int, items: int) -> Tensor:
        """The k best of so many items for each vector, the item of id 0 and excluded ones never being among them.

        Args:
            vectors: of histories ``[B, hidden_size]``.
            excluded: item ids ``[B, E]``, filled up with 0.
            k: how many; at most ``items``.
            items: how many there are, the one of id 0 among them.

        Returns:
            Scores and ids ``[2, B, k]`` in float64, so that one copy brings both to the CPU; of equal scores at the end
            of a list any may be there, and -inf stands where there were no more.
        """
        function = partial(_best_items, self._model, k, items)
        if (k, items) not in self._best:
            if len(self._best) == self.MOST_LENGTHS:
                return function(vectors, excluded)
            self._best[k, items] = Graphed(function, **self._how)
        found: Tensor = self._best[k, items](vectors, excluded)
        return found


def _best_items(model: Any, k: int, items: int, vectors: Tensor, excluded: Tensor) -> Tensor:
    scores = (model.query_vectors(vectors) @ model.item_vectors().T)[:, :items]
    scores[:, 0] = -torch.inf
    found = scores.scatter_(1, excluded, -torch.inf).topk(k)
    return torch.stack([found.values.double(), found.indices.double()])


def replay_graphs(model: Any) -> None:
    """Let a model on a GPU answer by replayed graphs where it serves; on a CPU it stays as it is.

    Raises:
        UserError: it is not a model of ours that reads the last position.
    """
    if not hasattr(model, "fixed_shape_scores") or getattr(model, "readout", "") != "last":
        raise UserError(f"cuda_graphs: {type(model).__name__} is no model of ours with readout: last; leave it out")
    if model.item_embedding.weight.is_cuda:
        model.graphed = GraphedModel(model)
