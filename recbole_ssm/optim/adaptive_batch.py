"""How large a batch should be, decided while training from the noise of its gradient."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.optim.gradient_noise import Change, GradientProbe, Measurement, is_out_of_memory

RULES = ("hoelder", "norm_test", "inner_product")

# What is assumed of nu where steps of one length say nothing about it: mean and deviation.
_NU_PRIOR, _NU_SPREAD = 1.0, 0.5
_LEAST_CHANGES = 9


class HolderFit(NamedTuple):
    """The Hölder model |grad f(x + s) - grad f(x)| = L |s|^nu, as fitted to steps.

    ``nu`` is in [0, 1], ``nu_error`` its standard error, ``change_error`` the relative standard error of
    :meth:`change` at a typical step, and ``points`` the number of steps.
    """

    nu: float
    L: float
    nu_error: float
    change_error: float
    points: int

    def change(self, distance: float) -> float:
        """How far the gradient changes over a step of this length, by the model."""
        return self.L * distance**self.nu


def fit_holder(distances: Sequence[float], squares: Sequence[float], noises: Sequence[float]) -> HolderFit | None:
    """Fit the Hölder model by weighted least squares of log |change of the gradient| on log |step|.

    arXiv 2408.05606 names the method only; what follows is ours. The square y of a change, its noise subtracted, is
    unbiased but may be negative, and the logarithm of a noisy number is biased. So the line

        log m = log L^2 + 2 nu log r

    is fitted to y as a generalised linear model: iterated least squares on log m + (y - m) / m, with the weights
    (m / (m + noise))^2 at the line before. Where all steps have one length, the data cannot tell nu. A weak prior then
    holds it near 1, and the line still passes through the data.

    Args:
        distances: |x_{k+1} - x_k|, positive.
        squares: |g_{k+1} - g_k|^2, noise subtracted.
        noises: by how much noise would have raised them; they set the weights.

    Returns:
        The fit; None for fewer than 9 steps, or where the noise hides the change of the gradient.
    """
    n = len(distances)
    if n < _LEAST_CHANGES:
        return None
    x = np.log(np.asarray(distances, float))
    y, noise = np.asarray(squares, float), np.asarray(noises, float)
    slope = 2 * _NU_PRIOR
    start = y.mean() / np.exp(slope * (x - x.max())).mean()
    if start <= 0:
        return None
    # The line is level + slope * (x - x0).
    level, x0 = math.log(start), float(x.max())
    for _ in range(100):
        log_m = level + slope * (x - x0)
        m = np.exp(log_m)
        w = (m / (m + noise)) ** 2
        z = log_m + (y - m) / m
        x0_next, z0 = w @ x / w.sum(), w @ z / w.sum()
        dispersion = w @ (z - log_m) ** 2 / (n - 2)
        # The second term leaves the prior some weight where exact steps of one length have no dispersion.
        prior = dispersion / (2 * _NU_SPREAD) ** 2 + 1e-12 * w.sum()
        spread = w @ (x - x0_next) ** 2
        bend = (w @ ((x - x0_next) * (z - z0)) + prior * 2 * _NU_PRIOR) / (spread + prior)
        here = level + slope * (x0_next - x0)
        move, turn = float(np.clip(z0 - here, -1, 1)), float(np.clip(bend, 0, 2)) - slope
        level, slope, x0 = here + move, slope + turn, float(x0_next)
        if max(abs(move), abs(turn)) < 1e-10:
            break
    # The error of the change itself is half that of its square. Beyond this, L^2 is uncertain by a factor.
    level_error = math.sqrt(dispersion / w.sum()) / 2
    if not level_error < 0.5:
        return None
    nu_error = math.sqrt(dispersion / (spread + prior)) / 2
    return HolderFit(slope / 2, math.exp((level - slope * x0) / 2), nu_error, level_error, n)


@dataclass(eq=False)
class AdaptiveBatchSize:
    """Proposes the batch size from measured gradients (:class:`GradientProbe`), whatever the optimiser.

    Rules:
        ``hoelder``: arXiv 2408.05606 says that the batch grows when the gradient's variance plateaus, shrinks when the
            optimal size changes across epochs, and that weighted least squares estimate the Hölder coefficients, but
            gives no formula. Ours: after T steps of B samples, USGM's bound has the terms L D^(1+nu) / T^((1+nu)/2)
            and sigma D / sqrt(B T). With N = B T samples to spend, they are equal at

                B* = (sigma^2 N^nu / (L D^nu)^2)^(1 / (1 + nu))            (1)

            B rises toward B* once the smoothed variance sigma^2 has stopped falling. At the end of an epoch it falls
            toward the epoch's median B* if that is less. nu is measured over the length of a step but used over D, so
            B* is only an order of magnitude.
        ``norm_test``: B >= variance / (theta^2 |g|^2) (Byrd, Chin, Nocedal, Wu, 2012).            (2)
        ``inner_product``: the augmented inner-product test, B >= variance along g / (theta^2 |g|^2) and
            B >= variance across g / (nu^2 |g|^2) (Bollapragada, Byrd, Nocedal, 2018).            (3)
        Both tests only raise B: when ``patience`` measurements in a row ask for more, to the least that these asked
        for (AdaBatchGrad, arXiv 2402.05264).

    Args:
        batch_size: where to start, in samples of one step, over all processes and accumulated parts.
        rule: one of the above.
        D: for ``hoelder``, the distance that training goes; USGM's D, if that is the optimiser.
        budget: for ``hoelder``, N, the samples that training will see: epochs times targets.
        batch_min, batch_max: bounds of the batch size.
        memory_size: samples that one process takes through the model at once; a larger batch is accumulated. It is
            halved when memory runs out. None: no limit is known.
        growth: the largest factor of one change, up or down; one sample a process may always come or go.
        every: one batch in so many is measured. It takes ``chunks`` + 2 passes over smaller parts in place of one: with
            4 chunks half as much work again, and more where batches are so small that any pass takes the same time.
        chunks: the parts of a measured batch, at least.
        patience: measurements without a fall of the variance that make a plateau; measurements in a row that a test
            needs.
        smoothing: weight of the past in the smoothed variance.
        window: how many of the latest steps the Hölder fit sees.
        theta, nu: of the tests; the defaults are Bollapragada's.
        processes: how many share a batch; sizes are multiples of it, rounded down where ``batch_min`` allows.

    The state is plain numbers, and the same measurements give the same sizes: processes that share them agree.
    ``variance`` is the smoothed variance a sample, ``optimum`` the size that the rule asked for last (both nan at
    first), and ``fit`` the Hölder model of the latest steps.

    Raises:
        UserError: values are impossible, or contradict each other.
    """

    batch_size: int
    _: KW_ONLY
    rule: str = "hoelder"
    D: float | None = None
    budget: float | None = None
    batch_min: int = 1
    batch_max: int = 65536
    memory_size: int | None = None
    growth: float = 2.0
    every: int = 50
    chunks: int = 4
    patience: int = 3
    smoothing: float = 0.8
    window: int = 64
    theta: float = 0.9
    nu: float = 5.84
    processes: int = 1

    def __post_init__(self) -> None:
        self._check()
        self.batch_size = self._whole(self.batch_size)
        self.steps = 0
        self.variance = self.optimum = math.nan
        self.fit: HolderFit | None = None
        self._seen, self._lowest, self._stale = 0, math.inf, 0
        self._changes: list[Change] = []
        # What the rule asked for: in this epoch for hoelder, by the latest measurements in a row for the tests.
        self._asked: list[float] = []
        self._log = logging.getLogger(__name__)

    def _check(self) -> None:
        def require(key: str, fine: bool, what: str) -> None:
            if not fine:
                raise UserError(f"{key}: {getattr(self, key)!r}{what}")

        def number(key: str) -> bool:
            return isinstance(getattr(self, key), (int, float)) and not isinstance(getattr(self, key), bool)

        if self.rule not in RULES:
            hint = did_you_mean(self.rule, RULES)
            raise UserError(f"adaptive_batch: '{self.rule}' is not one of {', '.join(RULES)}{hint}")
        # Fewer chunks give no variance, and a smaller window no fit.
        least = {"chunks": 2, "window": _LEAST_CHANGES}
        for key in ("batch_size", "batch_min", "batch_max", "memory_size", "every", "patience", "processes", *least):
            value, low = getattr(self, key), least.get(key, 1)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
            unlimited = key == "memory_size" and value is None
            require(key, whole or unlimited, f" is not a whole number from {low} up")
        require("growth", number("growth") and self.growth > 1, "; give a factor above 1")
        fine = number("smoothing") and 0 <= self.smoothing < 1
        require("smoothing", fine, "; give a weight from 0 up and below 1")
        for key in ("theta", "nu"):
            require(key, number(key) and getattr(self, key) > 0, "; give a positive number")
        size, low, high, processes = self.batch_size, self.batch_min, self.batch_max, self.processes
        require("batch_size", processes <= size, f" samples for {processes} processes; give at least one each")
        if not low <= size <= high:
            sizes = f"{low}, {size}, {high}"
            raise UserError(f"batch_min, batch_size, batch_max: {sizes} do not rise; give bounds around the size")
        if -(-low // processes) > high // processes:
            raise UserError(f"batch_min, batch_max: no multiple of {processes} processes is from {low} to {high}")
        if self.rule == "hoelder":
            for key in ("D", "budget"):
                require(
                    key,
                    number(key) and 0 < getattr(self, key) < math.inf,
                    "; adaptive_batch 'hoelder' needs a positive number",
                )

    # ---- a batch

    @property
    def due(self) -> bool:
        """Whether the next batch is to be measured."""
        return self.steps % self.every == 0

    def parts(self, samples: int, measured: bool = False) -> list[slice]:
        """Slices of nearly equal length in which a process takes its ``samples`` through the model; none for 0."""
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
        """Add up the gradients of a batch, part by part; where memory runs out, again in parts of half the size.

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
            # Here, and not in the handler, whose traceback would hold the tensors of the failed part.
            results.clear()
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
        """Take in one step, with its measurement and the change that it made if it was :attr:`due`.

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
        """Shrink to the epoch's median optimum where that is less (only ``hoelder`` does); returns the batch size."""
        if self.rule == "hoelder":
            if self._asked and (median := float(np.median(self._asked))) < self.batch_size:
                self._set(median, "the epoch's median optimum is lower")
            self._asked = []
        return self.batch_size

    def _ask(self, measurement: Measurement) -> float:
        """The batch size that the rule asks for, (1), (2) or (3), without bounds; nan if it cannot tell."""
        if self.rule == "hoelder":
            if self.fit is None:
                return math.nan
            assert self.D is not None and self.budget is not None
            optimum = self.variance * self.budget**self.fit.nu / self.fit.change(self.D) ** 2
            return float(optimum ** (1 / (1 + self.fit.nu)))
        square = measurement.gradient_square
        if square == 0:
            return math.nan
        if self.rule == "norm_test":
            return measurement.variance / (self.theta**2 * square)
        across = measurement.variance - measurement.along
        return max(measurement.along / self.theta**2, across / self.nu**2) / square

    def _set(self, wanted: float, why: str) -> None:
        before = self.batch_size
        least = min(before / self.growth, before - self.processes)
        most = max(before * self.growth, before + self.processes)
        self.batch_size = self._whole(min(max(wanted, least), most))
        self._stale = 0
        if self.batch_size != before:
            fit = f"; nu {self.fit.nu:.2f} +- {self.fit.nu_error:.2f}, L {self.fit.L:.3g}" if self.fit else ""
            self._log.info(
                f"batch size {before} -> {self.batch_size} at step {self.steps}: {why}; wanted {wanted:.4g}{fit}"
            )

    def _whole(self, size: float) -> int:
        """The nearest possible size: a multiple of the processes within the bounds."""
        size = min(max(size, self.batch_min), self.batch_max)
        return max(round(size) // self.processes, -(-self.batch_min // self.processes)) * self.processes

    # ---- state

    # All that decisions depend on beyond the arguments and the changes.
    _STATE = ("batch_size", "memory_size", "steps", "variance", "optimum", "_seen", "_lowest", "_stale", "_asked")

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON can hold it: nan and inf are None."""
        state = {name.lstrip("_"): _plain(getattr(self, name)) for name in self._STATE}
        return {**state, "changes": [list(change) for change in self._changes]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, exactly; a batch size that the bounds here rule out comes back to them."""
        absent = {"variance": math.nan, "optimum": math.nan, "_lowest": math.inf}
        for name in self._STATE:
            value = state_dict[name.lstrip("_")]
            setattr(self, name, absent.get(name) if value is None else value)
        self.batch_size = self._whole(self.batch_size)
        self._asked = list(self._asked)
        self._changes = [Change(*change) for change in state_dict["changes"]]
        self.fit = fit_holder(*zip(*self._changes)) if self._changes else None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
