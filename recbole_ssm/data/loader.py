"""Batches for training and evaluation.

An epoch visits every target once, in an order that is a function of the seed and the epoch alone; the random part of a
batch (negatives, masks) is a function of the seed, the epoch and the batch's number. So a run can go on from any batch,
and the number of worker processes changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.data.utils import _create_sampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from recbole_ssm import distributed
from recbole_ssm.data.evaluation import EvalLoader
from recbole_ssm.data.gaps import reads_times, require_clock_times
from recbole_ssm.data.masking import hide
from recbole_ssm.data.prefixes import Prefixes
from recbole_ssm.data.sampling import LocalGenerator, seeded
from recbole_ssm.data.splits import look_at_cold_targets, some_rows
from recbole_ssm.errors import UserError

# RecBole's changes to the histories of a batch that need a further key.
TRANSFORMS = {"mask_itemseq": "mask_ratio", "crop_itemseq": "eta", "reorder_itemseq": "beta"}


class PackedBatch(NamedTuple):
    """Histories end to end, without padding, and the targets at their positions."""

    items: Tensor
    """Item ids of all windows ``[total]``."""
    cu_seqlens: Tensor
    """Bounds of the windows ``[S + 1]``."""
    at: Tensor
    """The positions in ``items`` after which a target comes ``[n]``."""
    target: Tensor
    """Item ids of the targets ``[n]``."""
    negative: Tensor | None
    """A sampled item for each target ``[n]``, where the loss asks for one."""
    times: Tensor | None = None
    """When the events were, in seconds ``[total]``, where the model reads times."""
    now: Tensor | None = None
    """When it was asked what comes behind each event, in seconds ``[total]``: the time of the next event."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch._make(None if values is None else _moved(values, device) for values in self)

    @property
    def positions(self) -> int:
        """How many events the model computes."""
        return self.items.numel()


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch, :class:`PackedBatch` or RecBole's Interaction, on the device."""
    if isinstance(batch, PackedBatch):
        return batch.to(device)
    return Interaction({field: _moved(values, device) for field, values in batch.interaction.items()})


def _moved(values: Tensor, device: torch.device | str) -> Tensor:
    """The same values on the device; a GPU takes them from pinned memory, so that Python does not wait for it."""
    if torch.device(device).type == "cuda" and values.is_cpu:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Part(NamedTuple):
    """What one forward and backward pass sees of a step."""

    weight: float
    """Its share of the step's loss: the step's gradient is the sum of weight x gradient over all its parts, averaged
    over the processes."""
    batch: Any
    """A :class:`PackedBatch`, or RecBole's Interaction of rows."""


def _no_gather(piece: slice) -> Any:
    raise NotImplementedError("the parts of this step are gathered already")


class Step(NamedTuple):
    """One step of the optimiser: of several processes, the part that this one computes."""

    number: int
    """Its number within the epoch, from 0."""
    seen: int
    """Targets of the epoch up to and with this step."""
    targets: int
    """Targets of this step, of all processes together."""
    parts: list[Part]
    gather: Callable[[slice], Any] = _no_gather
    """Gathers the batch of some of its targets, where the trainer cuts the step itself and ``parts`` is empty."""


class Description(NamedTuple):
    """A step before its batches are gathered, which a worker process may do."""

    seed: list[int]
    number: int
    seen: int
    targets: int
    parts: list[tuple[float, np.ndarray]]
    order: np.ndarray | None
    """The epoch's order, where the trainer cuts the step itself."""


