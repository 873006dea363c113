"""USGM and USFGM: stochastic gradient methods that find their own step size from one number, the diameter D.

References:
    [1] A. Rodomanov, A. Kavis, Y. Wu, K. Antonakopoulos, V. Cevher. "Universal Gradient Methods for Stochastic Convex
        Optimization." ICML 2024, arXiv 2402.03210. The basic method is its algorithm 4.1.
    [2] A. Rodomanov, X. Jiang, S. Stich. "Universality of AdaGrad Stepsizes for Stochastic Optimization: Inexact
        Oracle, Acceleration and Variance Reduction." NeurIPS 2024, arXiv 2406.06398. Algorithms 1 and 2, in the form in
        which its authors' experiments run them.

Both papers treat convex problems over a bounded set. Everything beyond that here is marked as ours.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.optim.averaging import evaluation_point, restore_uncast

RULES = ("bregman", "adagrad")
PROJECTIONS = (False, "origin", "start")

Group = dict[str, Any]


class _Work(NamedTuple):
    """What one call of step has before it in one group."""

    group: Group
    params: list[Tensor]
    grads: list[Tensor]
    square: float  # |grads|^2
    differences: list[Tensor]  # to the kept gradients; empty where there is nothing to compare with
    difference_square: float


def next_usgm(H: float, D: float, beta: float, r_square: float) -> float:
    """The next H of USGM [1, 2]: H + [beta - H r^2 / 2]_+ / (D^2 + r^2 / 2). It never decreases.

    beta = <g_{k+1} - g_k, x_{k+1} - x_k> and r^2 = |x_{k+1} - x_k|^2.
    """
    return H + max(beta - H * r_square / 2, 0.0) / (D**2 + r_square / 2)


def next_usfgm(H: float, D: float, beta: float, r_square: float, a: float, A: float) -> float:
    """The next H of USFGM [2]; beta and r^2 are between the points y_k and x_{k+1}, A includes the newest weight a."""
    inner = (H * D**2 / A + beta) / (a**2 * D**2 / A**2 + r_square / 2)
    return H if beta < inner * r_square / 2 else a**2 / A * inner


def next_adagrad(H: float, D: float, difference_square: float, a: float = 1.0) -> float:
    """The next H by AdaGrad's rule on gradient differences [2]: sqrt(H^2 + a^2 |g' - g|^2 / D^2)."""
    return math.hypot(H, a / D * math.sqrt(difference_square))


class _UniversalMethod(Optimizer):
    """What USGM and USFGM share: their groups, the norms of their gradients, and the ball.

    The scalars of a recursion live in its parameter group as plain floats, so a state dict holds them exactly; they
    cost one synchronisation a step on an accelerator.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        # H: None before the start. gradient_square: |g|^2 of the kept gradient; the last displacement is -reach * g.
        scalars = {"H": None, "steps": 0, "gradient_square": None, "reach": 0.0}
        super().__init__(params, {**options, **scalars})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group with its own D, H and other options; it runs a recursion of its own.

        Raises:
            UserError: an option is not possible.
        """
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: Group) -> None:
        name = type(self).__name__

        def require(key: str, fine: bool, what: str) -> None:
            if not fine:
                raise UserError(f"{name}: {key} is {group[key]!r}; give {what}")

        def number(key: str, low: float) -> bool:
            value = group[key]
            return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < math.inf

        require("D", number("D", 0) and group["D"] > 0, "a positive number, about the distance to a solution")
        require("H0", group["H0"] is None or number("H0", 0), "a positive number, 0 with a projection, or None")
        if group["H0"] == 0 and not group["projection"]:
            raise UserError(f"{name}: H0 is 0, so the first step goes to the ball's boundary; give projection too")
        require("rho", number("rho", 0) and group["rho"] > 0, "a positive number, the first step's length over D")
        require("weight_decay", number("weight_decay", 0), "a number from 0 up")
        for key, known in (("rule", RULES), ("projection", PROJECTIONS)):
            near = did_you_mean(str(group[key]), [str(k) for k in known if k])
            require(key, any(group[key] is k or group[key] == k for k in known), f"one of {known}{near}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's. The numbers of sparse rows stay integers; PyTorch would cast them to the parameter's type."""
        super().load_state_dict(state_dict)
        restore_uncast(self, state_dict, ("rows",))

    def step_sizes(self) -> list[float]:
        """1 / H of each group; nan before the start, inf while H is 0."""
        return [_inverse(math.nan if group["H"] is None else group["H"]) for group in self.param_groups]

    _sparse = False  # whether gradients may be sparse

    # ---- gradients

    def _work(self, compare: Callable[[Group], bool]) -> list[_Work]:
        """The gradients of all groups that have one, and where ``compare`` says so their change since the kept ones.

        Raises:
            UserError: a gradient is not finite, or sparse where it must be dense. Nothing has been changed by then.
        """
        groups, vectors = [], []
        for group in self.param_groups:
            params, grads = self._gradients(group)
            if params:
                differences = self._differences(params, grads) if compare(group) else []
                groups.append((group, params, grads, differences))
                vectors += [grads, differences]
        if not groups:
            return []
        squares = iter(self._squares(*vectors))
        return [
            _Work(group, params, grads, next(squares), apart, next(squares)) for group, params, grads, apart in groups
        ]

    def _gradients(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        """The group's parameters and their gradients; a missing gradient is zero. Empty where no parameter has one."""
        params = [p for p in group["params"] if p.requires_grad or p.grad is not None]
        if all(p.grad is None for p in params):
            return [], []
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in params]
        if any(g.is_sparse for g in grads):
            needs = [key for key in ("weight_decay", "projection") if group[key]]
            if needs or not self._sparse:
                what = " with ".join([type(self).__name__, *needs[:1]])
                raise UserError(f"{what} needs dense gradients; use embeddings with sparse=False")
            grads = [g.coalesce() if g.is_sparse else g for g in grads]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        return params, grads

    def _keep(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Copy the gradients into the buffers that the next difference is taken from."""
        dense = [(p, g) for p, g in zip(params, grads) if not g.is_sparse]
        for p, g in dense:
            self.state[p].pop("rows", None)
            if "gradient" not in self.state[p] or self.state[p]["gradient"].shape != g.shape:
                self.state[p]["gradient"] = torch.empty_like(g)
        if dense:
            torch._foreach_copy_([self.state[p]["gradient"] for p, _ in dense], [g for _, g in dense])
        for p, g in zip(params, grads):
            if g.is_sparse:  # two plain tensors, which every format of checkpoints can hold
                self.state[p].update(rows=g.indices().clone(), gradient=g.values().clone())

    def _kept(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "rows" in state:
            return torch.sparse_coo_tensor(
                state["rows"], state["gradient"], p.shape, is_coalesced=True, check_invariants=False
            )
        return state["gradient"] if "gradient" in state else torch.zeros_like(p)

    def _differences(self, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        kept = [self._kept(p) for p in params]
        if not any(t.is_sparse for t in (*grads, *kept)):
            return list(torch._foreach_sub(grads, kept))
        return [_subtract(g, k) for g, k in zip(grads, kept)]

    def _squares(self, *vectors: list[Tensor]) -> list[float]:
        """|v|^2 of each vector, in one synchronisation; of an empty one 0."""
        norms = [get_total_norm([t._values() if t.is_sparse else t for t in vector]) for vector in vectors]
        device = norms[0].device
        squares = [norm**2 for norm in torch.stack([norm.to(device) for norm in norms]).tolist()]
        if not all(map(math.isfinite, squares)):
            name = type(self).__name__
            raise UserError(f"{name}: a gradient is not finite; try a smaller D or rho, or clip the gradient")
        return squares

    def _buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        """The named buffers of the parameters; a new one begins as the parameter stands."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = p.detach().clone()
        return [self.state[p][name] for p in params]

    # ---- the step

    def _bregman(self, work: _Work) -> tuple[float, float]:
        """beta and r^2 of the last displacement.

        Without projection the displacement is -reach * g, and 2 <g', g> = |g|^2 + |g'|^2 - |g' - g|^2: norms suffice,
        and no second buffer is needed (ours, plain algebra).
        """
        if work.group["projection"]:
            moved = torch._foreach_sub(work.params, self._buffers(work.params, "point"))
            products = torch._foreach_mul(work.differences, moved)
            beta = sum(torch.stack([product.sum() for product in products]).tolist())
            return beta, self._squares(list(moved))[0]
        reach, kept_square = work.group["reach"], work.group["gradient_square"]
        beta = reach * (kept_square - work.square + work.difference_square) / 2
        return beta, reach**2 * kept_square

    def _start(self, group: Group, params: list[Tensor], square: float, weight: float = 1.0) -> None:
        """Set H_0, from the first gradient where H0 is None: then the first step has the length rho * D (ours)."""
        if group["projection"] == "start":
            self._buffers(params, "centre")
        if group["projection"] == "origin" and (norm := math.sqrt(self._squares(params)[0])) > group["D"] / 2:
            raise UserError(
                f"{type(self).__name__}: the start is {norm:.4g} from the origin, outside the ball of diameter D = "
                f"{group['D']}; give D of {2 * norm:.4g} or more, or projection 'start'"
            )
        first_length = group["rho"] * group["D"]
        group["H"] = weight * math.sqrt(square) / first_length if group["H0"] is None else group["H0"]

    def _descend(self, group: Group, points: list[Tensor], grads: list[Tensor], square: float, weight: float) -> None:
        """points <- P(points - weight / H * g), in place. While H is 0 the step goes to the ball's boundary."""
        rate = _inverse(group["H"]) * weight
        if math.isinf(rate):  # as far as any point of the ball could be: the limit of the authors' 1e9
            rate = 1e9 * group["D"] / math.sqrt(square) if square else 0.0
        if any(g.is_sparse for g in grads):
            for p, g in zip(points, grads):
                p.add_(g, alpha=-rate)
        else:
            torch._foreach_add_(points, grads, alpha=-rate)

    def _reach(self, group: Group, weight: float) -> float:
        return 0.0 if group["projection"] else weight / group["H"]

    def _project(self, group: Group, params: list[Tensor], points: list[Tensor]) -> None:
        if not group["projection"]:
            return
        centred = group["projection"] == "start"
        centre = self._buffers(params, "centre") if centred else []
        offsets = torch._foreach_sub(points, centre) if centred else points
        norm = math.sqrt(self._squares(list(offsets))[0])
        if norm > group["D"] / 2:
            inside = torch._foreach_mul(offsets, group["D"] / 2 / norm)
            torch._foreach_copy_(points, torch._foreach_add(inside, centre) if centred else inside)


class USGM(_UniversalMethod):
    """The universal stochastic gradient method, algorithm 4.1 of [1]: SGD whose step 1/H needs no tuning but D.

        x_{k+1} = x_k - g_k / H_k
        H_{k+1} = H_k + [beta_k - H_k r_k^2 / 2]_+ / (D^2 + r_k^2 / 2)
        beta_k = <g_{k+1} - g_k, x_{k+1} - x_k>,  r_k = |x_{k+1} - x_k|

    g_{k+1} is a gradient of a new minibatch: one gradient a step, and H grows with the noise as it does with the
    curvature. For convex problems in a ball of diameter D the averaged iterate converges at the best rate that the
    smoothness and the noise allow, known or not [1]; :class:`~recbole_ssm.optim.IterateAverage` keeps it. With ``H0``
    given and no projection, this recursion is all that runs. Written with norms alone (ours, plain algebra), which is
    how it is computed::

        H_{k+1} = H_k + H_k [|g_{k+1} - g_k|^2 - |g_{k+1}|^2]_+ / (2 H_k^2 D^2 + |g_k|^2)

    so where noise outweighs the mean gradient, H is about sqrt(sum |g_k|^2) / D: the AdaGrad-norm method.

    H never decreases. In a network the first step must therefore not be too long: where the loss explodes once, H keeps
    what it met there, and the steps stay short for good. rho * D has to be tuned as a learning rate is.

    The authors': the recursion, ``rule``, ``projection="origin"`` with ``H0=0``. A third party's (OPTAMI):
    ``passive_start``, ``same_batch``, ``projection="start"``. Ours, for networks: ``rho``, weight decay, a
    recursion for each parameter group (the papers have a single H), sparse gradients.

    Args:
        params: parameters or groups. Each group has its own H, and may have its own value of every option below but
            ``same_batch``. A gradient that is None counts as zero.
        D: diameter of the set that holds the way from start to solution; in units of the parameters' joint norm.
        H0: the first H, in units of gradient over distance. None takes |g_0| / (rho * D) (ours). 0 is the papers': the
            first step goes to the boundary of the ball, so it needs ``projection``.
        rho: length of the first step over D, where H0 is None.
        rule: ``"bregman"`` as above, or ``"adagrad"``: H_{k+1} = sqrt(H_k^2 + |g_{k+1} - g_k|^2 / D^2) [2].
        passive_start: take the first step only to measure H_1, and take it again from the start with that H.
        same_batch: evaluate each minibatch before and after the step, so that the gradient difference is free of noise.
            ``step`` then needs a closure, and costs two gradients. No convergence result holds with noise.
        projection: stay within the ball of radius D/2 around the ``"origin"`` (as the authors' code) or the
            ``"start"``; or False.
        weight_decay: adds weight_decay * x to the gradient, as torch.optim.SGD does.

    One buffer a parameter, as large as it; one more each for the ball and its centre.

    Raises:
        UserError: an option is impossible; ``same_batch`` without a closure; a gradient that is not finite (parameters
            and state then are as they were); a sparse gradient with weight decay or a ball.
    """

    _sparse = True

    def __init__(
        self,
        params: Any,
        D: float,
        H0: float | None = None,
        *,
        rho: float = 0.1,
        rule: str = "bregman",
        passive_start: bool = False,
        same_batch: bool = False,
        projection: bool | str = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.same_batch = same_batch
        super().__init__(
            params,
            D=D,
            H0=H0,
            rho=rho,
            rule=rule,
            projection=projection,
            weight_decay=weight_decay,
            passive_start=passive_start,
        )

    def add_param_group(self, param_group: Group) -> None:
        """As of all universal methods; a passive start is the group's own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["tentative"] = group["passive_start"]  # until H_1 is measured

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One iteration with the gradients in ``p.grad``.

        Args:
            closure: clears the gradients, computes the loss and its gradients, and returns the loss. Needed with
                ``same_batch`` alone.

        Returns:
            The closure's loss, or None.
        """
        if closure is None and self.same_batch:
            raise UserError("USGM: same_batch needs each gradient twice; call step(closure), or set same_batch=False")
        loss = _evaluate(closure)
        for work in self._work(lambda group: group["gradient_square"] is not None and not self.same_batch):
            self._step(work)
        if self.same_batch:
            _evaluate(closure)
            for work in self._work(lambda group: group["gradient_square"] is not None):
                if work.differences:
                    self._look_back(work)
        return loss

    def _step(self, work: _Work) -> None:
        group, params, grads, square = work[:4]
        if group["gradient_square"] is None:
            if square == 0 and group["H0"] is None:
                return  # nothing to start from, and nowhere to go
            self._start(group, params, square)
        elif not self.same_batch:
            passive = group["tentative"]
            self._look_back(work)
            if passive:
                grads, square = [self._kept(p) for p in params], group["gradient_square"]
        self._move(group, params, grads, square)

    def _look_back(self, work: _Work) -> None:
        """Update H from the gradient after the last step; take a tentative step back."""
        group, reach = work.group, work.group["reach"]
        if group["rule"] == "adagrad":
            group["H"] = next_adagrad(group["H"], group["D"], work.difference_square)
        else:
            group["H"] = next_usgm(group["H"], group["D"], *self._bregman(work))
        if group["tentative"]:
            self._undo(group, work.params, reach)
            group["tentative"] = False

    def _move(self, group: Group, params: list[Tensor], grads: list[Tensor], square: float) -> None:
        self._keep(params, grads)
        if group["projection"]:
            torch._foreach_copy_(self._buffers(params, "point"), params)
        group["gradient_square"], group["reach"] = square, self._reach(group, 1.0)
        self._descend(group, params, grads, square, 1.0)
        self._project(group, params, params)
        group["steps"] += not group["tentative"]

    def _undo(self, group: Group, params: list[Tensor], reach: float) -> None:
        """Take the last displacement back."""
        if group["projection"]:
            torch._foreach_copy_(params, self._buffers(params, "point"))
        else:
            for p in params:  # once in a training
                p.add_(self._kept(p), alpha=reach)


class USFGM(_UniversalMethod):
    """The universal stochastic fast (accelerated) gradient method, algorithm 2 of [2].

    Iteration k = 0, 1, ... with a_k = (k + 1) / 2, A_{k+1} = A_k + a_k, v_0 = x_0::

        y_k = (A_k x_k + a_k v_k) / A_{k+1}
        v_{k+1} = v_k - a_k / H_k g(y_k)
        x_{k+1} = (A_k x_k + a_k v_{k+1}) / A_{k+1}

    and H_{k+1} from the gradients at y_k and x_{k+1} (:func:`next_usfgm`). An iteration takes two calls of
    :meth:`step`, each with a gradient of a minibatch of its own where the parameters stand: y_k, then x_{k+1}. No
    closure is needed. The method's output is x_k: evaluate and save within :meth:`evaluation_point`.

    Args:
        params, D, H0, rho, rule, projection, weight_decay: as of :class:`USGM`; the ball holds v.

    Three buffers a parameter. Dense gradients only.

    Raises:
        UserError: as :class:`USGM`.
    """

    def __init__(
        self,
        params: Any,
        D: float,
        H0: float | None = None,
        *,
        rho: float = 0.1,
        rule: str = "bregman",
        projection: bool | str = False,
        weight_decay: float = 0.0,
    ) -> None:
        method = {"D": D, "H0": H0, "rho": rho, "rule": rule, "projection": projection, "weight_decay": weight_decay}
        super().__init__(params, A=0.0, at_y=True, **method)

    def evaluation_point(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the parameters are the method's output x_k; afterwards they are what they were."""
        return evaluation_point(self, "x")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Half an iteration with the gradients in ``p.grad``; returns the closure's loss, or None."""
        loss = _evaluate(closure)
        for work in self._work(lambda group: not group["at_y"]):
            if work.group["at_y"]:
                self._to_x(work.group, work.params, work.grads, work.square)
            else:
                self._to_y(work)
        return loss

    def _to_x(self, group: Group, params: list[Tensor], grads: list[Tensor], square: float) -> None:
        a = (group["steps"] + 1) / 2
        if group["H"] is None:
            if square == 0 and group["H0"] is None:
                return
            self._start(group, params, square, weight=a)
        x, v = self._buffers(params, "x"), self._buffers(params, "v")
        self._keep(params, grads)
        if group["projection"]:
            torch._foreach_copy_(self._buffers(params, "point"), params)
        self._descend(group, v, grads, square, a)
        self._project(group, params, v)
        share = a / (group["A"] + a)
        group.update(gradient_square=square, reach=self._reach(group, share * a), A=group["A"] + a, at_y=False)
        torch._foreach_lerp_(x, v, share)
        torch._foreach_copy_(params, x)

    def _to_y(self, work: _Work) -> None:
        group, a = work.group, (work.group["steps"] + 1) / 2
        if group["rule"] == "adagrad":
            group["H"] = next_adagrad(group["H"], group["D"], work.difference_square, a)
        else:
            group["H"] = next_usfgm(group["H"], group["D"], *self._bregman(work), a, group["A"])
        group["steps"] += 1
        a = (group["steps"] + 1) / 2
        torch._foreach_lerp_(work.params, self._buffers(work.params, "v"), a / (group["A"] + a))
        group["at_y"] = True


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _inverse(H: float) -> float:
    return math.inf if H == 0 else 1 / H


def _subtract(a: Tensor, b: Tensor) -> Tensor:
    """a - b, where either may be sparse."""
    if a.is_sparse == b.is_sparse:
        return (a - b).coalesce() if a.is_sparse else a - b
    return a.to_dense() - b.to_dense()
