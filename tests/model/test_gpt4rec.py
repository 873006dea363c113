"""GPT4Rec: what it writes, what BM25 makes of it, and that it learns."""

import math
import re

import pytest
import torch
import transformers
from recbole.data.interaction import Interaction

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.errors import UserError
from recbole_ssm.llm.base import random_tokenizer
from recbole_ssm.llm.prompt import tell_of_shortened
from recbole_ssm.model import GPT4Rec
from recbole_ssm.quick_start import configure

TINY = {
    "random_base_args": {"vocab_size": 400}, "MAX_ITEM_LIST_LENGTH": 5, "title_tokens": 8, "num_queries": 2,
    "bm25_k1": 1.2, "bm25_b": 0.75, "learning_rate": 0.003, "epochs": 15, "train_batch_size": 16,
}  # fmt: skip


@pytest.fixture
def build(titled):
    """A model with its loaders."""

    def make(**options):
        torch.manual_seed(3)
        config = configure("GPT4Rec", titled["dataset"], config_dict={**titled["config_dict"], **TINY, **options})
        loaders = create_loaders(config, create_dataset(config))
        return GPT4Rec(config, loaders[0]._dataset).eval(), loaders

    return make


def rows_of(histories, targets=None):
    longest = max(map(len, histories))
    padded = torch.tensor([history + [0] * (longest - len(history)) for history in histories])
    columns = {"item_id_list": padded, "item_length": torch.tensor([len(history) for history in histories])}
    if targets is not None:
        columns["item_id"] = torch.tensor(targets)
    return Interaction(columns)


HISTORIES = [[1], [2, 3, 4, 5, 6], [7, 8], [12, 1, 2]]


def text_of(model, history):
    return model.tokenizer.decode(model.prompt(history))


def test_the_prompt_is_the_papers(build):
    model, _ = build()
    first, second = model.titles[1], model.titles[2]
    assert text_of(model, [1, 2]) == (
        f"Previously, the customer has bought: {first}. {second}. In the future, the customer wants to buy"
    )


def test_a_long_history_loses_its_oldest_items(build, caplog):
    model, _ = build(random_base_args={"vocab_size": 400, "max_position_embeddings": 64}, title_tokens=4)
    history, fits = list(range(1, 13)), 0
    while not model.prompts.shortened:
        fits += 1
        assert len(model.prompt(history[-fits:])) + 4 + 1 <= 64  # with a title and its end
    fits -= 1
    assert 1 <= fits < 11
    assert model.prompt(history) == model.prompt(history[-fits:])
    assert (model.prompts.written, model.prompts.shortened) == (fits + 3, 2)
    tell_of_shortened(model.prompts)
    assert f"2 of {fits + 3} prompts were longer than the base model reads, and lost" in caplog.text
    assert (model.prompts.written, model.prompts.shortened) == (0, 0)


def plain_loss(model, history, target):
    """-ln P(title, end | prompt), one token after the other, from full logits without padding."""
    answer = model._title[target] + [model.tokenizer.eos_token_id]
    prompt = model.prompt(history)
    logits = model.language_model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return -sum(logits[len(prompt) - 1 + place, token] for place, token in enumerate(answer))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_is_that_of_the_title_alone_whatever_stands_beside(build, gpt2, architecture):
    model, _ = build(**({} if architecture == "llama" else {"base_model": gpt2, "lora_r": 0}))
    targets = [2, 7, 9, 3]
    each = [plain_loss(model, *row) for row in zip(HISTORIES, targets)]
    together = model.calculate_loss(rows_of(HISTORIES, targets))
    torch.testing.assert_close(together.double(), sum(each) / 4, rtol=1e-5, atol=1e-5)
    for history, target, alone in zip(HISTORIES, targets, each):
        one = model.calculate_loss(rows_of([history], [target]))
        torch.testing.assert_close(one.double(), alone, rtol=1e-5, atol=1e-5)


def test_every_trained_weight_gets_a_gradient(build):
    model, _ = build()
    model.calculate_loss(rows_of(HISTORIES, [2, 7, 9, 3])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.fixture
def gpt2(tmp_path):
    """The folder of a tiny GPT-2 whose tokenizer knows some of the titles' words."""
    tokenizer = random_tokenizer(["The red table", "The blue engine", "The white garden"], 400)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    sizes |= {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=0))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_queries_and_scores_do_not_depend_on_the_batch(build, gpt2, architecture):
    model, _ = build(**({} if architecture == "llama" else {"base_model": gpt2, "lora_r": 0}), num_queries=3)
    together = model.full_sort_predict(rows_of(HISTORIES))
    wide = rows_of(HISTORIES)
    wide["item_id_list"] = torch.nn.functional.pad(wide["item_id_list"], (0, 7))
    assert torch.equal(together, model.full_sort_predict(wide))
    for row, history in enumerate(HISTORIES):
        assert model.queries(rows_of(HISTORIES))[row] == model.queries(rows_of([history]))[0]
        assert torch.equal(together[row], model.full_sort_predict(rows_of([history]))[0])


