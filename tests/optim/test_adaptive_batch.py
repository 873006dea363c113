"""Estimators against known noise and Hölder coefficients; decisions, their bounds and state; memory that runs out."""

import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import example, given
from hypothesis import strategies as st

from recbole_ssm.errors import UserError
from recbole_ssm.optim import USGM, AdaptiveBatchSize, GradientProbe, Measurement
from recbole_ssm.optim.adaptive_batch import RULES, fit_holder
from recbole_ssm.optim.gradient_noise import Change

each_rule = pytest.mark.parametrize("rule", RULES)


def measured(samples_ID, bounds, group=None, scale=1.0):
    """What the probe says at w = 0 of losses <samples_i, w> + |w|^2 / 2, whose gradients there are the samples.

    Returns the measurement, the gradient that p.grad held then, and the change over a step along it.
    """
    w = torch.zeros(samples_ID.shape[1], dtype=torch.float64, requires_grad=True)
    probe = GradientProbe([w], group, lambda: scale)

    def backward(part):
        loss = (samples_ID[part] @ w).mean() + w.square().sum() / 2
        (scale * loss * (part.stop - part.start) / len(samples_ID)).backward()

    probe.start(len(samples_ID))
    for start, stop in itertools.pairwise(bounds):
        probe.run(backward, slice(start, stop))
    measurement = probe.measure()
    gradient = w.grad / scale
    with torch.no_grad():
        w -= 0.1 * gradient
    return measurement, gradient, probe.change(backward)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_the_statistics_are_their_formulas(seed, sizes):
    samples = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1
    bounds = np.cumsum([0, *sizes])
    found, gradient, change = measured(samples, bounds)
    g = samples.mean(0)
    chunks = [samples[a:b].mean(0) for a, b in itertools.pairwise(bounds)]
    variance = sum(n * float((c - g) @ (c - g)) for n, c in zip(sizes, chunks)) / (len(sizes) - 1)
    along = sum(n * float(c @ g - g @ g) ** 2 for n, c in zip(sizes, chunks)) / (len(sizes) - 1) / float(g @ g)
    assert found == pytest.approx(Measurement(sum(sizes), float(g @ g), variance, along), rel=1e-9)
    torch.testing.assert_close(gradient, g)
    step = 0.1 * float(g.norm())
    assert change == pytest.approx((step, step**2, 0), rel=1e-9, abs=1e-20)


def test_the_scale_of_half_precision_is_not_measured():
    samples = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    plain, scaled = (measured(samples, [0, 5, 12], scale=scale) for scale in (1.0, 2.0**16))
    for a, b in zip(plain, scaled):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


def test_an_overflow_is_not_measured():
    w = torch.ones(3, requires_grad=True)
    probe = GradientProbe([w])
    probe.start(4)
    for part in (slice(0, 2), slice(2, 4)):
        probe.run(lambda part: (w.sum() * math.inf).backward(), part)
    assert probe.measure() is None and probe.change(lambda part: None) is None
    assert w.grad.isinf().all(), "for the scaler to see"
    changes = []
    for overflow in (False, True):
        probe.start(4)
        w.grad = None
        for part in (slice(0, 2), slice(2, 4)):
            probe.run(lambda part: (w.square().sum() / 4).backward(), part)
        assert probe.measure() is not None
        changes.append(probe.change(lambda part, by=math.inf if overflow else 1.0: (w.sum() * by).backward()))
    assert changes[0] is not None and changes[1] is None


@given(st.floats(0.01, 100), st.floats(0, 3), st.sampled_from([2, 4, 16]))
def test_the_variance_is_found_and_better_with_more_batches(sigma, mean, chunks):
    """Unbiased; after n batches within five standard errors, which fall as 1 / sqrt(n)."""
    generator = torch.Generator().manual_seed(0)
    size, batch, repeats = 20, 32, 64
    estimates, parts = [], []
    for _ in range(repeats):
        samples = mean + sigma * torch.randn(batch, size, generator=generator, dtype=torch.float64)
        found, *_ = measured(samples, np.linspace(0, batch, chunks + 1).astype(int))
        estimates.append(found.variance)
        parts.append(found.along)
    true = sigma**2 * size
    one = true * math.sqrt(2 / size / (chunks - 1))  # a chi-square of size * (chunks - 1) degrees of freedom
    for n in (4, 16, 64):
        assert abs(np.mean(estimates[:n]) - true) < 5 * one / math.sqrt(n)
    assert min(parts) >= 0 and max(np.array(parts) / np.array(estimates)) <= 1 + 1e-9


