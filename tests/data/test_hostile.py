"""Files and archives made to break their readers: refused in one line or read rightly, in bounded time and memory."""

import functools
import gzip
import io
import json
import math
import random
import struct
import zipfile
from collections import Counter
from decimal import Decimal, InvalidOperation

import pyarrow as pa
import pyarrow.parquet
import pytest

from recbole_ssm.data.atomic import read_columns, read_header
from recbole_ssm.data.convert import convert
from recbole_ssm.data.lines import BadLines
from recbole_ssm.data.summary import read
from recbole_ssm.errors import UserError
from tests.children import in_child

MOST = 1 << 30
ROWS = [(f"u{k % 3}", f"i{k}", f"{978300000 + k}") for k in range(12)]


def assert_held(outcome, what, most=MOST):
    """No traceback, no crash, no hang, one line, and bounded memory."""
    assert outcome.kind in ("done", "refused"), (what, outcome.value)
    assert outcome.memory < most, (what, outcome.memory >> 20)
    if outcome.kind == "refused":
        assert "\n" not in outcome.value and len(outcome.value) < 2_000, (what, outcome.value[:5000])


# --- single cases whose cause is known -------------------------------------------------------------------------------


def refusal(tmp_path, name, content, most=300 << 20, **options):
    """The one line by which ``convert`` refuses a file, within some 300 MB."""
    (tmp_path / name).write_bytes(content)
    outcome = in_child(lambda: convert(tmp_path / name, "made", tmp_path / "out", **options))
    assert_held(outcome, name, most)
    assert outcome.kind == "refused"
    return outcome.value


@pytest.mark.parametrize("opening", ["[", "{'a': [", "{'a': '", '{"a": [', "(", "-"])
def test_lines_of_json_without_end_take_little_memory(tmp_path, opening):
    line = opening + ("[],1e3,(),'x'," * (1 << 20))[: (15 << 20) - 20]
    event = b'{"user_id": 1, "item_id": 1, "timestamp": 1}\n'
    later = refusal(tmp_path, "x.jsonl", event + line.encode() + b"\n")
    assert "x.jsonl, line 2: no JSON object" in later
    first = refusal(tmp_path, "y.jsonl", line.encode())
    assert first.endswith("y.jsonl, line 1: the line is longer than 1 MB; is this a text file?")


def test_a_line_of_every_length_takes_time_in_proportion(tmp_path):
    content = b"user_id,item_id,timestamp\nu,i,1\n" + b"x" * (40 << 20)
    assert "line 3: the line is longer than 16 MB" in refusal(tmp_path, "x.csv", content)
    assert "line 1: the line is longer than 1 MB" in refusal(tmp_path, "y.csv", content.replace(b"\n", b","))


def test_a_header_of_a_million_columns(tmp_path):
    assert "line 1: more than 10,000 columns" in refusal(tmp_path, "x.csv", b",".join([b"abc"] * 250_000))
    assert "no column 'u'" in refusal(tmp_path, "y.csv", ",".join(f"c{k}" for k in range(9_000)).encode(), user="u")


def test_nothing_but_line_ends(tmp_path):
    message = refusal(tmp_path, "x.csv", b"user_id,item_id,timestamp\n" + b"\n" * (1 << 18), on_bad_lines="skip")
    assert "every line has a fault; the first is line 2: the line is empty" in message


