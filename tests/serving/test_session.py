"""Sessions: event by event gives what the whole history gives, in place and for less."""

import copy
import pickle

import pytest
import torch

from recbole_ssm import load_recommender, ops, run_recbole_ssm
from recbole_ssm.errors import UserError
from recbole_ssm.model import TwoMamba4Rec
from recbole_ssm.ops import native
from recbole_ssm.serving import Stepper
from tests.conftest import REPOSITORY

BACKENDS = ["torch"] if native.unusable else ["torch", "native"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Model name -> recommender."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        options = {"data_path": str(REPOSITORY / "dataset"), "show_progress": False, "state": "WARNING"}

        def train(name, **more):
            result = run_recbole_ssm(name, "toy", config_dict={**options, "epochs": 1, **more})
            return load_recommender(result["checkpoint"], device="cpu")

        yield {
            **{name: train(name, num_layers=2) for name in ("Mamba4Rec", "2Mamba4Rec", "Hydra4Rec")},
            "SASRec": train("SASRec"),
            "mean": train("Mamba4Rec", readout="mean"),
        }


def walk(length):
    generator = torch.Generator().manual_seed(length)
    return [f"i{n}" for n in torch.randint(20, (length,), generator=generator).tolist()]


def assert_same(found, expected, tolerance):
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec"])
def test_a_session_recommends_what_recommend_does(trained, name, backend):
    recommender, history = trained[name], walk(20)  # MAX_ITEM_LIST_LENGTH is 20
    with ops.use_backend(backend):
        for begin in (0, 1, 7):
            session = recommender.session(history[:begin])
            for end in range(begin, 20):
                session.update(history[end])
                assert_same(session.top(20), recommender.recommend(history[: end + 1], 20), 1e-5)
        seen = session.top(20, exclude_seen=True)
        assert_same(seen, recommender.recommend(history, 20, exclude_seen=True), 1e-5)


@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec"])
def test_in_double_precision_to_the_last_digits(trained, name):
    recommender, history = trained[name], walk(20)
    recommender.model.double()
    try:
        session = recommender.session(history[:5])
        for item in history[5:]:
            session.update(item)
        assert_same(session.top(20), recommender.recommend(history, 20), 1e-12)
    finally:
        recommender.model.float()


def test_a_session_never_forgets(trained):
    """Beyond MAX_ITEM_LIST_LENGTH it has read more than recommend reads, whichever way it got there."""
    recommender, history = trained["2Mamba4Rec"], walk(60)
    at_once, one_by_one = recommender.session(history), recommender.session()
    for item in history:
        one_by_one.update(item)
    assert_same(one_by_one.top(20), at_once.top(20), 1e-5)
    scores = dict(recommender.recommend(history, 20))
    assert any(abs(scores[token] - score) > 1e-7 for token, score in at_once.top(20))
    assert at_once.nbytes == recommender.session().nbytes


def test_sessions_are_apart(trained):
    recommender = trained["Mamba4Rec"]
    first, second = recommender.session(["i1"]), recommender.session(["i1"])
    before = second.top(20)
    first.update("i9")
    assert second.top(20) == before != first.top(20)


@pytest.mark.parametrize("name", ["Hydra4Rec", "SASRec", "mean"])
def test_models_without_a_state_say_so(trained, name):
    with pytest.raises(UserError, match="carries no state from event to event; use recommend"):
        trained[name].session(["i1"])


def test_mistakes_are_one_line_and_leave_the_session_as_it_was(trained):
    counts, trained["Mamba4Rec"].catalogue._counts = trained["Mamba4Rec"].catalogue._counts, None
    session = trained["Mamba4Rec"].session()
    with pytest.raises(UserError, match="there was no event yet"):
        session.top()
    trained["Mamba4Rec"].catalogue._counts = counts
    session.update("i1")
    before = session.top()
    with pytest.raises(UserError, match="item 'nosuch' is not in the catalogue"):
        session.update("nosuch")
    with pytest.raises(UserError, match="k: must be at least 1, got 0"):
        session.top(0)
    assert session.top() == before
    with pytest.raises(UserError, match="item 'x' is not in the catalogue"):
        trained["Mamba4Rec"].session(["x"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("users", [1, 20])
@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec"])
@torch.inference_mode()
def test_a_stepper_equals_the_model(trained, name, users, backend):
    model = trained[name].model
    state = model.alloc_state(users)
    with ops.use_backend(backend):
        stepper = Stepper(model, state)
        for _ in range(5):
            items = torch.randint(1, 21, (users,))
            expected, state = model.step(items, state)
            torch.testing.assert_close(stepper(items.tolist()), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(IndexError):
            stepper([1000] * users)
        for one, other in zip(stepper.state, state):
            torch.testing.assert_close(one.ssm, other.ssm, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec"])
def test_a_state_is_an_object(trained, name, backend):
    recommender, history = trained[name], walk(12)
    with ops.use_backend(backend):
        for begin in (0, 6):
            session = recommender.session(history[:begin])
            copies = [session.clone(), copy.copy(session), copy.deepcopy(session), recommender.session()]
            copies[-1].load_state_dict(session.state_dict())
            session.update("i3")
            for other in copies:
                for item in history[begin:]:
                    other.update(item)
                assert_same(other.top(20), recommender.recommend(history, 20), 1e-5)
                assert other._seen == {int(item[1:]) + 1 for item in history}
            # The copies have taken nothing of the original's, nor it of theirs.
            assert_same(session.top(20), recommender.recommend([*history[:begin], "i3"], 20), 1e-5)


def test_a_state_of_another_model_is_refused_and_nothing_is_pickled(trained):
    session = trained["Mamba4Rec"].session(["i1"])
    before = session.top(5)
    state = session.state_dict()
    for wrong in (
        trained["2Mamba4Rec"].session(["i1"]).state_dict(),
        {name: tensor for name, tensor in state.items() if name != "block.1.ssm"},
        {**state, "more": torch.zeros(1)},
        {**state, "output": state["output"].double()},
        {**state, "seen": torch.tensor([21])},
        {**state, "seen": torch.zeros(1, 1, dtype=torch.int64)},
    ):
        with pytest.raises(UserError, match="session: a state of another"):
            session.load_state_dict(wrong)
        assert session.top(5) == before
    with pytest.raises(UserError, match="not pickled"):
        pickle.dumps(session)


class Marked(TwoMamba4Rec):
    def embed(self, items_L, clock=None):
        marks = torch.zeros(len(items_L), self.hidden_size)
        marks[:, 0] = items_L % 3
        return super().embed(items_L, clock) + marks


class Doubled(TwoMamba4Rec):
    def step(self, item_B, state, clock=None):
        vectors, after = super().step(item_B, state, clock)
        return 2 * vectors, after


@pytest.mark.parametrize("own", [Marked, Doubled])
@torch.inference_mode()
def test_kernels_leave_methods_of_ones_own_to_them(trained, own):
    model = copy.deepcopy(trained["2Mamba4Rec"].model)
    model.__class__ = own
    items, bounds = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 2, 5])
    found = []
    for backend in ("auto", "torch"):
        with ops.use_backend(backend):
            step = Stepper(model, model.alloc_state(2))
            found.append((model.encode(items, bounds, last_only=True), step([3, 4]).clone(), step([1, 1]).clone()))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
