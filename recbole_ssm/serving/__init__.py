"""Trained models at work."""

from recbole_ssm.serving.recommender import Recommender, load_recommender, recommender_of
from recbole_ssm.serving.session import Session, Stepper

__all__ = ["Recommender", "Session", "Stepper", "load_recommender", "recommender_of"]
