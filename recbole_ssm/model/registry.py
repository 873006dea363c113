"""Models by the names that users type: ours, every sequential model of RecBole's, and a user's own class."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import recbole.model.sequential_recommender as recbole_models
import torch
from recbole.model.abstract_recommender import SequentialRecommender

from recbole_ssm.errors import UserError, did_you_mean, shown

MODELS: dict[str, Any] = {}
"""Our own models; :mod:`recbole_ssm.model` lists them."""

_VECTORS = "reads pretrained vectors of a knowledge graph, which are not read here; take GRU4RecF"
REFUSED = {
    "S3Rec": "hands its pre-training on as a pickle, which is never loaded here; take SASRec",
    "KSR": _VECTORS,
    "GRU4RecKG": _VECTORS,
}
"""RecBole's sequential models that cannot be trained here, and why."""


def model_names() -> list[str]:
    """Every name that ``--model`` takes: ours, then RecBole's sequential models."""
    return [*MODELS, *sorted(set(_recbole_models()) - set(MODELS) - set(REFUSED))]


def get_model(name: str) -> Any:
    """The model class of that name: ours, a sequential model of RecBole's, or the class that
    ``package.module:Class`` names, which is imported from the working folder or from what is
    installed.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    return _imported(name) if ":" in name else known_model(name)


def known_model(name: str) -> Any:
    """:func:`get_model` of a name that a file holds: nothing is imported for it.

    Raises:
        UserError: there is no such model among ours and RecBole's.
    """
    if name in REFUSED:
        raise UserError(f"model: {name} {REFUSED[name]}")
    found = MODELS.get(name) or _recbole_models().get(name)
    if found is None:
        hint = did_you_mean(name, model_names()) or f"; known are {', '.join(model_names())}"
        raise UserError(f"model: there is no sequential model {shown(name)}{hint}")
    return found


def class_of(info: Mapping[str, Any], path: object, model: str | type | None = None) -> Any:
    """The class of a checkpoint's model.

    Args:
        info: the checkpoint's header.
        path: where it was read from, for the error.
        model: the class or its name, as the caller knows it; a user's own class must be given so,
            because the path that a file names is never imported.

    Raises:
        UserError: the checkpoint is of an own class, and ``model`` is not it.
    """
    own = info.get("class")
    found: Any = get_model(model) if isinstance(model, str) else model
    if own is None:
        known = known_model(info["model"])
        right = found in (None, known)
        found = found or known
    elif found is None:
        raise UserError(
            f"checkpoint {path}: its model is the class {own}, and what a file names is not imported; give the class "
            f"as model={own.rpartition(':')[2]}, or its path as --model={own}"
        )
    else:
        right = found.__qualname__ == own.rpartition(":")[2]
    if not right:
        raise UserError(f"checkpoint {path}: its model is {own or info['model']}, not {found.__qualname__}")
    return found


def build_model(
    settings: Mapping[str, Any],
    dataset: Any,
    device: torch.device | str,
    model_class: Any = None,
) -> Any:
    """The model of a checkpoint's settings, with the weights that it starts from, on the device.

    One of ours or RecBole's is built without memory first, so that sizes that cannot be are an error before they take
    any.

    Args:
        settings: what a checkpoint's header holds as ``config``.
        dataset: a data set, or as much of one as the model asks for.
        device: where the model is to run.
        model_class: its class; None takes the one of its name.

    Raises:
        UserError: there is no such model, or it asks the data set for more than there is.
    """
    model = model_class or known_model(settings["model"])
    known = model.__module__.startswith(("recbole.", "recbole_ssm."))
    # RecBole's models read keys that no default is shipped for, and expect None.
    config = defaultdict(lambda: None, settings)
    if known and not getattr(model, "reads_text", False):
        with torch.device("meta"):
            model(config | {"device": torch.device("meta")}, dataset)
    return model(config | {"device": device}, dataset).to(device)


def _imported(path: str) -> type:
    """The class that ``package.module:Class`` names."""
    module, _, name = path.partition(":")
    folder = os.getcwd()  # what is imported may change it
    sys.path.insert(0, folder)
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"model: {shown(path)} cannot be imported ({error}); it reads package.module:Class") from error
    finally:
        sys.path.remove(folder)
    if folder not in sys.path:
        # The class may import what lies beside it later, as when it is built; last, the folder hides nothing.
        sys.path.append(folder)
    if not isinstance(found, type) or not issubclass(found, SequentialRecommender):
        raise UserError(f"model: {path} is no class of RecBole's SequentialRecommender")
    return found


def _recbole_models() -> dict[str, Any]:
    modules = [module.name for module in pkgutil.iter_modules(recbole_models.__path__)]
    classes = {name.lower(): value for name, value in vars(recbole_models).items() if isinstance(value, type)}
    return {classes[name].__name__: classes[name] for name in modules if name in classes}
