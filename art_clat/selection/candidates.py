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

    :param classifier: The classifier, whose weights a rule leaves as they are.
    :param layers: All layers, in execution order.
    :param eligible: Those that may be chosen.
    :param batches: Training samples drawn for the selection.
    :param attack: The trainer's first attack.
    :param seed: Seed of the run.
    :param round: Number of the selection within the run, counted from 0.
    :param predecessor: As in :class:`art_clat.LayerOptions`.
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
        """The criticality of every layer, measured once."""
        return measure(self.classifier, self.layers, self.batches, self.attack, predecessor=self.predecessor)

    @cached_property
    def adversarial(self) -> list[tuple[Batch, torch.Tensor]]:
        """The samples on the network's device, batch by batch, with their adversarial examples."""
        here = [batch.to(self.classifier.device) for batch in self.batches if len(batch)]
        return [(batch, self.attack(batch)) for batch in here]

    def gradients(self, parameters: Sequence[torch.nn.Parameter], *, adversarial: bool = True) -> list[torch.Tensor]:
        """
        Compute the gradient of the mean loss over the samples, with the network in evaluation mode.

        :param parameters: Of which parameters; zero for those the loss does not depend on.
        :param adversarial: On the adversarial examples, or on the samples as they are.
        :return: One gradient a parameter; on several processes the mean over all of them.
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
        Compute the mean loss on the adversarial examples, with the weights as they are at the moment.

        :return: The loss; on several processes over the samples of all.
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
        """Have some parameters, and no others, need gradients, with the network in evaluation mode."""
        model = self.classifier.model
        with evaluation_mode(model), only_trainable(model, []):  # puts the flags back
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
