"""What a recommendation costs by model, length of the history, batch and catalogue, and how the cost grows with length.

A call takes a batch of full histories and gives the best items of each: encode, the model's forward; score, the
products with all items; top-k. The device is synchronised around each part. Rows with path "one event" read one more
event of each user from the carried state instead of the whole history, as recbole_ssm.serving does. The weights are
random, since times do not depend on them; a length beyond those that models are trained on says what it would cost, not
how good it would be.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import psutil
import torch
from scipy.stats import linregress
from torch import Tensor, nn
from tqdm import tqdm

from recbole_ssm import compat
from recbole_ssm.bench import Row, table
from recbole_ssm.bench.measure import chosen, peak_memory, whole_numbers
from recbole_ssm.data.outline import DatasetOutline
from recbole_ssm.errors import UserError
from recbole_ssm.figure import check_drawable, figure

compat.install()

from recbole.data.interaction import Interaction  # noqa: E402

from recbole_ssm.model import SSMRecommender, get_model, model_names  # noqa: E402
from recbole_ssm.quick_start import configure  # noqa: E402
from recbole_ssm.serving import Stepper  # noqa: E402
from recbole_ssm.trainer.timing import Latency  # noqa: E402

MODELS = ("Mamba4Rec", "2Mamba4Rec", "Hydra4Rec", "SASRec", "GRU4Rec")
MEASURED = (
    "calls", "p50_s", "p95_s", "p99_s", "users_per_s", "encode_s", "score_s", "topk_s", "memory_mib", "note",
)  # fmt: skip
SMALLER = 16
WARM_UP = 3  # calls that are not counted; one where they are slow
FEWEST, MOST = 3, 200  # calls that are
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--models", default=",".join(MODELS), help=f"default {','.join(MODELS)}")
    parser.add_argument("--lengths", default="50,200,1000,4000,16000", help="events of a history (%(default)s)")
    parser.add_argument("--batch_sizes", default="1,64,4096", help="histories in a call (%(default)s)")
    parser.add_argument("--items", default="12101,1000000", help="items of the catalogue (%(default)s)")
    parser.add_argument("--top_k", type=int, default=10, help="best items of each history (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row, else it is skipped (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda ... (%(default)s)")
    parser.add_argument(
        "--clock",
        default="wall",
        help="wall (default), or processor: what a thread of a shared machine would take if it were alone",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw seconds against length")


def run(options: argparse.Namespace) -> list[Row]:
    """A row for each model, length, batch and catalogue, and one an event where the model carries its state.

    ``encode_s``, ``score_s`` and ``topk_s`` are medians of the parts, the percentiles are of the whole call. A row that
    was not measured has None there, and ``note`` says why.
    """
    names = chosen("--models", options.models, model_names())
    lengths, batches, catalogues = (
        whole_numbers(f"--{key}", getattr(options, key)) for key in ("lengths", "batch_sizes", "items")
    )
    if min(*lengths, *batches, *catalogues, options.top_k) < 1 or not 0 < options.seconds < math.inf:
        raise UserError("bench latency: --lengths, --batch_sizes, --items, --top_k from 1, --seconds above 0")
    device = _device(options.device)
    chosen("--clock", options.clock, ("wall", "processor"))
    if options.clock == "processor" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UserError("--clock: processor is for one thread of a CPU; set OMP_NUM_THREADS=1, or take wall")
    if options.plot:
        check_drawable(options.plot)  # before anything is measured
    print(
        f"{device}, {torch.get_num_threads()} CPU threads, {options.clock} time, PyTorch {torch.__version__}; weights "
        "are random: a length beyond those of training tells what it would cost, not how good it would be"
    )
    bench = _Bench(device, options.seconds, options.top_k, _Processor if options.clock == "processor" else Latency)
    rows: list[Row] = []
    total = len(catalogues) * len(batches) * (len(lengths) + 1) * len(names)
    with tqdm(total=total, unit="row", leave=False) as progress, contextlib.suppress(KeyboardInterrupt):
        for items in catalogues:
            torch.manual_seed(0)
            models = {name: _build(name, max(lengths), items, device) for name in names}
            costs: dict[tuple[str, bool], _Costs] = {}
            # models in turn within, so that a slow minute of the machine meets all of them
            for batch, length, name in itertools.product(sorted(batches), (0, *sorted(lengths)), names):
                model = models[name]
                progress.set_description(f"{name}, {batch} x {length or 'one event'}, {items:,} items")
                progress.update()
                if not length and not _carries_state(model):
                    continue
                row = {
                    "model": name,
                    "path": "history" if length else "one event",
                    "length": length or 1,
                    "batch_size": batch,
                    "items": items,
                }
                if isinstance(model, str):
                    rows.append({**row, **dict.fromkeys(MEASURED), "note": model})
                else:
                    known = costs.setdefault((name, bool(length)), _Costs(Forecast(), Forecast(), Forecast()))
                    rows.append({**row, **bench.row(model, known, length, batch, items)})
    if progress.n < total:
        print(f"interrupted after {progress.n} of {total} rows; these were measured:")
    return rows


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
        for two lengths, which leave no residual) and ``last``, the slope between the two longest: a cost that does not
        depend on length hides the exponent of short histories.
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
        logs = np.log(np.array(sorted(points)))  # [points, (length, seconds)]
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
    """What a larger call will cost, from those that were measured.

    In proportion to the batch, and to a power of the length: that which the two lengths before have shown, taken to be
    between one and attention's two.
    """

    def __init__(self) -> None:
        self._costs: dict[int, dict[int, float]] = {}  # batch -> length -> cost

    def note(self, batch: int, length: int, cost: float) -> None:
        """A measurement."""
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

    def note(self, calls: _Calls, encode_s: float, score_s: float) -> None:
        """What a call took; ``score_s`` with the choice of the best."""
        self.encode_s.note(calls.batch, calls.length, 0.0 if math.isnan(encode_s) else encode_s)
        self.score_s.note(calls.batch, calls.length if math.isnan(encode_s) else 1, score_s)


class _Bench:
    """Measures rows, and leaves those out that would take too much memory or time."""

    def __init__(self, device: torch.device, seconds: float, top_k: int, clock: type[Latency]) -> None:
        self.device, self.seconds, self.top_k, self.clock = device, seconds, top_k, clock

    def row(self, model: Any, costs: _Costs, length: int, batch: int, items: int) -> Row:
        """The measured columns of one row; ``length`` 0 is one event from the carried state."""
        row: Row = dict.fromkeys(MEASURED)

        def calls(batch: int, events: int) -> _Calls:
            return _Calls(model, events if length else 0, batch, items, self.device, self.top_k, self.clock())

        try:
            row["note"] = self._refusal(calls, costs, batch, length or 1, items)
            if row["note"] is None:
                row |= self._measured(calls(batch, length), costs)
        except Exception as error:  # out of memory, or a model that wants more than items: no other may stop for it
            row["note"] = f"failed: {_first_line(error)}"
        return row

    def _refusal(
        self, calls: Callable[[int, int], _Calls], costs: _Costs, batch: int, length: int, items: int
    ) -> str | None:
        """Why a row is not even tried. Before a forecast is believed, a sixteenth of the row is called."""
        refusal = self._forecast(costs, batch, length, items)
        smaller = (batch // SMALLER, length) if batch >= SMALLER else (batch, length // SMALLER)
        if refusal is None or 0 in smaller:
            return None if math.isinf(costs.encode_s.of(batch, length)) else refusal
        if self._refusal(calls, costs, *smaller, items) is None:
            part = calls(*smaller)
            self._first(part, costs)
            part.once()  # the first call has touched the memory
            encode, score, top_k, _ = part.seconds[-1]
            costs.note(part, encode, score + top_k)
            refusal = self._forecast(costs, batch, length, items)
        return refusal

    def _forecast(self, costs: _Costs, batch: int, length: int, items: int) -> str | None:
        # ids, scores, and a copy of the scores where the best are chosen
        needed = 8 * batch * length + 2 * 4 * batch * items + costs.encode_bytes.of(batch, length)
        free = _free_bytes(self.device)
        if needed > 0.9 * free:
            return f"skipped: takes about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        call = costs.encode_s.of(batch, length) + costs.score_s.of(batch, 1)
        return _too_slow(call) if call * (1 + FEWEST) > self.seconds else None

    def _first(self, calls: _Calls, costs: _Costs) -> float:
        """The first call, noted for forecasts; the MiB by which it lifts memory."""
        memory_mib = calls.memory_mib()
        encode, score, top_k, _ = calls.seconds[-1]
        costs.note(calls, encode, score + top_k)
        costs.encode_bytes.note(calls.batch, calls.length, max(memory_mib * MIB - 4 * calls.batch * calls.items, 0.0))
        return memory_mib

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
        parts = np.array(calls.seconds)  # [calls, (encode, score, top-k, all)]
        encode, score, top_k, _ = np.median(parts, axis=0).tolist()
        p50, p95, p99 = np.percentile(parts[:, 3], (50, 95, 99)).tolist()
        costs.note(calls, encode, score + top_k)  # better than what the first call said
        return {
            "calls": len(parts),
            "p50_s": p50,
            "p95_s": p95,
            "p99_s": p99,
            "users_per_s": calls.batch * len(parts) / float(parts[:, 3].sum()),
            "encode_s": None if math.isnan(encode) else encode,  # the scores did not come from forward
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
        self.seconds: list[tuple[float, float, float, float]] = []  # encode, score, top-k, all three
        history = torch.randint(1, items + 1, (batch, self.length), device=device)
        lengths = torch.full((batch,), self.length, device=device)
        self._rows = Interaction({"item_id_list": history, "item_length": lengths, "item_id": history[:, -1]})
        self._top_k = min(top_k, items)
        # the clock of measure_latency, which needs no more of a trainer than this
        self._clock = clock
        model = model if length else _OneEvent(model, batch)
        self._trainer = cast(Any, SimpleNamespace(model=model, device=device))
        self._clock.on_evaluation_start(self._trainer)

    @torch.inference_mode()
    def once(self) -> None:
        """One call, noted."""
        self._clock.on_evaluation_batch_start(self._trainer)
        scores = self._trainer.model.full_sort_predict(self._rows).view(self.batch, -1)
        self._clock.on_scores(self._trainer, self.batch)
        scores.topk(self._top_k)
        self._clock.on_evaluation_batch_end(self._trainer, self.batch)
        parts = {name: values.pop() for name, values in self._clock.seconds.items()}
        self.seconds.append((parts.get("encode", math.nan), parts["score"], parts["top_k"], parts["evaluate"]))

    def memory_mib(self) -> float:
        """One call, and by how much it lifts the memory in use; 0 where the system does not tell."""
        if self.device.type != "cuda":
            return peak_memory(self.once) or 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.once()
        return (torch.cuda.max_memory_allocated(self.device) - before) / MIB


class _Processor(Latency):
    """The same clock in time that the process was given."""

    def _now(self) -> float:
        return time.process_time()


class _OneEvent(nn.Module):
    """Serving as by a session: each user's state is carried, and a call reads one more event of each."""

    def __init__(self, model: Any, batch: int) -> None:
        super().__init__()
        self.model, self._step = model, Stepper(model, model.alloc_state(batch))

    def forward(self, item_B: Tensor) -> Tensor:
        """Item ids ``[B]`` -> vectors ``[B, hidden_size]``; the state moves on."""
        return self._step(item_B.tolist())

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        return self.forward(interaction["item_id"]) @ self.model.item_embedding.weight.T


