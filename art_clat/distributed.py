"""More than one processor: who takes which share of a batch, and what is summed over the processes."""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

#: How long one process waits for another before it gives up.
TIMEOUT = timedelta(seconds=60)


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
    The processes that train together; one alone unless a process group says otherwise.

    :param rank: This process, counted from 0.
    :param size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """
        Find the processes that train together: those of torch's process group, or those that ``torchrun`` launched.

        A group that has to be made for the latter (NCCL on a GPU, gloo otherwise) stays until the process ends.

        :param device: Where this process computes.
        :return: The processes.
        :raises ValueError: If two processes of one machine are on the same GPU.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
                return cls()
            _check_own_gpu(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size())

    def part(self, nb_samples: int) -> Part:
        """
        Give this process's part of a batch; the parts differ by one sample at most.

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
        total: torch.Tensor = _Sum.apply(values)
        return total

    def first(self, values: torch.Tensor) -> torch.Tensor:
        """
        Give every process what the first one has.

        :param values: Of the same shape in every process; overwritten.
        :return: The first process's values.
        """
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def check_same(self, facts: Mapping[str, object], device: torch.device) -> None:
        """
        Refuse processes that do not train the same.

        :param facts: Names and values that must be equal.
        :param device: Where this process computes.
        :raises ValueError: In every process, if one differs between two of them.
        """
        if self.size == 1:
            return
        digests = {name: hashlib.sha256(repr(value).encode()).digest()[:8] for name, value in facts.items()}
        here = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests.values()], device=device)
        largest, smallest = here.clone(), here.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        names = [name for name, same in zip(digests, (largest == smallest).tolist(), strict=True) if not same]
        if names:
            raise ValueError(
                f"The {self.size} processes differ in {', '.join(names[:5])}: all must call `fit` with the same "
                "arguments, model, checkpoint and data, all of the training set; each takes its share by itself."
            )

    def share_model(self, model: nn.Module) -> None:
        """
        Give every process the first one's weights and buffers.

        :param model: The network.
        """
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                self.first(tensor.detach())

    def wrap(self, module: nn.Module) -> nn.Module:
        """
        Have a module's gradients averaged over the processes.

        :param module: It has at least one trainable parameter. Buffers are left alone: ``BatchNorms`` keeps them equal.
        :return: The module itself for one process, otherwise in a ``DistributedDataParallel``.
        """
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        Say in plain words that another process is gone, where torch reports a broken connection.

        :raises ConnectionError: In that case.
        """
        try:
            yield
        except RuntimeError as error:
            broken = ("gloo", "nccl", "connection", "process group", "timed out", "broken pipe", "socket")
            if self.size == 1 or not any(word in str(error).lower() for word in broken):
                raise
            raise ConnectionError(
                f"Process {self.rank} of {self.size} has lost another one, which died or did not answer for "
                f"{TIMEOUT.seconds} seconds; its own message tells why. With `checkpoint=` the same command continues "
                "the run, on any number of processes."
            ) from error


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _check_own_gpu(device: torch.device) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda" and device.index != local_rank:
        raise ValueError(
            f"Process {local_rank} of this machine computes on {device}: call "
            '`torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))` before `classifier` is made, so that every process '
            "has a GPU of its own."
        )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
