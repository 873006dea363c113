"""What a recommendation costs by model, length of the history, batch and catalogue, and how the cost grows with length.

A call takes a batch of full histories and gives the best items of each. Its parts are encode, the model's forward;
score, the products with all items; and top-k. The device is synchronised around each part. Rows with path "one event"
read one more event of each user from the carried state instead of the whole history, as recbole_ssm.serving does. The
weights are random, since times do not depend on them. A length beyond those that models are trained on shows what it
would cost, not how good it would be.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import psutil
import torch
from scipy.stats import linregress
from torch import Tensor, nn

from recbole_ssm import compat
from recbole_ssm.arguments import add_counts, one_of, path_that, positive, sizes, some_of
from recbole_ssm.bench import Row, table
from recbole_ssm.bench.measure import add_device, extra_memory
from recbole_ssm.console import progress_bar
from recbole_ssm.errors import UserError, first_line
from recbole_ssm.figure import check_drawable, figure

compat.install()

from recbole_ssm.bench.untrained import random_histories, untrained_model  # noqa: E402
from recbole_ssm.model import NEURAL_BASELINES, STATE_SPACE, model_names  # noqa: E402
from recbole_ssm.serving import Stepper  # noqa: E402
from recbole_ssm.trainer.timing import Latency  # noqa: E402

MEASURED = (
    "calls", "p50_s", "p95_s", "p99_s", "users_per_s", "encode_s", "score_s", "topk_s", "memory_mib", "note",
)  # fmt: skip
# Before a forecast is believed, a call with this part of the batch or of the length is made.
SMALLER = 16
# Calls that are not counted (where calls are slow, one), and those that are.
WARM_UP = 3
FEWEST, MOST = 3, 200
PATHS = ("one event", "history")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    models = some_of(model_names())
    everything = ",".join([*STATE_SPACE, *NEURAL_BASELINES])
    parser.add_argument("--models", type=models, default=everything, help="separated by commas")
    parser.add_argument("--lengths", type=sizes, default="50,200,1000,4000,16000", help="events of a history")
    parser.add_argument("--batch_sizes", type=sizes, default="1,64,4096", help="histories in a call")
    parser.add_argument("--items", type=sizes, default="12101,1000000", help="items of the catalogue")
    add_counts(parser, k=(10, "best items of each history"))
    parser.add_argument("--seconds", type=positive, default=10.0, help="for each row; one that needs more is skipped")
    add_device(parser)
    parser.add_argument(
        "--clock",
        type=one_of(("wall", "processor")),
        default="wall",
        help="wall, or processor: what a thread of a shared machine would take if it had the machine to itself",
    )
    parser.add_argument("--plot", type=path_that(check_drawable), metavar="FILE", help="draw seconds against length")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each model, length, batch and catalogue, and one for an event where the model carries its state.

    ``encode_s``, ``score_s`` and ``topk_s`` are medians of the parts, the percentiles are of the whole call; one beyond
    which there is no call is None. A row that was not measured has None there, and ``note`` says why.
    """
    device = options.device
    if options.clock == "processor" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UserError("--clock: processor is for one thread of a CPU; set OMP_NUM_THREADS=1, or take wall")
    threads = torch.get_num_threads()
    print(f"{device}, {threads} CPU threads, {options.clock} time, PyTorch {torch.__version__}; weights are random")
    bench = _Bench(options)
    # Length 0 is one event. Models take turns within a length, so that a slow minute of the machine meets all of them.
    calls = list(itertools.product(sorted(options.batch_sizes), (0, *sorted(options.lengths)), options.models))
    with progress_bar(total=len(options.items) * len(calls), unit="row", leave=False) as progress:
        for items in options.items:
            torch.manual_seed(0)
            models = {name: _build(name, max(options.lengths), items, device) for name in options.models}
            costs = {(name, path): _Costs(Forecast(), Forecast(), Forecast()) for name in models for path in PATHS}
            for batch, length, name in calls:
                model, path = models[name], PATHS[bool(length)]
                progress.set_description(f"{name}, {batch} x {length or path}, {items:,} items")
                progress.update()
                if not length and not getattr(model, "carries_state", False):
                    continue
                row = {"model": name, "path": path, "length": length or 1, "batch_size": batch, "items": items}
                if isinstance(model, str):
                    measured = {**dict.fromkeys(MEASURED), "note": model}
                else:
                    measured = bench.row(model, costs[name, path], length, batch, items)
                yield {**row, **measured}


