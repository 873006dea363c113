"""The trainer: hooks, accumulation, precision, schedules, latency, and losses that are none."""

import errno
import json
import pathlib

import numpy as np
import pytest
import torch

from recbole_ssm import run_recbole_ssm
from recbole_ssm.config import SSMConfig
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.trainer import Hook, SSMTrainer, checkpoint


def build(model, toy, hooks=(), **options):
    """A trainer with a fresh model, and its loaders."""
    config = SSMConfig(model, toy["dataset"], config_dict={**toy["config_dict"], **options})
    train, valid, _ = create_loaders(config, create_dataset(config))
    torch.manual_seed(0)
    return SSMTrainer(config, get_model(model)(config, train._dataset), hooks), train, valid


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
    evaluation = ["on_evaluation_start", "on_evaluation_batch_start", "on_scores", "on_evaluation_batch_end"]
    epoch = ["on_epoch_start", *step, *step, "on_epoch_end", *evaluation, "on_evaluation_end"]
    assert recorder.calls == ["on_fit_start", *epoch, *epoch, "on_fit_end"]
    saved = checkpoint.newest(trainer.folder)[1]
    assert saved.info["training"]["hooks"] == {"Recorder": {"calls": len(recorder.calls) - 1}}


def test_every_hook_method_is_there_to_override():
    moments = {name for name in vars(Hook) if name.startswith("on_")}
    source = (pathlib.Path(__file__).parent.parent.parent / "recbole_ssm/trainer/trainer.py").read_text()
    assert moments == {name for name in moments if f'"{name}"' in source}


@pytest.mark.parametrize("model", ["2Mamba4Rec", "Hydra4Rec", "GRU4Rec"])
def test_a_step_in_parts_is_the_step(toy, model):
    """Gradient accumulation changes nothing but the memory, whatever lies in the parts."""
    dropout = {"dropout_prob": 0.0} if model != "GRU4Rec" else {"dropout_prob": 0.0, "num_layers": 1}
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


def test_a_loss_that_is_not_finite_names_its_batch_and_keeps_the_last_good_checkpoint(toy):
    class Poison(Hook):
        def on_step_start(self, trainer, step):
            if trainer.global_step == 7:
                with torch.no_grad():
                    trainer.model.item_embedding.weight.fill_(torch.inf)

    trainer, train, valid = build("2Mamba4Rec", toy, [Poison()], epochs=3)
    with pytest.raises(UserError, match=r"epoch 1, step 2: the training loss became nan; try .*the last good .* saved"):
        trainer.fit(train, valid)
    path, saved = checkpoint.newest(trainer.folder)
    assert path.name == "step-000000005.safetensors"
    assert all(torch.isfinite(t).all() for n, t in saved.tensors.items() if n.startswith("model."))


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(toy, monkeypatch):
    trainer, train, valid = build("2Mamba4Rec", toy, epochs=3)
    real, count = checkpoint.save_file, []

    def fills_up(tensors, path, metadata):
        count.append(path)
        if len(count) > 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    with pytest.raises(OSError, match=r"checkpoint saved.* was not written: No space left on device"):
        trainer.fit(train, valid)
    assert sorted(p.name for p in trainer.folder.iterdir()) == ["best.safetensors", "step-000000005.safetensors"]
    assert checkpoint.newest(trainer.folder)[1].info["training"]["epoch"] == 1


@pytest.mark.parametrize("model", ["2Mamba4Rec", "GRU4Rec"])
def test_latency_is_split_and_written(toy, model, caplog):
    options = {**toy["config_dict"], "measure_latency": True, "epochs": 3, "state": "INFO"}
    with caplog.at_level("INFO"):
        result = run_recbole_ssm(model, "toy", config_dict=options)
    report = json.loads((pathlib.Path(result["checkpoint"]).parent / "latency.json").read_text())
    assert set(report) == {"step", "encode", "score", "top_k", "evaluate", "peak_memory_bytes"}
    assert report["step"]["count"] == 15 - 3 and report["evaluate"]["count"] == 4 - 3
    for part in ("step", "encode", "score", "top_k", "evaluate"):
        assert 0 < report[part]["p50_s"] <= report[part]["p95_s"] <= report[part]["p99_s"]
    parts = sum(report[part]["p50_s"] for part in ("encode", "score", "top_k"))
    assert parts == pytest.approx(report["evaluate"]["p50_s"], rel=0.05)
    assert report["step"]["targets_per_second"] > 0 and report["evaluate"]["users_per_second"] > 0
    assert report["peak_memory_bytes"] > 10**7
    assert "latency after 3 warm-up rounds" in caplog.text


def test_other_optimisers_state_comes_back(toy):
    """A state that is no tensor too."""
    state = {"state": {0: {"step": 3, "buffer": None, "sum": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    tensors, info = checkpoint.flatten_optimizer(state)
    assert checkpoint.unflatten_optimizer(tensors, json.loads(json.dumps(info))) == {
        "state": {0: {"step": 3, "buffer": None, "sum": tensors["optimizer.0.sum"]}},
        "param_groups": [{"lr": 0.1}],
    }
