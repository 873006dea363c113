"""Models by the names that users type: ours, and every sequential model of RecBole's."""

from __future__ import annotations

import pkgutil
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import recbole.model.sequential_recommender as recbole_models
import torch

from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.keys import shown

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
    """The model class of that name, ours or a sequential model of RecBole's.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    if name in REFUSED:
        raise UserError(f"model: {name} {REFUSED[name]}")
    found = MODELS.get(name) or _recbole_models().get(name)
    if found is None:
        hint = did_you_mean(name, model_names()) or f"; known are {', '.join(model_names())}"
        raise UserError(f"model: there is no sequential model {shown(name)}{hint}")
    return found


def build_model(settings: Mapping[str, Any], dataset: Any, device: torch.device | str) -> Any:
    """The model of a checkpoint's settings, with the weights that it starts from, on the device.

    Args:
        settings: what a checkpoint's header holds as ``config``.
        dataset: a data set, or as much of one as the model asks for.
        device: where the model is to run.

    Raises:
        UserError: there is no such model, or it asks the data set for more than there is.
    """
    # RecBole's models read keys that no default is shipped for, and expect None.
    config = defaultdict(lambda: None, settings, device=device)
    return get_model(config["model"])(config, dataset).to(device)


def _recbole_models() -> dict[str, Any]:
    modules = [module.name for module in pkgutil.iter_modules(recbole_models.__path__)]
    classes = {name.lower(): value for name, value in vars(recbole_models).items() if isinstance(value, type)}
    return {classes[name].__name__: classes[name] for name in modules if name in classes}
