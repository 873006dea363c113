"""One process or several: ``torchrun --nproc_per_node=2 run_recbole_ssm.py ...``, on torch.distributed."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from torch import distributed as dist


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def start(use_gpu: bool) -> torch.device:
    """Join the other processes, over nccl on GPUs and gloo on CPUs; the device of this process."""
    if not dist.is_initialized():
        # DistributedDataParallel imports this module, whose functions take the group that there
        # is at that moment as a default and then hold it for good. The threads of a group that is
        # held outlive `stop`, and one that still works while Python ends aborts the process.
        # Imported before there is a group, it holds none.
        import torch.distributed.nn.functional

        dist.init_process_group("nccl" if use_gpu else "gloo")
    if not use_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def stop() -> None:
    """Leave the other processes, if there are any; the group's threads end."""
    if dist.is_initialized():
        # What only a cycle of references keeps alive may hold the group, and its threads with it.
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """All rows ``[all, ...]`` in their first order, after they were dealt out one by one to the processes."""
    if world_size() == 1:
        return rows
    everyone = gather(rows.cpu())
    merged = rows.new_empty(sum(len(part) for part in everyone), *rows.shape[1:], device="cpu")
    for number, part in enumerate(everyone):
        merged[number :: len(everyone)] = part
    return merged.to(rows.device)


def broadcast(value: Any) -> Any:
    """The value that process 0 has, for all processes."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def mean(values: list[float]) -> list[float]:
    """The processes' means, number by number."""
    if world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return average(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def average(values: torch.Tensor) -> torch.Tensor:
    """The processes' means, number by number, on the device; on a GPU, Python does not wait for them."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    return mean([float(flag)])[0] > 0
