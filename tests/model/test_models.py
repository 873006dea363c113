"""The contract that every model keeps, on a catalogue whose right answer is known; and their golden losses."""

import itertools
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction

from recbole_ssm import load_recommender, ops, run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import PackedBatch, Steps, Windows
from recbole_ssm.data.prefixes import Prefixes
from recbole_ssm.errors import UserError
from recbole_ssm.layers import Clock
from recbole_ssm.model import PackedRecommender, get_model
from recbole_ssm.ops.packing import cu_seqlens_of
from recbole_ssm.quick_start import configure

REPOSITORY = Path(__file__).parent.parent.parent


TIMES = {
    "none": {},
    "gaps": {"time": "gaps"},
    "query": {"time": "query"},
    "output": {"time": "query", "query_enters": "output", "query_calendar": True},
    "step": {"time": "query", "gap_enters": "step"},
}


def build(name, toy, **options):
    """A fresh model in evaluation mode, and its configuration."""
    if "gap_enters" in options and name != "2Mamba4Rec":
        pytest.skip("its state does not decay through gaps")
    options = {**toy["config_dict"], **options}
    config = configure(name, toy["dataset"], config_dict=options)
    dataset = create_dataset(config)
    torch.manual_seed(0)
    if config["time"] is None:
        return get_model(name)(config, dataset).eval(), config
    model = get_model(name)(config, dataset.build()[0]).eval()
    # The toy's gaps are all of one second. Units of 10 s that begin at 4 s, and gaps beyond the longest one, show more.
    model.time_encoding.scale.copy_(torch.tensor([4, 10, 9000]))
    for embedding in model.time_encoding.children():
        torch.nn.init.normal_(embedding.weight, std=0.3)
    for name, weight in model.named_parameters():
        if name.endswith("gap_rate"):
            torch.nn.init.uniform_(weight, -3, 1)
    return model, config


def times_of(history):
    """When the events of a history were: the gap before one depends on its item and place, from none to two days."""
    gaps = [(item * 7 + place * 3) % 57 for place, item in enumerate(history)]
    return list(itertools.accumulate(gap**3 for gap in gaps))


def rows(histories, length=20, **columns):
    """An interaction of right-padded histories, and of when they were; a row's own time is its target's."""
    padded, times = (
        torch.tensor([h + [0] * (length - len(h)) for h in columns])
        for columns in (histories, list(map(times_of, histories)))
    )
    lengths = torch.tensor([len(h) for h in histories])
    targets = columns["item_id"].tolist() if "item_id" in columns else [9] * len(histories)
    now = torch.tensor([times_of([*h, target])[-1] for h, target in zip(histories, targets)])
    known = {"item_id_list": padded, "item_length": lengths, "timestamp_list": times, "timestamp": now}
    return Interaction({**known, **columns})


def packed(histories):
    """Histories end to end: items, bounds, and the clock in which each event is followed by the next."""
    items, times = (torch.cat([torch.tensor(h) for h in rows]) for rows in (histories, list(map(times_of, histories))))
    bounds = cu_seqlens_of(torch.tensor([len(h) for h in histories]))
    return items, bounds, Clock.of_packed(times, torch.cat([times[1:], times[-1:]]), bounds)


HISTORIES = [[3], [1, 2, 3], [7, 8, 9, 10, 11, 12, 13], list(range(1, 21)), [5, 5, 5, 5]]


