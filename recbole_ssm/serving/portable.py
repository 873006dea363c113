"""A trained model as files that run without this package: ONNX graphs, or programs of torch.export.

A model is written as two or three parts, each a file that takes any number of users at once:

- ``encode``: histories of item ids, right-padded to a fixed length, and their lengths -> a vector for each;
- ``step``: one more event of each user and the state that was carried -> a vector and the next state; only of models
  that carry a state;
- ``score``: vectors -> the scores of all items, by the model's own score.

``model.json`` beside them says how they are called, and ``items.txt`` holds the items' own ids, that of item n in line
n. docs/serving.md shows their use.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm import __version__
from recbole_ssm.errors import UserError, first_line, require
from recbole_ssm.files import FORMER, LITTER, exchange, folder_beside, write_json, write_text
from recbole_ssm.layers import Clock, MixerState
from recbole_ssm.layers.time import NEVER
from recbole_ssm.llm.model import LanguageModelRecommender
from recbole_ssm.model import PackedRecommender
from recbole_ssm.serving.recommender import Recommender

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSTALL = "export: --format=onnx needs onnx, onnxscript and onnxruntime; pip install 'recbole-ssm[onnx]'"
# The newest that PyTorch 2.6 writes.
OPSET = 18
DESCRIPTION = "model.json"
ITEMS = "items.txt"
TOLERANCE = 1e-4
"""The largest difference between a file and the model, relative to the largest number of an output; 1e-6 is usual."""

Run = Callable[..., Sequence[Tensor]]
"""A part as a function of its inputs in their order."""


class Part(NamedTuple):
    """One of the files, before it is written."""

    module: nn.Module
    inputs: dict[str, Tensor]
    """Examples by name, of two users."""
    outputs: tuple[str, ...]


# The modules take their inputs in the order of Part.inputs, of which a model may have more or fewer.


class _Encode(nn.Module):
    def __init__(self, model: PackedRecommender) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        item_ids, lengths, *moments = inputs
        if not moments:
            return self.model.forward_padded(item_ids, lengths)
        # A model that reads no wait is not told the moment of asking, and any will do.
        now = moments[1] if len(moments) > 1 else moments[0][:, 0]
        return self.model.forward_padded(item_ids, lengths, Clock.of_rows(moments[0], now, lengths))


class _Step(nn.Module):
    def __init__(self, model: Any, moments: int) -> None:
        super().__init__()
        self.model, self.moments = model, moments

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        item_ids, moments, state = inputs[0], inputs[1 : 1 + self.moments], inputs[1 + self.moments :]
        clock = Clock(*(*moments, moments[-1])[:3]) if moments else None
        before = [MixerState(*pair) for pair in zip(state[::2], state[1::2])]
        output, after = self.model.step(item_ids, before, clock)
        return self.model.read_out(output, clock), *(tensor for one in after for tensor in one)


class _Score(nn.Module):
    def __init__(self, model: PackedRecommender) -> None:
        super().__init__()
        self.query_vectors = model.query_vectors
        self.register_buffer("items", model.item_vectors().detach()[1:].T.contiguous())
        self.items: Tensor

    def forward(self, *inputs: Tensor) -> Tensor:
        # The padding has id 0, and is never recommended.
        return F.pad(self.query_vectors(inputs[0]) @ self.items, (1, 0), value=-torch.inf)


def check_exportable(name: str, model_class: type, form: str) -> None:
    """Before a model is loaded: that it can leave in this form.

    Raises:
        UserError: it cannot, or packages are missing.
    """
    if issubclass(model_class, LanguageModelRecommender):
        raise UserError(
            f"export: {name} is a language model with prompts and a tokenizer, which are no graph of tensors; "
            "serve it, or take a model of item ids"
        )
    padded = getattr(model_class, "encode_padded", None)
    if padded is None or padded is PackedRecommender.encode_padded:
        raise UserError(
            f"export: {name} cannot leave as a file; Mamba4Rec, 2Mamba4Rec, Hydra4Rec, SASRec and GRU4Rec can, and a "
            "class of yours with the method encode_padded"
        )
    if form == "onnx":
        for package in ONNX_PACKAGES:
            require(package, INSTALL)


def check_out(out: Path, overwrite: bool) -> None:
    """Before long work: that the folder can be written.

    Raises:
        UserError: it is there already, or something that this module did not write is to be overwritten.
    """
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {out.absolute().parent}")
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out} is there already, and stays as it is; say --overwrite or choose another --out")
    if not out.exists():
        return
    try:
        about = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
        written = {DESCRIPTION, *LITTER, about["items"]["file"], *(part["file"] for part in about["parts"].values())}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--overwrite: {out} is no exported model; remove it or choose another --out") from error
    # Weights of more than 1.5 GB have a file of their own beside their graph.
    if others := sorted(path.name for path in out.iterdir() if path.name.removesuffix(".data") not in written):
        raise UserError(
            f"--overwrite: {out} holds {others[0]}, which export did not write; move it away or choose another --out"
        )


def write_model(
    recommender: Recommender, out: Path, form: str, checkpoint: dict[str, str], overwrite: bool = False
) -> dict[str, Any]:
    """Write the parts of a model into a folder, after :func:`check_exportable` and :func:`check_out`.

    What was written is loaded again and compared with the model on random histories.

    Args:
        recommender: the model on the CPU, and its items. Its weights ask for no gradient from then on, so that what is
            written does not.
        out: the folder, which appears once it is whole.
        form: ``onnx`` or ``torch``.
        checkpoint: what ``model.json`` says of where the model comes from.
        overwrite: a folder of that name that this module wrote is replaced.

    Returns:
        What ``model.json`` holds.

    Raises:
        UserError: a part cannot be written, or does not compute what the model does; or :func:`check_out`'s.
    """
    model, found = recommender.model.requires_grad_(False), parts_of(recommender)
    with folder_beside(out) as temporary:
        scratch = temporary / out.name
        scratch.mkdir()
        described = {}
        for name, part in found.items():
            file = scratch / f"{name}{SUFFIXES[form]}"
            try:
                with _quiet():
                    _write(part, file)
                    difference = _difference(name, part, _load(file), recommender)
            except UserError:
                raise
            except Exception as error:
                # PyTorch's own, of many kinds, about a model that it cannot follow.
                raise UserError(f"export: PyTorch cannot write {name} ({first_line(error)})") from error
            if not difference <= TOLERANCE:
                raise UserError(
                    f"export: {name} differs from the model by {difference:.1e}, and nothing was written; where a "
                    "class has its own encode or forward, its encode_padded and step must compute the same"
                )
            described[name] = {"file": file.name, **_described(part), "largest_difference": difference}
        write_text(scratch / ITEMS, "".join(f"{token}\n" for token in recommender.items[1:]))
        packages = ("torch", *(ONNX_PACKAGES if form == "onnx" else ()))
        description = {
            **checkpoint,
            "format": form,
            "length": recommender.max_length,
            "items": {"file": ITEMS, "count": len(recommender.items) - 1, "first_id": 1, "padding_id": 0},
            "score": {"kind": "cosine" if model.cosine else "dot", "temperature": model.temperature},
            "parts": described,
            "versions": {"recbole_ssm": __version__, **{name: importlib.metadata.version(name) for name in packages}},
        }
        if model.time_encoding is not None:
            description["time"] = {"unit": "seconds since 1970", "before_the_first_event": NEVER}
        write_json(scratch / DESCRIPTION, description)
        # Another process may have made such a folder meanwhile.
        check_out(out, overwrite)
        exchange(scratch, out, temporary / FORMER if overwrite else None)
    return description


def parts_of(recommender: Recommender) -> dict[str, Part]:
    """The parts of a model by their names."""
    model, encoding = recommender.model, recommender.model.time_encoding
    users, rows = torch.ones(2, dtype=torch.int64), torch.ones(2, recommender.max_length, dtype=torch.int64)
    histories, event = {"item_ids": rows, "lengths": users}, {"item_ids": users}
    if encoding is not None:
        histories["times"] = rows
        event |= {"time_before": users, "time": users}
        if encoding.asks:
            histories["now"] = event["now"] = users
    found = {"encode": Part(_Encode(model), histories, ("vectors",))}
    if getattr(model, "carries_state", False):
        state = {
            f"{name}_{number}": tensor
            for number, one in enumerate(model.alloc_state(2))
            for name, tensor in zip(("conv", "ssm"), one)
        }
        step = _Step(model, len(event) - 1)
        found["step"] = Part(step, {**event, **state}, ("vectors", *(f"next_{name}" for name in state)))
    width = model.item_vectors().shape[1]
    found["score"] = Part(_Score(model), {"vectors": torch.zeros(2, width)}, ("scores",))
    return found


@torch.no_grad()
def _write(part: Part, file: Path) -> None:
    batch = torch.export.Dim("batch")
    # Two inputs of one memory would be one input.
    inputs = tuple(tensor.clone() for tensor in part.inputs.values())
    shapes = (tuple({0: batch} for _ in inputs),)
    program = torch.export.export(part.module.eval(), inputs, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        # It names the files of this machine.
        node.meta.pop("stack_trace", None)
    if file.suffix == SUFFIXES["torch"]:
        torch.export.save(program, file)
        return
    names: dict[str, Any] = {"input_names": list(part.inputs), "output_names": list(part.outputs)}
    graph = torch.onnx.export(program, **names, opset_version=OPSET, dynamo=True, verbose=False)
    assert graph is not None
    for operator in graph.model.graph:
        operator.metadata_props.clear()
    graph.save(str(file))


def _load(file: Path) -> Run:
    if file.suffix == SUFFIXES["torch"]:
        program: Any = torch.export.load(file).module()
        return lambda *inputs: _several(program(*inputs))
    session = require("onnxruntime", INSTALL).InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *inputs: [
        torch.from_numpy(found) for found in session.run(None, dict(zip(names, (x.numpy() for x in inputs))))
    ]


def _several(found: Any) -> Sequence[Tensor]:
    return found if isinstance(found, tuple) else (found,)


@torch.no_grad()
def _difference(name: str, part: Part, run: Run, recommender: Recommender) -> float:
    """The largest difference between an output of a part and the model's, relative to the model's largest number
    there.
    """
    largest, scales = [0.0] * len(part.outputs), [1e-6] * len(part.outputs)
    for inputs, expected in _examples(name, part, recommender):
        for number, (found, right) in enumerate(zip(run(*inputs), expected, strict=True)):
            # Both score the padding minus infinity.
            error = torch.where(found == right, 0.0, (found - right).abs().nan_to_num(torch.inf))
            largest[number] = max(largest[number], float(error.max()))
            scales[number] = max(scales[number], float(right[right.isfinite()].abs().max()))
    return max(most / scale for most, scale in zip(largest, scales))


def _examples(name: str, part: Part, recommender: Recommender) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Inputs of a part for 16 users, and what the model makes of them by its own ways."""
    model, B, L, events = recommender.model, 16, recommender.max_length, 10
    draw = torch.Generator().manual_seed(0)
    if name == "score":
        vectors = torch.randn(B, *part.inputs["vectors"].shape[1:], generator=draw)
        scores = model.query_vectors(vectors) @ model.item_vectors().T
        yield [vectors], [scores.index_fill(1, torch.tensor([0]), -torch.inf)]
        return
    items = torch.randint(1, len(recommender.items), (B, max(L, events)), generator=draw)
    # Gaps from none to three months, which begin before 1970.
    times = (torch.rand(B, items.shape[1] + 2, generator=draw) ** 8 * 8e6).long().cumsum(1) - 10**6
    if name == "encode":
        lengths = torch.linspace(1, L, B).long()
        clock = None if model.time_encoding is None else Clock.of_rows(times[:, :L], times[:, -1], lengths)
        inputs = [items[:, :L], lengths, times[:, :L], times[:, -1]]
        yield inputs[: len(part.inputs)], [model.forward(items[:, :L], lengths, clock)]
        return
    times[:, 0] = NEVER
    state = model.alloc_state(B)
    for event in range(events):
        before = [tensor for one in state for tensor in one]
        given = [items[:, event], *times[:, event : event + 3].unbind(1)]
        clock = None if model.time_encoding is None else Clock(*given[1:])
        output, state = model.step(given[0], state, clock)
        after = [tensor for one in state for tensor in one]
        yield [*given[: len(part.inputs) - len(before)], *before], [model.read_out(output, clock), *after]


def _described(part: Part) -> dict[str, Any]:
    """Names, types and shapes of what a part takes and gives; the first dimension is that of users."""

    def described(named: dict[str, Tensor]) -> list[dict[str, Any]]:
        return [
            {"name": name, "type": str(tensor.dtype).removeprefix("torch."), "shape": ["batch", *tensor.shape[1:]]}
            for name, tensor in named.items()
        ]

    with torch.no_grad():
        outputs = dict(zip(part.outputs, _several(part.module(*part.inputs.values()))))
    found: dict[str, Any] = {"inputs": described(part.inputs), "outputs": described(outputs)}
    state = {name: f"next_{name}" for name in part.inputs if f"next_{name}" in part.outputs}
    return {**found, "state": state} if state else found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warnings of its own workings, none of which the user can mend."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
