"""Recipes of blocks, scores and losses: every promise of the default recipe holds for the others."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F

from recbole_ssm import load_recommender, ops, run_recbole_ssm
from recbole_ssm.data.loader import PackedBatch
from recbole_ssm.errors import UserError
from recbole_ssm.layers.history import _say_unknown
from recbole_ssm.ops import native
from recbole_ssm.ops.packing import cu_seqlens_of
from recbole_ssm.quick_start import configure
from recbole_ssm.serving import Recommender
from recbole_ssm.serving.session import Stepper
from tests.conftest import REPOSITORY
from tests.model.test_models import HISTORIES, build, rows

STACKS = {
    "pre": {"norm_position": "pre"},
    "swiglu": {"feed_forward": "swiglu"},
    "LiGR": {"norm_position": "pre", "feed_forward": "swiglu", "gated_residual": True},
}
COSINE = {"score": "cosine", "temperature": 0.05}
CAUSAL = ("Mamba4Rec", "2Mamba4Rec", "SASRec")
NO_DROPOUT = {
    "SASRec": {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "n_layers": 2},
}


def options_of(name, **recipe):
    return {**NO_DROPOUT.get(name, {"dropout_prob": 0.0, "num_layers": 2}), **recipe}


def packed(histories=HISTORIES[1:]):
    """Histories as a packed batch whose every position but the last has its target, and as rows of prefixes."""
    bounds = cu_seqlens_of(torch.tensor([len(h) for h in histories]))
    prefixes = [(h[:n], h[n]) for h in histories for n in range(1, len(h))]
    target = torch.tensor([t for _, t in prefixes])
    at = torch.cat([torch.arange(b, e - 1) for b, e in itertools.pairwise(bounds.tolist())])
    items = torch.cat([torch.tensor(h) for h in histories])
    return PackedBatch(items, bounds, at, target, None), rows([h for h, _ in prefixes], item_id=target)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", [*CAUSAL, "Hydra4Rec"])
def test_a_recipe_changes_nothing_of_what_packing_promises(toy, name, stack):
    model, _ = build(name, toy, **options_of(name, **STACKS[stack], **COSINE))
    model = model.double()
    items, bounds = (
        torch.cat([torch.tensor(h) for h in HISTORIES]),
        cu_seqlens_of(torch.tensor([len(h) for h in HISTORIES])),
    )
    last = model.encode(items, bounds, last_only=True)
    torch.testing.assert_close(last, model.encode(items, bounds)[bounds[1:] - 1], rtol=1e-9, atol=1e-9)
    padded = model.forward_padded(*model.histories_of(rows(HISTORIES)))
    torch.testing.assert_close(padded, last, rtol=1e-9, atol=1e-9)
    together = model.full_sort_predict(rows(HISTORIES))
    for history, expected in zip(HISTORIES, together):
        alone = model.full_sort_predict(rows([history], length=20)).view(-1)
        torch.testing.assert_close(alone, expected, rtol=1e-9, atol=1e-9)
    if name == "Hydra4Rec":
        return
    batch, in_rows = packed()
    weights = [w for w in model.train().parameters() if w.requires_grad]
    losses = model.calculate_loss(batch), model.calculate_loss(in_rows)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(loss, weights) for loss in losses)):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", CAUSAL[:2])
def test_events_one_by_one_give_the_whole_history(toy, name, stack):
    model, _ = build(name, toy, **options_of(name, **STACKS[stack]))
    model = model.double()
    state = model.alloc_state(1)
    for item in HISTORIES[2]:
        output, state = model.step(torch.tensor([item]), state)
    expected = model.forward(torch.tensor([HISTORIES[2]]), torch.tensor([len(HISTORIES[2])]))
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    found, carried = model.read(torch.tensor(HISTORIES[2]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(state, carried):
        torch.testing.assert_close(one.ssm, other.ssm, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*CAUSAL, "Hydra4Rec", "GRU4Rec"])
def test_every_way_to_a_score_gives_the_same(toy, name):
    model, config = build(name, toy, **COSINE)
    every = model.full_sort_predict(rows(HISTORIES))
    output = model.forward(*(rows(HISTORIES)[key] for key in ("item_id_list", "item_length")))
    cosines = F.cosine_similarity(output[:, None], model.item_embedding.weight[None, 1:], dim=-1)
    torch.testing.assert_close(every[:, 1:], cosines / 0.05, rtol=1e-4, atol=1e-4)
    items = torch.tensor([1, 5, 9, 20, 2])
    torch.testing.assert_close(model.predict(rows(HISTORIES, item_id=items)), every[torch.arange(5), items])
    inputs = rows(HISTORIES)
    if name in CAUSAL[:2]:
        fixed = model.fixed_shape_scores(inputs["item_id_list"], inputs["item_length"])
        torch.testing.assert_close(fixed, every, rtol=1e-4, atol=1e-4)
    loss = model.calculate_loss(rows(HISTORIES, item_id=items))
    torch.testing.assert_close(loss, F.cross_entropy(every, items))
    recommender = Recommender(model, config, ["[PAD]", *(f"i{item}" for item in range(1, 21))])
    history = [f"i{item}" for item in HISTORIES[2]]
    vectors = recommender.user_vectors([history]) @ recommender.item_vectors().T
    torch.testing.assert_close(vectors[0], every[2, 1:], rtol=1e-4, atol=1e-4)
    if model.__class__.__mro__[1].__name__ == "SSMRecommender" and model.carries_state:
        assert [item for item, _ in recommender.session(history).top(5)] == [
            item for item, _ in recommender.recommend(history, 5)
        ]


def test_the_padding_of_a_table_of_directions_has_a_gradient_within_bounds(toy):
    model, _ = build("2Mamba4Rec", toy, **COSINE)
    model.train()
    model.calculate_loss(rows(HISTORIES, item_id=torch.tensor([1, 5, 9, 20, 2]))).backward()
    gradient = model.item_embedding.weight.grad
    assert torch.isfinite(gradient).all() and gradient[0].norm() < 100 * gradient[1:].norm()


@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("name", ["2Mamba4Rec", "SASRec"])
def test_eight_layers_learn(toy, name, norm_position):
    depth = "n_layers" if name == "SASRec" else "num_layers"
    model, _ = build(name, toy, **{**options_of(name), depth: 8, "norm_position": norm_position})
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    losses = []
    for _ in range(12):
        loss = model.calculate_loss(packed()[0])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("SASRec", {**STACKS["LiGR"], "loss_type": "sampled_softmax", "num_negatives": 15, "logq_correction": False}),
        ("2Mamba4Rec", {**STACKS["LiGR"], **COSINE, "label_smoothing": 0.05}),
    ],
    ids=["eSASRec", "2Mamba4Rec"],
)
def test_a_recipe_learns_the_circle_and_is_served(toy, name, recipe):
    result = run_recbole_ssm(name, toy["dataset"], config_dict={**toy["config_dict"], **recipe})
    assert result["test_result"]["hit@1"] > 0.9
    recommender = load_recommender(result["checkpoint"], device="cpu")
    assert recommender.recommend(["i3", "i4", "i5"], k=1)[0][0] == "i6"


def test_the_weights_of_the_default_recipe_are_those_of_before(toy):
    """Names and order, by which older checkpoints are read; a recipe adds its gates, and no norm goes or comes."""
    default = list(build("Mamba4Rec", toy)[0].state_dict())
    assert not [name for name in default if "gate" in name or "last_norm" in name]
    assert default.index("blocks.0.norm.weight") < default.index("blocks.0.feed_forward.w_1.weight")
    gated = build("Mamba4Rec", toy, **STACKS["LiGR"])[0].state_dict()
    norms = [sum("norm" in name and "weight" in name for name in names) for names in (default, gated)]
    assert norms[0] == norms[1] and "blocks.0.feed_forward.gate.weight" in gated and "norm.weight" not in gated


@pytest.mark.skipif(bool(native.unusable), reason=f"native kernels: {native.unusable}")
def test_what_the_one_call_does_not_know_goes_layer_by_layer_and_the_log_says_so_once(toy, caplog):
    _say_unknown.cache_clear()
    for stack, times in (({}, 0), (STACKS["pre"], 0), (STACKS["LiGR"], 1)):
        caplog.clear()
        model, _ = build("2Mamba4Rec", toy, **stack)
        with caplog.at_level(logging.INFO), torch.no_grad(), ops.use_backend("native"):
            found = [model.full_sort_predict(rows(HISTORIES)) for _ in range(2)]
        assert sum("does not know these blocks of TwoMamba4Rec" in record.message for record in caplog.records) == times
        expected = model.double().full_sort_predict(rows(HISTORIES)).float()
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(bool(native.unusable), reason=f"native kernels: {native.unusable}")
@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec"])
@pytest.mark.parametrize("stack", [{}, STACKS["pre"]], ids=["post", "pre"])
def test_sessions_step_in_c_with_norms_before_or_behind(toy, monkeypatch, name, stack):
    model, _ = build(name, toy, **stack)
    calls, run = [], native.run_steps
    monkeypatch.setattr(native, "run_steps", lambda *call: calls.append(1) or run(*call))
    with torch.no_grad(), ops.use_backend("native"):
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        stepper = Stepper(model, model.alloc_state(1))
        calls.clear()  # The self-test of the kernel makes some too.
        found = [stepper([item]).clone() for item in (3, 1, 4, 1, 5)][-1]
        assert len(calls) == 5
        expected = model.double().read(torch.tensor([3, 1, 4, 1, 5]))[0].float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("2Mamba4Rec", {"gated_residual": True}, "gated_residual: is of blocks whose norms come first; take norm_pos"),
        (
            "SASRec",
            {"label_smoothing": 0.1, "loss_type": "BPR"},
            "label_smoothing: spreads a target over all items, an",
        ),
        ("GRU4Rec", {"norm_position": "pre"}, "norm_position: there is no such key"),
        ("BERT4Rec", {"score": "cosine"}, "score: there is no such key"),
        ("SASRec", {"norm_position": "before"}, "norm_position: 'before' is not one of post, pre"),
        ("SASRec", {"temperature": 0}, "temperature: must be above 0, got 0"),
        ("SASRec", {"label_smoothing": 1.0}, r"label_smoothing: must lie in \[0, 1\), got 1.0"),
    ],
)
def test_what_a_model_cannot_honour_is_one_line(toy, name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        configure(name, "toy", config_dict={**toy["config_dict"], **options})
    assert "\n" not in str(caught.value)


def test_weights_are_not_taken_over_into_another_recipe(toy):
    """Nor from a checkpoint that does not know the key, which had the effect of its default."""
    toy["config_dict"]["epochs"] = 1
    path = run_recbole_ssm("2Mamba4Rec", **toy)["checkpoint"]
    with pytest.raises(UserError, match="init: norm_position is 'pre' here and was 'post'"):
        run_recbole_ssm(
            "2Mamba4Rec", **{**toy, "config_dict": {**toy["config_dict"], "norm_position": "pre"}}, init=path
        )
    former = REPOSITORY / "tests" / "fixtures" / "0.1.0" / "Mamba4Rec.safetensors"
    with pytest.raises(UserError, match="init: score is 'cosine' here and was 'dot'"):
        run_recbole_ssm("Mamba4Rec", **{**toy, "config_dict": {**toy["config_dict"], "score": "cosine"}}, init=former)
