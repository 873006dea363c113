"""Missing, faulty and downloaded data sets, through the whole configuration."""

import http.server
import io
import logging
import shutil
import threading
import zipfile

import pytest
import torch

from recbole_ssm.data import create_dataset
from recbole_ssm.data.download import download
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure, load_recommender, run_recbole_ssm
from tests.conftest import REPOSITORY

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
GOOD = HEADER + "".join(f"u{u}\ti{(u + t) % 15}\t{t}\n" for u in range(4) for t in range(8))


def create(options, model="GRU4Rec"):
    return create_dataset(configure(model, **options))


def test_a_known_name_without_file_or_network_says_what_where_and_whence(tmp_path, monkeypatch):
    def no_network(url, timeout):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    options = {"dataset": "amazon-beauty", "config_dict": {"data_path": str(tmp_path)}}
    with pytest.raises(UserError) as caught:
        create(options)
    text = str(caught.value)
    assert f"no file amazon-beauty.inter in {tmp_path / 'amazon-beauty'}" in text
    assert "get https://" in text and "Amazon_Beauty.zip" in text and "\n" not in text
    assert list(tmp_path.iterdir()) == []  # nothing half written


def test_an_unknown_name_is_said_to_be_unknown(tmp_path):
    with pytest.raises(UserError, match="no file nosuch.inter in .* knows no download of that name"):
        create({"dataset": "nosuch", "config_dict": {"data_path": str(tmp_path)}})


def test_a_folder_without_inter_is_not_downloaded_over(write_dataset):
    options = write_dataset("item_id:token\n", name="ml-1m", suffix="item")
    with pytest.raises(
        UserError, match="no file ml-1m.inter in .*; put it there .from https.*ml-1m.zip., or set data_path"
    ):
        create(options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "user_id:token\titem:token\ttimestamp:float\nu\ti\t1\n",
            "no column item_id:token (there are user_id, item, timestamp; did you mean 'item'?); rename one",
        ),
        (
            "user_id:token\titem_id:token\nu\ti\n",
            "no column timestamp:float (there are user_id, item_id); rename one, or set TIME_FIELD",
        ),
        (
            "user_id:token\titem_id:float\ttimestamp:float\nu\t1\t1\n",
            "column item_id must be item_id:token, got item_id:float",
        ),
        (HEADER + "u\ti\t1\nu\tj\t2\n", "after filtering no user has 3 interactions"),
    ],
)
def test_faulty_columns_and_empty_remainders(write_dataset, content, message):
    with pytest.raises(UserError) as caught:
        create(write_dataset(content))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_filters_that_leave_nothing(write_dataset):
    options = write_dataset(GOOD)
    options["config_dict"]["user_inter_num_interval"] = "[100,inf)"
    with pytest.raises(UserError, match="dataset made: .*filter") as caught:
        create(options)
    assert "\n" not in str(caught.value)


def test_columns_that_are_asked_for_must_exist(write_dataset):
    options = write_dataset(GOOD)
    options["config_dict"]["load_col"] = {"inter": ["user_id", "item_id", "timestamp", "rating"]}
    with pytest.raises(UserError, match="no column rating, which load_col asks for"):
        create(options)


def test_columns_that_training_needs_cannot_be_left_out(write_dataset):
    options = write_dataset(GOOD)
    options["config_dict"]["load_col"] = {"inter": ["item_id", "timestamp"]}
    with pytest.raises(UserError, match="load_col and unload_col leave out user_id of made.inter"):
        create(options)


def test_encoding_can_be_set(write_dataset):
    options = write_dataset(GOOD.replace("u0", "é"), encoding="latin-1")
    with pytest.raises(UserError, match="not utf-8 text; set encoding"):
        create(options)
    options["config_dict"]["encoding"] = "latin-1"
    assert "é" in create(options).field2token_id["user_id"]
    options["config_dict"]["encoding"] = "latin-99"
    with pytest.raises(UserError, match="encoding: there is no encoding 'latin-99'"):
        create(options)


