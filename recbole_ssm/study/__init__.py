"""Studies: results over many runs, with tables and plots: ``recbole-ssm study NAME [--folder=DIR] [--key=value ...]``.

A study is one module of this package: ``add_arguments(parser)`` names its options, ``run(options, keys)`` trains what
is missing, prints its table and writes its files to ``options.folder``. ``keys`` are the config keys of the command
line, for every run of the study. Runs are kept (:mod:`recbole_ssm.study.runs`), so a study that was stopped goes on by
the same command, and one that is done can be printed again.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from recbole_ssm.errors import ArgumentParser, UserError, did_you_mean

STUDIES = {
    "compare": "models by data sets: quality over seeds with paired tests, latency, parameters, seconds, memory",
    "llm": "LlamaRec by base model, verbalizer and objective, each paired with its retriever",
    "length": "quality and cost by the longest history that a model sees",
    "tune": "the best hyper-parameters of a model, by exhaustive, random or Bayesian search",
    "optimizers": "Adam, SGD, USGM and the adaptive batch size: quality over seeds, samples and seconds to a score",
}
MODULES = {"llm": "objectives"}  # a study whose module has another name


def main(arguments: Sequence[str]) -> None:
    """Run one study.

    Raises:
        UserError: no such study, no such option, or an impossible value.
    """
    from recbole_ssm.arguments import join_values

    names = "; ".join(f"{name}: {what}" for name, what in STUDIES.items())
    if list(arguments) in (["--help"], ["-h"]):
        usage = "recbole-ssm study NAME [--folder=DIR] [--key=value ...] [--help]\n"
        print(usage + "".join(f"\n  {name}: {what}" for name, what in STUDIES.items()))
        return
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"study: name one of {names}")
    name = arguments[0]
    if name not in STUDIES:
        raise UserError(f"study: there is no study '{name}'{did_you_mean(name, STUDIES)}; {names}")
    module = importlib.import_module(f"recbole_ssm.study.{MODULES.get(name, name)}")
    parser = ArgumentParser(f"recbole-ssm study {name}", module.__doc__)
    folder = Path("saved", "study", name)
    parser.add_argument("--folder", type=Path, default=folder, help=f"where runs and tables are kept; default {folder}")
    module.add_arguments(parser)
    parser.epilog = "any other --key=value is a config key, for every run"
    help_asked = [argument for argument in arguments[1:] if argument in ("--help", "-h")]
    options, others = parser.parse_known_args(help_asked or join_values(list(arguments[1:])))

    from recbole_ssm.arguments import parse_options

    module.run(options, parse_options(others))
