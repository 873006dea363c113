"""One training run in a process of its own: ``python -m recbole_ssm.study.child FOLDER``, as Runs starts it.

It reads ``run.json``, says in lines of JSON on standard output how far it is, and leaves ``ranks.npz`` and, last of
all, ``outcome.json``. When standard input ends, the process that started it is gone: it saves a checkpoint and stops.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from recbole_ssm import __version__, run_recbole_ssm
from recbole_ssm.data.loader import Step
from recbole_ssm.errors import UserError
from recbole_ssm.files import locked, whole
from recbole_ssm.llm.base import size_of
from recbole_ssm.memory import peak_memory
from recbole_ssm.study.outcome import OUTCOME, RANKS, RUN, Outcome, Run
from recbole_ssm.study.runs import CHECKPOINTS
from recbole_ssm.trainer import Hook, Ranks, checkpoint
from recbole_ssm.trainer.checkpoint import plain
from recbole_ssm.trainer.hooks import Training

# Seconds between two lines that say how far the run is.
SAY_EVERY = 2.0


class History(Hook):
    """Notes what each epoch cost and brought, however often the run is interrupted, and the model's sizes."""

    def __init__(self, say: TextIO) -> None:
        self.entries: list[dict[str, Any]] = []
        self.parameters = self.items = self.peak_memory = 0
        self._say, self._said = say, 0.0
        self._done: dict[str, float] = {"seconds": 0.0, "steps": 0, "targets": 0}
        # When the stretch of training began that is under way.
        self._begin: float | None = None
        self._fitting = False
        self._steps = 0

    def on_fit_start(self, trainer: Training, loader: Any) -> None:
        """Count the parameters and the items."""
        self._fitting, self._steps = True, len(loader.steps)
        # RecBole counts its padding as an item.
        self.items = loader._dataset.item_num - 1
        self.parameters = size_of(trainer.model.parameters())

    def on_epoch_start(self, trainer: Training, epoch: int) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_step_end(self, trainer: Training, step: Step, loss: Tensor) -> None:
        """Count the step; say now and then how far the run is."""
        self._done["steps"] += 1
        self._done["targets"] += step.targets
        if time.monotonic() - self._said > SAY_EVERY:
            self._said = time.monotonic()
            self._tell(trainer, len(self.entries) + 1, step.number + 1)

    def on_epoch_end(self, trainer: Training, epoch: int, loss: float) -> None:
        """Stop the clock, and write the epoch down."""
        self._done["seconds"], self._begin = self._seconds(), None
        entry = {"epoch": epoch + 1, "loss": loss, "valid": None, **self._done}
        self.entries.append({**entry, "batch_size": trainer.batch_size, "step_size": float(trainer.step_size)})

    def on_evaluation_end(self, trainer: Training, result: dict[str, float]) -> None:
        """Note the score of a validation, and tell it; the test is none."""
        if self._fitting:
            self.entries[-1]["valid"] = float(result[trainer.valid_metric])
            scores = [entry["valid"] for entry in self.entries if entry["valid"] is not None]
            self._tell(trainer, len(self.entries), self._steps, validations=scores)

    def _tell(self, trainer: Training, epoch: int, step: int, **more: Any) -> None:
        """Say how far the run is: the epoch and its step, which count from 1, and the newest validation score."""
        valid = self.entries[-1]["valid"] if self.entries else None
        where = {"epoch": epoch, "epochs": trainer.epochs, "step": step, "steps": self._steps}
        say(self._say, **where, valid=valid, **more)

    def on_fit_end(self, trainer: Training) -> None:
        """From here on evaluations are tests."""
        self._fitting = False
        self.peak_memory = peak_memory(trainer.device)

    def state_dict(self) -> dict[str, Any]:
        """All counts, and the seconds until now."""
        return {"entries": plain(self.entries), "done": {**self._done, "seconds": self._seconds()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.entries, self._done = state["entries"], state["done"]

    def _seconds(self) -> float:
        return self._done["seconds"] + (0.0 if self._begin is None else time.perf_counter() - self._begin)


def main(folder: Path, lines: TextIO) -> int:
    """Train the folder's run, unless another process has just done so; return the exit status."""
    try:
        # Wait until no other process trains this run.
        with locked(folder):
            if not (folder / OUTCOME).is_file():
                _train(folder, lines)
    except KeyboardInterrupt as interrupt:
        say(lines, error="interrupted; the same command goes on")
        return getattr(interrupt, "status", 130)
    except (UserError, OSError) as error:
        say(lines, error=str(error))
        return 2
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).splitlines())
        say(lines, error=f"{type(error).__name__}: {text}")
        return 1
    return 0


