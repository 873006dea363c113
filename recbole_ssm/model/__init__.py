"""The models, by the names that users type."""

from __future__ import annotations

import pkgutil
from typing import Any

from recbole_ssm import compat

compat.install()

import recbole.model.sequential_recommender as recbole_models  # noqa: E402

from recbole_ssm.errors import UserError, did_you_mean  # noqa: E402
from recbole_ssm.model.gpt4rec import GPT4Rec  # noqa: E402
from recbole_ssm.model.gru4rec import GRU4Rec  # noqa: E402
from recbole_ssm.model.hydra4rec import Hydra4Rec  # noqa: E402
from recbole_ssm.model.llamarec import LlamaRec  # noqa: E402
from recbole_ssm.model.mamba4rec import Mamba4Rec  # noqa: E402
from recbole_ssm.model.packed import PackedRecommender  # noqa: E402
from recbole_ssm.model.recommender import SSMRecommender  # noqa: E402
from recbole_ssm.model.sasrec import SASRec  # noqa: E402
from recbole_ssm.model.two_mamba4rec import TwoMamba4Rec  # noqa: E402

MODELS: dict[str, Any] = {
    "Mamba4Rec": Mamba4Rec,
    "2Mamba4Rec": TwoMamba4Rec,
    "Hydra4Rec": Hydra4Rec,
    "LlamaRec": LlamaRec,
    "GPT4Rec": GPT4Rec,
    "SASRec": SASRec,  # these two in place of RecBole's: the same weights and scores, packed
    "GRU4Rec": GRU4Rec,
}

__all__ = [
    "MODELS",
    "GPT4Rec",
    "GRU4Rec",
    "Hydra4Rec",
    "LlamaRec",
    "Mamba4Rec",
    "PackedRecommender",
    "SASRec",
    "SSMRecommender",
    "TwoMamba4Rec",
    "get_model",
    "model_names",
]


def _recbole_models() -> dict[str, Any]:
    modules = [m.name for m in pkgutil.iter_modules(recbole_models.__path__)]
    classes = {name.lower(): value for name, value in vars(recbole_models).items() if isinstance(value, type)}
    return {classes[name].__name__: classes[name] for name in modules if name in classes}


def model_names() -> list[str]:
    """Every name that ``--model`` takes: ours, then RecBole's sequential models."""
    return [*MODELS, *sorted(set(_recbole_models()) - set(MODELS))]


def get_model(name: str) -> Any:
    """The model class of that name, ours or a sequential model of RecBole's.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    if name == "S3Rec":
        raise UserError("model: S3Rec hands its pre-training on as a pickle, which is never loaded here; take SASRec")
    found = MODELS.get(name) or _recbole_models().get(name)
    if found is None:
        hint = did_you_mean(name, model_names()) or f"; known are {', '.join(model_names())}"
        raise UserError(f"model: there is no sequential model '{name}'{hint}")
    return found
