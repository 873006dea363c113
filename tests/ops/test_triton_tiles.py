"""Every size of tiles computes the same, and the choice between them: tried on a stand-in for a GPU and its clock."""

import contextlib
import json
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from recbole_ssm.ops import selftest
from recbole_ssm.ops.packing import cu_seqlens_of
from recbole_ssm.ops.triton import operators, tiles
from tests.ops.test_ops import OPS, arguments
from tests.ops.test_triton import assert_equals_reference, on_kernels

KERNELS = [kernel for kernel, found in tiles.TILES.items() if len(found) > 1]
MOST = max(len(found) for found in tiles.TILES.values())


@on_kernels
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("number", range(1, MOST))
def test_every_tile_equals_the_reference(op, number, monkeypatch):
    """The first ones are what all other tests try."""
    tried = set()

    def best(kernel, values, found, run, repeatable=True):
        tried.add(kernel)
        return run(found[min(number, len(found) - 1)])

    monkeypatch.setattr(operators, "best", best)
    torch.manual_seed(0)
    lengths = torch.tensor([2, 0, 17])
    tensors, keywords = arguments(op, 1, int(lengths.sum()), len(lengths), sizes=(20, 3, 2, 5, 1, 3))
    assert_equals_reference(op, tensors, keywords, cu_seqlens_of(lengths))
    assert tried and tried <= tiles.TILES.keys()


# --- the choice ---


class OnAGPU(SimpleNamespace):
    is_cuda, device, dtype = True, torch.device("cuda", 0), torch.float32


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A stand-in for GPU and timer: the milliseconds of a tile by its warps, and what was timed."""
    found = SimpleNamespace(
        milliseconds={1: 3.0, 2: 1.0, 4: 2.0}, timed=[], devices=[], file=tmp_path / "caches" / "tiles.json"
    )

    def milliseconds(run):
        warps = run.args[0]["warps"]
        found.timed.append(warps)
        return found.milliseconds[warps]

    monkeypatch.setenv("RECBOLE_SSM_CACHE", str(found.file.parent))
    monkeypatch.delenv("RECBOLE_SSM_TILES", raising=False)
    monkeypatch.setattr(tiles, "milliseconds", milliseconds)
    monkeypatch.setattr(tiles, "machine", lambda device: "on a stand-in")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(found.devices.append(device)))
    new_process()
    yield found
    new_process()


def new_process():
    tiles._chosen.clear()
    tiles.kept.cache_clear()


WARPS = [{"warps": warps} for warps in (1, 2, 4)]


def best(rows=tiles.LEAST, S=1, dtype=torch.float32, x=None, **keywords):
    """The warps of the tile that a call takes."""
    values = {"x": OnAGPU(dtype=dtype) if x is None else x, "rows": rows, "S": S, "D": 64}
    taken = []
    tiles.best("scan.scan_forward", values, WARPS, taken.append, **keywords)
    return taken[-1]["warps"]


def test_the_fastest_is_taken_and_kept(clock):
    assert best() == 2 and best() == 2
    assert clock.timed == [1, 2, 4]
    (kind, tile), *others = json.loads(clock.file.read_text()).items()
    assert tile == {"warps": 2} and not others
    assert re.fullmatch(r"scan.scan_forward [0-9a-f]{8} float32 D=64 S<4\^1 L<4\^6 on a stand-in", kind)
    new_process()
    assert best() == 2
    assert clock.timed == [1, 2, 4]


def test_each_kind_of_call_has_its_own(clock):
    best()
    clock.milliseconds[4] = 0.5
    for other in ({"S": 16}, {"rows": 4 * tiles.LEAST}, {"dtype": torch.bfloat16}):
        assert best(**other) == 4
    # a length of the same size
    assert best(rows=tiles.LEAST + 1) == 2
    assert len(clock.timed) == 4 * len(WARPS)
    assert len(json.loads(clock.file.read_text())) == 4


def test_what_other_processes_wrote_stays(clock):
    best()
    clock.file.write_text(json.dumps({"theirs": {"warps": 4}}))
    best(S=16)
    assert len(json.loads(clock.file.read_text())) == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"scan.scan_forward": 1}'])
def test_a_broken_file_is_replaced(clock, text):
    clock.file.parent.mkdir()
    clock.file.write_text(text, encoding="latin-1")
    assert best() == 2
    assert {"warps": 2} in json.loads(clock.file.read_text()).values()


@pytest.mark.parametrize("kept", [3, [], {"warps": 32}, {"BD": 2}])
def test_a_tile_of_another_version_is_tried_again(clock, kept):
    best()
    (kind,) = json.loads(clock.file.read_text())
    clock.file.write_text(json.dumps({kind: kept}))
    new_process()
    assert best() == 2
    assert json.loads(clock.file.read_text()) == {kind: {"warps": 2}}


def test_a_folder_that_cannot_be_written_does_no_harm(clock):
    clock.file.parent.write_text("no folder")
    assert best() == 2 and best() == 2
    assert clock.timed == [1, 2, 4]


def test_where_nothing_is_tried(clock, monkeypatch):
    assert best(rows=tiles.LEAST - 1) == 1
    assert best(x=torch.zeros(3)) == 1
    assert best(repeatable=False) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert best() == 1
    with monkeypatch.context() as patch:
        patch.setenv("RECBOLE_SSM_TILES", "default")
        assert best() == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert best() == 1
    assert clock.timed == [] and not clock.file.exists()
    best()
    # what is known is taken there
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best() == 2 and best(repeatable=False) == 2


def test_a_tile_that_does_not_run_is_left_out(clock):
    clock.milliseconds[2] = float("inf")
    assert best() == 4
    clock.milliseconds |= dict.fromkeys((1, 4), float("inf"))
    clock.timed.clear()
    # the first, which will say why, and nothing is kept
    assert best(S=16) == 1
    assert len(json.loads(clock.file.read_text())) == 1
    clock.milliseconds |= {1: 3.0, 2: 2.9}
    assert best(S=64) == 1, "a gain that may be noise"


def test_a_tile_whose_results_differ_is_left_out(clock, monkeypatch):
    """Those of the first one are what the self-test has tried. What a kernel does not write is not looked at."""
    y, unwritten = torch.zeros(3), torch.full((3,), torch.nan)
    values = {"x": OnAGPU(), "rows": tiles.LEAST, "S": 1, "D": 64, "gx": y, "gdt": None, "y": unwritten}

    def chosen(others, first=1.0):
        """The warps of the tile that is taken, where the clock's fastest writes another number."""

        def run(tile):
            warps = tile["warps"]
            taken.append(warps)
            y.copy_(torch.tensor([first, others if warps == 2 else 1.0, 2.0]))
            return {"gA": torch.full((warps, 4), 1 / warps), "gskip": None, "scratch": torch.rand(3)}

        taken = []
        new_process()
        clock.file.unlink(missing_ok=True)
        tiles.best("scan.scan_backward", values, WARPS, run)
        return taken[-1]

    assert chosen(others=1 + 1e-5) == 2
    assert chosen(others=1.1) == 4
    assert chosen(others=torch.nan) == 4
    assert clock.devices == 3 * [torch.device("cuda", 0)]
    # numbers that tell nothing, as those of a step that overflows, are no choice
    assert chosen(others=1.0, first=torch.inf) == 1 and not clock.file.exists()

    def full(*tensors):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tiles, "_results", full)
    assert chosen(others=1.0) == 1 and not clock.file.exists()


