"""Judging a model, without a trainer: ranks of targets, metrics from ranks, tests of significance."""
