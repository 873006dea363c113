"""The batch size follows the gradient's noise, every target is still seen once an epoch, and a resume is exact."""

import csv
import inspect
import itertools
import pathlib
import re

import pytest
import torch
import yaml

from recbole_ssm import run_recbole_ssm
from recbole_ssm.arguments import PROPERTIES
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import PackedBatch, create_loaders
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.optim import USGM, AdaptiveBatchSize
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import Hook, Trainer, checkpoint


def options_of(toy, rule, **more):
    arguments = {"every": 2, "patience": 1, "batch_min": 8, "batch_max": 512, **more.pop("adaptive_batch_args", {})}
    if rule == "hoelder":
        arguments = {"D": 50, "window": 16, **arguments}
    shared = {"adaptive_batch": rule, "adaptive_batch_args": arguments, "train_batch_size": 16, "epochs": 3}
    return {**toy["config_dict"], **shared, **more}


class Watch(Hook):
    """Notes the sizes of steps, and the targets of each epoch."""

    def __init__(self):
        self.sizes, self.seen = [], {}

    def on_step_end(self, trainer, step, loss):
        self.sizes.append(step.targets)
        epoch = self.seen.setdefault(trainer.position.epoch, [])
        for part in step.parts:
            batch = part.batch
            epoch += (batch.target if isinstance(batch, PackedBatch) else batch["item_id"]).tolist()


