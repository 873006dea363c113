"""convert on a company's own table: names that are not ours, titles, what is left out, and converting again."""

import pytest

from recbole_ssm.cli import main
from recbole_ssm.data import writing
from recbole_ssm.data.convert import convert, filtered
from recbole_ssm.data.names import only_column
from recbole_ssm.errors import UserError
from recbole_ssm.files import locked

ORDERS = "Order Date|Quantity|Product|Customer\n" + "".join(
    f"2023-01-{day:02d}|1|SKU{(user * day) % 7}|cust-{user}\n" for user in range(1, 5) for day in range(1, 2 + user)
)


@pytest.mark.parametrize(
    ("part", "columns", "expected"),
    [
        ("user", ["Customer", "Product", "Order Date"], "Customer"),
        ("user", ["KundenNr.", "Artikel"], None),
        ("user", ["Kunde-Nr.", "Artikel"], "Kunde-Nr."),
        ("item", ["Order Date", "SKU"], "SKU"),
        ("item", ["ARTIKEL_ID", "Preis"], "ARTIKEL_ID"),
        ("item", ["Product Name", "Price"], None),
        ("time", ["Order Date", "Ship Date"], "Order Date"),
        ("time", ["Bestelldatum"], "Bestelldatum"),
        # Between two that fit nothing is chosen.
        ("time", ["Datum", "Uhrzeit"], None),
        ("item", ["Product", "SKU"], None),
        ("user", ["client", "customer_id"], None),
    ],
)
def test_columns_are_known_by_names_that_say_one_thing(part, columns, expected):
    assert only_column(part, columns) == expected


def test_a_table_of_a_company_and_what_is_said_of_it(tmp_path, capsys):
    (tmp_path / "orders.txt").write_text(ORDERS)
    (tmp_path / "products.txt").write_text("Product;Name\n" + "".join(f"SKU{k};Red River {k}\n" for k in range(7)))
    assert main(["convert", "orders.txt", "--name=shop", "--user_core=3", "--meta=products.txt"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("columns: user Customer, item Product, time Order Date\n")
    assert "\n1 users and 0 items are left out: nothing is recommended to these users" in out
    assert "of the items are described\ntitles: Name\n" in out


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("Bezeichnung", "titles: Bezeichnung, the only column of text\n"),
        (
            "Bezeichnung;Farbe",
            "no column of titles (of text: Bezeichnung, Farbe); to recommend with them, or for a language model, ",
        ),
    ],
)
def test_items_without_titles_are_told_before_anything_is_trained(tmp_path, capsys, columns, message):
    (tmp_path / "orders.csv").write_text(ORDERS)
    cells = ";".join("a b" for _ in columns.split(";"))
    (tmp_path / "items.csv").write_text(f"Product;{columns}\n" + "".join(f"SKU{k};{cells}\n" for k in range(7)))
    assert main(["convert", "orders.csv", "--name=shop", "--meta=items.csv"]) == 0
    out = capsys.readouterr().out
    assert message in out and "left out" not in out


def test_columns_that_nobody_named_and_that_do_not_fit_are_left_out_with_a_note(tmp_path, caplog):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp,rating\nu,i,1,PG-13\nu,j,2,G\n")
    (tmp_path / "items.csv").write_text(
        ",Unnamed: 0,Unnamed: 0.1,item_id,price,title\n0,0,0,i,-nan,One\n1,1,1,j,5,Two\n"
    )
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", meta=tmp_path / "items.csv")
    assert "rating" not in card["columns"]
    header = (tmp_path / "out" / "made" / "made.item").read_text().splitlines()[0]
    assert header == "item_id:token\tprice:token\ttitle:token"
    assert "x.csv: column 'rating' is left out, because it is no rating in numbers" in caplog.text
    for index in ("", "Unnamed: 0", "Unnamed: 0.1"):
        assert f"items.csv: column '{index}', as pandas writes its index, is left out" in caplog.text
    with pytest.raises(UserError, match="line 2: rating is 'PG-13', which is no finite number"):
        convert(tmp_path / "x.csv", "named", tmp_path / "out", rating="rating")


def test_columns_of_two_meanings_are_asked_for(tmp_path):
    (tmp_path / "x.csv").write_text("Kunde,Artikel,Datum,Uhrzeit\nu,i,2020-01-01,12:00\n")
    with pytest.raises(UserError, match="name its columns by --time .there are Kunde, Artikel, Datum, Uhrzeit"):
        convert(tmp_path / "x.csv", "made", tmp_path / "out")


