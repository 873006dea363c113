"""The states of many users as rows of numbers, stepped together.

A row holds the vector of the history, which scores are made from, and behind it the state of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.serving.session import Moments, Stepper, clock_of

LARGEST_STEP = 64
"""So many users are stepped at once at most."""


class Unread(NamedTuple):
    """Events of a user that a state has not read."""

    ids: Sequence[int]
    """Their items, oldest first."""
    moments: Sequence[Moments] = ()
    """Their times, where the model reads them; the last one's say when it is asked."""
    behind: int = 0
    """How many of the user's newest events a state still lacks after these were stepped: those that are tried."""


class States:
    """Reads and steps the states of a model that carries one.

    Where the wait until the moment of asking enters at an event's input (``time: query``), a state has read all events
    but the newest, as in :class:`~recbole_ssm.serving.session.Session`. That one is tried: it is stepped with its wait,
    and the state is not kept.

    It is for one thread at a time, and its model must stay where it is.

    Args:
        model: a causal state-space model in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.hidden_size: int = model.item_embedding.weight.shape[1]
        self._shapes = [part.shape[1:] for one in model.alloc_state(1) for part in one]
        ends = np.cumsum([self.hidden_size, *(shape.numel() for shape in self._shapes)]).tolist()
        self._places = list(pairwise(ends))
        self.width: int = ends[-1]
        """Numbers of a row."""
        self._encoding = getattr(model, "time_encoding", None)
        self.tried = int(self._encoding is not None and self._encoding.asks_at_input)
        """How many of the newest events of a user are stepped without keeping the state: one or none."""
        self._start: np.ndarray | None = None
        self._stepper: Stepper | None = None
        self._items: Tensor | None = None

    @torch.inference_mode()
    def read(self, events: Unread) -> np.ndarray:
        """The row after a history of one event or more ``[width]``; what is tried is not read."""
        read = len(events.ids) - self.tried
        if not read:
            return self.start()
        device = self._model.item_embedding.weight.device
        clock = [clock_of(events.moments[:read], device)] if events.moments else []
        output, state = self._model.read(torch.tensor(events.ids[:read], device=device), *clock)
        parts = [output, *(part for one in state for part in one)]
        return torch.cat([part.float().reshape(-1).cpu() for part in parts]).numpy()

    @torch.inference_mode()
    def start(self) -> np.ndarray:
        """The row before the first event, whose vector stands for nothing ``[width]``; it is not to be written into."""
        if self._start is None:
            parts = [part.float().reshape(-1).cpu() for one in self._model.alloc_state(1) for part in one]
            self._start = torch.cat([torch.zeros(self.hidden_size), *parts]).numpy()
        return self._start

    def step(self, rows: Sequence[np.ndarray], events: Sequence[Unread], whole: Sequence[bool]) -> list[np.ndarray]:
        """The next events of each user, one or more.

        Args:
            rows: the state of each ``[width]``.
            events: those of each.
            whole: whose next state is wanted; of the others the vector is enough.

        Returns:
            The next row of each ``[width]``, or its vector ``[hidden_size]``.
        """
        found = list(rows)
        # At any time those who have events left are the first.
        order = sorted(range(len(rows)), key=lambda user: -len(events[user].ids))
        for begin in range(0, len(order), LARGEST_STEP):
            users = order[begin : begin + LARGEST_STEP]
            after = self._step(
                [rows[user] for user in users], [events[user] for user in users], [whole[u] for u in users]
            )
            for user, row in zip(users, after):
                found[user] = row
        return found

    @torch.inference_mode()
    def _step(self, rows: list[np.ndarray], events: list[Unread], whole: list[bool]) -> list[np.ndarray]:
        """:meth:`step` for a few users, those with the most events first."""
        if self._stepper is None:
            self._stepper = Stepper(self._model, self._model.alloc_state(LARGEST_STEP))
            parts = [part.view(LARGEST_STEP, -1) for one in self._stepper.state for part in one]
            # NumPy copies small parts in a fraction of PyTorch's time.
            plain = all(part.is_cpu and part.dtype == torch.float32 for part in parts)
            self._parts: list[Any] = [part.numpy() for part in parts] if plain else parts
        block = np.stack(rows)
        for part, (begin, end) in zip(self._parts, self._places):
            numbers = block[:, begin:end]
            part[: len(block)] = numbers if isinstance(part, np.ndarray) else torch.from_numpy(numbers).to(part)
        for number in range(len(events[0].ids) - self.tried):
            self._advance(block, [mine for mine in events if len(mine.ids) - self.tried > number], number)
        kept = [user for user, one in enumerate(whole) if one]
        for part, (begin, end) in zip(self._parts, self._places):
            numbers = part[kept]
            block[kept, begin:end] = numbers if isinstance(part, np.ndarray) else numbers.float().cpu().numpy()
        if self.tried:
            self._advance(block, events, -1, keep=False)
        return [row if one else row[: self.hidden_size] for row, one in zip(block, whole)]

    def _advance(self, block: np.ndarray, events: list[Unread], number: int, keep: bool = True) -> None:
        """Step one event of each of the first users, and put the vectors after it into their rows."""
        assert self._stepper is not None
        moments = [mine.moments[number] for mine in events] if events[0].moments else []
        vectors = self._stepper([mine.ids[number] for mine in events], moments, keep=keep)
        block[: len(events), : self.hidden_size] = vectors.float().cpu().numpy()

    def queries(self, rows: Sequence[np.ndarray], asked: Sequence[Moments | None]) -> np.ndarray:
        """The vectors whose products with those of the items are scores ``[n, hidden_size]``."""
        return self._queries(rows, asked).float().cpu().numpy()

    @torch.inference_mode()
    def _queries(self, rows: Sequence[np.ndarray], asked: Sequence[Moments | None]) -> Tensor:
        weight = self._model.item_embedding.weight
        vectors = torch.from_numpy(np.stack([row[: self.hidden_size] for row in rows])).to(weight)
        if self._encoding is not None and self._encoding.asks and not self.tried:
            # The rows of waits, hours and weekdays; those of gaps enter at the input.
            _, *places = zip(*(self._encoding.rows_of(*moments) for moments in asked if moments is not None))
            vectors = self._encoding.gated(vectors, [torch.tensor(place, device=weight.device) for place in places])
        found: Tensor = self._model.query_vectors(vectors)
        return found

    @torch.inference_mode()
    def scores(self, rows: Sequence[np.ndarray], asked: Sequence[Moments | None]) -> Tensor:
        """The scores of all items ``[n, V]`` after rows, of which the vectors are enough.

        Args:
            rows: those of users.
            asked: the times of the newest event of each, and of asking, where the model reads them.
        """
        if self._items is None:
            self._items = self._model.item_vectors().T
        return self._queries(rows, asked) @ self._items
