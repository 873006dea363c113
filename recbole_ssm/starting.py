"""How a run begins: new, again as a checkpoint's run was, or on other data from a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_ssm.arguments import parse_options
from recbole_ssm.config import Config
from recbole_ssm.data.outline import item_tokens
from recbole_ssm.errors import UserError, shown
from recbole_ssm.keys import KEYS, Key
from recbole_ssm.model import get_model
from recbole_ssm.model.registry import build_model, class_of, known_model
from recbole_ssm.synonyms import renamed
from recbole_ssm.trainer import checkpoint, known_items
from recbole_ssm.trainer.transfer import require_same_shape, shaping_keys, transfer

Saved = tuple[Path, checkpoint.Checkpoint]
"""A checkpoint, and where it was read from."""

NOT_BY_A_FILE = ("checkpoint_dir", "log_wandb", "base_model_download")
"""What a run that goes on must be given again, if it is wanted."""


def configure(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: Iterable[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    command_line: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration of a run of one of our models or RecBole's; the arguments are those of :class:`Config`."""
    return Config(get_model, model, dataset, config_file_list, config_dict, command_line, base)


def read_resume(path: Path, allow_pickle: bool) -> Saved:
    """The checkpoint to go on from.

    Args:
        path: a ``.safetensors`` checkpoint, a folder of a run, or the folder above, for the newest whole one; or one of
            RecBole's ``.pth`` files.
        allow_pickle: whether the last may be, whose loading runs whatever code it holds.

    Raises:
        UserError: there is none, or it may not be read.
    """
    if path.suffix != ".pth":
        return checkpoint.find(path)
    if not allow_pickle:
        raise UserError(
            f"resume: {path} is a pickle, and loading one runs whatever code is in it; if you trust who made it, "
            "say --allow_pickle=True"
        )
    getLogger().warning(f"{path} is a pickle: loading it runs whatever code is in it")
    return path, checkpoint.read_pickle(path)


def configure_again(saved: Saved, model: str | type | None, **given: Any) -> Config:
    """The configuration of a checkpoint's run.

    Args:
        saved: the checkpoint.
        model: the class of its model, or its path, where it is one of the user's own.
        **given: arguments of :func:`configure`; what they say takes the place of the run's.

    Raises:
        UserError: the checkpoint is of another model, or something given is wrong.
    """
    path, found = saved
    try:
        base = {**found.info["training"]["options"], "dataset": found.info["config"]["dataset"]}
        name = found.info["model"]
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: it holds no training to go on with; take one that a run wrote") from error
    base = {key: value for key, value in base.items() if key not in NOT_BY_A_FILE}
    config = _configure_by(found, model, {**base, "model": name}, **given)
    class_of(found.info, path, config.model_class if "class" not in found.info or config.class_path else None)
    return config


def configure_ranker(saved: Saved, model: str | type | None, **given: Any) -> Config | None:
    """The configuration of the run for whose first stage a checkpoint was written; None where there is none, or where
    another model is asked for, as the first stage itself.

    Args:
        saved: the checkpoint.
        model: the model that is asked for, if one is.
        **given: arguments of :func:`configure`; what they say takes the place of the run's.

    Raises:
        UserError: something given is wrong.
    """
    path, found = saved
    ranker = found.info.get("for")
    options = {**(given["config_dict"] or {}), **parse_options(given["command_line"])}
    if ranker is None or (model or options.get("model", ranker["model"])) != ranker["model"]:
        return None
    base = {key: value for key, value in ranker["options"].items() if key not in NOT_BY_A_FILE}
    # The ranker's folder comes to lie beside the one of its first stage.
    base |= {"checkpoint_dir": str(path.parent.parent), "dataset": found.info.get("config", {}).get("dataset")}
    return _configure_by(found, model, {**base, "model": ranker["model"]}, **given)


def configure_data(saved: Saved, model: str | type | None, **given: Any) -> Config:
    """:func:`configure_again`, to read data for a trained model.

    Raises:
        UserError: also where a key is given that says something else than where and how data are read.
    """
    keys = renamed({**(given.get("config_dict") or {}), **parse_options(given.get("command_line", ()))})
    _refuse_settled(keys, KEYS)
    config = configure_again(saved, model, **given)
    _refuse_settled(keys, config.rows)
    return config


