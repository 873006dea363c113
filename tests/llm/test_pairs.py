"""Preference pairs: what is written, and TRL's ORPOTrainer on them."""

import json
import math

import pytest

from recbole_ssm import cli
from recbole_ssm.errors import UserError
from recbole_ssm.llm.base import load_base_model
from recbole_ssm.llm.pairs import read_pairs, train_with_trl, write_pairs
from recbole_ssm.quick_start import configure, export_pairs

TINY = {
    "retriever": "SASRec", "retriever_config": {"epochs": 1, "hidden_size": 8, "n_heads": 1}, "num_candidates": 5,
    "MAX_ITEM_LIST_LENGTH": 5, "prompt_history": 3, "random_base_args": {"vocab_size": 400, "num_hidden_layers": 1},
}  # fmt: skip
PAIRS = [
    {"prompt": f"History: {title}. Pool: (A) x (B) y. Answer:\n", "chosen": "A", "rejected": "B"}
    for title in ("The naïve table", "The garden", "The engine") * 3
]


@pytest.fixture
def export(titled, tmp_path):
    def run(**options):
        titled["config_dict"] |= {**TINY, **options}
        count = export_pairs(tmp_path / "pairs.jsonl", titled["dataset"], config_dict=titled["config_dict"])
        rows = read_pairs(tmp_path / "pairs.jsonl")
        assert len(rows) == count
        return rows

    return run


def pool_of(prompt):
    """Letter -> title, as the prompt lists them."""
    lines = prompt.split("Candidate pool:")[1].split("\n\n### Response:")[0].strip().split(" \n ")
    return {line[1]: line[4:] for line in lines}


def history_of(prompt):
    lines = prompt.split("User history:")[1].split("; \n")[0].strip().split(" \n ")
    return [line.partition(") ")[2] for line in lines]


def following(title):
    colours, things = ("red", "green", "blue", "white"), ("table", "garden", "engine")
    titles = [f"The {colour} {thing}" for colour in colours for thing in things]
    return titles[(titles.index(title) + 1) % 12]


@pytest.mark.parametrize("rejected", ["random", "hardest", "all"])
def test_chosen_is_what_came_and_rejected_another_candidate(export, rejected):
    rows = export(train_last=1, orpo_rejected=rejected)
    assert len(rows) == 48 * (4 if rejected == "all" else 1)
    for row in rows:
        pool = pool_of(row["prompt"])
        assert sorted(pool) == list("ABCDE")
        assert pool[row["chosen"]] == following(history_of(row["prompt"])[-1])
        assert row["rejected"] in pool and row["rejected"] != row["chosen"]
    if rejected == "all":
        assert all({row["rejected"] for row in rows[i : i + 4]} | {rows[i]["chosen"]} == set("ABCDE") for i in (0, 4))


def test_titles_are_the_answers_where_titles_are_asked_for(export):
    for row in export(train_last=1, verbalizer="title_likelihood"):
        assert row["chosen"] == following(history_of(row["prompt"])[-1])
        assert {row["chosen"], row["rejected"]} <= set(pool_of(row["prompt"]).values())


def test_the_same_seed_writes_the_same_pairs(export):
    first = export(train_last=2)
    assert export() == first != export(seed=7)


def test_the_command(titled, tmp_path, capsys):
    options = {**titled["config_dict"], **TINY, "train_last": 1, "dataset": titled["dataset"]}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    assert cli.main(["pairs", str(tmp_path / "out.jsonl"), *arguments]) == 0
    assert len(read_pairs(tmp_path / "out.jsonl")) == 48
    assert cli.main(["pairs", "--dataset=toy"]) == 2
    assert "pairs: name the file to write first" in capsys.readouterr().err
    (tmp_path / "file").touch()
    # Before anything is read or trained.
    for path, message in (("", "is a folder; name a file"), ("file/out.jsonl", "there is no folder")):
        assert cli.main(["pairs", str(tmp_path / path)]) == 2
        assert message in capsys.readouterr().err


def test_a_file_is_whole_or_absent(tmp_path):
    def failing():
        yield PAIRS[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_pairs(tmp_path / "pairs.jsonl", failing())
    assert not list(tmp_path.iterdir())
    assert write_pairs(tmp_path / "pairs.jsonl", PAIRS) == 9
    assert read_pairs(tmp_path / "pairs.jsonl") == PAIRS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; write it by recbole-ssm pairs"),
        ("", "there is no pair in it"),
        ("{\n", "line 1: not JSON"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n', "line 2: must hold the texts"),
        ('{"prompt": "a", "chosen": 1, "rejected": "c"}\n', "line 1: must hold the texts prompt, chosen, rejected"),
        ("[]\n", "line 1: must hold the texts"),
    ],
)
def test_faulty_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        read_pairs(tmp_path / "pairs.jsonl")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def trl(tmp_path):
    """Train on the pairs; the folder."""
    pytest.importorskip("trl", reason="pip install trl")

    def train(lora_r=None, base_model="random", **arguments):
        write_pairs(tmp_path / "pairs.jsonl", PAIRS)
        options = {"lora_r": lora_r, "base_model": base_model, "show_progress": False}
        sizes = {"vocab_size": 400, "num_hidden_layers": 1}
        config = configure("LlamaRec", "toy", config_dict={**options, "random_base_args": sizes})
        return train_with_trl(tmp_path / "pairs.jsonl", tmp_path / "trained", config, **arguments), config

    return train


def test_trl_trains_a_base_model_that_loads_again(trl, tmp_path):
    folder, config = trl(per_device_train_batch_size=3, num_train_epochs=8, learning_rate=0.01, logging_steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "trained"]
    assert (folder / "model.safetensors").is_file() and json.loads((folder / "config.json").read_text())
    config["base_model"] = str(folder)
    config["lora_r"] = 0
    base = load_base_model(config, [])
    tokens = base.tokenizer(PAIRS[0]["prompt"], return_tensors="pt")
    a, b = (base.tokenizer(letter).input_ids[0] for letter in "AB")
    logits = base.model(**tokens).logits[0, -1].log_softmax(-1)
    assert logits[a] > math.log(0.5) and logits[b] < logits[a] - 3


def test_lora_is_merged(trl):
    folder, config = trl(lora_r=2, per_device_train_batch_size=3, max_steps=1)
    assert not (folder / "adapter_config.json").exists()
    config["base_model"] = str(folder)
    assert load_base_model(config, []).model.peft_config["default"].r == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 10}, "max_length: 10 would cut off the answer of a pair of"),
        ({"betta": 0.1}, "TRL's ORPOConfig does not take {'betta': 0.1"),
    ],
)
def test_what_trl_cannot_do(trl, tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        trl(**arguments)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "trained").exists()


def test_a_folder_is_not_written_over(trl, tmp_path):
    (tmp_path / "trained").mkdir()
    with pytest.raises(UserError, match="trained: exists; name a folder that does not"):
        trl()


def test_a_pair_longer_than_the_context_is_refused(tmp_path):
    pytest.importorskip("trl", reason="pip install trl")
    write_pairs(tmp_path / "pairs.jsonl", [*PAIRS, {**PAIRS[0], "prompt": "x y " * 40}])
    sizes = {"vocab_size": 400, "max_position_embeddings": 64}
    config = configure("LlamaRec", "toy", config_dict={"random_base_args": sizes, "show_progress": False})
    with pytest.raises(UserError, match=r"pairs.jsonl, line 10: \d+ tokens, and random reads 64; write the pairs with"):
        train_with_trl(tmp_path / "pairs.jsonl", tmp_path / "trained", config)
