"""Checkpoints are whole or absent, load no code, and a bad one is named in one line."""

import errno
import json
import pathlib
import random
import shutil

import pytest
import safetensors.torch
import torch

from recbole_ssm import files, load_recommender, run_recbole_ssm
from recbole_ssm.arguments import PROPERTIES, read_yaml
from recbole_ssm.data import create_dataset
from recbole_ssm.errors import UserError
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import Hook, Trainer, checkpoint, known_items
from recbole_ssm.trainer.checkpoint import load_weights
from recbole_ssm.trainer.tensorfile import packed, unpacked
from tests.children import in_child


@pytest.fixture
def trained(toy):
    toy["config_dict"] |= {"epochs": 1}
    return run_recbole_ssm("Mamba4Rec", **toy)


def test_a_run_leaves_its_best_and_its_newest(trained, tmp_path):
    left = sorted(p for p in (tmp_path / "saved").rglob("*") if p.is_file())
    assert [f.name for f in left] == ["best.safetensors", "config.yaml", "step-000000005.safetensors"]
    assert left[0] == tmp_path / trained["checkpoint"]
    saved = checkpoint.read(left[0])
    assert saved.info["model"] == "Mamba4Rec"
    assert known_items.texts_in(saved, left[0], "items") == ["[PAD]", *(f"i{n}" for n in range(20))]
    assert saved.info["config"]["d_state"] == 32
    assert "data_path" not in saved.info["config"]


def test_a_digest_is_of_the_file_that_was_read(trained, monkeypatch):
    """A run that still trains puts a better one in its place meanwhile."""
    path = pathlib.Path(trained["checkpoint"])
    saved, read, newer = checkpoint.read(path), checkpoint.read, path.with_name("newer.safetensors")
    weight = saved.tensors["model.item_embedding.weight"]
    tensors = saved.tensors | {"model.item_embedding.weight": 2 * weight}
    checkpoint.write(newer, tensors, {key: value for key, value in saved.info.items() if key != "format"})

    def replaced(path):
        found = read(path)
        if newer.exists():
            newer.replace(path)
        return found

    monkeypatch.setattr(checkpoint, "read", replaced)
    found, digest = checkpoint.read_with_digest(path)
    assert not newer.exists() and digest == files.digest(path)
    torch.testing.assert_close(found.tensors["model.item_embedding.weight"], 2 * weight)


def test_runs_of_one_second_have_folders_of_their_own(toy):
    config = configure("Mamba4Rec", toy["dataset"], config_dict=toy["config_dict"])
    model = get_model("Mamba4Rec")(config, create_dataset(config))
    assert len({Trainer(config, model).open_folder() for _ in range(3)}) == 3


def test_the_last_k_stay_and_a_damaged_newest_is_passed_over(toy, caplog):
    toy["config_dict"] |= {"epochs": 2, "checkpoint_steps": 1, "checkpoint_keep": 3}
    folder = pathlib.Path(run_recbole_ssm("Mamba4Rec", **toy)["checkpoint"]).parent
    names = [p.name for p in sorted(folder.glob("step-*"))]
    assert names == [f"step-{n:09d}.safetensors" for n in (8, 9, 10)]
    (folder / names[-1]).write_bytes(b"cut short")
    path, _ = checkpoint.newest(folder)
    assert path.name == names[-2]
    assert "step-000000010.safetensors: cut short or damaged" in caplog.text
    for name in (*names, "best.safetensors"):
        (folder / name).write_bytes(b"cut short")
    with pytest.raises(UserError, match="no checkpoint that could be read"):
        checkpoint.newest(folder)


def test_a_failing_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, {"a": torch.ones(3)}, {"n": 1})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"checkpoint .*x.safetensors was not written: No space left"):
        checkpoint.write(path, {"a": torch.zeros(3)}, {"n": 2})
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


