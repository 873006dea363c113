"""Training steps that are replayed: batches of a few sizes, and the logic around a recording on a stand-in for it."""

import contextlib

import pytest
import torch

from recbole_ssm.trainer import Hook
from recbole_ssm.trainer.graphs import COMPARED, MOST, WARM_UP, Replays, round_up, rounded
from tests.conftest import REPOSITORY
from tests.ops.test_ops import assert_close
from tests.trainer.test_trainer import build

PACKED = {"train_batch_size": 90, "train_mode": "packed"}
SMALL = {**PACKED, "hidden_size": 16, "d_state": 8, "head_dim": 8, "epochs": 4}


# --- batches of a few sizes ------------------------------------------------------------------------------------------


def without_dropout(model):
    names = ("hidden_dropout_prob", "attn_dropout_prob") if model == "SASRec" else ("dropout_prob",)
    return dict.fromkeys(names, 0.0)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("Mamba4Rec", {}),
        ("Mamba4Rec", {"num_layers": 2, "loss_type": "BPR", "train_neg_sample_args": {"sample_num": 1}}),
        ("2Mamba4Rec", {"time": "query"}),
        ("SASRec", {}),
        ("GRU4Rec", {}),
    ],
)
def test_loss_and_gradients_do_not_change(toy, write_dataset, model, options):
    if "time" in options:
        head, *rows = (REPOSITORY / "dataset" / "toy" / "toy.inter").read_text().splitlines()
        rows = [f"{user}\t{item}\t{1_600_000_000 + 60 * float(time)}" for user, item, time in map(str.split, rows)]
        toy = write_dataset("\n".join([head, *rows]) + "\n")
    trainer, train, _ = build(model, toy, **PACKED, **without_dropout(model), **options)
    network = trainer.model.double().train()
    longest = network.max_seq_length
    for step in list(train)[:3]:
        batch = step.parts[0].batch
        found = []
        for given in (batch, rounded(batch, longest), rounded(rounded(batch, 3), 2)):
            network.zero_grad()
            loss = network.calculate_loss(given)
            loss.backward()
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in network.parameters()]
            found.append(torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)]))
        assert len(rounded(batch, longest).items) > len(batch.items) or round_up(len(batch.items)) == len(batch.items)
        for other in found[1:]:
            assert_close(other, found[0], 1e-12)


def test_sizes_are_few_and_little_is_added(toy):
    _, train, _ = build("2Mamba4Rec", toy, **{**PACKED, "train_batch_size": 16})
    sizes = []
    for epoch in range(4):
        train.steps.begin(epoch)
        for step in train:
            batch = step.parts[0].batch
            bigger = rounded(batch, 7)
            events, histories = len(batch.items), len(batch.cu_seqlens) - 1
            assert events <= len(bigger.items) <= events * 9 / 8
            assert bigger.cu_seqlens[-1] == len(bigger.items) and (bigger.cu_seqlens.diff() >= 0).all()
            assert torch.equal(bigger.cu_seqlens[: histories + 1], batch.cu_seqlens)
            assert (bigger.cu_seqlens[histories:].diff() <= 7).all()
            assert bin(len(bigger.cu_seqlens) - 1).count("1") == 1
            sizes.append((len(bigger.items), len(bigger.cu_seqlens)))
    assert len(set(sizes)) <= MOST < len(sizes)


def test_an_eighth_more_at_most():
    for number in range(1, 3000):
        assert number <= round_up(number) <= number * 9 / 8


# --- a stand-in for the recording ------------------------------------------------------------------------------------


class Standin:
    """As a graph: what is recorded runs at each replay, with the rates that stand on the device, and not before.

    Args:
        wrong: changes what a replay gives, from its number and the trainer.
        launched: why the optimiser's step is not recorded, if it is not.
    """

    def __init__(self, wrong=None, launched=None):
        self.wrong, self.launched, self.recorded, self.replayed = wrong, launched, 0, 0

    def of(self, trainer):
        trainer._replays = Replays(trainer, lambda call: self.record(trainer, call))
        trainer._replays.refusal = lambda: None
        trainer._replays.why_step_is_launched = lambda: self.launched
        return trainer

    def record(self, trainer, call):
        groups = trainer.optimizer.param_groups
        place = torch.full((1,), torch.nan, dtype=torch.float64)
        self.recorded += 1
        gradients = [p.grad for p in trainer.model.parameters()]
        # A graph would write a rate that is not there yet in every replay.
        assert self.launched or trainer._replays._written == [group["lr"] for group in groups]

        def replay():
            assert all(torch.is_tensor(group.get("lr")) == (self.launched is None) for group in groups)
            # A graph would write into those that it was recorded with.
            assert all(p.grad is there for p, there in zip(trainer.model.parameters(), gradients))
            place.copy_(call())
            self.replayed += 1
            if self.wrong:
                self.wrong(self.replayed, trainer, place)

        return place, replay


