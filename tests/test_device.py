"""What must hold on a GPU: ``pytest tests/test_device.py --device=cuda``; ``--device=cpu`` tries the tests themselves.

The contract of models, the invariants of the trainer, and serving. A GPU adds numbers up in another order, so figures
are compared to rounding.
"""

import pytest
import torch

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders, on_device
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import Hook, Trainer
from recbole_ssm.trainer.graphs import WARM_UP, Replays
from tests.model.test_models import HISTORIES, rows
from tests.ops.test_ops import assert_close

MODELS = ["Mamba4Rec", "2Mamba4Rec", "Hydra4Rec", "SASRec", "GRU4Rec"]
CAUSAL = [name for name in MODELS if name != "Hydra4Rec"]


@pytest.fixture
def here(toy, device):
    """Options of a run on the device."""
    return {**toy["config_dict"], "use_gpu": device.type == "cuda"}


def dropout_of(model):
    """Options that switch the model's dropout off."""
    names = ("hidden_dropout_prob", "attn_dropout_prob") if model == "SASRec" else ("dropout_prob",)
    return dict.fromkeys(names, 0.0)


def trainer_of(model, options):
    """A trainer with a fresh model, the same whatever the device; and its training data."""
    config = configure(model, "toy", config_dict={**options, **dropout_of(model)})
    train, _, _ = create_loaders(config, create_dataset(config))
    torch.manual_seed(0)
    return Trainer(config, get_model(model)(config, train._dataset).to(config["device"])), train


def gradient(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).double().cpu()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@torch.inference_mode()
def test_scores_are_those_of_the_cpu_and_padding_does_not_count(here, device, model):
    trainer, _ = trainer_of(model, here)
    network = trainer.model.eval()
    together = network.full_sort_predict(rows(HISTORIES).to(device)).view(len(HISTORIES), -1)
    for history, expected in zip(HISTORIES, together):
        assert_close(network.full_sort_predict(rows([history]).to(device)).view(-1), expected, 1e-5)
    on_cpu = network.cpu().full_sort_predict(rows(HISTORIES)).view(len(HISTORIES), -1)
    assert_close(together.cpu(), on_cpu, 1e-5)


@pytest.mark.parametrize("model", ["Mamba4Rec", "2Mamba4Rec"])
@torch.inference_mode()
def test_steps_are_the_whole_history(here, device, model):
    network = trainer_of(model, here)[0].model.eval()
    items = torch.tensor(HISTORIES[2], device=device)
    whole = network.encode(items, torch.tensor([0, len(items)], device=device), last_only=True)
    state = [part.to(device) for part in network.alloc_state(1)]
    for item in items:
        output, state = network.step(item[None], state)
    assert_close(output.view(-1), whole.view(-1), 1e-5)


