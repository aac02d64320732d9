"""The readings of CLAT's objective (arXiv 2408.10204, eq. 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from art_clat.attacks.ascent import Loss
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.features import Features
from art_clat.layers.layer import Layer
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.training.objectives.base import BatchLoss, Objective, register_objective
from art_clat.utils.batch import Batch
from art_clat.utils.modes import kept_statistics


class _FeatureObjective(Objective):
    """An objective with the feature distance of the chosen layers in it."""

    relative: ClassVar[bool] = False

    def __init__(self, classifier: TensorClassifier, layers: Sequence[Layer] | None, weight: float) -> None:
        super().__init__(classifier, layers, weight)
        chosen = list(layers or ())
        self.features = Features(chosen, lengths=self.relative)
        self.modules = [module for layer in chosen for module in layer.modules]

    def distance(self) -> torch.Tensor:
        """
        Return the summed distance of the features seen last.

        :return: Shape (batch,).
        """
        return self.features.total_relative_distance() if self.relative else self.features.total_distance()


@register_objective("adversarial")
class AdversarialCLAT(_FeatureObjective):
    """
    CLAT on the ordinary adversarial examples: one output attack makes δ, and the critical layers minimise

        L(F(x+δ), y) + λ · E[ Σ_{i∈S} ‖F_i(x+δ) − F_i(x)‖_2 ].

    This departs from eq. 5 and 6 in two ways: the cross-entropy is on the perturbed batch, and the same δ serves the
    feature distance. The gradient flows through both features, as in eq. 6. The clean pass ends at the last of them.
    BatchNorms in S that it meets normalise by its own batch, in training mode, as in TRADES, but their running
    statistics are those of the perturbed batches alone: the same for all of S, and the same as in adversarial training.
    """

    default_weight = 0.02

    def loss(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        with self.features.keep(stop=True), kept_statistics(self.modules):
            self.classifier.logits(batch.x)
        with self.features.compare(forget=True):
            cross_entropy, logits = self.classifier.loss(x_adv, batch.y)
        return BatchLoss.weighted(cross_entropy, self.distance(), self.weight, logits)


@register_objective("clean")
class CleanCLAT(_FeatureObjective):
    """
    CLAT to the letter: an inner attack on the summed feature distance (eq. 5) and clean cross-entropy (eq. 6),

        min over S:  L(F(x), y) + λ · E[ sup_δ Σ_{i∈S} ‖F_i(x+δ) − F_i(x)‖_2 ].

    The distance is zero at δ = 0, and so is its gradient: the inner attack starts at random whatever the ART attack
    does. Running statistics of BatchNorms in S are those of the clean batches.
    """

    default_weight = 0.05
    logits_are_adversarial = False

    def inner_loss(self, batch: Batch) -> Loss:
        with torch.no_grad(), self.features.keep(stop=True):
            self.classifier.logits(batch.x)

        def distance(z: torch.Tensor) -> torch.Tensor:
            with self.features.compare(stop=True):
                self.classifier.logits(z)
            total = self.distance()
            return total if total.requires_grad else total + 0 * z.flatten(1).sum(dim=1)  # no feature depends on z

        return distance

    def inner_start(self, attack: TensorAttack, batch: Batch) -> torch.Tensor:
        return attack.random_start(batch)

    def loss(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        # The perturbed pass comes first: the backward pass reaches it last, when the memory of the other is free again.
        with self.features.keep(stop=True), kept_statistics(self.modules):
            self.classifier.logits(x_adv)
        with self.features.compare(forget=True):
            cross_entropy, logits = self.classifier.loss(batch.x, batch.y)
        return BatchLoss.weighted(cross_entropy, self.distance(), self.weight, logits)


@register_objective("clean_single_step")
class SingleStepCLAT(CleanCLAT):
    """CLAT to the letter with one step of size ε as the inner attack: "CLAT (fast)"."""

    single_step = True


@register_objective("relative")
class RelativeCLAT(AdversarialCLAT):
    """
    As :class:`AdversarialCLAT`, with every distance divided by the length of the clean feature, ``‖F_i(x)‖_2``.

    So does the layer-wise penalty of LSA (arXiv 2202.02626). The scale of the layer's weights cancels, in the gradient
    too.
    """

    default_weight = 1.0
    relative = True
