"""Known ranks in, known tables out."""

import csv
import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from recbole_ssm.evaluation.significance import holm
from recbole_ssm.study import report
from recbole_ssm.study.asking import tables
from recbole_ssm.study.entry import Entry, of_same_targets
from recbole_ssm.study.outcome import Outcome, Run
from recbole_ssm.study.published import PUBLISHED, published

MADE = {"date": "2026-01-02", "recbole_ssm": "0", "torch": "2", "python": "3", "system": "X", "cpu": "C", "threads": 1}
SETTINGS = {"eval_args": {"split": {"LS": "valid_and_test"}}, "epochs": 3, "train_mode": "packed"}


@pytest.fixture
def entry(tmp_path):
    """An entry whose seeds have these ranks; users are 0, 1, 2 ..."""

    def make(model, *seeds, dataset="ml-1m", error=None, **settings):
        outcomes = []
        for number, ranks in enumerate(seeds):
            folder = tmp_path / dataset / model / str(number)
            folder.mkdir(parents=True)
            np.savez(folder / "ranks.npz", user=np.arange(len(ranks)).astype(str), rank=np.array(ranks, dtype=float))
            run = Run(model, dataset, {"seed": number})
            costs = {"seconds": 10.0 + number, "epochs": 4, "parameters": 1234, "items": 50, "peak_memory": 2**20}
            outcomes.append(Outcome(run, None, folder, **costs, made={**MADE, "gpu": None}))
        if error:
            outcomes.append(Outcome(Run(model, dataset), error, tmp_path))
        speed = {"p50_s": 0.002, "users_per_second": 5000.0}
        return Entry(Run(model, dataset), model, {**SETTINGS, **settings}, speed, len(outcomes), outcomes)

    return make


@pytest.fixture
def two(entry):
    return [entry("SASRec", [1, 2, 11, 4], [1, 11, 11, 4]), entry("Mamba4Rec", [1, 1, 2, 1], [1, 1, 1, 1])]


def test_rows_from_ranks(two):
    found = report.tests(two)
    sasrec, mamba = report.rows(two, found)
    assert (sasrec["hit"], sasrec["hit_sd"]) == (0.625, pytest.approx(statistics.stdev([0.75, 0.5])))
    assert sasrec["mrr"] == pytest.approx((1.75 / 4 + 1.25 / 4) / 2)
    assert mamba["ndcg"] == pytest.approx((1 + (3 + 1 / math.log2(3)) / 4) / 2)
    assert (sasrec["seconds"], sasrec["seconds_per_epoch"], sasrec["latency_p50_s"]) == (10.5, 10.5 / 4, 0.002)
    ndcg = [1 / math.log2(rank + 1) for rank in (1, 2, 4)]
    means = [ndcg[0], ndcg[1] / 2, 0, ndcg[2]], [1, 1, (1 + ndcg[1]) / 2, 1]
    assert sasrec["p_best"] == pytest.approx(stats.ttest_rel(*means).pvalue) and mamba["p_best"] is None
    assert [pair.metric for pair in found["ml-1m"]] == ["Hit@10", "NDCG@10", "MRR@10"]


def test_markdown(two):
    lines = report.markdown(report.rows(two, {})).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1:5] == ["ml-1m", "SASRec", "2", ".6250 ± .1768"] and cells[6] == ".3750 ± .0884"
    assert cells[7:-1] == ["", "2.00", "5,000", "1,234", "packed", "4.0", "10", "1"]
    assert "| **1.0000 ± .0000** |" in lines[3] and "**" not in lines[2]


