"""RecBole's splits of prefixes by array operations, where RecBole makes lists of Python numbers."""

from __future__ import annotations

from logging import getLogger
from typing import Any

import numpy as np
import recbole.data.dataset

from recbole_ssm.data.prefixes import Prefixes
from recbole_ssm.errors import UserError


class SplitDataset(recbole.data.dataset.SequentialDataset):
    """A sequential data set that splits its rows as RecBole does, the same rows in the same order."""

    # A DataFrame while it is read and filtered; afterwards an Interaction, or Prefixes.
    inter_feat: Any
    # The fields that are no alias of users or items.
    _rest_fields: Any

    def sort(self, by: Any, ascending: Any = True) -> None:
        """As RecBole's.

        A split of each user's rows takes the users in the order of time of their first rows, in float32 since 0.1.0. It
        decides nothing but from which order a seed draws its batches, so it stays.
        """
        of_each_user = self.config["eval_args"]["group_by"] == "user" or "RS" not in self.config["eval_args"]["split"]
        if by == self.time_field and of_each_user and isinstance(self.inter_feat, Prefixes):
            self.inter_feat.reorder(np.argsort(self.inter_feat[by].numpy().astype(np.float32), kind="stable"))
        else:
            super().sort(by, ascending)

    def leave_one_out(self, group_by: str, leave_one_mode: str) -> list[Any]:
        """As RecBole's, without its lists of Python numbers."""
        held_out = {"valid_and_test": 2, "valid_only": 1, "test_only": 1}.get(leave_one_mode)
        if not isinstance(self.inter_feat, Prefixes) or held_out is None:
            return super().leave_one_out(group_by, leave_one_mode)
        order, position, count = self._groups(group_by)
        # The newest row of a group goes to the last part.
        part = held_out - (count - position) + 1
        part = np.where(position > 0, part.clip(min=0), 0)
        if held_out == 1:
            part *= 1 if leave_one_mode == "valid_only" else 2
        return self._parts(order, part)

    def split_by_ratio(self, ratios: list[float], group_by: str | None = None) -> list[Any]:
        """As RecBole's, without its lists of Python numbers."""
        if not isinstance(self.inter_feat, Prefixes):
            return super().split_by_ratio(ratios, group_by)
        shares = [ratio / sum(ratios) for ratio in ratios]
        if group_by is None:
            order = position = np.arange(len(self), dtype=np.int32)
            bounds = np.array([self._calcu_split_ids(len(self), shares)])
            row_of_bounds = np.zeros(len(self), dtype=np.intp)
        else:
            order, position, count = self._groups(group_by)
            sizes, row_of_bounds = np.unique(count, return_inverse=True)
            bounds = np.array([self._calcu_split_ids(int(size), shares) for size in sizes])
        part = sum(position >= bound[row_of_bounds] for bound in bounds.T)
        return self._parts(order, part, len(shares))

    def time_based_split(self, ratios: list[float], group_by: str) -> list[Any]:
        """As RecBole's: rows after a moment test, and of each user's earlier rows the last share validates."""
        if not isinstance(self.inter_feat, Prefixes):
            return super().time_based_split(ratios, group_by)
        train, _, test = (ratio / sum(ratios) for ratio in ratios)
        times = self.inter_feat[self.time_field].numpy()
        boundary = np.percentile(times, 100 * (1 - test))
        order, position, count = self._groups(group_by)
        early = times[order] <= boundary
        starts = np.flatnonzero(position == 0)
        early_count = np.repeat(np.add.reduceat(early, starts, dtype=np.int64), count[starts])
        part = np.where(early, position >= (early_count * (train / (1 - test))).astype(np.int64), 2)
        return self._parts(order, part)

    def newest(self, count: int, alone: bool = False) -> Any:
        """Only each user's newest rows, at most ``count`` of them, in the order in which they stand.

        With ``alone`` their histories begin with the event before the oldest of their targets, as if the user had done
        nothing before.

        Raises:
            UserError: the rows come from files that were split beforehand.
        """
        if not isinstance(self.inter_feat, Prefixes):
            key = "train_newest" if alone else "train_last"
            raise UserError(f"{key}: benchmark_filename names files whose rows are written out; leave one empty")
        order, position, sizes = self._groups(self.uid_field)
        kept = np.flatnonzero(sizes - position <= count)
        kept = kept[np.argsort(order[kept])]
        rows = self.inter_feat.select(order[kept])
        if alone:
            oldest = np.maximum(sizes - count, 0)
            rows.length = np.minimum(rows.length, (position - oldest)[kept] + 1)
        return self.copy(rows)

    def _groups(self, field: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows group by group, groups in the order of their first row: (rows, position in the group, its size)."""
        key = self.inter_feat[field].numpy()
        rank = np.full(int(key.max(initial=0)) + 1, len(key), dtype=np.int32)
        # Of repeated keys the one that is written last stays, which is the first row.
        rank[key[::-1]] = np.arange(len(key), dtype=np.int32)[::-1]
        group = rank[key]
        # These arrays are as long as the data, so none is kept for longer than it is needed.
        del key
        order = np.argsort(group, kind="stable").astype(np.int32)
        first = np.flatnonzero(np.diff(group[order], prepend=-1)).astype(np.int32)
        count = np.diff(first, append=np.int32(len(group)))
        position = np.arange(len(group), dtype=np.int32) - np.repeat(first, count)
        return order, position, np.repeat(count, count)

    def _parts(self, order: np.ndarray, part: Any, count: int = 3) -> list[Any]:
        self._drop_unused_col()
        return [self.copy(self.inter_feat.select(order[part == p])) for p in range(count)]


def training_events(train: Any) -> np.ndarray:
    """How many events of training each item has, as a target or in a history ``[items]``.

    In files that were split beforehand, an event counts in each history that holds it.
    """
    rows, field = train.inter_feat, train.iid_field
    if isinstance(rows, Prefixes):
        items = rows.events[field].numpy()
        # How many rows hold each event: those that have begun with it or before, and have not ended before it.
        held = np.bincount(rows.target - rows.length, minlength=len(items) + 1)
        held -= np.bincount(rows.target + 1, minlength=len(items) + 1)
        items = items[held[:-1].cumsum() > 0]
    else:
        lists = rows[field + train.config["LIST_SUFFIX"]].numpy()
        items = np.append(rows[field].numpy(), lists[lists > 0])
    return np.bincount(items, minlength=train.item_num)


def look_at_cold_targets(drop: bool, train: Any, *evaluated: Any) -> list[Any]:
    """Say how many targets of validation and test are items that training never saw, and leave them out if asked to.

    Raises:
        UserError: that would leave nothing.
    """
    known = training_events(train) > 0
    found = []
    for phase, split in zip(("valid", "test"), evaluated):
        warm = known[split.inter_feat[train.iid_field].numpy()]
        cold = len(warm) - int(warm.sum())
        mend = ("; they are left out" if drop else "; drop_cold_targets: True leaves them out") if cold else ""
        getLogger().info(f"{phase}: {cold:,} of {len(warm):,} targets are items that training never saw{mend}")
        if cold and cold == len(warm) and drop:
            raise UserError(
                f"drop_cold_targets: training saw none of the {cold:,} items of {phase}; choose another split"
            )
        found.append(some_rows(split, np.flatnonzero(warm)) if cold and drop else split)
    return found


def some_rows(split: Any, rows: np.ndarray) -> Any:
    """Some rows of a split."""
    events = split.inter_feat
    return split.copy(events.select(rows) if isinstance(events, Prefixes) else events[rows])
