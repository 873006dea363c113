"""The rows of validation and test in order: each with its history, and with the items among which its target is ranked.

What belongs to a row depends on the row and the seed alone, never on the batch in which it comes.
"""

from __future__ import annotations

import copy
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.data.transform import construct_transform
from recbole.utils import EvaluatorType
from torch import Tensor
from torch.utils.data import DataLoader

from recbole_ssm import distributed
from recbole_ssm.data.gaps import of_whole_days, pauses
from recbole_ssm.data.outline import item_counts
from recbole_ssm.data.prefixes import Prefixes
from recbole_ssm.data.sampling import Candidates, LocalGenerator, seeded
from recbole_ssm.ops import Seen


class EvalBatch(NamedTuple):
    """B rows to evaluate."""

    interaction: Any
    """RecBole's Interaction of the rows."""
    target: Tensor
    """Item ids ``[B]``."""
    events: Tensor
    """How many events of the user are known before the target ``[B]``."""
    seen: Seen
    """The items of whole histories."""
    candidates: Tensor | None
    """Ids of the items that are ranked ``[B, C]``, the target first; None: all items."""
    labels: Tensor | None
    """Labels of the candidates ``[B, C]``, where metrics compare scores with labels."""

    def to(self, device: torch.device | str) -> EvalBatch:
        """The same batch elsewhere."""
        return EvalBatch._make(_moved(values, device) for values in self)


def _moved(values: Any, device: torch.device | str) -> Any:
    if isinstance(values, Seen):
        return Seen(*(part.to(device) for part in values))
    return None if values is None else values.to(device)


class EvalLoader(DataLoader[Any]):
    """Rows of one split, as :class:`EvalBatch`.

    A history is all that the user did before the target, also what is longer ago than MAX_ITEM_LIST_LENGTH events; of
    files that were split beforehand it is the list that stands there.

    Args:
        config: ``eval_args``, ``eval_batch_size`` and ``seed`` count.
        dataset: the split.
        phase: ``valid`` or ``test``.
        training: the training set, from which the popularity of items is taken.
        everything: the data set whose items ``popN`` counts; None takes the split.
    """

    def __init__(self, config: Any, dataset: Any, phase: str, training: Any = None, everything: Any = None) -> None:
        self.config, self._dataset = config, dataset
        self._seed = config["seed"], ("valid", "test").index(phase)
        self.step = config["eval_batch_size"]
        self.training, self.user_field = training, dataset.uid_field
        self.item_num: int = dataset.item_num
        self._transform = construct_transform(config)
        self._fields = dataset.iid_field, config["LIST_SUFFIX"], config["ITEM_LIST_LENGTH_FIELD"]
        self._rows: Any = dataset.inter_feat
        self.labelled = config["eval_type"] == EvaluatorType.VALUE
        # What is added to the moments of asking ``[rows]``, in seconds.
        self._later: Tensor | None = None
        self._candidates = None
        if (sample := config[f"{phase}_neg_sample_args"]["sample_num"]) != "none":
            weights = np.ones(self.item_num)
            if config[f"{phase}_neg_sample_args"]["distribution"] == "popularity":
                weights = item_counts(everything or dataset, self.item_num).astype(np.float64)
            weights[0] = 0
            others = np.count_nonzero(weights) - 1
            if sample > others:
                getLogger().warning(
                    f"eval_args: mode: {config['eval_args']['mode'][phase]} asks for {sample} items beside each "
                    f"target, and there are {others}; all of them are taken"
                )
            self._candidates = Candidates(min(sample, others), weights, self._seed)
        super().__init__(
            range(len(dataset)),  # type: ignore[arg-type]
            batch_size=self.step,
            collate_fn=self.gather,
            num_workers=config["worker"],
            generator=LocalGenerator(),
        )

    def gather(self, index: list[int]) -> EvalBatch:
        """Some rows of the split."""
        rows = np.array(index)
        with seeded(*self._seed, index[0]):
            interaction: Interaction = self._transform(self._dataset, self._dataset[rows])
        if self._later is not None:
            time = self._dataset.time_field
            interaction.update(Interaction({time: interaction[time] + self._later[rows]}))
        target = interaction[self._fields[0]]
        events, items = self._histories(rows, interaction)
        candidates = labels = None
        if self._candidates is not None:
            # The event that is the target stands for the row, whatever rows there are beside it.
            keys = self._rows.target[rows] if isinstance(self._rows, Prefixes) else rows
            drawn = [self._candidates.draw(*which) for which in zip(keys.tolist(), target.tolist())]
            candidates = torch.from_numpy(np.stack(drawn))
            labels = torch.zeros(candidates.shape)
            labels[:, 0] = 1
        elif self.labelled:
            candidates, labels = target[:, None], interaction[self.config["LABEL_FIELD"]][:, None]
        seen = seen_in(items, events, target.numpy(), self.item_num)
        return EvalBatch(
            interaction, target, torch.from_numpy(events), seen, candidates, labels if self.labelled else None
        )

    def pauses(self) -> np.ndarray | None:
        """How long before each target the newest event of its history was, in seconds, for the rows of all processes
        ``[all]``; None where the data have no clock times.
        """
        own = pauses(self.config, self._dataset)
        return None if own is None else distributed.gather_rows(torch.from_numpy(own)).numpy()

    @property
    def of_whole_days(self) -> bool:
        """Whether the data hold dates and no hours."""
        return of_whole_days(self._dataset)

    def with_shuffled_times(self) -> EvalLoader:
        """The same rows, each asked as long after its newest event as another row is, by a permutation of the seed.

        A model that gains by the time of asking must lose that gain here.

        Raises:
            ValueError: the data have no clock times.
        """
        waits = self.pauses()
        if waits is None:
            raise ValueError("the data have no clock times")
        moved = np.random.default_rng(self._seed).permutation(waits) - waits
        found = copy.copy(self)
        found.collate_fn = found.gather
        found._later = torch.from_numpy(moved[distributed.rank() :: distributed.world_size()])
        return found

    def _histories(self, rows: np.ndarray, interaction: Any) -> tuple[np.ndarray, np.ndarray]:
        """The length of each history ``[B]``, and the items of all, row by row ``[E]``."""
        item, suffix, length = self._fields
        if isinstance(self._rows, Prefixes):
            events, positions = self._rows.histories(rows)
            return events, self._rows.events[item].numpy()[positions]
        listed, events = interaction[item + suffix].numpy(), interaction[length].numpy()
        return events, listed[np.arange(listed.shape[1]) < events[:, None]]


def seen_in(items: np.ndarray, events: Any, target: np.ndarray, item_num: int) -> Seen:
    """What some histories hold beside the targets.

    Args:
        items: the items of all histories, row by row ``[E]``.
        events: how many events each row has ``[B]``.
        target: the items that came ``[B]``.
        item_num: how many items there are, the padding counted.
    """
    # A row and an item as one number, 32 bits where they suffice: sorting is most of the work, and several times faster
    # than np.unique.
    kind = np.int32 if len(target) * item_num < 2**31 else np.int64
    starts = np.arange(len(target) + 1, dtype=kind) * item_num
    pairs = np.repeat(starts[:-1], events) + items.astype(kind)
    pairs.sort()
    kept = np.diff(pairs, prepend=-1) > 0
    own = starts[:-1] + target
    place = np.searchsorted(pairs, own)
    found = place < len(pairs)
    found[found] = pairs[place[found]] == own[found]
    kept[place[found]] = False
    pairs = pairs[kept]
    items = (pairs % item_num).astype(np.int64)
    return Seen(torch.from_numpy(items), torch.from_numpy(np.searchsorted(pairs, starts)))
