"""What others published, with its source and its protocol: ``published.csv``."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path

from recbole_ssm.model.registry import model_names

PUBLISHED = Path(__file__).parent / "published.csv"


def published(datasets: Collection[str], models: Collection[str]) -> list[dict[str, str]]:
    """What others published of these models on these data sets, with ``source`` and ``protocol``, and of models that
    cannot be trained here, so that the best known figures stand beside ours.

    ``history`` is ``masked``, ``unmasked`` or ``unknown``: whether items of the history were left out of the ranking.
    """
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] in datasets]
    here = model_names()
    return [row for row in rows if row["model"] in models or row["model"] not in here]
