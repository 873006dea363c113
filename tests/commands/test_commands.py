"""recommend, evaluate and export: a trained model, and many users at once."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.commands import evaluate, recommend_users
from recbole_ssm.commands.serve import load_served
from recbole_ssm.errors import UserError
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The result of a run on a data set of 30 users and 20 items with titles, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data" / "shop"
    data.mkdir(parents=True)
    rows = [f"u{u}\ti{(u + j) % 20}\t{j}" for u in range(30) for j in range(8)]
    # A user with too few events for the run's filter.
    rows += ["few\ti1\t0", "few\ti2\t1"]
    (data / "shop.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n")
    titles = "".join(f"i{i}\tThe title, {i}\n" for i in range(20))
    (data / "shop.item").write_text("item_id:token\ttitle:token_seq\n" + titles)
    options = {
        "data_path": str(folder / "data"),
        "checkpoint_dir": str(folder / "saved"),
        "epochs": 4,
        "topk": [1, 5],
        "valid_metric": "NDCG@5",
        "user_inter_num_interval": "[3,inf)",
        "show_progress": False,
        "state": "WARNING",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_recbole_ssm("2Mamba4Rec", "shop", config_dict=options)
    return result, Path(result["checkpoint"]).parent


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_user_of_the_data_set(run, tmp_path):
    _, folder = run
    assert main(["recommend", str(folder), "--k=3", "--out=recs.csv", "--exclude_seen", "--device=cpu"]) == 0
    rows = rows_of("recs.csv")
    # All users with all their events, those whom the run's filter left out too.
    assert len({row["user_id"] for row in rows}) == 31
    recommender = load_recommender(folder, device="cpu")
    for user, history in (("u4", [f"i{n}" for n in range(4, 12)]), ("few", ["i1", "i2"])):
        expected = recommender.recommend(history, 3, exclude_seen=True)
        found = [row for row in rows if row["user_id"] == user]
        assert [row["item_id"] for row in found] == [item for item, _ in expected]
        assert [float(row["score"]) for row in found] == pytest.approx([score for _, score in expected], abs=1e-5)
        assert [row["rank"] for row in found] == ["1", "2", "3"]
        assert [row["title"] for row in found] == [f"The title, {item[1:]}" for item, _ in expected]
        assert {row["source"] for row in found} == {"model"}


def test_titles_of_a_column_that_is_named(run, tmp_path):
    result, folder = run
    (tmp_path / "data").mkdir()
    shutil.copytree(Path(result["checkpoint"]).parent.parent.parent / "data" / "shop", tmp_path / "data" / "shop")
    items = "".join(f"i{i}\tno. {i}\tThe title, {i}\n" for i in range(20))
    (tmp_path / "data" / "shop" / "shop.item").write_text(
        f"item_id:token\tlabel:token_seq\tItem title:token_seq\n{items}"
    )
    command = ["recommend", str(folder), "--k=1", "--out=recs.csv", "--data_path=data"]
    for more, title in ([], "The title, "), (["--title_field=label"], "no. "):
        assert main([*command, *more]) == 0
        assert all(row["title"] == title + row["item_id"][1:] for row in rows_of("recs.csv"))


def test_some_users_and_items(run, tmp_path, caplog):
    _, folder = run
    Path("users.txt").write_text("u3\nnobody\nu1\n")
    Path("allowed.txt").write_text("i1\ni2\ni3\n")
    Path("denied.txt").write_text("i2\n")
    options = ["--users=users.txt", "--allow=allowed.txt", "--deny=denied.txt", "--out=recs.parquet"]
    assert main(["recommend", str(folder), *options]) == 0
    table = pyarrow.parquet.read_table("recs.parquet").to_pydict()
    assert table["user_id"] == ["u3", "u3", "nobody", "nobody", "u1", "u1"]
    assert set(table["item_id"]) == {"i1", "i3"}
    assert table["source"][2:4] == ["popularity"] * 2 and set(table["source"][:2]) == {"model"}


def test_users_by_their_ids(run, tmp_path):
    _, folder = run
    for users, known in (("few", ["few"]), ("u3, few", ["u3", "few"])):
        assert list(recommend_users(folder, users, 1, device="cpu").user_id) == known


def test_users_that_are_typed_are_answered_on_the_screen(run, tmp_path, capsys):
    _, folder = run
    assert main(["recommend", str(folder), "--users=u3,few", "--k=2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["user_id", "rank", "item_id", "title", "score"]
    assert [line.split()[:2] for line in lines] == [["u3", "1"], ["u3", "2"], ["few", "1"], ["few", "2"]]
    assert not Path("recommendations.csv").exists()


def test_a_history_that_is_typed(run, tmp_path, capsys):
    _, folder = run
    recommender = load_recommender(folder, device="cpu")
    expected = recommender.recommend(["i4", "i5"], 3)
    assert main(["recommend", str(folder), "--history=i4,i5", "--k=3"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["rank", "item_id", "title", "score"] and not Path("recommendations.csv").exists()
    for rank, (line, (item, score)) in enumerate(zip(lines, expected, strict=True), 1):
        assert line.split() == [str(rank), item, "The", "title,", item[1:], f"{score:.4f}"]
    assert main(["recommend", str(folder), "--history=i4,i5", "--k=3", "--out=recs.csv"]) == 0
    assert [row["item_id"] for row in rows_of("recs.csv")] == [item for item, _ in expected]


def test_it_says_when_there_are_not_so_many_items(run, tmp_path, caplog):
    _, folder = run
    assert len(recommend_users(folder, ["u1", "few"], 20, device="cpu", exclude_seen=True)) == 12 + 18
    assert "--k=20: 2 users have fewer rows, because no more of the 20 items are left" in caplog.text


@pytest.mark.parametrize("kind", ["events.inter", "events.csv", "events.parquet"])
def test_users_from_a_file_of_events(run, tmp_path, kind):
    _, folder = run
    events = {"user_id": ["b", "a", "b", "b"], "item_id": ["i3", "i9", "i2", "no such"], "timestamp": [7, 1, 6, 8]}
    if kind.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table(events), kind)
    else:
        mark, header = ("\t", "user_id:token\titem_id:token\ttimestamp:float")
        if kind.endswith("csv"):
            mark, header = ",", "user_id,item_id,timestamp"
        lines = [mark.join(map(str, row)) for row in zip(*events.values())]
        Path(kind).write_text("\n".join([header, *lines]) + "\n")
    found = recommend_users(folder, kind, 2, device="cpu")
    recommender = load_recommender(folder, device="cpu")
    of_b = found[found.user_id == "b"]
    assert list(of_b.item_id) == [item for item, _ in recommender.recommend(["i2", "i3"], 2)]
    with pytest.raises(UserError, match=r"history of user 'b': item 'no such' is not in the catalogue"):
        recommend_users(folder, kind, 2, device="cpu", skip_unknown=False)


def test_a_run_is_tested_again_as_it_was(run):
    result, folder = run
    found = evaluate(folder, config_dict={"use_gpu": False})
    assert found == pytest.approx(dict(result["test_result"]))
    assert found.masked == pytest.approx(result["test_result_masked"])
    assert all(type(value) is float for value in found.values())
    assert evaluate(folder, part="valid") == pytest.approx(dict(result["best_valid_result"]))


def test_other_metrics_and_splits(run, capsys):
    _, folder = run
    options = ["--metrics=Recall, MAP", "--topk=2,3", "--json=out.json"]
    assert main(["evaluate", str(folder), "--device=cpu", *options]) == 0
    written = json.loads(Path("out.json").read_text())
    out = capsys.readouterr().out
    assert f"run {folder}, data set shop, test\n" in out and "recall@2" in out
    assert list(written["metrics"]) == list(written["masked"]) == ["recall@2", "recall@3", "map@2", "map@3"]
    sampled = evaluate(folder, config_dict={"eval_args": {"mode": "uni5"}, "use_gpu": False})
    assert sampled["hit@1"] >= evaluate(folder, config_dict={"use_gpu": False})["hit@1"] and sampled["hit@5"] <= 1
    by_time = evaluate(folder, config_dict={"eval_args": {"split": {"GTS": [0.7, 0.1, 0.2]}}})
    assert by_time.keys() == evaluate(folder).keys()


def test_another_data_set_knows_items_by_their_ids(run, tmp_path):
    _, folder = run
    data = tmp_path / "other" / "market"
    data.mkdir(parents=True)
    # The same circle of items, for other users, in another order of lines, and with items that the run did not know.
    rows = [f"v{u}\ti{(7 * u + j) % 20}\t{j}" for u in range(12) for j in range(8)]
    rows += [f"v{u}\tnew{u}\t3.5" for u in range(12)]
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    (data / "market.inter").write_text(header + "\n".join(reversed(rows)) + "\n")
    found = evaluate(folder, config_dict={"data_path": str(tmp_path / "other"), "dataset": "market"})
    recommender = load_recommender(folder, device="cpu")
    best = [recommender.recommend([f"i{(7 * u + j) % 20}" for j in range(7)], 1)[0][0] for u in range(12)]
    hits = [item == f"i{(7 * u + 7) % 20}" for u, item in enumerate(best)]
    assert found["hit@1"] == pytest.approx(np.mean(hits), abs=1e-4)


def test_vectors_by_raw_id(run):
    _, folder = run
    recommender = load_recommender(folder, device="cpu")
    assert main(["export", str(folder), "--out=v.parquet"]) == 0
    items = pyarrow.parquet.read_table("v.parquet").to_pydict()
    assert items["id"] == recommender.items[1:]
    np.testing.assert_array_equal(np.array(items["vector"], dtype=np.float32), recommender.item_vectors().numpy())
    assert main(["export", str(folder), "--what=users", "--out=v.npy", "--device=cpu"]) == 0
    users, ids = np.load("v.npy"), Path("v.npy.ids.txt").read_text().splitlines()
    assert users.shape[0] == len(ids) == 31
    expected = recommender.user_vectors([[f"i{n}" for n in range(4, 12)]])[0].numpy()
    np.testing.assert_allclose(users[ids.index("u4")], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend"], "the following arguments are required: checkpoint"),
        (["recommend", "{run}", "more"], "one checkpoint is taken"),
        (["recommend", "no/such"], "there is no such file"),
        (["recommend", "."], "there is no such file; name the folder of a run of recbole-ssm train (compare and"),
        (["recommend", "{run}", "--users=absent.txt"], "there is no file 'absent.txt' and no user 'absent.txt'"),
        (["recommend", "{run}", "--users=u3,feww"], "no file 'u3,feww' and no user 'feww'; did you mean 'few'?"),
        (["recommend", "{run}", "--history=i1,i99"], "--history: item 'i99' is not in the catalogue"),
        (["recommend", "{run}", "--history=i1", "--users=u1"], "--history: is in place of --users; leave one out"),
        (["recommend", "{run}", "--titel_field=x"], "there is no option --titel_field; did you mean '--title_field'?"),
        (["recommend", "{run}", "--exclude-seen"], "there is no option --exclude-seen; did you mean '--exclude_seen'?"),
        (["recommend", "{run}", "--history=,"], "--history: names no item"),
        (["recommend", "{run}", "--out=recs.xls"], "must end in .parquet or .csv"),
        (["recommend", "{run}", "--out=absent/recs.csv"], "there is no folder"),
        (["recommend", "{run}", "--allow=absent.txt"], "--allow: absent.txt cannot be read"),
        (["recommend", "{run}", "--allow={strange}"], "allow: none of its items is in the catalogue"),
        (["evaluate", "{run}", "--device=banana"], "--device: must be cpu, cuda or cuda:0, got banana"),
        (["recommend", "{run}", "--title_field=titl"], "has no column titl of text; did you mean 'title'?"),
        (["recommend", "{run}", "--k=0"], "must be at least 1"),
        (["recommend", "{run}", "--hidden_size=3"], "hidden_size: a trained model answers as it was trained"),
        (["recommend", "{run}", "--learning_rate=3"], "learning_rate: a trained model answers as it was trained"),
        (["serve", "{run}", "--num_layers=5"], "num_layers: a trained model answers as it was trained"),
        (["recommend", "{run}", "--learner_average=3"], "average_power: a trained model answers as it was trained"),
        (["recommend", "{run}", "--preset=ml-1m/2Mamba4Rec"], "preset: a trained model answers as it was trained"),
        (["recommend", "{run}", "--topk=5"], "topk: a trained model answers as it was trained"),
        (["evaluate", "{run}", "--hidden_size=3"], "hidden_size"),
        (["export", "{run}", "--what=users", "--d_state=5"], "d_state: a trained model answers as it was trained"),
        (
            ["export", "{run}", "--what=items", "--data_path=x"],
            "export: --what=items takes no config keys, got --data_path=x",
        ),
        (["recommend", "{run}", "--data_pth=x"], "data_pth: there is no such key; did you mean 'data_path'?"),
        (["evaluate", "{run}", "--metrics=Hits,MRR"], "tailpercentage; did you mean 'hit'?"),
        (["export", "{run}", "--what=people"], "invalid choice: 'people'"),
        (["export", "{run}", "--what=model", "--users=u1"], "--users: --what=model does not take it; leave it out"),
        (["export", "{run}", "--what=model", "--now=5"], "--now: --what=model does not take it"),
        (["export", "{run}", "--what=model", "--device=cpu"], "--device: --what=model does not take it"),
        (["export", "{run}", "--format=torch"], "--format: --what=items does not take it"),
        (["export", "{run}", "--users=u1"], "--users: --what=items does not take it"),
        (["export", "{run}", "--what=users", "--overwrite"], "--overwrite: --what=users does not take it"),
        (["export", "{run}", "--out=v.csv"], "must end in .parquet or .npy"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(run, capsys, arguments, message):
    Path("strange.txt").write_text("strange\n")
    before = set(Path().rglob("*"))
    names = {"run": str(run[1]), "strange": "strange.txt"}
    assert main([argument.format(**names) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert message in line
    written = {path for path in set(Path().rglob("*")) - before if path.parts[0] not in ("log", "log_tensorboard")}
    assert not written


def test_graphs_are_replayed_where_they_are_asked_for(run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("recbole_ssm.serving.recommender.replay_graphs", asked.append)
    for key in ((), ("--cuda_graphs=False",), ("--cuda_graphs=True",)):
        assert main(["recommend", str(run[1]), "--history=i1", "--device=cpu", *key]) == 0
        load_served(run[1], device="cpu", command_line=key)
        assert len(asked) == (2 if "--cuda_graphs=True" in key else 0)


def test_graphs_do_not_ask_for_the_data_set(run, monkeypatch):
    """Without which a checkpoint is served all the same, unless a key of the data is given."""

    def absent(*saved, **given):
        raise UserError("data_path: it is not there")

    monkeypatch.setattr("recbole_ssm.commands.serve.configure_data", absent)
    assert not load_served(run[1], device="cpu", command_line=["--cuda_graphs=True"]).titles
    with pytest.raises(UserError, match="it is not there"):
        load_served(run[1], device="cpu", command_line=["--data_path=nowhere"])


COMMANDS = [
    command
    for page in ("serving.md", "models.md")
    for command in re.findall(r"^    recbole-ssm (.+)$", (REPOSITORY / "docs" / page).read_text(), re.MULTILINE)
]


def test_there_are_commands_in_the_pages():
    assert len(COMMANDS) >= 8 and any(command.startswith("train --init") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages(run, tmp_path, command):
    """As it stands there, on the files that it speaks of."""
    _, folder = run
    (tmp_path / "saved").mkdir()
    shutil.copytree(folder, tmp_path / "saved" / folder.name)
    (tmp_path / "users.txt").write_text("u3\nu5\n")
    (tmp_path / "in_stock.txt").write_text("i1\ni2\ni3\nnew\n")
    events = {"user_id": ["a", "a"], "item_id": ["i3", "i4"], "timestamp": [1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(events), tmp_path / "events.parquet")
    for place, name in (("folder", "other"), ("dataset", "toy")):
        (tmp_path / place / name).mkdir(parents=True)
        rows = "".join(f"v{u}\ti{(u + j) % 20}\t{j}\n" for u in range(12) for j in range(6))
        (tmp_path / place / name / f"{name}.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + rows)
    if "--export=" in command:
        assert main(["state", "saved", "--state=state", "--import=events.parquet"]) == 0
    more = ["--epochs=1", "--show_progress=False", "--state=ERROR"] if command.startswith("train") else []
    assert main([*command.split(), *more]) == 0


def test_the_formats_of_the_page_are_those_of_the_code():
    page = (REPOSITORY / "docs" / "serving.md").read_text()
    for column in ("user_id", "item_id", "rank", "score", "source", "title"):
        assert f"`{column}`" in page