def test_each_data_set_has_a_best_of_its_own(two, entry):
    """The metrics of the second data set are all below those of the first."""
    two += [entry(model, ranks, dataset="beauty") for model, ranks in (("SASRec", [3, 4, 5]), ("Mamba4Rec", [4, 4, 5]))]
    lines = report.markdown(report.rows(two, {})).splitlines()
    bold = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines if "**" in line}
    assert bold == {("ml-1m", "Mamba4Rec"), ("beauty", "SASRec"), ("beauty", "Mamba4Rec")}
    assert [line.count("**") // 2 for line in lines[2:]] == [0, 3, 3, 1]


def test_latex_escapes_and_ends_its_lines(two, entry):
    two.append(entry("GRU4Rec_x%", error="100% of it_failed", dataset="a_b"))
    lines = report.latex(report.rows(two, report.tests(two))).splitlines()
    assert lines[0] == r"\begin{tabular}{llrrrrrrrrrrrr}" and lines[-1] == r"\end{tabular}"
    assert lines[4].startswith(r"ml-1m & SASRec & 2 & .6250 $\pm$ .1768 & ") and lines[4].endswith(r"\\")
    assert lines[6].startswith(r"a\_b & GRU4Rec\_x\% & 0 of 1 &  & ") and lines[6].endswith("% 100% of it_failed")
    assert all(line.count(" & ") == 13 for line in lines[2:3] + lines[4:7])


def test_csv_has_every_figure_in_full(two, tmp_path):
    report.write(tmp_path, "x", two, [1, 2], "none")
    table = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [row["model"] for row in table] == ["SASRec", "Mamba4Rec"]
    assert float(table[0]["hit"]) == 0.625 and table[0]["error"] == "" and float(table[0]["latency_p50_s"]) == 0.002


def test_a_failed_run_is_a_row_that_says_why(two, entry, tmp_path):
    entries = [*two, entry("GRU4Rec", error="out of paper"), entry("Hydra4Rec", [3, 3, 3, 3], error="killed")]
    text = report.write(tmp_path / "out", "x", entries, [1, 2], "none")
    assert "| ml-1m | GRU4Rec | 0 of 1 |  |" in text and "- ml-1m, GRU4Rec: out of paper\n" in text
    assert "| ml-1m | Hydra4Rec | 1 of 2 | **1.0000** |" in text and "- ml-1m, Hydra4Rec: killed\n" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"x-tests.csv", "x.csv", "x.md", "x.tex"}
    assert (tmp_path / "out" / "x.md").read_text() == text
    tested = list(csv.DictReader((tmp_path / "out" / "x-tests.csv").open()))
    assert len(tested) == 9  # three models, three metrics
    ps = [float(row["t_p"]) for row in tested if row["metric"] == "MRR@10"]
    assert [float(row["holm_p"]) for row in tested if row["metric"] == "MRR@10"] == pytest.approx(holm(ps))


def test_nothing_done_yet(entry, tmp_path):
    text = report.write(tmp_path, "x", [entry("SASRec"), entry("GRU4Rec", error="no")], [1], "none")
    assert "| ml-1m | SASRec | 0 | not run |" in text and "| ml-1m | GRU4Rec | 0 of 1 |  |" in text


def test_protocol(two, entry):
    two[1].settings |= {"residual": "auto", "num_layers": 1, "dropout_prob": 0.4}
    text = report.protocol(two, [2020, 2021], "none")
    assert "- ml-1m (4 users tested, 50 items): leave one out by time, so trained" in text
    assert "; epochs 3; train_mode packed\n" in text
    assert "  - SASRec: as above\n  - Mamba4Rec: num_layers 1, residual False, dropout_prob 0.4\n" in text
    assert "- Seeds 2020, 2021;" in text and "- Tuning: none.\n" in text and "not masked" in text
    assert "- C, 1 thread; recbole_ssm 0, PyTorch 2, Python 3, X; 2026-01-02.\n" in text


def test_a_residual_that_follows_from_the_layers_is_told_apart(entry):
    layers = {"Mamba4Rec": 1, "2Mamba4Rec": 2}
    two = [entry(name, [1, 2], residual="auto", num_layers=number) for name, number in layers.items()]
    two[0].outcomes[0].run.options["clip_grad_norm"] = None
    pre = entry("Mamba4Rec", [1, 2], dataset="toy", residual="auto", num_layers=1, norm_position="pre")
    assert "residual True; norm_position pre" in report.protocol([pre], [1], "none")
    text = report.protocol(two, [1], "none")
    assert "  - Mamba4Rec: num_layers 1, residual False\n  - 2Mamba4Rec: num_layers 2, residual True\n" in text
    assert "clip_grad_norm None\n" in text


def test_keys_that_the_user_gave_are_in_the_protocol(entry):
    one = entry("Mamba4Rec", [1, 2], d_state=16)
    one.outcomes[0].run.options["d_state"] = 16
    assert "d_state 16" in report.protocol([one], [1], "none")


def test_what_a_preset_chose_is_told(entry):
    one = entry("SASRec", [1, 2], inner_size=99, n_heads=7)
    one.chosen = {"preset", "data_path", "dataset", "inner_size", "n_heads"}
    words = report.protocol([one], [1], "none")
    assert "inner_size 99" in words and "n_heads 7" in words and "preset" not in words and "data_path" not in words
    assert next(report.of_runs(one))["settings"] == {"inner_size": 99, "n_heads": 7}


