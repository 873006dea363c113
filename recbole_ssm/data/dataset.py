"""RecBole's SequentialDataset, read with checks and ordered by full-precision time."""

from __future__ import annotations

import http.client
import math
import re
import warnings
import zipfile
from collections.abc import Collection
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recbole_ssm import compat
from recbole_ssm.data import readymade, temporal, ties
from recbole_ssm.data.atomic import as_frame, contradictions, read_configured, read_header, require_column
from recbole_ssm.data.download import download
from recbole_ssm.data.events import Events, k_core, oddities
from recbole_ssm.errors import UserError, did_you_mean

compat.install()

import recbole.data.dataset  # noqa: E402
from recbole.data.interaction import Interaction  # noqa: E402
from recbole.utils import EvaluatorType, FeatureSource, FeatureType  # noqa: E402

from recbole_ssm.data.prefixes import Prefixes  # noqa: E402
from recbole_ssm.data.splits import SplitDataset  # noqa: E402


def create_dataset(config: Any, items: Collection[str] | None = None) -> Any:
    """The filtered data set of a configuration; events of other ``items`` are left out, None keeps all.

    RecBole's function of this name first unpickles whatever ``<checkpoint_dir>/<dataset>-SequentialDataset.pth`` holds.

    Raises:
        UserError: a file is missing or faulty, or the filters leave nothing.
    """
    base = getattr(recbole.data.dataset, f"{config['model']}Dataset", None)
    kind = SequentialDataset if base is None else type(base.__name__, (SequentialDataset, base), {})
    try:
        return kind(config, items)
    except UserError:
        raise
    except ValueError as error:
        # RecBole's own checks of filters and fields.
        raise UserError(f"dataset {config['dataset']}: {error}") from error


