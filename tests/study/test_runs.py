"""Runs are done once, go on after a kill, and fail alone."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from recbole_ssm import config
from recbole_ssm.errors import UserError
from recbole_ssm.files import digest_of_json, locked
from recbole_ssm.ops import backend
from recbole_ssm.study import child, speed
from recbole_ssm.study import runs as module
from recbole_ssm.study.identity import results_of
from recbole_ssm.study.runs import OUTCOME, RANKS, RUN, Outcome, Run, Runs
from recbole_ssm.study.speed import speeds
from recbole_ssm.trainer import checkpoint
from tests.conftest import REPOSITORY
from tests.study.conftest import process_of, wait_for

DATA = {"data_path": str(REPOSITORY / "dataset")}
SHORT = Run("Mamba4Rec", "toy", {"seed": 1, "epochs": 2})
LONG = Run("Mamba4Rec", "toy", {"seed": 1, "epochs": 12, "stopping_step": 1000, "dropout_prob": 0.5})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which SHORT is done."""
    runs = Runs(tmp_path_factory.mktemp("done"), DATA)
    return runs, runs.get(SHORT)


def never(*arguments, **options):
    raise AssertionError("this run was done")


def test_what_a_run_leaves(done):
    _, outcome = done
    assert outcome.error is None and outcome.run == SHORT and outcome.epochs == 2
    assert (outcome.parameters, outcome.items, outcome.latency) == (73_600, 20, None)
    assert outcome.peak_memory > 10**7
    assert outcome.protocol == {"split": {"LS": "valid_and_test"}, "mode": {"valid": "full", "test": "full"},
                                "ties": "file", "seed": 1}  # fmt: skip
    first, last = outcome.history
    assert (first["epoch"], first["targets"], first["steps"], first["batch_size"]) == (1, 537, 5, 128)
    assert (last["epoch"], last["targets"], last["steps"], last["step_size"]) == (2, 2 * 537, 10, 0.01)
    assert 0 < first["seconds"] < last["seconds"] == outcome.seconds
    assert max(first["valid"], last["valid"]) == outcome.valid["hit@1"]
    users, ranks = outcome.ranks()
    assert sorted(users) == sorted(f"u{n}" for n in range(60)) and ranks.min() >= 1
    assert abs(outcome.test["hit@10"] - np.mean(ranks <= 10)) < 1e-4
    assert {"date", "torch", "cpu", "threads"} <= set(outcome.made)
    assert {path.name for path in outcome.folder.iterdir()} >= {"outcome.json", "ranks.npz", "log.txt"}
    assert not (outcome.folder / "checkpoints").exists()


def test_done_once(done, monkeypatch, capsys):
    runs, outcome = done
    monkeypatch.setattr(Runs, "_train", never)
    assert runs.get(SHORT) == outcome
    spelled = Run("Mamba4Rec", "toy", {**SHORT.options, "d_state": 32, "eval_batch_size": 5})
    again = Runs(runs.folder, {**DATA, "show_progress": True, "use_gpu": False})
    assert [outcome.run for outcome in again.all([SHORT, spelled])] == [SHORT, spelled]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/2] Mamba4Rec toy seed=1 epochs=2: hit@10 ") and lines[0].endswith("; done before")


def test_what_makes_another_run(done, monkeypatch, tmp_path):
    runs, _ = done
    folders = [
        runs.folder_of(Run("Mamba4Rec", "toy", {**SHORT.options, **more}))
        for more in ({}, {"seed": 2}, {"epochs": 3}, {"stopping_step": 1}, {"d_state": 16}, {"metric_decimal_place": 6})
    ]
    reranks = Run("LlamaRec", "toy", {"base_model": "random"})
    folders.append(runs.folder_of(reranks))
    shutil.copytree(REPOSITORY / "dataset" / "toy", tmp_path / "data" / "toy")
    there = Runs(runs.folder, {"data_path": str(tmp_path / "data")})
    assert there.folder_of(SHORT) == folders[0]
    file = tmp_path / "data" / "toy" / "toy.inter"
    file.write_text(file.read_text().replace("\ti1\t", "\ti2\t", 1))
    folders.append(there.folder_of(SHORT))
    monkeypatch.setattr(module, "results_of", lambda settings: "0.0")
    folders.append(runs.folder_of(SHORT))
    assert len(set(folders)) == len(folders)