def test_a_zip_that_holds_hundreds_of_times_its_size(tmp_path):
    """MovieLens' descriptions are looked at for their encoding, a piece at a time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-1m/ratings.dat", "1::2::3::4\n")
        with archive.open("ml-1m/movies.dat", "w", force_zip64=True) as file:
            for _ in range(120):
                file.write((b"2::" + b"x" * 1015 + b"::y\n") * (1 << 10))
    (tmp_path / "ml.zip").write_bytes(buffer.getvalue())
    outcome = in_child(lambda: convert(tmp_path / "ml.zip", "made", tmp_path / "out", encoding="utf-8")["steps"])
    assert_held(outcome, "ml.zip", 100 << 20)
    assert outcome.kind == "done"


def test_an_archive_cannot_ask_for_gigabytes(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.csv", "user_id,item_id,timestamp\n" + "".join(f"u,i,{t}\n" for t in range(99)))
    content = bytearray(buffer.getvalue())
    # The local header has 30 bytes, the name 5, what precedes the size of the dictionary 5.
    content[40:44] = (0xFFFF_FFFF).to_bytes(4, "little")
    message = refusal(tmp_path, "x.zip", bytes(content))
    assert "asks for 4,095 MiB to be decompressed, and 256 may be asked for" in message


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_damage_within_an_archive(tmp_path, method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("x.csv", "user_id,item_id,timestamp\n" + "".join(f"u,i,{t}\n" for t in range(5000)))
    content = bytearray(buffer.getvalue())
    for place in (60, 200):
        damaged = bytes(content[:place]) + bytes([content[place] ^ 0xFF]) * 4 + bytes(content[place + 4 :])
        message = refusal(tmp_path, "x.zip", damaged)
        assert "x.zip" in message and ("damaged or cut short" in message or "no zip archive" in message)


@pytest.mark.parametrize(
    ("separator", "encoding", "message"),
    [
        ("\n", "utf-8", "--separator: must stand within a line, got '\\n'"),
        ("a\0", "utf-8", "--separator: must stand within a line"),
        ("", "utf-8", "--separator: must not be empty"),
        ("\udcff", "utf-8", "--separator: must be text"),
        ("§", "ascii", "there are user_id,item_id,timestamp"),
        ('"', "utf-8", "there are user_id,item_id,timestamp"),
        (",", "undefined", "encoding: there is no encoding 'undefined'"),
        (",", "idna", "not idna text"),
        (",", "cp037", "name its columns by --user"),
    ],
)
def test_separators_and_encodings_that_do_not_fit(tmp_path, separator, encoding, message):
    content = b"user_id,item_id,timestamp\nu,i,1\n" + ("u" * 70 + ",..\n").encode()
    assert message in refusal(tmp_path, "x.csv", content, separator=separator, encoding=encoding)


def test_encodings_whose_letters_hold_bytes_of_separators(tmp_path):
    """In Shift JIS and Big5 the second byte of a letter may be that of | or of a backslash."""
    for encoding, letter in (("shift_jis", "ポ"), ("big5", "功"), ("gb18030", "丂")):
        (tmp_path / f"{encoding}.csv").write_bytes(f"user_id|item_id|timestamp\n{letter}|i|1\n".encode(encoding))
        convert(tmp_path / f"{encoding}.csv", encoding, tmp_path / "out", encoding=encoding)
        assert f"\n{letter}\ti\t1\n" in (tmp_path / "out" / encoding / f"{encoding}.inter").read_text()


def test_parquet_with_two_columns_of_one_name_or_rows_without_end(tmp_path):
    table = pa.Table.from_arrays([pa.array(["u"])] * 3, names=["user_id", "item_id", "user_id"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet: column 'user_id' stands twice; rename one"):
        convert(tmp_path / "x.parquet", "made", tmp_path / "out")
    huge = {"user_id": ["u" * (20 << 20)], "item_id": ["i"], "timestamp": [1]}
    pyarrow.parquet.write_table(pa.table(huge), tmp_path / "y.parquet", compression="zstd")
    assert "rows of more than 1 MB" in refusal(
        tmp_path, "y.parquet", (tmp_path / "y.parquet").read_bytes(), most=50 << 20
    )


CONTROLS = [chr(code) for code in range(1, 32) if chr(code) not in "\n\r"]


def test_a_separator_of_two_characters_splits_at_nothing_else(tmp_path):
    names = [f"u{mark}v" for mark in CONTROLS]
    head = "user_id:token::item_id:token\n"
    for cells in (names[:-5], names):
        path = tmp_path / "x.inter"
        path.write_text(head + "".join(f"{name}::i\n" for name in cells))
        with BadLines(path, "skip") as bad:
            found = read_columns(path, read_header(path, "::"), separator="::", bad=bad)
        lost = ["u\x1fv"] if cells is names else []
        assert found["user_id"].objects().tolist() == [name for name in cells if name not in lost]
        assert list(bad.numbers) == [cells.index(name) + 2 for name in lost]


@pytest.mark.parametrize(
    ("kind", "cell", "fault"),
    [
        ("token_seq", "a [PAD] b", "is 'a [PAD] b', which holds '[PAD]', RecBole's padding; rename that id"),
        ("float_seq", "1 nan", "is '1 nan', which are not all finite numbers"),
        ("float_seq", "inf", "is 'inf', which are not all finite numbers"),
        ("float_seq", "1_0 2", "is '1_0 2', which are not all finite numbers"),
        ("float_seq", "1 x", "is '1 x', which are no numbers"),
    ],
)
def test_sequences_are_as_strict_as_single_values(tmp_path, kind, cell, fault):
    path = tmp_path / "x.inter"
    path.write_text(f"v:{kind}\n1 2\n{cell}\n3\n")
    with pytest.raises(UserError, match="line 3: v ") as caught:
        read_columns(path, read_header(path))
    assert fault in str(caught.value)


def test_an_empty_separator_of_sequences(tmp_path):
    (tmp_path / "x.inter").write_text("v:token_seq\na\n")
    with pytest.raises(UserError, match="seq_separator: must not be empty"):
        read_columns(tmp_path / "x.inter", {"v": "token_seq"}, seq_separator="")


# --- thousands of files, each in a child of its own ------------------------------------------------------------------

SPICE = [
    b"\t", b",", b"::", b"\n", b"\r\n", b"\r", b"\0", b'"', b'""', b"[PAD]", b"nan", b"1e999", b"-1", b"+3", b" 7 ",
    b"1_0", b"\xff", b"\xc3", "é".encode(), "\u2028".encode(), "\u0661".encode(), b"\xef\xbb\xbf", b"\xff\xfe", b"inf",
    b"0x1", b"\x1f", b"\x1a", b"{", b"[[", b"\\u0000", b"\\ud800", b"null", b"true", b"1e18", b"9223372036854775808",
    b"20200102", b"2020-01-02", b"1970-01-01T00:00:00Z", b"'", b"}", b"]", b"\\", b"1.5", b"-0.0", b"9" * 400,
    b"x" * 5000,
]  # fmt: skip


def spiced(draw, content):
    """Some bytes of a file removed, repeated or replaced, a few times."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del content[at : at + draw.randint(1, 30)]
        elif kind == 2:
            content[at:at] = content[at : at + draw.randint(1, 60)] * draw.choice([1, 1, 1, 50])
        elif kind == 3:
            content = content[: max(at, 1)]
        else:
            content[at : at + draw.randint(0, 3)] = draw.choice(SPICE)
    return bytes(content)


