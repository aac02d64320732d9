"""Whose epochs are timed: ART's trainers, and this package's on layers that are fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import (
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerFBFPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerTRADESPyTorch,
)
from art.estimators.classification import PyTorchClassifier
from torch.utils.flop_counter import FlopCounterMode

from art_clat import AdversarialTrainerCLATPyTorch, Layer, LayerOptions, PerformanceOptions, TrainingLoop
from speed.measures import count_flops

ATTACK: dict[str, Any] = {"eps": 8 / 255, "eps_step": 2 / 255, "max_iter": 10, "num_random_init": 1}

#: How numbers are multiplied. Under bfloat16 that holds of this package's trainers; ART's, which have no such option,
#: and what autocast leaves in float32 run in TF32.
PRECISIONS = ("float32", "tf32", "bfloat16")

#: Epochs until reused perturbations are there and their strength, once in ten epochs, has been measured.
SETTLED = 3

Data = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How everything is measured."""

    device: str = "cpu"
    precision: str = "float32"
    batch_size: int = 128
    batches: int | None = None
    repeats: int = 5
    seed: int = 0
    only: Sequence[str] = ()
    smoke: bool = False


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Allow TF32, or forbid it, in matrix products and convolutions on a GPU."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = precision != "float32"
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


class FixedLayers(TrainingLoop):
    """CLAT without a measurement: it takes the layers that `selection` names."""

    def select(self) -> list[Layer]:
        """Return the layers."""
        self.progress.chosen = [str(name) for name in self.options.selection.rule]  # type: ignore[union-attr]
        return [layer for layer in self.layers if layer.name in self.progress.chosen]


@dataclass
class Contender:
    """A trainer and the data of an epoch; `nb_epochs` are trained, and the last one is measured."""

    trainer: Any
    data: Data
    batch_size: int
    nb_epochs: int = 1

    @property
    def is_ours(self) -> bool:
        """Whether it is this package's trainer."""
        return isinstance(self.trainer, AdversarialTrainerCLATPyTorch)

    def epoch(self) -> None:
        """Train one epoch."""
        if self.is_ours:
            self.trainer.fit(*self.data, batch_size=self.batch_size, nb_epochs=self.nb_epochs, verbose=False)
        elif isinstance(self.trainer, AdversarialTrainerMadryPGD):
            self.trainer.fit(*self.data)
        else:
            x, y = self.data
            labels = np.eye(10, dtype=np.float32)[y] if isinstance(self.trainer, AdversarialTrainerFBFPyTorch) else y
            self.trainer.fit(x, labels, batch_size=self.batch_size, nb_epochs=1)

    def seconds(self, spent: float) -> float:
        """Return what the epoch took of the time of a call; finding the layers, once a run, is no part of it."""
        return float(self.trainer.history.epochs[-1].seconds) if self.is_ours else spent

    def count_flops(self) -> int:
        """Train, and count the floating point operations of the last epoch."""
        if not self.is_ours:
            return count_flops(self.epoch)
        counter, loop_class = FlopCounterMode(display=False), self.trainer.loop_class

        def train_epoch(loop: TrainingLoop) -> None:
            with counter if loop.progress.epoch == self.nb_epochs - 1 else nullcontext():
                loop_class.train_epoch(loop)

        self.trainer.loop_class = type("Counted", (loop_class,), {"train_epoch": train_epoch})
        try:
            self.epoch()
        finally:
            self.trainer.loop_class = loop_class
        return int(counter.get_total_flops())


class FreeAdversarialTraining:
    """
    Free adversarial training (Shafahi et al., arXiv 1904.12843) as a plain loop.

    Each batch is trained on several times. Every pass gives the gradient of the weights and that of the perturbation,
    which goes on from batch to batch.

    :param classifier: Network, optimiser and loss.
    :param eps: Radius in ℓ∞, and size of a step.
    :param replays: How often each batch is trained on (m in the paper).
    """

    def __init__(self, classifier: PyTorchClassifier, *, eps: float, replays: int) -> None:
        self.classifier, self.eps, self.replays = classifier, eps, replays

    def fit(self, x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], *, batch_size: int, nb_epochs: int) -> None:
        """Train."""
        model, optimizer, device = self.classifier.model, self.classifier.optimizer, self.classifier.device
        inputs, labels = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        delta = torch.zeros_like(inputs[:batch_size])
        model.train()
        for _ in range(nb_epochs):
            for places in torch.randperm(len(inputs), device=device).split(batch_size):
                images, targets = inputs[places], labels[places]
                for _ in range(self.replays):
                    moved = delta[: len(images)].clone().requires_grad_(True)
                    optimizer.zero_grad()
                    loss = self.classifier.loss(model((images + moved).clamp(0, 1)), targets)
                    loss.backward()
                    optimizer.step()
                    assert moved.grad is not None
                    delta[: len(images)] = (moved + self.eps * moved.grad.sign()).detach().clamp(-self.eps, self.eps)


