"""Training steps that a GPU replays, all kernels of a step in one launch.

A step is some 200 kernels of microseconds, and a GPU waits most of the time for Python, which launches one after the
other. A CUDA graph holds them all. It demands fixed shapes: packed batches are rounded up to a few sizes, and forward,
loss, backward and the optimiser's step are recorded once for each. Where the optimiser's step cannot be recorded, it is
launched after each replay of the rest, while the GPU still works.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import distributed, graphs
from recbole_ssm.data.loader import PackedBatch, Part
from recbole_ssm.errors import first_line
from recbole_ssm.optim.gradient_noise import is_out_of_memory
from recbole_ssm.trainer.hooks import Hook

WARM_UP = 3
"""Steps of a run that are launched before one is recorded: kernels are compiled, and the optimiser's state is made."""
MOST = 16
"""Sizes that are recorded; steps of further sizes are launched."""
COMPARED = 2
"""Replays of each size that are compared with the launched step."""
TOLERANCE = {False: 1e-3, True: 3e-2}
"""How far gradients may differ, by whether half precision takes part. A GPU adds up in any order; dropout of other
masks would change them by a tenth and more."""
MOVES = 30
"""The moves of the weights may differ by so many times as much, since Adam divides by small numbers."""

MOVING_BETAS = ("one_cycle", "OneCycleLR", "CyclicLR")
"""Schedules that change more of the optimiser than its learning rate."""

Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Records a function; returns the tensor that it returned, and a function that replays it."""


def rounded(batch: PackedBatch, longest: int) -> PackedBatch:
    """The same targets in a batch whose numbers of events and of histories are among a few.

    Behind the histories stand events of item 0, in histories of at most ``longest`` of them, and then empty histories.
    No target asks for them, so the loss and its gradients stay what they are.
    """
    total, histories = len(batch.items), len(batch.cu_seqlens) - 1
    more = round_up(total) - total
    bounds = [*range(total + longest, total + more, longest), *([total + more] if more else [])]
    most = 1 << (histories + len(bounds) - 1).bit_length()
    bounds += [total + more] * (most - histories - len(bounds))

    def longer(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.cat([values, values.new_zeros(more)])

    return batch._replace(
        items=torch.cat([batch.items, batch.items.new_zeros(more)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor(bounds)]),
        times=longer(batch.times),
        now=longer(batch.now),
    )


def round_up(number: int) -> int:
    """The next number of four binary digits followed by zeros: at most an eighth more."""
    unit = 1 << max(number.bit_length() - 4, 0)
    return -(-number // unit) * unit


class _Recording:
    """The step of one size of batches."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = PackedBatch._make(None if values is None else values.clone() for values in batch)
        """Where the step reads its batch."""
        self.terms: Tensor
        """Where it writes the terms of its loss."""
        self.replay: Callable[[], None]
        self.gradients: list[Tensor | None]
        """Where it writes the gradient of each weight."""
        self.compared = 0

    def read(self, batch: PackedBatch) -> None:
        """Take the batch of the next replay."""
        for place, values in zip(self.batch, batch):
            if place is not None and values is not None:
                place.copy_(values)