def huge(draw):
    """A file whose size, not its bytes, is the trouble."""
    unit = draw.choice([b"x", b"\n", b",", b"[", b"{'a':", b'"', b"1,", b"\t\n", b"u,i,1\n", b'{"a":[', b"\0", b"\xff"])
    head = draw.choice([b"", b"user_id,item_id,timestamp\n", b"user_id:token\titem_id:token\ttimestamp:float\n", b"{"])
    return head + unit * (draw.choice([1 << 16, 1 << 18, 1 << 20]) // len(unit))


def text_of(draw, kind):
    """A sound file of text of that kind; its rows are :data:`ROWS` in another order."""
    rows = draw.sample(ROWS, len(ROWS))
    if kind == "x.jsonl":
        write = draw.choice([json.dumps, repr])
        return "".join(write(dict(zip(("user_id", "item_id", "timestamp"), row))) + "\n" for row in rows)
    cut = "\t" if kind == "x.inter" else draw.choice([",", ";", "|", "\t"])
    names = ["user_id", "item_id", "timestamp"]
    if kind == "x.inter":
        names = ["user_id:token", "item_id:token", "timestamp:float"]
    quote = draw.choice([str, '"{}"'.format]) if kind == "x.csv" else str
    return "".join(cut.join(map(quote, row)) + "\n" for row in [names, *rows])


def parquet_of(draw):
    users, items, times = zip(*ROWS)
    numbers = [int(time) for time in times]
    columns = {
        "user_id": draw.choice([pa.array(users), pa.array(users).dictionary_encode(), pa.array([1.0, None] * 6)]),
        "item_id": draw.choice([pa.array(items), pa.array(range(12)), pa.array([[k] for k in range(12)])]),
        "timestamp": draw.choice(
            [
                pa.array(numbers), pa.array(numbers, pa.timestamp("s")), pa.array(numbers, pa.timestamp("ns", "UTC")),
                pa.array([*numbers[:-1], None]), pa.array([float("nan"), *numbers[1:]]), pa.array(times),
                pa.array(range(12), pa.date32()), pa.array(range(12), pa.time32("s")), pa.array([2**62] * 12),
                pa.array(numbers, pa.duration("s")), pa.array([True] * 12), pa.array(times, pa.large_string()),
            ]
        ),
    }  # fmt: skip
    buffer = io.BytesIO()
    compression = draw.choice(["none", "snappy", "zstd", "gzip"])
    pyarrow.parquet.write_table(pa.table(columns), buffer, compression=compression, row_group_size=draw.choice([3, 99]))
    return buffer.getvalue()


def exact(cell):
    """A time as ``convert`` must read it, or None."""
    try:
        number = Decimal("nan" if "_" in cell else cell.strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() and number.copy_abs() < 2**63 else None


def plain_rows(name, text):
    """``(rows, whether every line is sound)`` of a text by the simplest reader; None where it cannot tell."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n").split("\n")
    if name == "x.jsonl":
        try:
            found = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        if not all(isinstance(one, dict) for one in found):
            return None
        cells = [[one.get(key) for key in ("user_id", "item_id", "timestamp")] for one in found]
        return None if not all(isinstance(cell, str) for row in cells for cell in row) else cells
    head = lines[0]
    if '"' in text:
        return None
    cut = "\t" if name == "x.inter" else max("\t", ",", ";", "|", key=head.count)
    if [cell.partition(":")[0] if name == "x.inter" else cell for cell in head.split(cut)] != [
        "user_id",
        "item_id",
        "timestamp",
    ]:
        return None
    return [line.split(cut) for line in lines[1:]]


def expected_rows(rows):
    """What ``convert`` writes of rows, or None where it must refuse one."""
    for row in rows:
        sound = len(row) == 3 and row[0] and row[1] and "[PAD]" not in row and exact(row[2]) is not None
        if not sound or any(mark in cell for cell in row for mark in "\0\r\n\t"):
            return None
    users = list(dict.fromkeys(row[0] for row in rows))
    return sorted(rows, key=lambda row: (users.index(row[0]), math.floor(exact(row[2]) * 10**9)))


def converted(path, out, name, **options):
    """The rows that ``convert`` writes."""
    convert(path, name, out, **options)
    lines = (out / name / f"{name}.inter").read_text(encoding="utf-8").split("\n")[1:-1]
    return [line.split("\t") for line in lines]


def looked_at(path):
    """The rows of an atomic file as training and ``inspect`` read them."""
    found = read(path, ("user_id", "item_id", "timestamp"), BadLines(path), "\t", "utf-8")
    return [list(row) for row in zip(found.users.objects(), found.items.objects(), found.times.tolist())]


def try_file(draw, folder, k):
    """Make a file, hold what is read of it against the simplest reader, and return its kind and what became of it."""
    name = draw.choice(["x.csv", "x.jsonl", "x.inter", "x.parquet", "x.csv"])
    encoding = draw.choice(["utf-8"] * 6 + ["latin-1", "utf-16", "utf-32", "utf-7", "cp1252", "shift_jis", "ascii"])
    if name == "x.parquet":
        content = spiced(draw, parquet_of(draw)) if draw.random() < 0.8 else parquet_of(draw)
    elif draw.random() < 0.04:
        content = huge(draw)
    else:
        content = text_of(draw, name).encode(encoding)
        content = content if draw.random() < 0.1 else spiced(draw, content)
    (folder / name).write_bytes(content)
    skip = draw.random() < 0.3
    options = {"encoding": encoding, "on_bad_lines": "skip" if skip else "error"}
    outcome = in_child(functools.partial(converted, folder / name, folder / "out", f"n{k}", **options))
    what = (k, name, encoding, skip, content[:300])
    assert_held(outcome, what)
    try:
        rows = plain_rows(name, content.decode(encoding)) if name != "x.parquet" else None
    except UnicodeError:
        rows = None
    if rows is not None and not skip:
        right = expected_rows(rows)
        assert (outcome.kind == "done") == bool(right), (what, outcome.value)
        if right:
            assert [row[:2] for row in outcome.value] == [row[:2] for row in right], what
            times = zip(outcome.value, right)
            assert all(abs(Decimal(row[2]) - exact(good[2])) < Decimal("1e-9") for row, good in times), what
    if name == "x.inter" and encoding == "utf-8":
        read = in_child(functools.partial(looked_at, folder / name))
        assert_held(read, what)
        if rows is not None and read.kind == "done":
            assert [row[:2] for row in read.value] == [row[:2] for row in rows], what
            assert [row[2] for row in read.value] == [float(row[2]) for row in rows], what
    return name, outcome.kind


@pytest.mark.parametrize(("count", "seed"), [(60, 11), pytest.param(3_000, 12, marks=pytest.mark.slow)])
def test_hostile_data_files(tmp_path, count, seed):
    draw = random.Random(seed)
    kinds = {try_file(draw, tmp_path, k) for k in range(count)}
    assert len(kinds) == 8, "each kind of file read and refused"


def archive_of(draw, rows):
    """``(name of the file, its bytes, what is in it)`` of a sound archive; what is in it is rows, or None."""
    text = "user_id,item_id,timestamp\n" + "".join(",".join(row) + "\n" for row in rows)
    if draw.random() < 0.35:
        return "x.csv.gz", gzip.compress(text.encode(), draw.choice([0, 9])), rows
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    members = {"folder/x.csv": text.encode()}
    kind = draw.randrange(8)
    if kind == 0:
        members["folder/y.csv"] = members["folder/x.csv"]
    elif kind == 1:
        members = {"../../x.csv": text.encode(), "/etc/readme": b"x"}
    elif kind == 2:
        members = {"x.csv.gz": gzip.compress(text.encode())}
    elif kind == 3:
        members = {f"{k}.txt": b"" for k in range(draw.choice([10, 3000]))} | members
    elif kind == 4:
        members = {"x.csv": draw.choice([b"\0", b"x", b"u,i,1\n", b"\n"]) * (draw.choice([1, 30]) << 20)}
    elif kind == 5:
        members = {"x.parquet": gzip.compress(b"PAR1" * 9), "x\0.csv": b"", "ü/.csv": b"x"}
    elif kind == 6:
        members = {"ml/ratings.dat": "".join("::".join([u, i, "3", t]) + "\n" for u, i, t in rows).encode()}
        members["ml/movies.dat"] = b"".join(f"{i}::T (1999)::Drama\n".encode() for _, i, _ in rows)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw.choice(methods)) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return "x.zip", buffer.getvalue(), None if kind in (0, 4, 5) else rows


def damaged(draw, content):
    """An archive cut, flipped or with fields of its headers changed."""
    content = bytearray(content)
    kind = draw.randrange(6)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content))
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content = content[: max(at, 4)]
        elif kind == 2:
            del content[at : at + draw.randint(1, 20)]
        elif kind == 3:
            content[at:at] = draw.choice([b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"\0" * 20, b"\xff" * 20])
        else:
            # A field of a local header, of the directory or of its end: flags, method, sizes, offsets.
            heads = [
                spot for mark in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06") if (spot := content.find(mark)) >= 0
            ]
            spot = (draw.choice(heads) if heads else 0) + draw.randrange(4, 42)
            value = draw.choice([0, 1, 8, 9, 12, 14, 97, 0xFFFF, draw.randrange(1 << 16)])
            content[spot : spot + 2] = struct.pack("<H", value)
    return bytes(content)


def try_archive(draw, folder, k):
    """Make an archive, hold what is read of it against what was put in, and return what became of it."""
    name, content, rows = archive_of(draw, draw.sample(ROWS, len(ROWS)))
    sound = draw.random() < 0.15
    (folder / name).write_bytes(content if sound else damaged(draw, content))
    outcome = in_child(functools.partial(converted, folder / name, folder / "out", f"n{k}"))
    assert_held(outcome, (k, name))
    if rows and outcome.kind == "done":
        # The checksums within archives vouch for what is read.
        found = [row[:2] + row[-1:] for row in outcome.value]
        assert found == [list(row) for row in expected_rows(rows)], (k, name)
    assert not (sound and rows) or outcome.kind == "done", (k, name, outcome.value)
    return outcome.kind


@pytest.mark.parametrize(("count", "seed"), [(40, 21), pytest.param(1_000, 22, marks=pytest.mark.slow)])
def test_hostile_archives(tmp_path, count, seed):
    draw = random.Random(seed)
    kinds = Counter(try_archive(draw, tmp_path, k) for k in range(count))
    assert min(kinds["done"], kinds["refused"]) > count / 30