class ModelContract:
    """Inherit, and name the model: every test below then runs on it."""

    name: str
    options: dict = {}  # of the training run, where the toy's own do not fit
    learned = 0.9
    causal = True

    def test_learns_the_circle_and_serves_it(self, toy):
        """Trains, improves, saves, loads, and predicts the same."""
        options = {**toy["config_dict"], **self.options}
        first = run_recbole_ssm(self.name, toy["dataset"], config_dict={**options, "epochs": 1}, saved=False)
        result = run_recbole_ssm(self.name, toy["dataset"], config_dict=options)
        assert result["test_result"]["hit@1"] > self.learned
        assert result["best_valid_score"] >= first["best_valid_score"]
        recommender = load_recommender(result["checkpoint"], device="cpu")
        assert recommender.recommend(["i3", "i4", "i5"], k=1)[0][0] == "i6"
        again = load_recommender(result["checkpoint"], device="cpu")
        assert again.recommend(["i18", "i19"], k=5) == recommender.recommend(["i18", "i19"], k=5)

    def test_full_sort_agrees_with_predict(self, toy):
        model, _ = build(self.name, toy)
        items = torch.tensor([1, 5, 9, 20, 2])
        every = model.full_sort_predict(rows(HISTORIES)).view(5, -1)
        one = model.predict(rows(HISTORIES, item_id=items))
        torch.testing.assert_close(every[torch.arange(5), items], one)

    @pytest.mark.parametrize("time", TIMES)
    def test_padding_and_neighbours_do_not_count(self, toy, time):
        if time != "none" and not issubclass(get_model(self.name), PackedRecommender):
            pytest.skip("it reads no times")
        model, _ = build(self.name, toy, **TIMES[time])
        together = model.full_sort_predict(rows(HISTORIES)).view(5, -1)
        for history, expected in zip(HISTORIES, together):
            alone = model.full_sort_predict(rows([history])).view(-1)
            torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)


