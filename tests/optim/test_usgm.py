"""USGM and USFGM against NumPy transcriptions of their papers, and on convex problems whose answer is known."""

import contextlib
import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm.errors import UserError
from recbole_ssm.optim import USFGM, USGM, IterateAverage, parameter_groups

each_rule = pytest.mark.parametrize("rule", ["bregman", "adagrad"])
each_method = pytest.mark.parametrize("method", [USGM, USFGM])


def quadratic(seed, size=6, noise=0.0):
    """A convex quadratic and its stochastic gradients: the k-th call has the k-th noise, for NumPy and torch alike."""
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(size, size))
    matrix, target = factor @ factor.T / size, generator.normal(size=size)
    noises = noise * generator.normal(size=(400, size))
    return (lambda x, k: matrix @ (x - target) + noises[k]), generator.normal(size=size)


def onto_ball(x, centre, radius):
    offset = x - centre
    length = np.linalg.norm(offset)
    return x if length <= radius else centre + offset * radius / length


def usgm_in_numpy(gradient, x, D, H, steps, rule="bregman", centre=None, decay=0.0):
    """Algorithm 4.1 of arXiv 2402.03210, as its authors' experiments (2406.06398) run it, word for word."""
    project = (lambda z: z) if centre is None else (lambda z: onto_ball(z, centre, D / 2))
    path, Hs, mean = [], [], np.zeros_like(x)
    g = gradient(x, 0) + decay * x
    for k in range(steps):
        step_size = 1 / H if H else 1e9
        x_next = project(x - step_size * g)
        g_next = gradient(x_next, k + 1) + decay * x_next
        Hs.append(H)
        if rule == "bregman":
            beta, r2 = (g_next - g) @ (x_next - x), (x_next - x) @ (x_next - x)
            H_next = (H * D**2 + beta) / (D**2 + r2 / 2)
            H = H if beta - H_next * r2 / 2 < 0 else H_next
        else:
            H = math.sqrt(H**2 + (g_next - g) @ (g_next - g) / D**2)
        x, g = x_next, g_next
        mean = k / (k + 1) * mean + x / (k + 1)
        path.append(x)
    return np.array(path), np.array(Hs), mean


def usfgm_in_numpy(gradient, x, D, H, steps, rule="bregman", centre=None):
    """Algorithm 2 of arXiv 2406.06398, as its authors' experiments run it."""
    project = (lambda z: z) if centre is None else (lambda z: onto_ball(z, centre, D / 2))
    v, A, path, Hs = x.copy(), 0.0, [], []
    for k in range(steps):
        a = (k + 1) / 2
        A_next = A + a
        y = (A * x + a * v) / A_next
        g = gradient(y, 2 * k)
        v = project(v - (a / H if H else 1e9 * a) * g)
        x = (A * x + a * v) / A_next
        g_next = gradient(x, 2 * k + 1)
        Hs.append(H)
        if rule == "bregman":
            beta, r2 = (g_next - g) @ (x - y), (x - y) @ (x - y)
            inner = (H * D**2 / A_next + beta) / (a**2 * D**2 / A_next**2 + r2 / 2)
            H = H if beta - inner * r2 / 2 < 0 else a**2 / A_next * inner
        else:
            H = math.sqrt(H**2 + a**2 / D**2 * ((g_next - g) @ (g_next - g)))
        A = A_next
        path.append(x)
    return np.array(path), np.array(Hs)


def run(make, gradient, start, calls):
    """Run an optimiser over two parameters that together are x; the points at which it would be evaluated, and H."""
    half = len(start) // 2
    params = [torch.tensor(part, requires_grad=True) for part in (start[:half], start[half:].reshape(1, -1))]
    optimizer = make(params)
    path, Hs = [], []
    for k in range(calls):
        x = np.concatenate([p.detach().numpy().ravel() for p in params])
        g = gradient(x, k)
        params[0].grad, params[1].grad = torch.tensor(g[:half]), torch.tensor(g[half:]).reshape(1, -1)
        optimizer.step()
        Hs.append(optimizer.param_groups[0]["H"])
        with getattr(optimizer, "evaluation_point", contextlib.nullcontext)():
            path.append(np.concatenate([p.detach().numpy().ravel() for p in params]))
    return np.array(path), np.array(Hs), optimizer


