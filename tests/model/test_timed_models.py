"""Times in the models: what can be learned from them alone is learned, and nothing of the target is seen."""

import numpy as np
import pytest
import torch

from recbole_ssm import run_recbole_ssm
from recbole_ssm.data.loader import Windows
from recbole_ssm.data.prefixes import Prefixes
from recbole_ssm.layers import Clock
from tests.model.test_models import TIMES, build, rows

MODELS = ["Mamba4Rec", "2Mamba4Rec", "Hydra4Rec", "SASRec", "GRU4Rec"]
WAITS = [3, 70, 4_000, 90_000]
"""Seconds between events; the item shows nothing of them."""


def write(write_dataset, shift):
    """Users whose every item says which of the four waits there was ``shift`` events before it."""
    generator = np.random.default_rng(0)
    lines = []
    for user in range(50):
        waits = generator.integers(0, 4, 12)
        times = 978_300_000 + np.cumsum([WAITS[wait] for wait in waits])
        items = [int(waits[n - shift]) if n >= shift else 4 + n for n in range(12)]
        lines += [f"u{user}\ti{item}\t{time}" for item, time in zip(items, times)]
    return write_dataset("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(lines) + "\n")


def hits(name, made, **options):
    """Hit@1 on the test events."""
    given = {
        **made["config_dict"],
        "topk": [1],
        "valid_metric": "Hit@1",
        "state": "WARNING",
        "epochs": 12,
        "eval_step": 12,
    }
    given |= {"hidden_size": 32, "train_batch_size": 64, "learning_rate": 0.02, **options}
    return run_recbole_ssm(name, "made", config_dict=given, saved=False)["test_result"]["hit@1"]


@pytest.mark.parametrize("name", ["2Mamba4Rec", pytest.param("SASRec", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("shift", "learns"), [(0, ["query", "output"]), (1, ["gaps"])])
def test_the_wait_or_the_gap_decides_and_only_who_reads_it_knows(write_dataset, name, shift, learns):
    """With ``shift`` 0 the item follows from the time since the last event, with 1 from the gap before that event."""
    made = write(write_dataset, shift)
    for time in learns:
        assert hits(name, made, **TIMES[time]) > 0.75
    assert hits(name, made) < 0.5


@pytest.mark.parametrize("time", list(TIMES)[1:])
@pytest.mark.parametrize("name", MODELS)
def test_scores_do_not_depend_on_the_target(toy, name, time):
    model, _ = build(name, toy, **TIMES[time])
    histories, now = [[1, 2, 3], [7, 8, 9, 10]], torch.tensor([10**6, 20])
    found = [
        model.full_sort_predict(rows(histories, item_id=torch.tensor(targets), timestamp=now))
        for targets in ([4, 11], [19, 5])
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("time", list(TIMES)[1:])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "Hydra4Rec"])
def test_later_events_change_nothing_but_what_now_explains(toy, name, time):
    """Of a packed window: outputs before an event know neither its item nor its time, but for when it was asked."""
    model, _ = build(name, toy, **TIMES[time])
    model = model.double()

    def outputs(items, times):
        events = {"user_id": torch.zeros(9), "item_id": torch.tensor(items), "timestamp": torch.tensor(times)}
        prefixes = Prefixes.of_events(events, "user_id", 20, list_suffix="_list", length_field="item_length")
        windows = Windows(prefixes, 20, 20, shuffle=False)
        batch = windows.gather(windows.epoch(np.random.default_rng(0))[:, :2], "item_id", "timestamp")
        clock = Clock.of_packed(batch.times, batch.now, batch.cu_seqlens)
        return model.read_out(model.encode(batch.items, batch.cu_seqlens, clock), clock)

    items, times = [3, 1, 4, 1, 5, 9, 2, 6, 5], [0, 50, 900, 900, 5000, 7000, 20_000, 20_100, 30_000]
    before = outputs(items, times)
    # From event 5 on, other items and other times: output 4 was asked at the time of event 5.
    changed = outputs([*items[:5], 2, 7, 1, 8], [*times[:5], *[time + 40_000 for time in times[5:]]])
    same = [torch.equal(one, other) for one, other in zip(before, changed)]
    assert same == [*[True] * 4, time == "gaps", *[False] * 3]
    # Only other items: what is asked before event 5 stays.
    changed = outputs([*items[:5], 2, 7, 1, 8], times)
    assert [torch.equal(one, other) for one, other in zip(before, changed)] == [*[True] * 5, *[False] * 3]


@pytest.mark.parametrize("name", MODELS)
def test_without_times_nothing_is_added(toy, name):
    """So old checkpoints load, and nothing is drawn that moves the weights behind it."""
    for time in ("none", None):
        model, config = build(name, toy, time=time)
        assert model.time_encoding is None and config["time"] is None
        assert not any("time" in weight for weight in model.state_dict())


@pytest.mark.parametrize(("time", "table"), [("query", "gap"), ("query", "wait"), ("output", "hour")])
def test_another_table_takes_the_place_of_one(toy, time, table):
    model, _ = build("2Mamba4Rec", toy, **TIMES[time])
    before = model.full_sort_predict(rows([[1, 2, 3]]))
    old = getattr(model.time_encoding, table)
    setattr(model.time_encoding, table, torch.nn.Embedding.from_pretrained(2 * old.weight.detach()))
    assert not torch.allclose(model.full_sort_predict(rows([[1, 2, 3]])), before)