GROUPS = {"n_groups": 2, "head_dim": 32}


@pytest.mark.parametrize(
    ("model", "options", "version"),
    [
        ("BERT4Rec", {}, "0.2.0"),
        ("LlamaRec", {"retriever": "BERT4Rec"}, "0.2.0"),
        ("LlamaRec", {"retriever_config": GROUPS}, "0.2.0"),
        ("2Mamba4Rec", GROUPS, "0.2.0"),
        ("SASRec", {"eval_args": {"split": {"TS": [0.8, 0.1, 0.1]}}}, "0.2.0"),
        ("SASRec", {"eval_args": {"mode": "uni100"}}, "0.2.0"),
        ("SASRec", {"eval_args": {"mode": {"valid": "full", "test": "pop100"}}}, "0.2.0"),
        ("SASRec", {"benchmark_filename": ["train", "valid", "test"]}, "0.2.0"),
        ("SASRec", {"drop_cold_targets": True, "train_rows": 5}, "0.3.0"),
        ("LlamaRec", {"fusion_weight": "tuned", "retriever": "FPMC"}, "0.3.0"),
        ("LlamaRec", {"fusion_weight": "tuned", "retriever_config": {"time": "gaps"}}, "0.3.0"),
        ("LlamaRec", {"fusion_weight": "tuned", "epochs": 0}, "0.3.0"),
        ("LlamaRec", {"retriever": "Pop"}, "0.3.0"),
        ("GPT4Rec", {"epochs": 0}, "0.3.0"),
        ("LlamaRec", {"fusion_weight": "tuned"}, "0.1.0"),
        ("LlamaRec", {"retriever": "FPMC"}, "0.1.0"),
        ("GPT4Rec", {}, "0.1.0"),
        ("SASRec", {"adaptive_batch": "norm_test", "adaptive_batch_args": {"growth": 1.5}}, "0.3.0"),
        ("SASRec", {"adaptive_batch": "norm_test", "adaptive_batch_args": {"growth": "2"}}, "0.1.0"),
        ("LlamaRec", {"learner": "usgm", "base_model_dtype": "bfloat16", "lora_r": 0}, "0.3.0"),
        ("LlamaRec", {"learner": "usgm", "base_model_dtype": "bfloat16", "lora_r": 8}, "0.1.0"),
        ("SASRec", {"drop_cold_targets": True}, "0.1.0"),
        ("SASRec", {"train_rows": 5}, "0.3.0"),
        ("SASRec", {"train_last": 2, "train_mode": "prefix"}, "0.1.0"),
        ("SASRec", {"train_newest": 2}, "0.1.0"),
        ("2Mamba4Rec", {"train_last": 2}, "0.1.0"),
        ("Hydra4Rec", {"train_last": 2}, "0.1.0"),
        ("Hydra4Rec", {"train_last": 2, "train_mode": "masked"}, "0.3.0"),
        ("LlamaRec", {"retriever": "SASRec"}, "0.1.0"),
        ("LlamaRec", {"retriever": "SASRec", "retriever_config": {"train_last": 2}}, "0.3.0"),
        ("SASRec", {}, "0.1.0"),
        ("LlamaRec", {}, "0.1.0"),
        ("2Mamba4Rec", {"n_groups": 1}, "0.1.0"),
        ("2Mamba4Rec", {**GROUPS, "joint_norm": True}, "0.1.0"),
        ("Hydra4Rec", GROUPS, "0.1.0"),
        ("SASRec", {"eval_args": {"split": {"TS": [0.8, 0.1, 0.1]}}, "legacy_time_order": True}, "0.1.0"),
        ("SASRec", {"eval_args": {"split": {"GTS": [0.8, 0.1, 0.1]}}}, "0.1.0"),
        ("SASRec", {"eval_args": {"mode": "full"}}, "0.1.0"),
    ],
)
def test_runs_of_0_1_0_are_kept_where_their_results_have_not_changed(tmp_path, model, options, version):
    assert Runs(tmp_path, DATA).content(Run(model, "toy", options))["version"] == version