@each_rule
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("H0", [0.01, 3.0])
def test_usgm_is_the_papers_recursion(rule, noise, H0):
    gradient, start = quadratic(0, noise=noise)
    expected, Hs, mean = usgm_in_numpy(gradient, start, D=5.0, H=H0, steps=60, rule=rule)
    found, found_Hs, _ = run(lambda p: USGM(p, D=5.0, H0=H0, rule=rule), gradient, start, 60)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found_Hs, Hs, rtol=1e-9)
    assert (np.diff(found_Hs) >= 0).all()
    averages = []

    def averaged(params):
        optimizer = USGM(params, D=5.0, H0=H0, rule=rule)
        averages.append(IterateAverage(optimizer))
        return optimizer

    _, _, optimizer = run(averaged, gradient, start, 60)
    with averages[0].evaluation_point():
        found = [p.detach().numpy().ravel() for p in optimizer.param_groups[0]["params"]]
        np.testing.assert_allclose(np.concatenate(found), mean, rtol=1e-8)


@each_rule
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_usgm_in_the_ball_is_the_authors_code(rule, noise):
    gradient, start = quadratic(1, noise=noise)
    start = start / 10
    expected, Hs, _ = usgm_in_numpy(gradient, start, D=2.0, H=0.0, steps=60, rule=rule, centre=np.zeros(6))
    found, found_Hs, _ = run(lambda p: USGM(p, D=2.0, H0=0.0, rule=rule, projection="origin"), gradient, start, 60)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)  # 1e9 against the boundary itself, in step one
    np.testing.assert_allclose(found_Hs, Hs, rtol=1e-5)
    assert np.linalg.norm(found, axis=1).max() <= 1 + 1e-12
    assert np.linalg.norm(found[0]) == pytest.approx(1)


@each_rule
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("projection", [False, "start", "origin"])
def test_usfgm_is_the_papers_recursion(rule, noise, projection):
    gradient, start = quadratic(2, noise=noise)
    start = start / 10
    centre = {False: None, "start": start, "origin": np.zeros(6)}[projection]
    expected, Hs = usfgm_in_numpy(gradient, start, D=2.0, H=0.3, steps=40, rule=rule, centre=centre)
    found, found_Hs, _ = run(lambda p: USFGM(p, D=2.0, H0=0.3, rule=rule, projection=projection), gradient, start, 80)
    np.testing.assert_allclose(found[::2], expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found[1::2], expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found_Hs[::2], Hs, rtol=1e-8)


def test_the_ball_around_the_start_and_weight_decay():
    gradient, start = quadratic(3, noise=0.5)
    expected, Hs, _ = usgm_in_numpy(gradient, start, D=1.0, H=0.2, steps=40, centre=start)
    found, found_Hs, _ = run(lambda p: USGM(p, D=1.0, H0=0.2, projection="start"), gradient, start, 40)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    np.testing.assert_allclose(found_Hs, Hs, rtol=1e-8)
    expected, Hs, _ = usgm_in_numpy(gradient, start, D=3.0, H=0.2, steps=40, decay=0.3)
    found, found_Hs, _ = run(lambda p: USGM(p, D=3.0, H0=0.2, weight_decay=0.3), gradient, start, 40)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    np.testing.assert_allclose(found_Hs, Hs, rtol=1e-8)


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(0.001, 100), st.floats(0, 10))
def test_any_quadratic_any_diameter_any_noise(seed, D, H0, noise):
    gradient, start = quadratic(seed, noise=noise)
    expected, Hs, _ = usgm_in_numpy(gradient, start, D=D, H=H0, steps=8)
    found, found_Hs, _ = run(lambda p: USGM(p, D=D, H0=H0), gradient, start, 8)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-7)
    np.testing.assert_allclose(found_Hs, Hs, rtol=1e-7)


@each_method
def test_the_first_step_has_the_length_asked_for(method):
    gradient, start = quadratic(4)
    found, _, _ = run(lambda p: method(p, D=10.0, rho=0.05), gradient, start, 1)
    assert np.linalg.norm(found[0] - start) == pytest.approx(0.5)


