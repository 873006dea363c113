"""The reader of atomic files: what it keeps, and one line for every fault."""

import math
import random
import resource
import time

import numpy as np
import pytest

from recbole_ssm.data import lines
from recbole_ssm.data.atomic import as_frame, read_columns, read_header
from recbole_ssm.data.lines import BadLines
from recbole_ssm.errors import UserError

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
REQUIRED = ("user_id", "item_id", "timestamp")


def read(tmp_path, content, **options):
    path = tmp_path / "x.inter"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return as_frame(read_columns(path, read_header(path), **{"required": REQUIRED, **options}))


def test_what_other_readers_lose_is_kept(tmp_path):
    """Ids that look missing, zeros in front, quotation marks, accents, CRLF, a byte-order mark."""
    lines = ["NA\t007\t1", 'null\t"a\t2', 'None\tb"\t3.5', "é\t1e5\t978300019"]
    frame = read(tmp_path, b"\xef\xbb\xbf" + (HEADER + "\n".join(lines) + "\n").replace("\n", "\r\n").encode())
    assert frame["user_id"].tolist() == ["NA", "null", "None", "é"]
    assert frame["item_id"].tolist() == ["007", '"a', 'b"', "1e5"]
    assert frame["timestamp"].tolist() == [1.0, 2.0, 3.5, 978300019.0]


def test_sequences_and_missing_features(tmp_path):
    header = (
        "user_id:token\titem_id:token\ttimestamp:float\ttags:token_seq\tvector:float_seq\trating:float\tkind:token\n"
    )
    frame = read(tmp_path, header + "u\ti\t1\ta b  c\t1 2.5\t\t\nu\tj\t2\t\t\t4\tk\n")
    assert [list(row) for row in frame["tags"]] == [["a", "b", "c"], []]
    assert [list(row) for row in frame["vector"]] == [[1.0, 2.5], []]
    assert np.isnan(frame["rating"][0]) and frame["rating"][1] == 4.0
    assert frame["kind"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.inter: the file is empty; its first line must name the columns"),
        (HEADER, "x.inter: there is a header but no line below it"),
        ("user_id\titem_id\n1\t2\n", "line 1: column 'user_id' must read name:type"),
        ("user_id:token,item_id:token\n", "line 1: column user_id has type 'token,item_id:token'"),
        ("user_id:string\n", "line 1: column user_id has type 'string'; known are token, token_seq, float, float_seq"),
        ("a:token\ta:token\n", "line 1: column a stands twice; keep one"),
        (HEADER + "u\ti\t1\nu\ti\t2\t3\n", "line 3: 4 columns where the header has 3"),
        (HEADER + "u\ti\t1\t\nu\ti\t2\t\n", "line 2: 4 columns where the header has 3"),
        (HEADER + "u\ti\t1\nu\ti\n", "line 3: 2 columns where the header has 3"),
        (HEADER + "u\ti\t1\n\nu\ti\t2\n", "line 3: the line is empty; drop it"),
        (HEADER + "u\ti\t1\nu\ti\tyesterday\n", "line 3: timestamp is 'yesterday', which is no finite number"),
        (HEADER + "u\ti\tinf\n", "line 2: timestamp is 'inf', which is no finite number"),
        (HEADER + "u\ti\t0x5F\n", "line 2: timestamp is '0x5F', which is no finite number"),
        (HEADER + "u\ti\tnan\n", "line 2: timestamp is 'nan', which is no finite number"),
        (HEADER + "u\ti\t\n", "line 2: timestamp is empty; fill it in or drop the line"),
        (HEADER + "u\t\t1\n", "line 2: item_id is empty; fill it in or drop the line"),
        (HEADER + "u\t[PAD]\t1\n", "line 2: item_id is '[PAD]', RecBole's padding; rename that id"),
        (HEADER + "u\ta\0b\t1\n", "line 2: a control character within the line"),
        (HEADER.encode() + b"u\ti\t1\nu\t\xff\t2\n", "not utf-8 text; set encoding"),
        (b"\xff\xfe\n", "line 1: not utf-8 text; set encoding"),
        (
            "user_id:token\titem_id:token\ttimestamp:float\tv:float_seq\nu\ti\t1\ta b\n",
            "line 2: v is 'a b', which are no numbers",
        ),
    ],
)
def test_every_fault_is_one_line(tmp_path, content, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value)
    assert "x.inter" in str(caught.value) and "\n" not in str(caught.value)


