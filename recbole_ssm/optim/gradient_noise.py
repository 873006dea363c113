"""What a batch says about the noise of its gradient, and about the change of the gradient over a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

RandomState = tuple[Tensor, "Tensor | None"]


class Measurement(NamedTuple):
    """A batch's gradient and its noise.

    g_i is the gradient of sample i, g its expectation, and gbar the mean over the batch. ``samples`` is B,
    ``gradient_square`` |gbar|^2, ``variance`` an estimate of E |g_i - g|^2 (that of gbar is a B-th of it), and
    ``along`` the part of the variance in the direction of gbar; the rest is across.
    """

    samples: int
    gradient_square: float
    variance: float
    along: float


class Change(NamedTuple):
    """What one step x -> x + s did to the gradient.

    ``distance`` is |s|, ``square`` an estimate of |grad f(x + s) - grad f(x)|^2 without noise, which may be negative,
    and ``noise`` what noise would have added to it.
    """

    distance: float
    square: float
    noise: float


class GradientProbe:
    """Measures, for the batches that ask for it, the noise of the gradient and its change over the step.

    Noise: the batch is taken in m chunks of b_c samples, with mean gradients g_c. Then

        variance = sum_c b_c |g_c - gbar|^2 / (m - 1)

    is unbiased for independent samples, and costs no further gradient.

    Change: to compare the gradients of two batches, one before and one after a step, does not serve. The difference
    contains the noise of both, and a product of noise and step, because the step follows the noise of the first; it
    outweighs the change itself once steps are small. So the first two chunks are computed again after the step, with
    the same random numbers (dropout). With D_1 and D_2 their differences, E <D_1, D_2> is the square of the mean
    change, up to order 1/B. It costs two chunks of a gradient.

    Use, with ``backward(part)`` as :meth:`AdaptiveBatchSize.accumulate` describes it::

        probe.start(samples)              # gradients are cleared
        for part in parts:
            probe.run(backward, part)
        measurement = probe.measure()     # None for fewer than two chunks
        optimizer.step()
        change = probe.change(backward)   # None where nothing was measured

    Args:
        parameters: on one device. A missing gradient is zero.
        process_group: the processes that share a batch, each with chunks of its own; None for one process. Gradients
            must be local (no DistributedDataParallel, or its ``no_sync``). :meth:`measure` puts their mean over all
            samples into ``p.grad``, and :meth:`share` does so for a batch that is not measured.
        scale: the factor by which ``backward`` multiplies gradients now: ``scaler.get_scale`` of a
            ``torch.amp.GradScaler``. It is taken out of the measurement; a gradient that overflowed is not measured.

    Until :meth:`measure` there is a copy of each chunk's gradient, and until :meth:`change` of two chunks' gradients
    and the parameters. Nothing is kept between batches, so there is no state to save.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        process_group: dist.ProcessGroup | None = None,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.process_group, self.scale = process_group, scale
        self.start(0)

    def start(self, samples: int) -> None:
        """Begin a batch of ``samples`` in this process; forget the one before."""
        self._samples = samples
        # The gradients of the chunks' mean losses, flat.
        self._chunks: list[Tensor] = []
        self._parts: list[slice] = []
        self._random: list[RandomState] = []
        self._sum: Tensor | None = None
        self._point: Tensor | None = None

    def run(self, backward: Callable[[slice], Any], part: slice) -> Any:
        """Call ``backward(part)``, note what it adds to the gradients, and return what it returns."""
        random = self._random_state()
        result = backward(part)
        total = self._gradient()
        own = total if self._sum is None else total - self._sum
        self._sum = total
        self._chunks.append(own * self._mean_factor(part))
        self._parts.append(part)
        self._random.append(random)
        return result

    @torch.no_grad()
    def measure(self) -> Measurement | None:
        """The statistics of the batch, equal on all processes; None for fewer than two chunks or after an overflow."""
        sizes = torch.tensor([part.stop - part.start for part in self._parts], dtype=torch.float64)
        chunks, samples = self._total(torch.tensor([float(len(sizes)), float(sizes.sum())])).tolist()
        if chunks < 2:
            self.share()
            return None
        # [m, parameters]; m is 0 in a process without a sample.
        gradients = torch.stack(self._chunks) if self._chunks else self._gradient().new_empty(0, self._size())
        mean = self._total((sizes / samples).to(gradients) @ gradients)
        if self.process_group is not None:
            self._write(mean * self.scale())
        square = float(mean.double() @ mean.double())
        # Centred before anything is squared, so that small noise is not lost in a large gradient.
        centred = gradients - mean
        apart = torch.linalg.vector_norm(centred, dim=1).double().cpu() ** 2
        along = (centred @ mean).double().cpu() ** 2
        sums = self._total(torch.stack([(sizes * apart).sum(), (sizes * along).sum()]))
        variance, along_mean = (sums / (chunks - 1)).tolist()
        if not all(map(math.isfinite, (square, variance, along_mean))):
            return None
        self._chunks = self._chunks[:2]
        self._point = _flat(self.parameters)
        return Measurement(int(samples), square, variance, along_mean / square if square else 0.0)

    def share(self) -> None:
        """Put the mean gradient over all processes' samples into ``p.grad``, for a batch that is not measured."""
        if self.process_group is not None:
            samples = self._total(torch.tensor(float(self._samples))).item()
            self._write(self._total(self._gradient() * (self._samples / samples)))

    def change(self, backward: Callable[[slice], Any]) -> Change | None:
        """How the step since :meth:`measure` changed the gradient, equal on all processes; clears the gradients.

        None where nothing was measured, and where no process could compute two chunks again: it has fewer, or memory
        ran out, or a gradient overflowed.
        """
        if self._point is None:
            return None
        distance = float((_flat(self.parameters) - self._point).norm())
        differences = []
        device = self.parameters[0].device
        chunks = self._chunks if len(self._chunks) == 2 else []
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for part, random, before in zip(self._parts, self._random, chunks):
                self._clear()
                self._set_random_state(random)
                try:
                    backward(part)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    # The copies of the first pass took too much; this step is not measured.
                    break
                differences.append(self._gradient() * self._mean_factor(part) - before)
        self._clear()
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        if len(differences) == 2:
            first, second = (d.double() for d in differences)
            found = torch.stack([first @ second, (first - second).square().sum() / 2, first.new_ones(())])
            sums = found if found.isfinite().all() else sums
        square, noise, processes = self._total(sums).tolist()
        self.start(0)
        return Change(distance, square / processes, noise / processes) if processes else None

    def _mean_factor(self, part: slice) -> float:
        """What turns that which ``backward(part)`` adds to the gradients into the gradient of the part's mean loss."""
        return self._samples / (part.stop - part.start) / self.scale()

    def _size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def _gradient(self) -> Tensor:
        return _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _write(self, flat: Tensor) -> None:
        users = self._total(torch.tensor([float(p.grad is not None) for p in self.parameters])).tolist()
        for p, part, used in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), users):
            p.grad = part.reshape(p.shape).to(p.dtype).clone() if used else None

    def _total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the parameters' device; for one process the tensor as it is."""
        if self.process_group is None:
            return tensor
        tensor = tensor.to(self.parameters[0].device)
        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def _random_state(self) -> RandomState:
        device = self.parameters[0].device
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _set_random_state(self, state: RandomState) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.parameters[0].device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: CUDA has a class for that, the CPU's allocator only a message."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _flat(tensors: list[Tensor]) -> Tensor:
    """All numbers of tensors ``[n]``, in float32 where any of them has fewer bits: sums of 16 bits are of no use."""
    flat = torch.cat([(t.to_dense() if t.is_sparse else t).detach().reshape(-1) for t in tensors])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