@pytest.mark.parametrize("projection", [False, "start"])
def test_passive_start_measures_first_and_steps_then(projection):
    gradient, start = quadratic(5)
    # The first step's H is far too small; what it finds is kept, where it leads is not.
    D, H0 = 50.0, 1e-3
    g0 = gradient(start, 0)
    tentative = onto_ball(start - g0 / H0, start, D / 2) if projection else start - g0 / H0
    s = tentative - start
    beta = (gradient(tentative, 1) - g0) @ s
    H1 = H0 + max(beta - H0 * (s @ s) / 2, 0) / (D**2 + (s @ s) / 2)
    found, Hs, _ = run(lambda p: USGM(p, D=D, H0=H0, passive_start=True, projection=projection), gradient, start, 2)
    np.testing.assert_allclose(found[0], tentative, rtol=1e-9)
    assert Hs[1] == pytest.approx(H1)
    np.testing.assert_allclose(found[1], start - g0 / H1, rtol=1e-7)


@pytest.mark.parametrize("passive_start", [False, True])
def test_same_batch_sees_no_noise(passive_start):
    """Noise that is the same before and after a step leaves H where the curvature puts it."""
    gradient, start = quadratic(6)
    noise = np.random.default_rng(0).normal(size=(200, 6)) * 100
    p = torch.tensor(start, requires_grad=True)
    optimizer = USGM([p], D=1.0, H0=1.0, same_batch=True, passive_start=passive_start)
    calls = []

    def closure():
        batch = len(calls) // 2
        calls.append(batch)
        p.grad = torch.tensor(gradient(p.detach().numpy(), 0) + noise[batch])
        return 7.0

    assert [optimizer.step(closure) for _ in range(60)] == [7.0] * 60
    assert len(calls) == 120
    matrix = np.array([gradient(e, 0) - gradient(np.zeros(6), 0) for e in np.eye(6)])
    assert optimizer.param_groups[0]["H"] <= 2 * np.linalg.eigvalsh(matrix).max()  # beta <= L r^2 allows no more
    _, Hs, _ = run(lambda p: USGM(p, D=1.0, H0=1.0), lambda x, k: gradient(x, 0) + noise[k], start, 60)
    assert Hs[-1] > 3 * optimizer.param_groups[0]["H"], "a new minibatch brings its noise into H"
    with pytest.raises(UserError, match=r"call step\(closure\)"):
        optimizer.step()


def test_groups_run_recursions_of_their_own():
    gradients = [quadratic(seed, noise=0.3) for seed in (7, 8)]
    params = [torch.tensor(start, requires_grad=True) for _, start in gradients]
    optimizer = USGM(
        [{"params": [params[0]], "D": 1.0}, {"params": [params[1]], "H0": 5.0, "rule": "adagrad"}], D=20.0, H0=0.7
    )
    for k in range(30):
        for p, (gradient, _) in zip(params, gradients):
            p.grad = torch.tensor(gradient(p.detach().numpy(), k))
        optimizer.step()
    for p, (gradient, start), D, H0, rule in zip(params, gradients, (1.0, 20.0), (0.7, 5.0), ("bregman", "adagrad")):
        path, _, _ = usgm_in_numpy(gradient, start, D=D, H=H0, steps=30, rule=rule)
        np.testing.assert_allclose(p.detach().numpy(), path[-1], rtol=1e-8)
    assert optimizer.step_sizes() == [1 / group["H"] for group in optimizer.param_groups]


def test_a_passive_start_of_one_group_alone():
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = USGM([{"params": [params[0]], "passive_start": True}, {"params": [params[1]]}], D=1.0)
    for _ in range(2):
        for p in params:
            p.grad = p.detach() * 3
        optimizer.step()
    assert [group["steps"] for group in optimizer.param_groups] == [1, 2]


def test_groups_by_the_names_of_parameters():
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(3, 2), "a": torch.nn.Linear(2, 2)})
    names = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), {"embed*": {"D": 3.0}, "*.bias": {"rule": "adagrad"}})
    assert [[names[p] for p in group["params"]] for group in groups] == [["embedding.weight"], ["a.bias"], ["a.weight"]]
    assert groups[0]["D"] == 3.0 and groups[1]["rule"] == "adagrad" and set(groups[2]) == {"params"}
    assert [group["D"] for group in USGM(groups, D=1.0).param_groups] == [3.0, 1.0, 1.0]
    assert len(parameter_groups(model.named_parameters(), {"*": {}})) == 1
    for options, message in (
        ({"embeding.weight": {}}, "fits no parameter that is left; did you mean 'embedding.weight'"),
        ({"*": {}, "a.bias": {}}, "'a.bias' fits no parameter that is left"),
        ({"*": 3}, "must look like"),
        (["*"], "must look like"),
    ):
        with pytest.raises(UserError, match=message):
            parameter_groups(model.named_parameters(), options)