class Looks(Hook):
    seen = 0

    def on_gradients(self, trainer, step):
        self.seen += sum(float(p.grad.norm()) for p in trainer.model.parameters())


def fitted(toy, standin, choice="auto", hook=None, **options):
    """The weights and losses of a run, whose batches are of the same sizes where nothing is recorded."""
    hooks = [] if hook is None else [hook]
    trainer, train, _ = build("2Mamba4Rec", toy, hooks, **{**SMALL, "lr_scheduler": "cosine", **options})
    trainer.config["cuda_graphs"] = choice
    standin.of(trainer).fit(train, saved=False)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), trainer.train_loss_dict


class Never(Standin):
    def record(self, trainer, call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def said(caplog):
    found = [record.message for record in caplog.records if "cuda_graphs" in record.message]
    caplog.clear()
    return found


@pytest.mark.parametrize("choice", ["auto", True])
def test_replays_train_as_launched_steps_do(toy, choice, caplog):
    """With dropout, and a learning rate that changes in every step."""
    launched = fitted(toy, Never())
    begin = "cuda_graphs: steps are launched kernel by kernel from here on: "
    why = "recording failed (RuntimeError: operation not permitted when stream is capturing)"
    assert said(caplog) == [begin + why]
    standin = Standin()
    weights, losses = fitted(toy, standin, choice)
    assert standin.recorded > 1 and standin.replayed > 2 * COMPARED
    assert torch.equal(weights, launched[0]) and losses == launched[1]
    assert said(caplog) == []


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "one_cycle"},
        {"learner": "usgm", "learner_args": {"D": 1.0}, "lr_scheduler": None},
        {"average_power": 8.0, "clip_grad_norm": {"max_norm": 0.1}},
        {"learner": "sgd"},
    ],
)
def test_the_optimisers_step_may_be_launched_after_a_replay(toy, options, caplog):
    caplog.set_level("INFO")
    first, second = Looks(), Looks()
    launched = fitted(toy, Never(launched="so it must"), hook=first, **options)
    said(caplog)
    standin = Standin(launched="so it must")
    weights, losses = fitted(toy, standin, hook=second, **options)
    assert standin.recorded > 1 and standin.replayed > 2 * COMPARED
    assert torch.equal(weights, launched[0]) and losses == launched[1]
    assert said(caplog) == ["cuda_graphs: all but the optimiser's step is recorded, because so it must"]
    assert first.seen == second.seen > 0


class Halves(Hook):
    """Puts other tensors in the place of gradients, now and then none."""

    def on_gradients(self, trainer, step):
        for p in trainer.model.parameters():
            if p.grad is not None:
                p.grad = p.grad * 0.5 if trainer.global_step % 3 else None


def test_a_hook_may_put_other_gradients_in_their_place(toy, caplog):
    launched = fitted(toy, Never(launched="a hook"), hook=Halves())
    said(caplog)
    standin = Standin(launched="a hook")
    weights, losses = fitted(toy, standin, hook=Halves())
    assert standin.replayed > 2 * COMPARED and not said(caplog)
    assert torch.equal(weights, launched[0]) and losses == launched[1]


def mask_again(number, trainer, place):
    torch.manual_seed(3)


def weaker(number, trainer, place):
    for p in trainer.model.parameters():
        p.grad.mul_(0.99)


def other_step(number, trainer, place):
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.05)


def other_loss(number, trainer, place):
    place.mul_(1.01)


def late(number, trainer, place):
    """Right once: a value of the first batch is baked in."""
    if number > 1:
        place.fill_(1.0)


def test_a_wrong_replay_is_found_and_changes_nothing(toy, caplog):
    launched = {why: fitted(toy, Never(launched=why)) for why in (None, "so it must")}
    said(caplog)
    for wrong, what, why in (
        (mask_again, "the random numbers", None),
        (weaker, "the gradients", None),
        (weaker, "the gradients", "so it must"),
        (other_step, "the weights", None),
        (other_loss, "the loss", None),
        (late, "the loss", "so it must"),
    ):
        found = fitted(toy, Standin(wrong, why))
        assert torch.equal(found[0], launched[why][0]) and found[1] == launched[why][1]
        line = "steps are launched kernel by kernel from here on: a replayed step differs from the launched one in"
        assert said(caplog) == [f"cuda_graphs: {line} {what}"]


def test_a_schedule_of_more_than_the_rate_ends_replays(toy, caplog):
    launched = fitted(toy, Never(), lr_scheduler="one_cycle")
    caplog.clear()
    found = fitted(toy, Standin(), lr_scheduler="one_cycle")
    assert torch.equal(found[0], launched[0])
    assert "lr_scheduler changes more than the learning rate" in caplog.text


