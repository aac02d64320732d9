"""More than one processor: who takes which share of a batch, and what is summed over the processes."""

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

#: How long one process waits within ``fit`` for another, with all of them at work, before it gives up.
TIMEOUT = timedelta(seconds=60)

#: Groups with a timeout of their own, by it and the group of all processes that they were made from.
_groups: dict[tuple[dist.ProcessGroup, timedelta], dist.ProcessGroup] = {}


@dataclass(frozen=True)
class Part:
    """
    The part of a batch that one process works on.

    :param total: Number of samples in the whole batch.
    :param mine: Which of them are here.
    """

    total: int
    mine: slice | torch.Tensor = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Ranks:
    """
    The processes that work together; one alone unless a process group says otherwise.

    :param rank: This process, counted from 0.
    :param size: How many there are.
    :param group: What they talk through; `None` for torch's default.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device: torch.device, timeout: timedelta = TIMEOUT) -> Ranks:
        """
        Find the processes that work together: those of torch's process group, or those that ``torchrun`` launched.

        A group that has to be made for the latter (NCCL on a GPU, gloo otherwise) stays until the process ends. All
        processes of the group must call this; they wait for each other as long as the group lets them.

        :param device: Where this process computes.
        :param timeout: How long one process waits for another, with all of them at work, before it gives up.
        :return: The processes.
        :raises ValueError: If ``torchrun``'s processes on one machine are not on a GPU of their own.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
                return cls()
            _check_own_gpu(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        if dist.get_world_size() == 1:
            return cls()
        world = dist.group.WORLD
        assert world is not None
        dist.barrier()
        if (world, timeout) not in _groups:
            _groups[world, timeout] = dist.new_group(timeout=timeout)  # type: ignore[assignment]  # it is in it
        return cls(dist.get_rank(), dist.get_world_size(), _groups[world, timeout])

    def part(self, nb_samples: int) -> Part:
        """
        Return this process's part of a batch; the parts differ by one sample at most.

        :param nb_samples: Samples in the batch.
        :return: Contiguous samples, or all of them for one process.
        """
        if self.size == 1:
            return Part(nb_samples)
        return Part(nb_samples, slice(self.rank * nb_samples // self.size, (self.rank + 1) * nb_samples // self.size))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """
        Sum over the processes; gradients are summed likewise.

        :param values: Of the same shape in every process, on the device the process computes on.
        :return: The same in every process.
        """
        if self.size == 1:
            return values
        total: torch.Tensor = _Sum.apply(values, self.group)
        return total

    def first(self, values: torch.Tensor) -> torch.Tensor:
        """
        Send every process what the first one has.

        :param values: Of the same shape in every process; overwritten.
        :return: The first process's values.
        """
        if self.size > 1:
            dist.broadcast(values, 0, group=self.group)
        return values

    def gather(self, value: object) -> list[Any]:
        """
        Collect what every process has.

        :param value: What this one has: text, numbers, or lists and dictionaries of them.
        :return: One value a process, in their order.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check_same(self, facts: Mapping[str, object], device: torch.device) -> None:
        """
        Refuse processes that do not work on the same.

        :param facts: Names and values that must be equal.
        :param device: Where this process computes.
        :raises ValueError: In every process, if one differs between two of them.
        """
        if self.size == 1:
            return
        # One number of the same kind everywhere first, since not even the number of facts need be the same.
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
            "arguments, model, optimizer, checkpoint and data, the whole of it; each takes its share by itself."
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """
        Have a module's gradients averaged over the processes, and give all of them the first one's weights and buffers.

        :param module: It has at least one trainable parameter. Buffers are left alone after that: ``BatchNorms`` keeps
               them equal.
        :return: The module itself for one process, otherwise in a ``DistributedDataParallel``.
        """
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(
            module, process_group=self.group, broadcast_buffers=False, find_unused_parameters=True
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        Say in plain words that another process is gone, where torch reports a broken connection.

        NCCL does not report one: torch itself ends the process then, with its own message.

        :raises ConnectionError: In that case.
        """
        try:
            yield
        except RuntimeError as error:
            broken = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
            if self.size == 1 or not any(word in str(error).lower() for word in broken):
                raise
            raise ConnectionError(
                f"Process {self.rank} of {self.size} has lost another one, which died or did not answer; its own "
                "message tells why. With `checkpoint=` the same command continues the run, on any number of processes."
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


def _check_own_gpu(device: torch.device) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # A launcher may show every process only its own GPU.
    if device.type == "cuda" and torch.cuda.device_count() > 1 and device.index != local_rank:
        raise ValueError(
            f"Process {local_rank} of this machine computes on {device}: call "
            '`torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))` before `classifier` is made, so that every process '
            "has a GPU of its own."
        )


def _leave() -> None:
    """End gloo's threads, which end with the last reference to a group: one at work at exit aborts the process."""
    _groups.clear()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
