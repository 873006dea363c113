"""A training run and what came of it, as a folder of runs keeps them (:mod:`recbole_ssm.study.runs`)."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from recbole_ssm.errors import UserError, first_line
from recbole_ssm.evaluation.metrics import Result, metric
from recbole_ssm.files import write_json

RUN, OUTCOME, RANKS = "run.json", "outcome.json", "ranks.npz"
"""The files of a run's folder: what was asked, what came of it, and the ranks of all targets."""


@dataclass(frozen=True)
class Run:
    """What decides a result, in JSON's terms."""

    model: str
    dataset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Config keys beyond the defaults; the seed among them."""

    @property
    def stem(self) -> str:
        """How its folder is called at first; without the colon of a user's own model, which Windows does not allow."""
        return f"{self.model.replace(':', '.')}-{self.dataset}-"

    def __str__(self) -> str:
        return " ".join([self.model, self.dataset, *(f"{key}={value}" for key, value in self.options.items())])


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    run: Run
    error: str | None
    """None where it succeeded, else the one line that says why."""
    folder: Path
    """``outcome.json``, ``ranks.npz``, ``log.txt``, and ``checkpoints/`` while the run is not done."""
    valid: dict[str, float] = field(default_factory=dict)
    """RecBole's metrics of the best validation; empty where the split leaves no rows for it."""
    test: dict[str, float] = field(default_factory=dict)
    """RecBole's metrics of the test, by the weights of the best validation."""
    valid_masked: dict[str, float] = field(default_factory=dict)
    """As ``valid``, in lists without the items of the user's history; empty in runs of 0.1.0."""
    test_masked: dict[str, float] = field(default_factory=dict)
    """As ``test``, likewise."""
    test_by_group: dict[str, dict[str, float]] = field(default_factory=dict)
    """What :func:`recbole_ssm.evaluation.metrics.by_group` says of the test."""
    test_shuffled_times: dict[str, float] = field(default_factory=dict)
    """As ``test``, of a model of ``time: query`` with its query times shuffled among users; empty elsewhere."""
    test_shuffled_times_masked: dict[str, float] = field(default_factory=dict)
    """As ``test_masked``, likewise."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Each epoch's ``epoch`` (1 is the first), ``loss`` (mean of its steps), ``valid`` (score, None where it was not
    validated), ``batch_size`` and ``step_size`` at its end, and the sums since the start: ``seconds`` of training
    (validations not counted), ``steps`` and ``targets``."""
    seconds: float = 0.0
    """Training, all interruptions taken out; validations are not counted."""
    epochs: int = 0
    parameters: int = 0
    """All numbers in the model's weights, trained or frozen."""
    items: int = 0
    """How many items were ranked."""
    peak_memory: int = 0
    """Bytes: of the GPU, or else of the whole process, data set included."""
    latency: dict[str, Any] | None = None
    """What ``latency.json`` holds, where the run has ``measure_latency``."""
    reranking: dict[str, Any] | None = None
    """What ``reranking.json`` holds, where the model is LlamaRec."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """What :func:`recbole_ssm.evaluation.metrics.protocol` says: split, ties, seed; empty in runs of 0.1.0."""
    made: dict[str, Any] = field(default_factory=dict)
    """Date, versions, processor, threads."""

    def validation(self, metric: str) -> float:
        """The best validation's figure of a ``valid_metric``, such as ``NDCG@10`` or ``masked NDCG@10``."""
        return Result(self.valid, self.valid_masked)[metric.lower()]

    def ranks(self, order: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The users' tokens of all rows of the test, and the ranks of their targets among all items; 1 is the best.

        Leave-one-out has one row a user. Ties have the mean of their ranks (see recbole_ssm.evaluation.ranks). The
        ``order`` ``masked`` gives the ranks in lists without the items of the history; where the query times were
        shuffled too, ``shuffled times`` and ``shuffled times masked`` those of that test. LlamaRec has the orders
        ``retriever``, ``language model`` and ``fused`` besides: ranks among its candidates, infinite where the target
        is none of them.

        Raises:
            UserError: the run failed, or was tested against samples.
        """
        if self.error is not None or not (self.folder / RANKS).is_file():
            raise UserError(f"{self.run}: it has no ranks{f' ({self.error})' if self.error else ''}")
        with np.load(self.folder / RANKS, allow_pickle=False) as file:
            return file["user"], file["rank" if order is None else f"rank of {order}"]

    def mean(self, name: str, order: str | None = None) -> float:
        """The mean of a metric of ranks, such as NDCG@10, over the rows of the test; arguments and errors as of
        :func:`recbole_ssm.evaluation.metrics.metric` and :meth:`ranks`.
        """
        return float(metric(name, self.ranks(order)[1]).mean())

    def write(self) -> None:
        """Write ``outcome.json``, by which the run counts as done."""
        values = {key: value for key, value in asdict(self).items() if key not in ("folder", "error")}
        write_json(self.folder / OUTCOME, values)

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """Read what :meth:`write` wrote, and of what a later version added nothing.

        Raises:
            UserError: it is damaged, or so are the ranks beside it.
            OSError: it cannot be read now.
        """
        try:
            values = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
            run = Run(**_known(Run, values["run"]))
            outcome = cls(**{**_known(cls, values), "run": run, "error": None, "folder": folder})
            if (folder / RANKS).is_file():
                with np.load(folder / RANKS, allow_pickle=False) as file:
                    ranks = {name: file[name] for name in file}
                if missing := {"user", "rank", *(["rank of masked"] if outcome.test_masked else [])} - ranks.keys():
                    raise KeyError(*missing)
            return outcome
        except (ValueError, TypeError, AttributeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{folder}: damaged ({first_line(error)}); delete that folder") from error


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of some values those that are fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