def pgd(classifier: PyTorchClassifier) -> ProjectedGradientDescent:
    """Make the attack of every contender."""
    return ProjectedGradientDescent(classifier, verbose=False, **ATTACK)


def make_contenders(
    make_classifier: Callable[[], PyTorchClassifier],
    positions: Mapping[str, str],
    groups: Mapping[str, Sequence[str]],
    data: Data,
    setting: Setting,
) -> dict[str, Contender]:
    """
    Make every contender, by its name.

    :param make_classifier: Returns a classifier with a copy of the network; each contender trains its own.
    :param positions: The layers that CLAT trains, one at a time, by what their place is called.
    :param groups: Layers that CLAT trains together, by what they are called.
    :param data: Images and labels of an epoch.
    :param setting: How everything is measured.
    :return: The contenders.
    """
    base = PerformanceOptions(amp=setting.precision == "bfloat16")

    def ours(
        fixed: str | Sequence[str] | None = None,
        objective: str | None = None,
        performance: PerformanceOptions = base,
        reuse: int | None = None,
    ) -> Any:
        classifier = make_classifier()
        trainer = AdversarialTrainerCLATPyTorch(
            classifier,
            pgd(classifier),
            warmup=int(fixed is None),
            objective=objective,
            selection="criticality" if fixed is None else [fixed] if isinstance(fixed, str) else list(fixed),
            layers=LayerOptions(head_eligible=True),
            reuse_perturbations=reuse,
            performance=performance,
            seed=setting.seed,
        )
        trainer.loop_class = FixedLayers
        return trainer

    made = _arts_trainers(make_classifier, setting) | {"PGD-AT": ours()}
    for objective in ("adversarial", "clean"):
        for position, layer in positions.items():
            made[f"CLAT {objective}, {position}"] = ours(layer, objective)
    reused = {
        f"CLAT adversarial, reused, {place}": ours(layer, reuse=1) for place, layer in {**positions, **groups}.items()
    }
    made |= reused
    options = ["channels_last"] if setting.smoke else ["channels_last", "amp", "compile"]
    for option in options:
        if getattr(base, option):
            continue
        performance = replace(base, **{option: True})
        made[f"PGD-AT, {option}=True"] = ours(performance=performance)
        for objective in ("adversarial",) if option == "compile" else ("adversarial", "clean"):
            made[f"CLAT {objective}, first half, {option}=True"] = ours(positions["first half"], objective, performance)
        name = f"CLAT adversarial, reused, first half, {option}=True"
        reused[name] = made[name] = ours(positions["first half"], performance=performance, reuse=1)
    if "amp" in options and not base.amp:
        made["PGD-AT, channels_last=True, amp=True"] = ours(
            performance=PerformanceOptions(channels_last=True, amp=True)
        )
    return {
        name: Contender(trainer, data, setting.batch_size, SETTLED if name in reused else 1)
        for name, trainer in made.items()
    }


def _arts_trainers(make_classifier: Callable[[], PyTorchClassifier], setting: Setting) -> dict[str, Any]:
    """Make ART's own trainers; the smoke form has the first of them alone."""
    made: dict[str, Any] = {
        "ART Madry PGD": AdversarialTrainerMadryPGD(
            make_classifier(), nb_epochs=1, batch_size=setting.batch_size, **ATTACK
        )
    }
    if not setting.smoke:
        classifier = make_classifier()
        made["ART TRADES"] = AdversarialTrainerTRADESPyTorch(classifier, pgd(classifier), beta=6.0)
        classifier = make_classifier()
        made["ART AWP"] = AdversarialTrainerAWPPyTorch(
            classifier, make_classifier(), pgd(classifier), mode="PGD", gamma=0.01, beta=6.0, warmup=0
        )
        made["ART FBF"] = AdversarialTrainerFBFPyTorch(make_classifier(), eps=ATTACK["eps"])
        made["Free-AT, each batch 8 times"] = FreeAdversarialTraining(make_classifier(), eps=ATTACK["eps"], replays=8)
    return made