def test_a_users_own_model_may_have_a_short_context_too():
    options = {
        "model": "Mine",
        "train_mode": "packed",
        "train_last": 2,
        "MAX_ITEM_LIST_LENGTH": 50,
        "packed_context": 26,
    }
    assert results_of(options) == "0.3.0"


def test_another_retriever_makes_another_run(tmp_path):
    checkpoint = tmp_path / "best.safetensors"
    runs = Runs(tmp_path / "runs", {"data_path": "dataset", "retriever_checkpoint": str(checkpoint)})
    run = Run("LlamaRec", "ml-100k")
    digests = set()
    for content in (b"one", b"two"):
        checkpoint.write_bytes(content)
        digests.add(digest_of_json(runs.content(run)))
        named = Runs(tmp_path / "runs", {"data_path": "dataset", "retriever_checkpoint": str(tmp_path)})
        assert digest_of_json(named.content(run)) in digests  # by its folder
    assert len(digests) == 2
    checkpoint.unlink()
    with pytest.raises(UserError, match="retriever_checkpoint: there is no such file"):
        digest_of_json(runs.content(run))


@pytest.mark.parametrize("knows", [True, False])
def test_a_new_key_voids_nothing(done, tmp_path, monkeypatch, knows):
    """A run of before some key existed is today's run with the key at its default, and no other."""
    runs = Runs(tmp_path / "r", DATA)
    job = json.loads((done[1].folder / RUN).read_text())
    assert job["content"]["settings"].pop("readout") == "last"
    job["known"].remove("readout")
    if not knows:
        # Former versions did not write it down.
        del job["known"]
    before = tmp_path / "r" / f"Mamba4Rec-toy-{digest_of_json(job['content'])[:16]}"
    shutil.copytree(done[1].folder, before)
    (before / RUN).write_text(json.dumps(job))
    monkeypatch.setattr(Runs, "_train", never)
    assert runs.get(SHORT).test == done[1].test
    assert runs.folder_of(Run("Mamba4Rec", "toy", {**SHORT.options, "readout": "last"})) == before
    for more in ({"readout": "mean"}, {"seed": 3}):
        assert runs.folder_of(Run("Mamba4Rec", "toy", {**SHORT.options, **more})) != before


def kept(runs, run, **record):
    """The folder of a run that was begun by a version whose run.json held this besides, or else by this one."""
    now = runs.identity(run)
    content = {**now.content, **record.pop("content", {})}
    folder = runs.folder / f"{run.model}-{run.dataset}-{digest_of_json(content)[:16]}"
    folder.mkdir(parents=True)
    job = {"run": asdict(run), "options": dict(run.options), "content": content, **record}
    (folder / RUN).write_text(json.dumps(job))
    return folder


