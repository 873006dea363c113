"""Every raw format there and back, the card, and what is refused."""

import gzip
import hashlib
import io
import json
import random
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from recbole_ssm.cli import main
from recbole_ssm.data import create_dataset
from recbole_ssm.data.archives import File
from recbole_ssm.data.atomic import as_frame, read_columns, read_header
from recbole_ssm.data.convert import convert
from recbole_ssm.data.lines import BadLines
from recbole_ssm.data.parquet import Parquet
from recbole_ssm.data.times import Moments
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure


def ratings(amazon=False):
    """Some ``(user, item, rating, time)``, users in order of first appearance, with ties and repeated pairs."""
    draw = random.Random(7)
    rows = []
    for user in (5, 2, 9, 1):
        for _ in range(draw.randint(4, 9)):
            rows.append((user, draw.randint(1, 6), draw.choice([0.5, 4.0, 5.0]), 978300000 + draw.randint(0, 5)))
    if amazon:
        rows = [(f"A{user:013d}X", f"B00{item:07d}", rating, time) for user, item, rating, time in rows]
    return [(str(user), str(item), rating, time) for user, item, rating, time in rows]


def expected(rows):
    """The rows as they must stand in .inter: by user as they first appear, then by time, then by row."""
    users = list(dict.fromkeys(row[0] for row in rows))
    return sorted(rows, key=lambda row: (users.index(row[0]), row[3]))


def written(folder, suffix="inter"):
    path = folder / f"{folder.name}.{suffix}"
    frame = as_frame(read_columns(path, read_header(path)))
    return [tuple(row) for row in frame.itertuples(index=False)]


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


TITLES = {str(k): f"Film {k}, The" for k in range(1, 9)}
FLAGS = "|".join("1" if k in (1, 5) else "0" for k in range(19))


def movielens(kind, rows):
    """``(file names with contents)`` of a release of MovieLens."""
    if kind == "100k":
        return {
            "ml-100k/u.data": "".join(f"{u}\t{i}\t{r:g}\t{t}\n" for u, i, r, t in rows),
            "ml-100k/u.item": "".join(
                f"{i}|{title} é (1995)|01-Jan-1995||http://x|{FLAGS}\n" for i, title in TITLES.items()
            ).encode("latin-1"),
        }
    if kind in ("1m", "10m"):
        return {
            f"ml-{kind}/ratings.dat": "".join(f"{u}::{i}::{r:g}::{t}\n" for u, i, r, t in rows),
            f"ml-{kind}/movies.dat": "".join(
                f"{i}::{title} é (1995)::Action|Children's\n" for i, title in TITLES.items()
            ).encode("latin-1" if kind == "1m" else "utf-8"),
        }
    return {
        f"ml-{kind}/ratings.csv": "userId,movieId,rating,timestamp\r\n"
        + "".join(f"{u},{i},{r},{t}\r\n" for u, i, r, t in rows),
        f"ml-{kind}/movies.csv": "movieId,title,genres\r\n"
        + "".join(f'{i},"{title} é (1995)",Action|Children\'s\r\n' for i, title in TITLES.items()),
        "__MACOSX/._ratings.csv": "x",
    }


