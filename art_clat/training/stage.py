"""What is trained at the moment, by which objective; and the sums of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from art_clat.layers.freezing import train_all, train_only
from art_clat.layers.layer import Layer
from art_clat.training.checkpoint import Progress
from art_clat.training.history import EpochRecord
from art_clat.training.objectives import BatchLoss, Objective
from art_clat.training.weight_perturbation import perturbed_weights
from art_clat.utils.batch import Batch
from art_clat.utils.modes import kept_statistics
from art_clat.utils.processes import Part, Ranks


class _ObjectiveModule(nn.Module):
    """An objective's loss as a module, which ``DistributedDataParallel`` needs."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        return self.objective.loss(batch, x_adv)


@dataclass(frozen=True)
class Stage:
    """
    A stage of training: the whole network, or the chosen layers, with one objective.

    :param chosen: The layers; `None` for the whole network.
    :param objective: What is climbed and minimised.
    :param module: Computes the loss, and averages the gradients over processes.
    :param weight_perturbation: γ of AWP, by which the weights move before each step; 0 for none.
    """

    chosen: list[Layer] | None
    objective: Objective
    module: nn.Module
    weight_perturbation: float = 0.0

    @property
    def title(self) -> str:
        """What the progress bar calls the stage."""
        return "adversarial training" if self.chosen is None else "CLAT"

    @classmethod
    def begin(cls, chosen: list[Layer] | None, objective: Objective, ranks: Ranks, gamma: float = 0.0) -> Stage:
        """Begin a stage; all processes get the first one's weights. The first stage uses γ only if it is AWP."""
        default = objective.weight_perturbation
        used = gamma or default if chosen is not None or default else 0.0
        return cls(chosen, objective, ranks.wrap(_ObjectiveModule(objective.classifier.model, objective)), used)

    def perturb(self, inner: Callable[[Batch], torch.Tensor], batch: Batch, ratio: float) -> torch.Tensor:
        """Perturb a share `ratio` of a batch, drawn at random over all processes; the other inputs stay clean."""
        if ratio == 1:
            return inner(batch)
        total, device = batch.part.total, batch.x.device
        drawn = torch.randperm(total)[: int(np.ceil(ratio * total))]
        place = torch.full((total,), -1)
        place[drawn] = torch.arange(len(drawn))
        here = place[batch.part.mine]  # each sample's place among the drawn ones, or -1
        perturbed = torch.nonzero(here >= 0)[:, 0]
        x_adv = batch.x.clone()
        if len(perturbed):
            places, among = perturbed.to(device), Part(len(drawn), here[perturbed].to(device))
            x_adv[places] = inner(replace(batch.take(perturbed), part=among))
        return x_adv

    def differentiate(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        """
        Compute the loss, and add its gradient to the parameters', averaged over the processes.

        With a weight perturbation both are those at the perturbed weights. BatchNorm statistics move once, there.
        """
        model = self.objective.classifier.model
        if not self.weight_perturbation:
            return self._backward(batch, x_adv)
        self._set_modes()
        with kept_statistics([model]):
            self._backward(batch, x_adv)
        with perturbed_weights(model, self.weight_perturbation):
            return self._backward(batch, x_adv)

    def _backward(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        loss, size = self.loss(batch, x_adv), self.objective.classifier.ranks.size
        # Gradients are averaged over processes, but their parts of a batch may differ by one sample.
        (loss.loss * (size * len(batch) / batch.part.total)).backward()
        return loss

    def _set_modes(self) -> None:
        """Put what is trained in training mode, and the rest in evaluation mode."""
        if self.chosen is None:
            train_all(self.objective.classifier.model)
        else:
            train_only(self.objective.classifier.model, self.chosen)

    def loss(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        """Compute the loss, with its graph; what is trained is in training mode, the rest in evaluation mode."""
        self._set_modes()
        try:
            with self.objective.classifier.shared():
                return BatchLoss(*self.module(batch, x_adv))
        except ValueError as error:
            if len(batch) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError(
                    "A batch of one sample cannot pass a BatchNorm in training mode: use another `batch_size`, or "
                    "`drop_last=True` in `fit`."
                ) from error
            raise


class EpochSums:
    """Sums over the samples of an epoch, kept on the device until they are taken."""

    NAMES = ("loss", "cross_entropy", "criticality_loss", "accuracy", "samples")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)

    def add(self, loss: BatchLoss, labels: torch.Tensor) -> None:
        """Add a batch's loss and accuracy; `labels` are index labels."""
        logits = loss.logits[: len(labels)]  # a preprocessing of training may append copies
        correct = (logits.argmax(dim=1) == labels).float().mean()
        means = [loss.loss.detach(), loss.cross_entropy, loss.criticality_loss, correct, torch.ones_like(correct)]
        self._sums += len(labels) * torch.stack(means)

    def take(self, before: dict[str, float], ranks: Ranks) -> dict[str, float]:
        """Add the sums of all processes to those taken before, return them, and begin again at zero."""
        taken = ranks.sum(self._sums).tolist()
        self._sums.zero_()
        return {name: before.get(name, 0.0) + more for name, more in zip(self.NAMES, taken, strict=True)}


def make_record(progress: Progress, stage: Stage, learning_rate: float) -> EpochRecord:
    """Make the record of the epoch in progress from its sums."""
    means = {name: value / progress.sums["samples"] for name, value in progress.sums.items()}
    robust = stage.objective.logits_are_adversarial
    return EpochRecord(
        epoch=progress.epoch,
        stage="adversarial training" if stage.chosen is None else "clat",
        loss=means["loss"],
        cross_entropy=means["cross_entropy"],
        criticality_loss=means["criticality_loss"],
        learning_rate=learning_rate,
        seconds=progress.seconds,
        train_clean_accuracy=None if robust else means["accuracy"],
        train_robust_accuracy=means["accuracy"] if robust else None,
        attack_steps=stage.objective.nb_steps,
    )