def test_shared_and_strided_tensors_are_stored(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    checkpoint.write(tmp_path / "x", {"a": base, "b": base.t()}, {})
    assert torch.equal(checkpoint.read(tmp_path / "x").tensors["b"], base.t())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short or damaged"),
        (b"\x80\x04\x95 a pickle", "cut short or damaged"),
        (safetensors.torch.save({"a": torch.ones(1)}), "a safetensors file, but none that recbole_ssm wrote"),
        (safetensors.torch.save({"a": torch.ones(1)}, {"recbole_ssm": "{"}), "cut short or damaged"),
        (safetensors.torch.save({"a": torch.ones(1)}, {"recbole_ssm": "[]"}), "none that recbole_ssm wrote"),
        (safetensors.torch.save({}, {"recbole_ssm": json.dumps({"format": 99})}), "written by a later recbole_ssm"),
        (safetensors.torch.save({}, {"recbole_ssm": json.dumps({"format": 1})}), "written by an earlier recbole_ssm"),
        (safetensors.torch.save({}, {"recbole_ssm": json.dumps({"format": 2})}), "damaged .its content is not what"),
        (
            safetensors.torch.save({}, {"recbole_ssm": f'{{"format": 3, "x": [{"[]," * 10**6}0]}}'}),
            "lists in its header",
        ),
    ],
)
def test_foreign_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_recommender(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_absent_file():
    with pytest.raises(UserError, match=r"checkpoint absent.safetensors: there is no such file"):
        load_recommender("absent.safetensors")


def test_a_header_without_what_it_needs(tmp_path):
    checkpoint.write(tmp_path / "x.safetensors", {}, {"model": "Mamba4Rec"})
    with pytest.raises(UserError, match="its header is incomplete"):
        load_recommender(tmp_path / "x.safetensors")


def test_a_thousand_mutated_files_are_refused_in_one_line(tmp_path):
    """Cut, flipped, overwritten, swapped and grown files: each is named, none is taken for the checkpoint."""
    path = tmp_path / "good.safetensors"
    tensors = {"model.a": torch.randn(40), "model.b": torch.arange(6), "rng.0.torch": torch.get_rng_state()[:64]}
    checkpoint.write(path, tensors, {"model": "Mamba4Rec", "config": {"x": 1.5}, "training": None})
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for trial in range(1000):
        broken = bytearray(content)
        kind = trial % 5
        if kind == 0:
            broken = broken[: rng.randrange(len(content))]
        elif kind == 1:
            broken[rng.randrange(header)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            broken[rng.randrange(header, len(content))] ^= 1 << rng.randrange(8)
        elif kind == 3:
            begin = rng.randrange(len(content) - 8)
            broken[begin : begin + 8] = rng.randbytes(8)
        else:
            broken += rng.randbytes(rng.randrange(1, 50))
        broken_path = tmp_path / "broken.safetensors"
        broken_path.write_bytes(bytes(broken))
        try:
            found = checkpoint.read(broken_path)
        except UserError as error:
            assert "\n" not in str(error) and str(broken_path) in str(error)
            continue
        # a changed blank in the header's padding: nothing of the content differs
        assert found.info["config"] == {"x": 1.5} and kind in (1, 3)
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_equal_checkpoints_are_equal_files(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.tensor(2.0), "c": torch.arange(3), "d": torch.ones(5, dtype=torch.bool)}
    tensors |= {"e": torch.ones(0, 4), "f": torch.ones(2, 2, dtype=torch.bfloat16)}
    contents = set()
    for number in range(8):
        names = random.Random(number).sample(sorted(tensors), len(tensors))
        checkpoint.write(tmp_path / "x.safetensors", {name: tensors[name] for name in names}, {"model": "x"})
        contents.add((tmp_path / "x.safetensors").read_bytes())
    assert len(contents) == 1
    found = safetensors.torch.load(contents.pop())
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("texts", [[], [""], ["[PAD]", "a", "", "é\0\n", "\ud800", "x" * 1000], ["\U0001f600"] * 3])
def test_texts_are_tensors(texts):
    assert unpacked(**{{"bytes": "content"}.get(k, k): t for k, t in packed(texts).items()}) == texts


@pytest.mark.parametrize("items", [300_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_ids_of_any_catalogue_are_written_and_read(tmp_path, items):
    """UUIDs; in the header, which readers limit to 100 MB, 2.4 million of them had no room."""
    path = tmp_path / "x.safetensors"

    def work():
        tokens = [f"{k:08x}-0000-4000-8000-{k * 2654435761 % 2**48:012x}" for k in range(items)]
        tensors = {f"catalogue.items.{part}": tensor for part, tensor in packed(tokens).items()}
        checkpoint.write(path, tensors, {"catalogue": {"sizes": {"item_id": items}}})
        return known_items.texts_in(checkpoint.read(path), path, "items") == tokens

    outcome = in_child(work, seconds=300)
    assert outcome[:2] == ("done", True)
    assert outcome.memory < 400 * items + (1 << 28)


def test_what_cannot_be_saved_is_refused_before_training(toy, monkeypatch):
    steps = []

    class Large(Hook):
        def on_step_end(self, trainer, step, loss):
            steps.append(step)

        def state_dict(self):
            return {"large": "x" * 2_000_000}

    with monkeypatch.context() as patch:
        patch.setattr("recbole_ssm.trainer.tensorfile.LARGEST_HEADER", 1_000_000)
        with pytest.raises(UserError, match="what is no tensor takes 2,0.* bytes, and a header may have 1,000,000"):
            run_recbole_ssm("2Mamba4Rec", **toy, hooks=[Large()])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(UserError, match="checkpoint_dir: a checkpoint takes .* MiB, and saved.* has 0 MiB left"):
            run_recbole_ssm("2Mamba4Rec", **toy, hooks=[Large()])
    assert steps == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(trained, value):
    path = pathlib.Path(trained["checkpoint"])
    saved = checkpoint.read(path)
    saved.tensors["model.item_embedding.weight"][3, 1] = value
    checkpoint.write(path, *saved)
    for act in (load_recommender, lambda path: run_recbole_ssm(resume=path)):
        with pytest.raises(
            UserError, match="its weight item_embedding.weight holds values that are not finite; take an earlier"
        ):
            act(path)


def test_a_file_says_of_itself_nothing_that_fetches_or_makes_folders(trained, tmp_path):
    path = pathlib.Path(trained["checkpoint"])
    saved = checkpoint.read(path)
    options = saved.info["training"]["options"]
    assert options.keys() >= {"data_path", "epochs"}
    options |= {"checkpoint_dir": str(tmp_path / "theirs"), "log_wandb": True, "epochs": 2}
    checkpoint.write(path, *saved)
    run_recbole_ssm(resume=path)
    assert not (tmp_path / "theirs").exists() and not (tmp_path / "wandb").exists()
    # The toy data set would be found in the package; one of another name lacks its settings.
    options |= read_yaml(PROPERTIES / "dataset/toy.yaml") | {"data_path": str(tmp_path / "elsewhere")}
    saved.info["config"]["dataset"] = "shop"
    checkpoint.write(path, *saved)
    with pytest.raises(UserError, match="data_path: there are no data in .*elsewhere.shop; give the data_path"):
        run_recbole_ssm(resume=path)
    assert not (tmp_path / "elsewhere").exists()


def test_histories_without_end_are_refused(trained):
    path = pathlib.Path(trained["checkpoint"])
    saved = checkpoint.read(path)
    saved.info["config"]["MAX_ITEM_LIST_LENGTH"] = 2**31 - 1
    checkpoint.write(path, *saved)
    with pytest.raises(UserError, match="MAX_ITEM_LIST_LENGTH is 2,147,483,647, .* up to 100,000 are served"):
        load_recommender(path)


def test_2mamba4rec_of_a_former_format_keeps_its_norm(toy, monkeypatch):
    """Version 0.1.0 had one norm over all groups; its weights go on with that, and new ones have a norm a group."""
    toy["config_dict"] |= {"n_groups": 2, "head_dim": 32, "epochs": 1}
    path = pathlib.Path(run_recbole_ssm("2Mamba4Rec", **toy)["checkpoint"])
    now = load_recommender(path, "cpu").model.blocks[0].mixer.norm_groups
    saved = checkpoint.read(path)
    del saved.info["config"]["joint_norm"]
    saved.info["catalogue"]["items"] = known_items.texts_in(saved, path, "items")
    tensors = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith("catalogue.")}
    checkpoint.write(path, tensors, saved.info | {"format": 2})
    assert (now, load_recommender(path, "cpu").model.blocks[0].mixer.norm_groups) == (2, 1)
    result = run_recbole_ssm(resume=path, config_dict={"epochs": 2})
    again = checkpoint.read(pathlib.Path(result["checkpoint"]))
    assert again.info["format"] == 3 and again.info["config"]["joint_norm"] is True
    assert load_recommender(result["checkpoint"], "cpu").model.blocks[0].mixer.norm_groups == 1


def test_weights_of_another_size_are_refused(toy, trained):
    toy["config_dict"] |= {"d_state": 8}
    config = configure("Mamba4Rec", toy["dataset"], config_dict=toy["config_dict"])
    model = get_model("Mamba4Rec")(config, create_dataset(config))
    path = pathlib.Path(trained["checkpoint"])
    with pytest.raises(UserError, match="its weights do not fit this model .*size mismatch") as caught:
        load_weights(model, checkpoint.read(path), path)
    assert "\n" not in str(caught.value)
