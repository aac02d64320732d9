"""A batch of training samples as one object."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from art_clat.utils.processes import Part

#: Input elements in one chunk on a CPU: the activations of 32 images of 3×32×32 stay in its caches.
CHUNK_ELEMENTS = 32 * 3 * 32 * 32


@dataclass(frozen=True)
class Batch:
    """
    A batch of inputs and labels, and its place in the batch of all processes.

    :param x: Inputs, shape (n, *input_shape).
    :param y: Index labels, shape (n,), or class probabilities, shape (n, nb_classes).
    :param part: Which samples of the whole batch this process holds.
    :param index: The samples' indices in the data set, shape (n,), on the CPU; `None` if they have none.
    """

    x: torch.Tensor
    y: torch.Tensor
    part: Part
    index: torch.Tensor | None = None

    @classmethod
    def whole(cls, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """
        Make a batch that is the whole batch: no other process holds a part of it.

        :param x: Inputs, shape (n, *input_shape).
        :param y: Index labels, shape (n,), or class probabilities, shape (n, nb_classes).
        :return: The batch.
        """
        return cls(x, y, Part(len(x)))

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> Batch:
        """
        Move inputs and labels to a device.

        :return: A batch of the same samples on the device.
        """
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def take(self, places: torch.Tensor) -> Batch:
        """
        Take some of the samples.

        :param places: Their places in this batch, on the CPU.
        :return: A batch of them, which are where they were in the batch of all processes.
        """
        on_device = places.to(self.x.device, non_blocking=True)
        part = Part(self.part.total, torch.arange(self.part.total)[self.part.mine][places])
        index = None if self.index is None else self.index[places]
        return Batch(self.x[on_device], self.y[on_device], part, index)

    def chunks(self, copies: int = 1) -> list[Batch]:
        """
        Split the batch into chunks that fit a CPU's caches, of 32 samples or more. On a GPU it stays whole.

        :param copies: How many inputs of each sample pass through the network together; it divides the chunks' size.
        :return: Batches that hold all samples, in their order.
        """
        size = max(32, CHUNK_ELEMENTS // max(1, self.x[:1].numel())) // copies
        if self.x.device.type != "cpu" or len(self) <= size:
            return [self]
        places = torch.arange(self.part.total)[self.part.mine].split(size)
        pieces = zip(self.x.split(size), self.y.split(size), places, strict=True)
        return [Batch(x, y, Part(self.part.total, place)) for x, y, place in pieces]
