"""A step that nobody waits for: losses stay on the device, and memory that runs out says what would fit."""

import types

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_ssm import ops, run_recbole_ssm
from recbole_ssm.data.loader import PackedBatch, on_device
from recbole_ssm.errors import UserError
from recbole_ssm.trainer import Hook, checkpoint
from recbole_ssm.trainer.learner import _device_options
from recbole_ssm.trainer.losses import LOOK_EVERY, Losses
from tests.trainer.test_replays import without_dropout
from tests.trainer.test_trainer import build

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "aten.equal", "unique")
COPIES = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)


class Copies(TorchFunctionMode):
    """Notes the calls that copy a tensor to Python, which on a CPU are no operations."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function in COPIES:
            self.found.append(str(function))
        return function(*arguments, **(keywords or {}))


class Reads(TorchDispatchMode):
    """Notes every operation for which Python has to wait: numbers that are read, and shapes that follow from values."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.copies = Copies(self.found)

    def __enter__(self):
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        flat = torch.utils._pytree.tree_leaves((arguments, keywords))
        masks = ".index" in str(function) and any(torch.is_tensor(t) and t.dtype == torch.bool for t in flat)
        if masks or any(name in str(function) for name in READS):
            self.found.append(str(function))
        return function(*arguments, **(keywords or {}))


def as_on_a_gpu(trainer):
    """Let the losses be looked at as seldom as on a GPU."""
    trainer._losses.every = LOOK_EVERY
    return trainer


@pytest.fixture
def no_reads_of_the_cpu(monkeypatch):
    """What is read on a CPU alone: bounds that are checked, and the steps that an optimiser has counted."""
    count = "recbole_ssm.ops.table.count_sequences"
    monkeypatch.setattr(count, lambda op, bounds, batch, *more: batch if bounds is None else len(bounds) - 1)
    monkeypatch.setattr("torch.optim.Adam.step", lambda *arguments: None)


@pytest.mark.skipif("native" not in ops.available_backends(), reason="the native kernels are not built")
@pytest.mark.parametrize("model", ["Mamba4Rec", "2Mamba4Rec", "SASRec"])
def test_a_step_reads_nothing_from_the_device(toy, model, no_reads_of_the_cpu, monkeypatch):
    # On a CPU attention pads; the kernel of a GPU reads no length.
    monkeypatch.setattr("recbole_ssm.model.sasrec.packed_attention", lambda q, k, v, *more, **options: q + k + v)
    options = {"clip_grad_norm": {"max_norm": 5.0}, "train_mode": "packed", **without_dropout(model)}
    trainer, train, _ = build(model, toy, gradient_accumulation_steps=2, train_batch_size=48, **options)
    as_on_a_gpu(trainer).model.train()
    steps = iter(train)
    trainer._run_step(next(steps))
    for _ in range(LOOK_EVERY - 2):
        step = next(steps)
        with Reads() as reads:
            trainer._run_step(step)
        assert reads.found == []
    with Reads() as reads:
        trainer._settle()
    assert reads.found, "the stand-in sees no reads at all"


class Poison(Hook):
    def __init__(self, at):
        self.at = at

    def on_step_start(self, trainer, step):
        if trainer.global_step == self.at:
            with torch.no_grad():
                trainer.model.item_embedding.weight.fill_(torch.inf)


@pytest.mark.parametrize("saves", [{}, {"checkpoint_steps": 1}])
def test_a_loss_that_is_not_finite_is_told_with_its_step_before_anything_is_saved(toy, saves):
    trainer, train, _ = build(
        "2Mamba4Rec", toy, [Poison(6)], epochs=1, train_batch_size=16, train_mode="packed", **saves
    )
    with pytest.raises(UserError, match="epoch 0, step 6: the training loss became nan"):
        as_on_a_gpu(trainer).fit(train)
    assert 6 < trainer.global_step <= 6 + 2 * LOOK_EVERY
    saved = [checkpoint.read(path).tensors for path in trainer.folder.glob("*.safetensors")]
    assert len(saved) == (1 if saves else 0)
    assert all(t.isfinite().all() for tensors in saved for name, t in tensors.items() if name.startswith("model."))


