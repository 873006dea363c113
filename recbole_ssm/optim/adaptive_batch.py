"""How large a batch should be, decided while training from the noise of its gradient."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.optim.gradient_noise import Change, GradientProbe, Measurement, is_out_of_memory

RULES = ("hoelder", "norm_test", "inner_product")

_NU_PRIOR, _NU_SPREAD = 1.0, 0.5  # of the exponent where steps of one length say nothing about it: smooth, give or take
_LEAST_CHANGES = 9


class HolderFit(NamedTuple):
    """|grad f(x + s) - grad f(x)| = L |s|^nu, as fitted to steps."""

    nu: float  # in [0, 1]
    L: float
    nu_error: float  # standard error of nu
    change_error: float  # relative standard error of change() at a typical step
    points: int

    def change(self, distance: float) -> float:
        """The modelled change of the gradient over a step of this length."""
        return self.L * distance**self.nu


def fit_holder(distances: Sequence[float], squares: Sequence[float], noises: Sequence[float]) -> HolderFit | None:
    """Weighted least squares of log |change of the gradient| on log |step| (ours; the paper names the method alone).

    A noise-free square y is unbiased but may be negative, and the logarithm of a noisy number is biased. So the line
    log m = log L^2 + 2 nu log r is fitted to y as a generalised linear model: least squares are iterated on
    log m + (y - m) / m with the weights (m / (m + noise))^2 at the line before. Where all steps have one length, nu
    cannot be told; a weak prior then holds it near 1, and the line still passes through the data.

    Args:
        distances: |x_{k+1} - x_k|, positive.
        squares: |g_{k+1} - g_k|^2, noise subtracted.
        noises: by how much noise would have raised them; they set the weights.

    Returns:
        The fit, or None of fewer than 9 steps, or where the noise hides the change of the gradient.
    """
    n = len(distances)
    if n < _LEAST_CHANGES:
        return None
    x, y, noise = np.log(np.asarray(distances, dtype=float)), np.asarray(squares, float), np.asarray(noises, float)
    slope = 2 * _NU_PRIOR
    start = y.mean() / np.exp(slope * (x - x.max())).mean()
    if start <= 0:
        return None
    level, x0 = math.log(start), float(x.max())  # the line is level + slope * (x - x0)
    for _ in range(100):
        log_m = level + slope * (x - x0)
        m = np.exp(log_m)
        w = (m / (m + noise)) ** 2
        z = log_m + (y - m) / m
        x0_next, z0 = w @ x / w.sum(), w @ z / w.sum()
        dispersion = w @ (z - log_m) ** 2 / (n - 2)
        prior = dispersion / (2 * _NU_SPREAD) ** 2 + 1e-12 * w.sum()  # never quite silent: exact steps of one length
        spread = w @ (x - x0_next) ** 2
        bend = (w @ ((x - x0_next) * (z - z0)) + prior * 2 * _NU_PRIOR) / (spread + prior)
        here = level + slope * (x0_next - x0)
        move, turn = float(np.clip(z0 - here, -1, 1)), float(np.clip(bend, 0, 2)) - slope
        level, slope, x0 = here + move, slope + turn, float(x0_next)
        if max(abs(move), abs(turn)) < 1e-10:
            break
    level_error = math.sqrt(dispersion / w.sum()) / 2
    if not level_error < 0.5:  # of the change itself; its square is uncertain by a factor
        return None
    nu_error = math.sqrt(dispersion / (spread + prior)) / 2
    return HolderFit(slope / 2, math.exp((level - slope * x0) / 2), nu_error, level_error, n)


class AdaptiveBatchSize:
    """Proposes the batch size from measured gradients (:class:`GradientProbe`), whatever the optimiser.

    Rules:
        ``hoelder``: arXiv 2408.05606 says that the batch grows when the gradient's variance plateaus, shrinks when the
            optimal size changes across epochs, and that weighted least squares estimate the Hölder coefficients; it
            gives no formula. The formula is ours: USGM's bound after T steps of B samples has the terms
            L D^(1+nu) / T^((1+nu)/2) and sigma D / sqrt(B T); they are equal, with N = B T samples to spend, at

                B* = (sigma^2 N^nu / (L D^nu)^2)^(1 / (1 + nu))

            B rises toward B* once the smoothed variance sigma^2 has stopped falling, and falls toward the epoch's
            median B* at its end, where that is below B. nu reaches from the length of a step to D here, so B* is an
            order of magnitude, and no more.
        ``norm_test``: B >= variance / (theta^2 |g|^2) (Byrd, Chin, Nocedal, Wu, 2012).
        ``inner_product``: the augmented inner-product test, B >= variance along g / (theta^2 |g|^2) and
            B >= variance across g / (nu^2 |g|^2) (Bollapragada, Byrd, Nocedal, 2018).
        Both tests only ever raise B, once ``patience`` measurements in a row ask for it, to the least that these asked
        for (AdaBatchGrad, arXiv 2402.05264).

    Args:
        batch_size: where to start, in samples of one step, over all processes and accumulated parts.
        rule: one of the above.
        D: for ``hoelder``, the distance that training goes; USGM's D, if that is the optimiser.
        budget: for ``hoelder``, N, the samples that training will see: epochs times targets.
        batch_min, batch_max: bounds of the batch size.
        memory_size: samples that one process takes through the model at once; a larger batch is accumulated. It is
            halved when memory runs out. None: no limit is known.
        growth: the largest factor of one change, up or down.
        every: one batch in so many is measured. It takes ``chunks`` + 2 passes over smaller parts in place of one: half
            as much work again for 4 chunks, but more where batches are so small that any pass takes the same time.
        chunks: the parts of a measured batch, at least.
        patience: measurements without a fall of the variance that make a plateau; measurements in a row that a test
            needs.
        smoothing: weight of the past in the smoothed variance.
        window: the latest steps that the Hölder fit sees.
        theta, nu: of the tests; the defaults are Bollapragada's.
        processes: that share a batch; sizes are multiples of it, rounded down where ``batch_min`` allows.

    All state is plain numbers. The same measurements give the same sizes: processes that share them agree.

    Raises:
        UserError: values that are not possible, or contradict each other.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        rule: str = "hoelder",
        D: float | None = None,
        budget: float | None = None,
        batch_min: int = 1,
        batch_max: int = 65536,
        memory_size: int | None = None,
        growth: float = 2.0,
        every: int = 50,
        chunks: int = 4,
        patience: int = 3,
        smoothing: float = 0.8,
        window: int = 64,
        theta: float = 0.9,
        nu: float = 5.84,
        processes: int = 1,
    ) -> None:
        if rule not in RULES:
            raise UserError(f"adaptive_batch: '{rule}' is not one of {', '.join(RULES)}{did_you_mean(rule, RULES)}")
        memory = 1 if memory_size is None else memory_size
        counts = {"batch_size": batch_size, "batch_min": batch_min, "batch_max": batch_max, "memory_size": memory}
        counts |= {"every": every, "patience": patience, "processes": processes, "chunks": chunks, "window": window}
        for key, value in counts.items():
            least = {"chunks": 2, "window": _LEAST_CHANGES}.get(key, 1)  # below these no variance and no fit
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{key}: {value!r} is not a whole number from {least} up")
        if not growth > 1:
            raise UserError(f"growth: {growth}; give a factor above 1")
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing: {smoothing}; give a weight from 0 up and below 1")
        for key, number in (("theta", theta), ("nu", nu)):
            if not number > 0:
                raise UserError(f"{key}: {number}; give a positive number")
        if processes > batch_size:
            raise UserError(f"batch_size: {batch_size} samples for {processes} processes; give at least one each")
        if not batch_min <= batch_size <= batch_max:
            raise UserError(
                f"batch_min, batch_size, batch_max: {batch_min}, {batch_size}, {batch_max} do not rise; "
                "give bounds around the size"
            )
        if -(-batch_min // processes) > batch_max // processes:
            raise UserError(
                f"batch_min, batch_max: no multiple of {processes} processes is from {batch_min} to {batch_max}"
            )
        if rule == "hoelder":
            for key, length in (("D", D), ("budget", budget)):
                if length is None or not 0 < length < math.inf:
                    raise UserError(f"{key}: {length}; adaptive_batch 'hoelder' needs a positive number")
        self.D, self.budget = D or 0.0, budget or 0.0
        self.rule, self.batch_min, self.batch_max, self.growth = rule, batch_min, batch_max, growth
        self.every, self.chunks, self.patience, self.smoothing = every, chunks, patience, smoothing
        self.window, self.theta, self.nu, self.processes = window, theta, nu, processes
        self.batch_size = self._whole(batch_size)
        self.memory_size = memory_size
        self.steps = 0
        self.variance = math.nan  # smoothed, per sample
        self.optimum = math.nan  # what the rule asked for last
        self._seen, self._lowest, self._stale = 0, math.inf, 0
        self.fit: HolderFit | None = None  # to the latest steps
        self._changes: list[Change] = []
        self._asked: list[float] = []  # of this epoch for hoelder, the latest in a row for the tests
        self._log = logging.getLogger(__name__)

    # ---- a batch

    @property
    def due(self) -> bool:
        """Whether the next batch is to be measured."""
        return self.steps % self.every == 0

    def parts(self, samples: int, measured: bool = False) -> list[slice]:
        """How a process takes its ``samples`` through the model: slices of nearly equal length, in order; none of 0."""
        if not samples:
            return []
        count = -(-samples // (self.memory_size or samples))
        count = min(max(count, self.chunks if measured else 1), samples)
        bounds = [samples * i // count for i in range(count + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def accumulate(
        self,
        samples: int,
        backward: Callable[[slice], Any],
        zero_grad: Callable[[], Any],
        probe: GradientProbe | None = None,
    ) -> list[Any]:
        """Add up the gradients of a batch, part by part; out of memory, again in parts of half the size.

        Args:
            samples: of this process's batch.
            backward: takes a slice of the batch, computes its mean loss times len / samples, and the gradients.
            zero_grad: clears the gradients, before the first part.
            probe: sees each part if the batch is :attr:`due`.

        Returns:
            What ``backward`` returned, part by part.

        Raises:
            UserError: a single sample does not fit into memory.
        """
        measured = probe is not None and self.due
        while True:
            zero_grad()
            if probe is not None:
                probe.start(samples)
            results: list[Any] = []
            failed = 0
            for part in self.parts(samples, measured):
                try:
                    results.append(probe.run(backward, part) if measured and probe else backward(part))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = part.stop - part.start
                    break
            if not failed:
                return results
            results.clear()  # out of the handler, whose traceback would hold the tensors of the failed part
            self.out_of_memory(failed)

    def out_of_memory(self, samples: int) -> None:
        """Halve ``memory_size``, after ``samples`` did not fit.

        Raises:
            UserError: it was a single sample.
        """
        if samples <= 1:
            raise UserError("out of memory with one sample at once; shorten MAX_ITEM_LIST_LENGTH or shrink the model")
        self.memory_size = -(-samples // 2)
        self._log.warning(
            f"out of memory with {samples} samples at once; going on with {self.memory_size}, the batch of "
            f"{self.batch_size} is accumulated"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- decisions

    def observe(self, measurement: Measurement | None = None, change: Change | None = None) -> int:
        """Take in one step, with its measurement and change if it was :attr:`due`.

        Returns:
            The batch size from here on.
        """
        self.steps += 1
        if change is not None and change.distance > 0:
            self._changes = [*self._changes, change][-self.window :]
            self.fit = fit_holder(*zip(*self._changes))
        if measurement is None:
            return self.batch_size
        self._seen += 1
        share = (1 - self.smoothing) / (1 - self.smoothing**self._seen)
        past = 0.0 if self._seen == 1 else self.variance
        self.variance = past + share * (measurement.variance - past)
        self._stale = 0 if self.variance < 0.99 * self._lowest else self._stale + 1
        self._lowest = min(self._lowest, self.variance)
        self.optimum = self._ask(measurement)
        if not math.isnan(self.optimum):
            self._asked.append(self.optimum)
        if self.rule == "hoelder":
            if self._stale >= self.patience and self.optimum > self.batch_size:
                self._set(self.optimum, f"the gradient's variance {self.variance:.3g} has stopped falling")
        else:
            self._asked = self._asked[-self.patience :]
            if len(self._asked) == self.patience and min(self._asked) > self.batch_size:
                self._set(min(self._asked), f"{self.rule} failed {self.patience} times")
                self._asked = []
        return self.batch_size

    def end_epoch(self) -> int:
        """Shrink if the epoch's optimum lies below the batch size (``hoelder`` alone); returns the batch size."""
        if self.rule == "hoelder":
            if self._asked and (median := float(np.median(self._asked))) < self.batch_size:
                self._set(median, "the epoch's median optimum is lower")
            self._asked = []
        return self.batch_size

    def _ask(self, measurement: Measurement) -> float:
        """The batch size that the rule wants, unbounded; nan if it cannot tell."""
        if self.rule == "hoelder":
            if self.fit is None:
                return math.nan
            return float(
                (self.variance * self.budget**self.fit.nu / self.fit.change(self.D) ** 2) ** (1 / (1 + self.fit.nu))
            )
        square = measurement.gradient_square
        if square == 0:
            return math.nan
        if self.rule == "norm_test":
            return measurement.variance / (self.theta**2 * square)
        across = measurement.variance - measurement.along
        return max(measurement.along / self.theta**2, across / self.nu**2) / square

    def _set(self, wanted: float, why: str) -> None:
        before = self.batch_size
        bounded = min(max(wanted, before / self.growth), before * self.growth)
        self.batch_size = self._whole(min(max(bounded, self.batch_min), self.batch_max))
        self._stale = 0
        if self.batch_size != before:
            fit = f"; nu {self.fit.nu:.2f} +- {self.fit.nu_error:.2f}, L {self.fit.L:.3g}" if self.fit else ""
            self._log.info(
                f"batch size {before} -> {self.batch_size} at step {self.steps}: {why}; wanted {wanted:.4g}{fit}"
            )

    def _whole(self, size: float) -> int:
        return max(round(size) // self.processes, -(-self.batch_min // self.processes)) * self.processes

    # ---- state

    _STATE = ("batch_size", "memory_size", "steps", "variance", "optimum", "_seen", "_lowest", "_stale", "_asked")

    def state_dict(self) -> dict[str, Any]:
        """Everything that decisions depend on, beyond the arguments, as JSON can hold it (nan and inf as None)."""
        state = {name.lstrip("_"): _plain(getattr(self, name)) for name in self._STATE}
        return {**state, "changes": [list(change) for change in self._changes]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, exactly."""
        for name in self._STATE:
            setattr(self, name, state_dict[name.lstrip("_")])
        self._asked = list(self._asked)
        self.variance = math.nan if self.variance is None else self.variance
        self.optimum = math.nan if self.optimum is None else self.optimum
        self._lowest = math.inf if self._lowest is None else self._lowest
        self._changes = [Change(*change) for change in state_dict["changes"]]
        self.fit = fit_holder(*zip(*self._changes)) if self._changes else None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