def test_scores_are_places_and_found_items_come_first(build, monkeypatch):
    model, _ = build()
    monkeypatch.setattr(model, "_generate", lambda prompts: [["green", "The garden"] for _ in prompts])
    scores = model.full_sort_predict(rows_of([[1], [2]]))
    assert scores.shape == (2, 13) and scores[0].tolist() == scores[1].tolist()
    assert sorted(scores[0, 1:].tolist(), reverse=True) == [-float(place) for place in range(1, 13)]
    assert scores[0].argmin() == 0
    order = [model.titles[item] for item in scores[0].argsort(descending=True).tolist()]
    # K = 5 of two queries: three of the first, then two of the second
    assert all("green" in title for title in order[:3]) and all("garden" in title for title in order[3:5])
    interaction = rows_of([[1], [2]], [4, 9])
    assert model.predict(interaction).tolist() == [scores[0, 4].item(), scores[1, 9].item()]


def test_a_history_is_asked_once_for_all_its_candidates(build, monkeypatch):
    model, _ = build()
    asked = []

    def generate(prompts):
        asked.append(len(prompts))
        return [[model.tokenizer.decode(prompt), "The garden"] for prompt in prompts]

    monkeypatch.setattr(model, "_generate", generate)
    scores = model.full_sort_predict(rows_of(HISTORIES))
    pairs = rows_of([history for history in HISTORIES for _ in range(3)], [4, 9, 2] * len(HISTORIES))
    expected = scores[torch.arange(len(HISTORIES)).repeat_interleave(3), pairs["item_id"]]
    assert torch.equal(model.predict(pairs), expected) and asked == [4, 4]


def test_k1_and_b_are_chosen_on_validation_and_kept_in_the_state(build, monkeypatch, caplog):
    model, (_, valid, _) = build(bm25_k1=[0.5, 2.0], bm25_b=[0.0, 1.0])
    seen = []

    def gain(queries, target):
        seen.append(target)
        return float(model.search._built == (2.0, 0.0))

    monkeypatch.setattr(model, "_gain", gain)
    with caplog.at_level("INFO"):
        model.tune(valid)
    assert "BM25: k1 2.0, b 0.0 of 4 pairs, on 48 validation rows: NDCG@1 1.0000, the least 0.0000" in caplog.text
    assert model.bm25.tolist() == [2.0, 0.0] == model.state_dict()["bm25"].tolist()
    assert seen == valid._dataset.inter_feat["item_id"].tolist() * 4
    # the evaluation that follows reads the queries that were written, and then they are gone
    monkeypatch.setattr(model, "_generate", lambda prompts: pytest.fail("written twice"))
    distinct = {}
    rows = valid._dataset.inter_feat[slice(None)]
    for number, history in enumerate(model.histories(rows)):
        distinct.setdefault(tuple(history), number)
    model.full_sort_predict(rows[torch.tensor(list(distinct.values()))])
    assert not model._ready


def test_what_is_tuned_is_what_validation_measures(titled, caplog):
    options = {**titled["config_dict"], **TINY, "epochs": 1, "bm25_k1": [0.5, 2.0], "valid_metric": "NDCG@5"}
    with caplog.at_level("INFO"):
        found = run_recbole_ssm("GPT4Rec", titled["dataset"], config_dict={**options, "state": "INFO"})
    best = float(re.search(r"NDCG@5 ([\d.]+), the least", caplog.text)[1])
    assert best == pytest.approx(found["best_valid_score"], abs=1e-4) and 0 < best < 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 0}, "of 2 pairs, on 48 validation rows: NDCG@5"),
        (
            {"epochs": 1, "eval_args": {"split": {"LS": "test_only"}}},
            "BM25: k1 0.5, b 0.75, the first of 2 pairs: there are no validation rows to choose by",
        ),
    ],
)
def test_it_is_tuned_once_where_no_epoch_is_validated(titled, caplog, options, told):
    options = {**titled["config_dict"], **TINY, "bm25_k1": [0.5, 2.0], "valid_metric": "NDCG@5", **options}
    with caplog.at_level("INFO"):
        run_recbole_ssm("GPT4Rec", titled["dataset"], config_dict={**options, "state": "INFO"})
    assert caplog.text.count("BM25: k1") == 1 and told in caplog.text


