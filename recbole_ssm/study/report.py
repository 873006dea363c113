"""The tables and plots of a study: outcomes in, Markdown, CSV and LaTeX out."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from recbole_ssm.errors import UserError
from recbole_ssm.evaluation.significance import METRICS, Pair, corrected, over_users, paired
from recbole_ssm.figure import figure
from recbole_ssm.files import write_csv, write_json, write_text
from recbole_ssm.keys import KEYS
from recbole_ssm.study.cells import average, grid, mean, spread
from recbole_ssm.study.entry import TARGETS, Entry, chosen_keys, differing, targets_of
from recbole_ssm.study.outcome import Outcome
from recbole_ssm.study.plots import quality_against_latency
from recbole_ssm.study.published import published

Row = dict[str, Any]
Compared = Callable[["Entry", "Entry"], bool]
"""Whether two entries are tested against each other."""


def rows(entries: Sequence[Entry], tests: Mapping[str, Sequence[Pair]]) -> list[Row]:
    """The table's figures, a row an entry; None where there is none.

    ``split``, ``ties`` and ``eval_rows`` say how the runs were tested (where some run says it; those of 0.1.0 do not),
    and so do others of :data:`TARGETS` in which the rows of a data set differ.
    ``hit``, ``ndcg`` and ``mrr`` at 10 are means over seeds, ``..._masked`` the same without the items of the history
    (where some run has them; those of 0.1.0 have not), ``..._sd`` their sample standard deviations (None for one seed),
    ``p_best`` the Holm-corrected p of NDCG@10 against the best of its data set and targets (None for the best, and
    where the mean over users, which is tested, is better than the best's),
    ``seconds`` and ``peak_memory_bytes`` means over seeds, ``latency_p50_s`` a call for one user.
    """
    found = []
    masked = any(outcome.test_masked for entry in entries for outcome in entry.done)
    stated = any(outcome.protocol for entry in entries for outcome in entry.done)
    told = {*(TARGETS[:3] if stated else ()), *differing(entries)}
    for entry in entries:
        done, speed = entry.done, entry.speed or {}
        row: Row = {"dataset": entry.run.dataset, "model": entry.label, "seeds": len(done), "of_seeds": entry.seeds}
        row |= {key: value for key, value in targets_of(entry).items() if key in told}
        for name in METRICS:
            values = [outcome.mean(name) for outcome in done]
            row |= spread(name.partition("@")[0].lower(), values)
        for name in METRICS if masked else ():
            values = [outcome.mean(name, "masked") for outcome in done if outcome.test_masked]
            row |= spread(f"{name.partition('@')[0].lower()}_masked", values)
        row["p_best"] = None
        row["latency_p50_s"], row["users_per_second"] = speed.get("p50_s"), speed.get("users_per_second")
        row["parameters"] = done[0].parameters if done else None
        row["seconds"], row["epochs"] = average(o.seconds for o in done), average(o.epochs for o in done)
        row["peak_memory_bytes"] = average(outcome.peak_memory for outcome in done)
        row["seconds_per_epoch"] = row["seconds"] / row["epochs"] if row["epochs"] else None
        row["train_mode"] = entry.settings.get("train_mode")
        row["max_length"] = entry.settings.get("MAX_ITEM_LIST_LENGTH")
        row["error"] = next((outcome.error for outcome in entry.outcomes if outcome.error), None)
        found.append(row)
    for dataset, pairs in tests.items():
        here = [row for row in found if row["dataset"] == dataset and row["ndcg"] is not None]
        for targets in set(map(_targets, here)):
            alike = {row["model"]: row for row in here if _targets(row) == targets}
            best = max(alike, key=lambda model: alike[model]["ndcg"])
            for pair in pairs:
                other = pair.second if pair.first == best else pair.first
                # Where users have several rows, the mean over users may say that the other is better.
                agrees = pair.difference >= 0 if pair.first == best else pair.difference <= 0
                if pair.metric == "NDCG@10" and best in (pair.first, pair.second) and other in alike and agrees:
                    alike[other]["p_best"] = pair.holm_p
    return found


def _targets(row: Row) -> tuple[str, ...]:
    """What decides which targets a row was tested on: rows are compared where they agree in this."""
    return tuple(str(row.get(key)) for key in TARGETS)


def tests(entries: Sequence[Entry], compared: Compared = lambda one, other: True) -> dict[str, list[Pair]]:
    """Data set -> the pairs of its entries that are to be compared, by every metric, over the users.

    ``NDCG@10 masked`` is of lists without the items of the history, where the runs have such.
    """
    found: dict[str, list[Pair]] = {entry.run.dataset: [] for entry in entries}
    for dataset, pairs in found.items():
        done = [entry for entry in entries if entry.run.dataset == dataset and entry.done]
        masked = [entry for entry in done if all(outcome.test_masked for outcome in entry.done)]
        for (order, tested), name in itertools.product(((None, done), ("masked", masked)), METRICS):
            values = {id(entry): over_users(name, [outcome.ranks(order) for outcome in entry.done]) for entry in tested}
            pairs += corrected(
                paired(
                    f"{name} {order}" if order else name, (one.label, values[id(one)]), (other.label, values[id(other)])
                )
                for one, other in itertools.combinations(tested, 2)
                if compared(one, other)
            )
    return found


def _seeds(row: Row) -> str:
    missing = row["seeds"] < row["of_seeds"]
    return f"{row['seeds']} of {row['of_seeds']}" if missing else f"{row['seeds']}"


def _not_run(row: Row) -> bool:
    return not row["seeds"] and not row["error"]


def _number(key: str, scale: float = 1.0, digits: int = 0) -> Callable[[Row], str]:
    return lambda row: "" if row[key] is None else f"{row[key] * scale:,.{digits}f}"


def _p(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def columns(table: Sequence[Row], latex: bool = False) -> dict[str, Callable[[Row], str]]:
    """The titles of the printed table in their order, and the text of each by a row."""
    splits = {str(row.get("split")) for row in table}
    masked = {"Hit@10 masked": mean("hit_masked", latex), "NDCG@10 masked": mean("ndcg_masked", latex)}
    return {
        "data set": lambda row: row["dataset"],
        "model": lambda row: row["model"],
        "seeds": _seeds,
        **({"ties": lambda row: row["ties"] or ""} if any("ties" in row for row in table) else {}),
        **({"split": lambda row: _split(row["split"])} if len(splits) > 1 else {}),
        "Hit@10": lambda row: "not run" if _not_run(row) else mean("hit", latex)(row),
        "NDCG@10": mean("ndcg", latex),
        "MRR@10": mean("mrr", latex),
        **(masked if any("hit_masked" in row for row in table) else {}),
        "p": lambda row: _p(row["p_best"]),
        "ms a user": _number("latency_p50_s", 1e3, 2),
        "users/s": _number("users_per_second"),
        "parameters": _number("parameters"),
        "trained on": lambda row: row["train_mode"] or "",
        "epochs": _number("epochs", 1, 1),
        "seconds": _number("seconds"),
        "MiB": _number("peak_memory_bytes", 2**-20),
    }


def markdown(table: Sequence[Row]) -> str:
    """The table in Markdown; the best mean of each data set and targets is bold, and below stands why runs failed."""
    best: dict[tuple[str, ...], Any] = {}
    for row, key in itertools.product(table, ("hit", "ndcg", "mrr", "hit_masked", "ndcg_masked")):
        group = row["dataset"], *_targets(row), key
        best[group] = max(best.get(group, 0), row.get(key) or 0)
    rows = []
    for row in table:
        cells = []
        for title, text_of in columns(table).items():
            text, key = text_of(row), title.lower().replace("@10", "").replace(" ", "_")
            if text and key in row and row[key] == best.get((row["dataset"], *_targets(row), key)):
                text = f"**{text}**"
            cells.append(text)
        rows.append(cells)
    return grid(list(columns(table)), rows) + failures("Failed:", table, "dataset", "model")


def failures(title: str, table: Sequence[Mapping[str, Any]], *names: str) -> str:
    """Why runs failed, as a list in Markdown under a title; nothing where none did."""
    failed = [f"- {', '.join(row[name] for name in names)}: {row['error']}\n" for row in table if row["error"]]
    return "".join([f"\n{title}\n\n", *failed]) if failed else ""


def latex(table: Sequence[Row]) -> str:
    """The table as a LaTeX tabular that needs no packages."""
    shown = columns(table, latex=True)
    lines = [rf"\begin{{tabular}}{{ll{'r' * (len(shown) - 2)}}}", r"\hline"]
    lines += [" & ".join(map(_escape, shown)) + r" \\", r"\hline"]
    for row in table:
        cells = [text(row) for text in shown.values()]
        cells = [cell if r"\pm" in cell else _escape(cell) for cell in cells]
        lines.append(" & ".join(cells) + r" \\" + (f" % {row['error']}" if row["error"] else ""))
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "$<$")


def pairs_markdown(found: Mapping[str, Sequence[Pair]]) -> str:
    """The paired tests of NDCG@10, unmasked and masked, as a table."""
    titles = [
        "data set",
        "metric",
        "models",
        "users",
        "difference",
        "95% interval",
        "p (t)",
        "p (Holm)",
        "p (Wilcoxon)",
    ]
    rows = []
    for dataset, pairs in found.items():
        for pair in pairs:
            if pair.metric.startswith("NDCG@10"):
                # There is no p where they share too few users.
                tested = not math.isnan(pair.t_p)
                interval = f"{pair.low:+.4f} to {pair.high:+.4f}" if tested else ""
                difference = f"{pair.difference:+.4f}" if tested else ""
                ps = [_p(pair.t_p), _p(pair.holm_p), _p(pair.wilcoxon_p)]
                who = f"{pair.first} - {pair.second}"
                rows.append([dataset, pair.metric, who, f"{pair.users:,}", difference, interval, *ps])
    return grid(titles, rows)


def published_markdown(found: Sequence[Mapping[str, str]]) -> str:
    """Published figures as a table."""
    if not found:
        return "None that we know of.\n"
    keys = ["dataset", "model", "hit", "ndcg", "mrr", "latency_s", "source", "history", "protocol"]
    titles = ["data set", "model", "Hit@10", "NDCG@10", "MRR@10", "latency, s", "source", "history", "what differs"]
    return grid(titles, ([row[k].removeprefix("0") if k in keys[2:5] else row[k] for k in keys] for row in found))


LEAVE_ONE_OUT = "leave one out by time, so trained on later events of other users (how many: log.txt of a run)"
MEANING = """\
- Ranking is against all items; items of the history are not masked, as in RecBole, but in the columns named masked:
  there all that the user did before is left out, and the target stays. Items of equal score share the mean of their
  ranks. The weights of the best validation are tested.
- ties: the order of a user's events of one time, as in the file or at random. They are two protocols, as splits and
  filters are: pairs are tested and the best is bold within each. What differs between ties stands on the file's order.
- p: two-sided paired t-test over users, each user's metric averaged over the seeds, with Holm's correction over all
  pairs of a data set and metric; in the table against the best NDCG@10. The tests speak of other users under these
  seeds, the deviation of other seeds. Wilcoxon's signed-rank test leaves out users without a difference. Where users
  have several rows, as in splits by shares or by time, the table's means are over rows, and a test averages the rows of
  each user first; where the two disagree on which is better, the table has no p.
- ms a user: median of encoding, scoring all items and choosing ten, one user a call; users/s: 256 a call (language
  models 8); all models in turns in one process (on one thread, its processor time).
- Seconds: training without validations, a run; with other work on the machine read the ratios. MiB: the peak of the
  process, data set included, or of the GPU.
"""


def protocol(entries: Sequence[Entry], seeds: Sequence[int], tuning: str) -> str:
    """How the table's figures came about, in Markdown."""
    lines = []
    for dataset in dict.fromkeys(entry.run.dataset for entry in entries):
        here = [entry for entry in entries if entry.run.dataset == dataset and entry.settings]
        if here:
            lines.append(f"- {dataset}{_counts(here)}: {_common(here)}")
            lines += [f"  - {entry.label}: {_own(entry, here)}" for entry in here]
    lines += [
        f"- Seeds {', '.join(map(str, seeds))}; ± is the sample standard deviation over seeds.",
        f"- Tuning: {tuning}.",
        *machines(outcome for entry in entries for outcome in entry.done),
    ]
    return "\n".join(lines) + f"\n{MEANING}"


def _split(split: Any) -> str:
    return "leave one out" if split == {"LS": "valid_and_test"} else "" if split is None else str(split)


def _counts(entries: Sequence[Entry]) -> str:
    done = [outcome for entry in entries for outcome in entry.done]
    if not done or len({str(targets_of(entry)["split"]) for entry in entries}) > 1:
        return ""
    items = dict.fromkeys(targets_of(entry)["items"] for entry in entries if entry.done)
    return f" ({len(np.unique(done[0].ranks()[0])):,} users tested, {' or '.join(items)} items)"


def _common(entries: Sequence[Entry]) -> str:
    """The split, or several, and what all entries share."""
    splits = {_split(targets_of(entry)["split"]): None for entry in entries}
    kind = " or ".join(LEAVE_ONE_OUT if split == "leave one out" else f"split {split}" for split in splits)
    alike = [key for key in _shown(entries) if not _differs(key, entries)]
    return "; ".join([kind, *(f"{key} {_value(entries[0], key)}" for key in alike)])


def _own(entry: Entry, entries: Sequence[Entry]) -> str:
    """The settings of one entry in which the entries differ."""
    own = [key for key in _shown(entries) if _differs(key, entries) and key in entry.settings]
    told = [f"{key} {_value(entry, key)}" for key in own]
    if entry.done and "items" in differing(entries):
        told.append(f"{targets_of(entry)['items']} items")
    return ", ".join(told) or "as above"


def _differs(key: str, entries: Sequence[Entry]) -> bool:
    there = [key in entry.settings for entry in entries]
    return any(there) != all(there) or any(_value(entry, key) != _value(entries[0], key) for entry in entries)


def _value(entry: Entry, key: str) -> Any:
    value = entry.settings.get(key)
    if key == "residual" and value == "auto":
        # Mamba4Rec's published rule, of blocks whose norms come last.
        return entry.settings["num_layers"] > 1 or entry.settings.get("norm_position") == "pre"
    return value


def _shown(entries: Sequence[Entry]) -> list[str]:
    """The keys that every table names, as far as they are set, targets that differ, and any other that is given."""
    named = [k for k, row in KEYS.items() if row.named and any(k in entry.settings for entry in entries)]
    chosen = [key for entry in entries for key in chosen_keys(entry)]
    return list(dict.fromkeys([*named, *(key for key in TARGETS if _differs(key, entries)), *chosen]))


def of_runs(entry: Entry) -> Iterator[Row]:
    """An entry's runs in JSON's terms."""
    kept = (
        *("valid", "valid_masked", "test", "test_masked", "test_shuffled_times", "test_shuffled_times_masked"),
        *("test_by_group", "protocol", "epochs", "seconds", "parameters", "made"),
    )
    for outcome in entry.done:
        run = {
            "row": entry.label,
            "model": entry.run.model,
            "dataset": entry.run.dataset,
            "options": outcome.run.options,
            "settings": {key: entry.settings.get(key) for key in chosen_keys(entry)},
        }
        yield run | {key: getattr(outcome, key) for key in kept}


def machines(outcomes: Iterable[Outcome]) -> list[str]:
    """The machines and versions that computed the runs, and when; a line of Markdown each."""
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        made = dict(outcome.made)
        date = made.pop("date")
        what = f"recbole_ssm {made['recbole_ssm']}, PyTorch {made['torch']}, Python {made['python']}, {made['system']}"
        where = made["gpu"] or f"{made['cpu']}, {made['threads']} thread{'s' if made['threads'] > 1 else ''}"
        found.setdefault(f"{where}; {what}", []).append(date)
    return [f"- {key}; {min(d)}{'' if min(d) == max(d) else f' to {max(d)}'}." for key, d in found.items()]


def write(
    folder: Path,
    name: str,
    entries: Sequence[Entry],
    seeds: Sequence[int],
    tuning: str,
    compared: Compared = lambda one, other: True,
    draw: Callable[[Any, Sequence[Row]], None] | None = None,
    height: float = 4,
    more: Callable[[Sequence[Entry]], str] = lambda entries: "",
) -> str:
    """Write ``name.md``, ``.csv``, ``-tests.csv``, ``.tex``, ``.json`` and, with Matplotlib, ``.png``.

    ``name.json`` holds each run by itself: its metrics of validation and test, its protocol, and what it cost.

    Args:
        folder: is made if it is not there.
        name: of the files.
        entries: the table's rows.
        seeds: of the study, for its protocol.
        tuning: the budget of every model, in words.
        compared: which pairs are tested.
        draw: draws the table's rows into a Matplotlib figure; None is quality against latency.
        height: of the figure, in inches.
        more: further tables of the entries, which stand below the paired tests.

    Returns:
        The Markdown: the results, the protocol, the tests, and what others published.
    """
    found = tests(entries, compared)
    table = rows(entries, found)
    others = published({entry.run.dataset for entry in entries}, {entry.run.model for entry in entries})
    text = "\n".join(
        [
            "## Results\n",
            markdown(table),
            "## Protocol\n",
            protocol(entries, seeds, tuning),
            "## Paired tests\n",
            f"Those of the other metrics are in {name}-tests.csv.\n",
            pairs_markdown(found),
            more(entries),
            "## Published by others\n",
            published_markdown(others),
        ]
    )
    tested = [{"dataset": dataset, **vars(pair)} for dataset, pairs in found.items() for pair in pairs]
    write_text(folder / f"{name}.md", text)
    write_text(folder / f"{name}.tex", latex(table))
    write_csv(folder / f"{name}.csv", table)
    write_csv(folder / f"{name}-tests.csv", tested)
    write_json(folder / f"{name}.json", [one for entry in entries for one in of_runs(entry)])
    datasets = len({row["dataset"] for row in table})
    # Matplotlib is optional.
    with contextlib.suppress(UserError), figure(folder / f"{name}.png", (5 * datasets, height)) as drawn:
        (draw or quality_against_latency)(drawn, table)
    return text


def closing(text: str, folder: Path, files: str, plot: str) -> str:
    """A study's text, and below it what was written; a plot is only where Matplotlib is."""
    plots = f", {plot}" if find_spec("matplotlib") else "; a plot needs Matplotlib: pip install 'recbole-ssm[plot]'"
    return f"{text}\nwritten to {folder}/: {files}{plots}"