class Rows:
    """An epoch's order over prefixes, one row each."""

    def __init__(self, prefixes: Any, shuffle: bool) -> None:
        self.total = len(prefixes)
        self.shuffle = shuffle
        self._lengths = prefixes.length if isinstance(prefixes, Prefixes) else np.ones(self.total, dtype=np.int64)

    def epoch(self, generator: np.random.Generator) -> np.ndarray:
        """Row numbers ``[total]`` in the order of one epoch."""
        return generator.permutation(self.total) if self.shuffle else np.arange(self.total)

    def take(self, order: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Rows that hold targets start to stop."""
        return order[start:stop]

    def work(self, rows: np.ndarray) -> np.ndarray:
        """Positions that each row costs."""
        return self._lengths[rows]

    def targets(self, rows: np.ndarray) -> int:
        """How many targets the rows hold."""
        return len(rows)


class Windows:
    """An epoch's order over whole histories, for models that learn from every position.

    Consecutive targets of a user form a run. A run whose inputs fit ``max_length`` is one window with all of its
    history, and every target sees exactly what RecBole's prefix would show it. A longer run is cut into windows of at
    most ``window`` targets, at an offset that every epoch draws for itself; each window starts with the ``context``
    events before its first target (fewer at the start of the history), which carry no loss. So each target is predicted
    once an epoch, from at least ``min(history, context)`` events and at most ``context + window - 1``. A step may end
    within a window: the rest of it opens the next step, with ``context`` events of its own.

    Args:
        prefixes: the rows of the training set.
        window: targets of a window.
        context: events before its first target.
        shuffle: whether the order of windows and their offsets change with the epoch.
    """

    def __init__(self, prefixes: Prefixes, window: int, context: int, shuffle: bool) -> None:
        order = np.argsort(prefixes.target, kind="stable")
        self.target = prefixes.target[order]
        length = prefixes.length[order]
        self.total = len(order)
        # It is as long as the data, and takes more memory than all that is kept.
        del order
        self.context = np.minimum(length, context)
        self.window = window
        self.shuffle = shuffle
        self._run_starts = np.flatnonzero(np.diff(self.target, prepend=np.int32(-2)) != 1)
        self._run_sizes = np.diff(np.append(self._run_starts, self.total))
        self._whole = length[self._run_starts] + self._run_sizes - 1 <= prefixes.max_length
        whole = self._run_starts[self._whole]
        self.context[whole] = length[whole]
        self._events = prefixes.events

    def epoch(self, generator: np.random.Generator) -> np.ndarray:
        """Windows ``[W, 3]`` in the order of one epoch: first target, one past the last, targets up to its end."""
        runs = len(self._run_starts)
        offset = generator.integers(1, self.window + 1, runs) if self.shuffle else np.full(runs, self.window)
        offset = np.where(self._whole, self._run_sizes, np.minimum(offset, self._run_sizes))
        # The windows of a run: the first one, and the rest in full ones.
        count = 1 - (offset - self._run_sizes) // self.window
        number = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        begin = np.where(number > 0, np.repeat(offset, count) + (number - 1) * self.window, 0)
        starts = np.repeat(self._run_starts, count) + begin
        stops = np.append(starts[1:], self.total)
        order = generator.permutation(len(starts)) if self.shuffle else np.arange(len(starts))
        return np.stack([starts[order], stops[order], (stops - starts)[order].cumsum()], 1)

    def take(self, order: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Windows ``[W, 2]`` that hold targets start to stop, cut where those begin and end."""
        first, last = np.searchsorted(order[:, 2], [start, stop - 1], side="right")
        taken = order[first : last + 1, :2].copy()
        taken[-1, 1] -= order[last, 2] - stop
        taken[0, 0] = order[first, 1] - (order[first, 2] - start)
        return taken

    def work(self, windows: np.ndarray) -> np.ndarray:
        """Positions that each window costs."""
        return self.context[windows[:, 0]] + windows[:, 1] - windows[:, 0] - 1

    def targets(self, windows: np.ndarray) -> int:
        """How many targets the windows hold."""
        return int((windows[:, 1] - windows[:, 0]).sum())

    def gather(self, windows: np.ndarray, item_field: str, time_field: str | None = None) -> PackedBatch:
        """The packed batch of some windows; with the times of events, where their column is named."""
        inputs = self.work(windows)
        sizes = windows[:, 1] - windows[:, 0]
        first_input = self.target[windows[:, 0]] - self.context[windows[:, 0]]
        bounds = np.concatenate([[0], inputs.cumsum()])
        within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], inputs)
        items = self._events[item_field]
        # In each window this counts from -size to -1.
        before = np.arange(sizes.sum()) - np.repeat(sizes.cumsum(), sizes)
        at = np.repeat(bounds[1:], sizes) + before
        target = self.target[np.repeat(windows[:, 1], sizes) + before]
        inputs_at = np.repeat(first_input, inputs) + within
        # Behind every input of a window stands an event of the same user, behind the last one its last target.
        times = self._events[time_field] if time_field else None
        return PackedBatch(
            items[inputs_at],
            torch.from_numpy(bounds),
            torch.from_numpy(at),
            items[target],
            None,
            None if times is None else times[inputs_at],
            None if times is None else times[inputs_at + 1],
        )


