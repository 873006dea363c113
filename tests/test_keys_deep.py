"""Each value that the table of keys accepts builds each of our models and trains it for a step, or is one line.

The values are the bounds and the choices of a key's kind; of what has no bound, twice the default.
"""

import ast
import math

import pytest
import torch

from recbole_ssm.errors import UserError
from recbole_ssm.kinds import Choice, Either, Fields, Filter, Flag, Many, Number, Only, Split, Table
from recbole_ssm.model import MODELS
from recbole_ssm.quick_start import configure, run_recbole_ssm

SPLITS = {name: [0.8, 0.1, 0.1] for name in Split.known if name != "LS"}
# What text may be, where a pattern alone does not say it.
TEXTS = {
    "lr_scheduler": [
        name
        for name, found in vars(torch.optim.lr_scheduler).items()
        if isinstance(found, type) and issubclass(found, torch.optim.lr_scheduler.LRScheduler)
    ],
    "valid_metric": ["MRR@10", "NDCG@1", "Recall@10", "AUC"],
    "metrics": ["Recall", ["GAUC"], ["AUC", "Hit"], ["ItemCoverage", "AveragePopularity", "GiniIndex", "Hit"]],
    "state": ["debug", "ERROR"],
    "gpu_id": ["", "0", "0,1"],
    "normalize_field": [["timestamp"]],
    "retriever": ["SASRec", "Mamba4Rec", "Pop"],
    "field_separator": ["\t", "::"],
    "learner_args": [{"betas": [0.5, 0.9]}, {"momentum": 0.9}, {}],
    "learner_groups": [{"*": {"lr": 0.1}}, {"zzz*": {"lr": 0.1}}, {}],
    "adaptive_batch_args": [{"batch_max": 64}, {}],
    "clip_grad_norm": [{"max_norm": 1e-3}, {"max_norm": 5, "norm_type": "inf"}, {"max_norm": 1, "foreach": None}],
}
# One process is as good as 512, and each takes its time to start.
FEW = {"worker": [0, 1]}
SMALL = {
    "epochs": 1, "train_rows": 40, "eval_rows": 6, "hidden_size": 16, "d_state": 4, "head_dim": 8, "inner_size": 16,
    "embedding_size": 16, "num_candidates": 4, "prompt_history": 3, "prompt_tokens": 256, "num_queries": 2,
    "retriever_config": {"epochs": 1, "hidden_size": 8, "head_dim": 8},
    "random_base_args": {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
}  # fmt: skip


def examples(kind, default):
    """Values of a kind: all choices, the ends of a range, one list or mapping for each value within."""
    if isinstance(kind, Flag):
        return [True, False]
    if isinstance(kind, Choice):
        return list(kind.values)
    if isinstance(kind, Only):
        return [kind.value]
    if isinstance(kind, Number):
        low, high, has_low, has_high = kind.range
        step = 1 if kind.whole else 1e-3
        known = default if isinstance(default, (int, float)) and not isinstance(default, bool) else 1
        ends = [low if has_low else low + step] if low > -math.inf else [-1]
        ends += [high if has_high else high - step] if high < math.inf else [2 * known]
        return [int(end) if kind.whole else float(end) for end in ends]
    if isinstance(kind, Either):
        return [value for part in kind.kinds for value in examples(part, default)]
    if isinstance(kind, Many):
        first = default[0] if isinstance(default, list) and default else None
        single = examples(kind.of, first)
        return [[value] * (kind.length or 1) for value in single] + (single if kind.or_one else [])
    if isinstance(kind, Filter):
        return ["[1,inf)", "(0,2];[3,100]"]
    if isinstance(kind, Split):
        return [{"LS": way} for way in Split.leave_one_out] + [{name: share} for name, share in SPLITS.items()]
    if isinstance(kind, Table):
        return [ast.literal_eval(kind.example)]
    if isinstance(kind, Fields):
        plain = {name: examples(kind.known[name], None)[0] for name in kind.needs}
        return [{**plain, name: value} for name, of in kind.known.items() for value in examples(of, None)] or [plain]
    return []


def keys():
    for model in MODELS:
        config = configure(model, "made")
        for name, row in config.rows.items():
            if not row.refused:
                yield pytest.param(model, name, id=f"{model}-{name}")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), keys())
def test_what_is_accepted_trains_a_step_or_is_refused_in_one_line(model, name, titled):
    config = configure(model, **titled)
    row, default = config.rows[name], config[name]
    known = {key: value for key, value in SMALL.items() if key in config.rows}
    values = [*FEW.get(name, TEXTS.get(name, examples(row.kind, default))), *([None] if row.empty else [])]
    trained = 0
    for value in values:
        options = {**titled["config_dict"], **known, name: value}
        try:
            run_recbole_ssm(model, titled["dataset"], config_dict=options, saved=False)
            trained += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
        except Exception as error:
            raise AssertionError(f"{name}: {value!r}: {type(error).__name__}: {error}") from error
    assert trained or not values or name in TEXTS, f"no value of {name} trains"
