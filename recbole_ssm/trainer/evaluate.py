"""Evaluating any sequential model: RecBole's Trainer as far as it scores, with hooks and in
several processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recbole_ssm import compat, distributed
from recbole_ssm.errors import UserError
from recbole_ssm.graphs import score_by_graphs
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer.checkpoint import load_weights
from recbole_ssm.trainer.hooks import Hook
from recbole_ssm.trainer.signals import Signals
from recbole_ssm.trainer.step_sizes import StepSizes
from recbole_ssm.trainer.timing import Latency

compat.install()

import recbole.trainer  # noqa: E402
from recbole.data.dataloader import FullSortEvalDataLoader  # noqa: E402
from recbole.utils import EvaluatorType  # noqa: E402


class EvaluatingTrainer(recbole.trainer.Trainer):
    """recbole.trainer.Trainer without its training; see :class:`recbole_ssm.trainer.Trainer`
    for the arguments.
    """

    def __init__(self, config: Any, model: Any, hooks: Iterable[Hook]) -> None:
        # RecBole makes this folder in a way in which several processes race.
        Path(config["checkpoint_dir"]).mkdir(parents=True, exist_ok=True)
        super().__init__(config, model)
        self.item_tensor: Any
        self.tensorboard: Any
        self._signals = Signals()
        if config["cuda_graphs"]:
            score_by_graphs(model)
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
        own: list[Hook] = [Latency()] if self.config["measure_latency"] else []
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
        """The metrics on some rows, as RecBole's; None where there are no rows.

        ``load_best_model`` takes the weights of ``model_file`` first, by default the run's best
        checkpoint.
        """
        if not eval_data:
            return None
        if load_best_model:
            path = Path(distributed.broadcast(model_file or self.saved_model_file))
            load_weights(self.model, checkpoint.read(path), path)
            self.logger.info(f"Loading model structure and parameters from {path}")
        self.model.eval()
        full = isinstance(eval_data, FullSortEvalDataLoader)
        score_batch = self._full_sort_batch_eval if full else self._neg_sample_batch_eval
        if full and self.item_tensor is None:
            self.item_tensor = eval_data._dataset.get_item_feature().to(self.device)
        if self.config["eval_type"] == EvaluatorType.RANKING:
            self.tot_item_num = eval_data._dataset.item_num
        self._notify("on_evaluation_start")
        for batch in tqdm(eval_data, desc="Evaluate", unit="batch", disable=not show_progress):
            self._notify("on_evaluation_batch_start")
            interaction, scores, positive_u, positive_i = score_batch(batch)
            self._notify("on_scores", len(scores))
            self.eval_collector.eval_batch_collect(scores, interaction, positive_u, positive_i)
            self._notify("on_evaluation_batch_end", len(scores))
            if full:
                self._notify("on_ranking", eval_data._dataset, interaction, scores, positive_u, positive_i)
            if distributed.world_size() == 1:
                # Several processes need not have the same number of batches, and all must agree
                # to stop.
                self._signals.stop_if_asked()
        self.eval_collector.model_collect(self.model)
        collected = self.eval_collector.get_data_struct()
        if full:
            for key in ("rec.topk", "rec.items", "rec.meanrank", "rec.score"):
                if key in collected:
                    collected.set(key, distributed.gather_rows(collected.get(key)))
        result = self.evaluator.evaluate(collected)
        self.wandblogger.log_eval_metrics(result, head="eval")
        self._notify("on_evaluation_end", result)
        return result


class _Silence:
    """TensorBoard's writer on all processes but the first."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None
