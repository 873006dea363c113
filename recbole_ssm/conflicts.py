"""Config keys that are right one by one and cannot go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType

from recbole_ssm.data import temporal
from recbole_ssm.data.gaps import reads_times
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.keys import MASKED, OF_RANKS


def check_together(merged: Mapping[str, Any]) -> None:
    """Refuse what is right by itself and cannot go together.

    Raises:
        UserError: two keys contradict each other.
    """
    loss, negatives = merged.get("loss_type"), merged["train_neg_sample_args"]
    if loss in ("sampled_softmax", "gBCE") and negatives is not None:
        raise UserError(f"train_neg_sample_args: {loss} draws its own samples; set num_negatives instead")
    if loss == "BPR" and negatives is None:
        raise UserError("train_neg_sample_args: BPR needs negative samples, got None; leave the key out")
    if negatives and negatives.get("dynamic") and not negatives.get("candidate_num"):
        raise UserError("train_neg_sample_args: dynamic needs a candidate_num of at least 1, such as 10")
    _check_times(merged)
    if temporal.NAME in merged["eval_args"]["split"]:
        temporal.check_parts(merged["eval_args"]["split"][temporal.NAME])
    if merged["train_last"] and merged["train_newest"]:
        raise UserError("train_newest: train_last leaves targets too, with their whole histories; leave one empty")
    if merged["ties"] == "random" and (merged["legacy_time_order"] or merged["benchmark_filename"] is not None):
        legacy = merged["legacy_time_order"]
        why = "legacy_time_order rounds times" if legacy else "benchmark_filename's rows are made"
        raise UserError(f"ties: random needs times that are not touched, and {why}; take ties: file")
    _check_metrics(merged)


def _check_times(merged: Mapping[str, Any]) -> None:
    for key in ("query_enters", "query_calendar"):
        if merged.get(key) and merged.get("time") != "query":
            raise UserError(f"{key}: is of time: query, and time is {merged.get('time') or 'none'}; leave it out")
    if not reads_times(merged.get("time")):
        if merged.get("gap_enters"):
            raise UserError("gap_enters: is of time: gaps or query, and time is none; leave it out")
        return
    if merged["legacy_time_order"]:
        raise UserError(f"legacy_time_order: rounds times, which time: {merged['time']} reads; leave it out")
    if merged["transform"] not in (None, "mask_itemseq"):
        raise UserError(
            f"transform: {merged['transform']} moves the items of histories and not their times, which time: "
            f"{merged['time']} reads; leave it out"
        )


def _check_metrics(merged: Mapping[str, Any]) -> None:
    metrics = [merged["metrics"]] if isinstance(merged["metrics"], str) else merged["metrics"]
    cutoffs = [merged["topk"]] if isinstance(merged["topk"], int) else merged["topk"]
    of_ranks = [name for name, kind in metric_types.items() if kind == EvaluatorType.RANKING]
    for metric in metrics:
        if str(metric).lower() not in metric_types:
            near = did_you_mean(str(metric), of_ranks)
            raise UserError(f"metrics: '{metric}' is not one of {', '.join(of_ranks)}{near}")
    valid_metric = str(merged["valid_metric"]).lower()
    name, _, cutoff = valid_metric.removeprefix(MASKED).partition("@")
    ranking_metrics = {*of_ranks} - {"gauc"}
    if valid_metric.startswith(MASKED) and name not in OF_RANKS:
        raise UserError(f"valid_metric: '{merged['valid_metric']}': only {', '.join(OF_RANKS)} choose by masked lists")
    if name not in {str(metric).lower() for metric in metrics}:
        raise UserError(f"valid_metric: '{merged['valid_metric']}' is not among metrics: {metrics}; name one of them")
    if name in ranking_metrics and not (cutoff.isdigit() and int(cutoff) in cutoffs):
        raise UserError(f"valid_metric: '{merged['valid_metric']}' needs its cut-off in topk: {cutoffs}; add it there")
