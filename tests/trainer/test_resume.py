"""Invariant 6: killed anywhere and resumed is never killed, byte for byte."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from recbole_ssm import run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.errors import UserError
from recbole_ssm.trainer import Hook, Interrupted, checkpoint

SCHEDULES = {
    "MultiStepLR": {"milestones": [2, 6], "gamma": 0.1},
    "StepLR": {"step_size": 3},
    "ReduceLROnPlateau": {"patience": 1},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 9},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 3},
    "LinearLR": {},
}
REPOSITORY = pathlib.Path(__file__).parent.parent.parent


class KilledError(Exception):
    pass


class KillAt(Hook):
    """Dies after so many steps, or in so many-th evaluation."""

    def __init__(self, step=None, evaluation=None):
        self.step, self.evaluation = step, evaluation

    def on_step_end(self, trainer, step, loss):
        if trainer.global_step == self.step:
            raise KilledError

    def on_evaluation_batch_end(self, trainer, rows):
        if self.evaluation is not None:
            self.evaluation -= 1
            if self.evaluation == 0:
                raise KilledError


class Count(Hook):
    """Counts its moments; what it has counted is part of the run."""

    def __init__(self):
        self.counts = {}

    def note(self, moment):
        self.counts[moment] = self.counts.get(moment, 0) + 1

    def on_epoch_end(self, trainer, epoch, loss):
        self.note(f"end {epoch} {loss}")

    def on_step_end(self, trainer, step, loss):
        self.note(f"step {step.number} {loss}")

    def state_dict(self):
        return self.counts

    def load_state_dict(self, state):
        self.counts = dict(state)


def last_of(folder):
    """The last checkpoint of a run."""
    saved = checkpoint.newest(pathlib.Path(folder))[1]
    saved.info["training"]["hooks"].pop("KillAt", None)
    saved.info["training"].pop("options")
    return saved


def assert_same(one, other):
    assert one.info == other.info
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


def options_of(toy, **more):
    return {**toy["config_dict"], "epochs": 2, "checkpoint_steps": 2, **more}


@pytest.fixture
def straight(toy):
    """A run never killed, and the options that made it."""

    def run(model, **more):
        options = options_of(toy, **more)
        result = run_recbole_ssm(model, toy["dataset"], config_dict=options, hooks=[Count()])
        return options, result, last_of(pathlib.Path(result["checkpoint"]).parent)

    return run


def kill_and_resume(model, options, **when):
    with pytest.raises(KilledError):
        run_recbole_ssm(model, "toy", config_dict=options, hooks=[Count(), KillAt(**when)])
    folder = max(pathlib.Path("saved").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    return run_recbole_ssm(resume=folder, hooks=[Count()]), last_of(folder)


def test_killed_at_every_batch(straight):
    options, result, expected = straight("2Mamba4Rec", lr_scheduler="ExponentialLR", lr_scheduler_args={"gamma": 0.9})
    for step in range(3, 11):  # the first checkpoint is that of step 2
        resumed, found = kill_and_resume("2Mamba4Rec", options, step=step)
        assert_same(found, expected)
        assert resumed["test_result"] == result["test_result"]
        assert resumed["best_valid_result"] == result["best_valid_result"]


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("2Mamba4Rec", {"average_power": 0}),
        ("SASRec", {"gradient_accumulation_steps": 2, "learner": "adagrad"}),
        ("Mamba4Rec", {"loss_type": "sampled_softmax", "lr_scheduler": "ReduceLROnPlateau", "learner": "sgd"}),
        (
            "2Mamba4Rec",
            {"learner": "usgm", "learner_args": {"D": 10, "rho": 0.05}, "average_power": 4},
        ),
        ("Mamba4Rec", {"learner": "usfgm", "learner_args": {"D": 50}}),
        ("Hydra4Rec", {"loss_type": "BPR", "lr_scheduler": "MultiStepLR", "lr_scheduler_args": {"milestones": [1]}}),
        ("BERT4Rec", {"worker": 1}),
        ("GRU4Rec", {"loss_type": "gBCE", "num_negatives": 8}),
        ("STAMP", {"eval_args": {"mode": "uni20"}}),
    ],
)
def test_killed_once_whatever_the_model_draws(straight, model, more):
    options, _, expected = straight(model, **more)
    assert_same(kill_and_resume(model, options, step=7)[1], expected)
    assert_same(kill_and_resume(model, options, evaluation=2)[1], expected)


def test_a_finished_run_only_tests_again(straight):
    _, result, _ = straight("2Mamba4Rec")
    again = run_recbole_ssm(resume=pathlib.Path(result["checkpoint"]).parent)
    assert again["test_result"] == result["test_result"]
    assert again["checkpoint"] == result["checkpoint"]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_survives_a_checkpoint(name):
    def rates(kill):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULES[name])
        found = []
        for step in range(8):
            if step == kill:
                groups, state = optimizer.state_dict()["param_groups"], checkpoint.keyed(scheduler.state_dict())
                optimizer = torch.optim.SGD([weight], lr=0.1)
                scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULES[name])
                optimizer.load_state_dict({"state": {}, "param_groups": groups})
                scheduler.load_state_dict(checkpoint.unkeyed(json.loads(json.dumps(state))))
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step(*[0.5] * (name == "ReduceLROnPlateau"))
        return found

    assert rates(kill=4) == rates(kill=None)
    assert len(set(rates(kill=None))) > 1


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("GRU4Rec", {"lr_scheduler": "cosine"}),
        ("GRU4Rec", {"lr_scheduler": "one_cycle", "lr_warmup": 0.5}),
        ("Hydra4Rec", {"train_mode": "masked"}),
    ],
    ids=["cosine", "one_cycle", "masked"],
)
def test_schedules_of_a_known_length_and_hidden_items_go_on(straight, model, options):
    options, _, expected = straight(model, **options)
    assert_same(kill_and_resume(model, options, step=5)[1], expected)


def test_an_older_checkpoint_goes_on_and_the_newer_ones_are_kept_aside(straight):
    _, first, expected = straight("2Mamba4Rec", checkpoint_steps=1, checkpoint_keep=20)
    folder = pathlib.Path(first["checkpoint"]).parent
    run_recbole_ssm(resume=folder / "step-000000003.safetensors", hooks=[Count()])
    assert_same(last_of(folder), expected)
    names = sorted(p.name for p in folder.glob("abandoned-step-*"))
    assert names == [f"abandoned-step-{n:09d}.safetensors" for n in range(4, 11)]


def best_of(path):
    """What a best checkpoint holds of its moment."""
    training = checkpoint.read(path).info["training"]
    return training["global_step"], training["best_valid_score"]


@pytest.mark.parametrize("keep", [1, 20])
def test_an_abandoned_future_leaves_no_best(straight, toy, keep):
    """A run goes back to its third step and ends where a run of one epoch ends; nothing later counts."""
    more = {"learning_rate": 0.05, "checkpoint_steps": 1}
    _, expected, _ = straight("2Mamba4Rec", epochs=1, **more)
    _, first, _ = straight("2Mamba4Rec", epochs=4, checkpoint_keep=20, **more)
    folder = pathlib.Path(first["checkpoint"]).parent
    assert best_of(folder / "best.safetensors")[0] > 5
    formers = sorted(path.name for path in folder.glob("former-best-*"))
    assert formers[0] == "former-best-000000010.safetensors"
    options = {"epochs": 1, "checkpoint_keep": keep}
    found = run_recbole_ssm(resume=folder / "step-000000003.safetensors", config_dict=options, hooks=[Count()])
    assert found["test_result"] == expected["test_result"]
    assert found["best_valid_score"] == expected["best_valid_score"]
    assert best_of(folder / "best.safetensors") == best_of(pathlib.Path(expected["checkpoint"]))
    assert not list(folder.glob("former-best-*"))
    assert len(list(folder.glob("abandoned-*"))) == 17 + 1 + len(formers)
    # From the end of the second epoch, which was the best then.
    _, first, _ = straight("2Mamba4Rec", epochs=4, checkpoint_keep=20, **more)
    _, expected, _ = straight("2Mamba4Rec", epochs=2, **more)
    folder = pathlib.Path(first["checkpoint"]).parent
    found = run_recbole_ssm(resume=folder / "step-000000010.safetensors", config_dict=options | {"epochs": 2})
    assert found["test_result"] == expected["test_result"]
    assert best_of(folder / "best.safetensors") == best_of(pathlib.Path(expected["checkpoint"]))


def test_to_evaluate_again_keeps_the_settings_of_training(straight):
    _, first, _ = straight("2Mamba4Rec", epochs=1)
    folder = pathlib.Path(first["checkpoint"]).parent
    settings = (folder / "config.yaml").read_text()
    found = run_recbole_ssm(resume=folder, config_dict={"epochs": 0})
    assert found["test_result"] == first["test_result"]
    assert (folder / "config.yaml").read_text() == settings


def test_the_best_of_a_step_is_gone_in_folders_of_former_versions(straight, caplog):
    _, first, _ = straight("2Mamba4Rec", epochs=4, checkpoint_steps=1, checkpoint_keep=20, learning_rate=0.05)
    folder = pathlib.Path(first["checkpoint"]).parent
    for path in folder.glob("former-best-*"):
        path.unlink()
    found = run_recbole_ssm(resume=folder / "step-000000007.safetensors", config_dict={"epochs": 2})
    assert "the best checkpoint until here is gone; the best from here on counts" in caplog.text
    step, score = best_of(folder / "best.safetensors")
    assert step == 10 and score == found["best_valid_score"]
    names = {path.name for path in folder.glob("abandoned-*")}
    assert "abandoned-best.safetensors" in names


def test_two_runs_in_one_folder(straight):
    _, first, _ = straight("2Mamba4Rec")
    folder = pathlib.Path(first["checkpoint"]).parent
    second = []

    class Rival(Hook):
        def on_epoch_start(self, trainer, epoch):
            with pytest.raises(UserError, match=f"{folder}: another run is at work in this folder; wait for its end"):
                run_recbole_ssm(resume=folder, config_dict={"epochs": 4})
            second.append(epoch)

    before = sorted(folder.iterdir())
    run_recbole_ssm(resume=folder, config_dict={"epochs": 3}, hooks=[Rival()])
    assert second == [2]
    assert len(before) == len(list(folder.iterdir()))


def test_a_signal_at_the_very_end_is_an_interruption_too(toy):
    class Late(Hook):
        def on_evaluation_end(self, trainer, result):
            if trainer.global_step == 10:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="go on with recbole-ssm train --resume=saved") as caught:
        run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options_of(toy), hooks=[Late()])
    assert caught.value.status == 143
    folder = next(pathlib.Path("saved").iterdir())
    assert run_recbole_ssm(resume=folder)["test_result"]


def test_more_patience_may_be_asked_for(straight):
    options = {"epochs": 30, "stopping_step": 1, "checkpoint_steps": None, "learning_rate": 0.1}
    _, first, _ = straight("2Mamba4Rec", **options)
    folder = pathlib.Path(first["checkpoint"]).parent
    steps = checkpoint.newest(folder)[1].info["training"]["global_step"]
    assert steps < 150
    run_recbole_ssm(resume=folder, config_dict={"stopping_step": 100})
    assert checkpoint.newest(folder)[1].info["training"]["global_step"] == 150


def test_more_epochs_may_be_asked_for(straight, toy):
    _, _, expected = straight("2Mamba4Rec", epochs=3)
    _, first, _ = straight("2Mamba4Rec")
    run_recbole_ssm(resume=pathlib.Path(first["checkpoint"]).parent, config_dict={"epochs": 3})
    found = last_of(pathlib.Path(first["checkpoint"]).parent)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_a_key_that_an_earlier_version_did_not_have_counts_as_its_default(straight):
    _, result, _ = straight("2Mamba4Rec")
    path = pathlib.Path(result["checkpoint"])
    saved = checkpoint.read(path)
    del saved.info["config"]["expand"], saved.info["config"]["weight_decay"]
    checkpoint.write(path, saved.tensors, saved.info)
    run_recbole_ssm(resume=path)
    with pytest.raises(UserError, match=r"resume: weight_decay is 0.5 here and was 0.0 in .*; leave it as it was"):
        run_recbole_ssm(resume=path, config_dict={"weight_decay": 0.5})


def test_other_settings_and_other_data_are_refused(straight, write_dataset):
    _, result, _ = straight("2Mamba4Rec")
    with pytest.raises(UserError, match=r"resume: learning_rate is 0.5 here and was 0.01 in .*; leave it as it was"):
        run_recbole_ssm(resume=result["checkpoint"], config_dict={"learning_rate": 0.5})
    with pytest.raises(UserError, match=r"its model is 2Mamba4Rec, not Mamba4Rec"):
        run_recbole_ssm("Mamba4Rec", resume=result["checkpoint"])
    with pytest.raises(UserError, match=r"its model is 2Mamba4Rec, not GRU4Rec"):
        run_recbole_ssm(resume=result["checkpoint"], command_line=["--model=GRU4Rec"])
    with open("rate.yaml", "w") as file:
        file.write("learning_rate: 0.7\n")
    with pytest.raises(UserError, match=r"resume: learning_rate is 0.7 here"):
        run_recbole_ssm(resume=result["checkpoint"], config_file_list=["rate.yaml"])
    lines = [f"u{u}\ti{(u + 2 * t) % 20}\t{t}\n" for u in range(4) for t in range(25)]
    other = write_dataset("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(lines), name="toy")
    path = other["config_dict"]["data_path"]
    with pytest.raises(UserError, match="resume: the items are no longer those of .*: they are in another order"):
        run_recbole_ssm(resume=result["checkpoint"], config_dict={"data_path": path})
    # The same items in the same order, and one event less.
    fewer = (REPOSITORY / "dataset" / "toy" / "toy.inter").read_text().splitlines(keepends=True)[:-1]
    write_dataset("".join(fewer), name="toy")
    with pytest.raises(UserError, match="resume: the training data is not what it was when the checkpoint was written"):
        run_recbole_ssm(resume=result["checkpoint"], config_dict={"data_path": path, "epochs": 9})


@pytest.mark.parametrize("options", [{}, {"query_enters": "output", "query_calendar": True}])
def test_a_model_that_reads_times_goes_on_and_with_the_same_times_alone(write_dataset, options):
    def write(power):
        header, *lines = (REPOSITORY / "dataset" / "toy" / "toy.inter").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        timed = [f"{user}\t{item}\t{978_300_000 + (int(time) - 1000) ** power}" for user, item, time in rows]
        return write_dataset("\n".join([header, *timed]) + "\n", name="toy")["config_dict"]

    options = options_of({"config_dict": {**write(3), "state": "WARNING", "time": "query", **options}})
    result = run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options, hooks=[Count()])
    expected = last_of(pathlib.Path(result["checkpoint"]).parent)
    resumed, found = kill_and_resume("2Mamba4Rec", options, step=5)
    assert_same(found, expected)
    assert resumed["test_result"] == result["test_result"]
    write(4)
    with pytest.raises(UserError, match="resume: the training data is not what it was when the checkpoint was written"):
        run_recbole_ssm(resume=result["checkpoint"], config_dict={"epochs": 9})


def test_recboles_own_checkpoint_needs_a_flag(toy, tmp_path, caplog):
    """RecBole writes it, its pickle is refused, and with the flag training goes on from it."""
    from recbole.trainer import Trainer

    from recbole_ssm.data import create_dataset
    from recbole_ssm.model import get_model
    from recbole_ssm.quick_start import configure

    config = configure("GRU4Rec", toy["dataset"], config_dict={**toy["config_dict"], "epochs": 2})
    model = get_model("GRU4Rec")(config, create_dataset(config))
    trainer = Trainer(config, model)
    trainer.saved_model_file = "theirs.pth"
    trainer._save_checkpoint(0)
    with pytest.raises(UserError, match=r"resume: theirs.pth is a pickle, .*say --allow_pickle=True"):
        run_recbole_ssm("GRU4Rec", **toy, resume="theirs.pth")
    toy["config_dict"]["epochs"] = 2
    result = run_recbole_ssm("GRU4Rec", **toy, resume="theirs.pth", allow_pickle=True)
    assert "loading it runs whatever code is in it" in caplog.text
    saved = checkpoint.read(pathlib.Path(result["checkpoint"]))
    assert list(saved.info["training"]["train_losses"]) == ["1"]  # epoch 0 was theirs
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk.pth: not one of RecBole's"):
        run_recbole_ssm("GRU4Rec", **toy, resume="junk.pth", allow_pickle=True)


def launch(tmp_path, *options):
    command = [sys.executable, "-m", "recbole_ssm", "train", "--model=2Mamba4Rec", "--dataset=toy"]
    command += [f"--data_path={REPOSITORY / 'dataset'}", "--show_progress=False", "--checkpoint_steps=1", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(tmp_path, pattern, process):
    while not (found := list(tmp_path.glob(pattern))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return found[0].parent


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_stop(tmp_path, toy, number):
    """Really killed, at a moment that is nobody's choice; then resumed by the command line."""
    process = launch(tmp_path, "--epochs=20")
    folder = wait_for(tmp_path, "saved/*/step-*", process)
    time.sleep(0.2)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], error[-500:]
    if number != signal.SIGKILL:
        assert f"interrupted; go on with recbole-ssm train --resume=saved/{folder.name}" in error
    assert main([f"--resume={folder}", "--show_progress=False", f"--data_path={REPOSITORY / 'dataset'}"]) == 0
    found = last_of(folder)
    result = run_recbole_ssm(
        "2Mamba4Rec", "toy", config_dict={**toy["config_dict"], "epochs": 20, "checkpoint_steps": 1, "state": "INFO"}
    )
    expected = last_of(pathlib.Path(result["checkpoint"]).parent)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