@pytest.mark.parametrize("kind", ["100k", "1m", "10m", "20m", "32m"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_movielens(tmp_path, kind, unpacked):
    rows = ratings()
    source = zipped(tmp_path / "ml.zip", movielens(kind, rows))
    if unpacked:
        zipfile.ZipFile(source).extractall(tmp_path / "ml")
        source = tmp_path / "ml" / f"ml-{kind}"
    card = convert(source, "ml", tmp_path / "out")
    assert written(tmp_path / "out" / "ml") == expected(rows)
    assert card["kind"] == "MovieLens"
    seen = {row[1] for row in rows}
    assert {
        row[0]: (" ".join(row[1]), row[2], " ".join(row[3])) for row in written(tmp_path / "out" / "ml", "item")
    } == {
        item: (f"{TITLES[item]} é", "1995", "Action Children's" if kind != "100k" else "Action Comedy") for item in seen
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("year", [2014, 2018, 2023])
@pytest.mark.parametrize("form", ["ratings", "reviews"])
def test_amazon(tmp_path, form, year, packed):
    rows = ratings(amazon=True)
    keys = ("user_id", "parent_asin") if year == 2023 else ("reviewerID", "asin")
    rest = ("rating", "timestamp") if year == 2023 else ("overall", "unixReviewTime")
    if form == "ratings":
        name = "Beauty.csv"
        text = "user_id,parent_asin,rating,timestamp\n" if year == 2023 else ""
        text += "".join(f"{i},{u},{r},{t}\n" if year == 2018 else f"{u},{i},{r},{t}\n" for u, i, r, t in rows)
    else:
        name = "Beauty.jsonl" if year == 2023 else "reviews_Beauty_5.json"
        objects = [dict(zip((*keys, *rest), row), text="so\ngood", images=[{"x": None}]) for row in rows]
        text = "".join(json.dumps(one) + "\n" for one in objects)
    item = {"title": "Crème <b>\t7", "brand": "O P I", "price": 3.5}
    item |= {2014: {"categories": [["Beauty", "Nails"], ["Beauty"]]}, 2018: {"category": ["Beauty", "Nails"]}}.get(
        year, {"categories": ["Beauty", "Nails"], "store": "O P I"}
    )
    described = [{keys[1]: asin, **item} for asin in [*sorted({row[1] for row in rows}), "B00NOBODY00"]]
    meta = "".join((repr(one) if year == 2014 else json.dumps(one)) + "\n" for one in described)  # 2014 is Python
    for file, content in ((name, text), (f"meta_Beauty{'.jsonl' if year == 2023 else '.json'}", meta)):
        packing = gzip.compress(content.encode()) if packed else content.encode()
        (tmp_path / (file + ".gz" * packed)).write_bytes(packing)
    card = convert(tmp_path / (name + ".gz" * packed), "beauty", tmp_path / "out")
    assert written(tmp_path / "out" / "beauty") == expected(rows)
    assert str(year) in card["kind"] and len(card["source"]) == 2
    items = written(tmp_path / "out" / "beauty", "item")
    assert {row[0] for row in items} == {row[1] for row in rows}
    assert {(" ".join(row[1]), " ".join(row[2]), row[3]) for row in items} == {
        ("Crème <b> 7", "Beauty, Nails", "O P I")
    }


def test_metadata_of_odd_shapes(tmp_path):
    rows = ratings(amazon=True)
    (tmp_path / "B.csv").write_text("".join(f"{u},{i},{r},{t}\n" for u, i, r, t in rows))
    odd = [
        {"categories": {"a": 1}},
        {"categories": "x"},
        {"categories": [1, ["y", None]]},
        {"title": [1]},
        {"title": 7},
        {},
    ]
    seen = sorted({row[1] for row in rows})
    meta = [{"asin": asin, **one} for asin, one in zip(seen, odd)] + [{"asin": seen[0], "title": "again"}]
    (tmp_path / "other.json").write_text("".join(json.dumps(one) + "\n" for one in meta))
    convert(tmp_path / "B.csv", "b", tmp_path / "out", meta=tmp_path / "other.json")
    found = [(" ".join(row[1]), " ".join(row[2])) for row in written(tmp_path / "out" / "b", "item")]
    assert found == [("again", ""), ("", ""), ("", "1, y, None"), ("1", ""), ("7", "")]
    (tmp_path / "other.json").write_text('{"asin": 5, "category": []}\n')
    with pytest.raises(UserError, match="other.json, line 1: neither parent_asin nor asin"):
        convert(tmp_path / "B.csv", "c", tmp_path / "out", meta=tmp_path / "other.json")


@pytest.mark.parametrize("form", ["csv", "quoted", "tsv", "semicolon", "parquet", "dates", "inter", "utf-16"])
def test_tables(tmp_path, form):
    rows = [(f"ü {u}", i, r, t) for u, i, r, t in ratings()]
    columns = {"who": [r[0] for r in rows], "what": [r[1] for r in rows], "stars": [r[2] for r in rows]}
    columns |= {"when": [row[3] for row in rows], "title": [f'the "{row[1]}"\nof all, 1' for row in rows]}
    named = {"user": "who", "item": "what", "time": "when", "rating": "stars", "text": "title"}
    path = tmp_path / {"parquet": "x.parquet", "tsv": "x.tsv", "inter": "x.inter"}.get(form, "x.csv")
    cut = {"tsv": "\t", "semicolon": ";", "inter": "\t"}.get(form, ",")
    encoding = "utf-16" if form == "utf-16" else "utf-8"
    if form in ("parquet", "dates"):
        columns["when"] = pa.array(columns["when"], pa.timestamp("s", "UTC"))
    if form == "parquet":
        pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=3)
    else:
        if form == "dates":
            columns["when"] = [f"{time:%Y-%m-%dT%H:%M:%SZ}" for time in columns["when"].to_pylist()]
        if form == "inter":
            named = {}
            columns = dict(zip(("user_id:token", "item_id:token", "rating:float", "timestamp:float"), columns.values()))
        elif form not in ("quoted", "dates", "utf-16"):
            columns.pop("title"), named.pop("text")
        quote = (
            str if form not in ("quoted", "dates", "utf-16") else lambda cell: '"' + str(cell).replace('"', '""') + '"'
        )
        lines = [list(columns), *zip(*columns.values())]
        path.write_bytes("".join(cut.join(map(quote, line)) + "\n" for line in lines).encode(encoding))
    before = path.read_bytes()
    convert(path, "made", tmp_path / "out", encoding=encoding, **named)
    assert written(tmp_path / "out" / "made") == expected(rows)
    assert path.read_bytes() == before
    if "text" in named:
        titles = {row[0]: " ".join(row[1]) for row in written(tmp_path / "out" / "made", "item")}
        assert titles == {item: f'the "{item}" of all, 1' for item in {row[1] for row in rows}}


def test_filters_and_card(tmp_path):
    """5-core after the first of each pair; the card counts each step and vouches for what was written."""
    rows = [(f"u{u}", f"i{i}", 1.0, 100 - t) for u in range(6) for t, i in enumerate([*range(u, 6), u, 0])]
    source = tmp_path / "x.csv"
    source.write_text("user_id,item_id,rating,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    card = convert(source, "core", tmp_path / "out", k_core=3, duplicates="first")
    assert [step["step"] for step in card["steps"]] == ["read", "first of each user and item", "3-core"]
    assert [step["interactions"] for step in card["steps"]] == [33, 26, len(written(tmp_path / "out" / "core"))]
    assert card["source"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    folder = tmp_path / "out" / "core"
    assert card == json.loads((folder / "core.card.json").read_text())
    assert set(card["written"]) | {"core.card.json"} == {path.name for path in folder.iterdir()}
    for name, made in card["written"].items():
        assert made == {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
    options = {"data_path": str(tmp_path / "out"), "topk": 1, "valid_metric": "NDCG@1"}
    data = create_dataset(configure("GRU4Rec", "core", config_dict=options))
    assert (data.user_num - 1, data.item_num - 1, len(data.inter_feat)) == tuple(
        card["steps"][-1][key] for key in ("users", "items", "interactions")
    )


BAD = [
    ("x.csv", "a,b,c\n1,2,3\n", "name its columns by --user, --item, --time (there are a, b, c)"),
    ("x.csv", "", "x.csv: the file is empty"),
    ("x.csv", "user_id,item_id,timestamp,user_id\nu,i,1,v\n", "x.csv, line 1: column 'user_id' stands twice"),
    ("x.csv", "user_id,item_id,timestamp\n", "x.csv: no event in it"),
    ("x.csv", "user_id,item_id,timestamp\nu,i,1\nu,i\n", "x.csv, line 3: 2 columns where the header has 3"),
    ("x.csv", 'user_id,item_id,timestamp\nu,"i,1\nu,i,2\n', "x.csv, line 2: not a row of cells"),
    ("x.csv", "user_id,item_id,timestamp\nu,i,1\nu,,2\n", "x.csv, line 3: item_id is empty"),
    ("x.csv", "user_id,item_id,timestamp\nu,i,soon\n", "x.csv, line 2: timestamp is 'soon', which is no finite number"),
    ("x.csv", 'user_id,item_id,timestamp\nu,"i\tj",1\n', "line 2: item_id is 'i\\tj', with a character that no atomic"),
    ("x.csv", b'user_id,item_id,timestamp\n"u",\xff,1\n', "x.csv, line 2: not utf-8 text"),
    ("x.csv", "A123456789,A987654321,5.0,1369699200\n", "'A123456789' and 'A987654321' do not tell user from item"),
    ("x.csv", "AA,BB,5.0,1369699200\n", "line 1: no header, and 'AA' and 'BB' do not tell user from item"),
    ("x.jsonl", '{"user_id": "u", "parent_asin": "i", "timestamp": 1}\n{bad}\n', "x.jsonl, line 2: no JSON object"),
    (
        "x.jsonl",
        '{"user_id": "u", "parent_asin": "i", "timestamp": 1}\n{"user_id": "u"}\n',
        "line 2: parent_asin is empty",
    ),
    ("x.jsonl", '{"user_id": "\\ud800", "parent_asin": "i", "timestamp": 1}\n', "x.jsonl, line 1: half a character"),
    ("x.jsonl", "[" * 100_000, "x.jsonl, line 1: no JSON object"),
    ("x.jsonl", "{1: 2}\n", "x.jsonl, line 1: no JSON object"),
    ("x.json", '[{"user_id": "u"}]', "write one a line, as pandas does by to_json(orient='records', lines=True)"),
    (
        "x.json",
        '{"user_id": {"0": "u"}, "item_id": {"0": "i"}, "timestamp": {"0": 1}}',
        "lists or objects, and each row",
    ),
    (
        "x.jsonl",
        '{"user_id": "u", "parent_asin": "i", "timestamp": 1}\n{"user_id": "u", "parent_asin": ["i"]}\n',
        "line 2: parent_asin is a list or an object, 'i', where one value must stand",
    ),
    (
        "x.jsonl",
        '{"user_id": "u", "parent_asin": "i", "timestamp": 1}\n'
        '{"user_id": "u", "parent_asin": "i", "timestamp": {"$date": 2}}\n',
        """line 2: timestamp is a list or an object, '{"$date":2}', where one value must stand""",
    ),
    (
        "x.csv",
        "user_id,item_id,timestamp\nu,i,1\n".encode("utf-16"),
        "not utf-8 text; set encoding to what the file is written in, such as --encoding=utf-16",
    ),
    ("x.jsonl", "__import__('os').mkdir('went-off')\n", "x.jsonl, line 1: no JSON object"),
    ("x.parquet", "PAR1 no", "x.parquet: no readable Parquet file"),
    (
        "x.csv.gz",
        gzip.compress(b"user_id,item_id,timestamp\nu,i,1\n" * 99, mtime=0)[:-9],
        "x.csv.gz: damaged or cut short",
    ),
    ("x.csv.gz", b"user_id,item_id,timestamp\nu,i,1\n", "x.csv.gz: damaged or cut short"),
    ("x.zip", b"PK\x03\x04 cut", "x.zip: no zip archive, or one that is cut short"),
    ("x.doc", "x", "x.doc: what file is this? known are .csv"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_sources_are_one_line_and_leave_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        convert(tmp_path / name, "made", tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "went-off").exists()


def test_bad_lines_can_be_skipped(tmp_path):
    text = 'user_id,item_id,timestamp\nu,"i",1\nu,i\n\nu,"a\nb",2\nu,j,x\n"u"x,i,3\nu,"k",4\n'
    (tmp_path / "x.csv").write_text(text)
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", on_bad_lines="skip")
    assert written(tmp_path / "out" / "made") == [("u", "i", 1.0), ("u", "k", 4.0)]
    assert card["skipped_lines"] == 6
    skipped = (tmp_path / "out" / "made" / "made.skipped").read_text()
    assert sorted(line.split("\t")[0] for line in skipped.splitlines()) == ["3", "4", "5", "6", "7", "8"]


@pytest.mark.parametrize("later", ["", 'u2000,"i2000",1600002000', '"u2000","",1600002000'])
def test_a_stray_quotation_mark_costs_its_own_line(tmp_path, later):
    lines = [f"u{row},i{row},{1_600_000_000 + row}" for row in range(3000)]
    stray = lines[9] = 'u9,"i9,1600000009'
    lines[2000] = later or lines[2000]
    (tmp_path / "x.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", on_bad_lines="skip")
    empty = '""' in later
    assert (len(written(tmp_path / "out" / "made")), card["skipped_lines"]) == (2999 - empty, 1 + empty)
    skipped = (tmp_path / "out" / "made" / "made.skipped").read_text().splitlines()
    assert [line.split("\t")[::2] for line in skipped] == [["11", stray], ["2002", later]][: 1 + empty]


def test_a_row_of_quoted_cells_is_not_read_without_bound(tmp_path):
    """Each of its cells is short, so that the longest cell that is allowed does not end it."""
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,1\n" + 'x","z\n' * 200_000 + 'x",y\n')
    with pytest.raises(UserError, match="line 3: not a row of cells .unexpected end of data.; correct it or drop it"):
        convert(tmp_path / "x.csv", "made", tmp_path / "out")


def test_lines_behind_stray_quotation_marks_are_not_read_again_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_ssm.data.text_tables.MOST_AGAIN", 10_000)
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,1\n" + 'a","\n' * 2000)
    with pytest.raises(UserError, match=r"x.csv, line \d+: here as in many lines before, a quotation mark stands open"):
        convert(tmp_path / "x.csv", "made", tmp_path / "out", on_bad_lines="skip")
    assert not (tmp_path / "out" / "made").exists()


@pytest.mark.parametrize("separator", ["::", "§", ";"])
def test_skipped_lines_are_kept_as_they_stand(tmp_path, separator):
    lines = [line.replace(",", separator) for line in ("user_id,item_id,timestamp", "é,i,1", "é,j", "é,k,soon")]
    (tmp_path / "x.csv").write_bytes("\n".join(lines).encode("latin-1"))
    options = {"separator": separator, "encoding": "latin-1", "out": tmp_path / "out"}
    with pytest.raises(UserError, match=f"line 3: 2 columns where the header has 3: 'é{separator}j'"):
        convert(tmp_path / "x.csv", "made", **options)
    convert(tmp_path / "x.csv", "made", on_bad_lines="skip", **options)
    assert written(tmp_path / "out" / "made") == [("é", "i", 1.0)]
    skipped = (tmp_path / "out" / "made" / "made.skipped").read_text("latin-1").splitlines()
    assert [line.split("\t")[::2] for line in skipped] == [["3", lines[2]], ["4", lines[3]]]


def test_a_line_that_is_read_twice_is_skipped_once(tmp_path):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp,words\nu,i,1,one\nu,i\nu,j,2,two\nu,k,soon,three\n")
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", text="words", on_bad_lines="skip")
    assert (card["skipped_lines"], card["described_items"]) == (2, 2)
    assert list(card["written"]) == ["made.inter", "made.item", "made.skipped"]
    assert [row[0] for row in written(tmp_path / "out" / "made", "item")] == ["i", "j"]


def test_one_description_of_the_items(tmp_path):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp,words\nu,i,1,one\n")
    (tmp_path / "meta_x.json").write_text('{"asin": "i", "title": "other"}\n')
    (tmp_path / "strange.json").write_text('{"asin": "j", "title": "other"}\n')
    convert(tmp_path / "x.csv", "made", tmp_path / "out", text="words")
    assert [tuple(row[1]) for row in written(tmp_path / "out" / "made", "item")] == [("one",)]
    with pytest.raises(UserError, match="--text words and --meta .* both describe the items"):
        convert(tmp_path / "x.csv", "both", tmp_path / "out", meta=tmp_path / "meta_x.json", text="words")
    with pytest.raises(UserError, match="strange.json: describes none of the items"):
        convert(tmp_path / "x.csv", "none", tmp_path / "out", meta=tmp_path / "strange.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["made"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_nothing_of_a_nested_cell_is_lost(tmp_path, form):
    """The first line decides nothing: its cells are empty here."""
    columns = {"user_id": ["u"] * 3, "item_id": ["i", "j", "k"], "timestamp": [1, 2, 3], "new": [None, True, False]}
    columns |= {"tags": [None, ["x", "y"], []], "where": [None, {"at": "a b"}, None]}
    columns |= {"paths": [None, [["p", "q"], ["r"]], []]}
    if form == "parquet":
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    else:
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(tmp_path / f"x.{form}", "made", tmp_path / "out", keep="new,tags,where,paths")
    lines = (tmp_path / "out" / "made" / "made.inter").read_text().splitlines()
    types = [column.partition(":")[2] for column in lines[0].split("\t")[3:]]
    assert types[2:] == ["token", "token_seq"]
    assert [line.split("\t")[3:] for line in lines[1:]] == [
        ["", "", "", ""],
        ["true", "x y", '{"at":"a b"}', '["p","q"] ["r"]'],
        ["false", "", "", ""],
    ]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "objects", [[{"brand": "Big Co"}, None], [None, {"brand": "Big Co"}], [{}, {"brand": "Big Co"}]]
)
def test_an_object_is_one_token(tmp_path, form, objects):
    """A ``token_seq`` would cut its JSON at blanks."""
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,1\nu,j,2\n")
    rows = [{"item_id": item, "maker": maker, "tags": ["a b"]} for item, maker in zip("ij", objects)]
    if form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    else:
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(tmp_path / "x.csv", "made", tmp_path / "out", meta=tmp_path / f"items.{form}")
    path = tmp_path / "out" / "made" / "made.item"
    assert read_header(path) == {"item_id": "token", "maker": "token", "tags": "token_seq"}
    assert '{"brand":"Big Co"}' in {row[1] for row in written(tmp_path / "out" / "made", "item")}


@pytest.mark.parametrize("kind", [pa.binary(), pa.binary(2), pa.string()])
def test_a_column_of_parquet_that_is_no_text_is_named(tmp_path, kind):
    users = pa.array([b"ab", b"\xff\xff"], pa.binary() if kind == pa.string() else kind)
    if kind == pa.string():
        users = pa.Array.from_buffers(kind, 2, users.buffers())
    columns = {"user_id": users, "item_id": ["i", "j"], "timestamp": [1, 2]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="column 'user_id' .* cannot be read as text .*; write it as strings in UTF-8"):
        convert(tmp_path / "x.parquet", "made", tmp_path / "out")


def test_long_cells_of_parquet_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_ssm.data.parquet.BYTES", 10_000)
    columns = {"item_id": [f"i{k}" for k in range(50)], "html": [f"{k:01000d}" for k in range(50)]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet", use_dictionary=False)
    table = Parquet(File(tmp_path / "x.parquet"))
    sizes = [len(rows.numbers) for rows in table.rows({name: name for name in columns}, BadLines("x"))]
    assert sum(sizes) == 50 and max(sizes) <= 10


def test_parquet_of_nanoseconds_and_bytes(tmp_path):
    columns = {"user_id": pa.array([b"u", b"v"]), "item_id": pa.array(["i", "j"]).dictionary_encode()}
    columns["timestamp"] = pa.array([1_500_000_001, 2_000_000_000], pa.timestamp("ns"))
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    convert(tmp_path / "x.parquet", "made", tmp_path / "out")
    assert written(tmp_path / "out" / "made") == [("u", "i", 1.500000001), ("v", "j", 2.0)]


def times_of(folder):
    """The times of a converted data set as they are spelt, in the order of its lines."""
    lines = (folder / f"{folder.name}.inter").read_text().splitlines()[1:]
    return [line.rsplit("\t", 1)[1] for line in lines]


FAR = 253_370_764_800  # 9999-01-01
PARQUET_TIMES = [
    (pa.timestamp("s"), [FAR, -FAR, 1], ["-253370764800", "1", "253370764800"]),
    (pa.timestamp("ms"), [1001, 1000, -1], ["-0.001", "1", "1.001"]),
    (pa.timestamp("us", "UTC"), [FAR * 10**6 + 1, 5], ["0.000005", "253370764800.000001"]),
    (
        pa.timestamp("ns"),
        [1_700_000_000_000_000_002, 1_700_000_000_000_000_001],
        ["1700000000.000000001", "1700000000.000000002"],
    ),
    (pa.date32(), [2_932_532, -1], ["-86400", "253370764800"]),
    (pa.date64(), [86_400_000, 0], ["0", "86400"]),
    (pa.int64(), [2**53 + 1, 2**53], [str(2**53), str(2**53 + 1)]),
    (pa.float64(), [1.5, 1e9], ["1.5", "1000000000"]),
]


@pytest.mark.parametrize(("kind", "values", "expected"), PARQUET_TIMES)
def test_times_of_parquet_are_exact(tmp_path, kind, values, expected):
    columns = {"user_id": ["u"] * len(values), "item_id": list("ijk")[: len(values)]}
    pyarrow.parquet.write_table(pa.table(columns | {"timestamp": pa.array(values, kind)}), tmp_path / "x.parquet")
    convert(tmp_path / "x.parquet", "made", tmp_path / "out")
    assert times_of(tmp_path / "out" / "made") == expected


TIMES = [
    (["2020-01-03", "20200102", "2020-01-01T00:00:00.5"], ["1577836800.5", "1577923200", "1578009600"]),
    (
        ["2020-01-01T00:00:00.000000002Z", "2020-01-01 01:00:00.000000001+01:00"],
        ["1577836800.000000001", "1577836800.000000002"],
    ),
    (["1700000000000000001", "1700000000000000000"], ["1700000000000000000", "1700000000000000001"]),
    (["+3", "1e3", " 2 ", "-0.50"], ["-0.5", "2", "3", "1000"]),
    (["0.1", "0.10000000001"], ["0.1", "0.1"]),
    # What may be dates is asked for; these are none.
    (["20230127.0", "20230128"], ["20230127", "20230128"]),
    (["20230127", "20230199"], ["20230127", "20230199"]),
    (["1674841555", "2023012717"], ["1674841555", "2023012717"]),
    (["1674841555000", "1674841556000"], ["1674841555000", "1674841556000"]),
    (["19700101", "15000101"], ["15000101", "19700101"]),
    (["2023-01-27 17:55:00 UTC", "2023-01-27 17:55:00.25 GMT"], ["1674842100", "1674842100.25"]),
]


@pytest.mark.parametrize(("cells", "expected"), TIMES)
def test_times_of_text_are_exact(tmp_path, cells, expected):
    lines = [f"u,i{k},{cell}\n" for k, cell in enumerate(cells)]
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\n" + "".join(lines))
    convert(tmp_path / "x.csv", "made", tmp_path / "out")
    assert times_of(tmp_path / "out" / "made") == expected


MIXED = [
    (["2020-01-01", "2020-01-02", "978300000"], "line 4: timestamp is '978300000' in a column of dates"),
    (["1", "2", "2020-01-02"], "line 4: timestamp is '2020-01-02' in a column of numbers"),
    (["1", "9e99"], "line 3: timestamp is '9e99', which is no finite number"),
    (["1.5", "9000000000000000000"], "timestamp holds fractions beside numbers too large for them"),
    (["1" * 300], "line 2: timestamp is '1111"),
    (["9e1800010"], "line 2: timestamp is '9e1800010', which is no finite number"),
    (
        ["20230127", "20230128"],
        "timestamp holds numbers such as 20230127, which may be dates: give --time_format=%Y%m%d",
    ),
    (["2020-13-01"], "line 2: timestamp is '2020-13-01', which is no finite number and no date"),
    (["27-i-2023", "28-i-2023", "1"], "no date of ISO 8601; give --time_format, such as %d.%m.%Y %H:%M:%S or %m/%d/%Y"),
    (["1", "27-i-2023"], "no date of ISO 8601; correct it or drop the line"),
    (["2023012717"], "numbers such as 2023012717, which may be dates: give --time_format=%Y%m%d%H, or write seconds"),
    ([" 202301271755"], "numbers such as 202301271755, which may be dates: give --time_format=%Y%m%d%H%M, or write"),
    (["20230127175500", "20230128000000"], "may be dates: give --time_format=%Y%m%d%H%M%S, or write seconds as"),
    (["1", "0x5F"], "line 3: timestamp is '0x5F', which is no finite number"),
]


@pytest.mark.parametrize(("cells", "message"), MIXED)
def test_times_that_cannot_be_told_are_refused(tmp_path, cells, message):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,i,{cell}\n" for cell in cells))
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "x.csv", "made", tmp_path / "out")
    assert message in str(caught.value)


def test_ids_that_are_missing_or_whole_numbers(tmp_path):
    columns = {"user_id": [7.0, None, float("nan"), 8.5], "item_id": list("ijkl"), "timestamp": [1, 2, 3, 4]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="line 2: user_id is empty"):
        convert(tmp_path / "x.parquet", "made", tmp_path / "out")
    convert(tmp_path / "x.parquet", "made", tmp_path / "out", on_bad_lines="skip")
    assert written(tmp_path / "out" / "made") == [("7", "i", 1.0), ("8.5", "l", 4.0)]
    (tmp_path / "x.jsonl").write_text('{"user_id": 7.0, "item_id": NaN, "timestamp": 1}\n')
    with pytest.raises(UserError, match="line 1: item_id is empty"):
        convert(tmp_path / "x.jsonl", "json", tmp_path / "out")


def test_an_event_is_not_taken_for_a_header(tmp_path):
    (tmp_path / "x.csv").write_text("u1,i1,978300000\nu1,i2,978300001\n")
    with pytest.raises(UserError, match="x.csv, line 1: no header, but an event at 978300000; write a line above it"):
        convert(tmp_path / "x.csv", "made", tmp_path / "out", user="u1", item="i1", time="978300000")


def test_descriptions_hold_nothing_that_their_reader_refuses(tmp_path):
    titles = ["a\0b [PAD] c", "\0", "d\re"]
    pyarrow.parquet.write_table(
        pa.table({"user_id": ["u"] * 3, "item_id": list("ijk"), "timestamp": [1, 2, 3], "title": titles}),
        tmp_path / "x.parquet",
    )
    convert(tmp_path / "x.parquet", "made", tmp_path / "out", text="title")
    assert [list(row[1]) for row in written(tmp_path / "out" / "made", "item")] == [["ab", "c"], [], ["d", "e"]]


def test_contradicting_descriptions_are_counted(tmp_path, capsys):
    lines = ["u,i,1,one", "u,j,2,two", "v,i,3,one", "v,j,4,three", "w,j,5,four"]
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp,words\n" + "\n".join(lines) + "\n")
    assert main(["convert", "x.csv", "--name=made", "--text=words"]) == 0
    out = capsys.readouterr().out
    assert "2 of the items are described\n1 of them again in other words; the first description counts" in out
    card = json.loads((tmp_path / "dataset" / "made" / "made.card.json").read_text())
    assert (card["described_items"], card["contradicting_descriptions"]) == (2, 1)


@pytest.mark.parametrize("form", ["text", "meta"])
def test_of_each_column_of_an_item_the_first_cell_that_is_not_empty_counts(tmp_path, form):
    lines = ["u,i,1,,", "u,j,2,,red", "v,i,3,One,", "v,j,4,Two,blue", "w,i,5,One,green"]
    (tmp_path / "x.csv").write_text("\n".join(["user_id,item_id,timestamp,words,colour", *lines]))
    (tmp_path / "m.csv").write_text("\n".join(["item_id,words,colour", *(line[2:3] + line[5:] for line in lines)]))
    how = {"text": "words"} if form == "text" else {"meta": tmp_path / "m.csv"}
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", **how)
    found = (tmp_path / "out" / "made" / "made.item").read_text().splitlines()[1:]
    assert found == (["i\tOne", "j\tTwo"] if form == "text" else ["i\tOne\tgreen", "j\tTwo\tred"])
    assert card["contradicting_descriptions"] == (form == "meta")


@pytest.mark.parametrize("name", ["timestamp", "rating", "user_id", "shop"])
def test_no_column_of_the_items_takes_the_place_of_one_of_the_events(tmp_path, name):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp,rating,shop\nu,i,1,2,s\n")
    (tmp_path / "m.csv").write_text(f"item_id,title,{name}\ni,One,9\n")
    with pytest.raises(
        UserError, match=f"^--meta: '{name}' would be a column of the items and of the events, .*m.csv$"
    ):
        convert(tmp_path / "x.csv", "made", tmp_path / "out", meta=tmp_path / "m.csv", keep="shop")
    with pytest.raises(UserError, match="^--text: 'title' would be a column of the items and of the events"):
        (tmp_path / "y.csv").write_text("user_id,item_id,timestamp,title\nu,i,1,One\n")
        convert(tmp_path / "y.csv", "made", tmp_path / "out", text="title", keep="title")


def test_only_doubled_events_go_where_real_repeats_are_meant_to_stay(tmp_path):
    rows = [("u", "i", 1), ("u", "i", 1), ("u", "i", 2), ("u", "j", 1), ("v", "i", 1), ("u", "i", 1)]
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", duplicates="same_time")
    assert written(tmp_path / "out" / "made") == [("u", "i", 1), ("u", "j", 1), ("u", "i", 2), ("v", "i", 1)]
    assert card["steps"][1] == {"step": "first of each user, item and time", "users": 2, "items": 2, "interactions": 4}


@pytest.mark.parametrize("name", ["x.txt", "x.dat", "X.DATA", "x.CSV.GZ"])
def test_the_only_table_of_an_archive_is_taken(tmp_path, name):
    content = b"user_id,item_id,timestamp\nu,i,1\n"
    content = gzip.compress(content) if name.endswith("GZ") else content
    convert(zipped(tmp_path / "X.ZIP", {name: content}), "made", tmp_path / "out")
    assert written(tmp_path / "out" / "made") == [("u", "i", 1)]
    two = zipped(tmp_path / "two.zip", {name: content, f"2{name}": content})
    with pytest.raises(UserError, match="which file holds the interactions.*; unpack it and name one as the source"):
        convert(two, "other", tmp_path / "out")


@pytest.mark.parametrize("form", ["meta.csv", "meta.jsonl", "x.jsonl"])
def test_the_encoding_of_the_events_is_not_that_of_a_table_in_utf_8(tmp_path, form):
    """JSON is UTF-8 by its standard, and where a table of items is, it shows."""
    (tmp_path / "meta.csv").write_text("item_id,title\ni,Crème\n", "utf-8")
    (tmp_path / "meta.jsonl").write_text('{"item_id": "i", "title": "Crème"}\n', "utf-8")
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nKäufer,i,1\n", "latin-1")
    (tmp_path / "x.jsonl").write_text('{"user_id": "Käufer", "item_id": "i", "timestamp": 1}\n', "utf-8")
    source, meta = ("x.jsonl", "meta.csv") if form == "x.jsonl" else ("x.csv", form)
    convert(tmp_path / source, "made", tmp_path / "out", meta=tmp_path / meta, encoding="latin-1")
    assert written(tmp_path / "out" / "made") == [("Käufer", "i", 1)]
    assert written(tmp_path / "out" / "made", "item") == [("i", "Crème")]
    (tmp_path / meta).write_text((tmp_path / meta).read_text("utf-8"), "latin-1")
    convert(tmp_path / source, "other", tmp_path / "out", meta=tmp_path / meta, encoding="latin-1")
    assert written(tmp_path / "out" / "other", "item") == [("i", "Crème")]


def test_damaged_and_ambiguous_archives(tmp_path):
    good = zipped(tmp_path / "ml.zip", movielens("20m", ratings())).read_bytes()
    (tmp_path / "cut.zip").write_bytes(good[:-40])
    with pytest.raises(UserError, match="cut.zip: no zip archive"):
        convert(tmp_path / "cut.zip", "made", tmp_path / "out")
    middle = good.index(b"rating,timestamp") + 40
    (tmp_path / "hurt.zip").write_bytes(good[:middle] + b"????" + good[middle + 4 :])
    with pytest.raises(UserError, match="hurt.zip:ml-20m/ratings.csv: damaged or cut short .Bad CRC"):
        convert(tmp_path / "hurt.zip", "made", tmp_path / "out")
    odd = movielens("20m", ratings()) | {"ml-20m/movies.csv": "movieId,title\n1,x\n"}
    with pytest.raises(UserError, match="odd.zip:ml-20m/movies.csv, line 1: no column 'genres'"):
        convert(zipped(tmp_path / "odd.zip", odd), "made", tmp_path / "out")
    with pytest.raises(UserError, match="--meta: MovieLens describes its items itself, in movies.csv"):
        convert(tmp_path / "ml.zip", "made", tmp_path / "out", meta=tmp_path / "absent.json")
    many = zipped(tmp_path / "many.zip", {f"{k}.csv": "x" for k in range(999)})
    with pytest.raises(UserError, match="it has 0.csv, .*, 7.csv, ...; unpack it and name one"):
        convert(many, "made", tmp_path / "out")
    two = zipped(tmp_path / "two.zip", {"a.csv": "x", "b.csv": "y"})
    with pytest.raises(UserError, match="which file holds the interactions.* it has a.csv, b.csv"):
        convert(two, "made", tmp_path / "out")
    assert not (tmp_path / "out" / "made").exists()


def test_a_block_without_rows_does_not_decide_what_times_are():
    times = Moments()
    for cells in ([], ["20230127"]):
        assert times.parse(pa.array(cells, pa.string()), True) == {}
        times.take(np.full(len(cells), True))
    with pytest.raises(ValueError, match="20230127, which may be dates"):
        times.finish()


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|", "\x01", "::", " "])
def test_columns_by_their_places_and_separators_that_are_guessed(tmp_path, separator):
    """Session logs have no header and all kinds of separators; the first line is an event like the others."""
    rows = ratings()
    lines = [separator.join([str(t), "view", u, i, f"{r:g}"]) for u, i, r, t in rows]
    (tmp_path / "x.dat").write_text("\n".join(lines) + "\n")
    convert(tmp_path / "x.dat", "made", tmp_path / "out", user="3", item="4", time="1", rating="5")
    assert written(tmp_path / "out" / "made") == expected(rows)


@pytest.mark.parametrize("item", ["product", "client", "date", "userId"])
@pytest.mark.parametrize(
    ("time", "how"),
    [
        ("1600000000", {}),
        ("27. Jan 2023", {"time_format": "%d. %b %Y"}),
        ("any", {"time": None, "file_order": True}),
    ],
)
def test_an_item_may_be_called_as_a_column_is(tmp_path, item, time, how):
    """Without a header; and what stands in a column that nobody names decides nothing."""
    (tmp_path / "x.txt").write_text(f"u1\t{item}\t{time}\tproduct\tmember\n")
    convert(tmp_path / "x.txt", "made", tmp_path / "out", **{"user": "1", "item": "2", "time": "3", **how})
    assert written(tmp_path / "out" / "made")[0][:2] == ("u1", item)


def test_a_header_is_told_by_the_cell_of_the_time(tmp_path):
    (tmp_path / "x.txt").write_text("visitor\tproduct\tseen\n")
    with pytest.raises(UserError, match="x.txt, line 1: a header, with product; name the columns as it does"):
        convert(tmp_path / "x.txt", "made", tmp_path / "out", user="1", item="2", time="3")


@pytest.mark.parametrize("separator", [",", ";"])
def test_columns_by_their_places_where_the_first_line_has_a_quoted_separator(tmp_path, separator):
    lines = [separator.join(cells) for cells in (('"u"', '"a, b; c, d; e"', "1"), ("u", "j", "2"))]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    convert(tmp_path / "x.csv", "made", tmp_path / "out", user="1", item="2", time="3")
    assert written(tmp_path / "out" / "made") == [("u", "a, b; c, d; e", 1), ("u", "j", 2)]


@pytest.mark.parametrize("separator", [None, ",", "\t"])
def test_one_sequence_a_line(tmp_path, separator):
    """As S3Rec, SASRec and P5 publish their data: a user, and the user's items in the order of time."""
    lines = [["1", "12", "7", "7", "30"], ["2", "5"], ["10", "7", "12"], ["2", "9"]]
    (tmp_path / "Beauty.txt").write_text("".join((separator or " ").join(line) + "\n" for line in lines))
    card = convert(tmp_path / "Beauty.txt", "made", tmp_path / "out", sequences=True, separator=separator)
    assert written(tmp_path / "out" / "made") == [
        ("1", "12", 1), ("1", "7", 2), ("1", "7", 3), ("1", "30", 4), ("2", "5", 1), ("2", "9", 2),
        ("10", "7", 1), ("10", "12", 2),
    ]  # fmt: skip
    assert card["kind"] == "sequences" and card["steps"][0]["interactions"] == 8
    assert card["ties"].startswith("the source has no times")


def test_faulty_sequences(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"1 12 7\n\n2\n3 \xff\n4 [PAD] 5\n")
    for line, fault in ((2, "no user with items after it: b''"), (3, "no user with items"), (4, "not utf-8 text")):
        with pytest.raises(UserError, match=f"x.txt, line {line}: {fault}"):
            convert(tmp_path / "x.txt", "made", tmp_path / "out", sequences=True)
        content = (tmp_path / "x.txt").read_bytes().split(b"\n")
        content[line - 1] = b"9 9"
        (tmp_path / "x.txt").write_bytes(b"\n".join(content))
    with pytest.raises(UserError, match="x.txt, line 5: item is '.PAD.', RecBole's padding"):
        convert(tmp_path / "x.txt", "made", tmp_path / "out", sequences=True)
    (tmp_path / "x.txt").write_bytes(b"1 12 7\n\n2\n3 \xff\n4 [PAD] 5 [PAD]\n")
    card = convert(tmp_path / "x.txt", "made", tmp_path / "out", sequences=True, on_bad_lines="skip")
    assert written(tmp_path / "out" / "made") == [("1", "12", 1), ("1", "7", 2), ("4", "5", 1)]
    assert card["skipped_lines"] == 4
    skipped = (tmp_path / "out" / "made" / "made.skipped").read_bytes().splitlines()
    assert [line.split(b"\t")[::2] for line in skipped] == [
        [b"2", b""],
        [b"3", b"2"],
        [b"4", b"3 \xff"],
        [b"5", b"4 [PAD] 5 [PAD]"],
    ]


@pytest.mark.parametrize("sequences", [False, True])
def test_without_times_events_are_counted_after_the_filters(tmp_path, sequences):
    """Gaps in the count would be taken for times."""
    items = [["a", "b", "a", f"only-{user}", "c"] for user in "uvw"]
    pairs = "".join(f"{user} {item}\n" for user, row in zip("uvw", items) for item in row)
    lines = "".join(" ".join([user, *row]) + "\n" for user, row in zip("uvw", items))
    (tmp_path / "x.txt").write_text(lines if sequences else pairs)
    how = {"sequences": True} if sequences else {"file_order": True, "user": "1", "item": "2"}
    convert(tmp_path / "x.txt", "made", tmp_path / "out", k_core=3, duplicates="last", **how)
    left = [(user, item, time) for user in "uvw" for time, item in enumerate("bac", 1)]
    assert written(tmp_path / "out" / "made") == left


def test_without_times_the_order_is_the_files(tmp_path):
    (tmp_path / "x.txt").write_text("u i\nv j\nu j\nu i\nv i\n")
    convert(tmp_path / "x.txt", "made", tmp_path / "out", user="1", item="2", file_order=True)
    assert written(tmp_path / "out" / "made") == [
        ("u", "i", 1),
        ("u", "j", 2),
        ("u", "i", 3),
        ("v", "j", 1),
        ("v", "i", 2),
    ]
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,soon\nu,j,later\n")
    convert(tmp_path / "x.csv", "named", tmp_path / "out", file_order=True)
    assert written(tmp_path / "out" / "named") == [("u", "i", 1), ("u", "j", 2)]


FORMS = [
    ("%d.%m.%Y %H:%M", ["02.01.2020 00:00", "01.01.2020 12:30"], ["1577881800", "1577923200"]),
    ("%m/%d/%y", ["01/02/20", "01/01/20"], ["1577836800", "1577923200"]),
    ("%d %b %Y %H:%M:%S.%f", ["01 Jan 2020 00:00:00.25"], ["1577836800.25"]),
    ("%Y-%m-%dT%H:%M:%S%z", ["2020-01-01T01:00:00+0100", "2020-01-01T00:00:01Z"], ["1577836800", "1577836801"]),
    ("%Y%j", ["2020002"], ["1577923200"]),
]


@pytest.mark.parametrize(("form", "cells", "times"), FORMS)
def test_dates_in_another_form(tmp_path, form, cells, times):
    rows = [f'u,i{k},"{cell}"\n' for k, cell in enumerate(cells)]
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    convert(tmp_path / "x.csv", "made", tmp_path / "out", time_format=form)
    assert times_of(tmp_path / "out" / "made") == times
    with (tmp_path / "x.csv").open("a") as file:
        file.write("u,j,tomorrow\nu,j,\n")
    card = convert(tmp_path / "x.csv", "again", tmp_path / "out", time_format=form, on_bad_lines="skip")
    assert card["skipped_lines"] == 2 and times_of(tmp_path / "out" / "again") == times


ADVICE = [
    # The form that fits all cells, where only one does.
    (["06.01.2026 11:50", "25.01.2026 11:50"], "'%d.%m.%Y %H:%M'"),
    (["1/25/2025", "1/2/2025"], "'%m/%d/%Y'"),
    (["01/02/2023 05:55 PM", "01/27/2023 10:53 AM"], "'%m/%d/%Y %I:%M %p'"),
    (["2023-01-27 5:55:01 PM"], "'%Y-%m-%d %I:%M:%S %p'"),
    (["Fri, 27 Jan 2023 17:55:00 +0100"], "'%a, %d %b %Y %H:%M:%S %z'"),
    (["Fri, 27 Jan 2023 17:55:00 GMT"], "'%a, %d %b %Y %H:%M:%S GMT'"),
    (["27/01/2023 17:55:00 +0100"], "'%d/%m/%Y %H:%M:%S %z'"),
    (["27/Jan/2023:17:55:00 +0100"], "'%d/%b/%Y:%H:%M:%S %z'"),
    (["Tue Apr 03 18:00:09 +0000 2012"], "'%a %b %d %H:%M:%S %z %Y'"),
    # A mistake does not hide it.
    (["05/27/2023", "x", "05/28/2023"], "'%m/%d/%Y'"),
    # What the cells leave open is asked.
    (["05/06/2023", "05/05/2023"], "'%d/%m/%Y' or '%m/%d/%Y', whichever is meant"),
]


@pytest.mark.parametrize("given", ["", "%d-%m-%Y"])
@pytest.mark.parametrize(("cells", "forms"), ADVICE)
def test_an_error_says_how_dates_in_another_form_are_read(tmp_path, cells, forms, given):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\n" + "".join(f'u,i,"{cell}"\n' for cell in cells))
    with pytest.raises(UserError) as error:
        convert(tmp_path / "x.csv", "made", tmp_path / "out", time_format=given)
    advice = (
        f"correct the form (here perhaps {forms}) or the line" if given else f"--time_format, here perhaps {forms},"
    )
    assert advice in str(error.value) and "x.csv, line 2: timestamp is" in str(error.value)
    if "or" not in forms:
        convert(tmp_path / "x.csv", "made", tmp_path / "out", time_format=forms.strip("'"), on_bad_lines="skip")


def test_a_mistake_in_one_line_is_not_taken_for_one_in_the_form(tmp_path):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,27/05/2023\nu,i,26/05/2023\nu,i,05/27/2023\n")
    with pytest.raises(UserError, match="line 4: .*; correct the form or the line, or drop the line$"):
        convert(tmp_path / "x.csv", "made", tmp_path / "out", time_format="%d/%m/%Y")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("%m/%d/%Y %H:%M %p", "has %p, which Python reads over beside %H; use %I with %p"),
        ("%m/%d/%Y %I:%M", "has %I without %p, so 1 and 13 o'clock are one; use %I with %p, or %H"),
        ("%m/%d/%Y %I:%M %p %Z", "has %Z, which Python reads over; write UTC or GMT in its place, or %z for +0100"),
        ("MM/DD/YYYY", "does not say year, month and day; try '%m/%d/%Y %I:%M %p'"),
        ("%m/%d/%q", "is no form of dates ('q' is a bad directive in format '%m/%d/%q'); try '%m/%d/%Y %I:%M %p'"),
    ],
)
def test_a_form_that_would_lose_a_part_of_the_times_is_refused(tmp_path, form, message):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,01/27/2023 05:55 PM\n")
    with pytest.raises(UserError) as error:
        convert(tmp_path / "x.csv", "made", tmp_path / "out", time_format=form)
    assert str(error.value) == f"--time_format: {form!r} {message}"
    convert(tmp_path / "x.csv", "made", tmp_path / "out", time_format="%m/%d/%Y %I:%M %p")
    assert times_of(tmp_path / "out" / "made") == ["1674842100"]


def test_some_columns_are_named_and_others_known(tmp_path):
    (tmp_path / "x.csv").write_text("session_id,item_id,timestamp,rating,user_id\ns,i,1,5,u\ns,j,2,4,u\n")
    convert(tmp_path / "x.csv", "made", tmp_path / "out", user="session_id")
    assert written(tmp_path / "out" / "made") == [("s", "i", 5, 1), ("s", "j", 4, 2)]
    (tmp_path / "y.csv").write_text("visitorid,movieId,timestamp\nv,i,1\n")
    convert(tmp_path / "y.csv", "other", tmp_path / "out", user="visitorid")
    assert written(tmp_path / "out" / "other") == [("v", "i", 1)]
    with pytest.raises(UserError, match="y.csv: name its columns by --user .there are visitorid, movieId, timestamp.$"):
        convert(tmp_path / "y.csv", "third", tmp_path / "out")


def test_users_and_items_have_cores_of_their_own(tmp_path):
    rows = [("a", "i"), ("a", "j"), *((user, item) for user in "bcd" for item in "ik")]
    (tmp_path / "x.csv").write_text("user_id,item_id\n" + "".join(f"{u},{i}\n" for u, i in rows))
    options = {"file_order": True, "out": tmp_path / "out"}
    card = convert(tmp_path / "x.csv", "made", k_core=3, user_core=2, **options)
    assert card["steps"][1] == {"step": "2-core of users, 3-core of items", "users": 3, "items": 2, "interactions": 6}
    assert [row[:2] for row in written(tmp_path / "out" / "made")] == rows[2:]
    with pytest.raises(UserError, match="3-core leaves nothing"):
        convert(tmp_path / "x.csv", "none", k_core=3, **options)


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_further_columns_are_kept_with_types_that_are_guessed_or_given(tmp_path, form):
    columns = {"user_id": ["v", "u", "u"], "item_id": ["i", "j", "k"], "timestamp": [3, 2, 1]}
    columns |= {
        "price": ["1.5", "", "20"],
        "zip": ["0815", "4711", ""],
        "words": ["a  b [PAD]", "c", ""],
        "tags": [["x", "y"], [], ["z"]],
    }
    if form == "csv":
        del columns["tags"]
        lines = [",".join(map(str, row)) for row in [list(columns), *zip(*columns.values())]]
        (tmp_path / "x.csv").write_text("\n".join(lines))
    elif form == "parquet":
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    else:
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = ",".join(["price", "zip", "words", *(["tags"] if "tags" in columns else [])])
    convert(tmp_path / f"x.{form}", "made", tmp_path / "out", keep=keep, duplicates="first")
    path = tmp_path / "out" / "made" / "made.inter"
    tags = {"tags": "token_seq"} if "tags" in columns else {}
    assert read_header(path) == {
        "user_id": "token", "item_id": "token", "timestamp": "float", "price": "float", "zip": "token",
        "words": "token_seq", **tags,
    }  # fmt: skip
    end = {"csv": ("", "", "")}.get(form, ("\tx y", "\tz", "\t"))
    assert path.read_text().splitlines()[1:] == [
        f"v\ti\t3\t1.5\t0815\ta b{end[0]}", f"u\tk\t1\t20\t\t{end[1]}", f"u\tj\t2\t\t4711\tc{end[2]}"
    ]  # fmt: skip
    convert(tmp_path / f"x.{form}", "typed", tmp_path / "out", keep="price:token,zip:float")
    assert list(read_header(tmp_path / "out" / "typed" / "typed.inter").items())[3:] == [
        ("price", "token"),
        ("zip", "float"),
    ]
    with pytest.raises(
        UserError, match="line [12]: words is 'a  b .*, which is no finite number; .*, or --keep it as token$"
    ):
        convert(tmp_path / f"x.{form}", "wrong", tmp_path / "out", keep="words:float")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_any_table_of_items_is_joined(tmp_path, form):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,1\nu,j,2\nu,k,3\n")
    columns = {
        "sku": ["j", "i", "nobody", "j"],
        "title": ["One two", "Three", "", "One two"],
        "price": [1.5, 2, 3, 1.5],
    }
    columns |= {
        "shelf": ["a1", "07", "x", "a1"],
        "empty": ["", "", "", ""],
        "tags": [["p q", "r"], [], ["s"], ["p q", "r"]],
    }
    if form == "csv":
        columns["tags"] = [" ".join(tags) for tags in columns["tags"]]
        lines = [";".join(map(str, row)) for row in [list(columns), *zip(*columns.values())]]
        (tmp_path / "items.csv").write_text("\n".join(lines))
    elif form == "jsonl":
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "items.parquet")
    meta = tmp_path / f"items.{form}"
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", meta=meta, meta_item="sku")
    assert (card["described_items"], card["contradicting_descriptions"], len(card["source"])) == (2, 0, 2)
    path = tmp_path / "out" / "made" / "made.item"
    assert path.read_text().splitlines() == [
        "item_id:token\ttitle:token_seq\tprice:float\tshelf:token\tempty:token\ttags:token_seq",
        "j\tOne two\t1.5\ta1\t\tp q r",
        "i\tThree\t2\t07\t\t",
    ]
    as_frame(read_columns(path, read_header(path)))
    with pytest.raises(
        UserError,
        match=f"--meta: .*items.{form} has no column 'item_id' .there are sku, title, .* name it by --meta_item",
    ):
        convert(tmp_path / "x.csv", "other", tmp_path / "out", meta=meta)


def test_what_is_there_stays(tmp_path):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,1\n")
    convert(tmp_path / "x.csv", "made", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "made").iterdir()}
    with pytest.raises(UserError, match="is there already, and stays as it is"):
        convert(tmp_path / "x.csv", "made", tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out" / "made").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "recbole-ssm convert: the following arguments are required: source, --name"),
        (["x.csv", "--name=a/b"], "--name: 'a/b' is no name of a folder"),
        (["x.csv", "--name=a", "--k_core=-1"], "--k_core: must be 0 or more, got -1"),
        (["absent.csv", "--name=a"], "absent.csv: No such file or directory"),
        (["x.csv", "--name=a", "--user=users"], "--user: x.csv has no column 'users' (there are user_id, item_id, "),
        (["x.csv", "--name=a", "--encoding=latin-99"], "encoding: there is no encoding 'latin-99'"),
        (["x.csv", "--name=a", "--k_core=9"], "x.csv: 9-core leaves nothing; choose a smaller --k_core"),
        (
            ["x.csv", "--name=a", "--meta=m.csv"],
            "--meta: m.csv has no column 'item_id' (there are sku, a:b); name it by",
        ),
        (["x.csv", "--name=a", "--meta=m.csv", "--meta_item=id"], "--meta_item: m.csv has no column 'id' (there are "),
        (["x.csv", "--name=a", "--meta=m.csv", "--meta_item=sku"], "--meta: 'a:b' cannot name a column of an atomic"),
        (["x.csv", "--name=a", "--meta_item=sku"], "--meta_item: sku is a column of --meta, and there is none; name"),
        (["x.csv", "--name=a", "--user_core=-1"], "--user_core: must be 0 or more, got -1"),
        (["x.csv", "--name=a", "--item_core=9"], "x.csv: 9-core of items leaves nothing; choose a"),
        (["x.csv", "--name=a", "--keep=x"], "--keep: x.csv has no column 'x' (there are user_id, item_id, timestamp)"),
        (["x.csv", "--name=a", "--keep=user_id"], "--keep: there would be two columns 'user_id'; rename one in the"),
        (["x.csv", "--name=a", "--keep=user_id:int"], "--keep: user_id has type 'int'; known are token, token_seq, "),
        (["x.csv", "--name=a", "--time_format=%q"], "--time_format: '%q' is no form of dates ('q' is a bad directive"),
        (["x.csv", "--name=a", "--time_format=%H:%M"], "--time_format: '%H:%M' does not say year, month and day; try"),
        (["x.csv", "--name=a", "--time_format=%Y-%m-%d"], "x.csv, line 2: timestamp is '1', which is not written as"),
        (["x.csv", "--name=a", "--sequences", "--item=item_id"], "--sequences: each line of a text file is a user and"),
        (
            ["x.csv", "--name=a", "--file_order", "--time=timestamp"],
            "--file_order: the events would be in the order of",
        ),
        (["h.csv", "--name=a", "--user=0", "--item=2", "--time=3"], "--user: h.csv has no column '0' (there are 1, 2,"),
        (["x.csv", "--name=a", "--user=1", "--item=2", "--time=3"], "x.csv, line 1: a header, with user_id; name the"),
        (
            ["h.csv", "--name=a", "--user=1", "--item=2", "--time=3"],
            "h.csv, line 1: column 3 is 'x', which is no finite",
        ),
        (["p.csv", "--name=a", "--user=1", "--item=2", "--file_order"], "p.csv, line 1: a header, with product; name"),
        (["x.csv", "--name=a", "--meta=d"], "d: which file holds the items? it has nothing; name one as --meta"),
        (["x.csv", "--name=a", "--text=item_id", "--meta_item=x"], "--text item_id and --meta_item x both describe"),
        (["h.txt", "--name=a", "--sequences", "--time_format=%Y%j"], "--time_format: with --sequences there are no"),
        (
            ["h.txt", "--name=a", "--sequences", "--duplicates=same_time"],
            "--duplicates=same_time: with --sequences there are no times; use --duplicates=first",
        ),
        (["x.csv", "--name=a", "--file_order", "--duplicates=same_time"], "--duplicates=same_time: with --file_order "),
        (
            ["h.txt", "--name=a"],
            "h.txt: name its columns by --user, --item, --time (there are 1, 7, 8); without times, ",
        ),
        (
            ["l.jsonl", "--name=a"],
            "--item: column 'item_id' of l.jsonl holds lists or objects, and each row must be one event; ",
        ),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, arguments, message):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,i,1\n")
    (tmp_path / "m.csv").write_text("sku,a:b\ni,1\n")
    (tmp_path / "h.txt").write_text("1 7 8\n2 8\n")
    (tmp_path / "p.csv").write_text("product,client\nv,p\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "h.csv").write_text("1,7,x\n2,8,5\n")
    (tmp_path / "l.jsonl").write_text('{"user_id": "u", "item_id": ["i", "j"], "timestamp": 1}\n')
    assert main(["convert", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"recbole_ssm: error: {message}")
    assert not list(tmp_path.glob("dataset/*"))


def test_the_command_says_what_became_of_the_data(tmp_path, capsys):
    zipped(tmp_path / "ml.zip", movielens("1m", ratings()))
    assert main(["convert", "ml.zip", "--name=ml"]) == 0
    out = capsys.readouterr().out
    assert "4 users" in out and "wrote dataset/ml: ml.inter, ml.item and the card, ml.card.json" in out
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    assert "--k_core" in capsys.readouterr().out


def mutated(draw, content):
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content))
        if draw.random() < 0.4:
            del content[at : at + draw.randint(1, 12)]
        else:
            spots = (b'"', b"\n", b"\r", b",", b"{", b"\\u0000", b"\xff", b"\0", b"[[", b"\t")
            content[at : at + draw.randint(0, 2)] = draw.choice(spots)
    return bytes(content) or b"x"


@pytest.mark.parametrize(("count", "seed"), [(150, 3), pytest.param(5_000, 4, marks=pytest.mark.slow)])
def test_mutated_sources_are_converted_or_refused_in_one_line(tmp_path, count, seed):
    draw = random.Random(seed)
    rows = ratings()
    parquet = io.BytesIO()
    table = {name: [row[k] for row in rows] for k, name in enumerate(("user_id", "item_id", "rating", "timestamp"))}
    pyarrow.parquet.write_table(pa.table(table), parquet)
    lines = "".join(f'{u},"{i}",{r},{t}\n' for u, i, r, t in rows)
    objects = "".join(
        json.dumps(dict(zip(("user_id", "parent_asin", "rating", "timestamp"), row))) + "\n" for row in rows
    )
    sources = {
        "x.csv": ("user_id,item_id,rating,timestamp\n" + lines).encode(),
        "x.jsonl": objects.encode(),
        "x.csv.gz": gzip.compress(("user_id,item_id,rating,timestamp\n" + lines).encode()),
        "x.parquet": parquet.getvalue(),
        "x.zip": zipped(tmp_path / "good.zip", movielens("10m", rows)).read_bytes(),
        "x.txt": "".join(f"{u} {i} {i}\n" for u, i, _, _ in rows).encode(),
        "meta.csv": ("item_id,title,price\n" + "".join(f'{i},"a {i}",{r}\n' for _, i, r, _ in rows)).encode(),
    }
    events = sources["x.csv"]
    options = {
        "x.txt": {"sequences": True},
        "meta.csv": {"meta": tmp_path / "meta.csv"},
    }
    outcomes = {True: 0, False: 0}
    for k in range(count):
        name = draw.choice(list(sources))
        (tmp_path / name).write_bytes(mutated(draw, sources[name]))
        source = name
        if name == "meta.csv":
            source = "events.csv"
            (tmp_path / source).write_bytes(events)
        how = {"on_bad_lines": draw.choice(["error", "skip"]), **options.get(name, {})}
        try:
            convert(tmp_path / source, f"n{k}", tmp_path / "out", **how)
        except UserError as error:
            assert "\n" not in str(error), error
            outcomes[False] += 1
        else:
            assert written(tmp_path / "out" / f"n{k}")
            outcomes[True] += 1
        assert not list((tmp_path / "out").glob(".*"))
    assert min(outcomes.values()) > count / 20
