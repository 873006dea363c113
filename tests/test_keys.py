"""The table of config keys: every key has a row, every row a use, every value is accepted or refused in one line."""

import inspect
import math
import re

import numpy as np
import pytest
import yaml

from recbole_ssm.arguments import PROPERTIES, read_yaml
from recbole_ssm.cli import main
from recbole_ssm.config import RECBOLE_PROPERTIES
from recbole_ssm.data.loader import TRANSFORMS
from recbole_ssm.errors import UserError
from recbole_ssm.keys import FREE_KEYS, KEYS, MACHINE_KEYS, Span
from recbole_ssm.kinds import Choice, Number, Range
from recbole_ssm.llm import preference
from recbole_ssm.llm.verbalizer import VERBALIZERS
from recbole_ssm.model import model_names
from recbole_ssm.ops.backend import BACKENDS
from recbole_ssm.optim import LEARNERS, adaptive_batch
from recbole_ssm.quick_start import configure, run_recbole_ssm
from recbole_ssm.reference import page
from recbole_ssm.synonyms import ALIASES
from tests.conftest import REPOSITORY

# What is no value of any key, what is one of few, and what another key would take.
HOSTILE = [
    None, True, False, -1, 0, 1, 2**31, 10**25, 10**5000, -0.5, 0.5, 1e300, math.nan, math.inf, -math.inf,
    "", "x", "x" * 5000, "a\0b", "None", "user_id", "[5,inf", "[5,inf)", "zz\nzz",
    [], [1], ["x"], [None], [True], [[1]], [0.8, 0.2], (1, 2), {}, {"x": 1}, {"x": {"y": {}}}, {1: 2}, {"inter": 5},
    {"split": {"RS": [-1, 1, 1]}}, {"mode": 5}, {"sample_num": 0}, {"max_norm": "x"}, {"step_size": 0},
    np.int64(3), np.float32(0.5), np.array([1, 5]), object(), b"x", {1, 2},
]  # fmt: skip
DEEP = [1]
for _ in range(5000):
    DEEP = [DEEP]
# Their errors name the model, the retriever's class, or the key that does not go with them.
NAMED_OTHERWISE = ("model", "dataset", "metrics", "retriever", "topk")
BOMB = ["x"] * 9
for _ in range(9):
    BOMB = [BOMB] * 9
ROWS = {model: configure(model, "toy").rows for model in ("2Mamba4Rec", *model_names())}
MODEL_OF = {name: model for model in reversed(ROWS) for name in ROWS[model]}


def outcome(model, options=None, command_line=()):
    """The value as the configuration keeps it, or the one line that refuses it."""
    try:
        return configure(model, "toy", config_dict=options, command_line=command_line), None
    except UserError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 600 and "Traceback" not in line, line
        return None, line


