"""Write the vectors of items or users: Parquet with the columns id and vector, or .npy with the ids in a text file.

With --what=model, the model itself, as files that run without this package; docs/serving.md shows their use.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recbole_ssm.commands.histories import ALL_EVENTS, histories_of
from recbole_ssm.commands.options import add_arguments, add_now, parse
from recbole_ssm.commands.tables import check_table, write_table
from recbole_ssm.console import progress_bar
from recbole_ssm.errors import ArgumentParser, UserError
from recbole_ssm.files import recover, whole
from recbole_ssm.model.registry import class_of
from recbole_ssm.serving import portable, recommender_of
from recbole_ssm.starting import configure_data
from recbole_ssm.trainer import checkpoint

NOT_TAKEN = {
    "items": ("users", "now", "format", "overwrite"),
    "users": ("format", "overwrite"),
    "model": ("users", "now", "device"),
}
"""Options that do not belong to what is written."""


def export_vectors(
    out: str | Path,
    model_file: str | Path,
    what: str = "items",
    users: str | Path | Iterable[str] = "all",
    *,
    model: str | type | None = None,
    device: str | None = None,
    now: Any = None,
    command_line: Iterable[str] = (),
) -> int:
    """Write the vectors of a model by raw id; the score of an item for a user is their dot product in our models.

    Args:
        out: a ``.parquet`` file, of the columns ``id`` (text) and ``vector`` (a list of float32, all of
            one length); or a ``.npy`` file of a float32 array ``[n, d]``, beside which a file
            ``<out>.ids.txt`` holds the ids, one in each line.
        model_file: a checkpoint, or the folder of a run.
        what: ``items``, or ``users``, each of whom is what the model makes of all events; a user
            without a known item has zeros.
        users: whose vectors: as of :func:`recbole_ssm.commands.recommend_users`.
        model: the class of the model, where it is one of your own.
        device: where to run; None takes a GPU if there is one.
        now: the moment at which users' vectors answer, where the model must know it, as of
            :class:`recbole_ssm.serving.Recommender`.
        command_line: config keys that are to be others than in the run, as ``["--key=value", ...]``.

    Returns:
        How many vectors were written.

    Raises:
        UserError: something given is wrong, or the model has no such vectors.
    """
    out = Path(out)
    check_table("out", out, (".parquet", ".npy"))
    if what not in ("items", "users"):
        raise UserError(f"what: must be items or users, got {what}")
    path, saved = checkpoint.find_best(Path(model_file))
    recommender = recommender_of(path, saved, device, model=model)
    if what == "items":
        ids, vectors = recommender.items[1:], recommender.item_vectors()
    else:
        config = configure_data((path, saved), model, config_dict=ALL_EVENTS, command_line=command_line)
        histories = histories_of(users, config)
        ids = histories.users
        bar = progress_bar(iter(histories), total=len(ids), desc="Encode", unit="user", unit_scale=True, delay=1)
        vectors = recommender.user_vectors(bar, True, histories.times, now, called=histories.called)
    _write(out, ids, vectors.numpy())
    return len(ids)


def export_model(
    out: str | Path,
    model_file: str | Path,
    form: str = "onnx",
    *,
    overwrite: bool = False,
    model: str | type | None = None,
) -> dict[str, Any]:
    """Write a model as files that run without this package: :mod:`recbole_ssm.serving.portable`.

    Args:
        out: a folder, for the parts of the model, ``items.txt`` and ``model.json``.
        model_file: a checkpoint, or the folder of a run.
        form: ``onnx``, or ``torch`` for programs of torch.export.
        overwrite: a folder of that name that this function wrote goes, once the new one is whole.
        model: the class of the model, where it is one of your own.

    Returns:
        What ``model.json`` holds.

    Raises:
        UserError: something given is wrong, packages are missing, or the model cannot leave so.
    """
    out = Path(out)
    if form not in portable.SUFFIXES:
        raise UserError(f"format: must be onnx or torch, got {form}")
    file = checkpoint.best_file(Path(model_file))
    saved, digest = checkpoint.read_with_digest(file)
    name = saved.info["model"]
    portable.check_exportable(name, class_of(saved.info, file, model), form)
    recover(out)
    portable.check_out(out, overwrite)
    recommender = recommender_of(file, saved, "cpu", model=model)
    return portable.write_model(recommender, out, form, {"model": name, "checkpoint_sha256": digest}, overwrite)


def _write(out: Path, ids: Sequence[str], vectors: np.ndarray) -> None:
    if out.suffix.lower() == ".parquet":
        column: Any = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        write_table(out, [pa.table({"id": pa.array(ids, pa.string()), "vector": column})])
        return
    names = out.with_name(f"{out.name}.ids.txt")
    # Both are there before one of them takes its name.
    with whole(names) as names_waiting, whole(out) as temporary:
        names_waiting.write_text("".join(f"{token}\n" for token in ids), encoding="utf-8")
        with open(temporary, "wb") as file:
            np.save(file, vectors)


def main(arguments: Sequence[str]) -> None:
    """Run the command and say what was written."""
    parser = ArgumentParser("recbole-ssm export", __doc__)
    add_arguments(parser)
    parser.add_argument("--what", choices=tuple(NOT_TAKEN), default="items", help="whose vectors, or the model itself")
    parser.add_argument("--users", help="which users: all (default) or a file, as recommend takes it")
    parser.add_argument(
        "--out",
        type=Path,
        help="a .parquet or .npy file, of a model a folder (default: items.parquet, users.parquet or exported)",
    )
    parser.add_argument("--format", choices=tuple(portable.SUFFIXES), help="of a model (default: onnx)")
    parser.add_argument("--overwrite", action="store_true", help="put the model in the place of one that is there")
    add_now(parser)
    options, command_line = parse(parser, arguments, flags=("--overwrite",))
    for name in NOT_TAKEN[options.what]:
        if getattr(options, name):
            raise UserError(f"--{name}: --what={options.what} does not take it; leave it out")
    if command_line and options.what != "users":
        raise UserError(f"export: --what={options.what} takes no config keys, got {command_line[0]}")
    if options.what == "model":
        _main_of_model(options)
        return
    out = options.out or Path(f"{options.what}.parquet")
    count = export_vectors(
        out,
        options.checkpoint,
        options.what,
        options.users or "all",
        model=options.model,
        device=options.device,
        now=options.now,
        command_line=command_line,
    )
    print(f"wrote {out}: the vectors of {count:,} {options.what}")


def _main_of_model(options: Namespace) -> None:
    out = options.out or Path("exported")
    found = export_model(
        out, options.checkpoint, options.format or "onnx", overwrite=options.overwrite, model=options.model
    )
    parts = ", ".join(part["file"] for part in found["parts"].values())
    most = max(part["largest_difference"] for part in found["parts"].values())
    print(f"wrote {out}: {parts} of {found['model']}, whose numbers differ from the model's by {most:.0e} at most")