class Replays:
    """Takes steps of a trainer by replaying them, where that is possible and right.

    A batch's size follows from the batch alone, and a replay draws the random numbers that the launched step would
    draw. So a run that goes on from a checkpoint draws the masks of dropout again, although it records anew.

    Args:
        trainer: a :class:`recbole_ssm.trainer.Trainer`; its key ``cuda_graphs`` says whether steps are recorded. The
            first replays of each size are compared with the launched step, and where they differ, training goes on
            without recordings.
        record: how a step is recorded; on a GPU by :func:`recbole_ssm.graphs.record`.
    """

    def __init__(self, trainer: Any, record: Record | None = None) -> None:
        self.trainer = trainer
        self._record = record or self._graph
        self.begin()

    def begin(self) -> None:
        """Forget all recordings, whose weights and states of the optimiser may be others now."""
        self._recordings: dict[Any, _Recording] = {}
        self._seen: Counter[Any] = Counter()
        # The learning rate of each group, which a recorded step reads on the device, and what stands there.
        self._rates: list[Tensor] = []
        self._written: list[float] = []
        self._settings: list[dict[str, Any]] = []
        self._pool: Any = None
        self._possible: bool | None = None
        self._failed = False
        self.step_is_launched = True
        """Whether a recording ends with the gradients, and the optimiser's step is taken after it."""

    @property
    def possible(self) -> bool:
        """Whether this run's steps can be recorded; on a GPU the log says once why not."""
        if self._possible is None:
            refusal = self.refusal()
            self._possible = refusal is None
            if refusal:
                logging.getLogger().info(f"cuda_graphs: steps are launched kernel by kernel, because {refusal}")
            self.trainer.gradients.kept = self._possible
            reason = self.why_step_is_launched() if self._possible else None
            self.step_is_launched = not self._possible or reason is not None
            if reason:
                logging.getLogger().info(f"cuda_graphs: all but the optimiser's step is recorded, because {reason}")
        return self._possible

    def refusal(self) -> str | None:
        """Why steps are not recorded; None where they are, and empty where that needs no line in the log."""
        trainer, config = self.trainer, self.trainer.config
        if not config["cuda_graphs"] or trainer.device.type != "cuda":
            return ""
        if distributed.world_size() > 1:
            return "several processes train"
        if not getattr(trainer.model, "fixed_shapes", False):
            return f"{config['model']} takes the lengths of histories on the CPU, or is RecBole's own"
        if config["train_mode"] != "packed":
            return f"train_mode: {config['train_mode']} gives batches of another size in every step"
        if config["adaptive_batch"] or config["gradient_accumulation_steps"] > 1:
            return "a step has several parts"
        if trainer.learner.scaler.is_enabled():
            return "enable_scaler: True decides on the CPU whether a step is taken"
        if any(getattr(module, "sparse", False) for module in trainer.model.modules()):
            return "sparse gradients have another size in every step"
        return None

    def why_step_is_launched(self) -> str | None:
        """Why the optimiser's step is not recorded with the rest; None where it is."""
        trainer, config = self.trainer, self.trainer.config
        if config["lr_scheduler"] in MOVING_BETAS:
            return (
                f"lr_scheduler: {config['lr_scheduler']} moves the betas at every step, and a recording would keep the "
                "first ones"
            )
        if not all(group.get("capturable") for group in trainer.optimizer.param_groups):
            return (
                f"{config['learner']}'s cannot be; those of adam and adamw can, unless learner_args name fused, "
                "foreach or capturable"
            )
        if config["average_power"] is not None:
            return "average_power follows every step"
        if any(type(hook).on_gradients is not Hook.on_gradients for hook in trainer.hooks):
            return "a hook looks at the gradients within a step"
        return None

    def rounded(self, batch: Any) -> Any:
        """The batch in one of a few sizes, where steps are recorded. A launched step takes it too, so dropout draws
        the same masks either way.
        """
        return rounded(batch, self.trainer.model.max_seq_length) if self.possible else batch

    def take(self, parts: Sequence[Part]) -> Tensor | None:
        """Take a step by a replay, or all of it but the optimiser's where ``step_is_launched``.

        Returns:
            The terms of its loss; None where nothing was replayed, and the step is still to be taken.
        """
        if not self.possible or self._failed:
            return None
        recording = self._recording_of(parts[0])
        if recording is None:
            return None
        if not self.step_is_launched and self._settings_now() != self._settings:
            self._give_up("lr_scheduler changes more than the learning rate")
            return None
        recording.read(parts[0].batch)
        if recording.compared < COMPARED:
            return self._both_ways(recording, parts[0])
        self._replay(recording)
        return recording.terms.clone()

    def _recording_of(self, part: Part) -> _Recording | None:
        """The recording of a part's size, made where it is time for it."""
        key = tuple(None if values is None else (values.shape, values.dtype) for values in part.batch)
        self._seen[key] += 1
        if key in self._recordings:
            return self._recordings[key]
        if self._seen[key] == 1 or self._seen.total() <= WARM_UP or len(self._recordings) == MOST:
            return None
        recording = _Recording(part.batch)
        self._settings = self._settings or self._settings_now()
        if not self.step_is_launched:
            # Before the recording begins, which would hold the writing and repeat it in every replay.
            self._write_rates([group["lr"] for group in self.trainer.optimizer.param_groups])
        try:
            recording.terms, recording.replay = self._record(lambda: self._launch(part._replace(batch=recording.batch)))
        except Exception as error:
            self._give_up(f"recording failed ({first_line(error)})")
            return None
        recording.gradients = [p.grad for p in self.trainer.model.parameters()]
        self._recordings[key] = recording
        return recording

    def _replay(self, recording: _Recording) -> None:
        # A hook may have put others in their place.
        for p, gradient in zip(self.trainer.model.parameters(), recording.gradients):
            p.grad = gradient
        with self.rates():
            recording.replay()

    def _graph(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return graphs.record(call, self.trainer.device, self._pool)

    def _launch(self, part: Part) -> Tensor:
        """What is recorded of a step, kernel by kernel."""
        self.trainer.optimizer.zero_grad(set_to_none=False)
        terms: Tensor = self.trainer._backward(part)
        if not self.step_is_launched:
            with self.rates():
                self.trainer.learner.step()
        return terms

    def _give_up(self, reason: str) -> None:
        self._failed = True
        self._recordings.clear()
        logging.getLogger().warning(f"cuda_graphs: steps are launched kernel by kernel from here on: {reason}")

    # --- what changes between steps ---

    def _settings_now(self) -> list[dict[str, Any]]:
        """What the optimiser is told of each group, which a recording holds as it was."""
        groups = self.trainer.optimizer.param_groups
        return [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]

    @contextlib.contextmanager
    def rates(self) -> Iterator[None]:
        """Let an optimiser whose steps are recorded read its learning rates on the device while the context lasts."""
        if self.step_is_launched:
            yield
            return
        groups = self.trainer.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        self._write_rates(numbers)
        try:
            for group, rate in zip(groups, self._rates):
                group["lr"] = rate
            yield
        finally:
            for group, number in zip(groups, numbers):
                group["lr"] = number

    def _write_rates(self, numbers: list[float]) -> None:
        """Write the learning rate of each group to where a recorded step reads it, unless it stands there."""
        if not self._rates:
            self._rates = [torch.zeros((), device=self.trainer.device) for _ in numbers]
        if numbers != self._written:
            self._written = numbers
            for rate, number in zip(self._rates, numbers):
                rate.fill_(number)

    # --- the comparison ---

    def _both_ways(self, recording: _Recording, part: Part) -> Tensor | None:
        """Take a step both ways, from one state; training goes on from the launched one.

        Returns:
            The terms of the loss; None where there is no room for both, and the step is still to be taken.
        """
        before, random = [], self._random_state()
        try:
            before = [tensor.clone() for tensor in self._state()]
            return self._compare(recording, part, before, random)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._put_back(before, random)
        self._give_up("there is no room to compare a replayed step with the launched one")
        return None

    def _compare(self, recording: _Recording, part: Part, before: list[Tensor], random: Tensor) -> Tensor:
        self._replay(recording)
        replayed = recording.terms.clone(), self._gradients(), self._weights()
        drawn = self._random_state()
        self._put_back(before, random)
        weights = self._weights()
        terms = self._launch(part)
        recording.compared += 1
        tolerance = TOLERANCE[bool(self.trainer.config["enable_amp"])]
        same = {
            "the loss": _near([replayed[0]], [terms], tolerance),
            "the gradients": _near(replayed[1], self._gradients(), tolerance),
            "the random numbers": torch.equal(drawn, self._random_state()),
        }
        if weights:
            # All as one, because Adam scales the gradients of every tensor to one length: where they are nothing but
            # rounding, it moves the tensor as far as where they are not.
            moves = [_whole(torch._foreach_sub(there, weights)) for there in (replayed[2], self._weights())]
            same["the weights"] = _near(moves[:1], moves[1:], MOVES * tolerance)
        if wrong := [what for what, is_same in same.items() if not is_same]:
            self._give_up(f"a replayed step differs from the launched one in {' and '.join(wrong)}")
        return terms

    def _put_back(self, before: list[Tensor], random: Tensor) -> None:
        """Undo a step; an empty list undoes none."""
        for tensor, value in zip(self._state(), before):
            tensor.copy_(value)
        self._set_random_state(random)

    def _state(self) -> list[Tensor]:
        """All tensors that a replay changes, except gradients, which it makes."""
        trainer = self.trainer
        if self.step_is_launched:
            return [*trainer.model.buffers()]
        kept = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*(p.detach() for p in trainer.model.parameters()), *trainer.model.buffers(), *kept]

    def _weights(self) -> list[Tensor]:
        """The weights, if what is recorded moves them."""
        if self.step_is_launched:
            return []
        return [p.detach().clone() for p in self.trainer.model.parameters() if p.requires_grad]

    def _gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.trainer.model.parameters() if p.grad is not None]

    def _random_state(self) -> Tensor:
        device = self.trainer.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def _set_random_state(self, state: Tensor) -> None:
        device = self.trainer.device
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _whole(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors in one."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether each tensor lies within the tolerance of its norm, and a hundredth of that of the norm of all."""
    norms = torch.stack([e.double().norm() for e in expected])
    errors = torch.stack([(f.double() - e.double()).norm() for f, e in zip(found, expected)])
    return bool((errors <= tolerance * (norms + norms.norm() / 100)).all())
