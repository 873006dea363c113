"""The order of convergence of USGM and USFGM on convex problems whose answer is known, with nothing tuned but D.

The theory bounds the mean gap f - f* after k gradients, for every nu in [0, 1] at once, by a constant times

    USGM     L_nu D^(1+nu) / k^((1+nu)/2)  + sigma D / sqrt(k)
    USFGM    L_nu D^(1+nu) / k^((1+3nu)/2) + sigma D / sqrt(k)

A row gives the largest ratio of the measured gap to that bound over all k (a number that stays of order one for every
noise is the theory's claim), and the measured order between the last powers of two beside the bound's own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_ssm.arguments import add_counts, at_least
from recbole_ssm.bench import Row
from recbole_ssm.console import progress_bar
from recbole_ssm.optim import USFGM, USGM, IterateAverage


class Problem(NamedTuple):
    """A convex function of a float64 vector, with its least value 0 at ``solution``."""

    value: Callable[[Tensor], Tensor]
    solution: Tensor
    nu: float
    # |grad f(x) - grad f(y)| <= L |x - y|^nu
    L: float


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def least_squares(size: int, generator: torch.Generator) -> Problem:
    """|A (x - x*)|^2 / 2, where the eigenvalues of A^T A fall from 1 to about 1e-4: hardly strongly convex."""
    rotation = torch.linalg.qr(normal(generator, size, size))[0]
    factor = rotation * torch.logspace(0, -2, size, dtype=torch.float64)
    solution = normal(generator, size)
    return Problem(lambda x: ((x - solution) @ factor).square().sum() / 2, solution, 1.0, 1.0)


def logistic(size: int, generator: torch.Generator) -> Problem:
    """The mean logistic loss of 20 * size labelled points, minus its least value, which Newton's method finds."""
    points = normal(generator, 20 * size, size)
    truth = normal(generator, size)
    chances = torch.rand(len(points), generator=generator, dtype=torch.float64)
    labels = (chances < torch.sigmoid(points @ truth)).double()

    def loss(x: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(points @ x, labels)

    x = torch.zeros(size, dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(points @ x)
        hessian = points.T @ (points * (p * (1 - p))[:, None]) / len(points)
        x = x - torch.linalg.solve(hessian, points.T @ (p - labels) / len(points))
    least = loss(x)
    curvature = float(torch.linalg.eigvalsh(points.T @ points / len(points) / 4)[-1])
    return Problem(lambda z: loss(z) - least, x, 1.0, curvature)


def power(p: float) -> Callable[[int, torch.Generator], Problem]:
    """sum_i |x_i - x*_i|^p / p: the gradient is Hölder with nu = p - 1, and for p = 1 not even continuous."""

    def make(size: int, generator: torch.Generator) -> Problem:
        solution = normal(generator, size)
        # |sign(a)|a|^nu - sign(b)|b|^nu| <= 2^(1-nu) |a-b|^nu in one coordinate, and |.|^nu in size coordinates.
        nu = p - 1
        constant = 2 ** (1 - nu) * size ** ((1 - nu) / 2)
        return Problem(lambda x: (x - solution).abs().pow(p).sum() / p, solution, nu, constant)

    return make


PROBLEMS: dict[str, Callable[[int, torch.Generator], Problem]] = {
    "least squares": least_squares,
    "logistic": logistic,
    "|x|^1.5": power(1.5),
    "|x|": power(1.0),
}
METHODS = {"USGM": USGM, "USFGM": USFGM}


def gaps(
    problem: Problem, method: str, sigma: float, gradients: int, seed: int, D_factor: float = 1.0
) -> dict[int, float]:
    """f - f* of a method's output after 1, 2, 4, ... gradients.

    The start is 1 away from the solution; D is 2 * ``D_factor``, the ball's diameter as in the papers; the gradient has
    Gaussian noise with E |noise|^2 = sigma^2.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(problem.solution)
    away = normal(generator, size)
    x = (problem.solution + away / away.norm()).requires_grad_()
    optimizer = METHODS[method]([x], D=2 * D_factor, H0=0.0, projection="start")
    output = optimizer if isinstance(optimizer, USFGM) else IterateAverage(optimizer)
    found = {}
    for k in range(1, gradients + 1):
        (x.grad,) = torch.autograd.grad(problem.value(x), x)
        x.grad += sigma / math.sqrt(size) * normal(generator, size)
        optimizer.step()
        if k & (k - 1) == 0:
            with output.evaluation_point(), torch.no_grad():
                found[k] = float(problem.value(x))
    return found


def bound(problem: Problem, method: str, sigma: float, k: int, D: float = 2.0) -> float:
    """The theory's bound without its constant, after k gradients."""
    order = (1 + (3 if method == "USFGM" else 1) * problem.nu) / 2
    return problem.L * D ** (1 + problem.nu) / k**order + sigma * D / math.sqrt(k)


def slope(values: dict[int, float], octaves: int = 4) -> float:
    """The order over the last powers of two: -d log value / d log k."""
    last = max(values)
    first = last >> octaves
    return math.log(values[first] / max(values[last], 1e-300)) / math.log(last / first)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--gradients", type=at_least(32), default=1024, help="gradients a run")
    add_counts(parser, size=(20, "unknowns"), seeds=(3, "runs that are averaged"))


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each problem, method and noise."""
    cases = [(name, method, sigma) for name in PROBLEMS for method in METHODS for sigma in (0.0, 0.1, 1.0)]
    for name, method, sigma in progress_bar(cases, desc="convex", leave=False):
        problem = PROBLEMS[name](options.size, torch.Generator().manual_seed(0))
        runs = [gaps(problem, method, sigma, options.gradients, seed) for seed in range(options.seeds)]
        mean = {k: sum(r[k] for r in runs) / len(runs) for k in runs[0]}
        bounds = {k: bound(problem, method, sigma, k) for k in mean}
        yield {
            "problem": name,
            "method": method,
            "noise": sigma,
            "gap": mean[max(mean)],
            "gap / bound, at most": max(mean[k] / bounds[k] for k in mean),
            "order": slope(mean),
            "order of the bound": slope(bounds),
        }
