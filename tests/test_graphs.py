"""CUDA graphs: the logic on a stand-in for the recording, the recording itself where there is a GPU."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_ssm import compat, ops
from recbole_ssm.graphs import Graphed, GraphedModel, Recording

compat.install()

from recbole_ssm.data.outline import DatasetOutline
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure
from recbole_ssm.serving.recommender import Recommender
from tests.ops.test_ops import assert_close


def model_of(name, **keys):
    config = configure(name, "ml-100k", config_dict={"train_neg_sample_args": None, "loss_type": "CE", **keys})
    config["device"] = torch.device("cpu")
    return get_model(name)(config, DatasetOutline(30)).eval(), config


recorded = []


def record(function, tensors, structure):
    """As a graph: it reads and writes where it did when it was recorded."""
    inputs = [t.clone() for t in tensors]
    outputs = function(*pytree.tree_unflatten(inputs, structure))
    flat, _ = pytree.tree_flatten(outputs)

    def replay():
        again, _ = pytree.tree_flatten(function(*pytree.tree_unflatten(inputs, structure)))
        for place, value in zip(flat, again):
            place.copy_(value)

    recorded.append(structure)
    return Recording(inputs, outputs, replay)


@pytest.fixture(autouse=True)
def nothing_recorded():
    recorded.clear()


STANDIN = {"serves": lambda tensors: True, "record": record}


def graphed(function, **options):
    return Graphed(function, **STANDIN, **options)


@torch.no_grad()
def test_replays_for_each_kind_and_gives_its_own_memory():
    double = graphed(lambda x, pair: (2 * x, [pair[0] + 1]))
    one, two = (double(torch.full((3,), v), (torch.tensor(v),)) for v in (1.0, 2.0))
    assert one[0].tolist() == [2, 2, 2] and one[1][0] == 2
    assert two[0].tolist() == [4, 4, 4] and two[1][0] == 3
    assert len(recorded) == 1
    double(torch.ones(4), (torch.tensor(1.0),))
    double(torch.ones(3, dtype=torch.float64), (torch.tensor(1.0),))
    assert len(recorded) == 3


def test_runs_as_it_is_where_a_graph_does_not_serve():
    plain = Graphed(lambda x: 2 * x, record=record)
    with torch.no_grad():
        assert plain(torch.ones(1)) == 2  # on a CPU
    few = graphed(lambda x: 2 * x, most=1)
    assert few(torch.ones(1, requires_grad=True)).requires_grad
    assert not recorded
    with torch.no_grad():
        assert [few(torch.ones(n)).numel() for n in (1, 2, 1)] == [1, 2, 1]
    assert len(recorded) == 1


@torch.no_grad()
def test_a_failed_recording_is_said_once(caplog):
    def fails(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    function = Graphed(lambda x: 2 * x, serves=lambda tensors: True, record=fails)
    assert [function(torch.ones(1)).item() for _ in range(2)] == [2, 2]
    assert [r.message for r in caplog.records] == [
        "CUDA graphs are switched off: recording failed (operation not permitted when stream is capturing)"
    ]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec", "Hydra4Rec"])
def test_scores_do_not_depend_on_the_form(name):
    model, config = model_of(name, MAX_ITEM_LIST_LENGTH=9, num_layers=2, readout="last")
    lengths = torch.tensor([9, 1, 4])
    rows = torch.randint(1, 30, (3, 9)) * (torch.arange(9) < lengths[:, None])
    expected = model.full_sort_predict({model.ITEM_SEQ: rows, model.ITEM_SEQ_LEN: lengths})
    assert_close(GraphedModel(model).scores(rows, lengths), expected, 1e-5)
    Recommender(model, config, [str(i) for i in range(30)], cuda_graphs=True)
    assert model.graphed is None  # on a CPU
    model.graphed = GraphedModel(model, **STANDIN)
    for _ in range(2):
        found = model.full_sort_predict({model.ITEM_SEQ: rows, model.ITEM_SEQ_LEN: lengths})
        assert_close(found, expected, 1e-5)
    assert len(recorded) == 1


@torch.inference_mode()
def test_steps_carry_their_state_through_the_graph():
    model, _ = model_of("Mamba4Rec")
    step = GraphedModel(model, **STANDIN).step
    state, other, third = model.alloc_state(2), model.alloc_state(2), model.alloc_state(2)
    output = torch.empty(2, 64)
    for item in (3, 4, 5):
        items = torch.full((2,), item)
        expected, state = model.step(items, state)
        found, other = step(items, other)
        step.into((output, third), items, third)
        assert torch.equal(found, expected) and torch.equal(output, expected)
    assert len(recorded) == 1 and type(other[0]) is type(state[0])
    for one, two in zip(pytree.tree_leaves(state), pytree.tree_leaves(third)):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "options",
    [{}, {"time": "query"}, {"time": "query", "query_enters": "output"}, {"time": "query", "gap_enters": "step"}],
)
@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec"])
def test_sessions_answer_by_graphs(name, options, monkeypatch):
    """Two sessions take turns, and each gives what it gives without graphs."""
    if "gap_enters" in options and name != "2Mamba4Rec":
        pytest.skip("its state does not decay through gaps")
    monkeypatch.setattr("recbole_ssm.serving.session.runs_natively", lambda table: False)
    model, config = model_of(name, MAX_ITEM_LIST_LENGTH=9, num_layers=2, readout="last", **options)
    with torch.inference_mode():
        # Two items of one score.
        model.item_embedding.weight[7] = model.item_embedding.weight[11]
    recommender = Recommender(model, config, [str(i) for i in range(30)])
    answers = []
    for replays in (None, GraphedModel(model, **STANDIN)):
        model.graphed = replays
        sessions = [recommender.session(["3", "4"], times=[5, 60]), recommender.session(["9"], times=[7])]
        for moment, item in enumerate("5612389", 70):
            for session in sessions:
                session.update(item, moment)
                for k, keys in (
                    (5, {}),
                    (29, {"exclude_seen": True}),
                    (3, {"exclude": ["1", "2"]}),
                    (2, {"deny": ["1"]}),
                ):
                    answers.append(session.top(k, now=moment + 3, **keys))
    middle = len(answers) // 2
    plain, replayed = answers[:middle], answers[middle:]
    assert [[item for item, _ in one] for one in plain] == [[item for item, _ in one] for one in replayed]
    for one, other in zip(plain, replayed):
        assert [score for _, score in one] == pytest.approx([score for _, score in other], rel=1e-6)
    assert {len(one) for one in replayed} >= {5, 3, 2, 29 - 3}
    # Lists of three lengths; those with "deny" are made without a graph.
    assert len(model.graphed.step._recordings) == 1 and len(model.graphed._best) == 3


@torch.inference_mode()
def test_lists_of_many_lengths_are_not_all_recorded():
    model, _ = model_of("Mamba4Rec", readout="last")
    replays, vector, excluded = GraphedModel(model, **STANDIN), torch.rand(1, 64), torch.tensor([[0, 5]])
    for k in range(1, 9):
        scores, ids = replays.best(vector, excluded, k, 30)
        expected = model.query_vectors(vector) @ model.item_vectors().T
        expected[:, [0, 5]] = -torch.inf
        assert_close(scores, expected.topk(k).values.double(), 1e-6)
        assert ids.tolist() == expected.topk(k).indices.tolist()
    assert len(recorded) == replays.MOST_LENGTHS


def test_other_models_refuse():
    model, config = model_of("Mamba4Rec", readout="mean")
    with pytest.raises(UserError, match="cuda_graphs: Mamba4Rec is no model of ours with readout: last"):
        Recommender(model, config, ["", "a"], cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_on_a_gpu(backend):
    model, _ = model_of("2Mamba4Rec", MAX_ITEM_LIST_LENGTH=50, readout="last")
    model.cuda()
    replays = GraphedModel(model)
    step, scores = replays.step, replays.scores
    with ops.use_backend(backend):
        state = other = [s.to("cuda") for s in model.alloc_state(2)]
        for item in (3, 4, 5):
            items = torch.full((2,), item, device="cuda")
            expected, state = model.step(items, state)
            found, other = step(items, other)
            assert_close(found, expected, 1e-6)
        if backend == "auto":
            for n in (50, 7):
                rows, lengths = torch.randint(1, 30, (2, 50), device="cuda"), torch.tensor([n, 1], device="cuda")
                expected = model.full_sort_predict({model.ITEM_SEQ: rows, model.ITEM_SEQ_LEN: lengths})
                assert_close(scores(rows, lengths), expected, 1e-5)
            assert not scores._failed
            vectors, excluded = torch.rand(1, 64, device="cuda"), torch.tensor([[0, 5]], device="cuda")
            expected = (model.query_vectors(vectors) @ model.item_vectors().T).index_fill(1, excluded[0], -torch.inf)
            for _ in range(2):
                found = replays.best(vectors, excluded, 5, 30)
                assert found[1].tolist() == expected.topk(5).indices.tolist()
            assert all(best._recordings for best in replays._best.values())
    assert not step._failed


class NoMasks(TorchDispatchMode):
    """Indexing by a mask reads the number of its elements from the GPU, which no graph can hold."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        flat, _ = pytree.tree_flatten((arguments, keywords))
        masked = "index" in str(function) and any(torch.is_tensor(t) and t.dtype == torch.bool for t in flat)
        assert not masked and "nonzero" not in str(function), function
        return function(*arguments, **(keywords or {}))


