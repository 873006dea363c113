"""Language models as recommenders: base models, titles, and what the models built on them share."""

from recbole_ssm import compat

compat.install()

from recbole_ssm.llm.base import BaseModel, load_base_model  # noqa: E402
from recbole_ssm.llm.model import LanguageModelRecommender  # noqa: E402
from recbole_ssm.llm.titles import titles_of  # noqa: E402

__all__ = ["BaseModel", "LanguageModelRecommender", "load_base_model", "titles_of"]