def conclude(options: argparse.Namespace, rows: list[Row]) -> str:
    """The exponents of length as a table; draws the plot where ``--plot`` asks for one."""
    if options.plot:
        _draw(options.plot, rows)
    fits = exponents(rows)
    if not fits:
        return "an exponent of the length needs two lengths"
    return (
        "\nencode_s ~ length ^ exponent, by least squares on logarithms, with the standard error of the slope; "
        "'last' is the slope between the two longest\n" + table(fits)
    )


def exponents(rows: Iterable[Row]) -> list[Row]:
    """The exponent of encoding time against length, for each model, batch and catalogue of measured rows.

    Returns:
        Rows with ``model``, ``batch_size``, ``items``, ``lengths`` (how many), ``exponent``, ``standard_error`` (None
        for two lengths, which leave no residual) and ``last``, the slope between the two longest lengths. Short
        histories show a smaller exponent, because part of their cost does not depend on length.
    """
    groups: dict[tuple[str, int, int], list[tuple[int, float]]] = {}
    for row in rows:
        if row["path"] == "history" and row["encode_s"]:
            key = (row["model"], row["batch_size"], row["items"])
            groups.setdefault(key, []).append((row["length"], row["encode_s"]))
    fits: list[Row] = []
    for (model, batch, items), points in groups.items():
        if len({length for length, _ in points}) < 2:
            continue
        # [points, (length, seconds)]
        logs = np.log(np.array(sorted(points)))
        fit = linregress(*logs.T)
        change = logs[-1] - logs[-2]
        fits.append(
            {
                "model": model,
                "batch_size": batch,
                "items": items,
                "lengths": len(points),
                "exponent": float(fit.slope),
                "standard_error": float(fit.stderr) if len(points) > 2 else None,
                "last": float(change[1] / change[0]),
            }
        )
    return fits


class Forecast:
    """What a larger call will cost, judged by those that were measured.

    The cost is taken to grow in proportion to the batch, and with a power of the length: the power that the two lengths
    before have shown, but at least 1 and at most attention's 2.
    """

    def __init__(self) -> None:
        # {batch: {length: cost}}
        self._costs: dict[int, dict[int, float]] = {}

    def note(self, batch: int, length: int, cost: float) -> None:
        """Take in a measurement; ``cost`` is in seconds, bytes or any other unit."""
        self._costs.setdefault(batch, {})[length] = cost

    def of(self, batch: int, length: int) -> float:
        """The cost to be expected; infinite where nothing has been measured."""
        if not self._costs:
            return math.inf
        nearest = max((b for b in self._costs if b <= batch), default=min(self._costs))
        known = sorted(self._costs[nearest].items())
        *before, (at, cost) = [point for point in known if point[0] <= length] or known[:1]
        power = 1.0
        if before and before[-1][1] > 0 < cost:
            power = math.log(cost / before[-1][1]) / math.log(at / before[-1][0])
        return cost * batch / nearest * (length / at) ** min(max(power, 1.0), 2.0)


class _Costs(NamedTuple):
    """Forecasts for one model and path."""

    encode_s: Forecast
    encode_bytes: Forecast
    score_s: Forecast

    def note(self, calls: _Calls, encode: float, score: float, top_k: float, _: float) -> None:
        """Take in the seconds of a call's parts. Scoring includes encoding where that cannot be timed."""
        self.encode_s.note(calls.batch, calls.length, encode)
        self.score_s.note(calls.batch, 1 if encode else calls.length, score + top_k)