def test_a_data_set_is_put_in_the_place_of_another(tmp_path):
    source, out = tmp_path / "orders.csv", tmp_path / "out"
    source.write_text(ORDERS)
    convert(source, "shop", out)
    before = (out / "shop" / "shop.inter").read_bytes()
    source.write_text(ORDERS + "soon|1|SKU1|cust-1\n")
    with pytest.raises(UserError, match="line 16: Order Date is 'soon'"):
        convert(source, "shop", out, overwrite=True)
    assert (out / "shop" / "shop.inter").read_bytes() == before
    source.write_text(ORDERS + "2024-01-01|1|SKU1|cust-1\n")
    with pytest.raises(
        UserError, match="is there already, and stays as it is; say --overwrite or choose another --name"
    ):
        convert(source, "shop", out)
    card = convert(source, "shop", out, overwrite=True)
    assert card["steps"][0]["interactions"] == 15
    assert (out / "shop" / "shop.inter").read_bytes().count(b"\n") == 16
    assert [path.name for path in out.iterdir()] == ["shop"]


def test_what_a_killed_conversion_left_is_mended_by_the_next(tmp_path):
    """Also where the former data set had just made room for the new one."""
    source, out = tmp_path / "orders.csv", tmp_path / "out"
    source.write_text(ORDERS)
    convert(source, "shop", out)
    left, foreign = out / ".shop-abcd_123", out / ".shop-2-abcd_123"
    for folder in (left, foreign):
        folder.mkdir()
        (folder / "lock").touch()
    (out / "shop").rename(left / "former")
    with locked(left):
        convert(source, "other", out)
        assert left.is_dir()
    with pytest.raises(UserError, match="shop is there already"):
        convert(source, "shop", out)
    convert(source, "shop", out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [foreign.name, "other", "shop"]


def test_nothing_but_a_data_set_of_converts_is_overwritten(tmp_path):
    (tmp_path / "x.csv").write_text(ORDERS)
    mine = tmp_path / "out" / "mine" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(
        UserError, match="--overwrite: .*mine is none of convert's data sets; remove it or choose another"
    ):
        convert(tmp_path / "x.csv", "mine", tmp_path / "out", overwrite=True)
    convert(tmp_path / "x.csv", "shop", tmp_path / "out")
    inter = tmp_path / "out" / "shop" / "shop.inter"
    with pytest.raises(UserError, match="--overwrite: .*shop.inter is read, and would go with .*shop; choose another"):
        convert(inter, "shop", tmp_path / "out", overwrite=True)
    assert inter.is_file() and mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["shop.user", "shop.train.inter", "shop.item", ".notes/mine"])
def test_a_file_that_convert_did_not_write_is_not_overwritten(tmp_path, name):
    """Also one that it wrote and somebody corrected; a file of its own that is gone does not matter."""
    (tmp_path / "x.csv").write_text(ORDERS)
    (tmp_path / "items.csv").write_text("Product,title\nSKU1,One\n")
    how = {"out": tmp_path / "out", "meta": tmp_path / "items.csv"}
    convert(tmp_path / "x.csv", "shop", **how)
    (tmp_path / "out" / "shop" / "shop.inter").unlink()
    mine = tmp_path / "out" / "shop" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"--overwrite: .*shop holds {name.split('/')[0]}, which convert did not write"):
        convert(tmp_path / "x.csv", "shop", overwrite=True, **how)
    assert mine.read_text() == "mine"
    mine.rename(tmp_path / "away")
    if mine.parent.name != "shop":
        mine.parent.rmdir()
    convert(tmp_path / "x.csv", "shop", overwrite=True, **how)


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"written": ["shop.inter"]}', '{"written": {"shop.inter": 3}}'])
def test_a_card_that_convert_did_not_write_is_none(tmp_path, content):
    (tmp_path / "x.csv").write_text(ORDERS)
    convert(tmp_path / "x.csv", "shop", tmp_path / "out")
    (tmp_path / "out" / "shop" / "shop.card.json").write_text(content)
    with pytest.raises(UserError, match="shop is none of convert's data sets"):
        convert(tmp_path / "x.csv", "shop", tmp_path / "out", overwrite=True)