def test_small_noise_on_a_large_gradient_is_not_lost_in_float32():
    generator = torch.Generator().manual_seed(0)
    w = torch.zeros(2000, requires_grad=True)
    samples = 100 + 0.1 * torch.randn(64, 2000, generator=generator)
    probe = GradientProbe([w])
    probe.start(64)
    for k in range(8):
        probe.run(lambda part: ((samples[part] @ w).sum() / 64).backward(), slice(8 * k, 8 * k + 8))
    assert probe.measure().variance == pytest.approx(0.01 * 2000, rel=0.1)


def steps(nu, L, noise, count, seed=0, spread=1.0, size=30):
    """Distances over ``spread`` decades, and |true change + noise|^2 with E|noise|^2 = ``noise``."""
    generator = np.random.default_rng(seed)
    r = 10 ** (-spread * generator.uniform(size=count))
    true = L * r**nu
    direction = generator.normal(size=(count, size))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    difference = true[:, None] * direction + math.sqrt(noise / size) * generator.normal(size=(count, size))
    return r, (difference**2).sum(1) - noise, np.full(count, noise)


@given(st.floats(0, 1), st.floats(0.01, 100))
def test_without_noise_the_coefficients_are_exact(nu, L):
    fit = fit_holder(*steps(nu, L, 0.0, 16))
    assert fit.nu == pytest.approx(nu, abs=1e-6)
    assert fit.change(0.3) == pytest.approx(L * 0.3**nu, rel=1e-6)
    assert fit.nu_error < 1e-6 and fit.points == 16


