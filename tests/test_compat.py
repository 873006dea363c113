"""One test for each patch of recbole_ssm.compat, and for what our subclasses put right for RecBole's models too."""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from recbole_ssm import compat, run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure

BASELINES = ["SASRec", "GRU4Rec", "BERT4Rec", "STAMP"]


class Bomb:
    """Unpickling one leaves a file behind."""

    def __reduce__(self):
        return (os.mkdir, ("bomb-went-off",))


@pytest.mark.parametrize("model", BASELINES)
def test_recbole_models_run(model, toy):
    toy["config_dict"] |= {"epochs": 1}
    result = run_recbole_ssm(model, **toy)
    assert set(result) >= {"best_valid_score", "valid_score_bigger", "best_valid_result", "test_result"}
    assert 0 <= result["test_result"]["hit@10"] <= 1


def test_missing_recbole_prints_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(compat, "_installed", False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps recbole==1.2.1") as caught:
        compat.install()
    assert "\n" not in str(caught.value)


def test_numpy_aliases():
    compat.install()
    for name in ("float", "int", "object", "str", "float_", "complex_", "bool8", "unicode_"):
        assert np.zeros(1, dtype=getattr(np, name)).shape == (1,)


def test_configs_read_no_removed_alias(toy):
    from recbole.config import Config

    assert Config.compatibility_settings(None) is None


def test_no_anomaly_detection():
    code = """
import torch
import recbole_ssm.model
assert not torch.is_anomaly_enabled()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_anomaly_detection_of_a_users_own_stays():
    code = """
import torch
torch.autograd.set_detect_anomaly(True)
import recbole_ssm.model
assert torch.is_anomaly_enabled()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:using <:FutureWarning")
def test_lengths_of_lists_row_by_row():
    import recbole.data.dataset.dataset as module

    rows = pd.Series([np.zeros(2), np.zeros(3)])
    length = vars(module).get("len", len)  # pandas 2 needs no patch
    assert list(rows.agg(length)) == [2, 3]
    assert length([1, 2, 3]) == 3


def test_missing_values_are_filled(write_dataset):
    options = write_dataset(
        "user_id:token\titem_id:token\ttimestamp:float\trating:float\tkind:token\n"
        + "".join(f"u{u}\ti{t}\t{t}\t{'' if t else 4}\t{'' if t else 'a'}\n" for u in range(3) for t in range(12))
    )
    options["config_dict"]["load_col"] = {"inter": ["user_id", "item_id", "timestamp", "rating", "kind"]}
    data = create_dataset(configure("GRU4Rec", **options))
    assert data.inter_feat["rating"].tolist() == [4.0] * 36
    assert set(data.inter_feat["kind"]) == {0, 1}


def test_sequence_columns_of_items_load(write_dataset):
    """token_seq columns broke under pandas 3; ids that look like missing values stay ids."""
    options = write_dataset(
        "user_id:token\titem_id:token\ttimestamp:float\n"
        + "".join(f"u{u}\tNA{t}\t{t}\n" for u in range(3) for t in range(12))
    )
    write_dataset("item_id:token\tclass:token_seq\n" + "".join(f"NA{t}\tx y{t}\n" for t in range(12)), suffix="item")
    options["config_dict"] |= {
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]},
        "selected_features": ["class"],
        "epochs": 1,
        "state": "WARNING",
    }
    result = run_recbole_ssm("SASRecF", **options)
    assert 0 <= result["test_result"]["hit@10"] <= 1


def test_features_that_the_data_lacks_are_named(toy):
    with pytest.raises(UserError, match=r"^selected_features: class is not loaded; see load_col"):
        run_recbole_ssm("SASRecF", **toy)


@pytest.mark.parametrize("name", ["toy-SequentialDataset.pth", "toy-for-GRU4Rec-dataloader.pth"])
def test_no_pickle_of_the_checkpoint_folder_is_loaded(name, toy):
    os.mkdir("saved")
    with open(f"saved/{name}", "wb") as file:
        pickle.dump(Bomb(), file)
    toy["config_dict"] |= {"epochs": 1}
    run_recbole_ssm("GRU4Rec", **toy)
    assert not os.path.exists("bomb-went-off")


def test_grad_scaler_does_not_warn():
    import recbole.trainer.trainer as module

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not module.amp.GradScaler(enabled=False).is_enabled()


def test_exhaustive_search_gets_a_generator():
    import recbole.trainer.hyper_tuning as module

    assert 0 <= module.np.random.RandomState(1).integers(5) < 5
    assert module.np.array([1]).sum() == 1


def test_quick_start_imports_without_ray():
    import recbole.quick_start

    assert callable(recbole.quick_start.run_recbole)
    assert "ray" not in sys.modules


@pytest.mark.parametrize("legacy", [False, True])
def test_ml_100k_is_in_the_order_of_its_times(legacy, tmp_path):
    """Under another name RecBole's float32 gives 149 of 943 users a wrong test target."""
    import recbole

    source = os.path.join(os.path.dirname(recbole.__file__), "dataset_example", "ml-100k", "ml-100k.inter")
    folder = tmp_path / "data" / "other"
    folder.mkdir(parents=True)
    shutil.copyfile(source, folder / "other.inter")
    options = {"data_path": str(tmp_path / "data"), "legacy_time_order": legacy}
    config = configure("GRU4Rec", "other", config_dict=options)
    _, _, test = create_dataset(config).build()
    found = {
        test.id2token("user_id", user): test.id2token("item_id", item)
        for user, item in zip(test.inter_feat["user_id"].tolist(), test.inter_feat["item_id"].tolist())
    }
    events = pd.read_csv(source, sep="\t", dtype={"user_id:token": str, "item_id:token": str})
    events = events.sort_values("timestamp:float", kind="stable")
    truth = dict(zip(events["user_id:token"], events["item_id:token"]))  # the last one of each user stays
    wrong = sum(found[user] != item for user, item in truth.items())
    assert len(found) == 943
    assert wrong == (149 if legacy else 0)


def test_defaults_that_did_not_run_run(write_dataset):
    """Cross-entropy with RecBole's default negatives, and a data set whose times nobody asked to load."""
    options = write_dataset(
        "user_id:token\titem_id:token\ttimestamp:float\n"
        + "".join(f"u{u}\ti{(u + t) % 12}\t{t}\n" for u in range(9) for t in range(6))
    )
    options["config_dict"] |= {"epochs": 1, "state": "WARNING"}
    assert run_recbole_ssm("SASRec", **options)["test_result"]
    options["config_dict"]["loss_type"] = "BPR"
    assert run_recbole_ssm("SASRec", **options)["test_result"]


def test_metrics_of_the_catalogue_and_sparse_adam_end_in_no_traceback(toy):
    """RecBole's collector takes the number of items for a tensor, and its SparseAdam fails in the midst of training."""
    options = {**toy["config_dict"], "epochs": 1, "train_rows": 64, "hidden_size": 8}
    metrics = ["Hit", "ItemCoverage", "AveragePopularity", "ShannonEntropy", "GiniIndex", "TailPercentage"]
    found = run_recbole_ssm("GRU4Rec", "toy", config_dict={**options, "metrics": metrics}, saved=False)["test_result"]
    assert 0 < found["itemcoverage@10"] <= 1 and found["averagepopularity@10"] > 0
    with pytest.raises(UserError, match="learner: sparse_adam is for sparse gradients, and GRU4Rec has none; try adam"):
        run_recbole_ssm("GRU4Rec", "toy", config_dict={**options, "learner": "sparse_adam"}, saved=False)
