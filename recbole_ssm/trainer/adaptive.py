"""The batch size of a run, chosen while it trains from the gradients that training computes anyway."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed as dist

from recbole_ssm import distributed
from recbole_ssm.data.loader import Part, Step, TrainLoader
from recbole_ssm.errors import UserError
from recbole_ssm.figure import figure
from recbole_ssm.files import whole
from recbole_ssm.optim import AdaptiveBatchSize, GradientProbe, Measurement

COLUMNS = ("step", "batch_size", "step_size", "sigma", "nu", "L")  # sigma^2: the variance of a sample's gradient

OF_THE_RUN = {"batch_size", "rule", "budget", "processes"}  # AdaptiveBatchSize's arguments that follow from it


class AdaptiveBatch:
    """:class:`~recbole_ssm.optim.AdaptiveBatchSize` at work on a loader and a model.

    A step's batch goes through the model in parts, and where the rule says so it is measured on the way; the loader's
    next step has the size that follows. A row of figures is kept for every step that was measured.

    Several processes each take an equal share of a step's targets, in parts of their own; then their gradients meet,
    measured or not. They measure the same, and so decide the same. DistributedDataParallel has no part in this.

    Args:
        config: ``adaptive_batch``, ``adaptive_batch_args``, and what it cannot go with.
        loader: the training loader, whose batch size is the first.
        model: whose gradients are measured.
        epochs: that training takes; with the targets of one they are the rule's budget.
        scale: by what the backward pass multiplies gradients, for the sake of half precision.

    Raises:
        UserError: an option is impossible, or goes with something that fixes the size of a step in advance.
    """

    def __init__(self, config: Any, loader: TrainLoader, model: Any, epochs: int, scale: Callable[[], float]) -> None:
        if config["worker"]:
            raise UserError(
                f"adaptive_batch: needs worker: 0, got {config['worker']}; a worker would prepare steps before their "
                "size is known"
            )
        if config["gradient_accumulation_steps"] != 1:
            raise UserError(
                f"adaptive_batch: needs gradient_accumulation_steps: 1, got {config['gradient_accumulation_steps']}; "
                "set what fits into memory instead: adaptive_batch_args: {'memory_size': 1024}"
            )
        arguments = {"D": (config["learner_args"] or {}).get("D"), **(config["adaptive_batch_args"] or {})}
        rule, budget = config["adaptive_batch"], float(epochs * loader.plan.total)
        world = distributed.world_size()
        for key in sorted(OF_THE_RUN & set(arguments)):
            raise UserError(f"adaptive_batch_args: {key} is not for you to give; it follows from the run")
        try:
            self.sizes = AdaptiveBatchSize(loader.step, rule=rule, budget=budget, processes=world, **arguments)
        except TypeError as error:
            raise UserError(f"adaptive_batch_args: {error}") from error
        self.device, self.model = config["device"], model
        self.probe = GradientProbe(model.parameters(), dist.group.WORLD if world > 1 else None, scale)
        self.steps = loader.steps
        self.steps.sliced = True
        self.steps.batch_size = self.sizes.batch_size
        self.rows: list[list[float]] = []
        self._backward: Callable[[slice], Any] | None = None

    def gradients(
        self, step: Step, backward: Callable[[Part], list[float]], zero_grad: Callable[[], Any]
    ) -> tuple[list[float], list[Part]]:
        """Add up the gradients of a step.

        Returns:
            The terms of its loss, and the parts in which this process took its share of it through the model.
        """
        rank, world = distributed.rank(), distributed.world_size()
        first, stop = step.targets * rank // world, step.targets * (rank + 1) // world
        samples = stop - first
        parts: list[Part] = []

        def take(piece: slice) -> list[float]:
            batch = step.gather(slice(first + piece.start, first + piece.stop)).to(self.device)
            parts.append(Part((piece.stop - piece.start) / samples, batch))
            return backward(parts[-1])

        self._backward = take
        found = self.sizes.accumulate(samples, take, zero_grad, self.probe)
        terms = [samples / step.targets * sum(values) for values in zip(*found)]
        if world > 1:
            everyone = distributed.gather((terms, self.sizes.memory_size))
            terms = [sum(values) for values in zip(*(theirs for theirs, _ in everyone if theirs))]
            # memory that ran out on one process is short on all: so that all cut alike, and a resumed run does
            self.sizes.memory_size = min((memory for _, memory in everyone if memory), default=None)
            for buffer in self.model.buffers():  # a normalisation's running means
                dist.broadcast(buffer, src=0)
        return terms, parts[len(parts) - len(found) :]

    def measure(self) -> Measurement | None:
        """What the gradients say, before the optimiser's step; None where this step is not measured.

        From here on all processes have the step's gradient.
        """
        if self.sizes.due:
            return self.probe.measure()
        self.probe.share()
        return None

    def decide(self, measurement: Measurement | None, global_step: int, step_size: float) -> dict[str, float]:
        """After the optimiser's step: see what it changed, and set the size of the next one.

        Returns:
            The figures of a measured step by name; of others nothing.
        """
        assert self._backward is not None
        change = self.probe.change(self._backward)
        self.steps.batch_size = self.sizes.observe(measurement, change)
        self._backward = None
        if measurement is None:
            return {}
        nu, L = (self.sizes.fit.nu, self.sizes.fit.L) if self.sizes.fit else (math.nan, math.nan)
        self.rows.append([global_step, self.sizes.batch_size, step_size, math.sqrt(self.sizes.variance), nu, L])
        return dict(zip(COLUMNS[1:], self.rows[-1][1:]))

    def end_epoch(self) -> None:
        """Let the rule look back on the epoch."""
        self.steps.batch_size = self.sizes.end_epoch()

    def text(self) -> str:
        """The state of the rule in words."""
        fit, sizes = self.sizes.fit, self.sizes
        holder = f", nu {fit.nu:.2f}, L {fit.L:.3g}" if fit else ""
        return (
            f"batch size {sizes.batch_size}, sigma {math.sqrt(sizes.variance):.3g}, wanted {sizes.optimum:.3g}{holder}"
        )

    def save(self, folder: Path) -> bool:
        """Write ``batch_size.csv``, and ``batch_size.png`` if Matplotlib is installed; whether it is."""
        with whole(folder / "batch_size.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(self.rows)
        steps, sizes, step_sizes = list(zip(*self.rows))[:3] if self.rows else ((), (), ())
        try:
            with figure(folder / "batch_size.png", (8, 5)) as drawn:
                upper, lower = drawn.subplots(2, sharex=True)
                upper.step(steps, sizes, where="post")
                upper.set(ylabel="batch size", yscale="log")
                lower.plot(steps, step_sizes)
                lower.set(xlabel="step", ylabel="step size")
        except UserError:
            return False
        return True

    def state_dict(self) -> dict[str, Any]:
        """JSON, exactly."""
        rows = [[None if math.isnan(number) else number for number in row] for row in self.rows]
        return {"sizes": self.sizes.state_dict(), "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.sizes.load_state_dict(state["sizes"])
        self.rows = [[math.nan if number is None else number for number in row] for row in state["rows"]]
        self.steps.batch_size = self.sizes.batch_size
