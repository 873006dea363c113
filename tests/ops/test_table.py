"""The table of operators: its checks, and the structures of the C++ kernels that follow from it."""

import ctypes
import inspect
import re

import pytest
import torch

from recbole_ssm import ops
from recbole_ssm.ops import backend, native
from recbole_ssm.ops.library import Namespace, Operator
from recbole_ssm.ops.table import OPS, check, row
from tests.conftest import REPOSITORY
from tests.ops.test_ops import OPS as FUNCTIONS
from tests.ops.test_ops import arguments

KERNELS_H = (REPOSITORY / "recbole_ssm" / "csrc" / "kernels.h").read_text()
STRUCTS = dict(re.findall(r"^  (?:TWO_WAYS|ONE_WAY)\((\w+), (\w+)\)", KERNELS_H, re.M))


def members(name):
    """The members of a struct of kernels.h with their kinds as ctypes has them."""
    body = KERNELS_H.partition(f"struct {name} {{")[2].partition("};")[0]
    found = []
    for statement in re.sub(r"//.*", "", body).split(";"):
        words = re.match(r"\s*(?:const )?(\w+)\s*(.*)", statement, re.S)
        for declared in words[2].split(",") if words else []:
            declared = declared.strip()
            kind = ctypes.c_void_p if "*" in declared + words[2].split()[0] + words[1] else None
            kind = kind or {"i64": ctypes.c_int64, "double": ctypes.c_double}.get(words[1])
            if words[1] == "Norm":
                found += [(f"{declared}_{member}", of) for member, of in members("Norm")]
            else:
                found.append((declared.strip("* "), kind))
    return found


def test_members_are_read_with_their_kinds():
    assert members("Norm") == [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_double)]
    assert members("Dropout")[3:6] == [
        ("threshold", ctypes.c_int64), ("scale", ctypes.c_double), ("x", ctypes.c_void_p)
    ]  # fmt: skip


@pytest.mark.parametrize("name", STRUCTS)
def test_structures_are_those_of_the_header(name):
    assert list(native.STRUCTURES[name]._fields_) == members(STRUCTS[name])


def test_every_kernel_has_a_structure():
    assert set(STRUCTS.values()) == set(re.findall(r"struct (\w+) \{", KERNELS_H)) - {"Norm", "Kernels"}
    assert set(native.STRUCTURES) == set(STRUCTS)


# --- the rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", FUNCTIONS, ids=lambda op: op.__name__)
def test_rows_are_the_signatures_of_the_functions(op):
    """The public names carry the letters, as x_BLD; dt_bias and dt_softplus of SSD are taken in before its row."""
    declared = [t.name for t in OPS[op.__name__].tensors] + [name for name, _ in OPS[op.__name__].options]
    public = [re.sub(r"_[A-Z]+$", "", name) for name in inspect.signature(op).parameters]
    assert set(declared) <= set(public)
    assert set(public) - set(declared) <= {"dt_bias", "dt_softplus", "lengths"}
    letters = {t.name: t.letters for t in OPS[op.__name__].tensors}
    for name in inspect.signature(op).parameters:
        plain, _, carried = name.rpartition("_")
        if carried.isupper() and plain in letters:
            # of padded batches, whose S is B
            assert letters[plain].replace("S", "B") == carried.replace("S", "B")


def test_every_implementation_belongs_to_a_row():
    # Attention is PyTorch's own, in other arrangements: no kernel of ours takes a row's tensors.
    assert {op for op, _ in backend._implementations} - {"attention"} <= set(OPS)
    for op in FUNCTIONS:
        assert {"reference", "torch"} <= {name for of, name in backend._implementations if of == op.__name__}