PRESET = {"preset": "ml-1m/2Mamba4Rec"}
SPELT_OUT = yaml.safe_load((REPOSITORY / "properties" / "preset" / "ml-1m" / "2Mamba4Rec.yaml").read_text())
NOT_SCHEDULED = {key: value for key, value in SPELT_OUT.items() if key not in ("model", "dataset", "lr_scheduler")}
ALL_USERS = {"user_inter_num_interval": None, "item_inter_num_interval": None}


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize(
    ("first", "then", "dataset"),
    [
        ({**PRESET, "lr_scheduler": None}, PRESET, "toy"),
        (NOT_SCHEDULED, PRESET, "toy"),
        (ALL_USERS, {}, "amazon-beauty"),
        ({}, {"lr_scheduler": "cosine"}, "toy"),
        ({"user_inter_num_interval": None}, {}, "toy"),
    ],
)
def test_a_key_that_was_empty_is_no_new_key(tmp_path, first, then, dataset, knows):
    """The kept run is found again, and no other is taken for it, whether its version wrote down what it knew or not."""
    shutil.copytree(REPOSITORY / "dataset" / "toy", tmp_path / dataset)
    (tmp_path / dataset / "toy.inter").rename(tmp_path / dataset / f"{dataset}.inter")
    runs = Runs(tmp_path / "r", {"data_path": str(tmp_path)})
    run, other = Run("2Mamba4Rec", dataset, first), Run("2Mamba4Rec", dataset, then)
    now = runs.identity(run)
    filled = {key: value for key, value in now.content["settings"].items() if value is not None}
    record = {"known": sorted(now.known)} if knows else {"content": {"settings": filled}}
    folder = kept(runs, run, **record)
    assert runs.folder_of(run) == folder
    assert runs.folder_of(other) != folder
    assert runs.folder_of(Run("2Mamba4Rec", dataset, {**first, "time": "none", "show_progress": True})) == folder


def test_a_default_that_is_new_makes_another_run(tmp_path, monkeypatch):
    """A key that was known and empty is not at what has become its default."""
    runs, run = Runs(tmp_path / "r", DATA), Run("Mamba4Rec", "toy")
    folder = kept(runs, run, known=sorted(runs.identity(run).known))
    assert runs.folder_of(run) == folder
    shipped = config._shipped

    def with_a_new_default(path):
        return {**shipped(path), **({"train_last": 7} if path.name == "overall.yaml" else {})}

    monkeypatch.setattr(config, "_shipped", with_a_new_default)
    later = Runs(runs.folder, DATA)
    assert later.config(run)["train_last"] == 7 and later.folder_of(run) != folder
    assert later.folder_of(Run("Mamba4Rec", "toy", {"train_last": None})) == folder


def test_a_preset_that_sets_a_new_key_makes_another_run(tmp_path):
    runs, run = Runs(tmp_path / "r", DATA), Run("2Mamba4Rec", "toy", PRESET)
    before = runs.identity(run).content["settings"]
    before.pop("norm_position")
    folder = kept(runs, run, content={"settings": before})
    assert runs.folder_of(run) != folder
    assert runs.folder_of(Run("2Mamba4Rec", "toy", {**PRESET, "norm_position": "post"})) == folder


def test_the_runs_of_the_published_table_are_found(monkeypatch):
    """Nothing of it is trained again, though its runs counted files that they did not read."""
    folder = REPOSITORY / "docs" / "results" / "table" / "runs"
    jobs = {path.parent: json.loads(path.read_text()) for path in folder.glob(f"*/{RUN}")}
    files = {name: digest for job in jobs.values() for name, digest in job["content"]["files"].items()}

    def digests(self, config):
        name = f"{config['dataset']}.inter"
        return {name: files[name]}

    monkeypatch.setattr(Runs, "_digests", digests)
    runs = Runs(folder)
    assert {runs.folder_of(Run(**job["run"])) for job in jobs.values()} == jobs.keys() and len(jobs) >= 37


def test_a_run_that_goes_on_keeps_its_record(tmp_path, monkeypatch):
    """One that was begun before a key existed is found again after it went on with that key at its default."""
    runs, run = Runs(tmp_path / "r", DATA), Run("Mamba4Rec", "toy")
    before = runs.identity(run).content["settings"]
    before.pop("readout")
    folder = kept(runs, run, content={"settings": before})
    monkeypatch.setattr(module.subprocess, "Popen", never)
    spelt_out = Run("Mamba4Rec", "toy", {"readout": "last"})
    with pytest.raises(AssertionError):
        runs.get(spelt_out)
    job = json.loads((folder / RUN).read_text())
    assert job["options"]["readout"] == "last" and job["content"]["settings"] == before
    assert Runs(runs.folder, DATA).folder_of(spelt_out) == folder


