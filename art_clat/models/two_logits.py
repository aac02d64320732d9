"""Binary networks with one logit as networks with two."""

from __future__ import annotations

import torch
from torch import nn


class TwoLogits(nn.Module):
    """
    A binary network that returns one logit, as one that returns the logits of both classes.

    The logit of class 0 is 0, so the softmax of both is the sigmoid of the one, and cross-entropy is the binary
    cross-entropy. Train it with ``CrossEntropyLoss`` and index labels::

        model = TwoLogits(network)
        classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), input_shape, nb_classes=2, ...)

    :param network: Returns the logit of class 1, shape (n,) or (n, 1).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Compute the logits.

        :param x: Shape (n, …).
        :return: Shape (n, 2).
        :raises ValueError: If the network returns something else than one logit a sample.
        """
        logit = self.network(x)
        if not isinstance(logit, torch.Tensor) or tuple(logit.shape) not in ((len(x),), (len(x), 1)):
            got = tuple(logit.shape) if isinstance(logit, torch.Tensor) else type(logit).__name__
            raise ValueError(f"`network` must return one logit a sample, shape (n,) or (n, 1), got {got}.")
        logit = logit.reshape(-1)
        return torch.stack([torch.zeros_like(logit), logit], dim=1)
