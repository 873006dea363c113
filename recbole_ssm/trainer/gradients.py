"""The gradient of a step, added up over the parts in which the model sees the step's targets.

:class:`Gradients` takes the parts as the loader cuts them. :class:`AdaptiveGradients` cuts them
itself, and chooses the batch size of the run while it trains, from the gradients that training
computes anyway.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from recbole_ssm import distributed
from recbole_ssm.data.loader import Part, Step, TrainLoader, on_device
from recbole_ssm.errors import UserError
from recbole_ssm.figure import figure
from recbole_ssm.files import whole
from recbole_ssm.optim import AdaptiveBatchSize, GradientProbe, Measurement
from recbole_ssm.optim.gradient_noise import is_out_of_memory
from recbole_ssm.trainer.fitting import what_fits
from recbole_ssm.trainer.learner import Learner
from recbole_ssm.trainer.tiled import loss_of

Backward = Callable[[Part], Tensor]
"""Takes a part through the model and back; the terms ``[n]`` of its share of the loss, in float64."""

COLUMNS = ("step", "batch_size", "step_size", "sigma", "nu", "L")
"""The figures of a measured step; sigma squared is the variance of a single sample's gradient."""


class Gradients:
    """Takes the parts of a step one after the other; several processes average their gradients in the last part.

    Args:
        config: ``train_batch_size``; with ``adaptive_batch`` the processes are left to
            :class:`AdaptiveGradients`.
        model: whose gradients are added up.
        learner: holds them, and takes the steps.
    """

    def __init__(self, config: Any, model: Any, learner: Learner) -> None:
        self.learner = learner
        self.loss: Any = _Loss(model)
        """Computes the loss of a batch, or the terms of the loss."""
        self.kept = False
        """Whether the tensors of the gradients stay from step to step, where a recorded step finds them again."""
        self._batch_size: int = config["train_batch_size"]
        if distributed.world_size() > 1 and not config["adaptive_batch"]:
            self.loss = DistributedDataParallel(self.loss, find_unused_parameters=True)

    @property
    def batch_size(self) -> int:
        """Targets of the next step."""
        return self._batch_size

    def add_up(self, step: Step, backward: Backward) -> tuple[Tensor, Step]:
        """Leave a step's gradient in the model's parameters.

        Returns:
            The terms of the step's loss, and the step with the parts in which it was taken.

        Raises:
            UserError: a part does not fit into memory; with several processes the error stays what it is.
        """
        self.learner.optimizer.zero_grad(set_to_none=not self.kept)
        terms: Any = 0
        for part in step.parts:
            last = part is step.parts[-1]
            with contextlib.nullcontext() if last or not hasattr(self.loss, "no_sync") else self.loss.no_sync():
                try:
                    terms = terms + backward(part)
                    continue
                except Exception as error:
                    if not is_out_of_memory(error) or distributed.world_size() > 1:
                        raise
            # Here, and not in the handler, whose traceback would hold the tensors of the failed part.
            raise UserError(what_fits(part, len(step.parts), backward, self.learner.optimizer))
        return terms, step

    def end_step(self, global_step: int) -> dict[str, float]:
        """See what the optimiser's step has changed, and choose the next one; figures of the
        step by name.
        """
        return {}

    def end_epoch(self, folder: Path | None) -> None:
        """Look back on the epoch, and write what there is to tell into the run's folder, if it
        has one.
        """

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint must hold, in JSON's terms."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""


