"""ART's PyTorch classifier as functions of tensors: preprocessing, logits, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from torch import nn

from art_clat.distributed import Ranks
from art_clat.guest import evaluation_mode
from art_clat.layers import Layer, find_layers
from art_clat.norms import BatchNorms


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
        #: The processes that share a batch.
        self.ranks = Ranks()
        #: Whether an input gradient flows through the preprocessing.
        self.is_differentiable = bool(classifier.all_framework_preprocessing)
        clip = classifier.clip_values
        self.clip_values = (
            None
            if clip is None
            else tuple(torch.as_tensor(np.asarray(c, np.float32), device=self.device) for c in clip)
        )
        # ART's own wrapper of a plain network would keep every intermediate result of an `nn.Sequential`.
        is_plain = type(classifier._model).__module__ == PyTorchClassifier.__module__
        self._wrapped: nn.Module = classifier._model
        self._run: Callable[[torch.Tensor], torch.Tensor] = self.model if is_plain else lambda x: self._wrapped(x)[-1]
        self._compiled: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._amp = False

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

    def loss_on(self, y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """
        Give the classifier's own loss as a function of the inputs only, for an attack on the network's output.

        :param y: Labels, as in :meth:`loss`.
        :return: A function of inputs of shape (batch, *input_shape); it prepares the labels once, not at every call.
        """
        if not all(isinstance(operation, StandardisationMeanStdPyTorch) for operation in self._preprocessing()):
            return lambda x: self.loss(x, y)[0]  # it may change labels along with inputs
        labels = self.classifier.reduce_labels(self.one_hot(y))

        def loss(x: torch.Tensor) -> torch.Tensor:
            x, _ = self._preprocess(x, None, fit=False)
            value: torch.Tensor = self.classifier.loss(self._forward(x, whole=True), labels)
            return value

        return loss

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

    @contextmanager
    def accelerated(self, *, amp: bool, compile: bool, channels_last: bool) -> Iterator[None]:
        """
        Run the network faster in this context, with other rounding.

        :param amp: Compute what autocast lets compute in bfloat16 in it; logits come out in float32.
        :param compile: Run the whole-network passes of attacks through ``torch.compile``.
        :param channels_last: Store images and convolution weights with their channels last; on leaving they are stored
               as before.
        """
        formats = [(p, p.stride()) for p in self.model.parameters() if p.ndim == 4] if channels_last else []
        self._amp = amp
        self._compiled = torch.compile(self._run, dynamic=False) if compile else None
        try:
            for parameter, _ in formats:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            yield
        finally:
            self._amp, self._compiled = False, None
            for parameter, stride in formats:
                parameter.data = torch.empty_strided(
                    parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
                ).copy_(parameter.data)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Switch mixed precision off in this context."""
        amp, self._amp = self._amp, False
        try:
            yield
        finally:
            self._amp = amp

    def _forward(self, x: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._amp):
            if whole and self._compiled is not None:
                return self._compiled(x).float()
            with BatchNorms(self.ranks):
                output = self._run(x)
        return output.float() if self._amp else output

    def _preprocessing(self) -> list[object]:
        """Give ART's preprocessing without the standardisation by 0 and 1 that it has where nobody asked for one."""
        return [
            operation
            for operation in self.classifier.preprocessing_operations
            if not (
                isinstance(operation, StandardisationMeanStdPyTorch)
                and np.all(operation.mean == 0)
                and np.all(operation.std == 1)
            )
        ]

    def _preprocess(self, x: torch.Tensor, y: torch.Tensor | None, *, fit: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._preprocessing():
            return x.clone(), y  # type: ignore[return-value]  # a network may begin with an in-place operation
        if self.is_differentiable:
            return self.classifier._apply_preprocessing(x, y, fit=fit, no_grad=False)  # type: ignore[no-any-return]
        y_array = None if y is None else y.cpu().numpy()
        arrays = self.classifier._apply_preprocessing(x.detach().cpu().numpy(), y_array, fit=fit)
        x, y = (None if a is None else torch.as_tensor(a, device=self.device) for a in arrays)  # type: ignore[assignment]
        return x.float(), y  # type: ignore[return-value]