@pytest.mark.parametrize("name", MODEL_OF)
def test_every_value_is_accepted_or_refused_in_one_line(name):
    model = MODEL_OF[name]
    for value in HOSTILE:
        _, line = outcome(model, {name: value})
        assert line is None or line.startswith(name) or name in NAMED_OTHERWISE, line
    # The command line's own: its literals become the values of above.
    for text in ("1e400", "[1", "[" * 5000, "9" * 5000, "{'a': {'b': [1]}}", "--", "=", "-1", "b'x'", "{1, 2}", "1_0"):
        _, line = outcome(model, command_line=[f"--{name}={text}"])
        assert line is None or line.startswith(name) or name in NAMED_OTHERWISE, line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed: must lie in [0, 4294967295], got -1; try seed: 2020"),
        ({"clip_grad_norm": 5}, "clip_grad_norm: must be a mapping such as {'max_norm': 5}, got 5"),
        ({"clip_grad_norm": {}}, "clip_grad_norm: needs the entry 'max_norm', got {}"),
        ({"learner_args": [1]}, "learner_args: must be a mapping such as {'name': value}, got [1]"),
        ({"lr_scheduler_args": {"step_size": 0}}, "lr_scheduler_args: step_size must be at least 1, got 0"),
        ({"hidden_size": -1}, "hidden_size: must be at least 1, got -1; try hidden_size: 1"),
        ({"MAX_ITEM_LIST_LENGTH": 10**20 - 1}, "MAX_ITEM_LIST_LENGTH: must be at most 2147483647, got 999999999999999"),
        ({"num_layers": 10**6}, "num_layers: must be at most 1000, got 1000000; try num_layers: 1"),
        ({"topk": True}, "topk: must be a whole number in [1, inf) or a list of such, got True"),
        ({"topk": None}, "topk: must be a whole number in [1, inf) or a list of such, got None"),
        ({"topk": [1, "x"]}, "topk: must be a whole number, got 'x'"),
        ({"checkpoint_dir": None}, "checkpoint_dir: must be a folder, got None"),
        ({"data_path": 5}, "data_path: must be a folder, got 5"),
        ({"metrics": 5}, "metrics: must be the name of a metric or a list of such, got 5"),
        ({"metrics": []}, "metrics: must be the name of a metric or a list of such, got []"),
        ({"load_col": 5}, "load_col: must be a mapping such as {'inter': ['user_id', 'item_id', 'timestamp']}, got 5"),
        ({"load_col": {"item": ["item_id"]}}, "load_col: needs the entry 'inter', got {'item': ['item_id']}"),
        ({"val_interval": 5}, "val_interval: must be a mapping such as {'rating': '[3,inf)'}, got 5"),
        (
            {"eval_args": {"split": {"RS": [-1, 1, 1]}}},
            "eval_args: RS takes three shares, the first above 0, got [-1, 1",
        ),
        (
            {"eval_args": {"split": {"RS": [0.8, 0.2]}}},
            "eval_args: RS takes three shares, the first above 0, got [0.8, ",
        ),
        ({"eval_args": {"mode": "uni"}}, "eval_args: mode must be "),
        ({"eval_args": {"group_by": "x"}}, "eval_args: group_by 'x' is not one of user, none, None"),
        ({"user_inter_num_interval": "[5,inf"}, "user_inter_num_interval: '[5,inf' is no interval, in '[5,inf'; inter"),
        ({"item_inter_num_interval": "[9,5]"}, "item_inter_num_interval: '[9, 5]' is no interval, in [9, 5]"),
        (
            {"benchmark_filename": ["a", "b"]},
            "benchmark_filename: must be a list of 3 in which each entry is a part of",
        ),
        ({"repeatable": False}, "repeatable: must be True, because the next item may be one of the history, got False"),
        ({"weight_decay": math.nan}, "weight_decay: must be 0 or more, got nan; try weight_decay: 0.0"),
        ({"learning_rate": math.inf}, "learning_rate: must be above 0 and finite, got inf; try learning_rate: 0.01"),
        (
            {"dropout_prob": object()},
            "dropout_prob: must be text, a number, True, False, a list or a mapping, got <obj",
        ),
        ({"learner_args": {"betas": DEEP}}, "learner_args: holds more than 20 values one in the other"),
        (
            {"learner_args": {"betas": BOMB}},
            "learner_args: holds more than 20 values one in the other, or more than 2000",
        ),
        ({"local_rank": 3}, "local_rank: refused, because torchrun starts several processes and numbers them"),
        ({5: 1}, "5: there is no such key"),
    ],
)
def test_errors_name_key_value_and_what_is_accepted(options, message):
    _, line = outcome("Mamba4Rec", options)
    assert line is not None and line.startswith(message), line


def test_what_is_accepted_becomes_plain(tmp_path):
    given = {
        "hidden_size": np.int64(16), "dropout_prob": np.float32(0.5), "topk": (1, np.int32(10)),
        "show_progress": np.False_, "checkpoint_dir": tmp_path, "user_inter_num_interval": (5, 10),
        "learner_args": {"betas": np.array([0.5, 0.75])},
    }  # fmt: skip
    found = configure("Mamba4Rec", "toy", config_dict=given)
    assert found["hidden_size"] == 16 and type(found["hidden_size"]) is int
    assert found["topk"] == [1, 10] and found["show_progress"] is False
    assert found["checkpoint_dir"] == str(tmp_path)
    assert found["user_inter_num_interval"] == "(5, 10)"
    assert found["learner_args"] == {"betas": [0.5, 0.75]}


# --- the table -----------------------------------------------------------------------------------------------------


def test_every_default_is_accepted_and_every_key_has_a_row():
    for model, rows in ROWS.items():
        defaults = configure(model, "toy").internal_config_dict
        assert defaults.keys() <= rows.keys()
        for name, value in defaults.items():
            if not rows[name].refused:
                rows[name].take(name, value, value)
    for file in PROPERTIES.glob("dataset/*.yaml"):
        for name, value in read_yaml(file).items():
            KEYS[name].take(name, value)


def test_every_row_is_used():
    """By our properties, by RecBole's, or by the code of one of them."""
    import recbole

    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in (REPOSITORY / "recbole_ssm", RECBOLE_PROPERTIES.parent)
        for path in folder.rglob("*.py")
        if path.name != "keys.py"
    )
    shipped = {
        name
        for folder in (PROPERTIES, RECBOLE_PROPERTIES)
        for file in folder.rglob("*.yaml")
        for name in yaml.safe_load(file.read_text(encoding="utf-8")) or ()
    }
    assert recbole.__version__ == "1.2.1"
    assert [name for name in KEYS if name not in shipped and not re.search(rf"['\"]{name}['\"]", code)] == []


