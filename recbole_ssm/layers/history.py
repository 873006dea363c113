"""Few short histories in one call of C++ (``csrc/history.h``), where no gradient is wanted.

A model's ``encode`` is its formula in PyTorch, decorated by :func:`in_one_call`. There most of the
time of a short history goes to Python and to the choice of PyTorch's kernels; the call spends it
on arithmetic alone. The formula is the readable form, the oracle of the tests, and what runs
wherever the call does not.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from recbole_ssm.layers.step import Prepared, norm_fields
from recbole_ssm.layers.weights import Weights, kernels_know
from recbole_ssm.ops import native
from recbole_ssm.ops.backend import dispatch, implements

MOST_EVENTS = {"scan": 1024, "ssd": 16_384}
"""Histories that are longer than this on average go layer by layer: with Mamba's scan, without one.

Measured on one thread (AVX2): 50 events take a fifth to a ninth of the time in one call, 1,000 half
to four fifths, whatever the number of histories. From some 2,000 events on Mamba loses, because
what lies between its layers has left the cache; Mamba-2 and Hydra take two thirds at 16,000. The
call gives a history one thread.
"""

Encode = Callable[..., Tensor]


def in_one_call(formula: Encode) -> Encode:
    """Let the backend that is chosen for the item embeddings encode few short histories in place of the formula.

    The decorated method belongs to a model of an ``item_embedding``, a ``norm`` behind it,
    ``blocks`` of :class:`recbole_ssm.layers.Block`, and a ``last_norm`` behind them, of which
    either norm may be nothing, and computes no more than these one after the other, with
    dropout. A model may have a method ``embed(items_L, clock)`` that takes the place of the
    ``item_embedding``.
    ``Model.encode.__wrapped__`` is the formula.
    """

    @functools.wraps(formula)
    def encode(
        model: Any, items_L: Tensor, cu_seqlens: Tensor, clock: Any = None, *, last_only: bool = False
    ) -> Tensor:
        # A formula that reads no times may have no such parameter.
        given = () if clock is None else (clock,)
        table = model.item_embedding.weight
        if not last_only or table.dtype != torch.float32 or not table.is_cpu or torch.compiler.is_compiling():
            return formula(model, items_L, cu_seqlens, *given, last_only=last_only)
        found: Tensor = dispatch("history", table)(formula, model, items_L, cu_seqlens, *given)
        return found

    return encode


@implements("history", "reference")
@implements("history", "torch")
def _formula(formula: Encode, model: Any, items_L: Tensor, cu_seqlens: Tensor, *clock: Any) -> Tensor:
    return formula(model, items_L, cu_seqlens, *clock, last_only=True)


def _native(formula: Encode, model: Any, items_L: Tensor, cu_seqlens: Tensor, *clock: Any) -> Tensor:
    positions, histories = items_L.numel(), cu_seqlens.numel() - 1
    few = 0 < positions <= max(MOST_EVENTS.values()) * histories
    fits = few and items_L.is_cpu and cu_seqlens.is_cpu and not torch.is_autocast_enabled("cpu")
    chain = chain_of(model) if fits else None
    takes = chain is not None and positions <= chain.most_events * histories and chain.takes()
    logging.getLogger().debug(
        "encode: %d positions of %d histories %s", positions, histories, "in one call" if takes else "layer by layer"
    )
    if chain is None or not takes:
        return _formula(formula, model, items_L, cu_seqlens, *clock)
    if getattr(model, "time_encoding", None) is None and (not hasattr(model, "embed") or kernels_know(model, "embed")):
        return chain(items_L, cu_seqlens)
    inputs = model.embed(items_L, *clock)
    shape = positions, *model.item_embedding.weight.shape[1:]
    known = inputs.dtype == torch.float32 and inputs.is_cpu and inputs.shape == shape
    if inputs.requires_grad or not known:
        return _formula(formula, model, items_L, cu_seqlens, *clock)
    return chain(torch.arange(positions, device="cpu"), cu_seqlens, inputs.contiguous())


class Chain(Weights):
    """The structures of a model's blocks, one after the other, and what stands before them.

    Args:
        model: as :func:`in_one_call` says.

    Attributes:
        layers: the structures.
        first: fields of the norm before the first block; nothing where there is none.
        behind: of the one behind the last block, likewise.
        most_events: how long histories may be on average.
    """

    def __init__(self, model: Any) -> None:
        self.layers = layers = [Prepared(block) for block in model.blocks]
        table = model.item_embedding.weight
        # A mixer without the rest of a block is for single events.
        sizes = [(layer.fields.F > 0, layer.fields.M) if layer.usable else None for layer in layers]
        known = bool(layers) and all(size == (True, table.shape[1]) for size in sizes)
        ends = {"first": getattr(model, "norm", None), "behind": getattr(model, "last_norm", None)}
        norms = {name: norm for name, norm in ends.items() if norm is not None and type(norm) is not nn.Identity}
        self.first, self.behind = (norm_fields(name, norms[name]) if name in norms else {} for name in ends)
        blocks = {f"{number}": p for number, p in enumerate(p for layer in layers for p in layer.weights)}
        dropout = [model.dropout] if hasattr(model, "dropout") else []
        modules = [model.item_embedding, model.blocks, *norms.values(), *dropout]
        shapes = {f"{name}_{part}": table.shape[1:] for name in norms for part in ("weight", "bias")}
        super().__init__(modules, {"table": table, **self.first, **self.behind, **blocks}, shapes, within=model)
        self.usable = self.usable and known
        if not self.usable:
            _say_unknown(type(model).__name__)
        self.most_events = 0
        if self.usable:
            self._blocks = (type(layers[0].fields) * len(layers))(*[layer.fields for layer in layers])
            native.fill(self._blocks[-1], self.behind)
            scans = any(layer.fields.H == 0 for layer in layers)
            self.most_events = MOST_EVENTS["scan" if scans else "ssd"]
            V, M = table.shape
            blocks_at = {"layers": len(layers), "blocks": ctypes.addressof(self._blocks)}
            self._fields = native.structure("history", V=V, M=M, table=table, **self.first, **blocks_at)

    def takes(self) -> bool:
        """Whether the call computes what the model would: no dropout, no gradient."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.weights)
        return self.usable and not self.drops and not learns

    def __call__(self, items_L: Tensor, cu_seqlens: Tensor, table: Tensor | None = None) -> Tensor:
        """Packed histories ``[L]`` and their bounds ``[S + 1]`` -> the outputs at their last events ``[S, M]``.

        The items are rows of ``table [V, M]``, which takes the place of the item embeddings where it is given.
        """
        items, offsets = items_L.long().contiguous(), cu_seqlens.long().contiguous()
        y = self._memory[0].new_empty(offsets.numel() - 1, self._fields.M)
        call = type(self._fields).from_buffer_copy(self._fields)
        call.S, call.L, call.threads = len(y), items.numel(), torch.get_num_threads()
        call.items, call.offsets, call.y = map(native.address, (items, offsets, y))
        if table is not None:
            call.V, call.table = len(table), native.address(table)
        native.run_history(call)
        return y


@functools.cache
def _say_unknown(model: str) -> None:
    """Say once that the blocks of such models go one by one."""
    logging.getLogger().info(f"encode: the one call of C++ does not know these blocks of {model}; one by one")


_chains: WeakKeyDictionary[nn.Module, Chain] = WeakKeyDictionary()


def chain_of(model: Any) -> Chain:
    """What the call reads of a model as it stands, kept from call to call."""
    chain = _chains.get(model)
    if chain is None or not chain.holds():
        chain = _chains[model] = Chain(model)
    return chain


if not native.unusable:
    implements("history", "native")(_native)
