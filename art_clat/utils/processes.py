"""Training on several processes: which share of a batch each one takes, and what is summed over them."""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

#: How long one process waits for another within ``fit`` before it gives up.
TIMEOUT = timedelta(seconds=60)

#: Groups made with a timeout, by the group of all processes and that timeout.
_groups: dict[tuple[dist.ProcessGroup, timedelta], dist.ProcessGroup] = {}


@dataclass(frozen=True)
class Part:
    """
    The part of a batch that one process works on.

    :param total: Number of samples in the whole batch.
    :param mine: Indices of this process's samples in the whole batch.
    """

    total: int
    mine: slice | torch.Tensor = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Ranks:
    """
    The processes that work together. Without a process group it is this process alone.

    :param rank: Number of this process, from 0.
    :param size: Number of processes.
    :param group: The group they communicate through; `None` for torch's default.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device: torch.device, timeout: timedelta = TIMEOUT) -> Ranks:
        """
        Find the processes that work together: those of torch's process group, or those that ``torchrun`` launched.

        All processes must call this; they wait for each other as long as the process group allows. If ``torchrun``
        launched them and no group exists, one is made (NCCL on a GPU, gloo otherwise) and stays until the process ends.

        :param device: The device that this process computes on.
        :param timeout: How long one process waits for another after that before it gives up.
        :return: The processes.
        :raises ValueError: If two processes that ``torchrun`` launched on one machine would use the same GPU.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
                return cls()
            _check_gpu_is_not_shared(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        if dist.get_world_size() == 1:
            return cls()
        world = dist.group.WORLD
        assert world is not None
        dist.barrier()
        if (world, timeout) not in _groups:
            _groups[world, timeout] = dist.new_group(timeout=timeout)  # type: ignore[assignment]  # a member
        return cls(dist.get_rank(), dist.get_world_size(), _groups[world, timeout])

    def part(self, nb_samples: int) -> Part:
        """
        Return this process's part of a batch.

        :param nb_samples: Number of samples in the whole batch.
        :return: Consecutive samples; the parts of two processes differ by one sample at most. One process takes all.
        """
        if self.size == 1:
            return Part(nb_samples)
        return Part(nb_samples, slice(self.rank * nb_samples // self.size, (self.rank + 1) * nb_samples // self.size))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """
        Sum tensors over the processes; their gradients are summed as well.

        :param values: On the device that the process computes on; of the same shape in every process.
        :return: The sum, in every process.
        """
        if self.size == 1:
            return values
        total: torch.Tensor = _Sum.apply(values, self.group)
        return total

    def first(self, values: torch.Tensor) -> torch.Tensor:
        """
        Send the first process's values to all.

        :param values: Of the same shape in every process; overwritten.
        :return: The first process's values.
        """
        if self.size > 1:
            dist.broadcast(values, 0, group=self.group)
        return values

    def gather(self, value: object) -> list[Any]:
        """
        Collect a value of every process.

        :param value: This process's value: text, numbers, or lists and dictionaries of them.
        :return: One value a process, in the order of their numbers.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check_same(self, facts: Mapping[str, object], device: torch.device) -> None:
        """
        Refuse processes that work on different things.

        :param facts: Names and values that must be equal in all processes.
        :param device: The device that this process computes on.
        :raises ValueError: In every process, if a value differs between two of them.
        """
        if self.size == 1:
            return
        # Compare one number first: processes that differ may not even have the same number of facts.
        text = json.dumps({name: str(value) for name, value in facts.items()})
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
        largest, smallest = torch.tensor(digest, device=device), torch.tensor(digest, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group)
        if largest == smallest:
            return
        first, *others = map(json.loads, self.gather(text))
        all_names = dict.fromkeys(name for one in (first, *others) for name in one)
        names = [name for name in all_names if any(other.get(name) != first.get(name) for other in others)]
        raise ValueError(
            f"The {self.size} processes differ in {', '.join(names[:5])}: all must make the same call with the same "
            "arguments, model, optimizer, checkpoint and data. Pass the whole data; each process takes its share of it."
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """
        Average a module's gradients over the processes; all begin with the first one's weights and buffers.

        :param module: A module with at least one trainable parameter. Its buffers are not sent again:
               :class:`art_clat.layers.batch_norm.BatchNorms` keeps them equal.
        :return: A ``DistributedDataParallel``, or the module itself for one process.
        """
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(
            module, process_group=self.group, broadcast_buffers=False, find_unused_parameters=True
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        Turn torch's error about a broken connection into one that says what to do.

        NCCL raises no such error: torch then ends the process, with another message.

        :raises ConnectionError: If another process is lost.
        """
        try:
            yield
        except RuntimeError as error:
            broken = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
            if self.size == 1 or not any(word in str(error).lower() for word in broken):
                raise
            raise ConnectionError(
                f"Process {self.rank} of {self.size} has lost another one, which died or did not answer. Its message "
                "says why. With `checkpoint=` the same command continues the run, on any number of processes."
            ) from error


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _check_gpu_is_not_shared(device: torch.device) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # A launcher may show every process one GPU only, which then has the index 0 everywhere.
    if device.type == "cuda" and torch.cuda.device_count() > 1 and device.index != local_rank:
        raise ValueError(
            f"Process {local_rank} of this machine computes on {device}: call "
            '`torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))` before `classifier` is made, so that no two '
            "processes share a GPU."
        )


def _leave() -> None:
    """End all groups, and with them gloo's threads: a thread that still works at exit aborts the process."""
    _groups.clear()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