def test_other_encodings_and_separators(tmp_path):
    path = tmp_path / "x.inter"
    path.write_bytes("user_id:token,title:token_seq\né,a|b\n".encode("latin-1"))
    header = read_header(path, ",", "latin-1")
    frame = as_frame(read_columns(path, header, separator=",", seq_separator="|", encoding="latin-1"))
    assert frame["user_id"][0] == "é" and list(frame["title"][0]) == ["a", "b"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.inter: No such file"):
        read_header(tmp_path / "absent.inter")


def test_wide_encodings_and_separators_of_several_bytes(tmp_path):
    path = tmp_path / "x.inter"
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        path.write_bytes("user_id:token::title:token_seq\r\né::a b\r\nü::c\r\n".encode(encoding))
        frame = as_frame(read_columns(path, read_header(path, "::", encoding), separator="::", encoding=encoding))
        assert frame["user_id"].tolist() == ["é", "ü"] and list(frame["title"][1]) == ["c"]
    path.write_bytes("user_id:token\n\ud800\n".encode("utf-16", "surrogatepass"))
    with pytest.raises(UserError, match="not utf-16 text"):
        read_columns(path, {"user_id": "token"}, encoding="utf-16")


def test_an_empty_separator_is_refused(tmp_path):
    (tmp_path / "x.inter").write_text("user_id:token\nu\n")
    with pytest.raises(UserError, match="field_separator: must not be empty"):
        read_header(tmp_path / "x.inter", "")


def test_equal_ids_are_one_object(tmp_path):
    frame = read(tmp_path, HEADER + "someone\ti\t1\n" * 3)
    assert len({id(cell) for cell in frame["user_id"]}) == 1


FAULTY = HEADER + "u\ti\t1\n\nu\tj\nu\tj\t2\nu\t[PAD]\t3\nu\tk\tsoon\nu\t\t3\nu\tk\t3\n"


@pytest.mark.parametrize("block", [lines.BLOCK, 7])
def test_bad_lines_are_skipped_counted_and_kept(tmp_path, monkeypatch, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    side = tmp_path / "saved" / "x.inter.skipped"
    with BadLines(tmp_path / "x.inter", "skip", side) as bad:
        frame = read(tmp_path, FAULTY.encode() + b"u\t\xff\t4\nu\tl\t4", bad=bad)
    assert frame["item_id"].tolist() == ["i", "j", "k", "l"] and frame["timestamp"].tolist() == [1, 2, 3, 4]
    assert sorted(bad.numbers) == [3, 4, 6, 7, 8, 10]
    assert [bad.line_of(row) for row in range(4)] == [2, 5, 9, 11]
    kept = {int(line.split(b"\t")[0]): line.split(b"\t", 2)[1:] for line in side.read_bytes().splitlines()}
    assert sorted(kept) == sorted(bad.numbers)
    assert kept[4] == [b"2 columns where the header has 3: 'u\\tj'; correct the line or drop it", b"u\tj"]
    assert kept[10][1] == b"u\t\xff\t4"
    assert str(bad).startswith(f"{tmp_path / 'x.inter'}: 6 lines skipped, the first because line 3: the line is empty")
    assert (tmp_path / "x.inter").read_bytes().startswith(FAULTY.encode())  # the source stays as it is


def test_no_side_file_where_nothing_is_skipped_or_the_read_fails(tmp_path):
    with BadLines(tmp_path / "x.inter", "skip", tmp_path / "side") as bad:
        read(tmp_path, HEADER + "u\ti\t1\n", bad=bad)
    with (
        pytest.raises(UserError, match="every line has a fault; the first is line 2: 1 columns"),
        BadLines(tmp_path / "x.inter", "skip", tmp_path / "side") as bad,
    ):
        read(tmp_path, HEADER + "u\nv\n", bad=bad)
    assert [file.name for file in tmp_path.iterdir()] == ["x.inter"]
    with pytest.raises(UserError, match="on_bad_lines: must be error or skip, got 'drop'"):
        BadLines("x", "drop")


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 1 << 20)
    monkeypatch.setattr(lines, "BLOCK", 1 << 12)
    with pytest.raises(UserError, match="line 2: the line is longer than 1 MB"):
        read(tmp_path, HEADER + "x" * (1 << 24))


# --- mutated files, beside a plain reader that looks at one line after the other -----------------------------------


def mutate(draw):
    """A small file with one to four faults or harmless changes in it."""
    content = bytearray((HEADER + "".join(f"u{i % 3}\ti{i}\t{i}.5\n" for i in range(8))).encode())
    spots = [b"\t", b"\n", b"\r\n", b"\r", b"\0", b"", b"[PAD]", b'"', b"nan", b"1e999", b"+3", b" 7 ", b"1_0", b"\xff"]
    spots += ["é".encode(), "\u2028".encode(), b"\xef\xbb\xbf", b"inf", b"-", b"0x1", b",", b"\x1f", b"\x1a", b"\xc3"]
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content)) if draw.random() < 0.2 else draw.randrange(len(HEADER), max(len(content), 50))
        kind = draw.randrange(5)
        if kind == 0:
            content[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del content[at : at + draw.randint(1, 9)]
        elif kind == 2:
            content[at:at] = content[at : at + 9]
        else:
            content[at : at + draw.randint(0, 3)] = draw.choice(spots)
        content = content or bytearray(b"x")
    return bytes(content)


def plain(content):
    """``(good rows, numbers of bad lines)`` of the lines below the header."""
    below = content.partition(b"\n")[2].replace(b"\r\n", b"\n").removesuffix(b"\r")
    good, bad = [], []
    for number, line in enumerate(below.split(b"\n")[: None if below[-1:] not in (b"\n", b"") else -1], 2):
        try:
            user, item, cell = line.decode().split("\t")
            fits = not set("\0\r") & set(line.decode()) and user and item and "[PAD]" not in (user, item)
            value = float(cell) if "_" not in cell else math.nan
        except ValueError:
            fits = False
        if fits and math.isfinite(value):
            good.append((user, item, value))
        else:
            bad.append(number)
    return good, bad


@pytest.mark.parametrize(("count", "seed"), [(600, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)])
def test_mutated_files_are_read_rightly_or_refused_in_one_line(tmp_path, monkeypatch, count, seed):
    """Accepted exactly where the plain reader accepts, the same rows kept, and never anything but one line."""
    draw = random.Random(seed)
    path = tmp_path / "x.inter"
    outcomes = {"read": 0, "refused": 0, "header": 0}
    longest, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        content = mutate(draw)
        monkeypatch.setattr(lines, "BLOCK", draw.choice([16, 64, 1 << 24]))
        path.write_bytes(content)
        good, faulty = plain(content)
        start = time.perf_counter()
        try:
            header = read_header(path)
            if list(header.items()) != [("user_id", "token"), ("item_id", "token"), ("timestamp", "float")]:
                outcomes["header"] += 1
                continue
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["header"] += 1
            continue
        for mode in ("error", "skip"):
            bad = BadLines(path, mode)
            try:
                found = read_columns(path, header, required=REQUIRED, bad=bad)
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                assert (faulty if mode == "error" else not good) or not (good or faulty), (content, error)
                outcomes["refused"] += 1
                continue
            assert mode == "skip" or not faulty, content
            assert sorted(bad.numbers) == faulty, content
            rows = zip(found["user_id"].objects(), found["item_id"].objects(), found["timestamp"])
            assert list(rows) == good, content
            outcomes["read"] += 1
        longest = max(longest, time.perf_counter() - start)
    assert min(outcomes.values()) > count / 30, outcomes
    assert longest < 30 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
