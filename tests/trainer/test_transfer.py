"""Training on from a checkpoint's weights on data that has other users, events and items."""

from pathlib import Path

import pytest
import torch

from recbole_ssm import run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import load_data_and_model
from recbole_ssm.trainer import Hook, checkpoint, known_items


class FirstWeights(Hook):
    """Keeps the weights with which training starts."""

    def on_fit_start(self, trainer, train_data):
        self.weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        self.items = [str(token) for token in train_data._dataset.field2id_token["item_id"]]


def lines(users, items):
    rows = [f"u{u}\ti{(u + j) % items}\t{j}" for u in range(users) for j in range(8)]
    return "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n"


@pytest.fixture
def runs(write_dataset):
    """A run on 20 items, and the options of a data set of the same name with 24 of which 4 are new."""

    def make(model, **options):
        given = write_dataset(lines(30, 20))
        given["config_dict"] |= {
            "epochs": 1,
            "topk": [1, 5],
            "valid_metric": "NDCG@5",
            "state": "WARNING",
            "show_progress": False,
            **options,
        }
        first = run_recbole_ssm(model, **given)
        write_dataset(lines(40, 24))
        return first, given

    return make


@pytest.mark.parametrize("model", ["2Mamba4Rec", "SASRec", "BERT4Rec"])
def test_an_item_keeps_its_vector_by_its_token(runs, model):
    first, given = runs(model)
    saved = checkpoint.read(Path(first["checkpoint"]))
    start = FirstWeights()
    run_recbole_ssm(model, **given, init=first["checkpoint"], hooks=[start])
    before = known_items.items_of(saved, Path())
    assert start.items != before and len(start.items) == len(before) + 4
    for name, now in start.weights.items():
        then = saved.tensors[f"model.{name}"]
        if now.shape == then.shape:
            torch.testing.assert_close(now, then, rtol=0, atol=0)
            continue
        assert now.shape[0] == then.shape[0] + 4
        for index, token in enumerate(before):
            torch.testing.assert_close(now[start.items.index(token)], then[index], rtol=0, atol=0)
        # Entries of a model's own, behind the items: BERT4Rec's mask.
        torch.testing.assert_close(now[len(start.items) :], then[len(before) :], rtol=0, atol=0)


def test_keys_that_shape_the_model_are_the_checkpoints(runs):
    first, given = runs("2Mamba4Rec", hidden_size=32, MAX_ITEM_LIST_LENGTH=6)
    del given["config_dict"]["hidden_size"], given["config_dict"]["MAX_ITEM_LIST_LENGTH"]
    given["config_dict"] |= {"dropout_prob": 0.3}
    folder = Path(first["checkpoint"]).parent
    again = run_recbole_ssm(None, **given, init=folder)
    assert checkpoint.read(Path(again["checkpoint"])).info["config"]["hidden_size"] == 32
    given["config_dict"] |= {"hidden_size": 64}
    with pytest.raises(UserError, match="init: hidden_size is 64 here and was 32"):
        run_recbole_ssm(None, **given, init=folder)
    del given["config_dict"]["dropout_prob"]
    with pytest.raises(UserError, match="of 2Mamba4Rec, cannot start SASRec"):
        run_recbole_ssm("SASRec", **given, init=folder)
    assert main([f"--init={folder}", f"--resume={folder}"]) == 2


def test_a_resumed_run_says_that_the_items_changed(runs):
    first, given = runs("2Mamba4Rec")
    with pytest.raises(UserError, match="resume: the items are no longer those of .*: 4 new, such as 'i20'"):
        run_recbole_ssm(**{**given, "config_dict": given["config_dict"] | {"epochs": 2}}, resume=first["checkpoint"])
    # A setting that differs is refused before the data is read.
    data = Path(given["config_dict"]["data_path"])
    next(data.rglob("*.inter")).unlink()
    with pytest.raises(UserError, match="resume: hidden_size is 32 here and was 64"):
        run_recbole_ssm(resume=first["checkpoint"], config_dict={"hidden_size": 32})


def test_the_data_set_and_the_model_of_a_run_come_back(runs, write_dataset):
    first, _ = runs("2Mamba4Rec")
    # The newest run of a folder of runs.
    config, model, dataset, train, valid, test = load_data_and_model(Path(first["checkpoint"]).parent.parent)
    saved = checkpoint.read(Path(first["checkpoint"]))
    # The four items that the checkpoint does not know are left out.
    assert [str(token) for token in dataset.field2id_token["item_id"]][1:] != []
    assert set(map(str, dataset.field2id_token["item_id"])) == set(known_items.items_of(saved, Path()))
    assert not model.training and len(train) and len(valid) and len(test)
    assert config["model"] == "2Mamba4Rec"