@pytest.mark.parametrize("nu", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_with_noise_the_coefficients_are_found_with_samples(nu, noise):
    """Noise from a tenth of the largest squared change to all of it: errors fall as steps are added."""
    errors = []
    for count in (64, 1024):
        fits = [fit_holder(*steps(nu, 1.0, noise, count, seed)) for seed in range(20)]
        errors.append(
            [
                np.median([abs(f.nu - nu) for f in fits]),
                np.median([abs(math.log(f.change(0.5) / 0.5**nu)) for f in fits]),
            ]
        )
    assert errors[1][0] < 0.12 and errors[1][1] < 0.08
    assert errors[1][1] < errors[0][1]


def test_the_stated_error_is_honest():
    """The exponent lies within two stated standard errors about as often as it should."""
    fits = [fit_holder(*steps(0.5, 1.0, 0.05, 256, seed)) for seed in range(100)]
    inside = np.mean([abs(f.nu - 0.5) < 2 * f.nu_error for f in fits])
    assert 0.75 < inside <= 1.0


def test_steps_of_one_length_leave_nu_to_the_prior_and_the_change_to_the_data():
    r, d2, noise = steps(0.5, 2.0, 0.01, 64, spread=0.0)
    fit = fit_holder(r, d2, noise)
    assert fit.nu == 1.0 and fit.nu_error == pytest.approx(0.5, abs=1e-5)
    assert fit.change(1.0) == pytest.approx(2.0, rel=0.05)
    assert fit_holder(r[:8], d2[:8], noise[:8]) is None
    assert fit_holder(r, -np.abs(d2), noise) is None, "noise hides every change"


def test_the_probe_follows_a_training():
    """On f = <c, x> + L |x|^2 / 2 with noise, probe and rule find noise and curvature while USGM trains."""
    torch.manual_seed(0)
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    L, sigma = 3.0, 0.5
    optimizer = USGM([x], D=20.0, H0=20.0)
    probe, sizes = GradientProbe([x]), AdaptiveBatchSize(64, every=2, batch_max=64, D=20.0, budget=64 * 300)
    for _ in range(300):
        noise = sigma * torch.randn(64, 40, dtype=torch.float64)

        def backward(part, noise=noise):
            loss = L * x.square().sum() / 2 + (noise[part] @ x).mean()
            (loss * (part.stop - part.start) / 64).backward()

        due = sizes.due
        sizes.accumulate(64, backward, optimizer.zero_grad, probe)
        measurement = probe.measure()
        assert (measurement is None) == (not due)
        optimizer.step()
        change = probe.change(backward)
        assert (change is None) == (not due)
        sizes.observe(measurement, change)
    assert sizes.variance == pytest.approx(sigma**2 * 40, rel=0.2)
    fit = sizes.fit
    assert fit.change(0.01) == pytest.approx(0.01 * L, rel=0.01)
    assert sizes.optimum > 0 and sizes.batch_size == 64


def test_the_change_is_free_of_noise_where_two_batches_are_not():
    """A step follows its batch's noise. The difference of two batches' gradients, corrected for the noise of both, then
    measures that noise again; the probe's does not."""
    torch.manual_seed(0)
    L, rate, size, batch = 1.0, 0.05, 50, 32
    x = torch.zeros(size, dtype=torch.float64, requires_grad=True)  # the optimum: every step is noise
    probe, optimizer = GradientProbe([x]), torch.optim.SGD([x], lr=rate)
    found, naive, true = [], [], []
    for _ in range(200):
        with torch.no_grad():
            x.zero_()
        noise = torch.randn(2, batch, size, dtype=torch.float64)

        def backward(part, noise=noise):
            ((L * x.square().sum() / 2 + (noise[0, part] @ x).mean()) * (part.stop - part.start) / batch).backward()

        probe.start(batch)
        for part in (slice(0, 16), slice(16, 32)):
            probe.run(backward, part)
        probe.measure()
        optimizer.step()
        change = probe.change(backward)
        after = L * x.detach() + noise[1].mean(0)
        naive.append(float((after - noise[0].mean(0)).square().sum()) - 2 * size / batch)
        found.append(change.square)
        true.append((L * change.distance) ** 2)
    np.testing.assert_allclose(found, true, rtol=1e-9)
    assert np.mean(naive) > 20 * np.mean(true)


def test_the_probe_repeats_dropout_and_leaves_the_random_numbers_alone():
    def train(probed, rate=1e-3):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 50), torch.nn.Dropout(0.5), torch.nn.Linear(50, 1)).double()
        optimizer, probe = torch.optim.SGD(model.parameters(), lr=rate), GradientProbe(model.parameters())
        x = torch.randn(32, 5, dtype=torch.float64)
        changes = []
        for _ in range(5):

            def backward(part):
                (model(x[part]).square().sum() / 32).backward()

            optimizer.zero_grad()
            probe.start(32)
            for part in (slice(0, 16), slice(16, 32)):
                probe.run(backward, part) if probed else backward(part)
            assert (probe.measure() is not None) == probed
            optimizer.step()
            changes.append(probe.change(backward))
            assert not probed or all(p.grad is None for p in model.parameters())
        return changes, model

    changes, model = train(True)
    nothing, reference = train(False)
    assert nothing == [None] * 5
    for a, b in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert all(change.distance > 0 and change.noise > 0 for change in changes)
    for change in train(True, rate=0.0)[0]:  # with fresh masks this would be their noise
        assert change == pytest.approx((0, 0, 0), abs=1e-25)


def noisy(variance=100.0, square=1.0, along=10.0, samples=64):
    return Measurement(samples, square, variance, along)


def feed(sizes, measurement, changes, times):
    for _ in range(times):
        sizes.observe(measurement, changes)
    return sizes.batch_size


def test_hoelder_waits_for_the_plateau_then_doubles_within_bounds(caplog):
    sizes = AdaptiveBatchSize(64, batch_max=200, every=1, patience=3, D=1.0, budget=40000)
    change = Change(0.1, 0.25, 0.1)  # of 0.5 in one step length: nu = 1, L = 5
    falling = [noisy(variance=1000 * 0.8**k) for k in range(10)]
    for measurement in falling:
        assert sizes.observe(measurement, change) == 64, "the variance still falls"
    with caplog.at_level(logging.INFO):
        sizes = AdaptiveBatchSize(64, batch_max=200, every=1, patience=3, D=1.0, budget=40000)
        path = [sizes.observe(noisy(), change) for _ in range(40)]
    # B* = sqrt(100 * 40000 / 5^2) = 400: known after nine steps; doublings three measurements apart, up to the bound.
    assert sizes.optimum == pytest.approx(400, rel=0.01)
    assert sorted(set(path)) == [64, 128, 200]
    assert path.index(200) - path.index(128) == 3
    assert "batch size 64 -> 128" in caplog.text and "stopped falling" in caplog.text and "wanted 400" in caplog.text