def test_paths_as_text_and_keywords_from_python(tmp_path):
    (tmp_path / "x.csv").write_text(ORDERS)
    (tmp_path / "items.csv").write_text("Product,title\nSKU1,One\n")
    card = convert(str(tmp_path / "x.csv"), "shop", str(tmp_path / "out"), meta=str(tmp_path / "items.csv"))
    assert card["described_items"] == 1 and (tmp_path / "out" / "shop" / "shop.inter").is_file()
    for misspelt in ("users", "overwrites"):
        with pytest.raises(TypeError, match=misspelt):
            convert(tmp_path / "x.csv", "other", tmp_path / "out", **{misspelt: "Customer"})
    with pytest.raises(UserError, match="--duplicates: must be keep, same_time, first, last, got 'once'"):
        convert(tmp_path / "x.csv", "other", tmp_path / "out", duplicates="once")


@pytest.mark.parametrize("meta", ["folder/../x.csv", "link.csv"])
def test_a_skipped_line_of_one_file_by_two_paths_is_counted_once(tmp_path, meta):
    (tmp_path / "x.csv").write_text("who,item_id,when,title\nu,i,1,One\nu,i\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "x.csv")
    how = {"user": "who", "time": "when", "meta": tmp_path / meta, "on_bad_lines": "skip"}
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", **how)
    assert (card["skipped_lines"], card["described_items"], len(card["source"])) == (1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "other", "cell"), [("float", "token", "N/A here"), ("float_seq", "token_seq", "1 two")]
)
def test_a_cell_of_a_further_column_that_is_not_of_its_type_has_a_line(tmp_path, kind, other, cell):
    (tmp_path / "x.csv").write_text(f"user_id,item_id,timestamp,price\nu,i,1,5\nu,j,2,{cell}\nu,k,3,\n")
    with pytest.raises(UserError, match=f"x.csv, line 3: price is '{cell}', which .*, or --keep it as {other}$"):
        convert(tmp_path / "x.csv", "made", tmp_path / "out", keep=f"price:{kind}")
    card = convert(tmp_path / "x.csv", "made", tmp_path / "out", keep=f"price:{kind}", on_bad_lines="skip")
    lines = (tmp_path / "out" / "made" / "made.inter").read_text().splitlines()
    assert lines == [f"user_id:token\titem_id:token\ttimestamp:float\tprice:{kind}", "u\ti\t1\t5", "u\tk\t3\t"]
    assert card["skipped_lines"] == 1


def test_a_row_that_the_filters_drop_does_not_decide_the_type_of_a_column(tmp_path):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp,price\nu,i,1,5\nu,i,2,free\n")
    convert(tmp_path / "x.csv", "made", tmp_path / "out", keep="price", duplicates="first")
    assert "price:float" in (tmp_path / "out" / "made" / "made.inter").read_text()


def test_long_texts_are_written_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """Arrow counts the bytes of a column of text in 32 bits."""
    rows = [f"u{row % 3},i{row % 7},{row},{chr(97 + row % 26) * 90}" for row in range(60)]
    (tmp_path / "x.csv").write_text("\n".join(["user_id,item_id,timestamp,words", *rows]))
    convert(tmp_path / "x.csv", "made", tmp_path / "out", keep="words")
    sizes, words = [], writing._words

    def measured(column, rows):
        cells = words(column, rows)
        sizes.append(sum(map(len, cells.to_pylist())))
        return cells

    monkeypatch.setattr(writing, "_words", measured)
    monkeypatch.setattr(writing, "BYTES_AT_ONCE", 1000)
    convert(tmp_path / "x.csv", "again", tmp_path / "out", keep="words")
    made, again = ((tmp_path / "out" / name / f"{name}.inter").read_bytes() for name in ("made", "again"))
    assert made == again and max(sizes) <= 1000


@pytest.mark.parametrize(
    ("overwrite", "message"), [(False, "shop is there already"), (True, "shop is none of convert's data sets")]
)
def test_a_folder_that_appears_while_a_source_is_read_stays(tmp_path, monkeypatch, overwrite, message):
    (tmp_path / "x.csv").write_text(ORDERS)
    appeared = tmp_path / "out" / "shop" / "shop.inter"

    def filters(events, *how):
        appeared.parent.mkdir()
        appeared.write_text("of another process")
        return filtered(events, *how)

    monkeypatch.setattr("recbole_ssm.data.convert.filtered", filters)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "x.csv", "shop", tmp_path / "out", overwrite=overwrite)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [appeared]
    assert appeared.read_text() == "of another process"
