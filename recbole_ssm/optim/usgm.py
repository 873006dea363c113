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
from typing import Any

import torch

from recbole_ssm.errors import UserError
from recbole_ssm.optim.averaging import evaluation_point
from recbole_ssm.optim.universal import Group, UniversalMethod, Work


def next_usgm(H: float, D: float, beta: float, r_square: float) -> float:
    """The next H of USGM, formula (2) of :class:`USGM`; it never decreases.

    Args:
        H: the coefficient so far, in units of gradient over distance.
        D: the diameter.
        beta: <g_{k+1} - g_k, x_{k+1} - x_k>.
        r_square: |x_{k+1} - x_k|^2.
    """
    return H + max(beta - H * r_square / 2, 0.0) / (D**2 + r_square / 2)


def next_usfgm(H: float, D: float, beta: float, r_square: float, a: float, A: float) -> float:
    """The next H of USFGM [2]; it never decreases.

    ``beta`` and ``r_square`` are as for :func:`next_usgm`, from y_k to x_{k+1}; ``a`` is a_k and ``A`` is A_{k+1}.
    """
    inner = (H * D**2 / A + beta) / (a**2 * D**2 / A**2 + r_square / 2)
    return H if beta < inner * r_square / 2 else a**2 / A * inner


def next_adagrad(H: float, D: float, difference_square: float, a: float = 1.0) -> float:
    """The next H by AdaGrad's rule on differences of gradients [2]: sqrt(H^2 + a^2 |g' - g|^2 / D^2)."""
    return math.hypot(H, a / D * math.sqrt(difference_square))


