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


def warn_about_still_layers(
    classifier: TensorClassifier, layers: Sequence[Layer], batch: Batch, *, ranks: Ranks
) -> None:
    """
    Warn if a chosen layer cannot move the loss, such as the first factor of an adapter whose second one is zero.

    :param classifier: The classifier.
    :param layers: The chosen layers; their parameters are trainable.
    :param batch: Some training samples, this process's share.
    :param ranks: The processes; the first one warns.
    """
    batch = batch.to(classifier.device)
    largest = torch.zeros(len(layers), device=classifier.device)
    if len(batch):
        parameters = [(place, p) for place, layer in enumerate(layers) for p in layer.parameters() if p.requires_grad]
        with evaluation_mode(classifier.model), torch.enable_grad():
            loss, _ = classifier.loss(batch.x, batch.y)
            tensors = [parameter for _, parameter in parameters]
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True) if loss.requires_grad else ()
        for (place, _), gradient in zip(parameters, gradients, strict=False):
            if gradient is not None:
                largest[place] += gradient.abs().max()
    still = [layer.name for layer, found in zip(layers, ranks.sum(largest).tolist(), strict=True) if found == 0]
    if still and ranks.rank == 0:
        logger.warning(
            "The loss has no gradient in the chosen layer(s) %s, so training cannot move it by them, as behind a "
            "weight that is 0: choose others by `selection=`, or set `requires_grad=False` on their parameters.",
            ", ".join(still),
        )


class FirstBatches:
    """
    Warns if λ times the feature distance rivals the cross-entropy.

    :param objective: The objective of the stage.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._sums: list[torch.Tensor] = []

    def add(self, loss: BatchLoss, *, warns: bool) -> None:
        """Look at a batch's loss; `warns` says whether this process warns."""
        if not self._objective.has_distance or len(self._sums) == BATCHES:
            return
        self._sums.append(torch.stack([loss.cross_entropy, loss.criticality_loss]).detach())
        if len(self._sums) < BATCHES or not warns:
            return
        cross_entropy, distance = torch.stack(self._sums).mean(dim=0).tolist()
        weight = self._objective.weight
        if cross_entropy > 0 and weight * distance > MOST * cross_entropy:
            logger.warning(
                "λ times the feature distance is %.3g beside a cross-entropy of %.3g, and may ruin the network: "
                "`criticality_weight=%.2g` would make it a tenth.",
                weight * distance,
                cross_entropy,
                SUGGESTED * cross_entropy / distance,
            )