class PackedContract(ModelContract):
    """What models over packed histories promise beyond that."""

    golden: tuple[float, float, float]
    no_dropout = {"dropout_prob": 0.0}
    window = (40, 40)  # targets and context

    def test_any_width_of_padding_gives_the_same(self, toy):
        model, _ = build(self.name, toy)
        narrow = model.full_sort_predict(rows([[4, 5, 6]], length=3))
        padded = torch.tensor([[4, 5, 6, 17, 18, 19, 20, 1]])  # garbage behind the history
        wide = model.full_sort_predict(Interaction({"item_id_list": padded, "item_length": torch.tensor([3])}))
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0)

    @pytest.mark.parametrize("time", TIMES)
    def test_the_padded_form_is_exact(self, toy, time):
        model, _ = build(self.name, toy, **TIMES[time])
        asked = rows(HISTORIES)
        padding = asked["item_id_list"] == 0
        asked["item_id_list"][padding], asked["timestamp_list"][padding] = 7, 99  # garbage behind the histories
        expected = model.double().forward(*model.histories_of(asked))
        found = model.forward_padded(*model.histories_of(asked))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("time", TIMES)
    def test_last_only_is_exact(self, toy, time):
        model, _ = build(self.name, toy, **TIMES[time])
        model = model.double()
        items, bounds, clock = packed(HISTORIES)
        every = model.encode(items, bounds, clock)
        last = model.encode(items, bounds, clock=clock, last_only=True)
        torch.testing.assert_close(last, every[bounds[1:] - 1], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("loss_type", ["CE", "BPR"])
    def test_losses_are_recboles(self, toy, loss_type):
        from recbole.model.loss import BPRLoss

        model, _ = build(self.name, toy, loss_type=loss_type)
        target, negative = torch.tensor([4, 4, 14, 1, 6]), torch.tensor([9, 10, 11, 12, 13])
        scores = model.full_sort_predict(rows(HISTORIES))
        expected = torch.nn.functional.cross_entropy(scores, target)
        if loss_type == "BPR":
            each = torch.arange(5)
            expected = BPRLoss()(scores[each, target], scores[each, negative])
        found = model.calculate_loss(rows(HISTORIES, item_id=target, neg_item_id=negative))
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(("loss_type", "time"), [("BPR", "none"), *[("CE", time) for time in TIMES]])
    def test_all_positions_at_once_give_recboles_loss(self, toy, loss_type, time):
        """Invariant 3: the packed loss and its gradients equal the prefix loss over the same targets."""
        if not self.causal:
            pytest.skip("a bidirectional model would see its targets")
        model, _ = build(self.name, toy, loss_type=loss_type, **self.no_dropout, **TIMES[time])
        model = model.double().train()
        items, cu_seqlens, clock = packed(HISTORIES[1:])
        prefixes = [(h[:n], h[n]) for h in HISTORIES[1:] for n in range(1, len(h))]
        target = torch.tensor([t for _, t in prefixes])
        at = torch.cat([torch.arange(b, e - 1) for b, e in itertools.pairwise(cu_seqlens.tolist())])
        negative = target % 20 + 1
        at_once = model.calculate_loss(PackedBatch(items, cu_seqlens, at, target, negative, clock.at, clock.after))
        in_rows = model.calculate_loss(rows([h for h, _ in prefixes], item_id=target, neg_item_id=negative))
        torch.testing.assert_close(at_once, in_rows, rtol=1e-9, atol=1e-12)
        weights = [w for w in model.parameters() if w.requires_grad]
        for one, other in zip(torch.autograd.grad(at_once, weights), torch.autograd.grad(in_rows, weights)):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-11)

    @pytest.mark.parametrize("time", ["none", "query"])
    @settings(max_examples=10)
    @given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
    def test_windows_of_random_histories_give_recboles_loss(self, time, lengths, seed):
        """The same with what the loader packs: histories that fit MAX_ITEM_LIST_LENGTH, and steps that cut them."""
        if not self.causal:
            pytest.skip("a bidirectional model would see its targets")
        options = {"data_path": str(REPOSITORY / "dataset"), "MAX_ITEM_LIST_LENGTH": 40, **self.no_dropout}
        options |= TIMES[time]
        model, _ = build(self.name, {"dataset": "toy", "config_dict": options})
        model = model.double().train()
        generator = torch.Generator().manual_seed(seed)
        user = torch.repeat_interleave(torch.tensor(lengths))
        events = {"user_id": user, "item_id": torch.randint(1, 20, (len(user),), generator=generator)}
        events["timestamp"] = (torch.randn(len(user), generator=generator).abs() * 9000).long().cumsum(0)
        prefixes = Prefixes.of_events(events, "user_id", 40, list_suffix="_list", length_field="item_length")
        weights = [w for w in model.parameters() if w.requires_grad]
        steps = Steps(Windows(prefixes, *self.window, shuffle=True), 17, parts=1, seed=seed)
        sums = [0.0] * (len(weights) + 1)
        for _, _, _, targets, [(_, windows)], _ in steps:
            loss = model.calculate_loss(steps.plan.gather(windows, "item_id", "timestamp"))
            found = [loss, *torch.autograd.grad(loss, weights)]
            sums = [a + targets * b for a, b in zip(sums, found)]
        if not len(prefixes):
            return
        loss = model.calculate_loss(prefixes[:])
        for one, other in zip(sums, [loss, *torch.autograd.grad(loss, weights)]):
            torch.testing.assert_close(one / len(prefixes), other, rtol=1e-7, atol=1e-10)

    def test_golden_losses(self, toy):
        """Fifty steps from a fixed seed: losses 1, 25 and 50. A change here is a change of the model."""
        model, _ = build(self.name, toy, **self.no_dropout)
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
        target = torch.tensor([4, 4, 14, 1, 6])
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = model.calculate_loss(rows(HISTORIES, item_id=target))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert (losses[0], losses[24], losses[49]) == pytest.approx(self.golden, rel=1e-3)


