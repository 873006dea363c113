"""RecBole's trainer, with checkpoints that are safe to load."""

from __future__ import annotations

import datetime
import itertools
import math
from pathlib import Path
from typing import Any

import torch

from recbole_ssm import compat
from recbole_ssm.errors import UserError
from recbole_ssm.trainer import checkpoint

compat.install()

import recbole.utils  # noqa: E402
from recbole.trainer import Trainer  # noqa: E402

MACHINE_KEYS = ("data_path", "checkpoint_dir", "device")  # of the machine, not of the model


class SSMTrainer(Trainer):
    """recbole.trainer.Trainer, whose checkpoints are safetensors files (:mod:`recbole_ssm.trainer.checkpoint`).

    A checkpoint is self-contained for recommending: it carries the catalogue, so that neither data set nor training
    machine is needed to use it.
    """

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        stem = f"{config['model']}-{config['dataset']}-{stamp}"
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        paths = (Path(self.checkpoint_dir) / (name + checkpoint.SUFFIX) for name in names)
        self.saved_model_file = str(next(path for path in paths if not path.exists()))
        self.catalogue: dict[str, Any] = {}

    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> Any:
        """As RecBole's; returns (best validation score, best validation result)."""
        self.catalogue = catalogue_of(train_data._dataset)
        return super().fit(train_data, *args, **kwargs)

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: str | None = None, show_progress: bool = False
    ) -> Any:
        """As RecBole's; returns the metrics. ``load_best_model`` takes the checkpoint's weights first."""
        if load_best_model:
            path = Path(model_file or self.saved_model_file)
            load_weights(self.model, checkpoint.read(path), path)
            self.logger.info(f"Loading model structure and parameters from {path}")
        return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)

    def resume_checkpoint(self, resume_file: str) -> None:
        """Take weights, optimiser, epoch and best score from a checkpoint of the same model."""
        path = Path(resume_file)
        saved = checkpoint.read(path)
        training = saved.info.get("training")
        if training is None or saved.info.get("model") != self.config["model"]:
            raise UserError(f"checkpoint {path}: of {saved.info.get('model')}, cannot resume {self.config['model']}")
        load_weights(self.model, saved, path)
        self.start_epoch, self.cur_step = training["epoch"] + 1, training["cur_step"]
        self.best_valid_result = training["best_valid_result"]
        if training["best_valid_score"] is not None:
            self.best_valid_score = training["best_valid_score"]
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in saved.tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, entry = rest.partition(".")
                state.setdefault(int(index), {})[entry] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": training["param_groups"]})
        self.saved_model_file = str(path)
        self.logger.info(f"Checkpoint loaded. Resume training from epoch {self.start_epoch}")

    def _check_nan(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise UserError(
                f"the training loss became {loss.item()}; try a smaller learning_rate than {self.learning_rate} "
                "or clip_grad_norm: {'max_norm': 5}"
            )

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        if not self.config["single_spec"] and self.config["local_rank"] != 0:
            return
        path = Path(kwargs.pop("saved_model_file", self.saved_model_file))
        optimizer = self.optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, entries in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        best = float(self.best_valid_score)
        info = {
            "model": self.config["model"],
            "config": plain({k: v for k, v in self.config.final_config_dict.items() if k not in MACHINE_KEYS}),
            "catalogue": self.catalogue,
            "training": {
                "epoch": epoch,
                "cur_step": self.cur_step,
                "best_valid_score": best if math.isfinite(best) else None,
                "best_valid_result": plain(self.best_valid_result),
                "param_groups": plain(optimizer["param_groups"]),
            },
        }
        checkpoint.write(path, tensors, info)
        if verbose:
            self.logger.info(f"Saving current: {path}")


def get_trainer(config: Any) -> type[SSMTrainer]:
    """The trainer of a model: SSMTrainer, in front of RecBole's special one where the model has one."""
    base = recbole.utils.get_trainer(config["MODEL_TYPE"], config["model"])
    return SSMTrainer if base is Trainer else type(base.__name__, (SSMTrainer, base), {})


def load_weights(model: torch.nn.Module, saved: checkpoint.Checkpoint, path: Path) -> None:
    """Copy a checkpoint's weights into a model, wherever that lives.

    Raises:
        UserError: the names or sizes of the weights do not fit.
    """
    weights = {name.removeprefix("model."): t for name, t in saved.tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[min(1, len(str(error).splitlines()) - 1)].strip()
        raise UserError(f"checkpoint {path}: its weights do not fit this model ({first})") from error


def catalogue_of(dataset: Any) -> dict[str, Any]:
    """What recommending needs of a data set: the item tokens by id, and the sizes that models ask for."""
    sizes = {field: dataset.num(field) for field in dataset.field2type if field in dataset.field2id_token}
    return {"items": [str(token) for token in dataset.field2id_token[dataset.iid_field]], "sizes": sizes}


def plain(value: Any) -> Any:
    """The value in JSON's terms; what JSON cannot hold (an enum, a device) becomes its text."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) or (hasattr(value, "__float__") and not isinstance(value, torch.Tensor)):
        return float(value)
    return str(value)