def test_a_key_that_was_renamed_voids_nothing(tmp_path):
    """The run keeps its folder, which says the key's old name."""
    runs = Runs(tmp_path / "r", DATA)
    run = Run("Mamba4Rec", "toy", {"average_power": 8.0})
    content = runs.content(run)
    content["settings"]["learner_average"] = content["settings"].pop("average_power")
    before = tmp_path / "r" / f"Mamba4Rec-toy-{digest_of_json(content)[:16]}"
    before.mkdir(parents=True)
    (before / RUN).write_text(json.dumps({"content": content}))
    assert runs.folder_of(run) == before
    assert runs.folder_of(Run("Mamba4Rec", "toy", {"average_power": 4.0})) != before


def test_a_failed_run_stops_nothing_and_is_tried_again(tmp_path, capsys):
    diverges = Run("SASRec", "toy", {"learner": "sgd", "learning_rate": 1e30, "weight_decay": 1.0, "epochs": 5})
    runs = Runs(tmp_path / "r", DATA)
    outcomes = list(runs.all([Run("SASRec", "toyy"), diverges, Run("SASRec", "toy", {"epochz": 1})]))
    messages = ["dataset toyy: no file toyy.inter", "the training loss became nan", "epochz: there is no such key"]
    for outcome, message in zip(outcomes, messages):
        assert message in outcome.error and "\n" not in outcome.error
        with pytest.raises(UserError, match="it has no ranks"):
            outcome.ranks()
    assert "[2/3] SASRec toy learner=sgd" in capsys.readouterr().err
    size = (outcomes[1].folder / "log.txt").stat().st_size
    assert "loss became nan" in runs.get(diverges).error
    assert (outcomes[1].folder / "log.txt").stat().st_size > size


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"run": []}'])
def test_a_damaged_outcome_is_one_line(tmp_path, text):
    (tmp_path / OUTCOME).write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}: damaged .* delete that folder"):
        Outcome.read(tmp_path)


def test_all_ranks_are_looked_at(done, tmp_path):
    folder = shutil.copytree(done[1].folder, tmp_path / "r")
    whole = (folder / RANKS).read_bytes()
    with np.load(folder / RANKS) as file:
        ranks = dict(file)
    assert set(ranks) == {"user", "rank", "rank of masked"}
    for name in ranks:
        place = whole.index(f"{name}.npy".encode()) + len(name) + 30
        (folder / RANKS).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            Outcome.read(folder)
    del ranks["rank of masked"]
    np.savez(folder / RANKS, **ranks)
    with pytest.raises(UserError, match="damaged"):
        Outcome.read(folder)


@pytest.mark.parametrize("name", [OUTCOME, RANKS])
def test_what_is_damaged_is_trained_again(done, tmp_path, monkeypatch, caplog, name):
    runs = Runs(tmp_path / "r", DATA)
    folder = shutil.copytree(done[1].folder, runs.folder_of(SHORT))
    (folder / name).write_bytes(b"\x80 nonsense")
    neighbour = tmp_path / "r" / "Mamba4Rec-toy-neighbour"
    neighbour.mkdir()
    (neighbour / RUN).write_text("")  # of a run that was killed as it began

    def train(self, run, where, progress):
        assert where == folder and not folder.exists()
        shutil.copytree(done[1].folder, folder)

    monkeypatch.setattr(Runs, "_train", train)
    assert runs.get(SHORT).test == done[1].test
    assert "damaged" in caplog.text and "it is trained again" in caplog.text
    (aside,) = runs.folder.glob("damaged-*")
    assert (aside / name).read_bytes() == b"\x80 nonsense"
    (folder / name).write_bytes(b"")
    runs.get(SHORT)
    assert len(list(runs.folder.glob("damaged-*"))) == 2