@torch.no_grad()
@pytest.mark.skipif("native" not in ops.available_backends(), reason="the native kernels are not built")
@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec", "Hydra4Rec"])
def test_scores_index_by_no_mask(name):
    model, _ = model_of(name, MAX_ITEM_LIST_LENGTH=9, num_layers=2, readout="last")
    rows, lengths = torch.randint(1, 30, (3, 9)), torch.tensor([9, 1, 4])
    with NoMasks():
        GraphedModel(model).scores._function(rows, lengths)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_failed_recording_leaves_the_process_usable(caplog, monkeypatch):
    """Whether the fault shows in the warm-up or in the recording itself."""
    here = torch.rand(3, device="cuda")
    reads = Graphed(lambda x: x * x.sum().item())
    assert reads(torch.ones(2, device="cuda")).tolist() == [2, 2]
    monkeypatch.setattr("recbole_ssm.graphs._refuse_waits", lambda call: None)
    torch.cuda.manual_seed(4)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(4)
    late = Graphed(lambda x: x * x.sum().item())
    assert late(torch.ones(2, device="cuda")).tolist() == [2, 2]
    assert torch.equal(torch.rand(3, device="cuda"), expected) and here.isfinite().all()
    good = Graphed(lambda x: 2 * x)
    assert good(torch.ones(2, device="cuda")).tolist() == [2, 2] and not good._failed
    assert len([r for r in caplog.records if "CUDA graphs are switched off" in r.message]) == 2


def test_a_model_with_graphs_is_copied_and_pickled_without_them():
    model, _ = model_of("2Mamba4Rec")
    model.graphed = GraphedModel(model, **STANDIN)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.graphed is None and model.graphed is not None
        assert torch.equal(other.item_embedding.weight, model.item_embedding.weight)
