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
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.processes import Batch


@dataclass(frozen=True)
class Candidates:
    """
    What a rule may look at to score layers.

    :param network: The network, whose weights a rule leaves as they are.
    :param layers: All layers, in execution order.
    :param eligible: Those that may be chosen.
    :param batches: Training samples drawn for the selection: inputs, labels, and which of a whole batch they are.
    :param attack: The trainer's first attack.
    :param seed: Of the run.
    :param round: Which selection of the run it is, counted from 0.
    :param predecessor: What ``F_{i−1}`` is, as in :func:`art_clat.measure_criticality`.
    """

    network: TensorClassifier
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
        return measure(self.network, self.layers, self.batches, self.attack, predecessor=self.predecessor)

    @cached_property
    def adversarial(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The samples on the network's device, their adversarial examples, and labels, batch by batch."""
        device = self.network.device
        here = [(x.to(device), y.to(device), part) for x, y, part in self.batches if len(x)]
        return [(x, self.attack(x, y, part), y) for x, y, part in here]

    def gradients(self, parameters: Sequence[torch.nn.Parameter], *, adversarial: bool = True) -> list[torch.Tensor]:
        """
        Give the gradient of the mean loss over the samples, with the network in evaluation mode.

        :param parameters: Of which parameters; zero for those the loss does not depend on.
        :param adversarial: On the adversarial examples, or on the samples as they are.
        :return: One gradient a parameter; on several processes the mean over all of them.
        """
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        with needing_gradients(self.network, parameters):
            for x, x_adv, y in self.adversarial:
                loss = len(x) * self.network.loss(x_adv if adversarial else x, y)[0]
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total += gradient
        return [self.network.ranks.sum(total) / self._nb_samples for total in sums]

    def adversarial_loss(self) -> float:
        """
        Give the mean loss on the adversarial examples, with the weights as they are at the moment.

        :return: The loss; on several processes over the samples of all.
        """
        total = torch.zeros((), device=self.network.device)
        with torch.no_grad(), evaluation_mode(self.network.model):
            for x, x_adv, y in self.adversarial:
                total += len(x) * self.network.loss(x_adv, y)[0]
        return float(self.network.ranks.sum(total)) / self._nb_samples

    @cached_property
    def _nb_samples(self) -> float:
        number = torch.tensor(float(sum(len(x) for x, _, _ in self.batches)), device=self.network.device)
        return float(self.network.ranks.sum(number))


@contextmanager
def needing_gradients(network: TensorClassifier, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Have some parameters, and no others, need gradients, with the network in evaluation mode."""
    with evaluation_mode(network.model), only_trainable(network.model, []):  # puts the flags back
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
