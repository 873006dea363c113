"""The states of many users as rows of numbers, stepped together.

A row holds the vector of the history, which scores are made from, and behind it the state of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.serving.session import Stepper

LARGEST_STEP = 64
"""So many users are stepped at once at most."""


class States:
    """Reads and steps the states of a model that carries one.

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
        self._steppers: dict[int, Stepper] = {}

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> np.ndarray:
        """The row after a history of one item or more ``[width]``."""
        output, state = self._model.read(torch.tensor(ids, device=self._model.item_embedding.weight.device))
        parts = [output, *(part for one in state for part in one)]
        return torch.cat([part.float().reshape(-1).cpu() for part in parts]).numpy()

    @torch.inference_mode()
    def start(self) -> np.ndarray:
        """The row before the first event, whose vector stands for nothing ``[width]``."""
        parts = [part.float().reshape(-1).cpu() for one in self._model.alloc_state(1) for part in one]
        return torch.cat([torch.zeros(self.hidden_size), *parts]).numpy()

    @torch.inference_mode()
    def step(self, rows: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """One more event of each user: rows ``[n, width]`` and item ids ``[n]`` -> the next rows."""
        after = np.empty_like(rows)
        begin = 0
        while begin < len(rows):
            # Powers of two, so that a few steppers do for any number of users.
            size = min(LARGEST_STEP, 1 << (len(rows) - begin).bit_length() - 1)
            part = slice(begin, begin + size)
            self._step(torch.from_numpy(rows[part]), ids[part], torch.from_numpy(after[part]))
            begin += size
        return after

    def _step(self, before: Tensor, ids: Sequence[int], after: Tensor) -> None:
        if len(ids) not in self._steppers:
            self._steppers[len(ids)] = Stepper(self._model, self._model.alloc_state(len(ids)))
        stepper = self._steppers[len(ids)]
        parts = [part for one in stepper.state for part in one]
        for part, shape, (begin, end) in zip(parts, self._shapes, self._places):
            part.copy_(before[:, begin:end].reshape(-1, *shape))
        after[:, : self.hidden_size] = stepper(ids)
        # A stepper that runs the formula in PyTorch has new tensors by now.
        parts = [part for one in stepper.state for part in one]
        for part, (begin, end) in zip(parts, self._places):
            after[:, begin:end] = part.reshape(len(ids), -1)

    @torch.inference_mode()
    def scores(self, rows: np.ndarray) -> Tensor:
        """The scores of all items ``[n, V]`` after rows ``[n, width]``."""
        items = self._model.item_vectors()
        return self._model.query_vectors(torch.from_numpy(rows[:, : self.hidden_size]).to(items)) @ items.T
