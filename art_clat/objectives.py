"""What a batch minimises: plain adversarial training, and the two readings of the CLAT objective (eq. 5 and 6)."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from art_clat.attacks import OutputAttack, in_chunks
from art_clat.distributed import Part
from art_clat.features import Features
from art_clat.layers import Layer
from art_clat.network import Network


@dataclass(frozen=True)
class BatchLoss:
    """
    The loss of one batch and what it is made of.

    :param loss: What is minimised, with its graph.
    :param cross_entropy: The classifier's own loss, detached.
    :param criticality_loss: The batch mean of the summed feature distance, detached, before its weight.
    :param logits: Detached, shape (batch, nb_classes).
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    criticality_loss: torch.Tensor
    logits: torch.Tensor


class Objective(abc.ABC):
    """An inner attack, and the loss on its result."""

    #: Whether the logits of :meth:`loss` are those of the perturbed batch.
    logits_are_adversarial = True

    def perturb(self, attack: OutputAttack, x: torch.Tensor, y: torch.Tensor, part: Part | None = None) -> torch.Tensor:
        """
        Solve the inner maximisation, with the network in evaluation mode; unless overridden, by the attack itself.

        :param attack: The ART attack whose ball and steps are used.
        :param x: Inputs, shape (batch, *input_shape).
        :param y: Index labels, shape (batch,), or class probabilities, shape (batch, nb_classes).
        :param part: Which of the batch of all processes these are; `None` for all of it.
        :return: Perturbed inputs, same shape as `x`, detached.
        """
        return attack(x, y, part)

    @abc.abstractmethod
    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        """
        Compute what the optimiser minimises, in the modes the network is in.

        :param x: Inputs, shape (batch, *input_shape).
        :param x_adv: Perturbed inputs, same shape.
        :param y: Labels as in :meth:`perturb`.
        :return: The loss.
        """


class AdversarialTraining(Objective):
    """
    Plain adversarial training: cross-entropy on the adversarial examples (Madry et al., arXiv 1706.06083).

    :param network: The network.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        loss, logits = self.network.loss(x_adv, y, fit=True)
        return BatchLoss(loss, loss.detach(), torch.zeros_like(loss), logits.detach())


class AdversarialCLAT(Objective):
    """
    CLAT on the ordinary adversarial examples: one output attack gives δ, and the critical layers minimise

        L(F(x+δ), y) + λ · E[ Σ_{i∈S} ‖F_i(x+δ) − F_i(x)‖_2 ].

    This departs from eq. 5 and 6 in two ways: the cross-entropy is on the perturbed batch, and the same δ serves the
    feature distance. The gradient flows through both features, as in eq. 6. The clean pass ends at the last of them; a
    BatchNorm in S before that sees the clean and the perturbed batch in turn, in training mode, as in TRADES.

    :param network: The network.
    :param layers: The critical layers S.
    :param weight: λ, at least 0.
    """

    def __init__(self, network: Network, layers: Sequence[Layer], weight: float) -> None:
        self.network = network
        self.features = Features(layers)
        self.weight = weight

    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        with self.features.keep(stop=True):
            self.network.logits(x)
        with self.features.compare():
            cross_entropy, logits = self.network.loss(x_adv, y)
        self.features.release()
        return _weighted(cross_entropy, self.features.total_distance(len(x)), self.weight, logits)


class CleanCLAT(Objective):
    """
    CLAT to the letter: an inner attack on the summed feature distance (eq. 5) and clean cross-entropy (eq. 6).

        min over S:  L(F(x), y) + λ · E[ sup_δ Σ_{i∈S} ‖F_i(x+δ) − F_i(x)‖_2 ].

    The distance is zero at δ = 0, and so is its gradient: the inner attack starts at random whatever the ART attack
    does.

    :param network: The network; its preprocessing must be differentiable.
    :param layers: The critical layers S.
    :param weight: λ, at least 0.
    :param single_step: One step of size ε instead of the attack's own steps: "CLAT (fast)".
    """

    logits_are_adversarial = False

    def __init__(self, network: Network, layers: Sequence[Layer], weight: float, *, single_step: bool = False) -> None:
        self.network = network
        self.features = Features(layers)
        self.weight = weight
        self.single_step = single_step

    def perturb(self, attack: OutputAttack, x: torch.Tensor, y: torch.Tensor, part: Part | None = None) -> torch.Tensor:
        full = attack.ascent
        assert full is not None, "the trainer has checked this"
        ascent = full.single_step() if self.single_step else replace(full, random_start=True, decay=None)

        def distance(z: torch.Tensor) -> torch.Tensor:
            with self.features.compare(stop=True):
                self.network.logits(z)
            return self.features.total_distance(len(z))

        def climb(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), self.features.keep(stop=True):
                self.network.logits(x)
            return ascent(distance, x, start)

        with self.network.attacked():
            return in_chunks(climb, x, ascent.start(x, part or Part(len(x))))

    def loss(self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> BatchLoss:
        with self.features.keep():
            cross_entropy, logits = self.network.loss(x, y)
        with self.features.compare(stop=True):
            self.network.logits(x_adv)
        self.features.release()
        return _weighted(cross_entropy, self.features.total_distance(len(x)), self.weight, logits)


def _weighted(cross_entropy: torch.Tensor, distance: torch.Tensor, weight: float, logits: torch.Tensor) -> BatchLoss:
    criticality_loss = distance.mean()
    loss = cross_entropy + weight * criticality_loss
    return BatchLoss(loss, cross_entropy.detach(), criticality_loss.detach(), logits.detach())


class AsModule(nn.Module):
    """
    An objective's loss as a module, which is what ``DistributedDataParallel`` takes.

    :param model: The network, whose parameters the module has.
    :param objective: The objective.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Compute the loss.

        :param x: As in :meth:`Objective.loss`, like the others.
        :return: The fields of :class:`BatchLoss`.
        """
        loss = self.objective.loss(x, x_adv, y)
        return loss.loss, loss.cross_entropy, loss.criticality_loss, loss.logits
