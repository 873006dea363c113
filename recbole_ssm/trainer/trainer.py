"""Training any sequential model: RecBole's Trainer, resumable at every step."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import math
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from recbole_ssm import compat, distributed
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.keys import FREE_KEYS
from recbole_ssm.memory import peak_memory, return_free_memory
from recbole_ssm.optim import LEARNERS, IterateAverage, parameter_groups
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer.adaptive import AdaptiveBatch
from recbole_ssm.trainer.checkpoint import catalogue_of, load_weights, plain, settings_of
from recbole_ssm.trainer.hooks import Hook
from recbole_ssm.trainer.step_sizes import StepSizes
from recbole_ssm.trainer.timing import Latency

compat.install()

import recbole.trainer  # noqa: E402
from recbole.data.dataloader import FullSortEvalDataLoader  # noqa: E402
from recbole.utils import EvaluatorType, dict2str, early_stopping  # noqa: E402

from recbole_ssm.data.loader import Part, Step, TrainLoader  # noqa: E402
from recbole_ssm.graphs import score_by_graphs  # noqa: E402

TRIM_EVERY = 16  # steps


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came, and a checkpoint to go on from is written; ``status`` is the exit status."""

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.status = 128 + signal_number


class Trainer(recbole.trainer.Trainer):
    """recbole.trainer.Trainer for every sequential model, whose runs can be killed at any batch and go on.

    What differs: batches come from :class:`recbole_ssm.data.loader.TrainLoader`; gradients may be accumulated over the
    parts of a step; the gradient scaler lives as long as the run and gradients are unscaled before they are clipped;
    several processes divide each step and each evaluation, and give one process's metrics; checkpoints hold all that
    the next step depends on. A checkpoint is also self-contained for recommending: it carries the catalogue.

    A run has a folder ``<checkpoint_dir>/<model>-<dataset>-<time>/`` with ``best.safetensors`` and the newest
    ``step-<n>.safetensors``.

    Args:
        config: the configuration.
        model: the model, on its device.
        hooks: called at the moments that :class:`~recbole_ssm.trainer.hooks.Hook` lists, as are those that the model
            brings by a method ``hooks()``.
    """

    def __init__(self, config: Any, model: Any, hooks: Iterable[Hook] = ()) -> None:
        Path(config["checkpoint_dir"]).mkdir(parents=True, exist_ok=True)  # of RecBole's own way processes race
        super().__init__(config, model)
        self.best_valid_score: float
        self.cur_step: int
        self.item_tensor: Any
        self.tensorboard: Any
        self.hooks = list(hooks)
        self.folder: Path | None = None
        self.catalogue: dict[str, Any] = {}
        self.fingerprint = ""
        self.global_step = 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.enable_scaler)
        self.scheduler = self._build_scheduler()
        self._output = self._build_output()
        self._iterate: dict[str, torch.Tensor] = {}  # where the optimiser stands, after a fit that leaves its output
        self._loss: Any = _Loss(model)
        if distributed.world_size() > 1 and not config["adaptive_batch"]:  # whose steps are cut as memory allows
            self._loss = DistributedDataParallel(self._loss, find_unused_parameters=True)
        # where training stands: epoch, steps and targets of it that are done, sum of their losses, nothing left of it
        self._position = _start_of(0)
        self._rng: dict[str, torch.Tensor] | None = None  # the random states to save, where not those of the moment
        self.adaptive: AdaptiveBatch | None = None
        self._adaptive_state: dict[str, Any] | None = None
        self._saved = False
        self._signal = 0
        if config["cuda_graphs"]:
            score_by_graphs(model)
        if config["measure_latency"]:
            self.hooks.append(Latency())
        if hasattr(model, "hooks"):
            self.hooks += model.hooks()
        if hasattr(self.optimizer, "step_sizes"):
            self.hooks.append(StepSizes())
        names = [type(hook).__name__ for hook in self.hooks]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"hooks: two hooks of class {twice}; their saved states would overwrite each other, so make one of "
                "them a subclass"
            )
        if distributed.rank():
            self.tensorboard.close()
            self.tensorboard = _Silence()

    # --- fit ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        train_data: TrainLoader,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, Any]:
        """As RecBole's; returns (best validation score, best validation result).

        Raises:
            UserError: the loss is not finite, or the checkpoint to go on from is of other data.
            Interrupted: SIGTERM or Ctrl-C came; where checkpoints are saved, one of that moment is there.
        """
        self.catalogue = catalogue_of(train_data._dataset, self.model)
        fingerprint = train_data.fingerprint()
        if self.fingerprint not in ("", fingerprint):
            raise UserError("resume: the training data is not what it was when the checkpoint was written")
        self.fingerprint = fingerprint
        self.eval_collector.data_collect(train_data)
        if self.config["train_neg_sample_args"].get("dynamic", False):
            train_data.get_model(self.model)
        self._check_schedule(len(train_data.steps))
        if self.config["adaptive_batch"]:
            self.adaptive = AdaptiveBatch(self.config, train_data, self.model, self.epochs, self.scaler.get_scale)
            if self._adaptive_state:
                self.adaptive.load_state_dict(self._adaptive_state)
        self._set_weights(self._iterate)
        self._iterate = {}
        self._saved = saved
        if saved:
            self.open_folder()
        self._notify("on_fit_start", train_data)
        with self._signals():
            if self._rng is not None:
                set_random_states(self._rng)
                self._rng = None
            for epoch in range(self._position["epoch"], self.epochs):
                if self.cur_step > self.stopping_step:
                    break
                self._run_epoch(train_data, valid_data, epoch, verbose, show_progress, callback_fn)
            self._stop_if_asked()
        if saved and not distributed.broadcast(Path(self.saved_model_file).exists()):
            self._save_checkpoint(self.epochs - 1, verbose=verbose)  # nothing was ever better than what came before
        if self._output is not None:  # what training gives is what is used from here on, until it goes on
            outputs, self._iterate = self._outputs()
            self._set_weights(outputs)
        self._add_hparam_to_tensorboard(self.best_valid_score)
        self._notify("on_fit_end")
        return self.best_valid_score, self.best_valid_result

    def _run_epoch(
        self, train_data: Any, valid_data: Any, epoch: int, verbose: bool, progress: bool, callback: Any
    ) -> None:
        """Train, evaluate, and save what came of it."""
        if not self._position["ended"]:
            begin = time.time()
            losses = self._train_epoch(train_data, epoch, show_progress=progress)
            self.train_loss_dict[epoch] = sum(losses) if isinstance(losses, tuple) else losses
            if verbose:
                self.logger.info(self._generate_train_loss_output(epoch, begin, time.time(), losses))
            self._add_train_loss_to_tensorboard(epoch, losses)
            self._log_step_sizes(epoch)
            self.wandblogger.log_metrics({"epoch": epoch, "train_loss": losses, "train_step": epoch}, head="train")
        improved, score = not valid_data, None
        if valid_data and (epoch + 1) % self.eval_step == 0:
            self._rng = random_states()  # a signal from here on repeats the evaluation
            improved, score = self._validate(valid_data, epoch, verbose, progress)
            self._rng = None
        self._schedule("epoch", score)
        self._position = _start_of(epoch + 1)
        if self.adaptive:
            self.adaptive.end_epoch()
            self.logger.info(f"adaptive_batch: {self.adaptive.text()}")
            if self._saved:
                folder = self.open_folder()
                if distributed.rank() == 0 and not self.adaptive.save(folder):
                    self.logger.info(
                        "batch_size.csv has no plot beside it; Matplotlib draws it: pip install matplotlib"
                    )
        if self._saved:
            if improved:
                self._save_checkpoint(epoch, verbose=verbose)
            self._save_step()
        if callback and score is not None:
            callback(epoch, score)

    def _validate(self, valid_data: Any, epoch: int, verbose: bool, progress: bool) -> tuple[bool, float]:
        begin = time.time()
        with self._output.evaluation_point() if self._output is not None else contextlib.nullcontext():
            self._notify("on_validation_start", valid_data)
            score, result = self._valid_epoch(valid_data, show_progress=progress)
        self.best_valid_score, self.cur_step, stop, improved = early_stopping(
            score, self.best_valid_score, self.cur_step, max_step=self.stopping_step, bigger=self.valid_metric_bigger
        )
        if improved:
            self.best_valid_result = result
        if verbose:
            self.logger.info(f"epoch {epoch} evaluating [time: {time.time() - begin:.2f}s, valid_score: {score:f}]")
            self.logger.info(f"valid result: \n{dict2str(result)}")
            if stop:
                best = epoch - self.cur_step * self.eval_step
                self.logger.info(f"Finished training, best eval result in epoch {best}")
        self.tensorboard.add_scalar("Vaild_score", score, epoch)  # RecBole's spelling, which its users' plots read
        self.wandblogger.log_metrics({**result, "valid_step": epoch // self.eval_step}, head="valid")
        return improved, score

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float | tuple[float, ...]:
        """The steps that are left of an epoch; the sum of their losses, of each term where a model gives several."""
        self.model.train()
        self._notify("on_epoch_start", epoch_idx)
        position = self._position
        train_data.steps.begin(epoch_idx, position["number"], position["seen"])
        done = position["number"]
        bar = tqdm(
            train_data,
            initial=done,
            total=done + len(train_data.steps),
            desc=f"Train {epoch_idx:>5}",
            unit="step",
            disable=not show_progress,
        )
        begin, first_seen = time.perf_counter(), position["seen"]
        for step in bar:
            losses = self._run_step(step, loss_func)
            before = position["loss"] or [0.0] * len(losses)
            self._position = position = {
                "epoch": epoch_idx,
                "number": step.number + 1,
                "seen": step.seen,
                "loss": [a + b for a, b in zip(before, losses)],
                "ended": False,
            }
            if show_progress:
                rate = (step.seen - first_seen) / (time.perf_counter() - begin)
                memory = peak_memory(self.device) / 2**20
                bar.set_postfix_str(f"loss {sum(losses):.4f}, {rate:,.0f} targets/s, {memory:,.0f} MiB", refresh=False)
            every = self.config["checkpoint_steps"]
            if every and self._saved and self.global_step % every == 0:
                self._save_step()
            self._stop_if_asked()
        total = position["loss"]
        self._notify("on_epoch_end", epoch_idx, sum(total) / max(position["number"], 1))
        self._position = {**position, "ended": True}
        return tuple(total) if len(total) > 1 else (total[0] if total else 0.0)

    def _run_step(self, step: Step, loss_func: Any = None) -> list[float]:
        """One step of the optimiser; the terms of its loss."""
        compute = loss_func or self._loss
        step = step._replace(parts=[part._replace(batch=part.batch.to(self.device)) for part in step.parts])

        def backward(part: Part) -> list[float]:
            with torch.autocast(self.device.type, enabled=self.enable_amp):
                losses = compute(part.batch)
            losses = losses if isinstance(losses, tuple) else (losses,)
            loss: Any = sum(losses)
            self._check_nan(loss, step)
            self.scaler.scale(part.weight * loss).backward()
            return [part.weight * term.item() for term in losses]

        self._notify("on_step_start", step)
        measurement = None
        if self.adaptive:
            terms, parts = self.adaptive.gradients(step, backward, self.optimizer.zero_grad)
            step = step._replace(parts=parts)
            measurement = self.adaptive.measure()
        else:
            self.optimizer.zero_grad()
            found = []
            for part in step.parts:
                last = part is step.parts[-1]
                alone = contextlib.nullcontext() if last or not hasattr(compute, "no_sync") else compute.no_sync()
                with alone:  # the processes' gradients meet in the last part
                    found.append(backward(part))
            terms = [sum(values) for values in zip(*found)]
        self.scaler.unscale_(self.optimizer)
        self._notify("on_gradients", step)
        if self.clip_grad_norm:
            clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.global_step += 1
        if self.adaptive:
            figures = self.adaptive.decide(measurement, self.global_step, self.step_size)
            for name, value in figures.items():
                self.tensorboard.add_scalar(f"AdaptiveBatch/{name}", value, self.global_step)
        if self.global_step % TRIM_EVERY == 0 and self.device.type == "cpu":
            return_free_memory()
        self._schedule("step")
        terms = distributed.mean(terms)
        self._notify("on_step_end", step, sum(terms))
        return terms

    def _check_nan(self, loss: torch.Tensor, step: Step | None = None) -> None:
        if torch.isfinite(loss):
            return
        where = f"epoch {self._position['epoch']}, step {step.number}" if step else "training"
        written = self.folder is not None and any(self.folder.glob(f"*{checkpoint.SUFFIX}"))
        kept = f"; the last good checkpoint is in {self.folder}" if written else ""
        smaller = f"a smaller learning_rate than {self.learning_rate}"
        if hasattr(self.optimizer, "step_sizes"):
            smaller = f"a smaller D or rho in learner_args than {self.config['learner_args']}"
        raise UserError(
            f"{where}: the training loss became {loss.item()}; try {smaller} or clip_grad_norm: {{'max_norm': 5}}{kept}"
        )

    # --- evaluate ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: str | None = None, show_progress: bool = False
    ) -> Any:
        """As RecBole's; returns the metrics. ``load_best_model`` takes the checkpoint's weights first."""
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
            if distributed.world_size() == 1:  # several need not have the same number of batches
                self._stop_if_asked()
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

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def open_folder(self) -> Path:
        """The folder of this run, made on the first call; no two runs share one."""
        if self.folder is None and distributed.rank() == 0:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            stem = f"{self.config['model']}-{self.config['dataset']}-{stamp}"
            for attempt in range(1, 1000):
                folder = Path(self.checkpoint_dir) / (stem if attempt == 1 else f"{stem}-{attempt}")
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(parents=True)
                    self.folder = folder
                    break
        self.folder = distributed.broadcast(self.folder)
        self.saved_model_file = str(self.folder / checkpoint.BEST)
        return self.folder

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write the best checkpoint."""
        path = self.open_folder() / checkpoint.BEST
        self._write(path)
        if verbose:
            self.logger.info(f"Saving current: {path}")

    def _save_step(self) -> None:
        """Write the checkpoint of this moment, and drop the oldest."""
        folder = self.open_folder()
        self._write(checkpoint.step_file(folder, self.global_step))
        if distributed.rank() == 0:
            checkpoint.keep_newest(folder, self.config["checkpoint_keep"])

    def _write(self, path: Path) -> None:
        states = distributed.gather(self._rng or random_states())
        if distributed.rank():
            return
        outputs, iterate = self._outputs()
        tensors = {f"model.{name}": tensor for name, tensor in outputs.items()}
        tensors |= {f"iterate.{name}": tensor for name, tensor in iterate.items()}
        optimizer_tensors, optimizer = checkpoint.flatten_optimizer(self.optimizer.state_dict())
        rng_tensors = {f"rng.{rank}.{name}": t for rank, state in enumerate(states) for name, t in state.items()}
        best = float(self.best_valid_score)
        training = {
            **self._position,
            "global_step": self.global_step,
            "cur_step": self.cur_step,
            "best_valid_score": best if math.isfinite(best) else None,
            "best_valid_result": plain(self.best_valid_result),
            "train_losses": plain(self.train_loss_dict),
            "optimizer": optimizer,
            "scheduler": checkpoint.keyed(self.scheduler.state_dict()) if self.scheduler else None,
            "scaler": plain(self.scaler.state_dict()),
            "adaptive": self.adaptive.state_dict() if self.adaptive else None,
            "hooks": {type(hook).__name__: hook.state_dict() for hook in self.hooks},
            "fingerprint": self.fingerprint,
            "options": plain(getattr(self.config, "external_config_dict", {})),
        }
        info = {
            "model": self.config["model"],
            "config": settings_of(self.config, self.model),
            "catalogue": self.catalogue,
            "training": training,
        }
        checkpoint.write(path, {**tensors, **optimizer_tensors, **rng_tensors}, info)

    def resume_checkpoint(self, resume_file: str | Path) -> None:
        """Take over everything from a checkpoint of this model, so that :meth:`fit` goes on as if never stopped.

        Args:
            resume_file: a checkpoint, or a run's folder: its newest checkpoint that is whole. RecBole's own ``.pth``
                is refused; see :func:`recbole_ssm.trainer.checkpoint.read_pickle`.

        Raises:
            UserError: it cannot be read, or is of another model or of other settings.
        """
        self.restore(*checkpoint.find(Path(resume_file)))

    def restore(self, path: Path, saved: checkpoint.Checkpoint) -> None:
        """Take over what a checkpoint holds, which was read from ``path``."""
        training = saved.info.get("training")
        if training is None or saved.info.get("model") != self.config["model"]:
            raise UserError(f"checkpoint {path}: of {saved.info.get('model')}, cannot resume {self.config['model']}")
        if "config" in saved.info:
            now = settings_of(self.config, self.model)
            for key in sorted(set(now) | set(saved.info["config"])):
                before, here = saved.info["config"].get(key), now.get(key)
                if before != here and key not in FREE_KEYS:
                    raise UserError(
                        f"resume: {key} is {here!r} here and was {before!r} in {path}; leave it as it was, "
                        "or start anew"
                    )
        # where the optimiser stands; what is served and tested is its output
        iterate = {n.replace("iterate.", "model.", 1): t for n, t in saved.tensors.items() if n.startswith("iterate.")}
        load_weights(self.model, saved._replace(tensors={**saved.tensors, **iterate}), path)
        self._iterate = {}
        try:
            self._take_over(saved.tensors, training)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"checkpoint {path}: its training state does not fit ({error})") from error
        if saved.info.get("format"):
            self.folder = path.parent
            self.saved_model_file = str(path.parent / checkpoint.BEST)
            if distributed.rank() == 0:
                checkpoint.set_aside(path.parent, self.global_step)
        self.logger.info(
            f"Checkpoint loaded from {path}. Resume training from epoch {self._position['epoch']}, "
            f"step {self._position['number']}"
        )

    def _take_over(self, tensors: Mapping[str, torch.Tensor], training: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(checkpoint.unflatten_optimizer(tensors, training["optimizer"]))
        self.cur_step = training["cur_step"]
        if training["best_valid_score"] is not None:
            self.best_valid_score = training["best_valid_score"]
        self._position = {key: training.get(key, start) for key, start in _start_of(training["epoch"]).items()}
        self.start_epoch = self._position["epoch"]
        if "global_step" not in training:  # RecBole's own
            return
        self.global_step, self.fingerprint = training["global_step"], training["fingerprint"]
        self.best_valid_result = training["best_valid_result"]
        self.train_loss_dict = {int(epoch): loss for epoch, loss in training["train_losses"].items()}
        if self.scheduler:
            self.scheduler.load_state_dict(checkpoint.unkeyed(training["scheduler"]))
        self.scaler.load_state_dict(training["scaler"])
        self._adaptive_state = training["adaptive"]
        for hook in self.hooks:
            if type(hook).__name__ in training["hooks"]:
                hook.load_state_dict(training["hooks"][type(hook).__name__])
        states: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith("rng."):
                _, rank, kind = name.split(".", 2)
                states.setdefault(int(rank), {})[kind] = tensor
        if len(states) != distributed.world_size():
            raise ValueError(f"it was written by {len(states)} processes, here are {distributed.world_size()}")
        self._rng = states[distributed.rank()]

    # --- the optimiser -----------------------------------------------------------------------------------------------

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        """RecBole's learners by their names, and ours, with ``learner_args`` and ``learner_groups``."""
        name, arguments = self.config["learner"], dict(self.config["learner_args"] or {})
        if arguments.get("same_batch"):
            raise UserError("learner_args: same_batch takes each gradient twice, and training gives one; leave it out")
        defaults = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if hasattr(LEARNERS[name], "step_sizes"):
            del defaults["lr"]  # they find their own
        if name == "sparse_adam":
            del defaults["weight_decay"]
        own: Mapping[str, Any] = self.config["learner_groups"] or {}
        try:
            trained = [(path, p) for path, p in self.model.named_parameters() if p.requires_grad]
            groups = parameter_groups(trained, own)
        except UserError as error:
            raise UserError(f"learner_groups: {error}") from error
        try:
            optimizer = LEARNERS[name](groups, **{**defaults, **arguments})  # type: ignore[arg-type]
        except TypeError as error:
            raise UserError(f"learner_args: {name} does not take {arguments} ({error})") from error
        known = set(inspect.signature(LEARNERS[name]).parameters) & set(optimizer.defaults)
        for key in (key for options in own.values() for key in options):
            if key not in known:  # PyTorch would keep it, unused
                raise UserError(f"learner_groups: {name} has no '{key}' of a group{did_you_mean(key, known)}")
        return optimizer

    def _build_output(self) -> Any:
        """What has the optimiser's ``evaluation_point``, where its output is not where it stands; or None."""
        own, power = hasattr(self.optimizer, "evaluation_point"), self.config["learner_average"]
        if power is None:
            return self.optimizer if own else None
        if own:
            raise UserError(f"learner_average: {self.learner} has an output of its own; leave learner_average empty")
        try:
            return IterateAverage(self.optimizer, power)
        except UserError as error:
            raise UserError(f"learner_average: {error}, or leave it empty for no mean") from error

    def _outputs(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The model's state with the optimiser's output for weights, and what differs from it where that stands."""
        here = self.model.state_dict()
        if self._output is None:
            return here, {}
        with self._output.evaluation_point():
            outputs = {name: tensor.clone() for name, tensor in here.items()}
        return outputs, {name: t.clone() for name, t in here.items() if not torch.equal(t, outputs[name])}

    def _set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Of the model, in place, by their names in its state."""
        state = self.model.state_dict()
        for name, weight in weights.items():
            state[name].copy_(weight)

    @property
    def batch_size(self) -> int:
        """Targets of the next step."""
        return int(self.adaptive.sizes.batch_size if self.adaptive else self.config["train_batch_size"])

    @property
    def step_size(self) -> float:
        """The learning rate of the first parameter group, or the step size that the optimiser found for it."""
        own = getattr(self.optimizer, "step_sizes", None)
        return own()[0] if own else self.optimizer.param_groups[0]["lr"]

    def _log_step_sizes(self, epoch: int) -> None:
        """H and 1 / H of the optimisers that choose them."""
        if not hasattr(self.optimizer, "step_sizes"):
            return
        for number, size in enumerate(self.optimizer.step_sizes()):
            H = 1 / size if size else math.inf
            self.logger.info(f"{self.learner}: group {number} H {H:.4g}, step size {size:.4g}")
            self.tensorboard.add_scalar(f"StepSize/{number}", size, epoch)
            self.tensorboard.add_scalar(f"H/{number}", H, epoch)

    def _notify(self, moment: str, *what: Any) -> None:
        for hook in self.hooks:
            getattr(hook, moment)(self, *what)

    def _build_scheduler(self) -> Any:
        name, arguments = self.config["lr_scheduler"], self.config["lr_scheduler_args"] or {}
        if name is None:
            return None
        if hasattr(self.optimizer, "step_sizes"):
            raise UserError(f"lr_scheduler: {self.learner} finds its own step size; leave lr_scheduler empty")
        known: dict[str, Any] = {
            n: c for n, c in vars(torch.optim.lr_scheduler).items() if inspect.isclass(c) and hasattr(c, "step")
        }
        if name not in known:
            raise UserError(f"lr_scheduler: torch.optim has no scheduler '{name}'{did_you_mean(str(name), known)}")
        if name == "ReduceLROnPlateau":
            if self.config["lr_scheduler_interval"] == "step":
                raise UserError("lr_scheduler_interval: ReduceLROnPlateau looks at validation; take 'epoch'")
            arguments = {"mode": "max" if self.valid_metric_bigger else "min", **arguments}
        try:
            return known[name](self.optimizer, **arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"lr_scheduler_args: {name} does not take {arguments} ({error})") from error

    def _schedule(self, interval: str, score: float | None = None) -> None:
        if self.scheduler is None or self.config["lr_scheduler_interval"] != interval:
            return
        if not isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()
        elif score is not None:
            self.scheduler.step(score)

    def _check_schedule(self, steps: int) -> None:
        """OneCycleLR refuses to go beyond its total_steps, and would do so in the middle of a run."""
        total = getattr(self.scheduler, "total_steps", None)
        planned = self.epochs * (steps if self.config["lr_scheduler_interval"] == "step" else 1)
        if isinstance(self.scheduler, torch.optim.lr_scheduler.OneCycleLR) and total < planned:
            raise UserError(f"lr_scheduler_args: total_steps is {total}, but {planned} steps come; give {planned}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C wait for the end of a batch, and leave a checkpoint; a second one does not wait."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            signal.signal(number, before[number])
            self._signal = number

        before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except _StopRequest:
            text = "nothing was saved"
            if self._saved:
                self._save_step()
                text = f"go on with --resume={self.folder}"
            raise Interrupted(self._signal or signal.SIGTERM, text) from None
        finally:
            self._signal = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        if distributed.any_of(bool(self._signal)):
            raise _StopRequest


class _Loss(nn.Module):
    """calculate_loss as a module's forward, around which DistributedDataParallel puts its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        """The loss, or its terms."""
        return self.model.calculate_loss(batch)


class _StopRequest(Exception):  # noqa: N818 (nothing failed)
    """A signal came, and this is a moment at which training can be saved."""


class _Silence:
    """TensorBoard's writer on all processes but the first."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _start_of(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "number": 0, "seen": 0, "loss": [], "ended": False}


def random_states() -> dict[str, torch.Tensor]:
    """The global random states of Python, NumPy and PyTorch on all devices, as tensors."""
    _, keys, position, has_gauss, gauss = tuple(np.random.get_state(legacy=True))
    assert isinstance(keys, np.ndarray)
    version, words, next_gauss = random.getstate()
    states = {
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Bring back what :func:`random_states` gave."""
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    version, *words = states["python"].tolist()
    next_gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), next_gauss[0] if next_gauss else None))
    torch.set_rng_state(states["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda{index}"], index)


def __getattr__(name: str) -> Any:
    if name == "SSMTrainer":  # its name in 0.1.0
        return Trainer
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