class _Bench:
    """Measures rows, and leaves those out that would take too much memory or time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.seconds, self.top_k = options.device, options.seconds, options.k
        self.clock = _Processor if options.clock == "processor" else Latency

    def row(self, model: Any, costs: _Costs, length: int, batch: int, items: int) -> Row:
        """The measured columns of one row; ``length`` 0 is one event from the carried state."""
        row: Row = dict.fromkeys(MEASURED)

        def calls(batch: int, events: int) -> _Calls:
            return _Calls(model, events if length else 0, batch, items, self.device, self.top_k, self.clock())

        try:
            row["note"] = self._refusal(calls, costs, batch, length or 1, items)
            if row["note"] is None:
                row |= self._measured(calls(batch, length), costs)
        except Exception as error:
            # Memory may run out, or a model need more than items; the others are measured all the same.
            row["note"] = f"failed: {first_line(error)}"
        return row

    def _refusal(
        self, calls: Callable[[int, int], _Calls], costs: _Costs, batch: int, length: int, items: int
    ) -> str | None:
        """Why a row is not even tried; None if it is."""
        refusal = self._forecast(costs, batch, length, items)
        smaller = (batch // SMALLER, length) if batch >= SMALLER else (batch, length // SMALLER)
        if refusal is None or 0 in smaller:
            return None if math.isinf(costs.encode_s.of(batch, length)) else refusal
        if self._refusal(calls, costs, *smaller, items) is None:
            part = calls(*smaller)
            self._first(part, costs)
            # The first call also touched its memory for the first time, so it is the second that counts.
            part.once()
            costs.note(part, *part.seconds[-1])
            refusal = self._forecast(costs, batch, length, items)
        return refusal

    def _forecast(self, costs: _Costs, batch: int, length: int, items: int) -> str | None:
        # Ids in 8 bytes; scores in 4 bytes, twice, because choosing the best copies them.
        needed = 8 * batch * length + 2 * 4 * batch * items + costs.encode_bytes.of(batch, length)
        free = _free_bytes(self.device)
        if needed > 0.9 * free:
            return f"skipped: takes about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        call = costs.encode_s.of(batch, length) + costs.score_s.of(batch, 1)
        return _too_slow(call) if call * (1 + FEWEST) > self.seconds else None

    def _first(self, calls: _Calls, costs: _Costs) -> float:
        """Make the first call, for forecasts; the MiB by which it lifts the memory in use, 0 if nobody knows."""
        lifted = extra_memory(calls.once, self.device) or 0
        costs.note(calls, *calls.seconds[-1])
        costs.encode_bytes.note(calls.batch, calls.length, max(lifted - 4 * calls.batch * calls.items, 0))
        return lifted / 2**20

    def _measured(self, calls: _Calls, costs: _Costs) -> Row:
        """Percentiles of the call and medians of its parts."""
        begin = time.perf_counter()
        memory_mib = self._first(calls, costs)
        first = time.perf_counter() - begin
        if first * (1 + FEWEST) > 2 * self.seconds:
            return {"note": _too_slow(first)}
        while len(calls.seconds) < WARM_UP and first < self.seconds / 20:
            calls.once()
        calls.seconds.clear()
        end = begin + self.seconds
        while len(calls.seconds) < FEWEST or (len(calls.seconds) < MOST and time.perf_counter() < end):
            calls.once()
        parts = np.array(calls.seconds)
        encode, score, top_k, whole = np.median(parts, axis=0).tolist()
        percentiles = {
            f"p{share}_s": float(np.percentile(parts[:, 3], share)) if len(parts) * (100 - share) >= 100 else None
            for share in (50, 95, 99)
        }
        costs.note(calls, encode, score, top_k, whole)
        return {
            "calls": len(parts),
            **percentiles,
            "users_per_s": calls.batch * len(parts) / float(parts[:, 3].sum()),
            "encode_s": encode or None,
            "score_s": score,
            "topk_s": top_k,
            "memory_mib": memory_mib or None,
        }


class _Calls:
    """Calls of one model with one batch of random histories, and the seconds of their parts."""

    def __init__(
        self, model: Any, length: int, batch: int, items: int, device: torch.device, top_k: int, clock: Latency
    ) -> None:
        self.length, self.batch, self.items, self.device = length or 1, batch, items, device
        # (encode, score, top-k, all three) of each call. Encoding is 0 where the scores do not come from forward.
        self.seconds: list[tuple[float, float, float, float]] = []
        self._rows = random_histories(batch, self.length, items, device)
        self._top_k = min(top_k, items)
        # The clock is that of measure_latency, which asks no more of a trainer than its model and device.
        self._clock = clock
        model = model if length else _OneEvent(model, batch)
        self._trainer = cast(Any, SimpleNamespace(model=model, device=device))
        self._clock.on_evaluation_start(self._trainer)

    @torch.inference_mode()
    def once(self) -> None:
        """Make one call, and append the seconds of its parts."""
        self._clock.on_evaluation_batch_start(self._trainer)
        scores = self._trainer.model.full_sort_predict(self._rows).view(self.batch, -1)
        self._clock.on_scores(self._trainer, self.batch)
        scores.topk(self._top_k)
        self._clock.on_evaluation_batch_end(self._trainer, self.batch)
        parts = {name: values.pop() for name, values in self._clock.seconds.items()}
        encode, score, whole = parts.get("encode", 0.0), parts["score"], parts["evaluate"]
        self.seconds.append((encode, score, whole - encode - score, whole))


class _Processor(Latency):
    """The same clock, of the processor time that this process was given."""

    def _now(self) -> float:
        return time.process_time()


class _OneEvent(nn.Module):
    """Serving as a session does it: each user's state is carried, and a call reads one more event of each user."""

    def __init__(self, model: Any, batch: int) -> None:
        super().__init__()
        self.model, self._step = model, Stepper(model, model.alloc_state(batch))

    def forward(self, item_B: Tensor) -> Tensor:
        """Item ids ``[B]`` -> vectors ``[B, hidden_size]``; the states advance by one event."""
        return self._step(item_B.tolist())

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        return self.forward(interaction["item_id"]) @ self.model.item_embedding.weight.T


