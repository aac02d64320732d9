"""Look at what was chosen: can these layers move the loss, and is λ of the right size?"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from art_clat.layers.layer import Layer
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.training.objectives import BatchLoss, Objective
from art_clat.utils.batch import Batch
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.processes import Ranks

logger = logging.getLogger(__name__)

#: Batches that are looked at. The result is fetched from the device once, after the last of them.
BATCHES = 3

#: What share of the cross-entropy λ times the distance may have, and what share the suggested λ would give it.
MOST, SUGGESTED = 0.25, 0.1


class Watch:
    """
    Warns, once a run, if a chosen layer cannot move the loss, or if λ times the feature distance rivals it.

    :param classifier: The classifier.
    :param ranks: The processes; the first one warns.
    """

    def __init__(self, classifier: TensorClassifier, ranks: Ranks) -> None:
        self._classifier = classifier
        self._ranks = ranks
        self._still: set[str] = set()
        self._has_warned = False
        self._is_done = True

    def begin(self, chosen: Sequence[Layer], objective: Objective, batch: Batch) -> None:
        """
        Look at layers that have just been chosen, and at the losses of the next batches.

        :param chosen: The chosen layers; their parameters are trainable.
        :param objective: The objective of the stage.
        :param batch: Some training samples, this process's share.
        """
        self._objective, self._sums = objective, list[torch.Tensor]()
        self._is_done = self._has_warned or not objective.has_distance
        still = [layer.name for layer in self._still_layers(chosen, batch) if layer.name not in self._still]
        self._still |= set(still)
        if still and self._ranks.rank == 0:
            logger.warning(
                "The loss has no gradient in the chosen layer(s) %s, so training cannot move it by them, as behind a "
                "weight that is 0: choose others by `selection=`, or set `requires_grad=False` on their parameters.",
                ", ".join(still),
            )

    def _still_layers(self, chosen: Sequence[Layer], batch: Batch) -> list[Layer]:
        """Return the layers in which the loss has no gradient, such as an adapter's whose second factor is zero."""
        batch = batch.to(self._classifier.device)
        largest = torch.zeros(len(chosen), device=self._classifier.device)
        if len(batch):
            parameters = [(place, p) for place, layer in enumerate(chosen) for p in layer.parameters()]
            parameters = [(place, parameter) for place, parameter in parameters if parameter.requires_grad]
            with evaluation_mode(self._classifier.model), torch.enable_grad():
                loss, _ = self._classifier.loss(batch.x, batch.y)
                tensors = [parameter for _, parameter in parameters]
                gradients = torch.autograd.grad(loss, tensors, allow_unused=True) if loss.requires_grad else ()
            for (place, _), gradient in zip(parameters, gradients, strict=False):
                if gradient is not None:
                    largest[place] += gradient.abs().max()
        found = self._ranks.sum(largest).tolist()
        return [layer for layer, gradient in zip(chosen, found, strict=True) if gradient == 0]

    def add(self, loss: BatchLoss) -> None:
        """Look at a batch's loss."""
        if self._is_done:
            return
        self._sums.append(torch.stack([loss.cross_entropy, loss.criticality_loss]).detach())
        if len(self._sums) < BATCHES:
            return
        self._is_done = True
        cross_entropy, distance = torch.stack(self._sums).mean(dim=0).tolist()
        weight = self._objective.weight
        self._has_warned = cross_entropy > 0 and weight * distance > MOST * cross_entropy
        if self._has_warned and self._ranks.rank == 0:
            logger.warning(
                "λ times the feature distance is %.3g beside a cross-entropy of %.3g, and may ruin the network: "
                "`criticality_weight=%.2g` would make it a tenth.",
                weight * distance,
                cross_entropy,
                SUGGESTED * cross_entropy / distance,
            )
