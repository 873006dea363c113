"""A model as files: what they compute is what the model and its sessions do, and every mistake is one line."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.commands import export_model
from recbole_ssm.errors import UserError
from recbole_ssm.files import digest
from recbole_ssm.layers.time import NEVER
from recbole_ssm.serving import portable
from tests.conftest import REPOSITORY
from tests.test_docs import PAGES

START, LENGTH = 978_300_000, 8
TINY = {"hidden_size": 16, "num_layers": 1}
MODELS = {
    "Mamba4Rec": ("Mamba4Rec", TINY),
    "2Mamba4Rec": ("2Mamba4Rec", {**TINY, "head_dim": 8, "n_groups": 2, "num_layers": 2}),
    "Hydra4Rec": ("Hydra4Rec", {**TINY, "head_dim": 8, "n_groups": 2, "num_layers": 2, "score": "cosine"}),
    "masked": ("Hydra4Rec", {**TINY, "head_dim": 8, "train_mode": "masked"}),
    "mean": ("Mamba4Rec", {**TINY, "readout": "mean"}),
    "SASRec": ("SASRec", {"hidden_size": 16, "inner_size": 32}),
    "GRU4Rec": ("GRU4Rec", {"hidden_size": 16, "embedding_size": 12}),
    "gaps": ("Mamba4Rec", {**TINY, "time": "gaps"}),
    "query": ("2Mamba4Rec", {**TINY, "head_dim": 8, "time": "query", "score": "cosine", "temperature": 0.5}),
    "output": ("Mamba4Rec", {**TINY, "time": "query", "query_enters": "output", "query_calendar": True}),
    "step": ("2Mamba4Rec", {**TINY, "head_dim": 8, "time": "query", "gap_enters": "step"}),
    "attention": ("SASRec", {"hidden_size": 16, "inner_size": 32, "time": "query", "query_calendar": True}),
}
STATEFUL = {"Mamba4Rec", "2Mamba4Rec", "gaps", "query", "output", "step"}


def times_of(user, count):
    """From no time at all to a month between two events."""
    gaps = [0, *np.random.default_rng(user).integers(0, 12, count - 1)]
    return [START + int(second) for second in np.cumsum([gap**6 for gap in gaps])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function from a name in MODELS to a checkpoint, trained once on 30 users."""
    folder, ready = tmp_path_factory.mktemp("trained"), {}
    (folder / "data" / "timed").mkdir(parents=True)
    lines = [f"u{user}\ti{(user + n) % 20}\t{time}" for user in range(30) for n, time in enumerate(times_of(user, 8))]
    text = "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(lines) + "\n"
    (folder / "data" / "timed" / "timed.inter").write_text(text)
    options = {"data_path": str(folder / "data"), "checkpoint_dir": str(folder / "saved"), "epochs": 1, "topk": [5]}
    options |= {"valid_metric": "NDCG@5", "MAX_ITEM_LIST_LENGTH": LENGTH, "show_progress": False, "state": "ERROR"}

    def train(name):
        if name not in ready:
            model, more = MODELS[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                ready[name] = Path(run_recbole_ssm(model, "timed", config_dict={**options, **more})["checkpoint"])
        return ready[name]

    return train


class Files:
    """An exported model as somebody calls it who has the folder alone."""

    def __init__(self, folder):
        self.about = json.loads(Path(folder, "model.json").read_text())
        self.parts = {name: self._load(Path(folder, part["file"])) for name, part in self.about["parts"].items()}
        items = Path(folder, self.about["items"]["file"]).read_text().splitlines()
        self.ids = {item: number for number, item in enumerate(items, self.about["items"]["first_id"])}

    def _load(self, file):
        if self.about["format"] == "torch":
            return torch.export.load(file).module()
        return pytest.importorskip("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def __call__(self, part, **inputs):
        described = self.about["parts"][part]
        names = [one["name"] for one in described["inputs"]]
        assert set(names) == set(inputs)
        if self.about["format"] == "torch":
            found = self.parts[part](*(torch.from_numpy(inputs[name]) for name in names))
            return [one.numpy() for one in (found if isinstance(found, tuple) else (found,))]
        return self.parts[part].run([one["name"] for one in described["outputs"]], inputs)

    def scores(self, histories, times, now):
        """Of all items, for histories of one batch."""
        rows = np.full((len(histories), self.about["length"]), 3)  # garbage behind the histories
        moments = np.full_like(rows, 17)
        for row, moment, history, at in zip(rows, moments, histories, times):
            row[: len(history)], moment[: len(history)] = [self.ids[item] for item in history], at
        known = {"item_ids": rows, "lengths": np.array([len(h) for h in histories]), "times": moments, "now": now}
        taken = {one["name"]: known[one["name"]] for one in self.about["parts"]["encode"]["inputs"]}
        return self("score", vectors=self("encode", **taken)[0])[0]


def check_histories(recommender, files):
    """All lengths at once, and one by one."""
    random = np.random.default_rng(5)
    histories = [[f"i{n}" for n in random.integers(0, 20, length)] for length in range(1, LENGTH + 1)]
    times = [times_of(length, length) for length in range(1, LENGTH + 1)]
    now = np.array([at[-1] + 10**length for length, at in enumerate(times)])
    ids = [[recommender.items.index(item) for item in history] for history in histories]
    expected = recommender.scores(ids, times, now.tolist()).numpy()
    np.testing.assert_allclose(files.scores(histories, times, now), expected, atol=1e-5, rtol=1e-5)
    for row in (0, LENGTH - 1):
        alone = files.scores([histories[row]], [times[row]], now[row : row + 1])
        np.testing.assert_allclose(alone, expected[row : row + 1], atol=1e-5, rtol=1e-5)


def check_steps(recommender, files, events):
    """Event by event, beside a session; with the moment of asking where the model reads it."""
    about = files.about["parts"]["step"]
    named = {one["name"]: one for one in about["inputs"]}
    state = {name: np.zeros((1, *named[name]["shape"][1:]), named[name]["type"]) for name in about["state"]}
    session, draw = recommender.session(), np.random.default_rng(6)
    items, times = draw.integers(0, 20, events), times_of(7, events + 1)
    before = files.about.get("time", {}).get("before_the_first_event")
    for item, at, after in zip(items, times, times[1:]):

        def step(now, item=item, before=before, at=at, state=state):
            known = {"item_ids": files.ids[f"i{item}"], "time_before": before, "time": at, "now": now}
            taken = {name: np.array([known[name]]) for name in named if name not in state}
            return files("step", **taken, **state)

        session.update(f"i{item}", at)
        # Asked twice, of which nothing stays; the next event ends the wait.
        for now in (at, at + 86_400) if "now" in named else (at,):
            scores = dict(zip(recommender.items, files("score", vectors=step(now)[0])[0][0]))
            for token, score in session.top(20, now=now):
                assert scores[token] == pytest.approx(score, abs=1e-5, rel=1e-5)
        state, before = dict(zip(state, step(after)[1:])), at
    return state


def check_files(name, checkpoint, folder, events):
    files, recommender = Files(folder), load_recommender(checkpoint, device="cpu")
    assert set(files.parts) == {"encode", "score", *({"step"} if name in STATEFUL else ())}
    check_histories(recommender, files)
    if name in STATEFUL:
        check_steps(recommender, files, events)
    return files, recommender


@pytest.mark.parametrize("name", ["query", pytest.param("GRU4Rec", marks=pytest.mark.slow)])
def test_programs_of_torch_compute_what_the_model_does(trained, name):
    assert main(["export", str(trained(name).parent), "--what=model", "--format=torch", "--out=here"]) == 0
    files, _ = check_files(name, trained(name), "here", 12)
    if name == "query":
        check_description(files.about, trained(name))
    for part in files.parts:
        with zipfile.ZipFile(f"here/{part}.pt2") as archive:
            assert not any(b"site-packages" in archive.read(member) for member in archive.namelist())


@pytest.mark.parametrize("name", ["Mamba4Rec", *(pytest.param(name, marks=pytest.mark.slow) for name in [*MODELS][1:])])
def test_graphs_compute_what_the_model_does(trained, name):
    """In onnxruntime: histories of all lengths, and 1,000 steps against the session."""
    for package in portable.ONNX_PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed")
    export_model("exported", trained(name))
    files, recommender = check_files(name, trained(name), "exported", 1000)
    # Operators of ONNX alone, no loops, no names of this machine's files, and little beside the weights.
    import onnx

    weights = sum(weight.nbytes for weight in recommender.model.parameters())
    for part in files.about["parts"].values():
        content = Path("exported", part["file"]).read_bytes()
        graph = onnx.load_from_string(content)
        assert {node.domain for node in graph.graph.node} <= {""} and not graph.functions
        assert {"Loop", "Scan", "If"}.isdisjoint(node.op_type for node in graph.graph.node)
        assert len(content) < weights + 150_000 and b"site-packages" not in content
    if name == "Mamba4Rec":
        (block,) = (block for block in PAGES[REPOSITORY / "docs" / "serving.md"] if "import onnxruntime" in block)
        names = {}
        exec(block, names)
        for history, found in (
            *zip(names["histories"], names["of_histories"]),
            (["i8", "i9", "i10"], names["scores"][0]),
        ):
            item, score = recommender.recommend(history, 1)[0]
            assert names["items"][found.argmax()] == item and found.max() == pytest.approx(score, abs=1e-5)


def check_description(about, checkpoint):
    """That it says how the files are called."""
    assert about["model"] == "2Mamba4Rec" and about["checkpoint_sha256"] == digest(checkpoint)
    assert (about["length"], about["score"]) == (LENGTH, {"kind": "cosine", "temperature": 0.5})
    assert about["items"] == {"file": "items.txt", "count": 20, "first_id": 1, "padding_id": 0}
    assert Path("here", "items.txt").read_text().splitlines() == load_recommender(checkpoint, device="cpu").items[1:]
    assert about["time"]["before_the_first_event"] == NEVER
    step = about["parts"]["step"]
    assert [one["name"] for one in step["inputs"]] == ["item_ids", "time_before", "time", "now", "conv_0", "ssm_0"]
    assert step["state"] == {"conv_0": "next_conv_0", "ssm_0": "next_ssm_0"}
    assert {"name": "ssm_0", "type": "float32", "shape": ["batch", 4, 8, 32]} in step["inputs"]
    assert {"name": "scores", "type": "float32", "shape": ["batch", 21]} in about["parts"]["score"]["outputs"]
    assert all(part["largest_difference"] < 1e-5 for part in about["parts"].values())
    assert about["versions"]["torch"] == torch.__version__


def test_a_class_whose_padded_form_is_another_is_not_written(trained, monkeypatch):
    recommender, written = load_recommender(trained("Mamba4Rec"), device="cpu"), []
    forward = recommender.model.forward
    monkeypatch.setattr(recommender.model, "forward", lambda *inputs: 2 * forward(*inputs))
    monkeypatch.setattr(portable, "_write", lambda part, file: written.append(part))
    monkeypatch.setattr(portable, "_load", lambda file: lambda *inputs: [written[-1].module(*inputs)])
    with pytest.raises(UserError, match="encode differs from the model by 5.0e-01, .* its encode_padded and step must"):
        portable.write_model(recommender, Path("exported"), "torch", {})
    assert not list(Path().glob("*exported*"))


def test_each_output_is_compared_by_its_own_size(monkeypatch):
    """A wrong small output beside a large one, and one that is missing."""
    right = [torch.full((2, 3), 1e3), torch.full((2, 3), 1e-3)]
    monkeypatch.setattr(portable, "_examples", lambda *_: iter([([], right)] * 2))
    part = portable.Part(torch.nn.Identity(), {}, ("vectors", "next_ssm_0"))
    assert portable._difference("step", part, lambda: right, None) == 0
    found = portable._difference("step", part, lambda: [right[0], 1.5 * right[1]], None)
    assert found == pytest.approx(0.5)
    with pytest.raises(ValueError, match="longer"):
        portable._difference("step", part, lambda: right[:1], None)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_while_a_model_is_written_stays(trained, monkeypatch, overwrite):
    recommender, appeared = load_recommender(trained("Mamba4Rec"), device="cpu"), Path("exported", "mine")

    def write(part, file):
        appeared.parent.mkdir(exist_ok=True)
        appeared.write_text("mine")

    monkeypatch.setattr(portable, "_write", write)
    monkeypatch.setattr(portable, "_load", lambda file: None)
    monkeypatch.setattr(portable, "_difference", lambda *arguments: 0.0)
    with pytest.raises(UserError, match="exported is (there already|no exported model)"):
        portable.write_model(recommender, Path("exported"), "torch", {}, overwrite)
    assert list(Path("exported").iterdir()) == [appeared] and appeared.read_text() == "mine"


def test_a_folder_is_replaced_where_it_is_asked_for(trained, monkeypatch, capsys):
    monkeypatch.setattr(portable, "_write", lambda part, file: file.write_text("new"))
    monkeypatch.setattr(portable, "_load", lambda file: None)
    monkeypatch.setattr(portable, "_difference", lambda *arguments: 0.0)
    command = ["export", str(trained("Mamba4Rec")), "--what=model", "--format=torch"]
    assert main(command) == 0
    Path("exported", "step.pt2").write_text("old")
    assert main(command) == 2 and "exported is there already, and stays as it is; say --over" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and Path("exported", "step.pt2").read_text() == "new"
    Path("exported", "notes.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 2 and "exported holds notes.txt, which export" in capsys.readouterr().err
    assert Path("exported", "notes.txt").read_text() == "mine"
    Path("mine").mkdir()
    assert main([*command, "--overwrite", "--out=mine"]) == 2 and "mine is no exported model" in capsys.readouterr().err
    for content in ('{"versions": {"torch": "2"}}', '{"versions": "1"}', "[]", "no JSON"):
        Path("mine/model.json").write_text(content)
        assert main([*command, "--overwrite", "--out=mine"]) == 2 and Path("mine/model.json").read_text() == content
        assert "mine is no exported model" in capsys.readouterr().err
    assert main([*command, "--out=none/here"]) == 2 and "--out: there is no folder" in capsys.readouterr().err
    assert main([*command, "--topk=5"]) == 2 and "takes no config keys, got --topk=5" in capsys.readouterr().err
    # What was begun is gone.
    assert {path.name for path in Path().iterdir()} - {"log", "log_tensorboard"} == {"exported", "mine"}


def test_what_is_missing_is_told_before_anything_is_loaded(trained, monkeypatch):
    monkeypatch.setattr(portable, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"needs onnx, onnxscript and onnxruntime; pip install 'recbole-ssm\[onnx\]'"):
        export_model("exported", trained("Mamba4Rec"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LlamaRec", "is a language model with prompts and a tokenizer"),
        ("GPT4Rec", "is a language model with prompts and a tokenizer"),
        ("Pop", "cannot leave as a file; Mamba4Rec, 2Mamba4Rec, Hydra4Rec, SASRec and GRU4Rec can"),
        ("BERT4Rec", "cannot leave as a file"),
    ],
)
def test_models_that_are_no_graph_are_refused(name, message):
    from recbole_ssm.model import get_model

    with pytest.raises(UserError, match=message):
        portable.check_exportable(name, get_model(name), "torch")
