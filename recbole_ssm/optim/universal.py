"""What the universal gradient methods of :mod:`recbole_ssm.optim.usgm` share: gradients, norms, steps and the ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.optim.averaging import restore_uncast

RULES = ("bregman", "adagrad")
PROJECTIONS = (False, "origin", "start")

Group = dict[str, Any]


class Work(NamedTuple):
    """One parameter group as a call of ``step`` finds it."""

    group: Group
    params: list[Tensor]
    grads: list[Tensor]
    # |grads|^2
    square: float
    # grads minus the kept gradients, and the square of its norm; empty where nothing is compared.
    differences: list[Tensor]
    difference_square: float


class UniversalMethod(Optimizer):
    """What USGM and USFGM share: their groups, the norms of their gradients, the step and the ball.

    The scalars of a recursion are plain floats in its parameter group, so that a state dict holds them exactly. On an
    accelerator they cost one synchronisation a step.
    """

    # Whether gradients may be sparse.
    sparse = False

    def __init__(self, params: Any, **options: Any) -> None:
        # H is None before the first step. gradient_square is |g|^2 of the kept gradient, and -reach * g is the last
        # displacement.
        scalars = {"H": None, "steps": 0, "gradient_square": None, "reach": 0.0}
        super().__init__(params, {**options, **scalars})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group with a recursion of its own, and its own values of the options where it has them.

        Raises:
            UserError: an option is impossible.
        """
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: Group) -> None:
        def require(key: str, fine: bool, what: str) -> None:
            if not fine:
                raise UserError(f"{type(self).__name__}: {key} is {group[key]!r}; give {what}")

        def number(key: str) -> bool:
            value = group[key]
            return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf

        require("D", number("D") and group["D"] > 0, "a positive number, about the distance to a solution")
        require("H0", group["H0"] is None or number("H0"), "a positive number, 0 with a projection, or None")
        if group["H0"] == 0 and not group["projection"]:
            name = type(self).__name__
            raise UserError(f"{name}: H0 is 0, so the first step goes to the ball's boundary; give projection too")
        require("rho", number("rho") and group["rho"] > 0, "a positive number, the first step's length over D")
        require("weight_decay", number("weight_decay"), "a number from 0 up")
        for key, known in (("rule", RULES), ("projection", PROJECTIONS)):
            near = did_you_mean(str(group[key]), [str(k) for k in known if k])
            require(key, any(group[key] is k or group[key] == k for k in known), f"one of {known}{near}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, but the row numbers of sparse gradients stay integers."""
        super().load_state_dict(state_dict)
        restore_uncast(self, state_dict, ("rows",))

    def step_sizes(self) -> list[float]:
        """1 / H of each group; nan before the first step, inf while H is 0."""
        return [_inverse(math.nan if group["H"] is None else group["H"]) for group in self.param_groups]

    # ---- gradients

    def collect(self, compare: Callable[[Group], bool]) -> list[Work]:
        """The groups that have a gradient. Where ``compare`` says so, gradients are compared with the kept ones.

        Raises:
            UserError: a gradient is not finite, or sparse where it must be dense, or a group starts outside its ball.
                Nothing has been changed by then.
        """
        found, vectors = [], []
        for group in self.param_groups:
            params, grads = self._gradients(group)
            if params:
                self._check_start(group, params)
                differences = self._differences(params, grads) if compare(group) else []
                found.append((group, params, grads, differences))
                vectors += [grads, differences]
        squares = iter(self._squares(*vectors))
        return [
            Work(group, params, grads, next(squares), apart, next(squares)) for group, params, grads, apart in found
        ]

    def _gradients(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        """The group's parameters and their gradients; a missing gradient is zero. Empty where no parameter has one."""
        params = [p for p in group["params"] if p.requires_grad or p.grad is not None]
        if all(p.grad is None for p in params):
            return [], []
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in params]
        if any(g.is_sparse for g in grads):
            needs = [key for key in ("weight_decay", "projection") if group[key]]
            if needs or not self.sparse:
                what = " with ".join([type(self).__name__, *needs[:1]])
                raise UserError(f"{what} needs dense gradients; use embeddings with sparse=False")
            grads = [g.coalesce() if g.is_sparse else g for g in grads]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        return params, grads

    def _check_start(self, group: Group, params: list[Tensor]) -> None:
        if group["H"] is not None or group["projection"] != "origin":
            return
        if (norm := math.sqrt(self._squares(params)[0])) > group["D"] / 2:
            raise UserError(
                f"{type(self).__name__}: the start is {norm:.4g} from the origin, outside the ball of diameter D = "
                f"{group['D']}; give D of {2 * norm:.4g} or more, or projection 'start'"
            )

    def _keep(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Copy the gradients, with which the next ones are compared."""
        copies, dense = [], []
        for p, g in zip(params, grads):
            state = self.state[p]
            if g.is_sparse:
                # Two plain tensors, because every format of checkpoints can hold those.
                state.update(rows=g.indices().clone(), gradient=g.values().clone())
                continue
            state.pop("rows", None)
            if "gradient" not in state or state["gradient"].shape != g.shape:
                state["gradient"] = torch.empty_like(g)
            copies.append(state["gradient"])
            dense.append(g)
        if dense:
            torch._foreach_copy_(copies, dense)

    def kept(self, p: Tensor) -> Tensor:
        """The gradient of a parameter that was kept; zero if none was."""
        state = self.state[p]
        if "rows" in state:
            return torch.sparse_coo_tensor(
                state["rows"], state["gradient"], p.shape, is_coalesced=True, check_invariants=False
            )
        return state["gradient"] if "gradient" in state else torch.zeros_like(p)

    def _differences(self, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        kept = [self.kept(p) for p in params]
        if not any(t.is_sparse for t in (*grads, *kept)):
            return list(torch._foreach_sub(grads, kept))
        return [_subtract(g, k) for g, k in zip(grads, kept)]

    def _squares(self, *vectors: list[Tensor]) -> list[float]:
        """|v|^2 of each vector, in one synchronisation; 0 for an empty one."""
        if not vectors:
            return []
        norms = [get_total_norm(list(map(_precise, vector))) for vector in vectors]
        device = norms[0].device
        squares = [norm**2 for norm in torch.stack([norm.to(device) for norm in norms]).tolist()]
        if not all(map(math.isfinite, squares)):
            name = type(self).__name__
            raise UserError(f"{name}: a gradient is not finite; try a smaller D or rho, or clip the gradient")
        return squares

    def buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        """The parameters' buffers of that name; a new one is a copy of its parameter."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = p.detach().clone()
        return [self.state[p][name] for p in params]

    # ---- the step

    def bregman(self, work: Work) -> tuple[float, float]:
        """beta and r^2 of the last displacement.

        Without projection the displacement is -reach * g, and 2 <g', g> = |g|^2 + |g'|^2 - |g' - g|^2. So norms are
        enough, and no second buffer is needed (ours, plain algebra).
        """
        group = work.group
        if group["projection"]:
            moved = torch._foreach_sub(work.params, self.buffers(work.params, "point"))
            products = torch._foreach_mul(work.differences, moved)
            beta = sum(torch.stack([product.sum(dtype=_at_least_float32(product)) for product in products]).tolist())
            return beta, self._squares(list(moved))[0]
        reach, kept_square = group["reach"], group["gradient_square"]
        beta = reach * (kept_square - work.square + work.difference_square) / 2
        return beta, reach**2 * kept_square

    def start(self, work: Work, weight: float = 1.0) -> bool:
        """Set H_0, from the first gradient where ``H0`` is None; False where that gradient is zero."""
        group, D = work.group, work.group["D"]
        if work.square == 0 and group["H0"] is None:
            return False
        if group["projection"] == "start":
            self.buffers(work.params, "centre")
        first_length = group["rho"] * D
        group["H"] = weight * math.sqrt(work.square) / first_length if group["H0"] is None else group["H0"]
        return True

    def move(self, work: Work, points: list[Tensor], weight: float = 1.0, share: float = 1.0) -> None:
        """points <- P(points - weight / H * g), in place; while H is 0, as far as the boundary of the ball.

        What :meth:`bregman` needs is kept. ``share`` is the part of this step that the parameters themselves will move.
        """
        group, params, grads, square = work[:4]
        self._keep(params, grads)
        rate = _inverse(group["H"]) * weight
        if group["projection"]:
            torch._foreach_copy_(self.buffers(params, "point"), params)
        group.update(gradient_square=square, reach=0.0 if group["projection"] else share * weight / group["H"])
        if math.isinf(rate):
            # The authors' code takes a rate of 1e9; this goes beyond the ball from any of its points.
            rate = 1e9 * group["D"] / math.sqrt(square) if square else 0.0
        if any(g.is_sparse for g in grads):
            for p, g in zip(points, grads):
                p.add_(g, alpha=-rate)
        else:
            torch._foreach_add_(points, grads, alpha=-rate)
        if group["projection"]:
            self._project(group, params, points)

    def _project(self, group: Group, params: list[Tensor], points: list[Tensor]) -> None:
        """Bring points that are outside the ball back to its boundary, in place."""
        centre = self.buffers(params, "centre") if group["projection"] == "start" else []
        offsets = torch._foreach_sub(points, centre) if centre else points
        norm = math.sqrt(self._squares(list(offsets))[0])
        if norm > group["D"] / 2:
            inside = torch._foreach_mul(offsets, group["D"] / 2 / norm)
            torch._foreach_copy_(points, torch._foreach_add(inside, centre) if centre else inside)


def _inverse(H: float) -> float:
    return math.inf if H == 0 else 1 / H


def _at_least_float32(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _precise(t: Tensor) -> Tensor:
    """A tensor of the same norm, which neither overflows nor is rounded to 16 bits: for halves, their norm itself."""
    values = t._values() if t.is_sparse else t
    wide = _at_least_float32(values)
    if values.dtype != wide:
        values = torch.linalg.vector_norm(values, dtype=wide)
    return values


def _subtract(a: Tensor, b: Tensor) -> Tensor:
    """a - b, where either may be sparse."""
    if a.is_sparse == b.is_sparse:
        return (a - b).coalesce() if a.is_sparse else a - b
    return a.to_dense() - b.to_dense()
