"""A user whose events come one by one: the model's state is carried, so an event costs the same
after any history.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.graphs import Graphed
from recbole_ssm.layers import MixerState
from recbole_ssm.layers.history import chain_of
from recbole_ssm.layers.step import runs_natively
from recbole_ssm.layers.time import NEVER, Clock, TimeEncoding
from recbole_ssm.layers.weights import hooks_of, kernels_know
from recbole_ssm.ops import native
from recbole_ssm.serving.asked import Reader
from recbole_ssm.serving.catalogue import Catalogue, Recommendations

Moments = tuple[int, int, int]
"""Of an event in seconds: when the event before it was, its own time, and when the next one was or it was asked."""


def moments_of(times: Sequence[int], asked: int) -> list[Moments]:
    """Those of each event of a history, whose times these are, where it is asked at a moment."""
    return list(zip([NEVER, *times[:-1]], times, [*times[1:], asked]))


def clock_of(moments: Sequence[Moments], device: torch.device) -> Clock:
    """The clock ``[n]`` of n events."""
    return Clock(*torch.tensor(moments, device=device).T)


class Session:
    """What :meth:`Recommender.session` returns. Of a user it keeps the state of the model and the set of items seen.

    Up to MAX_ITEM_LIST_LENGTH events :meth:`top` gives what ``recommend`` gives for the same
    history. Beyond, the two part: ``recommend`` reads the newest MAX_ITEM_LIST_LENGTH events,
    as RecBole does; the state has read all of them.

    Where the wait until the moment of asking enters at an event's input (``time: query``), the
    carried state is the one before the newest event. :meth:`top` steps that event with its wait and
    keeps nothing; the next event ends the wait, and then the step is taken for good.

    A session is for one thread at a time, and its model must stay where it is: no ``to``, no
    further training.

    Args:
        model: a model that carries state, in evaluation mode.
        catalogue: its items.
        history: item ids so far, oldest first.
        times: when these events were, in seconds; None where the model does not read it.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Any, catalogue: Catalogue, history: Sequence[int], times: Sequence[int] | None = None
    ) -> None:
        self._model, self._catalogue = model, catalogue
        self._reader = Reader(model, catalogue)
        self._seen = set(history)
        encoding = getattr(model, "time_encoding", None)
        self._waits = encoding is not None and encoding.asks_at_input
        self._device = model.item_embedding.weight.device
        # Of a model that reads times: the newest item, and when the event before it and its own were.
        self._newest: tuple[int, int, int] | None = None
        moments: list[Moments] = []
        if history and self._reader.reads_times:
            assert times is not None
            moments = moments_of(times, times[-1])
            self._newest = history[-1], *moments[-1][:2]
        self._output, state = None, model.alloc_state(1)
        read = history[:-1] if self._waits else history
        if read:
            clock = [clock_of(moments[: len(read)], self._device)] if moments else []
            output, state = model.read(torch.tensor(read, device=self._device), *clock)
            self._output = None if self._waits else output
        self._step = Stepper(model, state)

    @property
    def nbytes(self) -> int:
        """Bytes of the carried state; they do not depend on how many events there were."""
        return sum(state.nbytes for state in self._step.state)

    def update(self, item: str, time: Any = None) -> None:
        """Take one more event.

        Args:
            item: its token.
            time: when it was: seconds since 1970, a datetime, or a date of ISO 8601 as text; a model without times
                passes over it. One before the event before counts as its time.

        Raises:
            UserError: the item is not in the catalogue, or the model reads times and there is none.
        """
        (index,) = self._catalogue.ids([item])
        at = self._reader.time(time)
        if not self._reader.reads_times:
            self._output = self._step([index])
        else:
            assert at is not None
            newest, before, last = self._newest or (0, NEVER, NEVER)
            at = max(at, last)
            if not self._waits:
                self._output = self._step([index], [(last, at, at)])
            elif self._newest:
                # Its wait is over, and so it is read for good.
                self._step([newest], [(before, last, at)])
            self._newest = index, last, at
        self._seen.add(index)

    @torch.inference_mode()
    def top(
        self,
        k: int = 10,
        *,
        exclude_seen: bool = False,
        exclude: Iterable[str] = (),
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        now: Any = None,
    ) -> Recommendations:
        """The k items most likely to come next; as :meth:`Recommender.recommend`, by popularity before the first event.

        Raises:
            UserError: there was no event yet and the checkpoint has no counts of items, k is below
                1, a token is unknown, or the model must know when it is asked and is not told.
        """
        refused = self._catalogue.refused(allow, deny)
        excluded = [*self._catalogue.known(exclude, "exclude", True)[0], *(self._seen if exclude_seen else ())]
        if not self._seen:
            if not self._catalogue.has_counts:
                raise UserError("session: there was no event yet; give a history, or update(item) first")
            return self._catalogue.popular(k, excluded, refused)
        vector, graphed = self._vector(now), getattr(self._model, "graphed", None)
        if graphed is not None and refused is None:
            found = self._catalogue.best_by_graph(graphed, vector, k, excluded)
            if found is not None:
                return found
        scores = self._model.query_vectors(vector) @ self._model.item_vectors().T
        return self._catalogue.best(scores, k, [excluded], refused)[0]

    def _vector(self, now: Any) -> Tensor:
        """The vector of the history ``[1, hidden_size]`` that answers at a moment."""
        moment = self._reader.moment(now)
        if self._newest is not None and moment is not None and self._reader.asks:
            item, before, at = self._newest
            if self._waits:
                return self._step([item], [(before, at, moment)], keep=False)
            encoding = self._model.time_encoding
            _, *rows = encoding.rows_of(before, at, moment)
            gated: Tensor = encoding.gated(self._output, torch.tensor(rows, device=self._device)[:, None])
            return gated
        assert self._output is not None
        return self._output

    # --- the state as an object ---

    @torch.inference_mode()
    def state_dict(self) -> dict[str, Tensor]:
        """The state of the user as tensors on the CPU, copied: what :meth:`load_state_dict` of a session of the same
        model takes, and safetensors writes.

        ``seen`` holds the ids of the items seen ``[n]``, ``output`` the vector of the history
        ``[1, hidden_size]``, without which there was no event; ``block.<n>.<part>`` the state of a
        block. Of a model that reads times, ``newest`` holds the newest item and the times of the event
        before and of its own ``[3]``; where it waits to be read, there is no ``output``.
        """
        found = {"seen": torch.tensor(sorted(self._seen), dtype=torch.int64)}
        if self._output is not None:
            found["output"] = self._output
        if self._newest is not None:
            found["newest"] = torch.tensor(self._newest)
        for number, one in enumerate(self._step.state):
            found |= {f"block.{number}.{part}": tensor for part, tensor in one._asdict().items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}

    @torch.inference_mode()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on as the session did whose :meth:`state_dict` this is.

        Raises:
            UserError: it is of another model or another catalogue; the session stays as it was.
        """
        now = self.state_dict()
        weight = self._model.item_embedding.weight
        if not self._waits:
            now.setdefault("output", torch.empty(1, weight.shape[1], dtype=weight.dtype))
        if self._reader.reads_times:
            now.setdefault("newest", torch.empty(3, dtype=torch.int64))
        of_events = {"output", "newest"} if state.get("seen", torch.empty(0)).numel() == 0 else set()
        if missing := sorted(set(now) - set(state) - of_events) or sorted(set(state) - set(now)):
            raise UserError(f"session: a state of another model; it differs in {missing[0]}")
        for name, tensor in state.items():
            fits = tensor.ndim == 1 if name == "seen" else tensor.shape == now[name].shape
            if not fits or tensor.dtype != now[name].dtype:
                raise UserError(
                    f"session: a state of another model; {name} is {tensor.dtype} {list(tensor.shape)} there and "
                    f"{now[name].dtype} {list(now[name].shape)} here"
                )
        seen = set(state["seen"].tolist())
        newest = tuple(state["newest"].tolist()) if "newest" in state else None
        if any(not 0 < item < len(self._catalogue.items) for item in (*seen, *(newest or ())[:1])):
            raise UserError("session: a state of another catalogue; it has seen items that are not in this one")
        self._seen, self._newest = seen, newest
        self._output = state["output"].to(weight.device, copy=True) if "output" in state else None
        for number, one in enumerate(self._step.state):
            for part, tensor in one._asdict().items():
                tensor.copy_(state[f"block.{number}.{part}"])

    def clone(self) -> Session:
        """Another session in the same state, of the same model; what one takes afterwards the other does not know.

        ``copy.copy`` and ``copy.deepcopy`` do the same.
        """
        other = Session(self._model, self._catalogue, ())
        other.load_state_dict(self.state_dict())
        return other

    def __copy__(self) -> Session:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self.clone()

    def __reduce__(self) -> Any:
        raise UserError("session: is not pickled, because its model would be too; keep its state_dict()")


class Stepper:
    """Advances the states of B users in place, an event of each at a time, or of the first of them; in C++, without new
    memory, where it can.

    Args:
        model: a causal state-space model in evaluation mode; its weights are read where they
            lie now.
        state: what came before, one entry a block; it is copied.
    """

    def __init__(self, model: Any, state: Sequence[MixerState]) -> None:
        self.model = model
        copies = [[t.detach().clone(memory_format=torch.contiguous_format) for t in one] for one in state]
        self.state = [MixerState(*copy) for copy in copies]
        table = model.item_embedding.weight.detach()
        graphed = getattr(model, "graphed", None)
        self._graphed: Graphed | None = graphed and graphed.step
        self._encoding = getattr(model, "time_encoding", None)
        self._native = runs_natively(table) and self._is_known()
        if not self._native:
            return
        chain = chain_of(model)
        B = len(self.state[0].ssm)
        self._output = table.new_empty(B, table.shape[1])
        self._rows: Any = (ctypes.c_int64 * B)()
        calls = [layer.call(self._output, one, one, self._output) for layer, one in zip(chain.layers, self.state)]
        self._calls = (type(calls[0]) * len(calls))(*calls)
        native.fill(self._calls[0], chain.first)
        native.fill(self._calls[-1], chain.behind)
        # The first layer reads its input from the table of embeddings, or, where times are added
        # to an item's, from what is computed for each event.
        first = self._calls[0]
        if self._encoding is None:
            first.rows, first.items, first.u = ctypes.addressof(self._rows), len(table), table.data_ptr()
        else:
            self._tables = [weight.detach().numpy() for weight in (table, *self._encoding.input_tables())]
            self._inputs = np.empty((B, table.shape[1]), dtype=np.float32)
            first.u = self._inputs.ctypes.data
        spaces = [native.step_workspace(call) for call in self._calls]
        for call, space in zip(self._calls, spaces):
            call.workspace = space.data_ptr()
        self._alive = table, chain, spaces

    def _is_known(self) -> bool:
        """Whether the kernels compute what the model's own step would."""
        if not (kernels_know(self.model, "embed") and kernels_know(self.model, "step")):
            return False
        encoding, chain = self._encoding, chain_of(self.model)
        times = encoding is None or (type(encoding) is TimeEncoding and not any(hooks_of(encoding.modules())))
        return times and chain.usable and not chain.drops and all(layer.steps for layer in chain.layers)

    def __call__(self, items: Sequence[int], moments: Sequence[Moments] = (), *, keep: bool = True) -> Tensor:
        """Ids of one item a user -> vectors ``[n, hidden_size]``, which the next call writes over.

        Args:
            items: the ids, of the first n users.
            moments: of each event, where the model reads times.
            keep: whether the states advance; else the events are only tried.

        Raises:
            IndexError: there is no such item.
        """
        users = len(items)
        if not self._native:
            with torch.inference_mode():
                device = self.model.item_embedding.weight.device
                clock = [clock_of(moments, device)] if moments else []
                before = [MixerState(*(part[:users] for part in one)) for one in self.state]
                given = torch.tensor(items, device=device), before, *clock
                if self._graphed:
                    table = self.model.item_embedding.weight
                    output = table.new_empty(users, table.shape[1])
                    self._graphed.into((output, before) if keep else (output,), *given)
                    return output
                output, after = self.model.step(*given)
                pairs = zip(itertools.chain(*before), itertools.chain(*after)) if keep else ()
                for part, next_one in pairs:
                    part.copy_(next_one)
            return output
        calls = self._calls if keep else self._trials
        if users != calls[0].B:
            for call in calls:
                call.B = users
        if self._encoding is None:
            self._rows[:users] = items
        else:
            for row, item, times in zip(self._inputs, items, moments):
                row[:] = sum(
                    table[place] for table, place in zip(self._tables, (item, *self._encoding.rows_of(*times)))
                )
        native.run_steps(calls, len(calls))
        return self._output[:users]

    @functools.cached_property
    def _trials(self) -> Any:
        """The calls, with their states after them written where nobody reads."""
        trials = type(self._calls).from_buffer_copy(self._calls)
        self._unread = [MixerState(*map(torch.empty_like, one)) for one in self.state]
        for call, unread in zip(trials, self._unread):
            call.conv_after, call.ssm_after = unread.conv_BDK.data_ptr(), unread.ssm.data_ptr()
        return trials
