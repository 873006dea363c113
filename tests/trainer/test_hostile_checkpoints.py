"""Checkpoints whose digest is right and whose content does not fit together: refused in one line, or harmless."""

import copy
import functools
import math
import pathlib
import random
import shutil
from collections import Counter

import pytest
import torch

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.trainer import checkpoint
from tests.children import in_child
from tests.conftest import REPOSITORY

MOST = 1 << 30
OPTIONS = {
    "data_path": str(REPOSITORY / "dataset"),
    "show_progress": False,
    "state": "CRITICAL",
    "epochs": 1,
    "hidden_size": 16,
    "topk": [1, 5],
    "valid_metric": "Hit@5",
}
MODELS = {
    "2Mamba4Rec": {"head_dim": 8, "lr_scheduler": "StepLR", "lr_scheduler_args": {"step_size": 2}},
    "SASRec": {"n_heads": 2, "inner_size": 32, "average_power": 2},
    "GRU4Rec": {"embedding_size": 16, "loss_type": "BPR"},
    "BERT4Rec": {"n_heads": 2, "inner_size": 32, "learner": "sgd"},
}
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, 1e308, -1e-9, math.inf, math.nan, 10**6, 2**31 - 1, 2**31, 2**63, 10**30,
    "", "x", "nan", "1", "é\0", "x" * 100_000, "../../x", "/nowhere/x", "https://example.org/x", [], [1], ["x"], [[]],
    {}, {"x": 1}, {"keys": [1], "values": [2]}, [0] * 10_000, "cuda:7", "LlamaRec", "Mamba4Rec", "KSR",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``{model: (checkpoint, what it recommends)}`` of small runs."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for model, more in MODELS.items():
            result = run_recbole_ssm(model, "toy", config_dict={**OPTIONS, **more})
            path = max((folder / result["checkpoint"]).parent.glob("step-*"))
            found[model] = checkpoint.read(path), served(path)
    return found


def served(path):
    return [item for item, _ in load_recommender(path, "cpu").recommend(["i3", "i4"], 20)]


def resumed(path):
    """One more epoch of training."""
    return run_recbole_ssm(resume=path, config_dict={"epochs": 2, "state": "CRITICAL"})["test_result"]


def places(value, path=()):
    """The path of every entry of nested mappings and lists; of long lists only the first ones."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def change_info(draw, info):
    """Replace, remove or add an entry somewhere, and return where."""
    # As many of the few entries of training as of the many of the configuration.
    part = draw.choice(["model", "config", "config", "catalogue", "training", "training"])
    info.setdefault(part, None)
    path = draw.choice([(part,), *places(info[part], (part,))])
    for key in path[:-1]:
        info = info[key]
    kind = draw.randrange(8)
    if kind == 0:
        del info[path[-1]]
    elif kind == 1 and isinstance(info, dict):
        info[draw.choice(["x", "", "n_layers", "device", "base_model", "checkpoint_dir"])] = draw.choice(VALUES)
    elif kind == 2 and isinstance(info[path[-1]], (int, float)):
        info[path[-1]] = info[path[-1]] * draw.choice([-1, 2, 10, 1000]) + draw.choice([0, 1])
    else:
        info[path[-1]] = copy.deepcopy(draw.choice(VALUES))
    return path


def change_tensors(draw, tensors):
    """Remove, rename, reshape or fill one tensor, and return where."""
    kinds = sorted({name.split(".")[0] for name in tensors})
    kind = draw.choice(kinds)
    name = draw.choice(sorted(name for name in tensors if name.split(".")[0] == kind))
    tensor = tensors[name].clone()
    how = draw.randrange(8)
    if how == 0:
        del tensors[name]
    elif how == 1:
        other = draw.choice(
            ["x", "", "model.", "rng.0", "rng.x.y", "optimizer.1", "optimizer.-1.x", "optimizer.x.y", kind]
        )
        tensors[other] = tensors.pop(name)
    elif how == 2:
        tensors[name] = tensor.to(draw.choice([torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]))
    elif how == 3:
        tensors[name] = tensor.reshape(-1)[: draw.choice([0, 1, 5])]
    elif how == 4:
        tensors[name] = torch.cat([tensor.reshape(-1)] * 2)
    elif how == 5:
        tensors[name] = tensor[None]
    elif tensor.numel():
        fill = [0, 1, 255] if tensor.dtype == torch.uint8 else [0, -1, 2**40]
        fill += [torch.nan, torch.inf, -torch.inf, 3e38] if tensor.is_floating_point() else []
        tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(fill)
        tensors[name] = tensor
    return (kind, name, how)


def try_checkpoint(draw, trained, folder, k):
    """Change a sound checkpoint, serve it and train on from it, and return what became of both."""
    model = draw.choice(sorted(trained))
    (tensors, info), right = trained[model]
    tensors, info = dict(tensors), copy.deepcopy(info)
    changes = [
        change_info(draw, info) if draw.random() < 0.65 else change_tensors(draw, tensors)
        for _ in range(draw.choice([1, 1, 1, 2]))
    ]
    if draw.random() < 0.1:
        info["format"] = draw.choice([2, 2, 3, 4, "3", -1])
    folder.mkdir()
    path = folder / "step-000000005.safetensors"
    checkpoint.write(path, tensors, info)
    kinds = []
    for act in (served, resumed):
        outcome = in_child(functools.partial(act, path), seconds=120)
        what = (k, model, changes, act.__name__)
        assert outcome.kind in ("done", "refused"), (what, outcome.value)
        assert outcome.memory < MOST, (what, outcome.memory >> 20)
        if outcome.kind == "refused":
            assert "\n" not in outcome.value and len(outcome.value) < 1_000, (what, outcome.value[:2000])
        elif act is served and not {change[0] for change in changes} & {"model", "config", "catalogue"}:
            # What training alone reads changes no recommendation.
            assert outcome.value == right, what
        kinds.append((act.__name__, outcome.kind))
    left = {file.name.split("-")[0].split(".")[0] for file in pathlib.Path().iterdir()}
    assert left <= {"log", "log_tensorboard", "saved", folder.name}, (what, left)
    shutil.rmtree(folder)
    return kinds


@pytest.mark.parametrize(("count", "seed"), [(6, 31), pytest.param(500, 32, marks=pytest.mark.slow)])
def test_hostile_checkpoints(tmp_path, trained, count, seed):
    draw = random.Random(seed)
    kinds = Counter(kind for k in range(count) for kind in try_checkpoint(draw, trained, tmp_path / "case", k))
    assert count < 100 or min(kinds[act, kind] for act in ("served", "resumed") for kind in ("done", "refused")) > 50