def test_hoelder_shrinks_at_the_end_of_an_epoch_only():
    sizes = AdaptiveBatchSize(1024, batch_min=300, every=1, D=1.0, budget=40000)
    change = Change(0.1, 0.25, 0.1)
    assert feed(sizes, noisy(), change, 20) == 1024
    assert [sizes.end_epoch(), feed(sizes, noisy(), change, 20), sizes.end_epoch()] == [512, 512, 400]
    assert sizes.end_epoch() == 400, "an epoch without a measurement says nothing"


def test_the_tests_are_their_formulas_and_never_shrink():
    sizes = AdaptiveBatchSize(64, rule="norm_test", theta=0.5, every=1, patience=3)
    assert feed(sizes, noisy(), None, 2) == 64, "two are not three"
    assert sizes.optimum == pytest.approx(100 / 0.25)
    assert [feed(sizes, noisy(), None, 1), feed(sizes, noisy(), None, 3), feed(sizes, noisy(), None, 3)] == [
        128,
        256,
        400,
    ]
    assert feed(sizes, noisy(variance=1e-3), None, 30) == 400 == sizes.end_epoch()
    sizes = AdaptiveBatchSize(8, rule="inner_product", theta=0.5, nu=2.0, every=1)
    sizes.observe(noisy(variance=100, square=2, along=10))
    assert sizes.optimum == pytest.approx(max(10 / 0.25, 90 / 4) / 2)
    sizes.observe(noisy(square=0))
    assert math.isnan(sizes.optimum)


@pytest.mark.parametrize(("size", "growth", "processes", "grown"), [(2, 1.2, 1, [3, 4]), (8, 1.4, 8, [16, 24])])
def test_a_small_growth_moves_by_a_sample_a_process(size, growth, processes, grown):
    sizes = AdaptiveBatchSize(size, rule="norm_test", growth=growth, patience=1, every=1, processes=processes)
    assert [sizes.observe(Measurement(2, 1.0, 1e6, 1.0)) for _ in grown] == grown


def test_a_state_of_other_bounds_comes_back_to_them():
    options = {"rule": "norm_test", "batch_min": 4}
    state = AdaptiveBatchSize(300, **options).state_dict()
    for bounds, size in (({"batch_max": 100}, 100), ({"batch_max": 100, "processes": 3}, 99), ({}, 300)):
        sizes = AdaptiveBatchSize(50, **options, **bounds)
        sizes.load_state_dict(state)
        assert sizes.batch_size == size


def test_halves_are_measured_in_float32():
    """A gradient of which no half holds the square, and steps that a half would round."""
    found = []
    for dtype in (torch.float16, torch.float32):
        w = torch.zeros(4000, dtype=dtype, requires_grad=True)
        probe, (slopes,) = GradientProbe([w]), (torch.full((4000,), 90.0),)

        def backward(part, w=w, slopes=slopes):
            (w.float() @ slopes * (part.stop - part.start) / 8).backward()

        probe.start(8)
        for start in range(0, 8, 4):
            probe.run(backward, slice(start, start + 4))
        found.append(probe.measure().gradient_square)
    assert found[0] == pytest.approx(found[1]) == pytest.approx(4000 * 8100)


@each_rule
@example([(1e-3, 1.25, 0.1)] * 40, 3)  # down to the lower bound, which is no multiple of 3
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e6), st.floats(1e-6, 1e3), st.floats(1e-4, 10)), max_size=60), st.integers(1, 4)
)
def test_any_measurements_keep_the_bounds_and_resume_exactly(rule, seen, processes):
    """Saved at any step as JSON, in the middle of growing, and resumed: the same sizes as never stopped."""

    def fresh():
        return AdaptiveBatchSize(
            32,
            rule=rule,
            D=3.0,
            budget=1e4,
            batch_min=8,
            batch_max=300,
            every=1,
            window=16,
            processes=processes,
        )

    whole, resumed = fresh(), fresh()
    for k, (variance, square, distance) in enumerate(seen):
        before = whole.batch_size
        for sizes in (whole, resumed):
            sizes.observe(
                Measurement(32, square, variance, variance / 3), Change(distance, square - 1.0, variance / 16)
            )
            if k % 10 == 9:
                sizes.end_epoch()
        assert 8 <= whole.batch_size <= 300 and whole.batch_size % processes == 0
        assert before / 4 - processes <= whole.batch_size <= before * 4, (
            "an observation and an epoch's end: a factor of 2 each"
        )
        state = json.loads(json.dumps(resumed.state_dict(), allow_nan=False))
        resumed = fresh()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == whole.state_dict()
        assert resumed.batch_size == whole.batch_size


