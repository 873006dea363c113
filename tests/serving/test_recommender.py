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
from recbole_ssm.serving.catalogue import Catalogue, largest
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
            with pytest.raises(UserError, match=r"(history|histories\[0\]): must be a list of item tokens, got b?'12'"):
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


def test_allow_deny_and_exclude(recommender):
    everything = [token for token, _ in recommender.recommend(["i3"], 20)]
    few = [token for token, _ in recommender.recommend(["i3"], 20, allow={"i1", "i2", "i3"}, deny=["i2"])]
    assert few == [token for token in everything if token in ("i1", "i3")]
    many = recommender.recommend_many([["i3"], ["i3"]], 20, exclude=[["i4", "no such item"], []])
    assert [[token for token, _ in one] for one in many] == [[t for t in everything if t != "i4"], everything]
    assert [token for token, _ in recommender.recommend(["i3"], 20, allow=["i1", "new"], deny=["gone"])] == ["i1"]
    for exclude, count in ([["i4"]], "fewer"), ([["i4"], [], ["i5"]], "more"):
        with pytest.raises(UserError, match=f"exclude: has {count} entries than there are histories"):
            recommender.recommend_many([["i3"], ["i3"]], 20, exclude=exclude)
    with pytest.raises(UserError, match="allow: none of its items is in the catalogue"):
        recommender.recommend(["i3"], allow=["x"])


@pytest.mark.parametrize("columns", [20_000, 20_032])
def test_the_largest_scores_by_blocks_are_those_of_all(columns):
    """Also where many scores are equal, or hardly any item is left."""
    torch.manual_seed(0)
    rows = torch.randn(8, columns)
    rows[1] = (rows[1] * 2).round()
    rows[2] = -torch.inf
    rows[3, 7:] = -torch.inf
    rows[4, -20:] += 10
    for k in (1, 11, 70):
        values, indices = largest(rows, k)
        expected = rows.topk(k)
        assert torch.equal(values, expected.values) and torch.equal(rows.gather(1, indices), values)
        assert all(len(set(row)) == k for row in indices.tolist())
        assert torch.equal(indices[[0, 4]], expected.indices[[0, 4]])
    catalogue = Catalogue([str(n) for n in range(columns)])
    for row, found in zip(rows, catalogue.best(rows.clone(), 10)):
        order = sorted(range(1, columns), key=lambda item: (-row[item].item(), item))[:10]
        assert [item for item, _ in found] == [str(item) for item in order if row[item] > -torch.inf]


def test_of_equal_scores_the_lowest_ids_are_taken():
    catalogue = Catalogue(["[PAD]", *(f"i{n}" for n in range(30))], torch.tensor([0, *([5, 1] * 15)]))
    assert [token for token, _ in catalogue.popular(3, [], None)] == ["i0", "i2", "i4"]
    scores = torch.tensor([[0.0, *([1.0, 2.0] * 15)], [0.0, *range(30)]])
    first, second = catalogue.best(scores, 2)
    assert [token for token, _ in first] == ["i1", "i3"] and [token for token, _ in second] == ["i29", "i28"]


def test_histories_come_in_chunks_and_are_named(recommender, monkeypatch):
    histories = [[f"i{n % 20}", f"i{(n + 1) % 20}"] for n in range(50)]
    whole = recommender.recommend_many(histories, 3)
    monkeypatch.setattr("recbole_ssm.serving.recommender.MOST_SCORES", 7 * 21)
    sizes = []
    scores = recommender._scores
    monkeypatch.setattr(recommender, "_scores", lambda rows: sizes.append(len(rows)) or scores(rows))
    in_chunks = recommender.recommend_many((iter(history) for history in histories), 3)
    assert sizes == [7] * 7 + [1]
    for one, other in zip(whole, in_chunks):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [score for _, score in one] == pytest.approx([score for _, score in other], abs=1e-5)
    histories[41] = ["i1", "x"]
    with pytest.raises(UserError, match=r"histories\[41\]: item 'x' is not in the catalogue"):
        recommender.recommend_many(histories, 3)
    answers = recommender.recommend_many(histories, 3, skip_unknown=True)
    assert [answer.skipped for answer in answers] == [0] * 41 + [1] + [0] * 8


@pytest.mark.parametrize("history", [{"i1"}, {"i1": 1}, 5, None])
def test_a_history_has_an_order(recommender, history):
    with pytest.raises(UserError, match="history: must be a list of item tokens, oldest first"):
        recommender.recommend(history)


@pytest.mark.parametrize("k", [2.5, True, "3", None])
def test_k_is_a_whole_number(recommender, k):
    with pytest.raises(UserError, match="k: must be a whole number"):
        recommender.recommend(["i1"], k)


def test_a_checkpoint_without_counts_answers_no_empty_history(recommender):
    # As those of 0.1.0 are.
    recommender.catalogue = Catalogue(recommender.items)
    with pytest.raises(UserError, match="history: must be a list of one item token or more"):
        recommender.recommend([])


def test_an_empty_history_is_answered_by_popularity(recommender):
    # In the toy data every item is a target about as often; the order of equal counts is that of the ids.
    popular = recommender.recommend([], 20)
    assert popular.source == "popularity" and all(count > 0 for _, count in popular)
    assert [count for _, count in popular] == sorted((count for _, count in popular), reverse=True)
    items = recommender.items
    recommender.catalogue = Catalogue(items, torch.arange(21))
    alone, answer = recommender.recommend_many([["i3"], []], 3)
    assert alone.source == "model" and answer.source == "popularity"
    assert answer == [(items[20], 20.0), (items[19], 19.0), (items[18], 18.0)]
    unknown = recommender.recommend(["x"], 2, skip_unknown=True, deny=[items[20]])
    assert unknown.skipped == 1 and [token for token, _ in unknown] == [items[19], items[18]]
    assert recommender.session().top(3) == answer and recommender.session().top(3).source == "popularity"


def test_scores_and_vectors(recommender):
    best = dict(recommender.recommend(["i3", "i4"], 20))
    assert recommender.score(["i3", "i4"], ["i7", "i1"]) == pytest.approx([best["i7"], best["i1"]])
    items, users = recommender.item_vectors(), recommender.user_vectors([["i3", "i4"], [], ["i5"]])
    assert items.shape[0] == 20 and users.shape == (3, items.shape[1]) and not users[1].any()
    torch.testing.assert_close(users[0] @ items.T, torch.tensor([best[item] for item in recommender.items[1:]]))
    cosines = torch.nn.functional.cosine_similarity(items, items[2:3])
    similar = recommender.similar_items(recommender.items[3], 19)
    assert {token for token, _ in similar} == set(recommender.items[1:]) - {recommender.items[3]}
    assert [value for _, value in similar] == pytest.approx(sorted(cosines.tolist(), reverse=True)[1:], abs=1e-5)


def test_a_device_that_is_none(path):
    with pytest.raises(UserError, match="device: there is no 'gpu' here; take cpu, cuda or cuda:0"):
        load_recommender(path, device="gpu")
