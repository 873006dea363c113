"""What becomes a row of a study's table, and which rows may be compared: those that were tested on the same targets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recbole_ssm.study.outcome import Outcome, Run
from recbole_ssm.study.runs import NOT_CACHED
from recbole_ssm.study.speed import Speed

TARGETS = (
    *("ties", "split", "eval_rows", "drop_cold_targets", "train_last", "train_newest", "train_rows", "ties_seed"),
    *("legacy_time_order", "group_by", "benchmark_filename", "on_bad_lines", "rm_dup_inter", "val_interval"),
    *("user_inter_num_interval", "item_inter_num_interval", "filter_inter_by_user_or_item"),
    *("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "MAX_ITEM_LIST_LENGTH", "items"),
)
"""What decides which targets of a data set are tested, on which histories and among how many items. All but the last
are keys. A table says the first three.
"""


@dataclass
class Entry:
    """What becomes one row of a table: one configuration, its runs over seeds."""

    run: Run
    """Without a seed."""
    label: str
    """What the row is called: the model, and what else tells it from its neighbours."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration; empty where it is refused."""
    speed: Speed | None = None
    seeds: int = 1
    """How many runs there will be."""
    outcomes: list[Outcome] = field(default_factory=list)
    """One a seed, failed ones too."""
    chosen: Collection[str] = ()
    """The keys of the settings to which an option, a preset or the data set gives another value than the default."""

    @property
    def done(self) -> list[Outcome]:
        """The runs that succeeded."""
        return [outcome for outcome in self.outcomes if outcome.error is None]


def of_same_targets(one: Entry, other: Entry) -> bool:
    """Whether two entries of a data set were tested on the same targets, as far as :data:`TARGETS` decide these."""
    return targets_of(one) == targets_of(other)


def targets_of(entry: Entry) -> dict[str, Any]:
    """The entry's :data:`TARGETS`; those that have no effect are None."""
    settings = {**entry.run.options, **entry.settings}
    settings |= {key: value for key, value in (settings.get("eval_args") or {}).items() if key != "mode"}
    found = {key: settings.get(key) for key in TARGETS}
    if found["ties"] != "random":
        found["ties_seed"] = None
    cuts = ("train_last", "train_newest", "train_rows")
    if not (found["drop_cold_targets"] and any(found[key] for key in cuts)):
        # What a model trains on, and of what histories, decides only which targets are cold.
        found |= dict.fromkeys((*cuts, "MAX_ITEM_LIST_LENGTH"))
    # Files of items may name some without events.
    found["items"] = " or ".join(f"{items:,}" for items in sorted({outcome.items for outcome in entry.done})) or None
    return found


def differing(entries: Sequence[Entry]) -> set[str]:
    """The :data:`TARGETS` in which entries of a data set differ."""
    found: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        for key, value in targets_of(entry).items():
            # What was not run was ranked among no items.
            if key != "items" or value:
                found.setdefault((entry.run.dataset, key), set()).add(str(value))
    return {key for (_, key), values in found.items() if len(values) > 1}


def chosen_keys(entry: Entry) -> list[str]:
    """The keys that decide the results of an entry and that somebody chose, without its model, data set and seed."""
    options = {key: None for outcome in entry.outcomes for key in outcome.run.options}
    left_out = {*NOT_CACHED, "seed", "model", "dataset"}
    return [key for key in {**options, **dict.fromkeys(sorted(entry.chosen))} if key not in left_out]