class SequentialDataset(SplitDataset):
    """RecBole's SequentialDataset, with these differences:

    - files are read by :mod:`recbole_ssm.data.atomic`, whose errors name file and line;
    - times are whole numbers (int64) where the file's are, and events are sorted by them, stably: events of one time
      keep the order of the file, unless ``ties: random`` draws one. RecBole rounds to float32 first, 64 s and coarser
      (``legacy_time_order: true``). Batches carry seconds, also where the file counts milli-, micro- or nanoseconds;
    - a data set that is missing is downloaded whole or not at all;
    - prefixes are gathered batch by batch (:class:`recbole_ssm.data.prefixes.Prefixes`), the same rows in the same
      order; RecBole stores them all, padded;
    - ``eval_args: {split: {GTS: [0.8, 0.1, 0.1]}}`` splits all events by two moments in time, and leave-one-out says in
      the log how much of the future it trains on.
    """

    def __init__(self, config: Any, items: Collection[str] | None = None) -> None:
        self._known_items = items
        super().__init__(config)

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
            near = did_you_mean(self.dataset_name, (path.parent.name for path in folder.parent.glob("*/*.inter")))
            raise UserError(f"{where}, and RecBole knows no download of that name{near}; set data_path or correct it")
        getLogger().info(f"{where}; downloading {url}")
        try:
            download(url, folder, self.dataset_name)
        except (OSError, http.client.HTTPException, zipfile.BadZipFile) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"{where}, and the download failed ({reason}); get {url} and unpack it there") from error

    def _load_feat(self, filepath: str, source: Any) -> Any:
        path = Path(filepath)
        if self._get_load_and_unload_col(source)[0] == set():
            return None
        header = read_header(path, self.config["field_separator"], self.config["encoding"] or "utf-8")
        columns, required = self._columns(path, header, source)
        if not columns:
            self.logger.warning(f"No columns has been loaded from [{source}]")
            return None
        time_field = self.time_field if source == FeatureSource.INTERACTION else None
        kinds = {name: "time" if name == time_field else kind for name, kind in columns.items()}
        found, bad = read_configured(path, kinds, self.config, required)
        if source == FeatureSource.INTERACTION and self.benchmark_filename_list is None:
            user, item, time = required
            events = Events(found[user], found[item], found[time])
            for level, oddity in oddities(events, (user, item, time), bad, self.config["rm_dup_inter"]):
                self.logger.log(level, oddity)
        frame = as_frame(found)
        if source in (FeatureSource.ITEM, FeatureSource.USER) and (note := contradictions(frame, required[0], bad)):
            self.logger.warning(note)
        for name, kind in columns.items():
            self._register(name, FeatureType(kind), source, frame)
        return frame

    def _columns(self, path: Path, header: dict[str, str], source: Any) -> tuple[dict[str, str], list[str]]:
        """What to load of a file, ``{name: type}``, and the columns in which no cell may be empty.

        Raises:
            UserError: a column is missing, or stands in a file that was loaded before.
        """
        load, unload = self._get_load_and_unload_col(source)
        needed: dict[str, tuple[str, str]] = {}
        if source in (FeatureSource.INTERACTION, FeatureSource.USER):
            needed["USER_ID_FIELD"] = self.uid_field, "token"
        if source in (FeatureSource.INTERACTION, FeatureSource.ITEM):
            needed["ITEM_ID_FIELD"] = self.iid_field, "token"
        if source == FeatureSource.INTERACTION and self.benchmark_filename_list is None:
            needed["TIME_FIELD"] = self.time_field, "float"
        elif source == FeatureSource.INTERACTION:
            needed["LIST_SUFFIX"] = self.iid_field + self.config["LIST_SUFFIX"], "token_seq"
            # The histories are what such files are made for.
            load = load and load | {name for name, _ in needed.values()}
        for key, (name, kind) in needed.items():
            require_column(path, header, key, name, kind)
        absent = sorted((load or set()) - set(header))
        if absent and source == FeatureSource.INTERACTION:
            raise UserError(f"{path}, line 1: no column {absent[0]}, which load_col asks for; drop it from load_col")
        columns = {
            name: kind
            for name, kind in header.items()
            if (load is None or name in load) and (unload is None or name not in unload)
        }
        required = [name for name, _ in needed.values()]
        for name in required:
            if name not in columns:
                raise UserError(f"load_col and unload_col leave out {name} of {path.name}, which must be loaded")
        for name in columns:
            other = self.field2source.get(name, source)
            if other != source and name not in required:
                # An id may stand in a second file, which RecBole then notes; the first is that of the events.
                suffix = "inter" if name in (self.uid_field, self.iid_field) else getattr(other, "value", other)
                raise UserError(
                    f"{path}, line 1: {self.dataset_name}.{suffix} has a column {name} too, and one would take the "
                    "place of the other; rename one, or load one alone (load_col, unload_col)"
                )
        return columns, required

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

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        super()._load_inter_feat(token, dataset_path)
        if self.benchmark_filename_list is not None:
            zeros = readymade.trim_histories(self.inter_feat, self.iid_field, self._lists(), self.max_item_list_len)
            if zeros:
                self.logger.info(
                    f"{zeros:,} zeros pad the histories of {self.benchmark_filename_list}; they are no items"
                )

    def _lists(self) -> dict[str, str]:
        """``{field: the column that holds its history}`` of ready-made splits."""
        found = {field: field + self.config["LIST_SUFFIX"] for field in self.inter_feat}
        return {field: name for field, name in found.items() if name in self.inter_feat}

    def _init_alias(self) -> None:
        """A token is one token, in a target and in a history."""
        super()._init_alias()
        if self.benchmark_filename_list is None:
            return
        for field, name in self._lists().items():
            known = next((alias for alias, fields in self.alias.items() if field in fields), field)
            if name in self._rest_fields:
                self.alias[known] = np.array([*self.alias.get(known, [field]), name])
                self._rest_fields = np.setdiff1d(self._rest_fields, self.alias[known])

    def _benchmark_presets(self) -> None:
        for field, name in self._lists().items():
            setattr(self, f"{field}_list_field", name)
            self.field2seqlen[name] = self.max_item_list_len
        self.set_field_property(self.item_list_length_field, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        histories = self.inter_feat[self.iid_field + self.config["LIST_SUFFIX"]]
        self.inter_feat[self.item_list_length_field] = histories.map(len)

    @property
    def token_like_fields(self) -> list[str]:
        """All fields of tokens; RecBole leaves out those of additional files, which then are never numbered."""
        return [name for name, kind in self.field2type.items() if kind in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)]

    def _data_processing(self) -> None:
        self._check_features()
        super()._data_processing()
        self._check_labels()
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

    def _check_features(self) -> None:
        """What RecBole would run into later, without a word on the cause."""
        for key in ("numerical_features", "discretization", "normalize_field"):
            if self.time_field in (self.config[key] or ()) and not self.config["legacy_time_order"]:
                raise UserError(f"{key}: {self.time_field} is the time of events, not a feature; leave it out")
        for key in ("alias_of_user_id", "alias_of_item_id", "numerical_features"):
            for field in self.config[key] or ():
                if field not in self.field2type:
                    hint = did_you_mean(field, self.field2type)
                    raise UserError(f"{key}: {field} is not loaded; see load_col{hint}")
                if key == "numerical_features" and field in self.token_like_fields:
                    raise UserError(f"{key}: {field} holds tokens, not numbers; leave it out")
        for field in self.config["selected_features"] or ():
            if field not in self.field2type:
                hint = did_you_mean(field, self.field2type)
                raise UserError(f"selected_features: {field} is not loaded; see load_col{hint}")
            is_float = self.field2type[field] in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ)
            if is_float and field not in (self.config["numerical_features"] or ()):
                raise UserError(f"selected_features: {field} is a number; name it in numerical_features too")

    def _check_labels(self) -> None:
        modes = self.config["eval_args"]["mode"]
        if "labeled" not in (modes if isinstance(modes, str) else modes.values()):
            return
        if self.config["eval_type"] == EvaluatorType.RANKING:
            raise UserError("eval_args: mode: labeled ranks nothing; take mode: full, or metrics of labels such as AUC")
        if self.label_field not in self.inter_feat:
            raise UserError(
                f"eval_args: mode: labeled needs labels; load a column {self.label_field}, or make it of another by "
                "threshold: {'rating': 3}"
            )

    def _drop_unused_col(self) -> None:
        for name, fields in (self.config["unused_col"] or {}).items():
            if getattr(self, f"{name}_feat", None) is None:
                raise UserError(f"unused_col: no file .{name} is loaded; see load_col")
            if needed := {self.uid_field, self.iid_field} & set(fields):
                raise UserError(f"unused_col: {needed.pop()} is needed; leave it out")
        super()._drop_unused_col()

    def _remove_duplication(self) -> None:
        keep = self.config["rm_dup_inter"]
        if keep is None:
            return
        fields = [self.uid_field, self.iid_field]
        if keep == "same_time":
            keep, fields = "first", [*fields, self.time_field]
        # RecBole sorts by time here too, but unstably, and all that follows keeps that order.
        self.inter_feat = self.inter_feat.sort_values(self.time_field, kind="stable").drop_duplicates(fields, keep=keep)

    def _parse_intervals_str(self, intervals_str: Any) -> Any:
        """``"[3,inf)"`` -> ``[("[", 3, inf, ")")]``; whole numbers stay exact, which RecBole rounds."""
        if intervals_str is None:
            return None
        found = []
        for text in str(intervals_str).split(";"):
            low, _, high = text.strip()[1:-1].partition(",")
            found.append((text.strip()[0], _number(low), _number(high), text.strip()[-1]))
        return found

    def _filter_by_field_value(self) -> None:
        if self._known_items is not None:
            known = self.inter_feat[self.iid_field].isin(set(self._known_items))
            if not known.all():
                unknown = self.inter_feat[self.iid_field][~known]
                self.logger.warning(
                    f"{len(unknown):,} of {len(known):,} events are of {unknown.nunique():,} items that the checkpoint "
                    "does not know; they are left out"
                )
                self.inter_feat = self.inter_feat[known].reset_index(drop=True)
        for field, accepted in (self.config["val_interval"] or {}).items():
            kind = self.field2type.get(field)
            if kind is None:
                hint = did_you_mean(field, self.field2type)
                raise UserError(f"val_interval: {field} is not loaded; see load_col{hint}")
            if kind in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
                raise UserError(f"val_interval: {field} holds sequences; only a number or a token can be a filter")
            if (kind == FeatureType.TOKEN) != isinstance(accepted, list):
                needed = (
                    "tokens, so it takes a list of them"
                    if kind == FeatureType.TOKEN
                    else "numbers, so it takes intervals"
                )
                raise UserError(f"val_interval: {field} holds {needed}, got {accepted!r}")
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
            # With an upper bound, what is left depends on the order of dropping. Infinity is no count to begin from.
            if len(intervals) == 1 and -np.inf < low < high == np.inf:
                least.append(math.ceil(low) if bracket == "[" else math.floor(low) + 1)
        if len(least) == 2:
            users, items = (pd.factorize(self.inter_feat[field])[0] for field in (self.uid_field, self.iid_field))
            rows = k_core(users, items, *least)
            if len(rows) < len(users):
                self.inter_feat = self.inter_feat.iloc[rows]
        super()._filter_by_inter_num()

    def _change_feat_format(self) -> None:
        if self.benchmark_filename_list is None and not self.config["legacy_time_order"]:
            # Before times become seconds: all later sorts are stable, and rounding keeps the order.
            order = ties.rows_of(self)
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
        self.logger.info(ties.sentence(self.config["ties"], self.config["ties_seed"], users, times))
        if temporal.NAME in split:
            parts = temporal.split_by_time(times, temporal.check_parts(split[temporal.NAME]))
            self._part_of_row = temporal.parts_of_targets(parts, users, times)
            self.logger.info(f"split by time: {temporal.sentence(temporal.describe(parts, users, items, times))}")
            if temporal.is_position(users, times):
                self.logger.warning(
                    f"{self.time_field} only counts each user's events: a split by time compares nothing across users"
                )
        elif "LS" in split and (note := temporal.leave_one_out_warning(users, times)):
            self.logger.info(note)

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
        if data is self.inter_feat and self.benchmark_filename_list is not None:
            for field, name in self._lists().items():
                are_times = field == self.time_field and not self.config["legacy_time_order"]
                short = readymade.seconds_of(data[name]) if are_times else found[name]
                found.update(Interaction({name: readymade.widened(short, self.max_item_list_len)}))
        return found


def _number(text: str) -> Any:
    """The number that a text spells, exact where it is whole."""
    return int(text) if re.fullmatch(r"\s*[-+]?[0-9]+\s*", text) else float(text)
