"""Test a trained model: with other metrics, cut-offs, modes or splits, on its data set or another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_ssm.arguments import path_that
from recbole_ssm.commands.options import add_arguments, parse
from recbole_ssm.errors import ArgumentParser, UserError
from recbole_ssm.evaluation.metrics import Result, protocol
from recbole_ssm.files import check_writable, write_json
from recbole_ssm.quick_start import load_data_and_model
from recbole_ssm.trainer import Trainer, checkpoint


def evaluate(
    model_file: str | Path,
    *,
    part: str = "test",
    model: str | type | None = None,
    config_dict: Mapping[str, Any] | None = None,
    command_line: Iterable[str] = (),
) -> Result:
    """The metrics of a trained model.

    Args:
        model_file: a checkpoint, or the folder of a run.
        part: of the split, ``test`` or ``valid``.
        model: the class of the model, where it is one of your own.
        config_dict: options that are to be others than in the run: ``metrics``, ``topk``,
            ``eval_args``, or ``dataset`` and ``data_path``. On another data set items are known by
            their ids; events of unknown items are left out, and counted in the log.
        command_line: the same as ``["--key=value", ...]``; they win.

    Returns:
        ``{metric: value}``, as RecBole names them; its attribute ``masked`` has the same with the items
        of the history left out, and ``protocol`` says split, ties and seed. Of the test, ``by_group``
        has groups of targets, and ``shuffled_times`` the metrics of a model of ``time: query`` with its
        query times shuffled among the users.

    Raises:
        UserError: something given is wrong, or the split leaves no rows.
    """
    return _evaluate(model_file, part, model, config_dict, command_line)[0]


def _evaluate(
    model_file: str | Path,
    part: str,
    model: str | type | None,
    config_dict: Mapping[str, Any] | None,
    command_line: Iterable[str],
) -> tuple[Result, str]:
    """The metrics, and the name of the data set."""
    if part not in ("test", "valid"):
        raise UserError(f"part: must be test or valid, got {part}")
    config, recommender, _, _, valid, test = load_data_and_model(model_file, model, config_dict, command_line)
    trainer = Trainer(config, recommender)
    with contextlib.closing(trainer.tensorboard):
        rows, way = (test, trainer.test) if part == "test" else (valid, trainer.evaluate)
        found = way(rows, load_best_model=False, show_progress=config["show_progress"])
    if found is None:
        raise UserError(f"part: the split leaves no rows of {part}; change eval_args")
    result: Result = found
    result.protocol = protocol(config)
    return result, config["dataset"]


def _device_keys(named: str | None) -> list[str]:
    """The config keys that mean a device."""
    if named in (None, "cuda"):
        return []
    if named == "cpu":
        return ["--use_gpu=False"]
    kind, _, number = str(named).partition(":")
    if kind != "cuda" or not number.isdigit():
        raise UserError(f"--device: must be cpu, cuda or cuda:0, got {named}")
    return [f"--gpu_id={number}"]


def main(arguments: Sequence[str]) -> None:
    """Run the command and print the metrics."""
    parser = ArgumentParser("recbole-ssm evaluate", __doc__)
    add_arguments(parser)
    parser.add_argument("--part", choices=("test", "valid"), default="test", help="of the split")
    parser.add_argument("--json", type=path_that(check_writable), metavar="FILE", help="write the metrics there too")
    options, command_line = parse(parser, arguments)
    command_line += _device_keys(options.device)
    file = checkpoint.best_file(options.checkpoint)
    found, dataset = _evaluate(file, options.part, options.model, None, command_line)
    print(f"run {file.parent if file.name == checkpoint.BEST else file}, data set {dataset}, {options.part}")
    print(found.table())
    print(f"protocol: {found.protocol}")
    if options.json:
        about = {"checkpoint": str(options.checkpoint), "part": options.part, "protocol": found.protocol}
        figures = {"metrics": found, "masked": found.masked, "by_group": found.by_group}
        if shuffled := found.shuffled_times:
            figures |= {"shuffled_times": shuffled, "shuffled_times_masked": shuffled.masked}
        write_json(options.json, {**about, **figures})
