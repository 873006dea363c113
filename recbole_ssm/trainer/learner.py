"""The optimiser of a run, with its schedule, its gradient scaler and the average of its
iterates.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer, lr_scheduler

from recbole_ssm.errors import UserError, did_you_mean, first_line, shown
from recbole_ssm.optim import LEARNERS, IterateAverage, parameter_groups
from recbole_ssm.optim.gradient_noise import is_out_of_memory
from recbole_ssm.optim.schedule import SHAPES, Schedule
from recbole_ssm.trainer.checkpoint import keyed, plain, unkeyed
from recbole_ssm.trainer.snapshot import Snapshot

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OF_A_DEVICE = ("fused", "foreach", "capturable")
"""Options of PyTorch's optimisers that say how a step is computed on a device, and not what."""


class Learner:
    """Takes the steps of training, from gradients that are complete.

    While it trains, the model holds the weights that the optimiser goes on from. What is tested
    and served may be others: the average of the optimiser's iterates, or the output of an
    accelerated method.

    Args:
        config: the configuration; ``learner`` and ``lr_scheduler`` with their keys, and
            ``clip_grad_norm``.
        model: whose weights are trained.
        scaled: whether gradients are scaled, for the sake of half precision.
        bigger: whether the higher of two validation scores is the better one.

    Raises:
        UserError: an option is impossible, or does not go with another.
    """

    def __init__(self, config: Any, model: nn.Module, scaled: bool, bigger: bool) -> None:
        self.model = model
        self.clip_grad_norm: Mapping[str, Any] | None = config["clip_grad_norm"]
        self.optimizer = _build_optimizer(config, model)
        self.scheduler = _build_scheduler(config, self.optimizer, bigger)
        self.interval: str = "step" if isinstance(self.scheduler, Schedule) else config["lr_scheduler_interval"]
        self._device_type = torch.device(config["device"]).type
        # None is PyTorch's choice for the device.
        self._half = AMP_DTYPES.get(config["amp_dtype"])
        self._mixed = bool(config["enable_amp"])
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=scaled)
        self._output = _build_output(config, self.optimizer)
        self._optimizer_weights: Mapping[str, Tensor] = {}
        # Whether the next step is the first after a checkpoint was read.
        self._restored = False

    @property
    def step_size(self) -> float:
        """The learning rate of the first parameter group, or the step size that the optimiser
        found for it.
        """
        own = getattr(self.optimizer, "step_sizes", None)
        return own()[0] if own else self.optimizer.param_groups[0]["lr"]

    # --- steps ---

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """While the context lasts, PyTorch computes in half precision where ``enable_amp`` says so."""
        return torch.autocast(self._device_type, self._half, self._mixed)

    def unscale(self) -> None:
        """Give complete gradients their true size."""
        self.scaler.unscale_(self.optimizer)

    def step(self) -> None:
        """Clip the gradients, and move the weights."""
        if self.clip_grad_norm:
            clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
        try:
            self.scaler.step(self.optimizer)
        except Exception as error:
            if not self._restored or is_out_of_memory(error):
                raise
            # An optimiser looks at the state that it was given when it takes its first step.
            raise UserError(f"resume: the optimiser's state does not fit its weights ({first_line(error)})") from error
        self._restored = False
        self.scaler.update()

    def schedule(self, interval: str, score: float | None = None) -> None:
        """A ``step`` or an ``epoch`` has ended, the latter with the score of its validation, if
        there was one.
        """
        if self.scheduler is None or self.interval != interval:
            return
        if not isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()
        elif score is not None:
            self.scheduler.step(score)

    def check_length(self, epochs: int, steps: int) -> None:
        """Tell the schedule that so many epochs of so many steps come; refuse one that is too short, which would fail
        in mid-run.
        """
        if isinstance(self.scheduler, Schedule):
            self.scheduler.plan(epochs * steps)
            return
        planned = epochs * (steps if self.interval == "step" else 1)
        if isinstance(self.scheduler, lr_scheduler.OneCycleLR) and self.scheduler.total_steps < planned:
            raise UserError(
                f"lr_scheduler_args: total_steps is {self.scheduler.total_steps}, but {planned} steps come; "
                f"give {planned}"
            )

    # --- what is tested and served ---

    def evaluation_point(self) -> contextlib.AbstractContextManager[Any]:
        """While the context lasts, the model holds the weights that are tested and served."""
        return contextlib.nullcontext() if self._output is None else self._output.evaluation_point()

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's state as it is tested and served, and those weights that training goes on
        from that differ.
        """
        here = self.model.state_dict()
        if self._output is None:
            return here, {}
        with self.evaluation_point():
            outputs = {name: tensor.clone() for name, tensor in here.items()}
        return outputs, {name: t.clone() for name, t in here.items() if not torch.equal(t, outputs[name])}

    def give_output(self) -> None:
        """Let the model hold the weights that are tested and served, until :meth:`take_back` is
        called.
        """
        if self._output is not None:
            outputs, self._optimizer_weights = self.weights()
            self._set_weights(outputs)

    def take_back(self) -> None:
        """Let the model hold the weights that training goes on from again."""
        self._set_weights(self._optimizer_weights)
        self._optimizer_weights = {}

    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        state = self.model.state_dict()
        for name, weight in weights.items():
            state[name].copy_(weight)

    # --- checkpoints ---

    def progress(self) -> dict[str, Any]:
        """What a checkpoint holds of schedule and scaler, in JSON's terms."""
        scheduler = keyed(self.scheduler.state_dict()) if self.scheduler else None
        return {"scheduler": scheduler, "scaler": plain(self.scaler.state_dict())}

    def load(self, snapshot: Snapshot) -> None:
        """Go on from a moment of training; RecBole's own checkpoints have nothing of schedule
        and scaler.
        """
        self._optimizer_weights = {}
        self._restored = True
        own = self.optimizer.state_dict()["param_groups"]
        groups = [dict(group) for group in snapshot.optimizer["param_groups"]]
        # The run may have been on another device before.
        for group, here in zip(groups, own):
            group.update({name: here[name] for name in OF_A_DEVICE if name in here})
        _require_alike("param_groups", groups, own)
        self.optimizer.load_state_dict({**snapshot.optimizer, "param_groups": groups})
        for weight, entries in self.optimizer.state.items():
            # Gradients of rows have the shape of those rows.
            for name, entry in entries.items() if "rows" not in entries else ():
                if isinstance(entry, Tensor) and entry.shape != weight.shape and entry.dim():
                    raise ValueError(f"{name} of {list(entry.shape)}, of a weight of {list(weight.shape)}")
        if "scaler" in snapshot.progress:
            if self.scheduler:
                state = unkeyed(snapshot.progress["scheduler"])
                _require_alike("scheduler", state, self.scheduler.state_dict())
                self.scheduler.load_state_dict(state)
            self.scaler.load_state_dict(snapshot.progress["scaler"])