# --- the trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", CAUSAL)
def test_packed_and_prefix_give_one_gradient(here, model):
    found = []
    for mode in ("packed", "prefix"):
        trainer, train = trainer_of(model, {**here, "train_mode": mode, "train_batch_size": 537})
        trainer.model.train()
        step = next(iter(train))
        batch = on_device(step.parts[0].batch, trainer.device)
        trainer._backward(step.parts[0]._replace(batch=batch))
        found.append(gradient(trainer))
    assert_close(found[0], found[1], 1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_in_parts_is_the_step(here, model):
    found = []
    for parts in (1, 4):
        trainer, train = trainer_of(model, {**here, "gradient_accumulation_steps": parts})
        trainer.model.train()
        trainer._run_step(next(iter(train)))
        found.append(gradient(trainer))
    assert_close(found[0], found[1], 1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_losses_are_those_of_the_cpu(here, model):
    found = []
    for options in (here, {**here, "use_gpu": False}):
        trainer, train = trainer_of(model, options)
        trainer.model.train()
        found.append(torch.stack([trainer._run_step(step).cpu() for step in train]))
    assert_close(found[0], found[1], 1e-5)


class KilledError(Exception):
    pass


class Kill(Hook):
    def on_step_end(self, trainer, step, loss):
        if trainer.global_step == 7:
            raise KilledError


@pytest.mark.parametrize("model", ["2Mamba4Rec", "SASRec"])
def test_killed_and_resumed_is_never_killed(here, model):
    """To rounding, because a GPU adds up gradients in any order."""
    options = {**here, "epochs": 2, "checkpoint_steps": 2}
    trainer, train = trainer_of(model, options)
    trainer.hooks.append(Kill())
    with pytest.raises(KilledError):
        trainer.fit(train)
    whole, train = trainer_of(model, options)
    whole.fit(train)
    resumed, again = trainer_of(model, options)
    resumed.resume_checkpoint(trainer.folder)
    assert resumed.global_step == 6
    resumed.fit(again)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters()):
        assert_close(one.detach(), other.detach(), 1e-6)


@pytest.fixture
def packed(here, device):
    """Options of runs whose steps are recorded, with dropout."""
    if device.type != "cuda":
        pytest.skip("records CUDA graphs: pytest --device=cuda")
    return {**here, "train_mode": "packed", "train_batch_size": 90, "epochs": 6}


def refuse(call):
    raise RuntimeError("not recorded")


RECORDED = ["Mamba4Rec", "2Mamba4Rec", "SASRec"]


@pytest.mark.parametrize("model", RECORDED)
@pytest.mark.parametrize(
    "options",
    [{}, {"enable_amp": True, "amp_dtype": "bf16"}, {"lr_scheduler": "cosine"}, {"lr_scheduler": "one_cycle"}],
)
def test_replayed_steps_train_as_launched_ones(packed, model, options, caplog):
    found = []
    for record in (None, refuse):
        config = configure(model, "toy", config_dict={**packed, **options})
        train, _, _ = create_loaders(config, create_dataset(config))
        torch.manual_seed(0)
        trainer = Trainer(config, get_model(model)(config, train._dataset).to(config["device"]))
        if record:
            trainer._replays = Replays(trainer, record)
        else:
            replays = trainer._replays
        trainer.fit(train, saved=False)
        found.append(torch.tensor(list(trainer.train_loss_dict.values())))
    assert replays._recordings and not replays._failed
    assert_close(found[0], found[1], 1e-2 if "enable_amp" in options else 1e-4)


@pytest.mark.parametrize("model", RECORDED)
def test_every_replay_draws_other_masks(packed, model):
    config = configure(model, "toy", config_dict={**packed, "learning_rate": 1e-30})
    train, _, _ = create_loaders(config, create_dataset(config))
    trainer = Trainer(config, get_model(model)(config, train._dataset).to(config["device"]))
    trainer.model.train()
    step = next(iter(train))
    losses = [float(trainer._run_step(step).sum()) for _ in range(WARM_UP + 8)]
    assert trainer._replays._recordings and len(set(losses)) == len(losses)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_learns(here, dtype):
    options = {**here, "enable_amp": True, "amp_dtype": dtype, "enable_scaler": dtype == "fp16", "epochs": 6}
    assert run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options)["test_result"]["hit@1"] > 0.9


# --- serving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_serves_alike_on_every_device(here, device, model):
    result = run_recbole_ssm(model, "toy", config_dict={**here, "epochs": 3})
    served, on_cpu = (load_recommender(result["checkpoint"], where) for where in (device, "cpu"))
    history = ["i3", "i4", "i5"]
    found, expected = (dict(recommender.recommend(history, k=5)) for recommender in (served, on_cpu))
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    if not getattr(served.model, "carries_state", False):
        return
    session = served.session(history[:2])
    session.update(history[2])
    assert dict(session.top(5)) == pytest.approx(found, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("model", ["Mamba4Rec", "2Mamba4Rec"])
def test_sessions_answer_by_graphs(here, device, model):
    if device.type != "cuda":
        pytest.skip("records CUDA graphs: pytest --device=cuda")
    result = run_recbole_ssm(model, "toy", config_dict={**here, "epochs": 3})
    answers = []
    for replayed in (False, True):
        recommender = load_recommender(result["checkpoint"], device, cuda_graphs=replayed)
        sessions = [recommender.session(["i3"]), recommender.session(["i7", "i8"])]
        for item in ("i4", "i5", "i6"):
            for session in sessions:
                session.update(item)
                answers += [dict(session.top(5)), dict(session.top(3, exclude_seen=True))]
    graphs = recommender.model.graphed
    assert graphs.step._recordings and all(best._recordings for best in graphs._best.values())
    for one, other in zip(answers[: len(answers) // 2], answers[len(answers) // 2 :]):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
