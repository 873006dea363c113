"""Training any sequential model: RecBole's Trainer, resumable at every step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import compat, distributed
from recbole_ssm.console import progress_bar, trained_in_words
from recbole_ssm.errors import UserError
from recbole_ssm.memory import peak_memory, return_memory_of_growth
from recbole_ssm.trainer import checkpoint, known_items
from recbole_ssm.trainer import folder as folders
from recbole_ssm.trainer.gradients import AdaptiveGradients
from recbole_ssm.trainer.hooks import Hook
from recbole_ssm.trainer.signals import Interrupted
from recbole_ssm.trainer.snapshot import Position, random_states, set_random_states

compat.install()

from recbole.utils import early_stopping  # noqa: E402

from recbole_ssm.data.loader import Part, Step, TrainLoader, on_device  # noqa: E402
from recbole_ssm.trainer.graphs import Replays  # noqa: E402
from recbole_ssm.trainer.saving import SavingTrainer  # noqa: E402

__all__ = ["Interrupted", "Trainer"]

SHOW_EVERY = 0.5
"""Seconds between two losses that a progress bar shows."""


class Trainer(SavingTrainer):
    """recbole.trainer.Trainer for every sequential model, whose runs can be killed at any batch and go on.

    What differs from RecBole's: batches come from :class:`recbole_ssm.data.loader.TrainLoader`; gradients may be
    accumulated over the parts of a step; the gradient scaler lives as long as the run, and gradients are unscaled
    before they are clipped; several processes divide each step and each evaluation, and give one process's metrics;
    checkpoints hold all that the next step depends on. A checkpoint also holds what recommending needs.

    A run has a folder ``<checkpoint_dir>/<model>-<dataset>-<time>/``; see :mod:`recbole_ssm.trainer.folder`.

    Args:
        config: the configuration.
        model: the model, on its device.
        hooks: called at the moments that :class:`~recbole_ssm.trainer.hooks.Hook` lists, as are those that the model
            brings by a method ``hooks()``.

    Raises:
        UserError: an option is impossible, or two hooks are of one class.
    """

    def __init__(self, config: Any, model: Any, hooks: Iterable[Hook] = ()) -> None:
        super().__init__(config, model, hooks)
        self._replays = Replays(self)

    def fit(
        self,
        train_data: TrainLoader,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, Any]:
        """As RecBole's; returns the best validation score, and the metrics of that validation.

        Raises:
            UserError: the loss is not finite, or the checkpoint to go on from is of other data.
            Interrupted: SIGTERM or Ctrl-C came; where checkpoints are saved, one of that moment
                is there.
        """
        self._prepare(train_data, saved)
        self._notify("on_fit_start", train_data)
        if saved:
            checkpoint.check_room(self.open_folder(), *self._contents([random_states()]))
            if distributed.rank() == 0 and self.folder:
                trains = self.position.epoch < self.epochs
                folders.write_settings(self.folder, self.config, overwrite=trains)
        with self._folder_held(), self._signals.held(self._save_for_later):
            first, last = self.position.epoch // self.eval_step, self.epochs // self.eval_step
            if not valid_data or (first >= last and self.best_valid_result is None):
                with self.learner.evaluation_point():
                    self._notify("on_no_validation", valid_data)
            if self._random is not None:
                set_random_states(self._random)
                self._random = None
            for epoch in range(self.position.epoch, self.epochs):
                if self.cur_step > self.stopping_step:
                    break
                self._run_epoch(train_data, valid_data, epoch, verbose, show_progress, callback_fn)
            self._signals.stop_if_asked()
        if saved and not distributed.broadcast(Path(self.saved_model_file).exists()):
            # No epoch was ever better than what the run went on from.
            self._save_checkpoint(self.epochs - 1, verbose=verbose)
        self.learner.give_output()
        self._add_hparam_to_tensorboard(self.best_valid_score)
        self._notify("on_fit_end")
        return self.best_valid_score, self.best_valid_result

    def _prepare(self, train_data: TrainLoader, saved: bool) -> None:
        """Make ready for the data, and refuse what cannot work with it."""
        self.catalogue = known_items.catalogue_of(train_data._dataset, self.model)
        fingerprint = train_data.fingerprint()
        if self.fingerprint not in ("", fingerprint):
            raise UserError("resume: the training data is not what it was when the checkpoint was written")
        self.fingerprint = fingerprint
        if self.config["train_neg_sample_args"].get("dynamic", False):
            train_data.get_model(self.model)
        self.learner.check_length(self.epochs, len(train_data.steps))
        if self.config["adaptive_batch"]:
            self.gradients = AdaptiveGradients(self.config, self.model, self.learner, train_data, self.epochs)
        if self._gradients_state:
            self.gradients.load_state_dict(self._gradients_state)
        self.learner.take_back()
        self._replays.begin()
        self._saved = saved

    def _run_epoch(
        self,
        train_data: Any,
        valid_data: Any,
        epoch: int,
        verbose: bool,
        progress: bool,
        callback: Any,
    ) -> None:
        """Train, evaluate, and save what came of it."""
        told = []
        if not self.position.ended:
            begin, first_seen = time.perf_counter(), self.position.seen
            losses = self._train_epoch(train_data, epoch, show_progress=progress)
            self.train_loss_dict[epoch] = sum(losses) if isinstance(losses, tuple) else losses
            self._add_train_loss_to_tensorboard(epoch, losses)
            seconds, events = time.perf_counter() - begin, self.position.seen - first_seen
            mean = self.train_loss_dict[epoch] / max(self.position.number, 1)
            told.append(trained_in_words(mean, seconds, events))
        improved, score = not valid_data, None
        if valid_data and (epoch + 1) % self.eval_step == 0:
            # A checkpoint that a signal causes from here on repeats the evaluation.
            self._random = random_states()
            improved, score = self._validate(valid_data, epoch, progress)
            self._random = None
            told.append(self._validation_in_words(epoch, score))
        if verbose:
            self.logger.info(f"epoch {epoch}: {'; '.join(told)}")
        self.learner.schedule("epoch", score)
        self._stand_at(Position(epoch + 1))
        self.gradients.end_epoch(self.folder if self._saved else None)
        if self._saved:
            if improved:
                self._save_checkpoint(epoch, verbose=verbose)
            self._save_step()
        if callback and score is not None:
            callback(epoch, score)

    def _validate(self, valid_data: Any, epoch: int, progress: bool) -> tuple[bool, float]:
        """Evaluate on the validation rows; whether the model has become better, and the score."""
        with self.learner.evaluation_point():
            self._notify("on_validation_start", valid_data)
            score, result = self._valid_epoch(valid_data, show_progress=progress)
        self.best_valid_score, self.cur_step, _, improved = early_stopping(
            score, self.best_valid_score, self.cur_step, max_step=self.stopping_step, bigger=self.valid_metric_bigger
        )
        if improved:
            self.best_valid_result = result
        self.logger.debug(f"valid result:\n{result}")
        # The name is RecBole's spelling, which its users' plots read.
        self.tensorboard.add_scalar("Vaild_score", score, epoch)
        return improved, score

    def _validation_in_words(self, epoch: int, score: float) -> str:
        """The score of an epoch beside the best one, and whether training stops."""
        best = epoch - self.cur_step * self.eval_step
        since = "the best so far" if best == epoch else f"best {self.best_valid_score:.4f} in epoch {best}"
        stops = f"; training stops after {self.cur_step} validations without a better one"
        return f"valid {self.valid_metric} {score:.4f}, {since}{stops if self.cur_step > self.stopping_step else ''}"

    def _train_epoch(self, train_data: Any, epoch_idx: int, show_progress: bool = False) -> float | tuple[float, ...]:
        """Take the steps that are left of an epoch; the sum of their losses, of each term where there are several."""
        self.model.train()
        self._notify("on_epoch_start", epoch_idx)
        position = self.position
        train_data.steps.begin(epoch_idx, position.number, position.seen)
        bar = progress_bar(
            train_data,
            show_progress,
            initial=position.number,
            total=position.number + len(train_data.steps),
            desc=f"Train {epoch_idx:>5}",
            unit="step",
            leave=False,
        )
        begin, first_seen, shown = time.perf_counter(), position.seen, 0.0
        for step in bar:
            terms = self._run_step(step)
            self.position = Position(epoch_idx, step.number + 1, step.seen)
            # To read the loss of a step is to wait for it.
            if not bar.disable and time.perf_counter() - shown > SHOW_EVERY:
                shown = time.perf_counter()
                rate, memory = (step.seen - first_seen) / (shown - begin), peak_memory(self.device) / 2**20
                text = f"loss {float(sum(terms)):.4f}, {rate:,.0f} events/s, {memory:,.0f} MiB"
                bar.set_postfix_str(text, refresh=False)
            every = self.config["checkpoint_steps"]
            if every and self._saved and self.global_step % every == 0:
                self._save_step()
            self._signals.stop_if_asked()
        self._settle()
        total = self.position.loss
        self._notify("on_epoch_end", epoch_idx, sum(total) / max(self.position.number, 1))
        self.position = self.position._replace(ended=True)
        return total if len(total) > 1 else sum(total)

    def _run_step(self, step: Step) -> Tensor:
        """One step of the optimiser; the terms of its loss, where they were computed."""
        parts = [part._replace(batch=self._replays.rounded(part.batch)) for part in step.parts]
        step = step._replace(parts=[part._replace(batch=on_device(part.batch, self.device)) for part in parts])
        self._notify("on_step_start", step)
        replayed = terms = self._replays.take(step.parts)
        if terms is None:
            terms, step = self.gradients.add_up(step, self._backward)
            terms = distributed.average(terms)
        self._losses.add(terms)
        if replayed is None or self._replays.step_is_launched:
            self.learner.unscale()
            self._notify("on_gradients", step)
            with self._replays.rates():
                self.learner.step()
        self.global_step += 1
        for name, value in self.gradients.end_step(self.global_step).items():
            self.tensorboard.add_scalar(f"AdaptiveBatch/{name}", value, self.global_step)
        if self.device.type == "cpu":
            return_memory_of_growth()
        self.learner.schedule("step")
        self._notify("on_step_end", step, sum(terms))
        return terms

    def _backward(self, part: Part) -> Tensor:
        """Take a part of a step through the model and back; the terms of its share of the step's loss."""
        with self.learner.autocast():
            losses = self.gradients.loss(part.batch)
        losses = losses if isinstance(losses, tuple) else (losses,)
        loss: Any = sum(losses)
        self.learner.scaler.scale(part.weight * loss).backward()
        return part.weight * torch.stack([term.detach().double().view(()) for term in losses])