def test_what_cannot_be_read_now_is_kept(done, tmp_path, monkeypatch):
    """Too many files are open, or a network's disk is away."""
    runs = Runs(tmp_path / "r", DATA)
    shutil.copytree(done[1].folder, runs.folder_of(SHORT))
    read = Path.read_text

    def failing(self, *arguments, **options):
        if self.name == OUTCOME:
            raise OSError(errno.EMFILE, "Too many open files", str(self))
        return read(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        patch.setattr(Runs, "_train", never)
        (outcome,) = runs.all([SHORT])
    assert outcome.error.endswith(f"{OUTCOME}: Too many open files")
    assert runs.get(SHORT).test == done[1].test


def test_what_a_later_version_wrote_is_read(done, tmp_path, monkeypatch):
    runs = Runs(tmp_path / "r", DATA)
    folder = shutil.copytree(done[1].folder, runs.folder_of(SHORT))
    values = json.loads((folder / OUTCOME).read_text())
    values["run"]["machines"] = values["energy"] = 3
    (folder / OUTCOME).write_text(json.dumps(values))
    monkeypatch.setattr(Runs, "_train", never)
    assert runs.get(SHORT) == replace(done[1], folder=folder)


def test_paths_hold_in_another_folder_and_nothing_else_is_one(tmp_path, monkeypatch):
    """A run trains in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("saved", "random", "ml-1m/2Mamba4Rec", "pre"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "weights").write_text("")

    def absolute(key, value, model="LlamaRec"):
        return module._absolute(model, key, value) == str(tmp_path / value)

    assert (
        absolute("retriever_checkpoint", "saved") and absolute("base_model", "saved") and absolute("data_path", "new")
    )
    assert absolute("my_file", "weights", "my_models:Mine")
    assert absolute("my_folder", "ml-1m/2Mamba4Rec", "my_models:Mine")
    assert not absolute("pooling", "saved", "my_models:Mine") and not absolute("note", "", "my_models:Mine")
    assert not absolute("base_model", "random") and not absolute("base_model", "some/hub-name")
    assert not absolute("preset", "ml-1m/2Mamba4Rec") and not absolute("norm_position", "pre")


def test_a_run_that_is_given_up_has_no_checkpoints_unless_another_process_is_at_it(tmp_path):
    runs = Runs(tmp_path / "r", DATA)
    runs.give_up(SHORT)
    checkpoints = runs.folder_of(SHORT) / "checkpoints" / "one"
    checkpoints.mkdir(parents=True)
    with locked(runs.folder_of(SHORT)):
        runs.give_up(SHORT)
    assert checkpoints.is_dir()
    runs.give_up(SHORT)
    assert not checkpoints.parent.exists()


def test_a_kept_run_of_a_base_model_is_found_whose_tokenizer_was_not_looked_at(tmp_path):
    """Up to 0.2.0; a change of what was looked at is another run all the same."""
    (tmp_path / "base").mkdir()
    for name in ("merges.txt", "config.json", "LICENSE.txt"):
        (tmp_path / "base" / name).write_text("one")
    runs, run = Runs(tmp_path / "r", DATA), Run("LlamaRec", "toy", {"base_model": str(tmp_path / "base")})
    now = runs.identity(run)
    files = {name: digest for name, digest in now.content["files"].items() if not name.endswith(".txt")}
    assert len(files) == len(now.content["files"]) - 1
    kept = runs.folder / f"{run.stem}{digest_of_json({**now.content, 'files': files})[:16]}"
    kept.mkdir(parents=True)
    record = {"run": asdict(run), "options": {}, "content": {**now.content, "files": files}, "known": sorted(now.known)}
    (kept / RUN).write_text(json.dumps(record))
    assert runs.folder_of(run) == kept
    (tmp_path / "base" / "config.json").write_text("another")
    assert runs.folder_of(run) != kept


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.model", "chat_template.jinja", "config.json"])
def test_every_file_of_a_base_model_counts(tmp_path, name):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_text("one")
    runs, run = Runs(tmp_path / "r", DATA), Run("LlamaRec", "toy", {"base_model": str(tmp_path / "base")})
    before = runs.folder_of(run)
    (tmp_path / "base" / name).write_text("another")
    assert runs.folder_of(run) != before


@pytest.mark.parametrize("text", ["", "[]", '{"content": {"settings": 3}}'])
def test_a_damaged_record_of_a_run_is_written_again(tmp_path, monkeypatch, text):
    runs = Runs(tmp_path / "r", DATA)
    folder = runs.folder_of(SHORT)
    folder.mkdir(parents=True)
    (folder / RUN).write_text(text)
    monkeypatch.setattr(module.subprocess, "Popen", never)
    with pytest.raises(AssertionError):
        runs.get(SHORT)
    assert json.loads((folder / RUN).read_text())["content"] == runs.content(SHORT)


LEFT_BY = ("toy.card.json", "toy.skipped", "toy.item.skipped", "toy.zip", "toy.inter.bak", "toy.ent", "toy.train.inter")


@pytest.mark.parametrize(
    ("options", "name", "counts"),
    [
        *(({}, name, False) for name in LEFT_BY),
        ({}, "toy.item", False),
        ({"load_col": None}, "toy.item", True),
        ({"load_col": {"inter": "*", "user": "*"}}, "toy.user", True),
        ({"load_col": {"inter": "*", "user": "*"}}, "toy.item", False),
        ({"additional_feat_suffix": ["ent"]}, "toy.ent", True),
        ({"benchmark_filename": ["train", "valid", "test"]}, "toy.train.inter", True),
        ({"benchmark_filename": ["train", "valid", "test"]}, "toy.inter", False),
    ],
)
def test_files_count_that_a_run_reads(tmp_path, options, name, counts):
    shutil.copytree(REPOSITORY / "dataset" / "toy", tmp_path / "toy")
    (tmp_path / "toy" / name).write_text("one")
    runs, run = Runs(tmp_path / "r", {"data_path": str(tmp_path)}), Run("SASRec", "toy", options)
    before = runs.folder_of(run)
    (tmp_path / "toy" / name).write_text("another")
    assert (runs.folder_of(run) != before) is counts
    # A language model reads titles.
    assert ("toy.item" in runs.content(Run("LlamaRec", "toy"))["files"]) is (name == "toy.item")


def test_runs_of_before_are_kept_that_counted_all_files(tmp_path):
    shutil.copytree(REPOSITORY / "dataset" / "toy", tmp_path / "toy")
    runs, run = Runs(tmp_path / "r", {"data_path": str(tmp_path)}), Run("SASRec", "toy", {"load_col": None})
    (tmp_path / "toy" / "toy.user").write_text("a user's age")
    files = runs.content(run)["files"]
    folder = kept(runs, run, content={"files": {**files, "toy.card.json": "the digest of a former card"}})
    assert runs.folder_of(run) == folder
    (tmp_path / "toy" / "toy.user").unlink()
    assert runs.folder_of(run) != folder


def test_a_data_file_that_cannot_be_read_fails_its_runs_alone(tmp_path, monkeypatch):
    data = shutil.copytree(Path(DATA["data_path"]) / "toy", tmp_path / "data" / "toy")
    files = sorted(path.name for path in data.glob("toy.*"))
    (data / "toy.old").mkdir()
    runs = Runs(tmp_path / "r", {"data_path": str(tmp_path / "data")})
    assert sorted(runs.content(SHORT)["files"]) == files

    def denied(self, path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Runs, "_file_digest", denied)
    (outcome,) = runs.all([SHORT])
    assert outcome.error.startswith("toy: ") and outcome.error.endswith("cannot be read (Permission denied)")


def test_models_that_cannot_be_timed_and_catalogues_below_ten_items(tmp_path, monkeypatch):
    class Small(torch.nn.Linear):
        def full_sort_predict(self, rows):
            if self.out_features == 5:
                raise IndexError("out of range")
            return self(rows)

    monkeypatch.setattr(speed, "_model", lambda options, run: (Small(3, int(run.model)), torch.ones(2, 3), "auto"))
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    found = speed._measure({}, [Run("4", "toy"), Run("5", "toy"), Run("20", "toy")])
    assert [one is not None for one in found] == [True, False, True]


def test_each_model_is_timed_on_its_own_backend(monkeypatch):
    used = set()

    class Small(torch.nn.Linear):
        def full_sort_predict(self, rows):
            used.add((self.out_features, backend._selected))
            return self(rows)

    def small(options, run):
        return Small(3, int(run.model)), torch.ones(2, 3), run.options["ssm_backend"]

    monkeypatch.setattr(speed, "_model", small)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    names = {"2": "torch", "3": "reference"}
    assert all(speed._measure({}, [Run(model, "toy", {"ssm_backend": name}) for model, name in names.items()]))
    assert used == {(2, "torch"), (3, "reference")} and backend._selected == "auto"


def test_a_latency_is_kept_with_its_data_and_a_failure_is_not(tmp_path, monkeypatch):
    measured = []

    def measure(machine_options, todo):
        measured.append(len(todo))
        return [None if one.dataset == "toyy" else {"p50_s": 1.0, "users_per_second": 2.0} for one in todo]

    monkeypatch.setattr(speed, "_measure", measure)
    runs = Runs(tmp_path / "r", DATA)
    for _ in range(2):
        assert speeds(runs, [SHORT, Run("Mamba4Rec", "toyy")]) == [{"p50_s": 1.0, "users_per_second": 2.0}, None]
    assert len(measured) == 3  # of the first one once
    (kept,) = (tmp_path / "r").glob("speed-*.json")
    kept.write_text("[")
    assert speeds(runs, [SHORT])[0]["p50_s"] == 1.0 and len(measured) == 4
    settings = {"ssm_backend": "auto"}
    monkeypatch.setattr(Runs, "content", lambda self, run: {"files": "others", "settings": settings})
    speeds(runs, [SHORT])
    assert len(measured) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_and_gone_on_is_never_killed(tmp_path):
    straight = Runs(tmp_path / "straight", DATA).get(LONG)
    runs = Runs(tmp_path / "killed", DATA)

    def kill():
        wait_for(lambda: list(runs.folder.glob("*/checkpoints/*/step-*")))  # once there is one to go on from
        (folder,) = runs.folder.iterdir()
        os.kill(process_of(folder), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    stopped = runs.get(LONG)
    killer.join()
    assert "its process ended with signal 9; see " in stopped.error
    first = []
    found = runs.get(LONG, lambda state: first.append(state["epoch"]))
    assert found.error is None and min(first) > 1
    assert (found.test, found.valid) == (straight.test, straight.valid)
    assert all((a == b).all() for a, b in zip(found.ranks(), straight.ranks()))
    timeless = [[{**entry, "seconds": 0} for entry in outcome.history] for outcome in (found, straight)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 12


def test_a_run_goes_on_from_its_own_checkpoints_or_from_those_of_its_first_stage(tmp_path):
    def write(name, **info):
        checkpoint.write(tmp_path / name / "step-000000001.safetensors", {}, info)
        return tmp_path / name

    write("GRU4Rec-alone", model="GRU4Rec")
    stage = write("GRU4Rec-stage", model="GRU4Rec", **{"for": {"model": "LlamaRec", "options": {}}})
    assert child._interrupted(tmp_path, "LlamaRec") == stage
    own = write("LlamaRec-own", model="LlamaRec")
    os.utime(own, (1, 1))
    assert child._interrupted(tmp_path, "LlamaRec") == own
    assert child._interrupted(tmp_path, "SASRec") is None and not tmp_path.exists()
