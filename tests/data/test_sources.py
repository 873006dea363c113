"""What convert makes of files as people bring them: encodings, sparse objects, headers, and what stands beside."""

import json
import zipfile
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest

from recbole_ssm.commands.histories import events_of
from recbole_ssm.data.convert import convert
from recbole_ssm.data.sources import open_raw
from recbole_ssm.errors import UserError

EVENTS = "user_id,item_id,timestamp\nu,i,1\nu,j,2\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text(EVENTS)
    return tmp_path


def made(here, source="x.csv", **how):
    """The lines of .inter and of .item, each as cells."""
    name = f"made-{len(list(here.glob('dataset/*')))}"
    if "meta" in how:
        how["meta"] = here / how["meta"]
    convert(here / source, name, **how)
    files = (here / "dataset" / name / f"{name}.{suffix}" for suffix in ("inter", "item"))
    return [[line.split("\t") for line in file.read_text("utf-8").split("\n")[:-1]] for file in files if file.exists()]


def refused(here, source="x.csv", **how):
    with pytest.raises(UserError) as caught:
        made(here, source, **how)
    return str(caught.value)


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize(
    ("events", "items", "named"),
    [
        ("utf-8", "latin-1", "latin-1"),
        ("latin-1", "utf-8", "latin-1"),
        ("utf-8", "utf-16", "utf-16"),
        ("utf-16", "utf-8", "utf-16"),
        ("iso-2022-jp", "iso-2022-jp", "iso-2022-jp"),
    ],
)
def test_each_file_is_utf_8_or_as_the_encoding_says(here, events, items, named, sequences):
    user, title = ("ユーザ", "題名") if named == "iso-2022-jp" else ("Käufer", "Crème")
    text = f"{user} i j\n" if sequences else f"user_id,item_id,timestamp\n{user},i,1\n"
    (here / "e.txt").write_text(text, events)
    (here / "m.csv").write_text(f"item,title\ni,{title}\n", items)
    inter, item = made(here, "e.txt", meta="m.csv", encoding=named, sequences=sequences)
    assert (inter[1][0], item[1]) == (user, ["i", title])


def test_ascii_beside_utf_16_is_what_it_looks_like(here):
    (here / "m.csv").write_text("item_id,title\ni,One\n", "utf-16")
    assert made(here, meta="m.csv", encoding="utf-16")[1][1] == ["i", "One"]


