"""Memory and seconds from the raw columns to the last batch of an epoch, on generated interactions, beside RecBole.

Each row is a process of its own: it holds the raw columns (user, item, time), builds the splits and the loaders, and
reads --steps batches. The memory is the most that is in use meanwhile above that of the raw columns; only Linux tells
it. RecBole's expansion is measured on a hundredth of the interactions, because each takes kilobytes there.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from recbole_ssm.arguments import add_counts
from recbole_ssm.bench import Row
from recbole_ssm.bench.measure import extra_memory, in_a_process
from recbole_ssm.errors import first_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_counts(
        parser,
        interactions=(20_000_000, "how many are generated"),
        length=(200, "events of the longest history"),
        steps=(100, "batches of 2048 targets that are read"),
    )


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Rows with name, interactions, raw_bytes, above_raw_bytes, bytes_per_interaction, build_s, batch_s.

    A row that could not be measured has the first two alone, and a ``note`` that says why.
    """
    jobs = [("packed", options.interactions), ("prefix", options.interactions)]
    jobs.append(("RecBole", max(options.interactions // 100, 1000)))
    for name, interactions in jobs:
        row: Row = {"name": name, "interactions": interactions}
        try:
            row |= in_a_process(_measure, name, interactions, options.length, options.steps)
        except Exception as error:  # a row that fails must not take the others with it
            row["note"] = f"failed: {first_line(error)}"
        yield row


def _measure(name: str, interactions: int, max_length: int, steps: int) -> Row:
    """The measured columns of one row, in this process."""
    import recbole.data.dataset
    from recbole.data import data_preparation

    from recbole_ssm.data.loader import create_loaders
    from recbole_ssm.quick_start import configure

    options = {"MAX_ITEM_LIST_LENGTH": max_length, "state": "ERROR"}
    if name != "RecBole":
        options["train_mode"] = name
    dataset = _generated(configure("Mamba4Rec", "generated", config_dict=options), interactions)
    if name == "RecBole":
        type(dataset).data_augmentation = recbole.data.dataset.SequentialDataset.data_augmentation  # type: ignore[method-assign]
    raw = sum(dataset.inter_feat[field].nbytes for field in dataset.inter_feat)
    prepare = data_preparation if name == "RecBole" else create_loaders
    times: list[float] = []
    batches = 0

    def build_and_read() -> None:
        nonlocal batches
        times.append(time.perf_counter())
        train, _, _ = prepare(dataset.config, dataset)
        times.append(time.perf_counter())
        batches = sum(1 for _ in itertools.islice(train, steps))
        times.append(time.perf_counter())

    above = extra_memory(build_and_read, torch.device("cpu"))
    begin, built, end = times
    return {
        "raw_bytes": raw,
        "above_raw_bytes": above,
        "bytes_per_interaction": None if above is None else above / interactions,
        "build_s": built - begin,
        "batch_s": (end - built) / batches,
    }


def _generated(config: Any, interactions: int) -> Any:
    """A random data set that needs no file: histories of about 150 events, popular and rare items, random times."""
    import pandas as pd
    from recbole.utils import FeatureSource, FeatureType

    from recbole_ssm.data.dataset import SequentialDataset

    class Generated(SequentialDataset):
        def _load_data(self, token: str, dataset_path: str) -> None:
            rng = np.random.default_rng(0)
            self.inter_feat = pd.DataFrame(
                {
                    self.uid_field: rng.integers(0, max(interactions // 150, 10), interactions, dtype=np.int32),
                    self.iid_field: np.minimum(rng.zipf(1.3, interactions), 50_000).astype(np.int32),
                    self.time_field: rng.random(interactions) * 1e9,
                }
            )
            self.user_feat = self.item_feat = None
            for field, kind in zip(self.inter_feat, (FeatureType.TOKEN, FeatureType.TOKEN, FeatureType.FLOAT)):
                self._register(field, kind, FeatureSource.INTERACTION, self.inter_feat)

    return Generated(config)
