"""One event at a time in C++ (``csrc/step.h``): what the ``step`` of a layer is handed to where no gradient is wanted.

A layer that can be run so has ``step_weights()``, the fields that the kernel reads, and ``step_formula``, the same in
PyTorch: the readable form, the oracle of the tests, and what runs everywhere else. A kernel takes a few microseconds,
in which Python reads some ten attributes of a module; so the addresses of the weights are kept from call to call.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from recbole_ssm.layers.state import MixerState
from recbole_ssm.ops import native
from recbole_ssm.ops.backend import dispatch, implements


def step(layer: Any, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    """One event of each sequence through a mixer or a block, by the backend that is chosen for ``u_t``.

    Args:
        layer: what has ``step_weights`` and ``step_formula``.
        u_t: ``[B, d_model]``.
        state: what came before; it is left as it is.

    Returns:
        y ``[B, d_model]`` and the next state.
    """
    if u_t.dtype != torch.float32 or not u_t.is_cpu or torch.compiler.is_compiling():
        return layer.step_formula(u_t, state)
    return dispatch("step", u_t)(layer, u_t, state)


@implements("step", "reference")
@implements("step", "torch")
def _formula(layer: Any, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    return layer.step_formula(u_t, state)


def _native(layer: Any, u_t: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
    prepared = _prepared.get(layer)
    if prepared is None or not prepared.holds():
        prepared = _prepared[layer] = Prepared(layer)
    if not prepared.usable or not _plain(u_t, *state) or (layer.training and prepared.drops):
        return layer.step_formula(u_t, state)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u_t, *state, *prepared.weights)):
        return layer.step_formula(u_t, state)
    u_t, before = u_t.contiguous(), MixerState(state.conv_BDK.contiguous(), state.ssm.contiguous())
    y, after = torch.empty_like(u_t), MixerState(torch.empty_like(before.conv_BDK), torch.empty_like(before.ssm))
    call = prepared.call(u_t, before, after, y)
    workspace = native.step_workspace(call)
    call.workspace = workspace.data_ptr()
    native.run_steps(call, 1)
    return y, after


def _plain(*tensors: Tensor) -> bool:
    """Whether all are float32 in memory of the CPU, and none carries a tangent or stands for a batch of tensors."""
    if forward_ad._current_level >= 0:
        return False
    try:
        return all(t.dtype == torch.float32 and t.is_cpu and (t.data_ptr() or not t.numel()) for t in tensors)
    except RuntimeError:  # torch.func's wrappers have no memory
        return False


class Prepared:
    """The kernel's structure of a layer with the addresses of its weights, good as long as they lie where they lay.

    Attributes:
        usable: whether there is a kernel for this layer, its weights are parameters of it, and all lie as they should.
        weights: what the structure points to.
        drops: whether the layer drops out while it is trained.
    """

    def __init__(self, layer: Any) -> None:
        fields: dict[str, Any] = layer.step_weights()
        self.weights = [value for value in fields.values() if isinstance(value, Tensor)]
        self.drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())
        owners = {id(p): (m._parameters, name) for m in layer.modules() for name, p in m._parameters.items()}
        self.usable = bool(self.weights) and all(
            id(p) in owners and p.dtype == torch.float32 and p.is_cpu and p.is_contiguous() for p in self.weights
        )
        self._places = [(*owners[id(p)], p, p.data_ptr()) for p in self.weights if id(p) in owners]
        self._children = [(m._modules, name, child) for m in layer.modules() for name, child in m.named_children()]
        self._memory = [p.detach() for p in self.weights]  # nothing else can come to lie there while this lives
        if self.usable:
            self._fields = native.structure("step", **fields)
            self._conv = fields["D"] + (2 * fields["G"] * fields["N"] if fields["H"] else 0), fields["K"]

    def holds(self) -> bool:
        """Whether every weight is the parameter that it was, of the module that it was, and lies where it lay."""
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                return False
        for parameters, name, parameter, address in self._places:
            if parameters.get(name) is not parameter or parameter.data_ptr() != address:
                return False
        return True

    def call(self, u: Tensor, before: MixerState, after: MixerState, y: Tensor) -> Any:
        """The structure of a call, which holds no tensor alive; ``after`` may be ``before``.

        Raises:
            ValueError: the shapes do not fit the layer or each other.
        """
        call = type(self._fields).from_buffer_copy(self._fields)
        B, (conv, ssm) = len(y), before
        if u.shape[1:] != (call.M,) or conv.shape != (B, *self._conv) or ssm.numel() != B * call.D * call.N:
            shapes = [list(t.shape) for t in (u, conv, ssm)]
            raise ValueError(f"step: the input and the two parts of the state have shapes {shapes}, which do not fit")
        call.B, call.threads, call.u, call.y = B, torch.get_num_threads(), u.data_ptr(), y.data_ptr()
        call.conv, call.ssm = conv.data_ptr(), ssm.data_ptr()
        call.conv_after, call.ssm_after = after.conv_BDK.data_ptr(), after.ssm.data_ptr()
        return call


_prepared: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()
if not native.unusable:
    implements("step", "native")(_native)


def runs_natively(u: Tensor) -> bool:
    """Whether the backend for a tensor like u is the kernel."""
    return u.dtype == torch.float32 and u.is_cpu and dispatch("step", u) is _native


def norm_fields(name: str, norm: Any) -> dict[str, Any]:
    """Weight, bias and eps of a LayerNorm or an RMSNorm, as fields of the kernel's structure."""
    return {f"{name}_weight": norm.weight, f"{name}_bias": getattr(norm, "bias", None), f"{name}_eps": norm.eps}
