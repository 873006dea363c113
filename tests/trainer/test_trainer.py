"""The trainer: hooks, accumulation, precision, schedules, latency, and losses that are none."""

import csv
import errno
import json
import math
import pathlib
import time
import types

import numpy as np
import pytest
import torch

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import Hook, Latency, Trainer, checkpoint
from recbole_ssm.trainer.step_sizes import StepSizes


def build(model, toy, hooks=(), **options):
    """A trainer with a fresh model, and its loaders."""
    config = configure(model, toy["dataset"], config_dict={**toy["config_dict"], **options})
    train, valid, _ = create_loaders(config, create_dataset(config))
    torch.manual_seed(0)
    return Trainer(config, get_model(model)(config, train._dataset), hooks), train, valid


class Recorder(Hook):
    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda trainer, *what: self.calls.append(name)
        return super().__getattribute__(name)

    def state_dict(self):
        return {"calls": len(self.calls)}


def test_hooks_are_called_in_this_order(toy):
    recorder = Recorder()
    trainer, train, valid = build("2Mamba4Rec", toy, [recorder], epochs=2, train_batch_size=300)
    trainer.fit(train, valid)
    step = ["on_step_start", "on_gradients", "on_step_end"]
    batch = ["on_evaluation_batch_start", "on_scores", "on_evaluation_batch_end"]
    evaluation = ["on_evaluation_start", *batch, "on_ranking"]
    validation = ["on_validation_start", *evaluation, "on_evaluation_end"]
    epoch = ["on_epoch_start", *step, *step, "on_epoch_end", *validation]
    assert recorder.calls == ["on_fit_start", *epoch, *epoch, "on_fit_end"]
    saved = checkpoint.newest(trainer.folder)[1]
    assert saved.info["training"]["hooks"] == {"Recorder": {"calls": len(recorder.calls) - 1}}


@pytest.mark.parametrize(("epochs", "validates"), [(0, True), (1, False)])
def test_hooks_are_told_where_no_epoch_is_validated(toy, epochs, validates):
    recorder = Recorder()
    trainer, train, valid = build("2Mamba4Rec", toy, [recorder], epochs=epochs)
    trainer.fit(train, valid if validates else None)
    assert recorder.calls[:2] == ["on_fit_start", "on_no_validation"]
    assert recorder.calls.count("on_no_validation") == 1 and "on_validation_start" not in recorder.calls


def test_processes_do_not_race_for_the_folder_of_checkpoints(toy, tmp_path, monkeypatch):
    """RecBole looks whether it is there, then makes it, and fails if another process did so in between."""
    seen = []
    monkeypatch.setattr("recbole.trainer.trainer.ensure_dir", lambda path: seen.append(pathlib.Path(path).is_dir()))
    build("2Mamba4Rec", toy, checkpoint_dir=str(tmp_path / "new" / "saved"))
    assert seen == [True]


def test_every_hook_method_is_there_to_override():
    moments = {name for name in vars(Hook) if name.startswith("on_")}
    folder = pathlib.Path(__file__).parent.parent.parent / "recbole_ssm/trainer"
    source = "".join((folder / name).read_text() for name in ("trainer.py", "evaluate.py"))
    assert moments == {name for name in moments if f'"{name}"' in source}


