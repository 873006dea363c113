"""The table of the study of language models, from outcomes whose ranks are known."""

import numpy as np
import pytest

from recbole_ssm.errors import UserError
from recbole_ssm.llm.reranking import FUSED, LANGUAGE_MODEL, RETRIEVER, report
from recbole_ssm.study import main
from recbole_ssm.study.objectives import _options_of, markdown, table
from recbole_ssm.study.outcome import RANKS, Outcome, Run


def outcome(folder, language, fused):
    """40 users, half of them retrieved at rank 3."""
    folder.mkdir()
    missed = np.full(20, np.inf)
    ranks = {RETRIEVER: np.append(np.full(20, 3.0), missed)}
    ranks |= {LANGUAGE_MODEL: np.append(language, missed), FUSED: np.append(fused, missed)}
    users = np.array([f"u{number}" for number in range(40)])
    np.savez(folder / RANKS, user=users, rank=ranks[FUSED], **{f"rank of {name}": r for name, r in ranks.items()})
    found = {**report(ranks, [20]), "fusion_weight": 0.25, "seconds_per_user": 0.5}
    history = [{"steps": 10}]
    return Outcome(Run("LlamaRec", "made"), None, folder, reranking=found, history=history, parameters=7, seconds=1.0)


def test_each_order_is_paired_with_the_retriever(tmp_path):
    noise = np.random.default_rng(0)
    better = outcome(tmp_path / "a", np.ones(20), np.full(20, 3.0))
    other = outcome(tmp_path / "b", noise.permutation([1.0, 9.0] * 10), np.full(20, 2.0))
    rows = table({("random", "letters", "sft"): [better], ("random", "letters", "orpo"): [other]})
    assert [row["order"] for row in rows] == [RETRIEVER, LANGUAGE_MODEL, FUSED] * 2
    first = rows[1]
    assert first["retrieved ndcg@10"] == pytest.approx(1.0) and first["overall ndcg@10"] == pytest.approx(0.5)
    assert first["difference"] == pytest.approx(0.25)  # from 1 / log2(4) to 1, of half of the users
    assert first["p"] < 0.001 < 0.1 < rows[4]["p"]
    assert rows[2]["difference"] == 0 and rows[2]["p"] == 1
    text = markdown(rows)
    assert text.count("| retriever |") == 1  # both arms share it
    assert "| random | 7 | letters | sft | language model | 0.5000 | 0.5000 | 1.0000 | +0.2500 (" in text


def test_one_user_says_nothing(tmp_path):
    only = outcome(tmp_path / "a", np.ones(20), np.full(20, 3.0))
    with np.load(only.folder / RANKS) as file:
        ranks = {**file, "user": np.full(40, "u0")}
    np.savez(only.folder / RANKS, **ranks)
    text = markdown(table({("random", "letters", "sft"): [only]}))
    assert "| language model |" in text and "nan" not in text and "1.000 |" not in text


def test_failed_arms_have_no_rows(tmp_path):
    assert table({("random", "letters", "sft"): [Outcome(Run("LlamaRec", "made"), "no titles", tmp_path)]}) == []


def test_random_bases_by_size():
    found = _options_of("random:64x2", "embedding", "orpo")
    assert found["base_model"] == "random" and found["orpo_probabilities"] == "letters"
    assert found["random_base_args"]["hidden_size"] == 64 and found["random_base_args"]["num_hidden_layers"] == 2
    assert "random_base_args" not in _options_of("folder", "letters", "sft")


OPTION = "recbole-ssm study llm: argument"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verbalizers=letter"], f"{OPTION} --verbalizers: 'letter' is not one of letters, title_likelihood, embed"),
        (["--objectives=dpo"], f"{OPTION} --objectives: 'dpo' is not one of sft, orpo"),
        (["--seeds=0"], f"{OPTION} --seeds: must be at least 1, got 0"),
        (["--eval_args={'split': {'LS': 'valid_only'}}"], "eval_args: split: {'LS': 'valid_only'} leaves no rows to"),
        (["--eval_args={'split': {'LS': 'test_only'}}"], "eval_args: split: {'LS': 'test_only'} leaves no rows for v"),
        (["--orpo_lambd=1"], "orpo_lambd: there is no such key; did you mean 'orpo_lambda'?"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(UserError) as caught:
        main(["llm", *arguments])
    assert str(caught.value).startswith(message)
