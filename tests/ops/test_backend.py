"""The choice of a backend, and the test of a compiled one before its first use."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

import recbole_ssm.layers  # noqa: F401 - it has the examples of step and history
from recbole_ssm import ops
from recbole_ssm.errors import UserError
from recbole_ssm.ops import backend, selftest
from recbole_ssm.ops.table import OPS as TABLE
from tests.conftest import REPOSITORY
from tests.ops.test_ops import OPS, arguments

backend_ops = sorted({op for op, name in backend._implementations if name == "torch"} - {"step"})
right = backend.implementations("ssd", "torch")[0].function


def slightly_wrong(*arguments):
    y, final = right(*arguments)
    return y * 1.001, final * 1.001


def breaks(*arguments):
    raise RuntimeError("out of resource: shared memory\nRequired: 163840")


def gradient_wrong(x, *arguments):
    y, final = right(x, *arguments)
    return y + 0.01 * (x - x.detach()), final


@pytest.fixture
def registry(monkeypatch):
    """A registry of this test's own, in which native has nothing for ssd yet."""
    copied = {key: list(found) for key, found in backend._implementations.items() if key != ("ssd", "native")}
    monkeypatch.setattr(backend, "_implementations", copied)
    monkeypatch.setattr(backend, "_tested", set())
    monkeypatch.setattr(backend, "_logged", set())
    return copied


def ssd():
    tensors, keywords = arguments(ops.ssd, 1, 5, 1, torch.float32)
    return tensors, keywords, ops.ssd(*tensors, **keywords)[0]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (slightly_wrong, "its result is wrong by 1.0e-03 of the largest entry"),
        (gradient_wrong, "its result is wrong by"),
        (breaks, "it does not run on this machine (RuntimeError: out of resource: shared memory)"),
    ],
)
def test_what_fails_is_switched_off_with_one_warning(registry, caplog, function, why):
    backend.implements("ssd", "native")(function)
    for _ in range(2):
        tensors, keywords, y = ssd()
        with ops.use_backend("torch"):
            assert torch.equal(y, ops.ssd(*tensors, **keywords)[0])
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("op ssd: backend native is switched off: ") and why in warnings[0]
    assert "torch takes its place. Please report what 'recbole-ssm doctor --numerics' prints" in warnings[0]
    assert "native" not in backend.available_backends("ssd")


def test_the_next_implementation_takes_the_place_of_a_wrong_one(registry, caplog):
    backend.implements("ssd", "native", "theirs")(slightly_wrong)
    backend.implements("ssd", "native", "ours")(lambda *arguments: right(*arguments))
    ssd()
    assert "backend native (theirs) is switched off" in caplog.text and "; ours takes its place" in caplog.text
    assert [i.name for i in backend.implementations("ssd", "native")] == ["ours"]
    assert backend.available_backends("ssd") == ["reference", "torch", "native"]


def test_whatever_the_caller_has_switched_on_does_not_matter(registry):
    tested = []

    def watched(*arguments):
        tested.append(threading.get_ident())
        return right(*arguments)

    tensors, keywords = arguments(ops.ssd, 1, 5, 1, torch.float32)
    state = torch.get_rng_state()

    def call(x):
        return ops.ssd(x, *tensors[1:], **keywords)[0]

    for enter in (
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.autograd.graph.saved_tensors_hooks(breaks, breaks),
    ):
        backend._tested.clear()
        registry["ssd", "native"] = [backend.Implementation(watched, "native")]
        with enter(), torch.no_grad():
            call(tensors[0])
    backend._tested.clear()
    torch.func.vmap(call)(tensors[0][None].expand(3, -1, -1, -1, -1))
    assert backend.available_backends("ssd") == ["reference", "torch", "native"]
    assert len(set(tested)) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_thread_waits_for_the_test(registry, monkeypatch):
    """What is not yet tested may be wrong."""
    begun, end = threading.Event(), threading.Event()

    def self_test(op, function, device):
        begun.set()
        end.wait(10)
        return "wrong"

    monkeypatch.setattr(backend, "self_test", self_test)
    backend.implements("ssd", "native")(slightly_wrong)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(backend.dispatch, "ssd", torch.zeros(1))]
        assert begun.wait(10)
        calls.append(pool.submit(backend.dispatch, "ssd", torch.zeros(1)))
        assert not wait(calls, 0.05).done
        end.set()
    assert [call.result() for call in calls] == [right, right]


