"""RecBole's SequentialDataset, read with checks and ordered by full-precision time."""

from __future__ import annotations

import http.client
import math
import re
import warnings
import zipfile
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recbole_ssm import compat
from recbole_ssm.data import temporal
from recbole_ssm.data.atomic import as_frame, read_columns, read_header, require_column
from recbole_ssm.data.download import download
from recbole_ssm.data.events import Events, k_core, oddities
from recbole_ssm.data.lines import BadLines
from recbole_ssm.errors import UserError, did_you_mean

compat.install()

import recbole.data.dataset  # noqa: E402
from recbole.data.interaction import Interaction  # noqa: E402
from recbole.utils import FeatureSource, FeatureType  # noqa: E402

from recbole_ssm.data.prefixes import Prefixes  # noqa: E402


def create_dataset(config: Any) -> Any:
    """The filtered data set of a configuration.

    RecBole's function of this name first unpickles whatever ``<checkpoint_dir>/<dataset>-SequentialDataset.pth`` holds.

    Raises:
        UserError: a file is missing or faulty, or the filters leave nothing.
    """
    base = getattr(recbole.data.dataset, f"{config['model']}Dataset", None)
    kind = SequentialDataset if base is None else type(base.__name__, (SequentialDataset, base), {})
    try:
        return kind(config)
    except UserError:
        raise
    except ValueError as error:
        # RecBole's own checks of filters and fields.
        raise UserError(f"dataset {config['dataset']}: {error}") from error


