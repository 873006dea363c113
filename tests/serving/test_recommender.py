"""load_recommender: raw tokens in, raw tokens and scores out, on any machine."""

import subprocess
import sys

import pytest
import torch

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure
from recbole_ssm.serving import Recommender
from recbole_ssm.trainer import checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from tests.conftest import REPOSITORY

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = {"data_path": str(REPOSITORY / "dataset"), "show_progress": False, "state": "WARNING"}
        return folder / run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options)["checkpoint"]


@pytest.fixture
def recommender(path):
    return load_recommender(path, device="cpu")


def test_the_next_items_of_the_circle(recommender):
    tokens = [token for token, _ in recommender.recommend(["i8", "i9", "i10"], k=3)]
    assert tokens[0] == "i11"
    scores = [score for _, score in recommender.recommend(["i8", "i9", "i10"], k=20)]
    assert scores == sorted(scores, reverse=True) and len(scores) == 20
    assert all(isinstance(score, float) for score in scores)


def test_padding_is_never_recommended_and_k_beyond_the_catalogue_gives_all(recommender):
    tokens = {token for token, _ in recommender.recommend(["i1"], k=1000)}
    assert tokens == {f"i{n}" for n in range(20)}


def test_seen_items_are_left_out_on_demand(recommender):
    history = ["i3", "i4", "i5"]
    assert not {t for t, _ in recommender.recommend(history, k=20, exclude_seen=True)} & set(history)


def test_several_histories_equal_one_by_one(recommender):
    histories = [["i1"], ["i5", "i6", "i7"], [f"i{n % 20}" for n in range(50)]]
    for together, history in zip(recommender.recommend_many(histories, k=5), histories):
        alone = recommender.recommend(history, k=5)
        assert [t for t, _ in together] == [t for t, _ in alone]
        assert [s for _, s in together] == pytest.approx([s for _, s in alone], abs=1e-5)
    assert recommender.recommend_many([]) == []


def test_only_the_newest_events_count(recommender):
    long = [f"i{n % 20}" for n in range(100)]
    assert recommender.recommend(long) == recommender.recommend(long[-20:])


def test_one_text_is_no_list_of_items(toy):
    """Its characters are items of this catalogue, and would be taken for a history."""
    data = create_dataset(configure("2Mamba4Rec", **toy))
    model = get_model("2Mamba4Rec")(configure("2Mamba4Rec", **toy), data)
    tokens = ["[PAD]", *map(str, range(20))]
    recommender = Recommender(model, configure("2Mamba4Rec", **toy), tokens)
    for call in (recommender.recommend, recommender.session, lambda text: recommender.recommend_many([text])):
        for text in ("12", b"12"):
            with pytest.raises(UserError, match="history: must be a list of item tokens, got b?'12'"):
                call(text)
    with pytest.raises(UserError, match="histories: must be a list of histories, got '12'"):
        recommender.recommend_many("12")
    session = recommender.session(["12"])
    session.update("3")
    assert session._seen == {13, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["i1", "i99x"],), "history: item 'i99x' is not in the catalogue"),
        (([],), "history: must be a list of one item token or more"),
        (("i1",), "history: must be a list of item tokens, got 'i1'; write ['i1']"),
        ((["i1"], 0), "k: must be at least 1, got 0"),
        ((["[PAD]"],), "history: item '[PAD]' is not in the catalogue"),
    ],
)
def test_bad_histories(recommender, arguments, message):
    with pytest.raises(UserError) as caught:
        recommender.recommend(*arguments)
    assert str(caught.value).startswith(message)


def test_a_checkpoint_from_a_gpu_serves_without_one(path, tmp_path, recommender):
    saved = checkpoint.read(path)
    saved.info["config"] |= {"device": "cuda:3", "use_gpu": True, "gpu_id": "3"}
    checkpoint.write(
        tmp_path / "gpu.safetensors", saved.tensors, {k: v for k, v in saved.info.items() if k != "format"}
    )
    moved = load_recommender(tmp_path / "gpu.safetensors", device="cpu")
    assert moved.recommend(["i1", "i2"]) == recommender.recommend(["i1", "i2"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(path, recommender):
    found = load_recommender(path, device="cuda").recommend(["i1", "i2"], k=3)
    expected = recommender.recommend(["i1", "i2"], k=3)
    assert [t for t, _ in found] == [t for t, _ in expected]
    assert [s for _, s in found] == pytest.approx([s for _, s in expected], abs=1e-3)


def test_another_process_without_the_data_set(path, tmp_path):
    code = f"""
from recbole_ssm import load_recommender
print(load_recommender({str(path)!r}).recommend(["i7", "i8"], k=1)[0][0])
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.strip() == "i9"


def test_models_of_more_than_items_say_so(toy):
    toy["config_dict"] |= {"epochs": 1}
    result = run_recbole_ssm("HGN", toy["dataset"], config_dict=toy["config_dict"])
    with pytest.raises(UserError, match="serves models of items alone"):
        load_recommender(result["checkpoint"], device="cpu").recommend(["i1"])