def _require_alike(name: str, found: Any, own: Any) -> None:
    """Make sure that what was saved has numbers where there are numbers now, lists where there are lists, and so on.

    Raises:
        ValueError: it has something else.
    """
    kinds = [(int, float) if isinstance(value, (int, float)) else type(value) for value in (found, own)]
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        for key in own.keys() & found.keys():
            _require_alike(f"{name}.{key}", found[key], own[key])
    elif isinstance(own, (list, tuple)) and isinstance(found, (list, tuple)) and len(found) == len(own):
        for one, other in zip(found, own):
            _require_alike(name, one, other)
    elif own is not None and kinds[0] != kinds[1]:
        raise ValueError(f"{name} is {shown(found)}, in the place of {shown(own)}")


def _build_optimizer(config: Any, model: nn.Module) -> Optimizer:
    """RecBole's learners by their names, and ours, with ``learner_args`` and ``learner_groups``."""
    name, arguments = config["learner"], dict(config["learner_args"] or {})
    if arguments.get("same_batch"):
        raise UserError("learner_args: same_batch takes each gradient twice, and training gives one; leave it out")
    defaults = {"lr": config["learning_rate"], "weight_decay": config["weight_decay"]}
    defaults |= _device_options(name, arguments, torch.device(config["device"]))
    if hasattr(LEARNERS[name], "step_sizes"):
        # Such an optimiser finds its own.
        del defaults["lr"]
    if name == "sparse_adam":
        if not any(getattr(module, "sparse", False) for module in model.modules()):
            raise UserError(f"learner: sparse_adam is for sparse gradients, and {config['model']} has none; try adam")
        del defaults["weight_decay"]
    own: Mapping[str, Any] = config["learner_groups"] or {}
    try:
        trained = [(path, p) for path, p in model.named_parameters() if p.requires_grad]
        groups = parameter_groups(trained, own)
    except UserError as error:
        raise UserError(f"learner_groups: {error}") from error
    try:
        optimizer = LEARNERS[name](groups, **{**defaults, **arguments})  # type: ignore[arg-type]
        _try_a_step(name, groups, {**defaults, **arguments})
    except UserError:
        raise
    except Exception as error:
        # PyTorch's optimisers have no class of errors of their own.
        key, given = ("learner_args", arguments) if arguments or isinstance(error, TypeError) else ("learner", defaults)
        raise UserError(f"{key}: {name} does not take {given} ({error})") from error
    # PyTorch would keep other keys of a group, unused.
    known = set(inspect.signature(LEARNERS[name]).parameters) & set(optimizer.defaults)
    for options in own.values():
        for key in options:
            if key not in known:
                raise UserError(f"learner_groups: {name} has no '{key}' of a group{did_you_mean(key, known)}")
    return optimizer


