"""Events and descriptions of items as atomic files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_ssm.data.atomic import Tokens
from recbole_ssm.data.descriptions import KINDS, Descriptions, kind_of
from recbole_ssm.data.events import Events
from recbole_ssm.data.lines import BadLines, progress
from recbole_ssm.data.sources import Raw
from recbole_ssm.data.times import decimals
from recbole_ssm.errors import UserError

# Rows that are written at once, and bytes of their text; Arrow has no more than 2^31 in a column.
ROWS_AT_ONCE, BYTES_AT_ONCE = 1 << 20, 1 << 28


def write_inter(path: Path, events: Events, digits: int, kept: Mapping[str, str]) -> None:
    """Write events, whose times count units of ``10 ** -digits``, as an atomic file; whole numbers have no point.

    A further column to which ``kept`` gives the type "" has the one that its cells show.
    """
    columns = {"user_id:token": events.users, "item_id:token": events.items}
    further = {}
    for name, column in events.others.items():
        words = pa.array([_one_line(word) for word in column.names.to_pylist()], pa.string())
        # The filters may have left some words in no row.
        kind = kept[name] or KINDS[kind_of(words.take(np.unique(column.codes[column.codes >= 0])))] or "token"
        further[f"{name}:{kind}"] = Tokens(column.codes, words)
    ratings = events.ratings
    longest = sum(pc.max(pc.binary_length(column.names)).as_py() or 0 for column in (columns | further).values())
    rows_at_once = min(ROWS_AT_ONCE, 1 + BYTES_AT_ONCE // max(longest, 1))
    with open(path, "wb") as file, progress(f"Write {path.name}", len(events), "rows") as bar:
        header = [*columns, *(["rating:float"] if ratings is not None else []), "timestamp:float", *further]
        file.write("\t".join(header).encode() + b"\n")
        for start in range(0, len(events), rows_at_once):
            rows = slice(start, start + rows_at_once)
            cells = [_words(ids, rows) for ids in columns.values()]
            cells += [_spelt(ratings[rows])] if ratings is not None else []
            cells += [decimals(events.times[rows], digits), *(_words(column, rows) for column in further.values())]
            # Arrow's writer of CSV refuses quotation marks where it may not quote
            lines = pc.binary_join_element_wise(pc.binary_join_element_wise(*cells, "\t"), "", "\n")
            _, ends, characters = lines.buffers()
            file.write(memoryview(characters)[: np.frombuffer(ends, np.int32)[len(lines)]])
            bar.update(len(cells[0]))


def _words(column: Tokens, rows: slice) -> pa.StringArray:
    codes = column.codes[rows]
    return column.names.take(pa.array(codes, mask=codes < 0)).fill_null("")


def write_descriptions(folder: Path, raw: Raw, events: Events, on_bad_lines: str) -> dict[str, int]:
    """Write ``.item`` where a source describes its items, and a file of the lines that were skipped.

    Args:
        folder: of the data set, and called as it.
        raw: the source.
        events: those whose items are described.
        on_bad_lines: ``error``, or ``skip``.

    Returns:
        ``described_items``, ``contradicting_descriptions`` and ``skipped_lines``, as on the card.

    Raises:
        UserError: the first faulty line, or none of the items is described.
    """
    described = contradicting = skipped = 0
    if raw.items is not None:
        # The faults of a table that describes its own items were told when its events were read.
        again = len(raw.files) == 1
        side = folder / f"{folder.name}.item.skipped"
        with BadLines(str(raw.items.file), *(("skip",) if again else (on_bad_lines, side))) as bad:
            described, contradicting = write_items(folder / f"{folder.name}.item", raw.items, events, bad)
        if not described:
            raise UserError(
                f"{raw.items.file}: describes none of the items; is it of another data set? Name the right one by "
                "--meta, or move it away"
            )
        skipped = 0 if again else len(bad)
    return {
        "described_items": described,
        "contradicting_descriptions": contradicting,
        "skipped_lines": skipped,
    }


def write_items(path: Path, items: Descriptions, events: Events, bad: BadLines) -> tuple[int, int]:
    """Write the descriptions of those items that events have; of each column the first that is not empty counts.

    RecBole takes every line of .item into its catalogue, so an item that nobody met would be ranked with the others.

    Returns:
        How many items are described, and how many of them again in other words.
    """
    wanted = set(events.items.names.take(pa.array(np.unique(events.items.codes))).to_pylist())
    lines: dict[str, str] = {}
    contradicting = set()
    for item, cells in items.read(bad):
        if item in wanted:
            line = "\t".join([item, *(_one_line(cells[name]) for name in items.columns)])
            if (first := lines.setdefault(item, line)) != line:
                pairs = list(zip(first.split("\t"), line.split("\t")))
                lines[item] = "\t".join(former or later for former, later in pairs)
                if any(former and later and former != later for former, later in pairs):
                    contradicting.add(item)
    header = "\t".join(["item_id:token", *(f"{name}:{kind}" for name, kind in items.columns.items())])
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in [header, *lines.values()])
    return len(lines), len(contradicting)


def _spelt(values: np.ndarray) -> pa.StringArray:
    """Numbers as text: whole ones without a point, others in the fewest digits that give them back, missing as ""."""
    if np.all(np.isfinite(values)) and np.all(values == np.round(values)) and np.all(np.abs(values) < 2**53):
        return pa.array(values.astype(np.int64)).cast(pa.string())
    text = ["" if math.isnan(value) else repr(value).removesuffix(".0") for value in values.tolist()]
    return pa.array(text, pa.string())


def _one_line(text: str) -> str:
    """Text as a cell of an atomic file, without what its reader refuses: line ends, NUL, half characters and [PAD]."""
    words = text.replace("\0", "").encode("utf-8", "replace").decode().split()
    return " ".join(word for word in words if word != "[PAD]")
