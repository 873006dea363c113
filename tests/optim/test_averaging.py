"""The mean of iterates: of any optimiser, beside its state, through a state dict, and back again."""

import numpy as np
import pytest
import torch

from recbole_ssm.errors import UserError
from recbole_ssm.optim import USGM, IterateAverage

OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "usgm": lambda params: USGM(params, D=1.0),
}


def steps(params, optimizer, numbers):
    """Steps on |x - k|^2 / 2 of changing k; the iterates."""
    seen = []
    for k in numbers:
        for p in params:
            p.grad = p.detach() - k
        optimizer.step()
        seen.append(params[0].detach().double().numpy())
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("power", "weights"), [(0, [1, 1, 1, 1]), (1, [1, 2, 3, 4]), (2, [1, 3, 6, 10])])
def test_it_is_the_weighted_mean_and_changes_no_step(name, power, weights):
    """Weights of polynomial-decay averaging: uniform for 0, k for 1, k (k + 1) / 2 for 2."""
    p, q = [torch.linspace(0, 1, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]
    optimizer, plain = OPTIMIZERS[name]([p]), OPTIMIZERS[name]([q])
    average = IterateAverage(optimizer, power)
    seen = steps([p], optimizer, range(4))
    np.testing.assert_array_equal(seen, steps([q], plain, range(4)))
    with average.evaluation_point():
        np.testing.assert_allclose(p.detach().numpy(), np.average(seen, axis=0, weights=weights))
    assert torch.equal(p, q)


def test_the_evaluation_point_gives_the_parameters_back():
    p = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.1)
    average = IterateAverage(optimizer)
    with average.evaluation_point():
        assert torch.equal(p, torch.ones(3))  # before the first step there is no other point
    steps([p], optimizer, range(3))
    here = p.detach().clone()
    with pytest.raises(KeyError), average.evaluation_point():
        assert not torch.equal(p, here)
        assert torch.is_grad_enabled()
        raise KeyError
    assert torch.equal(p, here)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_dict_holds_it(name):
    def start():
        p = torch.ones(3, requires_grad=True)
        optimizer = OPTIMIZERS[name]([p])
        return p, optimizer, IterateAverage(optimizer, 4)

    whole, optimizer, average = start()
    steps([whole], optimizer, range(10))
    stopped, first, _ = start()
    steps([stopped], first, range(6))
    resumed, second, again = start()
    resumed.data.copy_(stopped.data)
    second.load_state_dict(first.state_dict())
    steps([resumed], second, range(6, 10))
    assert torch.equal(whole, resumed)
    with average.evaluation_point(), again.evaluation_point():
        assert torch.equal(whole, resumed)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_stays_and_one_that_comes_late_joins(name):
    """Adam takes an empty state for the first step of a parameter, so none may be filled before."""
    p, late, never = (torch.zeros(1, requires_grad=True) for _ in range(3))
    optimizer = OPTIMIZERS[name]([p, late, never])
    average = IterateAverage(optimizer)
    early = steps([p], optimizer, [1, 2])
    seen = steps([p, late], optimizer, [3])
    joined = [late.item()]
    seen += steps([p, late], optimizer, [4])
    joined.append(late.item())
    with average.evaluation_point():
        assert p.item() == pytest.approx(np.mean(early + seen))
        assert late.item() == pytest.approx(np.mean(joined))
        assert never.item() == 0


def test_a_passive_starts_tentative_point_is_no_iterate():
    """It only measures H, and may be far away."""
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = USGM([p], D=2.0, H0=1e-3, passive_start=True)
    average = IterateAverage(optimizer)
    assert abs(steps([p], optimizer, [0])[0].item()) > 900
    seen = steps([p], optimizer, [0] * 20)
    with average.evaluation_point():
        assert p.item() == pytest.approx(np.mean(seen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_short_floats_does_not_stall(dtype):
    """Kept in their own precision it would stay where it is, once a new iterate moves it by less than half a digit."""
    p = torch.zeros(1, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=1.0)
    average = IterateAverage(optimizer)
    steps([p], optimizer, [1] * 300 + [2] * 200)
    other = torch.optim.SGD([p], lr=1.0)
    again = IterateAverage(other)
    other.load_state_dict(optimizer.state_dict())
    steps([p], other, [2] * 500)
    assert average.optimizer.state[p]["average"].item() == pytest.approx(1.4)
    with again.evaluation_point():
        assert p.item() == pytest.approx(1.7, abs=0.01)


@pytest.mark.parametrize("power", [-1, float("inf"), float("nan"), True, "8", None])
def test_an_impossible_power(power):
    with pytest.raises(UserError, match=f"power is {power!r}; give a number from 0 up"):
        IterateAverage(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1), power)


def test_a_second_mean_would_share_the_buffers():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    IterateAverage(optimizer)
    with pytest.raises(UserError, match="this optimiser has one already"):
        IterateAverage(optimizer)
