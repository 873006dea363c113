"""The checkpoints of a run: what stands in them, when they are written, and how a run goes on from one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from recbole_ssm import compat, distributed
from recbole_ssm.console import run_on_command_line
from recbole_ssm.errors import UserError
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer import folder as folders
from recbole_ssm.trainer.checkpoint import load_weights, plain, settings_of
from recbole_ssm.trainer.gradients import Gradients
from recbole_ssm.trainer.hooks import Hook
from recbole_ssm.trainer.learner import Learner
from recbole_ssm.trainer.losses import Losses
from recbole_ssm.trainer.snapshot import (
    Position,
    RandomStates,
    Snapshot,
    random_states,
    require_same_run,
    set_random_states,
)

compat.install()

from recbole_ssm.evaluation.metrics import Result  # noqa: E402
from recbole_ssm.trainer.evaluate import EvaluatingTrainer  # noqa: E402


class SavingTrainer(EvaluatingTrainer):
    """A trainer whose moments can be saved and taken up again; :class:`recbole_ssm.trainer.Trainer` takes its steps."""

    def __init__(self, config: Any, model: Any, hooks: Iterable[Hook]) -> None:
        super().__init__(config, model, hooks)
        self.best_valid_score: float
        self.best_valid_result: Any
        self.cur_step: int
        self.folder: Path | None = None
        self.catalogue = checkpoint.Checkpoint({}, {})
        self.fingerprint = ""
        self.global_step = 0
        self.position = Position()
        self._losses = Losses(self)
        self.gradients = Gradients(config, model, self.learner)
        self._gradients_state: dict[str, Any] | None = None
        # What a checkpoint holds in place of the random states of the moment.
        self._random: RandomStates | None = None
        self._saved = False
        # The checkpoint to go on from.
        self._start: Path | None = None

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        # RecBole calls this; its own attribute ``learner`` is the name of the optimiser.
        self.learner = Learner(self.config, self.model, self.enable_scaler, self.valid_metric_bigger)
        return self.learner.optimizer

    @property
    def batch_size(self) -> int:
        """Targets of the next step."""
        return self.gradients.batch_size

    @property
    def step_size(self) -> float:
        """The learning rate of the first parameter group, or the step size that the optimiser found for it."""
        return self.learner.step_size

    def _settle(self) -> None:
        """Wait for the steps that are under way, and note the sums of the losses; nothing is saved before that."""
        self.position = self.position._replace(loss=self._losses.sums())

    def _stand_at(self, position: Position) -> None:
        self.position = position
        self._losses.begin(position.number, position.loss)

    def open_folder(self) -> Path:
        """The folder of this run, made on the first call; no two runs share one."""
        if self.folder is None and distributed.rank() == 0:
            name = f"{self.config['model']}-{self.config['dataset']}"
            self.folder = folders.new_folder(Path(self.checkpoint_dir), name)
        self.folder = distributed.broadcast(self.folder)
        self.saved_model_file = str(self.folder / checkpoint.BEST)
        return self.folder

    @contextlib.contextmanager
    def _folder_held(self) -> Iterator[None]:
        """Keep other runs out of this run's folder, which becomes what it was at the moment to go on from."""
        with contextlib.ExitStack() as stack:
            refusal = None
            if self._saved and self.folder and distributed.rank() == 0:
                try:
                    stack.enter_context(folders.held(self.folder))
                    if self._start:
                        folders.go_back(
                            self._start,
                            self.global_step,
                            self.cur_step == 0 and self.position.validated(self.eval_step),
                        )
                except UserError as error:
                    refusal = error
            refusal = distributed.broadcast(refusal)
            if refusal is not None:
                raise refusal
            best = distributed.broadcast(Path(self.saved_model_file).exists())
            if self._saved and self._start and not best and math.isfinite(self.best_valid_score):
                self.logger.warning(
                    f"{self.folder}: the best checkpoint until here is gone; the best from here on counts"
                )
                self.best_valid_score = -math.inf if self.valid_metric_bigger else math.inf
                self.best_valid_result = None
            self._start = None
            yield

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write the best checkpoint."""
        path = self.open_folder() / f".{checkpoint.BEST}"
        self._write(path)
        if distributed.rank() == 0:
            folders.put_best(path, self.global_step)
        if verbose:
            self.logger.debug(f"Saving current: {self.saved_model_file}")

    def _save_step(self) -> None:
        """Write the checkpoint of this moment, and drop the oldest."""
        folder = self.open_folder()
        self._write(folders.step_file(folder, self.global_step))
        if distributed.rank() == 0:
            folders.keep_newest(folder, self.config["checkpoint_keep"])

    def _save_for_later(self) -> str:
        """Save what an interrupted run can go on from, and say so."""
        if not self._saved:
            return "nothing was saved"
        self._save_step()
        return f"go on with recbole-ssm train --resume={run_on_command_line(self.config, self.folder)}"

    def _write(self, path: Path) -> None:
        self._settle()
        states = distributed.gather(self._random or random_states())
        if distributed.rank() == 0:
            checkpoint.write(path, *self._contents(states))

    def _contents(self, states: list[RandomStates]) -> checkpoint.Checkpoint:
        """All that a checkpoint of this moment holds."""
        tensors, info = self._snapshot(states).checkpoint()
        header = {"model": self.config["model"], "config": settings_of(self.config, self.model)}
        # Of a user's own model; who loads the checkpoint gives the class again.
        if own_class := getattr(self.config, "class_path", None):
            header["class"] = own_class
        # Who goes on from a first stage goes on to the model for which it is trained.
        if ranker := getattr(self.config, "ranker", None):
            header["for"] = {"model": ranker["model"], "options": plain(ranker.external_config_dict)}
        return checkpoint.Checkpoint({**self.catalogue.tensors, **tensors}, {**header, **self.catalogue.info, **info})

    def _snapshot(self, states: list[RandomStates]) -> Snapshot:
        """This moment of training; ``states`` are the random states of all processes."""
        best = float(self.best_valid_score)
        progress = {
            **self.position._asdict(),
            "global_step": self.global_step,
            "cur_step": self.cur_step,
            "best_valid_score": best if math.isfinite(best) else None,
            "best_valid_result": plain(self.best_valid_result),
            "best_valid_result_masked": plain(getattr(self.best_valid_result, "masked", None)),
            "train_losses": plain(self.train_loss_dict),
            **self.learner.progress(),
            "adaptive": self.gradients.state_dict(),
            "hooks": {type(hook).__name__: state for hook in self.hooks if (state := hook.state_dict())},
            "fingerprint": self.fingerprint,
            "options": plain(getattr(self.config, "external_config_dict", {})),
        }
        weights, optimizer_weights = self.learner.weights()
        return Snapshot(weights, optimizer_weights, self.optimizer.state_dict(), states, progress)

    def resume_checkpoint(self, resume_file: str | Path) -> None:
        """Take over everything from a checkpoint of this model, so that :meth:`fit` goes on as if never stopped.

        Args:
            resume_file: a checkpoint, or a run's folder: its newest checkpoint that is whole.
                RecBole's own ``.pth`` is refused; see
                :func:`recbole_ssm.trainer.checkpoint.read_pickle`.

        Raises:
            UserError: it cannot be read, or is of another model or of other settings.
        """
        self.restore(*checkpoint.find(Path(resume_file)))

    def restore(self, path: Path, saved: checkpoint.Checkpoint) -> None:
        """Take over what a checkpoint holds, which was read from ``path``; as :meth:`resume_checkpoint`."""
        require_same_run(saved, path, self.config, self.model)
        try:
            snapshot = Snapshot.of(saved)
            weights = {**snapshot.weights, **snapshot.optimizer_weights}
            load_weights(self.model, checkpoint.Checkpoint({f"model.{n}": t for n, t in weights.items()}, {}), path)
            self._take_over(snapshot)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"checkpoint {path}: its training state does not fit ({error})") from error
        if saved.info.get("format"):
            self.folder = path.parent
            self.saved_model_file = str(path.parent / checkpoint.BEST)
            self._start = path
        self.logger.info(
            f"Checkpoint loaded from {path}. Resume training from epoch {self.position.epoch}, "
            f"step {self.position.number}"
        )

    def _take_over(self, snapshot: Snapshot) -> None:
        progress = snapshot.progress
        self.learner.load(snapshot)
        self.cur_step = progress["cur_step"]
        if progress["best_valid_score"] is not None:
            self.best_valid_score = progress["best_valid_score"]
        position = {field: progress[field] for field in Position._fields if field in progress}
        self._stand_at(Position(**position))
        self.start_epoch = self.position.epoch
        # RecBole's own checkpoints hold no more than this.
        if "global_step" not in progress:
            return
        self.global_step, self.fingerprint = progress["global_step"], progress["fingerprint"]
        if progress["best_valid_result"] is not None:
            self.best_valid_result = Result(progress["best_valid_result"], progress.get("best_valid_result_masked"))
        self.train_loss_dict = {int(epoch): loss for epoch, loss in progress["train_losses"].items()}
        self._gradients_state = progress["adaptive"]
        for hook in self.hooks:
            if type(hook).__name__ in progress["hooks"]:
                hook.load_state_dict(progress["hooks"][type(hook).__name__])
        written, here = len(snapshot.random), distributed.world_size()
        if written != here:
            raise ValueError(f"it was written by {written} processes, here are {here}")
        # They are set when training goes on; here they are only tried.
        self._random, now = snapshot.random[distributed.rank()], random_states()
        set_random_states(self._random)
        set_random_states(now)
