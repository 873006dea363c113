"""The models, by the names that users type. A new one is a module here and a row of the table
below.
"""

from __future__ import annotations

from recbole_ssm import compat

compat.install()

from recbole_ssm.model.baselines import Pop, RepeatNewest  # noqa: E402
from recbole_ssm.model.bert4rec import BERT4Rec  # noqa: E402
from recbole_ssm.model.gpt4rec import GPT4Rec  # noqa: E402
from recbole_ssm.model.gru4rec import GRU4Rec  # noqa: E402
from recbole_ssm.model.hydra4rec import Hydra4Rec  # noqa: E402
from recbole_ssm.model.llamarec import LlamaRec  # noqa: E402
from recbole_ssm.model.mamba4rec import Mamba4Rec  # noqa: E402
from recbole_ssm.model.packed import PackedRecommender  # noqa: E402
from recbole_ssm.model.registry import MODELS, get_model, model_names  # noqa: E402
from recbole_ssm.model.sasrec import SASRec  # noqa: E402
from recbole_ssm.model.ssm import SSMRecommender  # noqa: E402
from recbole_ssm.model.two_mamba4rec import TwoMamba4Rec  # noqa: E402

MODELS |= {
    "Mamba4Rec": Mamba4Rec,
    "2Mamba4Rec": TwoMamba4Rec,
    "Hydra4Rec": Hydra4Rec,
    "LlamaRec": LlamaRec,
    "GPT4Rec": GPT4Rec,
    # These two take the place of RecBole's: the same weights and scores, packed.
    "SASRec": SASRec,
    "GRU4Rec": GRU4Rec,
    # And this one, which reads the oldest event of a history too.
    "BERT4Rec": BERT4Rec,
    "Pop": Pop,
    "RepeatNewest": RepeatNewest,
}

STATE_SPACE = tuple(name for name, model in MODELS.items() if issubclass(model, SSMRecommender))
"""Our models of state-space layers, which studies and benchmarks compare with the others."""
NEURAL_BASELINES = ("SASRec", "GRU4Rec")
"""What they are compared with: models of attention and of recurrent layers, packed as they are."""

__all__ = [
    "MODELS",
    "NEURAL_BASELINES",
    "STATE_SPACE",
    "BERT4Rec",
    "GPT4Rec",
    "GRU4Rec",
    "Hydra4Rec",
    "LlamaRec",
    "Mamba4Rec",
    "PackedRecommender",
    "Pop",
    "RepeatNewest",
    "SASRec",
    "SSMRecommender",
    "TwoMamba4Rec",
    "get_model",
    "model_names",
]
