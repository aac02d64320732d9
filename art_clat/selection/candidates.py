"""What a selection rule may look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.freezing import only_trainable
from art_clat.layers.layer import Layer
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.criticality import Criticality, measure
from art_clat.utils.batch import Batch
from art_clat.utils.modes import evaluation_mode


@dataclass(frozen=True)
class Candidates:
    """
    What a rule may look at to score layers.

    :param classifier: The classifier. A rule must leave its weights unchanged.
    :param layers: All layers, in execution order.
    :param eligible: The layers that may be chosen.
    :param batches: Training samples drawn for the selection.
    :param attack: The trainer's first attack.
    :param seed: Seed of the run.
    :param round: Number of the selection within the run, from 0.
    :param predecessor: What ``F_{i−1}`` of eq. 3 is, see :class:`art_clat.LayerOptions`.
    """

    classifier: TensorClassifier
    layers: Sequence[Layer]
    eligible: Sequence[Layer]
    batches: Sequence[Batch]
    attack: TensorAttack
    seed: int
    round: int
    predecessor: str = "execution"

    @cached_property
    def criticality(self) -> Criticality:
        """The criticality of every layer; measured on first use."""
        return measure(self.classifier, self.layers, self.batches, self.attack, predecessor=self.predecessor)

    @cached_property
    def adversarial(self) -> list[tuple[Batch, torch.Tensor]]:
        """The batches on the network's device, each with its adversarial examples; made on first use."""
        here = [batch.to(self.classifier.device) for batch in self.batches if len(batch)]
        return [(batch, self.attack(batch)) for batch in here]

    def gradients(self, parameters: Sequence[torch.nn.Parameter], *, adversarial: bool = True) -> list[torch.Tensor]:
        """
        Compute the gradient of the mean loss over the samples, with the network in evaluation mode.

        :param parameters: The parameters to differentiate by.
        :param adversarial: Use the adversarial examples instead of the clean samples.
        :return: One gradient a parameter, zero if the loss does not depend on it; the mean over all processes.
        """
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        with self._needing_gradients(parameters):
            for batch, x_adv in self.adversarial:
                loss = len(batch) * self.classifier.loss(x_adv if adversarial else batch.x, batch.y)[0]
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total += gradient
        return [self.classifier.ranks.sum(total) / self._nb_samples for total in sums]

    def adversarial_loss(self) -> float:
        """
        Compute the mean loss on the adversarial examples with the current weights, in evaluation mode.

        :return: The mean over the samples of all processes.
        """
        total = torch.zeros((), device=self.classifier.device)
        with torch.no_grad(), evaluation_mode(self.classifier.model):
            for batch, x_adv in self.adversarial:
                total += len(batch) * self.classifier.loss(x_adv, batch.y)[0]
        return float(self.classifier.ranks.sum(total)) / self._nb_samples

    @cached_property
    def _nb_samples(self) -> float:
        number = torch.tensor(float(sum(map(len, self.batches))), device=self.classifier.device)
        return float(self.classifier.ranks.sum(number))

    @contextmanager
    def _needing_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        """Turn gradients on for some parameters and off for all others, with the network in evaluation mode."""
        model = self.classifier.model
        with evaluation_mode(model), only_trainable(model, []):  # which restores the flags
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
