"""What is done with a trained model and many users at once: recommend, evaluate, export."""

from __future__ import annotations

from recbole_ssm.commands.evaluate import evaluate
from recbole_ssm.commands.export import export_model, export_vectors
from recbole_ssm.commands.recommend import recommend_users, write_recommendations

__all__ = ["evaluate", "export_model", "export_vectors", "recommend_users", "write_recommendations"]
