"""Rates that rise and fall once: torch's own curves, told their length late, and the same after an interruption."""

import copy
import math
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from recbole_ssm.cli import main
from recbole_ssm.errors import UserError
from recbole_ssm.optim.schedule import SHAPES, Schedule
from recbole_ssm.quick_start import configure, run_recbole_ssm
from recbole_ssm.trainer import Hook


def adam():
    weight = torch.nn.Parameter(torch.zeros(2))
    return torch.optim.Adam([{"params": [weight]}], lr=0.01)


def curve(optimizer, schedule, steps):
    """The rate and the first beta of each step."""
    found = []
    for _ in range(steps):
        (group,) = optimizer.param_groups
        found.append((group["lr"], group["betas"][0]))
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("total", "warmup"), [(40, 0.3), (100, 0.05), (7, 0.5), (10, 0.0), (1, 0.3), (2, 0.05)])
def test_one_cycle_is_torchs(total, warmup):
    ours = adam()
    schedule = Schedule(ours, "one_cycle", warmup)
    schedule.plan(total)
    found = curve(ours, schedule, total)
    # Where nothing rises, torch divides by zero, or starts behind the top.
    if warmup * total > 1 and total > 2:
        theirs = adam()
        expected = curve(theirs, OneCycleLR(theirs, 0.01, total_steps=total, pct_start=warmup), total - 1)
        assert found[: total - 1] == [pytest.approx(pair, rel=1e-9) for pair in expected]
    assert all(0 < rate <= 0.01 and 0.85 <= beta <= 0.95 for rate, beta in found)
    assert max(rate for rate, _ in found) > 0.0099 or total < 10


def test_cosine_rises_linearly_and_falls_to_nothing():
    optimizer = adam()
    schedule = Schedule(optimizer, "cosine", 0.1)
    schedule.plan(100)
    rates = [rate for rate, beta in curve(optimizer, schedule, 100) if beta == 0.9]
    assert rates[:10] == pytest.approx([0.001 * step for step in range(1, 11)])
    assert rates[10:] == pytest.approx([0.005 * (1 + math.cos(math.pi * step / 90)) for step in range(90)])
    assert len(rates) == 100


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_goes_on_where_it_was(shape):
    whole, part = adam(), adam()
    schedule = Schedule(whole, shape, 0.2)
    schedule.plan(30)
    expected = curve(whole, schedule, 30)
    first = Schedule(part, shape, 0.2)
    first.plan(30)
    curve(part, first, 11)
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(part.state_dict())
    other = adam()
    again = Schedule(other, shape, 0.2)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    again.plan(30)
    assert curve(other, again, 19) == expected[11:]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_length_is_that_of_the_run(toy, shape):
    class Rates(Hook):
        def __init__(self):
            self.found = []

        def on_step_end(self, trainer, step, loss):
            self.found.append(trainer.step_size)

    toy["config_dict"] |= {"lr_scheduler": shape, "epochs": 2, "stopping_step": 10, "lr_warmup": 0.2}
    rates = Rates()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run_recbole_ssm("GRU4Rec", **toy, hooks=[rates])
    highest = configure("GRU4Rec", **toy)["learning_rate"]
    assert max(rates.found) == pytest.approx(highest, rel=0.2) and rates.found[-1] < highest / 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_args": {"T_max": 3}}, "lr_scheduler_args: cosine takes none; lr_warmup says how long"),
        ({"adaptive_batch": "norm_test"}, "lr_scheduler: cosine must know how many steps come, and adaptive_batch"),
        ({"learner": "usgm", "learner_args": {"D": 10, "rho": 0.1}}, "lr_scheduler: usgm finds its own step size"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler: torch.optim has no scheduler 'cosin'; did you mean 'cosine'"),
        ({"lr_warmup": 1.0}, r"lr_warmup: must lie in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes(toy, options, message):
    with pytest.raises(UserError, match=message):
        run_recbole_ssm("GRU4Rec", "toy", config_dict={**toy["config_dict"], "lr_scheduler": "cosine", **options})


def test_the_key_is_described(capsys):
    assert main(["keys", "lr_scheduler"]) == 0
    assert "'cosine' or 'one_cycle' over all steps of all epochs" in capsys.readouterr().out
