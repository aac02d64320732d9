"""ART's PyTorch classifier as functions of tensors: preprocessing, logits, loss."""

from __future__ import annotations

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.guest import evaluation_mode
from art_clat.layers import Layer, find_layers


class Network:
    """
    A view of an ART classifier in which inputs, labels, logits and losses are tensors on its device.

    :param classifier: Any ``PyTorchClassifier``, its Hugging Face subclass included.
    """

    def __init__(self, classifier: PyTorchClassifier) -> None:
        self.classifier = classifier
        self.model: nn.Module = classifier.model
        self.device = torch.device(classifier.device)
        self.nb_classes = int(classifier.nb_classes)
        #: Whether an input gradient flows through the preprocessing.
        self.is_differentiable = bool(classifier.all_framework_preprocessing)
        clip = classifier.clip_values
        self.clip_values = (
            None
            if clip is None
            else tuple(torch.as_tensor(np.asarray(c, np.float32), device=self.device) for c in clip)
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """
        Give the network's output, through the preprocessing that ART applies at prediction.

        :param x: Inputs as the user gives them, shape (batch, *input_shape).
        :return: Shape (batch, nb_classes).
        """
        x, _ = self._preprocess(x, None, fit=False)
        return self._forward(x)

    def loss(self, x: torch.Tensor, y: torch.Tensor, *, fit: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Give the classifier's own loss, and the logits it was computed from.

        :param x: Inputs, shape (batch, *input_shape).
        :param y: Index labels, shape (batch,), or class probabilities, shape (batch, nb_classes).
        :param fit: Apply the preprocessing that ART applies in training, not that of prediction.
        :return: The loss, reduced as the classifier's loss does, and logits of shape (batch, nb_classes).
        """
        x, y = self._preprocess(x, self.one_hot(y), fit=fit)
        logits = self._forward(x)
        loss: torch.Tensor = self.classifier.loss(logits, self.classifier.reduce_labels(y))
        return loss, logits

    def one_hot(self, y: torch.Tensor) -> torch.Tensor:
        """
        Give labels as ART's own methods expect them.

        :param y: Index labels, shape (batch,), or class probabilities, shape (batch, nb_classes).
        :return: Shape (batch, nb_classes), float32.
        """
        return y if y.ndim == 2 else nn.functional.one_hot(y, self.nb_classes).float()

    def find_layers(self, x: torch.Tensor, *, after_norm: bool = False) -> list[Layer]:
        """
        Find the network's layers in execution order.

        :param x: At least one input, shape (batch, *input_shape).
        :param after_norm: Take features after a layer's norm.
        :return: See :func:`art_clat.layers.find_layers`.
        """
        one = x[:1].to(self.device)
        with evaluation_mode(self.model):
            return find_layers(
                self.model, lambda size: self.logits(one.expand(size, *one.shape[1:])), after_norm=after_norm
            )

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        # ART's wrapper returns a list whose last element is the logits, and holds the Hugging Face processor.
        output: torch.Tensor = self.classifier._model(x)[-1]
        return output

    def _preprocess(self, x: torch.Tensor, y: torch.Tensor | None, *, fit: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_differentiable:
            return self.classifier._apply_preprocessing(x, y, fit=fit, no_grad=False)  # type: ignore[no-any-return]
        y_array = None if y is None else y.cpu().numpy()
        arrays = self.classifier._apply_preprocessing(x.detach().cpu().numpy(), y_array, fit=fit)
        x, y = (None if a is None else torch.as_tensor(a, device=self.device) for a in arrays)  # type: ignore[assignment]
        return x.float(), y  # type: ignore[return-value]