def test_duplicates_are_removed_in_the_order_of_the_file(write_dataset):
    options = write_dataset(HEADER + "".join(f"u{u}\ti{t}\t5\n" for u in range(3) for t in (*range(20), 3, 2, 1)))
    options["config_dict"]["rm_dup_inter"] = "first"
    _, _, test = create(options).build()
    row = test.inter_feat[0]
    assert [test.id2token("item_id", item) for item in row["item_id_list"].tolist()[:4]] == ["i0", "i1", "i2", "i3"]


def test_doubled_lines_go_and_real_repeats_stay(write_dataset, caplog):
    """The advice on doubled lines keeps what is no doubled line, and is silent once it is followed."""
    options = write_dataset(HEADER + "".join(f"u{u}\ti{t % 4}\t{t}\n" for u in range(3) for t in (*range(9), 5)))
    options["config_dict"] |= {"topk": 1, "valid_metric": "NDCG@1"}
    with caplog.at_level(logging.WARNING):
        assert len(create(options).inter_feat) == 30
    assert "line 11: the same user_id, item_id and timestamp as an earlier line, and 3 such lines in all" in caplog.text
    assert "rm_dup_inter: same_time drops them and keeps other repeats" in caplog.text
    caplog.clear()
    options["config_dict"]["rm_dup_inter"] = "same_time"
    with caplog.at_level(logging.WARNING):
        assert len(create(options).inter_feat) == 27
    assert "as an earlier line" not in caplog.text
    options["config_dict"]["rm_dup_inter"] = "all"
    with pytest.raises(UserError, match="rm_dup_inter: 'all' is not one of None, first, last, same_time"):
        create(options)


def test_cutoffs_beyond_the_catalogue(write_dataset):
    options = write_dataset(GOOD)
    options["config_dict"] |= {"topk": 50, "valid_metric": "NDCG@50"}
    with pytest.raises(UserError, match=r"topk: 50 is more than the 11 items of dataset made; try topk: \[11\]"):
        create(options)


def test_users_with_one_interaction_are_counted_and_skipped(write_dataset, caplog):
    options = write_dataset(GOOD + "lonely\ti1\t3\nalone\ti2\t3\n")
    with caplog.at_level(logging.WARNING):
        data = create(options)
    assert "2 of 6 users have a single interaction" in caplog.text
    train, _, _ = data.build()
    assert len(set(train.inter_feat["user_id"].tolist())) == 4


def test_ties_keep_the_order_of_the_file(write_dataset):
    options = write_dataset(
        HEADER + "".join(f"u{u}\ti{t}\t5\n" for u in range(3) for t in (9, 2, 7, 4, *range(10, 20)))
    )
    _, _, test = create(options).build()
    row = test.inter_feat["item_id_list"][0]
    assert [test.id2token("item_id", item) for item in row[:4].tolist()] == ["i9", "i2", "i7", "i4"]


# --- times ---------------------------------------------------------------------------------------------------------


def last_items(data):
    """The item of the test row of each user."""
    rows = data.build()[2].inter_feat[:]
    return dict(zip(data.id2token("user_id", rows["user_id"]), data.id2token("item_id", rows["item_id"])))


def test_whole_times_beyond_2_to_the_53_keep_their_order(write_dataset):
    start = 1_700_000_000_000_000_000
    lines = [f"u{u}\ti{(u + j) % 15}\t{start + u * 10**6 + j}\n" for u in range(40) for j in range(8)]
    options = write_dataset(HEADER + "".join(reversed(lines)))
    assert last_items(create(options)) == {f"u{u}": f"i{(u + 7) % 15}" for u in range(40)}


