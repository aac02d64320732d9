"""Runs the steps of an evaluation batch by batch: shared among processes, saved as they finish, continued later."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from art_clat.robustness.autoattack import collect_warnings
from art_clat.robustness.plan import Settings, Step
from art_clat.robustness.target import Target
from art_clat.utils.descriptions import check_description
from art_clat.utils.files import prepare, read, write
from art_clat.utils.processes import Ranks
from art_clat.utils.randomness import reseed


@dataclass(frozen=True)
class Outcome:
    """
    What an attack did to the examples it was run on.

    :param robust: Whether each of all examples is still classified correctly, shape (n,); `False` where it was not run.
    :param fooled: Indices of the examples that it got misclassified, in ascending order.
    :param adversarial: Their adversarial examples, shape (len(fooled), channels, height, width).
    :param warnings: AutoAttack's warnings, explained.
    :param seconds: Time taken, of all processes together.
    """

    robust: torch.Tensor
    fooled: torch.Tensor
    adversarial: torch.Tensor
    warnings: tuple[str, ...]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of all examples that are still classified correctly."""
        return float(self.robust.numpy().mean())


@dataclass(frozen=True)
class _Batch:
    fooled: torch.Tensor
    adversarial: torch.Tensor
    warnings: list[str]
    seconds: float


