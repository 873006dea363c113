"""Ready-made splits: each file's rows stay its own, and histories are RecBole's lists in our numbering."""

import numpy as np
import pytest
import torch

from recbole_ssm import run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure

FILES = {
    # Times of the parts overlap, so that a sort by time would mix them.
    "train": [("a", "1 2", "3", 50), ("a", "1 2 3", "4", 60), ("b", "5", "6", 10)],
    "valid": [("a", "1 2 3 4", "5", 20), ("b", "6 5 4 3 2 1", "2", 70)],
    "test": [("b", "5 6", "1", 30), ("a", "9", "1", 5)],
}


def written(tmp_path, files=FILES, item="item_id", pad=0, time=True):
    folder = tmp_path / "data" / "made"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = [f"user_id:token\t{item}_list:token_seq\t{item}:token" + "\ttimestamp:float" * time]
        for user, history, target, when in rows:
            history = " ".join(history.split() + ["0"] * max(pad - len(history.split()), 0))
            lines.append(f"{user}\t{history}\t{target}" + f"\t{when}" * time)
        (folder / f"made.{name}.inter").write_text("\n".join(lines) + "\n")
    options = {"data_path": str(tmp_path / "data"), "benchmark_filename": list(files), "topk": 1, "state": "WARNING"}
    options |= {"valid_metric": "NDCG@1", "MAX_ITEM_LIST_LENGTH": 4, "show_progress": False, "ITEM_ID_FIELD": item}
    return options


def rows_of(data, part, item="item_id"):
    """``(user, history, target)`` of each row, in raw tokens."""
    rows = part.inter_feat
    users, items = data.field2id_token["user_id"], data.field2id_token[item]
    lengths = rows["item_length"].tolist()
    lists = rows[f"{item}_list"]
    assert lists.shape[1] == 4 and not lists[torch.arange(4) >= rows["item_length"][:, None]].any()
    return [
        (users[user], " ".join(items[history[:length].numpy()]), items[target])
        for user, history, length, target in zip(rows["user_id"], lists, lengths, rows[item])
    ]


def expected(rows):
    return [(user, " ".join(history.split()[-4:]), target) for user, history, target, _ in rows]


@pytest.mark.parametrize("item", ["item_id", "movie_id"])
@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("time", [True, False])
def test_rows_stay_in_their_file_as_they_stand(tmp_path, item, pad, time):
    options = written(tmp_path, item=item, pad=pad, time=time)
    options["load_col"] = {"inter": ["user_id", item] + ["timestamp"] * time}
    data = create_dataset(configure("GRU4Rec", "made", config_dict=options))
    for part, rows in zip(data.build(), FILES.values()):
        assert rows_of(data, part, item) == expected(rows)
    assert data.item_num == 8


def test_an_item_called_0_is_one(tmp_path):
    files = {**FILES, "train": [("a", "0 2", "3", 1), ("a", "1", "0", 2)]}
    data = create_dataset(configure("GRU4Rec", "made", config_dict=written(tmp_path, files)))
    assert rows_of(data, data.build()[0]) == expected(files["train"])


def test_other_features_have_histories_too(tmp_path):
    options = written(tmp_path)
    for name in FILES:
        path = tmp_path / "data" / "made" / f"made.{name}.inter"
        head, *lines = path.read_text().splitlines()
        lines = [
            line + f"\tk{line.split(chr(9))[2]}\t{' '.join('k' + i for i in line.split(chr(9))[1].split())}"
            for line in lines
        ]
        path.write_text("\n".join([head + "\tkind:token\tkind_list:token_seq", *lines]) + "\n")
    options["load_col"] = None
    data = create_dataset(configure("GRU4Rec", "made", config_dict=options))
    for part in data.build():
        items, kinds = (part.inter_feat[name] for name in ("item_id_list", "kind_list"))
        names = np.char.add("k", data.id2token("item_id", items))
        assert (np.where(items == 0, "[PAD]", names) == data.id2token("kind", kinds)).all()


def test_the_times_of_histories_are_whole_seconds(tmp_path):
    options = written(tmp_path)
    first = 1_700_000_000_123
    for name in FILES:
        path = tmp_path / "data" / "made" / f"made.{name}.inter"
        head, *lines = path.read_text().splitlines()
        lengths = [len(line.split("\t")[1].split()) for line in lines]
        times = [" ".join(str(first + 3000 * n) for n in range(length)) for length in lengths]
        lines = ["\t".join(pair) for pair in zip(lines, times)]
        path.write_text("\n".join([head + "\ttimestamp_list:float_seq", *lines]) + "\n")
    options["load_col"] = None
    data = create_dataset(configure("GRU4Rec", "made", config_dict=options))
    for part, rows in zip(data.build(), FILES.values()):
        times = part.inter_feat["timestamp_list"]
        assert times.dtype == torch.int64
        for row, (_, history, _, _) in zip(times.tolist(), rows):
            whole = [first // 1000 + 3 * n for n in range(len(history.split()))][-4:]
            assert row == whole + [0] * (4 - len(whole))


@pytest.mark.parametrize("model", ["GRU4Rec", "Mamba4Rec", "SASRec"])
def test_a_run(tmp_path, model):
    files = {name: rows * 10 for name, rows in FILES.items()}
    result = run_recbole_ssm(model, "made", config_dict={**written(tmp_path, files), "epochs": 2}, saved=False)
    assert 0 <= result["test_result"]["ndcg@1"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"benchmark_filename": ["train", "test"]},
            "benchmark_filename: must be a list of 3",
        ),
        ({"benchmark_filename": "train"}, "benchmark_filename: must be a list of 3"),
        ({"benchmark_filename": ["train", "valid", "last"]}, "no file made.last.inter"),
        ({"LIST_SUFFIX": "_seq"}, "made.train.inter, line 1: no column item_id_seq:token_seq"),
        ({"unload_col": {"inter": ["item_id_list"]}, "load_col": None}, "leave out item_id_list of made.train.inter"),
    ],
)
def test_mistakes(tmp_path, change, message):
    options = {**written(tmp_path), **change}
    with pytest.raises(UserError) as caught:
        create_dataset(configure("GRU4Rec", "made", config_dict=options))
    assert message in str(caught.value)


def test_an_empty_history_is_refused(tmp_path):
    files = {**FILES, "valid": [("a", "0 0", "3", 1)]}
    with pytest.raises(UserError, match="benchmark_filename: row 4 of the files together has no item in item_id_list"):
        create_dataset(configure("GRU4Rec", "made", config_dict=written(tmp_path, files)))
