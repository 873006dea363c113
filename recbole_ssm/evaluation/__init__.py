"""Judging a model: ranks of targets, metrics from ranks, and tests of significance. No trainer is needed here."""
