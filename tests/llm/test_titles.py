"""Titles by item id, and what is wrong where there are none."""

import pytest

from recbole_ssm.data import create_dataset
from recbole_ssm.errors import UserError
from recbole_ssm.llm import titles_of
from recbole_ssm.quick_start import configure

EVENTS = "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(
    f"u{user}\ti{item}\t{item}\n" for user in range(3) for item in range(12)
)


@pytest.fixture
def titles(write_dataset):
    """The titles by token that an .item file gives."""

    def read(item_file, **options):
        found = write_dataset(EVENTS)
        if item_file is not None:
            write_dataset(item_file, suffix="item")
        config = configure("GPT4Rec", found["dataset"], config_dict={**found["config_dict"], **options})
        dataset = create_dataset(config)
        dataset.build()
        listed = titles_of(dataset, config)
        assert listed[0] == "" and len(listed) == dataset.item_num == 13
        return dict(zip(dataset.field2id_token["item_id"], listed))

    return read


def test_titles_are_cleaned_and_items_without_events_stay_out(titles, caplog):
    file = "item_id:token\tprice:float\ttitle:token_seq\n"
    file += "i1\t1.5\tBeauty &amp; the  Beast \nnever_bought\t2\tX\ni2\t\t\n"
    file += "".join(f"i{item}\t\tNo. {item}\n" for item in (0, *range(3, 12)))
    found = titles(file)
    assert (found["i1"], found["i2"], found["i11"]) == ("Beauty & the Beast", "i2", "No. 11")
    assert "1 of 12 items have no title; their ids stand for them" in caplog.text


def test_a_column_of_single_tokens_and_another_name(titles):
    file = "item_id:token\tlabel:token\ttitle:token\n" + "".join(f"i{i}\tL {i}\tT {i}\n" for i in range(12))
    assert titles(file)["i3"] == "T 3"
    assert titles(file, title_field="label")["i3"] == "L 3"


def test_the_first_line_of_an_item_counts_and_faulty_ones_are_skipped(titles, caplog):
    """As where models read features, and as convert writes them."""
    file = "item_id:token\ttitle:token\n" + "".join(f"i{i}\tT {i}\n" for i in range(12)) + "i3\tagain\n\tnothing\n"
    with pytest.raises(UserError, match="made.item, line 15: item_id is empty"):
        titles(file)
    assert titles(file, on_bad_lines="skip")["i3"] == "T 3"
    assert "made.item: 1 lines skipped, the first because line 15" in caplog.text


def test_movie_titles_are_found_without_a_word():
    config = configure("GPT4Rec", "ml-100k")
    dataset = create_dataset(config)
    dataset.build()
    found = titles_of(dataset, config)
    assert found[int(dataset.token2id("item_id", "1"))] == "Toy Story" and len(found) == 1683


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (None, {}, "made.item: there is no such file, and GPT4Rec reads titles from it; write one with the columns"),
        ("item_id:token\tyear:float\ni1\t3\n", {}, "no column of titles (its columns of text are none); add a column"),
        (
            "item_id:token\theadline:token_seq\tshade:token\ni1\tx\tred\n",
            {},
            "no column of titles (its columns of text are headline, shade); add --title_field=COLUMN",
        ),
        (
            "item_id:token\theadline:token_seq\ni1\tx\n",
            {"title_field": "headlin"},
            "has no column headlin of text; did you mean 'headline'? (its columns of text are headline)",
        ),
        ("item:token\ttitle:token\ni1\tx\n", {}, "no column item_id:token (there are item, title)"),
        (
            "item_id:token\ttitle:token\nother\tx\n",
            {},
            "has no title for any of the 12 items; add --title_field=COLUMN, with",
        ),
    ],
)
def test_bad_files(titles, file, options, message):
    with pytest.raises(UserError) as caught:
        titles(file, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
