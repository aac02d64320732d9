"""Training batches, from arrays or from an ART data generator."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import replace

import torch
from art.data_generators import DataGenerator
from art.estimators.classification import PyTorchClassifier

from art_clat.models.checks import check_data
from art_clat.utils.batch import Batch
from art_clat.utils.processes import Ranks

#: The training set is kept on a GPU if it takes less than this share of its free memory.
DEVICE_SHARE = 0.3


class Batches(abc.ABC):
    """The batches that an epoch trains on."""

    #: Samples in a batch, over all processes.
    batch_size: int

    @property
    @abc.abstractmethod
    def nb_batches(self) -> int:
        """Number of batches in an epoch."""

    @property
    @abc.abstractmethod
    def nb_samples(self) -> int:
        """Number of samples in the data."""

    @abc.abstractmethod
    def example(self) -> torch.Tensor:
        """Return at least one input."""

    @abc.abstractmethod
    def describe(self) -> dict[str, object]:
        """Return the number of samples and how they are batched, ready for JSON."""

    @abc.abstractmethod
    def epoch(self, first: int, ranks: Ranks) -> Iterator[Batch]:
        """Yield an epoch's batches from number `first` on, in an order that torch's generator draws at the start."""

    @abc.abstractmethod
    def sample(self, nb_samples: int, ranks: Ranks) -> list[Batch]:
        """
        Draw about `nb_samples` training samples to measure on, over all processes; epochs still train on all samples.

        A generator's batches are taken whole. A batch with fewer samples than there are processes may be empty here.
        """


class ArrayBatches(Batches):
    """
    Batches of arrays, shuffled anew every epoch.

    :param batch_size: Samples in a batch, over all processes.
    :param drop_last: Leave out a smaller last batch.
    :param device: The device that the network runs on. Data that fit are kept there.
    """

    def __init__(
        self, x: torch.Tensor, y: torch.Tensor, *, batch_size: int, drop_last: bool, device: torch.device
    ) -> None:
        if device.type == "cuda" and x.nbytes < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            x, y = x.to(device), y.to(device)
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.drop_last = drop_last

    @property
    def nb_batches(self) -> int:
        full, rest = divmod(len(self.x), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def nb_samples(self) -> int:
        return len(self.x)

    def example(self) -> torch.Tensor:
        return self.x[:1]

    def describe(self) -> dict[str, object]:
        return {"x": list(self.x.shape), "batch_size": self.batch_size, "drop_last": self.drop_last}

    def epoch(self, first: int, ranks: Ranks) -> Iterator[Batch]:
        order = torch.randperm(len(self.x))
        yield from self._batches(order[first * self.batch_size : self.nb_batches * self.batch_size], ranks)

    def sample(self, nb_samples: int, ranks: Ranks) -> list[Batch]:
        return list(self._batches(torch.randperm(len(self.x))[:nb_samples], ranks))

    def _batches(self, order: torch.Tensor, ranks: Ranks) -> Iterator[Batch]:
        on_device = order.to(self.x.device)
        for index, places in zip(order.split(self.batch_size), on_device.split(self.batch_size), strict=True):
            part = ranks.part(len(index))
            mine = places[part.mine]
            yield Batch(self.x[mine], self.y[mine], part, index[part.mine])


class GeneratorBatches(Batches):
    """Batches of an ART data generator, each checked when it comes; for one process."""

    def __init__(self, generator: DataGenerator, classifier: PyTorchClassifier) -> None:
        if not isinstance(generator, DataGenerator):
            raise TypeError(
                f"`generator` must be an ART DataGenerator (art.data_generators), got {type(generator).__name__}. For "
                "a DataLoader use PyTorchDataGenerator(loader, size=len(dataset), batch_size=128)."
            )
        if generator.size is None:
            raise ValueError("`generator` has no size: make it with `size=`, the number of samples in an epoch.")
        self.generator = generator
        self.batch_size = int(generator.batch_size)
        self.classifier = classifier
        self._ahead: list[Batch] = []

    @property
    def nb_batches(self) -> int:
        return -(-int(self.generator.size) // int(self.generator.batch_size))

    @property
    def nb_samples(self) -> int:
        return int(self.generator.size)

    def example(self) -> torch.Tensor:
        if not self._ahead:
            self._ahead.append(self._next())
        return self._ahead[0].x

    def describe(self) -> dict[str, object]:
        generator = self.generator
        return {"generator": type(generator).__name__, "size": generator.size, "batch_size": generator.batch_size}

    def epoch(self, first: int, ranks: Ranks) -> Iterator[Batch]:
        for _ in range(first, self.nb_batches):
            yield self._ahead.pop(0) if self._ahead else self._next()

    def sample(self, nb_samples: int, ranks: Ranks) -> list[Batch]:
        while sum(map(len, self._ahead)) < min(nb_samples, self.generator.size):
            self._ahead.append(self._next())
        # Copies: the next epoch trains on these batches first, and an augmentation may write to them.
        return [replace(batch, x=batch.x.clone()) for batch in self._ahead]

    def _next(self) -> Batch:
        x, y = self.generator.get_batch()
        inputs, labels = check_data(
            self.classifier, x, y, argument="x of the generator's batch", label_argument="y of the generator's batch"
        )
        return Batch.whole(inputs.clone(), labels)  # an augmentation may write to it