def test_the_gain_is_ndcg_of_the_place(build, monkeypatch):
    model, _ = build(valid_metric="NDCG@5", topk=[5])
    monkeypatch.setattr(model, "_generate", lambda prompts: [["blue", "blue table"]])
    order = model.full_sort_predict(rows_of([[1]]))[0].argsort(descending=True).tolist()
    assert "blue table" in model.titles[order[0]]
    gains = [1 / math.log2(place + 2) if place < 5 else 0 for place in range(12)]
    assert [model._gain(["blue", "blue table"], item) for item in order[:12]] == pytest.approx(gains)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_learns_what_the_history_decides(titled, gpt2, architecture):
    own = {} if architecture == "llama" else {"base_model": gpt2, "lora_r": 0, "epochs": 30, "eval_step": 10}
    found = run_recbole_ssm("GPT4Rec", titled["dataset"], config_dict={**titled["config_dict"], **TINY, **own})
    assert found["test_result"]["hit@1"] > 0.9
    recommender = load_recommender(found["checkpoint"], device="cpu")
    for item in range(3):
        history = [f"i{(item + step) % 12}" for step in range(4)]
        assert recommender.recommend(history, k=1)[0][0] == f"i{(item + 4) % 12}"


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(titled, gpt2):
    options = {
        **titled["config_dict"], **TINY, "base_model": gpt2, "lora_r": 2, "lora_dropout": 0.1, "epochs": 2,
        "bm25_b": [0.0, 1.0],
    }  # fmt: skip
    whole = run_recbole_ssm("GPT4Rec", titled["dataset"], config_dict=options)
    first = run_recbole_ssm("GPT4Rec", titled["dataset"], config_dict={**options, "epochs": 1})
    folder = first["checkpoint"].rpartition("/")[0]
    again = run_recbole_ssm(resume=folder, config_dict={"epochs": 2})
    assert again["test_result"] == whole["test_result"] and again["best_valid_score"] == whole["best_valid_score"]
    from safetensors.torch import load_file

    ours, theirs = (load_file(found["checkpoint"]) for found in (again, whole))
    weights = {name for name in ours if name.startswith("model.")}
    assert {"model.bm25", "model.base_digest"} < weights
    assert all("lora_" in name for name in weights - {"model.bm25", "model.base_digest"})
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_another_base_is_refused(build, gpt2):
    model, _ = build(base_model=gpt2, lora_r=2)
    state = model.state_dict()
    model.load_state_dict(state)
    other, _ = build(lora_r=2)
    with pytest.raises(
        UserError,
        match="base_model: random is not what .* is made of the titles, random_base_args and seed, which differ",
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bm25_b": 1.5}, "bm25_b: must be a number in [0, 1] or a list of such, got 1.5"),
        ({"bm25_k1": [1.0, -1]}, "bm25_k1: must be 0 or more, got -1"),
        ({"bm25_k1": []}, "bm25_k1: must be a number in [0, inf) or a list of such, got []"),
        ({"num_queries": 3, "num_beams": 2}, "num_beams: 2 beams end in no 3 queries; give more beams"),
        ({"num_queries": 0}, "num_queries: must be at least 1, got 0"),
        ({"title_tokens": 600}, "title_tokens: 600 leave no room for a history in the 1024 tokens that random reads"),
        ({"train_last": 0}, "train_last: must be at least 1, got 0"),
        ({"train_mode": "packed"}, "packed is not possible, because GPT4Rec reads a history as one text"),
        ({"base_model_dtype": "float16"}, "base_model_dtype: 'float16' is not one of auto, float32, bfloat16"),
    ],
)
def test_wrong_values(build, options, message):
    with pytest.raises(UserError) as caught:
        build(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_more_rows_than_train_last_and_the_newest_ones(build):
    _, (train, _, _) = build(train_last=2)
    rows = train._dataset.inter_feat
    assert len(rows) == 2 * 48
    _, (whole, _, _) = build()
    last = {}
    for user, length in zip(whole._dataset.inter_feat["user_id"].tolist(), whole._dataset.inter_feat.target.tolist()):
        last.setdefault(user, []).append(length)
    expected = {user: sorted(targets)[-2:] for user, targets in last.items()}
    found = {}
    for user, target in zip(rows["user_id"].tolist(), rows.target.tolist()):
        found.setdefault(user, []).append(target)
    assert found == expected
