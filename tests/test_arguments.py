"""What users type, as values."""

import re

import pytest

from recbole_ssm.arguments import at_least, join_values, names, one_of, positive, sizes, some_of
from recbole_ssm.errors import ArgumentParser, UserError


def test_names_between_commas():
    assert names("SASRec, Mamba4Rec") == ["SASRec", "Mamba4Rec"]
    assert names(" a,,b, ") == ["a", "b"] and names("") == []


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (at_least(0), "0", 0),
        (sizes, "3,1,3", [3, 1]),
        (positive, "1e-3", 0.001),
        (one_of(["wall", "processor"]), "wall", "wall"),
        (some_of({"a": 1, "b": 2}), "b, a", ["b", "a"]),
    ],
)
def test_options_are_parsed_by_their_type(kind, text, value):
    parser = ArgumentParser("program", None)
    parser.add_argument("--option", type=kind)
    assert parser.parse_args([f"--option={text}"]).option == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (at_least(2), "1", "must be at least 2, got 1"),
        (at_least(2), "1.5", "must be a whole number, got 1.5"),
        (sizes, "1,x", "must be whole numbers with commas, got 1,x"),
        (sizes, "4,0", "must be at least 1, got 4,0"),
        (positive, "nan", "must be above 0, got nan"),
        (positive, "soon", "invalid positive value: 'soon'"),
        (
            one_of(["wall", "processor"]),
            "processer",
            "'processer' is not one of wall, processor; did you mean 'processor'?",
        ),
        (some_of(["a", "b"]), "a,c", "'c' is not one of a, b"),
        (some_of(["a", "b"]), "a,a", "must be one name or more, each once, got a,a"),
        (some_of(["a", "b"]), "", "must be one name or more, each once, got "),
    ],
)
def test_impossible_options_are_told_with_their_name(kind, text, message):
    parser = ArgumentParser("program", None)
    parser.add_argument("--option", type=kind)
    with pytest.raises(UserError, match=f"^program: argument --option: {re.escape(message)}"):
        parser.parse_args([f"--option={text}"])


def test_flags_take_no_value():
    assert join_values(["--prune", "--seeds", "3", "-m", "A"], {"--prune"}) == ["--prune", "--seeds=3", "--model=A"]
    assert join_values(["--prune=5", "--prune"], {"--prune"}) == ["--prune=5", "--prune"]
    with pytest.raises(UserError, match="--prune has no value"):
        join_values(["--prune"])


@pytest.mark.parametrize("following", ["--epochs=30", "--epochs", "-m"])
def test_an_option_is_no_value_of_the_option_before_it(following):
    with pytest.raises(UserError, match="--allow_pickle has no value; options look like --allow_pickle=VALUE"):
        join_values(["--allow_pickle", following, "30"])
    assert join_values(["--seed", "-1", "--name=--x"]) == ["--seed=-1", "--name=--x"]