class Steps(Sampler[Any]):
    """The steps of an epoch, from any target on.

    Args:
        plan: the epoch's order.
        batch_size: targets of a step, of all processes and parts together. It may change between steps.
        parts: into how many parts, one forward and backward pass each, a process cuts its share of a step.
        seed: with the epoch it fixes the order.
    """

    def __init__(self, plan: Rows | Windows, batch_size: int, parts: int, seed: int) -> None:
        self.plan, self.batch_size, self.parts, self.seed = plan, batch_size, parts, seed
        self.epoch = 0
        self.number = 0
        self.start = 0
        # Whether the trainer cuts the steps into parts itself.
        self.sliced = False

    def begin(self, epoch: int, number: int = 0, start: int = 0) -> None:
        """Let the next iteration give this epoch, from step ``number`` and target ``start`` on."""
        self.epoch, self.number, self.start = epoch, number, start

    def __len__(self) -> int:
        return -(-(self.plan.total - self.start) // self.batch_size)

    def __iter__(self) -> Iterator[Description]:
        epoch, number, start = self.epoch, self.number, self.start
        order = self.plan.epoch(np.random.default_rng([self.seed, epoch]))
        while start < self.plan.total:
            stop = min(start + self.batch_size, self.plan.total)
            seed, targets = [self.seed, epoch, number, distributed.rank()], stop - start
            if self.sliced:
                yield Description(seed, number, stop, targets, [], order)
            else:
                parts = self._parts(self.plan.take(order, start, stop), targets)
                yield Description(seed, number, stop, targets, parts, None)
            start, number = stop, number + 1

    def _parts(self, taken: np.ndarray, targets: int) -> list[tuple[float, np.ndarray]]:
        """This process's parts of a step: even in positions over processes and parts, each with its weight."""
        world = distributed.world_size()
        shares = share_evenly(self.plan.work(taken), world * self.parts)[distributed.rank() :: world]
        mine = [taken[share] for share in shares if len(share)]
        weighted = [(self.plan.targets(part) * world / targets, part) for part in mine]
        # A process without a share computes a batch of weight 0, so that the others' gradients meet its own.
        return weighted or [(0.0, taken[:1])]


class TrainLoader(TrainDataLoader):
    """RecBole's TrainDataLoader over :class:`Steps`; it yields :class:`Step`.

    Args:
        config: the configuration.
        dataset: the training set.
        sampler: RecBole's negative sampler, or None.
    """

    def __init__(self, config: Any, dataset: Any, sampler: Any) -> None:
        # RecBole's own constructors write out list(range(rows)) and fix an order of their own.
        self.logger = getLogger()
        self.config, self._dataset, self._sampler, self.model = config, dataset, sampler, None
        self.shuffle = config["shuffle"]
        self._set_neg_sample_args(config, dataset, config["MODEL_INPUT_TYPE"], config["train_neg_sample_args"])
        self._init_batch_size_and_step()
        self.transform = construct_transform(config)
        self.is_sequential = True
        self._time_field = dataset.time_field if reads_times(config["time"]) else None
        self.sample_size = len(dataset)
        self.plan: Rows | Windows
        self._hides = config["train_mode"] == "masked"
        if self._hides:
            self.plan = Windows(dataset.inter_feat, max(config["MAX_ITEM_LIST_LENGTH"] - 1, 1), 1, self.shuffle)
        elif config["train_mode"] == "packed":
            self.plan = Windows(dataset.inter_feat, config["packed_window"], config["packed_context"], self.shuffle)
        else:
            self.plan = Rows(dataset.inter_feat, self.shuffle)
        self.steps = Steps(self.plan, self.step, config["gradient_accumulation_steps"], config["seed"])
        DataLoader.__init__(
            self,
            dataset=_Gather(self),
            sampler=self.steps,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=config["worker"],
            # A generator of its own, because the global one belongs to the model.
            generator=LocalGenerator(),
        )

    def fingerprint(self) -> str:
        """A digest of what the epochs are made of: the targets, their histories, and the catalogue's size."""
        events = self._dataset.inter_feat
        parts = [events[self.iid_field].numpy()]
        if self._dataset.benchmark_filename_list is not None:
            parts.append(events[self.iid_field + self.config["LIST_SUFFIX"]].numpy())
        if isinstance(events, Prefixes):
            parts = [events.target, events.length, events.events[self.iid_field].numpy()]
            if self._time_field:
                parts.append(events.events[self._time_field].numpy())
        digest = hashlib.sha256(str(self._dataset.item_num).encode())
        for part in parts:
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def in_words(self) -> str:
        """What an epoch is."""
        plan, config = self.plan, self.config
        text = f"train_mode {config['train_mode']}: {plan.total:,} targets in {len(self.steps):,} steps of {self.step}"
        if not isinstance(plan, Windows):
            return f"{text}, each with its own history"
        if self._hides:
            return f"{text}, whose histories hide {config['mask_ratio']:.0%} of their events, or the last one alone"
        positions = int(plan.work(plan.epoch(np.random.default_rng(0))).sum())
        return (
            f"{text}; histories longer than {config['MAX_ITEM_LIST_LENGTH']} in windows of {plan.window} targets after "
            f"{config['packed_context']} events of context; {positions / plan.total:.2f} positions a target"
        )

    def gather(self, rows: np.ndarray) -> Any:
        """The batch of some rows or windows of the plan."""
        if not isinstance(self.plan, Windows):
            # The loader's own attribute of that name is PyTorch's.
            return TrainDataLoader.collate_fn(self, rows)
        batch = self.plan.gather(rows, self.iid_field, self._time_field)
        if self._hides:
            batch = hide(batch, self.config["mask_ratio"], self.config["ft_ratio"])
        if self._sampler is None:
            return batch
        ones = np.ones(len(batch.target), dtype=np.int64)
        return batch._replace(negative=self._sampler.sample_by_user_ids(ones, batch.target.numpy(), 1))


class _Gather(Dataset[Step]):
    """Makes steps from their descriptions, in a worker process if there is one."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __getitem__(self, step: Any) -> Step:
        seed, number, seen, targets, parts, order = step
        if order is not None:
            return Step(number, seen, targets, [], partial(self._piece, seed, order, seen - targets))
        with seeded(*seed):
            return Step(number, seen, targets, [Part(weight, self.loader.gather(rows)) for weight, rows in parts])

    def _piece(self, seed: list[int], order: np.ndarray, start: int, piece: slice) -> Any:
        with seeded(*seed, piece.start):
            return self.loader.gather(self.loader.plan.take(order, start + piece.start, start + piece.stop))


def _as_it_is(step: Any) -> Any:
    return step


def create_loaders(config: Any, dataset: Any) -> tuple[TrainLoader, EvalLoader, EvalLoader]:
    """Split a data set; loaders for training, validation and test.

    As RecBole's data_preparation, which unpickles what it finds in the checkpoint folder. The rows of an evaluation are
    shared out to the processes of a run, one by one. The samples of a row are the same in every epoch, whatever the
    processes, workers and batches; RecBole draws new ones.

    Raises:
        UserError: there are fewer rows to evaluate than processes, ``train_last`` or ``train_newest`` does not fit the
            data, a target is to be ranked among more items than there are, or the model reads times and there are none.
    """
    _check_transform(config)
    built = dataset.build()
    if reads_times(config["time"]):
        require_clock_times(config, built[0])
    for key in ("train_last", "train_newest"):
        if config[key]:
            rows = len(built[0])
            built[0] = built[0].newest(config[key], alone=key == "train_newest")
            getLogger().info(f"{key}: {config[key]}: {len(built[0]):,} of {rows:,} targets train")
    if config["train_rows"]:
        built[0] = _sample(built[0], config["train_rows"], config["seed"])
    built[1:] = look_at_cold_targets(config["drop_cold_targets"], *built)
    negatives = config["train_neg_sample_args"]
    sampler = _create_sampler(dataset, built, negatives["distribution"], config["repeatable"], negatives["alpha"])
    train = TrainLoader(config, built[0], sampler.set_phase("train") if sampler else None)
    evaluation = []
    world = distributed.world_size()
    for phase, split in zip(("valid", "test"), built[1:]):
        if config["eval_rows"]:
            split = _sample(split, config["eval_rows"], config["seed"])
        if 0 < len(split) < world:
            raise UserError(f"{phase}: {len(split)} rows for {world} processes; start at most {len(split)} processes")
        if world > 1:
            split = some_rows(split, np.arange(distributed.rank(), len(split), world))
        evaluation.append(EvalLoader(config, split, phase, built[0], dataset))
    return train, evaluation[0], evaluation[1]


def _check_transform(config: Any) -> None:
    key = TRANSFORMS.get(config["transform"])
    if key and config[key] is None:
        raise UserError(f"{key}: {config['transform']} needs it, a share of the history; try {key}: 0.5")


def _sample(split: Any, count: int, seed: int) -> Any:
    """So many rows of a split, the same ones for a seed and a number of rows, in the order in which they stand."""
    return some_rows(split, np.sort(np.random.default_rng(seed).permutation(len(split))[:count]))


def share_evenly(work: np.ndarray, parts: int) -> list[np.ndarray]:
    """Indices into ``work`` for each part, so that the parts' sums are near each other; the order is kept.

    The largest goes first, always to the part that has least (Graham 1969).
    """
    if parts == 1:
        return [np.arange(len(work))]
    loads = np.zeros(parts, dtype=np.int64)
    owner = np.empty(len(work), dtype=np.int64)
    for index in np.argsort(-work, kind="stable"):
        owner[index] = loads.argmin()
        loads[owner[index]] += work[index]
    return [np.flatnonzero(owner == part) for part in range(parts)]