def test_looking_seldom_changes_no_result(toy):
    found = []
    for prepare in (lambda trainer: trainer, as_on_a_gpu):
        trainer, train, valid = build("2Mamba4Rec", toy, epochs=2, train_batch_size=48)
        prepare(trainer).fit(train, valid)
        found.append((trainer.train_loss_dict, [p.tolist() for p in trainer.model.parameters()]))
    assert found[0] == found[1]


def test_sums_go_on_where_they_stood():
    losses = Losses(types.SimpleNamespace(device=torch.device("cpu")))
    assert losses.sums() == ()
    losses.begin(3, (1.0, 2.0))
    losses.add(torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert losses.sums() == (1.5, 2.25)
    losses.begin(0, ())
    losses.add(torch.tensor([0.5], dtype=torch.float64))
    assert losses.sums() == (0.5,)


@pytest.mark.parametrize("model", ["2Mamba4Rec", "STAMP"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_full_memory_names_the_batch_size_that_fits(toy, model, parts, monkeypatch):
    """The toy has 537 targets; a device on which 60 fit."""
    trainer, train, _ = build(model, toy, train_batch_size=400, gradient_accumulation_steps=parts)
    fits = trainer.gradients.loss.forward

    def full(batch):
        if len(batch.target if isinstance(batch, PackedBatch) else batch) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return fits(batch)

    monkeypatch.setattr(trainer.gradients.loss, "forward", full)
    with pytest.raises(UserError) as error:
        trainer.fit(train, saved=False)
    at_once, size = (400, 50) if parts == 1 else (200, 50)
    said = f"with {at_once} targets at once, and {size} fit; take train_batch_size: {size * parts}"
    assert model != "STAMP" or said in str(error.value)
    assert "or keep it and take gradient_accumulation_steps: 8" in str(error.value) and "\n" not in str(error.value)
    assert trainer.global_step == 0


def test_a_single_target_that_does_not_fit(toy, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("recbole_ssm.model.packed.PackedRecommender.calculate_loss", full)
    with pytest.raises(UserError, match="memory runs out with a single target; take a smaller model"):
        run_recbole_ssm("2Mamba4Rec", **toy)


def test_adam_on_a_gpu_is_fused_and_can_be_recorded():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert all(_device_options(name, {}, gpu) == {"fused": True, "capturable": True} for name in ("adam", "adamw"))
    for name, arguments, device in (("adam", {}, cpu), ("sgd", {}, gpu), ("adam", {"foreach": True}, gpu)):
        assert _device_options(name, arguments, device) == {}


def test_a_run_goes_on_on_another_device(toy, tmp_path):
    """What a checkpoint says of fused kernels is of the device on which it was written."""
    options = {"epochs": 1, "learner_args": {"fused": True}}
    trainer, train, _ = build("2Mamba4Rec", toy, **options)
    trainer.fit(train)
    path, saved = checkpoint.newest(trainer.folder)
    saved.info["config"]["learner_args"] = None
    other, _, _ = build("2Mamba4Rec", toy, epochs=2)
    other.restore(path, saved)
    assert not other.optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.bfloat16)])
def test_the_half_precision_is_that_of_the_key(toy, name, dtype):
    trainer, _, _ = build("2Mamba4Rec", toy, enable_amp=True, amp_dtype=name)
    with trainer.learner.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_batches_are_the_same_on_the_device(toy):
    for model in ("2Mamba4Rec", "STAMP"):
        _, train, _ = build(model, toy)
        batch = next(iter(train)).parts[0].batch
        moved = on_device(batch, torch.device("cpu"))
        pairs = zip(batch, moved) if model == "2Mamba4Rec" else ((batch[f], moved[f]) for f in batch.interaction)
        assert all(one is other is None or torch.equal(one, other) for one, other in pairs)