def test_a_test_that_is_broken_off_is_not_over(registry, monkeypatch):
    def interrupted(op, function, device):
        raise KeyboardInterrupt

    backend.implements("ssd", "native")(slightly_wrong)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(backend, "self_test", interrupted)
        backend.dispatch("ssd", torch.zeros(1))
    assert backend.dispatch("ssd", torch.zeros(1)) is right


packed_or_continued = [
    pytest.param(op.__name__, place, id=f"{op.__name__}-{t.name}")
    for op in OPS
    for place, t in enumerate(TABLE[op.__name__].tensors)
    if t.name in ("state", "cu_seqlens")
]


@pytest.mark.parametrize(("op", "place"), packed_or_continued)
def test_packed_and_continued_calls_are_tested(op, place):
    """As every training step is packed, and every chunk of a long history goes on from a state."""
    torch_form = backend.implementations(op, "torch")[0].function

    def wrong(*arguments):
        changed = list(arguments)
        if arguments[place] is not None:
            changed[0] = arguments[0] * 1.01
        return torch_form(*changed)

    assert "wrong by" in selftest.why_wrong(op, wrong, torch.device("cpu"))


def test_tracing_and_forked_workers_are_left_alone(registry, monkeypatch):
    backend.implements("ssd", "native")(lambda *arguments: right(*arguments))
    tensors, _ = arguments(ops.ssd, 1, 5, 1, torch.float32)
    monkeypatch.setattr(backend, "self_test", lambda *arguments: pytest.fail("tested"))
    torch.compile(lambda *t: ops.ssd(*t)[0], backend="eager", fullgraph=True)(*[t.abs() for t in tensors])
    torch.export.export(Once(), tuple(t.abs() for t in tensors), strict=False)
    monkeypatch.setattr(backend, "_forked", True)
    ssd()


class Once(torch.nn.Module):
    def forward(self, *tensors):
        return ops.ssd(*tensors)[0]


def test_a_forked_child_knows_that_it_is_one():
    code = "import os; from recbole_ssm.ops import backend\n"
    code += "pid = os.fork()\nif not pid: os._exit(7 if backend._forked else 1)\n"
    code += "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7 and not backend._forked"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_there_is_an_example_of_all_that_a_backend_computes():
    compiled = {op for op, name in backend._implementations if name in backend.COMPILED}
    assert set(selftest._examples(torch.device("cpu"), 1, 3)) >= compiled | {op.__name__ for op in OPS}


@pytest.mark.parametrize(
    "op", [*(op.__name__ for op in OPS), "dropout", "linear_cross_entropy", "rank_targets", "step"]
)
def test_the_torch_form_is_right_and_a_wrong_one_is_found(op):
    torch_form = backend.implementations(op, "torch")[0].function
    before = torch.get_rng_state()
    assert selftest.why_wrong(op, torch_form, torch.device("cpu")) == ""

    def wrong(*arguments, **keywords):
        found = torch_form(*arguments, **keywords)
        return 1.01 * found if isinstance(found, torch.Tensor) else (1.01 * found[0], *found[1:])

    assert "wrong by" in selftest.why_wrong(op, wrong, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("op", [*backend_ops, "step", "history"])
def test_examples_may_be_called_on_any_device(op):
    """The reference is, with tensors on the CPU, whatever the device that an example was made for."""
    example = selftest._examples(torch.device("meta"), 1, 5)[op]
    assert {t.device.type for t in example.tensors} == {"meta"}
    tensors = [torch.randn(t.shape, dtype=torch.float64) for t in example.tensors]
    with backend.force(op, backend.implementations(op, "reference")[0].function):
        assert example.call(*tensors).device.type == "cpu"


def test_a_backend_that_the_machine_lacks_says_what(monkeypatch):
    monkeypatch.setattr(backend, "_lacks", {"cuda": "there is no GPU that PyTorch can use"})
    with pytest.raises(
        UserError, match=r"'cuda' is not installed on this machine \(there is no GPU .* use one of auto"
    ):
        ops.set_backend("cuda")


@pytest.mark.skipif("native" not in ops.available_backends(), reason="native kernels are not built")
def test_what_a_backend_does_not_compute_is_computed_by_torch():
    x, dt, A, B, C, skip = arguments(ops.ssd, 1, 5, 1)[0]
    with ops.use_backend("native"):
        assert ops.ssd(x, dt.abs(), A, B, C, skip)[0].dtype == torch.float64


def test_the_implementation_that_fails_is_switched_off(monkeypatch):
    key = "ssd", "torch"
    right = backend.implementations(*key)[0]
    monkeypatch.setitem(backend._implementations, key, [right, right._replace(name="wrong")])
    backend.switch_off(*key, "wrong", "a test")
    assert backend.implementations(*key) == [right]