def train(steps, resume_at=None):
    """USGM with a growing batch on noisy least squares; stopped and resumed through states at one batch."""

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 1)
        return model, USGM(model.parameters(), D=5.0), AdaptiveBatchSize(16, every=1, batch_max=256, D=5.0, budget=1e6)

    model, optimizer, sizes = fresh()
    probe = GradientProbe(model.parameters())
    path = []
    for k in range(steps):
        if k == resume_at:
            states = [model.state_dict(), optimizer.state_dict(), json.loads(json.dumps(sizes.state_dict()))]
            model, optimizer, sizes = fresh()
            probe = GradientProbe(model.parameters())
            for part, state in zip((model, optimizer, sizes), states):
                part.load_state_dict(state)
        n = sizes.batch_size
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(n, 6, generator=generator)
        y = x.sum(1, keepdim=True) + torch.randn(n, 1, generator=generator)

        def backward(part, model=model, x=x, y=y, n=n):
            ((model(x[part]) - y[part]).square().sum() / n).backward()

        sizes.accumulate(n, backward, optimizer.zero_grad, probe)
        measurement = probe.measure()
        optimizer.step()
        sizes.observe(measurement, probe.change(backward))
        path.append(sizes.batch_size)
    return path, model


def test_a_training_resumes_in_mid_growth():
    path, model = train(60)
    assert len(set(path)) > 2, "the batch grows in this test"
    middle = next(k for k in range(60) if path[k] > 16) + 1
    for stop in (middle, middle + 1, 30):
        resumed, other = train(60, resume_at=stop)
        assert resumed == path
        assert torch.equal(model.weight, other.weight)