def test_the_rows_of_a_model_say_what_it_means():
    for file in (PROPERTIES / "model").iterdir():
        for name in read_yaml(file):
            assert ROWS[file.stem][name].about, f"{file.stem}: {name}"
    assert [name for name, key in KEYS.items() if key.scope != "model" and not key.about and not key.refused] == []
    assert [name for name, key in KEYS.items() if key.scope == "model" and key.about] == []


def test_ranges_and_choices_of_a_line_of_yaml(tmp_path):
    rows = ROWS["LlamaRec"]
    assert rows["train_candidates"].kind.values == ("random", "insert", "skip")
    assert ROWS["GRU4RecCPR"]["context_norm"].kind.within == "[0, inf)"
    assert ROWS["CORE"]["dnn_type"].kind.values == ("trm", "ave")
    assert ROWS["CORE"]["item_dropout"].kind.within == "[0, 1)"
    assert ROWS["GRU4RecCPR"]["n_facet_window"].kind.range.low == -math.inf
    assert rows["num_candidates"].kind.within == "[2, 26]"


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (KEYS["learner"].kind, LEARNERS),
        (KEYS["ssm_backend"].kind, BACKENDS),
        (KEYS["adaptive_batch"].kind, adaptive_batch.RULES),
        (KEYS["transform"].kind, (*TRANSFORMS, "inverse_itemseq")),
        (KEYS["rerank"].kind, ("all", "retrieved")),
        (ROWS["Mamba4Rec"]["loss_type"].kind, ("CE", "BPR", "sampled_softmax", "gBCE")),
        (ROWS["LlamaRec"]["verbalizer"].kind, VERBALIZERS),
        (ROWS["LlamaRec"]["train_objective"].kind, preference.OBJECTIVES),
        (ROWS["LlamaRec"]["orpo_rejected"].kind, ("random", "all", "hardest")),
        (ROWS["LlamaRec"]["orpo_probabilities"].kind, ("vocabulary", "letters")),
    ],
)
def test_choices_are_those_of_the_code(kind, known):
    assert isinstance(kind, Choice) and set(kind.values) == set(known)


def test_what_is_tuned_is_accepted():
    for name, key in KEYS.items():
        values = key.tune or ()
        if isinstance(values, Span):
            values = (values.low, values.high)
        for value in values:
            key.take(name, value)
        assert not values or key.tunable
    assert KEYS["learning_rate"].tunable and not KEYS["eval_args"].tunable and not KEYS["device"].tunable


