"""Patches of RecBole 1.2.1: for today's NumPy, pandas and PyTorch, and for defects that every user of it meets.

:func:`install` applies all of them, once, before anything of RecBole's is used. Each patch is one function, which says
what breaks without it, and has one test. What a subclass of ours can put right is put right there
(:mod:`recbole_ssm.config`, :mod:`recbole_ssm.data`, :mod:`recbole_ssm.trainer`), not here.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

import numpy as np
import torch

from recbole_ssm.errors import NO_RECBOLE, UserError

_installed = False


def install() -> None:
    """Make RecBole usable; later calls do nothing.

    Raises:
        UserError: RecBole is not installed; the message is the line that installs it.
    """
    global _installed
    if _installed:
        return
    if importlib.util.find_spec("recbole") is None:
        raise UserError(NO_RECBOLE)
    restore_numpy_aliases()
    import_models_without_anomaly_detection()
    take_numpy_aliases_once()
    measure_lists_row_by_row()
    fill_missing_values_in_place()
    never_unpickle_dataloaders()
    use_current_grad_scaler()
    collect_more_than_tensors()
    seed_exhaustive_search()
    with without_ray():
        importlib.import_module("recbole.quick_start")
    _installed = True


def restore_numpy_aliases() -> None:
    """RecBole's metrics and data set use np.float, np.object and others that NumPy 1.24 and 2.0 removed."""
    aliases = {
        np.float64: ("float", "float_"),
        np.complex128: ("complex", "complex_"),
        np.int_: ("int", "long"),
        np.bool_: ("bool8",),
        np.object_: ("object",),
        np.str_: ("str", "unicode", "unicode_"),
    }
    for target, names in aliases.items():
        for name in names:
            if name not in np.__dict__:
                setattr(np, name, target)


def import_models_without_anomaly_detection() -> None:
    """Importing RecBole's sequential models calls torch.autograd.set_detect_anomaly(True) (sine.py, line 25).

    It slows every training step of the process by a factor of 1.4 to 1.7.
    """
    before, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    importlib.import_module("recbole.model.sequential_recommender")
    torch.autograd.set_detect_anomaly(before, check_nan)


def take_numpy_aliases_once() -> None:
    """Config.compatibility_settings reads np.float_ and np.complex_ at every Config, which NumPy 2 no longer has."""
    from recbole.config import Config

    Config.compatibility_settings = lambda self: None


def measure_lists_row_by_row() -> None:
    """pandas 3 takes Series.agg(len) as the length of the series; RecBole means the length of each row's list.

    So under pandas 3, ``len`` of a series gives the lengths of its rows in RecBole's data set modules.
    """
    import pandas as pd

    if int(pd.__version__.partition(".")[0]) < 3:
        return
    from recbole.data.dataset import dataset, sequential_dataset

    def rows_len(x: Any) -> Any:
        return x.map(builtins.len) if isinstance(x, pd.Series) else builtins.len(x)

    dataset.len = rows_len
    sequential_dataset.len = rows_len


def fill_missing_values_in_place() -> None:
    """``feat[field].fillna(..., inplace=True)`` fills a copy under pandas 3: missing values stay, without an error."""
    from recbole.data.dataset.dataset import Dataset
    from recbole.utils import FeatureType

    def fill_nan(self: Any) -> None:
        for feat in (getattr(self, name) for name in self.feat_name_list):
            for field in feat:
                kind = self.field2type[field]
                if kind == FeatureType.TOKEN:
                    feat[field] = feat[field].fillna(0)
                elif kind == FeatureType.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                else:
                    empty = np.array([], dtype=np.int64 if kind == FeatureType.TOKEN_SEQ else np.float64)
                    feat[field] = feat[field].map(lambda row, empty=empty: empty if isinstance(row, float) else row)

    Dataset._fill_nan = fill_nan


def never_unpickle_dataloaders() -> None:
    """At every run data_preparation unpickles ``<dataset>-for-<model>-dataloader.pth`` from the checkpoint folder."""
    import recbole.data.utils

    def refuse(config: Any) -> None:
        name = f"{config['dataset']}-for-{config['model']}-dataloader.pth"
        path = os.path.join(config["checkpoint_dir"], name)
        if os.path.exists(path):
            getLogger().warning(f"{path} is ignored: unpickling it could run any code; the splits are made again")

    recbole.data.utils.load_split_dataloaders = refuse


def use_current_grad_scaler() -> None:
    """torch.cuda.amp.GradScaler, which RecBole's trainer makes every epoch, warns that it is deprecated."""
    import recbole.trainer.trainer

    def grad_scaler(enabled: bool = True) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cuda", enabled=enabled)

    recbole.trainer.trainer.amp = types.SimpleNamespace(GradScaler=grad_scaler)


def collect_more_than_tensors() -> None:
    """Collector.get_data_struct calls ``.cpu()`` on numbers too, so that ItemCoverage and others end in a traceback."""
    from recbole.evaluator.collector import Collector

    get_tensors = Collector.get_data_struct

    def get_data_struct(self: Any) -> Any:
        collected = self.data_struct._data_dict
        others = {key: value for key, value in collected.items() if not isinstance(value, torch.Tensor)}
        for key in others:
            del collected[key]
        found = get_tensors(self)
        collected |= others
        found._data_dict |= others
        return found

    Collector.get_data_struct = get_data_struct


def seed_exhaustive_search() -> None:
    """hyperopt 0.2.6 and later want a numpy Generator; RecBole's exhaustive search hands it a RandomState."""
    import recbole.trainer.hyper_tuning as hyper_tuning

    numpy = types.ModuleType("numpy")
    numpy.__dict__.update(vars(np), random=types.SimpleNamespace(RandomState=np.random.default_rng))
    hyper_tuning.np = numpy


@contextmanager
def without_ray() -> Iterator[None]:
    """recbole.quick_start imports ray.tune for one call; its pinned ray fails to import beside current setuptools.

    Empty modules stand in for ray during that import only. A ray that has been imported before is left as it is.
    """
    ray, tune = types.ModuleType("ray"), types.ModuleType("ray.tune")
    ray.tune, tune.report = tune, lambda *args, **kwargs: None  # type: ignore[attr-defined]
    stand_ins = {name: module for name, module in {"ray": ray, "ray.tune": tune}.items() if name not in sys.modules}
    sys.modules |= stand_ins
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
