"""The first stage of a ranker: how its retriever is configured, and where its trained weights
come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.errors import UserError
from recbole_ssm.keys import KEYS
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
        UserError: the named retriever is of another model, or was trained on other rows than
            this run's training part.
    """
    if saved is not None:
        settings = saved.info.get("config", {}).get("retriever_settings")
        if not isinstance(settings, dict) or "model" not in settings:
            raise UserError("resume: the checkpoint does not say how its retriever was configured; take another one")
        return Retriever(settings, None)
    own = _config_of(config, configure)
    if config["retriever_checkpoint"] is None:

        def trained() -> tuple[Path, Checkpoint]:
            path = Path(train(own))
            return path, checkpoint.read(path)

        return Retriever(settings_of(own), trained)
    path, found = checkpoint.find_best(Path(config["retriever_checkpoint"]))
    _check_rows(config, own, path, found)
    return Retriever(found.info["config"], lambda: (path, found))


def check_retriever(options: Mapping[str, Any], find_model: Callable[[str], type]) -> None:
    """Refuse options of a retriever that cannot work.

    Args:
        options: ``retriever``, ``retriever_config`` and ``retriever_checkpoint``.
        find_model: the class of a model's name.

    Raises:
        UserError: a value is impossible, or does not go with another.
    """
    own = options["retriever_config"] or {}
    for key in own:
        if key in ("model", "data_path") or (key in KEYS and KEYS[key].scope == "data"):
            raise UserError(
                f"retriever_config: {key} is the ranker's too, as another one could show the retriever what is "
                f"tested; give {key} beside retriever_config"
            )
    if ":" in options["retriever"]:
        raise UserError(
            f"retriever: must be the name of a model, got {options['retriever']}; no class is imported here"
        )
    if getattr(find_model(options["retriever"]), "reads_text", False):
        raise UserError(f"retriever: {options['retriever']} is a ranker itself; try retriever: 2Mamba4Rec")
    if own and options["retriever_checkpoint"] is not None:
        raise UserError("retriever_config: retriever_checkpoint names one that is trained; leave one of them empty")


def _config_of(config: Any, configure: Callable[..., Any]) -> Any:
    """``retriever_config``, with the ranker's options but for those of its model and of its training."""
    shared = {key for key, row in KEYS.items() if row.scope not in ("model", "training")} - {"model"}
    options = {key: value for key, value in config.external_config_dict.items() if key in shared}
    options |= {**(config["retriever_config"] or {}), "MAX_ITEM_LIST_LENGTH": config["MAX_ITEM_LIST_LENGTH"]}
    return configure(config["retriever"], config["dataset"], config_dict=options)


def _check_rows(config: Any, own: Any, path: Path, found: Checkpoint) -> None:
    """Refuse a trained retriever that may know what the ranker is tested on."""
    if not found.info.get("training") or not found.info.keys() >= {"config", "model"}:
        raise UserError(f"retriever_checkpoint: {path} does not say how it was trained; take one that a run wrote")
    if found.info["model"] != config["retriever"]:
        raise UserError(f"retriever: {path} is of {found.info['model']}; set retriever: {found.info['model']}")
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