class USGM(UniversalMethod):
    """The universal stochastic gradient method, algorithm 4.1 of [1]: SGD whose step 1/H needs no tuning but D.

        x_{k+1} = x_k - g_k / H_k                                                 (1)
        H_{k+1} = H_k + [beta_k - H_k r_k^2 / 2]_+ / (D^2 + r_k^2 / 2)            (2)
        beta_k = <g_{k+1} - g_k, x_{k+1} - x_k>,  r_k = |x_{k+1} - x_k|           (3)

    Each g is the gradient of a new minibatch: one gradient a step, and H grows with the noise as it does with the
    curvature. For convex problems in a ball of diameter D the averaged iterate converges at the best rate that the
    smoothness and the noise allow, known or not [1]; :class:`~recbole_ssm.optim.IterateAverage` keeps it. With ``H0``
    given and no projection, (1) to (3) are all that runs. In terms of norms alone, which is how it is computed, (2) is
    (ours, plain algebra)::

        H_{k+1} = H_k + H_k [|g_{k+1} - g_k|^2 - |g_{k+1}|^2]_+ / (2 H_k^2 D^2 + |g_k|^2)

    so where noise outweighs the mean gradient, H is about sqrt(sum |g_k|^2) / D: the AdaGrad-norm method.

    H never decreases. In a network the first step must therefore not be too long: where the loss explodes once, H keeps
    what it met there, and all later steps are short. So rho * D has to be tuned as a learning rate is.

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
        rule: ``"bregman"`` is (2); ``"adagrad"`` is H_{k+1} = sqrt(H_k^2 + |g_{k+1} - g_k|^2 / D^2) [2].
        passive_start: take the first step only to measure H_1, and take it again from the start with that H.
        same_batch: evaluate each minibatch before and after the step, so that the gradient difference is free of noise.
            ``step`` then needs a closure, and costs two gradients. No convergence result holds with noise.
        projection: stay within the ball of radius D/2 around the ``"origin"`` (as the authors' code) or the
            ``"start"``; or False.
        weight_decay: adds weight_decay * x to the gradient, as torch.optim.SGD does.

    The state is one buffer as large as the parameters; the ball and its centre take one more each.

    Raises:
        UserError: an option is impossible; ``same_batch`` without a closure; a gradient that is not finite, or a
            start outside its ball (parameters and state then are as they were, but for the step that was taken where
            it is the second gradient of ``same_batch``); a sparse gradient with weight decay or a ball.
    """

    sparse = True

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
        method = {"D": D, "H0": H0, "rho": rho, "rule": rule, "projection": projection, "weight_decay": weight_decay}
        super().__init__(params, passive_start=passive_start, **method)

    def __getstate__(self) -> dict[str, Any]:
        """As PyTorch's, for copies and pickles, with what is no option of a group."""
        return {**super().__getstate__(), "same_batch": self.same_batch}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group with a recursion of its own; a passive start is the group's own too.

        Raises:
            UserError: an option is impossible.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Whether the last step was taken only to measure H_1.
        group["tentative"] = group["passive_start"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One iteration with the gradients in ``p.grad``.

        Args:
            closure: clears the gradients, computes the loss and its gradients, and returns the loss. Only
                ``same_batch`` needs it.

        Returns:
            The closure's loss, or None.
        """
        if closure is None and self.same_batch:
            raise UserError("USGM: same_batch needs each gradient twice; call step(closure), or set same_batch=False")
        loss = _evaluate(closure)
        for work in self.collect(lambda group: group["gradient_square"] is not None and not self.same_batch):
            self._step(work)
        if self.same_batch:
            _evaluate(closure)
            for work in self.collect(lambda group: group["gradient_square"] is not None):
                if work.differences:
                    self._look_back(work)
        return loss

    def _step(self, work: Work) -> None:
        group = work.group
        if group["gradient_square"] is None:
            if not self.start(work):
                return
        elif not self.same_batch:
            passive = group["tentative"]
            self._look_back(work)
            if passive:
                kept = [self.kept(p) for p in work.params]
                work = work._replace(grads=kept, square=group["gradient_square"])
        self.move(work, work.params)
        group["steps"] += not group["tentative"]

    def _look_back(self, work: Work) -> None:
        """Update H by the gradient after the last step, and take that step back if it was tentative."""
        group, reach = work.group, work.group["reach"]
        if group["rule"] == "adagrad":
            group["H"] = next_adagrad(group["H"], group["D"], work.difference_square)
        else:
            group["H"] = next_usgm(group["H"], group["D"], *self.bregman(work))
        if not group["tentative"]:
            return
        group["tentative"] = False
        if group["projection"]:
            torch._foreach_copy_(work.params, self.buffers(work.params, "point"))
        else:
            for p in work.params:
                p.add_(self.kept(p), alpha=reach)


class USFGM(UniversalMethod):
    """The universal stochastic fast (accelerated) gradient method, algorithm 2 of [2].

    Iteration k = 0, 1, ... with a_k = (k + 1) / 2, A_{k+1} = A_k + a_k, v_0 = x_0::

        y_k = (A_k x_k + a_k v_k) / A_{k+1}                  (4)
        v_{k+1} = v_k - a_k / H_k g(y_k)                     (5)
        x_{k+1} = (A_k x_k + a_k v_{k+1}) / A_{k+1}          (6)

    and H_{k+1} follows from the gradients at y_k and x_{k+1} (:func:`next_usfgm`). An iteration takes two calls of
    :meth:`step`, each with the gradient of a new minibatch where the parameters stand: first at y_k, then at x_{k+1}.
    No closure is needed. The method's output is x_k, so evaluate and save within :meth:`evaluation_point`.

    Args:
        params, D, H0, rho, rule, projection, weight_decay: as for :class:`USGM`; the ball holds v.

    The state is three buffers as large as the parameters; the ball takes two more. Gradients must be dense.

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
        for work in self.collect(lambda group: not group["at_y"]):
            if work.group["at_y"]:
                self._to_x(work)
            else:
                self._to_y(work)
        return loss

    def _to_x(self, work: Work) -> None:
        """(5) and (6), from y_k to x_{k+1}."""
        group, params = work.group, work.params
        a = (group["steps"] + 1) / 2
        if group["H"] is None and not self.start(work, a):
            return
        x, v = self.buffers(params, "x"), self.buffers(params, "v")
        share = a / (group["A"] + a)
        self.move(work, v, a, share)
        group.update(A=group["A"] + a, at_y=False)
        torch._foreach_lerp_(x, v, share)
        torch._foreach_copy_(params, x)

    def _to_y(self, work: Work) -> None:
        """H_{k+1} and (4), from x_{k+1} to y_{k+1}."""
        group, a = work.group, (work.group["steps"] + 1) / 2
        if group["rule"] == "adagrad":
            group["H"] = next_adagrad(group["H"], group["D"], work.difference_square, a)
        else:
            group["H"] = next_usfgm(group["H"], group["D"], *self.bregman(work), a, group["A"])
        group["steps"] += 1
        a = (group["steps"] + 1) / 2
        torch._foreach_lerp_(work.params, self.buffers(work.params, "v"), a / (group["A"] + a))
        group["at_y"] = True


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