def test_rows_among_other_numbers_of_items_stand_apart(two, entry):
    assert "items" not in report.rows(two, {})[0]
    two[1].outcomes = [replace(outcome, items=57) for outcome in two[1].outcomes]
    not_run = entry("GRU4Rec")
    assert report.tests([*two, not_run], of_same_targets) == {"ml-1m": []}
    assert [row.get("items") for row in report.rows([*two, not_run], {})] == ["50", "57", None]
    words = report.protocol([*two, not_run], [1], "none")
    assert "(4 users tested, 50 or 57 items)" in words and "- Mamba4Rec: 57 items" in words


def test_the_table_has_no_p_where_the_users_say_the_opposite_of_the_rows(entry):
    """One user has most of the rows."""
    users = np.array([*["a"] * 90, *"bcdefgh"])
    one, other = entry("One", [*[1] * 90, *[30] * 7]), entry("Other", [*[2] * 90, *[1] * 7])
    for entry_ in (one, other):
        ranks = entry_.outcomes[0].ranks()[1]
        np.savez(entry_.outcomes[0].folder / "ranks.npz", user=users, rank=ranks)
    found = report.tests([one, other])
    pair = next(pair for pair in found["ml-1m"] if pair.metric == "NDCG@10")
    table = report.rows([one, other], found)
    assert table[0]["ndcg"] > table[1]["ndcg"] and pair.difference < 0 and pair.holm_p < 0.05
    assert table[1]["p_best"] is None


def test_published_figures_have_a_source_and_a_protocol():
    every = list(csv.DictReader(PUBLISHED.open(newline="", encoding="utf-8")))
    assert all(row["source"] and row["protocol"] and row["hit"] and None not in row for row in every)
    for row in every:
        assert all(0 < float(row[key]) < 1 for key in ("hit", "ndcg", "mrr", "latency_s") if row[key])
        assert not (row["ndcg"] and row["mrr"]) or row["hit"] > row["ndcg"] > row["mrr"]
    *others, hydra = published({"amazon-beauty"}, {"Hydra4Rec"})
    assert {row["model"] for row in others} == {"WEARec"}, "no model that could be trained here, but was not"
    assert "not comparable" in hydra["protocol"] and hydra["latency_s"] == "0.0042"
    table = report.published_markdown([hydra])
    assert "| amazon-beauty | Hydra4Rec | .070 |  |  | 0.0042 | arXiv 2408.05606; latency on one A100-80GB |" in table
    assert report.published_markdown([]) == "None that we know of.\n"


def test_only_pairs_that_were_asked_for(two, entry):
    two.append(entry("GRU4Rec", [5, 5, 5, 5]))
    found = report.tests(two, lambda one, other: "GRU4Rec" in (one.label, other.label))
    assert {(pair.first, pair.second) for pair in found["ml-1m"]} == {("SASRec", "GRU4Rec"), ("Mamba4Rec", "GRU4Rec")}


def test_masked_columns_stand_beside_the_others_where_runs_have_them(two, tmp_path):
    """Runs of 0.1.0 have not, and their tables stay as they are."""
    assert "masked" not in report.markdown(report.rows(two, {}))
    outcome = two[1].outcomes[0]
    np.savez(outcome.folder / "ranks.npz", user=list("0123"), rank=[1, 1, 2, 1], **{"rank of masked": [1.0, 1, 1, 12]})
    outcome.test_masked["hit@10"] = 0.75
    sasrec, mamba = report.rows(two, {})
    assert (mamba["hit_masked"], mamba["ndcg_masked"], mamba["hit"]) == (0.75, 0.75, 1.0)
    assert sasrec["hit_masked"] is None
    text = report.write(tmp_path, "x", two, [1, 2], "none")
    assert "| MRR@10 | Hit@10 masked | NDCG@10 masked | p |" in text and "| **.7500** | **.7500** |" in text
    assert "hit_masked" in (tmp_path / "x.csv").read_text() and "Hit@10 masked" in (tmp_path / "x.tex").read_text()


def test_published_figures_say_whether_the_history_was_masked():
    every = list(csv.DictReader(PUBLISHED.open(newline="", encoding="utf-8")))
    assert {row["history"] for row in every} == {"masked", "unmasked", "unknown"}
    assert all(row["history"] == "unmasked" for row in every if row["protocol"].startswith("RecBole"))
    assert "| source | history |" in report.published_markdown(every)


