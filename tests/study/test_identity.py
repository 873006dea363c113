"""What makes a run another one, and that runs of former versions are found again."""

import json
import shutil
from dataclasses import asdict

import pytest
import yaml

from recbole_ssm import config
from recbole_ssm.errors import UserError
from recbole_ssm.files import digest_of_json
from recbole_ssm.study import runs as module
from recbole_ssm.study.arms import read_arms
from recbole_ssm.study.compare import FIRST_SEED
from recbole_ssm.study.identity import results_of
from recbole_ssm.study.outcome import RUN, Run
from recbole_ssm.study.runs import Runs
from tests.conftest import REPOSITORY
from tests.study.conftest import DATA, SHORT, never


def test_what_makes_another_run(monkeypatch, tmp_path):
    runs = Runs(tmp_path / "r", DATA)
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
        ("Hydra4Rec", {"enable_amp": True}, "0.3.0"),
        ("SASRec", {"enable_amp": True}, "0.1.0"),
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


PRESET = {"preset": "ml-1m/2Mamba4Rec-untuned"}
SPELT_OUT = yaml.safe_load((REPOSITORY / "properties" / "preset" / f"{PRESET['preset']}.yaml").read_text())
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
    """Nothing of it is trained again by the command that goes on with it, though its runs counted files that they did
    not read, and presets have been renamed since.
    """
    table = REPOSITORY / "docs" / "results" / "table"
    folder = table / "runs"
    jobs = {path.parent: json.loads(path.read_text()) for path in folder.glob(f"*/{RUN}")}
    files = {name: digest for job in jobs.values() for name, digest in job["content"]["files"].items()}

    def digests(self, config):
        name = f"{config['dataset']}.inter"
        # No run of ml-100k is kept.
        return {name: files.get(name, "")}

    monkeypatch.setattr(Runs, "_digests", digests)
    runs, found = Runs(folder), set()
    for entry in read_arms(table / "arms.yaml", {}, None, 1):
        for seed in range(FIRST_SEED, FIRST_SEED + entry.seeds):
            options = {**entry.run.options, "seed": seed}
            found.add(runs.folder_of(Run(entry.run.model, entry.run.dataset, options)))
    assert jobs.keys() <= found and len(jobs) >= 56


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
