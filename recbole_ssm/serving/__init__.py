"""Trained models at work."""

from recbole_ssm.serving.recommender import Recommender, load_recommender

__all__ = ["Recommender", "load_recommender"]