@pytest.mark.parametrize("per_second", [1, 10**3, 10**6, 10**9])
@pytest.mark.parametrize("normalize", [False, True])
def test_batches_carry_seconds_whatever_the_file_counts(write_dataset, per_second, normalize):
    lines = [f"u{u}\ti{(u + j) % 15}\t{(1_700_000_000 + j) * per_second + u}\n" for u in range(4) for j in range(8)]
    options = write_dataset(HEADER + "".join(lines))
    options["config_dict"] |= {"normalize_all": normalize, "legacy_time_order": False}
    train, _, test = create(options).build()
    late = [1_700_000_007 + (user if per_second == 1 else 0) for user in range(4)]
    assert test.inter_feat["timestamp"].dtype == torch.int64 and sorted(test.inter_feat["timestamp"].tolist()) == late
    assert train.inter_feat["timestamp_list"].dtype == torch.int64


def test_fractions_and_positions_are_times_too(write_dataset):
    lines = [f"u{u}\ti{(u + j) % 15}\t{j / 4}\n" for u in range(4) for j in range(8)]
    options = write_dataset(HEADER + "".join(reversed(lines)))
    data = create(options)
    assert last_items(data) == {f"u{u}": f"i{(u + 7) % 15}" for u in range(4)}


def test_times_in_two_units_are_noted(write_dataset, caplog):
    lines = [f"u{u}\ti{(u + j) % 15}\t{(1_700_000_000 + j) * (1000 if u else 1)}\n" for u in range(4) for j in range(8)]
    with caplog.at_level(logging.WARNING):
        create(write_dataset(HEADER + "".join(lines)))
    assert (
        "line 2: timestamp is 1700000000, but others are counted in milliseconds since 1970, up to 1700" in caplog.text
    )


def test_filters_by_value_are_exact_or_refused(write_dataset):
    start = 1_700_000_000_000_000_000
    lines = [f"u{u}\ti{(u + j) % 15}\t{start + j}\n" for u in range(4) for j in range(8)]
    options = write_dataset(HEADER + "".join(lines))
    options["config_dict"] |= {"topk": 1, "valid_metric": "NDCG@1", "val_interval": {"timestamp": f"({start + 2},inf)"}}
    assert len(create(options).inter_feat) == 20
    refused = [
        ({"timestamp": ">=3"}, "'>=3' is no interval, in '>=3'; intervals read [3,inf) or (0,1];[3,4)"),
        ({"timestamp": "[3,2]"}, "'[3,2]' is no interval"),
        ({"timestamp": "[1,2];x"}, "'x' is no interval, in '[1,2];x'"),
        ({"time": "[1,2]"}, "val_interval: time is not loaded; see load_col; did you mean 'timestamp'?"),
        (
            {"item_id": "i1"},
            "val_interval: item_id 'i1' is no interval, in 'i1'; intervals read",
        ),
    ]
    for interval, message in refused:
        options["config_dict"]["val_interval"] = interval
        with pytest.raises(UserError) as caught:
            create(options)
        assert message in str(caught.value)
    options["config_dict"] |= {"val_interval": None, "user_inter_num_interval": "[5,inf"}
    with pytest.raises(UserError, match=r"'\[5,inf' is no interval"):
        create(options)


# --- download: a server on loopback stands in for RecBole's -------------------------------------------------------