class SequentialDataset(recbole.data.dataset.SequentialDataset):
    """RecBole's SequentialDataset, with these differences:

    - files are read by :mod:`recbole_ssm.data.atomic`, whose errors name file and line;
    - times are whole numbers (int64) where the file's are, and events are sorted by them, stably: events of one time
      keep the order of the file. RecBole rounds to float32 first, 64 s and coarser (``legacy_time_order: true`` brings
      that back). Batches carry seconds, whether the file counts them or milli-, micro- or nanoseconds;
    - a data set that is missing is downloaded whole or not at all;
    - prefixes are gathered batch by batch (:class:`recbole_ssm.data.prefixes.Prefixes`), the same rows in the same
      order; RecBole stores them all, padded;
    - ``eval_args: {split: {GTS: [0.8, 0.1, 0.1]}}`` splits all events by two moments in time, and leave-one-out says in
      the log how much of the future it trains on.
    """

    # A DataFrame while it is read and filtered; afterwards an Interaction, or Prefixes.
    inter_feat: Any

    def _load_data(self, token: str, dataset_path: str) -> None:
        folder = Path(dataset_path)
        needed = [f"{token}.{part}.inter" for part in self.benchmark_filename_list or ()] or [f"{token}.inter"]
        missing = next((name for name in needed if not (folder / name).is_file()), None)
        if missing is not None:
            self._fetch(folder, missing)
        super()._load_data(token, dataset_path)

    def _fetch(self, folder: Path, missing: str) -> None:
        where = f"dataset {self.dataset_name}: no file {missing} in {folder.absolute()}"
        url = self._get_download_url("url", allow_none=True)
        if folder.is_dir() and any(folder.iterdir()):
            source = f" (from {url})" if url else ""
            raise UserError(f"{where}; put it there{source}, or set data_path to the folder above {self.dataset_name}/")
        if url is None:
            raise UserError(f"{where}, and RecBole knows no download of that name; set data_path or correct it")
        getLogger().info(f"{where}; downloading {url}")
        try:
            download(url, folder, self.dataset_name)
        except (OSError, http.client.HTTPException, zipfile.BadZipFile) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"{where}, and the download failed ({reason}); get {url} and unpack it there") from error

    def _load_feat(self, filepath: str, source: Any) -> Any:
        load, unload = self._get_load_and_unload_col(source)
        if load == set():
            return None
        path, encoding = Path(filepath), self.config["encoding"] or "utf-8"
        separator = self.config["field_separator"]
        header = read_header(path, separator, encoding)
        required = []
        if source == FeatureSource.INTERACTION and self.benchmark_filename_list is None:
            for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"):
                name = self.config[key]
                require_column(path, header, key, name, "float" if key == "TIME_FIELD" else "token")
                required.append(name)
        if load is not None:
            absent = sorted(load - set(header))
            if absent and source == FeatureSource.INTERACTION:
                raise UserError(
                    f"{path}, line 1: no column {absent[0]}, which load_col asks for; drop it from load_col"
                )
        columns = {
            name: kind
            for name, kind in header.items()
            if (load is None or name in load) and (unload is None or name not in unload)
        }
        for name in required:
            if name not in columns:
                raise UserError(f"load_col and unload_col leave out {name} of {path.name}, which must be loaded")
        if not columns:
            self.logger.warning(f"No columns has been loaded from [{source}]")
            return None
        time_field = self.time_field if source == FeatureSource.INTERACTION else None
        side = Path(self.config["checkpoint_dir"]) / f"{path.name}.skipped"
        with BadLines(path, self.config["on_bad_lines"], side) as bad:
            found = read_columns(
                path,
                {name: "time" if name == time_field else kind for name, kind in columns.items()},
                required=required,
                separator=separator,
                seq_separator=self.config["seq_separator"],
                encoding=encoding,
                bad=bad,
            )
        if len(bad):
            self.logger.warning(bad)
        if required:
            user, item, time = required
            events = Events(found[user], found[item], found[time])
            for level, oddity in oddities(events, (user, item, time), bad, self.config["rm_dup_inter"]):
                self.logger.log(level, oddity)
        frame = as_frame(found)
        for name, kind in columns.items():
            self._register(name, FeatureType(kind), source, frame)
        return frame

    def _register(self, name: str, kind: Any, source: Any, frame: Any) -> None:
        """What RecBole's reader notes of each field."""
        if isinstance(source, FeatureSource) or source != "link":
            self.field2source[name] = source
            self.field2type[name] = kind
            if "float" in kind.value:
                self.field2bucketnum[name] = 2
        if not kind.value.endswith("seq"):
            self.field2seqlen[name] = 1
            return
        limit = (self.config["seq_len"] or {}).get(name)
        if limit is not None:
            frame[name] = frame[name].map(lambda row: row[:limit])
        self.field2seqlen[name] = int(frame[name].map(lambda row: row.size).max())

    def _data_processing(self) -> None:
        super()._data_processing()
        if self.benchmark_filename_list is None:
            _, counts = np.unique(self.inter_feat[self.uid_field], return_counts=True)
            single = int((counts == 1).sum())
            if single:
                getLogger().warning(
                    f"{single} of {len(counts)} users have a single interaction: no history to learn or predict from; "
                    "they are skipped"
                )
            if not (counts >= 3).any():
                raise UserError(
                    f"dataset {self.dataset_name}: after filtering no user has 3 interactions (one each to train, "
                    "validate and test); loosen user_inter_num_interval and item_inter_num_interval"
                )
        if max(self.config["topk"]) >= self.item_num:
            raise UserError(
                f"topk: {max(self.config['topk'])} is more than the {self.item_num - 1} items of dataset "
                f"{self.dataset_name}; try topk: [{self.item_num - 1}]"
            )

    def _remove_duplication(self) -> None:
        keep = self.config["rm_dup_inter"]
        if keep is None:
            return
        if keep not in ("first", "last", "same_time"):
            raise UserError(f"rm_dup_inter: must be first, last, same_time or empty, got {keep!r}")
        fields = [self.uid_field, self.iid_field]
        if keep == "same_time":
            keep, fields = "first", [*fields, self.time_field]
        # RecBole sorts by time here too, but unstably, and all that follows keeps that order.
        self.inter_feat = self.inter_feat.sort_values(self.time_field, kind="stable").drop_duplicates(fields, keep=keep)

    def _parse_intervals_str(self, intervals_str: Any) -> Any:
        """``"[3,inf)"`` -> ``[("[", 3, inf, ")")]``; whole numbers stay exact. RecBole skips what it cannot read."""
        if intervals_str is None:
            return None
        found = []
        for text in str(intervals_str).split(";"):
            match = re.fullmatch(r"\s*([\[(])([^,]+),([^,]+)([\])])\s*", text)
            ends = [_number(end) for end in match.groups()[1:3]] if match else []
            if not match or None in ends or not ends[0] <= ends[1]:
                raise UserError(f"{text!r} is no interval, in {intervals_str!r}; intervals read [3,inf) or (0,1];[3,4)")
            found.append((match[1], *ends, match[4]))
        return found

    def _filter_by_field_value(self) -> None:
        for field, accepted in (self.config["val_interval"] or {}).items():
            kind = self.field2type.get(field)
            if kind is None:
                hint = did_you_mean(field, self.field2type)
                raise UserError(f"val_interval: {field} is not loaded; see load_col{hint}")
            if kind in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
                raise UserError(f"val_interval: {field} holds sequences; only a number or a token can be a filter")
            if kind == FeatureType.TOKEN and not isinstance(accepted, list):
                raise UserError(f"val_interval: {field} holds tokens, so it takes a list of them, got {accepted!r}")
        super()._filter_by_field_value()

    def _normalize(self) -> None:
        """As RecBole's, but times stay times."""
        times = None if self.config["legacy_time_order"] else self.inter_feat.get(self.time_field)
        super()._normalize()
        if times is not None:
            self.inter_feat[self.time_field] = times

    def _filter_by_inter_num(self) -> None:
        """RecBole's filter, after one that leaves the same and takes the bulk away by array operations."""
        least = []
        for key in ("user_inter_num_interval", "item_inter_num_interval"):
            intervals = self._parse_intervals_str(self.config[key]) or [("[", 0, np.inf, ")")]
            bracket, low, high, _ = intervals[0]
            # With an upper bound, what is left depends on the order of dropping.
            if len(intervals) == 1 and high == np.inf:
                least.append(math.ceil(low) if bracket == "[" else math.floor(low) + 1)
        if len(least) == 2:
            users, items = (pd.factorize(self.inter_feat[field])[0] for field in (self.uid_field, self.iid_field))
            rows = k_core(users, items, *least)
            if len(rows) < len(users):
                self.inter_feat = self.inter_feat.iloc[rows]
        super()._filter_by_inter_num()

    def _change_feat_format(self) -> None:
        if not self.config["legacy_time_order"] and self.time_field in self.inter_feat:
            # Before times become seconds: all later sorts are stable, and rounding keeps the order.
            order = np.argsort(self.inter_feat[self.time_field].to_numpy(), kind="stable")
            # One column after the other, because a second copy of all would double the memory.
            for column in self.inter_feat:
                self.inter_feat[column] = self.inter_feat[column].array[order]
            self.inter_feat.reset_index(drop=True, inplace=True)
            del order
        self._look_at_times()
        super()._change_feat_format()

    def data_augmentation(self) -> None:
        """Index every history and its next event, where RecBole writes them out."""
        if super().data_augmentation.__func__ is not recbole.data.dataset.SequentialDataset.data_augmentation:
            # A model whose rows hold more, such as DIEN.
            super().data_augmentation()
            return
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        self.inter_feat = Prefixes.of_events(
            self.inter_feat.interaction,
            self.uid_field,
            self.max_item_list_len,
            list_suffix=self.config["LIST_SUFFIX"],
            length_field=self.item_list_length_field,
        )

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

    def newest(self, count: int) -> Any:
        """Only each user's newest rows, at most ``count`` of them, in the order in which they stand.

        Raises:
            UserError: the rows come from files that were split beforehand.
        """
        if not isinstance(self.inter_feat, Prefixes):
            raise UserError("train_last: benchmark_filename names files whose rows are written out; leave one empty")
        order, position, sizes = self._groups(self.uid_field)
        return self.copy(self.inter_feat.select(np.sort(order[sizes - position <= count])))

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

    def _look_at_times(self) -> None:
        """Split by time, or say what leave-one-out leaks, while times are at full precision."""
        if self.benchmark_filename_list is not None or self.time_field not in self.inter_feat:
            return
        split = self.config["eval_args"]["split"]
        fields = (self.uid_field, self.iid_field, self.time_field)
        users, items, times = (self.inter_feat[field].to_numpy() for field in fields)
        if self.config["legacy_time_order"]:
            # As RecBole will sort them.
            times = times.astype(np.float32)
        if temporal.NAME in split:
            parts = temporal.split_by_time(times, temporal.check_parts(split[temporal.NAME]))
            self._part_of_row = temporal.parts_of_targets(parts, users, times)
            self.logger.info(f"split by time: {temporal.sentence(temporal.describe(parts, users, items, times))}")
            if temporal.is_position(users, times):
                self.logger.warning(
                    f"{self.time_field} only counts each user's events: a split by time compares nothing across users"
                )
        elif "LS" in split and (warning := temporal.leave_one_out_warning(users, times)):
            self.logger.warning(warning)

    def build(self) -> list[Any]:
        """RecBole's build, and the split by time that eval_args names GTS.

        An event of validation or test is predicted from all that its user did before, as it would be at that moment;
        a user's first event is no target, as there is nothing to predict it from.
        """
        if self.benchmark_filename_list is not None or temporal.NAME not in self.config["eval_args"]["split"]:
            return super().build()
        self._change_feat_format()
        assert len(self._part_of_row) == len(self.inter_feat), "a part for each row"
        self._drop_unused_col()
        pick = self.inter_feat.select if isinstance(self.inter_feat, Prefixes) else self.inter_feat.__getitem__
        return [self.copy(pick(np.flatnonzero(self._part_of_row == part))) for part in range(3)]

    def _dataframe_to_interaction(self, data: Any) -> Any:
        with warnings.catch_warnings():
            # pandas 3 hands out read-only arrays, which RecBole copies into tensors.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            found = super()._dataframe_to_interaction(data)
        if data is self.inter_feat and self.time_field in data and not self.config["legacy_time_order"]:
            times = data[self.time_field].to_numpy()
            found.update(Interaction({self.time_field: torch.from_numpy(temporal.in_seconds(times))}))
        return found


def _number(text: str) -> Any:
    """The number that a text spells, exact where it is whole; None if it spells none."""
    try:
        return int(text) if re.fullmatch(r"\s*-?[0-9]+\s*", text) else float(text)
    except ValueError:
        return None