def test_without_room_to_compare_steps_are_launched(toy, caplog):
    def full(number, trainer, place):
        other_step(number, trainer, place)
        raise torch.OutOfMemoryError("CUDA out of memory")

    launched = fitted(toy, Never())
    said(caplog)
    found = fitted(toy, Standin(full))
    assert torch.equal(found[0], launched[0]) and found[1] == launched[1]
    (line,) = said(caplog)
    assert line.endswith("there is no room to compare a replayed step with the launched one")


class KilledError(Exception):
    pass


class Kill(Hook):
    def on_step_end(self, trainer, step, loss):
        if trainer.global_step == 17:
            raise KilledError


def test_a_resumed_run_draws_the_masks_again(toy):
    """Of the run that goes on, the first steps are launched where those of the other were replayed."""
    keys = {**SMALL, "epochs": 6, "checkpoint_steps": 4}
    trainer, train, _ = build("2Mamba4Rec", toy, [Kill()], **keys)
    killed = Standin()
    with pytest.raises(KilledError):
        killed.of(trainer).fit(train)
    assert killed.replayed > COMPARED
    resumed, again, _ = build("2Mamba4Rec", toy, **keys)
    standin = Standin()
    standin.of(resumed).resume_checkpoint(trainer.folder)
    assert resumed.global_step == 16
    resumed.fit(again)
    whole, train, _ = build("2Mamba4Rec", toy, **keys)
    Standin().of(whole).fit(train)
    assert standin.replayed
    for one, other in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, other)


def test_another_fit_records_anew(toy):
    """A recording reads weights and states of the optimiser where they lay."""
    keys = {**SMALL, "epochs": 3}
    trainer, train, _ = build("2Mamba4Rec", toy, **keys)
    standin = Standin()
    standin.of(trainer).fit(train, saved=False)
    before = standin.recorded
    trainer._replays.begin()
    assert not trainer._replays._recordings
    trainer.position = trainer.position._replace(epoch=0, number=0, seen=0, ended=False)
    trainer.fit(train, saved=False)
    assert standin.recorded == 2 * before > 0


# --- where steps are launched ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_a_gpu(trainer):
    device, trainer.device = trainer.device, torch.device("cuda")
    for group in trainer.optimizer.param_groups:
        group["capturable"] = trainer.config["learner"] == "adam"
    yield trainer._replays.refusal()
    trainer.device = device


@pytest.mark.parametrize(
    ("model", "hooks", "options", "reason"),
    [
        ("2Mamba4Rec", [], {}, None),
        ("2Mamba4Rec", [], {"cuda_graphs": False}, ""),
        ("2Mamba4Rec", [], {"train_mode": "prefix"}, "train_mode: prefix gives batches of another size"),
        ("2Mamba4Rec", [], {"gradient_accumulation_steps": 2}, "a step has several parts"),
        ("GRU4Rec", [], {}, "GRU4Rec takes the lengths of histories on the CPU"),
        ("STAMP", [], {}, "STAMP takes the lengths of histories on the CPU, or is RecBole's own"),
    ],
)
def test_what_is_not_recorded_says_why(toy, model, hooks, options, reason):
    trainer, _, _ = build(model, toy, hooks, **options)
    with on_a_gpu(trainer) as refusal:
        assert refusal == reason if not reason else refusal.startswith(reason)


def test_sparse_gradients_are_not_recorded(toy):
    trainer, _, _ = build("2Mamba4Rec", toy)
    trainer.model.item_embedding.sparse = True
    with on_a_gpu(trainer) as refusal:
        assert refusal == "sparse gradients have another size in every step"


@pytest.mark.parametrize(
    ("hooks", "options", "reason"),
    [
        ([], {}, None),
        ([Looks()], {}, "a hook looks at the gradients"),
        ([], {"learner": "sgd"}, "sgd's cannot be; those of adam and adamw can"),
        ([], {"lr_scheduler": "one_cycle"}, "lr_scheduler: one_cycle moves the betas at every step"),
        ([], {"average_power": 1.0}, "average_power follows every step"),
    ],
)
def test_what_launches_the_optimisers_step_says_why(toy, hooks, options, reason):
    trainer, _, _ = build("2Mamba4Rec", toy, hooks, **options)
    with on_a_gpu(trainer) as refusal:
        found = trainer._replays.why_step_is_launched()
        assert refusal is None and (found is None if reason is None else found.startswith(reason))


def test_a_cpu_says_nothing_and_pads_nothing(toy, caplog):
    trainer, train, _ = build("2Mamba4Rec", toy, **SMALL)
    batch = next(iter(train)).parts[0].batch
    assert trainer.config["cuda_graphs"] == "auto" and trainer._replays.rounded(batch) is batch
    assert "cuda_graphs" not in caplog.text


def test_no_more_than_so_many_sizes_are_recorded(toy, monkeypatch):
    monkeypatch.setattr("recbole_ssm.trainer.graphs.MOST", 1)
    standin = Standin()
    fitted(toy, standin)
    assert standin.recorded == 1 and WARM_UP > 0
