"""Recommending for many users takes little memory beyond the model."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource
import numpy as np, torch
from recbole_ssm.data.outline import DatasetOutline
from recbole_ssm.model.registry import build_model
from recbole_ssm.quick_start import configure
from recbole_ssm.serving import Recommender

items = ["[PAD]", *(f"item {n}" for n in range(12_101))]
config = configure("2Mamba4Rec", "toy", config_dict={"use_gpu": False, "MAX_ITEM_LIST_LENGTH": 50})
model = build_model(config.final_config_dict, DatasetOutline({"item_id": len(items)}), "cpu")
recommender = Recommender(model, config, items)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
recommender.recommend(items[1:51])
before = peak()
draw = np.random.default_rng(0)
histories = [[items[n] for n in draw.integers(1, 12_102, draw.integers(1, 51))] for _ in range(19_412)]
answers = recommender.recommend_many(histories, 10)
print(json.dumps([before, peak(), len(answers)]))
"""


@pytest.mark.slow
def test_nineteen_thousand_histories_within_500_mb():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, after, answers = json.loads(done.stdout.splitlines()[-1])
    assert answers == 19_412
    # MiB; the histories and the answers as Python's lists are among them.
    assert after - before < 500