@pytest.mark.parametrize("rule", ["hoelder", "norm_test", "inner_product"])
@pytest.mark.parametrize("model", ["2Mamba4Rec", "STAMP"])
def test_sizes_change_and_every_target_is_seen_once(toy, rule, model, caplog):
    watch = Watch()
    tight = {"theta": 0.2, "nu": 0.5} if rule != "hoelder" else {}
    options = options_of(toy, rule, state="INFO", adaptive_batch_args=tight)
    with caplog.at_level("INFO"):
        result = run_recbole_ssm(model, "toy", config_dict=options, hooks=[watch])
    config = configure(model, "toy", config_dict=options)
    train, _, _ = create_loaders(config, create_dataset(config))
    expected = sorted(train._dataset.inter_feat["item_id"].tolist())
    assert {epoch: sorted(items) for epoch, items in watch.seen.items()} == dict.fromkeys(range(3), expected)
    assert max(watch.sizes) > 16 and "batch size 16 -> " in caplog.text
    folder = pathlib.Path(result["checkpoint"]).parent
    with open(folder / "batch_size.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows[:-1]:
        assert watch.sizes[int(row["step"])] <= int(row["batch_size"])
    assert max(watch.sizes) in {int(row["batch_size"]) for row in rows}
    assert [int(row["step"]) for row in rows] == list(range(1, len(watch.sizes) + 1, 2))
    assert float(rows[0]["sigma"]) > 0 and float(rows[0]["step_size"]) == 0.01
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "Matplotlib draws it" in caplog.text
    else:
        assert (folder / "batch_size.png").read_bytes().startswith(b"\x89PNG")


def test_the_gradient_of_a_measured_step_is_that_of_the_whole(toy):
    """In parts or in one, with a constant size, the same steps are taken."""
    weights = []
    for adaptive in (True, False):
        options = options_of(toy, "norm_test", dropout_prob=0.0, adaptive_batch_args={"batch_min": 16, "batch_max": 16})
        if not adaptive:
            options |= {"adaptive_batch": None, "adaptive_batch_args": None}
        config = configure("2Mamba4Rec", "toy", config_dict=options)
        train, _, _ = create_loaders(config, create_dataset(config))
        torch.manual_seed(0)
        trainer = Trainer(config, get_model("2Mamba4Rec")(config, train._dataset).double())
        trainer.fit(train, saved=False)
        weights.append(torch.cat([w.detach().flatten() for w in trainer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-8)


def fit(toy, scale=None, **options):
    config = configure("2Mamba4Rec", "toy", config_dict=options_of(toy, "norm_test", dropout_prob=0.0, **options))
    train, _, _ = create_loaders(config, create_dataset(config))
    torch.manual_seed(0)
    trainer = Trainer(config, get_model("2Mamba4Rec")(config, train._dataset))
    if scale:  # which RecBole's key brings on GPUs alone
        trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.fit(train, saved=False)
    return trainer


def test_a_gradient_scaler_changes_no_measurement(toy):
    """Scaled by 2^16 and back, exact in float32: the same measurements, sizes and weights."""
    plain, scaled = (fit(toy, scale, adaptive_batch_args={"theta": 0.2}) for scale in (None, 2.0**16))
    assert scaled.learner.scaler.is_enabled() and scaled.learner.scaler.get_scale() == 2.0**16
    assert max(row[1] for row in scaled.gradients.rows) > 16, "the batch grows in this test"
    for found, expected in zip(scaled.gradients.rows, plain.gradients.rows):
        assert found == pytest.approx(expected, rel=1e-3, nan_ok=True)
    for a, b in zip(scaled.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_measured_step_is_on_tensorboard(toy):
    trainer, said = None, {}

    class Record(Hook):
        def on_fit_start(self, trainer, loader):
            trainer.tensorboard.add_scalar = lambda name, value, step: said.setdefault(name, []).append((step, value))

    options = options_of(toy, "hoelder", learner="usgm", learner_args={"D": 50, "rho": 0.02}, epochs=1)
    options["learner_groups"] = {"item_embedding*": {"D": 20}}
    config = configure("2Mamba4Rec", "toy", config_dict=options)
    train, _, _ = create_loaders(config, create_dataset(config))
    trainer = Trainer(config, get_model("2Mamba4Rec")(config, train._dataset), [Record()])
    trainer.fit(train, saved=False)
    for name in ("batch_size", "step_size", "sigma", "nu", "L"):
        assert [step for step, _ in said[f"AdaptiveBatch/{name}"]] == [int(row[0]) for row in trainer.gradients.rows]
    assert said["AdaptiveBatch/sigma"][-1][1] ** 2 == pytest.approx(trainer.gradients.sizes.variance)
    for number in (0, 1):
        ((_, H),), ((_, size),) = said[f"H/{number}"], said[f"StepSize/{number}"]
        assert H == pytest.approx(1 / size) == pytest.approx(trainer.optimizer.param_groups[number]["H"])


@pytest.mark.parametrize("learner", ["adam", "usgm"])
def test_killed_and_resumed_is_never_killed(toy, learner):
    class KilledError(Exception):
        pass

    class Kill(Hook):
        def on_step_end(self, trainer, step, loss):
            if trainer.global_step == 21:
                raise KilledError

    options = options_of(toy, "hoelder", learner=learner, checkpoint_steps=4)
    if learner == "usgm":
        options["learner_args"] = {"D": 50, "rho": 0.02}
    straight = run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options)
    with pytest.raises(KilledError):
        run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options, hooks=[Kill()])
    folder = max(pathlib.Path("saved").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    run_recbole_ssm(resume=folder)
    expected = checkpoint.newest(pathlib.Path(straight["checkpoint"]).parent)[1]
    found = checkpoint.newest(folder)[1]
    assert found.info["training"]["adaptive"] == expected.info["training"]["adaptive"]
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert (folder / "batch_size.csv").read_text() == (
        pathlib.Path(straight["checkpoint"]).parent / "batch_size.csv"
    ).read_text()


def test_memory_that_runs_out_halves_the_parts_and_goes_on(toy, caplog):
    """A step of 64 fits 20 at once; the run completes, and says what it did."""

    class Small(Hook):
        def on_fit_start(self, trainer, loader):
            real = trainer.model.calculate_loss

            def limited(batch):
                if len(batch.target) > 20:
                    raise torch.OutOfMemoryError("injected")
                return real(batch)

            trainer.model.calculate_loss = limited

    options = options_of(toy, "norm_test", train_batch_size=64, state="INFO", adaptive_batch_args={"batch_max": 64})
    with caplog.at_level("INFO"):
        result = run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options, hooks=[Small()])
    assert result["test_result"]["hit@10"] > 0.4
    assert "out of memory with 32 samples at once; going on with 16" in caplog.text


@pytest.mark.parametrize(
    ("key", "kind", "inherited"),
    [
        ("learner_args", USGM, {"params", "same_batch"}),
        ("adaptive_batch_args", AdaptiveBatchSize, {"batch_size", "rule", "budget", "processes"}),
    ],
)
def test_the_defaults_that_the_properties_name_are_those_of_the_code(key, kind, inherited):
    """The options of a dict stand below its key as comments."""
    text = (PROPERTIES / "overall.yaml").read_text(encoding="utf-8")
    block = text[text.index(f"{key}:") :].splitlines()[1:]
    lines = list(itertools.takewhile(lambda line: line.startswith("#   "), block))
    named = {re.match(r"#   (\w+)", line)[1]: yaml.safe_load(line[1:].partition("  # ")[0]) for line in lines}
    signature = inspect.signature(kind).parameters
    assert set(named) == set(signature) - inherited
    for name, value in named.items():
        assert value == ("D" if name == "D" else {name: signature[name].default})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker": 1}, "adaptive_batch: needs worker: 0, got 1; a worker would prepare steps"),
        (
            {"gradient_accumulation_steps": 2},
            "needs gradient_accumulation_steps: 1, got 2; set what fits into memory instead: .*'memory_size'",
        ),
        ({"adaptive_batch_args": {"budget": 5}}, "adaptive_batch_args: budget is not for you to give"),
        ({"adaptive_batch_args": {"D": None}}, "D: None; adaptive_batch 'hoelder' needs a positive number"),
        ({"adaptive_batch_args": {"speed": 1}}, "adaptive_batch_args: .*unexpected keyword argument 'speed'"),
        ({"adaptive_batch": "hölder"}, "adaptive_batch: 'hölder' is not one of None, hoelder, norm_test"),
    ],
)
def test_mistakes(toy, options, message):
    with pytest.raises(UserError, match=message):
        run_recbole_ssm("2Mamba4Rec", "toy", config_dict={**options_of(toy, "hoelder"), **options})