def embedding_gradients(sparse, method_options, steps=20):
    torch.manual_seed(0)
    table = torch.nn.Embedding(30, 4, sparse=sparse, dtype=torch.float64)
    dense = torch.nn.Linear(4, 1, dtype=torch.float64)
    optimizer = USGM([*table.parameters(), *dense.parameters()], D=3.0, **method_options)
    for k in range(steps):
        rows = torch.randint(30, (k % 5 + 1, 3), generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        dense(table(rows).tanh()).square().mean().backward()
        optimizer.step()
    return [*table.parameters(), *dense.parameters()], optimizer


@each_rule
@pytest.mark.parametrize("options", [{}, {"passive_start": True}])
def test_sparse_gradients_give_what_dense_ones_give(rule, options):
    sparse, optimizer = embedding_gradients(True, {"rule": rule, **options})
    dense, reference = embedding_gradients(False, {"rule": rule, **options})
    for a, b in zip(sparse, dense):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert optimizer.param_groups[0]["H"] == pytest.approx(reference.param_groups[0]["H"])
    assert all(not t.is_sparse for state in optimizer.state.values() for t in state.values())
    if not options:
        assert optimizer.state[sparse[0]]["gradient"].shape[0] < 30, "no dense buffer for the table"


def test_a_missing_gradient_is_zero():
    ends = []
    for missing in (False, True):
        torch.manual_seed(0)
        a, b = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
        optimizer = USGM([a, b], D=1.0)
        for k in range(10):
            a.grad = a.detach() * 2 + k
            b.grad = b.detach() * 3 if k % 3 else (None if missing else torch.zeros(2))
            optimizer.step()
        ends.append([a, b, torch.tensor(optimizer.step_sizes())])
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    before = a.detach().clone()
    a.grad = b.grad = None
    optimizer.step()
    assert torch.equal(a, before)


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", [1, 2, 7, 8])
@pytest.mark.parametrize("options", [{}, {"projection": "start"}, {"weight_decay": 0.1, "rule": "adagrad"}])
def test_a_state_dict_resumes_exactly(method, dtype, stop, options):
    """Through bytes and through JSON: stopped anywhere and resumed equals never stopped, bit for bit."""
    if method is USGM:
        options = {**options, "passive_start": True}

    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3, dtype=dtype)
        return model, method(model.parameters(), D=2.0, **options)

    def train(model, optimizer, batches):
        for k in batches:
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(k), dtype=dtype)
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()

    whole, optimizer = start()
    train(whole, optimizer, range(20))
    model, first = start()
    train(model, first, range(stop))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    state["param_groups"] = json.loads(json.dumps(state["param_groups"], allow_nan=False))
    resumed, second = start()
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(state)
    train(resumed, second, range(stop, 20))
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    assert optimizer.param_groups[0]["H"] == second.param_groups[0]["H"]
    if method is USFGM:
        with optimizer.evaluation_point(), second.evaluation_point():
            assert torch.equal(whole.weight, resumed.weight)


def test_a_sparse_state_resumes_exactly():
    _, optimizer = embedding_gradients(True, {}, steps=7)
    params, whole = embedding_gradients(True, {}, steps=8)
    table = torch.nn.Embedding(30, 4, sparse=True, dtype=torch.float16)  # rows beyond 2048 are no float16 numbers
    rows = torch.tensor([[5, 2049, 4099]])
    other = USGM(table.parameters(), D=1.0)
    other.state[table.weight] = {"rows": rows, "gradient": torch.ones(3, 4, dtype=torch.float16)}
    again = USGM(table.parameters(), D=1.0)
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    assert torch.equal(again.state[table.weight]["rows"], rows)
    assert optimizer.state_dict()["param_groups"][0]["steps"] == 7
    assert whole.param_groups[0]["steps"] == 8 and params


def test_float32_follows_float64():
    gradient, start = quadratic(9, noise=0.5)
    expected, _, _ = usgm_in_numpy(gradient, start, D=5.0, H=0.5, steps=40)
    p = torch.tensor(start, dtype=torch.float32, requires_grad=True)
    optimizer = USGM([p], D=5.0, H0=0.5)
    for k in range(40):
        p.grad = torch.tensor(gradient(p.detach().double().numpy(), k), dtype=torch.float32)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), expected[-1], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"D": 30.0, "H0": 1.0}, {"D": 300.0, "H0": 1.0, "projection": "start"}])
