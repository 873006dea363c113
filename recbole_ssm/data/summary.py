"""``recbole-ssm inspect``: what a data set holds, whether its order can be trusted, and what a split of it leaks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_ssm.arguments import TOY, literal, path_that
from recbole_ssm.data import temporal, ties
from recbole_ssm.data.atomic import Tokens, read_columns, read_header, require_column
from recbole_ssm.data.events import Events, k_core, oddities, rows_back_in_time, without_repeats
from recbole_ssm.data.lines import BadLines
from recbole_ssm.errors import ArgumentParser, UserError, did_you_mean
from recbole_ssm.figure import check_drawable, figure
from recbole_ssm.files import check_writable, write_json

# Characters of the longest bar.
BAR = 50
# The share of histories in the order of their item ids beyond which the order is hardly that of time.
SUSPICIOUS = 0.5
# By how much the share may exceed twice that of chance before a warning is given.
NOTED = 0.1
# The share of tied events, or of tied targets, above which a warning is given.
TIED = 0.1
# A share that lies more standard deviations than these above that of chance does not come about by chance.
DEVIATIONS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("dataset", help="name of a data set, its folder, or a file NAME.inter")
    parser.add_argument(
        "--data_path", type=Path, default=Path("dataset"), help="folder of data sets (default: dataset/)"
    )
    parser.add_argument("--k_core", type=int, default=0, metavar="K", help="look at what K-core filtering leaves")
    parser.add_argument(
        "--split", default="LS", help=f"what may leak: LS (default), or {temporal.EXAMPLE.split(': ', 1)[1]}"
    )
    parser.add_argument("--on_bad_lines", choices=("error", "skip"), default="error", help="stop at one, or count them")
    for key, default in (("user", "user_id"), ("item", "item_id"), ("time", "timestamp")):
        parser.add_argument(f"--{key}", default=default, metavar="COLUMN", help=f"(default: {default})")
    parser.add_argument("--separator", default="\t", help="between columns (default: tab)")
    parser.add_argument("--encoding", default="utf-8", help="of the file (default: utf-8)")
    file, drawn = path_that(check_writable), path_that(check_drawable)
    parser.add_argument("--json", type=file, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--plot", type=drawn, metavar="FILE", help="draw the lengths of histories there (.png, .svg, .pdf)"
    )


def main(arguments: Sequence[str]) -> None:
    """Run the command and print what it found."""
    parser = ArgumentParser("recbole-ssm inspect", __doc__)
    add_arguments(parser)
    options = parser.parse_args(list(arguments))
    parts = _parts(options.split)
    path = find(options.dataset, options.data_path)
    names = (options.user, options.item, options.time)
    with BadLines(path, options.on_bad_lines) as bad:
        events = read(path, names, bad, options.separator.replace("\\t", "\t"), options.encoding)
    found = inspect(events, k=options.k_core, parts=parts)
    notes = [text for _, text in oddities(events, names, bad)]
    found = {"dataset": path.stem, "file": str(path), **found, "skipped_lines": len(bad)}
    found["warnings"] = ([str(bad)] if len(bad) else []) + notes + found["warnings"]
    print(text(found))
    if options.plot:
        plot(options.plot, found)
    if options.json:
        write_json(options.json, found)


def find(dataset: str, data_path: Path) -> Path:
    """The .inter file of a data set.

    Raises:
        UserError: there is none.
    """
    if dataset.endswith(".inter"):
        return Path(dataset)
    if (path := Path(dataset, f"{Path(dataset).name}.inter")).is_file():
        return path
    path = data_path / dataset / f"{dataset}.inter"
    if not path.is_file() and dataset == "ml-100k":
        from importlib.util import find_spec

        spec = find_spec("recbole")
        if spec and spec.submodule_search_locations:
            path = Path(spec.submodule_search_locations[0]) / "dataset_example" / dataset / f"{dataset}.inter"
    if dataset == TOY.name and not path.parent.is_dir():
        path = TOY / f"{dataset}.inter"
    if not path.is_file():
        near = did_you_mean(dataset, (found.parent.name for found in data_path.glob("*/*.inter")))
        raise UserError(
            f"no file {path}{near}; set --data_path to the folder above {dataset}/, or name the file; recbole-ssm "
            "convert makes it of a table"
        )
    return path


def read(path: Path, names: tuple[str, str, str], bad: BadLines, separator: str, encoding: str) -> Events:
    """The interactions of an atomic file.

    Raises:
        UserError: a fault, or one of the three columns is missing.
    """
    header = read_header(path, separator, encoding)
    for key, name, kind in zip(("--user", "--item", "--time"), names, ("token", "token", "float")):
        require_column(path, header, key, name, kind)
    columns = dict(zip(names, ("token", "token", "time")))
    found = read_columns(path, columns, required=names, separator=separator, encoding=encoding, bad=bad)
    return Events(*(found[name] for name in names))


def inspect(events: Events, k: int = 0, parts: Sequence[float] | None = None) -> dict[str, Any]:
    """The figures of a data set.

    Args:
        events: in the order of their file.
        k: look at the k-core; 0 at all events.
        parts: of a split by time, as of :func:`recbole_ssm.data.temporal.check_parts`; None looks at leave-one-out.

    Returns:
        ``users``, ``items``, ``interactions``, ``sparsity``, ``length`` (of histories), ``repeated_pairs`` (events
        beyond the first of their user and item), ``repeats`` (shares of the test targets that their histories hold),
        ``ties`` (consecutive events of one user at one time, and the share of the test targets that have the time of
        the event before them), ``time``, ``order``, ``split`` and ``warnings``.

    Raises:
        UserError: the k-core is empty, or the split has a part without events or targets.
    """
    if k > 1:
        events = events.take(k_core(events.users.codes, events.items.codes, k, k))
    if not len(events):
        raise UserError(f"--k_core: the {k}-core is empty; choose a smaller one")
    sorted_events = events.take(events.by_user_and_time())
    users, times = sorted_events.users.codes, sorted_events.times
    starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    lengths = np.diff(np.append(starts, len(users)))
    counts = events.counts()
    same = users[1:] == users[:-1]
    tied = ties.are_tied(users, times)
    part_of_event = None if parts is None else temporal.split_by_time(times, parts)
    # Leave-one-out tests the last event of each user who has three; a split by time all of its part but first events.
    if part_of_event is None:
        targets = (starts + lengths - 1)[lengths >= 3]
    else:
        targets = np.flatnonzero(same)[temporal.parts_of_targets(part_of_event, users, times) == 2] + 1
    repeated = np.setdiff1d(np.arange(len(events)), without_repeats(sorted_events, "first"), assume_unique=True)
    positions = temporal.is_position(users, times)
    found: dict[str, Any] = {
        "k_core": k,
        **counts,
        "sparsity": 1 - counts["interactions"] / counts["users"] / counts["items"],
        "length": _lengths(lengths),
        "repeated_pairs": len(repeated),
        "repeats": _repeats(sorted_events.items.codes, targets, repeated),
        "ties": {
            "events": int(tied.sum()),
            "share": int(tied.sum()) / max(int(same.sum()), 1),
            "targets": float(np.mean(tied[targets])) if len(targets) else 0.0,
        },
        "time": _time(times, positions),
        "order": _order(events, sorted_events, starts, lengths),
    }
    warnings = _doubts(found)
    if part_of_event is not None:
        found["split"] = {temporal.NAME: temporal.describe(part_of_event, users, sorted_events.items.codes, times)}
        if positions:
            warnings.append("a split by time compares nothing across users here")
    else:
        found["split"] = {"LS": None if positions else temporal.leak_of_leave_one_out(users, times)}
        if not positions and (warning := temporal.leave_one_out_warning(users, times)):
            warnings.append(warning)
    return {**found, "warnings": warnings}


def text(found: dict[str, Any]) -> str:
    """The figures for people, with the lengths of histories as bars."""
    length, time, order, repeats = (found[key] for key in ("length", "time", "order", "repeats"))
    when = f"{temporal.shown(time['first'])} to {temporal.shown(time['last'])}"
    if "from" in time:
        when = f"{time['from']} to {time['to']} ({time['unit']} since 1970)"
    elif time["unit"]:
        when += f" ({time['unit']})"
    core = f", {found['k_core']}-core" if found["k_core"] > 1 else ""
    lines = [
        f"{found['dataset']}{core}: {found['users']:,} users, {found['items']:,} items, {found['interactions']:,} "
        f"interactions, sparsity {found['sparsity']:.4%} (pairs of a user and an item without an event)",
        f"history length   min {length['min']:,}, median {length['median']:g}, mean {length['mean']:.2f}, 99 % up to "
        f"{length['p99']:g}, max {length['max']:,}",
    ]
    most = max(bin["users"] for bin in length["histogram"])
    for bin in length["histogram"]:
        span = f"{bin['from']:,}" if bin["from"] == bin["to"] else f"{bin['from']:,}-{bin['to']:,}"
        lines.append(f"  {span:>14} {bin['users']:>12,} {'#' * round(BAR * bin['users'] / most)}".rstrip())
    lines += [
        f"repeated pairs   {found['repeated_pairs']:,} events beyond the first of their user and item",
        f"targets          {repeats['in_history']:.1%} of {repeats['targets']:,} test targets are in the history before"
        f" them; {repeats['newest']:.1%} are the newest item of it",
        f"ties             {found['ties']['events']:,} events at the time of the one before them "
        f"({found['ties']['share']:.1%} of consecutive pairs); {found['ties']['targets']:.1%} of the test targets",
        f"time             {when}",
        f"order            {order['back_in_time']:,} lines go back in time for their user; "
        f"{order['sorted_by_item']:.1%} of the histories of 3 and more are in the order of their item ids "
        f"({order['sorted_by_chance']:.1%} would be by chance; most of them, if the file were sorted by item)",
    ]
    if by_time := found["split"].get(temporal.NAME):
        lines.append(f"split by time    {temporal.sentence(by_time)}")
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    lines.append(f"verdict          {_verdict(found)}")
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    """Whether a model can be trained on it, and what to look at first."""
    if found["length"]["max"] < 3:
        return "not fit to train: no user has 3 events, one each to train, validate and test"
    # What leave-one-out leaks concerns how the test is read, not the data.
    doubts = [warning for warning in found["warnings"] if not warning.startswith("leave-one-out")]
    return "it can be trained on; look at the warnings above first" if doubts else "fit to train"


def plot(path: Path, found: dict[str, Any]) -> None:
    """Draw how many users have histories of which length, both axes logarithmic.

    Raises:
        UserError: Matplotlib is not installed, or knows no such file.
    """
    bins = found["length"]["histogram"]
    with figure(path) as drawn:
        axes = drawn.subplots()
        edges = [bin["from"] - 0.5 for bin in bins] + [bins[-1]["to"] + 0.5]
        axes.stairs([bin["users"] for bin in bins], edges, fill=True)
        axes.set(xscale="log", yscale="log", xlabel="interactions of a user", ylabel="users")
        axes.set_title(f"{found['dataset']}: {found['users']:,} users, {found['interactions']:,} interactions")


def _parts(split: str) -> list[float] | list[int] | None:
    if split == "LS":
        return None
    named = literal(split)
    if not isinstance(named, dict) or list(named) != [temporal.NAME]:
        raise UserError(f"--split: must be LS or {temporal.EXAMPLE.split(': ', 1)[1]}, got {split}")
    return temporal.check_parts(named[temporal.NAME])


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Figures of the lengths, and how many users lie between powers of two."""
    edges = [1]
    while edges[-1] <= lengths.max():
        edges.append(edges[-1] * 2)
    counts, _ = np.histogram(lengths, edges)
    return {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "p99": float(np.quantile(lengths, 0.99, method="inverted_cdf")),
        "max": int(lengths.max()),
        "histogram": [
            {"from": low, "to": high - 1, "users": int(count)}
            for low, high, count in zip(edges, edges[1:], counts)
            if high > lengths.min()
        ],
    }