@pytest.mark.parametrize(
    ("op", "index", "wrong", "message"),
    [
        (ops.selective_scan, 0, torch.zeros(2, 5), "selective_scan: x must have shape [B, L, D], got [2, 5]"),
        (ops.selective_scan, 2, torch.zeros(6), "selective_scan: A must have shape [6, N], got [6]"),
        (ops.selective_scan, 3, torch.zeros(2, 5, 4), "selective_scan: B must have shape [2, 5, 5], got [2, 5, 4]"),
        (ops.selective_scan_last, 4, torch.zeros(3, 5), "selective_scan_last: C must have shape [2, 5], got [3, 5]"),
        (ops.ssd, 1, torch.zeros(2, 5, 3), "ssd: dt must have shape [2, 5, 4], got [2, 5, 3]"),
        (ops.ssd, 3, torch.zeros(2, 5, 3, 5), "ssd: the 3 groups of B must divide the 4 heads of x"),
        (ops.ssd, 1, None, "ssd: dt must be given"),
        (ops.quasiseparable, 5, torch.zeros(5), "quasiseparable: C_fwd must have shape [2, 5, 2, 5], got [5]"),
        (ops.causal_conv1d, 1, torch.zeros(5, 4), "causal_conv1d: weight must have shape [6, K], got [5, 4]"),
        (ops.centered_conv1d, 2, torch.zeros(5), "centered_conv1d: bias must have shape [6], got [5]"),
        (ops.ssd, 2, torch.zeros(4, dtype=torch.int64), "ssd: A must hold floating-point numbers, got torch.int64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(op, index, wrong, message):
    tensors, _ = arguments(op, 2, 5, 2)
    if op is ops.ssd and index == 3:
        tensors[4] = wrong
    tensors[index] = wrong
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        op(*tensors)


def test_keywords_that_do_not_fit_are_named():
    tensors, keywords = arguments(ops.ssd, 2, 5, 2)
    with pytest.raises(ValueError, match=r"^ssd: state must have shape \[2, 4, 3, 5\], got \[2, 4, 3\]$"):
        ops.ssd(*tensors, state_BHPN=keywords["state_BHPN"][..., 0])
    with pytest.raises(ValueError, match=r"^ssd: dt_bias must have shape \[4\], got \[3\]$"):
        ops.ssd(*tensors, dt_bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"^quasiseparable: lengths must have shape \[2\], got \[3\]$"):
        ops.quasiseparable(*arguments(ops.quasiseparable, 2, 5, 2)[0], lengths_B=torch.ones(3))


# --- a new op is a row and its kernels ----------------------------------------------------------------------------


def test_a_new_op_is_a_row_and_its_kernels(monkeypatch):
    """y = sum_n x_n w_n, picked by an index; nothing but the two functions is written for the compiled form."""
    monkeypatch.setitem(OPS, "picked", row("picked", "x:BLN weight:VN target:BL:int64 bias?:V", "y:BL", "scale:float"))

    def forward(values):
        x, weight, target, bias = (values[name] for name in ("x", "weight", "target", "bias"))
        picked = weight[target]
        values["y"].copy_((x * picked).sum(-1) * values["scale"] + (0 if bias is None else bias[target]))
        if values["kept"] is not None:
            values["kept"].copy_(picked)

    def backward(values):
        target, gy = values["target"], values["gy"]
        gx = gy[..., None] * values["scale"]
        weight = torch.zeros_like(values["weight"]).index_put((target,), gx * values["x"], accumulate=True)
        bias = torch.zeros(values["V"]).index_put((target,), gy, accumulate=True)
        return {"gx": gx * values["kept"], "gweight": weight, "gbias": bias}

    def shape_kept(sizes):
        return [sizes[letter] for letter in "BLN"]

    operator = Operator(Namespace("recbole_ssm_test", ["CPU"]), "picked", forward, backward, {"kept": shape_kept})
    x, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((2, 3, 4), (7, 4), (7,)))
    target = torch.randint(7, (2, 3))

    def formula(x, weight, bias):
        return (x * weight[target]).sum(-1) * 0.5 + bias[target]

    for function in (operator, torch.compile(operator, backend="aot_eager", fullgraph=True)):
        y = function(x, weight, target, bias, 0.5)
        torch.testing.assert_close(y, formula(x, weight, bias))
        expected = torch.autograd.grad(formula(x, weight, bias).square().sum(), (x, weight, bias))
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, weight, bias)), expected)
    without = operator(x, weight, target, None, 0.5)
    torch.testing.assert_close(without, formula(x, weight, torch.zeros(7)))
    torch.library.opcheck(
        torch.ops.recbole_ssm_test.picked.default, (x, weight, target, bias, 0.5, True), test_utils="test_schema"
    )
    with pytest.raises(ValueError, match=r"^picked: weight must have shape \[V, 4\], got \[7, 3\]$"):
        check("picked", x, weight[:, :3], target, bias)