def _build(name: str, length: int, items: int, device: torch.device) -> Any:
    """A model of its own default sizes with random weights; where there can be none, the reason as a string."""
    try:
        config = configure(name, "generated", config_dict={"MAX_ITEM_LIST_LENGTH": length, "state": "ERROR"})
        config["device"] = device
        model = get_model(name)(config, DatasetOutline(items + 1)).to(device).eval()
        for path in (1, 0) if _carries_state(model) else (1,):  # kernels are chosen and tested on their first call
            _Calls(model, path, 1, items, device, 1, Latency()).once()
        return model
    except Exception as error:  # a model that wants more than items must not stop the others
        return f"failed: {_first_line(error)}"


def _too_slow(call_s: float) -> str:
    return f"skipped: a call takes about {call_s:,.1f} s; more --seconds measure it"


def _carries_state(model: Any) -> bool:
    return isinstance(model, SSMRecommender) and all(hasattr(block.mixer, "alloc_state") for block in model.blocks)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{text}' cannot be used ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _draw(path: Path, rows: list[Row]) -> None:
    """Seconds of a call against length, a panel for each batch and catalogue; one event as a dashed line."""
    panels = sorted({(row["batch_size"], row["items"]) for row in rows if row["p50_s"]})
    names = list(dict.fromkeys(row["model"] for row in rows))
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
        if panels:
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
