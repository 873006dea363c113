"""Shipped settings by one name: above the other defaults, below what is given."""

import pytest

from recbole_ssm import run_recbole_ssm
from recbole_ssm.arguments import PROPERTIES, read_yaml
from recbole_ssm.cli import main
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure
from tests.test_packaging import setup_cfg

PRESETS = {
    path.relative_to(PROPERTIES / "preset").with_suffix("").as_posix(): read_yaml(path)
    for path in (PROPERTIES / "preset").rglob("*.yaml")
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_taken_as_it_stands(name):
    config = configure(command_line=[f"--preset={name}"])
    assert config["preset"] == name and name.startswith(f"{config['dataset']}/")
    assert {key: config[key] for key in PRESETS[name]} == PRESETS[name]


def test_they_are_shipped():
    assert {"ml-1m/Mamba4Rec-published", "ml-1m/eSASRec", "amazon-beauty/eSASRec"} <= PRESETS.keys()
    assert all(name.count("/") == 1 for name in PRESETS)
    assert "preset/*/*.yaml" in setup_cfg()["options.package_data"]["recbole_ssm.properties"]


def test_priorities(tmp_path):
    (tmp_path / "a.yaml").write_text("hidden_size: 8\npreset: ml-1m/eSASRec\n")
    config = configure(None, "toy", ["a.yaml"], {"num_negatives": 9})
    found = [config[key] for key in ("model", "dataset", "hidden_size", "num_negatives", "n_heads", "stopping_step")]
    assert found == ["SASRec", "toy", 8, 9, 1, 50]
    assert configure("SASRec", "toy")["stopping_step"] != 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset=ml-1m/eSASRek"], "preset: there is no preset 'ml-1m/eSASRek'; did you mean 'ml-1m/eSASRec'?"),
        (["--preset=zzz"], "preset: there is no preset 'zzz'; known are amazon-beauty/2Mamba4Rec"),
        (["--preset=5"], "preset: must be a name such as ml-1m/2Mamba4Rec, got 5"),
        (["--preset=../overall"], "preset: there is no preset '../overall'; known are "),
        (
            ["--preset=ml-1m/eSASRec", "--model=GRU4Rec"],
            "preset: ml-1m/eSASRec is of SASRec, and the model is GRU",
        ),
        (["--preset=ml-1m/eSASRec", "--n_heads=0"], "n_heads: must be at least 1, got 0"),
    ],
)
def test_mistakes(options, message, capsys):
    assert main(options) == 2
    assert message in capsys.readouterr().err


def test_a_run_by_a_preset_goes_on_without_it(toy, monkeypatch):
    """A checkpoint holds what the preset said, so another version's preset of that name changes nothing."""
    toy["config_dict"] |= {"preset": "ml-1m/eSASRec", "hidden_size": 8, "inner_size": 8, "epochs": 1}
    path = run_recbole_ssm(**toy)["checkpoint"]
    monkeypatch.setattr("recbole_ssm.config._preset", lambda name: {} if name is None else 1 / 0)
    result = run_recbole_ssm(resume=path, config_dict={"epochs": 2, "data_path": toy["config_dict"]["data_path"]})
    assert result["model"] == "SASRec"
    with pytest.raises(UserError, match="resume: n_heads is 2 here and was 1"):
        run_recbole_ssm(resume=path, config_dict={"n_heads": 2, "data_path": toy["config_dict"]["data_path"]})


def test_a_preset_stands_above_what_a_checkpoint_says(toy):
    """So one that does not fit the weights is refused, and not passed over."""
    toy["config_dict"]["epochs"] = 0
    path = run_recbole_ssm("SASRec", **toy)["checkpoint"]
    toy["config_dict"]["preset"] = "ml-1m/eSASRec"
    for how in ("init", "resume"):
        with pytest.raises(UserError, match=rf"{how}: \w+ is .* here and was"):
            run_recbole_ssm(**toy, **{how: path})
