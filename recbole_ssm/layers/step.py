"""One event at a time in C++ (``csrc/step.h``), where no gradient is wanted.

A layer's ``step`` is its formula in PyTorch, decorated by :func:`in_one_kernel`; beside it,
``kernel_weights()`` names what the kernel reads. The formula is the readable form, the oracle of
the tests, and what runs wherever the kernel does not: a layer of another class, with other parts
or with hooks may compute something else, and so the kernel serves only what
:class:`recbole_ssm.layers.weights.Weights` knows to be its formula. The kernel takes a few
microseconds, in which Python reads some ten attributes of a module; so the addresses of the
weights are kept from call to call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from recbole_ssm.layers.state import MixerState
from recbole_ssm.layers.weights import Weights
from recbole_ssm.ops import native
from recbole_ssm.ops.backend import dispatch, implements

Step = Callable[[Any, Tensor, MixerState], tuple[Tensor, MixerState]]


def in_one_kernel(formula: Step) -> Step:
    """Let the backend that is chosen for ``u_t`` run a layer's step in place of the decorated formula.

    The state that comes in is left as it is. ``Layer.step.__wrapped__`` is the formula.
    """

    @functools.wraps(formula)
    def step(layer: Any, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        if u_t.dtype != torch.float32 or not u_t.is_cpu or torch.compiler.is_compiling():
            return formula(layer, u_t, state)
        return dispatch("step", u_t)(formula, layer, u_t, state)

    return step


@implements("step", "reference")
@implements("step", "torch")
def _formula(formula: Step, layer: Any, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    return formula(layer, u_t, state)


def _native(formula: Step, layer: Any, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    prepared = prepared_of(layer)
    if prepared.drops or not prepared.steps or not _plain(u_t, *state):
        return formula(layer, u_t, state)
    tensors = (u_t, *state, *prepared.weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return formula(layer, u_t, state)
    u_t = u_t.contiguous()
    before = MixerState(state.conv_BDK.contiguous(), state.ssm.contiguous())
    after = MixerState(torch.empty_like(before.conv_BDK), torch.empty_like(before.ssm))
    y = torch.empty_like(u_t)
    call = prepared.call(u_t, before, after, y)
    workspace = native.step_workspace(call)
    call.workspace = workspace.data_ptr()
    native.run_steps(call, 1)
    return y, after


def _plain(*tensors: Tensor) -> bool:
    """Whether all are float32 in the CPU's memory, and stand for no tangent or batch of tensors."""
    if forward_ad._current_level >= 0:
        return False
    try:
        return all(t.dtype == torch.float32 and t.is_cpu and (t.data_ptr() or not t.numel()) for t in tensors)
    except RuntimeError:  # torch.func's wrappers have no memory
        return False


class Prepared(Weights):
    """The kernel's structure of a layer with the addresses of its weights.

    Attributes:
        steps: whether it is usable, and for one event at a time.
    """

    def __init__(self, layer: Any) -> None:
        try:
            fields: dict[str, Any] = layer.kernel_weights()
        except AttributeError:  # another class stands in the place of the layer or of one of its parts
            fields = {}
        super().__init__([layer], fields, _shapes(fields) if fields else {})
        self.steps = self.usable and "diagonal" not in fields
        if self.usable:
            self.fields = native.structure("step", **fields)
            maps = 2 * fields["G"] * fields["N"] if fields["H"] else 0
            self._conv = fields["D"] + maps, fields["K"]

    def call(self, u: Tensor, before: MixerState, after: MixerState, y: Tensor) -> Any:
        """The structure of a call, which holds no tensor alive; ``after`` may be ``before``.

        Raises:
            ValueError: the shapes do not fit the layer or each other.
        """
        call = type(self.fields).from_buffer_copy(self.fields)
        B, (conv, ssm) = len(y), before
        fits = u.shape[1:] == (call.M,) and conv.shape == (B, *self._conv)
        if not fits or ssm.numel() != B * call.D * call.N:
            shapes = [list(t.shape) for t in (u, conv, ssm)]
            raise ValueError(f"step: the input and the two parts of the state have shapes {shapes}, which do not fit")
        call.B, call.threads = B, torch.get_num_threads()
        call.u, call.y = u.data_ptr(), y.data_ptr()
        call.conv, call.ssm = conv.data_ptr(), ssm.data_ptr()
        call.conv_after, call.ssm_after = after.conv_BDK.data_ptr(), after.ssm.data_ptr()
        return call


def _shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights that the kernel reads of a layer of such sizes."""
    M, D, N, K, H, F = (fields.get(size, 0) for size in "MDNKHF")
    directions = 2 if "diagonal" in fields else 1
    if H:
        channels = D + 2 * directions * fields["G"] * N
        inputs, scalars = D + channels + directions * H, (H,)
        shapes: dict[str, tuple[int, ...]] = {"A_log": (H,), "gate_norm_weight": (D,)}
    else:
        channels, inputs, scalars, R = D, 2 * D, (D,), fields["R"]
        shapes = {"A_log": (D, N), "x_weight": (R + 2 * N, D), "dt_weight": (D, R)}
    shapes |= {"in_weight": (inputs, M), "conv_weight": (channels, 1, K), "conv_bias": (channels,)}
    shapes |= {"dt_bias": scalars, "skip": scalars, "out_weight": (M, D)}
    if directions == 2:
        shapes["diagonal"] = (H, D)
    if F:
        shapes |= {"w_1": (F, M), "b_1": (F,), "w_2": (M, F), "b_2": (M,)}
        shapes |= {f"{norm}_{part}": (M,) for norm in ("norm", "last") for part in ("weight", "bias")}
    return shapes


_prepared: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()
if not native.unusable:
    implements("step", "native")(_native)


def prepared_of(layer: Any) -> Prepared:
    """What the kernel reads of a layer as it stands, kept from call to call."""
    prepared = _prepared.get(layer)
    if prepared is None or not prepared.holds():
        prepared = _prepared[layer] = Prepared(layer)
    return prepared


def runs_natively(u: Tensor) -> bool:
    """Whether the backend for a tensor like u is the kernel."""
    return u.dtype == torch.float32 and u.is_cpu and dispatch("step", u) is _native


def norm_fields(name: str, norm: Any, kind: type[nn.LayerNorm] | type[nn.RMSNorm] = nn.LayerNorm) -> dict[str, Any]:
    """Weight, bias and eps of a norm, as fields of the kernel's structure; nothing of another kind than it computes."""
    if type(norm) is not kind or norm.eps is None:
        return {}
    bias = {f"{name}_bias": norm.bias} if kind is nn.LayerNorm else {}
    return {f"{name}_weight": norm.weight, **bias, f"{name}_eps": norm.eps}


def ssd_fields(mixer: Any) -> dict[str, Any]:
    """Sizes and weights of a mixer around SSD, as fields of the kernels' structure."""
    return {
        "M": mixer.in_proj.in_features,
        "D": mixer.d_inner,
        "N": mixer.d_state,
        "K": mixer.d_conv,
        "H": mixer.n_heads,
        "G": mixer.n_groups,
        "in_weight": mixer.in_proj.weight,
        "conv_weight": mixer.conv1d.weight,
        "conv_bias": mixer.conv1d.bias,
        "dt_bias": mixer.dt_bias,
        "A_log": mixer.A_log,
        "skip": mixer.D,
        "out_weight": mixer.out_proj.weight,
        **norm_fields("gate_norm", mixer.norm, nn.RMSNorm),
    }
