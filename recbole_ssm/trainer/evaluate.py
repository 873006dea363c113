"""Evaluating any sequential model: RecBole's Trainer as far as it scores, with hooks and in
several processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from recbole_ssm import compat, distributed
from recbole_ssm.console import progress_bar
from recbole_ssm.errors import UserError
from recbole_ssm.graphs import replay_graphs
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer.checkpoint import load_weights
from recbole_ssm.trainer.hooks import Hook
from recbole_ssm.trainer.records import TensorBoardRecords, WandbRecords
from recbole_ssm.trainer.signals import Signals
from recbole_ssm.trainer.step_sizes import StepSizes
from recbole_ssm.trainer.timing import Latency

compat.install()

import recbole.trainer  # noqa: E402
from recbole.evaluator.collector import DataStruct  # noqa: E402

from recbole_ssm.data.evaluation import EvalLoader  # noqa: E402
from recbole_ssm.data.splits import training_events  # noqa: E402
from recbole_ssm.evaluation import metrics  # noqa: E402
from recbole_ssm.evaluation.metrics import OF_ITEMS, Result  # noqa: E402
from recbole_ssm.evaluation.ranks import Ranking, Scorer  # noqa: E402


class EvaluatingTrainer(recbole.trainer.Trainer):
    """recbole.trainer.Trainer without its training; see :class:`recbole_ssm.trainer.Trainer`
    for the arguments.
    """

    def __init__(self, config: Any, model: Any, hooks: Iterable[Hook]) -> None:
        # RecBole makes this folder in a way in which several processes race.
        Path(config["checkpoint_dir"]).mkdir(parents=True, exist_ok=True)
        super().__init__(config, model)
        # RecBole takes at most the number of epochs, which may be 0.
        self.eval_step: int = max(min(config["eval_step"], config["epochs"]), 1)
        self.tensorboard: Any
        self._signals = Signals()
        if config["cuda_graphs"] is True:
            replay_graphs(model)
        self.hooks = [*hooks, *self._own_hooks()]
        names = [type(hook).__name__ for hook in self.hooks]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"hooks: two hooks of class {name}; their saved states would overwrite each other, so make one of "
                    "them a subclass"
                )
        if distributed.rank():
            self.tensorboard.close()
            self.tensorboard = _Silence()

    def _own_hooks(self) -> list[Hook]:
        own: list[Hook] = [TensorBoardRecords()]
        if self.config["log_wandb"]:
            own.append(WandbRecords(self.wandblogger))
        if self.config["measure_latency"]:
            own.append(Latency())
        if hasattr(self.model, "hooks"):
            own += self.model.hooks()
        if hasattr(self.optimizer, "step_sizes"):
            own.append(StepSizes())
        return own

    def _notify(self, moment: str, *what: Any) -> None:
        for hook in self.hooks:
            getattr(hook, moment)(self, *what)

    @torch.no_grad()
    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """The metrics on some rows, a :class:`~recbole_ssm.evaluation.metrics.Result`; None where there are no rows.

        Args:
            eval_data: rows of :func:`recbole_ssm.data.loader.create_loaders`, or a loader of RecBole's, whose rows are
                evaluated in the same way: one list a target.
            load_best_model: take the weights of ``model_file`` first, by default the run's best checkpoint.
            model_file: a checkpoint.
            show_progress: whether a bar shows how far it is.
        """
        if not eval_data:
            return None
        if load_best_model:
            path = Path(distributed.broadcast(model_file or self.saved_model_file))
            load_weights(self.model, checkpoint.read(path), path)
            self.logger.debug(f"Loading model structure and parameters from {path}")
        self.model.eval()
        if not isinstance(eval_data, EvalLoader):
            phase = getattr(eval_data._sampler, "phase", "test")
            eval_data = EvalLoader(self.config, eval_data._dataset, phase)
        scorer = Scorer(self.model, eval_data._dataset, self.config["eval_batch_size"])
        k = max(self.config["topk"]) if {m.lower() for m in self.config["metrics"]} & set(OF_ITEMS) else 0
        found: list[tuple[torch.Tensor, ...]] = []
        self._notify("on_evaluation_start")
        for batch in progress_bar(eval_data, show_progress, desc="Evaluate", unit="batch", leave=False):
            self._notify("on_evaluation_batch_start")
            batch = batch.to(self.device)
            rows: tuple[torch.Tensor, ...]
            if eval_data.labelled:
                rows = scorer.among(batch.interaction, batch.candidates), batch.labels
            else:
                rows = batch.interaction[eval_data.user_field], batch.target, batch.events, *scorer.rank(batch, k)
            self._notify("on_scores", len(batch.target))
            found.append(tuple(values.cpu() for values in rows))
            self._notify("on_evaluation_batch_end", len(batch.target))
            if distributed.world_size() == 1:
                # Several processes need not have the same number of batches, and all must agree
                # to stop.
                self._signals.stop_if_asked()
        result = self._of_labels(found) if eval_data.labelled else self._of_ranks(found, eval_data)
        self._notify("on_evaluation_end", result)
        return result

    def test(self, rows: EvalLoader, load_best_model: bool = True, show_progress: bool = False) -> Result | None:
        """:meth:`evaluate`, and what says whether the figures can be believed: the metrics of groups of targets, and
        those of a model of ``time: query`` with its query times shuffled among the users.

        Args:
            rows: of the test, as :func:`recbole_ssm.data.loader.create_loaders` gives them.
            load_best_model: as of :meth:`evaluate`.
            show_progress: likewise.
        """
        result: Result | None = self.evaluate(rows, load_best_model, show_progress=show_progress)
        if result is None:
            return None
        if result.ranking is not None:
            events = training_events(rows.training)
            pauses = rows.pauses()
            whole_days = pauses is not None and rows.of_whole_days
            result.by_group = metrics.by_group(result.ranking, self.config, events, pauses, whole_days)
            self.logger.debug(metrics.text_of(result.by_group))
        # The time may be read by a ranker's retriever, of which this configuration says nothing.
        if self.config["time"] == "query" or getattr(getattr(self.model, "time_encoding", None), "asks", False):
            # Hooks would take it for the test.
            hooks, self.hooks = self.hooks, []
            try:
                result.shuffled_times = self.evaluate(rows.with_shuffled_times(), False, show_progress=show_progress)
            finally:
                self.hooks = hooks
        return result

    def _of_ranks(self, found: list[tuple[torch.Tensor, ...]], rows: EvalLoader) -> Result:
        ranking = Ranking.of(found)
        self._notify("on_ranking", ranking, rows._dataset)
        return metrics.result(ranking, self.config, rows.training)

    def _of_labels(self, found: list[tuple[torch.Tensor, ...]]) -> Result:
        """RecBole's metrics of scores and labels."""
        scores, labels = (distributed.gather_rows(torch.cat(column)).flatten() for column in zip(*found))
        collected = DataStruct()
        collected.set("rec.score", scores)
        collected.set("data.label", labels)
        return Result(self.evaluator.evaluate(collected))


class _Silence:
    """TensorBoard's writer on all processes but the first."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None
