"""Priorities, literals and error texts of the configuration."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm import run_recbole_ssm
from recbole_ssm.arguments import PROPERTIES, literal, parse_options
from recbole_ssm.errors import UserError
from recbole_ssm.model import MODELS, get_model, model_names
from recbole_ssm.quick_start import configure


def config(model="Mamba4Rec", dataset="ml-100k", files=None, command_line=(), **options):
    return configure(model, dataset, files, options, command_line)


def test_priority(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("d_state: 1\nd_conv: 1\nexpand: 1\nlearning_rate: 1e-3\n")
    second.write_text("d_conv: 2\nexpand: 2\n")
    found = config(files=[str(first), str(second)], command_line=["--expand=4"], d_conv=3, expand=3)
    assert (found["d_state"], found["d_conv"], found["expand"], found["learning_rate"]) == (1, 3, 4, 0.001)


def test_what_is_given_wins_over_a_preset_also_where_a_run_that_goes_on_has_the_same():
    base = {"model": "2Mamba4Rec", "dataset": "toy", "epochs": 3, "d_state": 7}
    given = {"preset": "ml-1m/2Mamba4Rec", "epochs": 3, "lr_scheduler": None}
    found = configure("2Mamba4Rec", "toy", config_dict=given, base=base)
    assert (found["epochs"], found["lr_scheduler"]) == (3, None)
    assert found["d_state"] == 64, "the preset wins over what the run had"
    kept = {**base, "preset": "ml-1m/2Mamba4Rec"}
    assert configure("2Mamba4Rec", "toy", config_dict=given, base=kept)["d_state"] == 7


def test_defaults_of_our_files_win_over_recboles():
    assert config(dataset="ml-1m")["MAX_ITEM_LIST_LENGTH"] == 200
    assert config(dataset="amazon-beauty")["MAX_ITEM_LIST_LENGTH"] == 50
    assert config(dataset="amazon-beauty")["user_inter_num_interval"] == "[5,inf)"
    assert config("SASRec", "whatever")["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}


def test_nothing_leaks_between_configs():
    from recbole.utils.argument_list import dataset_arguments

    before = list(dataset_arguments)
    first = config()
    first["eval_args"]["order"] = "changed"
    assert config()["eval_args"]["order"] == "TO"
    assert list(dataset_arguments) == before


def test_part_of_eval_args_leaves_the_rest():
    found = config(eval_args={"mode": "uni100"})
    assert found["eval_args"]["order"] == "TO"
    assert found["eval_args"]["split"] == {"LS": "valid_and_test"}
    assert found["eval_args"]["mode"] == {"valid": "uni100", "test": "uni100"}


def test_use_gpu_false_means_cpu():
    assert config(use_gpu=False)["device"].type == "cpu"


def test_data_path_counts_for_ml_100k_too(tmp_path):
    assert "dataset_example" in config(data_path=str(tmp_path))["data_path"]
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "ml-100k.inter").write_text("x")
    assert config(data_path=str(tmp_path))["data_path"] == str(tmp_path / "ml-100k")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("[1, 5]", [1, 5]),
        ("{'LS': 'valid_only'}", {"LS": "valid_only"}),
        ("None", None),
        ("True", True),
        ("false", False),
        ("2Mamba4Rec", "2Mamba4Rec"),
        ("[5,inf)", "[5,inf)"),
        ("1/0", "1/0"),
        ("__import__('os').mkdir('went-off')", "__import__('os').mkdir('went-off')"),
    ],
)
def test_strings_are_literals_only(text, value, tmp_path):
    assert literal(text) == value
    assert not (tmp_path / "went-off").exists()


@given(st.text(max_size=40))
def test_literal_never_fails(text):
    literal(text)


def test_options_with_equals_signs_in_their_value():
    assert parse_options(["--a=b=c", "--x=[1]"]) == {"a": "b=c", "x": [1]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 5}, "learning_rat: there is no such key; did you mean 'learning_rate'?"),
        ({"d_stat": 5}, "d_stat: there is no such key; did you mean 'd_state'?"),
        ({"eval_args": {"mod": "full"}}, "eval_args: there is no such entry 'mod'; did you mean 'mode'?"),
        ({"eval_args": "full"}, "eval_args: must be a mapping such as {'split': ...}, got 'full'"),
        ({"epochs": "ten"}, "epochs: must be a whole number, got 'ten'; the default is 6"),
        ({"learning_rate": "fast"}, "learning_rate: must be a number, got 'fast'; the default is 0.001"),
        ({"shuffle": 3}, "shuffle: must be True or False, got 3; the default is True"),
        ({"eval_step": 0}, "eval_step: must be at least 1, got 0; try eval_step: 1"),
        ({"MAX_ITEM_LIST_LENGTH": 0}, "MAX_ITEM_LIST_LENGTH: must be at least 1, got 0; try MAX_ITEM_LIST_LENGTH: 1"),
        ({"num_layers": 0}, "num_layers: must be at least 1, got 0; try num_layers: 1"),
        ({"dropout_prob": 1.0}, "dropout_prob: must lie in [0, 1), got 1.0; try dropout_prob: 0.2"),
        (
            {"learner": "adamm"},
            "learner: 'adamm' is not one of adam, adamw, sgd, adagrad, rmsprop, sparse_adam, usgm, usfgm; "
            "did you mean 'adam'?",
        ),
        ({"loss_type": "BCE"}, "loss_type: 'BCE' is not one of CE, BPR"),
        ({"readout": "first"}, "readout: 'first' is not one of last, mean"),
        ({"residual": "yes"}, "residual: 'yes' is not one of auto, True, False"),
        (
            {"ssm_backend": "torhc"},
            "ssm_backend: 'torhc' is not one of auto, reference, torch, native, cuda; did you mean 'torch'?",
        ),
        (
            {"metrics": "MAP,Hitt"},
            "metrics: 'Hitt' is not one of averagepopularity, gauc, giniindex, hit, itemcoverage, map, mrr, ndcg, ",
        ),
        ({"valid_metric": "NDCG@7"}, "valid_metric: 'NDCG@7' needs its cut-off in topk: [10]; add it there"),
        (
            {"valid_metric": "Recall@10"},
            "valid_metric: 'Recall@10' is not among metrics: ['Hit', 'NDCG', 'MRR']; name one of them",
        ),
        ({"valid_metric": "masked NDCG@7"}, "valid_metric: 'masked NDCG@7' needs its cut-off in topk: [10]; add it"),
        (
            {"metrics": ["AUC"], "valid_metric": "masked AUC"},
            "valid_metric: 'masked AUC': only hit, recall, precision, mrr, map, ndcg, gauc choose by masked lists",
        ),
        (
            {"metrics": ["GiniIndex"], "valid_metric": "masked GiniIndex@10"},
            "valid_metric: 'masked GiniIndex@10': only hit, ",
        ),
        ({"lr": 3}, "lr: there is no such key; did you mean 'learning_rate'?"),
        ({"batch_size": 3}, "batch_size: there is no such key; did you mean 'train_batch_size'?"),
        ({"dim": 3}, "dim: there is no such key; did you mean 'hidden_size'?"),
        ({"valid_metric": "Hit"}, "valid_metric: 'Hit' needs its cut-off in topk: [10]; add it there"),
        ({"seed": None}, "seed: must be a whole number, got None; the default is 2020"),
        ({"learning_rate": -1}, "learning_rate: must be above 0, got -1; try learning_rate: 0.001"),
        ({"eval_args": {"order": "RO"}}, "eval_args: order must be TO (by time) for sequences, got 'RO'"),
        ({"loss_type": "BPR", "train_neg_sample_args": None}, "train_neg_sample_args: BPR needs negative samples"),
        ({"device": "cuda:7"}, "device: refused, because it follows from use_gpu and gpu_id"),
        ({"config_file": "x.yaml"}, "config_file: refused, because options are read from config_files"),
        ({"save_dataset": True}, "save_dataset: refused, because it would be a pickle"),
        ({"dataset_save_path": "x.pth"}, "dataset_save_path: refused, because a saved data set is a pickle"),
        (
            {"preload_weight": {"iid": "vector"}},
            "preload_weight: refused, because no sequential model reads pretrained",
        ),
        ({"eval_args": {"mode": "pop999999"}}, "eval_args: mode must be a mapping"),
    ],
)
def test_errors_name_key_value_and_mend(options, message):
    with pytest.raises(UserError) as caught:
        config(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Mamba4rec", "model: there is no sequential model 'Mamba4rec'; did you mean 'Mamba4Rec'?"),
        ("sasrec", "model: there is no sequential model 'sasrec'; did you mean 'SASRec'?"),
        ("S3Rec", "model: S3Rec hands its pre-training on as a pickle, which is never loaded here"),
        ("KSR", "model: KSR reads pretrained vectors of a knowledge graph, which are not read here; take GRU4RecF"),
        ("LightGBM99", "model: there is no sequential model 'LightGBM99'"),
        (5, "model: must be a name, got 5"),
    ],
)
def test_wrong_model_names(model, message):
    with pytest.raises(UserError) as caught:
        config(model)
    assert str(caught.value).startswith(message)
    assert model not in model_names()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "not valid YAML: expected"),
        ("- a\n- b\n", "must hold 'key: value' lines, got list"),
        ("a: !!python/object/apply:os.mkdir ['x']", "line 1: not valid YAML"),
    ],
)
def test_config_files_that_are_none(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        config(files=[str(file)])
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        # It would end the process with the status of success.
        (
            "SASRecCPR",
            {"loss_type": "BPR"},
            "RecBole's code does not take these settings or data (SystemExit",
        ),
        (
            "GRU4RecCPR",
            {},
            "RecBole's code does not take these settings or data (RuntimeError: selected",
        ),
    ],
)
def test_what_recboles_own_code_raises_in_a_run_is_a_line(toy, model, options, message):
    with pytest.raises(UserError) as caught:
        run_recbole_ssm(model, "toy", config_dict={**toy["config_dict"], **options}, saved=False)
    assert str(caught.value).startswith(f"{model}: {message}") and "\n" not in str(caught.value)


def test_absent_and_empty_config_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        config(files=["absent.yaml"])
    (tmp_path / "empty.yaml").write_text("")
    assert config(files=["empty.yaml"])["epochs"] == 6


def test_the_main_job_needs_no_name():
    found = config(None, None)
    assert (found["model"], found["dataset"]) == ("2Mamba4Rec", "ml-100k")


@pytest.mark.parametrize("name", ["2020", "1.10", "true", "1e5", "None"])
def test_a_data_set_may_be_called_as_a_number_is(name):
    assert config(dataset=None, command_line=[f"--dataset={name}"])["dataset"] == name
    with pytest.raises(UserError, match="dataset: must be the name of a data set, got None"):
        configure("Mamba4Rec", None, None, {"dataset": None})


def test_dataset_must_be_a_name():
    with pytest.raises(UserError, match="'../data/x' is a path; give its folder as data_path"):
        config(dataset="../data/x")


def test_every_model_is_found_and_has_properties():
    assert {"Mamba4Rec", "2Mamba4Rec", "Hydra4Rec", "SASRec", "GRU4Rec", "BERT4Rec"} <= set(model_names())
    for name, model in MODELS.items():
        assert get_model(name) is model
        for line in (PROPERTIES / "model" / f"{name}.yaml").read_text().splitlines():
            assert line.startswith("# ") or "  # (" in line, line


def test_every_properties_file_is_a_mapping():
    for file in PROPERTIES.rglob("*.yaml"):
        assert isinstance(yaml.safe_load(file.read_text()), dict), file


def test_frozen_keys():
    """A new key is a promise: it belongs in the README and in CHANGELOG.md, and then here."""
    ours = {key for file in PROPERTIES.glob("model/*.yaml") for key in yaml.safe_load(file.read_text())}
    assert sorted(ours) == [
        "MAX_ITEM_LIST_LENGTH", "base_model", "base_model_download", "base_model_dtype", "bm25_b", "bm25_k1",
        "d_conv", "d_state", "dropout_prob", "dt_init", "epochs", "eval_batch_size", "expand", "feed_forward",
        "ft_ratio", "fusion_weight", "gap_enters", "gated_residual", "gbce_t", "gradient_checkpointing", "head_dim",
        "hidden_size", "initializer_range", "joint_norm", "label_smoothing", "learning_rate", "length_penalty",
        "logq_correction", "lora_alpha", "lora_dropout", "lora_modules", "lora_r", "loss_type", "lr_scheduler",
        "lr_scheduler_args", "lr_scheduler_interval", "mask_ratio", "n_groups", "negative_power",
        "norm_position", "num_beams", "num_candidates", "num_layers", "num_negatives", "num_queries",
        "orpo_lambda", "orpo_probabilities", "orpo_rejected", "prompt_batch_tokens", "prompt_history",
        "prompt_tokens", "quantize_4bit", "query_calendar", "query_enters", "random_base_args", "readout",
        "rerank", "residual", "retriever", "retriever_checkpoint", "retriever_config", "score", "stopping_step",
        "temperature", "time", "title_field", "title_tokens", "train_batch_size", "train_candidates",
        "train_last", "train_neg_sample_args", "train_objective", "verbalizer",
    ]  # fmt: skip
    assert sorted(yaml.safe_load((PROPERTIES / "overall.yaml").read_text())) == [
        "adaptive_batch", "adaptive_batch_args", "amp_dtype", "average_power", "checkpoint_keep", "checkpoint_steps",
        "cuda_graphs", "dataset", "eval_args", "eval_rows", "gradient_accumulation_steps", "learner_args",
        "learner_groups", "legacy_time_order", "load_col", "lr_scheduler", "lr_scheduler_args",
        "lr_scheduler_interval", "lr_warmup", "measure_latency", "metrics", "model", "on_bad_lines",
        "packed_window", "preset", "ssm_backend", "ties", "ties_seed", "train_last", "train_mode",
        "train_newest", "train_rows", "valid_metric",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "Hydra4Rec",
            {"train_mode": "packed"},
            "train_mode: packed is not possible, because Hydra4Rec is bidirectional",
        ),
        ("2Mamba4Rec", {"train_mode": "packed", "readout": "mean"}, "because readout: mean takes a history as one"),
        ("STAMP", {"train_mode": "packed"}, "because STAMP is RecBole's own, which reads one position of a row"),
        ("SASRec", {"train_mode": "packed", "transform": "crop_itemseq"}, "because transform: crop_itemseq changes"),
        ("SASRec", {"train_mode": "paked"}, "'paked' is not one of None, packed, prefix, masked; did you mean"),
        ("STAMP", {"loss_type": "gBCE"}, "loss_type: 'gBCE' is not one of BPR, CE"),
        (
            "Mamba4Rec",
            {"train_mode": "packed", "loss_type": "BPR", "train_neg_sample_args": {"sample_num": 4}},
            "more than one",
        ),
        ("Mamba4Rec", {"loss_type": "gBCE", "train_neg_sample_args": {"sample_num": 4}}, "gBCE draws its own samples"),
        ("Mamba4Rec", {"gbce_t": 2.0}, "gbce_t: must lie in"),
        ("Mamba4Rec", {"negative_power": -1.0}, "negative_power: must be 0 or more"),
        ("Mamba4Rec", {"packed_window": 0}, "packed_window: must be at least 1, got 0"),
        ("Mamba4Rec", {"checkpoint_steps": "often"}, "checkpoint_steps: must be a whole number, got 'often'"),
    ],
)
def test_training_keys_are_checked(model, options, message):
    with pytest.raises(UserError) as caught:
        config(model, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "mode", "window", "context"),
    [
        ("Mamba4Rec", "packed", 20, 20),
        ("SASRec", "packed", 10, 11),
        ("Hydra4Rec", "prefix", 20, 20),
        ("GRU4Rec", "packed", 20, 20),
        ("STAMP", "prefix", None, None),
    ],
)
def test_train_mode_follows_the_model(model, mode, window, context):
    found = config(model)
    assert (found["train_mode"], found["packed_window"], found["packed_context"]) == (mode, window, context)
