"""The first stage of a ranker: how its retriever is configured, and where its trained weights
come from.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

from recbole.model.abstract_recommender import AbstractRecommender

from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.errors import UserError, shown
from recbole_ssm.keys import KEYS
from recbole_ssm.synonyms import renamed
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer.checkpoint import Checkpoint, load_weights, plain, settings_of


class Retriever(NamedTuple):
    """A ranker's retriever before the ranker is built."""

    settings: dict[str, Any]
    """The configuration with which it was trained, or will be."""
    weights: Callable[[], tuple[Path, Checkpoint]] | None
    """Trains it or reads it; None where the ranker's own checkpoint holds its weights."""

    def load_into(self, ranker: Any) -> None:
        """Give the ranker's ``retriever`` its weights; it is trained now if it must be."""
        if self.weights is not None:
            path, found = self.weights()
            load_weights(ranker.retriever, found, path)
            ranker.settings["retriever_checkpoint"] = str(path)


def find_retriever(
    config: Any,
    saved: Checkpoint | None,
    configure: Callable[..., Any],
    train: Callable[[Any], str],
) -> Retriever:
    """The retriever of a ranker's configuration.

    Args:
        config: the ranker's configuration. ``retriever_checkpoint`` names a trained retriever,
            ``retriever`` and ``retriever_config`` one to train.
        saved: the ranker's own checkpoint, where its run goes on from one.
        configure: makes a configuration from a model's name, a data set's and ``config_dict``.
        train: trains a configuration and returns the path of its best checkpoint.

    Raises:
        UserError: ``retriever_config`` asks for other data than the ranker's; or the named retriever
            is of another model, or was trained on other rows than this run's training part.
    """
    if saved is not None:
        settings = saved.info.get("config", {}).get("retriever_settings")
        if not isinstance(settings, dict) or "model" not in settings:
            raise UserError("resume: the checkpoint does not say how its retriever was configured; take another one")
        return Retriever(settings, None)
    if config["retriever_checkpoint"] is None:
        own = _config_of(config, config["retriever_config"] or {}, configure)

        def trained() -> tuple[Path, Checkpoint]:
            path = Path(train(own))
            return path, checkpoint.read(path)

        return Retriever(settings_of(own), trained)
    try:
        path, found = checkpoint.find_best(Path(config["retriever_checkpoint"]))
    except UserError as error:
        raise UserError(f"retriever_checkpoint: {error}") from error
    _check_rows(config, path, found, configure)
    _warn_of_unfinished(path.parent)
    return Retriever(found.info["config"], lambda: (path, found))


def _warn_of_unfinished(folder: Path) -> None:
    """Say so where the retriever's run has epochs left; a best checkpoint alone does not tell."""
    with suppress(UserError, KeyError, TypeError):
        newest, found = checkpoint.newest(folder)
        done, options = found.info["training"], found.info["config"]
        left = done["epoch"] < options["epochs"] and done["cur_step"] <= options["stopping_step"]
        if left and newest.name != checkpoint.BEST:
            getLogger().warning(
                f"retriever_checkpoint: the run in {folder} has ended {done['epoch']} of {options['epochs']} epochs; "
                "to train the others first, recbole-ssm train "
                f"--resume={shlex.quote(str(folder))} --model={found.info['model']}"
            )


def check_retriever(options: Mapping[str, Any], find_model: Callable[[str], type]) -> None:
    """Refuse options of a retriever that cannot work.

    Args:
        options: ``retriever``, ``retriever_config`` and ``retriever_checkpoint``.
        find_model: the class of a model's name.

    Raises:
        UserError: a value is impossible, or does not go with another.
    """
    own = options["retriever_config"] or {}
    if "model" in own:
        raise UserError(f"retriever_config: its model stands beside it; give retriever: {own['model']}")
    if ":" in options["retriever"]:
        raise UserError(
            f"retriever: must be the name of a model, got {options['retriever']}; no class is imported here"
        )
    model: Any = find_model(options["retriever"])
    if getattr(model, "reads_text", False):
        raise UserError(f"retriever: {options['retriever']} is a ranker itself; try retriever: 2Mamba4Rec")
    if model.full_sort_predict is AbstractRecommender.full_sort_predict:
        raise UserError(
            f"retriever: {options['retriever']} scores one item at a time, and a retriever scores all; try retriever: "
            "2Mamba4Rec"
        )
    if own and options["retriever_checkpoint"] is not None:
        raise UserError("retriever_config: retriever_checkpoint names one that is trained; leave one of them empty")


def _config_of(config: Any, options: Mapping[str, Any], configure: Callable[..., Any]) -> Any:
    """The configuration of the ranker's retriever: ``options``, and the ranker's but for those of its model and of its
    training.

    Raises:
        UserError: it would read other data than the ranker, or split them otherwise.
    """
    shared = {key for key, row in KEYS.items() if row.scope not in ("model", "training")} - {"model", "preset"}
    given = {key: value for key, value in config.external_config_dict.items() if key in shared}
    given["MAX_ITEM_LIST_LENGTH"] = config["MAX_ITEM_LIST_LENGTH"]
    own = configure(config["retriever"], None, config_dict={"dataset": config["dataset"], **given, **options})
    for key in ("data_path", *(key for key, row in KEYS.items() if row.scope == "data")):
        if own[key] != config[key] and key == "load_col" and key not in options:
            raise UserError(
                f"retriever: {config['retriever']} reads columns that this run does not load; give load_col: {own[key]}"
            )
        if own[key] != config[key]:
            raise UserError(
                f"retriever_config: {key} is the ranker's too, as another one could show the retriever what is tested; "
                f"it is {shown(own[key])} there and {shown(config[key])} here, so give {key} beside retriever_config"
            )
    return own


def _check_rows(config: Any, path: Path, found: Checkpoint, configure: Callable[..., Any]) -> None:
    """Refuse a trained retriever that may know what the ranker is tested on."""
    if not found.info.get("training") or not found.info.keys() >= {"config", "model"}:
        raise UserError(f"retriever_checkpoint: {path} does not say how it was trained; take one that a run wrote")
    if found.info["model"] != config["retriever"]:
        raise UserError(f"retriever: {path} is of {found.info['model']}; set retriever: {found.info['model']}")
    # It may read times, or have learned from a part of the rows, which the seed may have drawn.
    learned = {key for key, row in KEYS.items() if row.scope in ("model", "training")} | {"seed"}
    options = renamed(found.info["training"].get("options", {}))
    options = {key: value for key, value in options.items() if key in learned}
    own = _config_of(config, options, configure)
    train_data, _, _ = create_loaders(own, create_dataset(own))
    # The split counts too: the best epoch was chosen on the retriever's own validation part,
    # which must not be what this run tests on.
    split = (found.info["config"].get("eval_args") or {}).get("split")
    same_split = split == plain(config["eval_args"]["split"])
    if not same_split or train_data.fingerprint() != found.info["training"].get("fingerprint"):
        raise UserError(
            f"retriever_checkpoint: {path} was trained on other rows than this run's training part, and may know the "
            "targets; train it with the same data set, split and MAX_ITEM_LIST_LENGTH"
        )
