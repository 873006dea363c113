"""How long a step of training and a batch of evaluation take: the latency column of a
comparison.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_ssm import clock, distributed
from recbole_ssm.data.loader import PackedBatch, Step
from recbole_ssm.files import write_json
from recbole_ssm.memory import peak_memory
from recbole_ssm.trainer.hooks import Hook, Training

WARM_UP = 3
"""The first steps and batches of a run do not count: kernels are chosen, and memory is touched
for the first time.
"""


class Latency(Hook):
    """Times steps and evaluation batches, with the device synchronised around every part that is timed.

    Parts: ``step``, a whole step of training without the reading of its batch; ``encode``, the
    model's forward over the histories of an evaluation batch; ``score``, the products with all
    items and the count of those that score higher than the target; ``evaluate``, all that a batch
    takes. A model whose scores do not come from ``forward`` has no ``encode`` of its own.

    Targets are those of all processes; positions, users and times are this one's. After every
    evaluation the report is written to ``latency.json`` in the run's folder, if it has one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.work: dict[str, list[int]] = {}
        self._device = torch.device("cpu")
        self._begin = self._scored = self._encoded = 0.0

    def on_fit_start(self, trainer: Training, loader: Any) -> None:
        """Take the device, and time the model's forward from now on."""
        self._device = trainer.device

    def on_step_start(self, trainer: Training, step: Step) -> None:
        """Start the clock."""
        self._begin = self._now()

    def on_step_end(self, trainer: Training, step: Step, loss: Tensor) -> None:
        """Note the step, its targets and its positions."""
        batches = [part.batch for part in step.parts]
        lengths = trainer.config["ITEM_LIST_LENGTH_FIELD"]
        positions = sum(b.positions if isinstance(b, PackedBatch) else int(b[lengths].sum()) for b in batches)
        self._note("step", self._now() - self._begin, targets=step.targets, positions=positions)

    def on_evaluation_start(self, trainer: Training) -> None:
        """Put a clock around the model's forward, which RecBole's models call as a method."""
        self._device = trainer.device
        model: Any = trainer.model
        forward = type(model).forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            output = forward(model, *args, **kwargs)
            self._encoded += self._now() - begin
            return output

        model.forward = timed

    def on_evaluation_batch_start(self, trainer: Training) -> None:
        """Start the clock."""
        self._encoded = 0.0
        self._begin = self._now()

    def on_scores(self, trainer: Training, rows: int) -> None:
        """What is not encoding was scoring."""
        self._scored = self._now()

    def on_evaluation_batch_end(self, trainer: Training, rows: int) -> None:
        """Note the batch."""
        end = self._now()
        if self._encoded:
            self._note("encode", self._encoded)
        self._note("score", self._scored - self._begin - self._encoded)
        self._note("evaluate", end - self._begin, users=rows)

    def on_evaluation_end(self, trainer: Training, result: dict[str, float]) -> None:
        """Give the model its own forward back, and write the report."""
        del trainer.model.forward
        if trainer.folder is not None and distributed.rank() == 0:
            write_json(trainer.folder / "latency.json", self.report())

    def on_fit_end(self, trainer: Training) -> None:
        """Log the report."""
        trainer.logger.info(self.text())

    def report(self) -> dict[str, Any]:
        """Part -> count, ``p50_s``, ``p95_s``, ``p99_s`` and rates a second; and
        ``peak_memory_bytes``.
        """
        parts = {}
        for name, seconds in self.seconds.items():
            counted = np.array(seconds[WARM_UP:] or seconds)
            row: dict[str, float] = {"count": len(counted)}
            row |= {f"p{q}_s": float(np.percentile(counted, q)) for q in (50, 95, 99)}
            for kind, amounts in self.work.items():
                part, _, unit = kind.partition(" ")
                if part == name:
                    row[f"{unit}_per_second"] = float(sum(amounts[-len(counted) :]) / counted.sum())
            parts[name] = row
        return {**parts, "peak_memory_bytes": peak_memory(self._device)}

    def text(self) -> str:
        """The report as a table."""
        lines = [f"latency after {WARM_UP} warm-up rounds, milliseconds   p50      p95      p99"]
        report = self.report()
        for name, row in report.items():
            if isinstance(row, dict):
                times = "".join(f"{1000 * row[f'p{q}_s']:9.3f}" for q in (50, 95, 99))
                rates = ", ".join(f"{v:,.0f} {k.split('_')[0]}/s" for k, v in row.items() if k.endswith("_per_second"))
                lines.append(f"  {name:10} x {row['count']:<8}{'':22}{times}   {rates}".rstrip())
        lines.append(f"  peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB")
        return "\n".join(lines)

    def _now(self) -> float:
        return clock.now(self._device)

    def _note(self, part: str, seconds: float, **work: int) -> None:
        self.seconds.setdefault(part, []).append(seconds)
        for unit, amount in work.items():
            self.work.setdefault(f"{part} {unit}", []).append(amount)
