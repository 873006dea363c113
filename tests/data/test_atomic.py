"""The reader of atomic files: what it keeps, and one line for every fault."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm.data.atomic import read_atomic, read_header
from recbole_ssm.errors import UserError

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
REQUIRED = ("user_id", "item_id", "timestamp")


def read(tmp_path, content, **options):
    path = tmp_path / "x.inter"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_atomic(path, read_header(path), **{"required": REQUIRED, **options})


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
    frame = read_atomic(path, header, separator=",", seq_separator="|", encoding="latin-1")
    assert frame["user_id"][0] == "é" and list(frame["title"][0]) == ["a", "b"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.inter: No such file"):
        read_header(tmp_path / "absent.inter")


@given(data=st.data())
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path_factory, data):
    content = bytearray((HEADER + "".join(f"u{i % 3}\ti{i}\t{i}.5\n" for i in range(8))).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["put", "cut", "double"]))
        if kind == "put":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 9))]
        else:
            content[at:at] = content[at : at + 9]
        content = content or bytearray(b"x")
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        frame = read(folder, bytes(content), required=())
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(frame) >= 1