def test_json_has_the_keys_of_all_its_objects(here):
    objects = [
        {"item_id": "i", "price": 3, "tags": None},
        {"item_id": "j", "title": "Two", "tags": ["p", "q"]},
    ]
    (here / "m.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects))
    assert made(here, meta="m.jsonl")[1] == [
        ["item_id:token", "price:float", "tags:token_seq", "title:token"],
        ["i", "3", "", ""],
        ["j", "", "p q", "Two"],
    ]
    (here / "x.jsonl").write_text(
        '{"user_id": "u", "item_id": "i", "timestamp": 1}\n'
        '{"user_id": "u", "item_id": "j", "timestamp": 2, "rating": 4, "vote": 7}\n'
    )
    assert made(here, "x.jsonl", keep="vote")[0] == [
        ["user_id:token", "item_id:token", "rating:float", "timestamp:float", "vote:float"],
        ["u", "i", "", "1", ""],
        ["u", "j", "4", "2", "7"],
    ]


def test_json_whose_keys_are_ids_is_refused(here, monkeypatch):
    monkeypatch.setattr("recbole_ssm.data.json_lines.MOST_COLUMNS", 3)
    (here / "m.jsonl").write_text('{"item_id": "i"}\n' + json.dumps(dict.fromkeys("abc", 1)))
    assert "m.jsonl: more than 3 keys; a row must be an object" in refused(here, meta="m.jsonl")


@pytest.mark.parametrize("item", ["sku", "item_id"])
def test_a_table_of_ones_own_may_have_an_asin(here, item):
    (here / "x.csv").write_text(EVENTS.replace("item_id", item))
    (here / "m.jsonl").write_text(json.dumps({"asin": "B00", item: "i", "title": "One", "price": 3, "category": 5}))
    assert made(here, item=item, meta="m.jsonl")[1][1] == ["i", "B00", "One", "3", "5"]
    (here / "m.jsonl").write_text(json.dumps({"asin": "i", "title": "One", "price": 3}))
    assert made(here, item=item, meta="m.jsonl")[1][1] == ["i", "One", "3"]


def test_what_goes_of_amazons_metadata_is_told(here, caplog):
    (here / "meta_x.json").write_text(json.dumps({"asin": "i", "title": "One", "price": 3, "category": ["a"]}))
    assert made(here)[1][1] == ["i", "One", "a", ""]
    assert "title, categories and brand are kept; price go; with --meta and --meta_item" in caplog.text


def test_a_sequence_without_its_user_is_a_fault(here):
    (here / "q.txt").write_text("1\t12\t 7\t \n\t12\t7\n")
    assert refused(here, "q.txt", sequences=True, separator="\t").endswith(
        "q.txt, line 2: user is empty; fill it in or drop the line"
    )
    inter = made(here, "q.txt", sequences=True, separator="\t", on_bad_lines="skip")[0]
    assert [line[:2] for line in inter[1:]] == [["1", "12"], ["1", "7"]]


@pytest.mark.parametrize(
    "named", [{"user": "userId"}, {"time": "timestamp", "item": "movieId", "user": "userId"}, {"separator": ","}]
)
def test_movielens_keeps_its_titles_where_its_columns_are_named(here, named):
    (here / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3,4\n")
    (here / "movies.csv").write_text("movieId,title,genres\n2,Ä (1995),Action\n", "utf-8")
    assert made(here, "ratings.csv", **named)[1][1] == ["2", "Ä", "1995", "Action"]


def test_movielens_keeps_its_titles_where_the_places_of_its_columns_are_given(here):
    (here / "ratings.dat").write_text("1::2::3::4\n")
    (here / "movies.dat").write_text("2::Ä (1995)::Action\n", "latin-1")
    assert made(here, "ratings.dat", user="1", item="2", time="4")[1][1] == ["2", "Ä", "1995", "Action"]


def test_an_option_without_meaning_is_refused(here):
    (here / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3,4\n")
    (here / "x.jsonl").write_text('{"user_id": "u", "item_id": "i", "timestamp": 1}\n')
    message = "--meta_item: MovieLens describes its items itself, in movies.csv; drop --meta_item sku"
    assert refused(here, "ratings.csv", meta_item="sku") == message
    for source in ("ratings.csv", "x.jsonl"):
        message = refused(here, source, separator=";")
        assert message.startswith("--separator: ") and message.endswith("; drop --separator ;")


@pytest.mark.parametrize("first", ["0,1,2", ",0,1,2", "0,1,2,3"])
def test_the_numbers_that_pandas_gives_columns_are_a_header(here, first):
    places = {"user": "1", "item": "2", "time": "3"} if first[0] == "0" else {"user": "2", "item": "3", "time": "4"}
    row = first.replace("2", "978300000").replace("0,1,", "u,i,")
    (here / "x.csv").write_text(f"{first}\n{row}\n")
    message = refused(here, **places)
    assert "x.csv, line 1: 0, 1, 2 ... is the header that pandas gives a table without names; drop that line" in message
    (here / "x.csv").write_text(f"{first.replace('2', '2.0')}\n{row}\n")
    assert len(made(here, **places)[0]) == 3


@pytest.mark.parametrize(
    "header", ["User_ID,Item_ID,Timestamp", "user_id, item_id, timestamp", 'user_id , "item_id", "timestamp"']
)
@pytest.mark.parametrize("row", ["u, i, 1", 'u, "i", 1'])
def test_blanks_and_capitals_in_a_header(here, header, row):
    """Where the header has blanks behind its commas, those of the rows are no part of ids."""
    row = row if " " in header else row.replace(" ", "")
    (here / "x.csv").write_text(f"{header}\n{row}\nu,j,2\n")
    assert made(here)[0][1:] == [["u", "i", "1"], ["u", "j", "2"]]


def test_a_long_cell_between_quotation_marks_is_read(here):
    (here / "x.csv").write_text(f'user_id,item_id,timestamp,text\nu,i,1,"{"a" * 200_000}\nb"\nu,j,2,"c"\n')
    assert made(here)[0][1:] == [["u", "i", "1"], ["u", "j", "2"]]


def test_quotation_marks_that_quote_nothing_between_tabs(here):
    """As in the news of MIND; between commas they would leave the columns open."""
    titles = ['"Heroes" by B', '"Low', '"a\tb"', "c"]
    rows = [f"u\ti{k}\t{k}\t{title}\tx\n" for k, title in enumerate(titles)]
    (here / "x.tsv").write_text("user_id\titem_id\ttimestamp\ttitle\tz\n" + "".join(rows))
    assert [line[1] for line in made(here, "x.tsv", text="title")[1][1:]] == ['"Heroes" by B', '"Low', "a b", "c"]
    (here / "x.csv").write_text('user_id,item_id,timestamp,title\nu,i,1,"Heroes" by B\n')
    assert "x.csv, line 2: not a row of cells" in refused(here)


def test_a_quotation_mark_that_stands_open_between_tabs_takes_no_rows_along(here):
    titles = ['"Low', "a", 'TV 55"', "c"]
    rows = [f"u\ti{k}\t{k}\t{title}\tx\n" for k, title in enumerate(titles)]
    (here / "x.tsv").write_text("user_id\titem_id\ttimestamp\ttitle\tz\n" + "".join(rows))
    assert [line[1] for line in made(here, "x.tsv", text="title")[1][1:]] == titles
    (here / "y.tsv").write_text('u\ti\t1\t"Heroes" by B\nu\tj\t2\tc\n')
    assert made(here, "y.tsv", user="1", item="2", time="3")[0][1:] == [["u", "i", "1"], ["u", "j", "2"]]


def test_no_column_of_a_table_that_was_found_beside_the_events(here):
    (here / "meta_x.json").write_text('{"sku": "i", "title": "One"}\n')
    assert refused(here).endswith("meta_x.json has no column 'item_id' (there are sku, title); name it by --meta_item")
    assert open_raw(here / "x.csv", {}, items=False).items is None


def test_the_items_are_found_in_an_archive(here):
    with zipfile.ZipFile(here / "m.zip", "w") as archive:
        archive.writestr("meta_x.jsonl", '{"item_id": "i", "title": "One"}\n')
        archive.writestr("other.csv", EVENTS)
    assert made(here, meta="m.zip")[1][1] == ["i", "One"]


def test_hidden_folders_hold_no_data(here):
    for path in (here / "data" / "x.csv", here / "data" / ".ipynb_checkpoints" / "x-checkpoint.csv"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(EVENTS)
    assert len(made(here, "data")[0]) == 3


def test_a_time_within_an_object_that_no_calendar_has(here):
    times = pa.array([{"t": 10**18}, None], pa.struct([("t", pa.timestamp("us"))]))
    pyarrow.parquet.write_table(pa.table({"item_id": ["i", "j"], "m": times}), here / "m.parquet")
    assert "m.parquet: column 'm' (struct<t: timestamp[us]>) cannot be read as text" in refused(here, meta="m.parquet")


def test_half_a_character_in_a_key(here):
    (here / "m.jsonl").write_text('{"item_id": "i"}\n{"item_id": "j", "\\ud800": "One"}\n')
    assert "m.jsonl, line 2: no JSON object" in refused(here, meta="m.jsonl")


def test_maps_decimals_and_indices_of_parquet(here):
    maps = pa.array([[("brand", "Big Co"), ("x", "y")], None], pa.map_(pa.string(), pa.string()))
    prices = pa.array([Decimal("7.00"), Decimal("8.50")], pa.decimal128(10, 2))
    columns = {"item_id": ["i", "j"], "price": prices, "facts": maps, "__index_level_0__": [5, 9]}
    pyarrow.parquet.write_table(pa.table(columns), here / "m.parquet")
    assert made(here, meta="m.parquet")[1] == [
        ["item_id:token", "price:float", "facts:token"],
        ["i", "7", '{"brand":"Big Co","x":"y"}'],
        ["j", "8.50", ""],
    ]


@pytest.mark.parametrize("quote", ["", '"'])
def test_columns_without_names_are_no_fault(here, quote):
    (here / "x.csv").write_text(f"user_id,item_id,timestamp,,\nu,{quote}i{quote},1,2,3\n")
    (here / "m.csv").write_text("item_id,,title,\ni,,One,\n")
    inter, item = made(here, meta="m.csv")
    assert (inter[1], item[1]) == (["u", "i", "1"], ["i", "One"])


def test_faults_of_a_header(here):
    (here / "x.csv").write_text('user_id,item_id,"time\n(UTC)"\nu,i,1\n')
    assert "x.csv, line 1: not a row of cells" in refused(here)
    (here / "x.csv").write_text("\n" + EVENTS)
    assert "x.csv: the file is empty, or its first line, which must name the columns" in refused(here)
    (here / "x.csv").write_text(EVENTS)
    assert "--user and --item both name column 'user_id' of" in refused(here, user="user_id", item="user_id")
    (here / "x.csv").write_text("1,2,5,978300000\n")
    assert refused(here).endswith("name its columns by --user and --item, or give their places, as --user=1 --item=2")


def test_an_atomic_file_keeps_its_types_and_what_stands_beside(here):
    (here / "t.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\tzip:token\ttags:float_seq\nu\ti\t1\t4711\t1 2\n"
    )
    (here / "t.item").write_text('item_id:token\tshelf:token\tsizes:float_seq\tprice:float\ni\t07\t1 "2"\tfree\n')
    inter, item = made(here, "t.inter", keep="zip,tags")
    assert inter[0][3:] == ["zip:token", "tags:float_seq"]
    # Its first column could be numbers, and the last two are not what they are called.
    assert item == [["item_id:token", "shelf:token", "sizes:token_seq", "price:token"], ["i", "07", '1 "2"', "free"]]
    (here / "m.item").write_text("item_id:token\tshelf:token\tsizes:float_seq\ni\t7\t1 2\n")
    assert made(here, meta="m.item")[1][0] == ["item_id:token", "shelf:token", "sizes:float_seq"]


@pytest.mark.parametrize("names", ["user_id,item_id,timestamp", "userId,movieId,timestamp"])
def test_a_rating_that_nobody_named_is_no_fault(here, names, caplog):
    (here / "r.csv").write_text(f"{names},rating\nu,i,1,5\nu,j,2,-\nu,k,3,inf\nu,l,4,\nu,m,5,4.5\n")
    assert [line[2] for line in made(here, "r.csv")[0]] == ["rating:float", "5", "", "", "", "4.5"]
    assert "r.csv: 2 cells of column 'rating' are no numbers and count as missing; where it is named" in caplog.text
    assert refused(here, "r.csv", rating="rating").startswith(f"{here / 'r.csv'}, line 3: rating is '-', which is no")
    (here / "r.csv").write_text(f"{names},rating\nu,i,1,PG-13\nu,j,2,G\n")
    assert made(here, "r.csv")[0][0] == ["user_id:token", "item_id:token", "timestamp:float"]


def test_histories_need_no_items(here):
    (here / "meta_x.json").write_text('{"sku": "i", "title": "One"}\n')
    assert events_of(here / "x.csv").users == ["u"]
    (here / "ratings.csv").write_text("userId,movieId,rating,timestamp\nu,i,5,1\n")
    (here / "movies.csv").write_text("id,title\ni,One\n")
    assert events_of(here / "ratings.csv").users == ["u"]


OTHERS = [
    ("ratings.csv", "userId,movieId,timestamp\nu,i,1\n", ("userId", "movieId", "timestamp"), None),
    ("ratings.csv", "userId;movieId;rating;timestamp\nu;i;5;1\n", ("userId", "movieId", "timestamp"), ";"),
    ("ratings.csv", "userId, movieId, rating, timestamp\nu, i, 5, 1\n", (), None),
    ("ratings.dat", "u\ti\t5\t1\n", ("1", "2", "4"), None),
    ("ratings.dat", "u,i,5,1\n", ("1", "2", "4"), ","),
    ("u.data", "u i 5 1\n", ("1", "2", "4"), None),
]


@pytest.mark.parametrize(("name", "text", "columns", "separator"), OTHERS)
def test_another_table_called_as_one_of_movielens(here, name, text, columns, separator):
    (here / name).write_text(text)
    named = dict(zip(("user", "item", "time"), columns))
    line = made(here, name, separator=separator, **named)[0][1]
    assert (line[:2], line[-1]) == (["u", "i"], "1")


def test_an_item_file_that_describes_something_else_is_left_out(here, caplog):
    (here / "t.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
    (here / "t.item").write_text("sku:token\tshelf:token\ni\t07\n")
    assert len(made(here, "t.inter")) == 1 and "t.item: left out, for it has no column 'item_id'" in caplog.text


def test_a_rating_of_json_that_nobody_named_may_be_anything(here):
    (here / "x.jsonl").write_text("".join(
        f'{{"user_id": "u", "item_id": "{item}", "timestamp": 1, "rating": {rating}}}\n'
        for item, rating in (("i", "5"), ("j", "4"), ("k", '{"v": 5}'))
    ))  # fmt: skip
    assert [line[2] for line in made(here, "x.jsonl")[0][1:]] == ["5", "4", ""]
