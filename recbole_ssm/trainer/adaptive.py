"""The batch size of a run, chosen while it trains from the gradients that training computes anyway."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recbole_ssm import distributed
from recbole_ssm.data.loader import Part, Step, TrainLoader
from recbole_ssm.errors import UserError
from recbole_ssm.files import whole
from recbole_ssm.optim import AdaptiveBatchSize, GradientProbe

COLUMNS = ("step", "batch_size", "step_size", "variance", "nu", "L")


class AdaptiveBatch:
    """:class:`~recbole_ssm.optim.AdaptiveBatchSize` at work on a loader and a model.

    Where training says so, a step's batch goes through the model in parts, and is measured on the way; the loader's
    next step has the size that follows. A row of figures is kept for every step that was measured.

    Args:
        config: ``adaptive_batch``, ``adaptive_batch_args``, and what it cannot go with.
        loader: the training loader, whose batch size is the first.
        model: whose gradients are measured.
        epochs: that training takes; with the targets of one they are the rule's budget.

    Raises:
        UserError: an option is impossible, or goes with something that hides the gradient of single parts.
    """

    def __init__(self, config: Any, loader: TrainLoader, model: Any, epochs: int) -> None:
        unfit = {"worker": 0, "enable_scaler": False, "gradient_accumulation_steps": 1}
        for key, needed in unfit.items():
            if config[key] != needed:
                raise UserError(f"adaptive_batch: needs {key}: {needed}, got {config[key]}")
        if distributed.world_size() > 1:
            raise UserError("adaptive_batch: one process alone, so far; start without torchrun")
        arguments = {"D": (config["learner_args"] or {}).get("D"), **(config["adaptive_batch_args"] or {})}
        rule, budget = config["adaptive_batch"], float(epochs * loader.plan.total)
        try:
            self.sizes = AdaptiveBatchSize(loader.step, rule=rule, budget=budget, **arguments)
        except TypeError as error:
            raise UserError(f"adaptive_batch_args: {error}") from error
        self.device = config["device"]
        self.probe = GradientProbe(model.parameters())
        self.steps = loader.steps
        self.steps.sliced = True
        self.steps.batch_size = self.sizes.batch_size
        self.rows: list[list[float]] = []
        self._backward: Callable[[slice], Any] | None = None

    def gradients(
        self, step: Step, backward: Callable[[Part], list[float]], zero_grad: Callable[[], Any]
    ) -> tuple[list[float], list[Part]]:
        """Add up the gradients of a step; its loss terms, and the parts in which it went through the model."""
        parts: list[Part] = []

        def take(piece: slice) -> list[float]:
            parts.append(Part((piece.stop - piece.start) / step.targets, step.gather(piece).to(self.device)))
            return backward(parts[-1])

        self._backward = take
        found = self.sizes.accumulate(step.targets, take, zero_grad, self.probe)
        return [sum(terms) for terms in zip(*found)], parts[-len(found) :]

    def measure(self) -> Any:
        """What the gradients say, before the optimiser's step; None where this step is not measured."""
        return self.probe.measure() if self.sizes.due else None

    def decide(self, measurement: Any, global_step: int, step_size: float) -> None:
        """After the optimiser's step: see what it changed, and set the size of the next one."""
        assert self._backward is not None
        change = self.probe.change(self._backward)
        self.steps.batch_size = self.sizes.observe(measurement, change)
        self._backward = None
        if measurement is not None:
            fit = self.sizes.fit
            figures = [self.sizes.variance, fit.nu if fit else math.nan, fit.L if fit else math.nan]
            self.rows.append([global_step, self.sizes.batch_size, step_size, *figures])

    def end_epoch(self) -> None:
        """Let the rule look back on the epoch."""
        self.steps.batch_size = self.sizes.end_epoch()

    def text(self) -> str:
        """The state of the rule in words."""
        fit, sizes = self.sizes.fit, self.sizes
        holder = f", nu {fit.nu:.2f}, L {fit.L:.3g}" if fit else ""
        return f"batch size {sizes.batch_size}, variance {sizes.variance:.3g}, wanted {sizes.optimum:.3g}{holder}"

    def save(self, folder: Path) -> bool:
        """Write ``batch_size.csv``, and ``batch_size.png`` if Matplotlib is installed; whether it is."""
        with whole(folder / "batch_size.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(self.rows)
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return False
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, sharex=True)
        steps, sizes, step_sizes = list(zip(*self.rows))[:3] if self.rows else ((), (), ())
        upper.step(steps, sizes, where="post")
        upper.set(ylabel="batch size", yscale="log")
        lower.plot(steps, step_sizes)
        lower.set(xlabel="step", ylabel="step size")
        with whole(folder / "batch_size.png") as path:
            figure.savefig(path, format="png")
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
