"""Attacks on many examples, a batch at a time: shared among processes, saved as they come, continued after a kill."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from art_clat.robustness.autoattack import Attack, heard
from art_clat.utils.descriptions import check_description
from art_clat.utils.files import prepare, read, write
from art_clat.utils.processes import Ranks
from art_clat.utils.randomness import reseed


@dataclass(frozen=True)
class Outcome:
    """
    What an attack did to the examples it was run on.

    :param robust: Whether each of all examples is still classified correctly, shape (n,); `False` where it was not run.
    :param fooled: Which of them it got misclassified, in ascending order.
    :param adversarial: Their adversarial examples, shape (len(fooled), channels, height, width).
    :param warnings: What AutoAttack warned of.
    :param seconds: Time taken, of all processes together.
    """

    robust: torch.Tensor
    fooled: torch.Tensor
    adversarial: torch.Tensor
    warnings: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class _Batch:
    fooled: torch.Tensor
    adversarial: torch.Tensor
    warnings: list[str]
    seconds: float


class Folder:
    """
    The folder an evaluation saves itself in: one file for the run, and one for each attack on each batch.

    :param path: Created if missing.
    :param description: What must be the same for an evaluation to be continued: names, and values that JSON can hold.
    :param outputs: What the network gives for some examples, on the CPU: no description tells what its code computes.
    """

    def __init__(self, path: Path, description: Mapping[str, object], outputs: torch.Tensor) -> None:
        self._path = path
        self._description = description
        self._outputs = outputs

    def check(self) -> None:
        """
        Refuse a folder with anything else in it than this evaluation, or that cannot be written to.

        :raises ValueError: In the first case.
        :raises OSError: In the second case.
        """
        if self._run.exists():
            tensors, content = read(self._run)
            check_description(content["description"], self._description, self._path)
            before, scale = tensors["outputs"], float(self._outputs.abs().max())
            if not torch.allclose(before, self._outputs, rtol=0, atol=1e-3 * scale):  # another machine rounds otherwise
                raise ValueError(
                    f"`checkpoint`: {self._path} holds the evaluation of a network with these weights that gave other "
                    "outputs for the same inputs; its code has changed since. Use another folder."
                )
        elif self._path.exists() and (
            not self._path.is_dir() or any(entry.suffix != ".tmp" for entry in self._path.iterdir())
        ):
            raise ValueError(
                f"`checkpoint`: {self._path} holds something else than an evaluation. Name a new or empty folder."
            )
        prepare(self._path)

    def open(self) -> None:
        """
        Make the folder this evaluation's, once all processes have checked it.

        :raises OSError: If it cannot be written to.
        """
        write(self._run, {"outputs": self._outputs}, {"description": self._description})

    def load(self, attack: str, number: int, indices: torch.Tensor) -> _Batch | None:
        """
        Read a batch that is done.

        :param attack: Name of the attack.
        :param number: Which of its batches.
        :param indices: The examples in it.
        :return: `None` if it is not done, or was of other examples.
        :raises ValueError: If its file is damaged.
        """
        path = self._file(attack, number)
        if not path.exists():
            return None
        tensors, content = read(path)
        if not torch.equal(tensors["indices"], indices):
            return None
        return _Batch(tensors["fooled"], tensors["adversarial"], content["warnings"], content["seconds"])

    def save(self, attack: str, number: int, indices: torch.Tensor, batch: _Batch) -> None:
        """
        Write a batch that is done.

        :param attack: Name of the attack.
        :param number: Which of its batches.
        :param indices: The examples in it.
        :param batch: What came out.
        :raises OSError: If the folder cannot be written to.
        """
        tensors = {"indices": indices, "fooled": batch.fooled, "adversarial": batch.adversarial.contiguous()}
        write(self._file(attack, number), tensors, {"warnings": batch.warnings, "seconds": batch.seconds})

    @property
    def _run(self) -> Path:
        return self._path / "evaluation.safetensors"

    def _file(self, attack: str, number: int) -> Path:
        return self._path / f"{attack}-{number:05}.safetensors"


class Evaluation:
    """
    A network against one attack after another.

    Every attack runs on those examples, in their order and batch by batch, that it is given; batch ``k`` is that of
    process ``k`` modulo their number. What is drawn at random in a batch follows from the seed, the attack and the
    batch, so that neither the number of processes nor a kill changes it.

    :param model: Gives logits, shape (batch, nb_classes); in the mode in which it is to be attacked.
    :param x: Examples, shape (n, channels, height, width), on the CPU.
    :param y: Index labels, shape (n,), on the CPU.
    :param costs: The attacks to come in their order, and the forward passes that each needs for an example; for the
           time left.
    :param device: Where the network runs.
    :param batch_size: Examples in a batch.
    :param seed: The seed.
    :param ranks: The processes that share the batches.
    :param folder: Where to save, or `None`.
    :param verbose: Show the progress.
    """

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        costs: Mapping[str, float],
        device: torch.device,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        folder: Folder | None,
        verbose: bool,
    ) -> None:
        self._model, self._x, self._y = model, x, y
        self._costs = dict(costs)
        self._device, self._batch_size, self._seed = device, batch_size, seed
        self._ranks, self._folder = ranks, folder
        self._restored = 0.0
        self._bar = tqdm(
            total=len(x) * sum(costs.values()) / ranks.size,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            smoothing=0,  # the mean speed: batches of several attacks differ
            disable=not verbose or ranks.rank > 0,
        )

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def run(self, name: str, attack: Attack | None, among: torch.Tensor) -> Outcome:
        """
        Run one attack. All processes must.

        :param name: Its name, one of `costs`.
        :param attack: The attack, or `None` for the examples as they are.
        :param among: Whether to run it on each example, shape (n,).
        :return: What came out, the same in every process.
        """
        indices = among.nonzero().squeeze(1)
        batches = [batch for batch in indices.split(self._batch_size) if len(batch)]
        self._expect(name, len(indices))
        done = {}
        for number in range(self._ranks.rank, len(batches), self._ranks.size):
            done[number] = self._batch(name, attack, number, batches[number])
        return self._merge(among, batches, done)

    @torch.no_grad()
    def _batch(self, name: str, attack: Attack | None, number: int, indices: torch.Tensor) -> _Batch:
        saved = None if self._folder is None else self._folder.load(name, number, indices)
        if saved is None:
            started = time.perf_counter()
            reseed(self._device, self._seed, zlib.crc32(name.encode()), number)
            x, y = self._x[indices].to(self._device), self._y[indices].to(self._device)
            with heard() as warnings:
                x_adv = x if attack is None else attack(x, y)
            fooled = self._model(x_adv).argmax(dim=1) != y
            batch = _Batch(fooled.cpu(), x_adv[fooled].cpu(), warnings, time.perf_counter() - started)
            if self._folder is not None:
                self._folder.save(name, number, indices, batch)
        else:
            batch = saved
        work = len(indices) * self._costs[name]
        if saved is not None:
            self._restored += work
            self._bar.initial = self._restored  # it took no time
        self._bar.update(work)
        return batch

    def _merge(self, among: torch.Tensor, batches: list[torch.Tensor], done: Mapping[int, _Batch]) -> Outcome:
        """Put together what the processes have; sums, to each of which one process only contributes."""
        verdicts = torch.zeros(len(self._x), dtype=torch.int32)
        for number, batch in done.items():
            verdicts[batches[number]] = batch.fooled.int()
        fooled = self._sum(verdicts).bool().nonzero().squeeze(1)
        adversarial = self._x.new_zeros(len(fooled), *self._x.shape[1:])
        for number, batch in done.items():
            adversarial[torch.searchsorted(fooled, batches[number][batch.fooled])] = batch.adversarial
        for part in adversarial.split(self._batch_size):
            part.copy_(self._sum(part))
        notes = self._ranks.gather([note for batch in done.values() for note in batch.warnings])
        seconds = self._ranks.gather(sum(batch.seconds for batch in done.values()))
        robust = among.clone()
        robust[fooled] = False
        return Outcome(
            robust, fooled, adversarial, tuple(dict.fromkeys(note for some in notes for note in some)), sum(seconds)
        )

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._ranks.size == 1 else self._ranks.sum(values.to(self._device)).cpu()

    def _expect(self, name: str, count: int) -> None:
        """Say what is going on, and how much is left at most: later attacks have no more examples than this one."""
        names = list(self._costs)
        left = sum(self._costs[later] for later in names[names.index(name) :])
        self._bar.total = self._bar.n + max(count * left / self._ranks.size, 1e-9)
        self._bar.set_description_str(f"{name} on {count} of {len(self._x)}")