def _refuse_settled(keys: Iterable[str], rows: Mapping[str, Key]) -> None:
    for key in keys:
        scope = rows[key].scope if key in rows else None
        if scope in ("model", "training", "evaluation") or key in ("preset", "MAX_ITEM_LIST_LENGTH"):
            raise UserError(
                f"{key}: a trained model answers as it was trained, so this would change nothing; leave it out"
            )


def configure_from(saved: Saved, model: str | type | None, **given: Any) -> Config:
    """The configuration of a run that starts from a checkpoint's weights, on other data.

    Args:
        saved: the checkpoint.
        model: the class of its model, or its path, where it is one of the user's own.
        **given: arguments of :func:`configure`.

    Raises:
        UserError: the checkpoint is of another model or shape, or something given is wrong.
    """
    path, found = saved
    try:
        base, name = {"dataset": found.info["config"]["dataset"]}, found.info["model"]
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: its header is incomplete ({error})") from error
    config = _configure_by(found, model, {**base, "model": name}, **given)
    class_of(found.info, path, config.model_class if config.class_path else None)
    named = [given["dataset"], (given["config_dict"] or {}).get("dataset"), *given["command_line"]]
    if not any(str(option).startswith("--dataset=") or option == config["dataset"] for option in named):
        require_data(config)
    if getattr(config.model_class, "reads_text", False):
        raise UserError(f"init: {config['model']} reads titles; name a retriever_checkpoint in place of init")
    if config["model"] == found.info["model"]:
        config = _configure_by(found, model, {**base, "model": name, **shaping_keys(found, config.rows)}, **given)
    require_same_shape(found, path, config)
    return config


def _configure_by(found: checkpoint.Checkpoint, model: str | type | None, base: dict[str, Any], **given: Any) -> Config:
    """A configuration over options that come from a checkpoint, the model's name among them.

    The class that a file names is never imported: whoever loads it gives it again.
    """
    if "class" in found.info:
        del base["model"]
    else:
        known_model(base["model"])
    return configure(model, **given, base=base)


def require_data(config: Config) -> None:
    """Make sure that no data set is downloaded because a checkpoint names it.

    Raises:
        UserError: it is not there.
    """
    folder = Path(config["data_path"])
    if not any(folder.glob("*")):
        raise UserError(f"data_path: there are no data in {folder}; give the data_path that holds them now")


def require_same_items(dataset: Any, saved: Saved) -> None:
    """Make sure that a run goes on with the items that it had.

    Raises:
        UserError: some are new, gone or called otherwise.
    """
    path, found = saved
    # RecBole's own checkpoints hold no catalogue.
    now = item_tokens(dataset)
    before = known_items.items_of(found, path) if "catalogue" in found.info else now
    if before == now:
        return
    differing = {"new": sorted(set(now) - set(before)), "gone": sorted(set(before) - set(now))}
    found_out = [f"{len(names):,} {kind}, such as {shown(names[0])}" for kind, names in differing.items() if names]
    raise UserError(
        f"resume: the items are no longer those of {path}: {' and '.join(found_out) or 'they are in another order'}; "
        "to train on from its weights, give --init"
    )


def take_weights(recommender: Any, config: Config, dataset: Any, saved: Saved) -> None:
    """Take over a checkpoint's weights, item by item, and say how many it knew."""
    path, found = saved
    items = item_tokens(dataset)

    def build(settings: Mapping[str, Any], outline: Any) -> Any:
        return build_model(settings, outline, "cpu", config.model_class)

    with checkpoint.doubted(found, path):
        known = transfer(recommender, items, found, path, build)
    getLogger().info(
        f"weights of {path}: {known:,} of {len(items) - 1:,} items keep their vectors, the others are new; "
        f"{len(known_items.items_of(found, path)) - 1 - known:,} of the checkpoint's are not in this data set"
    )
