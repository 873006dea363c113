"""What is seen of a run, what its files keep, and what commands are called."""

import json
import logging
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from recbole_ssm import __version__, console, errors, run_recbole_ssm
from recbole_ssm.bench import BENCHES
from recbole_ssm.cli import main
from recbole_ssm.console import progress_bar
from recbole_ssm.ops import backend
from recbole_ssm.quick_start import configure
from recbole_ssm.study import STUDIES
from tests.conftest import REPOSITORY

TOY = ["--dataset=toy", f"--data_path={REPOSITORY / 'dataset'}"]


@pytest.fixture
def main_alone(monkeypatch):
    """``main`` without the handlers that pytest has on the root logger, as in a process of its own."""
    root = logging.getLogger()
    level = root.level

    def run(arguments):
        monkeypatch.setattr(root, "handlers", [])
        return main(arguments)

    yield run
    for handler in root.handlers:
        handler.close()
    root.setLevel(level)
    console.set_quiet(False)


def test_a_run_fits_a_screen_and_its_files_keep_the_rest(main_alone, capsys, monkeypatch):
    # Backends are logged once in a process, and another test may have come before.
    monkeypatch.setattr(backend, "_logged", set())
    assert main_alone(["train", *TOY, "--model=Hydra4Rec", "--epochs=6"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert 10 < len(lines) + len(out.splitlines()) <= 40, err + out
    assert "WARNING" not in err and "Embedding(" not in err and "hidden_size" not in err and "\r" not in err + out
    assert re.search(r"Hydra4Rec on toy; data_path: '.*dataset', epochs: 6; log: log/Hydra4Rec/.*\.log$", lines[0])
    assert sum("leave-one-out" in line for line in lines) <= 1
    told = re.compile(r"  epoch \d+: loss [\d.]+, [\d.]+ s, [\d,]+ events/s; valid hit@1 [\d.]+, ")
    epochs = [line for line in lines if told.search(line)]
    assert len(epochs) == 6 and "the best so far" in epochs[0]

    (folder,) = Path("saved").iterdir()
    assert f"run: {folder}, with the checkpoints and all settings, config.yaml" in err
    assert "hidden_size: 64" in (folder / "config.yaml").read_text()
    (log,) = Path("log", "Hydra4Rec").iterdir()
    kept = log.read_text()
    assert all(text in kept for text in ("hidden_size: 64", "Embedding(", "backend ", "head items", "test result"))
    assert "\x1b" not in kept


def test_the_closing_block_names_the_metrics_the_folder_and_the_next_commands(main_alone, capsys):
    assert main_alone(["train", *TOY, "--model=GRU4Rec", "--epochs=1", "--topk=[1,5]"]) == 0
    out = capsys.readouterr().out
    (folder,) = Path("saved").iterdir()
    block = out.strip().splitlines()
    assert block[0].split() == ["test", "result", "unmasked", "history", "masked"]
    assert [line.split()[0] for line in block[1:7]] == ["hit@1", "hit@5", "ndcg@1", "ndcg@5", "mrr@1", "mrr@5"]
    assert len({len(line) for line in block[:7]}) == 1, "aligned"
    assert block[7] == "(history masked: items that the user had before are left out of the list)"
    assert f"run   {folder}" in block
    commands = [line.partition("recbole-ssm ")[2].replace("'", "").split() for line in block if "recbole-ssm " in line]
    assert [command[0] for command in commands] == ["recommend", "evaluate", "compare"]
    # Those that train nothing do what they say.
    for command in commands[:2]:
        assert main(command) == 0
    assert Path("recommendations.csv").is_file() and "hit@20" in capsys.readouterr().out
    assert commands[2][1:] == ["--models=GRU4Rec,SASRec", "--datasets=toy", TOY[1], "--seeds=3"]


def test_the_command_to_compare_a_ranker_names_its_base_model():
    config = configure("LlamaRec", "toy", config_dict={"base_model": "some/model"})
    block = console.closing(config, {"test_result": None, "checkpoint": None})
    assert block.endswith("--models=LlamaRec,SASRec --datasets=toy --LlamaRec.base_model=some/model --seeds=3")


def test_names_in_the_next_commands_can_be_pasted():
    class Mine(dict):
        class_path, changed = "my models.mine:M", {}

    config = Mine(model="M", dataset="my data", topk=[10])
    text = console.closing(config, {"test_result": None, "checkpoint": "saved/a b/best.safetensors"})
    recommend, _, compare = [shlex.split(line.partition("recbole-ssm ")[2]) for line in text.splitlines()[-3:]]
    assert recommend[:3] == ["recommend", "saved/a b", "--model=my models.mine:M"]
    assert compare[1:3] == ["--models=my models.mine:M,SASRec", "--datasets=my data"]


def test_an_epoch_of_which_nothing_was_left_to_train_has_no_speed():
    assert console.trained_in_words(1.5, 2.0, 100) == "loss 1.5000, 2.0 s, 50 events/s"
    assert console.trained_in_words(1.5, 0.001, 0) == "loss 1.5000"


def test_quiet_leaves_the_result(main_alone, capsys):
    assert main_alone(["--quiet", *TOY, "--model=Pop", "--epochs=1"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.strip().startswith("test result") and "unmasked" in out


def test_a_second_run_has_a_log_of_its_own(main_alone):
    assert main_alone([*TOY, "--model=GRU4Rec", "--epochs=0"]) == main([*TOY, "--model=NARM", "--epochs=0"]) == 0
    (first,), (second,) = (list(Path("log", model).iterdir()) for model in ("GRU4Rec", "NARM"))
    assert "GRU4Rec on toy" in first.read_text() and "NARM" not in first.read_text()
    assert "NARM on toy" in second.read_text() and "GRU4Rec" not in second.read_text()


def test_an_application_that_logs_by_itself_is_left_alone(toy):
    root = logging.getLogger()
    before = list(root.handlers), root.level
    assert before[0], "pytest's"
    run_recbole_ssm("Pop", **toy)
    assert (list(root.handlers), root.level) == before and not Path("log").exists()


@pytest.mark.parametrize("model", ["2Mamba4Rec", "Hydra4Rec", "SASRec", "BERT4Rec", "Pop"])
def test_the_settings_of_a_run_train_it_again(model, toy, tmp_path):
    first = configure(model, **toy, command_line=["--learning_rate=0.002", "--train_batch_size=64", "--gpu_id=0,1"])
    assert first.changed["learning_rate"] == 0.002
    (tmp_path / "config.yaml").write_text(first.as_yaml())
    again = configure(config_file_list=[tmp_path / "config.yaml"])
    assert again.final_config_dict == first.final_config_dict


@pytest.mark.parametrize(
    ("terminal", "quiet", "wanted", "drawn"),
    [(True, False, True, True), (False, False, True, False), (True, True, True, False), (True, False, False, False)],
)
def test_bars_are_drawn_on_terminals_alone(terminal, quiet, wanted, drawn, main_alone, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    console.set_quiet(quiet)
    assert sum(progress_bar(range(3), wanted, desc="steps")) == 3
    assert ("steps" in capsys.readouterr().err) == drawn


def test_alone_it_prints_its_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "recbole-ssm train " in out and "--version" in out and "--quiet" in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"recbole_ssm {__version__}\n"


def test_without_arguments_the_script_trains(monkeypatch):
    import runpy

    begun = []
    monkeypatch.setattr("recbole_ssm.quick_start.run_recbole_ssm", lambda **options: begun.append(options))
    monkeypatch.setattr(sys, "argv", ["run_recbole_ssm.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "run_recbole_ssm.py"), run_name="__main__")
    assert ended.value.code == 0 and begun[0]["command_line"] == []


COMMANDS = [
    *([name] for name in ("recommend", "evaluate", "serve", "export", "convert", "inspect")),
    *(["study", name] for name in STUDIES),
    *(["bench", name] for name in BENCHES),
]


def options_of(command, monkeypatch):
    """The options that a command's help lists."""
    found = []
    monkeypatch.setattr(
        errors.ArgumentParser, "print_help", lambda parser, *_: found.extend(parser._option_string_actions)
    )
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return {option for option in found if option.startswith("--")}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_same_words_mean_the_same_in_every_command(command, monkeypatch):
    options = options_of(command, monkeypatch)
    assert "--help" in options and not options & errors.FORMER_OPTIONS.keys()
    # One word for one of a kind, and its plural for several.
    for one, several in (("--length", "--lengths"), ("--batch_size", "--batch_sizes"), ("--dataset", "--datasets")):
        assert not {one, several} <= options


def test_a_former_word_still_counts(capsys):
    parser = errors.ArgumentParser("recbole-ssm bench step", None)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--top_k", type=int)
    assert vars(parser.parse_args(["--batch=7", "--top_k", "3"])) == {"batch_size": 7, "top_k": 3}
    hint = "recbole-ssm bench step: --batch is called --batch_size now; the old name still counts\n"
    assert capsys.readouterr().err == hint


def numbers_in(value):
    """All values within dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from numbers_in(entry)
    else:
        yield value


@pytest.mark.parametrize("mode", ["full", "uni10", "labeled"])
def test_results_are_plain_numbers(mode, write_dataset):
    lines = [f"u{u}\ti{(u + t) % 20}\t{t}\t{(u + t) % 5 + 1}" for u in range(30) for t in range(6)]
    columns = "user_id:token\titem_id:token\ttimestamp:float\trating:float\n"
    options = write_dataset(columns + "\n".join(lines) + "\n")
    metrics = {"metrics": ["Hit", "NDCG", "ItemCoverage", "GiniIndex", "TailPercentage"]}
    if mode == "labeled":
        inter = ["user_id", "item_id", "timestamp", "rating"]
        metrics = {
            "metrics": ["AUC", "LogLoss"],
            "valid_metric": "AUC",
            "threshold": {"rating": 3},
            "load_col": {"inter": inter},
        }
    options["config_dict"] |= {"epochs": 1, "state": "WARNING", "eval_args": {"mode": mode}, **metrics}
    result = run_recbole_ssm("GRU4Rec", **options)
    kinds = {type(value) for value in numbers_in(result)}
    assert kinds <= {float, int, bool, str, type(None)} and float in kinds
    json.dumps(result)


def test_tensorboard_has_every_metric_and_the_speed(toy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy["config_dict"] |= {"epochs": 2, "learning_rate": 0.003}
    result = run_recbole_ssm("GRU4Rec", **toy)
    (folder,) = Path("log_tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    both = result["test_result"].both()
    assert {name.removeprefix("masked ") for name in both} == set(result["test_result"])
    curves = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert {f"{part}/{name}" for part in ("Valid", "Test") for name in both} <= curves.keys()
    assert len(curves["Valid/masked ndcg@10"]) == 2 and len(curves["Test/masked ndcg@10"]) == 1
    assert curves["Test/hit@10"] == pytest.approx([both["hit@10"]])
    assert curves["Train/learning_rate"] == pytest.approx([0.003, 0.003])
    assert all(speed > 0 for speed in curves["Train/events_per_second"])
    # RecBole's loss is the sum over the steps, ours the mean.
    assert curves["Loss/Train"][0] > curves["Train/loss"][0] > 0


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")], ids=["absent", "folder"])
def test_a_missing_wandb_is_told_before_the_data_is_read(found, monkeypatch, capsys):
    """The folder that wandb leaves where it ran can be imported, and is no wandb."""
    monkeypatch.setitem(sys.modules, "wandb", found)
    assert main(["--log_wandb=True", "--dataset=absent", "--show_progress=False"]) == 2
    message = "log_wandb: wandb is not installed; run: pip install wandb, or take log_wandb: False"
    assert capsys.readouterr().err.splitlines()[-1] == f"recbole_ssm: error: {message}"


def test_wandb_gets_what_tensorboard_gets(toy, monkeypatch):
    sent = []
    wandb = types.ModuleType("wandb")
    wandb.run = types.SimpleNamespace(summary={})
    wandb.init = wandb.define_metric = lambda *args, **options: None
    wandb.log = lambda values, commit: sent.append(values)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    toy["config_dict"] |= {"epochs": 2, "log_wandb": True}
    result = run_recbole_ssm("GRU4Rec", **toy)
    training = [values for values in sent if "train_step" in values]
    validation = [values for values in sent if "valid_step" in values]
    assert [values["train_step"] for values in training] == [values["valid_step"] for values in validation] == [0, 1]
    assert {"train/train_loss", "train/loss", "train/learning_rate", "train/events_per_second"} <= training[0].keys()
    assert {f"valid/{name}" for name in result["test_result"].both()} <= validation[0].keys()
    assert wandb.run.summary["eval/masked hit@10"] == result["test_result_masked"]["hit@10"]