@pytest.mark.parametrize("model", ["2Mamba4Rec", "Hydra4Rec", "GRU4Rec", "STAMP"])
def test_a_step_in_parts_is_the_step(toy, model):
    """Gradient accumulation changes nothing but the memory, whatever lies in the parts."""
    dropout = {} if model == "STAMP" else {"dropout_prob": 0.0}  # which has none
    weights = []
    for parts in (1, 4):
        trainer, train, _ = build(model, toy, epochs=2, gradient_accumulation_steps=parts, **dropout)
        trainer.model.double()
        trainer.fit(train, saved=False)
        weights.append(torch.cat([w.detach().flatten() for w in trainer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-8)


def test_prefix_and_packed_training_take_the_same_steps(toy):
    for mode, positions in (("packed", 1.0), ("prefix", 5.5)):
        _, train, _ = build("2Mamba4Rec", toy, epochs=1, train_mode=mode)
        assert len(train.steps) == 5 and train.plan.total == 537
        order = train.plan.epoch(np.random.default_rng(0))
        rows = order[:, :2] if mode == "packed" else order
        assert train.plan.work(rows).sum() / 537 == pytest.approx(positions, rel=0.2)


def test_clipping_sees_the_gradient_that_is_applied(toy):
    class Norm(Hook):
        def on_gradients(self, trainer, step):
            self.norm = torch.nn.utils.get_total_norm(p.grad for p in trainer.model.parameters()).item()

    norm = Norm()
    trainer, train, _ = build("2Mamba4Rec", toy, [norm], epochs=1, learner="sgd", clip_grad_norm={"max_norm": 1e-3})
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer._run_step(next(iter(train)))
    moved = torch.nn.utils.get_total_norm([p - b for p, b in zip(trainer.model.parameters(), before)])
    assert norm.norm > 0.01
    assert moved.item() == pytest.approx(0.01 * 1e-3, rel=1e-2)  # learning rate times the clipped norm


def test_mixed_precision_learns_too(toy):
    result = run_recbole_ssm("2Mamba4Rec", "toy", config_dict={**toy["config_dict"], "enable_amp": True, "epochs": 6})
    assert result["test_result"]["hit@1"] > 0.9


@pytest.mark.parametrize(
    ("interval", "schedule", "arguments", "rates"),
    [
        ("epoch", "StepLR", {"step_size": 1, "gamma": 0.1}, [0.01, 0.001]),
        ("step", "LambdaLR", None, None),
        ("step", "ConstantLR", {"factor": 0.5, "total_iters": 5}, [0.005, 0.01]),
    ],
)
def test_learning_rates_follow_pytorchs_schedules(toy, interval, schedule, arguments, rates):
    class Rates(Hook):
        def __init__(self):
            self.rates = []

        def on_epoch_start(self, trainer, epoch):
            self.rates.append(trainer.optimizer.param_groups[0]["lr"])

    options = {"lr_scheduler": schedule, "lr_scheduler_args": arguments, "lr_scheduler_interval": interval}
    hook = Rates()
    if rates is None:
        with pytest.raises(UserError, match="lr_scheduler_args: LambdaLR does not take {} .*lr_lambda"):
            build("2Mamba4Rec", toy, **options)
        return
    trainer, train, valid = build("2Mamba4Rec", toy, [hook], epochs=2, **options)
    trainer.fit(train, valid, saved=False)
    assert hook.rates == pytest.approx(rates)


def test_unknown_schedules_are_named(toy):
    with pytest.raises(UserError, match="no scheduler 'OneCicleLR'; did you mean 'OneCycleLR'?"):
        build("2Mamba4Rec", toy, lr_scheduler="OneCicleLR")


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ({}, "a smaller learning_rate than 0.01"),
        (
            {"learner": "usgm", "learner_args": {"D": 20, "rho": 0.01}},
            "a smaller D or rho in learner_args than .*20.*",
        ),
    ],
)
def test_a_loss_that_is_not_finite_names_its_batch_and_keeps_the_last_good_checkpoint(toy, options, mend):
    class Poison(Hook):
        def on_step_start(self, trainer, step):
            if trainer.global_step == 7:
                with torch.no_grad():
                    trainer.model.item_embedding.weight.fill_(torch.inf)

    trainer, train, valid = build("2Mamba4Rec", toy, [Poison()], epochs=3, **options)
    message = rf"epoch 1, step 2: the training loss became nan; try {mend} .*the last good .* saved"
    with pytest.raises(UserError, match=message):
        trainer.fit(train, valid)
    path, saved = checkpoint.newest(trainer.folder)
    assert path.name == "step-000000005.safetensors"
    assert all(torch.isfinite(t).all() for n, t in saved.tensors.items() if n.startswith("model."))


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(toy, monkeypatch):
    trainer, train, valid = build("2Mamba4Rec", toy, epochs=3)
    count = []

    def fills_up(descriptor):
        count.append(descriptor)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fills_up)
    with pytest.raises(OSError, match=r"checkpoint saved.* was not written: No space left on device"):
        trainer.fit(train, valid)
    assert sorted(p.name for p in trainer.folder.glob("*.safetensors")) == [
        "best.safetensors",
        "step-000000005.safetensors",
    ]
    assert checkpoint.newest(trainer.folder)[1].info["training"]["epoch"] == 1


class WeightAtEvaluation(Hook):
    """Keeps a weight and its mean as each evaluation meets them."""

    def __init__(self):
        self.seen = []

    def on_evaluation_start(self, trainer):
        weight = trainer.model.item_embedding.weight
        self.seen.append((weight.detach().clone(), trainer.optimizer.state[weight]["average"].clone()))


def test_the_mean_is_what_is_validated_and_what_training_leaves(toy):
    trainer, train, valid = build("2Mamba4Rec", toy, [WeightAtEvaluation()], epochs=2, average_power=4)
    trainer.fit(train, valid, saved=False)
    seen = trainer.hooks[0].seen
    assert len(seen) == 2
    weight = trainer.model.item_embedding.weight
    assert torch.equal(weight, trainer.optimizer.state[weight]["average"])
    for validated, mean in (*seen, (weight, seen[-1][1])):
        assert torch.equal(validated, mean)


