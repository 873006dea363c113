"""Convergence on convex problems whose answer is known, at the predicted order and for every noise: only D is given."""

import pytest
import torch

from recbole_ssm.bench.convex import METHODS, PROBLEMS, bound, gaps, slope

# Of the theory's bound: one for all problems and noises. k counts gradients, and USFGM takes two an iteration.
CONSTANT = {"USGM": 0.25, "USFGM": 2.0}

each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_method = pytest.mark.parametrize("method", METHODS)


def problem_of(name):
    return PROBLEMS[name](20, torch.Generator().manual_seed(0))


@each_problem
def test_the_solution_and_the_hoelder_constant_are_right(name):
    problem = problem_of(name)
    generator = torch.Generator().manual_seed(1)
    assert float(problem.value(problem.solution)) == pytest.approx(0, abs=1e-12)

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(problem.value(x), x)[0]

    for scale in (1e-3, 1.0, 10.0):
        for _ in range(20):
            x, s = (scale * torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
            x = x + problem.solution
            assert float(problem.value(x)) > 0
            assert (gradient(x + s) - gradient(x)).norm() <= problem.L * s.norm() ** problem.nu * (1 + 1e-9)


@each_problem
@each_method
def test_the_gap_stays_below_the_bound_for_every_noise(name, method):
    problem = problem_of(name)
    for sigma in (0.0, 0.1, 1.0):
        for k, gap in gaps(problem, method, sigma, 512, seed=0).items():
            assert gap <= CONSTANT[method] * bound(problem, method, sigma, k), (sigma, k)


@each_problem
@each_method
def test_without_noise_the_order_is_reached(name, method):
    problem = problem_of(name)
    order = (1 + (3 if method == "USFGM" else 1) * problem.nu) / 2
    assert slope(gaps(problem, method, 0.0, 1024, seed=0)) > order - 0.05


@each_problem
@each_method
def test_a_ball_ten_times_too_large_costs_what_the_bound_says(name, method):
    problem = problem_of(name)
    for k, gap in gaps(problem, method, 0.1, 512, seed=0, D_factor=10.0).items():
        assert gap <= CONSTANT[method] * bound(problem, method, 0.1, k, D=20.0), k


@pytest.mark.slow
@each_problem
@each_method
@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_the_mean_gap_stays_below_the_bound_to_4096_gradients(name, method, sigma):
    problem = problem_of(name)
    runs = [gaps(problem, method, sigma, 4096, seed) for seed in range(3)]
    for k in runs[0]:
        assert sum(run[k] for run in runs) / 3 <= CONSTANT[method] * bound(problem, method, sigma, k), k