def _process(rank, store, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    samples = torch.randn(24, 5, dtype=torch.float64) + 0.3
    mine = samples[:10] if rank == 0 else samples[10:]  # unequal shares, chunks of unequal sizes
    bounds = [0, 4, 10] if rank == 0 else [0, 3, 9, 14]
    found, gradient, change = measured(mine, bounds, dist.group.WORLD)
    sizes = AdaptiveBatchSize(24, rule="norm_test", every=1, patience=1, processes=2)
    sizes.observe(found)
    # one process has a single chunk, then none at all: the other's change counts for both
    lone = measured(samples[:4] if rank == 0 else samples[4:], [0, 4] if rank == 0 else [0, 10, 20], dist.group.WORLD)
    none = measured(samples[:0] if rank == 0 else samples, [] if rank == 0 else [0, 10, 24], dist.group.WORLD)
    # not measured: the gradients still meet, and one that nobody has stays missing
    w, unused = torch.zeros(5, dtype=torch.float64, requires_grad=True), torch.zeros(2, requires_grad=True)
    probe = GradientProbe([w, unused], dist.group.WORLD)
    probe.start(len(mine))
    (mine @ w).mean().backward()
    probe.share()
    assert unused.grad is None
    numbers = [(tuple(m), g.tolist(), tuple(c)) for m, g, c in ((found, gradient, change), lone, none)]
    queue.put((rank, numbers, w.grad.tolist(), sizes.batch_size))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_agree(tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_process, (str(tmp_path / "store"), queue), nprocs=2)
    (_, *first), (_, *second) = sorted(queue.get() for _ in range(2))
    assert first == second, "bit for bit, so that the sizes are"
    torch.manual_seed(0)
    samples = torch.randn(24, 5, dtype=torch.float64) + 0.3
    for numbers, bounds in zip(first[0], ([0, 4, 10, 13, 19, 24], [0, 4, 14, 24], [0, 10, 24])):
        alone, gradient, change = measured(samples, bounds)
        assert numbers[0] == pytest.approx(alone)
        assert numbers[1] == pytest.approx(gradient.tolist())
        assert numbers[2] == pytest.approx(tuple(change), rel=1e-9, abs=1e-20)
    assert first[1] == pytest.approx(samples.mean(0).tolist())


def test_parts_cover_the_batch():
    sizes = AdaptiveBatchSize(100, rule="norm_test", memory_size=30, chunks=5)
    for samples in (1, 2, 29, 30, 31, 100, 101):
        for measured_ in (False, True):
            parts = sizes.parts(samples, measured_)
            assert [i for p in parts for i in range(p.start, p.stop)] == list(range(samples))
            lengths = [p.stop - p.start for p in parts]
            assert max(lengths) <= 30 and max(lengths) - min(lengths) <= 1
            assert not measured_ or len(parts) >= min(5, samples)
    assert AdaptiveBatchSize(100, rule="norm_test").parts(100) == [slice(0, 100)]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_and_goes_on(error, caplog):
    sizes, w = AdaptiveBatchSize(100, rule="norm_test"), torch.zeros(3, requires_grad=True)
    samples = torch.randn(100, 3)
    tried = []

    def backward(part):
        count = part.stop - part.start
        tried.append(count)
        ((samples[part] @ w).sum() / 100).backward()  # a part of the gradient is there when memory runs out
        if count > 30:
            raise error
        return count

    def zero_grad():
        w.grad = None

    with caplog.at_level(logging.WARNING):
        results = sizes.accumulate(100, backward, zero_grad)
    assert tried == [100, 50, 25, 25, 25, 25] and results == [25] * 4
    torch.testing.assert_close(w.grad, samples.mean(0))
    assert caplog.text.count("out of memory") == 2 and "25" in caplog.text
    sizes.accumulate(100, backward, zero_grad)
    assert tried[6:] == [25] * 4, "what does not fit is not tried again"
    assert sizes.state_dict()["memory_size"] == 25


def test_out_of_memory_frees_the_failed_part_before_it_retries():
    import weakref

    sizes, alive = AdaptiveBatchSize(4, rule="norm_test"), []

    def backward(part):
        assert all(reference() is None for reference in alive)
        big = torch.zeros(10)
        alive.append(weakref.ref(big))
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    sizes.accumulate(4, backward, lambda: None)
    assert len(alive) == 3


def test_a_step_whose_change_does_not_fit_is_not_measured():
    w = torch.ones(3, requires_grad=True)
    probe, calls = GradientProbe([w]), []

    def backward(part):
        calls.append(part)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        (w.square().sum() / 2).backward()

    probe.start(4)
    for part in (slice(0, 2), slice(2, 4)):
        probe.run(backward, part)
    assert probe.measure().samples == 4
    assert probe.change(backward) is None and probe.change(backward) is None
    assert len(calls) == 4 and w.grad is None


def test_other_errors_pass_and_one_sample_is_the_end():
    sizes = AdaptiveBatchSize(4, rule="norm_test")
    with pytest.raises(RuntimeError, match="shapes"):
        sizes.accumulate(4, lambda part: (_ for _ in ()).throw(RuntimeError("shapes do not match")), lambda: None)

    def fail(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="out of memory with one sample"):
        sizes.accumulate(4, fail, lambda: None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "holder"}, "did you mean 'hoelder'"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 2.5}, "batch_size: 2.5"),
        ({"batch_min": 200}, "do not rise"),
        ({"batch_min": 100, "batch_max": 101, "processes": 3}, "no multiple of 3 processes is from 100 to 101"),
        ({"batch_max": 50}, "do not rise"),
        ({"memory_size": 0}, "memory_size: 0"),
        ({"every": 0}, "every: 0"),
        ({"chunks": 1}, "chunks: 1 is not a whole number from 2 up"),
        ({"window": 5}, "window: 5"),
        ({"growth": 1.0}, "growth: 1.0"),
        ({"growth": "2"}, "growth: '2'; give a factor above 1"),
        ({"smoothing": None}, "smoothing: None; give a weight"),
        ({"theta": True}, "theta: True; give a positive number"),
        ({"nu": math.nan}, "nu: nan; give a positive number"),
        ({"D": "100"}, "D: '100'; adaptive_batch 'hoelder' needs a positive number"),
        ({"smoothing": 1.0}, "smoothing: 1.0"),
        ({"theta": 0}, "theta: 0"),
        ({"D": None}, "D: None; adaptive_batch 'hoelder' needs"),
        ({"budget": -1}, "budget: -1"),
        ({"processes": 101}, "100 samples for 101 processes"),
    ],
)
def test_impossible_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        AdaptiveBatchSize(**{"batch_size": 100, "D": 1.0, "budget": 1e5, **options})
    assert "\n" not in str(caught.value)