def say(lines: TextIO, **values: Any) -> None:
    """Print a line for the process that started this one, if that is still there."""
    with contextlib.suppress(OSError):
        print(json.dumps(values), file=lines, flush=True)


def _train(folder: Path, lines: TextIO) -> None:
    job = json.loads((folder / RUN).read_text(encoding="utf-8"))
    run = Run(**job["run"])
    history, ranks = History(lines), Ranks()
    # A model of the user's own is called by its class there, not by its path.
    name = job["content"]["settings"]["model"]
    result = run_recbole_ssm(
        run.model,
        run.dataset,
        config_dict=job["options"],
        hooks=[history, ranks],
        resume=_interrupted(folder / CHECKPOINTS, name),
    )
    # Without a test they would be those of the last validation.
    if len(ranks.ranks) and result["test_result"]:
        with whole(folder / RANKS) as temporary, open(temporary, "wb") as file:
            orders = {"masked": ranks.masked, **result.get("ranks", {})}
            of_orders = {f"rank of {order}": values for order, values in orders.items()}
            np.savez_compressed(file, user=ranks.users, rank=ranks.ranks, **of_orders)
    latency = Path(result["checkpoint"]).with_name("latency.json")
    Outcome(
        run=run,
        error=None,
        folder=folder,
        valid=plain(dict(result["best_valid_result"] or {})),
        test=plain(dict(result["test_result"] or {})),
        valid_masked=plain(result["best_valid_result_masked"] or {}),
        test_masked=plain(result["test_result_masked"] or {}),
        test_by_group=plain(result["test_by_group"]),
        test_shuffled_times=plain(dict(result["test_result_shuffled_times"] or {})),
        test_shuffled_times_masked=plain(result["test_result_shuffled_times_masked"] or {}),
        history=history.entries,
        seconds=history.entries[-1]["seconds"] if history.entries else 0.0,
        epochs=len(history.entries),
        parameters=history.parameters,
        items=history.items,
        peak_memory=history.peak_memory,
        latency=json.loads(latency.read_text(encoding="utf-8")) if latency.is_file() else None,
        reranking=result.get("reranking"),
        protocol=plain(result["protocol"]),
        made=machine(),
    ).write()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _interrupted(checkpoints: Path, model: str) -> Path | None:
    """The folder of checkpoints from which a run of this model can go on: its own newest, or that of its first stage.

    Where none can be read, all are deleted.
    """
    stage = None
    folders = [path for path in checkpoints.glob("*") if path.is_dir()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(UserError):
            info = checkpoint.newest(folder)[1].info
            if info["model"] == model:
                return folder
            if stage is None and info.get("for", {}).get("model") == model:
                stage = folder
    if stage is None:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return stage


def machine() -> dict[str, Any]:
    """Today's date, the versions that decide results, and the processor."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [n for n in Path("/proc/cpuinfo").read_text().splitlines() if n.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "recbole_ssm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _stop_with_parent() -> None:
    # sys.stdin has a lock that this thread would hold when Python ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    # Whatever else is printed goes to the log, also by libraries and by other processes.
    # The lines end with this process: where they end, the parent believes that it is over.
    own_lines, sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", closefd=False), sys.stderr
    os.dup2(2, 1)
    status = main(Path(sys.argv[1]), own_lines)
    with contextlib.suppress(OSError):
        own_lines.close()
    sys.exit(status)