def _device_options(name: str, arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What lets a learner take its step on a GPU in one kernel, which also a CUDA graph can hold."""
    if device.type != "cuda" or name not in ("adam", "adamw") or arguments.keys() & {*OF_A_DEVICE, "differentiable"}:
        return {}
    return {"fused": True, "capturable": True}


def _try_a_step(name: str, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
    """One step of one number a group, so that options fail here and not in the midst of training."""
    tried = []
    for group in groups:
        number = torch.ones(1, device=group["params"][0].device, requires_grad=True)
        number.grad = torch.ones_like(number).to_sparse() if name == "sparse_adam" else torch.ones_like(number)
        tried.append({**group, "params": [number]})
    LEARNERS[name](tried, **arguments).step()


def _build_scheduler(config: Any, optimizer: Optimizer, bigger: bool) -> Any:
    """One of our schedules or any scheduler of torch.optim by its name, or None."""
    name, arguments = config["lr_scheduler"], config["lr_scheduler_args"] or {}
    if name is None:
        return None
    if hasattr(optimizer, "step_sizes"):
        raise UserError(f"lr_scheduler: {config['learner']} finds its own step size; leave lr_scheduler empty")
    if name in SHAPES:
        if arguments:
            raise UserError(f"lr_scheduler_args: {name} takes none; lr_warmup says how long the rate rises")
        if config["adaptive_batch"]:
            raise UserError(f"lr_scheduler: {name} must know how many steps come, and adaptive_batch changes that")
        return Schedule(optimizer, name, config["lr_warmup"])
    known: dict[str, Any] = {
        key: value for key, value in vars(lr_scheduler).items() if inspect.isclass(value) and hasattr(value, "step")
    }
    if name not in known:
        raise UserError(
            f"lr_scheduler: torch.optim has no scheduler '{name}'{did_you_mean(str(name), [*known, *SHAPES])}"
        )
    if name == "ReduceLROnPlateau":
        if config["lr_scheduler_interval"] == "step":
            raise UserError("lr_scheduler_interval: ReduceLROnPlateau looks at validation; take 'epoch'")
        arguments = {"mode": "max" if bigger else "min", **arguments}
    if name == "OneCycleLR" and config["adaptive_batch"] and config["lr_scheduler_interval"] == "step":
        raise UserError(
            "lr_scheduler: OneCycleLR ends after total_steps, and adaptive_batch changes how many come; take "
            "lr_scheduler_interval: epoch"
        )
    try:
        return known[name](optimizer, **arguments)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise UserError(f"lr_scheduler_args: {name} does not take {arguments} ({error})") from error


def _build_output(config: Any, optimizer: Optimizer) -> Any:
    """What has an ``evaluation_point``, where the weights to test are not those that training
    goes on from; or None.
    """
    own, power = hasattr(optimizer, "evaluation_point"), config["average_power"]
    if power is None:
        return optimizer if own else None
    if own:
        raise UserError(f"average_power: {config['learner']} has an output of its own; leave average_power empty")
    return IterateAverage(optimizer, power)
