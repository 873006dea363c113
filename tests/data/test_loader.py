"""Every target once an epoch, from enough context, in steps of the asked size, whoever computes them."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import Rows, Steps, Windows, create_loaders, share_evenly
from recbole_ssm.data.masking import MASK, hide
from recbole_ssm.data.prefixes import Prefixes
from recbole_ssm.data.sampling import seeded
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure


def prefixes_of(lengths, max_length, keep=None):
    """Users with so many events each; event e is item e + 1."""
    user = np.repeat(np.arange(len(lengths)), lengths)
    events = {"user_id": torch.from_numpy(user), "item_id": torch.arange(1, len(user) + 1)}
    rows = Prefixes.of_events(events, "user_id", max_length, list_suffix="_list", length_field="item_length")
    return rows if keep is None else rows.select(np.flatnonzero(keep[: len(rows)]))


histories = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(
    lengths=histories, max_length=st.integers(1, 20), window=st.integers(1, 20), size=st.integers(1, 50), data=st.data()
)
def test_windows_give_each_target_once_with_its_context(lengths, max_length, window, size, data):
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))))
    prefixes = prefixes_of(lengths, max_length, keep)
    if not len(prefixes):
        return
    context = data.draw(st.integers(1, max_length))
    windows = Windows(prefixes, window, context, shuffle=True)
    steps = Steps(windows, size, parts=1, seed=1)
    seen = []
    for seed, number, stop, targets, [(weight, rows)], _ in steps:
        assert (seed, weight) == ([1, 0, number, 0], 1.0)
        assert targets == (size if stop < len(prefixes) else len(prefixes) - size * number)
        batch = windows.gather(rows, "item_id")
        assert len(batch.target) == len(batch.at) == targets
        assert batch.positions == windows.work(rows).sum()
        starts = batch.cu_seqlens[torch.searchsorted(batch.cu_seqlens, batch.at, right=True) - 1]
        for at, target, start in zip(batch.at.tolist(), batch.target.tolist(), starts.tolist()):
            history = batch.items[start : at + 1].tolist()
            assert history == list(range(target - len(history), target))  # the events just before it, in order
            row = np.flatnonzero(prefixes.target == target - 1)[0]
            assert len(history) >= min(prefixes.length[row], context)
            assert len(history) < context + max(window, max_length)
        seen += batch.target.tolist()
    assert len(steps) == -(-len(prefixes) // size)
    assert sorted(seen) == sorted(prefixes["item_id"].tolist())


@given(lengths=histories, max_length=st.integers(1, 20), data=st.data())
def test_histories_that_fit_are_recboles_prefixes_exactly(lengths, max_length, data):
    """Also where the oldest events are no targets, as train_last leaves it, and the context is short."""
    lengths = [min(n, max_length + 1) for n in lengths]
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))))
    prefixes = prefixes_of(lengths, max_length, keep)
    if not len(prefixes):
        return
    windows = Windows(prefixes, max_length, data.draw(st.integers(1, max_length)), shuffle=True)
    order = windows.epoch(np.random.default_rng(0))[:, :2]
    batch = windows.gather(order, "item_id")
    starts = batch.cu_seqlens[torch.searchsorted(batch.cu_seqlens, batch.at, right=True) - 1]
    lengths_of = dict(zip(prefixes["item_id"].tolist(), prefixes["item_length"].tolist()))
    for at, target, start in zip(batch.at.tolist(), batch.target.tolist(), starts.tolist()):
        assert at + 1 - start == lengths_of[target]
    # One position a target, nothing twice, and before the first of them its history.
    assert batch.positions == len(prefixes) + sum(lengths_of[target + 1] - 1 for target in windows.target[order[:, 0]])


@given(lengths=histories, size=st.integers(1, 50), stop=st.integers(0, 30), packed=st.booleans())
def test_an_epoch_goes_on_from_any_step(lengths, size, stop, packed):
    prefixes = prefixes_of(lengths, 10)
    if not len(prefixes):
        return
    plan = Windows(prefixes, 10, 10, shuffle=True) if packed else Rows(prefixes, shuffle=True)
    steps = Steps(plan, size, parts=1, seed=5)
    steps.begin(3)
    whole = list(steps)
    done = whole[: stop % (len(whole) + 1)]
    steps.begin(3, len(done), done[-1].seen if done else 0)
    rest = list(steps)
    assert len(done) + len(rest) == len(whole) and len(steps) == len(rest)
    for again, first in zip(rest, whole[len(done) :]):
        assert again[:4] == first[:4] and np.array_equal(again.parts[0][1], first.parts[0][1])


def test_epochs_differ_and_seeds_differ():
    plan = Windows(prefixes_of([30, 40, 20], 10), 10, 10, shuffle=True)

    def order(seed, epoch):
        steps = Steps(plan, 16, parts=1, seed=seed)
        steps.begin(epoch)
        return np.concatenate([step.parts[0][1] for step in steps]).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    still = Windows(prefixes_of([30, 40, 20], 10), 10, 10, shuffle=False)
    assert np.array_equal(still.epoch(np.random.default_rng(0)), still.epoch(np.random.default_rng(1)))


def test_the_batch_size_may_change_between_steps():
    steps = Steps(Windows(prefixes_of([30, 40, 20], 10), 10, 10, shuffle=True), 16, parts=1, seed=0)
    sizes = []
    for step in steps:
        sizes.append(step.targets)
        steps.batch_size = 5
    assert sizes == [16, *[5] * 14, 1]


@given(work=st.lists(st.integers(1, 50), min_size=1, max_size=30), parts=st.integers(1, 4))
def test_work_is_shared_evenly_and_wholly(work, parts):
    shares = share_evenly(np.array(work), parts)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(work)))
    loads = [sum(work[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(work)


def test_parts_of_a_step_weigh_what_they_hold():
    plan = Windows(prefixes_of([30, 40, 20, 7], 10), 10, 10, shuffle=True)
    for step in Steps(plan, 25, parts=3, seed=0):
        assert sum(weight for weight, _ in step.parts) == pytest.approx(1)
        for weight, rows in step.parts:
            assert weight == pytest.approx(plan.targets(rows) / step.targets)


@given(
    lengths=histories,
    max_length=st.integers(2, 20),
    size=st.integers(1, 50),
    ratio=st.floats(0.05, 1.0),
    seed=st.integers(),
)
def test_hidden_items_are_some_of_whole_histories(lengths, max_length, size, ratio, seed):
    """Every event of training comes as an input once an epoch and more where windows meet; targets are the hidden."""
    prefixes = prefixes_of(lengths, max_length)
    if not len(prefixes):
        return
    np.random.seed(seed % 2**32)
    windows = Windows(prefixes, max_length - 1, 1, shuffle=True)
    for last_ratio in (0.0, 0.5, 1.0):
        seen = set()
        for _, _, _, targets, [(_, rows)], _ in Steps(windows, size, parts=1, seed=1):
            whole = windows.gather(rows, "item_id")
            batch = hide(whole, ratio, last_ratio)
            assert len(batch.items) == targets + len(rows)
            events = batch.items.clone()
            events[batch.at] = batch.target
            assert (batch.items[batch.at] == MASK).all() and (batch.items == MASK).sum() == len(batch.at)
            for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
                window = events[start:stop].tolist()
                assert window == list(range(window[0], window[0] + len(window))) and 2 <= len(window) <= max_length + 1
                hidden = (batch.items[start:stop] == MASK).tolist()
                assert any(hidden) and (hidden == [False] * (len(window) - 1) + [True] or last_ratio < 1)
                seen |= set(window)
        long = [(sum(lengths[:user]), count) for user, count in enumerate(lengths) if count > 1]
        assert seen == {start + event + 1 for start, count in long for event in range(count)}


def test_as_many_items_are_hidden_as_asked_for():
    prefixes = prefixes_of([400] * 40, 50)
    windows = Windows(prefixes, 49, 1, shuffle=True)
    np.random.seed(0)
    whole = windows.gather(windows.epoch(np.random.default_rng(0))[:, :2], "item_id")
    every, none, half = (hide(whole, 0.2, last) for last in (0.0, 1.0, 0.5))
    assert len(every.at) / len(every.items) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(none.at, none.cu_seqlens[1:] - 1)
    assert len(half.at) / len(half.items) == pytest.approx(0.1 + 0.5 / 50, abs=0.015)


def test_the_newest_events_alone_train(toy, caplog):
    """As in the published loaders: what is older is neither a target nor in a history."""
    found = {}
    for options in ({}, {"train_last": 3}, {"train_newest": 3}, {"train_newest": 3, "train_mode": "prefix"}):
        config = configure("2Mamba4Rec", "toy", config_dict={**toy["config_dict"], **options})
        with caplog.at_level(logging.INFO):
            train = create_loaders(config, create_dataset(config))[0]
        rows = train._dataset.inter_feat
        found[tuple(options)] = rows
        if "train_newest" in options:
            assert "train_newest: 3: 180 of 537 targets train" in caplog.text
            lengths = {user: [] for user in rows["user_id"].tolist()}
            for user, length in zip(rows["user_id"].tolist(), rows.length.tolist()):
                lengths[user].append(length)
            assert all(one == [1, 2, 3] for one in lengths.values()) and len(lengths) == 60
        if config["train_mode"] == "packed" and "train_newest" in options:
            batches = [step.parts[0].batch for step in train]
            assert sum(len(batch.target) for batch in batches) == 180
            # A window that a step cuts begins again with its own context.
            assert sum(batch.positions for batch in batches) <= 180 + 3 * len(batches)
    last, newest = found[("train_last",)], found[("train_newest",)]
    assert np.array_equal(last.target, newest.target) and (last.length >= newest.length).all()
    assert (last.length > newest.length).any()
    with pytest.raises(UserError, match="train_newest: train_last leaves targets too"):
        configure("2Mamba4Rec", "toy", config_dict={**toy["config_dict"], "train_last": 3, "train_newest": 3})


@pytest.mark.parametrize("model", ["2Mamba4Rec", "BERT4Rec", "Hydra4Rec"])
@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
def test_worker_processes_change_nothing(toy, model, loss_type):
    """Negatives and masks too, and the global random states are left alone."""
    batches = {}
    for worker in (0, 2):
        toy["config_dict"] |= {"worker": worker, "loss_type": loss_type}
        toy["config_dict"] |= {"train_mode": "masked"} if model == "Hydra4Rec" else {}
        config = configure(model, **toy)
        train, _, _ = create_loaders(config, create_dataset(config))
        random.seed(1)
        np.random.seed(1)
        batches[worker] = [step.parts[0].batch for step in train]
        assert (random.random(), np.random.rand()) == (0.13436424411240122, 0.417022004702574)
    for one, other in zip(batches[0], batches[2]):
        pairs = zip(one.interaction.values(), other.interaction.values()) if model == "BERT4Rec" else zip(one, other)
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mode", ["full", "uni10"])
def test_workers_may_be_spawned(toy, mode):
    """As they are on macOS and Windows."""
    batches = []
    for worker in (0, 1):
        toy["config_dict"] |= {"worker": worker, "eval_args": {"mode": mode}}
        config = configure("2Mamba4Rec", **toy)
        train, valid, _ = create_loaders(config, create_dataset(config))
        if worker:
            train.multiprocessing_context = valid.multiprocessing_context = "spawn"
        batches.append(([step.parts[0].batch.items for step in train], [batch[0]["item_id"] for batch in valid]))
    for one, other in zip(*batches):
        assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def test_seeded_blocks_do_not_leak():
    np.random.seed(7)
    before = np.random.get_state()[1].tolist()
    with seeded(1, 2, 3):
        first = np.random.rand(), random.random()
    with seeded(1, 2, 3):
        assert first == (np.random.rand(), random.random())
    assert np.random.get_state()[1].tolist() == before


def test_fingerprint_knows_the_data(toy, write_dataset):
    def fingerprint(options):
        config = configure("Mamba4Rec", **options)
        return create_loaders(config, create_dataset(config))[0].fingerprint()

    lines = [f"u{u}\ti{(u + t) % 15}\t{t}\n" for u in range(4) for t in range(8)]
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    first = fingerprint(write_dataset(header + "".join(lines)))
    assert first == fingerprint(write_dataset(header + "".join(lines)))
    lines[3], lines[4] = lines[3].replace("\t3", "\t4"), lines[4].replace("\t4", "\t3")
    assert first != fingerprint(write_dataset(header + "".join(lines)))