class Folder:
    """
    The folder that an evaluation is saved in: one file for the evaluation, and one for each attack on each batch.

    :param path: Created if missing.
    :param description: What must be the same for an evaluation to be continued: names, and values that JSON can hold.
    :param outputs: The network's outputs for some examples, on the CPU. They show whether its code has changed.
    """

    def __init__(self, path: Path, description: Mapping[str, object], outputs: torch.Tensor) -> None:
        self._path = path
        self._description = description
        self._outputs = outputs

    def check(self) -> None:
        """
        Refuse a folder that holds anything but this evaluation, or that cannot be written to.

        :raises ValueError: If it holds something else.
        :raises OSError: If it cannot be written to.
        """
        if self._run.exists():
            tensors, content = read(self._run)
            check_description(content["description"], self._description, self._path)
            before, scale = tensors["outputs"], float(self._outputs.abs().max())
            if not torch.allclose(before, self._outputs, rtol=0, atol=1e-3 * scale):  # other machines round differently
                raise ValueError(
                    f"`checkpoint`: {self._path} holds the evaluation of a network with these weights that returned "
                    "other outputs for the same inputs. Its code has changed since. Use another folder."
                )
        elif self._path.exists() and (
            not self._path.is_dir() or any(entry.suffix != ".tmp" for entry in self._path.iterdir())
        ):
            raise ValueError(
                f"`checkpoint`: {self._path} holds something else than an evaluation. Use a new or empty folder."
            )
        prepare(self._path)

    def open(self) -> None:
        """
        Write the evaluation's own file, after all processes have checked the folder.

        :raises OSError: If it cannot be written to.
        """
        write(self._run, {"outputs": self._outputs}, {"description": self._description})

    def load(self, attack: str, number: int, indices: torch.Tensor) -> _Batch | None:
        """
        Read a finished batch.

        :param attack: Name of the attack.
        :param number: Which of the attack's batches, counted from 0.
        :param indices: Indices of the examples in it.
        :return: The batch; `None` if it is not finished, or was of other examples.
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
        Write a finished batch.

        :param attack: Name of the attack.
        :param number: Which of the attack's batches, counted from 0.
        :param indices: Indices of the examples in it.
        :param batch: Its results.
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
    Runs one attack after another on a network.

    An attack runs batch by batch; batch ``k`` belongs to process ``k`` modulo their number. What is drawn at random in
    a batch follows from the seed, the attack and the batch alone, not from the number of processes or earlier kills.

    :param target: What is attacked, in the mode in which it is to be attacked.
    :param x: Examples, shape (n, channels, height, width), on the CPU.
    :param y: Index labels, shape (n,), on the CPU.
    :param plan: The steps to come, in their order.
    :param settings: Where the batch size and the seed are taken from.
    :param ranks: The processes that share the batches.
    :param folder: Where to save, or `None`.
    :param verbose: Show the progress.
    """

    def __init__(
        self,
        target: Target,
        x: torch.Tensor,
        y: torch.Tensor,
        plan: Sequence[Step],
        settings: Settings,
        *,
        ranks: Ranks,
        folder: Folder | None,
        verbose: bool,
    ) -> None:
        self._target, self._x, self._y = target, x, y
        self._costs = {step.name: step.cost for step in plan}
        self._settings, self._ranks, self._folder = settings, ranks, folder
        self._restored = 0.0
        self._bar = tqdm(
            total=len(x) * sum(self._costs.values()) / ranks.size,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            smoothing=0,  # the mean speed: batches of several attacks differ
            disable=not verbose or ranks.rank > 0,
        )

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def run(self, step: Step, outcomes: Mapping[str, Outcome]) -> Outcome:
        """
        Run one step. All processes must call this.

        :param step: One of the plan.
        :param outcomes: The outcomes of the steps before, by name.
        :return: The outcome, the same in every process.
        """
        everything = torch.ones(len(self._x), dtype=torch.bool)
        among = everything if step.after is None else outcomes[step.after].robust
        indices = among.nonzero().squeeze(1)
        batches = [batch for batch in indices.split(self._settings.batch_size) if len(batch)]
        self._show(step, len(indices))
        done = {}
        for number in range(self._ranks.rank, len(batches), self._ranks.size):
            done[number] = self._batch(step, number, batches[number])
        return self._merge(among, batches, done)

    def _batch(self, step: Step, number: int, indices: torch.Tensor) -> _Batch:
        """Return a batch from the folder, or else run and save it."""
        work = len(indices) * step.cost
        batch = None if self._folder is None else self._folder.load(step.name, number, indices)
        if batch is None:
            batch = self._attack(step, number, indices)
            if self._folder is not None:
                self._folder.save(step.name, number, indices, batch)
        else:
            self._restored += work
            self._bar.initial = self._restored  # it took no time
        self._bar.update(work)
        return batch

    @torch.no_grad()
    def _attack(self, step: Step, number: int, indices: torch.Tensor) -> _Batch:
        started, device = time.perf_counter(), self._target.device
        reseed(device, self._settings.seed, zlib.crc32(step.name.encode()), number)
        x, y = self._x[indices].to(device), self._y[indices].to(device)
        with collect_warnings() as warnings:
            x_adv = x if step.attack is None else step.attack(x, y)
        fooled = self._target.model(x_adv).argmax(dim=1) != y
        return _Batch(fooled.cpu(), x_adv[fooled].cpu(), warnings, time.perf_counter() - started)

    def _merge(self, among: torch.Tensor, batches: list[torch.Tensor], done: Mapping[int, _Batch]) -> Outcome:
        """Combine the batches of all processes by sums, in which only one process has other values than zero."""
        verdicts = torch.zeros(len(self._x), dtype=torch.int32)
        for number, batch in done.items():
            verdicts[batches[number]] = batch.fooled.int()
        fooled = self._sum(verdicts).bool().nonzero().squeeze(1)
        adversarial = self._x.new_zeros(len(fooled), *self._x.shape[1:])
        for number, batch in done.items():
            adversarial[torch.searchsorted(fooled, batches[number][batch.fooled])] = batch.adversarial
        for part in adversarial.split(self._settings.batch_size):
            part.copy_(self._sum(part))
        notes = self._ranks.gather([note for batch in done.values() for note in batch.warnings])
        seconds = self._ranks.gather(sum(batch.seconds for batch in done.values()))
        robust = among.clone()
        robust[fooled] = False
        return Outcome(
            robust, fooled, adversarial, tuple(dict.fromkeys(note for some in notes for note in some)), sum(seconds)
        )

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._ranks.size == 1 else self._ranks.sum(values.to(self._target.device)).cpu()

    def _show(self, step: Step, count: int) -> None:
        """Show the step, and how much is left at most: later attacks have no more examples than this one."""
        names = list(self._costs)
        left = sum(self._costs[later] for later in names[names.index(step.name) :])
        self._bar.total = self._bar.n + max(count * left / self._ranks.size, 1e-9)
        self._bar.set_description_str(f"{step.name} on {count} of {len(self._x)}")