class SSMContract(PackedContract):
    """What state-space models promise beyond that."""

    @pytest.mark.parametrize(("readout", "time"), [("mean", "output"), *[("last", time) for time in TIMES]])
    def test_backends_agree(self, toy, readout, time):
        model, _ = build(self.name, toy, readout=readout, **TIMES[time])
        with ops.use_backend("reference"):
            expected = model.full_sort_predict(rows(HISTORIES))
        torch.testing.assert_close(model.full_sort_predict(rows(HISTORIES)), expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_blocks_may_be_added_and_taken_away(self, toy):
        items, bounds, _ = packed(HISTORIES)
        for blocks in (1, 3):
            model, _ = build(self.name, toy, num_layers=2)
            # One block twice, as where blocks share their weights.
            model.blocks = torch.nn.ModuleList([*model.blocks, model.blocks[1]][:blocks])
            every = model.encode(items, bounds)[bounds[1:] - 1]
            for backend in ("auto", "torch"):
                with ops.use_backend(backend):
                    last = model.encode(items, bounds, last_only=True)
                torch.testing.assert_close(last, every, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("time", TIMES)
    def test_steps_equal_the_whole_history(self, toy, time):
        if not self.causal:
            pytest.skip("a bidirectional model has no step")
        model, _ = build(self.name, toy, num_layers=2, **TIMES[time])
        model = model.double()
        batch = rows([[1, 2, 3, 4, 5, 6, 7], [20, 19, 18, 17, 16, 15, 14]], length=7)
        items = batch["item_id_list"]
        clock = Clock.of_rows(batch["timestamp_list"], batch["timestamp"], batch["item_length"])
        state = model.alloc_state(2)
        for t in range(7):
            output, state = model.step(items[:, t], state, clock.take((slice(None), t)))
        found = model.read_out(output, clock.take((slice(None), 6)))
        torch.testing.assert_close(found, model.forward(*model.histories_of(batch)), rtol=1e-9, atol=1e-9)
        # And so does a part of it at once, with steps behind it.
        _, state = model.read(items[0, :4], clock.take((0, slice(4))))
        for t in range(4, 7):
            chunked, state = model.step(items[:1, t], state, clock.take((slice(1), t)))
        torch.testing.assert_close(chunked, output[:1], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("time", TIMES)
    def test_shapes_that_lengths_do_not_change_give_the_same_scores(self, toy, time):
        model, _ = build(self.name, toy, **TIMES[time])
        batch = rows(HISTORIES)
        found = model.fixed_shape_scores(*model.histories_of(batch))
        torch.testing.assert_close(found, model.full_sort_predict(batch), rtol=1e-5, atol=1e-6)

    def test_residual_follows_the_published_rule(self, toy):
        for num_layers, expected in ((1, False), (2, True)):
            assert build(self.name, toy, num_layers=num_layers)[0].blocks[0].residual is expected
        assert build(self.name, toy, num_layers=1, residual=True)[0].blocks[0].residual is True


class TestMamba4Rec(SSMContract):
    name, golden = "Mamba4Rec", (3.157342, 0.834348, 0.236826)

    def test_step_sizes_start_as_published_or_as_mamba_does(self, toy):
        """The published code zeroes dt_proj's bias by accident; here that is a choice with a name."""
        published, _ = build(self.name, toy)
        assert not published.blocks[0].mixer.dt_proj.bias.any()
        own, _ = build(self.name, toy, dt_init="log_uniform")
        start = torch.nn.functional.softplus(own.blocks[0].mixer.dt_proj.bias)
        assert start.max() <= 0.11 and start.min() >= 1e-4


class TestTwoMamba4Rec(SSMContract):
    name, golden = "2Mamba4Rec", (3.125756, 0.845567, 0.233655)


class TestHydra4Rec(SSMContract):
    name, golden, causal = "Hydra4Rec", (3.199757, 1.021066, 0.286605), False

    def backward_half_counts(self, toy, **options):
        """Whether the backward maps of some block reach the output."""
        model, _ = build(self.name, toy, **options)
        model.full_sort_predict(rows(HISTORIES)).square().sum().backward()
        reach = 0.0
        for block in model.blocks:
            mixer = block.mixer
            begin = 2 * mixer.d_inner + 2 * mixer.d_state  # rows of in_proj that make B_bwd and C_bwd
            reach += mixer.in_proj.weight.grad[begin : begin + 2 * mixer.d_state].abs().sum().item()
        return reach > 0

    def test_default_is_bidirectional(self, toy):
        assert self.backward_half_counts(toy)
        assert self.backward_half_counts(toy, num_layers=1, readout="mean")

    def test_one_layer_read_at_the_end_is_not_and_says_so(self, toy, caplog):
        with caplog.at_level(logging.WARNING):
            assert not self.backward_half_counts(toy, num_layers=1, readout="last")
        assert "never uses its backward half" in caplog.text


class TestHydra4RecMasked(ModelContract):
    """It learns whole histories, of which items are hidden, and is asked for a hidden one behind them."""

    name = "Hydra4Rec"
    options = {"train_mode": "masked", "epochs": 30, "stopping_step": 30}

    def test_the_next_item_is_a_hidden_one(self, toy):
        model, _ = build(self.name, toy, train_mode="masked")
        items, length = torch.tensor([[4, 5, 6, 17, 18]]), torch.tensor([3])  # garbage behind the history
        expected = model.encode(torch.tensor([4, 5, 6, 0]), torch.tensor([0, 4]), last_only=True)
        torch.testing.assert_close(model.forward(items, length), expected, rtol=0, atol=0)
        full = model.forward(torch.tensor([[4, 5, 6]]), length)
        torch.testing.assert_close(full, expected, rtol=0, atol=0)
        fixed = model.fixed_shape_scores(items, length)
        torch.testing.assert_close(fixed, expected @ model.item_embedding.weight.T)
        assert model.item_embedding.weight[0].any()

    def test_who_learns_so(self, toy):
        for name in ("2Mamba4Rec", "SASRec", "BERT4Rec"):
            with pytest.raises(UserError, match=f"train_mode: masked is not possible, because {name} does not learn"):
                build(name, toy, train_mode="masked")
        with pytest.raises(UserError, match="readout: mean does not read where an item is hidden"):
            build("Hydra4Rec", toy, train_mode="masked", readout="mean")
        with pytest.raises(UserError, match="train_mode: packed is not possible, because Hydra4Rec is bidirectional"):
            build("Hydra4Rec", toy, train_mode="packed")


class RecBolesContract(PackedContract):
    """What our forms of RecBole's own models promise beyond that."""

    @pytest.mark.parametrize("seed", [0, 1])
    def test_weights_and_scores_are_recboles(self, toy, seed):
        from recbole.model import sequential_recommender

        config = configure(self.name, **toy)
        data = create_dataset(config)
        torch.manual_seed(seed)
        ours = get_model(self.name)(config, data)
        torch.manual_seed(seed)
        recboles = getattr(sequential_recommender, self.name)(config, data)
        expected = recboles.state_dict()
        assert list(ours.state_dict()) == list(expected)
        assert all(torch.equal(weight, expected[name]) for name, weight in ours.state_dict().items())
        one, other = ours.eval().double(), recboles.eval().double()
        torch.testing.assert_close(
            one.full_sort_predict(rows(HISTORIES)), other.full_sort_predict(rows(HISTORIES)), rtol=1e-9, atol=1e-9
        )


class TestSASRec(RecBolesContract):
    name, golden = "SASRec", (3.010217, 0.911157, 0.244655)
    no_dropout = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}


class TestGRU4Rec(RecBolesContract):
    name, golden = "GRU4Rec", (3.027883, 0.855279, 0.006651)


class TestBERT4Rec(ModelContract):
    name = "BERT4Rec"
    options = {
        "epochs": 60,
        "stopping_step": 60,
        "learning_rate": 0.003,
        "hidden_dropout_prob": 0,
        "attn_dropout_prob": 0,
    }
    learned = 0.5  # masked items teach it the circle slowly; chance is 0.05
