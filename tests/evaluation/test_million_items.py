"""Evaluating among a million items takes less than 1 GB beyond the model."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource, sys
import torch
from recbole_ssm.bench.untrained import random_histories, untrained_model
from recbole_ssm.data.evaluation import EvalBatch
from recbole_ssm.evaluation.ranks import Scorer
from recbole_ssm.ops import Seen

V, B, L = 1_000_000, 256, 50
model = untrained_model(sys.argv[1], V, torch.device("cpu"), MAX_ITEM_LIST_LENGTH=L).eval()
class Data:
    item_num, iid_field = V + 1, "item_id"
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
rows = random_histories(B, L, V, torch.device("cpu"))
seen = Seen(rows["item_id_list"].sort(1).values.flatten(), torch.arange(B + 1) * L)
batch = EvalBatch(rows, rows["item_id"], rows["item_length"], seen, None, None)
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
with torch.no_grad():
    ranks, _, best = Scorer(model, Data, 4096).rank(batch, int(sys.argv[2]))
print(json.dumps([resident, peak(), list(ranks.shape), list(best.shape)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("model", "k"), [("2Mamba4Rec", 0), ("2Mamba4Rec", 10), ("STAMP", 0)])
def test_a_million_items_within_a_gigabyte(model, k):
    """Ours by the op and with lists of items, and one of RecBole's by its own scores."""
    done = subprocess.run([sys.executable, "-c", CODE, model, str(k)], capture_output=True, text=True, check=True)
    loaded, peak, ranks, best = json.loads(done.stdout.splitlines()[-1])
    assert ranks == [256, 2] and best == [256, 2, k]
    assert peak - loaded < 1024