def _build(name: str, length: int, items: int, device: torch.device) -> Any:
    """A model of its own default sizes with random weights; where there can be none, the reason as a string."""
    try:
        model = untrained_model(name, items, device, MAX_ITEM_LIST_LENGTH=length).eval()
        # On their first call kernels are chosen and tested.
        _Calls(model, 1, 1, items, device, 1, Latency()).once()
        if getattr(model, "carries_state", False):
            _Calls(model, 0, 1, items, device, 1, Latency()).once()
        return model
    except Exception as error:
        # A model may need more than items; the others are measured all the same.
        return f"failed: {first_line(error)}"


def _too_slow(call_s: float) -> str:
    return f"skipped: a call takes about {call_s:,.1f} s; more --seconds measure it"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _draw(path: Path, rows: list[Row]) -> None:
    """Seconds of a call against length, a panel for each batch and catalogue; one event as a dashed line."""
    panels = sorted({(row["batch_size"], row["items"]) for row in rows if row["p50_s"]})
    names = list(dict.fromkeys(row["model"] for row in rows))
    handles: dict[str, Any] = {}
    with figure(path, (4 * len(panels) + 2, 4)) as drawn:
        for axes, panel in zip(drawn.subplots(1, max(len(panels), 1), squeeze=False)[0], panels):
            here = [row for row in rows if (row["batch_size"], row["items"]) == panel and row["p50_s"]]
            for number, name in enumerate(names):
                own = [row for row in here if row["model"] == name]
                points = sorted((row["length"], row["p50_s"]) for row in own if row["path"] == "history")
                if points:
                    axes.plot(*zip(*points), "o-", color=f"C{number}", label=name)
                for row in own:
                    if row["path"] == "one event":
                        axes.axhline(row["p50_s"], ls="--", color=f"C{number}", label=f"{name}, one event")
            axes.set(xscale="log", yscale="log", xlabel="events in the history", ylabel="seconds (p50)")
            axes.set_title(f"batch of {panel[0]:,}, {panel[1]:,} items")
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
        if handles:
            drawn.legend(handles.values(), handles, loc="outside right upper", fontsize="small")
