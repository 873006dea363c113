"""Studies: results over many runs, with tables and plots: ``recbole-ssm study NAME [--folder=DIR] [--key=value ...]``.

A study is one module of this package: ``add_arguments(parser)`` names its options, ``run(options, keys)`` trains what
is missing, writes its files to ``options.folder`` and returns what is printed. ``keys`` are the config keys of the
command line, for every run of the study. An unknown name or key and an impossible value are a UserError before anything
is trained. Runs are kept (:mod:`recbole_ssm.study.runs`), so a study that was stopped
goes on by the same command, and one that is done can be printed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recbole_ssm.errors import ArgumentParser
from recbole_ssm.subcommands import choose

STUDIES = {
    "compare": "models by data sets: quality over seeds with paired tests, latency, parameters, seconds, memory",
    "llm": "LlamaRec by base model, verbalizer and objective, each paired with its retriever",
    "length": "quality and cost by the longest history that a model sees",
    "tune": "the best hyper-parameters of a model, by exhaustive, random or Bayesian search",
    "optimizers": "Adam, SGD, USGM and the adaptive batch size: quality over seeds, samples and seconds to a score",
}
# A study whose module has another name.
MODULES = {"llm": "objectives"}


def main(arguments: Sequence[str]) -> None:
    """Run one study.

    Raises:
        UserError: no such study, no such option, or an impossible value.
    """

    def add_folder(parser: ArgumentParser, name: str) -> None:
        if name in ("compare", "tune"):
            # They are commands of their own too, by which they are known.
            parser.prog = f"recbole-ssm {name}"
        folder = Path("saved", "study", name)
        what = f"where runs and tables are kept; default {folder}"
        parser.add_argument("--folder", type=Path, default=folder, help=what)

    usage = "[--folder=DIR] [--key=value ...]"
    if chosen := choose("study", "study", usage, STUDIES, MODULES, arguments, add_folder, with_keys=True):
        module, options, keys = chosen
        print(module.run(options, keys))
