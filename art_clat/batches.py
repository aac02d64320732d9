"""Training batches, from arrays or from an ART data generator."""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch
from art.data_generators import DataGenerator
from art.estimators.classification import PyTorchClassifier

from art_clat.validation import check_data

Batch = tuple[torch.Tensor, torch.Tensor]


class Batches(abc.ABC):
    """An epoch's batches of inputs and labels, every time it is iterated over."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Give one epoch, in an order drawn from torch's generator."""

    @abc.abstractmethod
    def sample(self, nb_samples: int) -> list[Batch]:
        """
        Draw training samples to measure on; the epochs lose nothing by it.

        :param nb_samples: How many, at most.
        :return: At least one batch.
        """


class ArrayBatches(Batches):
    """
    Batches of data in memory, shuffled anew every epoch.

    :param x: Inputs, shape (n, *input_shape).
    :param y: Labels, first dimension n.
    :param batch_size: Samples in a batch.
    :param drop_last: Leave out a smaller last batch.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, *, batch_size: int, drop_last: bool) -> None:
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[Batch]:
        for indices in torch.randperm(len(self.x)).split(self.batch_size):
            if len(indices) == self.batch_size or not self.drop_last:
                yield self.x[indices], self.y[indices]

    def sample(self, nb_samples: int) -> list[Batch]:
        indices = torch.randperm(len(self.x))[:nb_samples]
        return [(self.x[part], self.y[part]) for part in indices.split(self.batch_size)]


class GeneratorBatches(Batches):
    """
    Batches of an ART data generator, each checked as it comes.

    :param generator: The generator.
    :param classifier: The classifier they are for.
    :raises TypeError: If it is no ART data generator.
    :raises ValueError: If its size is unknown.
    """

    def __init__(self, generator: DataGenerator, classifier: PyTorchClassifier) -> None:
        if not isinstance(generator, DataGenerator):
            raise TypeError(
                "`generator` must be an ART DataGenerator (art.data_generators), "
                "PyTorchDataGenerator(loader, size=len(dataset), batch_size=128) for a DataLoader, "
                f"got {type(generator).__name__}."
            )
        if generator.size is None:
            raise ValueError("`generator` has no size: pass `size=`, the number of examples in an epoch, to it.")
        self.generator = generator
        self.classifier = classifier
        self._ahead: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(-(-self.generator.size // self.generator.batch_size)):
            yield self._ahead.pop(0) if self._ahead else self._next()

    def sample(self, nb_samples: int) -> list[Batch]:
        sampled: list[Batch] = []
        while sum(len(x) for x, _ in sampled) < min(nb_samples, self.generator.size):
            sampled.append(self._next())
        self._ahead = list(sampled)  # trained on first, in the epoch they belong to
        return sampled

    def _next(self) -> Batch:
        x, y = self.generator.get_batch()
        return check_data(
            self.classifier, x, y, argument="x of the generator's batch", label_argument="y of the generator's batch"
        )