def archive(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name, text in files.items():
            content.writestr(name.replace("__", "."), text)
    return buffer.getvalue()


@pytest.fixture
def serve():
    """Serve bytes at a URL; ``claimed`` is the length that the header tells."""
    servers = []

    def start(body, claimed=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(claimed or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/Some.zip"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_download_renames_and_is_used(serve, tmp_path, monkeypatch):
    url = serve(archive(Some__inter=GOOD, Some__item="item_id:token\ni1\n", readme__txt="x"))
    monkeypatch.setattr(
        "recbole_ssm.data.dataset.SequentialDataset._get_download_url", lambda self, file, allow_none: url
    )
    data = create({"dataset": "fresh", "config_dict": {"data_path": str(tmp_path / "data")}})
    assert data.item_num == 12
    assert sorted(f.name for f in (tmp_path / "data" / "fresh").iterdir()) == ["fresh.inter", "fresh.item"]
    assert [f.name for f in (tmp_path / "data").iterdir()] == ["fresh"]


def test_of_two_processes_that_download_at_once_the_first_ones_files_stay(serve, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "x"
    url = serve(archive(Some__inter=GOOD))
    unpack = shutil.copyfileobj

    def the_other_is_done_meanwhile(source, target):
        unpack(source, target)
        folder.mkdir()
        (folder / "x.inter").write_text("theirs")

    monkeypatch.setattr(shutil, "copyfileobj", the_other_is_done_meanwhile)
    download(url, folder, "x")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("x.inter", "theirs")]
    assert list((tmp_path / "data").iterdir()) == [folder]


@pytest.mark.parametrize("fault", ["cut short", "no zip", "no inter", "damaged", "encrypted"])
def test_a_bad_download_leaves_nothing(serve, tmp_path, fault):
    good = archive(Some__inter=GOOD)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("Some.inter", GOOD)
    packed = buffer.getvalue()
    start = 30 + len("Some.inter")  # where the local header ends
    locked = bytearray(good)
    locked[6] |= 1
    locked[good.index(b"PK\x01\x02") + 8] |= 1
    body, claimed = {
        "cut short": (good[:-20], len(good)),
        "no zip": (b"<html>not found</html>", None),
        "no inter": (archive(readme__txt="x"), None),
        "damaged": (packed[:start] + b"\xff" * 8 + packed[start + 8 :], None),
        "encrypted": (bytes(locked), None),
    }[fault]
    with pytest.raises((OSError, zipfile.BadZipFile, http.client.IncompleteRead)):
        download(serve(body, claimed), tmp_path / "data" / "x", "x")
    assert list((tmp_path / "data").iterdir()) == []


def test_an_archive_writes_nowhere_else(serve, tmp_path):
    download(
        serve(archive(**{"../../Some.inter": GOOD, "/../Some.item": "item_id:token\n"})), tmp_path / "a" / "x", "x"
    )
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "a",
        "a/x",
        "a/x/x.inter",
        "a/x/x.item",
    }


def test_columns_of_other_names_are_loaded_by_the_keys_that_name_them(toy, tmp_path):
    """The keys of the fields are enough: load_col need not repeat them, and the results are the same."""
    names = {"user_id": "session_id", "item_id": "product", "timestamp": "when"}
    text = (REPOSITORY / "dataset" / "toy" / "toy.inter").read_text()
    for name, other in names.items():
        text = text.replace(f"{name}:", f"{other}:")
    (tmp_path / "data" / "toy").mkdir(parents=True)
    (tmp_path / "data" / "toy" / "toy.inter").write_text(text)
    fields = {"USER_ID_FIELD": "session_id", "ITEM_ID_FIELD": "product", "TIME_FIELD": "when"}
    plain = toy["config_dict"] | {"epochs": 1, "train_rows": 200}
    expected = run_recbole_ssm("GRU4Rec", "toy", config_dict=plain)
    found = run_recbole_ssm("GRU4Rec", "toy", config_dict=plain | fields | {"data_path": str(tmp_path / "data")})
    assert found["test_result"] == expected["test_result"]
    one, other = (load_recommender(result["checkpoint"], device="cpu") for result in (found, expected))
    assert one.recommend(["i3", "i4"]) == other.recommend(["i3", "i4"])


def test_a_given_load_col_stands_as_it_is(toy):
    options = {"USER_ID_FIELD": "session_id", "load_col": {"inter": ["session_id", "item_id", "timestamp", "rating"]}}
    assert configure("GRU4Rec", config_dict=options)["load_col"] == options["load_col"]
    assert configure("GRU4Rec", config_dict={"USER_ID_FIELD": "session_id"})["load_col"] == {
        "inter": ["session_id", "item_id", "timestamp"]
    }
    loaded = configure("GRU4RecF", config_dict={"ITEM_ID_FIELD": "product"})["load_col"]
    assert loaded["item"][0] == "product" and "item_id" not in loaded["inter"]
