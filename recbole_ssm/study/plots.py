"""The figures of a study's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def quality_against_latency(drawn: Any, table: Sequence[Mapping[str, Any]]) -> None:
    """Draw NDCG@10 against milliseconds a user, one panel for each data set."""
    models = list(dict.fromkeys(row["model"] for row in table))
    for axes, dataset, here in panels(drawn, table):
        for row in here:
            if row["ndcg"] is not None and row["latency_p50_s"]:
                at, color = 1e3 * row["latency_p50_s"], f"C{models.index(row['model']) % 10}"
                axes.errorbar(at, row["ndcg"], row["ndcg_sd"], fmt="o", color=color, capsize=3, label=row["model"])
        axes.set(xlabel="milliseconds a user", ylabel="NDCG@10", title=dataset)
        axes.margins(0.2)
        latencies = [row["latency_p50_s"] for row in here if row["latency_p50_s"]]
        if latencies and max(latencies) > 20 * min(latencies):
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


def panels(
    drawn: Any, table: Sequence[Mapping[str, Any]], lines: int = 1
) -> Iterator[tuple[Any, str, list[Mapping[str, Any]]]]:
    """For each data set: its axes (a list of them where there are several lines), its name, its rows."""
    datasets = list(dict.fromkeys(row["dataset"] for row in table))
    grid = drawn.subplots(lines, len(datasets), squeeze=False)
    for column, dataset in zip(grid.T, datasets):
        yield column[0] if lines == 1 else list(column), dataset, [r for r in table if r["dataset"] == dataset]