def test_what_a_resumed_run_may_change():
    assert {"epochs", "stopping_step", "show_progress", "data_path", "eval_batch_size"} <= FREE_KEYS
    assert not {"learning_rate", "hidden_size", "seed", "eval_args"} & FREE_KEYS
    assert FREE_KEYS | {name for name, key in KEYS.items() if key.refused} >= MACHINE_KEYS


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [("[0, 1)", [0, 0.5], [1, -0.1, math.nan]), ("(0, inf)", [1e-9, 1e9], [0, math.inf]), ("[-2,-1]", [-2, -1], [0])],
)
def test_ranges(text, inside, outside):
    found = Range.read(text)
    assert all(number in found for number in inside) and not any(number in found for number in outside)
    assert Number(text).range == found


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "epochs: 1\nseed: 2\nepochs: 3\n",
            "line 3: not valid YAML: epochs stands in line 1 and again in line 3; keep one",
        ),
        ("eval_args: {mode: full, mode: uni5}\n", "mode stands in line 1 and again in line 1; keep one"),
        ("[" * 5000, "not valid YAML"),
        ("seed: 99999999999999999999999\n", "seed: must lie in [0, 4294967295]"),
        ("a: &a [1]\nlearner_args: {x: *a}\n", "a: there is no such key"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        configure("SASRec", "toy", [str(file)])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("merge", [False, True])
def test_a_small_file_that_means_a_large_one_is_refused_at_once(tmp_path, merge):
    lines = ["a0: &a0 {x0: 1, x1: 2}"] if merge else ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        names = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {{<<: [{names}]}}" if merge else f"a{level}: &a{level} [{names}]")
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        configure("SASRec", "toy", ["bomb.yaml"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_an_endless_value_is_refused(tmp_path):
    (tmp_path / "endless.yaml").write_text("learner_args: &a {x: *a}\n")
    with pytest.raises(UserError, match="learner_args: holds more than 20 values one in the other"):
        configure("SASRec", "toy", ["endless.yaml"])


# --- former names ----------------------------------------------------------------------------------------------------


def test_former_names_still_count(tmp_path, caplog):
    (tmp_path / "a.yaml").write_text("learner_average: 2\n")
    for options in ({"config_file_list": ["a.yaml"]}, {"config_dict": {"learner_average": 2}},
                    {"command_line": ["--learner_average=2"]}, {"base": {"learner_average": 2}}):  # fmt: skip
        assert configure("SASRec", "toy", **options)["average_power"] == 2
    for options in ({"learner_average": 2, "average_power": 3}, {"average_power": 3, "learner_average": 2}):
        with pytest.raises(UserError, match="learner_average: its name is average_power now, and both are given"):
            configure("SASRec", "toy", config_dict=options)
    # In another place the stronger one wins, whatever its name.
    assert configure("SASRec", "toy", ["a.yaml"], {"average_power": 3})["average_power"] == 3
    assert set(ALIASES.values()) <= KEYS.keys() and not ALIASES.keys() & KEYS.keys()


def test_the_new_name_is_said_once():
    from recbole_ssm import config

    config._hint.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("logging.Logger.warning", lambda self, text, *rest: said.append(text))
        for _ in range(3):
            configure("SASRec", "toy", config_dict={"learner_average": 2})
    assert said == ["learner_average: its name is average_power now; the old one still counts"]


def test_what_a_run_was_trained_with_is_not_judged_again():
    base = {"stopping_step": -1, "tensorboard": "x", "user_inter_num_interval": "[5,inf"}
    assert configure("SASRec", "toy", base=base)["stopping_step"] == -1
    with pytest.raises(UserError, match="stopping_step: must be 0 or more, got -2"):
        configure("SASRec", "toy", base=base, config_dict={"stopping_step": -2})
    with pytest.raises(UserError, match="dataset_save_path: refused"):
        configure("SASRec", "toy", base={"dataset_save_path": "x.pth"})


# --- what passes the check works, or is refused before anything is trained -------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alias_of_item_id": ["zzz"]}, "alias_of_item_id: zzz is not loaded; see load_col"),
        ({"hidden_size": 2**31 - 2}, "SASRec: more memory is asked for than there is"),
        ({"MAX_ITEM_LIST_LENGTH": 2**31 - 1}, "SASRec: more memory is asked for than there is"),
        ({"learner_args": {"differentiable": True}}, "learner_args: adam does not take {'differentiable': True}"),
        ({"learner_args": {"betas": [1]}}, "learner_args: adam does not take {'betas': [1]}"),
        ({"learner_groups": {"*": {"lr": "x"}}}, "adam does not take"),
        ({"learning_rate": 1e300}, "learner: adam does not take {'lr': 1e+300, 'weight_decay': 0.0} (value cannot be"),
        ({"lr_scheduler": "CyclicLR", "lr_scheduler_args": {"base_lr": 0.1}}, "lr_scheduler_args: CyclicLR does not"),
    ],
)
def test_what_fails_deep_inside_is_one_line_before_training(toy, options, message):
    toy["config_dict"] |= {"epochs": 1, **options}
    with pytest.raises(UserError) as caught:
        run_recbole_ssm("SASRec", **toy)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(REPOSITORY.glob("saved")) and "Training" not in str(caught.value)


# --- the reference ---------------------------------------------------------------------------------------------------


def test_the_page_is_written_from_the_table():
    written = (REPOSITORY / "docs" / "keys.md").read_text(encoding="utf-8")
    assert written == page(), "write it again: recbole-ssm keys --markdown > docs/keys.md"


def test_the_command(capsys):
    assert main(["keys", "learning_rate"]) == 0
    assert "accepts   a number in (0, inf)" in capsys.readouterr().out
    assert main(["keys", "d_state"]) == 0
    assert "d_state of Mamba4Rec: N, the state size of a channel" in capsys.readouterr().out
    assert main(["keys"]) == 0
    assert "learning_rate" in capsys.readouterr().out
    assert main(["keys", "learner_average"]) == 0
    assert "learner_average: its name is average_power now" in capsys.readouterr().out
    assert main(["keys", "learning_rat"]) == 2
    assert "keys: there is no key 'learning_rat'; did you mean 'learning_rate'?" in capsys.readouterr().err


def test_every_public_function_of_the_table_is_documented():
    import recbole_ssm.keys

    for name, member in inspect.getmembers(recbole_ssm.keys, inspect.isfunction):
        assert name.startswith("_") or member.__doc__ or member.__module__ != "recbole_ssm.keys"