def _time(times: np.ndarray, positions: bool) -> dict[str, Any]:
    first, last = times.min().item(), times.max().item()
    unit, per_second = temporal.unit_of(times)
    if not unit:
        return {"first": first, "last": last, "unit": "positions" if positions else ""}
    start, end = (datetime.fromtimestamp(time / per_second, timezone.utc) for time in (first, last))
    shown = {key: f"{date:%Y-%m-%d %H:%M:%S}" for key, date in (("from", start), ("to", end))}
    return {"first": first, "last": last, "unit": unit, **shown}


def _repeats(items: np.ndarray, targets: np.ndarray, repeated: np.ndarray) -> dict[str, Any]:
    """How many targets there are, the share whose item the history holds, and the share whose item is its newest.

    Args:
        items: [events] codes, by user and time.
        targets: rows that are tested; none is the first of its user.
        repeated: rows whose user has an earlier one of the same item.
    """
    if not len(targets):
        return {"targets": 0, "in_history": 0.0, "newest": 0.0}
    return {
        "targets": len(targets),
        "in_history": float(np.mean(np.isin(targets, repeated, assume_unique=True))),
        "newest": float(np.mean(items[targets] == items[targets - 1])),
    }


def _order(events: Events, by_time: Events, starts: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Whether the file is chronological, and whether time or item ids gave the order."""
    ranks = _ranks(by_time.items)[by_time.items.codes]
    falls = np.append(0, np.cumsum(ranks[1:] < ranks[:-1]))
    # Falls between a user's first and last event.
    within = falls[starts + lengths - 1] - falls[starts]
    # By chance a history of n events is in order with probability prod(m!) / n!, with m events of each of its items.
    log_factorials = np.append(0.0, np.cumsum(np.log(np.arange(1.0, lengths.max() + 1))))
    users, items = by_time.users.codes, len(by_time.items.names)
    pairs, counts = np.unique(users * np.int64(items) + ranks, return_counts=True)
    alike = np.bincount(pairs // items, weights=log_factorials[counts])[users[starts]]
    # Histories of one item alone are left out, because every order of them is the same.
    long = (lengths >= 3) & (alike < log_factorials[lengths])
    chance = np.exp(alike - log_factorials[lengths])[long]
    return {
        "back_in_time": len(rows_back_in_time(events)),
        "sorted_by_item": float(np.mean(within[long] == 0)) if long.any() else 0.0,
        "sorted_by_chance": float(np.mean(chance)) if long.any() else 0.0,
        "deviations": _deviations(within[long] == 0, chance),
        "histories": int(long.sum()),
    }


def _deviations(happened: np.ndarray, chance: np.ndarray) -> float:
    """By how many standard deviations more often something happened than by its probabilities."""
    spread = float(np.sqrt(np.sum(chance * (1 - chance))))
    return float(np.sum(happened) - np.sum(chance)) / spread if spread else 0.0


def _ranks(items: Tokens) -> np.ndarray:
    """[items] the place of each item among all, by number if all are numbers, else by letters."""
    names = items.names
    if len(names) and pc.all(pc.match_substring_regex(names, "^[0-9]{1,18}$")).as_py():
        names = names.cast(pa.int64())
    order = pc.sort_indices(names).to_numpy()
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _doubts(found: dict[str, Any]) -> list[str]:
    warnings = []
    order, tied = found["order"], found["ties"]
    if order["histories"] >= 20 and order["deviations"] > DEVIATIONS:
        share = f"{order['sorted_by_item']:.1%} of the histories are in the order of their item ids"
        if order["sorted_by_item"] > SUSPICIOUS:
            warnings.append(
                f"{share}, so this is hardly the order of time; results on it mean nothing; convert the raw data again"
            )
        elif order["sorted_by_item"] > 2 * order["sorted_by_chance"] + NOTED:
            warnings.append(
                f"{share}, and {order['sorted_by_chance']:.1%} would be by chance: either ids were given in the order "
                "of time, or a part of the data is sorted by item"
            )
    if max(tied["share"], tied["targets"]) > TIED:
        warnings.append(
            f"{tied['share']:.1%} of consecutive events of a user have one time, and {tied['targets']:.1%} of the test "
            "targets that of the event before, so a result may stand on the order of the file; state it beside every "
            "figure, and its twin by ties: random"
        )
    if found["time"]["unit"] == "positions":
        warnings.append("the times only count each user's events; they are no clock times")
    return warnings
