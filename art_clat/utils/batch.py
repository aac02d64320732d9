"""A batch of training samples as one object."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from art_clat.utils.processes import Part

#: Elements of the inputs that a CPU works on at once: the activations of 32 images of 3×32×32 stay in its caches.
CHUNK_ELEMENTS = 32 * 3 * 32 * 32


@dataclass(frozen=True)
class Batch:
    """
    Inputs and labels of one process, and which part of the whole batch they are.

    :param x: Inputs, shape (n, *input_shape).
    :param y: Index labels, shape (n,), or class probabilities, shape (n, nb_classes).
    :param part: Which samples of the batch of all processes these are.
    """

    x: torch.Tensor
    y: torch.Tensor
    part: Part

    @classmethod
    def whole(cls, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """
        Make a batch that no other process shares.

        :param x: Inputs, shape (n, *input_shape).
        :param y: Labels, first dimension n.
        :return: The batch.
        """
        return cls(x, y, Part(len(x)))

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> Batch:
        """
        Move inputs and labels to a device.

        :param device: The device.
        :return: The same samples there.
        """
        return Batch(self.x.to(device), self.y.to(device), self.part)

    def chunks(self, copies: int = 1) -> list[Batch]:
        """
        Split the batch into as many samples as a CPU's caches hold; at least 32, and all of them on a GPU.

        :param copies: How many inputs of each sample pass through the network together.
        :return: The samples in their order.
        """
        size = max(32, CHUNK_ELEMENTS // max(1, self.x[:1].numel())) // copies
        if self.x.device.type != "cpu" or len(self) <= size:
            return [self]
        places = torch.arange(self.part.total)[self.part.mine].split(size)
        pieces = zip(self.x.split(size), self.y.split(size), places, strict=True)
        return [Batch(x, y, Part(self.part.total, place)) for x, y, place in pieces]
