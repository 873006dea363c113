"""LlamaRec learns a catalogue in which the history decides the answer, leaks nothing, and reorders candidates alone."""

import json
import os
import pathlib
import random

import numpy as np
import pytest
import torch
import transformers
from recbole.data.interaction import Interaction
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_ssm import load_recommender, quick_start, run_recbole_ssm
from recbole_ssm.commands import evaluate
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.errors import UserError
from recbole_ssm.evaluation import ranks
from recbole_ssm.llm import preference, retriever
from recbole_ssm.llm.base import random_tokenizer
from recbole_ssm.llm.prompt import prompt_words
from recbole_ssm.llm.reranking import metrics
from recbole_ssm.llm.retriever import find_retriever
from recbole_ssm.model import LlamaRec
from recbole_ssm.model.llamarec import column_of, fuse, shuffled, strictly_falling, target_ranks
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import Hook, Trainer, checkpoint
from recbole_ssm.trainer.checkpoint import load_weights

WORDS = ["apple", "river", "stone", "cloud", "tiger", "piano"]
SMALL = {
    "base_model": "random",
    "random_base_args": {"vocab_size": 460, "hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.2},
    "retriever": "GRU4Rec",
    # it hardly learns, so that what is learned is the ranker's
    "retriever_config": {"epochs": 1, "learning_rate": 1e-4, "embedding_size": 16, "hidden_size": 16},
    "num_candidates": 3,
    "MAX_ITEM_LIST_LENGTH": 2,
    "prompt_history": 1,
    "train_last": None,
    "train_batch_size": 32,
    "lr_scheduler": None,
    "topk": [1, 3],
    "valid_metric": "Hit@1",
    "show_progress": False,
    "state": "INFO",
}
LEARNS = {
    **SMALL,
    "random_base_args": {"vocab_size": 460, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2},
    "train_candidates": "insert",
    "learning_rate": 2e-3,
    "epochs": 24,
}


def write_circle(folder, last=None, begin=1000):
    """Six items, each followed by the next. ``last`` gives all users but the first other validation and test items."""
    (folder / "circle").mkdir(parents=True)
    rng = random.Random(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(60):
        start = rng.randrange(6) if user else 0
        for time in range(12):
            item = last if last is not None and user and time >= 10 else (start + time) % 6
            lines.append(f"u{user}\ti{item}\t{begin + time}")
    (folder / "circle" / "circle.inter").write_text("\n".join(lines) + "\n")
    titles = [f"i{number}\t{word}" for number, word in enumerate(WORDS)]
    (folder / "circle" / "circle.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *titles]) + "\n")
    return {"data_path": str(folder)}


@pytest.fixture
def circle(tmp_path):
    return {**SMALL, **write_circle(tmp_path / "data")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The results of SFT and of ORPO, from the same retriever."""
    folder = tmp_path_factory.mktemp("llamarec")
    before = pathlib.Path.cwd()
    os.chdir(folder)  # RecBole writes its logs where it stands
    options = {**LEARNS, **write_circle(folder / "data"), "checkpoint_dir": str(folder / "saved")}
    try:
        sft = run_recbole_ssm("LlamaRec", "circle", config_dict=options)
        retriever = max((folder / "saved").glob("GRU4Rec*")) / "best.safetensors"
        options |= {"retriever_config": None, "retriever_checkpoint": str(retriever), "train_objective": "orpo"}
        orpo = run_recbole_ssm("LlamaRec", "circle", config_dict={**options, "orpo_lambda": 0.5})
    finally:
        os.chdir(before)
    return {"sft": sft, "orpo": orpo, "options": options}


def model_of(result):
    return load_recommender(result["checkpoint"], device="cpu").model


def rows(histories, **columns):
    padded = torch.tensor([h + [0] * (2 - len(h)) for h in histories])
    lengths = torch.tensor([len(h) for h in histories])
    return Interaction({"item_id_list": padded, "item_length": lengths, **columns})


HISTORIES = [[1, 2], [2, 3], [3, 4], [4, 5], [5], [6]]


# --- what it learns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["sft", "orpo"])
def test_learns_what_the_history_decides(trained, objective):
    report = trained[objective]["reranking"]
    assert report["retrieved_users"] > 20
    assert report["retrieved"]["language model"]["hit@1"] > 0.9
    assert report["retrieved"]["retriever"]["hit@1"] < 0.7
    share = report["retrieved_users"] / report["users"]
    assert report["overall"]["fused"]["hit@1"] == pytest.approx(share * report["retrieved"]["fused"]["hit@1"])
    assert trained[objective]["test_result"]["hit@1"] == pytest.approx(report["overall"]["fused"]["hit@1"], abs=1e-4)
    written = json.loads((pathlib.Path(trained[objective]["checkpoint"]).parent / "reranking.json").read_text())
    assert written == report


@pytest.mark.parametrize("objective", ["sft", "orpo"])
def test_gpt2_learns_it_too(trained, tmp_path, objective):
    words = [*WORDS, *(f" {word}" for word in WORDS), *prompt_words()]
    tokenizer = random_tokenizer(words, 460)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": len(tokenizer)}
    sizes |= {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} | {"initializer_range": 0.2}
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=0))
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    options = {**trained["options"], "base_model": str(tmp_path / "gpt2"), "random_base_args": None, "lora_r": 0}
    options |= {"train_objective": objective, "orpo_lambda": 0.5}
    report = run_recbole_ssm("LlamaRec", "circle", config_dict=options)["reranking"]
    assert report["retrieved"]["language model"]["hit@1"] > 0.9


def test_orpo_changes_nothing_in_the_graph(trained):
    """The same operations on the same shapes: ORPO costs no latency."""

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else None
            self.calls.append((str(function), shape))
            return found

    calls = []
    for objective in ("sft", "orpo"):
        model = model_of(trained[objective])
        with Record() as record:
            model.full_sort_predict(rows(HISTORIES))
        calls.append(record.calls)
    assert len(calls[0]) > 100 and calls[0] == calls[1]
    weights = [
        torch.cat([p.flatten() for p in model_of(trained[o]).language_model.parameters()]) for o in ("sft", "orpo")
    ]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("verbalizer", ["title_likelihood", "embedding"])
def test_the_other_verbalizers_learn_too(trained, verbalizer):
    options = {**trained["options"], "verbalizer": verbalizer, "train_objective": "sft", "epochs": 8}
    report = run_recbole_ssm("LlamaRec", "circle", config_dict=options)["reranking"]
    assert report["retrieved"]["language model"]["hit@1"] > 0.9


@pytest.mark.parametrize("verbalizer", ["letters", "title_likelihood", "embedding"])
@pytest.mark.parametrize("rejected", ["random", "hardest", "all"])
@pytest.mark.parametrize("probabilities", ["vocabulary", "letters"])
@pytest.mark.parametrize("candidates", ["random", "insert", "skip"])
def test_every_objective_has_a_finite_loss_and_gradients(circle, verbalizer, rejected, probabilities, candidates):
    if (verbalizer, probabilities) == ("embedding", "vocabulary"):
        pytest.skip("refused")
    options = {"verbalizer": verbalizer, "orpo_rejected": rejected, "orpo_probabilities": probabilities}
    model, _ = untrained(circle, train_objective="orpo", train_candidates=candidates, **options)
    loss = model.train().calculate_loss(rows(HISTORIES, item_id=torch.tensor([3, 4, 5, 6, 6, 1])))
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert any(p.grad.abs().sum() > 0 for p in model.language_model.parameters() if p.grad is not None)
    assert all(p.grad is None for p in model.retriever.parameters())


def untrained(options, own=None, **more):
    """A model whose retriever, with options of its ``own``, and language model are as they start, and its loaders."""
    config = configure("LlamaRec", "circle", config_dict={**options, **more})
    settings = configure(config["retriever"], "circle", config_dict={
        "data_path": options["data_path"], "MAX_ITEM_LIST_LENGTH": config["MAX_ITEM_LIST_LENGTH"],
        "embedding_size": 16, **({"hidden_size": 16} if own is None else own),
    })  # fmt: skip
    loaders = create_loaders(config, create_dataset(config))
    torch.manual_seed(0)
    return LlamaRec(config, loaders[0]._dataset, settings.final_config_dict).eval(), loaders


def test_sft_is_the_negative_log_likelihood_of_the_right_letter(circle):
    model, _ = untrained(circle)
    batch = rows(HISTORIES, item_id=torch.tensor([3, 4, 5, 6, 6, 1]))
    torch.manual_seed(5)
    loss = model.calculate_loss(batch)
    torch.manual_seed(5)
    histories, candidates, target = model.candidates_to_learn_from(batch)
    assert (candidates.gather(1, target[:, None]).squeeze(1) == batch["item_id"]).all()
    log_p = []
    for history, items in zip(histories, candidates.tolist()):
        tokens = [*model.prompts.prefix, *model.prompts.write(history, items)]
        log_p.append(model.language_model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1))
    letters = torch.tensor(model.prompts.letters)[target]
    torch.testing.assert_close(loss, -torch.stack(log_p).gather(1, letters[:, None]).mean())


@pytest.mark.parametrize("verbalizer", ["letters", "embedding"])
@pytest.mark.parametrize("rejected", ["random", "hardest", "all"])
@pytest.mark.parametrize("probabilities", ["vocabulary", "letters"])
def test_orpo_is_the_likelihood_and_the_odds_ratio_of_its_paper(
    circle, monkeypatch, verbalizer, rejected, probabilities
):
    """L = -ln P(chosen) - lambda ln sigmoid(ln odds(chosen) - ln odds(rejected)), written out in float64."""
    if (verbalizer, probabilities) == ("embedding", "vocabulary"):
        pytest.skip("refused")
    options = {"orpo_rejected": rejected, "orpo_probabilities": probabilities, "orpo_lambda": 0.7}
    model, _ = untrained(circle, train_objective="orpo", verbalizer=verbalizer, **options)
    batch = rows(HISTORIES, item_id=torch.tensor([3, 4, 5, 6, 6, 1]))
    columns = []
    choose = preference.choose_rejected
    monkeypatch.setattr(preference, "choose_rejected", lambda *given: columns.append(choose(*given)) or columns[-1])
    torch.manual_seed(5)
    loss = model.calculate_loss(batch)
    torch.manual_seed(5)
    histories, candidates, target = model.candidates_to_learn_from(batch)
    log_p = model.verbalizer.log_probabilities(model.questions(histories, candidates)).double()
    own = log_p.log_softmax(-1) if probabilities == "letters" else log_p
    (wrong,) = columns
    expected = []
    for row, right in enumerate(target.tolist()):
        others = [column for column in range(log_p.shape[1]) if column != right]
        asked = {"all": others, "hardest": [max(others, key=lambda column: log_p[row, column])]}
        assert sorted(wrong[row].tolist()) == asked.get(rejected, wrong[row].tolist()) and right not in wrong[row]
        odds = own[row].exp() / (1 - own[row].exp())
        ratios = [-torch.log(torch.sigmoid(torch.log(odds[right] / odds[column]))) for column in wrong[row].tolist()]
        expected.append(-log_p[row, right] + 0.7 * sum(ratios) / len(ratios))
    torch.testing.assert_close(loss.double(), sum(expected) / len(expected), rtol=1e-4, atol=1e-5)


def test_random_candidates_are_unseen_and_each_once(circle):
    model, _ = untrained(circle)
    came = torch.tensor([3, 4, 5, 6, 6, 1])
    firsts = set()
    for _ in range(20):
        batch = rows(HISTORIES, item_id=came)
        _, candidates, target = model.candidates_to_learn_from(batch)
        for history, items, wanted in zip(HISTORIES, candidates.tolist(), came.tolist()):
            assert len(set(items)) == 3 and 0 not in items and wanted in items
            assert not set(items) & set(history)
        firsts |= set(target.tolist())
    assert firsts == {0, 1, 2}


# --- what it may not see or touch ------------------------------------------------------------------------------------


def test_no_target_of_validation_or_test_is_learned_from(tmp_path):
    """Other held-out items, the same weights: of the retriever and of the ranker."""
    found = []
    for name, last in (("one", None), ("other", 3)):
        options = {**SMALL, **write_circle(tmp_path / name, last), "epochs": 1, "train_candidates": "insert"}
        result = run_recbole_ssm("LlamaRec", "circle", config_dict={**options, "checkpoint_dir": str(tmp_path / name)})
        found.append((result, checkpoint.read(pathlib.Path(result["checkpoint"])).tensors))
    (one, before), (other, after) = found
    assert one["test_result"] != other["test_result"]
    names = [name for name in before if name.startswith("model.")]
    assert any("retriever" in name for name in names) and any("language_model" in name for name in names)
    for name in names:
        assert torch.equal(before[name], after[name]), name


def test_a_retriever_that_may_know_the_targets_is_refused(trained):
    options = {**trained["options"], "eval_args": {"split": {"LS": "test_only"}}}
    with pytest.raises(UserError, match="retriever_checkpoint: .* was trained on other rows than this run's training"):
        run_recbole_ssm("LlamaRec", "circle", config_dict=options)
    with pytest.raises(UserError, match="retriever: .*best.safetensors is of GRU4Rec; set retriever: GRU4Rec"):
        run_recbole_ssm("LlamaRec", "circle", config_dict={**options, "retriever": "SASRec"})


@pytest.mark.parametrize("split", ["valid_and_test", "test_only"])
def test_a_retriever_may_have_learned_from_times_and_from_a_part_of_the_rows(tmp_path, split):
    data = write_circle(tmp_path / "data", begin=978_300_000)
    own = {"epochs": 0, "time": "gaps", "train_newest": 5, "train_rows": 50, "seed": 5, "topk": [3]}
    own |= {"valid_metric": "NDCG@3", "MAX_ITEM_LIST_LENGTH": 2, "eval_args": {"split": {"LS": split}}}
    found = run_recbole_ssm("GRU4Rec", "circle", config_dict={**data, **own})
    options = {**SMALL, **data, "retriever_config": None, "retriever_checkpoint": found["checkpoint"]}
    config = configure("LlamaRec", "circle", config_dict=options)
    if split == "test_only":
        with pytest.raises(UserError, match="was trained on other rows than this run's training part"):
            find_retriever(config, None, configure, pytest.fail)
        return
    assert find_retriever(config, None, configure, pytest.fail).settings["time"] == "gaps"


def test_of_a_retrievers_folder_the_best_checkpoint_is_taken(trained):
    path = pathlib.Path(trained["options"]["retriever_checkpoint"])
    assert len(list(path.parent.glob("*.safetensors"))) > 1
    options = {**trained["options"], "retriever_checkpoint": str(path.parent)}
    found = find_retriever(configure("LlamaRec", "circle", config_dict=options), None, configure, pytest.fail)
    assert found.weights()[0] == path


def test_scores_are_the_retrievers_but_for_the_candidates_order(trained):
    model = model_of(trained["sft"])
    plain = model._retrieve(rows(HISTORIES))
    found = model.full_sort_predict(rows(HISTORIES))
    best = plain.topk(3).indices
    torch.testing.assert_close(found.sort(1).values, plain.sort(1).values, rtol=0, atol=0)
    untouched = torch.ones_like(found, dtype=torch.bool).scatter(1, best, False)
    assert torch.equal(found[untouched], plain[untouched])
    assert not torch.equal(found, plain)
    again = model.full_sort_predict(rows(HISTORIES, item_id=torch.tensor([1, 1, 1, 1, 1, 1])))
    assert torch.equal(found, again)  # the target decides nothing


def test_padding_and_neighbours_do_not_count(trained):
    model = model_of(trained["sft"])
    together = model.full_sort_predict(rows(HISTORIES))
    for history, expected in zip(HISTORIES, together):
        assert torch.equal(model.full_sort_predict(rows([history])).argsort(), expected[None].argsort())
    every = torch.arange(1, 7).expand(6, -1)
    candidates = every[:, :3]
    wide = torch.tensor([h + [0] * (9 - len(h)) for h in HISTORIES])
    lengths = torch.tensor([len(h) for h in HISTORIES])
    narrow = model(rows(HISTORIES)["item_id_list"], lengths, candidates)
    torch.testing.assert_close(model(wide, lengths, candidates), narrow)
    assert torch.equal(shuffled(every, wide, 1), shuffled(every, rows(HISTORIES)["item_id_list"], 1))


def test_the_shuffle_depends_on_seed_history_and_items_alone():
    items = torch.arange(1, 21).expand(500, -1)
    histories = torch.arange(1, 501)[:, None]
    order = shuffled(items, histories, 1)
    reversed_order = shuffled(items.flip(1), histories, 1).flip(1)
    assert torch.equal(order, reversed_order)
    assert not torch.equal(order.argsort(1), shuffled(items, histories, 2).argsort(1))
    first = order.argsort(1)[:, 0].bincount(minlength=20)  # of 500 users, which rank comes first: 25 each by chance
    assert ((first - 25).square() / 25).sum() < 44  # chi-squared, 19 degrees of freedom, p = 0.001


def test_the_metrics_are_recboles(trained):
    """Both measures agree with RecBole's evaluator, and leaving out the hopeless changes none of ranks."""
    config = configure("LlamaRec", "circle", config_dict=trained["options"])
    path = pathlib.Path(trained["orpo"]["checkpoint"])
    settings = checkpoint.read(path).info["config"]["retriever_settings"]
    train, _, test = create_loaders(config, create_dataset(config))
    results = []
    for rerank in ("all", "retrieved"):
        config["rerank"] = rerank
        model = LlamaRec(config, train._dataset, settings)
        load_weights(model, checkpoint.read(path), path)
        trainer = Trainer(config, model)
        results.append(trainer.evaluate(test, load_best_model=False))
        report = trainer.hooks[-1].report
        for name, value in results[-1].items():
            assert report["overall"]["fused"][name] == pytest.approx(value, abs=1e-4)
    assert results[0] == results[1] == trained["orpo"]["test_result"]


def test_a_validation_is_not_reported_as_the_test(circle):
    options = {**circle, "epochs": 1, "train_last": 1, "eval_args": {"split": {"LS": "valid_only"}}}
    found = run_recbole_ssm("LlamaRec", "circle", config_dict=options)
    assert found["test_result"] is None and found["reranking"] == found["ranks"] == {}


def test_metrics_of_known_ranks():
    found = metrics(np.array([1, 2, np.inf]), [1, 3])
    assert found["hit@1"] == pytest.approx(1 / 3) and found["hit@3"] == pytest.approx(2 / 3)
    assert found["mrr@3"] == pytest.approx(1.5 / 3)
    assert found["ndcg@3"] == pytest.approx((1 + 0.63093) / 3, abs=1e-5)
    assert metrics(np.array([]), [1]) == {"hit@1": 0.0, "ndcg@1": 0.0, "mrr@1": 0.0}


# --- fusion ----------------------------------------------------------------------------------------------------------


def test_fusion_goes_from_one_order_to_the_other(trained):
    model = model_of(trained["sft"])
    model.fusion.fill_(1.0)
    torch.testing.assert_close(model.full_sort_predict(rows(HISTORIES)), model._retrieve(rows(HISTORIES)))


def test_the_fusion_weight_is_chosen_on_validation(circle, monkeypatch):
    model, (_, valid, _) = untrained(circle, fusion_weight="tuned")
    answer, asked = model.forward, []
    monkeypatch.setattr(model, "forward", lambda *given: asked.append(len(given[0])) or answer(*given))
    model.tune(valid)
    model.records = []
    assert sum(asked) == 60
    for batch in valid:
        model.full_sort_predict(batch[0])
    target, language, retriever = (torch.cat(column) for column in zip(*model.records))
    found = target >= 0

    def gain(weight):
        ranks = target_ranks(fuse(language, retriever, weight)[found], target[found])
        return float((1 / torch.log2(ranks + 1.0)).sum())

    # answers are kept for one evaluation, of equal histories once
    assert 60 <= sum(asked) < 120 and not model._ready
    assert gain(float(model.fusion)) == pytest.approx(max(gain(step / 20) for step in range(21)))
    assert sum(asked) == model.asked
    result = run_recbole_ssm("LlamaRec", "circle", config_dict={**circle, "fusion_weight": "tuned", "epochs": 1})
    tensors = checkpoint.read(pathlib.Path(result["checkpoint"])).tensors
    assert float(tensors["model.fusion"]) == result["reranking"]["fusion_weight"]


@pytest.mark.parametrize("reader", ["users", "times"])
def test_tuning_gives_no_row_the_answer_of_other_candidates(tmp_path, reader):
    """A retriever that reads users or times finds other candidates for an equal history."""
    options = {**SMALL, **write_circle(tmp_path / "data", begin=978_300_000), "fusion_weight": "tuned"}
    if reader == "users":
        model, (_, valid, _) = untrained(options, own={}, retriever="FPMC", retriever_config=None)
    else:
        model, (_, valid, _) = untrained(options, own={"time": "query", "hidden_size": 16})
        valid._later = torch.arange(len(valid._dataset)) % 24 * 3600
    with torch.no_grad():
        for weights in model.retriever.parameters():
            weights.normal_()
    model.fusion.fill_(0.0)
    plain = torch.cat([model.full_sort_predict(batch.interaction) for batch in valid])
    model.tune(valid)
    model.fusion.fill_(0.0)
    asked = model.asked
    assert torch.equal(torch.cat([model.full_sort_predict(batch.interaction) for batch in valid]), plain)
    assert model.asked - asked < len(plain)  # some answers were kept


def test_tuning_scores_as_few_rows_at_once_as_an_evaluation(circle, monkeypatch):
    model, (_, valid, _) = untrained(circle, fusion_weight="tuned")
    expected = model.full_sort_predict
    sizes = []
    monkeypatch.setattr(model, "full_sort_predict", lambda batch: sizes.append(len(batch)) or expected(batch))
    monkeypatch.setattr(ranks, "LARGEST_SCORES", 7 * 8)
    model.tune(valid)
    assert max(sizes) == 8 and sum(sizes) == 60


def test_what_is_tuned_is_tuned_where_no_epoch_is_validated(circle, monkeypatch):
    calls = []

    def tune(model, valid_data):
        calls.append(len(valid_data._dataset))
        model.fusion.fill_(0.25)

    options = {**circle, "fusion_weight": "tuned", "epochs": 0}
    with monkeypatch.context() as patch:
        patch.setattr(LlamaRec, "tune", tune)
        found = run_recbole_ssm("LlamaRec", "circle", config_dict=options)
        assert calls == [60] and found["reranking"]["fusion_weight"] == 0.25
        assert run_recbole_ssm(resume=found["checkpoint"])["reranking"]["fusion_weight"] == 0.25
    options |= {"epochs": 1, "eval_args": {"split": {"LS": "test_only"}}}
    monkeypatch.setattr(quick_start, "Trainer", lambda *_: pytest.fail("the retriever was trained"))
    with pytest.raises(UserError, match="fusion_weight: there are no validation rows by which it could be tuned"):
        run_recbole_ssm("LlamaRec", "circle", config_dict=options)


@pytest.mark.parametrize("name", ["Pop", "RepeatNewest"])
def test_equal_scores_of_the_retriever_leave_the_language_models_order(circle, name):
    options = {**circle, "retriever": name, "retriever_config": None, "epochs": 0, "num_candidates": 4}
    found = run_recbole_ssm("LlamaRec", "circle", config_dict=options)
    fused = found["reranking"]["overall"]["fused"]
    assert dict(found["test_result"]) == pytest.approx({name: fused[name] for name in found["test_result"]}, abs=1e-4)


def test_strictly_falling_values():
    values = torch.tensor([[3.0, 3.0, 3.0, 1.0], [2.0, 1.0, 0.0, 0.0], [-torch.inf] * 4, [4.0, 3.0, 2.0, 1.0]])
    found = strictly_falling(values)
    assert (found.diff(dim=1) < 0).all()
    assert torch.equal(found[:, -1], values[:, -1]) and torch.equal(found[3], values[3])
    torch.testing.assert_close(found[:2], values[:2])


def test_column_of():
    candidates = torch.tensor([[4, 5, 6], [1, 2, 3]])
    assert column_of(candidates, torch.tensor([6, 9])).tolist() == [2, -1]


# --- one command -----------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


class KillAt(Hook):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, step, loss):
        if trainer.global_step == self.step and isinstance(trainer.model, LlamaRec):
            raise KilledError


def test_killed_and_resumed_is_never_killed(circle, monkeypatch):
    """And the language model is never copied, as RecBole's count of operations would."""
    monkeypatch.setattr(LlamaRec, "__deepcopy__", lambda *args: pytest.fail("a copy of the language model"), False)
    options = {**circle, "epochs": 2, "checkpoint_steps": 5, "fusion_weight": "tuned", "lr_scheduler": "LinearLR"}
    options |= {"gradient_accumulation_steps": 2, "train_objective": "orpo"}
    straight = run_recbole_ssm("LlamaRec", "circle", config_dict=options)
    with pytest.raises(KilledError):
        run_recbole_ssm("LlamaRec", "circle", config_dict=options, hooks=[KillAt(23)])
    folder = max(pathlib.Path("saved").glob("LlamaRec*"), key=lambda path: path.stat().st_mtime_ns)
    retrievers = len(list(pathlib.Path("saved").glob("GRU4Rec*")))
    resumed = run_recbole_ssm(resume=folder)
    assert len(list(pathlib.Path("saved").glob("GRU4Rec*"))) == retrievers  # it is not trained again
    assert resumed["test_result"] == straight["test_result"]
    one, other = (checkpoint.newest(pathlib.Path(r["checkpoint"]).parent)[1] for r in (straight, resumed))
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


@pytest.mark.parametrize("epochs_ended", [1, 2])
def test_killed_in_the_retrievers_training_and_resumed_is_never_killed(circle, monkeypatch, caplog, epochs_ended):
    """Within its second epoch, and behind that, its last one."""
    own = {**circle["retriever_config"], "epochs": 2, "train_batch_size": 128}
    options = {**circle, "retriever_config": own, "epochs": 1, "train_last": 1, "checkpoint_steps": 1}
    straight = run_recbole_ssm("LlamaRec", "circle", config_dict=options)
    save = Trainer._save_step

    def save_and_die(trainer):
        save(trainer)
        if trainer.position.epoch == epochs_ended and (trainer.position.number or epochs_ended == 2):
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Trainer, "_save_step", save_and_die)
        run_recbole_ssm("LlamaRec", "circle", config_dict=options)
    folder = max(pathlib.Path("saved").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    trained = {**options, "retriever_config": None, "retriever_checkpoint": str(folder)}
    find_retriever(configure("LlamaRec", "circle", config_dict=trained), None, configure, pytest.fail)
    warning = f"retriever_checkpoint: the run in {folder} has ended 1 of 2 epochs; to train the others first"
    assert (warning in caplog.text) == (epochs_ended == 1)
    resumed = run_recbole_ssm(resume="saved")
    assert sorted(path.name[:5] for path in pathlib.Path("saved").iterdir()) == ["GRU4R"] * 2 + ["Llama"] * 2
    assert resumed["model"] == "LlamaRec" and resumed["test_result"] == straight["test_result"]
    one, other = (checkpoint.newest(pathlib.Path(r["checkpoint"]).parent)[1].tensors for r in (straight, resumed))
    assert list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert run_recbole_ssm("GRU4Rec", resume=folder)["model"] == "GRU4Rec"


def test_a_ranker_is_tested_again_as_it_was(circle):
    result = run_recbole_ssm("LlamaRec", "circle", config_dict={**circle, "epochs": 1})
    found = evaluate(pathlib.Path(result["checkpoint"]).parent)
    assert found == pytest.approx(dict(result["test_result"]))
    assert found.masked == pytest.approx(result["test_result_masked"])


def test_checkpoints_hold_what_was_trained_and_serve(circle, tmp_path):
    base = tmp_path / "base"
    model, _ = untrained(circle)
    model.language_model.save_pretrained(base)
    model.tokenizer.save_pretrained(base)
    options = {**circle, "base_model": str(base), "random_base_args": None, "lora_r": 2, "epochs": 1}
    result = run_recbole_ssm("LlamaRec", "circle", config_dict={**options, "measure_latency": True})
    tensors = checkpoint.read(pathlib.Path(result["checkpoint"])).tensors
    names = [n.removeprefix("model.") for n in tensors if n.startswith("model.")]
    of_base = [n for n in names if n.startswith("language_model.")]
    assert of_base and all("lora_" in n for n in of_base)
    assert any(n.startswith("retriever.") for n in names)
    best = load_recommender(result["checkpoint"], device="cpu").recommend(["i0", "i1"], k=3)
    assert len(best) == 3 and all(token.startswith("i") for token, _ in best)
    latency = json.loads((pathlib.Path(result["checkpoint"]).parent / "latency.json").read_text())
    assert {"step", "encode", "score", "evaluate"} <= set(latency)


def test_shortened_histories_are_counted(circle, caplog):
    options = {**circle, "MAX_ITEM_LIST_LENGTH": 9, "prompt_history": 9, "prompt_tokens": 100, "epochs": 1}
    with caplog.at_level("WARNING"):
        run_recbole_ssm("LlamaRec", "circle", config_dict=options)
    told = "prompts were longer than the base model or prompt_tokens allow"
    counts = [message.split(" prompts")[0] for message in caplog.messages if told in message]
    assert counts[-2:] == ["60 of 60", "60 of 60"] and len(counts) == 3  # of training, validation and test


def test_evaluation_on_some_rows(circle):
    sizes = []
    for _ in range(2):
        config = configure("GRU4Rec", "circle", config_dict={
            "data_path": circle["data_path"], "topk": [3], "valid_metric": "NDCG@3", "eval_rows": 7,
        })  # fmt: skip
        _, valid, test = create_loaders(config, create_dataset(config))
        users = [loader._dataset.inter_feat["user_id"].tolist() for loader in (valid, test)]
        sizes.append(users)
    assert sizes[0] == sizes[1] and len(set(sizes[0][0])) == 7
    assert sorted(sizes[0][0]) == sorted(sizes[0][1])  # the same users validate and test


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retriever": "2Mamba4rec"}, "model: there is no sequential model '2Mamba4rec'; did you mean '2Mamba4Rec'?"),
        ({"retriever": "LlamaRec"}, "retriever: LlamaRec is a ranker itself; try retriever: 2Mamba4Rec"),
        ({"retriever": "DIN"}, "retriever: DIN scores one item at a time, and a retriever scores all; try retriever"),
        ({"num_candidates": 30}, "num_candidates: must lie in [2, 26], got 30"),
        ({"num_candidates": 1}, "num_candidates: must lie in [2, 26], got 1"),
        ({"fusion_weight": 2}, "fusion_weight: must be 'tuned' or a number in [0, 1], got 2"),
        ({"fusion_weight": "tune"}, "fusion_weight: must be 'tuned' or a number in [0, 1], got 'tune'"),
        ({"orpo_lambda": -1.0}, "orpo_lambda: must be 0 or more, got -1.0; try orpo_lambda: 0.1"),
        ({"verbalizer": "letter"}, "verbalizer: 'letter' is not one of letters, title_likelihood, embedding; did you"),
        ({"train_objective": "dpo"}, "train_objective: 'dpo' is not one of sft, orpo"),
        (
            {"train_objective": "orpo", "verbalizer": "embedding"},
            "orpo_probabilities: verbalizer: embedding has probabilities of candidates alone; take orpo_probabilities",
        ),
        ({"eval_args": {"mode": "uni100"}}, "eval_args: a ranker of retrieved items is evaluated with mode: full, got"),
        (
            {"rerank": "retrieved", "metrics": ["Hit", "ItemCoverage"]},
            "rerank: the language model must order every user's items for ItemCoverage; take rerank: all",
        ),
        ({"retriever_config": {"epoch": 3}}, "epoch: there is no such key; did you mean 'epochs'?"),
        ({"retriever_config": 3}, "retriever_config: must be a mapping such as {'epochs': 20}, got 3"),
        (
            {"retriever_config": {"eval_args": {"split": {"LS": "valid_only"}}}},
            "retriever_config: eval_args is the ranker's too, as another one could show the retriever what is tested",
        ),
        ({"retriever_config": {"MAX_ITEM_LIST_LENGTH": 9}}, "retriever_config: MAX_ITEM_LIST_LENGTH is the ranker's"),
        ({"retriever_config": {"encoding": "latin-1"}}, "retriever_config: encoding is the ranker's too"),
        ({"retriever_config": {"dataset": "toy"}}, "retriever_config: data_path is the ranker's too"),
        ({"retriever_config": {"model": "SASRec"}}, "retriever_config: its model stands beside it; give retriever:"),
        (
            {"retriever": "2Mamba4Rec", "retriever_config": {"preset": "ml-1m/2Mamba4Rec"}},
            "retriever_config: user_inter_num_interval is the ranker's too, as another one could show the retriever "
            "what is tested; it is '[5,inf)' there and '[0,inf)' here, so give user_inter_num_interval beside",
        ),
        ({"retriever": 3}, "retriever: must be a name such as 2Mamba4Rec, got 3"),
        (
            {"retriever_config": None, "retriever_checkpoint": 3},
            "retriever_checkpoint: must be a file such as best.safetensors, or the folder of a run, got 3",
        ),
        ({"eval_args": {"mode": {"valid": "full", "test": "uni100"}}}, "eval_args: a ranker of retrieved items is"),
        ({"random_base_args": {"vocab_size": "x"}}, "random_base_args: vocab_size must be at least 400, got 'x'"),
        ({"title_field": 3}, "title_field: must be the name of a column, got 3"),
        ({"retriever_config": {"epochs": 3}, "retriever_checkpoint": "x"}, "retriever_config: retriever_checkpoint na"),
        ({"prompt_history": 0}, "prompt_history: must be at least 1, got 0"),
        ({"prompt_tokens": 60}, "prompt_tokens: 3 candidates of up to"),
        ({"train_mode": "packed"}, "train_mode: packed is not possible, because LlamaRec reads a history as one text"),
        ({"base_model": "nowhere/at/all"}, "base_model: nowhere/at/all is no folder and no GGUF file; give a folder"),
    ],
)
def test_what_cannot_work_is_one_line(circle, options, message):
    with pytest.raises(UserError) as caught:
        run_recbole_ssm("LlamaRec", "circle", config_dict={**circle, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not list(pathlib.Path().glob("saved/*/*.safetensors"))  # before a retriever was trained for nothing


def test_a_retriever_has_the_keys_of_its_ranker_but_for_model_and_training():
    given = {"encoding": "latin-1", "drop_cold_targets": True, "seed": 7, "prompt_history": 3, "epochs": 9}
    config = configure("LlamaRec", "toy", config_dict={**given, "retriever_config": {"hidden_size": 8}})
    own = retriever._config_of(config, config["retriever_config"], configure)
    assert {key: own[key] for key in ("encoding", "drop_cold_targets", "seed")} == {
        key: given[key] for key in ("encoding", "drop_cold_targets", "seed")
    }
    assert own["model"] == "2Mamba4Rec" and own["hidden_size"] == 8 and own["epochs"] != 9
    assert own["prompt_history"] is None


def test_a_retriever_may_read_times(tmp_path):
    """The ranker's batches carry them, and who is served gives them."""
    options = {**SMALL, **write_circle(tmp_path / "data", begin=978_300_000), "epochs": 0, "state": "WARNING"}
    options["retriever_config"] = {**options["retriever_config"], "time": "query"}
    result = run_recbole_ssm("LlamaRec", "circle", config_dict=options)
    assert result["test_result_shuffled_times"].keys() == result["test_result"].keys()
    assert {"shuffled times", "fused"} <= result["ranks"].keys()
    recommender = load_recommender(result["checkpoint"], device="cpu")
    times = [978_300_000, 978_300_001]
    scores = [recommender.score(["i1", "i2"], ["i3"], times=times, now=times[1] + wait) for wait in (0, 1)]
    assert scores[0] != scores[1]
    with pytest.raises(UserError, match="now: this model reads how long ago the newest event was"):
        recommender.recommend(["i1", "i2"], times=times)
