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
    """An objective that contains the feature distance of the chosen layers."""

    has_distance = True
    relative: ClassVar[bool] = False

    def __init__(self, classifier: TensorClassifier, layers: Sequence[Layer] | None, weight: float) -> None:
        super().__init__(classifier, layers, weight)
        chosen = list(layers or ())
        self.features = Features(chosen, lengths=self.relative)
        self.modules = [module for layer in chosen for module in layer.modules]

    def distance(self) -> torch.Tensor:
        """Return the summed distance of the features seen last, shape (batch,)."""
        return self.features.total_relative_distance() if self.relative else self.features.total_distance()


@register_objective("adversarial")
class AdversarialCLAT(_FeatureObjective):
    """
    CLAT on ordinary adversarial examples. One output attack makes δ, and the chosen layers S minimise

        L(F(x+δ), y) + λ · E[ Σ_{i∈S} ‖F_i(x+δ) − F_i(x)‖_2 ].

    This departs from eq. 5 and 6 in two ways: the cross-entropy is taken on the perturbed batch, and the feature
    distance at the same δ. As in eq. 6, the gradient flows through both features. The clean pass ends at the last
    chosen layer. In it the BatchNorms in S are in training mode and normalise by the clean batch, as in TRADES. Their
    running statistics are updated on the perturbed batches alone, as in adversarial training.
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
    CLAT to the letter: an inner attack on the summed feature distance (eq. 5), and clean cross-entropy (eq. 6),

        min over S:  L(F(x), y) + λ · E[ sup_δ Σ_{i∈S} ‖F_i(x+δ) − F_i(x)‖_2 ].

    At δ = 0 the distance and its gradient are zero, so the inner attack always starts at random, even if the ART attack
    does not. Running statistics of BatchNorms in S are updated on the clean batches alone.
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
            # The attack needs a gradient even if no feature depends on z.
            return total if total.requires_grad else total + 0 * z.flatten(1).sum(dim=1)

        return distance

    def inner_start(self, attack: TensorAttack, batch: Batch) -> torch.Tensor:
        return attack.random_start(batch)

    def loss(self, batch: Batch, x_adv: torch.Tensor) -> BatchLoss:
        # The perturbed pass comes first: the backward pass reaches it last, when the clean pass has freed its memory.
        with self.features.keep(stop=True), kept_statistics(self.modules):
            self.classifier.logits(x_adv)
        with self.features.compare(forget=True):
            cross_entropy, logits = self.classifier.loss(batch.x, batch.y)
        return BatchLoss.weighted(cross_entropy, self.distance(), self.weight, logits)


@register_objective("clean_single_step")
class SingleStepCLAT(CleanCLAT):
    """CLAT to the letter with an inner attack of one step of size ε: "CLAT (fast)"."""

    single_step = True


@register_objective("relative")
class RelativeCLAT(AdversarialCLAT):
    """
    :class:`AdversarialCLAT` with every distance divided by the length of the clean feature, ``‖F_i(x)‖_2``.

    The layer-wise penalty of LSA does the same (arXiv 2202.02626). The scale of the layer's weights cancels, also in
    the gradient.
    """

    default_weight = 1.0
    relative = True
