"""What a gain by the time of asking stands on: query times shuffled among users, and targets apart by the time since
the event before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from recbole_ssm.data.gaps import reads_times
from recbole_ssm.evaluation.metrics import PAUSES, metric
from recbole_ssm.study.cells import average, grid, mean, spread
from recbole_ssm.study.entry import Entry

METRIC = "NDCG@10"


def tables(entries: Sequence[Entry]) -> str:
    """Both tables in Markdown, each under its heading; "" where no row reads times."""
    timed = [entry for entry in entries if reads_times(entry.settings.get("time"))]
    shuffled = [entry for entry in timed if any(outcome.test_shuffled_times for outcome in entry.done)]
    parts = []
    if shuffled:
        parts += [
            "## Query times shuffled among users\n",
            "The same test, but each target is asked as long after its newest event as another one was. A gain by the "
            "time of asking must be gone.\n",
            _shuffled(shuffled),
        ]
    if timed:
        parts += ["## By the time since the event before\n", _by_pause(entries)]
    return "\n".join(parts)


def _shuffled(entries: Sequence[Entry]) -> str:
    titles = ["data set", "model", METRIC, "shuffled", f"{METRIC} masked", "masked and shuffled"]
    orders = (None, "shuffled times", "masked", "shuffled times masked")
    rows = []
    for entry in entries:
        tested = [outcome for outcome in entry.done if outcome.test_shuffled_times]
        cells = []
        for order in orders:
            values = [float(metric(METRIC, outcome.ranks(order)[1]).mean()) for outcome in tested]
            cells.append(mean("ndcg")(spread("ndcg", values)))
        rows.append([entry.run.dataset, entry.label, *cells])
    return grid(titles, rows)


def _by_pause(entries: Sequence[Entry]) -> str:
    """Only rows whose runs have such groups; those of former versions have not."""
    rows = []
    for entry, group in itertools.product(entries, PAUSES):
        found = [outcome.test_by_group[group] for outcome in entry.done if group in outcome.test_by_group]
        if found:
            targets = average(values["targets"] for values in found) or 0
            names = (METRIC.lower(), f"masked {METRIC.lower()}")
            figures = [spread("ndcg", [values[name] for values in found if name in values]) for name in names]
            rows.append([entry.run.dataset, entry.label, group, f"{targets:,.0f}", *map(mean("ndcg"), figures)])
    return grid(["data set", "model", "targets", "how many", METRIC, f"{METRIC} masked"], rows)