@pytest.mark.parametrize(
    "options",
    [{"average_power": 4}, {"learner": "usfgm", "learner_args": {"D": 50}}, {"average_power": None}],
)
def test_a_second_fit_goes_on_where_the_optimiser_stands(toy, options):
    whole, train, valid = build("2Mamba4Rec", toy, epochs=3, dropout_prob=0.0, **options)
    whole.fit(train, valid, saved=False)
    twice, train, valid = build("2Mamba4Rec", toy, epochs=1, dropout_prob=0.0, **options)
    twice.fit(train, valid, saved=False)
    twice.epochs = 3
    twice.fit(train, valid, saved=False)
    for one, other in zip(whole.model.parameters(), twice.model.parameters()):
        assert torch.equal(one, other)


def test_usgm_trains_and_its_average_is_what_is_tested_and_served(toy, caplog):
    options = {**toy["config_dict"], "learner": "usgm", "epochs": 30, "state": "INFO"}
    options |= {"learner_args": {"D": 100, "rho": 0.01}, "average_power": 8}
    with caplog.at_level("INFO"):
        result = run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options)
    assert result["test_result"]["hit@1"] > 0.9
    assert "usgm: group 0 H " in caplog.text
    saved = checkpoint.read(pathlib.Path(result["checkpoint"]))
    name = "item_embedding.weight"
    assert not torch.equal(saved.tensors[f"model.{name}"], saved.tensors[f"iterate.{name}"])
    averages = [t for n, t in saved.tensors.items() if n.endswith(".average")]
    assert any(torch.equal(saved.tensors[f"model.{name}"], average) for average in averages)
    with open(pathlib.Path(result["checkpoint"]).parent / "step_size.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 30 * 5 + 1))
    sizes = [float(row["group_0"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    served = load_recommender(result["checkpoint"]).model.item_embedding.weight
    assert torch.equal(served, saved.tensors[f"model.{name}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learner": "usgm"}, "learner_args: usgm does not take {} .*'D'"),
        ({"learner": "adam", "learner_args": {"beta": 1}}, "learner_args: adam does not take {'beta': 1}"),
        (
            {"average_power": -1},
            "average_power: must be 0 or more, got -1; leave it empty",
        ),
        ({"average_power": False}, "average_power: must be a number, got False; leave it empty"),
        (
            {"learner": "usfgm", "learner_args": {"D": 1}, "average_power": 1},
            "average_power: usfgm has an output of its own; leave average_power empty",
        ),
        ({"learner": "usgm", "learner_args": {"D": -1}}, "USGM: D is -1; give a positive number"),
        ({"learner": "usgm", "learner_args": {"D": 1, "same_batch": True}}, "learner_args: same_batch takes each"),
        (
            {"learner_groups": {"item_embeding*": {}}},
            "learner_groups: 'item_embeding.' fits no parameter .*did you mean",
        ),
        ({"learner_groups": {"*": {"lrr": 1}}}, "learner_groups: adam has no 'lrr' of a group; did you mean 'lr'"),
        ({"learner_groups": 3}, "learner_groups: must be a mapping such as {'item_embedding"),
        ({"learner": "usgm", "learner_args": {"D": 1}, "lr_scheduler": "StepLR"}, "usgm finds its own step size"),
    ],
)
def test_learners_arguments_are_checked(toy, options, message):
    with pytest.raises(UserError, match=message):
        build("2Mamba4Rec", toy, **options)


def test_learners_take_their_arguments(toy):
    trainer, _, _ = build("2Mamba4Rec", toy, learner="adam", learner_args={"betas": [0.8, 0.9]}, weight_decay=0.1)
    group = trainer.optimizer.param_groups[0]
    assert (tuple(group["betas"]), group["weight_decay"], group["lr"]) == ((0.8, 0.9), 0.1, 0.01)


def test_a_plateau_of_a_score_that_should_rise(toy):
    trainer, _, _ = build("2Mamba4Rec", toy, lr_scheduler="ReduceLROnPlateau")
    assert trainer.learner.scheduler.mode == "max"
    with pytest.raises(UserError, match="lr_scheduler_interval: ReduceLROnPlateau looks at validation; take 'epoch'"):
        build("2Mamba4Rec", toy, lr_scheduler="ReduceLROnPlateau", lr_scheduler_interval="step")


def test_a_cycle_that_is_too_short_is_refused_before_training(toy):
    options = {"lr_scheduler": "OneCycleLR", "lr_scheduler_args": {"max_lr": 0.1, "total_steps": 7}}
    trainer, train, _ = build("2Mamba4Rec", toy, epochs=2, lr_scheduler_interval="step", **options)
    with pytest.raises(UserError, match="total_steps is 7, but 10 steps come; give 10"):
        trainer.fit(train, saved=False)
    adaptive = {"adaptive_batch": "hoelder", "adaptive_batch_args": {"D": 5}}
    with pytest.raises(UserError, match="OneCycleLR ends after total_steps, and adaptive_batch changes how many come"):
        build("2Mamba4Rec", toy, lr_scheduler_interval="step", **options, **adaptive)


@pytest.mark.parametrize("split", [{"LS": "test_only"}, {"LS": "valid_only"}, {"RS": [1, 0, 0]}])
def test_splits_without_rows_to_evaluate(toy, split):
    options = {**toy["config_dict"], "epochs": 1, "eval_args": {"split": split}}
    result = run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options)
    assert (result["test_result"] is None) == (split != {"LS": "test_only"})
    assert pathlib.Path(result["checkpoint"]).exists()


def test_a_model_brings_its_hooks_and_a_hook_its_part_of_the_result(toy, monkeypatch):
    class Validations(Hook):
        seen = 0

        def on_validation_start(self, trainer, loader):
            self.seen += len(loader._dataset)

        def result(self):
            return {"validated": self.seen}

    monkeypatch.setattr(get_model("2Mamba4Rec"), "hooks", lambda model: [Validations()], raising=False)
    result = run_recbole_ssm("2Mamba4Rec", "toy", config_dict={**toy["config_dict"], "epochs": 2})
    assert result["validated"] == 2 * 60


def test_no_two_hooks_share_a_state(toy):
    with pytest.raises(UserError, match="hooks: two hooks of class Recorder; their saved states would overwrite"):
        build("2Mamba4Rec", toy, [Recorder(), Recorder()])


def test_samples_of_an_evaluation_are_always_the_same(toy):
    """In every epoch, and with worker processes."""
    results = []
    for worker in (0, 2):
        trainer, _, valid = build("STAMP", toy, worker=worker, eval_args={"mode": "uni10"})
        results += [trainer.evaluate(valid, load_best_model=False) for _ in range(2)]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("model", ["2Mamba4Rec", "STAMP"])
def test_latency_is_split_and_written(toy, model, caplog):
    options = {**toy["config_dict"], "measure_latency": True, "epochs": 3, "state": "INFO"}
    with caplog.at_level("INFO"):
        result = run_recbole_ssm(model, "toy", config_dict=options)
    report = json.loads((pathlib.Path(result["checkpoint"]).parent / "latency.json").read_text())
    assert set(report) == {"step", "encode", "score", "evaluate", "peak_memory_bytes"}
    assert report["step"]["count"] == 15 - 3 and report["evaluate"]["count"] == 4 - 3
    for part in ("step", "encode", "score", "evaluate"):
        assert 0 < report[part]["p50_s"] <= report[part]["p95_s"] <= report[part]["p99_s"]
    assert report["step"]["targets_per_second"] > 0 and report["evaluate"]["users_per_second"] > 0
    assert report["peak_memory_bytes"] > 10**7
    assert "latency after 3 warm-up rounds" in caplog.text


def test_a_slow_encoder_shows_as_such(toy):
    latency = Latency()
    trainer, _, valid = build("2Mamba4Rec", toy, [latency])
    fast = type(trainer.model).forward

    class Slow(type(trainer.model)):
        def forward(self, *args):
            time.sleep(0.3)
            return fast(self, *args)

    trainer.model.__class__ = Slow
    trainer.evaluate(valid, load_best_model=False)
    report = latency.report()
    assert report["evaluate"]["p50_s"] >= report["encode"]["p50_s"] >= 0.3 > report["score"]["p50_s"]
    assert "forward" not in vars(trainer.model)


def test_other_optimisers_state_comes_back(toy):
    """A state that is no tensor too."""
    state = {"state": {0: {"step": 3, "buffer": None, "sum": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    tensors, info = checkpoint.flatten_optimizer(state)
    assert checkpoint.unflatten_optimizer(tensors, json.loads(json.dumps(info))) == {
        "state": {0: {"step": 3, "buffer": None, "sum": tensors["optimizer.0.sum"]}},
        "param_groups": [{"lr": 0.1}],
    }


def test_the_step_sizes_of_a_long_run_are_thinned_out(monkeypatch):
    monkeypatch.setattr("recbole_ssm.trainer.step_sizes.ROWS", 10)
    trainer = types.SimpleNamespace(optimizer=types.SimpleNamespace(step_sizes=lambda: [1.0, math.inf]))
    sizes = StepSizes()
    for trainer.global_step in range(1, 101):
        sizes.on_step_end(trainer, None, 0.0)
    again = StepSizes()
    again.load_state_dict(json.loads(json.dumps(sizes.state_dict())))
    assert again.rows == [[step, 1.0, None] for step in range(16, 101, 16)] and again.every == 16
