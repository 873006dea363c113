"""Language models as recommenders: base models, titles, and what the models built on them share."""

from recbole_ssm.llm.base import BaseModel, LanguageModelRecommender, load_base_model
from recbole_ssm.llm.titles import titles_of

__all__ = ["BaseModel", "LanguageModelRecommender", "load_base_model", "titles_of"]