def test_rows_of_several_splits_stand_apart(two, entry):
    """Each is compared with its like alone, as each was tested on targets of its own."""
    split = {"GTS": [0.8, 0.1, 0.1]}
    entries = [*two, entry("GRU4Rec", [1, 1, 1, 1], eval_args={"split": split}, ties="file")]
    for one in two:
        one.settings["ties"] = "file"
    for outcome in (outcome for one in entries for outcome in one.done):
        outcome.protocol["ties"] = "file"
    found = report.tests(entries, of_same_targets)
    assert {(pair.first, pair.second) for pair in found["ml-1m"]} == {("SASRec", "Mamba4Rec")}
    table = report.rows(entries, found)
    assert [row["p_best"] is None for row in table] == [False, True, True]
    text = report.markdown(table)
    assert "| ties | split | Hit@10 |" in text and text.count("**1.0000") == 4
    assert f"| GRU4Rec | 1 | file | {split} |" in text and "| SASRec | 2 | file | leave one out |" in text
    words = report.protocol(entries, [1], "none")
    assert "- ml-1m: leave one out by time, so trained" in words and f" or split {split}; epochs 3" in words
    assert "split" not in report.markdown(report.rows(two, {}))


@pytest.mark.parametrize(
    ("apart", "settings"),
    [
        (True, {"drop_cold_targets": True}),
        (True, {"rm_dup_inter": "first"}),
        (True, {"user_inter_num_interval": "[5,inf)"}),
        (True, {"ties": "random", "ties_seed": 7}),
        (True, {"eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "none"}}),
        (False, {"ties_seed": 7, "MAX_ITEM_LIST_LENGTH": 7, "train_newest": 7}),
    ],
)
def test_rows_of_other_targets_stand_apart(two, entry, apart, settings):
    """They are tested against their like alone, their best is bold, and the protocol says what they are."""
    entries = [*two, entry("GRU4Rec", [3, 3, 3, 40], **settings), entry("Pop", [3, 4, 4, 40], **settings)]
    others = {("SASRec", "Mamba4Rec"), ("GRU4Rec", "Pop")}
    found = report.tests(entries, of_same_targets)
    assert ({(pair.first, pair.second) for pair in found["ml-1m"]} == others) is apart
    table = report.rows(entries, found)
    assert (table[2]["p_best"] is None) is apart
    text = report.markdown(table)
    assert any("**" in line for line in text.splitlines() if "| GRU4Rec |" in line) is apart
    if apart and "eval_args" not in settings:
        key, value = list(settings.items())[-1]
        assert table[2][key] == value and f"{key} {value}" in report.protocol(entries, [1], "none")


def test_what_is_cold_depends_on_what_trains_and_then_on_the_length_of_histories(entry):
    def made(model, length, **options):
        return entry(model, [1, 2], drop_cold_targets=True, MAX_ITEM_LIST_LENGTH=length, **options)

    five, six, shorter = made("A", 50, train_rows=5), made("B", 50, train_rows=6), made("C", 1, train_rows=5)
    assert not of_same_targets(five, six)
    assert not of_same_targets(five, shorter)
    assert of_same_targets(made("D", 50), made("E", 1))


def test_data_sets_may_differ_in_their_filters(two, entry):
    two.append(entry("SASRec", [1, 2], dataset="beauty", user_inter_num_interval="[5,inf)"))
    assert "user_inter_num_interval" not in report.rows(two, {})[0]


def test_a_gain_by_time_is_shown_beside_shuffled_times(two, tmp_path):
    """Both protocols, and targets apart by the time before them; only where a row reads times."""
    assert tables(two) == ""
    timed = two[1]
    timed.settings["time"] = "query"
    group = {"targets": 3, "ndcg@10": 0.25, "masked ndcg@10": 0.5}
    for outcome in timed.outcomes:
        orders = {"rank of masked": [1, 1, 1, 1], "rank of shuffled times": [3, 3, 3, 3]}
        orders["rank of shuffled times masked"] = [11, 11, 1, 1]
        np.savez(outcome.folder / "ranks.npz", user=list("0123"), rank=np.ones(4), **orders)
        outcome.test_masked["hit@10"] = outcome.test_shuffled_times["hit@10"] = 1.0
        outcome.test_by_group.update({"at the moment of the event before": group, "head items": group})
    text = report.write(tmp_path, "x", two, [1, 2], "none", more=tables)
    row = "| ml-1m | Mamba4Rec | 1.0000 ± .0000 | .5000 ± .0000 | 1.0000 ± .0000 | .5000 ± .0000 |"
    assert "## Query times shuffled among users\n" in text and row in text
    assert "| ml-1m | Mamba4Rec | at the moment of the event before | 3 | .2500 ± .0000 | .5000 ± .0000 |" in text
    assert "head items" not in text
    (run, _) = [one for one in json.loads((tmp_path / "x.json").read_text()) if one["row"] == "Mamba4Rec"]
    assert run["test_shuffled_times"] == {"hit@10": 1.0} and "head items" in run["test_by_group"]


def test_rows_are_json(two):
    assert json.loads(json.dumps(report.rows(two, report.tests(two))))
