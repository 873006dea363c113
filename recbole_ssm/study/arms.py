"""The rows of a table as a file names them: ``recbole-ssm compare --arms=FILE.yaml``.

The file maps what a row is called to its config keys, a preset among them if it has one. Three entries are no config
keys: ``datasets`` (one or a list, in place of ``--datasets`` and of the preset's own), ``ties`` (``file``, ``random``
or both, an arm each) and ``seeds`` (how many, in place of ``--seeds``)::

    2Mamba4Rec: {model: 2Mamba4Rec, num_layers: 4, ties: [file, random], seeds: 3}
    eSASRec: {preset: ml-1m/eSASRec, datasets: ml-1m}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_ssm.arguments import plain, read_yaml
from recbole_ssm.errors import UserError
from recbole_ssm.kinds import AT_LEAST_1, NAME, Choice, Fields, KindError, Many
from recbole_ssm.quick_start import configure
from recbole_ssm.study.entry import Entry
from recbole_ssm.study.outcome import Run

DATASET = "ml-100k"
"""The data set of a row for which nobody names one; it comes along."""
_ARM = Fields(
    {
        "datasets": Many(NAME, or_one=True, least=1),
        "ties": Many(Choice("file", "random"), or_one=True, least=1),
        "seeds": AT_LEAST_1,
        "model": NAME,
        "preset": NAME,
    },
    "{'model': '2Mamba4Rec', 'seeds': 3}",
    open=True,
)


def read_arms(path: Path, common: Mapping[str, Any], datasets: Sequence[str] | None, seeds: int) -> list[Entry]:
    """The rows that a file names, data set by data set, in the order of the file.

    Args:
        path: the file.
        common: config keys of all rows; a row's own win.
        datasets: where a row names none; None takes that of the row's preset, and else ml-100k.
        seeds: likewise.

    Raises:
        UserError: the file cannot be read, or a row is no mapping, or names no model.
    """
    entries = [
        entry
        for label, arm in read_yaml(path).items()
        for entry in _rows(path, str(label), arm, common, datasets, seeds)
    ]
    if not entries:
        raise UserError(f"--arms: {path} names no row; write one such as 2Mamba4Rec: {{model: 2Mamba4Rec, seeds: 3}}")
    order = list(dict.fromkeys(entry.run.dataset for entry in entries))
    return sorted(entries, key=lambda entry: order.index(entry.run.dataset))


def _rows(
    path: Path, label: str, arm: Any, common: Mapping[str, Any], datasets: Sequence[str] | None, seeds: int
) -> Iterator[Entry]:
    try:
        keys: dict[str, Any] = _ARM.take(plain(label, arm))
    except KindError as error:
        raise UserError(f"--arms: {path}: {label}: {error}") from None
    for key, instead in (("dataset", "datasets"), ("seed", "seeds, and --seed for the first")):
        if key in keys:
            raise UserError(f"--arms: {path}: {label}: {key}: here it is {instead}")
    named = {key: keys.pop(key) for key in ("datasets", "ties", "seeds", "model") if key in keys}
    if "model" not in named and "preset" not in keys:
        raise UserError(f"--arms: {path}: {label}: names no model; add model: 2Mamba4Rec, or a preset")
    default = {"model": "", "dataset": DATASET}
    if "preset" in keys:
        try:
            preset = configure(config_dict={"preset": keys["preset"]})
        except UserError as error:
            raise UserError(f"--arms: {path}: {label}: {error}") from error
        default = {key: preset[key] for key in default}
    model = named.get("model", default["model"])
    ties = named.get("ties", [None])
    ties = ties if isinstance(ties, list) else [ties]
    where = named.get("datasets") or datasets or default["dataset"]
    for dataset, one in itertools.product([where] if isinstance(where, str) else where, ties):
        own = {} if one is None else {"ties": one}
        run = Run(model, dataset, {**common, **keys, **own})
        yield Entry(run, f"{label}, ties {one}" if len(ties) > 1 else label, seeds=named.get("seeds", seeds))
