"""ART's PyTorch classifier as functions of tensors: preprocessing, logits, loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from art.preprocessing.standardisation_mean_std.utils import broadcastable_mean_std
from torch import nn

from art_clat.config import LayerOptions, PerformanceOptions
from art_clat.layers.batch_norm import BatchNorms, Factors
from art_clat.layers.discovery import find_layers
from art_clat.layers.features import tell_samples_apart
from art_clat.layers.freezing import only_trainable
from art_clat.layers.layer import Layer
from art_clat.layers.recurrent import WithoutCudnn
from art_clat.models.outputs import check_network, check_output
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.processes import Ranks


class TensorClassifier:
    """
    An ART classifier as functions of tensors on its device: logits, losses and labels.

    :param estimator: A ``PyTorchClassifier``; its Hugging Face subclass too.
    :param performance: How forward passes are computed.
    :param ranks: The processes that share the batches. BatchNorms in training mode take their statistics over all of
           them.
    """

    def __init__(
        self,
        estimator: PyTorchClassifier,
        performance: PerformanceOptions = PerformanceOptions(),
        ranks: Ranks = Ranks(),
    ) -> None:
        self.estimator = estimator
        self.performance = performance
        self.ranks = ranks
        self.model: nn.Module = estimator.model
        self.device = torch.device(estimator.device)
        self.nb_classes = int(estimator.nb_classes)
        self._factors: Factors | None = None
        self._sharing = Ranks()
        # Norms of other libraries too: they call torch's function.
        self._has_norms = any(hasattr(module, "running_mean") for module in self.model.modules())
        self._recurrent = [module for module in self.model.modules() if isinstance(module, nn.RNNBase)]
        #: Whether an input gradient flows through the preprocessing.
        self.is_differentiable = bool(estimator.all_framework_preprocessing)
        clip = estimator.clip_values
        self.clip_values = (
            None
            if clip is None
            else tuple(torch.as_tensor(np.asarray(c, np.float32), device=self.device) for c in clip)
        )
        # A plain network runs without ART's wrapper, which keeps every intermediate result of an `nn.Sequential`.
        is_plain = type(estimator._model).__module__ == PyTorchClassifier.__module__
        self._wrapped: nn.Module = estimator._model
        self._run: Callable[[torch.Tensor], torch.Tensor] = self.model if is_plain else lambda x: self._wrapped(x)[-1]
        self._compiled: Callable[[torch.Tensor], torch.Tensor] | None = (
            torch.compile(self._run, dynamic=False) if performance.compile else None
        )
        # Whether the loss takes index labels. ART would convert one-hot labels to them, and wait for the device.
        indices = torch.arange(self.nb_classes, device=self.device)
        reduced = estimator.reduce_labels(self.one_hot(indices))
        self._takes_indices = reduced.dtype == indices.dtype and torch.equal(reduced, indices)
        self._standardisations: dict[tuple[bytes, bytes], list[torch.Tensor]] = {}

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """
        Compute the network's output, with the preprocessing that ART applies at prediction.

        :param x: Inputs before preprocessing, shape (batch, *input_shape).
        :return: Shape (batch, nb_classes).
        """
        x, _ = self._preprocess(x, None, fit=False)
        return self._forward(x)

    def loss(self, x: torch.Tensor, y: torch.Tensor, *, fit: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute the classifier's loss, and the logits it was computed from.

        :param x: Inputs before preprocessing, shape (batch, *input_shape).
        :param y: Index labels, shape (batch,), or class probabilities, shape (batch, nb_classes).
        :param fit: Apply the preprocessing of training instead of prediction.
        :return: The loss, with the classifier's reduction, and logits of shape (batch, nb_classes).
        """
        if self._only_standardises():
            x, labels = self._preprocess(x, None, fit=fit)[0], self._labels(y)
        else:
            x, y = self._preprocess(x, self.one_hot(y), fit=fit)
            labels = self.estimator.reduce_labels(y)
        logits = self._forward(x)
        loss: torch.Tensor = self.estimator.loss(logits, labels)
        return loss, logits

    def loss_on(self, y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """
        Return the classifier's loss as a function of the inputs, for an attack on the network's output.

        The labels are prepared once, not in every step.

        :param y: Index labels, shape (batch,), or class probabilities, shape (batch, nb_classes).
        :return: A function of inputs of shape (batch, *input_shape).
        """
        if not self._only_standardises():
            return lambda x: self.loss(x, y)[0]  # preprocessing may change labels too
        labels = self._labels(y)

        def loss(x: torch.Tensor) -> torch.Tensor:
            x, _ = self._preprocess(x, None, fit=False)
            value: torch.Tensor = self.estimator.loss(self._forward(x, whole=True), labels)
            return value

        return loss

    def one_hot(self, y: torch.Tensor) -> torch.Tensor:
        """
        Return labels as ART's methods expect them.

        :param y: Index labels, shape (batch,), or class probabilities, shape (batch, nb_classes).
        :return: Shape (batch, nb_classes), float32.
        """
        return y if y.ndim == 2 else nn.functional.one_hot(y, self.nb_classes).float()

    def find_layers(self, x: torch.Tensor, options: LayerOptions = LayerOptions()) -> list[Layer]:
        """
        Find the network's layers, in execution order.

        :param x: Inputs, shape (batch, *input_shape); only the first one is used.
        :param options: What counts as one layer.
        :return: The layers; with ``freeze_norms`` without their norms.
        :raises ValueError: If the network's layers cannot be followed, it does not return logits, or the granularity
                does not fit it.
        """
        check_network(self.model)
        one = x[:1].to(self.device)
        with evaluation_mode(self.model):
            self.check_output(one, mode="evaluation")
            layers = find_layers(
                self.model,
                lambda size: self.logits(one.expand(size, *one.shape[1:])),
                after_norm=options.after_norm,
                granularity=options.granularity,
            )
            layers = tell_samples_apart(layers, self.logits, one)
        if options.freeze_norms:
            layers = [replace(layer, modules=layer.modules[:1]) for layer in layers]
        return layers

    def check_output(self, x: torch.Tensor, *, mode: str) -> None:
        """
        Refuse a network that does not return logits, in the mode that it is in.

        :param x: Inputs before preprocessing, shape (batch, *input_shape); only the first one is used, twice.
        :param mode: ``"evaluation"`` or ``"training"``, for the message.
        :raises ValueError: If the output is no float32 tensor of shape (batch, nb_classes).
        """
        one = x[:1].to(self.device)
        amp = self.performance.amp
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=amp), self.recurrent_layers():
            two, _ = self._preprocess(one.expand(2, *one.shape[1:]), None, fit=False)
            check_output(self._run, two, self.nb_classes, mode=mode, dtype=None if amp else torch.float32)

    def in_float32(self) -> TensorClassifier:
        """Return this classifier without mixed precision; the network is shared."""
        if not self.performance.amp:
            return self
        other = copy.copy(self)
        other.performance = replace(self.performance, amp=False)
        return other

    def _forward(self, x: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.performance.amp), self.recurrent_layers():
            if whole and self._compiled is not None:
                return self._compiled(x).float()
            with self.batch_norms():
                output = self._run(x)
        return output.float() if self.performance.amp else output

    def batch_norms(self) -> AbstractContextManager[object]:
        """Return the context in which the BatchNorms of a forward pass are computed."""
        return BatchNorms(self._sharing, self._factors) if self._has_norms else nullcontext()

    def recurrent_layers(self) -> AbstractContextManager[object]:
        """
        Return the context in which the recurrent layers of a forward pass are computed.

        Evaluations, selection and the second stage take gradients in evaluation mode, in which cuDNN's recurrent layers
        have none.
        """
        in_evaluation = any(not module.training for module in self._recurrent)
        return WithoutCudnn() if in_evaluation and torch.is_grad_enabled() else nullcontext()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """
        Take BatchNorm statistics over all processes in this context.

        Each process must make the same forward passes in it. Attacks, selection and validation do not: a process may
        have no sample of a batch.
        """
        self._sharing = self.ranks
        try:
            yield
        finally:
            self._sharing = Ranks()

    @contextmanager
    def attacked(self) -> Iterator[None]:
        """Put the network in evaluation mode and freeze its weights in this context, as every attack needs it."""
        with evaluation_mode(self._wrapped), only_trainable(self.model, []):
            self._factors = {}
            try:
                yield
            finally:
                self._factors = None

    def _labels(self, y: torch.Tensor) -> torch.Tensor:
        """Return labels in the form that the loss takes."""
        if y.ndim == 1 and self._takes_indices:
            return y
        labels: torch.Tensor = self.estimator.reduce_labels(self.one_hot(y))
        return labels

    def _only_standardises(self) -> bool:
        operations = self.estimator.preprocessing_operations
        return all(isinstance(operation, StandardisationMeanStdPyTorch) for operation in operations)

    def _standardise(self, x: torch.Tensor, *, fit: bool) -> torch.Tensor:
        """Standardise as ART does, with the constants on the device, and never in place."""
        standard = x
        for operation in self.estimator.preprocessing_operations:
            applied = operation.apply_fit if fit else operation.apply_predict
            if not applied or (np.all(operation.mean == 0) and np.all(operation.std == 1)):
                continue  # ART's default: mean 0, deviation 1
            key = (operation.mean.tobytes(), operation.std.tobytes())
            if key not in self._standardisations:
                constants = broadcastable_mean_std(x, operation.mean, operation.std)
                self._standardisations[key] = [
                    torch.as_tensor(np.asarray(c, np.float32), device=x.device) for c in constants
                ]
            mean, std = self._standardisations[key]
            standard = (standard - mean) / std
        return x.clone() if standard is x else standard  # the network may begin with an in-place operation

    def _preprocess(self, x: torch.Tensor, y: torch.Tensor | None, *, fit: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if self._only_standardises():
            return self._standardise(x, fit=fit), y  # type: ignore[return-value]
        if self.is_differentiable:
            return self.estimator._apply_preprocessing(x, y, fit=fit, no_grad=False)  # type: ignore[no-any-return]
        y_array = None if y is None else y.cpu().numpy()
        arrays = self.estimator._apply_preprocessing(x.detach().cpu().numpy(), y_array, fit=fit)
        x, y = (None if a is None else torch.as_tensor(a, device=self.device) for a in arrays)  # type: ignore[assignment]
        return x.float(), y  # type: ignore[return-value]


@contextmanager
def channels_last(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Store convolution weights and their momentum with channels last in this context, and as before on leaving."""
    state = {} if optimizer is None else optimizer.state
    strides = [(p, p.stride()) for p in model.parameters() if p.ndim == 4]
    try:
        for parameter, _ in strides:
            _restride(parameter, state, torch.empty_like(parameter, memory_format=torch.channels_last).stride())
        yield
    finally:
        for parameter, stride in strides:
            _restride(parameter, state, stride)


def _restride(
    parameter: nn.Parameter, state: Mapping[torch.Tensor, dict[str, object]], stride: tuple[int, ...]
) -> None:
    """Change the memory format of a parameter, and of its optimiser state of the same shape."""

    def restrided(tensor: torch.Tensor) -> torch.Tensor:
        stored = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
        return stored.copy_(tensor)

    parameter.data = restrided(parameter.data)
    for key, value in state.get(parameter, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            state[parameter][key] = restrided(value)
