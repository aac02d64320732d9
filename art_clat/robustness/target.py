"""What is evaluated: an ART classifier or a network, as a function from inputs in [0, 1] to logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.models.checks import check_plain
from art_clat.models.description import describe_inputs
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.descriptions import fingerprint, text_of
from art_clat.utils.weights import weights


@dataclass(frozen=True)
class Target:
    """
    A classifier or network of the user's.

    :param argument: The name of the argument it came as, for messages.
    :param original: What the user passed.
    :param model: Takes inputs in [0, 1], returns logits.
    :param device: Where it runs.
    """

    argument: str
    original: PyTorchClassifier | nn.Module
    model: nn.Module
    device: torch.device

    @classmethod
    def of(cls, original: object, argument: str) -> Target:
        """
        Make a target of what the user passed.

        :param original: An ART classifier with ``clip_values=(0, 1)``, or a network.
        :param argument: The name of the argument.
        :return: The target.
        :raises TypeError: If it is neither, or a classifier that predicts otherwise than its network.
        :raises ValueError: If the classifier's inputs are not in [0, 1], or no gradient passes its preprocessing.
        """
        if isinstance(original, PyTorchClassifier):
            check_plain(original, argument=argument)
            network = _differentiable(original, argument)
            return cls(argument, original, _Logits(network), network.device)
        if isinstance(original, nn.Module):
            tensor = next(original.parameters(), None)
            return cls(argument, original, original, torch.device("cpu") if tensor is None else tensor.device)
        raise TypeError(
            f"`{argument}` must be an ART PyTorchClassifier or a torch.nn.Module, "
            f"got {type(original).__module__}.{type(original).__qualname__}."
        )

    def check_size(self, images: torch.Tensor) -> None:
        """
        Refuse images of another size than a classifier was declared for; convolutions would take them.

        :param images: Shape (n, channels, height, width).
        :raises ValueError: If they are.
        """
        shape = tuple(images.shape[1:])
        if isinstance(self.original, PyTorchClassifier) and shape != tuple(self.original.input_shape):
            raise ValueError(f"`x` has images of shape {shape}, `{self.argument}` takes {self.original.input_shape}.")

    def describe(self) -> dict[str, object]:
        """
        Describe the target, so that an evaluation of another one is not continued by mistake.

        :return: Names, and values that JSON can hold.
        """
        facts: dict[str, object] = {}
        model: nn.Module = self.original
        if isinstance(self.original, PyTorchClassifier):
            model, facts = self.original.model, describe_inputs(self.original)
        facts["weights"] = fingerprint(*weights(model).values())
        facts["architecture"] = hashlib.sha256(text_of(model).encode()).hexdigest()[:16]
        return {f"{self.argument}, {name}": fact for name, fact in facts.items()}


class _Logits(nn.Module):
    """An ART classifier as the function from inputs to logits that AutoAttack takes."""

    def __init__(self, network: TensorClassifier) -> None:
        super().__init__()
        self.wrapped = network.estimator._model
        self._network = [network]  # in a list, so that it is no submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._network[0].logits(x)


def _differentiable(classifier: PyTorchClassifier, argument: str) -> TensorClassifier:
    """Return an ART classifier as functions of tensors, if AutoAttack can attack it."""
    clip = classifier.clip_values
    if clip is None or not (np.allclose(clip[0], 0) and np.allclose(clip[1], 1)):
        raise ValueError(
            f"`{argument}`: AutoAttack perturbs within [0, 1], so the classifier's clip_values must be "
            f"(0, 1), got {classifier.clip_values}."
        )
    network = TensorClassifier(classifier)
    if not network.is_differentiable:
        raise ValueError(
            f"`{argument}`: its preprocessing is not PyTorch's, no gradient passes through it, and "
            "AutoAttack's result would be false."
        )
    return network
