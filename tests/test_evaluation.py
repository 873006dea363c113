"""Invariant 5: the metrics that a run reports are those of RecBole's evaluator, and of their definitions."""

import math

import torch
from recbole.data import data_preparation

from recbole_ssm.data import create_dataset
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import Trainer


def test_metrics_equal_recboles_and_their_definitions(toy):
    import recbole.trainer

    options = {**toy["config_dict"], "topk": [5], "valid_metric": "NDCG@5", "metric_decimal_place": 10}
    config = configure("Mamba4Rec", toy["dataset"], config_dict=options)
    _, _, test = data_preparation(config, create_dataset(config))
    torch.manual_seed(3)
    model = get_model("Mamba4Rec")(config, test._dataset).eval()
    found = Trainer(config, model).evaluate(test, load_best_model=False)
    assert found == recbole.trainer.Trainer(config, model).evaluate(test, load_best_model=False)
    hit = ndcg = mrr = 0.0
    data = test._dataset.inter_feat
    with torch.no_grad():
        scores = model.full_sort_predict(data)
    scores[:, 0] = -torch.inf
    for row, target in zip(scores, data["item_id"].tolist()):
        rank = int((row > row[target]).sum()) + 1
        if rank <= 5:
            hit, ndcg, mrr = hit + 1, ndcg + 1 / math.log2(rank + 1), mrr + 1 / rank
    users = len(data)
    for name, value in (("hit@5", hit), ("ndcg@5", ndcg), ("mrr@5", mrr)):
        assert abs(found[name] - value / users) < 1e-9