class AdaptiveGradients(Gradients):
    """:class:`~recbole_ssm.optim.AdaptiveBatchSize` at work on a loader and a model.

    A step's batch goes through the model in parts, and where the rule says so it is measured on
    the way; the loader's next step has the size that follows. A row of figures is kept for
    every step that was measured.

    Several processes each take an equal share of a step's targets, in parts of their own; then
    their gradients meet, measured or not. They measure the same, and so decide the same.
    DistributedDataParallel has no part in this.

    Args:
        config: ``adaptive_batch``, ``adaptive_batch_args``, and the options that it cannot go
            with.
        model: whose gradients are measured.
        learner: holds them, and takes the steps.
        loader: the training loader, whose batch size is the first.
        epochs: how many epochs training takes; with the targets of one they are the rule's
            budget.

    Raises:
        UserError: an option is impossible, or goes with something that fixes the size of a step
            in advance.
    """

    def __init__(self, config: Any, model: Any, learner: Learner, loader: TrainLoader, epochs: int) -> None:
        super().__init__(config, model, learner)
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
        world = distributed.world_size()
        arguments = {"D": (config["learner_args"] or {}).get("D"), **(config["adaptive_batch_args"] or {})}
        of_the_run = {
            "batch_size": loader.step,
            "rule": config["adaptive_batch"],
            "budget": float(epochs * loader.plan.total),
            "processes": world,
        }
        for key in sorted(of_the_run.keys() & arguments):
            raise UserError(f"adaptive_batch_args: {key} is not for you to give; it follows from the run")
        try:
            self.sizes = AdaptiveBatchSize(**of_the_run, **arguments)
        except TypeError as error:
            raise UserError(f"adaptive_batch_args: {error}") from error
        self.device, self.model = config["device"], model
        group = dist.group.WORLD if world > 1 else None
        self.probe = GradientProbe(model.parameters(), group, learner.scaler.get_scale)
        self.steps = loader.steps
        self.steps.sliced = True
        self.steps.batch_size = self.sizes.batch_size
        self.rows: list[list[float]] = []
        self._measurement: Measurement | None = None
        self._take: Callable[[slice], Any] | None = None

    @property
    def batch_size(self) -> int:
        """Targets of the next step."""
        return int(self.sizes.batch_size)

    def add_up(self, step: Step, backward: Backward) -> tuple[Tensor, Step]:
        """As :meth:`Gradients.add_up`; the gradients of the processes are averaged here."""
        rank, world = distributed.rank(), distributed.world_size()
        first, stop = step.targets * rank // world, step.targets * (rank + 1) // world
        samples = stop - first
        parts: list[Part] = []

        def take(piece: slice) -> Tensor:
            batch = on_device(step.gather(slice(first + piece.start, first + piece.stop)), self.device)
            parts.append(Part((piece.stop - piece.start) / samples, batch))
            return backward(parts[-1])

        self._take = take
        found = self.sizes.accumulate(samples, take, self.learner.optimizer.zero_grad, self.probe)
        terms: Any = samples / step.targets * sum(found)
        if world > 1:
            agreed = self._agree(terms.tolist() if found else [])
            terms = torch.tensor(agreed, dtype=torch.float64, device=self.device)
        if self.sizes.due:
            self._measurement = self.probe.measure()
        else:
            self._measurement = None
            self.probe.share()
        # Parts that were tried before memory ran out do not count.
        return terms, step._replace(parts=parts[len(parts) - len(found) :])

    def _agree(self, terms: list[float]) -> list[float]:
        """The terms of the loss over all processes, which are left in one state."""
        everyone = distributed.gather((terms, self.sizes.memory_size))
        # Memory that ran out on one process counts for all, so that all cut alike, and a
        # resumed run does too.
        self.sizes.memory_size = min((memory for _, memory in everyone if memory), default=None)
        # Buffers such as a normalisation's running means are those of the first process.
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)
        return [sum(values) for values in zip(*(theirs for theirs, _ in everyone if theirs))]

    def end_step(self, global_step: int) -> dict[str, float]:
        """As :meth:`Gradients.end_step`; a step that was not measured has no figures."""
        assert self._take is not None
        change = self.probe.change(self._take)
        self.steps.batch_size = self.sizes.observe(self._measurement, change)
        self._take = None
        if self._measurement is None:
            return {}
        nu, L = (self.sizes.fit.nu, self.sizes.fit.L) if self.sizes.fit else (math.nan, math.nan)
        sigma = math.sqrt(self.sizes.variance)
        self.rows.append([global_step, self.sizes.batch_size, self.learner.step_size, sigma, nu, L])
        return dict(zip(COLUMNS[1:], self.rows[-1][1:]))

    def end_epoch(self, folder: Path | None) -> None:
        """Let the rule look back on the epoch; log where it stands, and write and draw its
        figures.
        """
        self.steps.batch_size = self.sizes.end_epoch()
        fit, sizes = self.sizes.fit, self.sizes
        holder = f", nu {fit.nu:.2f}, L {fit.L:.3g}" if fit else ""
        getLogger().info(
            f"adaptive_batch: batch size {sizes.batch_size}, sigma {math.sqrt(sizes.variance):.3g}, "
            f"wanted {sizes.optimum:.3g}{holder}"
        )
        if folder is not None and distributed.rank() == 0 and not self._write(folder):
            getLogger().info("batch_size.csv has no plot beside it; Matplotlib draws it: pip install matplotlib")

    def _write(self, folder: Path) -> bool:
        """Write ``batch_size.csv``, and ``batch_size.png`` if Matplotlib is installed; whether
        it is.
        """
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
        """The state of the rule and all rows, in JSON's terms and exactly."""
        rows = [[None if math.isnan(number) else number for number in row] for row in self.rows]
        return {"sizes": self.sizes.state_dict(), "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.sizes.load_state_dict(state["sizes"])
        self.rows = [[math.nan if number is None else number for number in row] for row in state["rows"]]
        self.steps.batch_size = self.sizes.batch_size


class _Loss(nn.Module):
    """calculate_loss as a module's forward, around which DistributedDataParallel puts its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        """The loss, or its terms."""
        return loss_of(self.model, batch)