@on_kernels
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_the_choice_by_real_kernels(op, clock, monkeypatch):
    """The last tile is the fastest of each, and new memory holds NaN."""
    seen = {}

    def milliseconds(run):
        return 1.0 / (1 + current.index(run.args[-1]))

    def best(kernel, values, found, run, repeatable=True):
        current[:] = found
        result = choose(kernel, values, found, run, repeatable)
        seen[kernel] = (len(found), tiles._chosen.get(tiles._kind(kernel, values)) == found[-1], repeatable)
        return result

    current, choose = [], tiles.best
    monkeypatch.setattr(tiles, "milliseconds", milliseconds)
    monkeypatch.setattr(tiles, "_matters", lambda values: True)
    monkeypatch.setattr(operators, "best", best)
    monkeypatch.setattr(operators, "empty_float32", lambda x, *shape: x.new_full(shape, torch.nan, dtype=torch.float32))
    torch.manual_seed(0)
    lengths = torch.tensor([2, 0, 17])
    tensors, keywords = arguments(op, 1, int(lengths.sum()), len(lengths), sizes=(20, 3, 2, 5, 1, 3))
    assert_equals_reference(op, tensors, keywords, cu_seqlens_of(lengths))
    assert seen and all(is_last for count, is_last, repeatable in seen.values() if count > 1 and repeatable)


def test_a_run_that_fails_is_the_slowest():
    def run():
        raise RuntimeError("out of resource: shared memory")

    assert tiles.milliseconds(run) == float("inf")


def test_two_threads_try_once(clock, monkeypatch):
    timed = tiles.milliseconds
    monkeypatch.setattr(tiles, "milliseconds", lambda run: time.sleep(0.02) or timed(run))
    threads = [threading.Thread(target=best) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.timed == [1, 2, 4]


@pytest.mark.parametrize(("B", "L"), [(1, selftest.LENGTH), (2, 70), (4, 150)])
def test_self_tests_and_doctor_try_nothing(B, L):
    """A second is what they may take in all, and each tile has to be compiled."""
    for example in selftest._examples(torch.device("cpu"), B, L).values():
        rows = [t.shape[:2].numel() for t in example.tensors if t.dim() > 2]
        assert max(rows, default=0) < tiles.LEAST
