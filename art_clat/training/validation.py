"""Clean and robust accuracy on the validation data."""

from __future__ import annotations

import torch

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.utils.batch import Batch
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.randomness import seeded_randomness

#: Samples in one forward pass, over all processes.
BATCH_SIZE = 256


def measure_accuracies(attack: TensorAttack, x: torch.Tensor, y: torch.Tensor, *, seed: int) -> tuple[float, float]:
    """
    Measure clean accuracy, and robust accuracy under an attack, in [0, 1], with the network in evaluation mode.

    The accuracies are over the data of all processes, and equal in each.
    """
    classifier = attack.classifier
    correct = torch.zeros(2, dtype=torch.int64, device=classifier.device)
    with seeded_randomness(seed, classifier.device), evaluation_mode(classifier.model):
        for inputs, labels in zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True):
            part = classifier.ranks.part(len(inputs))
            batch = Batch(inputs[part.mine], labels[part.mine], part).to(classifier.device)
            if len(batch) == 0:
                continue
            right = classifier.one_hot(batch.y).argmax(dim=1)
            x_adv = attack(batch)
            with torch.no_grad():
                for row, shown in enumerate((batch.x, x_adv)):
                    correct[row] += (classifier.logits(shown).argmax(dim=1) == right).sum()
    clean, robust = (classifier.ranks.sum(correct).double() / len(x)).tolist()
    return clean, robust