def test_norms_of_halves_are_not_rounded_to_halves_and_do_not_overflow(dtype, options):
    """H beside that of float64 on the same gradients and points; and a gradient whose norm no float16 can hold."""
    half = torch.zeros(20_000, dtype=dtype, requires_grad=True)
    precise = torch.zeros(20_000, dtype=torch.float64, requires_grad=True)
    ours, expected = USGM([half], **options), USGM([precise], **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        half.grad = torch.randn(20_000, generator=generator).to(dtype)
        precise.grad = half.grad.double()
        ours.step()
        expected.step()
        with torch.no_grad():
            precise.copy_(half)
        assert ours.param_groups[0]["H"] == pytest.approx(expected.param_groups[0]["H"], rel=1e-4)
    half.grad *= 600
    ours.step()
    assert math.isfinite(ours.param_groups[0]["H"])


def test_a_copy_and_a_pickle_step_as_the_original():
    p = torch.ones(3, requires_grad=True)
    optimizer = USGM([p], D=1.0, same_batch=True)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (q,) = twin.param_groups[0]["params"]

        def closure(q=q):
            q.grad = 2 * q.detach()
            return q.sum()

        twin.step(closure)
        assert twin.same_batch and not torch.equal(q, p)


@each_method
def test_a_gradient_that_is_not_finite_changes_nothing(method):
    first, p = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = method([{"params": [first]}, {"params": [p]}], D=1.0)
    for _ in range(2):
        first.grad, p.grad = first.detach() * 3, p.detach() * 2
        optimizer.step()
    still = first.detach().clone()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
    p.grad = torch.tensor([1.0, math.nan, 0.0])
    with pytest.raises(UserError, match="not finite"):
        optimizer.step()
    assert torch.equal(p, before) and torch.equal(first, still)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert torch.equal(optimizer.state_dict()["state"][0]["gradient"], state["state"][0]["gradient"])


def test_a_zero_first_gradient_waits():
    p = torch.ones(2, requires_grad=True)
    optimizer = USGM([p], D=1.0)
    p.grad = torch.zeros(2)
    optimizer.step()
    assert optimizer.param_groups[0]["H"] is None and math.isnan(optimizer.step_sizes()[0])
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert (p.detach() - 1).norm().item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"D": 0}, "D is 0"),
        ({"D": -1.0}, "D is -1.0"),
        ({"D": math.inf}, "D is inf"),
        ({"D": "3"}, "D is '3'"),
        ({"D": 1.0, "H0": -1.0}, "H0 is -1.0"),
        ({"D": 1.0, "H0": 0.0}, "give projection too"),
        ({"D": 1.0, "rho": 0}, "rho is 0"),
        ({"D": 1.0, "weight_decay": -0.1}, "weight_decay"),
        ({"D": 1.0, "rule": "adgrad"}, "did you mean 'adagrad'"),
        ({"D": 1.0, "projection": True}, "projection is True"),
    ],
)
def test_impossible_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        USGM([torch.ones(1, requires_grad=True)], **options)
    assert "\n" not in str(caught.value)


@each_method
def test_a_start_outside_its_ball_changes_nothing(method):
    inside, outside = (torch.full((4,), size, requires_grad=True) for size in (0.1, 3.0))
    optimizer = method([{"params": [inside]}, {"params": [outside]}], D=2.0, projection="origin")
    for p in (inside, outside):
        p.grad = torch.ones(4)
    with pytest.raises(UserError, match="the start is 6 from the origin"):
        optimizer.step()
    assert torch.equal(inside, torch.full((4,), 0.1)) and optimizer.param_groups[0]["H"] is None


def test_more_refusals():
    p = torch.full((4,), 3.0, requires_grad=True)
    p.grad = torch.ones(4)
    with pytest.raises(UserError, match="D of 12 or more"):
        USGM([p], D=2.0, projection="origin").step()
    for method, options in ((USGM, {"weight_decay": 0.1}), (USGM, {"projection": "start"}), (USFGM, {})):
        table = torch.nn.Embedding(5, 2, sparse=True)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(UserError, match="needs dense gradients"):
            method(table.parameters(), D=1.0, **options).step()
    with pytest.raises(UserError, match="D is -2"):
        USGM([p], D=1.0).add_param_group({"params": [torch.ones(1, requires_grad=True)], "D": -2})
