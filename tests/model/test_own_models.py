"""A user's own class as a model: by the class or by its path, with keys of its own."""

import contextlib
import sys
from pathlib import Path

import pytest

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure, load_data_and_model
from recbole_ssm.trainer import checkpoint

CODE = """
from recbole.model.sequential_recommender import GRU4Rec
from recbole_ssm.model import TwoMamba4Rec


class Gated(GRU4Rec):
    default_config = {"gate": 0.5}

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.gate = config["gate"]


class Deep(TwoMamba4Rec):
    pass


class NoModel:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The module own_models_of_test in the working folder, with a YAML file beside it for one class."""
    (tmp_path / "own_models_of_test.py").write_text(CODE)
    (tmp_path / "Deep.yaml").write_text("num_layers: 1   # (int) The number of blocks. Range in [1, 3].\n")
    monkeypatch.delitem(sys.modules, "own_models_of_test", raising=False)
    return "own_models_of_test"


def test_a_class_inherits_the_keys_of_its_parent(module, toy):
    options = toy["config_dict"]
    deep = configure(f"{module}:Deep", "toy", config_dict=options)
    parent = configure("2Mamba4Rec", "toy", config_dict=options)
    assert deep["model"] == "Deep" and deep["num_layers"] == 1
    assert deep["hidden_size"] == parent["hidden_size"] and deep["train_mode"] == "packed"
    with pytest.raises(UserError, match=r"num_layers: must lie in \[1, 3\]"):
        configure(f"{module}:Deep", "toy", config_dict=options | {"num_layers": 4})


def test_keys_of_a_class_come_from_it_or_from_the_options(module, toy):
    options = toy["config_dict"]
    gated = configure(f"{module}:Gated", "toy", config_dict=options | {"damping": [1, 2]})
    assert gated["gate"] == 0.5 and gated["damping"] == [1, 2]
    assert gated["embedding_size"] == configure("GRU4Rec", "toy", config_dict=options)["embedding_size"]
    with pytest.raises(UserError, match="gaet: there is no such key; did you mean 'gate'"):
        configure(f"{module}:Gated", "toy", config_dict=options | {"gaet": 1})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:M", "cannot be imported"),
        ("own_models_of_test:Missing", "cannot be imported"),
        ("own_models_of_test:NoModel", "is no class of RecBole's SequentialRecommender"),
        (":M", "cannot be imported"),
    ],
)
def test_a_path_that_is_no_model_is_one_line(module, toy, path, message):
    with pytest.raises(UserError, match=message):
        configure(path, "toy", config_dict=toy["config_dict"])


def test_a_checkpoint_of_an_own_class_is_served_when_the_class_is_given_again(module, toy, monkeypatch):
    path = f"{module}:Gated"
    result = run_recbole_ssm(path, "toy", config_dict=toy["config_dict"] | {"epochs": 1})
    own = sys.modules[module].Gated
    # What a file names is not imported, even if it could be.
    monkeypatch.delitem(sys.modules, module)
    for load in (load_recommender, load_data_and_model):
        with pytest.raises(UserError, match=f"the class {path}, and what a file names is not imported"):
            load(result["checkpoint"])
    assert main([f"--resume={result['checkpoint']}"]) == 2
    assert module not in sys.modules

    with pytest.raises(UserError, match="its model is own_models_of_test:Gated, not SASRec"):
        load_recommender(result["checkpoint"], model="SASRec")
    assert len(load_recommender(result["checkpoint"], model=own).recommend(["i0"], 3)) == 3
    resumed = run_recbole_ssm(own, resume=result["checkpoint"], config_dict={"epochs": 2})
    assert resumed["model"] == "Gated"


def test_a_file_that_names_a_class_imports_nothing(module, toy):
    """Whichever entry of a checkpoint names it, and whoever reads the checkpoint."""
    result = run_recbole_ssm("2Mamba4Rec", "toy", config_dict=toy["config_dict"] | {"epochs": 1})
    path, evil = Path(result["checkpoint"]), f"{module}:Gated"
    saved = checkpoint.read(path)
    config, options = saved.info["config"], saved.info["training"]["options"]
    files = {
        "model": saved.info | {"model": evil},
        "config": saved.info | {"model": evil, "config": config | {"model": evil}},
        "options": saved.info | {"training": saved.info["training"] | {"options": options | {"model": evil}}},
        "class": saved.info | {"class": evil},
        "retriever": saved.info
        | {"model": "LlamaRec", "config": config | {"retriever_settings": {"model": evil}}}
        | {"training": saved.info["training"] | {"options": options | {"retriever": evil}}},
    }
    for name, info in files.items():
        checkpoint.write(path.with_name(f"{name}.safetensors"), saved.tensors, info)
        file = path.with_name(f"{name}.safetensors")
        for use in (
            load_recommender,
            load_data_and_model,
            lambda file: run_recbole_ssm(init=file, config_dict={"epochs": 0}),
            lambda file: run_recbole_ssm(resume=file),
        ):
            with contextlib.suppress(UserError):
                use(file)
            assert module not in sys.modules, (name, use)


def test_a_file_does_not_have_a_base_model_downloaded(tmp_path):
    wants = {"base_model": "someone/x", "base_model_download": True}
    info = {"config": {**wants, "retriever_settings": wants}, "training": {"options": wants}}
    checkpoint.write(tmp_path / "x.safetensors", {}, info)
    found = checkpoint.read(tmp_path / "x.safetensors").info
    for settings in (found["config"], found["config"]["retriever_settings"], found["training"]["options"]):
        assert settings["base_model_download"] is False and settings["base_model"] == "someone/x"


def test_a_module_may_change_the_folder_and_import_its_neighbours_later(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_test.py").write_text("NUMBER = 7\n")
    later = "    def number():\n        import neighbour_of_test\n        return neighbour_of_test.NUMBER\n"
    head = "import os\nfrom recbole_ssm.model import TwoMamba4Rec\nos.chdir('/')\n"
    (tmp_path / "moving_model_of_test.py").write_text(f"{head}class Moves(TwoMamba4Rec):\n{later}")
    assert get_model("moving_model_of_test:Moves").number() == 7
