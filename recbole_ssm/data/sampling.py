"""Random draws that are a function of what they are for."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class Candidates:
    """Items to rank a target among, drawn for one row: none twice, and never the target.

    Each next item is drawn from those that are left, in proportion to its weight. RecBole draws with replacement.

    Args:
        count: how many, besides the target.
        weights: of each item ``[V]``; one of 0 is never drawn.
        seed: what the draws depend on besides the row.
    """

    def __init__(self, count: int, weights: np.ndarray, seed: tuple[int, ...]) -> None:
        self.count, self.seed = count, seed
        self._weights = weights
        self._bounds = weights.cumsum()
        self._bounds /= self._bounds[-1]
        # Where so many are taken, drawing until all are different would not end.
        self._most_of_all = 2 * count >= np.count_nonzero(weights)

    def draw(self, row: int, target: int) -> np.ndarray:
        """The target and its ``count`` candidates, for the row of that number."""
        generator = np.random.default_rng([*self.seed, row])
        if self._most_of_all:
            # The order in which independent exponential clocks of these rates ring.
            with np.errstate(divide="ignore"):
                rings = generator.standard_exponential(len(self._weights)) / self._weights
            rings[target] = -1
            return rings.argsort()[: 1 + self.count]
        chosen = np.array([target])
        while len(chosen) <= self.count:
            drawn = np.searchsorted(self._bounds, generator.random(2 * self.count), side="right")
            chosen = np.concatenate([chosen, drawn])
            chosen = chosen[np.sort(np.unique(chosen, return_index=True)[1])]
        return chosen[: 1 + self.count]


class LocalGenerator(torch.Generator):
    """A generator that a spawned worker replaces by a new one, since PyTorch's cannot be sent; no worker uses it."""

    def __reduce__(self) -> Any:
        return torch.Generator, ()


@contextlib.contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Python's and NumPy's global random states fixed by ``seed`` for a while, and put back.

    RecBole's negatives are drawn from NumPy's, its masks from Python's.
    """
    before = random.getstate(), np.random.get_state()
    mixed = np.random.SeedSequence(seed).generate_state(2)
    random.seed(int(mixed[0]))
    np.random.seed(mixed[1])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
