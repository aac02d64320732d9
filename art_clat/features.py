"""Taps on layers: see their features in a forward pass, and stop it after the last one needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from art_clat.layers import Layer, feature_tensor


class _LastFeatureSeen(Exception):
    """Ends a forward pass from within."""


@contextmanager
def tap(
    layers: Sequence[Layer], on_feature: Callable[[Layer, torch.Tensor], None], *, stop: bool = False
) -> Iterator[None]:
    """
    Show each layer's feature to a function in the forward pass that runs in this context.

    The function sees the tensor at the moment it is made: an in-place activation that overwrites it later does no
    harm to what was computed from it, but a function that keeps it must copy it.

    :param layers: The layers to tap.
    :param on_feature: Called with the layer and its feature, batch first; once for every call of the layer.
    :param stop: End the forward pass, and with it the context, once every layer has been seen.
    """
    left = sum(layer.calls for layer in layers)

    def hook_of(layer: Layer) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            nonlocal left
            feature = feature_tensor(output)
            if feature is None:
                raise RuntimeError(f"Layer {layer.name!r} returned no tensor.")
            on_feature(layer, feature.movedim(layer.batch_dim, 0))
            left -= 1
            if stop and left == 0:
                raise _LastFeatureSeen

        return hook

    handles = [layer.output.register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield
    except _LastFeatureSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()


class Features:
    """
    The features of a batch at some layers, and how far another forward pass is from them.

    :param layers: The layers.
    :param lengths: Whether the length of the features themselves is wanted too, see :meth:`relative_distance`.
    """

    def __init__(self, layers: Sequence[Layer], *, lengths: bool = False) -> None:
        self.layers = list(layers)
        self._wants_lengths = lengths
        self._clean_lengths: dict[Layer, list[torch.Tensor]] = {}
        self._kept: dict[Layer, list[torch.Tensor]] = {}
        self._distances: dict[Layer, list[torch.Tensor]] = {}

    @contextmanager
    def keep(self, *, stop: bool = False) -> Iterator[None]:
        """
        Keep the features of the forward pass in this context: ``F_i(x)``.

        :param stop: End the forward pass after the last layer.
        """
        self._kept = {layer: [] for layer in self.layers}

        def keep(layer: Layer, feature: torch.Tensor) -> None:
            self._kept[layer].append(feature.clone())

        with tap(self.layers, keep, stop=stop):
            yield

    @contextmanager
    def compare(self, *, stop: bool = False) -> Iterator[None]:
        """
        Measure the forward pass in this context against the kept features; `distance` has the result.

        :param stop: End the forward pass after the last layer.
        """
        self._begin()

        def compare(layer: Layer, feature: torch.Tensor) -> None:
            self._compare(layer, self._kept[layer][len(self._distances[layer])].float(), feature.float())

        with tap(self.layers, compare, stop=stop):
            yield

    @contextmanager
    def compare_halves(self, *, stop: bool = False) -> Iterator[None]:
        """
        Measure the second half of a batch against the first in one forward pass, with nothing kept.

        :param stop: End the forward pass after the last layer.
        """
        self._begin()

        def compare(layer: Layer, feature: torch.Tensor) -> None:
            self._compare(layer, *feature.float().chunk(2))

        with tap(self.layers, compare, stop=stop):
            yield

    def release(self) -> None:
        """Forget the kept features, whose memory the backward pass can use."""
        self._kept = {}

    def distance(self, layer: Layer, batch_size: int) -> torch.Tensor:
        """
        Give ``‖F_i(x+δ) − F_i(x)‖_2`` of every sample.

        :param layer: One of the layers.
        :param batch_size: Number of samples; a feature may have a multiple of it as its first dimension (windows).
        :return: Shape (`batch_size`,), float32.
        """
        return _joined(self._distances[layer], batch_size)

    def relative_distance(self, layer: Layer, batch_size: int) -> torch.Tensor:
        """
        Give ``‖F_i(x+δ) − F_i(x)‖_2 / ‖F_i(x)‖_2`` of every sample; 0 where the feature itself is 0.

        :param layer: One of the layers.
        :param batch_size: Number of samples.
        :return: Shape (`batch_size`,), float32.
        """
        length = _joined(self._clean_lengths[layer], batch_size)
        zero = length == 0
        return (self.distance(layer, batch_size) / length.masked_fill(zero, 1)).masked_fill(zero, 0)

    def total_distance(self, batch_size: int) -> torch.Tensor:
        """
        Give the summed distance of all layers, ``Σ_i ‖F_i(x+δ) − F_i(x)‖_2`` (the term inside eq. 5).

        :param batch_size: Number of samples.
        :return: Shape (`batch_size`,), float32.
        """
        return torch.stack([self.distance(layer, batch_size) for layer in self.layers]).sum(dim=0)

    def total_relative_distance(self, batch_size: int) -> torch.Tensor:
        """
        Give the summed relative distance of all layers.

        :param batch_size: Number of samples.
        :return: Shape (`batch_size`,), float32.
        """
        return torch.stack([self.relative_distance(layer, batch_size) for layer in self.layers]).sum(dim=0)

    def _begin(self) -> None:
        self._distances = {layer: [] for layer in self.layers}
        self._clean_lengths = {layer: [] for layer in self.layers}

    def _compare(self, layer: Layer, clean: torch.Tensor, perturbed: torch.Tensor) -> None:
        self._distances[layer].append(_lengths(perturbed - clean))
        if self._wants_lengths:
            self._clean_lengths[layer].append(_lengths(clean))


def _joined(lengths: Sequence[torch.Tensor], batch_size: int) -> torch.Tensor:
    """Give one length a sample where a layer ran several times, or has several rows a sample."""
    parts = torch.cat([part.reshape(batch_size, -1) for part in lengths], dim=1)
    return parts[:, 0] if parts.shape[1] == 1 else torch.linalg.vector_norm(parts, dim=1)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    """Give the Euclidean length of every sample, in whatever order its elements are stored."""
    lengths: torch.Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)))
    return lengths
